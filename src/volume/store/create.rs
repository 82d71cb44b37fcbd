//! How volumes and snapshots come to be: in a directory that nobody sees, which is given its name when all in it is
//! durable.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{STAGING, Store};
use crate::ids::{VolumeId, VolumeSnapshotId};
use crate::sys::sparse;
use crate::volume::about::{self, Origin, SNAPSHOT, SnapshotAbout, VOLUME, VolumeAbout, check_name};
use crate::volume::chunk::{CHUNK_BYTES, SIZE_STEP_BYTES, chunk_of};
use crate::volume::digest::{OnProgress, Progress};
use crate::volume::error::VolumeError;
use crate::volume::format::{Header, LayerLine, Run, Salt};
use crate::volume::layer::Layer;
use crate::volume::live::{Frozen, Info, Live, MAP, State, Volume, write_image};
use crate::volume::log::Log;
use crate::volume::snapshot::{Snapshot, SnapshotInfo};
use crate::volume::view::{Slot, View};

/// What a new volume is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSpec {
    /// Its name: 1 to 63 of a-z, 0-9 and -, and no other volume's.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// The time, in ms since the Unix epoch.
    pub created_ms: u64,
}

impl CreateSpec {
    fn about(&self, id: &VolumeId) -> VolumeAbout {
        VolumeAbout::new(id.clone(), self.name.clone(), self.size_bytes, self.created_ms)
    }
}

/// Bytes of a volume that an image fits: its length, rounded up to whole blocks.
pub fn image_bytes(image: &File) -> io::Result<u64> {
    let mut image = image;
    Ok(image.seek(SeekFrom::End(0))?.next_multiple_of(SIZE_STEP_BYTES))
}

/// Keeps a name and an id for what is being made.
struct Reservation<'a> {
    store: &'a Store,
    words: [String; 2],
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut catalog = self.store.catalog();
        for word in &self.words {
            catalog.pending.remove(word);
        }
    }
}

/// A layer that no map speaks of yet.
struct Fresh<'a> {
    store: &'a Store,
    layer: Arc<Layer>,
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        // Nobody took it: what it was made for came to nothing.
        if Arc::strong_count(&self.layer) == 1 {
            let _ = self.store.parts.disk.remove_file(&self.layer.path());
        }
    }
}

/// The directory of something that is being made.
struct Stage<'a> {
    store: &'a Store,
    subject: String,
    directory: PathBuf,
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        // When it has its name, there is none; otherwise the next start would sweep it.
        let _ = self.store.parts.disk.remove_tree(&self.directory);
        self.store.parts.sweep();
    }
}

impl Stage<'_> {
    fn failed(&self, source: io::Error) -> VolumeError {
        VolumeError::io(&self.subject, "make", self.directory.clone(), source)
    }

    fn map(&self, header: &Header, runs: &[Run]) -> Result<(Salt, u64), VolumeError> {
        let written = write_image(&self.store.parts.disk, &self.directory.join(MAP), header, runs);
        written.map(|(_, salt, start)| (salt, start)).map_err(|error| self.failed(error))
    }

    /// Gives it its name, durable.
    fn publish(&self) -> Result<(), VolumeError> {
        let disk = &self.store.parts.disk;
        let done = disk
            .sync_directory(&self.directory)
            .and_then(|()| disk.rename(&self.directory, Path::new(&self.subject)))
            .and_then(|()| disk.sync_directory(Path::new("")))
            .and_then(|()| disk.sync_directory(Path::new(STAGING)));
        done.map_err(|error| self.failed(error))
    }
}

impl Store {
    fn reserve(&self, kind: &str, name: &str, subject: &str) -> Result<Reservation<'_>, VolumeError> {
        check_name(name)?;
        let words = [format!("{kind} {name}"), subject.to_owned()];
        let is_volume = kind == VOLUME;
        let mut catalog = self.catalog();
        let volumes: Vec<Arc<Volume>> =
            if is_volume { catalog.volumes.values().cloned().collect() } else { Vec::new() };
        let taken = if is_volume {
            volumes.iter().any(|volume| volume.name() == name)
        } else {
            catalog.snapshots.values().any(|snapshot| snapshot.about.name == name)
        };
        if taken || catalog.pending.contains(&words[0]) {
            return Err(VolumeError::NameTaken { name: name.to_owned() });
        }
        let is_there = catalog.volumes.keys().any(|id| id.as_str() == subject)
            || catalog.snapshots.keys().any(|id| id.as_str() == subject);
        if is_there || catalog.pending.contains(subject) {
            return Err(VolumeError::Exists { subject: subject.to_owned() });
        }
        catalog.pending.extend(words.clone());
        Ok(Reservation { store: self, words })
    }

    fn stage(&self, subject: &str) -> Result<Stage<'_>, VolumeError> {
        let directory = Path::new(STAGING).join(subject);
        let stage = Stage { store: self, subject: subject.to_owned(), directory };
        let made = self.parts.disk.remove_tree(&stage.directory);
        made.and_then(|()| self.parts.disk.make_directory(&stage.directory)).map_err(|error| stage.failed(error))?;
        Ok(stage)
    }

    /// A new layer to write to. What it takes is refused before if there is no space at all.
    fn new_layer(&self, subject: &str, bytes: u64) -> Result<Fresh<'_>, VolumeError> {
        self.check_space(subject, CHUNK_BYTES)?;
        let made = self.parts.layers.create(bytes);
        made.map(|layer| Fresh { store: self, layer }).map_err(|source| {
            if source.kind() == io::ErrorKind::FileTooLarge {
                // The file system has no files of this length.
                let max = bytes.saturating_sub(SIZE_STEP_BYTES);
                return VolumeError::Size { size_bytes: bytes, step: SIZE_STEP_BYTES, max };
            }
            VolumeError::io(subject, "make a layer of", PathBuf::new(), source)
        })
    }

    fn check_space(&self, subject: &str, wanted_bytes: u64) -> Result<(), VolumeError> {
        let subject = subject.to_owned();
        match self.parts.space.take(wanted_bytes, || Ok(wanted_bytes)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(available_bytes)) => Err(VolumeError::NoSpace { subject, wanted_bytes, available_bytes }),
            Err(source) => Err(VolumeError::io(&subject, "look at the space of", self.root.clone(), source)),
        }
    }

    /// Makes a volume, all zero.
    pub fn create(&self, spec: &CreateSpec, id: &VolumeId) -> Result<Info, VolumeError> {
        self.parts.check_size(spec.size_bytes)?;
        let _reserved = self.reserve(VOLUME, &spec.name, id.as_str())?;
        let top = self.new_layer(id.as_str(), spec.size_bytes)?;
        self.finish_volume(spec.about(id), Frozen::nothing(spec.size_bytes), Arc::clone(&top.layer), Vec::new())
    }

    /// Makes a volume of an image: a file, whose holes are left out, or a block device.
    pub fn create_from_image(
        &self,
        spec: &CreateSpec,
        id: &VolumeId,
        image: &File,
        on_progress: OnProgress<'_>,
    ) -> Result<Info, VolumeError> {
        self.parts.check_size(spec.size_bytes)?;
        let failed = |source| VolumeError::io(id.as_str(), "read the image for", PathBuf::new(), source);
        let mut seeking = image;
        let image_bytes = seeking.seek(SeekFrom::End(0)).map_err(failed)?;
        if image_bytes > spec.size_bytes {
            return Err(VolumeError::Image { image_bytes, size_bytes: spec.size_bytes });
        }
        let _reserved = self.reserve(VOLUME, &spec.name, id.as_str())?;
        let top = self.new_layer(id.as_str(), spec.size_bytes)?;
        let own = self.copy_image(id.as_str(), image, image_bytes, &top.layer, on_progress)?;
        self.finish_volume(spec.about(id), Frozen::nothing(spec.size_bytes), Arc::clone(&top.layer), own)
    }

    /// Copies the chunks of an image that are not zero; gives their runs.
    fn copy_image(
        &self,
        subject: &str,
        image: &File,
        length: u64,
        top: &Layer,
        on_progress: OnProgress<'_>,
    ) -> Result<Vec<Run>, VolumeError> {
        let failed = |source| VolumeError::io(subject, "copy an image to", top.path(), source);
        let mut runs: Vec<Run> = Vec::new();
        let mut buffer = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(0)];
        let mut at = 0;
        while let Some(data) = sparse::next_data(image, at, length).map_err(failed)? {
            let start = (data.start / CHUNK_BYTES * CHUNK_BYTES).max(at);
            at = (start + CHUNK_BYTES).min(length);
            let bytes = &mut buffer[..usize::try_from(at - start).unwrap_or(0)];
            image.read_exact_at(bytes, start).map_err(failed)?;
            if on_progress(Progress { done_bytes: at, total_bytes: length }).is_break() {
                return Err(VolumeError::Cancelled);
            }
            if bytes.iter().all(|byte| *byte == 0) {
                continue;
            }
            self.check_space(subject, bytes.len() as u64)?;
            top.file.write_all_at(bytes, start).map_err(failed)?;
            let chunk = chunk_of(start);
            match runs.last_mut() {
                Some(last) if last.first + last.count == chunk => last.count += 1,
                Some(_) | None => runs.push(Run { first: chunk, count: 1, layer: 1, generation: 1 }),
            }
        }
        if on_progress(Progress { done_bytes: length, total_bytes: length }).is_break() {
            return Err(VolumeError::Cancelled);
        }
        top.file.sync_all().map_err(failed)?;
        Ok(runs)
    }

    /// Makes a volume that begins as another one is now, or as a snapshot is. They share what neither writes. The size of
    /// `spec` may be larger.
    pub fn clone_of(&self, origin: &Origin, spec: &CreateSpec, id: &VolumeId) -> Result<Info, VolumeError> {
        self.parts.check_size(spec.size_bytes)?;
        let _reserved = self.reserve(VOLUME, &spec.name, id.as_str())?;
        let (frozen, _held) = match origin {
            Origin::Volume(from) => {
                let volume = self.volume(from).ok_or_else(|| VolumeError::NotFound { subject: from.to_string() })?;
                check_grows(from.as_str(), volume.size_bytes(), spec.size_bytes)?;
                (volume.freeze(&self.new_layer(from.as_str(), 0)?.layer)?, None)
            }
            Origin::Snapshot(from) => {
                let snapshot =
                    self.snapshot(from).ok_or_else(|| VolumeError::NotFound { subject: from.to_string() })?;
                (snapshot.frozen()?, Some(snapshot))
            }
        };
        check_grows(id.as_str(), frozen.size_bytes, spec.size_bytes)?;
        let top = self.new_layer(id.as_str(), spec.size_bytes)?;
        let mut about = spec.about(id);
        about.parent = Some(origin.clone());
        self.finish_volume(about, frozen, Arc::clone(&top.layer), Vec::new())
    }

    /// Writes what says that there is a volume, and opens it. `own` are runs in its top.
    fn finish_volume(
        &self,
        about: VolumeAbout,
        frozen: Frozen,
        top: Arc<Layer>,
        own: Vec<Run>,
    ) -> Result<Info, VolumeError> {
        let (id, size_bytes) = (about.id.clone(), about.size_bytes);
        let Frozen { generation, incomplete_to, mut slots, mut runs, .. } = frozen;
        let line = LayerLine { number: top.number, bytes: size_bytes };
        slots.push(Slot { line, layer: Some(Arc::clone(&top)) });
        runs.extend(own);
        let number = u16::try_from(slots.len()).unwrap_or(u16::MAX);
        let generation = generation.saturating_add(1);
        let header = Header {
            size_bytes,
            generation,
            incomplete_to,
            boot: self.parts.boot,
            top: number,
            layers: slots.iter().map(|slot| slot.line).collect(),
        };
        let stage = self.stage(id.as_str())?;
        about::write(&self.parts.disk, &stage.directory.join(VOLUME), &about).map_err(|error| stage.failed(error))?;
        let (salt, start) = stage.map(&header, &runs)?;
        stage.publish()?;
        let map_path = Path::new(id.as_str()).join(MAP);
        let file = self.parts.disk.open_to_write(&map_path).map_err(|error| stage.failed(error))?;
        let live = Live { number, top, log: Arc::new(Log::empty(file, salt, start)) };
        let view = View::of_runs(id.as_str(), map_path, size_bytes, slots, &runs);
        let state = State { view, generation, incomplete_to, live: Some(live) };
        let volume = Arc::new(Volume::new(&self.parts, about, state, Vec::new()));
        let info = volume.info();
        self.catalog().volumes.insert(id, volume);
        info
    }

    /// Keeps what a volume holds now. Its writers wait only while its map is exchanged.
    pub fn take_snapshot(
        &self,
        of: &VolumeId,
        name: &str,
        created_ms: u64,
        id: &VolumeSnapshotId,
    ) -> Result<SnapshotInfo, VolumeError> {
        let volume = self.volume(of).ok_or_else(|| VolumeError::NotFound { subject: of.to_string() })?;
        let _reserved = self.reserve(SNAPSHOT, name, id.as_str())?;
        let Frozen { size_bytes, generation, incomplete_to, slots, runs } =
            volume.freeze(&self.new_layer(of.as_str(), 0)?.layer)?;
        let stage = self.stage(id.as_str())?;
        let mut about = SnapshotAbout::new(id.clone(), name.to_owned(), size_bytes, created_ms);
        about.volume = Some(of.clone());
        about::write(&self.parts.disk, &stage.directory.join(SNAPSHOT), &about).map_err(|error| stage.failed(error))?;
        let layers = slots.iter().map(|slot| slot.line).collect();
        let header = Header { size_bytes, generation, incomplete_to, boot: self.parts.boot, top: 0, layers };
        stage.map(&header, &runs)?;
        stage.publish()?;
        let view = View::of_runs(id.as_str(), Path::new(id.as_str()).join(MAP), size_bytes, slots, &runs);
        let snapshot = Snapshot { about, view, generation, incomplete_to, damage: Vec::new() };
        let info = snapshot.info();
        self.catalog().snapshots.insert(id.clone(), Arc::new(snapshot));
        Ok(info)
    }
}

fn check_grows(subject: &str, from_bytes: u64, to_bytes: u64) -> Result<(), VolumeError> {
    if to_bytes < from_bytes {
        return Err(VolumeError::Shrink { subject: subject.to_owned(), from_bytes, to_bytes });
    }
    Ok(())
}
