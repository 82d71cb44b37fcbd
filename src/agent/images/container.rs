//! Images made of containers: the file system becomes the initrd, beside the guest agent and the kernel of an image that
//! is there already (`crate::container`).

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{
    Description, FORMAT, Image, ImageError, ImageStore, MEMORY_MIB_MIN_DEFAULT, copy, hash, write_description,
};
use crate::agent::command_line::glibc_words;
use crate::agent::world::ImageImport;
use crate::container::{self, AGENT_PATH, Bounds, Container, ContainerError, Program, Source};
use crate::sys::{file, host};
use crate::units::{Bytes, MIB};

/// The word by which a kernel is told where its first program is, if that is not `/init`.
const INIT_WORD: &str = "rdinit=";

/// What an image was made of, if that was a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerOrigin {
    /// The archive, or the layout's directory.
    pub container: String,
    /// Digest of the OCI image's manifest.
    pub manifest: Option<String>,
    /// How many layers it had.
    pub layers: u32,
    /// The image whose kernel and guest agent it has.
    pub like: String,
    /// Device nodes that are left out.
    pub devices_left_out: u64,
    /// Extended attributes that are left out.
    pub attributes_left_out: u64,
    /// What the OCI image's maker wants to be run. Nothing runs it by itself.
    pub program: Option<ContainerProgram>,
}

/// A container's main program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerProgram {
    /// Entry point and what is added to it.
    pub arguments: Vec<String>,
    /// `NAME=value` words.
    pub environment: Vec<String>,
    /// Where it runs.
    pub directory: String,
    /// As whom.
    pub user: String,
}

/// An order for an image made of a container.
pub(super) struct ContainerImport<'a> {
    pub(super) order: &'a ImageImport,
    pub(super) source: &'a Source,
    pub(super) like: Option<&'a str>,
    pub(super) unpacked_bytes_max: u64,
    /// Whether this host's guests run on an emulated kernel mode.
    pub(super) emulated: bool,
}

/// What is taken of another image.
struct Base {
    name: String,
    files: super::ImageFiles,
    command_line: String,
    memory_mib_min: u64,
    agent: Vec<u8>,
}

impl ImageStore {
    /// The image whose kernel and guest agent another one gets.
    fn base(&self, like: Option<&str>, default: &str) -> Result<Base, ImageError> {
        let name = match like {
            Some(like) => like.to_owned(),
            None if self.image(default).is_ok() => default.to_owned(),
            None => self.list().into_iter().next().map_or_else(|| default.to_owned(), |first| first.name),
        };
        let (dir, description) = self.describe(&name)?;
        let mut files = super::open_files(&dir, &description)?;
        let words = description.command_line.split_ascii_whitespace();
        let init = words.rev().find_map(|word| word.strip_prefix(INIT_WORD)).unwrap_or("/init");
        let none = || ContainerError::Agent { reason: "it has no initrd".to_owned() };
        let found = files.initrd.as_mut().ok_or_else(none).and_then(|initrd| container::find_file(initrd, init));
        let agent = found.map_err(|source| ImageError::Container { name: name.clone(), source: Box::new(source) })?;
        let Description { command_line, memory_mib_min, .. } = description;
        Ok(Base { name, files, command_line, memory_mib_min: memory_mib_min.unwrap_or(MEMORY_MIB_MIN_DEFAULT), agent })
    }

    /// Makes an image's files of a container, in `staging`.
    pub(super) fn fill_from_container(&self, staging: &Path, import: &ContainerImport<'_>) -> Result<(), ImageError> {
        let ContainerImport { order, source, like, unpacked_bytes_max, emulated } = import;
        let name = &order.name;
        let failed = |file: &str| {
            let (name, file) = (name.clone(), file.to_owned());
            move |source| ImageError::File { name, file, source }
        };
        // One after the other: each has up to a million names in memory.
        let Ok(_turn) = self.unpacking.try_lock() else {
            return Err(ImageError::Busy { name: name.clone() });
        };
        let base = self.base(*like, super::IMAGE_DEFAULT)?;
        let kernel = copy(&base.files.kernel, &staging.join("kernel")).map_err(failed("kernel"))?;
        let free = host::space(staging).map_err(failed("space"))?.free_bytes.saturating_sub(self.reserve_bytes);
        let bounds = Bounds { unpacked_bytes: *unpacked_bytes_max, disk_bytes: free };
        let spool = file::create(&staging.join("spool")).map_err(failed("spool"))?;
        // Without a name it is gone with whoever has it open.
        std::fs::remove_file(staging.join("spool")).map_err(failed("spool"))?;
        let refused = |source| ImageError::Container { name: name.clone(), source: Box::new(source) };
        let unpacked = Container::unpack(source, spool, bounds).map_err(refused)?;
        let initrd = file::create(&staging.join("initrd")).map_err(failed("initrd"))?;
        let made = unpacked.write_initramfs(&base.agent, &initrd).map_err(refused)?;
        initrd.sync_all().map_err(failed("initrd"))?;
        let digests = [("kernel", kernel), ("initrd", hash(&staging.join("initrd")).map_err(failed("initrd"))?)];
        let origin = origin(source, &base.name, &unpacked);
        let description = Description {
            format: FORMAT,
            name: name.clone(),
            kernel: "kernel".to_owned(),
            initrd: Some("initrd".to_owned()),
            command_line: command_line(order.command_line.as_deref().unwrap_or(&base.command_line), *emulated),
            memory_mib_min: Some(base.memory_mib_min.saturating_add(Bytes(made.memory_bytes).0.div_ceil(MIB))),
            digests: digests.map(|(file, digest)| (file.to_owned(), digest)).into(),
            built_from: serde_json::to_value(&origin)
                .map_err(|source| ImageError::Syntax { name: name.clone(), source })?,
        };
        write_description(staging, &description)
    }
}

/// The words given, and those that an imported image needs.
fn command_line(words: &str, emulated: bool) -> String {
    let given = words.split_ascii_whitespace().filter(|word| !word.starts_with(INIT_WORD));
    let glibc = if emulated { glibc_words(words) } else { None };
    let init = format!("{INIT_WORD}/{AGENT_PATH}");
    let own = [Some(init.as_str()), glibc];
    given.chain(own.into_iter().flatten()).collect::<Vec<_>>().join(" ")
}

fn origin(source: &Source, like: &str, unpacked: &Container) -> ContainerOrigin {
    let path = match source {
        Source::Rootfs(path) => path,
        Source::Oci { layout, reference: _ } => layout,
    };
    let program = unpacked.origin().program.as_ref().map(|program| {
        let Program { arguments, environment, directory, user } = program.clone();
        ContainerProgram { arguments, environment, directory, user }
    });
    let left_out = unpacked.left_out();
    ContainerOrigin {
        container: path.display().to_string(),
        manifest: unpacked.origin().manifest.clone(),
        layers: unpacked.layers(),
        like: like.to_owned(),
        devices_left_out: left_out.devices,
        attributes_left_out: left_out.attributes,
        program,
    }
}

impl Image {
    /// What it was made of, as its description says: images that were made otherwise have other words there.
    pub(super) fn origin_in(built_from: &serde_json::Value) -> Option<ContainerOrigin> {
        serde_json::from_value(built_from.clone()).ok()
    }
}

#[cfg(test)]
mod tests;
