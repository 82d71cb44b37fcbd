//! What is sent, in which order: rounds while the guest runs, then the last pages and the state while it stands still.

use std::fs::File;
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::Duration;

use super::lane::Lane;
use super::{
    HELD_MIN, HELD_TIMES_MAX, Job, News, PAUSE_FIXED, PROTECTED_AT_ONCE, SILENCE_MAX_HELD, SendError, Sender, bytes,
    nanos, per_second, pieces,
};
use crate::clock::{Clock, Monotonic};
use crate::machine::pre_copy::{Decision, Policy, PreCopy, Round, Unconverged};
use crate::machine::{DirtyConsumer, GuestRam, Harvester, PageRun, image, pages};
use crate::units::{Bytes, PAGE_BYTES};
use crate::wire::control::{PackedPhases, SendPhase, SendPhases, SendSpec, SentPages};
use crate::wire::packed::Packer;
use crate::wire::stream::{BODY_BYTES_MAX, Kind, Pages, STATE_BYTES_MAX, state_digest};

/// A send under way.
pub(super) struct Copy<'a> {
    pub(super) sender: &'a mut Sender,
    pub(super) ram: GuestRam,
    pub(super) lanes: Vec<Lane>,
    pub(super) spec: SendSpec,
    /// What packs pages, if they are packed.
    pub(super) packer: Option<Packer>,
    pub(super) counts: SendPhases,
    pub(super) packed: PackedPhases,
    /// Whether the guest stands still.
    pub(super) held: bool,
    /// Its state, if it came before it was needed.
    pub(super) state: Option<Vec<u8>>,
    pub(super) round: u32,
}

impl Copy<'_> {
    pub(super) fn all(
        &mut self,
        dirty: &Harvester,
        pagemap: &File,
        runs: bool,
        begun: Monotonic,
    ) -> Result<(), SendError> {
        let pages = match self.spec.pages {
            SentPages::All => Some(image::Pages::All),
            SentPages::Changed => Some(image::Pages::Changed),
            SentPages::None => None,
        };
        let consumer = match pages {
            Some(pages) => {
                let touched = || image::touched(&self.ram, pages, pagemap).map_err(SendError::Find);
                Some(dirty.subscribe_touched(touched)?)
            }
            None => None,
        };
        if let Some(consumer) = consumer.as_ref().filter(|_| runs) {
            self.rounds(consumer)?;
        }
        self.counts.running_ns = nanos(self.sender.clock.monotonic().since(begun));
        self.critical(consumer.as_ref())
    }

    /// Rounds, until what is left can be sent while the guest stands still.
    fn rounds(&mut self, consumer: &DirtyConsumer) -> Result<(), SendError> {
        let spec = &self.spec;
        let policy = Policy {
            pause_max: Duration::from_millis(spec.pause_ms_max.into()),
            rounds_max: spec.rounds_max,
            deadline: Duration::from_millis(spec.deadline_ms),
            throttle: spec.throttle,
            unconverged: if spec.force { Unconverged::Force } else { Unconverged::Abort },
        };
        let mut pre_copy = PreCopy::new(policy, PAUSE_FIXED);
        loop {
            let begun = self.sender.clock.monotonic();
            let sent = self.round(consumer)?;
            let took = self.sender.clock.monotonic().since(begun);
            let dirty = bytes(consumer.harvest().map_err(SendError::Log)?);
            self.counts.rounds += 1;
            let decision = pre_copy.after(Round { sent, took, dirty });
            self.sender.progress(|progress| {
                progress.rounds = self.counts.rounds;
                progress.rate_bytes = pre_copy.rate().map_or(0, |rate| rate.0);
                progress.dirty_rate_bytes = per_second(dirty, took);
                progress.pause_expected_ns = nanos(pre_copy.pause_expected(dirty));
            });
            match decision {
                Decision::Round => {}
                Decision::Throttle(share) => {
                    self.sender.progress(|progress| progress.vcpu_share = share);
                    self.sender.tell(News::Throttle(share));
                }
                Decision::Critical => return Ok(()),
                Decision::Abort(abort) => return Err(abort.into()),
            }
        }
    }

    /// Sends every page in the set, and waits until all are acknowledged.
    fn round(&mut self, consumer: &DirtyConsumer) -> Result<Bytes, SendError> {
        let begun = self.sender.clock.monotonic();
        let all = bytes(consumer.snapshot().len());
        self.sender.progress(|progress| (progress.round_bytes, progress.round_sent_bytes) = (all.0, 0));
        let mut sent = Bytes(0);
        let mut buffer = Vec::new();
        loop {
            let chunk = consumer.take_batch(PROTECTED_AT_ONCE).map_err(SendError::Log)?;
            if chunk.is_empty() {
                break;
            }
            for run in chunk {
                for piece in pieces(run) {
                    self.send_pages(piece, &mut buffer)?;
                    sent.0 += piece.count.0 * PAGE_BYTES;
                    self.go_on(begun, sent)?;
                }
            }
        }
        let number = self.round.to_le_bytes();
        self.round += 1;
        for lane in &mut self.lanes {
            lane.push(Kind::RoundEnd, &number, &[], 0)?;
        }
        for at in 0..self.lanes.len() {
            self.take_acks(at, Lane::is_waiting)?;
        }
        Ok(sent)
    }

    /// Takes acknowledgements of a connection while that is so. Each takes as long as the other end likes, within its silence.
    fn take_acks(&mut self, at: usize, is_so: impl Fn(&Lane) -> bool) -> Result<(), SendError> {
        while let Some(lane) = self.lanes.get_mut(at).filter(|lane| is_so(lane)) {
            lane.take_ack()?;
            self.hear()?;
        }
        Ok(())
    }

    /// Sends pages that follow each other on the connection that has least to do.
    fn send_pages(&mut self, run: PageRun, buffer: &mut Vec<u8>) -> Result<(), SendError> {
        pages::read(&self.ram, run, buffer).map_err(SendError::Read)?;
        let least = self.lanes.iter().zip(0..).min_by_key(|(lane, _)| lane.in_flight_bytes);
        // There is at least one.
        let Some((_, at)) = least else { return Ok(()) };
        let mut first = run.first;
        for part in pages::by_kind(buffer) {
            let count = part.count();
            let Some(lane) = self.lanes.get_mut(at) else { return Ok(()) };
            let Some(head) = Pages::new(first, count).map(Pages::to_bytes) else { continue };
            if part.zero {
                lane.push(Kind::ZeroPages, &head, &[], 0)?;
                self.counts.zero_pages += count.0;
            } else {
                let memory = count.0 * PAGE_BYTES;
                match self.packer.as_mut().and_then(|packer| packer.pack(part.bytes())) {
                    Some(block) => {
                        lane.push(Kind::PackedPages, &head, block, memory)?;
                        self.packed.pages += count.0;
                        self.packed.bytes += block.len() as u64;
                    }
                    None => lane.push(Kind::Pages, &head, part.bytes(), memory)?,
                }
                self.counts.pages += count.0;
            }
            self.take_acks(at, Lane::is_full)?;
            first.0 += count.0;
        }
        Ok(())
    }

    /// Between two pieces: whether to go on, and when.
    fn go_on(&mut self, begun: Monotonic, sent: Bytes) -> Result<(), SendError> {
        self.sender.progress(|progress| {
            progress.sent_bytes += sent.0 - progress.round_sent_bytes.min(sent.0);
            progress.round_sent_bytes = sent.0;
        });
        self.hear()?;
        let Some(rate) = self.spec.rate_bytes_max.filter(|_| !self.held) else { return Ok(()) };
        let due = u64::try_from(u128::from(sent.0) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX);
        let early = Duration::from_nanos(due).saturating_sub(self.sender.clock.monotonic().since(begun));
        if early.is_zero() {
            return Ok(());
        }
        let round = self.round;
        self.lanes.iter_mut().try_for_each(|lane| lane.keep_alive(round))?;
        match self.sender.jobs.recv_timeout(early) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(_) | Err(RecvTimeoutError::Disconnected) => Err(SendError::Cancelled),
        }
    }

    /// What the first thread has told meanwhile.
    fn hear(&mut self) -> Result<(), SendError> {
        match self.sender.jobs.try_recv() {
            Err(TryRecvError::Empty) => Ok(()),
            // It is collected while the last pages are sent.
            Ok(Job::State(state)) => {
                self.state = Some(state);
                Ok(())
            }
            Ok(_) | Err(TryRecvError::Disconnected) => Err(SendError::Cancelled),
        }
    }

    /// The guest stands still: the pages that are left, and the state.
    fn critical(&mut self, consumer: Option<&DirtyConsumer>) -> Result<(), SendError> {
        self.sender.tell(News::Converged);
        let Ok(Job::Held) = self.sender.jobs.recv() else { return Err(SendError::Cancelled) };
        let begun = self.sender.clock.monotonic();
        self.held = true;
        let bound = Duration::from_millis(self.spec.pause_ms_max.into()).saturating_mul(HELD_TIMES_MAX).max(HELD_MIN);
        let deadline = (!self.spec.force).then(|| begun.after(bound));
        for lane in &mut self.lanes {
            lane.link.connection_mut().hurry(SILENCE_MAX_HELD, deadline).map_err(SendError::Prepare)?;
        }
        self.sender.progress(|progress| progress.phase = SendPhase::Critical);
        if let Some(consumer) = consumer {
            consumer.harvest().map_err(SendError::Log)?;
            self.counts.last_pages = self.round(consumer)?.0 / PAGE_BYTES;
        }
        let last_sent = self.sender.clock.monotonic();
        let state = match self.state.take() {
            Some(state) => state,
            None => match self.sender.jobs.recv() {
                Ok(Job::State(state)) => state,
                Ok(_) | Err(_) => return Err(SendError::Cancelled),
            },
        };
        self.hand_over(&state)?;
        self.counts.state_bytes = state.len() as u64;
        self.counts.last_pages_ns = nanos(last_sent.since(begun));
        self.counts.ready_ns = nanos(self.sender.clock.monotonic().since(last_sent));
        Ok(())
    }

    /// Sends the state and waits until the other end has made a machine of it.
    fn hand_over(&mut self, state: &[u8]) -> Result<(), SendError> {
        if state.len() > STATE_BYTES_MAX {
            return Err(SendError::StateBytes(state.len()));
        }
        // There is at least one.
        let Some(lane) = self.lanes.first_mut() else { return Ok(()) };
        let digest = state_digest(state);
        let mut parts = state.chunks(BODY_BYTES_MAX as usize);
        let sent = parts.try_for_each(|part| lane.link.send(Kind::State, part));
        sent.and_then(|()| lane.link.send(Kind::End, &digest)).map_err(|source| lane.failed(source))?;
        let mut body = Vec::new();
        lane.link.expect(Kind::Ready, "Ready", &mut body).map_err(|source| lane.failed(source))?;
        if body == digest { Ok(()) } else { Err(SendError::OtherState) }
    }
}
