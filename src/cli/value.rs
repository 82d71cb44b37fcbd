//! Single words: names, references, durations, disks, `NAME=value`.

use std::path::PathBuf;
use std::str::FromStr;

use crate::api::types::{EgressProtocol, EgressRule, NAME_BYTES_MAX, PortProtocol, PublishedPort};

/// Longest idempotency key in bytes.
const KEY_BYTES_MAX: usize = 128;

/// A word that is not what it has to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// Not a name.
    #[error("a name is 1 to {NAME_BYTES_MAX} of a-z, 0-9 and `-`, starts with a letter and does not end with `-`")]
    Name,
    /// Not an id, prefix of an id, or name.
    #[error("an id or name is 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_` and `.`")]
    Reference,
    /// Not an idempotency key.
    #[error("a key is 1 to {KEY_BYTES_MAX} visible ASCII characters")]
    Key,
    /// Not a duration.
    #[error("a duration is a number of seconds, or a number with ms, s, m or h behind it, up to 49 days")]
    Duration,
    /// Not `NAME=value`.
    #[error("expected NAME=value")]
    Variable,
    /// Not a rate.
    #[error("expected RATE or RATE/BURST, numbers with k, M or G behind them for thousands, millions and billions")]
    Rate,
    /// Less than a second, or not a duration.
    #[error("a time to live is a number of seconds, or a number with s, m or h behind it: at least 1s, up to 49 days")]
    Seconds,
    /// Not a session's network id.
    #[error("a network id is a number from 1 to 4294967294, decimal or 0x and hexadecimal digits")]
    SessionNumber,
    /// Not something to reach.
    #[error("{text:?}: expected NETWORK[:PORT[-PORT]][/tcp|udp|icmp], such as 192.0.2.0/24:443 or ::/0:53/udp")]
    Egress {
        /// What was given.
        text: String,
    },
    /// Not ports.
    #[error("expected HOSTPORT:GUESTPORT, with /udp behind it for UDP: 8080:80, 5353:53/udp")]
    Port,
    /// No path.
    #[error("expected FILE, FILE:ro or FILE:shared")]
    Disk,
    /// No path, or no name behind it.
    #[error("expected DIR or DIR:NAME")]
    Layout,
}

/// A VM, image or operation by id, unique prefix of an id, or name. Safe to put into a path as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceWord(String);

impl ReferenceWord {
    /// The word.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ReferenceWord {
    type Err = WordError;
    fn from_str(text: &str) -> Result<Self, WordError> {
        let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
        let dots = text.bytes().all(|byte| byte == b'.');
        if plain && !dots && (1..=NAME_BYTES_MAX).contains(&text.len()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(WordError::Reference)
        }
    }
}

/// A disk: `FILE`, with `:ro` behind it to refuse the guest's writes, and `:shared` if other hosts see the same file there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskWord {
    /// The file, as given.
    pub path: PathBuf,
    /// Refuse writes.
    pub read_only: bool,
    /// Other hosts see the same file at this path.
    pub shared: bool,
}

impl FromStr for DiskWord {
    type Err = WordError;
    fn from_str(text: &str) -> Result<Self, WordError> {
        let (mut path, mut read_only, mut shared) = (text, false, false);
        loop {
            if let Some(rest) = path.strip_suffix(":ro").filter(|_| !read_only) {
                (path, read_only) = (rest, true);
            } else if let Some(rest) = path.strip_suffix(":shared").filter(|_| !shared) {
                (path, shared) = (rest, true);
            } else {
                break;
            }
        }
        if path.is_empty() { Err(WordError::Disk) } else { Ok(Self { path: PathBuf::from(path), read_only, shared }) }
    }
}

/// A volume for a VM: `VOLUME`, with `:ro` behind it to refuse the guest's writes, and `:/DIR` to have it mounted there;
/// `:/` has the guest's root on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeWord {
    /// Which.
    pub volume: ReferenceWord,
    /// Refuse writes.
    pub read_only: bool,
    /// Where the guest is to mount it.
    pub mount: Option<String>,
}

impl FromStr for VolumeWord {
    type Err = WordError;
    fn from_str(text: &str) -> Result<Self, WordError> {
        let (text, mount) = match text.split_once(":/") {
            Some((text, directory)) => (text, Some(format!("/{directory}"))),
            None => (text, None),
        };
        let (volume, read_only) = match text.strip_suffix(":ro") {
            Some(volume) => (volume, true),
            None => (text, false),
        };
        Ok(Self { volume: volume.parse()?, read_only, mount })
    }
}

/// A limit: `RATE` per second, or `RATE/BURST` with how much passes at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateWord {
    /// Units per second.
    pub per_s: u64,
    /// Units at once, if it was given.
    pub burst: Option<u64>,
}

impl FromStr for RateWord {
    type Err = WordError;
    fn from_str(text: &str) -> Result<Self, WordError> {
        let (rate, burst) = match text.split_once('/') {
            Some((rate, burst)) => (rate, Some(number(burst)?)),
            None => (text, None),
        };
        Ok(Self { per_s: number(rate)?, burst })
    }
}

/// A whole number, with `k`, `M` or `G` for thousands, millions and billions: decimal, as networks are measured.
pub(super) fn number(text: &str) -> Result<u64, WordError> {
    let digits = text.trim_end_matches(['k', 'M', 'G']);
    let unit = match &text[digits.len()..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        _ => return Err(WordError::Rate),
    };
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = if plain { digits.parse::<u64>().ok() } else { None };
    number.and_then(|number| number.checked_mul(unit)).ok_or(WordError::Rate)
}

/// A published port: `HOSTPORT:GUESTPORT[/PROTOCOL]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortWord(PublishedPort);

impl PortWord {
    /// The port, as the API takes it.
    pub const fn port(&self) -> PublishedPort {
        self.0
    }
}

impl FromStr for PortWord {
    type Err = WordError;
    fn from_str(text: &str) -> Result<Self, WordError> {
        let (pair, protocol) = match text.split_once('/').unwrap_or((text, "tcp")) {
            (pair, "tcp") => (pair, PortProtocol::Tcp),
            (pair, "udp") => (pair, PortProtocol::Udp),
            (_, _) => return Err(WordError::Port),
        };
        let (host, guest) = pair.split_once(':').ok_or(WordError::Port)?;
        let one = |text: &str| ports(text).filter(|(from, to)| from == to).map(|(from, _)| from).ok_or(WordError::Port);
        Ok(Self(PublishedPort { protocol, host_port: one(host)?, guest_port: one(guest)? }))
    }
}

/// What may be reached outside: `NETWORK[:PORT[-PORT]][/PROTOCOL]`. The agent checks the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressWord(EgressRule);

impl EgressWord {
    /// The rule, as the API takes it.
    pub fn rule(&self) -> EgressRule {
        self.0.clone()
    }
}

impl FromStr for EgressWord {
    type Err = WordError;
    fn from_str(text: &str) -> Result<Self, WordError> {
        let wrong = || WordError::Egress { text: text.to_owned() };
        // The network's own slash comes first; only behind it are colons no part of an IPv6 address.
        let (address, rest) = text.split_once('/').ok_or_else(wrong)?;
        let (rest, protocol) = match rest.split_once('/') {
            Some((rest, word)) => (rest, Some(protocol(word).ok_or_else(wrong)?)),
            None => (rest, None),
        };
        let (bits, ports) = match rest.split_once(':') {
            Some((bits, range)) => (bits, Some(ports(range).ok_or_else(wrong)?)),
            None => (rest, None),
        };
        let has_network = !address.is_empty() && !bits.is_empty() && bits.bytes().all(|byte| byte.is_ascii_digit());
        let protocol = match (protocol, ports) {
            (None, Some(_)) => EgressProtocol::Tcp,
            (None, None) => EgressProtocol::Any,
            (Some(EgressProtocol::Icmp), Some(_)) => return Err(wrong()),
            (Some(protocol), _) => protocol,
        };
        if !has_network {
            return Err(wrong());
        }
        Ok(Self(EgressRule { cidr: format!("{address}/{bits}"), protocol, ports }))
    }
}

fn protocol(word: &str) -> Option<EgressProtocol> {
    match word {
        "tcp" => Some(EgressProtocol::Tcp),
        "udp" => Some(EgressProtocol::Udp),
        "icmp" => Some(EgressProtocol::Icmp),
        _ => None,
    }
}

/// `443` or `8000-8100`.
fn ports(text: &str) -> Option<(u16, u16)> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0 && !text.starts_with('+'));
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    let (from, to) = (port(from)?, port(to)?);
    (from <= to).then_some((from, to))
}

/// A session's network id, decimal or hexadecimal.
pub(super) fn session_number(text: &str) -> Result<u32, WordError> {
    let number = match text.strip_prefix("0x") {
        Some(digits) if !digits.starts_with('+') => u32::from_str_radix(digits, 16),
        _ if text.starts_with('+') => return Err(WordError::SessionNumber),
        _ => text.parse(),
    };
    // Which numbers between are reserved is the agent's to say.
    number.ok().filter(|number| *number != 0 && *number != u32::MAX).ok_or(WordError::SessionNumber)
}

/// Whole seconds from what [`duration_ms`] reads; a part of a second counts as one.
pub(super) fn seconds(text: &str) -> Result<u32, WordError> {
    match duration_ms(text) {
        Ok(0) | Err(_) => Err(WordError::Seconds),
        Ok(ms) => Ok(ms.div_ceil(1000)),
    }
}

/// A new name of a VM or image: a DNS label that starts with a letter.
pub(super) fn name(text: &str) -> Result<String, WordError> {
    let plain = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    let starts = text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    if plain && starts && !text.ends_with('-') && text.len() <= NAME_BYTES_MAX {
        Ok(text.to_owned())
    } else {
        Err(WordError::Name)
    }
}

/// An idempotency key: it becomes a header's value.
pub(super) fn key(text: &str) -> Result<String, WordError> {
    let visible = text.bytes().all(|byte| byte.is_ascii_graphic());
    if visible && (1..=KEY_BYTES_MAX).contains(&text.len()) { Ok(text.to_owned()) } else { Err(WordError::Key) }
}

/// `NAME=value` for an environment.
pub(super) fn variable(text: &str) -> Result<String, WordError> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() && !text.contains('\0') => Ok(text.to_owned()),
        Some(_) | None => Err(WordError::Variable),
    }
}

/// Milliseconds from `30`, `1.5s`, `200ms`, `5m`, `1h`.
pub(super) fn duration_ms(text: &str) -> Result<u32, WordError> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match &text[digits.len()..] {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        _ => return Err(WordError::Duration),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    let all_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || fraction.len() > 3 {
        return Err(WordError::Duration);
    }
    let thousandths: u64 = format!("{fraction:0<3}").parse().map_err(|_| WordError::Duration)?;
    let whole: u64 = whole.parse().map_err(|_| WordError::Duration)?;
    let ms = whole.checked_mul(unit_ms).and_then(|ms| ms.checked_add(thousandths * unit_ms / 1000));
    ms.and_then(|ms| u32::try_from(ms).ok()).ok_or(WordError::Duration)
}

/// An OCI layout's directory and which of its images: `DIR` or `DIR:NAME`. A directory with a `:` in its own name has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutWord {
    /// The directory.
    pub directory: PathBuf,
    /// A reference name or digest.
    pub name: Option<String>,
}

impl FromStr for LayoutWord {
    type Err = WordError;

    fn from_str(text: &str) -> Result<Self, WordError> {
        let (directory, name) = match text.split_once(':') {
            Some((directory, name)) => (directory, Some(name)),
            None => (text, None),
        };
        if directory.is_empty() || name == Some("") {
            return Err(WordError::Layout);
        }
        Ok(Self { directory: directory.into(), name: name.map(str::to_owned) })
    }
}
