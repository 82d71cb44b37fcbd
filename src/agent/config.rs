//! The agent's configuration: words checked once, at start. Nothing here depends on the host.

mod fabric;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

pub use super::swap::SwapConfig;
use super::trust::TRUSTED_KEYS_MAX;
pub use super::trust::TrustConfig;
use crate::signing::PublicKey;
use crate::units::MIB;
pub use fabric::{FabricConfig, Peer, Underlay};

/// Where the configuration is looked for when no path is given. It may be absent.
pub const PATH_DEFAULT: &str = "/etc/hearth/hearth.toml";

/// Where state is kept.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/hearth";

/// Where the API is served.
pub const SOCKET_DEFAULT: &str = "/run/hearth/api.sock";

/// Longest configuration file in bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// A checked configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// This host's name; the kernel's host name when absent.
    pub host_name: Option<String>,
    /// Where state is kept.
    pub state_dir: PathBuf,
    /// Where images are kept.
    pub images_dir: PathBuf,
    /// Where the API is served.
    pub socket: PathBuf,
    /// Bounds on what users may ask for.
    pub limits: Limits,
    /// Which user ids VMMs get.
    pub uids: Uids,
    /// How long things may take.
    pub waits: Waits,
    /// When idle VMs are moved out.
    pub swap: SwapConfig,
    /// Whose bundles are launched.
    pub trust: TrustConfig,
    /// Most MiB that bundles from elsewhere take on disk, but for those that are used or kept; 0: no bound.
    pub fetched_mib: u64,
    /// Where volumes are, and how much of the disk they take.
    pub volumes: VolumesConfig,
    /// What session networks are made of; without it there are none.
    pub fabric: Option<FabricConfig>,
    /// The control group below which VMs have theirs, from the mount of version 2; found when it is not said.
    pub cgroup_parent: Option<String>,
}

/// Where volumes are, and how much of the disk they take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumesConfig {
    /// Their directory.
    pub directory: PathBuf,
    /// Most bytes of the disk that they take together; `None`: as many as there are.
    pub quota_bytes: Option<u64>,
    /// The TCP port where other hosts of the fabric reach them.
    pub port: u16,
    /// Seconds without any connection to a volume after which its guest is told of errors.
    pub reconnect_s: u32,
}

/// The port where other hosts reach volumes: the one behind that of agents.
const VOLUMES_PORT_DEFAULT: u16 = super::peers::PEER_PORT_DEFAULT + 1;

/// As long as Linux lets a disk take for one request before it resets it.
const RECONNECT_S_DEFAULT: u32 = 30;

/// Bounds on what users may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most VMs, ended ones that were not removed included.
    pub vms_max: u32,
    /// Most vCPUs of one VM.
    pub vcpus_max: u32,
    /// Memory in MiB that VMs may not use up.
    pub memory_reserve_mib: u64,
    /// Space in MiB on the state directory's file system that new work may not use up.
    pub disk_reserve_mib: u64,
    /// Most MiB of memory that are mapped for a guest from a bundle before it reaches them; 0: none.
    pub prefault_mib: u64,
    /// Most connections of clients at once; one process may have half of them.
    pub connections_max: u32,
    /// Events that are kept.
    pub events_kept: u32,
    /// Days that events are kept.
    pub events_kept_days: u32,
    /// Backups of the ledger that are kept.
    pub ledger_backups_kept: u32,
}

impl Default for Limits {
    fn default() -> Self {
        // 4096 slots of uids per host; 32 vCPUs is the most the machine floor tests. 256 MiB is room for the agent,
        // its page cache and an administrator's shell.
        // 512 MiB of disk are room for the ledger, its log and backups, what VMs write to their consoles and logs, and a
        // bundle of a small guest that is under way. 512 connections are as many calls that wait for a VM. A client that
        // looks once a minute at ten events a second misses none of 10,000. A week of daily backups.
        Self {
            vms_max: 1024,
            vcpus_max: VCPUS_MAX,
            memory_reserve_mib: 256,
            disk_reserve_mib: 512,
            prefault_mib: 64,
            connections_max: 512,
            events_kept: 10_000,
            events_kept_days: 30,
            ledger_backups_kept: 7,
        }
    }
}

/// Most vCPUs the VMM takes.
pub const VCPUS_MAX: u32 = 32;

/// User ids per host number: host numbers share one uid space where hosts are namespaces of one machine.
pub const UIDS_PER_HOST: u32 = 4096;

/// Which user ids VMMs get: `base + host_number * 4096 + slot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uids {
    /// The first user id.
    pub base: u32,
    /// This host's number among those that share user ids.
    pub host_number: u32,
    /// Seconds a user id rests after its VMM is gone.
    pub quarantine_s: u32,
}

impl Default for Uids {
    fn default() -> Self {
        // Above what distributions (up to 60,000), systemd (up to 61,439 and 1,879,048,192) and subordinate ids
        // (from 100,000 in blocks of 65,536 for the first users) take by default.
        Self { base: 1_610_612_736, host_number: 0, quarantine_s: 10 }
    }
}

/// Bytes per packet of VMs where no fabric says otherwise: Ethernet's.
const MTU_DEFAULT: u16 = 1500;

impl Config {
    /// The number that the names of this host's jails begin with.
    pub fn network_number(&self) -> u16 {
        match &self.fabric {
            Some(fabric) => fabric.host.into(),
            // At most 65,535: checked.
            None => u16::try_from(self.uids.host_number).unwrap_or(u16::MAX),
        }
    }

    /// Bytes per packet of VMs.
    pub fn mtu(&self) -> u16 {
        self.fabric.as_ref().map_or(MTU_DEFAULT, |fabric| fabric.mtu)
    }
}

impl Uids {
    /// The first user id of this host.
    pub const fn first(&self) -> u32 {
        self.base + self.host_number * UIDS_PER_HOST
    }

    /// How long a user id rests.
    pub fn quarantine(&self) -> Duration {
        Duration::from_secs(self.quarantine_s.into())
    }
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Waits {
    /// Seconds from the guest's first instruction until its agent has to answer; longer on a host with many guests for
    /// each processor, where all are slow.
    pub guest_ready_s: u32,
    /// Seconds a VMM has to answer a request other than a launch.
    pub vmm_answer_s: u32,
    /// Seconds a VMM has to build a machine.
    pub vmm_launch_s: u32,
    /// Seconds a guest waits for memory of its bundle that is not on this host yet, before its VM fails.
    pub memory_s: u32,
}

impl Default for Waits {
    fn default() -> Self {
        // A guest under an emulating KVM boots in 12 to 20 seconds, six at once on two processors in a minute.
        Self { guest_ready_s: 120, vmm_answer_s: 10, vmm_launch_s: 60, memory_s: 30 }
    }
}

/// What the command line says: wins over the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// `--socket`.
    pub socket: Option<PathBuf>,
    /// `$HEARTH_IMAGES`.
    pub images_dir: Option<PathBuf>,
}

/// What the file says of bundles.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenBundles {
    trusted_keys: Vec<PublicKey>,
    trust_local: bool,
    fetched_mib: u64,
}

/// [`VolumesConfig`] as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenVolumes {
    directory: Option<PathBuf>,
    quota_mib: u64,
    port: Option<u16>,
    reconnect_s: Option<u32>,
}

/// The file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Written {
    host_name: Option<String>,
    state_dir: Option<PathBuf>,
    images_dir: Option<PathBuf>,
    socket: Option<PathBuf>,
    limits: Limits,
    uids: WrittenUids,
    waits: Waits,
    swap: SwapConfig,
    bundles: WrittenBundles,
    volumes: WrittenVolumes,
    fabric: Option<fabric::WrittenFabric>,
    peers: Vec<fabric::WrittenPeer>,
    cgroup: WrittenCgroup,
}

/// Where control groups go.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenCgroup {
    parent: Option<String>,
}

/// [`Uids`] as they are written: what is not said may follow from elsewhere.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WrittenUids {
    base: Option<u32>,
    host_number: Option<u32>,
    quarantine_s: Option<u32>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It is not what a configuration looks like.
    #[error("understand the configuration {}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value is out of range.
    #[error("{what} is {found}, {wanted}")]
    Range {
        /// Which value.
        what: String,
        /// What it is.
        found: String,
        /// What it may be.
        wanted: String,
    },
}

/// Reads and checks the configuration.
pub fn load(overrides: Overrides) -> Result<Config, ConfigError> {
    let written = match &overrides.config {
        Some(path) => parse(path, &read(path)?)?,
        None => {
            let path = Path::new(PATH_DEFAULT);
            match read(path) {
                Ok(text) => parse(path, &text)?,
                Err(ConfigError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                    Written::default()
                }
                Err(error) => return Err(error),
            }
        }
    };
    check(written, overrides)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    use std::io::Read;
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
    }
    Ok(text)
}

fn parse(path: &Path, text: &str) -> Result<Written, ConfigError> {
    toml::from_str(text).map_err(|source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) })
}

fn in_range(what: &str, found: u64, from: u64, to: u64) -> Result<(), ConfigError> {
    if (from..=to).contains(&found) {
        return Ok(());
    }
    let wanted = format!("{from} to {to} are possible");
    Err(ConfigError::Range { what: what.to_owned(), found: found.to_string(), wanted })
}

/// A group of its own: the root's processes are everybody's.
fn group_path(path: String) -> Result<String, ConfigError> {
    let parts: Option<Vec<&str>> = path.strip_prefix('/').map(|rest| rest.split('/').collect());
    let is_plain = |part: &&str| !["", ".", ".."].contains(part) && !part.contains('\0');
    if parts.is_some_and(|parts| parts.iter().all(is_plain)) {
        return Ok(path);
    }
    let wanted = "a path from the mount of cgroup2 such as /hearth.slice is possible".to_owned();
    Err(ConfigError::Range { what: "cgroup.parent".to_owned(), found: format!("{path:?}"), wanted })
}

fn check_swap(swap: &SwapConfig) -> Result<(), ConfigError> {
    in_range("swap.low_free_mib", swap.low_free_mib, 0, 1 << 40)?;
    in_range("swap.target_free_mib", swap.target_free_mib, 0, 1 << 40)?;
    in_range("swap.idle_s", swap.idle_s.into(), 1, 86_400)?;
    in_range("swap.sample_s", swap.sample_s.into(), 1, 3600)?;
    for (what, percent, most) in [
        ("swap.psi_some_avg10", swap.psi_some_avg10, 100.0),
        // Of one processor: a VM may have several.
        ("swap.idle_cpu_percent", swap.idle_cpu_percent, 3200.0),
    ] {
        if !(0.0..=most).contains(&percent) {
            let wanted = format!("0 to {most} are possible");
            return Err(ConfigError::Range { what: what.to_owned(), found: percent.to_string(), wanted });
        }
    }
    Ok(())
}

fn check_volumes(written: WrittenVolumes, state_dir: &Path) -> Result<VolumesConfig, ConfigError> {
    let WrittenVolumes { directory, quota_mib, port, reconnect_s } = written;
    let (port, reconnect_s) = (port.unwrap_or(VOLUMES_PORT_DEFAULT), reconnect_s.unwrap_or(RECONNECT_S_DEFAULT));
    in_range("volumes.quota_mib", quota_mib, 0, 1 << 40)?;
    in_range("volumes.port", port.into(), 1, u16::MAX.into())?;
    in_range("volumes.reconnect_s", reconnect_s.into(), 1, 3600)?;
    let directory = directory.unwrap_or_else(|| state_dir.join("volumes"));
    if !directory.is_absolute() {
        let wanted = "an absolute path is possible".to_owned();
        let found = directory.display().to_string();
        return Err(ConfigError::Range { what: "volumes.directory".to_owned(), found, wanted });
    }
    let quota_bytes = (quota_mib > 0).then(|| quota_mib.saturating_mul(MIB));
    Ok(VolumesConfig { directory, quota_bytes, port, reconnect_s })
}

fn check(written: Written, overrides: Overrides) -> Result<Config, ConfigError> {
    let Written { host_name, state_dir, images_dir, socket, limits, uids, waits, swap, bundles, .. } = written;
    let fabric = fabric::check(written.fabric, written.peers)?;
    let defaults = Uids::default();
    let in_fabric = fabric.as_ref().map(|fabric| u16::from(fabric.host).into());
    let uids = Uids {
        base: uids.base.unwrap_or(defaults.base),
        host_number: uids.host_number.or(in_fabric).unwrap_or(defaults.host_number),
        quarantine_s: uids.quarantine_s.unwrap_or(defaults.quarantine_s),
    };
    in_range("limits.vms_max", limits.vms_max.into(), 1, UIDS_PER_HOST.into())?;
    in_range("limits.vcpus_max", limits.vcpus_max.into(), 1, VCPUS_MAX.into())?;
    in_range("limits.memory_reserve_mib", limits.memory_reserve_mib, 0, 1 << 40)?;
    in_range("limits.disk_reserve_mib", limits.disk_reserve_mib, 0, 1 << 40)?;
    in_range("limits.prefault_mib", limits.prefault_mib, 0, 1 << 20)?;
    in_range("limits.connections_max", limits.connections_max.into(), 2, 65_536)?;
    in_range("limits.events_kept", limits.events_kept.into(), 100, 10_000_000)?;
    in_range("limits.events_kept_days", limits.events_kept_days.into(), 1, 3650)?;
    in_range("limits.ledger_backups_kept", limits.ledger_backups_kept.into(), 1, 365)?;
    check_swap(&swap)?;
    in_range("the number of bundles.trusted_keys", bundles.trusted_keys.len() as u64, 0, TRUSTED_KEYS_MAX as u64)?;
    in_range("uids.base", uids.base.into(), 1000, 0x7fff_ffff)?;
    in_range("uids.host_number", uids.host_number.into(), 0, 0xffff)?;
    in_range("uids.quarantine_s", uids.quarantine_s.into(), 0, 86_400)?;
    in_range("waits.guest_ready_s", waits.guest_ready_s.into(), 1, 86_400)?;
    in_range("waits.vmm_answer_s", waits.vmm_answer_s.into(), 1, 3600)?;
    in_range("waits.vmm_launch_s", waits.vmm_launch_s.into(), 1, 3600)?;
    in_range("waits.memory_s", waits.memory_s.into(), 1, 3600)?;
    let cgroup_parent = written.cgroup.parent.map(group_path).transpose()?;
    let state_dir = overrides.state_dir.or(state_dir).unwrap_or_else(|| STATE_DIR_DEFAULT.into());
    let images_dir = overrides.images_dir.or(images_dir).unwrap_or_else(|| state_dir.join("images"));
    let socket = overrides.socket.or(socket).unwrap_or_else(|| SOCKET_DEFAULT.into());
    in_range("bundles.fetched_mib", bundles.fetched_mib, 0, 1 << 40)?;
    let WrittenBundles { trusted_keys, trust_local, fetched_mib } = bundles;
    let trust = TrustConfig { trusted_keys, trust_local };
    let volumes = check_volumes(written.volumes, &state_dir)?;
    Ok(Config {
        host_name,
        state_dir,
        images_dir,
        socket,
        limits,
        uids,
        waits,
        swap,
        trust,
        fetched_mib,
        volumes,
        fabric,
        cgroup_parent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn checked(text: &str) -> Result<Config, String> {
        let written = parse(Path::new("hearth.toml"), text).map_err(|error| crate::report::chain(&error))?;
        check(written, Overrides::default()).map_err(|error| crate::report::chain(&error))
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        let config = checked("").unwrap();
        assert_eq!(config.state_dir, Path::new(STATE_DIR_DEFAULT));
        assert_eq!(config.images_dir, Path::new("/var/lib/hearth/images"));
        assert_eq!(config.limits, Limits::default());
        assert_eq!(config.uids.first(), Uids::default().base);
    }

    #[test]
    fn unknown_keys_and_values_out_of_range_are_refused() {
        assert!(checked("stat_dir = '/x'").unwrap_err().contains("stat_dir"));
        assert!(checked("[limits]\nvms = 3").unwrap_err().contains("vms"));
        assert!(checked("[limits]\nvcpus_max = 33").unwrap_err().contains("limits.vcpus_max is 33"));
        assert!(checked("[limits]\nvcpus_max = 32").is_ok());
        assert!(checked("[uids]\nbase = 0").is_err());
    }

    #[test]
    fn a_control_group_is_a_path_of_its_own() {
        let parent = |path: &str| checked(&format!("[cgroup]\nparent = '{path}'")).map(|config| config.cgroup_parent);
        assert_eq!(parent("/hearth.slice/vms").unwrap().as_deref(), Some("/hearth.slice/vms"));
        for path in ["", "/", "hearth", "/a/../b", "/a//b", "/a/"] {
            assert!(parent(path).unwrap_err().contains("cgroup.parent"), "{path}");
        }
        assert_eq!(checked("").unwrap().cgroup_parent, None);
    }

    #[test]
    fn trusted_keys_are_keys() {
        let key = "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
        let trust = checked(&format!("[bundles]\ntrusted_keys = ['{key}']\ntrust_local = true")).unwrap().trust;
        assert_eq!((trust.trusted_keys, trust.trust_local), (vec![key.parse().unwrap()], true));
        assert_eq!(checked("").unwrap().trust, TrustConfig::default());
        for wrong in ["['rsa:AAAA']", "['ed25519:AAAA']", "'x'", "[1]"] {
            assert!(checked(&format!("[bundles]\ntrusted_keys = {wrong}")).is_err(), "{wrong}");
        }
        assert!(checked("[bundles]\ntrust = true").unwrap_err().contains("trust"));
        let many = format!("'{key}',").repeat(257);
        assert!(checked(&format!("[bundles]\ntrusted_keys = [{many}]")).unwrap_err().contains("257"));
    }

    #[test]
    fn volumes_are_in_the_state_directory_unless_said_otherwise() {
        let volumes = checked("").unwrap().volumes;
        assert_eq!((volumes.directory.as_path(), volumes.quota_bytes), (Path::new("/var/lib/hearth/volumes"), None));
        let volumes = checked("[volumes]\ndirectory = '/srv/volumes'\nquota_mib = 2\nport = 9").unwrap().volumes;
        assert_eq!((volumes.directory.as_path(), volumes.quota_bytes), (Path::new("/srv/volumes"), Some(2 << 20)));
        for wrong in ["directory = 'here'", "port = 0", "reconnect_s = 0", "quota = 1"] {
            assert!(checked(&format!("[volumes]\n{wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_line_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hearth.toml");
        crate::sys::file::replace(&path, b"state_dir = '/a'\nsocket = '/b'").unwrap();
        let overrides = Overrides { config: Some(path), state_dir: Some("/c".into()), ..Overrides::default() };
        let config = load(overrides).unwrap();
        assert_eq!((config.state_dir.as_path(), config.socket.as_path()), (Path::new("/c"), Path::new("/b")));
        let absent = Overrides { config: Some(dir.path().join("absent")), ..Overrides::default() };
        assert!(matches!(load(absent), Err(ConfigError::Read { .. })), "a file that was named has to be there");
    }
}
