//! Taps of VMs whose memory is out, held by the agent beside their VMMs or without them. The tap's own queue is where
//! packets wait: in order, up to the kernel's bound, beyond which it drops and counts them. Nothing is read here.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use futures_util::future::select_all;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::ids::VmId;

/// Taps of all VMs, by name. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct HeldTaps {
    taps: Arc<Mutex<BTreeMap<VmId, Taps>>>,
    /// Some VM's are others than before.
    changed: Arc<Notify>,
}

type Taps = Vec<(String, Arc<File>)>;

impl HeldTaps {
    fn taps(&self) -> MutexGuard<'_, BTreeMap<VmId, Taps>> {
        self.taps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this VM's are held.
    pub(super) fn has(&self, vm: &VmId) -> bool {
        self.taps().contains_key(vm)
    }

    /// Holds them.
    pub(super) fn put(&self, vm: VmId, taps: Vec<(String, File)>) {
        self.taps().insert(vm, taps.into_iter().map(|(name, tap)| (name, Arc::new(tap))).collect());
        self.changed.notify_waiters();
    }

    /// Another descriptor of one of them, if it is held.
    pub(super) fn get(&self, vm: &VmId, name: &str) -> Option<io::Result<File>> {
        let tap = self.taps().get(vm)?.iter().find(|(is, _)| is == name)?.1.try_clone();
        Some(tap)
    }

    /// Holds them no longer.
    pub(super) fn release(&self, vm: &VmId) {
        self.taps().remove(vm);
        self.changed.notify_waiters();
    }

    /// Resolves when a packet waits in one of them; never when none is held. Call inside the runtime.
    pub(super) async fn packet(&self, vm: &VmId) {
        loop {
            let changed = self.changed.notified();
            tokio::select! {
                () = self.packet_in_these(vm) => return,
                () = changed => {}
            }
        }
    }

    async fn packet_in_these(&self, vm: &VmId) {
        let taps = self.taps().get(vm).cloned().unwrap_or_default();
        let mut waits = Vec::with_capacity(taps.len());
        for (name, tap) in taps {
            // Of its own, so that it can be watched whoever else watches the same open file.
            #[expect(deprecated, reason = "what replaces it is unsafe; a File is never replaced while it is held")]
            let watched = tap.try_clone().and_then(|tap| AsyncFd::with_interest(tap, Interest::READABLE));
            let watched = match watched {
                Ok(watched) => watched,
                Err(error) => {
                    tracing::warn!(%vm, tap = name, %error, "cannot watch a tap: its packets wake nobody");
                    continue;
                }
            };
            waits.push(async move { watched.readable().await.map(|mut ready| ready.retain_ready()) }.boxed());
        }
        if waits.is_empty() {
            return std::future::pending().await;
        }
        let (_, _, _) = select_all(waits).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use tokio::time::timeout;

    #[tokio::test]
    async fn the_first_packet_is_noticed_and_not_taken() {
        let (vm, held) = (VmId::from_random([1; 10]), HeldTaps::default());
        let short = Duration::from_millis(20);
        assert!(timeout(short, held.packet(&vm)).await.is_err(), "nothing is held");
        let (mut there, here) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        held.put(vm.clone(), vec![("tap0".to_owned(), File::from(OwnedFd::from(here)))]);
        assert!(timeout(short, held.packet(&vm)).await.is_err(), "nothing waits");
        there.write_all(b"packet").unwrap();
        held.packet(&vm).await;
        // It is still there, for this watcher and for the VMM.
        held.packet(&vm).await;
        let mut tap = held.get(&vm, "tap0").unwrap().unwrap();
        let mut bytes = [0; 6];
        io::Read::read_exact(&mut tap, &mut bytes).unwrap();
        assert_eq!(&bytes, b"packet");
        held.release(&vm);
        assert!(held.get(&vm, "tap0").is_none() && !held.has(&vm));
    }
}
