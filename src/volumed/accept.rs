//! Who connects to this daemon to use a volume: standard clients of this host, and daemons of others.

use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use super::Daemon;
use super::connections::{ACCEPTED_MAX, Connected};
use super::exports::{Asker, Names};
use super::handshake;
use super::line::{Line, Socket};
use super::log::say;
use super::payload::Payload;
use super::registry::Bound;
use super::serve::{ServeError, Transmission};
use super::stop::Stop;
use crate::clock::Clock;
use crate::report;
use crate::sys::sock;

/// How long accepting rests when the host has no descriptor or memory for another socket.
const REST: Duration = Duration::from_millis(200);

/// Accepts clients of this host, for as long as the process lives.
pub(super) fn accept_local(daemon: &Arc<Daemon>, listener: &UnixListener) {
    loop {
        match listener.accept() {
            Ok((socket, _)) => begin(daemon, Socket::Unix(socket), "nbd.sock".to_owned()),
            Err(error) if accept_failed(&daemon.stop, "nbd.sock", &error) => {}
            Err(_) => return,
        }
    }
}

/// Accepts daemons of other hosts, until the listener is stopped.
pub(super) fn accept_remote(daemon: &Arc<Daemon>, listener: &TcpListener) {
    loop {
        match listener.accept() {
            Ok((socket, from)) => match sock::notice_silence(&socket) {
                Ok(()) => begin(daemon, Socket::Tcp(socket), from.to_string()),
                Err(error) => say(format_args!("{from}: set the socket up: {error}")),
            },
            // What a listener says that was stopped.
            Err(error) if error.kind() == ErrorKind::InvalidInput => return,
            Err(error) if accept_failed(&daemon.stop, "the TCP socket", &error) => {}
            Err(_) => return,
        }
    }
}

/// After a failure to accept: whether to go on.
pub(super) fn accept_failed(stop: &Stop, what: &str, error: &io::Error) -> bool {
    // The client hung up already, say.
    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) {
        return true;
    }
    say(format_args!("{what}: accept: {error}"));
    !stop.is_near_within(REST)
}

/// Gives a connection its thread.
fn begin(daemon: &Arc<Daemon>, socket: Socket, peer: String) {
    let Ok(handle) = socket.handle() else { return };
    // Who comes as one too many hears that it is hung up on.
    let Some(connected) = daemon.registry.connections.accepted(handle) else {
        let text = format_args!("{peer}: a connection is one too many, of {ACCEPTED_MAX} in all");
        daemon.noise.say(daemon.registry.clock.monotonic(), text);
        return;
    };
    let shared = Arc::clone(daemon);
    let thread = std::thread::Builder::new().name("client".to_owned()).spawn(move || {
        if let Err(error) = serve(&shared, socket, &connected, &peer) {
            let now = shared.registry.clock.monotonic();
            shared.noise.say(now, format_args!("{peer}: {}", report::chain(&error)));
        }
    });
    if let Err(error) = thread {
        say(format_args!("a connection has no thread: {error}"));
    }
}

fn serve(daemon: &Daemon, socket: Socket, connected: &Connected, peer: &str) -> Result<(), ServeError> {
    let remote = matches!(socket, Socket::Tcp(_));
    let mut line = Line::new(socket, daemon.registry.clock)?;
    let asker = if remote { Asker::Remote } else { Asker::Local };
    let tls = remote.then_some(&daemon.identity.server);
    let mut names = Names { registry: &daemon.registry, asker };
    let Some(agreed) = handshake::shake(&mut line, tls, &mut names)? else { return Ok(()) };
    let lease = match &agreed.bound {
        Bound::Leased { lease, .. } => Some(lease.clone()),
        Bound::Looked { .. } | Bound::Snapshot(_) => None,
    };
    connected.bind(agreed.bound.volume().map(|volume| volume.id()), lease.as_ref());
    Transmission::new(&mut line, Payload::new(&daemon.stock), agreed, peer).run()
}
