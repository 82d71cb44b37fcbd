//! The real world: this host. Made at start-up, in this order: directories, lock, ledger, then the rest.

use std::io;
use std::path::PathBuf;

use super::config::Config;
use super::host_disk::{HostDisk, VmDirs};
use super::host_vmm::HostVmm;
use super::images::ImageStore;
use super::ledger::LedgerError;
use super::ledger::writer::LedgerThread;
use super::world::World;
use crate::clock::SystemClock;
use crate::sys::file;

/// This host.
#[derive(Debug)]
pub struct HostWorld {
    clock: SystemClock,
    vmm: HostVmm,
    disk: HostDisk,
    records: LedgerThread,
    /// Held as long as this agent lives.
    _lock: file::Lock,
}

/// Why an agent cannot have its state.
#[derive(Debug, thiserror::Error)]
pub enum OpenHostError {
    /// A directory could not be made.
    #[error("make the directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The lock file could not be used.
    #[error("lock the state directory {}", path.display())]
    Lock {
        /// The state directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Another agent has it.
    #[error(
        "another agent uses the state directory {}; stop it, or give this one its own with --state-dir",
        path.display()
    )]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// The ledger could not be opened.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl HostWorld {
    /// Takes the state directory and opens what is in it. Call inside the runtime.
    pub fn open(config: &Config) -> Result<Self, OpenHostError> {
        let vms = config.state_dir.join("vms");
        for path in [&config.state_dir, &vms] {
            file::make_directories(path).map_err(|source| OpenHostError::Directory { path: path.clone(), source })?;
        }
        let path = config.state_dir.clone();
        let lock = match file::try_lock(&path.join("lock")) {
            Ok(Some(lock)) => lock,
            Ok(None) => return Err(OpenHostError::InUse { path }),
            Err(source) => return Err(OpenHostError::Lock { path, source }),
        };
        let records = LedgerThread::start(&path.join("ledger.db"))?;
        let dirs = VmDirs::new(vms);
        let images = ImageStore::new(config.images_dir.clone());
        let vmm = HostVmm { dirs: dirs.clone(), images: images.clone(), waits: config.waits };
        let disk = HostDisk::new(dirs, images, config.host_name.clone());
        Ok(Self { clock: SystemClock::new(), vmm, disk, records, _lock: lock })
    }
}

impl World for HostWorld {
    type Clock = SystemClock;
    type Vmm = HostVmm;
    type Disk = HostDisk;
    type Records = LedgerThread;

    fn clock(&self) -> &SystemClock {
        &self.clock
    }

    fn vmm(&self) -> &HostVmm {
        &self.vmm
    }

    fn disk(&self) -> &HostDisk {
        &self.disk
    }

    fn records(&self) -> &LedgerThread {
        &self.records
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        getrandom::fill(bytes).map_err(|error| io::Error::other(error.to_string()))
    }
}
