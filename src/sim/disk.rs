//! Directories, images and facts of a simulated host.

use std::io;

use super::SimHost;
use crate::agent::world::{DiskIdentity, HostFacts, ImageImport, VmDisk};
use crate::agent::{DiskSpec, Image, ImageError, Pressure, Remains};
use crate::clock::UnixNanos;
use crate::ids::VmId;
use crate::wire::last_words::LastWords;

fn demo() -> Image {
    Image {
        name: "demo".to_owned(),
        digest: "0".repeat(64),
        kernel_bytes: 1 << 20,
        initrd_bytes: None,
        command_line: "quiet".to_owned(),
        memory_mib_min: 64,
        container: None,
        created_at: UnixNanos(0),
    }
}

impl VmDisk for SimHost {
    async fn make(&self, vm: &VmId) -> io::Result<()> {
        self.point(true).await?;
        self.state().directories.insert(vm.clone());
        self.point(false).await
    }

    async fn remove(&self, vm: &VmId) -> io::Result<()> {
        self.point(true).await?;
        {
            let mut state = self.state();
            state.settle();
            if state.vmms.values().any(|vmm| vmm.vm == *vm && vmm.end.is_none()) {
                state.violations.push(format!("the directory of {vm} was removed while its VMM lives"));
            }
            state.directories.remove(vm);
            state.discard_sealed(vm);
        }
        self.point(false).await
    }

    async fn list(&self) -> io::Result<Vec<VmId>> {
        self.point(true).await?;
        Ok(self.directories())
    }

    async fn remains(&self, vm: &VmId) -> (Remains, Option<LastWords>) {
        let mut state = self.state();
        state.settle();
        let there = state.directories.contains(vm);
        let words = state.vmms.values().rev().find(|vmm| vmm.vm == *vm).and_then(|vmm| vmm.words.clone());
        let words = words.filter(|_| there);
        let last_words = words.as_ref().map(|words| format!("{words:?}"));
        (Remains { last_words, console: vec!["simulated".to_owned()], ..Remains::default() }, words)
    }

    async fn console_history(&self, _vm: &VmId, bytes_max: usize) -> io::Result<Vec<u8>> {
        let history = b"simulated\n";
        Ok(history[history.len().saturating_sub(bytes_max)..].to_vec())
    }

    async fn keep_sealed(&self, vm: &VmId) -> io::Result<()> {
        self.point(true).await?;
        self.state().keep_sealed(vm)?;
        self.point(false).await
    }

    async fn discard_sealed(&self, vm: &VmId) -> io::Result<()> {
        self.point(true).await?;
        self.state().discard_sealed(vm);
        self.point(false).await
    }

    async fn images(&self) -> Result<Vec<Image>, ImageError> {
        Ok(vec![demo()])
    }

    async fn image(&self, name: &str) -> Result<Image, ImageError> {
        if name == "demo" { Ok(demo()) } else { Err(ImageError::Unknown { name: name.to_owned() }) }
    }

    async fn import_image(&self, import: ImageImport) -> Result<Image, ImageError> {
        Err(ImageError::Exists { name: import.name })
    }

    async fn remove_image(&self, name: &str) -> Result<(), ImageError> {
        Err(ImageError::Unknown { name: name.to_owned() })
    }

    async fn check_disk(&self, disk: &DiskSpec) -> io::Result<()> {
        if disk.path == "/there" { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    async fn identify_disk(&self, disk: &DiskSpec) -> io::Result<DiskIdentity> {
        self.check_disk(disk).await?;
        Ok(DiskIdentity { inode: 1, bytes: 512 })
    }

    async fn sync_disk(&self, disk: &DiskSpec) -> io::Result<()> {
        self.check_disk(disk).await
    }

    async fn command_line_additions(&self) -> String {
        String::new()
    }

    async fn pressure(&self) -> Pressure {
        Pressure::default()
    }

    async fn host(&self) -> io::Result<HostFacts> {
        Ok(HostFacts {
            name: "simulated".to_owned(),
            cpus: 2,
            memory_bytes: 64 << 30,
            memory_available_bytes: 64 << 30,
            disk_total_bytes: 1 << 40,
            disk_free_bytes: self.disk_free_bytes(),
            descriptors_open: 64,
            descriptors_max: 1 << 20,
            probe: None,
            isolation: None,
        })
    }
}
