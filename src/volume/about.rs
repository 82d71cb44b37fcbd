//! What is said of volumes and snapshots beside their maps: small JSON files.

use std::io;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::error::VolumeError;
use crate::ids::{VolumeId, VolumeSnapshotId};

/// The file of a volume.
pub(super) const VOLUME: &str = "volume.json";

/// The file of a snapshot.
pub(super) const SNAPSHOT: &str = "snapshot.json";

/// The only version.
const FORMAT: u32 = 1;

/// Longest file that is read.
const BYTES_MAX: usize = 64 << 10;

/// What a volume was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Another volume, as it was then.
    Volume(VolumeId),
    /// A snapshot.
    Snapshot(VolumeSnapshotId),
}

/// What is said of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct VolumeAbout {
    format: u32,
    pub(super) id: VolumeId,
    pub(super) name: String,
    /// The map says it as well, and is believed if it can be read.
    pub(super) size_bytes: u64,
    pub(super) created_ms: u64,
    pub(super) parent: Option<Origin>,
}

/// What is said of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SnapshotAbout {
    format: u32,
    pub(super) id: VolumeSnapshotId,
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) created_ms: u64,
    /// The volume it is of.
    pub(super) volume: Option<VolumeId>,
}

impl VolumeAbout {
    pub(super) const fn new(id: VolumeId, name: String, size_bytes: u64, created_ms: u64) -> Self {
        Self { format: FORMAT, id, name, size_bytes, created_ms, parent: None }
    }
}

impl SnapshotAbout {
    pub(super) const fn new(id: VolumeSnapshotId, name: String, size_bytes: u64, created_ms: u64) -> Self {
        Self { format: FORMAT, id, name, size_bytes, created_ms, volume: None }
    }
}

/// Reads one of these files.
pub(super) fn read<T: DeserializeOwned>(disk: &Disk, path: &Path) -> io::Result<T> {
    let mut bytes = vec![0; BYTES_MAX];
    let length = disk.open(path)?.read_at(&mut bytes, 0)?;
    Ok(serde_json::from_slice(&bytes[..length])?)
}

/// Writes one to a directory that nobody sees yet.
pub(super) fn write<T: Serialize>(disk: &Disk, path: &Path, about: &T) -> io::Result<()> {
    disk.write_new(path, &serde_json::to_vec(about)?).map(drop)
}

/// Replaces one.
pub(super) fn replace<T: Serialize>(disk: &Disk, path: &Path, about: &T) -> io::Result<()> {
    let new = path.with_extension("new");
    write(disk, &new, about)?;
    disk.rename(&new, path)?;
    disk.sync_directory(path.parent().unwrap_or(Path::new("")))
}

/// Whether a text may be a name.
pub(super) fn check_name(name: &str) -> Result<(), VolumeError> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=63).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    Err(VolumeError::Name { name: name.to_owned() })
}
