//! The thread that heals: it waits on the kernel's own word that something changed in the host's namespace or in a
//! jail, looks, and has it as it should be. There is no other repair code. This program's changes are reported as well;
//! looking then finds nothing to do.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nix::sys::epoll::EpollTimeout;

use super::host::{HostNetwork, Settled};

/// Longest wait without looking whether the watching is over, in milliseconds.
const WAIT_MS: u16 = 60_000;

/// What was found and done: whose it was (`None`: the host's own), and the steps.
pub type Report = dyn Fn(Option<u16>, Settled) + Send + Sync;

/// Watches until dropped.
#[derive(Debug)]
pub struct Watcher {
    network: Arc<HostNetwork>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Begins to watch; `report` is called on the watching thread whenever there was something to do.
    pub fn start(network: Arc<HostNetwork>, report: Box<Report>) -> io::Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let (watched, until) = (Arc::clone(&network), Arc::clone(&over));
        let thread =
            thread::Builder::new().name("network".to_owned()).spawn(move || watch(&watched, &until, &report))?;
        Ok(Self { network, over, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.network.wake();
        if let Some(thread) = self.thread.take() {
            // A report that panicked has said so; there is nothing to add.
            let _ = thread.join();
        }
    }
}

fn watch(network: &HostNetwork, over: &AtomicBool, report: &Report) {
    while !over.load(Ordering::Acquire) {
        let changed = match network.wait(EpollTimeout::from(WAIT_MS)) {
            Ok(changed) => changed,
            // Interrupted by a signal.
            Err(nix::Error::EINTR) => continue,
            // The epoll is broken, which nothing mends.
            Err(_) => return,
        };
        for whose in changed {
            if over.load(Ordering::Acquire) {
                return;
            }
            let settled = match whose {
                None => network.heal_host(),
                Some(number) => network.heal_jail(number),
            };
            if !settled.steps.is_empty() || !settled.failures.is_empty() {
                report(whose, settled);
            }
        }
    }
}
