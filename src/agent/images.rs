//! Images on disk: one directory each, with `image.json` and the files it names beside it. They come from scripts and
//! from people, so nothing in them is believed before it is checked.

mod container;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::room::NoRoom;
use super::world::{ImageContent, ImageImport};
use crate::clock::UnixNanos;
use crate::container::ContainerError;
use crate::report::Retry;
use crate::sys::file;

use container::ContainerImport;
pub use container::{ContainerOrigin, ContainerProgram};

/// The image whose kernel and guest agent others get.
const IMAGE_DEFAULT: &str = "demo";

/// What an import holds while it is under way, in its directory.
const LOCK: &str = "lock";

/// Version of `image.json`.
const FORMAT: u32 = 1;

/// Longest `image.json` in bytes.
const DESCRIPTION_BYTES_MAX: u64 = 64 * 1024;

/// Longest name of an image or VM in bytes: a DNS label (RFC 1035 section 2.3.4).
pub const NAME_BYTES_MAX: usize = 63;

/// Memory an image needs when it does not say, in MiB.
const MEMORY_MIB_MIN_DEFAULT: u64 = 64;

/// An image as `image.json` describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    format: u32,
    name: String,
    kernel: String,
    #[serde(default)]
    initrd: Option<String>,
    #[serde(default)]
    command_line: String,
    #[serde(default)]
    memory_mib_min: Option<u64>,
    /// blake3 of the files, by file name.
    #[serde(default)]
    digests: BTreeMap<String, String>,
    /// What it was made of; for people.
    #[serde(default)]
    built_from: serde_json::Value,
}

/// A usable image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// blake3 over the digests of its files and its command line, in hexadecimal.
    pub digest: String,
    /// Size of the kernel.
    pub kernel_bytes: u64,
    /// Size of the initrd, if there is one.
    pub initrd_bytes: Option<u64>,
    /// Words for the kernel's command line.
    pub command_line: String,
    /// Memory a guest needs, in MiB.
    pub memory_mib_min: u64,
    /// What it was made of, if that was a container.
    pub container: Option<ContainerOrigin>,
    /// When it came to this host.
    pub created_at: UnixNanos,
}

/// An image's files, open.
#[derive(Debug)]
pub(super) struct ImageFiles {
    /// The kernel.
    pub kernel: File,
    /// The initrd, if there is one.
    pub initrd: Option<File>,
}

/// Why an image cannot be used, made or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Names are DNS labels.
    #[error("{name:?} is not a name: 1 to {NAME_BYTES_MAX} of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// What was given.
        name: String,
    },
    /// There is none of this name.
    #[error("there is no image {name:?}")]
    Unknown {
        /// The name.
        name: String,
    },
    /// There is one of this name.
    #[error("there is an image {name:?} already")]
    Exists {
        /// The name.
        name: String,
    },
    /// No new work is taken now.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// Another import is under way.
    #[error("image {name:?}: another import is under way")]
    Busy {
        /// The name.
        name: String,
    },
    /// A container is not what can be imported.
    #[error("image {name:?}")]
    Container {
        /// The name.
        name: String,
        /// Why.
        #[source]
        source: Box<ContainerError>,
    },
    /// VMs were made of it.
    #[error("image {name:?} is used by {vms} VMs")]
    InUse {
        /// The name.
        name: String,
        /// How many.
        vms: usize,
    },
    /// Its description says what it may not.
    #[error("image {name:?}: {reason}")]
    Malformed {
        /// The name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Its description is not JSON of the right shape.
    #[error("image {name:?}: image.json")]
    Syntax {
        /// The name.
        name: String,
        /// Where and what.
        #[source]
        source: serde_json::Error,
    },
    /// One of its files cannot be used.
    #[error("image {name:?}: {file}")]
    File {
        /// The name.
        name: String,
        /// Which file.
        file: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoRoom(error) => error.retry(),
            Self::Container { source, .. } => source.retry(),
            Self::File { .. } | Self::Busy { .. } => Retry::Later,
            Self::Name { .. }
            | Self::Unknown { .. }
            | Self::Exists { .. }
            | Self::InUse { .. }
            | Self::Malformed { .. }
            | Self::Syntax { .. } => Retry::WithChange,
        }
    }
}

/// Whether this may be the name of an image or VM: a DNS label, as it becomes a host name.
pub(super) fn is_name(name: &str) -> bool {
    let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    name.len() <= NAME_BYTES_MAX
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(label)
}

/// Opens `name` below an open directory: what the directory's path leads to meanwhile does not matter.
fn open_in(dir: &File, name: &str) -> io::Result<File> {
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a file's name cannot lead elsewhere"));
    }
    File::open(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

fn open_regular(dir: &File, name: &str) -> io::Result<File> {
    let file = open_in(dir, name)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

/// The images of this host. All calls block on the disk.
#[derive(Debug, Clone)]
pub(super) struct ImageStore {
    dir: PathBuf,
    /// What has to stay free on the disk.
    reserve_bytes: u64,
    /// Held by who unpacks a container.
    unpacking: Arc<Mutex<()>>,
}

impl ImageStore {
    /// The images below `dir`, which may be made later.
    pub(super) fn new(dir: PathBuf, reserve_bytes: u64) -> Self {
        Self { dir, reserve_bytes, unpacking: Arc::default() }
    }

    /// Removes what imports have left that an agent's end interrupted; those of other agents go on.
    pub(super) fn remove_left_over(&self) {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let is_staging = |name: &str| name.strip_prefix('.')?.strip_suffix(".new").map(is_name);
            if name.to_str().and_then(is_staging) != Some(true) {
                continue;
            }
            // What cannot be removed is never listed, and the next import of this name tries again.
            if let Ok(Some(_held)) = file::try_lock(&entry.path().join(LOCK)) {
                let _ = file::remove_tree(&entry.path());
            }
        }
    }

    /// The usable images, by name. Directories that are none are left out.
    pub(super) fn list(&self) -> Vec<Image> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut images: Vec<Image> = names.filter_map(|name| self.image(&name).ok()).collect();
        images.sort_by(|a, b| a.name.cmp(&b.name));
        images
    }

    /// One image.
    pub(super) fn image(&self, name: &str) -> Result<Image, ImageError> {
        let (dir, description) = self.describe(name)?;
        let files = open_files(&dir, &description)?;
        let failed = |file: &str| {
            let (name, file) = (name.to_owned(), file.to_owned());
            move |source| ImageError::File { name, file, source }
        };
        let kernel = files.kernel.metadata().map_err(failed(&description.kernel))?;
        let initrd = files.initrd.as_ref().map(File::metadata).transpose().map_err(failed("initrd"))?;
        let digest = digest(&description, &files).map_err(failed("digest"))?;
        let created = kernel.created().or_else(|_| kernel.modified()).ok();
        let created = created.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
        Ok(Image {
            name: name.to_owned(),
            digest,
            kernel_bytes: kernel.len(),
            initrd_bytes: initrd.map(|initrd| initrd.len()),
            command_line: description.command_line,
            memory_mib_min: description.memory_mib_min.unwrap_or(MEMORY_MIB_MIN_DEFAULT),
            container: Image::origin_in(&description.built_from),
            created_at: UnixNanos(u64::try_from(created.as_nanos()).unwrap_or(0)),
        })
    }

    /// An image's files, to hand to a VMM.
    pub(super) fn open(&self, name: &str) -> Result<ImageFiles, ImageError> {
        let (dir, description) = self.describe(name)?;
        open_files(&dir, &description)
    }

    fn describe(&self, name: &str) -> Result<(File, Description), ImageError> {
        if !is_name(name) {
            return Err(ImageError::Name { name: name.to_owned() });
        }
        let dir = match File::open(self.dir.join(name)) {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Unknown { name: name.to_owned() });
            }
            Err(source) => return Err(ImageError::File { name: name.to_owned(), file: ".".to_owned(), source }),
        };
        let mut text = Vec::new();
        open_regular(&dir, "image.json")
            .and_then(|file| file.take(DESCRIPTION_BYTES_MAX + 1).read_to_end(&mut text))
            .map_err(|source| ImageError::File { name: name.to_owned(), file: "image.json".to_owned(), source })?;
        parse(name, &text).map(|description| (dir, description))
    }

    /// Makes a new image of files of this host.
    pub(super) fn import(&self, import: &ImageImport, emulated: bool) -> Result<Image, ImageError> {
        let name = &import.name;
        if !is_name(name) {
            return Err(ImageError::Name { name: name.clone() });
        }
        let failed = |file: &str| {
            let (name, file) = (name.clone(), file.to_owned());
            move |source| ImageError::File { name, file, source }
        };
        let place = self.dir.join(name);
        if place.exists() {
            return Err(ImageError::Exists { name: name.clone() });
        }
        // A name that is no image's: what a crash leaves here is never listed, and replaced by the next try.
        let staging = self.dir.join(format!(".{name}.new"));
        let _held =
            stage(&staging).map_err(failed("staging"))?.ok_or_else(|| ImageError::Busy { name: name.clone() })?;
        let filled = match &import.content {
            ImageContent::Files { kernel_path, initrd_path } => {
                fill(&staging, import, (kernel_path, initrd_path.as_deref()))
            }
            ImageContent::Container { source, like, unpacked_bytes_max } => {
                let (like, unpacked_bytes_max) = (like.as_deref(), *unpacked_bytes_max);
                let import = ContainerImport { order: import, source, like, unpacked_bytes_max, emulated };
                self.fill_from_container(&staging, &import)
            }
        };
        let made = filled.and_then(|()| {
            std::fs::rename(&staging, &place).map_err(failed("rename"))?;
            // Not before: without it the directory would be somebody else's to remove.
            let _ = std::fs::remove_file(place.join(LOCK));
            file::sync_parent(&place).map_err(failed("sync"))
        });
        if let Err(error) = made {
            // The first error is the one to tell; the next import of this name tries again.
            let _ = file::remove_tree(&staging);
            return Err(error);
        }
        self.image(name)
    }

    /// Removes an image.
    pub(super) fn remove(&self, name: &str) -> Result<(), ImageError> {
        if !is_name(name) {
            return Err(ImageError::Name { name: name.to_owned() });
        }
        let place = self.dir.join(name);
        let failed = |source| ImageError::File { name: name.to_owned(), file: "directory".to_owned(), source };
        match std::fs::symlink_metadata(&place) {
            Ok(found) if found.is_symlink() => std::fs::remove_file(&place).map_err(failed),
            Ok(_) => file::remove_tree(&place).map_err(failed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ImageError::Unknown { name: name.to_owned() }),
            Err(error) => Err(failed(error)),
        }
    }
}

fn parse(name: &str, text: &[u8]) -> Result<Description, ImageError> {
    let malformed = |reason: String| Err(ImageError::Malformed { name: name.to_owned(), reason });
    if text.len() as u64 > DESCRIPTION_BYTES_MAX {
        return malformed(format!("image.json is longer than {DESCRIPTION_BYTES_MAX} bytes"));
    }
    let description: Description =
        serde_json::from_slice(text).map_err(|source| ImageError::Syntax { name: name.to_owned(), source })?;
    if description.format != FORMAT {
        return malformed(format!("format {}, this program reads {FORMAT}", description.format));
    }
    if description.name != name {
        return malformed(format!("image.json names it {:?}", description.name));
    }
    if !description.command_line.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return malformed("the command line has characters that are not printable ASCII".to_owned());
    }
    Ok(description)
}

fn open_files(dir: &File, description: &Description) -> Result<ImageFiles, ImageError> {
    let open = |file: &String| {
        open_regular(dir, file).map_err(|source| ImageError::File {
            name: description.name.clone(),
            file: file.clone(),
            source,
        })
    };
    Ok(ImageFiles { kernel: open(&description.kernel)?, initrd: description.initrd.as_ref().map(open).transpose()? })
}

/// The image's digest. Files whose digest the description does not give are read.
fn digest(description: &Description, files: &ImageFiles) -> io::Result<String> {
    let mut whole = blake3::Hasher::new();
    let named =
        [(Some(&description.kernel), Some(&files.kernel)), (description.initrd.as_ref(), files.initrd.as_ref())];
    for (name, file) in named {
        let (Some(name), Some(file)) = (name, file) else { continue };
        match description.digests.get(name) {
            Some(digest) => whole.update(digest.as_bytes()),
            None => {
                let mut hasher = blake3::Hasher::new();
                hasher.update_reader(file)?;
                whole.update(hasher.finalize().to_hex().as_bytes())
            }
        };
        whole.update(b"\n");
    }
    whole.update(description.command_line.as_bytes());
    Ok(whole.finalize().to_hex().to_string())
}

/// Has an empty directory for an import that nobody else fills; `None` when somebody does.
fn stage(staging: &Path) -> io::Result<Option<file::Lock>> {
    file::make_directories(staging)?;
    let Some(held) = file::try_lock(&staging.join(LOCK))? else { return Ok(None) };
    for left in std::fs::read_dir(staging)? {
        let left = left?;
        if left.file_name() != LOCK {
            std::fs::remove_file(left.path())?;
        }
    }
    Ok(Some(held))
}

fn fill(
    staging: &Path,
    import: &ImageImport,
    (kernel_path, initrd_path): (&str, Option<&str>),
) -> Result<(), ImageError> {
    let failed = |file: &str| {
        let (name, file) = (import.name.clone(), file.to_owned());
        move |source| ImageError::File { name, file, source }
    };
    let mut digests = BTreeMap::new();
    let mut copy = |from: &str, to: &str| {
        let digest = copy_file(Path::new(from), &staging.join(to)).map_err(failed(from))?;
        digests.insert(to.to_owned(), digest);
        Ok::<(), ImageError>(())
    };
    copy(kernel_path, "kernel")?;
    if let Some(initrd) = initrd_path {
        copy(initrd, "initrd")?;
    }
    let description = Description {
        format: FORMAT,
        name: import.name.clone(),
        kernel: "kernel".to_owned(),
        initrd: initrd_path.map(|_| "initrd".to_owned()),
        command_line: import.command_line.clone().unwrap_or_default(),
        memory_mib_min: None,
        digests,
        built_from: serde_json::Value::Null,
    };
    write_description(staging, &description)
}

fn write_description(staging: &Path, description: &Description) -> Result<(), ImageError> {
    let name = &description.name;
    let text =
        serde_json::to_vec_pretty(description).map_err(|source| ImageError::Syntax { name: name.clone(), source })?;
    // Checked before it is there: what cannot be read back is refused now.
    parse(name, &text)?;
    file::replace(&staging.join("image.json"), &text).map_err(|source| ImageError::File {
        name: name.clone(),
        file: "image.json".to_owned(),
        source,
    })
}

fn copy_file(from: &Path, to: &Path) -> io::Result<String> {
    if !from.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an absolute path"));
    }
    let source = File::open(from)?;
    if !source.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    copy(&source, to)
}

/// Copies an open file; the copy's digest.
fn copy(mut source: &File, to: &Path) -> io::Result<String> {
    let mut target = file::create(to)?;
    io::copy(&mut source, &mut target)?;
    target.sync_all()?;
    hash(to)
}

fn hash(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests;
