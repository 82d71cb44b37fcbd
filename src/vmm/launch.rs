//! From a launch or restore request and its descriptors to a machine's specification: descriptors are counted and given
//! names here, once.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::log;
use crate::machine::layout::Slot;
use crate::machine::virtio::Backend;
use crate::machine::virtio::block::volume::Attachment;
use crate::machine::virtio::block::{VolumeError, check_volume_bytes};
use crate::machine::virtio::spec::net::MTU_MIN;
use crate::machine::{RamBacking, SealKey};
use crate::units::NetLimitError;
use crate::wire::control::{
    COMMAND_LINE_BYTES_MAX, DeviceSpec, LaunchSpec, ReceiveSpec, ReceivedMemory, RestoreFillingSpec, RestoreSpec,
    UnsealSpec,
};
use crate::wire::stream::CONNECTIONS_MAX;

/// A launch request whose parts fit together.
#[derive(Debug)]
pub(super) struct Launch {
    /// The request.
    pub(super) spec: LaunchSpec,
    /// /dev/kvm.
    pub(super) kvm: File,
    /// The kernel.
    pub(super) kernel: File,
    /// The initrd, if one is wanted.
    pub(super) initrd: Option<File>,
    /// The console file.
    pub(super) console_file: File,
    /// The console's listening socket.
    pub(super) console_listener: UnixListener,
    /// Devices by slot.
    pub(super) devices: Vec<(Slot, Backend)>,
}

/// A restore request whose parts fit together.
#[derive(Debug)]
pub(super) struct Restore {
    /// Guest memory in bytes.
    pub(super) memory_bytes: u64,
    /// /dev/kvm.
    pub(super) kvm: File,
    /// What it is made of.
    pub(super) from: SavedMachine,
    /// The console file.
    pub(super) console_file: File,
    /// The console's listening socket.
    pub(super) console_listener: UnixListener,
    /// Devices by slot.
    pub(super) devices: Vec<(Slot, Backend)>,
}

/// The files a machine is made of that was there before.
#[derive(Debug)]
pub(super) enum SavedMachine {
    /// State and memory, each in a file of its own.
    Bundle {
        /// Saved state.
        state: File,
        /// The memory image.
        memory: File,
    },
    /// The same, of a memory image that is not all here yet.
    Filling {
        /// Saved state.
        state: File,
        /// What there is of memory, and how the rest of it comes.
        memory: FillingFiles,
    },
    /// State and pages in one sealed file.
    Sealed {
        /// The file.
        file: File,
        /// Its key.
        key: SealKey,
        /// The memory image that the pages differ from; without one, from zero.
        memory: Option<File>,
    },
}

/// A memory image that is not all here yet.
#[derive(Debug)]
pub(super) struct FillingFiles {
    /// The image.
    pub(super) image: File,
    /// In chunks of this many bytes.
    pub(super) chunk_bytes: u32,
    /// /dev/userfaultfd.
    pub(super) userfaultfd: File,
    /// Where agents connect to that fill it.
    pub(super) listener: UnixListener,
}

/// Why a launch request does not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LaunchRequestError {
    /// Another number of descriptors than the request names.
    #[error("{found} descriptors came with the request, it names {wanted}")]
    Descriptors {
        /// How many came.
        found: usize,
        /// How many it names.
        wanted: usize,
    },
    /// A device of this index does not exist.
    #[error("there is no {kind} device of index {index}")]
    DeviceIndex {
        /// Kind of device.
        kind: &'static str,
        /// The index.
        index: u8,
    },
    /// Two devices want one slot.
    #[error("two devices for slot {slot}")]
    SlotTwice {
        /// The slot's number.
        slot: u8,
    },
    /// No network has such a small MTU.
    #[error("net device {index}: MTU {found}, the least is {MTU_MIN}")]
    Mtu {
        /// The index.
        index: u8,
        /// What was asked for.
        found: u16,
    },
    /// Nobody can mean such a limit.
    #[error(transparent)]
    Limits(NetLimitError),
    /// No volume is like that.
    #[error(transparent)]
    Volume(VolumeError),
    /// No stream has so many connections.
    #[error("{found} connections: 1 to {CONNECTIONS_MAX} are possible")]
    Connections {
        /// How many were asked for.
        found: u8,
    },
    /// The command line is too long.
    #[error("the kernel command line has {found} bytes, at most {COMMAND_LINE_BYTES_MAX} are possible")]
    CommandLine {
        /// Its length in bytes.
        found: usize,
    },
}

/// /dev/kvm, the kernel, the console file and its socket.
const ALWAYS: usize = 4;

/// /dev/kvm, state, memory, the console file and its socket.
const ALWAYS_RESTORED: usize = 5;

/// /dev/userfaultfd and the filling listener.
const WANTED_TO_FILL: usize = 2;

/// /dev/kvm, the sealed file, the console file and its socket.
const ALWAYS_UNSEALED: usize = 4;

/// Descriptors that are yet to get their names.
struct Unnamed {
    rest: std::vec::IntoIter<OwnedFd>,
    error: LaunchRequestError,
}

impl Unnamed {
    /// Exactly `wanted` descriptors.
    fn new(descriptors: Vec<OwnedFd>, wanted: usize) -> Result<Self, LaunchRequestError> {
        let found = descriptors.len();
        let error = || LaunchRequestError::Descriptors { found, wanted };
        if found != wanted {
            return Err(error());
        }
        Ok(Self { rest: descriptors.into_iter(), error: error() })
    }

    fn next<T: From<OwnedFd>>(&mut self) -> Result<T, LaunchRequestError> {
        self.rest.next().map(T::from).ok_or_else(|| self.error.clone())
    }

    /// Gives each device its descriptor and its slot.
    fn devices(&mut self, specs: &[DeviceSpec]) -> Result<Vec<(Slot, Backend)>, LaunchRequestError> {
        let mut devices: Vec<(Slot, Backend)> = Vec::with_capacity(specs.len());
        for device in specs {
            let (slot, backend) = self.device(*device)?;
            if devices.iter().any(|(taken, _)| *taken == slot) {
                return Err(LaunchRequestError::SlotTwice { slot: slot.number() });
            }
            devices.push((slot, backend));
        }
        Ok(devices)
    }

    fn device(&mut self, device: DeviceSpec) -> Result<(Slot, Backend), LaunchRequestError> {
        Ok(match device {
            DeviceSpec::Vsock => (Slot::VSOCK, Backend::Vsock { listener: self.next()? }),
            DeviceSpec::Rng => (Slot::RNG, Backend::Rng),
            DeviceSpec::Balloon => (Slot::BALLOON, Backend::Balloon),
            DeviceSpec::Block { index, read_only } => {
                let slot = Slot::block(index).ok_or(LaunchRequestError::DeviceIndex { kind: "block", index })?;
                (slot, Backend::Block { file: self.next()?, read_only, ring: None })
            }
            DeviceSpec::Volume { index, bytes, read_only, reconnect_ms } => {
                let slot = Slot::block(index).ok_or(LaunchRequestError::DeviceIndex { kind: "volume", index })?;
                if bytes != 0 {
                    check_volume_bytes(bytes).map_err(LaunchRequestError::Volume)?;
                }
                let reconnect = Duration::from_millis(reconnect_ms.into());
                let attached = (bytes != 0).then_some(Attachment { bytes, read_only, reconnect });
                (slot, Backend::Volume { listener: self.next()?, attached, read_only, tell: log::say })
            }
            DeviceSpec::Net { index, mac, mtu, limits } => {
                let slot = Slot::net(index).ok_or(LaunchRequestError::DeviceIndex { kind: "net", index })?;
                if let Some(found) = mtu.filter(|mtu| *mtu < MTU_MIN) {
                    return Err(LaunchRequestError::Mtu { index, found });
                }
                limits.check().map_err(LaunchRequestError::Limits)?;
                (slot, Backend::Net { tap: self.next()?, mac, mtu, limits })
            }
        })
    }
}

/// /dev/kvm, the console file and its socket.
const ALWAYS_RECEIVED: usize = 3;

/// What a machine on its way here gets, whose parts fit together.
#[derive(Debug)]
pub(super) struct Arrival {
    /// /dev/kvm.
    pub(super) kvm: File,
    /// What its memory is made of.
    pub(super) memory: RamBacking,
    /// The console file.
    pub(super) console_file: File,
    /// The console's listening socket.
    pub(super) console_listener: UnixListener,
    /// Devices by slot.
    pub(super) devices: Vec<(Slot, Backend)>,
    /// One connected socket for each connection.
    pub(super) sockets: Vec<OwnedFd>,
}

impl Arrival {
    /// Gives each descriptor its name.
    pub(super) fn new(spec: &ReceiveSpec, descriptors: Vec<OwnedFd>) -> Result<Self, LaunchRequestError> {
        if !(1..=CONNECTIONS_MAX).contains(&spec.connections) {
            return Err(LaunchRequestError::Connections { found: spec.connections });
        }
        let memory = usize::from(spec.memory != ReceivedMemory::New);
        let wanted = ALWAYS_RECEIVED + memory + wanted_by(&spec.devices) + usize::from(spec.connections);
        let mut unnamed = Unnamed::new(descriptors, wanted)?;
        Ok(Self {
            kvm: unnamed.next()?,
            memory: match spec.memory {
                ReceivedMemory::New => RamBacking::SharedMemfd,
                ReceivedMemory::Image => RamBacking::PrivateFile(unnamed.next()?),
                ReceivedMemory::Shared => RamBacking::SharedFile(unnamed.next()?),
            },
            console_file: unnamed.next()?,
            console_listener: unnamed.next()?,
            devices: unnamed.devices(&spec.devices)?,
            sockets: unnamed.rest.collect(),
        })
    }
}

fn wanted_by(devices: &[DeviceSpec]) -> usize {
    devices.iter().filter(|device| device.wants_descriptor()).count()
}

impl Launch {
    /// Gives each descriptor its name.
    pub(super) fn new(spec: LaunchSpec, descriptors: Vec<OwnedFd>) -> Result<Self, LaunchRequestError> {
        if spec.command_line.len() > COMMAND_LINE_BYTES_MAX {
            return Err(LaunchRequestError::CommandLine { found: spec.command_line.len() });
        }
        let wanted = ALWAYS + usize::from(spec.initrd) + wanted_by(&spec.devices);
        let mut unnamed = Unnamed::new(descriptors, wanted)?;
        Ok(Self {
            kvm: unnamed.next()?,
            kernel: unnamed.next()?,
            initrd: if spec.initrd { Some(unnamed.next()?) } else { None },
            console_file: unnamed.next()?,
            console_listener: unnamed.next()?,
            devices: unnamed.devices(&spec.devices)?,
            spec,
        })
    }
}

impl Restore {
    /// Gives each descriptor its name.
    pub(super) fn new(spec: &RestoreSpec, descriptors: Vec<OwnedFd>) -> Result<Self, LaunchRequestError> {
        let mut unnamed = Unnamed::new(descriptors, ALWAYS_RESTORED + wanted_by(&spec.devices))?;
        Ok(Self {
            memory_bytes: spec.memory_bytes,
            kvm: unnamed.next()?,
            from: SavedMachine::Bundle { state: unnamed.next()?, memory: unnamed.next()? },
            console_file: unnamed.next()?,
            console_listener: unnamed.next()?,
            devices: unnamed.devices(&spec.devices)?,
        })
    }

    /// The same for a machine whose memory is not all here.
    pub(super) fn filling(spec: &RestoreFillingSpec, descriptors: Vec<OwnedFd>) -> Result<Self, LaunchRequestError> {
        let RestoreFillingSpec { restore: spec, chunk_bytes } = spec;
        let mut unnamed = Unnamed::new(descriptors, ALWAYS_RESTORED + wanted_by(&spec.devices) + WANTED_TO_FILL)?;
        let (kvm, state, image) = (unnamed.next()?, unnamed.next()?, unnamed.next()?);
        let (console_file, console_listener) = (unnamed.next()?, unnamed.next()?);
        let devices = unnamed.devices(&spec.devices)?;
        let (userfaultfd, listener) = (unnamed.next()?, unnamed.next()?);
        let memory = FillingFiles { image, chunk_bytes: *chunk_bytes, userfaultfd, listener };
        let from = SavedMachine::Filling { state, memory };
        Ok(Self { memory_bytes: spec.memory_bytes, kvm, from, console_file, console_listener, devices })
    }

    /// The same for a sealed machine.
    pub(super) fn sealed(spec: &UnsealSpec, descriptors: Vec<OwnedFd>) -> Result<Self, LaunchRequestError> {
        let wanted = ALWAYS_UNSEALED + usize::from(spec.image) + wanted_by(&spec.devices);
        let mut unnamed = Unnamed::new(descriptors, wanted)?;
        let kvm = unnamed.next()?;
        let file = unnamed.next()?;
        let memory = if spec.image { Some(unnamed.next()?) } else { None };
        Ok(Self {
            memory_bytes: spec.memory_bytes,
            kvm,
            from: SavedMachine::Sealed { file, key: SealKey(spec.key.0), memory },
            console_file: unnamed.next()?,
            console_listener: unnamed.next()?,
            devices: unnamed.devices(&spec.devices)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{FlowLimits, NetLimits, Rate};
    use crate::wire::control::SealingKey;

    fn spec(devices: Vec<DeviceSpec>) -> LaunchSpec {
        LaunchSpec { vcpus: 1, memory_bytes: 128 << 20, command_line: String::new(), initrd: true, devices }
    }

    fn files(count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| OwnedFd::from(tempfile::tempfile().unwrap())).collect()
    }

    #[test]
    fn descriptors_are_counted() {
        let devices = vec![DeviceSpec::Rng, DeviceSpec::Block { index: 0, read_only: false }];
        assert!(Launch::new(spec(devices.clone()), files(6)).is_ok());
        for count in [0, 5, 7] {
            let refused = Launch::new(spec(devices.clone()), files(count)).unwrap_err();
            assert_eq!(refused, LaunchRequestError::Descriptors { found: count, wanted: 6 });
        }
    }

    #[test]
    fn a_restore_counts_its_descriptors_too() {
        let devices = vec![DeviceSpec::Rng, DeviceSpec::Block { index: 0, read_only: false }];
        let spec = RestoreSpec { memory_bytes: 128 << 20, devices };
        assert_eq!(Restore::new(&spec, files(6)).unwrap().devices.len(), 2);
        for count in [0, 5, 7] {
            let refused = Restore::new(&spec, files(count)).unwrap_err();
            assert_eq!(refused, LaunchRequestError::Descriptors { found: count, wanted: 6 });
        }
    }

    #[test]
    fn a_restore_that_is_filled_wants_two_more() {
        let devices = vec![DeviceSpec::Rng, DeviceSpec::Block { index: 0, read_only: false }];
        let spec =
            RestoreFillingSpec { restore: RestoreSpec { memory_bytes: 128 << 20, devices }, chunk_bytes: 65_536 };
        let restore = Restore::filling(&spec, files(8)).unwrap();
        assert_eq!(restore.devices.len(), 1 + 1);
        assert!(matches!(restore.from, SavedMachine::Filling { memory, .. } if memory.chunk_bytes == 65_536));
        for count in [0, 6, 7, 9] {
            let refused = Restore::filling(&spec, files(count)).unwrap_err();
            assert_eq!(refused, LaunchRequestError::Descriptors { found: count, wanted: 8 });
        }
    }

    #[test]
    fn a_sealed_machine_may_come_with_an_image() {
        let key = SealingKey([1; 32]);
        for (image, wanted) in [(true, 5), (false, 4)] {
            let spec = UnsealSpec { memory_bytes: 128 << 20, devices: vec![DeviceSpec::Rng], key, image };
            let restore = Restore::sealed(&spec, files(wanted)).unwrap();
            assert!(matches!(restore.from, SavedMachine::Sealed { memory, .. } if memory.is_some() == image));
            let refused = Restore::sealed(&spec, files(wanted + 1)).unwrap_err();
            assert_eq!(refused, LaunchRequestError::Descriptors { found: wanted + 1, wanted });
        }
    }

    #[test]
    fn impossible_devices_are_refused() {
        let beyond = Launch::new(spec(vec![DeviceSpec::Block { index: 6, read_only: true }]), files(6)).unwrap_err();
        assert_eq!(beyond, LaunchRequestError::DeviceIndex { kind: "block", index: 6 });
        let twice = Launch::new(spec(vec![DeviceSpec::Rng, DeviceSpec::Rng]), files(5)).unwrap_err();
        assert_eq!(twice, LaunchRequestError::SlotTwice { slot: 1 });
        let volume = |index, bytes| DeviceSpec::Volume { index, bytes, read_only: false, reconnect_ms: 1000 };
        assert!(Launch::new(spec(vec![volume(0, 0), volume(5, 4096)]), files(7)).is_ok());
        let taken = DeviceSpec::Block { index: 5, read_only: true };
        let twice = Launch::new(spec(vec![volume(5, 0), taken]), files(7)).unwrap_err();
        assert_eq!(twice, LaunchRequestError::SlotTwice { slot: 8 });
        let beyond = Launch::new(spec(vec![volume(6, 0)]), files(6)).unwrap_err();
        assert_eq!(beyond, LaunchRequestError::DeviceIndex { kind: "volume", index: 6 });
        for bytes in [1, 512, 4097, u64::MAX - 4095] {
            let odd = Launch::new(spec(vec![volume(0, bytes)]), files(6)).unwrap_err();
            assert_eq!(odd, LaunchRequestError::Volume(VolumeError::Bytes { found: bytes }));
        }
        let net = |index, mtu, limits| DeviceSpec::Net { index, mac: [2; 6], mtu, limits };
        let open = NetLimits::default();
        assert!(Launch::new(spec((0..8).map(|index| net(index, Some(1280), open)).collect()), files(13)).is_ok());
        let beyond = Launch::new(spec(vec![net(8, None, open)]), files(6)).unwrap_err();
        assert_eq!(beyond, LaunchRequestError::DeviceIndex { kind: "net", index: 8 });
        let small = Launch::new(spec(vec![net(0, Some(67), open)]), files(6)).unwrap_err();
        assert_eq!(small, LaunchRequestError::Mtu { index: 0, found: 67 });
        let never = FlowLimits { bytes: Some(Rate { per_s: 0, burst: 2_000 }), frames: None };
        let never = NetLimits { tx: never, ..open };
        assert!(matches!(Launch::new(spec(vec![net(0, None, never)]), files(6)), Err(LaunchRequestError::Limits(_))));
        let mut long = spec(vec![]);
        long.command_line = "x".repeat(COMMAND_LINE_BYTES_MAX + 1);
        assert!(matches!(Launch::new(long, files(5)), Err(LaunchRequestError::CommandLine { .. })));
    }
}
