//! Floor 3: the process that has the volumes of a host.
//!
//! One `hearth volumed` owns a store's directory. It serves volumes over the NBD protocol, to the VMMs that it dials
//! ([`dial`]), to standard clients of this host (`nbd.sock`) and to the daemons of other hosts, in TLS; it says who may
//! write ([`registry`], [`gate`], [`leases`]), and it is asked by agents (`control.sock`). It needs no agent to go on, and
//! whatever ends it, the next one goes on with the same volumes, leases and attachments.
//!
//! Every connection has a thread of its own, which blocks. What one client does, or does not do, costs that thread and a
//! bounded piece of memory ([`payload`]), and nobody else anything.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use crate::clock::SystemClock;
use crate::report;
use crate::sys::landlock::{ConfineError, write_below_only};
use crate::sys::{file, host, jail};
use crate::volume::{Largest, Options, Store, VolumeError};
use crate::wire::volumed::StartMessage;

mod accept;
mod answer;
mod attachments;
mod connections;
mod control;
mod dial;
mod exports;
mod gate;
mod handshake;
mod leases;
mod line;
mod listen;
mod log;
mod payload;
mod record;
mod registry;
mod relay;
mod serve;
mod sets;
mod stop;
mod tls;

use accept::accept_failed;
use attachments::Attachments;
use listen::Listener;
use log::{Seldom, say};
use payload::Stock;
use registry::Registry;
use stop::Stop;
use tls::Identity;

/// Longest start message in bytes.
const START_MESSAGE_BYTES_MAX: u64 = 64 * 1024;

/// The lock of the runtime directory.
const LOCK: &str = "volumed.lock";

/// How often leases whose time is over are looked for.
const EXPIRE_EVERY: Duration = Duration::from_millis(500);

/// How long connections are waited for at the end.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Why the daemon could not start or end in order.
#[derive(Debug, thiserror::Error)]
pub enum VolumedError {
    /// The start message is not one.
    #[error("read the start message, JSON on standard input")]
    StartMessage(#[source] io::Error),
    /// Another one is there.
    #[error("another volume daemon runs in {}", runtime.display())]
    Running {
        /// The directory of its sockets.
        runtime: PathBuf,
    },
    /// The system refused something.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The store does not open, or could not be flushed.
    #[error(transparent)]
    Store(#[from] VolumeError),
    /// There is no certificate.
    #[error("make a certificate")]
    Tls(#[source] io::Error),
    /// What it may reach is not confined.
    #[error("confine the process")]
    Confine(#[source] ConfineError),
    /// It has more powers than it needs.
    #[error("give up root's powers")]
    Powers(#[source] jail::EnterJailError),
}

/// What the threads share.
#[derive(Debug)]
struct Daemon {
    registry: Registry,
    attachments: Attachments,
    stock: Stock,
    stop: Stop,
    /// What clients have the log say.
    noise: Seldom,
    identity: Identity,
    listener: Listener,
}

/// Runs the daemon until it is told to end.
pub fn run() -> Result<(), VolumedError> {
    let start = read_start()?;
    // Before there is a second thread, so that all inherit it.
    let signals = ending_signals();
    signals.thread_block().map_err(|error| VolumedError::StartMessage(error.into()))?;
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |source| VolumedError::Io { what, path, source }
    };
    file::make_directories(&start.runtime).map_err(io("make", &start.runtime))?;
    let lock = file::try_lock(&start.runtime.join(LOCK)).map_err(io("lock", &start.runtime))?;
    let Some(_lock) = lock else { return Err(VolumedError::Running { runtime: start.runtime }) };
    file::make_directories(&start.store).map_err(io("make", &start.store))?;
    let recorder = match &start.record {
        Some(path) => Some(record::FileRecorder::create(path).map_err(io("record to", path))?),
        None => None,
    };
    host::raise_descriptors().map_err(io("raise the bound of descriptors of", &start.runtime))?;
    jail::keep_access_to_files().map_err(VolumedError::Powers)?;
    let confined = write_below_only(&[&start.store, &start.runtime]).map_err(VolumedError::Confine)?;
    say(format_args!("confined to {} and {}: {confined}", start.store.display(), start.runtime.display()));

    let daemon = open(&start, recorder)?;
    daemon.0.listen_again();
    // Who finds the control socket answered finds the other one as well.
    let nbd = bind(&start.runtime, "nbd.sock")?;
    let control = bind(&start.runtime, "control.sock")?;
    let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        thread.map(drop).map_err(io("start a thread for", Path::new(name)))
    };
    let of = || Arc::clone(&daemon.0);
    let shared = of();
    spawn("signals", Box::new(move || wait_for_signal(&shared, signals)))?;
    let shared = of();
    spawn("expire", Box::new(move || expire(&shared)))?;
    let shared = of();
    spawn("nbd.sock", Box::new(move || accept::accept_local(&shared, &nbd)))?;
    let shared = of();
    spawn("control.sock", Box::new(move || control::accept(&shared, &control)))?;
    for kept in &daemon.1 {
        dial::start(&daemon.0, kept);
    }
    say(format_args!(
        "serves {} volumes of {}, {} attachments",
        daemon.0.registry.all_gates().len(),
        start.store.display(),
        daemon.1.len()
    ));
    daemon.0.stop.wait();
    end(&daemon.0)
}

fn read_start() -> Result<StartMessage, VolumedError> {
    let mut message = Vec::new();
    let mut input = io::stdin().lock().take(START_MESSAGE_BYTES_MAX);
    input.read_to_end(&mut message).map_err(VolumedError::StartMessage)?;
    let start: StartMessage =
        serde_json::from_slice(&message).map_err(|error| VolumedError::StartMessage(error.into()))?;
    if start.store.is_absolute() && start.runtime.is_absolute() {
        return Ok(start);
    }
    Err(VolumedError::StartMessage(io::Error::other("its directories are not absolute paths")))
}

fn open(
    start: &StartMessage,
    recorder: Option<Arc<record::FileRecorder>>,
) -> Result<(Arc<Daemon>, Vec<Arc<attachments::Kept>>), VolumedError> {
    let boot = Path::new("/proc/sys/kernel/random/boot_id");
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |source| VolumedError::Io { what, path, source }
    };
    let boot_id = std::fs::read_to_string(boot).map_err(io("read", boot))?;
    let options = Options {
        quota_bytes: start.quota_bytes,
        reserve_bytes: start.reserve_bytes,
        largest: Largest::FileSystem,
        recorder: recorder.map(|recorder| -> Arc<dyn crate::volume::Recorder> { recorder }),
        ..Options::new(boot_id.trim())
    };
    let registry = Registry::new(Store::open(&start.store, &options)?, SystemClock::new())?;
    let attachments = Attachments::open(&start.runtime);
    let (attachments, to_dial) = attachments.map_err(io("read the attachments in", &start.runtime))?;
    let identity = Identity::kept_in(&start.runtime);
    let identity = identity.map_err(|error| VolumedError::Tls(io::Error::other(report::chain(&error))))?;
    let daemon = Daemon {
        registry,
        attachments,
        stock: Stock::new(),
        stop: Stop::default(),
        noise: Seldom::default(),
        identity,
        listener: Listener::open(&start.runtime),
    };
    Ok((Arc::new(daemon), to_dial))
}

/// Binds a socket for this user only. What an earlier daemon left of that name is removed: the lock says it is gone.
fn bind(runtime: &Path, name: &str) -> Result<UnixListener, VolumedError> {
    let path = runtime.join(name);
    let bound = match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => UnixListener::bind(&path),
    };
    // Until the mode is set, the directory keeps others out.
    let bound = bound.and_then(|listener| {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(file::FILE_MODE))?;
        Ok(listener)
    });
    bound.map_err(|source| VolumedError::Io { what: "listen at", path, source })
}

fn ending_signals() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals
}

fn wait_for_signal(daemon: &Daemon, signals: SigSet) {
    while let Err(error) = signals.wait() {
        if error != nix::Error::EINTR {
            return;
        }
    }
    daemon.stop.ask();
    daemon.stop.end_if_asked();
}

fn expire(daemon: &Daemon) {
    while !daemon.stop.is_near_within(EXPIRE_EVERY) {
        daemon.registry.expire();
    }
}

/// No new connection, no new request; what is under way is answered, and everything is made durable.
fn end(daemon: &Daemon) -> Result<(), VolumedError> {
    daemon.attachments.end_all();
    if !daemon.registry.connections.end_all(END_PATIENCE) {
        say(format_args!("some requests did not end within {} s", END_PATIENCE.as_secs()));
    }
    let mut failed = None;
    for (id, _) in daemon.registry.all_gates() {
        let Some(volume) = daemon.registry.store.volume(&id) else { continue };
        if volume.damage().is_empty()
            && let Err(error) = volume.flush()
        {
            say(format_args!("volume {id} was not flushed: {}", report::chain(&error)));
            failed = failed.or(Some(error));
        }
    }
    say(format_args!("ends"));
    failed.map_or(Ok(()), |error| Err(error.into()))
}
