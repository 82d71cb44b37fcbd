//! `hearth image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::value::{self, LayoutWord, ReferenceWord};

const IMPORT_HELP: &str = "\
A kernel and an initrd are copied as they are. The words the host itself needs (`hearth host probe` lists them) are
added at launch and do not belong on the command line given here.

A container's file system (--rootfs, --oci) becomes the initrd, with the guest agent as /.hearth/init beside it; kernel and
guest agent are those of an image that is there. It is in the guest's memory: `hearth image show` tells how much that
takes. Left out are device nodes and extended attributes. Nothing runs by itself: `hearth vm exec` does what is asked.

Examples:
  hearth image import mine --kernel vmlinux --initrd initrd.cpio
  hearth image import web --rootfs rootfs.tar.gz            from debootstrap, docker export, ...
  hearth image import web --oci layout:web                  from skopeo copy, buildah push, ...
  hearth vm launch --image web --memory 256";

/// `hearth image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List the images of this host
    Ls,
    /// Show one image
    Show {
        /// Name of the image
        image: ReferenceWord,
    },
    /// Make an image of a kernel and an initrd, or of a container
    #[command(after_help = IMPORT_HELP)]
    Import(ImportArgs),
    /// Remove an image; VMs that were booted from it stay
    Rm {
        /// Name of the image
        image: ReferenceWord,
    },
}

/// `hearth image import`.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    /// Name: 1 to 63 of a-z, 0-9 and `-`, starting with a letter
    #[arg(value_parser = value::name)]
    pub name: String,
    /// Kernel: an ELF vmlinux or a bzImage
    #[arg(long, value_name = "FILE", required_unless_present_any = ["rootfs", "oci"])]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk; uncompressed ones boot fastest
    #[arg(long, value_name = "FILE", conflicts_with_all = ["rootfs", "oci"])]
    pub initrd: Option<PathBuf>,
    /// Root file system: a tar archive, as it is or packed by gzip
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "oci"])]
    pub rootfs: Option<PathBuf>,
    /// Image in an OCI layout: its directory, and which of its images by name or digest
    #[arg(long, value_name = "DIR[:NAME]", conflicts_with = "kernel")]
    pub oci: Option<LayoutWord>,
    /// Image whose kernel and guest agent a container gets [default: demo, or the first there is]
    #[arg(long, value_name = "NAME", value_parser = value::name, conflicts_with = "kernel")]
    pub like: Option<String>,
    /// Most MiB that a container's layers may have once they are unpacked [default: 4096]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20), conflicts_with = "kernel")]
    pub max_size: Option<u64>,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS")]
    pub command_line: Option<String>,
}
