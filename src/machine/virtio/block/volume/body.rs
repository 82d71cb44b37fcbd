//! The thread of a volume slot: takes orders and requests, connections and answers, and waits for more of any of them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::counts::VolumeCounts;
use super::line::{Answered, Line, LineError};
use super::tasks::{Finished, Flow, Part, Tasks, flow_of};
use super::{Attachment, Desk, Mode, Setup, State, Tell};
use crate::clock::{Clock, Monotonic};
use crate::machine::ram::GuestRam;
use crate::machine::virtio::block::nbd::{self, Export, Verdict};
use crate::machine::virtio::block::worker::{Done, Job};
use crate::machine::virtio::bucket::Limiter;
use crate::machine::virtio::spec::block::SECTOR_BYTES;
use crate::units::FlowLimits;

/// Most connections at once.
const LINES_MAX: usize = 8;

/// How long a server may take to agree upon its export.
const SHAKING_MAX: Duration = Duration::from_secs(5);

/// Shortest largest request of a server that is taken.
const BLOCK_BYTES_MAX_LEAST: u32 = 4096;

pub(super) struct Body {
    index: u8,
    listener: UnixListener,
    tell: Tell,
    ram: GuestRam,
    clock: Arc<dyn Clock>,
    desk: Arc<Desk>,
    // As it was ordered.
    mode: Mode,
    attached: Option<Attachment>,
    // What there is.
    lines: Vec<Line>,
    tasks: Tasks,
    /// Requests that wait for their turn under the limits, with when they came.
    held_back: VecDeque<(Job, Monotonic)>,
    limiter: Limiter,
    /// The handle of the next request to a server.
    next_handle: u64,
    /// Requests sent before this handle may be answered by who knew this client still, or not yet.
    fenced_at: u64,
    /// Since when something waits and there is no connection for it.
    alone_since: Option<Monotonic>,
    /// Whether requests fail at once, since there was no connection for too long.
    is_given_up: bool,
    /// Finished, and not told.
    finished: Vec<Finished>,
    counts: VolumeCounts,
}

/// What is to be watched for.
struct Ready {
    listener: bool,
    lines: Vec<PollFlags>,
}

impl Body {
    pub(super) fn new(setup: Setup, ram: GuestRam, clock: Arc<dyn Clock>, desk: Arc<Desk>) -> Self {
        let Setup { index, listener, attached, tell } = setup;
        let limiter = Limiter::new(FlowLimits::default(), clock.monotonic());
        Self {
            index,
            listener,
            tell,
            ram,
            clock,
            desk,
            mode: Mode::Parked,
            attached,
            lines: Vec::new(),
            tasks: Tasks::default(),
            held_back: VecDeque::new(),
            limiter,
            next_handle: 1,
            fenced_at: 0,
            alone_since: None,
            is_given_up: false,
            finished: Vec::new(),
            counts: VolumeCounts::default(),
        }
    }

    pub(super) fn run(mut self) {
        loop {
            let now = self.clock.monotonic();
            if !self.take_orders(now) {
                return;
            }
            self.let_go(now);
            self.give_up_in_time(now);
            self.issue();
            self.speak();
            // What was finished without a server is told before anything is waited for.
            self.publish(None);
            match self.wait(now) {
                Ok(ready) => {
                    if ready.listener {
                        self.accept();
                    }
                    self.hear(&ready.lines);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    // Only a descriptor that is none, or no memory, come to this: nothing of it can be gone on with.
                    (self.tell)(format_args!("volume {}: wait for connections: {error}", self.index));
                    let error = LineError::Io(error.into());
                    (0..self.lines.len()).rev().for_each(|at| self.end(at, &error));
                }
            }
        }
    }

    /// Obeys; false at the end.
    fn take_orders(&mut self, now: Monotonic) -> bool {
        let _ = self.desk.bell.read();
        let desk = Arc::clone(&self.desk);
        let mut state = desk.lock();
        if state.stopping {
            return false;
        }
        if state.mode == Mode::Works && self.mode != Mode::Works {
            // Time does not pass for who stands still.
            self.alone_since = None;
        }
        self.mode = state.mode;
        self.take_attachment(&state);
        if std::mem::take(&mut state.limits_changed) {
            self.limiter = Limiter::new(state.limits.flow(), now);
        }
        let todo = std::mem::take(&mut state.todo);
        self.held_back.extend(todo.into_iter().map(|job| (job, now)));
        let (fail_all, close_all) = (std::mem::take(&mut state.fail_all), std::mem::take(&mut state.close_all));
        let ordered = state.ordered;
        drop(state);
        if fail_all {
            self.fail_all(close_all);
        }
        if self.desk.lock().obeyed < ordered {
            self.publish(Some(ordered));
        }
        true
    }

    fn take_attachment(&mut self, state: &State) {
        if self.attached == state.attached {
            return;
        }
        if self.attached.is_none() || state.attached.is_none() {
            self.counts = VolumeCounts::default();
            (self.fenced_at, self.is_given_up) = (self.next_handle, false);
        } else {
            // Another size, which is agreed upon on each connection.
            self.lines.retain(|line| line.under_way() > 0);
            self.lines.iter_mut().for_each(|line| line.retires = true);
        }
        self.attached = state.attached;
    }

    fn fail_all(&mut self, close_all: bool) {
        // An answer on its way would be written to buffers that are somebody else's then.
        self.lines.retain(|line| line.under_way() == 0 && !close_all);
        self.finished.extend(self.tasks.fail_all());
        self.finished.extend(self.held_back.drain(..).map(|(job, begun)| Finished::failed(job, begun)));
    }

    /// Tells what is finished and how things are.
    fn publish(&mut self, obeyed: Option<u64>) {
        let now = self.clock.monotonic();
        let sent = self.lines.iter().map(Line::under_way).sum();
        let ready = self.lines.iter().filter(|line| line.export().is_some() && !line.retires).count();
        let done: Vec<_> = self.finished.drain(..).map(|finished| count(&mut self.counts, finished, now)).collect();
        let waiting = self.tasks.count() + self.held_back.len();
        let counts = &mut self.counts;
        counts.bytes = self.attached.map_or(0, |attached| attached.bytes);
        counts.read_only = self.attached.is_some_and(|attached| attached.read_only);
        counts.connections = u8::try_from(ready).unwrap_or(u8::MAX);
        counts.waiting = u32::try_from(waiting).unwrap_or(u32::MAX);
        let mut state = self.desk.lock();
        state.counts.clone_from(counts);
        let is_settled = sent == 0 && state.sent > 0;
        state.sent = sent;
        let has_done = !done.is_empty();
        state.done.extend(done);
        if let Some(number) = obeyed {
            state.obeyed = number;
        }
        drop(state);
        if has_done {
            let _ = self.desk.finished.write(1);
        }
        if is_settled || obeyed.is_some() {
            self.desk.news.notify_all();
        }
    }

    /// Begins requests whose turn it is.
    fn let_go(&mut self, now: Monotonic) {
        while let Some((job, _)) = self.held_back.front() {
            let fails = self.attached.is_none() || self.is_given_up;
            let (_, bytes) = flow_of(&job.request);
            if !fails && self.limiter.is_limiting() {
                if self.mode != Mode::Works || !self.limiter.wait(bytes, now).is_zero() {
                    return;
                }
                self.limiter.passed(bytes);
            }
            let Some((job, begun)) = self.held_back.pop_front() else { return };
            if fails {
                self.finished.push(Finished::failed(job, begun));
            } else {
                self.finished.extend(self.tasks.begin(job, begun));
            }
        }
    }

    fn has_connection(&self) -> bool {
        self.lines.iter().any(|line| line.export().is_some() && (!line.retires || line.under_way() > 0))
    }

    /// Fails what waits when there was no connection for too long.
    fn give_up_in_time(&mut self, now: Monotonic) {
        let waits = self.mode == Mode::Works && self.tasks.count() > 0 && !self.has_connection();
        if !waits {
            self.alone_since = None;
            return;
        }
        let since = *self.alone_since.get_or_insert(now);
        let Some(attached) = self.attached else { return };
        if since.after(attached.reconnect) <= now {
            (self.alone_since, self.is_given_up) = (None, true);
            (self.tell)(format_args!(
                "volume {}: no connection for {} ms, requests fail until there is one",
                self.index,
                attached.reconnect.as_millis()
            ));
            self.fail_all(false);
        }
    }

    /// Gives parts to connections, each to the one that has least to do.
    fn issue(&mut self) {
        while self.mode == Mode::Works && self.tasks.has_unsent() {
            let free = self.lines.iter_mut().filter(|line| line.has_room()).min_by_key(|line| line.under_way());
            let Some(line) = free else { return };
            let Some(export) = line.export().copied() else { return };
            let Some(part) = self.tasks.next_part(&export) else { return };
            let handle = self.next_handle;
            self.next_handle += 1;
            if !line.send(part, handle) {
                self.finished.extend(self.tasks.answered(part, false));
            }
        }
    }

    /// Writes what there is to write.
    fn speak(&mut self) {
        let mut at = 0;
        while at < self.lines.len() {
            let line = &mut self.lines[at];
            if !line.has_more() || (self.mode == Mode::Parked && line.export().is_some()) {
                at += 1;
                continue;
            }
            match line.speak(&self.tasks, &self.ram) {
                Ok(None) => at += 1,
                Ok(Some(answered)) => self.answered(answered),
                Err(error) => self.end(at, &error),
            }
        }
    }

    /// When something is due that no descriptor will tell of.
    fn patience(&mut self, now: Monotonic) -> PollTimeout {
        let reconnect = self.attached.map(|attached| attached.reconnect);
        let alone = self.alone_since.zip(reconnect).map(|(since, reconnect)| since.after(reconnect));
        let turn = self.held_back.front().filter(|_| self.mode == Mode::Works).map(|(job, _)| flow_of(&job.request).1);
        let turn = turn.map(|bytes| now.after(self.limiter.wait(bytes, now)));
        let shaken = self.lines.iter().filter(|line| line.export().is_none()).map(|line| line.since.after(SHAKING_MAX));
        let Some(due) = shaken.chain(alone).chain(turn).min() else { return PollTimeout::NONE };
        // Rounded up: what is due has to be due when the wait is over.
        let left = due.since(now).as_micros().div_ceil(1000);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    /// Whether another connection is of use.
    fn has_room(&self) -> bool {
        let is_lonely = |line: &Line| !line.retires && line.export().is_some_and(|one| !one.has(nbd::CAN_MULTI_CONN));
        self.lines.len() < LINES_MAX && !self.lines.iter().any(is_lonely)
    }

    /// Waits until there is something to do.
    fn wait(&mut self, now: Monotonic) -> nix::Result<Ready> {
        let patience = self.patience(now);
        let mut sources = vec![PollFd::new(self.desk.bell.as_fd(), PollFlags::POLLIN)];
        let listens = self.has_room();
        if listens {
            sources.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        // One that is parked is not looked at, nor whether its server hung up.
        let is_watched = |line: &Line| self.mode != Mode::Parked || line.export().is_none();
        for line in self.lines.iter().filter(|line| is_watched(line)) {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, line.has_more());
            sources.push(PollFd::new(line.as_fd(), events));
        }
        poll(&mut sources, patience)?;
        let mut told = sources.iter().skip(1).map(|source| source.revents().unwrap_or(PollFlags::POLLERR));
        let listener = listens && told.next().is_some_and(|flags| !flags.is_empty());
        let watched =
            |line: &Line| if is_watched(line) { told.next().unwrap_or(PollFlags::empty()) } else { PollFlags::empty() };
        let lines = self.lines.iter().map(watched).collect();
        Ok(Ready { listener, lines })
    }

    /// Takes a connection.
    fn accept(&mut self) {
        // One that cannot be taken is hung up on, as is any while nothing is attached: the server tries again.
        let Ok((socket, _)) = self.listener.accept() else { return };
        if self.attached.is_some() && socket.set_nonblocking(true).is_ok() {
            self.lines.push(Line::new(socket, self.clock.monotonic()));
        }
    }

    /// Reads what came. `flags` are those of the first connections; a new one has none yet.
    fn hear(&mut self, flags: &[PollFlags]) {
        let now = self.clock.monotonic();
        // From the last to the first: one that ends leaves those before it in their places.
        for at in (0..self.lines.len()).rev() {
            let heard = if self.lines[at].export().is_none() {
                self.shake(at, now)
            } else if flags.get(at).is_some_and(|flags| flags.intersects(!PollFlags::POLLOUT)) {
                self.hear_line(at)
            } else {
                Ok(())
            };
            if let Err(error) = heard {
                self.end(at, &error);
            } else if self.lines[at].retires && self.lines[at].under_way() == 0 {
                self.lines.remove(at);
            }
        }
    }

    fn hear_line(&mut self, at: usize) -> Result<(), LineError> {
        while let Some(answered) = self.lines[at].hear(&self.tasks, &self.ram)? {
            self.answered(answered);
        }
        Ok(())
    }

    fn shake(&mut self, at: usize, now: Monotonic) -> Result<(), LineError> {
        if !self.lines[at].shake()? {
            let is_late = self.lines[at].since.after(SHAKING_MAX) <= now;
            return if is_late { Err(LineError::Io(io::ErrorKind::TimedOut.into())) } else { Ok(()) };
        }
        let (Some(attached), Some(export)) = (self.attached, self.lines[at].export().copied()) else { return Ok(()) };
        if let Some(reason) = unfit(attached, export) {
            return Err(LineError::Unfit(reason));
        }
        let rivals = |line: &&Line| !line.retires && line.export().is_some();
        let shares = self.lines.iter().filter(rivals).all(|line| line.export().is_some_and(can_share));
        if self.lines.iter().filter(rivals).count() > 1 && !shares {
            // A flush would cover only what was written on its own connection.
            self.lines[at].retires = true;
        }
        self.counts.trouble = None;
        self.is_given_up = false;
        Ok(())
    }

    /// What the server said of a part.
    fn answered(&mut self, Answered { part, verdict, handle }: Answered) {
        if verdict == Verdict::Fenced {
            (self.counts.fenced, self.fenced_at) = (true, self.next_handle);
        } else if handle >= self.fenced_at {
            // It was sent after the server last said no.
            self.counts.fenced = false;
        }
        let finished = self.tasks.answered(part, verdict != Verdict::Done);
        self.finished.extend(finished);
    }

    /// A connection is of no further use: what it did not answer goes elsewhere.
    fn end(&mut self, at: usize, error: &LineError) {
        let line = self.lines.remove(at);
        let was_ready = line.export().is_some() && !matches!(error, LineError::Unfit(_));
        let parts: Vec<Part> = line.close();
        let finished = self.tasks.put_back(parts);
        self.finished.extend(finished);
        if was_ready {
            self.counts.reconnects += 1;
        }
        // The ordinary end of a server is no trouble; and what is said once is not said at each attempt.
        let is_ordinary = was_ready && matches!(error, LineError::HungUp | LineError::ShutDown);
        let reason = error.to_string();
        if !is_ordinary && self.counts.trouble.as_deref() != Some(&reason) {
            (self.tell)(format_args!("volume {}: a connection is given up: {reason}", self.index));
            self.counts.trouble = Some(reason);
        }
    }
}

fn can_share(export: &Export) -> bool {
    export.has(nbd::CAN_MULTI_CONN)
}

/// Why an export is not the volume that is attached.
fn unfit(attached: Attachment, export: Export) -> Option<String> {
    let Export { bytes, block_bytes_min, block_bytes_max, .. } = export;
    // It may have been made larger meanwhile, of which the guest is told when this is.
    if bytes < attached.bytes {
        Some(format!("the server exports {bytes} bytes, the volume has {}", attached.bytes))
    } else if !attached.read_only && export.has(nbd::READ_ONLY) {
        Some("the server exports the volume read-only".to_owned())
    } else if !attached.read_only && !export.has(nbd::SEND_FLUSH) {
        Some("the server takes no flush".to_owned())
    } else if u64::from(block_bytes_min) > SECTOR_BYTES || block_bytes_max < BLOCK_BYTES_MAX_LEAST {
        Some(format!("the server takes requests in blocks of {block_bytes_min} to {block_bytes_max} bytes"))
    } else {
        None
    }
}

/// Counts a request, and gives it to be handed back.
fn count(counts: &mut VolumeCounts, finished: Finished, now: Monotonic) -> Done {
    let took = now.since(finished.begun);
    if !finished.is_ok() {
        counts.errors += 1;
    } else {
        match finished.flow {
            Flow::Read => counts.read.add(finished.bytes, took),
            Flow::Write => counts.write.add(finished.bytes, took),
            Flow::Flush => counts.flush.add(finished.bytes, took),
            Flow::Other => {}
        }
    }
    finished.done
}
