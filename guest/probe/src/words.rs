//! The command line: words, and options with a value each.

use std::collections::{HashMap, VecDeque};
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use hearth_guest_probe::frames::Mac;

use crate::ProbeError;

/// The port where nothing else is said.
pub(crate) const PORT: u16 = 7777;

/// What follows the program's name.
pub(crate) struct Words {
    plain: VecDeque<String>,
    options: HashMap<String, String>,
}

impl Words {
    pub(crate) fn new(mut words: impl Iterator<Item = String>) -> Self {
        let (mut plain, mut options) = (VecDeque::new(), HashMap::new());
        while let Some(word) = words.next() {
            match word.strip_prefix("--") {
                Some(name) => {
                    options.insert(name.to_owned(), words.next().unwrap_or_default());
                }
                None => plain.push_back(word),
            }
        }
        Self { plain, options }
    }

    /// The next word that is no option.
    pub(crate) fn next(&mut self) -> Option<String> {
        self.plain.pop_front()
    }

    /// The next word, which has to be there.
    pub(crate) fn need(&mut self, what: &str) -> Result<String, ProbeError> {
        self.next().ok_or_else(|| ProbeError::Words(format!("{what} is missing")))
    }

    /// An option's value, if it was given.
    pub(crate) fn option<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Option<T>, ProbeError> {
        let parse = |text: String| text.parse().map_err(|error| ProbeError::Words(format!("--{name} {text}: {error}")));
        self.options.remove(name).map(parse).transpose()
    }

    /// An option's value, which has to be there.
    pub(crate) fn option_needed<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<T, ProbeError> {
        self.option(name)?.ok_or_else(|| ProbeError::Words(format!("--{name} is missing")))
    }

    /// A hardware address.
    pub(crate) fn mac(&mut self, name: &str) -> Result<Mac, ProbeError> {
        let text: String = self.option_needed(name)?;
        parse_mac(&text).ok_or_else(|| ProbeError::Words(format!("--{name} {text}: no hardware address")))
    }

    /// Ends the command line: nothing may be left.
    pub(crate) fn end(mut self) -> Result<(), ProbeError> {
        let left = self.next().or_else(|| self.options.into_keys().next());
        left.map_or(Ok(()), |word| Err(ProbeError::Words(format!("what is {word}?"))))
    }
}

/// Six hexadecimal bytes between colons.
pub(crate) fn parse_mac(text: &str) -> Option<Mac> {
    let bytes: Option<Vec<u8>> = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

/// An address, of a certain interface if one is named, with a port.
pub(crate) fn socket_address(text: &str, port: u16) -> Result<SocketAddr, ProbeError> {
    let (address, interface) = text.split_once('%').map_or((text, None), |(address, name)| (address, Some(name)));
    let parsed: IpAddr = address.parse().map_err(|error| ProbeError::Words(format!("{address}: {error}")))?;
    Ok(match (parsed, interface) {
        (IpAddr::V6(address), Some(name)) => SocketAddrV6::new(address, port, 0, interface_index(name)?).into(),
        (address, _) => SocketAddr::new(address, port),
    })
}

fn interface_index(name: &str) -> Result<u32, ProbeError> {
    nix::net::if_::if_nametoindex(name).map_err(crate::failed("look up the interface"))
}
