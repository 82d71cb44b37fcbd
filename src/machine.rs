//! Floor 2: one virtual machine, in the process that runs it. The only door to this floor is [`Machine`]: built from a
//! kernel or from saved sections, then resumed, paused, saved and stopped. See `ARCHITECTURE.md`.
//!
//! Every resource comes as an open file: no path, no name, no route is opened here. Nothing is logged: what a guest does
//! shows in [`MachineEvents`] and [`CountersSnapshot`]. The owner calls from one thread; vCPUs and devices have their
//! own. It does not know why it is paused.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub mod boot;
pub mod build;
pub mod bus;
pub mod counters;
pub mod cpuid;
pub mod device;
pub mod dirty;
pub mod event_port;
pub mod events;
pub mod exit;
pub mod filling;
pub mod i8042;
pub mod image;
pub mod layout;
mod packets;
pub mod pages;
pub mod pre_copy;
pub mod probe;
pub mod ram;
pub mod sealed;
pub mod serial;
pub mod shape;
pub mod state;
pub mod time;
mod vcpu;
mod vcpu_saved;
pub mod virtio;
mod vm_saved;

pub use boot::{BootError, Entry, KernelImageError};
pub use build::{BuildError, MachineSpec, RestoreSpec};
pub use counters::CountersSnapshot;
pub use dirty::{BeginWith, DirtyConsumer, DirtySet, Harvester, PageRun};
pub use events::{MachineEvent, MachineEvents, RebootRequest};
pub use exit::{InternalError, VcpuFailure};
pub use filling::{FillingRam, Presence};
pub use packets::PacketDoor;
pub use ram::{GuestRam, MappedRegion, RamBacking};
pub use sealed::{SealKey, Sealed};
pub use serial::ConsoleSink;
pub use shape::Shape;
pub use state::{MachineState, Verb, WrongState};
pub use time::GuestTime;
pub use vcpu::AskVcpuError;
pub use vcpu_saved::RestoreVcpuError;
pub use vm_saved::RestoreVmError;

use crate::clock::Monotonic;
use crate::report::Retry;
use crate::saved::{DuplicateSection, SaveSectionError, Section, Sections};
use crate::sys::kvm::{CallError, Capabilities, Vm};
use crate::units::PageCount;
use counters::Counters;
use device::Device as _;
use layout::Slot;
use serial::SerialPort;
use time::{ClockOverflow, Stopped};
use vcpu::{PausedTsc, RunClock, SharedClock, Surroundings, VcpuThread};
use vcpu_saved::MsrIndices;
use virtio::block::VolumeError;
use virtio::block::volume::{Attachment, VolumeCounts, VolumeLimits};
use virtio::{BalloonCounts, DeviceLoop, NetCounts};
use vm_saved::ClockReading;

/// When the parts of a machine's making were done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phases {
    /// Building began.
    pub started: Monotonic,
    /// Guest memory was mapped.
    pub memory_ready: Monotonic,
    /// Kernel, initrd and boot structures were in guest memory; not for a restored machine.
    pub kernel_loaded: Option<Monotonic>,
    /// The machine could be resumed.
    pub built: Monotonic,
    /// vCPU 0 entered guest mode for the first time.
    pub first_entry: Option<Monotonic>,
}

/// The clocks of the moment a guest stopped, here or where it was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct StoodStill {
    clock: ClockReading,
    // Of vCPU 0; all get the same when the guest goes on.
    tsc: PausedTsc,
}

impl StoodStill {
    fn stopped(self) -> Stopped {
        Stopped {
            kvmclock_ns: self.clock.kvmclock_ns,
            realtime_ns: self.clock.realtime_ns,
            guest_tsc: self.clock.host_tsc.wrapping_add(self.tsc.offset),
            tsc_khz: self.tsc.khz,
        }
    }
}

/// A virtual machine. Dropping it stops it.
#[derive(Debug)]
pub struct Machine {
    // Fixed configuration.
    shape: Shape,
    capabilities: Capabilities,
    msrs: MsrIndices,
    phases: Phases,
    // Where it is in its life; with the clocks of the moment it last stopped.
    state: MachineState,
    stopped: Option<StoodStill>,
    // Made from saved sections and not resumed since.
    restored: bool,
    // Runtime glue. vCPU threads go first: they use everything below.
    vcpus: Vec<VcpuThread>,
    device_loop: Option<DeviceLoop>,
    serial: Arc<Mutex<SerialPort>>,
    around: Arc<Surroundings>,
    events: MachineEvents,
    counters: Arc<Counters>,
    dirty: Harvester,
    clock: SharedClock,
    vm: Arc<Vm>,
}

/// Why a machine could not be resumed.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// Not in this state.
    #[error("resume")]
    State(#[source] WrongState),
    /// The guest's clocks cannot hold the time that passed.
    #[error("adjust the guest's clocks")]
    Clock(#[source] ClockOverflow),
    /// A KVM call failed.
    #[error("set the guest's clock")]
    Call(#[source] CallError),
    /// A vCPU did not start.
    #[error("resume")]
    Vcpu(#[source] AskVcpuError),
}

/// Why a machine could not be paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// Not in this state.
    #[error("pause")]
    State(#[source] WrongState),
    /// A vCPU did not stop.
    #[error("pause")]
    Vcpu(#[source] AskVcpuError),
    /// The clocks could not be read.
    #[error("read the guest's clocks")]
    Call(#[source] CallError),
}

/// Why a machine could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Not in this state.
    #[error("save")]
    State(#[source] WrongState),
    /// A vCPU did not give its state.
    #[error("save")]
    Vcpu(#[source] AskVcpuError),
    /// The VM did not give its state.
    #[error("save the state of the virtual machine")]
    Call(#[source] CallError),
    /// State does not fit a section.
    #[error("save")]
    Section(#[source] SaveSectionError),
    /// Two devices gave one section.
    #[error("save")]
    Duplicate(#[source] DuplicateSection),
}

/// What becomes of a volume slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeChange {
    /// It gets a volume; it has none.
    Attach(Attachment),
    /// It has no volume any more.
    Detach {
        /// Also with requests under way, which fail.
        force: bool,
    },
    /// Its volume has become larger.
    Resize {
        /// The new size.
        bytes: u64,
    },
    /// What the guest may do with it is bounded.
    Limit(VolumeLimits),
}

/// Why an interface did not get another tap; it has the old one.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceTapError {
    /// The machine has no such interface.
    #[error("there is no network interface {index}")]
    NoInterface {
        /// The index.
        index: u8,
    },
    /// What came is no tap, or the host refused it.
    #[error("use another tap for interface {index}")]
    Host {
        /// The index.
        index: u8,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ReplaceTapError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoInterface { .. } | Self::Host { .. } => Retry::WithChange,
        }
    }
}

impl ResumeError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::State(_) => Retry::WithChange,
            Self::Clock(_) | Self::Call(_) | Self::Vcpu(_) => Retry::Never,
        }
    }
}

impl PauseError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::State(_) => Retry::WithChange,
            Self::Vcpu(_) | Self::Call(_) => Retry::Never,
        }
    }
}

impl SaveError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::State(_) => Retry::WithChange,
            Self::Vcpu(_) | Self::Call(_) | Self::Section(_) | Self::Duplicate(_) => Retry::Never,
        }
    }
}

impl Machine {
    /// Builds a machine that will boot a kernel. `kvm` is an open `/dev/kvm`.
    pub fn build(kvm: File, spec: MachineSpec) -> Result<Self, BuildError> {
        build::from_kernel(kvm, spec)
    }

    /// Builds a paused machine from saved sections. Every section must be used, and every part must find its section.
    pub fn restore(kvm: File, spec: RestoreSpec, sections: Sections) -> Result<Self, BuildError> {
        build::from_sections(kvm, spec, sections)
    }

    /// Lets the guest run; its clocks go on from where they stopped.
    pub fn resume(&mut self) -> Result<(), ResumeError> {
        self.resume_with(GuestTime::Stands)
    }

    /// Lets the guest run, with or without the time that passed since it stopped. On failure it stands still as before.
    pub fn resume_with(&mut self, time: GuestTime) -> Result<(), ResumeError> {
        let next = self.allowed(Verb::Resume).map_err(ResumeError::State)?;
        let clock = self.adjust_clocks(time)?;
        self.resume_devices();
        let begun = VcpuThread::all(&self.vcpus, |vcpu| vcpu.begin_run(clock), VcpuThread::wait_running);
        if let Err(error) = begun {
            // Those that began stand still again; a second failure would only hide the first.
            let _ = VcpuThread::all(&self.vcpus, VcpuThread::begin_pause, VcpuThread::wait_paused);
            self.pause_devices();
            return Err(ResumeError::Vcpu(error));
        }
        self.state = next;
        self.stopped = None;
        self.restored = false;
        Ok(())
    }

    /// Sets kvmclock and says what becomes of the TSC. A machine that never ran keeps the clocks it was made with. A host
    /// whose KVM does not tell its TSC keeps the offset.
    fn adjust_clocks(&self, time: GuestTime) -> Result<RunClock, ResumeError> {
        let restored = self.restored;
        let Some(stood) = self.stopped else { return Ok(RunClock { tsc_offset: None, restored }) };
        let read = || vm_saved::read_clock(&self.vm, &*self.clock.0).map_err(ResumeError::Call);
        let mut now = read()?;
        if now.host_tsc == 0 && stood.clock.host_tsc != 0 {
            // KVM finds out whether it can tell the host's TSC when a vCPU runs or a clock is set: in a VM that was
            // restored neither has happened. Without it the offset of another host would be kept.
            vm_saved::set_clock(&self.vm, stood.clock.kvmclock_ns).map_err(ResumeError::Call)?;
            now = read()?;
        }
        let adjusted = time::adjust(stood.stopped(), now.host(), time).map_err(ResumeError::Clock)?;
        vm_saved::set_clock(&self.vm, adjusted.kvmclock_ns).map_err(ResumeError::Call)?;
        let told = now.host_tsc != 0 && stood.clock.host_tsc != 0;
        Ok(RunClock { tsc_offset: told.then_some(adjusted.tsc_offset), restored })
    }

    /// Makes the guest stand still: all vCPUs leave guest mode, then devices stop.
    pub fn pause(&mut self) -> Result<(), PauseError> {
        let next = self.allowed(Verb::Pause).map_err(PauseError::State)?;
        let tscs = VcpuThread::all(&self.vcpus, VcpuThread::begin_pause, VcpuThread::wait_paused);
        let tscs = tscs.map_err(PauseError::Vcpu)?;
        self.pause_devices();
        // True from here on, even if the clocks cannot be read.
        self.state = next;
        let clock = vm_saved::read_clock(&self.vm, &*self.clock.0).map_err(PauseError::Call)?;
        self.stopped = tscs.first().map(|tsc| StoodStill { clock, tsc: *tsc });
        Ok(())
    }

    fn resume_devices(&self) {
        self.serial().resume();
        if let Some(devices) = &self.device_loop {
            devices.resume();
        }
    }

    fn pause_devices(&self) {
        self.serial().pause();
        if let Some(devices) = &self.device_loop {
            devices.pause();
        }
    }

    fn serial(&self) -> MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of everything but guest memory; only while paused. Saving twice gives the same.
    pub fn save(&self) -> Result<Sections, SaveError> {
        self.allowed(Verb::Save).map_err(SaveError::State)?;
        let mut sections = Sections::new();
        let mut push = |section: Result<Section, SaveSectionError>| {
            sections.push(section.map_err(SaveError::Section)?).map_err(SaveError::Duplicate)
        };
        push(Section::new(0, &self.shape.saved()))?;
        let clock = self.stopped.map_or(ClockReading::default(), |stood| stood.clock);
        push(Section::new(0, &vm_saved::save(&self.vm, clock).map_err(SaveError::Call)?))?;
        for (vcpu, index) in self.vcpus.iter().zip(0_u16..) {
            push(Section::new(index, &vcpu.save(&self.msrs).map_err(SaveError::Vcpu)?))?;
        }
        let mut devices = self.serial().save().map_err(SaveError::Section)?;
        if let Some(device_loop) = &self.device_loop {
            devices.extend(device_loop.save().map_err(SaveError::Section)?);
        }
        devices.into_iter().try_for_each(|section| push(Ok(section)))?;
        Ok(sections)
    }

    /// Ends the machine: vCPU threads, then the device thread.
    pub fn stop(mut self) {
        self.halt();
    }

    fn halt(&mut self) {
        if let Some(next) = self.state.after(Verb::Stop) {
            self.state = next;
            self.vcpus.clear();
            if let Some(devices) = self.device_loop.take() {
                devices.stop();
            }
        }
    }

    fn allowed(&self, verb: Verb) -> Result<MachineState, WrongState> {
        self.state.after(verb).ok_or(WrongState { state: self.state, verb })
    }

    /// Where the machine is in its life.
    pub fn state(&self) -> MachineState {
        self.state
    }

    /// vCPUs, memory and slots.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// What the guest told and what ended its run. Pollable.
    pub fn events(&self) -> &MachineEvents {
        &self.events
    }

    /// Hands input to the guest's console; returns how many bytes were taken.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.serial().input(bytes)
    }

    /// When the parts of its making were done.
    pub fn phases(&self) -> Phases {
        Phases { first_entry: self.around.first_entry.get().copied(), ..self.phases }
    }

    /// What the guest did that nobody asked for, as numbers.
    pub fn counters(&self) -> CountersSnapshot {
        self.counters.snapshot()
    }

    /// What passed the network interfaces, each with its index.
    pub fn network(&self) -> Vec<(u8, NetCounts)> {
        let slots = self.device_loop.as_ref().map_or(&[][..], DeviceLoop::slots);
        slots.iter().filter_map(|slot| Some((slot.slot().net_index()?, slot.net_counts()?))).collect()
    }

    /// What the balloon holds, with another target if one is given. `None`: the machine has none.
    pub fn balloon(&self, target: Option<PageCount>) -> Option<BalloonCounts> {
        let mut slots = self.device_loop.as_ref().map_or(&[][..], DeviceLoop::slots).iter();
        slots.find(|slot| slot.slot() == Slot::BALLOON)?.balloon(target)
    }

    /// Gives a network interface another tap, for one that was deleted. The guest goes on with what it negotiated.
    pub fn replace_tap(&self, index: u8, tap: File) -> Result<(), ReplaceTapError> {
        let mut slots = self.device_loop.as_ref().map_or(&[][..], DeviceLoop::slots).iter();
        let slot = slots.find(|slot| slot.slot().net_index() == Some(index));
        let slot = slot.ok_or(ReplaceTapError::NoInterface { index })?;
        slot.replace_tap(tap).map_err(|source| ReplaceTapError::Host { index, source })
    }

    /// The volume slots, each with its index.
    pub fn volumes(&self) -> Vec<(u8, VolumeCounts)> {
        let slots = self.device_loop.as_ref().map_or(&[][..], DeviceLoop::slots);
        slots.iter().filter_map(|slot| Some((slot.slot().block_index()?, slot.volume_counts()?))).collect()
    }

    /// Changes something of a volume slot, whether the machine runs or not.
    pub fn change_volume(&self, index: u8, change: VolumeChange) -> Result<(), VolumeError> {
        let mut slots = self.device_loop.as_ref().map_or(&[][..], DeviceLoop::slots).iter();
        let slot = slots.find(|slot| slot.slot().block_index() == Some(index) && slot.volume_counts().is_some());
        let slot = slot.ok_or(VolumeError::NoSlot { index })?;
        match change {
            VolumeChange::Attach(attachment) => slot.attach_volume(attachment),
            VolumeChange::Detach { force } => slot.detach_volume(force),
            VolumeChange::Resize { bytes } => slot.resize_volume(bytes),
            VolumeChange::Limit(limits) => slot.limit_volume(limits),
        }
    }

    /// The packets that wait for the guest's interfaces.
    pub fn packets(&self) -> PacketDoor {
        PacketDoor::new(self.device_loop.as_ref().map_or(&[][..], DeviceLoop::slots))
    }

    /// Has all vCPUs rest once, for a running machine that writes memory faster than it can be copied. A pause ends it.
    pub fn rest_vcpus(&self, time: Duration) {
        if self.state == MachineState::Running {
            self.vcpus.iter().for_each(|vcpu| vcpu.rest(time));
        }
    }

    /// Who wants to know which pages are written.
    pub fn dirty(&self) -> &Harvester {
        &self.dirty
    }

    /// Guest memory.
    pub fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// Where guest memory lies in this process.
    pub fn guest_regions(&self) -> Vec<MappedRegion> {
        ram::mapped_regions(self.vm.ram())
    }

    /// What the host's KVM can do.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.halt();
    }
}
