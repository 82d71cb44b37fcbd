//! The states of a machine and what may be asked of it in each.
//!
//! ```text
//!            resume           pause
//!  Built ──────────▶ Running ◀──────▶ Paused ⟲ save
//!    │                  │      resume    │
//!    └──────── stop ────┴────── stop ────┴──▶ Stopped
//! ```
//! A machine restored from saved state begins Paused, one that boots begins Built: neither has run in this process.
//! Owned by [`super::Machine`]; the table is the only place that decides.

/// Where a machine is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineState {
    /// Made from a kernel; no instruction has run.
    Built,
    /// vCPUs and devices work.
    Running,
    /// Nothing changes the guest: no vCPU in guest mode, no device writing memory.
    Paused,
    /// Threads are gone.
    Stopped,
}

/// What can be asked of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Let it run.
    Resume,
    /// Make it stand still.
    Pause,
    /// Read its state.
    Save,
    /// End it.
    Stop,
}

impl MachineState {
    /// The state after `verb`; `None` when it may not be asked in this state.
    pub const fn after(self, verb: Verb) -> Option<Self> {
        match (self, verb) {
            (Self::Built | Self::Paused, Verb::Resume) => Some(Self::Running),
            (Self::Running, Verb::Pause) => Some(Self::Paused),
            (Self::Paused, Verb::Save) => Some(Self::Paused),
            (Self::Built | Self::Running | Self::Paused, Verb::Stop) => Some(Self::Stopped),
            (Self::Running, Verb::Resume | Verb::Save)
            | (Self::Built, Verb::Pause | Verb::Save)
            | (Self::Paused, Verb::Pause)
            | (Self::Stopped, Verb::Resume | Verb::Pause | Verb::Save | Verb::Stop) => None,
        }
    }
}

/// A verb that does not fit the machine's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{verb:?} is not possible while the machine is {state:?}")]
pub struct WrongState {
    /// The state.
    pub state: MachineState,
    /// What was asked.
    pub verb: Verb,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    #[test]
    fn the_table_is_what_it_was() {
        let mut text = String::new();
        for state in [MachineState::Built, MachineState::Running, MachineState::Paused, MachineState::Stopped] {
            for verb in [Verb::Resume, Verb::Pause, Verb::Save, Verb::Stop] {
                let after = state.after(verb).map_or_else(|| "refused".to_owned(), |after| format!("{after:?}"));
                writeln!(text, "{:<8} {:<7} {after}", format!("{state:?}"), format!("{verb:?}")).unwrap();
            }
        }
        assert_eq!(text, include_str!("../../tests/golden/machine_states.txt"));
    }
}
