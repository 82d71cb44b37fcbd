//! The machine's memory written to a file while it runs, and mapped ahead of its guest: what the first thread does of it.
//! See [`crate::vmm::send::checkpoint`] and `send/prefault` for the thread that does the rest.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::{EventLoop, bad_request, host, nanos};
use crate::clock::{Clock, Monotonic};
use crate::machine::image::WriteImageError;
use crate::machine::pre_copy::{Policy, Unconverged};
use crate::saved::codec;
use crate::units::Bytes;
use crate::vmm::save::{self, RestFiles, SaveMachineError};
use crate::vmm::send::Job;
use crate::vmm::send::checkpoint::{Checkpoint, CheckpointError};
use crate::wire::control::{
    Answer, CopyPhases, CopySpec, MachineState, PREFAULT_RUNS_MAX, PrefaultSpec, SavePhases, SavedPages,
};
use crate::wire::refusal::Refusal;

/// Memory that is being copied, or was.
pub(super) struct Copying {
    pages: SavedPages,
    stage: Stage,
}

enum Stage {
    /// Rounds are made.
    UnderWay,
    /// It was given up, and the thread is about to say so.
    GivenUp,
    /// Little is left, and what the guest writes is logged.
    Copied,
    /// The last pages are written, from this moment on; what was done of the state meanwhile.
    Resting(Monotonic, Result<SavePhases, SaveMachineError>),
    /// All is written. KVM takes milliseconds to stop logging, for each GiB of memory: not before the guest goes on.
    Rested,
}

impl EventLoop {
    /// Whether the last pages are being written: the guest has to stand still until they are.
    pub(super) fn is_resting(&self) -> bool {
        matches!(self.copying, Some(Copying { stage: Stage::Resting(..), .. }))
    }

    /// Whether the thread that copies has work: no send begins then, and no other copy.
    pub(super) fn is_copying(&self) -> bool {
        let stage = self.copying.as_ref().map(|copying| &copying.stage);
        matches!(stage, Some(Stage::UnderWay | Stage::GivenUp | Stage::Resting(..)))
    }

    /// Has pages mapped ahead, unless the thread that would do it has something to do that somebody waits for.
    pub(super) fn prefault(&self, spec: PrefaultSpec) -> Result<(), Refusal> {
        self.not_sending()?;
        if self.copying.is_some() {
            return Err(Refusal::Sending);
        }
        let guest = self.guest.as_ref().ok_or(Refusal::State { state: MachineState::Empty })?;
        if spec.read.len() + spec.written.len() > PREFAULT_RUNS_MAX {
            return Err(Refusal::BadRequest { reason: format!("more than {PREFAULT_RUNS_MAX} runs of pages") });
        }
        let presence = guest.fill.as_ref().map(|fill| Arc::clone(fill.presence()));
        guest.sender.tell(Job::Prefault(guest.machine.ram().clone(), spec, presence));
        Ok(())
    }

    /// Begins to copy memory; the answer comes later.
    pub(super) fn copy_memory(&mut self, spec: CopySpec, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
        self.not_sending()?;
        self.all_there()?;
        self.forget_copy();
        let guest = self.guest.as_ref().ok_or(Refusal::State { state: MachineState::Empty })?;
        if guest.state != MachineState::Running {
            return Err(Refusal::State { state: guest.state });
        }
        let found = descriptors.len();
        let mut files = descriptors.into_iter().map(File::from);
        let (Some(pagemap), Some(memory), None) = (files.next(), files.next(), files.next()) else {
            let reason = format!("{found} descriptors came with the request, it names 2");
            return Err(Refusal::BadRequest { reason });
        };
        let CopySpec { pages, pause_ms_max, rounds_max, deadline_ms } = spec;
        let policy = Policy {
            pause_max: Duration::from_millis(pause_ms_max.into()),
            rounds_max,
            deadline: Duration::from_millis(deadline_ms),
            throttle: false,
            unconverged: Unconverged::Force,
        };
        let (ram, dirty) = (guest.machine.ram().clone(), guest.machine.dirty().clone());
        let pages_wanted = save::pages_of(pages);
        let checkpoint = Checkpoint { pages: pages_wanted, policy, pagemap, memory, ram, dirty };
        guest.sender.tell(Job::Checkpoint(Box::new(checkpoint)));
        self.copying = Some(Copying { pages, stage: Stage::UnderWay });
        Ok(())
    }

    /// Gives up a copy, wherever it is. One under way is there until its thread says that it is not.
    pub(super) fn cancel_copy(&mut self) {
        match self.copying.as_mut() {
            Some(Copying { stage: stage @ Stage::UnderWay, .. }) => {
                *stage = Stage::GivenUp;
                if let Some(guest) = &self.guest {
                    guest.sender.tell(Job::Cancel);
                }
            }
            Some(Copying { stage: Stage::Copied | Stage::Rested, .. }) => self.forget_copy(),
            Some(Copying { stage: Stage::GivenUp | Stage::Resting(..), .. }) | None => {}
        }
    }

    /// What was copied is complete, or is not to be completed: the guest's writes are logged no longer.
    pub(super) fn forget_copy(&mut self) {
        if let Some(Copying { stage: Stage::Copied | Stage::Rested, .. }) = &self.copying {
            self.copying = None;
            if let Some(guest) = &self.guest {
                guest.sender.tell(Job::Forget);
            }
        }
    }

    /// The guest goes on. What it writes is logged no longer, if all was copied; a copy that waits for its rest stays.
    pub(super) fn forget_rested_copy(&mut self) {
        if matches!(self.copying, Some(Copying { stage: Stage::Rested, .. })) {
            self.forget_copy();
        }
    }

    /// Writes what is left, while the state is collected; the answer comes later.
    pub(super) fn save_rest(&mut self, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
        let begun = self.clock.monotonic();
        self.paused()?;
        self.all_there()?;
        let (Some(guest), Some(copying @ Copying { stage: Stage::Copied, .. })) =
            (self.guest.as_ref(), self.copying.as_mut())
        else {
            return Err(Refusal::BadRequest { reason: "no memory was copied before".to_owned() });
        };
        let RestFiles { mut state, list } =
            RestFiles::new(copying.pages, descriptors).map_err(|error| bad_request(&error))?;
        guest.sender.tell(Job::Rest { list });
        let collected = guest.machine.save().map_err(SaveMachineError::Collect);
        let encoded = collected.and_then(|sections| codec::to_bytes(&sections).map_err(SaveMachineError::Encode));
        let written = encoded.and_then(|bytes| {
            let failed = |source| SaveMachineError::Write { what: "state", source };
            state.write_all(&bytes).map(|()| bytes.len() as u64).map_err(failed)
        });
        let phases = written.map(|state_bytes| SavePhases {
            state_bytes,
            state_ns: nanos(begun, self.clock.monotonic()),
            ..SavePhases::default()
        });
        copying.stage = Stage::Resting(begun, phases);
        Ok(())
    }

    /// The rounds are over.
    pub(super) fn copied(&mut self, result: Result<CopyPhases, CheckpointError>) {
        let answer = match (result, self.copying.as_mut()) {
            (Ok(phases), Some(copying @ Copying { stage: Stage::UnderWay, .. })) => {
                copying.stage = Stage::Copied;
                Answer::Copied(phases)
            }
            // It was given up as it ended: the thread has read that, or reads it now.
            (Ok(_), Some(_) | None) => {
                self.copying = None;
                Answer::Refused(Refusal::Cancelled)
            }
            (Err(error), _) => {
                self.copying = None;
                Answer::Refused(refusal_of(&error))
            }
        };
        // Of a copy that nobody waits for nothing is kept.
        if !self.answer_waiting(&answer) {
            self.forget_copy();
        }
    }

    /// All of it is written.
    pub(super) fn rested(&mut self, result: Result<Bytes, CheckpointError>) {
        let Some(copying @ Copying { stage: Stage::Resting(..), .. }) = self.copying.as_mut() else { return };
        let Stage::Resting(begun, state) = std::mem::replace(&mut copying.stage, Stage::Rested) else { return };
        let answer = match (state, result) {
            (Ok(phases), Ok(written)) => Answer::Saved(SavePhases {
                memory_bytes: written.0,
                memory_ns: nanos(begun, self.clock.monotonic()).saturating_sub(phases.state_ns),
                ..phases
            }),
            (Err(error), _) => Answer::Refused(super::refusal_to_save(&error)),
            (Ok(_), Err(error)) => Answer::Refused(refusal_of(&error)),
        };
        self.answer_waiting(&answer);
    }
}

fn refusal_of(error: &CheckpointError) -> Refusal {
    match error {
        CheckpointError::Cancelled => Refusal::Cancelled,
        CheckpointError::Image(WriteImageError::NoOriginal) => bad_request(error),
        CheckpointError::Log(_) | CheckpointError::Image(_) | CheckpointError::List(_) => host(error),
    }
}
