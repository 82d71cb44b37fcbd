//! Dialers: each keeps one connection of an attachment up, and serves the VMM on it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::Daemon;
use super::attachments::Kept;
use super::connections::Connected;
use super::exports::{Asker, Names};
use super::handshake;
use super::line::{Line, Socket};
use super::log::say;
use super::payload::Payload;
use super::registry::stale;
use super::relay;
use super::serve::{ServeError, Transmission};
use crate::clock::Clock;
use crate::report;
use crate::wire::nbd::negotiate::Exports;
use crate::wire::volumed::Attachment;

/// The shortest and the longest rest between two attempts.
const REST: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// A connection that lasted as long was a good one: the next attempt comes soon.
const GOOD: Duration = Duration::from_secs(1);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// Another attempt may succeed.
    #[error(transparent)]
    Later(#[from] ServeError),
    /// Something could not be connected to.
    #[error("connect to {to}")]
    Connect {
        /// What.
        to: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no use in trying again, in words.
    #[error("{0}")]
    ForGood(String),
}

/// Starts the dialers of an attachment.
pub(super) fn start(daemon: &Arc<Daemon>, kept: &Arc<Kept>) {
    for number in 0..kept.attachment.lines {
        let (daemon, attachment) = (Arc::clone(daemon), Arc::clone(kept));
        let dialer = std::thread::Builder::new().name(format!("dial-{number}"));
        if let Err(error) = dialer.spawn(move || keep_up(&daemon, &attachment)) {
            kept.trouble(&format!("start a thread: {error}"));
            say(format_args!("{}: start a thread: {error}", kept.attachment.socket.display()));
        }
    }
}

fn keep_up(daemon: &Arc<Daemon>, kept: &Kept) {
    let Attachment { socket, volume, .. } = &kept.attachment;
    let mut rest = REST.0;
    while !kept.ended() {
        let began = daemon.registry.clock.monotonic();
        let ended = match &kept.attachment.upstream {
            None => serve(daemon, kept),
            Some(upstream) => relay::relay(daemon, kept, upstream),
        };
        if kept.ended() {
            return;
        }
        if daemon.registry.clock.monotonic().since(began) >= GOOD {
            rest = REST.0;
        }
        match ended {
            Ok(()) => {}
            Err(error) => {
                let text = report::chain(&error);
                let for_good = matches!(error, DialError::ForGood(_));
                if kept.trouble(&text) {
                    let then = if for_good { "it is not tried again" } else { "it is tried again" };
                    say(format_args!("{} is not served with {volume}: {text}; {then}", socket.display()));
                }
                if for_good {
                    kept.give_up();
                    return;
                }
            }
        }
        if !kept.rest(rest) {
            return;
        }
        rest = (rest * 2).min(REST.1);
    }
}

/// Connects to the VMM, and serves it until the connection ends.
fn serve(daemon: &Arc<Daemon>, kept: &Kept) -> Result<(), DialError> {
    let attachment = &kept.attachment;
    let mut names = Names { registry: &daemon.registry, asker: Asker::Vmm(attachment) };
    // Looked at before anybody is bothered: a lease that ended does not come back.
    drop(names.open("").map_err(|_| gone(daemon, attachment))?);
    in_a_set(
        daemon,
        kept,
        |_| Ok(()),
        |socket, connected, (), had_requests| {
            let mut line = Line::new(socket, daemon.registry.clock).map_err(ServeError::Socket)?;
            let Some(agreed) = handshake::shake(&mut line, None, &mut names)? else { return Ok(()) };
            connected.bind(Some(&attachment.volume), Some(&attachment.lease));
            *had_requests = true;
            kept.connected();
            let payload = Payload::new(&daemon.stock);
            let peer = attachment.socket.display().to_string();
            let ended = Transmission::new(&mut line, payload, agreed, &peer).run();
            kept.disconnected();
            Ok(ended?)
        },
    )
}

/// Makes a connection that belongs to the present set of its attachment: `prepare` what is needed, connect to the VMM, and
/// `serve`, which says whether requests came. When one that had requests ends, the others of its set are ended, and none is
/// made anew before nothing of them is being carried out: what the VMM asks again there cannot be overtaken.
pub(super) fn in_a_set<P>(
    daemon: &Daemon,
    kept: &Kept,
    prepare: impl FnOnce(u64) -> Result<P, DialError>,
    serve: impl FnOnce(Socket, &Connected, P, &mut bool) -> Result<(), DialError>,
) -> Result<(), DialError> {
    let Some(set) = kept.set(daemon.registry.wall_ms()) else { return Ok(()) };
    let prepared = prepare(set)?;
    let socket = connect(&kept.attachment)?;
    let connection = socket.handle().map_err(ServeError::Socket)?;
    let path = &kept.attachment.socket;
    let Some(connected) = daemon.registry.connections.dialed(connection, path) else { return Ok(()) };
    if !kept.join(set) {
        return Ok(());
    }
    let mut had_requests = false;
    let ended = serve(socket, &connected, prepared, &mut had_requests);
    if kept.leave(had_requests) {
        daemon.registry.connections.hang_up(path);
    }
    ended
}

/// Connects to the VMM's slot.
fn connect(attachment: &Attachment) -> Result<Socket, DialError> {
    let to = || attachment.socket.display().to_string();
    let socket = UnixStream::connect(&attachment.socket);
    socket.map(Socket::Unix).map_err(|source| DialError::Connect { to: to(), source })
}

fn gone(daemon: &Daemon, attachment: &Attachment) -> DialError {
    let Attachment { volume, lease, epoch, .. } = attachment;
    let Ok(gate) = daemon.registry.gate_of(volume) else {
        return DialError::ForGood(format!("there is no volume {volume}"));
    };
    DialError::ForGood(gate.look(|book| match book.known() {
        Ok(leases) => stale(leases, lease, *epoch).to_string(),
        Err(damage) => damage.to_owned(),
    }))
}
