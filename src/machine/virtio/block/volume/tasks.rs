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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXPORT: Export = Export { bytes: 1 << 40, flags: 0xffff, block_bytes_min: 1, block_bytes_max: 64 << 10 };

    fn job(head: u16, request: Request) -> Job {
        Job { chain: Chain::new(head, Vec::new(), 0), request }
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let range = (0_u64..1 << 20, 0_u64..600).prop_map(|(at, count)| Range { offset: at * 512, bytes: count * 512 });
        prop_oneof![
            range.clone().prop_map(Request::Read),
            range.clone().prop_map(Request::Write),
            Just(Request::Flush),
            proptest::collection::vec(range.clone(), 1..4).prop_map(Request::Discard),
            (range, any::<bool>()).prop_map(|(range, unmap)| Request::Zero { range, unmap }),
        ]
    }

    /// What happens to one of the parts that are sent.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Event {
        Fails,
        Breaks,
        Done,
    }

    proptest! {
        /// Whatever order the answers come in, whatever breaks on the way: each request is finished once, when all of it
        /// was asked for and answered.
        #[test]
        fn every_request_is_finished_once(
            requests in proptest::collection::vec(any_request(), 1..12),
            events in proptest::collection::vec(
                (prop_oneof![Just(Event::Fails), Just(Event::Breaks), Just(Event::Done)], 0_usize..1000),
                0..400,
            ),
        ) {
            let (mut tasks, mut sent, mut finished) = (Tasks::default(), Vec::new(), Vec::new());
            let (mut asked, mut failed) = (vec![0_u64; requests.len()], vec![false; requests.len()]);
            let mut owners = std::collections::BTreeMap::new();
            let mut todo: VecDeque<_> = (0_u16..).zip(requests.clone()).collect();
            let total = |request: &Request| match request {
                Request::Read(range) | Request::Write(range) | Request::Zero { range, .. } => range.bytes,
                Request::Discard(ranges) => ranges.iter().map(|range| range.bytes).sum(),
                Request::Flush | Request::Id => 0,
            };
            let tail = std::iter::repeat_n((Event::Done, 0), 100_000);
            for (event, at) in events.into_iter().chain(tail) {
                if sent.is_empty() && todo.is_empty() && !tasks.has_unsent() {
                    break;
                }
                if let Some((head, request)) = todo.pop_front() {
                    let one = tasks.begin(job(head, request), Monotonic(0));
                    if one.is_none() {
                        let place = tasks.slots.iter().position(|slot| {
                            slot.as_ref().is_some_and(|task| task.job.chain.head() == head)
                        });
                        owners.insert(place.unwrap(), usize::from(head));
                    }
                    finished.extend(one);
                }
                while let Some(part) = tasks.next_part(&EXPORT) {
                    prop_assert!(part.bytes <= RANGE_BYTES_MAX);
                    sent.push(part);
                }
                if sent.is_empty() {
                    continue;
                }
                let part = sent.swap_remove(at % sent.len());
                let owner = owners[&part.task];
                match event {
                    Event::Fails => {
                        failed[owner] = true;
                        finished.extend(tasks.answered(part, true));
                    }
                    Event::Breaks => finished.extend(tasks.put_back(vec![part])),
                    Event::Done => {
                        asked[owner] += part.bytes;
                        finished.extend(tasks.answered(part, false));
                    }
                }
            }
            prop_assert_eq!(tasks.count(), 0);
            let mut heads: Vec<_> = finished.iter().map(|one| one.done.chain.head()).collect();
            heads.sort_unstable();
            prop_assert_eq!(heads, (0_u16..).take(requests.len()).collect::<Vec<_>>());
            for one in &finished {
                let number = usize::from(one.done.chain.head());
                prop_assert_eq!(one.is_ok(), !failed[number]);
                if one.is_ok() {
                    prop_assert_eq!(asked[number], total(&requests[number]));
                }
            }
        }
    }

    #[test]
    fn parts_are_what_the_server_takes() {
        let mut tasks = Tasks::default();
        let range = Range { offset: 512, bytes: 100 << 10 };
        assert!(tasks.begin(job(1, Request::Write(range)), Monotonic(0)).is_none());
        let parts: Vec<_> = std::iter::from_fn(|| tasks.next_part(&EXPORT)).collect();
        let shown: Vec<_> = parts.iter().map(|part| (part.offset, part.at, part.bytes)).collect();
        assert_eq!(shown, [(512, 0, 64 << 10), (512 + (64 << 10), 64 << 10, 36 << 10)]);
        assert!(tasks.answered(parts[1], false).is_none());
        assert!(tasks.put_back(vec![parts[0]]).is_empty());
        assert_eq!(tasks.next_part(&EXPORT), Some(parts[0]));
        assert!(tasks.answered(parts[0], false).unwrap().is_ok());
    }
}
