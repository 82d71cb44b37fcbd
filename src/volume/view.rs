//! A map and its layers: what a volume or a snapshot reads as.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::chunk::{bytes_of, chunk_of, chunks_in};
use super::error::{Damage, VolumeError};
use super::format::{LayerLine, Run};
use super::layer::Layer;
use super::map::{ChunkMap, Entry, LOST};

/// A layer in the list of a map.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) line: LayerLine,
    /// `None` for one that is missing or too short, and for one that no chunk is in any more.
    pub(super) layer: Option<Arc<Layer>>,
}

/// Bytes of a volume that are data, or that read as zero and take no space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusRun {
    /// The first byte.
    pub offset: u64,
    /// How many.
    pub length: u64,
    /// Whether there is data; what is none reads as zero.
    pub is_data: bool,
}

/// What a volume reads as.
#[derive(Debug)]
pub(super) struct View {
    pub(super) subject: String,
    /// The map's file, for messages.
    pub(super) map_path: PathBuf,
    pub(super) size_bytes: u64,
    pub(super) map: ChunkMap,
    /// Entry number 1 is the first.
    pub(super) slots: Vec<Slot>,
}

impl View {
    pub(super) fn of_runs(subject: &str, map_path: PathBuf, size_bytes: u64, slots: Vec<Slot>, runs: &[Run]) -> Self {
        let map = ChunkMap::new(chunks_in(size_bytes));
        for run in runs {
            let entry = Entry { layer: run.layer, generation: run.generation };
            map.set(run.first..run.first.saturating_add(run.count), entry);
        }
        Self { subject: subject.to_owned(), map_path, size_bytes, map, slots }
    }

    /// The layer of this number and how long it is.
    fn slot(&self, layer: u16, chunk: u32) -> Result<(&Arc<Layer>, u64), VolumeError> {
        let slot = usize::from(layer).checked_sub(1).and_then(|place| self.slots.get(place));
        match slot.and_then(|slot| slot.layer.as_ref().map(|layer| (layer, slot.line.bytes))) {
            Some(found) => Ok(found),
            None => Err(self.lost(chunk)),
        }
    }

    pub(super) fn lost(&self, chunk: u32) -> VolumeError {
        let damage = Damage {
            file: self.map_path.display().to_string(),
            offset: 0,
            what: format!("what chunk {chunk} held is lost"),
        };
        VolumeError::Damaged { subject: self.subject.clone(), damage }
    }

    pub(super) fn io(&self, what: &'static str, layer: &Layer, source: std::io::Error) -> VolumeError {
        VolumeError::io(&self.subject, what, layer.path(), source)
    }

    /// The first part of a range that lies in one layer, or in none.
    fn part(&self, range: &Range<u64>) -> (u16, Range<u64>) {
        let chunks = chunk_of(range.start)..chunk_of(range.end - 1).saturating_add(1);
        let (layer, chunks) = self.map.same_layer(chunks);
        let end = bytes_of(&chunks, self.size_bytes).end.min(range.end);
        (layer, range.start..end)
    }

    /// Fills the buffer. The range was checked.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let end = offset + buffer.len() as u64;
        let (mut at, mut rest) = (offset, buffer);
        while at < end {
            let (layer, part) = self.part(&(at..end));
            let bytes = usize::try_from(part.end - part.start).unwrap_or(rest.len());
            let (now, later) = rest.split_at_mut(bytes.min(rest.len()));
            match layer {
                0 => now.fill(0),
                LOST => return Err(self.lost(chunk_of(at))),
                layer => self.read_layer(layer, now, at)?,
            }
            (at, rest) = (part.end, later);
        }
        Ok(())
    }

    fn read_layer(&self, number: u16, buffer: &mut [u8], offset: u64) -> Result<(), VolumeError> {
        let (layer, length) = self.slot(number, chunk_of(offset))?;
        let read = layer.file.read_at(buffer, offset).map_err(|error| self.io("read", layer, error))?;
        if read < buffer.len() && offset + (read as u64) < length {
            // It became shorter behind our back.
            return Err(self.lost(chunk_of(offset + read as u64)));
        }
        buffer[read..].fill(0);
        Ok(())
    }

    /// What of a range is data, at most `max` runs from its start on. The range was checked.
    pub(super) fn status(&self, range: &Range<u64>, max: usize) -> Result<Vec<StatusRun>, VolumeError> {
        let mut runs: Vec<StatusRun> = Vec::new();
        let mut push = |part: Range<u64>, is_data| {
            let length = part.end - part.start;
            match runs.last_mut() {
                _ if length == 0 => {}
                Some(last) if last.is_data == is_data => last.length += length,
                Some(_) | None => runs.push(StatusRun { offset: part.start, length, is_data }),
            }
            runs.len()
        };
        let mut at = range.start;
        while at < range.end {
            let (layer, part) = self.part(&(at..range.end));
            at = part.end;
            let count = match layer {
                0 => push(part, false),
                // Whoever reads it is told what is wrong.
                LOST => push(part, true),
                layer => self.layer_status(layer, &part, max, &mut push)?,
            };
            if count > max {
                break;
            }
        }
        runs.truncate(max);
        Ok(runs)
    }

    fn layer_status(
        &self,
        number: u16,
        part: &Range<u64>,
        max: usize,
        push: &mut impl FnMut(Range<u64>, bool) -> usize,
    ) -> Result<usize, VolumeError> {
        let Ok((layer, length)) = self.slot(number, chunk_of(part.start)) else { return Ok(push(part.clone(), true)) };
        let (mut at, end) = (part.start, part.end.min(length));
        let mut count = 0;
        while at < part.end && count <= max {
            let data = layer.file.next_data(at, end).map_err(|error| self.io("look at", layer, error))?;
            let data = data.unwrap_or(part.end..part.end);
            push(at..data.start, false);
            at = data.end;
            count = push(data, true);
        }
        Ok(count)
    }
}
