//! Who carries a disk's requests out: the device does not know which.

use super::uring::UringDisk;
use super::volume::Volume;
use super::worker::{Done, Job, Worker};

/// What requests are handed to, and what says when they are finished.
#[derive(Debug)]
pub(crate) enum Carrier {
    /// A thread, on a file.
    Thread(Worker),
    /// The kernel, by io_uring, on a file.
    Uring(Box<UringDisk>),
    /// A thread that speaks with a volume's server.
    Volume(Volume),
}

impl Carrier {
    /// Takes a request over. It may wait for [`commit`](Self::commit).
    pub(crate) fn submit(&mut self, job: Job) {
        match self {
            Self::Thread(worker) => worker.submit(job),
            Self::Uring(disk) => disk.submit(job),
            Self::Volume(volume) => volume.submit(job),
        }
    }

    /// Has every request begun that was taken over.
    pub(crate) fn commit(&mut self) {
        match self {
            Self::Thread(_) | Self::Volume(_) => {}
            Self::Uring(disk) => disk.commit(),
        }
    }

    /// The requests finished since the last call.
    pub(crate) fn take_done(&mut self) -> Vec<Done> {
        match self {
            Self::Thread(worker) => worker.take_done(),
            Self::Uring(disk) => disk.take_done(),
            Self::Volume(volume) => volume.take_done(),
        }
    }

    /// Goes on after a pause.
    pub(crate) fn work(&self) {
        match self {
            Self::Thread(_) | Self::Uring(_) => {}
            Self::Volume(volume) => volume.work(),
        }
    }

    /// No buffer is touched from here on. A file's requests are finished then; a volume's may stay under way.
    pub(crate) fn pause(&mut self) {
        match self {
            Self::Thread(worker) => worker.wait_idle(),
            Self::Uring(disk) => disk.wait_idle(),
            Self::Volume(volume) => volume.park(),
        }
    }

    /// Every request is finished when this returns; those of a volume fail if its server does not answer soon.
    pub(crate) fn end_all(&mut self) {
        match self {
            Self::Thread(worker) => worker.wait_idle(),
            Self::Uring(disk) => disk.wait_idle(),
            Self::Volume(volume) => volume.end_all(),
        }
    }

    /// The volume slot, if it is one.
    pub(crate) fn volume(&self) -> Option<&Volume> {
        match self {
            Self::Thread(_) | Self::Uring(_) => None,
            Self::Volume(volume) => Some(volume),
        }
    }
}
