//! What lies on the disk becomes a volume again: after an orderly end, after the process was killed, after power was
//! lost, and when something is damaged.
//!
//! After a loss of power (the map is of another boot) only records that a barrier covers count. What the others spoke of
//! was never flushed: those chunks are where they were before. In each case data in the top that belongs to no chunk there
//! is cleared, or later writes to parts of such a chunk would find it. Of a damaged volume nothing is changed.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chunk::{CHUNK_BYTES, chunk_of, chunks_in};
use super::error::Damage;
use super::format::{self, Header, LayerLine, Parsed, RECORD_BYTES, Record, Replay, Wrong};
use super::layer::Layer;
use super::live::{Live, MAP, MAP_NEW, State, write_image};
use super::log::{Log, Tail};
use super::map::{ChunkMap, Entry, LOST};
use super::store::Parts;
use super::view::{Slot, View};

/// A map that was read.
pub(super) struct Opened {
    pub(super) view: View,
    pub(super) generation: u32,
    pub(super) incomplete_to: u32,
    pub(super) damage: Vec<Damage>,
    top: u16,
    parsed: Option<(Parsed, Replay, u64)>,
}

/// A volume in a directory of the root. `size_bytes` is believed when the map says nothing.
pub(super) fn volume(
    parts: &Parts,
    directory: &Path,
    size_bytes: u64,
    mut damage: Vec<Damage>,
) -> (State, Vec<Damage>) {
    let mut opened = map(parts, directory, size_bytes);
    damage.append(&mut opened.damage);
    let mut live = None;
    if damage.is_empty() {
        match make_live(parts, directory, &mut opened) {
            Ok(made) => live = Some(made),
            Err((file, what)) => damage.push(Damage { file: file.display().to_string(), offset: 0, what }),
        }
    }
    let Opened { view, generation, incomplete_to, .. } = opened;
    (State { view, generation, incomplete_to, live }, damage)
}

/// Reads a map and opens the layers it speaks of.
pub(super) fn map(parts: &Parts, directory: &Path, size_bytes: u64) -> Opened {
    let path = directory.join(MAP);
    let subject = directory.display().to_string();
    let unreadable = |wrong: Wrong| Opened {
        view: View {
            subject: subject.clone(),
            map_path: path.clone(),
            size_bytes,
            map: ChunkMap::lost(chunks_in(size_bytes)),
            slots: Vec::new(),
        },
        generation: 0,
        incomplete_to: u32::MAX,
        damage: vec![damage_of(&path, wrong)],
        top: 0,
        parsed: None,
    };
    let bytes = match parts.disk.open(&path).and_then(|file| {
        let length = usize::try_from(file.length()?).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        let read = file.read_at(&mut bytes, 0)?;
        bytes.truncate(read);
        Ok(bytes)
    }) {
        Ok(bytes) => bytes,
        Err(error) => {
            let mut opened = unreadable(Wrong { offset: 0, what: "" });
            opened.damage[0].what = format!("it cannot be read: {error}");
            return opened;
        }
    };
    let parsed = match format::parse(&bytes) {
        Ok(parsed) => parsed,
        Err(wrong) => return unreadable(wrong),
    };
    let replay = parsed.replay(parsed.header.boot == parts.boot);
    let mut damage: Vec<Damage> =
        parsed.wrong.iter().chain(&replay.wrong).map(|wrong| damage_of(&path, wrong.clone())).collect();
    let slots = slots(parts, &parsed.header.layers, &mut damage);
    let view = View::of_runs(&subject, path, parsed.header.size_bytes, slots, &parsed.runs);
    let Header { top, generation, incomplete_to, .. } = parsed.header;
    for lost in &parsed.lost {
        view.map.set(lost.clone(), Entry { layer: LOST, generation: 0 });
    }
    for record in &replay.records {
        if let Record::Touched { first, count, generation } = *record {
            view.map.set(first..first.saturating_add(count), Entry { layer: top, generation });
        }
    }
    if !replay.wrong.is_empty() || !parsed.lost.is_empty() {
        mark_suspects(&view, top);
    }
    let generation = generation.max(replay.generation);
    let garbage = usize::try_from(parsed.records_start + replay.slots * RECORD_BYTES as u64).unwrap_or(usize::MAX);
    let is_clean = bytes.get(garbage..).is_none_or(|rest| rest.iter().all(|byte| *byte == 0));
    let room = if is_clean { bytes.len() as u64 } else { garbage as u64 };
    Opened { view, generation, incomplete_to, damage, top, parsed: Some((parsed, replay, room)) }
}

fn damage_of(path: &Path, wrong: Wrong) -> Damage {
    Damage { file: path.display().to_string(), offset: wrong.offset, what: wrong.what.to_owned() }
}

/// Opens layers. One that is missing or too short is damage; the others can be read all the same.
fn slots(parts: &Parts, lines: &[LayerLine], damage: &mut Vec<Damage>) -> Vec<Slot> {
    let mut slots = Vec::with_capacity(lines.len());
    for line in lines {
        parts.layers.known(line.number);
        let found = parts.layers.get(line.number).and_then(|layer| {
            let length = layer.file.length()?;
            Ok((layer, length))
        });
        let layer = match found {
            Ok((layer, length)) => {
                if length < line.bytes {
                    let what = format!("the layer has {length} bytes instead of {}", line.bytes);
                    damage.push(Damage { file: layer.path().display().to_string(), offset: length, what });
                }
                Some(layer)
            }
            Err(error) => {
                let file = Layer::path_of(line.number).display().to_string();
                damage.push(Damage { file, offset: 0, what: format!("the layer cannot be opened: {error}") });
                None
            }
        };
        slots.push(Slot { line: *line, layer });
    }
    slots
}

/// A record that is lost may have said that a chunk is in the top. So a chunk that has data there and is said to be
/// elsewhere is not read.
fn mark_suspects(view: &View, top: u16) {
    let Some(layer) = usize::from(top).checked_sub(1).and_then(|place| view.slots.get(place)?.layer.clone()) else {
        return;
    };
    let _ = each_unowned(view, top, &layer, |chunk, _| {
        view.map.set(chunk..chunk + 1, Entry { layer: LOST, generation: 0 });
        Ok(())
    });
}

/// Calls for each range of data in the top that belongs to a chunk elsewhere.
fn each_unowned(
    view: &View,
    top: u16,
    layer: &Layer,
    mut call: impl FnMut(u32, Range<u64>) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while let Some(data) = layer.file.next_data(at, view.size_bytes)? {
        at = data.end;
        let mut within = data.start;
        while within < data.end {
            let chunk = chunk_of(within);
            let end = ((u64::from(chunk) + 1) * CHUNK_BYTES).min(data.end);
            if view.map.get(chunk).layer != top {
                call(chunk, within..end)?;
            }
            within = end;
        }
    }
    Ok(())
}

/// Makes a map that was read one that is written. An error names the file, and says what is wrong.
fn make_live(parts: &Parts, directory: &Path, opened: &mut Opened) -> Result<Live, (PathBuf, String)> {
    let path = directory.join(MAP);
    let Some((parsed, replay, room)) = opened.parsed.take() else { return Err((path, "it was not read".to_owned())) };
    let number = opened.top;
    let slot = usize::from(number).checked_sub(1).and_then(|place| opened.view.slots.get(place));
    let Some(top) = slot.and_then(|slot| slot.layer.clone()) else {
        return Err((path, "there is no layer to write to".to_owned()));
    };
    let is_same_boot = parsed.header.boot == parts.boot;
    let mut cleared = false;
    let swept = each_unowned(&opened.view, number, &top, |_, range| {
        cleared = true;
        top.file.punch(&range)
    });
    // What is cleared must be so before a record can make the chunk this layer's: a flush sees to that, or this.
    let swept = swept.and_then(|()| if cleared && !is_same_boot { top.file.sync_all() } else { Ok(()) });
    swept.map_err(|error| (top.path(), format!("what belongs to no chunk could not be cleared: {error}")))?;
    let failed = |error| (path.clone(), format!("it could not be written: {error}"));
    parts.disk.remove_file(&directory.join(MAP_NEW)).map_err(failed)?;
    let log = if is_same_boot {
        let file = parts.disk.open_to_write(&path).map_err(failed)?;
        if room < file.length().map_err(failed)? {
            // Half a record at the end: the next one is written over it, and nothing may follow.
            file.set_length(room).map_err(failed)?;
        }
        let Replay { slots, covered, .. } = replay;
        Log::new(file, parsed.salt, parsed.records_start, Tail { slots, covered, last: slots, room, is_broken: false })
    } else {
        // Not every change of the last generation left a trace.
        opened.incomplete_to = opened.incomplete_to.max(opened.generation);
        opened.generation = opened.generation.saturating_add(1);
        let header = Header {
            generation: opened.generation,
            incomplete_to: opened.incomplete_to,
            boot: parts.boot,
            ..parsed.header
        };
        rewrite(parts, directory, &header, &opened.view).map_err(failed)?
    };
    Ok(Live { number, top, log: Arc::new(log) })
}

fn rewrite(parts: &Parts, directory: &Path, header: &Header, view: &View) -> io::Result<Log> {
    let new = directory.join(MAP_NEW);
    let (file, salt, start) = write_image(&parts.disk, &new, header, &view.map.runs())?;
    parts.disk.rename(&new, &directory.join(MAP))?;
    parts.disk.sync_directory(directory)?;
    Ok(Log::empty(file, salt, start))
}
