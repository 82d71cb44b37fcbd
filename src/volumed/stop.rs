//! The end, asked for by a signal or by an agent, and waited for by the first thread.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Whether the end is near.
#[derive(Debug, Default)]
pub(super) struct Stop {
    stage: Mutex<Stage>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Stage {
    #[default]
    Running,
    /// Somebody asked, and may still be answered.
    Asked,
    Ending,
}

impl Stop {
    fn stage(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for it. It begins with [`Self::end_if_asked`], so that who asked can be answered before.
    pub(super) fn ask(&self) {
        let mut stage = self.stage();
        if *stage == Stage::Running {
            *stage = Stage::Asked;
        }
    }

    /// Begins it, if it was asked for.
    pub(super) fn end_if_asked(&self) {
        let mut stage = self.stage();
        if *stage == Stage::Asked {
            *stage = Stage::Ending;
            self.changed.notify_all();
        }
    }

    /// Whether it was asked for.
    pub(super) fn is_near(&self) -> bool {
        *self.stage() != Stage::Running
    }

    /// Waits until it begins.
    pub(super) fn wait(&self) {
        let ended = self.changed.wait_while(self.stage(), |stage| *stage != Stage::Ending);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits for it, for `limit` at most; whether it began.
    pub(super) fn is_near_within(&self, limit: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.stage(), limit, |stage| *stage != Stage::Ending);
        let (stage, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *stage == Stage::Ending
    }
}
