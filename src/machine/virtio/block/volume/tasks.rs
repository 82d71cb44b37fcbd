//! The guest's requests under way, and the parts each is cut into for the server. Bookkeeping only: who carries a part
//! knows it by value, and brings it back when it is answered or when its connection broke.
//!
//! A request is finished when each of its parts is answered: until then its buffers may be written to.

use std::collections::VecDeque;

use crate::clock::Monotonic;
use crate::machine::virtio::block::nbd::{self, Command, Export};
use crate::machine::virtio::block::request::{Range, Request};
use crate::machine::virtio::block::worker::{Done, Job};
use crate::machine::virtio::chain::Chain;
use crate::machine::virtio::spec::block::{S_IOERR, S_OK};

/// Most bytes of data in one part: a large request is carried by several connections.
const DATA_BYTES_MAX: u64 = 1 << 20;

/// Most bytes of a part without data.
const RANGE_BYTES_MAX: u64 = 32 << 20;

/// What a part asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PartKind {
    Read,
    Write,
    Flush,
    Trim,
    /// Zeroes; with `hole`, the space may be given back.
    Zero {
        hole: bool,
    },
}

/// What one request to the server is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// Place of its request in [`Tasks`].
    pub(super) task: usize,
    pub(super) kind: PartKind,
    /// Where on the volume.
    pub(super) offset: u64,
    /// Where in the request's data.
    pub(super) at: u64,
    /// How much.
    pub(super) bytes: u64,
}

impl Part {
    /// The request for a server; `None` if it takes none of this kind and nothing has to be done.
    pub(super) fn request(&self, export: &Export, handle: u64) -> Option<nbd::Request> {
        let (command, flags) = match self.kind {
            PartKind::Read => (Command::Read, 0),
            PartKind::Write => (Command::Write, 0),
            // A server that takes no flush serves reads only, else its connection is refused.
            PartKind::Flush if !export.has(nbd::SEND_FLUSH) => return None,
            PartKind::Flush => (Command::Flush, 0),
            // A hint (virtio 1.2 section 5.2.6.1).
            PartKind::Trim if !export.has(nbd::SEND_TRIM) => return None,
            PartKind::Trim => (Command::Trim, 0),
            PartKind::Zero { .. } if !export.has(nbd::SEND_WRITE_ZEROES) => (Command::Write, 0),
            PartKind::Zero { hole: true } => (Command::WriteZeroes, 0),
            PartKind::Zero { hole: false } => (Command::WriteZeroes, nbd::NO_HOLE),
        };
        // Parts are cut to less than that.
        let bytes = u32::try_from(self.bytes).unwrap_or(u32::MAX);
        Some(nbd::Request { command, flags, handle, offset: self.offset, bytes })
    }

    /// Most bytes such a part may have for a server.
    fn most(&self, export: &Export) -> u64 {
        let data = DATA_BYTES_MAX.min((export.block_bytes_max & !0xfff).into());
        match self.kind {
            PartKind::Read | PartKind::Write => data,
            PartKind::Zero { .. } if !export.has(nbd::SEND_WRITE_ZEROES) => data,
            PartKind::Zero { .. } | PartKind::Trim | PartKind::Flush => RANGE_BYTES_MAX,
        }
    }
}

/// Which counter a request belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Read,
    Write,
    Flush,
    Other,
}

/// A request that is finished.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) done: Done,
    pub(super) flow: Flow,
    pub(super) bytes: u64,
    pub(super) begun: Monotonic,
}

impl Finished {
    pub(super) fn is_ok(&self) -> bool {
        self.done.status == S_OK
    }

    /// A request that fails before it began.
    pub(super) fn failed(job: Job, begun: Monotonic) -> Self {
        let (flow, bytes) = flow_of(&job.request);
        Self { done: Done { chain: job.chain, status: S_IOERR }, flow, bytes, begun }
    }
}

#[derive(Debug)]
struct Task {
    job: Job,
    begun: Monotonic,
    /// Parts that are not answered.
    open: usize,
    failed: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    /// At most as many as the ring has entries.
    slots: Vec<Option<Task>>,
    unsent: VecDeque<Part>,
}

/// Bytes that a request reads or writes, and which counter it belongs to.
pub(super) fn flow_of(request: &Request) -> (Flow, u64) {
    match request {
        Request::Read(range) => (Flow::Read, range.bytes),
        Request::Write(range) => (Flow::Write, range.bytes),
        Request::Flush => (Flow::Flush, 0),
        Request::Id | Request::Discard(_) | Request::Zero { .. } => (Flow::Other, 0),
    }
}

fn parts_of(task: usize, request: &Request) -> Vec<Part> {
    let part = |kind, range: &Range| Part { task, kind, offset: range.offset, at: 0, bytes: range.bytes };
    let some = |part: Part| if part.bytes == 0 { Vec::new() } else { vec![part] };
    match request {
        Request::Read(range) => some(part(PartKind::Read, range)),
        Request::Write(range) => some(part(PartKind::Write, range)),
        Request::Flush => vec![part(PartKind::Flush, &Range { offset: 0, bytes: 0 })],
        // Answered before it comes here.
        Request::Id => Vec::new(),
        Request::Discard(ranges) => ranges.iter().flat_map(|range| some(part(PartKind::Trim, range))).collect(),
        Request::Zero { range, unmap } => some(part(PartKind::Zero { hole: *unmap }, range)),
    }
}

impl Tasks {
    /// How many are under way.
    pub(super) fn count(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Begins a request; gives it back if there is nothing to do.
    pub(super) fn begin(&mut self, job: Job, begun: Monotonic) -> Option<Finished> {
        let free = self.slots.iter().position(Option::is_none);
        let at = free.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let parts = parts_of(at, &job.request);
        self.slots[at] = Some(Task { job, begun, open: parts.len(), failed: false });
        self.unsent.extend(parts);
        self.finished(at)
    }

    /// Whether a part waits to be sent.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// The next part for a server, cut to what it takes.
    pub(super) fn next_part(&mut self, export: &Export) -> Option<Part> {
        let part = self.unsent.pop_front()?;
        let most = part.most(export);
        if part.bytes <= most {
            return Some(part);
        }
        let rest = Part { offset: part.offset + most, at: part.at + most, bytes: part.bytes - most, ..part };
        self.unsent.push_front(rest);
        if let Some(task) = &mut self.slots[part.task] {
            task.open += 1;
        }
        Some(Part { bytes: most, ..part })
    }

    /// Parts whose connection broke: they go first, in their order. Those of a request that failed meanwhile are not sent
    /// again.
    pub(super) fn put_back(&mut self, parts: Vec<Part>) -> Vec<Finished> {
        let mut finished = Vec::new();
        for part in parts.into_iter().rev() {
            match &self.slots[part.task] {
                Some(Task { failed: true, .. }) => finished.extend(self.answered(part, true)),
                Some(Task { failed: false, .. }) | None => self.unsent.push_front(part),
            }
        }
        finished
    }

    /// A part is answered. Gives the request when it was the last one.
    pub(super) fn answered(&mut self, part: Part, failed: bool) -> Option<Finished> {
        let task = self.slots[part.task].as_mut()?;
        task.open -= 1;
        if failed && !task.failed {
            task.failed = true;
            // What is left of it need not be carried out.
            let before = self.unsent.len();
            self.unsent.retain(|one| one.task != part.task);
            task.open -= before - self.unsent.len();
        }
        self.finished(part.task)
    }

    fn finished(&mut self, at: usize) -> Option<Finished> {
        let Task { job, begun, failed, .. } = self.slots[at].take_if(|task| task.open == 0)?;
        let (flow, bytes) = flow_of(&job.request);
        let status = if failed { S_IOERR } else { S_OK };
        Some(Finished { done: Done { chain: job.chain, status }, flow, bytes, begun })
    }

    /// All of them fail. Nobody may carry a part any more.
    pub(super) fn fail_all(&mut self) -> Vec<Finished> {
        self.unsent.clear();
        let tasks = std::mem::take(&mut self.slots).into_iter().flatten();
        tasks.map(|task| Finished::failed(task.job, task.begun)).collect()
    }

    /// The buffers of a request.
    pub(super) fn chain(&self, task: usize) -> Option<&Chain> {
        Some(&self.slots.get(task)?.as_ref()?.job.chain)
    }
}
