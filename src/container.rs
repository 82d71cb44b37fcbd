//! Container file systems: a root file system as a tar archive, or an image in an OCI layout, becomes an initramfs with
//! a guest agent beside it. This floor knows archives and layers; what an image of this host is, is others' business.
//!
//! ```text
//! rootfs.tar ──────────────┐ layer by layer: bounded, unzipped, digest checked (oci, layer, budget)
//! OCI layout: index ─ manifest ─ layers ┤
//!                                       ▼
//!                        Tree: names, owners, modes in memory; contents in one spool file (tree, spool)
//!                                       ▼
//!                        initramfs: cpio, agent first (cpio)
//! ```
//!
//! Nothing of an archive is ever a path on this host: names are keys of a tree in memory, and all contents lie behind one
//! another in one file. So an archive cannot lead anywhere, whatever its names and links say; what tries is still
//! refused, since it was made to be unpacked differently by different programs.
//!
//! What an initramfs cannot hold is left out and counted: device nodes (the guest's kernel has its own in `/dev`) and
//! extended attributes. Pipes, hard links, symbolic links, modes with setuid, owners and times stay. All calls block on
//! the disk.
#![forbid(unsafe_code)]

mod budget;
mod cpio;
mod fault;
mod layer;
mod oci;
#[cfg(test)]
mod samples;
mod spool;
mod tree;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::PathBuf;

pub use cpio::{INITRAMFS_BYTES_MAX, find_file};
pub use fault::{ContainerError, Fault};
pub use oci::Program;

use crate::sys::file;
use crate::units::{MIB, PAGE_BYTES};
use budget::Budget;
use layer::{Layer, Target};
use spool::Spool;
use tree::Tree;

/// Where the guest agent lies in an imported image: a directory that no container may have.
pub const AGENT_PATH: &str = ".hearth/init";

/// Largest guest agent in bytes.
pub const AGENT_BYTES_MAX: u64 = 16 * MIB;

/// Where a container's file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A root file system: a tar archive, as it is or packed by gzip.
    Rootfs(PathBuf),
    /// An image in an OCI layout.
    Oci {
        /// The layout's directory.
        layout: PathBuf,
        /// Which of its images: a reference name, or a digest. `None`: the only one there is.
        reference: Option<String>,
    },
}

/// What an import may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of all layers together, once unzipped.
    pub unpacked_bytes: u64,
    /// Space on the disk.
    pub disk_bytes: u64,
}

/// What was in the archives and is not in the initramfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeftOut {
    /// Device nodes.
    pub devices: u64,
    /// Extended attributes, file capabilities and access control lists among them.
    pub attributes: u64,
}

/// Whether names of a layer hide what lower layers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// They do, as the OCI specification has it.
    Hide,
    /// They are names like others.
    Plain,
}

/// A container's file system, layer upon layer.
#[derive(Debug)]
pub struct Container {
    tree: Tree,
    spool: Spool,
    budget: Budget,
    left_out: LeftOut,
    layers: u32,
    origin: Origin,
}

/// Where a file system came from, and what its maker says of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Origin {
    /// Digest of an OCI image's manifest.
    pub manifest: Option<String>,
    /// What an OCI image's maker wants to be run.
    pub program: Option<Program>,
}

/// An initramfs that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initramfs {
    /// Its size.
    pub bytes: u64,
    /// Memory a guest needs for it: the archive itself, and twice what it is once it is unpacked, as the kernel lets its
    /// root file system have half of its memory.
    pub memory_bytes: u64,
}

impl Container {
    /// Nothing yet; contents go to `spool`, which is empty.
    pub fn new(spool: File, bounds: Bounds) -> Self {
        Self {
            tree: Tree::default(),
            // The initramfs will hold most of it again.
            spool: Spool::new(spool, bounds.disk_bytes / 2),
            budget: Budget::new(bounds.unpacked_bytes),
            left_out: LeftOut::default(),
            layers: 0,
            origin: Origin::default(),
        }
    }

    /// Unpacks all layers of `source`.
    pub fn unpack(source: &Source, spool: File, bounds: Bounds) -> Result<Self, ContainerError> {
        let mut container = Self::new(spool, bounds);
        match source {
            Source::Rootfs(path) => {
                let read = |source| ContainerError::Read { path: path.clone(), source };
                let archive = file::open_regular(path).map_err(read)?;
                let archive = archive.ok_or_else(|| ContainerError::NotAFile { path: path.clone() })?;
                container.layer("the archive", Whiteouts::Plain, archive)?;
            }
            Source::Oci { layout, reference } => {
                let image = oci::Image::find(layout, reference.as_deref())?;
                for (number, blob) in image.layers.iter().enumerate() {
                    let name = format!("layer {} ({})", number + 1, blob.digest.short());
                    let mut stored = blob.open(layout)?;
                    let unpacked = container.layer(&name, Whiteouts::Hide, &mut stored);
                    // What is not what it should be says more than what came of reading it.
                    stored.check()?;
                    unpacked?;
                }
                container.origin = Origin { manifest: Some(image.manifest.to_string()), program: image.program };
            }
        }
        Ok(container)
    }

    /// Puts one more layer on top: a tar archive, as it is or packed by gzip. All of it is read.
    pub fn layer(&mut self, name: &str, whiteouts: Whiteouts, stored: impl Read) -> Result<(), ContainerError> {
        self.layers += 1;
        let mut stored = BufReader::with_capacity(128 * 1024, stored);
        let mut unzipped = layer::unzip(name, &mut stored)?;
        let layer = Layer { name, number: self.layers, whiteouts };
        let Self { tree, spool, budget, left_out, .. } = self;
        layer.apply(&mut unzipped, &mut Target { tree, spool, budget, left_out })
    }

    /// How many layers there are.
    pub const fn layers(&self) -> u32 {
        self.layers
    }

    /// What is not in the initramfs.
    pub const fn left_out(&self) -> LeftOut {
        self.left_out
    }

    /// Where it came from.
    pub const fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Writes the initramfs, with `agent` at [`AGENT_PATH`].
    pub fn write_initramfs(&self, agent: &[u8], to: impl Write) -> Result<Initramfs, ContainerError> {
        let mut archive = cpio::Writer::new(BufWriter::with_capacity(256 * 1024, to));
        let mut inodes = tree::Inodes::of(&self.tree);
        archive.write_agent(agent, &mut inodes)?;
        self.tree.write(&self.spool, &mut inodes, &mut archive)?;
        let bytes = archive.finish()?;
        let agent_bytes = u64::try_from(agent.len()).unwrap_or(u64::MAX);
        let unpacked = self.tree.memory_bytes(&inodes).saturating_add(agent_bytes + 3 * PAGE_BYTES);
        Ok(Initramfs { bytes, memory_bytes: bytes.saturating_add(unpacked.saturating_mul(2)) })
    }
}

/// Words for a failed write of the image's files.
fn not_written(source: io::Error) -> ContainerError {
    ContainerError::Write { source }
}

#[cfg(test)]
mod tests;
