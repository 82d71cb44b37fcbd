//! Makes a machine, from a kernel or from saved sections. Nothing half-built escapes: until the last step succeeded
//! there is only a `Chassis` on this thread's stack, and dropping it takes everything down again.
//!
//! ```text
//! /dev/kvm ─▶ memory ─▶ VM, interrupt controllers, timer ─▶ devices on buses ─▶ vCPUs ─┬─ kernel: load, first registers
//!                                                                                      └─ sections: VM, vCPU states
//!          ─▶ interrupt lines connected ─▶ threads (paused) ─▶ Machine
//! ```
//! Interrupt lines are connected after the vCPUs have their state: an interrupt that a restored device raises at once
//! would otherwise be overwritten together with the local APIC it went to.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::boot::{self, BootError, BootPlan, Entry};
use super::bus::AddRangeError;
use super::layout::Slot;
use super::ram::{GuestRam, MakeRamError, RamBacking};
use super::sealed::{Sealed, UnsealError};
use super::serial::{BuildSerialError, ConsoleSink, SerialPort};
use super::shape::{Shape, ShapeV1};
use super::state::MachineState;
use super::vcpu::PausedTsc;
use super::vcpu_saved::{self, RestoreVcpuError, VcpuV1};
use super::virtio::{Backend, BuildDeviceError, VirtioSlot};
use super::vm_saved::{self, RestoreVmError, VmV1};
use super::{Machine, StoodStill};
use crate::clock::Clock;
use crate::report::Retry;
use crate::saved::{Sections, TakeSectionError};
use crate::sys::kvm::{CallError, OpenKvmError};
use crate::units::Bytes;

mod chassis;

use chassis::{Chassis, set_first_registers};

/// A machine to boot from a kernel.
pub struct MachineSpec {
    /// Number of vCPUs, 1 to [`super::layout::VCPUS_MAX`].
    pub vcpus: u8,
    /// Guest memory.
    pub memory: Bytes,
    /// What it is made of.
    pub backing: RamBacking,
    /// vmlinux or bzImage; untrusted.
    pub kernel: File,
    /// Initial file system; untrusted.
    pub initrd: Option<File>,
    /// Command line; the words for devices are added.
    pub command_line: String,
    /// How the kernel is entered.
    pub entry: Entry,
    /// Announced devices.
    pub devices: Vec<(Slot, Backend)>,
    /// Where the guest's console output goes. Written on vCPU threads: it must not block for long.
    pub console: ConsoleSink,
    /// Where the machine reads the time for [`super::Phases`].
    pub clock: Arc<dyn Clock>,
}

/// What a machine made from saved sections gets from outside; vCPUs and memory size come from the sections.
pub struct RestoreSpec {
    /// Guest memory with its content.
    pub backing: RamBacking,
    /// Pages that differ from it, and all that is left of a sealed file.
    pub sealed: Option<Sealed>,
    /// Announced devices: exactly the slots that were saved.
    pub devices: Vec<(Slot, Backend)>,
    /// Where the guest's console output goes. Written on vCPU threads: it must not block for long.
    pub console: ConsoleSink,
    /// Where the machine reads the time for [`super::Phases`].
    pub clock: Arc<dyn Clock>,
}

/// Why a machine could not be built or restored.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// There is no usable KVM.
    #[error("use KVM")]
    Kvm(#[source] OpenKvmError),
    /// No machine has this many vCPUs.
    #[error("{found} vCPUs: 1 to {limit} are possible")]
    VcpuCount {
        /// How many were asked for.
        found: u8,
        /// How many this host allows.
        limit: u8,
    },
    /// Two devices for one slot.
    #[error("slot {} has two devices", .slot.number())]
    SlotTwice {
        /// The slot.
        slot: Slot,
    },
    /// Guest memory could not be made.
    #[error("guest memory")]
    Ram(#[source] MakeRamError),
    /// A KVM call failed.
    #[error("set up the virtual machine")]
    Call(#[source] CallError),
    /// The kernel could not be loaded.
    #[error("boot")]
    Boot(#[source] BootError),
    /// The console could not be made.
    #[error("console")]
    Serial(#[source] BuildSerialError),
    /// A virtio device could not be made.
    #[error("virtio device")]
    Device(#[source] BuildDeviceError),
    /// Two devices want one address.
    #[error("device address")]
    Address(#[source] AddRangeError),
    /// A thread or event descriptor could not be made.
    #[error("make the {what}")]
    Host {
        /// What.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Pages could not be taken from a sealed file.
    #[error("unseal")]
    Unseal(#[source] UnsealError),
    /// The sections are not those of such a machine.
    #[error("saved state")]
    Sections(#[source] TakeSectionError),
    /// The VM's state does not fit this host.
    #[error("restore the state of the virtual machine")]
    RestoreVm(#[source] RestoreVmError),
    /// A vCPU's state does not fit this host.
    #[error("restore vCPU {vcpu}")]
    RestoreVcpu {
        /// Which one.
        vcpu: u8,
        /// The reason.
        #[source]
        source: RestoreVcpuError,
    },
}

impl BuildError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Boot(error) => error.retry(),
            Self::Call(_) | Self::Host { .. } => Retry::Later,
            Self::Ram(error) => error.retry(),
            Self::Kvm(_)
            | Self::VcpuCount { .. }
            | Self::SlotTwice { .. }
            | Self::Serial(_)
            | Self::Device(_)
            | Self::Address(_)
            | Self::Unseal(_)
            | Self::Sections(_)
            | Self::RestoreVm(_)
            | Self::RestoreVcpu { .. } => Retry::WithChange,
        }
    }
}

/// The slots of `devices`, ascending; refuses a slot with two devices.
fn slots_of(devices: &[(Slot, Backend)]) -> Result<Vec<Slot>, BuildError> {
    let mut slots: Vec<Slot> = devices.iter().map(|(slot, _)| *slot).collect();
    slots.sort_unstable();
    match slots.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(BuildError::SlotTwice { slot: pair[0] }),
        None => Ok(slots),
    }
}

/// Boots: the machine is [`MachineState::Built`].
pub(super) fn from_kernel(device: File, spec: MachineSpec) -> Result<Machine, BuildError> {
    let MachineSpec { vcpus, memory, backing, kernel, initrd, command_line, entry, devices, console, clock } = spec;
    let shape = Shape { vcpus, memory, slots: slots_of(&devices)? };
    let mut chassis = Chassis::new(device, shape, backing, Arc::clone(&clock))?;
    let serial = SerialPort::new(console, Arc::clone(&chassis.counters)).map_err(BuildError::Serial)?;
    let make = |slot, backend, ram: &GuestRam| VirtioSlot::new(slot, backend, ram);
    let fitted = chassis.fit(serial, devices, make)?;

    let plan = BootPlan { kernel, initrd, command_line: &command_line, slots: &chassis.shape.slots, vcpus, entry };
    let first = boot::load(chassis.vm.ram(), memory, plan).map_err(BuildError::Boot)?;
    chassis.phases.kernel_loaded = Some(clock.monotonic());
    let made = chassis.create_vcpus()?;
    if let Some(boot_vcpu) = made.first() {
        set_first_registers(boot_vcpu, &first).map_err(BuildError::Call)?;
    }
    chassis.finish(fitted, made, MachineState::Built, None)
}

/// Restores: the machine is [`MachineState::Paused`].
pub(super) fn from_sections(device: File, spec: RestoreSpec, sections: Sections) -> Result<Machine, BuildError> {
    let RestoreSpec { backing, sealed, devices, console, clock } = spec;
    let mut sections = sections;
    let shape = sections.take::<ShapeV1>(0).map_err(BuildError::Sections)?;
    let shape = Shape::from_saved(shape, slots_of(&devices)?).map_err(BuildError::Sections)?;
    let mut chassis = Chassis::new(device, shape, backing, clock)?;
    // Before the devices: they look at their queues.
    sealed.map_or(Ok(()), |sealed| sealed.fill(chassis.vm.ram())).map_err(BuildError::Unseal)?;
    let vm_state = sections.take::<VmV1>(0).map_err(BuildError::Sections)?;
    let mut states = Vec::with_capacity(usize::from(chassis.shape.vcpus));
    for vcpu in 0..chassis.shape.vcpus {
        states.push(sections.take::<VcpuV1>(u16::from(vcpu)).map_err(BuildError::Sections)?);
    }
    let counters = Arc::clone(&chassis.counters);
    let serial = SerialPort::from_saved(console, counters, &mut sections).map_err(BuildError::Serial)?;
    let make = |slot, backend, ram: &GuestRam| VirtioSlot::from_saved(slot, backend, ram, &mut sections);
    let fitted = chassis.fit(serial, devices, make)?;
    // Before anything of it is set: leftovers mean that this is another machine's state.
    sections.finish().map_err(BuildError::Sections)?;

    let made = chassis.create_bare_vcpus()?;
    vm_saved::restore(&chassis.vm, &vm_state).map_err(BuildError::RestoreVm)?;
    for ((vcpu, state), index) in made.iter().zip(&states).zip(0_u8..) {
        vcpu_saved::restore(vcpu, state).map_err(|source| BuildError::RestoreVcpu { vcpu: index, source })?;
    }
    let tsc = states.first().map(|boot| PausedTsc { offset: boot.tsc_offset(), khz: boot.tsc_khz() });
    let stopped = tsc.map(|tsc| StoodStill { clock: vm_state.clock(), tsc });
    chassis.finish(fitted, made, MachineState::Paused, stopped)
}
