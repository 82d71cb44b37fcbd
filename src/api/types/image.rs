//! Images: a kernel, its initrd and the words on its command line.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most MiB of a container's layers, once unpacked, when a request does not say.
pub const CONTAINER_MIB_MAX_DEFAULT: u64 = 4096;

/// An image VMs can boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// blake3 over kernel, initrd and command line, 64 hexadecimal digits.
    pub digest: String,
    /// Size of the kernel file.
    pub kernel_bytes: u64,
    /// Size of the initrd; null when there is none.
    pub initrd_bytes: Option<u64>,
    /// Words it adds to the kernel's command line.
    pub command_line: String,
    /// Memory a guest needs to boot it, in MiB.
    pub memory_mib_min: u64,
    /// What it was made of, if that was a container; null otherwise.
    pub container: Option<ImageContainer>,
    /// When it came to this host.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

/// What an image was made of, if that was a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageContainer {
    /// Path of the archive or OCI layout.
    pub source: String,
    /// Digest of the OCI image's manifest; null for an archive.
    pub manifest: Option<String>,
    /// How many layers it had.
    pub layers: u32,
    /// The image that gave kernel and guest agent.
    pub like: String,
    /// Device nodes that were left out: the guest's kernel has its own.
    pub devices_left_out: u64,
    /// Extended attributes that were left out, file capabilities among them: an initramfs has none.
    pub attributes_left_out: u64,
    /// What the OCI image's maker wants to be run; null if it does not say. Nothing runs it by itself.
    pub program: Option<ContainerProgram>,
}

/// A container's main program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ContainerProgram {
    /// Entry point, and what is added to it.
    pub arguments: Vec<String>,
    /// `NAME=value` words.
    pub environment: Vec<String>,
    /// Where it runs.
    pub directory: String,
    /// As whom: a name or number, perhaps with a group behind a colon; empty for root.
    pub user: String,
}

/// `GET /v1/images`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// All images of this host, by name.
    pub images: Vec<Image>,
}

/// `POST /v1/images`: makes an image of files of this host. Exactly one of `kernel_path`, `rootfs_path` and `oci_path` is
/// given. Answered 201 with the [`Image`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageImportRequest {
    /// Name, unique on this host: 1 to 63 of `a-z 0-9 -`, starting with a letter.
    pub name: String,
    /// Absolute path of the kernel: an ELF `vmlinux` or a `bzImage`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_path: Option<String>,
    /// Absolute path of the initrd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// Absolute path of a root file system: a tar archive, as it is or packed by gzip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rootfs_path: Option<String>,
    /// Absolute path of an OCI layout's directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oci_path: Option<String>,
    /// Which image of the OCI layout: a reference name or a digest. Not needed if there is one only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Image that gives a container its kernel and guest agent [default: `demo`, or the first there is].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub like: Option<String>,
    /// Most MiB of a container's layers, once unpacked [default: 4096].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unpacked_mib_max: Option<u64>,
    /// Words to add to the kernel's command line; a container's [default: those of the image it is like].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
}
