//! A machine in the making: the VM first, then devices on buses, vCPUs, interrupt lines, threads. Private to `build`;
//! dropping a [`Chassis`] takes everything down again.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry,
    kvm_pit_config,
};
use kvm_ioctls::{IoEventAddress, Kvm};

use super::BuildError;
use crate::clock::Clock;
use crate::machine::boot::FirstRegisters;
use crate::machine::bus::{Bus, SharedBusDevice};
use crate::machine::counters::Counters;
use crate::machine::dirty::Harvester;
use crate::machine::event_port::EventPort;
use crate::machine::events::{self, EventSender, MachineEvents};
use crate::machine::i8042::I8042Command;
use crate::machine::layout::{
    EVENT_PORT, I8042_COMMAND_PORT, KVM_IDENTITY_MAP, KVM_TSS, SERIAL_GSI, SERIAL_PORT, SERIAL_PORT_COUNT, Slot,
    VCPUS_MAX, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_SLOT_BYTES,
};
use crate::machine::ram::{self, GuestRam, RamBacking};
use crate::machine::serial::SerialPort;
use crate::machine::shape::Shape;
use crate::machine::state::MachineState;
use crate::machine::vcpu::{SharedClock, Surroundings, VcpuThread};
use crate::machine::vcpu_saved::MsrIndices;
use crate::machine::virtio::{Backend, BuildDeviceError, DeviceLoop, VirtioSlot};
use crate::machine::{Machine, Phases, StoodStill, cpuid};
use crate::sys::kvm::{self, CallError, Capabilities, Vcpu, Vm};

/// IA32_MISC_ENABLE: fast string operations on, as firmware leaves it (SDM volume 4 table 2-2).
const MSR_MISC_ENABLE: (u32, u64) = (0x1A0, 1);

/// IA32_MTRR_DEF_TYPE: range registers on, default write-back, as firmware leaves it (SDM volume 3 section 12.11.2.1).
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2FF, 1 << 11 | 6);

/// Local APIC: the two local interrupt lines, and the delivery modes firmware gives them (SDM volume 3 section 11.5.1).
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const LAPIC_MODE_EXTINT: i8 = 7;
const LAPIC_MODE_NMI: i8 = 4;

/// A VM with memory, interrupt controllers and timer, before it has devices and vCPUs.
pub(super) struct Chassis {
    kvm: Kvm,
    capabilities: Capabilities,
    pub(super) vm: Arc<Vm>,
    pub(super) shape: Shape,
    events: (EventSender, MachineEvents),
    pub(super) counters: Arc<Counters>,
    clock: Arc<dyn Clock>,
    pub(super) phases: Phases,
}

/// Devices on their buses.
pub(super) struct Fitted {
    serial: Arc<Mutex<SerialPort>>,
    slots: Vec<Arc<VirtioSlot>>,
    around: Arc<Surroundings>,
}

impl Chassis {
    pub(super) fn new(
        device: File,
        shape: Shape,
        backing: RamBacking,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, BuildError> {
        let started = clock.monotonic();
        let kvm = kvm::system(device).map_err(BuildError::Kvm)?;
        let capabilities = kvm::capabilities(&kvm).map_err(BuildError::Kvm)?;
        let limit = u8::try_from(capabilities.vcpus_max).unwrap_or(VCPUS_MAX).min(VCPUS_MAX);
        if !(1..=limit).contains(&shape.vcpus) {
            return Err(BuildError::VcpuCount { found: shape.vcpus, limit });
        }
        let ram = ram::make(backing, shape.memory).map_err(BuildError::Ram)?;
        let memory_ready = clock.monotonic();
        let vm = Vm::new(&kvm, capabilities, ram).map_err(BuildError::Call)?;
        set_up_vm(&vm).map_err(BuildError::Call)?;
        let events = events::channel().map_err(|source| BuildError::Host { what: "event queue", source })?;
        let phases = Phases { started, memory_ready, kernel_loaded: None, built: memory_ready, first_entry: None };
        Ok(Self { kvm, capabilities, vm, shape, events, counters: Arc::new(Counters::default()), clock, phases })
    }

    /// Puts the devices on the buses.
    pub(super) fn fit(
        &mut self,
        serial: SerialPort,
        devices: Vec<(Slot, Backend)>,
        mut make: impl FnMut(Slot, Backend, &GuestRam) -> Result<VirtioSlot, BuildDeviceError>,
    ) -> Result<Fitted, BuildError> {
        let serial = Arc::new(Mutex::new(serial));
        let (mut ports, mut mmio) = (Bus::new(), Bus::new());
        let sender = &self.events.0;
        let reset: SharedBusDevice = Arc::new(Mutex::new(I8042Command::new(sender.clone())));
        let told: SharedBusDevice = Arc::new(Mutex::new(EventPort::new(sender.clone())));
        let console: SharedBusDevice = Arc::clone(&serial) as SharedBusDevice;
        for (port, count, device) in
            [(SERIAL_PORT, SERIAL_PORT_COUNT, console), (I8042_COMMAND_PORT, 1, reset), (EVENT_PORT, 1, told)]
        {
            ports.add(u64::from(port), u64::from(count), device).map_err(BuildError::Address)?;
        }
        let mut slots = Vec::with_capacity(devices.len());
        for (slot, backend) in devices {
            let device = Arc::new(make(slot, backend, self.vm.ram()).map_err(BuildError::Device)?);
            mmio.add(slot.address(), VIRTIO_MMIO_SLOT_BYTES, device.registers()).map_err(BuildError::Address)?;
            slots.push(device);
        }
        let around = Arc::new(Surroundings {
            ports,
            mmio,
            events: sender.clone(),
            counters: Arc::clone(&self.counters),
            clock: SharedClock(Arc::clone(&self.clock)),
            first_entry: OnceLock::new(),
        });
        Ok(Fitted { serial, slots, around })
    }

    /// vCPUs with the processor of the template.
    pub(super) fn create_vcpus(&self) -> Result<Vec<Vcpu>, BuildError> {
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(CallError::of("KVM_GET_SUPPORTED_CPUID"))
            .map_err(BuildError::Call)?;
        let vcpus = self.create_bare_vcpus()?;
        for (vcpu, index) in vcpus.iter().zip(0..) {
            let entries = cpuid::template(supported.as_slice(), index, self.shape.vcpus);
            set_cpuid(vcpu, &entries).map_err(BuildError::Call)?;
        }
        Ok(vcpus)
    }

    pub(super) fn create_bare_vcpus(&self) -> Result<Vec<Vcpu>, BuildError> {
        (0..self.shape.vcpus)
            .map(|index| self.vm.create_vcpu(index))
            .collect::<Result<_, _>>()
            .map_err(BuildError::Call)
    }

    /// Connects interrupt lines, starts threads.
    pub(super) fn finish(
        self,
        fitted: Fitted,
        vcpus: Vec<Vcpu>,
        state: MachineState,
        stopped: Option<StoodStill>,
    ) -> Result<Machine, BuildError> {
        let Self { kvm, capabilities, vm, shape, events, counters, clock, mut phases } = self;
        let Fitted { serial, slots, around } = fitted;
        let msrs = MsrIndices::of(&kvm).map_err(BuildError::Call)?;
        connect(&vm, &serial, &slots).map_err(BuildError::Call)?;
        let device_loop = match slots.is_empty() {
            true => None,
            false => {
                let started = DeviceLoop::start(slots);
                Some(started.map_err(|source| BuildError::Host { what: "device thread", source })?)
            }
        };
        let mut threads = Vec::with_capacity(vcpus.len());
        for (vcpu, index) in vcpus.into_iter().zip(0..) {
            let thread = VcpuThread::start(index, vcpu, Arc::clone(&around));
            threads.push(thread.map_err(|source| BuildError::Host { what: "vCPU thread", source })?);
        }
        phases.built = clock.monotonic();
        let dirty = Harvester::new(Arc::clone(&vm));
        Ok(Machine {
            state,
            shape,
            vcpus: threads,
            device_loop,
            serial,
            around,
            events: events.1,
            counters,
            phases,
            msrs,
            restored: stopped.is_some(),
            stopped,
            dirty,
            clock: SharedClock(clock),
            capabilities,
            vm,
        })
    }
}

fn set_up_vm(vm: &Vm) -> Result<(), CallError> {
    let identity = KVM_IDENTITY_MAP.0;
    vm.fd().set_identity_map_address(identity).map_err(CallError::of("KVM_SET_IDENTITY_MAP_ADDR"))?;
    let tss = usize::try_from(KVM_TSS.0).unwrap_or(usize::MAX);
    vm.fd().set_tss_address(tss).map_err(CallError::of("KVM_SET_TSS_ADDR"))?;
    vm.fd().create_irq_chip().map_err(CallError::of("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.fd().create_pit2(pit).map_err(CallError::of("KVM_CREATE_PIT2"))
}

fn connect(vm: &Vm, serial: &Mutex<SerialPort>, slots: &[Arc<VirtioSlot>]) -> Result<(), CallError> {
    let serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
    vm.fd().register_irqfd(serial.interrupt(), SERIAL_GSI).map_err(CallError::of("KVM_IRQFD"))?;
    for slot in slots {
        let at = slot.slot();
        vm.fd().register_irqfd(slot.interrupt(), at.gsi()).map_err(CallError::of("KVM_IRQFD"))?;
        let notify = IoEventAddress::Mmio(at.address() + VIRTIO_MMIO_QUEUE_NOTIFY);
        for (event, queue) in slot.queue_notify().iter().zip(0_u32..) {
            vm.fd().register_ioevent(event, &notify, queue).map_err(CallError::of("KVM_IOEVENTFD"))?;
        }
    }
    Ok(())
}

fn set_cpuid(vcpu: &Vcpu, entries: &[kvm_cpuid_entry2]) -> Result<(), CallError> {
    const CALL: &str = "KVM_SET_CPUID2";
    let too_many = |_| CallError { call: CALL, source: io::ErrorKind::InvalidInput.into() };
    let cpuid = CpuId::from_entries(entries).map_err(too_many)?;
    vcpu.fd().set_cpuid2(&cpuid).map_err(CallError::of(CALL))
}

/// What firmware would have left behind, then the kernel's first registers.
pub(super) fn set_first_registers(vcpu: &Vcpu, first: &FirstRegisters) -> Result<(), CallError> {
    let FirstRegisters { regs, code, data, task, tables, control, efer } = first;
    let mut sregs = vcpu.sregs2()?;
    (sregs.cs, sregs.tr) = (*code, *task);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (*data, *data, *data, *data, *data);
    (sregs.gdt, sregs.idt) = *tables;
    (sregs.cr0, sregs.cr3, sregs.cr4) = *control;
    sregs.efer = *efer;
    vcpu.set_sregs2(&sregs)?;
    vcpu.fd().set_regs(regs).map_err(CallError::of("KVM_SET_REGS"))?;

    let mut lapic: kvm_lapic_state = vcpu.fd().get_lapic().map_err(CallError::of("KVM_GET_LAPIC"))?;
    // Delivery mode is bits 10:8, so the low three bits of the register's second byte.
    for (register, mode) in [(LAPIC_LVT_LINT0, LAPIC_MODE_EXTINT), (LAPIC_LVT_LINT1, LAPIC_MODE_NMI)] {
        lapic.regs[register + 1] = lapic.regs[register + 1] & !7 | mode;
        // Not masked: bit 16.
        lapic.regs[register + 2] &= !1;
    }
    vcpu.fd().set_lapic(&lapic).map_err(CallError::of("KVM_SET_LAPIC"))?;

    for (index, data) in [MSR_MISC_ENABLE, MSR_MTRR_DEF_TYPE] {
        if let Ok(msrs) = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]) {
            // A KVM that does not have one of them is fine: a kernel sets up what it needs itself.
            vcpu.fd().set_msrs(&msrs).map_err(CallError::of("KVM_SET_MSRS"))?;
        }
    }
    Ok(())
}
