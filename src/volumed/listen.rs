//! Where other hosts are served: at one address, as an agent asked, and from the next start on without being asked.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::log::say;
use super::{Daemon, accept};
use crate::report;
use crate::sys::{file, sock};
use crate::wire::volumed::Listening;

/// The file, in the daemon's own directory.
const FILE: &str = "listen.json";

/// The file's content.
#[derive(Debug, Serialize, Deserialize)]
struct Written {
    format: u32,
    address: SocketAddr,
}

/// The only version.
const FORMAT: u32 = 1;

/// The address, and who listens there.
#[derive(Debug)]
pub(super) struct Listener {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// As in the file: what other hosts were told.
    told: Option<SocketAddr>,
    /// Who listens now, where.
    socket: Option<(Arc<TcpListener>, SocketAddr)>,
}

fn read(path: &Path) -> io::Result<Option<SocketAddr>> {
    match std::fs::read(path) {
        Ok(bytes) => {
            let written: Written = serde_json::from_slice(&bytes)?;
            if written.format == FORMAT { Ok(Some(written.address)) } else { Err(ErrorKind::InvalidData.into()) }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Listener {
    /// Reads where it was; listens nowhere yet.
    pub(super) fn open(directory: &Path) -> Self {
        let path = directory.join(FILE);
        let told = read(&path).unwrap_or_else(|error| {
            let text = report::chain(&error);
            say(format_args!("{}: {text}; other hosts are served when an agent asks for it", path.display()));
            None
        });
        Self { path, state: Mutex::new(State { told, socket: None }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bind(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let socket = sock::listen_tcp(address, None)?;
    socket.set_nonblocking(false)?;
    let at = socket.local_addr()?;
    Ok((socket, at))
}

/// Whether who asks for an address, port 0 for any port, has it with this one.
fn is_it(at: SocketAddr, asked: SocketAddr) -> bool {
    at.ip() == asked.ip() && (asked.port() == 0 || asked.port() == at.port())
}

impl Daemon {
    /// Where other hosts are served.
    pub(super) fn listening(&self) -> Option<Listening> {
        self.listener.state().socket.as_ref().map(|(_, address)| self.told(*address))
    }

    fn told(&self, address: SocketAddr) -> Listening {
        Listening { address, certificate_sha256: self.identity.sha256.clone() }
    }

    /// Serves other hosts where an earlier daemon did, if one did: they try again there.
    pub(super) fn listen_again(self: &Arc<Self>) {
        let told = self.listener.state().told;
        if let Some(address) = told
            && let Err(error) = self.listen(address)
        {
            let text = report::chain(&error);
            say(format_args!("other hosts are not served at {address} until an agent asks for it again: {text}"));
        }
    }

    /// Serves other hosts at an address, and at no other. When this returns, the next start does as well.
    pub(super) fn listen(self: &Arc<Self>, address: SocketAddr) -> io::Result<Listening> {
        let mut state = self.listener.state();
        if let Some((_, at)) = state.socket.as_ref().filter(|(_, at)| is_it(*at, address)) {
            return Ok(self.told(*at));
        }
        // Of all ports that are free, the one that others know.
        let known = state.told.filter(|told| is_it(*told, address)).and_then(|told| bind(told).ok());
        let (socket, at) = known.map_or_else(|| bind(address), Ok)?;
        if state.told != Some(at) {
            let written = serde_json::to_vec(&Written { format: FORMAT, address: at })?;
            file::replace(&self.listener.path, &written)?;
            state.told = Some(at);
        }
        let socket = Arc::new(socket);
        let (daemon, shared) = (Arc::clone(self), Arc::clone(&socket));
        std::thread::Builder::new().name("tcp".to_owned()).spawn(move || accept::accept_remote(&daemon, &shared))?;
        if let Some((before, at)) = state.socket.replace((socket, at)) {
            say(format_args!("other hosts are no longer served at {at}"));
            sock::stop_listening(&before)?;
        }
        say(format_args!("other hosts are served at {at}"));
        Ok(self.told(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_read_again_and_damage_is_no_address() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Listener::open(dir.path()).state().told, None);
        let path = dir.path().join(FILE);
        let address: SocketAddr = "[::1]:4711".parse().unwrap();
        file::replace(&path, &serde_json::to_vec(&Written { format: FORMAT, address }).unwrap()).unwrap();
        assert_eq!(Listener::open(dir.path()).state().told, Some(address));
        for damaged in [&b"{"[..], br#"{"format":2,"address":"[::1]:1"}"#, br#"{"format":1,"address":"here"}"#] {
            file::replace(&path, damaged).unwrap();
            assert_eq!(Listener::open(dir.path()).state().told, None);
        }
        let of = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert!(is_it(address, of("[::1]:0")) && is_it(address, address));
        assert!(!is_it(address, of("[::1]:4712")) && !is_it(address, of("[::2]:0")));
    }
}
