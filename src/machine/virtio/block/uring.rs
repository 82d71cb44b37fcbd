//! A disk on a file by io_uring, without a thread of its own: whoever serves the device hands its requests to the kernel,
//! many at once, and learns from an event which of them are finished.
//!
//! ```text
//!  submit(job) … submit(job), commit ──▶ tasks ⇄ sys::uring ⇄ kernel          take_done ◀── finished (eventfd)
//! ```
//! A request is one operation of the ring or several, one after the other: what the host cut short is gone on with, and
//! a discard has a range at a time. Requests pass each other, as the specification lets them (2.7.13: buffers are used
//! in any order); a flush covers the writes that the guest was told of before it, which the kernel has finished by
//! then. What is in the host's page cache is copied by the device loop itself, unless that would keep it from the other
//! devices for long.

use std::fs::File;
use std::io;

use nix::sys::eventfd::EventFd;

use super::request::{Range, Request};
use super::worker::{Done, Job};
use crate::machine::ram::GuestRam;
use crate::machine::virtio::spec::block::{HEADER_BYTES, S_IOERR, S_OK};
use crate::sys::uring::{self, By, DEPTH, FileRing, Operation, Piece, Ring};

/// The device loop copies up to this many bytes of one request: some ten microseconds. More is the kernel's workers'.
const CALLER_BYTES_MAX: usize = 128 << 10;

/// How often an operation is asked for again that the kernel could not do at the time.
const TRIES_MAX: u8 = 8;

/// A request under way.
#[derive(Debug)]
struct Task {
    job: Job,
    progress: Progress,
    tries: u8,
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    /// Bytes that were moved.
    Bytes(u64),
    /// Ranges that were discarded.
    Ranges(usize),
    /// Bytes of zeroes that were written, as the file system cannot make a range zero.
    Zeroes(u64),
    /// Nothing is left to do.
    Finished,
}

/// The next operation of a request, without its buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Read(Range),
    Write(Range),
    Sync,
    PunchHole(Range),
    ZeroRange(Range),
    WriteZeroes(Range),
}

/// What is left of a range after its first `done` bytes.
fn rest(range: Range, done: u64) -> Option<Range> {
    let bytes = range.bytes.checked_sub(done).filter(|left| *left > 0)?;
    Some(Range { offset: range.offset + done, bytes })
}

impl Progress {
    fn of(request: &Request) -> Self {
        match request {
            Request::Discard(_) => Self::Ranges(0),
            // Answered before it comes here.
            Request::Id => Self::Finished,
            Request::Read(_) | Request::Write(_) | Request::Flush | Request::Zero { .. } => Self::Bytes(0),
        }
    }

    /// What to do next; `None` when the request is carried out. Passes over ranges of no length, which the kernel refuses.
    fn next(&mut self, request: &Request) -> Option<Next> {
        match (request, &mut *self) {
            (Request::Read(range), Self::Bytes(done)) => rest(*range, *done).map(Next::Read),
            (Request::Write(range), Self::Bytes(done)) => rest(*range, *done).map(Next::Write),
            (Request::Flush, Self::Bytes(_)) => Some(Next::Sync),
            (Request::Discard(ranges), Self::Ranges(at)) => {
                *at += ranges.get(*at..)?.iter().take_while(|range| range.bytes == 0).count();
                ranges.get(*at).copied().map(Next::PunchHole)
            }
            (Request::Zero { range, unmap }, Self::Bytes(0)) => {
                rest(*range, 0).map(if *unmap { Next::PunchHole } else { Next::ZeroRange })
            }
            (Request::Zero { range, .. }, Self::Zeroes(done)) => rest(*range, *done).map(Next::WriteZeroes),
            (_, Self::Bytes(_) | Self::Ranges(_) | Self::Zeroes(_) | Self::Finished) => None,
        }
    }

    /// Goes on after an operation has ended. On an error the request fails.
    fn advance(&mut self, request: &Request, result: io::Result<usize>) -> io::Result<()> {
        *self = match (request, *self, result) {
            // The file has become shorter than the disk.
            (Request::Read(_) | Request::Write(_), Self::Bytes(_), Ok(0)) | (_, Self::Zeroes(_), Ok(0)) => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            (Request::Read(_) | Request::Write(_), Self::Bytes(done), Ok(count)) => Self::Bytes(done + count as u64),
            (_, Self::Zeroes(done), Ok(count)) => Self::Zeroes(done + count as u64),
            (_, Self::Ranges(at), Ok(_)) => Self::Ranges(at + 1),
            (_, Self::Bytes(_) | Self::Finished, Ok(_)) => Self::Finished,
            // A discard is a hint (5.2.6.1): a file system that cannot give space back keeps it.
            (_, Self::Ranges(at), Err(error)) if error.kind() == io::ErrorKind::Unsupported => Self::Ranges(at + 1),
            (Request::Zero { .. }, Self::Bytes(_), Err(error)) if error.kind() == io::ErrorKind::Unsupported => {
                Self::Zeroes(0)
            }
            (_, _, Err(error)) => return Err(error),
        };
        Ok(())
    }
}

impl Task {
    /// Goes on after an operation has ended. An interrupted one is asked for again, one that the kernel could not do at
    /// the time some times.
    fn advance(&mut self, result: io::Result<usize>) -> io::Result<()> {
        let passing = match &result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            Ok(_) => false,
        };
        self.tries = if passing { self.tries + 1 } else { 0 };
        if passing && self.tries < TRIES_MAX { Ok(()) } else { self.progress.advance(&self.job.request, result) }
    }

    /// The guest's buffers of a part of the request.
    fn pieces(&self, next: Next) -> Vec<Piece> {
        let Progress::Bytes(done) = self.progress else { return Vec::new() };
        // Buffers lie in memory: their lengths are sizes.
        let size = |number| usize::try_from(number).unwrap_or(usize::MAX);
        match next {
            Next::Read(range) => self.job.chain.writable_pieces(size(done), size(range.bytes)),
            Next::Write(range) => self.job.chain.readable_pieces(HEADER_BYTES + size(done), size(range.bytes)),
            Next::Sync | Next::PunchHole(_) | Next::ZeroRange(_) | Next::WriteZeroes(_) => Vec::new(),
        }
    }
}

/// A disk on a file by io_uring.
#[derive(Debug)]
pub(crate) struct UringDisk {
    ring: FileRing,
    /// By the ring's token.
    tasks: Vec<Option<Task>>,
    done: Vec<Done>,
}

impl UringDisk {
    /// A disk on `file`.
    pub(crate) fn new(ring: Ring, file: &File, ram: GuestRam) -> io::Result<Self> {
        let ring = ring.serve(file, ram)?;
        Ok(Self { ring, tasks: (0..DEPTH).map(|_| None).collect(), done: Vec::new() })
    }

    /// Signalled when requests are finished.
    pub(crate) fn finished(&self) -> &EventFd {
        self.ring.finished()
    }

    /// Takes a request over; [`commit`](Self::commit) begins it. The block device hands over no more than its queue holds.
    pub(crate) fn submit(&mut self, job: Job) {
        let progress = Progress::of(&job.request);
        let task = Task { job, progress, tries: 0 };
        match self.tasks.iter().position(Option::is_none) {
            Some(token) => self.go_on(token, task),
            None => self.finish(task, S_IOERR),
        }
    }

    /// Asks the ring for the next operation of a request, or finishes it.
    fn go_on(&mut self, token: usize, mut task: Task) {
        let Some(next) = task.progress.next(&task.job.request) else { return self.finish(task, S_OK) };
        let pieces = task.pieces(next);
        let (operation, by) = match next {
            Next::Read(Range { offset, bytes }) => (Operation::Read { to: &pieces, offset }, copied_by(bytes)),
            Next::Write(Range { offset, bytes }) => (Operation::Write { from: &pieces, offset }, copied_by(bytes)),
            Next::Sync => (Operation::Sync, By::Caller),
            Next::PunchHole(Range { offset, bytes }) => (Operation::PunchHole { offset, bytes }, By::Caller),
            Next::ZeroRange(Range { offset, bytes }) => (Operation::ZeroRange { offset, bytes }, By::Caller),
            Next::WriteZeroes(Range { offset, bytes }) => (Operation::WriteZeroes { offset, bytes }, By::Worker),
        };
        match self.ring.begin(token, operation, by) {
            Ok(()) => self.tasks[token] = Some(task),
            Err(_) => self.finish(task, S_IOERR),
        }
    }

    fn finish(&mut self, task: Task, status: u8) {
        self.done.push(Done { chain: task.job.chain, status });
    }

    /// Hands the requests to the kernel that were taken over since the last time.
    pub(crate) fn commit(&mut self) {
        match self.ring.submit() {
            Ok(()) => {}
            // The device loop comes again. It can only fail when 2^64 - 2 events are pending already.
            Err(error) if uring::is_passing(&error) => drop(self.ring.finished().write(1)),
            Err(error) => panic!("io_uring refuses what it was made for: {error}"),
        }
    }

    /// The requests finished since the last call.
    pub(crate) fn take_done(&mut self) -> Vec<Done> {
        self.reap();
        std::mem::take(&mut self.done)
    }

    /// Takes what the kernel has finished and goes on with what is not carried out by that.
    fn reap(&mut self) {
        loop {
            let completions = self.ring.take_completions();
            if completions.is_empty() {
                return;
            }
            for completion in completions {
                let Some(mut task) = self.tasks.get_mut(completion.token).and_then(Option::take) else { continue };
                match task.advance(completion.result) {
                    Ok(()) => self.go_on(completion.token, task),
                    Err(_) => self.finish(task, S_IOERR),
                }
            }
            self.commit();
        }
    }

    /// Waits until every request is finished.
    pub(crate) fn wait_idle(&mut self) {
        self.reap();
        while self.ring.under_way() > 0 {
            match self.ring.wait() {
                Ok(()) => {}
                Err(error) if uring::is_passing(&error) => {}
                Err(error) => panic!("io_uring refuses what it was made for: {error}"),
            }
            self.reap();
        }
    }
}

fn copied_by(bytes: u64) -> By {
    if bytes > CALLER_BYTES_MAX as u64 { By::Worker } else { By::Caller }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errno<T>(number: i32) -> io::Result<T> {
        Err(io::Error::from_raw_os_error(number))
    }

    fn range(offset: u64, bytes: u64) -> Range {
        Range { offset, bytes }
    }

    /// What a request is made of, as the host answers each of its operations, and whether it succeeded.
    fn story(request: &Request, answers: &[Result<usize, i32>]) -> (Vec<Next>, bool) {
        let (mut progress, mut asked) = (Progress::of(request), Vec::new());
        for answer in answers {
            let Some(next) = progress.next(request) else { break };
            asked.push(next);
            if progress.advance(request, answer.map_err(io::Error::from_raw_os_error)).is_err() {
                return (asked, false);
            }
        }
        assert_eq!(progress.next(request), None, "the story is too short");
        (asked, true)
    }

    #[test]
    fn what_is_cut_short_is_gone_on_with() {
        let asked = story(&Request::Read(range(1024, 512)), &[Ok(100), Ok(400), Ok(12)]);
        let wanted = [range(1024, 512), range(1124, 412), range(1524, 12)].map(Next::Read).to_vec();
        assert_eq!(asked, (wanted, true));
        let asked = story(&Request::Write(range(0, 1024)), &[Ok(1000), Err(libc::ENOSPC)]);
        assert_eq!(asked, (vec![Next::Write(range(0, 1024)), Next::Write(range(1000, 24))], false));
        let asked = story(&Request::Read(range(0, 1024)), &[Ok(512), Ok(0)]);
        assert_eq!(asked, (vec![Next::Read(range(0, 1024)), Next::Read(range(512, 512))], false));
        assert_eq!(story(&Request::Read(range(7, 0)), &[]), (Vec::new(), true));
    }

    #[test]
    fn a_discard_has_a_range_at_a_time_and_is_a_hint() {
        let ranges = [range(0, 512), range(512, 0), range(4096, 512), range(8192, 0)];
        let wanted = [ranges[0], ranges[2]].map(Next::PunchHole).to_vec();
        let discard = Request::Discard(ranges.to_vec());
        assert_eq!(story(&discard, &[Ok(0), Err(libc::EOPNOTSUPP)]), (wanted.clone(), true));
        assert_eq!(story(&discard, &[Err(libc::EOPNOTSUPP), Err(libc::EIO)]), (wanted, false));
    }

    #[test]
    fn zeroes_are_written_where_a_range_cannot_be_made_zero() {
        let zero = |unmap| Request::Zero { range: range(512, 1024), unmap };
        assert_eq!(story(&zero(true), &[Ok(0)]), (vec![Next::PunchHole(range(512, 1024))], true));
        assert_eq!(story(&zero(false), &[Err(libc::EIO)]), (vec![Next::ZeroRange(range(512, 1024))], false));
        let wanted = vec![
            Next::ZeroRange(range(512, 1024)),
            Next::WriteZeroes(range(512, 1024)),
            Next::WriteZeroes(range(1512, 24)),
        ];
        assert_eq!(story(&zero(false), &[Err(libc::EOPNOTSUPP), Ok(1000), Ok(24)]), (wanted, true));
    }

    #[test]
    fn interruptions_are_asked_again_and_passing_refusals_some_times() {
        let job = Job { chain: crate::machine::virtio::chain::Chain::new(0, Vec::new(), 0), request: Request::Flush };
        let mut task = Task { job, progress: Progress::Bytes(0), tries: 0 };
        for _ in 0..100 {
            task.advance(errno(libc::EINTR)).unwrap();
        }
        for _ in 1..TRIES_MAX {
            task.advance(errno(libc::EAGAIN)).unwrap();
        }
        assert_eq!(task.progress.next(&task.job.request), Some(Next::Sync));
        assert!(task.advance(errno(libc::EAGAIN)).is_err());
        task.advance(Ok(0)).unwrap();
        assert_eq!(task.progress.next(&task.job.request), None);
    }
}
