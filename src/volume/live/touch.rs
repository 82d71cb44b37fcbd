//! What changes a volume's bytes: writes, zeroes, discards.
//!
//! The first touch of a chunk in a generation leaves a record in the map. For a chunk that is not in the top yet it comes
//! after the bytes: until then the chunk is where it was, whatever lies in the top. For one that is there already it comes
//! before them: a process that ends in between has told of a change that was none, which harms nobody.

use std::io;
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use super::{Live, STRIPES, State, Volume};
use crate::volume::chunk::{CHUNK_BYTES, Piece, pieces, range_in};
use crate::volume::error::VolumeError;
use crate::volume::format::Record;
use crate::volume::log::AppendError;
use crate::volume::map::{Entry, LOST};

/// Chunks that share a stripe: a request of this size takes one lock and leaves one record.
const STRIPE_CHUNKS: u64 = 16;

/// What a range is to hold.
#[derive(Debug, Clone, Copy)]
enum Content<'a> {
    /// These bytes, which begin at an offset of the volume.
    Bytes(&'a [u8], u64),
    /// Zeroes, in space that is there to be written to or in none.
    Zeros { keeps_space: bool },
    /// Zeroes where that costs nothing, otherwise what it holds.
    Discard,
}

/// What is done for a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Nothing: it is as it is to be.
    Skip,
    /// The chunk is in the top from now on, where it is a hole.
    Adopt,
    /// The bytes go to the top.
    Put,
    /// All of the chunk goes to the top, what the layers below hold and the bytes over it.
    CopyUp,
}

impl Content<'_> {
    const fn step(self, piece: Piece, entry: Entry, top: u16) -> Step {
        if entry.layer == top {
            return Step::Put;
        }
        match (self, entry.layer, piece.is_whole()) {
            (Self::Zeros { keeps_space: false } | Self::Discard, 0, _) | (Self::Discard, _, false) => Step::Skip,
            (Self::Zeros { keeps_space: false } | Self::Discard, _, true) => Step::Adopt,
            (Self::Bytes(..) | Self::Zeros { .. }, 0, _) | (Self::Bytes(..) | Self::Zeros { .. }, _, true) => Step::Put,
            (Self::Bytes(..) | Self::Zeros { .. }, _, false) => Step::CopyUp,
        }
    }

    /// Bytes a step writes to the disk.
    const fn cost(self, step: Step, piece: Piece) -> u64 {
        match (step, self) {
            (Step::CopyUp, _) => piece.chunk_range().end - piece.chunk_range().start,
            (Step::Put, Self::Bytes(..) | Self::Zeros { keeps_space: true }) => piece.end - piece.start,
            (Step::Put, _) | (Step::Skip | Step::Adopt, _) => 0,
        }
    }
}

impl Volume {
    /// Writes bytes. They are there for whoever reads from now on, and after the end of this process; after a loss of power
    /// once a [`flush`](Self::flush) that began later has succeeded.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), VolumeError> {
        self.change(offset, bytes.len() as u64, Content::Bytes(bytes, offset))
    }

    /// Makes a range read as zero, with space that is there for later writes or without.
    pub fn zero(&self, offset: u64, length: u64, keeps_space: bool) -> Result<(), VolumeError> {
        self.change(offset, length, Content::Zeros { keeps_space })
    }

    /// Gives space back. The range reads as zero then; parts of chunks that lie in shared layers stay as they are.
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.change(offset, length, Content::Discard)
    }

    fn change(&self, offset: u64, length: u64, content: Content<'_>) -> Result<(), VolumeError> {
        let state = self.state();
        let range = range_in(&self.subject, offset, length, state.view.size_bytes)?;
        let live = self.live(&state)?;
        self.take_space(&state, live, &range, content)?;
        let mut at = range.start;
        while at < range.end {
            let stripe_bytes = STRIPE_CHUNKS * CHUNK_BYTES;
            let end = ((at / stripe_bytes + 1) * stripe_bytes).min(range.end);
            self.change_in_stripe(&state, live, at..end, content)?;
            at = end;
        }
        let is_long = self.is_long(live);
        drop(state);
        if is_long {
            self.compact();
        }
        Ok(())
    }

    /// Refuses what would take more space than there may be, before anything of it is written.
    fn take_space(
        &self,
        state: &State,
        live: &Live,
        range: &Range<u64>,
        content: Content<'_>,
    ) -> Result<(), VolumeError> {
        let steps = || {
            pieces(range.clone(), state.view.size_bytes).map(|piece| {
                let entry = state.view.map.get(piece.chunk);
                let step = content.step(piece, entry, live.number);
                (piece, entry.layer == live.number, content.cost(step, piece))
            })
        };
        let wanted = steps().map(|(_, _, cost)| cost).sum::<u64>();
        if wanted == 0 {
            return Ok(());
        }
        // What lies in the top and is data already is written over.
        let needed = || {
            let mut needed = 0;
            for (piece, is_here, cost) in steps() {
                needed += if is_here && cost > 0 { cost.saturating_sub(data_in(live, piece.range())?) } else { cost };
            }
            Ok(needed)
        };
        match self.parts.space.take(wanted, needed) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(available_bytes)) => {
                Err(VolumeError::NoSpace { subject: self.subject.clone(), wanted_bytes: wanted, available_bytes })
            }
            Err(error) => Err(state.view.io("look at the space of", &live.top, error)),
        }
    }

    fn change_in_stripe(
        &self,
        state: &State,
        live: &Live,
        range: Range<u64>,
        content: Content<'_>,
    ) -> Result<(), VolumeError> {
        let size_bytes = state.view.size_bytes;
        let ready = Entry { layer: live.number, generation: state.generation };
        if pieces(range.clone(), size_bytes).all(|piece| state.view.map.get(piece.chunk) == ready) {
            return put(live, &range, content).map_err(|error| state.view.io("write", &live.top, error));
        }
        let _first = self.stripe(range.start);
        let mut steps = Vec::new();
        let (mut again, mut first) = (Vec::new(), Vec::new());
        for piece in pieces(range, size_bytes) {
            let entry = state.view.map.get(piece.chunk);
            if entry.layer == LOST {
                return Err(state.view.lost(piece.chunk));
            }
            let step = content.step(piece, entry, live.number);
            if step != Step::Skip && entry != ready {
                push(if entry.layer == live.number { &mut again } else { &mut first }, piece.chunk);
            }
            steps.push((piece, step));
        }
        self.record(state, live, &again, ready)?;
        let done =
            self.clear_stale(live, &first, size_bytes).and_then(|()| self.carry_out(state, live, &steps, content));
        let done = done.and_then(|()| self.record(state, live, &first, ready));
        if done.is_err() {
            let mut stale = self.stale.lock().unwrap_or_else(PoisonError::into_inner);
            stale.extend(first.iter().cloned().flatten());
        }
        done
    }

    fn stripe(&self, offset: u64) -> MutexGuard<'_, ()> {
        let stripe = usize::try_from(offset / (STRIPE_CHUNKS * CHUNK_BYTES)).unwrap_or(0) % STRIPES;
        self.stripes[stripe].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(
        &self,
        state: &State,
        live: &Live,
        steps: &[(Piece, Step)],
        content: Content<'_>,
    ) -> Result<(), VolumeError> {
        let failed = |error| state.view.io("write", &live.top, error);
        let mut run: Option<Range<u64>> = None;
        for (piece, step) in steps {
            if *step == Step::Put {
                let start = run.take().map_or(piece.start, |run| run.start);
                run = Some(start..piece.end);
                continue;
            }
            if let Some(run) = run.take() {
                put(live, &run, content).map_err(failed)?;
            }
            if *step == Step::CopyUp {
                copy_up(state, live, *piece, content)?;
            }
        }
        run.map_or(Ok(()), |run| put(live, &run, content).map_err(failed))
    }

    /// Leaves records of chunks, and has them in the map.
    fn record(&self, state: &State, live: &Live, chunks: &[Range<u32>], entry: Entry) -> Result<(), VolumeError> {
        let generation = entry.generation;
        let touched = |run: &Range<u32>| Record::Touched { first: run.start, count: run.end - run.start, generation };
        let records: Vec<Record> = chunks.iter().map(touched).collect();
        let path = || state.view.map_path.clone();
        live.log.append(&records).map_err(|error| match error {
            AppendError::Nothing(error) => VolumeError::io(&self.subject, "write the map of", path(), error),
            AppendError::Broken(error) => {
                self.distrust(path(), format!("it could not be written: {error}"));
                VolumeError::io(&self.subject, "write the map of", path(), error)
            }
        })?;
        for run in chunks {
            state.view.map.set(run.clone(), entry);
        }
        Ok(())
    }

    /// Has holes in the top where chunks come to it, also where a write failed half-way before.
    fn clear_stale(&self, live: &Live, chunks: &[Range<u32>], size_bytes: u64) -> Result<(), VolumeError> {
        let mut stale = self.stale.lock().unwrap_or_else(PoisonError::into_inner);
        if stale.is_empty() {
            return Ok(());
        }
        for chunk in chunks.iter().cloned().flatten() {
            if stale.contains(&chunk) {
                let range = crate::volume::chunk::bytes_of(&(chunk..chunk + 1), size_bytes);
                let failed = |error| VolumeError::io(&self.subject, "clear", live.top.path(), error);
                live.top.file.punch(&range).map_err(failed)?;
                stale.remove(&chunk);
            }
        }
        Ok(())
    }
}

/// How many bytes of a range are data in the top.
fn data_in(live: &Live, range: Range<u64>) -> io::Result<u64> {
    let (mut at, mut bytes) = (range.start, 0);
    while let Some(data) = live.top.file.next_data(at, range.end)? {
        bytes += data.end - data.start;
        at = data.end;
    }
    Ok(bytes)
}

/// Has the content of a range in the top.
fn put(live: &Live, range: &Range<u64>, content: Content<'_>) -> io::Result<()> {
    match content {
        Content::Bytes(bytes, offset) => {
            let at = |place: u64| usize::try_from(place - offset).unwrap_or(usize::MAX);
            let bytes = bytes.get(at(range.start)..at(range.end)).ok_or(io::ErrorKind::InvalidInput)?;
            live.top.file.write_all_at(bytes, range.start)
        }
        Content::Zeros { keeps_space: true } => live.top.file.zero(range),
        Content::Zeros { keeps_space: false } | Content::Discard => live.top.file.punch(range),
    }
}

fn copy_up(state: &State, live: &Live, piece: Piece, content: Content<'_>) -> Result<(), VolumeError> {
    let chunk = piece.chunk_range();
    let mut buffer = vec![0; usize::try_from(chunk.end - chunk.start).unwrap_or(0)];
    state.view.read(&mut buffer, chunk.start)?;
    let within = |at: u64| usize::try_from(at - chunk.start).unwrap_or(usize::MAX);
    let over = &mut buffer[within(piece.start)..within(piece.end)];
    match content {
        Content::Bytes(bytes, offset) => {
            let from = usize::try_from(piece.start - offset).unwrap_or(usize::MAX);
            over.copy_from_slice(&bytes[from..from + over.len()]);
        }
        Content::Zeros { .. } | Content::Discard => over.fill(0),
    }
    live.top.file.write_all_at(&buffer, chunk.start).map_err(|error| state.view.io("write", &live.top, error))
}

fn push(runs: &mut Vec<Range<u32>>, chunk: u32) {
    match runs.last_mut() {
        Some(last) if last.end == chunk => last.end += 1,
        Some(_) | None => runs.push(chunk..chunk + 1),
    }
}
