//! A disk that is made again from the changes that were recorded, as it may look after a loss of power: what was synced is
//! there, and of what was not an arbitrary part, block by block and name by name.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const BLOCK: usize = 4096;

/// A change, kept.
#[derive(Debug, Clone)]
pub(super) enum Kept {
    Create(u64, PathBuf),
    Open(u64, PathBuf),
    Write(u64, u64, Vec<u8>),
    Punch(u64, u64, u64),
    Truncate(u64, u64),
    Share(u64, u64),
    SyncBegin(u64),
    SyncEnd(u64),
    MakeDirectory(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncDirectory(PathBuf),
}

/// Bytes of a file. Blocks that are not there are zero.
#[derive(Debug, Clone, Default)]
struct Bytes {
    length: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

/// Part of a change that is durable or not as a whole.
#[derive(Debug, Clone)]
enum Change {
    /// Within one block.
    Write {
        block: u64,
        at: usize,
        bytes: Vec<u8>,
    },
    Truncate(u64),
    All(Bytes),
}

impl Bytes {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Write { block, at, bytes } => {
                let end = block * BLOCK as u64 + (at + bytes.len()) as u64;
                self.length = self.length.max(end);
                let found = self.blocks.entry(*block).or_insert_with(|| vec![0; BLOCK]);
                found[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            Change::Truncate(length) => {
                self.length = *length;
                let blocks = length.div_ceil(BLOCK as u64);
                self.blocks.retain(|block, _| *block < blocks);
                let rest = usize::try_from(length % BLOCK as u64).unwrap();
                if rest > 0
                    && let Some(last) = self.blocks.get_mut(&(blocks - 1))
                {
                    last[rest..].fill(0);
                }
            }
            Change::All(bytes) => *self = bytes.clone(),
        }
    }
}

#[derive(Debug, Default)]
struct Inode {
    live: Bytes,
    durable: Bytes,
    pending: Vec<Change>,
}

/// A change of names. Directories have numbers, as files have.
#[derive(Debug, Clone)]
enum Naming {
    Add { directory: usize, name: PathBuf, node: usize },
    Delete { directory: usize, name: PathBuf },
    Move { from: (usize, PathBuf), to: (usize, PathBuf), synced: [bool; 2] },
}

type Names = BTreeMap<usize, BTreeMap<PathBuf, usize>>;

fn apply_naming(names: &mut Names, naming: &Naming) {
    match naming {
        Naming::Add { directory, name, node } => {
            names.entry(*directory).or_default().insert(name.clone(), *node);
        }
        Naming::Delete { directory, name } => {
            names.entry(*directory).or_default().remove(name);
        }
        Naming::Move { from, to, .. } => {
            if let Some(node) = names.entry(from.0).or_default().remove(&from.1) {
                names.entry(to.0).or_default().insert(to.1.clone(), node);
            }
        }
    }
}

/// What is known of a disk whose changes are made again. Node 0 is the root.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    inodes: BTreeMap<usize, Inode>,
    directories: std::collections::BTreeSet<usize>,
    numbers: BTreeMap<u64, usize>,
    begun: BTreeMap<u64, usize>,
    live: Names,
    durable: Names,
    pending: Vec<Naming>,
    next: usize,
}

impl Replayed {
    pub(super) fn new() -> Self {
        Self { directories: [0].into(), next: 1, ..Self::default() }
    }

    fn find(&self, path: &Path) -> usize {
        path.iter().fold(0, |node, name| self.live[&node][Path::new(name)])
    }

    fn parent(&self, path: &Path) -> (usize, PathBuf) {
        (self.find(path.parent().unwrap()), PathBuf::from(path.file_name().unwrap()))
    }

    fn name(&mut self, naming: Naming) {
        apply_naming(&mut self.live, &naming);
        self.pending.push(naming);
    }

    fn add(&mut self, path: &Path) -> usize {
        let node = self.next;
        self.next += 1;
        let (directory, name) = self.parent(path);
        self.name(Naming::Add { directory, name, node });
        node
    }

    fn change(&mut self, file: u64, change: Change) {
        let inode = self.inodes.get_mut(&self.numbers[&file]).unwrap();
        inode.live.apply(&change);
        inode.pending.push(change);
    }

    fn write(&mut self, file: u64, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let within = usize::try_from(at % BLOCK as u64).unwrap();
            let count = (BLOCK - within).min(bytes.len() - done);
            let bytes = bytes[done..done + count].to_vec();
            self.change(file, Change::Write { block: at / BLOCK as u64, at: within, bytes });
            done += count;
        }
    }

    pub(super) fn step(&mut self, kept: &Kept) {
        match kept {
            Kept::Create(file, path) => {
                let node = self.add(path);
                self.inodes.insert(node, Inode::default());
                self.numbers.insert(*file, node);
            }
            Kept::Open(file, path) => {
                let node = self.find(path);
                self.numbers.insert(*file, node);
            }
            Kept::Write(file, offset, bytes) => self.write(*file, *offset, bytes),
            Kept::Punch(file, offset, length) => {
                // The length stays, so only what is in the file is written to.
                let end = (offset + length).min(self.inodes[&self.numbers[file]].live.length);
                let zeros = vec![0; usize::try_from(end.saturating_sub(*offset)).unwrap()];
                self.write(*file, *offset, &zeros);
            }
            Kept::Truncate(file, length) => self.change(*file, Change::Truncate(*length)),
            Kept::Share(from, to) => {
                let bytes = self.inodes[&self.numbers[from]].live.clone();
                self.change(*to, Change::All(bytes));
            }
            Kept::SyncBegin(file) => {
                let node = self.numbers[file];
                self.begun.insert(*file, self.inodes[&node].pending.len());
            }
            Kept::SyncEnd(file) => {
                let count = self.begun.remove(file).unwrap();
                let inode = self.inodes.get_mut(&self.numbers[file]).unwrap();
                for change in inode.pending.drain(..count) {
                    inode.durable.apply(&change);
                }
            }
            Kept::MakeDirectory(path) => {
                let node = self.add(path);
                self.directories.insert(node);
            }
            Kept::Rename(from, to) => {
                let (from, to) = (self.parent(from), self.parent(to));
                self.name(Naming::Move { from, to, synced: [false; 2] });
            }
            Kept::Remove(path) => {
                let (directory, name) = self.parent(path);
                self.name(Naming::Delete { directory, name });
            }
            Kept::SyncDirectory(path) => self.sync_directory(path),
        }
    }

    fn sync_directory(&mut self, path: &Path) {
        let node = self.find(path);
        for mut naming in std::mem::take(&mut self.pending) {
            let is_durable = match &mut naming {
                Naming::Add { directory, .. } | Naming::Delete { directory, .. } => *directory == node,
                Naming::Move { from, to, synced } => {
                    synced[0] |= from.0 == node;
                    synced[1] |= to.0 == node;
                    *synced == [true; 2]
                }
            };
            if is_durable {
                apply_naming(&mut self.durable, &naming);
            } else {
                self.pending.push(naming);
            }
        }
    }

    /// Makes a directory of what is durable and a part of the rest: of each change, `is_there` tells.
    pub(super) fn write_to(&self, directory: &Path, is_there: &mut dyn FnMut() -> bool) {
        let mut names = self.durable.clone();
        for naming in &self.pending {
            if is_there() {
                apply_naming(&mut names, naming);
            }
        }
        self.write_node(0, &names, directory, is_there);
    }

    fn write_node(&self, node: usize, names: &Names, path: &Path, is_there: &mut dyn FnMut() -> bool) {
        if self.directories.contains(&node) {
            crate::sys::file::make_directories(path).unwrap();
            for (name, child) in names.get(&node).into_iter().flatten() {
                self.write_node(*child, names, &path.join(name), is_there);
            }
            return;
        }
        let inode = &self.inodes[&node];
        let mut bytes = inode.durable.clone();
        for change in &inode.pending {
            if is_there() {
                bytes.apply(change);
            }
        }
        let file = crate::sys::file::create(path).unwrap();
        file.set_len(bytes.length).unwrap();
        for (block, bytes) in bytes.blocks.iter().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0)) {
            file.write_all_at(bytes, block * BLOCK as u64).unwrap();
        }
        file.set_len(bytes.length).unwrap();
    }
}
