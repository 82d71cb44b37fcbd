//! Files of this host: one directory per VM that has a VMM, the images, and what the host says of itself.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tokio::task::spawn_blocking;

use super::cgroup::HostCgroups;
use super::health::Pressure;
use super::host_probe::HostProbe;
use super::host_vmm::names;
use super::images::{Image, ImageError, ImageStore};
use super::isolation;
use super::record::{DiskSpec, Remains};
use super::world::{DiskIdentity, HostFacts, ImageImport, VmDisk};
use crate::ids::VmId;
use crate::sys::{file, host};
use crate::wire::console_ring::{self, RING_BYTES};
use crate::wire::last_words::{self, LastWords};

/// Lines of console and log kept of a VM that ended.
const LINES_KEPT: usize = 20;

/// Longest line kept, in bytes.
const LINE_BYTES_MAX: usize = 512;

/// Bytes of the end of a VMM's log that are looked at.
const LOG_BYTES: u64 = 16 * 1024;

/// The directories of VMs.
#[derive(Debug, Clone)]
pub(super) struct VmDirs {
    root: PathBuf,
}

impl VmDirs {
    /// The directories below `root`.
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// A VM's directory.
    pub(super) fn path(&self, vm: &VmId) -> PathBuf {
        self.root.join(vm.as_str())
    }

    /// A VM's directory, held open.
    pub(super) fn open(&self, vm: &VmId) -> io::Result<File> {
        File::open(self.path(vm))
    }

    /// A new, empty file in a VM's directory.
    pub(super) fn create(&self, vm: &VmId, name: &str) -> io::Result<File> {
        file::create(&self.path(vm).join(name))
    }

    /// A file in a VM's directory that several may write to, each at its end.
    pub(super) fn append(&self, vm: &VmId, name: &str) -> io::Result<File> {
        file::append(&self.path(vm).join(name))
    }

    /// A file in a VM's directory as it is, to read and write.
    pub(super) fn open_to_change(&self, vm: &VmId, name: &str) -> io::Result<File> {
        File::options().read(true).write(true).open(self.path(vm).join(name))
    }

    /// Has a file of a VM's directory under another name, in the place of what was called so. Done before is as good.
    pub(super) fn rename(&self, vm: &VmId, from: &str, to: &str) -> io::Result<()> {
        let dir = self.path(vm);
        match std::fs::rename(dir.join(from), dir.join(to)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Whether there is a file of this name in a VM's directory.
    pub(super) fn has(&self, vm: &VmId, name: &str) -> bool {
        self.path(vm).join(name).exists()
    }

    /// Has none of these files in a VM's directory.
    pub(super) fn remove_files(&self, vm: &VmId, names: &[String]) -> io::Result<()> {
        for name in names {
            match std::fs::remove_file(self.path(vm).join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }

    fn make(&self, vm: &VmId) -> io::Result<()> {
        file::make_directories(&self.path(vm))
    }

    /// What was sealed of a VM, to be read.
    pub(super) fn open_sealed(&self, vm: &VmId) -> io::Result<File> {
        File::open(self.path(vm).join(names::SEALED))
    }

    fn keep_sealed(&self, vm: &VmId) -> io::Result<()> {
        let dir = self.path(vm);
        let (from, to) = (dir.join(names::SEALING), dir.join(names::SEALED));
        match File::open(&from) {
            Ok(sealing) => {
                sealing.sync_all()?;
                std::fs::rename(from, to)?;
            }
            // Done before, and its end was not recorded.
            Err(error) if error.kind() == io::ErrorKind::NotFound && to.exists() => {}
            Err(error) => return Err(error),
        }
        File::open(dir)?.sync_all()
    }

    fn discard_sealed(&self, vm: &VmId) -> io::Result<()> {
        self.remove_files(vm, &[names::SEALING, names::SEALED].map(str::to_owned))
    }

    fn remove(&self, vm: &VmId) -> io::Result<()> {
        match std::fs::remove_dir_all(self.path(vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn list(&self) -> io::Result<Vec<VmId>> {
        let entries = std::fs::read_dir(&self.root)?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter_map(|name| name.parse().ok()).collect())
    }

    fn read(&self, vm: &VmId, name: &str, bytes_max: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.path(vm).join(name))?.take(bytes_max).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn console(&self, vm: &VmId) -> io::Result<Vec<u8>> {
        let bytes = self.read(vm, names::CONSOLE_RING, (console_ring::HEADER_BYTES + RING_BYTES) as u64)?;
        Ok(console_ring::history(&bytes).unwrap_or_default())
    }

    fn log_end(&self, vm: &VmId) -> io::Result<Vec<u8>> {
        let mut file = File::open(self.path(vm).join(names::LOG))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn remains(&self, vm: &VmId) -> (Remains, Option<LastWords>) {
        let words = self.read(vm, names::LAST_WORDS, last_words::BYTES_MAX as u64).unwrap_or_default();
        let parsed = LastWords::parse(&words);
        let console = self.console(vm).unwrap_or_default();
        let log = self.log_end(vm).unwrap_or_default();
        let line = |bytes: &[u8]| console_ring::last_lines(bytes, 1).pop().map(bounded);
        let remains = Remains {
            at: None,
            cause: parsed.as_ref().map(|words| cause(words).to_owned()),
            exit: None,
            last_words: line(&words),
            console: console_ring::last_lines(&console, LINES_KEPT).into_iter().map(bounded).collect(),
            log: console_ring::last_lines(&log, LINES_KEPT).into_iter().map(bounded).collect(),
        };
        (remains, parsed)
    }
}

/// The name of last words, as in their JSON.
const fn cause(words: &LastWords) -> &'static str {
    match words {
        LastWords::Stopped => "stopped",
        LastWords::GuestPoweredOff => "guest_powered_off",
        LastWords::GuestRebooted => "guest_rebooted",
        LastWords::GuestPanic => "guest_panic",
        LastWords::GuestFault { .. } => "guest_fault",
        LastWords::VmmError { .. } => "vmm_error",
    }
}

fn bounded(mut line: String) -> String {
    let mut end = LINE_BYTES_MAX.min(line.len());
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    line
}

/// Files of this host.
#[derive(Debug)]
pub struct HostDisk {
    dirs: VmDirs,
    images: ImageStore,
    host_name: Option<String>,
    probe: HostProbe,
    cgroups: HostCgroups,
}

impl HostDisk {
    /// Files of this host.
    pub(super) const fn new(
        dirs: VmDirs,
        images: ImageStore,
        host_name: Option<String>,
        probe: HostProbe,
        cgroups: HostCgroups,
    ) -> Self {
        Self { dirs, images, host_name, probe, cgroups }
    }

    async fn on_images<T: Send + 'static>(
        &self,
        job: impl FnOnce(ImageStore) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        let images = self.images.clone();
        let done = spawn_blocking(move || job(images)).await;
        done.unwrap_or_else(|_| {
            let source = io::Error::other("the agent is ending");
            Err(ImageError::File { name: String::new(), file: String::new(), source })
        })
    }

    async fn on_dirs<T: Send + 'static>(&self, job: impl FnOnce(VmDirs) -> T + Send + 'static) -> io::Result<T> {
        let dirs = self.dirs.clone();
        spawn_blocking(move || job(dirs)).await.map_err(|_| io::Error::other("the agent is ending"))
    }
}

impl VmDisk for HostDisk {
    async fn make(&self, vm: &VmId) -> io::Result<()> {
        let vm = vm.clone();
        self.on_dirs(move |dirs| dirs.make(&vm)).await?
    }

    async fn remove(&self, vm: &VmId) -> io::Result<()> {
        let vm = vm.clone();
        self.on_dirs(move |dirs| dirs.remove(&vm)).await?
    }

    async fn list(&self) -> io::Result<Vec<VmId>> {
        self.on_dirs(|dirs| dirs.list()).await?
    }

    async fn remains(&self, vm: &VmId) -> (Remains, Option<LastWords>) {
        let vm = vm.clone();
        self.on_dirs(move |dirs| dirs.remains(&vm)).await.unwrap_or_default()
    }

    async fn console_history(&self, vm: &VmId, bytes_max: usize) -> io::Result<Vec<u8>> {
        let vm = vm.clone();
        let history = self.on_dirs(move |dirs| dirs.console(&vm)).await??;
        Ok(history[history.len().saturating_sub(bytes_max)..].to_vec())
    }

    async fn keep_sealed(&self, vm: &VmId) -> io::Result<()> {
        let vm = vm.clone();
        self.on_dirs(move |dirs| dirs.keep_sealed(&vm)).await?
    }

    async fn discard_sealed(&self, vm: &VmId) -> io::Result<()> {
        let vm = vm.clone();
        self.on_dirs(move |dirs| dirs.discard_sealed(&vm)).await?
    }

    async fn images(&self) -> Result<Vec<Image>, ImageError> {
        self.on_images(|images| Ok(images.list())).await
    }

    async fn image(&self, name: &str) -> Result<Image, ImageError> {
        let name = name.to_owned();
        self.on_images(move |images| images.image(&name)).await
    }

    async fn import_image(&self, import: ImageImport) -> Result<Image, ImageError> {
        // What guests need beside their image they need where their kernel mode is emulated.
        let emulated = !self.probe.command_line_additions().await.is_empty();
        self.on_images(move |images| images.import(&import, emulated)).await
    }

    async fn remove_image(&self, name: &str) -> Result<(), ImageError> {
        let name = name.to_owned();
        self.on_images(move |images| images.remove(&name)).await
    }

    async fn check_disk(&self, disk: &DiskSpec) -> io::Result<()> {
        let disk = disk.clone();
        self.on_dirs(move |_| check_disk(&disk).map(drop)).await?
    }

    async fn identify_disk(&self, disk: &DiskSpec) -> io::Result<DiskIdentity> {
        let disk = disk.clone();
        self.on_dirs(move |_| check_disk(&disk)).await?
    }

    async fn sync_disk(&self, disk: &DiskSpec) -> io::Result<()> {
        let path = disk.path.clone();
        // A flush is the file's, whoever wrote to it.
        self.on_dirs(move |_| File::open(path)?.sync_data()).await?
    }

    async fn command_line_additions(&self) -> String {
        self.probe.command_line_additions().await
    }

    async fn pressure(&self) -> Pressure {
        let look =
            |_| Pressure { cpu: host::pressure("cpu"), memory: host::pressure("memory"), io: host::pressure("io") };
        self.on_dirs(look).await.unwrap_or_default()
    }

    async fn host(&self) -> io::Result<HostFacts> {
        let mut facts = self.on_dirs(|dirs| host_facts(&dirs.root)).await??;
        if let Some(name) = &self.host_name {
            facts.name.clone_from(name);
        }
        facts.probe = self.probe.so_far();
        facts.isolation = Some(isolation::host(&self.cgroups));
        Ok(facts)
    }
}

fn check_disk(disk: &DiskSpec) -> io::Result<DiskIdentity> {
    // Looked at before it is opened: opening a FIFO would wait for its writer.
    let metadata = std::fs::metadata(Path::new(&disk.path))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("neither a regular file nor a block device"));
    }
    let mut file = File::options().read(true).write(!disk.read_only).open(&disk.path)?;
    let length = file.seek(SeekFrom::End(0))?;
    if length < 512 || length % 512 != 0 {
        return Err(io::Error::other(format!("{length} bytes long, which is not a number of 512-byte sectors")));
    }
    Ok(DiskIdentity { inode: if kind.is_file() { metadata.ino() } else { 0 }, bytes: length })
}

fn host_facts(dir: &Path) -> io::Result<HostFacts> {
    let space = host::space(dir)?;
    let descriptors = host::descriptors()?;
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(HostFacts {
        name: name.trim().to_owned(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_bytes: kib_field(&memory, "MemTotal:") * 1024,
        memory_available_bytes: kib_field(&memory, "MemAvailable:") * 1024,
        disk_total_bytes: space.total_bytes,
        disk_free_bytes: space.free_bytes,
        descriptors_open: descriptors.open,
        descriptors_max: descriptors.max,
        probe: None,
        isolation: None,
    })
}

pub(super) fn kib_field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> VmId {
        VmId::from_random([7; 10])
    }

    #[test]
    fn what_a_vmm_left_is_read_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = VmDirs::new(dir.path().to_owned());
        assert_eq!(dirs.remains(&id()), (Remains::default(), None));
        dirs.make(&id()).unwrap();
        dirs.make(&id()).unwrap();
        let at = |name: &str| dirs.path(&id()).join(name);
        file::replace(&at(names::LAST_WORDS), &LastWords::GuestPanic.to_line()).unwrap();
        let console = format!("{}\nlast\n", "x".repeat(10_000));
        let mut ring = console_ring::header(console.len() as u64).to_vec();
        ring.extend(console.as_bytes());
        file::replace(&at(names::CONSOLE_RING), &ring).unwrap();
        file::replace(&at(names::LOG), "line\n".repeat(10_000).as_bytes()).unwrap();
        let (remains, words) = dirs.remains(&id());
        assert_eq!(words, Some(LastWords::GuestPanic));
        assert_eq!(remains.console.iter().map(String::len).collect::<Vec<_>>(), [LINE_BYTES_MAX, 4]);
        assert_eq!(remains.log.len(), LINES_KEPT);
        assert_eq!(dirs.list().unwrap(), [id()]);
        dirs.remove(&id()).unwrap();
        dirs.remove(&id()).unwrap();
        assert!(dirs.list().unwrap().is_empty());
    }

    #[test]
    fn what_is_sealed_is_kept_and_discarded_however_often() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = VmDirs::new(dir.path().to_owned());
        dirs.make(&id()).unwrap();
        assert!(dirs.keep_sealed(&id()).is_err(), "nothing was sealed");
        drop(dirs.create(&id(), names::SEALING).unwrap());
        assert!(dirs.open_sealed(&id()).is_err(), "not before it is kept");
        dirs.keep_sealed(&id()).unwrap();
        dirs.keep_sealed(&id()).unwrap();
        dirs.open_sealed(&id()).unwrap();
        dirs.discard_sealed(&id()).unwrap();
        dirs.discard_sealed(&id()).unwrap();
        assert!(dirs.open_sealed(&id()).is_err());
    }

    #[test]
    fn disks_are_files_of_whole_sectors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let disk = |path: &Path| DiskSpec { path: path.to_str().unwrap().to_owned(), read_only: false, shared: false };
        assert!(check_disk(&disk(&path)).is_err());
        for (length, fits) in [(0, false), (511, false), (512, true), (513, false), (4096, true)] {
            file::replace(&path, &vec![0; length]).unwrap();
            assert_eq!(check_disk(&disk(&path)).is_ok(), fits, "{length}");
        }
        assert!(check_disk(&disk(dir.path())).is_err());
        assert!(check_disk(&disk(Path::new("/dev/null"))).is_err());
    }
}
