//! The control socket: an agent's connections, each with a thread of its own, so that what takes long keeps only its own
//! waiting.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::Daemon;
use super::answer::answer;
use super::line::{Line, Socket};
use super::log::say;
use crate::clock::{Clock, Monotonic};
use crate::report;
use crate::wire::volumed::{Answer, Ask, FrameError, Hello, Refusal, VERSION, Welcome, body_bytes, decode, encode};

/// Most connections of agents: one agent has a few, and two are there while one follows another.
const CONNECTIONS_MAX: usize = 64;

/// How long a first frame may take.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Why a connection of an agent ended other than by hanging up.
#[derive(Debug, thiserror::Error)]
enum ControlError {
    #[error("the connection broke")]
    Socket(#[from] io::Error),
    #[error("what came is no question")]
    Frame(#[from] FrameError),
}

/// Accepts agents, for as long as the process lives.
pub(super) fn accept(daemon: &Arc<Daemon>, listener: &UnixListener) {
    let count = Arc::new(AtomicUsize::new(0));
    loop {
        let socket = match listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) => {
                if super::accept_failed(&daemon.stop, "control.sock", &error) {
                    continue;
                }
                return;
            }
        };
        // Who comes as one too many hears that it is hung up on.
        if count.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            say(format_args!("an agent's connection is one too many: {CONNECTIONS_MAX} are there"));
            continue;
        }
        let (daemon, held) = (Arc::clone(daemon), Held::new(&count));
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            if let Err(error) = serve(&daemon, socket) {
                say(format_args!("an agent's connection ended: {}", report::chain(&error)));
            }
            drop(held);
        });
        if let Err(error) = thread {
            say(format_args!("an agent's connection has no thread: {error}"));
        }
    }
}

/// Counts a connection for as long as it is there.
struct Held(Arc<AtomicUsize>);

impl Held {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn serve(daemon: &Arc<Daemon>, socket: UnixStream) -> Result<(), ControlError> {
    let handle = socket.try_clone()?;
    let mut line = Line::new(Socket::Unix(socket), daemon.registry.clock)?;
    let Some(Hello { version: _ }) = read(&mut line, Some(HELLO_PATIENCE))? else { return Ok(()) };
    let welcome = Welcome {
        version: VERSION,
        pid: std::process::id(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        listening: daemon.listening(),
    };
    line.write(&encode(&welcome)?)?;
    while let Some(asked) = read_ask(&mut line)? {
        let mut progress = Teller { socket: &handle, daemon, told: daemon.registry.clock.monotonic() };
        let answer = match asked {
            Ok(ask) => answer(daemon, ask, &mut progress),
            Err(Refusal::Unknown) => Answer::Refused { refusal: Refusal::Unknown },
            Err(refusal) => Answer::Refused { refusal },
        };
        let bytes = match encode(&answer) {
            Ok(bytes) => bytes,
            Err(error) => {
                let text = format!("the answer is too long: {}", report::chain(&error));
                encode(&Answer::Refused { refusal: Refusal::Failed { text } })?
            }
        };
        line.write(&bytes)?;
        daemon.stop.end_if_asked();
    }
    Ok(())
}

fn read_body(line: &mut Line, patience: Option<Duration>) -> Result<Option<Vec<u8>>, ControlError> {
    let mut head = [0; 4];
    let deadline = patience.map(|patience| line.within(patience));
    if !line.read_message(&mut head, deadline)? {
        return Ok(None);
    }
    let mut body = vec![0; body_bytes(head)?];
    let deadline = line.within(super::line::MESSAGE_PATIENCE);
    line.read_all(&mut body, deadline)?;
    Ok(Some(body))
}

fn read<M: for<'de> Deserialize<'de> + Serialize>(
    line: &mut Line,
    patience: Option<Duration>,
) -> Result<Option<M>, ControlError> {
    let Some(body) = read_body(line, patience)? else { return Ok(None) };
    Ok(Some(decode(&body)?))
}

/// A question; one that is not known here is answered, as an agent of a later version may ask it.
fn read_ask(line: &mut Line) -> Result<Option<Result<Ask, Refusal>>, ControlError> {
    let Some(body) = read_body(line, None)? else { return Ok(None) };
    Ok(Some(decode(&body).map_err(|_| Refusal::Unknown)))
}

/// Tells an agent how far long work is, and notices when it hangs up.
#[derive(Debug)]
pub(super) struct Teller<'a> {
    socket: &'a UnixStream,
    daemon: &'a Arc<Daemon>,
    told: Monotonic,
}

impl Teller<'_> {
    /// Whether the work goes on.
    pub(super) fn progress(&mut self, done: u64, total: u64) -> bool {
        let now = self.daemon.registry.clock.monotonic();
        if now.since(self.told) < PROGRESS_EVERY {
            return true;
        }
        self.told = now;
        let Ok(frame) = encode(&Answer::Progress { done, total }) else { return true };
        !self.daemon.stop.is_near() && !self.has_hung_up() && self.socket.write_all(&frame).is_ok()
    }

    fn has_hung_up(&self) -> bool {
        // These are told unasked.
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        let ended = PollFlags::POLLHUP | PollFlags::POLLERR;
        let asked = poll(&mut fds, PollTimeout::ZERO).is_ok();
        asked && fds[0].revents().is_some_and(|happened| happened.intersects(ended))
    }
}
