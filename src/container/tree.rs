//! The names of a container's file system, in memory. Layers are put on top of each other here; nothing in it is a path
//! of this host. Recursion ends at [`DEPTH_MAX`].

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io::Write;

use super::AGENT_PATH;
use super::cpio::{Header, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, TRAILER, Writer};
use super::fault::{ContainerError, Fault, shown};
use super::spool::{Content, Spool};
use crate::units::{Bytes, PAGE_BYTES};

/// Longest path in bytes: Linux has 4,096 with the null byte (`PATH_MAX`).
pub(super) const PATH_BYTES_MAX: usize = 4095;

/// Longest name in bytes (`NAME_MAX`).
pub(super) const NAME_BYTES_MAX: usize = 255;

/// Most names in a path.
pub(super) const DEPTH_MAX: usize = 256;

/// Begins the name of an entry that hides another (OCI image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";

/// Hides all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Begins names of what an overlay keeps for itself: nothing is hidden by these.
const WHITEOUT_OWN: &[u8] = b".wh..wh.";

/// Who owns an inode, what may be done with it, when its content was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Metadata {
    /// Permissions, setuid, setgid and sticky.
    pub(super) mode: u32,
    /// Owner.
    pub(super) uid: u32,
    /// Group.
    pub(super) gid: u32,
    /// Seconds since 1970.
    pub(super) time: u32,
}

/// What an inode is, other than a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file.
    File(Content),
    /// A symbolic link.
    Link(Vec<u8>),
    /// A named pipe.
    Pipe,
}

/// A directory: in how many layers it was named does not matter, but in which it was last.
#[derive(Debug, Default)]
struct Directory {
    /// `None`: only what is in it was named.
    declared: Option<(u32, Metadata)>,
    names: BTreeMap<Vec<u8>, Node>,
}

#[derive(Debug)]
enum Node {
    Directory(Directory),
    /// A name of an inode, and the layer it is from.
    Leaf {
        inode: usize,
        layer: u32,
    },
}

/// A file system.
#[derive(Debug, Default)]
pub(super) struct Tree {
    root: Directory,
    inodes: Vec<(Kind, Metadata)>,
}

/// A path of an archive, checked: names from the root on. None is the root itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Path<'a>(Vec<&'a [u8]>);

impl<'a> Path<'a> {
    /// Reads a path.
    pub(super) fn parse(path: &'a [u8]) -> Result<Self, Fault> {
        if path.is_empty() {
            return Err(Fault::NoName);
        }
        if path.contains(&0) {
            return Err(Fault::NullByte);
        }
        if path.len() > PATH_BYTES_MAX {
            return Err(Fault::PathTooLong);
        }
        let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|name| !matches!(name, [] | [b'.'])).collect();
        if names.contains(&&b".."[..]) {
            return Err(Fault::Upwards);
        }
        // Some programs call the root "/", which leads nowhere else.
        if path.starts_with(b"/") && !names.is_empty() {
            return Err(Fault::Absolute);
        }
        if names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
            return Err(Fault::NameTooLong);
        }
        if names.len() > DEPTH_MAX {
            return Err(Fault::TooDeep);
        }
        Ok(Self(names))
    }

    fn split(&self) -> Option<(&[&'a [u8]], &'a [u8])> {
        self.0.split_last().map(|(last, parents)| (parents, *last))
    }

    /// What it hides, if it is a whiteout.
    pub(super) fn hides(&self) -> Result<Option<Hidden<'_, 'a>>, Fault> {
        let Some((directory, name)) = self.split() else { return Ok(None) };
        if directory.iter().any(|name| name.starts_with(WHITEOUT)) {
            // What an overlay keeps for itself may be a directory.
            return if directory.iter().any(|name| name.starts_with(WHITEOUT_OWN)) {
                Ok(Some(Hidden::Nothing))
            } else {
                Err(Fault::Whiteout)
            };
        }
        if name == OPAQUE {
            return Ok(Some(Hidden::All { directory }));
        }
        if name.starts_with(WHITEOUT_OWN) {
            return Ok(Some(Hidden::Nothing));
        }
        match name.strip_prefix(WHITEOUT) {
            None => Ok(None),
            Some([] | b"." | b"..") => Err(Fault::Whiteout),
            Some(name) => Ok(Some(Hidden::One { directory, name })),
        }
    }
}

/// What a whiteout hides of lower layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hidden<'p, 'a> {
    /// One name of a directory.
    One { directory: &'p [&'a [u8]], name: &'a [u8] },
    /// All of a directory.
    All { directory: &'p [&'a [u8]] },
    /// It is an overlay's own.
    Nothing,
}

impl Directory {
    /// Takes away what is from below `layer`; says whether nothing is left.
    fn prune(&mut self, layer: u32) -> bool {
        self.names.retain(|_, node| match node {
            Node::Leaf { layer: of, .. } => *of >= layer,
            Node::Directory(directory) => !directory.prune(layer) || directory.is_declared_in(layer),
        });
        if !self.is_declared_in(layer) {
            self.declared = None;
        }
        self.names.is_empty()
    }

    fn is_declared_in(&self, layer: u32) -> bool {
        self.declared.is_some_and(|(of, _)| of >= layer)
    }
}

impl Tree {
    /// The directory of these names, made where it is missing. `made` is told of each name that is new.
    fn directory(
        &mut self,
        names: &[&[u8]],
        made: impl Fn(usize) -> Result<(), Fault>,
    ) -> Result<&mut Directory, Fault> {
        let mut here = &mut self.root;
        for (depth, name) in names.iter().enumerate() {
            let node = match here.names.entry(name.to_vec()) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(free) => {
                    if depth == 0 {
                        is_free(name)?;
                    }
                    made(name.len())?;
                    free.insert(Node::Directory(Directory::default()))
                }
            };
            here = match node {
                Node::Directory(directory) => directory,
                Node::Leaf { inode, .. } => {
                    return Err(through(&self.inodes, *inode, names.get(..=depth).unwrap_or_default()));
                }
            };
        }
        Ok(here)
    }

    /// Puts a directory there, or says who owns the one that is there.
    pub(super) fn put_directory(
        &mut self,
        path: &Path<'_>,
        metadata: Metadata,
        layer: u32,
        made: impl Fn(usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let directory = match path.split() {
            None => &mut self.root,
            Some((parents, name)) => {
                if parents.is_empty() {
                    is_free(name)?;
                }
                let parent = self.directory(parents, made)?;
                let node = parent.names.entry(name.to_vec()).or_insert_with(|| Node::Directory(Directory::default()));
                match node {
                    Node::Leaf { layer: of, .. } if *of == layer => return Err(Fault::Twice),
                    Node::Leaf { .. } => *node = Node::Directory(Directory::default()),
                    Node::Directory(_) => {}
                }
                match node {
                    Node::Directory(directory) => directory,
                    Node::Leaf { .. } => return Err(Fault::Twice),
                }
            }
        };
        directory.declared = Some((layer, metadata));
        Ok(())
    }

    /// Puts a file, link or pipe there.
    pub(super) fn put(
        &mut self,
        path: &Path<'_>,
        (kind, metadata): (Kind, Metadata),
        layer: u32,
        made: impl Fn(usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let inode = self.inodes.len();
        self.put_name(path, inode, layer, made)?;
        self.inodes.push((kind, metadata));
        Ok(())
    }

    /// Gives the inode that `target` names another name.
    pub(super) fn put_hard_link(
        &mut self,
        path: &Path<'_>,
        target: &Path<'_>,
        layer: u32,
        made: impl Fn(usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let named = || shown(&target.0.join(&b'/'));
        match self.find(target) {
            None => Err(Fault::NoTarget { target: named() }),
            Some(Node::Directory(_)) => Err(Fault::LinkToDirectory { target: named() }),
            Some(Node::Leaf { inode, .. }) => {
                let inode = *inode;
                self.put_name(path, inode, layer, made)
            }
        }
    }

    fn find(&self, path: &Path<'_>) -> Option<&Node> {
        let (parents, name) = path.split()?;
        let mut here = &self.root;
        for parent in parents {
            match here.names.get(*parent)? {
                Node::Directory(directory) => here = directory,
                Node::Leaf { .. } => return None,
            }
        }
        here.names.get(name)
    }

    fn put_name(
        &mut self,
        path: &Path<'_>,
        inode: usize,
        layer: u32,
        made: impl Fn(usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        // The root is a directory in every layer.
        let (parents, name) = path.split().ok_or(Fault::Twice)?;
        if parents.is_empty() {
            is_free(name)?;
        }
        let directory = self.directory(parents, made)?;
        match directory.names.get_mut(name) {
            Some(Node::Leaf { layer: of, .. }) if *of == layer => return Err(Fault::Twice),
            Some(Node::Directory(lower)) => {
                // What this layer has in it could not be there if it were a file.
                if !lower.prune(layer) || lower.is_declared_in(layer) {
                    return Err(Fault::Twice);
                }
            }
            Some(Node::Leaf { .. }) | None => {}
        }
        directory.names.insert(name.to_vec(), Node::Leaf { inode, layer });
        Ok(())
    }

    /// Takes away what a whiteout of this layer hides. What the layer has itself stays, whichever came first.
    pub(super) fn hide(&mut self, hidden: &Hidden<'_, '_>, layer: u32) -> Result<(), Fault> {
        let directory = match hidden {
            Hidden::One { directory, .. } | Hidden::All { directory } => *directory,
            Hidden::Nothing => return Ok(()),
        };
        let mut here = &mut self.root;
        for (depth, name) in directory.iter().enumerate() {
            match here.names.get_mut(*name) {
                Some(Node::Directory(directory)) => here = directory,
                Some(Node::Leaf { inode, .. }) => {
                    return Err(through(&self.inodes, *inode, directory.get(..=depth).unwrap_or_default()));
                }
                // There is nothing to hide.
                None => return Ok(()),
            }
        }
        match hidden {
            Hidden::One { name, .. } => {
                let gone = match here.names.get_mut(*name) {
                    Some(Node::Leaf { layer: of, .. }) => *of < layer,
                    Some(Node::Directory(directory)) => directory.prune(layer) && !directory.is_declared_in(layer),
                    None => false,
                };
                if gone {
                    here.names.remove(*name);
                }
            }
            Hidden::All { .. } => {
                // Not the directory itself: it stays what it was.
                let declared = here.declared;
                here.prune(layer);
                here.declared = declared;
            }
            Hidden::Nothing => {}
        }
        Ok(())
    }

    /// Writes all of it.
    pub(super) fn write<W: Write>(
        &self,
        spool: &Spool,
        inodes: &mut Inodes,
        archive: &mut Writer<W>,
    ) -> Result<(), ContainerError> {
        if let Some((_, metadata)) = self.root.declared {
            archive.header(b".", directory_header(inodes, metadata))?;
        }
        self.write_names(&self.root, &mut Vec::new(), spool, inodes, archive)
    }

    fn write_names<W: Write>(
        &self,
        directory: &Directory,
        path: &mut Vec<u8>,
        spool: &Spool,
        inodes: &mut Inodes,
        archive: &mut Writer<W>,
    ) -> Result<(), ContainerError> {
        let above = path.len();
        for (name, node) in &directory.names {
            if above > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            match node {
                Node::Directory(below) => {
                    let metadata = below.declared.map_or(UNDECLARED, |(_, metadata)| metadata);
                    archive.header(path, directory_header(inodes, metadata))?;
                    self.write_names(below, path, spool, inodes, archive)?;
                }
                Node::Leaf { inode, .. } => self.write_leaf(*inode, path, spool, inodes, archive)?,
            }
            path.truncate(above);
        }
        Ok(())
    }

    fn write_leaf<W: Write>(
        &self,
        inode: usize,
        path: &[u8],
        spool: &Spool,
        inodes: &mut Inodes,
        archive: &mut Writer<W>,
    ) -> Result<(), ContainerError> {
        let Some((kind, metadata)) = self.inodes.get(inode) else { return Ok(()) };
        let metadata = *metadata;
        if let Kind::Link(target) = kind {
            // One of its own under each name: the kernel knows no hard links to symbolic ones.
            let bytes = u64::try_from(target.len()).unwrap_or(u64::MAX);
            let header = Header { inode: inodes.next_number(), names: 1, kind: S_IFLNK, metadata, bytes };
            return archive.entry(path, header, |to| to.write_all(target));
        }
        let (number, names, last) = inodes.name(inode);
        let header = |kind, bytes| Header { inode: number, names, kind, metadata, bytes };
        match kind {
            Kind::File(content) if last => {
                archive.entry(path, header(S_IFREG, content.bytes), |to| spool.give(*content, to))
            }
            Kind::File(_) => archive.header(path, header(S_IFREG, 0)),
            Kind::Pipe | Kind::Link(_) => archive.header(path, header(S_IFIFO, 0)),
        }
    }

    /// What it takes in a guest's memory: whole pages of contents, and one for each inode.
    pub(super) fn memory_bytes(&self, inodes: &Inodes) -> u64 {
        let contents = self.inodes.iter().zip(&inodes.names).filter(|(_, names)| names.all > 0);
        let pages = contents.map(|((kind, _), _)| match kind {
            Kind::File(content) => Bytes(content.bytes).pages_up().0,
            Kind::Link(_) | Kind::Pipe => 0,
        });
        let pages = pages.fold(u64::from(inodes.last_number), u64::saturating_add);
        pages.saturating_mul(PAGE_BYTES)
    }
}

/// Why nothing can be below what is no directory.
fn through(inodes: &[(Kind, Metadata)], inode: usize, path: &[&[u8]]) -> Fault {
    let path = shown(&path.join(&b'/'));
    match inodes.get(inode) {
        Some((Kind::Link(_), _)) => Fault::ThroughLink { link: path },
        Some(_) | None => Fault::ThroughFile { file: path },
    }
}

/// What a directory is of which only the content was named.
const UNDECLARED: Metadata = Metadata { mode: 0o755, uid: 0, gid: 0, time: 0 };

fn directory_header(inodes: &mut Inodes, metadata: Metadata) -> Header {
    Header { inode: inodes.next_number(), names: 2, kind: S_IFDIR, metadata, bytes: 0 }
}

/// Whether a container may have this name at its root.
fn is_free(name: &[u8]) -> Result<(), Fault> {
    let ours = AGENT_PATH.split('/').next().unwrap_or(AGENT_PATH).as_bytes();
    if name == ours || name == TRAILER { Err(Fault::Reserved) } else { Ok(()) }
}

/// How many names the inodes of a tree have, and which numbers they get.
#[derive(Debug)]
pub(super) struct Inodes {
    names: Vec<Names>,
    last_number: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Names {
    all: u32,
    written: u32,
    number: u32,
}

impl Inodes {
    /// Counts.
    pub(super) fn of(tree: &Tree) -> Self {
        fn count(directory: &Directory, names: &mut [Names]) {
            for node in directory.names.values() {
                match node {
                    Node::Directory(directory) => count(directory, names),
                    Node::Leaf { inode, .. } => {
                        if let Some(names) = names.get_mut(*inode) {
                            names.all += 1;
                        }
                    }
                }
            }
        }
        let mut names = vec![Names::default(); tree.inodes.len()];
        count(&tree.root, &mut names);
        Self { names, last_number: 0 }
    }

    /// A number that no inode has yet.
    pub(super) const fn next_number(&mut self) -> u32 {
        self.last_number += 1;
        self.last_number
    }

    /// One more name of an inode is written: its number, how many names it has, and whether this is the last.
    fn name(&mut self, inode: usize) -> (u32, u32, bool) {
        let Some(names) = self.names.get_mut(inode) else { return (0, 1, true) };
        if names.written == 0 {
            self.last_number += 1;
            names.number = self.last_number;
        }
        names.written += 1;
        (names.number, names.all, names.written == names.all)
    }
}

#[cfg(test)]
mod tests;
