//! What needs a new map: snapshots, a new size, a map whose records have become many.
//!
//! A new map is believed as a whole, also after a loss of power. So it is written only when all it speaks of is durable:
//! the top is synced first, and nobody writes from then on until the new map has the name of the old one for good.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Live, State, Volume};
use crate::volume::about::{self, VOLUME};
use crate::volume::chunk::chunks_in;
use crate::volume::disk::{Disk, DiskFile};
use crate::volume::error::VolumeError;
use crate::volume::format::{self, Header, LayerLine, Record, Run, Salt};
use crate::volume::layer::Layer;
use crate::volume::log::{AppendError, Log};
use crate::volume::view::Slot;

/// The file of a map.
pub(in crate::volume) const MAP: &str = "map";

/// One that is being written.
pub(in crate::volume) const MAP_NEW: &str = "map.new";

/// Most layers below each other: each is an open file.
const LAYERS_MAX: usize = 1000;

/// A volume as it was at some moment.
#[derive(Debug)]
pub(in crate::volume) struct Frozen {
    pub(in crate::volume) size_bytes: u64,
    pub(in crate::volume) generation: u32,
    pub(in crate::volume) incomplete_to: u32,
    /// Nobody writes to any of them.
    pub(in crate::volume) slots: Vec<Slot>,
    pub(in crate::volume) runs: Vec<Run>,
}

impl Frozen {
    /// What a volume begins with that is made of no other.
    pub(in crate::volume) const fn nothing(size_bytes: u64) -> Self {
        Self { size_bytes, generation: 0, incomplete_to: 0, slots: Vec::new(), runs: Vec::new() }
    }
}

/// What the next map is to say.
struct Next {
    size_bytes: u64,
    generation: u32,
    /// An empty layer, if that is to be written from now on.
    top: Option<Arc<Layer>>,
}

/// Writes a map, durable but for its name. Gives what its log begins with.
pub(in crate::volume) fn write_image(
    disk: &Disk,
    path: &Path,
    header: &Header,
    runs: &[Run],
) -> io::Result<(DiskFile, Salt, u64)> {
    let (bytes, salt) = format::encode(header, runs);
    Ok((disk.write_new(path, &bytes)?, salt, bytes.len() as u64))
}

/// Keeps the layers that some chunk is in, and the top, and counts them anew; gives the top's new number.
fn compacted(slots: &[Slot], runs: &[Run], top: u16) -> (Vec<Slot>, Vec<Run>, u16) {
    let mut numbers = vec![0_u16; slots.len() + 1];
    let place = |number: u16| usize::from(number);
    for number in runs.iter().map(|run| run.layer).chain([top]) {
        if let Some(used) = numbers.get_mut(place(number)) {
            *used = 1;
        }
    }
    numbers[0] = 0;
    let mut kept = Vec::new();
    for (slot, number) in slots.iter().zip(&mut numbers[1..]).filter(|(_, used)| **used != 0) {
        kept.push(slot.clone());
        *number = u16::try_from(kept.len()).unwrap_or(u16::MAX);
    }
    let new = |number: u16| numbers.get(place(number)).copied().unwrap_or(0);
    let runs = runs.iter().map(|run| Run { layer: new(run.layer), ..*run }).collect();
    (kept, runs, new(top))
}

impl Volume {
    /// Has a new map in the place of the old one. An error leaves the old one in use, or the volume read only.
    fn exchange(&self, state: &mut State, next: Next) -> Result<(), VolumeError> {
        let Live { number, top, .. } = self.live(state)?.clone();
        if let Err(error) = top.file.sync_data() {
            self.distrust(top.path(), format!("what was written could not be made durable: {error}"));
            return Err(state.view.io("write", &top, error));
        }
        let runs = state.view.map.runs();
        let (mut slots, number, top) = self.next_slots(state, &runs, number, next.top.unwrap_or(top))?;
        if let Some(slot) = slots.get_mut(usize::from(number) - 1) {
            slot.line.bytes = next.size_bytes;
        }
        let (lines, image_runs, image_top) = compacted(&slots, &runs, number);
        let header = Header {
            size_bytes: next.size_bytes,
            generation: next.generation,
            incomplete_to: state.incomplete_to,
            boot: self.parts.boot,
            top: image_top,
            layers: lines.iter().map(|slot| slot.line).collect(),
        };
        let (new, map) = (self.directory.join(MAP_NEW), self.directory.join(MAP));
        let disk = &self.parts.disk;
        let written = write_image(disk, &new, &header, &image_runs);
        let written = written.and_then(|written| disk.rename(&new, &map).map(|()| written));
        let (file, salt, start) = written.map_err(|error| {
            // The next one writes over it.
            let _ = disk.remove_file(&new);
            VolumeError::io(&self.subject, "write a new map of", new, error)
        })?;
        state.view.slots = slots;
        state.view.map.grow(chunks_in(next.size_bytes));
        state.view.size_bytes = next.size_bytes;
        state.generation = next.generation;
        state.live = Some(Live { number, top, log: Arc::new(Log::empty(file, salt, start)) });
        if let Err(error) = disk.sync_directory(&self.directory) {
            self.distrust(map.clone(), format!("its name could not be made durable: {error}"));
            return Err(VolumeError::io(&self.subject, "write a new map of", map, error));
        }
        self.parts.sweep();
        Ok(())
    }

    /// The list of layers with this top, without what no chunk is in. Places of the list keep their meaning.
    fn next_slots(
        &self,
        state: &State,
        runs: &[Run],
        number: u16,
        top: Arc<Layer>,
    ) -> Result<(Vec<Slot>, u16, Arc<Layer>), VolumeError> {
        let mut slots = state.view.slots.clone();
        let is_kept = slots.get(usize::from(number) - 1).is_some_and(|slot| is_layer(slot, &top));
        let mut used = vec![false; slots.len() + 1];
        for layer in runs.iter().map(|run| run.layer).chain(is_kept.then_some(number)) {
            if let Some(used) = used.get_mut(usize::from(layer)) {
                *used = true;
            }
        }
        for (slot, _) in slots.iter_mut().zip(&used[1..]).filter(|(_, used)| !**used) {
            slot.layer = None;
        }
        if is_kept {
            return Ok((slots, number, top));
        }
        let slot = Slot { line: LayerLine { number: top.number, bytes: 0 }, layer: Some(Arc::clone(&top)) };
        let free = used[1..].iter().position(|used| !used);
        let place = match free {
            Some(place) => {
                slots[place] = slot;
                place
            }
            None if slots.len() < LAYERS_MAX => {
                slots.push(slot);
                slots.len() - 1
            }
            None => return Err(VolumeError::Layers { subject: self.subject.clone(), max: LAYERS_MAX }),
        };
        Ok((slots, u16::try_from(place + 1).unwrap_or(u16::MAX), top))
    }

    /// Keeps the volume as it is now, and has later writes in the next generation. `fresh` is an empty layer: it becomes a
    /// copy that shares the top's blocks where the file system has that, otherwise the top of this volume.
    pub(in crate::volume) fn freeze(&self, fresh: &Arc<Layer>) -> Result<Frozen, VolumeError> {
        // What is flushed here is not waited for below, while nobody writes.
        self.flush()?;
        let mut state = self.state_alone();
        let live = self.live(&state)?.clone();
        let (generation, incomplete_to, size_bytes) = (state.generation, state.incomplete_to, state.view.size_bytes);
        let next_generation = generation.saturating_add(1);
        let runs = state.view.map.runs();
        let mut slots = state.view.slots.clone();
        let failed = |error| VolumeError::io(&self.subject, "copy", fresh.path(), error);
        if fresh.file.share(&live.top.file).map_err(failed)? {
            let line = LayerLine { number: fresh.number, bytes: size_bytes };
            slots[usize::from(live.number) - 1] = Slot { line, layer: Some(Arc::clone(fresh)) };
            live.log.append(&[Record::Generation(next_generation)]).map_err(|error| match error {
                AppendError::Nothing(error) | AppendError::Broken(error) => failed(error),
            })?;
            state.generation = next_generation;
            drop(state);
            fresh.file.sync_all().map_err(failed)?;
            // Later changes are to be told from those in the snapshot, also after a loss of power.
            self.flush()?;
        } else {
            fresh.file.set_length(size_bytes).map_err(failed)?;
            fresh.file.sync_all().map_err(failed)?;
            let next = Next { size_bytes, generation: next_generation, top: Some(Arc::clone(fresh)) };
            self.exchange(&mut state, next)?;
        }
        let (slots, runs, _) = compacted(&slots, &runs, 0);
        Ok(Frozen { size_bytes, generation, incomplete_to, slots, runs })
    }

    /// Has later writes in the next generation, durably; gives the one that ended.
    pub fn bump(&self) -> Result<u32, VolumeError> {
        let mut state = self.state_alone();
        let ended = state.generation;
        let live = self.live(&state)?;
        let next = Record::Generation(ended.saturating_add(1));
        live.log.append(&[next]).map_err(|error| match error {
            AppendError::Nothing(error) | AppendError::Broken(error) => {
                VolumeError::io(&self.subject, "write the map of", self.directory.join(MAP), error)
            }
        })?;
        state.generation = ended.saturating_add(1);
        drop(state);
        self.flush()?;
        Ok(ended)
    }

    /// Makes it larger; what is new is zero.
    pub(in crate::volume) fn grow(&self, size_bytes: u64) -> Result<(), VolumeError> {
        self.parts.check_size(size_bytes)?;
        let mut state = self.state_alone();
        let from_bytes = state.view.size_bytes;
        if size_bytes < from_bytes {
            return Err(VolumeError::Shrink { subject: self.subject.clone(), from_bytes, to_bytes: size_bytes });
        }
        let Live { top, .. } = self.live(&state)?.clone();
        if size_bytes > from_bytes {
            let grown = top.file.set_length(size_bytes).and_then(|()| top.file.sync_all());
            grown.map_err(|error| state.view.io("grow", &top, error))?;
            let generation = state.generation;
            self.exchange(&mut state, Next { size_bytes, generation, top: None })?;
        }
        drop(state);
        let mut about = self.about();
        about.size_bytes = size_bytes;
        let path = self.directory.join(VOLUME);
        about::replace(&self.parts.disk, &path, &*about)
            .map_err(|error| VolumeError::io(&self.subject, "write what is said of", path, error))
    }

    /// Whether the map has so many records that reading them would take as long as a new map.
    pub(super) fn is_long(&self, live: &Live) -> bool {
        live.log.bytes() > self.compact_after.load(Ordering::Relaxed).max(live.log.start())
    }

    /// Writes the map anew. What was written before is as it is, whatever comes of it: a disk that has no space for a new
    /// map is asked again some records later.
    pub(super) fn compact(&self) {
        let done = self.flush().and_then(|()| {
            let mut state = self.state_alone();
            if !state.live.as_ref().is_some_and(|live| self.is_long(live)) {
                return Ok(());
            }
            let (size_bytes, generation) = (state.view.size_bytes, state.generation);
            self.exchange(&mut state, Next { size_bytes, generation, top: None })
        });
        let step = self.parts.compact_bytes;
        match done {
            Ok(()) => self.compact_after.store(step, Ordering::Relaxed),
            Err(_) => _ = self.compact_after.fetch_add(step, Ordering::Relaxed),
        }
    }
}

fn is_layer(slot: &Slot, layer: &Arc<Layer>) -> bool {
    slot.layer.as_ref().is_some_and(|found| Arc::ptr_eq(found, layer))
}
