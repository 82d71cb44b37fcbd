//! The thread that waits for a disk on a file, so that the device loop does not: where the host has no io_uring, and where
//! guest memory may be missing.
//!
//! Takes jobs in order, one at a time, moves bytes between the file and guest memory, and hands the job back with its
//! status. The order makes a flush cover every write before it. The block device bounds the jobs; it also waits here
//! until there is none, at a pause and a reset: between them the worker is the only one that writes to guest memory
//! outside the slot's lock.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::request::{Range, Request};
use crate::machine::ram::GuestRam;
use crate::machine::virtio::chain::{Chain, GuestSlice};
use crate::machine::virtio::queue::RingError;
use crate::machine::virtio::spec::block::{HEADER_BYTES, S_IOERR, S_OK};
use crate::sys::thread::{self, ThreadClass};
use crate::sys::{extent, vectored};

/// Bytes of zeroes written at a time where the file system cannot make a range zero.
const ZEROES_BYTES: usize = 64 << 10;

/// A request with its buffers.
#[derive(Debug)]
pub(crate) struct Job {
    /// The buffers.
    pub(crate) chain: Chain,
    /// What to do with them.
    pub(crate) request: Request,
}

/// A request that was carried out, or not.
#[derive(Debug)]
pub(crate) struct Done {
    /// The buffers.
    pub(crate) chain: Chain,
    /// The answer for the guest.
    pub(crate) status: u8,
}

#[derive(Debug, Default)]
struct State {
    todo: VecDeque<Job>,
    done: Vec<Done>,
    busy: bool,
    stopping: bool,
}

#[derive(Debug)]
struct Desk {
    state: Mutex<State>,
    /// There is a job, or the end.
    work: Condvar,
    /// There is no job any more.
    idle: Condvar,
    finished: EventFd,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The worker of one disk.
#[derive(Debug)]
pub(crate) struct Worker {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread, of this name.
    pub(crate) fn start(file: File, ram: GuestRam, name: String) -> io::Result<Self> {
        let finished = EventFd::new(EFD_NONBLOCK)?;
        let (state, work, idle) = (Mutex::new(State::default()), Condvar::new(), Condvar::new());
        let desk = Arc::new(Desk { state, work, idle, finished });
        let body = Body { file, ram, desk: desk.clone() };
        let thread = thread::start(ThreadClass::Disk, name, move || body.run())?;
        Ok(Self { desk, thread: Some(thread) })
    }

    /// Signalled for every job that is finished.
    pub(crate) fn finished(&self) -> &EventFd {
        &self.desk.finished
    }

    /// Hands a job over.
    pub(crate) fn submit(&self, job: Job) {
        self.desk.lock().todo.push_back(job);
        self.desk.work.notify_one();
    }

    /// The jobs finished since the last call.
    pub(crate) fn take_done(&self) -> Vec<Done> {
        std::mem::take(&mut self.desk.lock().done)
    }

    /// Waits until every job is finished.
    pub(crate) fn wait_idle(&self) {
        let busy = |state: &mut State| state.busy || !state.todo.is_empty();
        let waited = self.desk.idle.wait_while(self.desk.lock(), busy);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.desk.lock().stopping = true;
        self.desk.work.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Body {
    file: File,
    ram: GuestRam,
    desk: Arc<Desk>,
}

impl Body {
    fn run(&self) {
        while let Some(job) = self.next() {
            let status = match self.carry_out(&job) {
                Ok(()) => S_OK,
                Err(_) => S_IOERR,
            };
            let mut state = self.desk.lock();
            state.done.push(Done { chain: job.chain, status });
            state.busy = false;
            if state.todo.is_empty() {
                self.desk.idle.notify_all();
            }
            drop(state);
            // It can only fail when 2^64 - 2 events are pending already.
            let _ = self.desk.finished.write(1);
        }
    }

    fn next(&self) -> Option<Job> {
        let waiting = |state: &mut State| state.todo.is_empty() && !state.stopping;
        let waited = self.desk.work.wait_while(self.desk.lock(), waiting);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.stopping {
            return None;
        }
        state.busy = true;
        state.todo.pop_front()
    }

    fn carry_out(&self, job: &Job) -> io::Result<()> {
        match &job.request {
            Request::Read(range) => self.read(&job.chain, *range),
            Request::Write(range) => self.write(&job.chain, *range),
            Request::Flush => self.file.sync_data(),
            // Answered before it comes here.
            Request::Id => Ok(()),
            Request::Discard(ranges) => ranges.iter().try_for_each(|range| {
                match extent::punch_hole(&self.file, range.offset, range.bytes) {
                    // A discard is a hint (5.2.6.1): a file system that cannot give space back keeps it.
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                    other => other,
                }
            }),
            Request::Zero { range, unmap } => self.zero(*range, *unmap),
        }
    }

    fn read(&self, chain: &Chain, range: Range) -> io::Result<()> {
        let slices = |done, left| chain.writable_slices(&self.ram, done, left);
        whole(range, slices, |slices, offset| vectored::read_at(&self.file, slices, offset))
    }

    fn write(&self, chain: &Chain, range: Range) -> io::Result<()> {
        let slices = |done, left| chain.readable_slices(&self.ram, HEADER_BYTES + done, left);
        whole(range, slices, |slices, offset| vectored::write_at(&self.file, slices, offset))
    }

    fn zero(&self, range: Range, unmap: bool) -> io::Result<()> {
        let make = if unmap { extent::punch_hole } else { extent::zero_range };
        match make(&self.file, range.offset, range.bytes) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            other => return other,
        }
        let zeroes = vec![0; ZEROES_BYTES];
        let mut done = 0;
        while done < range.bytes {
            let left = usize::try_from(range.bytes - done).unwrap_or(ZEROES_BYTES).min(ZEROES_BYTES);
            self.file.write_all_at(&zeroes[..left], range.offset + done)?;
            done += left as u64;
        }
        Ok(())
    }
}

/// Moves all bytes of a range, however the host cuts them.
fn whole<'a>(
    range: Range,
    slices: impl Fn(usize, usize) -> Result<Vec<GuestSlice<'a>>, RingError>,
    transfer: impl Fn(&[GuestSlice<'a>], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let all = usize::try_from(range.bytes).map_err(io::Error::other)?;
    let mut done = 0;
    while done < all {
        match transfer(&slices(done, all - done).map_err(io::Error::other)?, range.offset + done as u64)? {
            // The file has become shorter than the disk.
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(())
}
