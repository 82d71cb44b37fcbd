//! `hearth bundle`, and `hearth vm snapshot`.

use clap::{Args, Subcommand};

use super::bundle_file::{BundleExportArgs, BundleImportArgs, BundleKeyArgs, BundleSignArgs};
use super::fetch::{BundleFetchArgs, BundlePinArgs};
use super::value::{ReferenceWord, duration_ms, key, name};
use crate::api::types::IMAGE_DEFAULT;

const BUILD_HELP: &str = "\
A VM of the image is booted, warmed up, brought to rest, frozen and removed; what is left is a bundle: its memory and
registers. VMs launched from it go on where it stood, each with a name, addresses and randomness of its own.

Programs in the guest that keep random state or an identity of their own take note of the new one by executables in
/etc/hearth/identity.d: those run in every VM before anything reaches it from outside.

Examples:
  hearth bundle build --name base                                 the demo image, booted
  hearth bundle build --name web --warmup 'httpd -p 80 -h /srv; wget -q -O /dev/null http://127.0.0.1/'
  hearth bundle build --name app --warmup '/srv/app --serve' --ready-marker 'listening on'
  hearth vm launch --bundle app                                   a VM of it, in milliseconds";

const SNAPSHOT_HELP: &str = "\
The VM stands still while its memory is written, and goes on. Its name, addresses and randomness stay its own: VMs that
are launched from the bundle get others.

Examples:
  hearth vm snapshot web --bundle-name web-monday
  hearth vm snapshot web --live                         with a pause of milliseconds, however large it is
  hearth vm snapshot web --diff                         only what differs from the bundle that it was launched from";

/// `hearth bundle`.
#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Boot an image, warm it up and freeze it into a bundle
    #[command(after_help = BUILD_HELP)]
    Build(Box<BundleBuildArgs>),
    /// List the bundles of this host
    Ls,
    /// Show one bundle: its machine, where it comes from, what it builds on
    Show {
        /// Id of the bundle, a unique prefix of it, or its name
        bundle: ReferenceWord,
    },
    /// Read all of a bundle and compare it with its digests
    Verify {
        /// Id of the bundle, a unique prefix of it, or its name
        bundle: ReferenceWord,
    },
    /// Make a bundle with the content of one that builds on others, which builds on none
    Compact(BundleCompactArgs),
    /// Write a bundle, with what it builds on, into one file
    Export(BundleExportArgs),
    /// Take a bundle out of a file, once all of it was verified
    Import(BundleImportArgs),
    /// Have a bundle that is elsewhere; its memory comes while VMs of it already run
    Fetch(BundleFetchArgs),
    /// Keep a bundle that was fetched, however long it is not used
    Pin(BundlePinArgs),
    /// Let a bundle that was fetched go when others need its room
    Unpin(BundlePinArgs),
    /// Make a key to sign bundles with
    Key(BundleKeyArgs),
    /// Sign a bundle
    Sign(BundleSignArgs),
    /// Remove bundles that no VM runs from and no other bundle builds on
    Rm {
        /// Ids of the bundles, unique prefixes of them, or their names
        #[arg(required = true, value_name = "BUNDLE")]
        bundles: Vec<ReferenceWord>,
    },
}

/// `hearth bundle build`.
#[derive(Debug, Clone, Args)]
pub struct BundleBuildArgs {
    /// Image to boot
    #[arg(long, value_name = "NAME", default_value = IMAGE_DEFAULT, value_parser = name)]
    pub image: String,
    /// Name of the bundle: 1 to 63 of a-z, 0-9 and `-`, starting with a letter
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Memory in MiB [default: 128]
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    /// Number of network interfaces, 1 to 8 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub interfaces: Option<u8>,
    /// Disks of its VMs that are empty until they get a volume, at launch or by `hearth volume attach`, 0 to 6
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=6))]
    pub spare_disks: Option<u8>,
    /// Make it also if the guest says that it holds secrets: every clone has them then
    #[arg(long)]
    pub with_secrets: bool,
    /// Line for the guest's shell that warms it up
    #[arg(long, value_name = "CMD")]
    pub warmup: Option<String>,
    /// What the warm-up program prints when the guest is warm; it runs on then. Without a program: what the console says
    #[arg(long, value_name = "TEXT")]
    pub ready_marker: Option<String>,
    /// How long warming up may take: 90s, 5m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration_ms)]
    pub timeout: u32,
    /// Do not wait: print the operation
    #[arg(long)]
    pub no_wait: bool,
    /// A repeated build with the same key answers with the first one's operation
    #[arg(long, value_name = "KEY", value_parser = key)]
    pub idempotency_key: Option<String>,
}

/// `hearth bundle compact`.
#[derive(Debug, Clone, Args)]
pub struct BundleCompactArgs {
    /// Id of the bundle, a unique prefix of it, or its name
    pub bundle: ReferenceWord,
    /// Name of the new bundle
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,
}

/// `hearth vm snapshot`.
#[derive(Debug, Clone, Args)]
#[command(after_help = SNAPSHOT_HELP)]
pub struct SnapshotArgs {
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// Name of the bundle: 1 to 63 of a-z, 0-9 and `-`, starting with a letter
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub bundle_name: Option<String>,
    /// Hold only what differs from the bundle that the VM was launched from
    #[arg(long)]
    pub diff: bool,
    /// Copy memory while the VM runs, and hold it for what is left: a shorter pause, a longer snapshot
    #[arg(long)]
    pub live: bool,
    /// Make it also if the guest says that it holds secrets: every clone has them then
    #[arg(long)]
    pub with_secrets: bool,
}
