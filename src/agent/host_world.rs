//! The real world: this host. Made at start-up, in this order: directories, lock, ledger, then the rest.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::bundles::BundleError;
use super::cgroup::HostCgroups;
use super::config::{self, Config, FabricConfig};
use super::held_taps::HeldTaps;
use super::host_bundles::HostBundles;
use super::host_disk::{HostDisk, VmDirs};
use super::host_network::HostNetworks;
use super::host_probe::HostProbe;
use super::host_vmm::HostVmm;
use super::host_volumes::HostVolumes;
use super::images::ImageStore;
use super::ledger::LedgerError;
use super::ledger::writer::LedgerThread;
use super::world::World;
use crate::clock::{Clock, SystemClock, Uptime};
use crate::net::desired::{Host, Peer, Underlay};
use crate::net::host::{NetworkSpec, OpenNetworkError};
use crate::sys::{file, host};
use crate::units::MIB;
use crate::wire::volumed::StartMessage;

/// This host.
#[derive(Debug)]
pub struct HostWorld {
    clock: SystemClock,
    /// When the clock began.
    uptime: Uptime,
    vmm: HostVmm,
    disk: HostDisk,
    networks: HostNetworks,
    bundles: HostBundles,
    volumes: HostVolumes,
    records: LedgerThread,
    /// The state directory and this host's number: held as long as this agent lives.
    _locks: [file::Lock; 2],
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
    #[error("lock {}", path.display())]
    Lock {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Another agent has the state directory.
    #[error(
        "another agent uses the state directory {}; stop it, or give this one its own with --state-dir",
        path.display()
    )]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// Another agent has this host's number, and would take this one's jails for what is left of its own.
    #[error(
        "another agent of this machine has host number {number} ({} is locked): stop it, or give this one another \
         host_number in [fabric] or [uids]",
        path.display()
    )]
    NumberInUse {
        /// The number.
        number: u16,
        /// What is locked.
        path: PathBuf,
    },
    /// How long the host has been up could not be read.
    #[error("read how long this host has been up; /proc has to be mounted")]
    Uptime {
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The ledger could not be opened.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The bundles could not be opened.
    #[error("open the bundles of this host")]
    Bundles(#[from] BundleError),
    /// The network could not be opened.
    #[error("open this host's network")]
    Network(#[from] OpenNetworkError),
    /// This host has no address towards a peer, which VXLAN needs.
    #[error("find the address that peer {peer} ({address}) is reached from; give this host one, or a route there")]
    Underlay {
        /// The peer.
        peer: String,
        /// Where it is.
        address: IpAddr,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Where numbers of hosts are locked: beside the named namespaces, which begin with them.
const NUMBERS: &str = "/run/hearth";

/// How long a lock may still be held for an agent that is dead: a process that it had just started shares its
/// descriptors until it executes its program, which no event tells of.
const LAST_HOLD_LIMIT: Duration = Duration::from_secs(2);

/// Time between two tries to lock.
const LOCK_AGAIN: Duration = Duration::from_millis(20);

fn lock_soon(path: &Path) -> io::Result<Option<file::Lock>> {
    let tries = LAST_HOLD_LIMIT.as_millis() / LOCK_AGAIN.as_millis();
    for _ in 0..tries {
        if let Some(lock) = file::try_lock(path)? {
            return Ok(Some(lock));
        }
        std::thread::sleep(LOCK_AGAIN);
    }
    file::try_lock(path)
}

fn lock_number(number: u16) -> Result<file::Lock, OpenHostError> {
    let directory = PathBuf::from(NUMBERS);
    let path = directory.join(format!("host-{number}.lock"));
    // Not for the owner alone: the API's socket is there as well by default.
    std::fs::create_dir_all(&directory).map_err(|source| OpenHostError::Directory { path: directory, source })?;
    match lock_soon(&path) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(OpenHostError::NumberInUse { number, path }),
        Err(source) => Err(OpenHostError::Lock { path, source }),
    }
}

/// What the configuration makes of this host's network, and how many jails are made ahead.
fn network_spec(config: &Config) -> Result<(NetworkSpec, usize), OpenHostError> {
    let host = config.fabric.as_ref().map(fabric_host).transpose()?;
    let pool = config.fabric.as_ref().map_or(0, |fabric| usize::try_from(fabric.pool).unwrap_or(0));
    Ok((NetworkSpec { number: config.network_number(), host, mtu: config.mtu().into() }, pool))
}

fn fabric_host(fabric: &FabricConfig) -> Result<Host, OpenHostError> {
    let underlay = match (fabric.underlay, fabric.peers.first()) {
        (config::Underlay::Vxlan { id, port }, Some(peer)) => {
            let local = address_towards(peer.address).map_err(|source| OpenHostError::Underlay {
                peer: peer.name.clone(),
                address: peer.address,
                source,
            })?;
            Underlay::Vxlan { id, port, local }
        }
        // Nobody to carry packets to.
        (config::Underlay::Vxlan { .. }, None) | (config::Underlay::Routed, _) => Underlay::Routed,
    };
    let peers = fabric.peers.iter().map(|peer| Peer { number: peer.host, address: peer.address }).collect();
    Ok(Host { fabric: fabric.fabric, number: fabric.host, peers, underlay, mtu: fabric.mtu.into() })
}

/// The address of this host that the kernel takes for packets to another. Nothing is sent.
fn address_towards(other: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if other.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    // The discard port (RFC 863): a route is looked up, no packet is made.
    socket.connect((other, 9))?;
    Ok(socket.local_addr()?.ip())
}

impl HostWorld {
    /// Takes the state directory and opens what is in it. Call inside the runtime.
    pub fn open(config: &Config) -> Result<Self, OpenHostError> {
        let vms = config.state_dir.join("vms");
        for path in [&config.state_dir, &vms] {
            file::make_directories(path).map_err(|source| OpenHostError::Directory { path: path.clone(), source })?;
        }
        let path = config.state_dir.clone();
        let lock = match lock_soon(&path.join("lock")) {
            Ok(Some(lock)) => lock,
            Ok(None) => return Err(OpenHostError::InUse { path }),
            Err(source) => return Err(OpenHostError::Lock { path, source }),
        };
        let number_lock = lock_number(config.network_number())?;
        let records = LedgerThread::start(&path.join("ledger.db"))?;
        let dirs = VmDirs::new(vms);
        let images = ImageStore::new(config.images_dir.clone(), config.limits.disk_reserve_mib.saturating_mul(MIB));
        images.remove_left_over();
        let networks = network_spec(config).and_then(|(spec, pool)| Ok(HostNetworks::open(spec, pool)?))?;
        let probe = HostProbe::start();
        let host = (config.host_name.clone(), config.mtu());
        let bundles = path.join("bundles");
        let bundles = HostBundles::open(bundles, dirs.clone(), images.clone(), host, probe.clone())?;
        let cgroups = HostCgroups::open(config.cgroup_parent.as_deref(), config.network_number());
        let vmm = HostVmm {
            dirs: dirs.clone(),
            images: images.clone(),
            bundles: bundles.store().clone(),
            waits: config.waits,
            host_number: config.network_number(),
            mtu: config.mtu(),
            listens_at: config.fabric.as_ref().and_then(|fabric| fabric.listen).map(|at| at.ip()),
            reconnect_s: config.volumes.reconnect_s,
            held: HeldTaps::default(),
            cgroups: cgroups.clone(),
        };
        vmm.sweep_groups();
        let volumes = StartMessage {
            store: config.volumes.directory.clone(),
            runtime: path.join("volumed"),
            quota_bytes: config.volumes.quota_bytes,
            reserve_bytes: config.limits.disk_reserve_mib.saturating_mul(MIB),
            record: None,
        };
        let listens_at = vmm.listens_at.map(|address| (address, config.volumes.port));
        let volumes = HostVolumes::new(volumes, dirs.clone(), listens_at);
        let disk = HostDisk::new(dirs, images, config.host_name.clone(), probe, cgroups);
        let (clock, uptime) = (SystemClock::new(), host::uptime().map_err(|source| OpenHostError::Uptime { source })?);
        Ok(Self { clock, uptime, vmm, disk, networks, bundles, volumes, records, _locks: [lock, number_lock] })
    }
}

impl World for HostWorld {
    type Clock = SystemClock;
    type Vmm = HostVmm;
    type Disk = HostDisk;
    type Networks = HostNetworks;
    type Bundles = HostBundles;
    type Volumes = HostVolumes;
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

    fn networks(&self) -> &HostNetworks {
        &self.networks
    }

    fn bundles(&self) -> &HostBundles {
        &self.bundles
    }

    fn volumes(&self) -> &HostVolumes {
        &self.volumes
    }

    fn records(&self) -> &LedgerThread {
        &self.records
    }

    fn random(&self, bytes: &mut [u8]) -> io::Result<()> {
        getrandom::fill(bytes).map_err(|error| io::Error::other(error.to_string()))
    }

    fn uptime(&self) -> Uptime {
        let Uptime { boot, since_boot } = self.uptime;
        Uptime { boot, since_boot: since_boot.saturating_add(Duration::from_nanos(self.clock.monotonic().0)) }
    }
}
