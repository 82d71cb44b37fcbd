//! The volumes and snapshots of a host: one directory each below a root.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::about::{self, SNAPSHOT, SnapshotAbout, VOLUME, VolumeAbout};
use super::chunk::{SIZE_BYTES_MAX, check_size};
use super::disk::{Disk, Recorder};
use super::error::{Damage, VolumeError};
use super::layer::Layers;
use super::live::{Info, Volume};
use super::open;
use super::snapshot::{Snapshot, SnapshotInfo};
use super::space::Space;
use crate::ids::{VolumeId, VolumeSnapshotId};
use crate::sys::file::{self, Lock};
use crate::sys::host;

mod create;

pub use create::{CreateSpec, image_bytes};

/// Held by the process that has the store open.
const LOCK: &str = "lock";

/// What is being made. Whatever is in it when a store is opened is not finished.
const STAGING: &str = ".staging";

/// What is being removed.
const REMOVING: &str = ".removing";

/// How a store is used.
#[derive(Debug, Clone)]
pub struct Options {
    /// Most bytes that all files of the store may take on the disk; `None` for as many as there are. Blocks that files
    /// share count for each of them.
    pub quota_bytes: Option<u64>,
    /// Bytes of the file system that the store leaves free.
    pub reserve_bytes: u64,
    /// The id of this boot of the host (`/proc/sys/kernel/random/boot_id`): under another one what was not flushed is
    /// not believed.
    pub boot_id: String,
    /// The largest volume.
    pub largest: Largest,
    /// Bytes of records after which a volume's map is written anew.
    pub compact_bytes: u64,
    /// Told all changes of the disk.
    pub recorder: Option<Arc<dyn Recorder>>,
}

/// How large a volume may be, at most the format's bound. Volumes are thin: all of them together may be larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Largest {
    /// As large as the file system that the store lies on, as large as that is when a volume is made or grows: a larger one
    /// could never be filled.
    FileSystem,
    /// This many bytes.
    Bytes(u64),
}

impl Options {
    /// No quota, no reserve, nobody who is told.
    pub fn new(boot_id: &str) -> Self {
        Self {
            quota_bytes: None,
            reserve_bytes: 0,
            boot_id: boot_id.to_owned(),
            largest: Largest::Bytes(SIZE_BYTES_MAX),
            compact_bytes: 1 << 20,
            recorder: None,
        }
    }
}

/// What all volumes of a store share.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) disk: Arc<Disk>,
    pub(super) layers: Layers,
    pub(super) space: Space,
    pub(super) boot: [u8; 32],
    pub(super) compact_bytes: u64,
    pub(super) largest: Largest,
    /// How many maps there are of which it is not known which layers they speak of.
    pub(super) unknown: AtomicUsize,
}

impl Parts {
    /// Whether a volume may be made with this size, or grow to it.
    pub(super) fn check_size(&self, size_bytes: u64) -> Result<(), VolumeError> {
        let max = match self.largest {
            Largest::Bytes(bytes) => bytes,
            Largest::FileSystem => {
                let root = self.space.root();
                let space = host::space(root);
                let failed = |source| {
                    let subject = root.display().to_string();
                    VolumeError::io(&subject, "look at the file system of the volumes in", root.to_owned(), source)
                };
                space.map_err(failed)?.total_bytes
            }
        };
        check_size(size_bytes, max)
    }

    /// Removes layers that no map speaks of, if all maps are known. What stays is found by the next sweep.
    pub(super) fn sweep(&self) {
        if self.unknown.load(Ordering::Relaxed) == 0 {
            let _ = self.layers.sweep();
        }
    }
}

/// The volumes below one directory. For one process, and free to be used by all of its threads. All calls block on the
/// disk.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    parts: Arc<Parts>,
    catalog: Mutex<Catalog>,
    _lock: Lock,
}

/// What there is. Held for look-ups only, and while something is removed.
#[derive(Debug, Default)]
struct Catalog {
    volumes: BTreeMap<VolumeId, Arc<Volume>>,
    snapshots: BTreeMap<VolumeSnapshotId, Arc<Snapshot>>,
    /// Names and ids of what is being made.
    pending: BTreeSet<String>,
}

impl Store {
    /// Opens the store below a directory, which is made if it is not there. What is damaged is opened read only; see
    /// [`Volume::damage`].
    pub fn open(root: &Path, options: &Options) -> Result<Self, VolumeError> {
        let subject = root.display().to_string();
        let failed = |source| VolumeError::io(&subject, "open the volumes in", root.to_owned(), source);
        file::make_directories(root).map_err(failed)?;
        let lock = file::try_lock(&root.join(LOCK)).map_err(failed)?;
        let Some(lock) = lock else { return Err(VolumeError::InUse { subject }) };
        let disk = Arc::new(Disk::new(root, options.recorder.clone()));
        for directory in [STAGING, REMOVING] {
            disk.make_directory(Path::new(directory)).map_err(failed)?;
            for name in disk.names(Path::new(directory)).map_err(failed)? {
                disk.remove_tree(&Path::new(directory).join(name)).map_err(failed)?;
            }
        }
        let layers = Layers::open(&disk).map_err(failed)?;
        disk.sync_directory(Path::new("")).map_err(failed)?;
        let parts = Parts {
            layers,
            disk,
            space: Space::new(root, options.quota_bytes, options.reserve_bytes),
            boot: *blake3::hash(options.boot_id.as_bytes()).as_bytes(),
            compact_bytes: options.compact_bytes,
            largest: options.largest,
            unknown: AtomicUsize::new(0),
        };
        let store = Self { root: root.to_owned(), parts: Arc::new(parts), catalog: Mutex::default(), _lock: lock };
        store.load().map_err(failed)?;
        store.parts.sweep();
        Ok(store)
    }

    fn load(&self) -> io::Result<()> {
        let mut catalog = self.catalog();
        for name in self.parts.disk.names(Path::new(""))? {
            if let Ok(id) = name.parse::<VolumeId>() {
                catalog.volumes.insert(id.clone(), Arc::new(self.load_volume(&id)));
            } else if let Ok(id) = name.parse::<VolumeSnapshotId>() {
                catalog.snapshots.insert(id.clone(), Arc::new(self.load_snapshot(&id)));
            }
        }
        Ok(())
    }

    fn load_volume(&self, id: &VolumeId) -> Volume {
        let path = Path::new(id.as_str()).join(VOLUME);
        let read: io::Result<VolumeAbout> = about::read(&self.parts.disk, &path);
        let none = VolumeAbout::new(id.clone(), id.to_string(), 0, 0);
        let (about, damage) = known(read, |about| about.id == *id, none, &path);
        let (state, damage) = open::volume(&self.parts, Path::new(id.as_str()), about.size_bytes, damage);
        self.count_unknown(&damage);
        Volume::new(&self.parts, about, state, damage)
    }

    fn load_snapshot(&self, id: &VolumeSnapshotId) -> Snapshot {
        let path = Path::new(id.as_str()).join(SNAPSHOT);
        let read: io::Result<SnapshotAbout> = about::read(&self.parts.disk, &path);
        let none = SnapshotAbout::new(id.clone(), id.to_string(), 0, 0);
        let (about, mut damage) = known(read, |about| about.id == *id, none, &path);
        let mut opened = open::map(&self.parts, Path::new(id.as_str()), about.size_bytes);
        damage.append(&mut opened.damage);
        self.count_unknown(&damage);
        let open::Opened { view, generation, incomplete_to, .. } = opened;
        Snapshot { about, view, generation, incomplete_to, damage }
    }

    fn count_unknown(&self, damage: &[Damage]) {
        self.parts.unknown.fetch_add(usize::from(!damage.is_empty()), Ordering::Relaxed);
    }

    fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory it lies in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A volume. For as long as somebody holds it, it is in use and not removed.
    pub fn volume(&self, id: &VolumeId) -> Option<Arc<Volume>> {
        self.catalog().volumes.get(id).cloned()
    }

    /// A snapshot; what is said of volumes holds for it as well.
    pub fn snapshot(&self, id: &VolumeSnapshotId) -> Option<Arc<Snapshot>> {
        self.catalog().snapshots.get(id).cloned()
    }

    /// All volumes, in the order of their ids.
    pub fn list(&self) -> Result<Vec<Info>, VolumeError> {
        // Not of clones of the list: they would be in use meanwhile.
        self.catalog().volumes.values().map(|volume| volume.info()).collect()
    }

    /// All snapshots, in the order of their ids.
    pub fn list_snapshots(&self) -> Vec<SnapshotInfo> {
        self.catalog().snapshots.values().map(|snapshot| snapshot.info()).collect()
    }

    /// Bytes that all files of the store take on the disk.
    pub fn allocated_bytes(&self) -> Result<u64, VolumeError> {
        self.parts.space.allocated().map_err(|source| {
            VolumeError::io(&self.root.display().to_string(), "look at the files in", self.root.clone(), source)
        })
    }

    /// Makes a volume larger. One that is as large already stays as it is; none becomes smaller.
    pub fn resize(&self, id: &VolumeId, size_bytes: u64) -> Result<Info, VolumeError> {
        let volume = self.volume(id).ok_or_else(|| VolumeError::NotFound { subject: id.to_string() })?;
        volume.grow(size_bytes)?;
        volume.info()
    }

    /// Removes a volume, also a damaged one, if nobody holds it. Its snapshots and clones stay.
    pub fn remove(&self, id: &VolumeId) -> Result<(), VolumeError> {
        let mut catalog = self.catalog();
        let Some(volume) = catalog.volumes.get(id) else {
            return Err(VolumeError::NotFound { subject: id.to_string() });
        };
        if Arc::strong_count(volume) > 1 {
            return Err(VolumeError::InUse { subject: id.to_string() });
        }
        let is_damaged = !volume.damage().is_empty();
        self.remove_directory(id.as_str())?;
        catalog.volumes.remove(id);
        drop(catalog);
        self.finish_removal(id.as_str(), is_damaged);
        Ok(())
    }

    /// Removes a snapshot, if nobody holds it. What was cloned from it stays.
    pub fn remove_snapshot(&self, id: &VolumeSnapshotId) -> Result<(), VolumeError> {
        let mut catalog = self.catalog();
        let Some(snapshot) = catalog.snapshots.get(id) else {
            return Err(VolumeError::NotFound { subject: id.to_string() });
        };
        if Arc::strong_count(snapshot) > 1 {
            return Err(VolumeError::InUse { subject: id.to_string() });
        }
        let is_damaged = !snapshot.damage.is_empty();
        self.remove_directory(id.as_str())?;
        catalog.snapshots.remove(id);
        drop(catalog);
        self.finish_removal(id.as_str(), is_damaged);
        Ok(())
    }

    /// From here on it is gone, also after a loss of power.
    fn remove_directory(&self, subject: &str) -> Result<(), VolumeError> {
        let (from, to) = (Path::new(subject), Path::new(REMOVING).join(subject));
        let disk = &self.parts.disk;
        let removed = disk
            .remove_tree(&to)
            .and_then(|()| disk.rename(from, &to))
            .and_then(|()| disk.sync_directory(Path::new(REMOVING)))
            .and_then(|()| disk.sync_directory(Path::new("")));
        removed.map_err(|source| VolumeError::io(subject, "remove", from.to_owned(), source))
    }

    /// What stays of it is swept when the store is opened.
    fn finish_removal(&self, subject: &str, is_damaged: bool) {
        let _ = self.parts.disk.remove_tree(&Path::new(REMOVING).join(subject));
        if is_damaged {
            let fewer = |count: usize| Some(count.saturating_sub(1));
            let _ = self.parts.unknown.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
        }
        self.parts.sweep();
    }
}

/// What was read, or something in its place and what is wrong with it.
fn known<T>(read: io::Result<T>, is_it: impl Fn(&T) -> bool, none: T, path: &Path) -> (T, Vec<Damage>) {
    let damage = |what| vec![Damage { file: path.display().to_string(), offset: 0, what }];
    match read {
        Ok(about) if is_it(&about) => (about, Vec::new()),
        Ok(_) => (none, damage("it is of another id".to_owned())),
        Err(error) => (none, damage(format!("it cannot be read: {error}"))),
    }
}
