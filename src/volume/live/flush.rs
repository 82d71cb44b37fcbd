//! Flushes: one at a time, and one for all that wait.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Volume;
use crate::volume::error::VolumeError;

/// Who flushes, and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    turn: Mutex<Turn>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Turn {
    is_running: bool,
    /// How many have begun.
    begun: u64,
    /// The last one that ended; a failed one makes the volume read only.
    ended: u64,
}

impl Flushes {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `work` done once from a beginning on that is later than this call, here or by another caller.
    fn share(&self, work: impl FnOnce()) {
        let mut turn = self.turn();
        // One that runs may have begun before what is to be flushed was written.
        let wanted = turn.begun + 1;
        while turn.is_running {
            turn = self.ended.wait(turn).unwrap_or_else(PoisonError::into_inner);
            if turn.ended >= wanted {
                return;
            }
        }
        turn.is_running = true;
        turn.begun += 1;
        let number = turn.begun;
        drop(turn);
        work();
        let mut turn = self.turn();
        turn.is_running = false;
        turn.ended = number;
        drop(turn);
        self.ended.notify_all();
    }
}

impl Volume {
    /// Makes all durable that was acknowledged before this call.
    pub fn flush(&self) -> Result<(), VolumeError> {
        self.flushes.share(|| {
            let Some(live) = self.state().live.clone() else { return };
            // Another state may come meanwhile: whoever brings it has made all of this one durable.
            if let Err(error) = live.log.sync(&live.top.file) {
                // What the kernel could not write it may have forgotten: no later call would tell.
                self.distrust(live.top.path(), format!("what was written could not be made durable: {error}"));
            }
        });
        // One that was damaged from the start has nothing to flush.
        if self.state().live.is_none() { Ok(()) } else { self.check_writable() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn those_who_wait_share_the_next_one() {
        let (flushes, count) = (Flushes::default(), AtomicU32::new(0));
        let (begun, first) = std::sync::mpsc::channel();
        let (go, held) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let (flushes, count) = (&flushes, &count);
            scope.spawn(move || {
                flushes.share(|| {
                    begun.send(()).unwrap();
                    held.recv().unwrap();
                });
            });
            first.recv().unwrap();
            let later = (0..4).map(|_| scope.spawn(|| flushes.share(|| _ = count.fetch_add(1, Ordering::Relaxed))));
            let later: Vec<_> = later.collect();
            // None of them may take the one that runs for theirs.
            assert!(later.iter().all(|thread| !thread.is_finished()));
            go.send(()).unwrap();
        });
        let ran = count.load(Ordering::Relaxed);
        assert!((1..=4).contains(&ran), "{ran}");
        assert_eq!(flushes.turn().begun, u64::from(ran) + 1);
    }
}
