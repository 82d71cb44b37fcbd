//! Layers: the files that hold chunks, each at the offset it has in the volume. Maps share those that nobody writes any
//! more. A layer is there for as long as some map in memory holds it; which maps there are is all that says so.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::disk::{Disk, DiskFile};

/// The directory of layers.
pub(super) const LAYERS: &str = "layers";

/// An open layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) number: u64,
    pub(super) file: DiskFile,
}

impl Layer {
    pub(super) fn path(&self) -> PathBuf {
        Self::path_of(self.number)
    }

    /// Where the layer of this number lies.
    pub(super) fn path_of(number: u64) -> PathBuf {
        Path::new(LAYERS).join(format!("{number:016x}"))
    }
}

fn number_of(name: &str) -> Option<u64> {
    (name.len() == 16).then(|| u64::from_str_radix(name, 16).ok()).flatten()
}

/// The layers of a store.
#[derive(Debug)]
pub(super) struct Layers {
    disk: Arc<Disk>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    open: BTreeMap<u64, Weak<Layer>>,
    next: u64,
}

impl Layers {
    /// Looks which numbers are taken.
    pub(super) fn open(disk: &Arc<Disk>) -> io::Result<Self> {
        disk.make_directory(Path::new(LAYERS))?;
        let taken = disk.names(Path::new(LAYERS))?;
        let last = taken.iter().filter_map(|name| number_of(name)).max().unwrap_or(0);
        let held = Held { open: BTreeMap::new(), next: last.saturating_add(1) };
        Ok(Self { disk: Arc::clone(disk), held: Mutex::new(held) })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A map speaks of this number, whether there is such a file or not: it is not given to another one.
    pub(super) fn known(&self, number: u64) {
        let mut held = self.held();
        held.next = held.next.max(number.saturating_add(1));
    }

    /// A new layer, all hole, durable.
    pub(super) fn create(&self, bytes: u64) -> io::Result<Arc<Layer>> {
        let layer = {
            let mut held = self.held();
            let number = held.next;
            let layer = Arc::new(Layer { number, file: self.disk.create(&Layer::path_of(number))? });
            held.next += 1;
            held.open.insert(number, Arc::downgrade(&layer));
            layer
        };
        let made = layer.file.set_length(bytes).and_then(|()| layer.file.sync_all());
        if let Err(error) = made.and_then(|()| self.disk.sync_directory(Path::new(LAYERS))) {
            // Swept later if it cannot be removed now.
            let _ = self.disk.remove_file(&layer.path());
            return Err(error);
        }
        Ok(layer)
    }

    /// The layer of this number.
    pub(super) fn get(&self, number: u64) -> io::Result<Arc<Layer>> {
        let mut held = self.held();
        if let Some(layer) = held.open.get(&number).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let layer = Arc::new(Layer { number, file: self.disk.open_to_write(&Layer::path_of(number))? });
        held.open.insert(number, Arc::downgrade(&layer));
        Ok(layer)
    }

    /// Removes the files of layers that no map holds. For callers that know all maps.
    pub(super) fn sweep(&self) -> io::Result<()> {
        let mut held = self.held();
        held.open.retain(|_, layer| layer.strong_count() > 0);
        for name in self.disk.names(Path::new(LAYERS))? {
            if number_of(&name).is_none_or(|number| !held.open.contains_key(&number)) {
                self.disk.remove_file(&Path::new(LAYERS).join(name))?;
            }
        }
        Ok(())
    }
}
