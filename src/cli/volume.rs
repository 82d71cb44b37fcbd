//! `hearth volume`.

use clap::{Args, Subcommand, ValueEnum};

use super::value::{RateWord, ReferenceWord};
use crate::ids::LeaseId;

const CREATE_HELP: &str = "\
A volume is a block device that outlives guests. It takes space on the disk as it is written; what it shares with
snapshots and clones is there once.

Examples:
  hearth volume create --name data --size 1024          1 GiB, empty
  hearth volume create --name root --from-file debian.img --size 4096
  hearth volume create --name try --from-volume data    a copy, made at once
  hearth vm launch --volume data:/srv                   a VM that has it, mounted at /srv
  hearth vm launch --volume root:/                      a VM that has its root file system on it";

const ATTACH_HELP: &str = "\
The VM takes one of the slots that it was launched with for this (`hearth vm launch --spare-disks N`). In the guest a
disk that was empty gets the volume's size. A volume has one VM that writes; with --read-only, any number that read.

Examples:
  hearth volume attach data web
  hearth volume attach data web --mount /srv
  hearth volume detach data web";

const LEASES_HELP: &str = "\
One lease is active: its holder reads and writes. One may stand by, to become active by a conversion, as in a migration.
Each new active lease has the next epoch, and requests of earlier ones are refused.";

const LEASE_HELP: &str = "\
VMs take their leases by themselves: this is for other programs, which use a volume by NBD. The export's name is
VOLUME:LEASE:EPOCH; without lease and epoch it can be read only.

Examples:
  hearth volume lease data --holder backup --ttl 60s
  qemu-img convert -O raw disk.img \\
      nbd+unix:///vol-...:l-...:1?socket=/var/lib/hearth/volumed/nbd.sock";

/// `hearth volume`.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume
    #[command(after_help = CREATE_HELP)]
    Create(VolumeCreateArgs),
    /// List the volumes of this host
    Ls,
    /// Show a volume
    Show {
        /// Id of the volume, a unique prefix of it, or its name
        volume: ReferenceWord,
    },
    /// Give a volume to a VM
    #[command(after_help = ATTACH_HELP)]
    Attach(VolumeAttachArgs),
    /// Take a volume from a VM
    Detach(VolumeDetachArgs),
    /// Keep a volume's content as of now
    Snapshot(VolumeSnapshotArgs),
    /// List the snapshots of volumes
    Snapshots,
    /// Make a volume larger
    Resize {
        /// Id of the volume, a unique prefix of it, or its name
        volume: ReferenceWord,
        /// Its new size in MiB
        #[arg(long, value_name = "MiB", value_parser = clap::value_parser!(u64).range(1..))]
        size: u64,
    },
    /// BLAKE3 of all bytes of a volume
    Digest {
        /// Id of the volume, a unique prefix of it, or its name
        volume: ReferenceWord,
    },
    /// List what changed of a volume after a generation
    Changes {
        /// Id of the volume, a unique prefix of it, or its name
        volume: ReferenceWord,
        /// A snapshot's generation, or that of an earlier answer
        #[arg(long, value_name = "GENERATION")]
        since: u32,
    },
    /// Who may use a volume, and who could before
    #[command(after_help = LEASES_HELP)]
    Leases {
        /// Id of the volume, a unique prefix of it, or its name
        volume: ReferenceWord,
    },
    /// Take a lease of a volume, to use it by NBD
    #[command(after_help = LEASE_HELP)]
    Lease(LeaseArgs),
    /// End a lease
    Release {
        /// Id of the volume, a unique prefix of it, or its name
        volume: ReferenceWord,
        /// Id of the lease
        lease: LeaseId,
    },
    /// Make the standby lease of a volume the active one
    Convert(LeaseConvertArgs),
    /// Remove volumes that nobody has a lease of, or snapshots
    Rm {
        /// Ids of volumes or snapshots, unique prefixes of them, or names of volumes
        #[arg(required = true)]
        volumes: Vec<ReferenceWord>,
    },
}

/// `hearth volume create`.
#[derive(Debug, Clone, Args)]
pub struct VolumeCreateArgs {
    /// Its name
    #[arg(long)]
    pub name: Option<String>,
    /// Its size in MiB [default: that of what it begins with]
    #[arg(long, value_name = "MiB", value_parser = clap::value_parser!(u64).range(1..),
          required_unless_present_any = ["from_file", "from_volume", "from_snapshot"])]
    pub size: Option<u64>,
    /// A raw image that it begins with
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from_volume", "from_snapshot"])]
    pub from_file: Option<std::path::PathBuf>,
    /// A volume that it begins with, as that is now
    #[arg(long, value_name = "VOLUME", conflicts_with = "from_snapshot")]
    pub from_volume: Option<ReferenceWord>,
    /// A snapshot that it begins with
    #[arg(long, value_name = "SNAPSHOT")]
    pub from_snapshot: Option<ReferenceWord>,
}

/// `hearth volume attach`.
#[derive(Debug, Clone, Args)]
pub struct VolumeAttachArgs {
    /// Id of the volume, a unique prefix of it, or its name
    pub volume: ReferenceWord,
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// Refuse the guest's writes; other VMs may read it as well
    #[arg(long)]
    pub read_only: bool,
    /// Have the guest mount it here; not at /, which is for a launch: `hearth vm launch --volume VOLUME:/`
    #[arg(long, value_name = "DIR")]
    pub mount: Option<String>,
    /// Most requests per second: more wait
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub iops: Option<u32>,
    /// Most bytes read and written per second: 10M, 500k
    #[arg(long, value_name = "BYTES")]
    pub rate: Option<RateWord>,
}

/// `hearth volume detach`.
#[derive(Debug, Clone, Args)]
pub struct VolumeDetachArgs {
    /// Id of the volume, a unique prefix of it, or its name
    pub volume: ReferenceWord,
    /// Id of the VM, a unique prefix of it, or its name
    pub vm: ReferenceWord,
    /// Take it also while the guest has it mounted or writes: what it did not flush is lost
    #[arg(long)]
    pub force: bool,
}

/// `hearth volume snapshot`.
#[derive(Debug, Clone, Args)]
pub struct VolumeSnapshotArgs {
    /// Id of the volume, a unique prefix of it, or its name
    pub volume: ReferenceWord,
    /// The snapshot's name
    #[arg(long)]
    pub name: Option<String>,
}

/// What a lease shall allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LeaseModeWord {
    /// To read and write, alone
    Active,
    /// Nothing yet: to become active by a conversion
    Standby,
    /// To read, beside others that only read
    Shared,
}

/// `hearth volume lease`.
#[derive(Debug, Clone, Args)]
pub struct LeaseArgs {
    /// Id of the volume, a unique prefix of it, or its name
    pub volume: ReferenceWord,
    /// What it shall allow
    #[arg(long, value_enum, default_value_t = LeaseModeWord::Active)]
    pub mode: LeaseModeWord,
    /// Who wants it, for people
    #[arg(long, default_value = "hearth volume lease")]
    pub holder: String,
    /// It ends by itself after this, unless somebody is connected with it
    #[arg(long, value_name = "TIME", value_parser = ttl_s)]
    pub ttl: Option<u32>,
    /// End the leases that are in the way, as their holders are dead: what they still write is refused
    #[arg(long = "break")]
    pub break_others: bool,
}

/// `hearth volume convert`.
#[derive(Debug, Clone, Args)]
pub struct LeaseConvertArgs {
    /// Id of the volume, a unique prefix of it, or its name
    pub volume: ReferenceWord,
    /// The active lease, which ends
    #[arg(long)]
    pub from: LeaseId,
    /// The standby lease
    #[arg(long)]
    pub to: LeaseId,
    /// The epoch of the active lease
    #[arg(long)]
    pub epoch: u64,
}

/// A time to live in whole seconds.
fn ttl_s(text: &str) -> Result<u32, super::value::WordError> {
    super::value::duration_ms(text).map(super::whole_seconds)
}
