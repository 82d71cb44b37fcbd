//! Images: a kernel, its initrd and the words on its command line.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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
    /// When it came to this host.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

/// `GET /v1/images`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// All images of this host, by name.
    pub images: Vec<Image>,
}

/// `POST /v1/images`: copies files of this host into the agent's store. Answered 201 with the [`Image`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageImportRequest {
    /// Name, unique on this host: 1 to 63 of `a-z 0-9 -`, starting with a letter.
    pub name: String,
    /// Absolute path of the kernel: an ELF `vmlinux` or a `bzImage`.
    pub kernel_path: String,
    /// Absolute path of the initrd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// Words to add to the kernel's command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command_line: Option<String>,
}
