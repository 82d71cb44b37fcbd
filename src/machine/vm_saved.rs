//! The VM's own state: three interrupt controllers, the timer, kvmclock.
//!
//! Interrupt controllers and timer are set after the memory and before the vCPUs; kvmclock only when the guest goes on
//! ([`super::time`]).

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use serde::{Deserialize, Serialize};

use super::time::HostNow;
use crate::clock::Clock;
use crate::saved::{Saved, SectionKind};
use crate::sys::kvm::plain::{Plain, WrongLength};
use crate::sys::kvm::{CallError, Vm};

/// Flags of KVM_GET_CLOCK (api.rst section 4.29): real time and host TSC are there.
const CLOCK_REALTIME: u32 = 1 << 2;
const CLOCK_HOST_TSC: u32 = 1 << 3;

/// Interrupt controllers, in the order they are saved and restored.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// All clocks at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct ClockReading {
    /// kvmclock, nanoseconds.
    pub(super) kvmclock_ns: u64,
    /// The host's real time, nanoseconds since the Unix epoch; 0 in states of versions that took it from KVM alone.
    pub(super) realtime_ns: u64,
    /// The host's TSC; 0 when KVM does not tell.
    pub(super) host_tsc: u64,
}

impl ClockReading {
    /// The host's part of it.
    pub(super) fn host(self) -> HostNow {
        HostNow { realtime_ns: self.realtime_ns, host_tsc: self.host_tsc }
    }
}

/// Saved state of the VM, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VmV1 {
    #[serde(with = "serde_bytes")]
    pic_master: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pic_slave: Vec<u8>,
    #[serde(with = "serde_bytes")]
    io_apic: Vec<u8>,
    #[serde(with = "serde_bytes")]
    pit: Vec<u8>,
    clock: ClockReading,
}

impl Saved for VmV1 {
    const KIND: SectionKind = SectionKind::Vm;
    const VERSION: u16 = 1;
}

impl VmV1 {
    /// The clocks when the guest stopped.
    pub(super) fn clock(&self) -> ClockReading {
        self.clock
    }
}

/// Why the VM's state could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreVmError {
    /// A part has the wrong length.
    #[error("a part of the state is malformed")]
    Malformed(#[source] WrongLength),
    /// An interrupt controller's state is another's.
    #[error("state of interrupt controller {found} where that of {wanted} belongs")]
    Chip {
        /// The number in the state.
        found: u32,
        /// The number that belongs there.
        wanted: u32,
    },
    /// A KVM call failed.
    #[error("set the state")]
    Call(#[source] CallError),
}

/// Reads all clocks at once. Where KVM does not tell real time with its own, as it does not when it cannot follow the
/// host's TSC, it is read right after: microseconds apart, and the pause is not lost.
pub(super) fn read_clock(vm: &Vm, clock_of_host: &dyn Clock) -> Result<ClockReading, CallError> {
    let clock = vm.fd().get_clock().map_err(CallError::of("KVM_GET_CLOCK"))?;
    let wall = clock_of_host.wall();
    let told = |flag: u32, value: u64| if clock.flags & flag == 0 { 0 } else { value };
    Ok(ClockReading {
        kvmclock_ns: clock.clock,
        realtime_ns: if clock.flags & CLOCK_REALTIME == 0 { wall.0 } else { clock.realtime },
        host_tsc: told(CLOCK_HOST_TSC, clock.host_tsc),
    })
}

/// Sets kvmclock. No flags: KVM takes the value as it is and adds nothing for time that passed.
pub(super) fn set_clock(vm: &Vm, kvmclock_ns: u64) -> Result<(), CallError> {
    let clock = kvm_clock_data { clock: kvmclock_ns, ..Default::default() };
    vm.fd().set_clock(&clock).map_err(CallError::of("KVM_SET_CLOCK"))
}

/// Reads the state; `clock` was read when the guest stopped.
pub(super) fn save(vm: &Vm, clock: ClockReading) -> Result<VmV1, CallError> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.fd().get_irqchip(&mut chip).map_err(CallError::of("KVM_GET_IRQCHIP"))?;
        Ok(chip.to_bytes())
    };
    let [pic_master, pic_slave, io_apic] = CHIPS;
    let mut pit = vm.fd().get_pit2().map_err(CallError::of("KVM_GET_PIT2"))?;
    // When a counter was loaded, in the host's own monotonic time: means nothing later or elsewhere. KVM loads channel
    // 0, the only one that interrupts, anew when the state is set.
    pit.channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
    Ok(VmV1 {
        pic_master: chip(pic_master)?,
        pic_slave: chip(pic_slave)?,
        io_apic: chip(io_apic)?,
        pit: pit.to_bytes(),
        clock,
    })
}

/// Writes interrupt controllers and timer.
pub(super) fn restore(vm: &Vm, saved: &VmV1) -> Result<(), RestoreVmError> {
    let VmV1 { pic_master, pic_slave, io_apic, pit, clock: _ } = saved;
    let mut chips = Vec::with_capacity(CHIPS.len());
    for (wanted, bytes) in CHIPS.into_iter().zip([pic_master, pic_slave, io_apic]) {
        let chip = kvm_irqchip::from_bytes(bytes).map_err(RestoreVmError::Malformed)?;
        if chip.chip_id != wanted {
            return Err(RestoreVmError::Chip { found: chip.chip_id, wanted });
        }
        chips.push(chip);
    }
    let pit = kvm_pit_state2::from_bytes(pit).map_err(RestoreVmError::Malformed)?;
    let call = |name| move |error| RestoreVmError::Call(CallError::of(name)(error));
    chips.iter().try_for_each(|chip| vm.fd().set_irqchip(chip)).map_err(call("KVM_SET_IRQCHIP"))?;
    vm.fd().set_pit2(&pit).map_err(call("KVM_SET_PIT2"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saved::Section;

    fn example() -> VmV1 {
        let clock = ClockReading { kvmclock_ns: 1, realtime_ns: 2, host_tsc: 300 };
        VmV1 { pic_master: vec![1], pic_slave: vec![2, 2], io_apic: vec![3, 3, 3], pit: vec![], clock }
    }

    /// The golden keeps the encoding: changing it needs a new version.
    #[test]
    fn the_encoding_is_what_it_was() {
        let bytes = Section::new(0, &example()).unwrap().bytes;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../../tests/golden/saved_vm_v1.hex").trim_end());
    }
}
