//! Who carries a disk's requests out: the device does not know which.

use super::volume::Volume;
use super::worker::{Done, Job, Worker};

/// A thread that requests are handed to, and that says when they are finished.
#[derive(Debug)]
pub(crate) enum Carrier {
    /// A file's.
    File(Worker),
    /// A volume's.
    Volume(Volume),
}

impl Carrier {
    /// Hands a request over.
    pub(crate) fn submit(&self, job: Job) {
        match self {
            Self::File(worker) => worker.submit(job),
            Self::Volume(volume) => volume.submit(job),
        }
    }

    /// The requests finished since the last call.
    pub(crate) fn take_done(&self) -> Vec<Done> {
        match self {
            Self::File(worker) => worker.take_done(),
            Self::Volume(volume) => volume.take_done(),
        }
    }

    /// Goes on after a pause.
    pub(crate) fn work(&self) {
        match self {
            Self::File(_) => {}
            Self::Volume(volume) => volume.work(),
        }
    }

    /// No buffer is touched from here on. A file's requests are finished then; a volume's may stay under way.
    pub(crate) fn pause(&self) {
        match self {
            Self::File(worker) => worker.wait_idle(),
            Self::Volume(volume) => volume.park(),
        }
    }

    /// Every request is finished when this returns; those of a volume fail if its server does not answer soon.
    pub(crate) fn end_all(&self) {
        match self {
            Self::File(worker) => worker.wait_idle(),
            Self::Volume(volume) => volume.end_all(),
        }
    }

    /// The volume slot, if it is one.
    pub(crate) fn volume(&self) -> Option<&Volume> {
        match self {
            Self::File(_) => None,
            Self::Volume(volume) => Some(volume),
        }
    }
}
