//! A vCPU's state: which KVM calls read and write it, in which order and why.
//!
//! Called on the thread that owns the vCPU, outside guest mode and with no access pending. What is saved is [`VcpuV1`]:
//! each KVM struct as bytes of its exact length, MSRs as pairs, and the few numbers a host is checked against.
//!
//! **Saving**: the state of multiprocessing comes first because reading it applies pending INIT and SIPI, which change
//! everything else; pending events come last because the other reads may still deliver into them.
//!
//! **Restoring** has one order and each step needs the one before:
//! 1. CPUID: decides which MSRs and control bits KVM takes.
//! 2. TSC frequency: it is only checked. KVM could scale on some hosts; then the offset would no longer be the
//!    difference to the host's TSC, which is what [`super::time`] computes with.
//! 3. Multiprocessing state: a vCPU that waits for SIPI refuses some of what follows otherwise.
//! 4. General registers, then segment and control registers: they set the APIC base, which puts the local APIC into
//!    xAPIC or x2APIC mode, in which its registers are then read.
//! 5. xsave area and XCR0, debug registers.
//! 6. Local APIC before the MSRs: KVM drops a write of the TSC deadline while the timer is not in deadline mode, and
//!    reports success; a guest restored that way waits for ever.
//! 7. MSRs; the TSC offset before the TSC deadline, which is compared with it, in a call of its own.
//! 8. Pending events: everything before may clear them.
//!
//! No nested state: VMX and SVM are hidden from guests, so there is none.

use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::saved::{Saved, SectionKind};
use crate::sys::kvm::plain::{Plain, WrongLength};
use crate::sys::kvm::{CallError, Vcpu};

/// IA32_TIME_STAMP_COUNTER: saved as an offset, not as an MSR, because it never stands still (SDM volume 4 table 2-2).
const MSR_TSC: u32 = 0x10;

/// IA32_TSC_DEADLINE: written last and alone (SDM volume 3 section 11.5.4.1).
const MSR_TSC_DEADLINE: u32 = 0x6E0;

/// Most MSRs in one call: half of what the kernel takes (MAX_IO_MSRS, 256).
const MSRS_PER_CALL: usize = 128;

/// Most MSRs of a vCPU: KVM lists about 40 to 150.
const MSRS_MAX: usize = 512;

/// How far two TSC frequencies may be apart to count as one: 250 parts in a million, the same that KVM tolerates
/// before it scales (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// MSRs to save, in the order KVM lists them.
#[derive(Debug, Clone)]
pub(super) struct MsrIndices(Arc<[u32]>);

impl MsrIndices {
    /// What this host's KVM lists, without those handled apart.
    pub(super) fn of(kvm: &Kvm) -> Result<Self, CallError> {
        let listed = kvm.get_msr_index_list().map_err(CallError::of("KVM_GET_MSR_INDEX_LIST"))?;
        let indices = listed.as_slice().iter().copied().filter(|index| !matches!(*index, MSR_TSC | MSR_TSC_DEADLINE));
        Ok(Self(indices.collect()))
    }
}

/// Saved state of a vCPU, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct VcpuV1 {
    #[serde(with = "serde_bytes")]
    mp_state: Vec<u8>,
    #[serde(with = "serde_bytes")]
    regs: Vec<u8>,
    #[serde(with = "serde_bytes")]
    sregs2: Vec<u8>,
    #[serde(with = "serde_bytes")]
    xsave: Vec<u8>,
    #[serde(with = "serde_bytes")]
    xcrs: Vec<u8>,
    #[serde(with = "serde_bytes")]
    debug_regs: Vec<u8>,
    #[serde(with = "serde_bytes")]
    lapic: Vec<u8>,
    /// Entries one after the other.
    #[serde(with = "serde_bytes")]
    cpuid: Vec<u8>,
    /// Index and value, in the order they are written.
    msrs: Vec<(u32, u64)>,
    tsc_deadline: Option<u64>,
    #[serde(with = "serde_bytes")]
    events: Vec<u8>,
    tsc_khz: u32,
    tsc_offset: u64,
    xsave_bytes: u32,
    xcr0: u64,
}

impl Saved for VcpuV1 {
    const KIND: SectionKind = SectionKind::Vcpu;
    const VERSION: u16 = 1;
}

impl VcpuV1 {
    /// What was added to the host's TSC to give the guest's.
    pub(super) fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    /// Frequency of the TSC, kHz.
    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The processor the guest was given.
    pub(super) fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, WrongLength> {
        self.cpuid.chunks(size_of::<kvm_cpuid_entry2>()).map(kvm_cpuid_entry2::from_bytes).collect()
    }
}

/// Why a vCPU's state could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreVcpuError {
    /// A part has the wrong length.
    #[error("a part of the state is malformed")]
    Malformed(#[source] WrongLength),
    /// More parts than a vCPU has.
    #[error("{what}: {found} is over the limit of {limit}")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// The xsave area is another processor's.
    #[error("the xsave area has {found} bytes, this host's has {wanted}")]
    Xsave {
        /// Bytes in the state.
        found: usize,
        /// Bytes on this host.
        wanted: usize,
    },
    /// The TSC runs at another frequency.
    #[error("the guest's TSC has {saved_khz} kHz, this host's has {host_khz} kHz")]
    TscFrequency {
        /// The guest's.
        saved_khz: u32,
        /// The host's.
        host_khz: u32,
    },
    /// KVM does not take an MSR and does not hold the saved value already.
    #[error("MSR {index:#x} does not take {value:#x}")]
    Msr {
        /// Its index.
        index: u32,
        /// The saved value.
        value: u64,
    },
    /// A KVM call failed.
    #[error("set the state")]
    Call(#[source] CallError),
}

/// Reads the state.
pub(super) fn save(vcpu: &Vcpu, indices: &MsrIndices) -> Result<VcpuV1, CallError> {
    let fd = vcpu.fd();
    let mp_state = fd.get_mp_state().map_err(CallError::of("KVM_GET_MP_STATE"))?;
    let regs = fd.get_regs().map_err(CallError::of("KVM_GET_REGS"))?;
    let sregs2 = vcpu.sregs2()?;
    let xsave = vcpu.xsave()?;
    let xcrs = fd.get_xcrs().map_err(CallError::of("KVM_GET_XCRS"))?;
    let debug_regs = fd.get_debug_regs().map_err(CallError::of("KVM_GET_DEBUGREGS"))?;
    let lapic = fd.get_lapic().map_err(CallError::of("KVM_GET_LAPIC"))?;
    let tsc_khz = fd.get_tsc_khz().map_err(CallError::of("KVM_GET_TSC_KHZ"))?;
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(CallError::of("KVM_GET_CPUID2"))?;
    let tsc_offset = vcpu.tsc_offset()?;
    let msrs = read_msrs(vcpu, &indices.0)?;
    let tsc_deadline = read_msrs(vcpu, &[MSR_TSC_DEADLINE])?.first().map(|(_, value)| *value);
    let events = fd.get_vcpu_events().map_err(CallError::of("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuV1 {
        mp_state: mp_state.to_bytes(),
        regs: regs.to_bytes(),
        sregs2: sregs2.to_bytes(),
        xsave_bytes: u32::try_from(xsave.len()).unwrap_or(u32::MAX),
        xsave,
        xcr0: xcrs.xcrs.iter().find(|xcr| xcr.xcr == 0).map_or(0, |xcr| xcr.value),
        xcrs: xcrs.to_bytes(),
        debug_regs: debug_regs.to_bytes(),
        lapic: lapic.to_bytes(),
        cpuid: cpuid.as_slice().iter().flat_map(Plain::to_bytes).collect(),
        msrs,
        tsc_deadline,
        events: events.to_bytes(),
        tsc_khz,
        tsc_offset,
    })
}

/// Writes the state, in the order of this module's documentation.
pub(super) fn restore(vcpu: &Vcpu, saved: &VcpuV1) -> Result<(), RestoreVcpuError> {
    let VcpuV1 {
        mp_state,
        regs,
        sregs2,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        cpuid: _,
        msrs,
        tsc_deadline,
        events,
        tsc_khz,
        tsc_offset,
        xsave_bytes,
        xcr0: _,
    } = saved;
    // Everything is decoded before anything is set.
    let mp_state = plain::<kvm_mp_state>(mp_state)?;
    let regs = plain::<kvm_regs>(regs)?;
    let sregs2 = plain::<kvm_sregs2>(sregs2)?;
    let xcrs = plain::<kvm_xcrs>(xcrs)?;
    let debug_regs = plain::<kvm_debugregs>(debug_regs)?;
    let lapic = plain::<kvm_lapic_state>(lapic)?;
    let events = plain::<kvm_vcpu_events>(events)?;
    let cpuid = saved.cpuid().map_err(RestoreVcpuError::Malformed)?;
    limit("CPUID entries", cpuid.len(), KVM_MAX_CPUID_ENTRIES)?;
    limit("MSRs", msrs.len(), MSRS_MAX)?;
    let wanted = vcpu.vm().capabilities().xsave_bytes;
    if xsave.len() != wanted || usize::try_from(*xsave_bytes) != Ok(wanted) {
        return Err(RestoreVcpuError::Xsave { found: xsave.len(), wanted });
    }

    let fd = vcpu.fd();
    let call = |name| move |error| RestoreVcpuError::Call(CallError::of(name)(error));
    let cpuid = CpuId::from_entries(&cpuid).map_err(|_| RestoreVcpuError::Limit {
        what: "CPUID entries",
        found: cpuid.len(),
        limit: KVM_MAX_CPUID_ENTRIES,
    })?;
    fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
    check_tsc_khz(vcpu, *tsc_khz)?;
    fd.set_mp_state(mp_state).map_err(call("KVM_SET_MP_STATE"))?;
    fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
    vcpu.set_sregs2(&sregs2).map_err(RestoreVcpuError::Call)?;
    vcpu.set_xsave(xsave).map_err(RestoreVcpuError::Call)?;
    fd.set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))?;
    fd.set_debug_regs(&debug_regs).map_err(call("KVM_SET_DEBUGREGS"))?;
    fd.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))?;
    write_msrs(vcpu, msrs)?;
    vcpu.set_tsc_offset(*tsc_offset).map_err(RestoreVcpuError::Call)?;
    if let Some(deadline) = tsc_deadline {
        write_msrs(vcpu, &[(MSR_TSC_DEADLINE, *deadline)])?;
    }
    fd.set_vcpu_events(&events).map_err(call("KVM_SET_VCPU_EVENTS"))
}

/// Sets the TSC offset for going on and brings the deadline timer along, which is compared with the TSC. A restored
/// vCPU whose deadline is 0 gets one that is over: a timer that had fired, but whose interrupt was not yet in the local
/// APIC when the state was read, would be lost otherwise. A tick too many is harmless, and KVM drops the write when the
/// timer is not in deadline mode.
pub(super) fn set_clocks(vcpu: &Vcpu, offset: Option<u64>, restored: bool) -> Result<(), CallError> {
    let held = vcpu.tsc_offset()?;
    let changed = offset.is_some_and(|offset| offset != held);
    if !changed && !restored {
        return Ok(());
    }
    let deadline = read_msrs(vcpu, &[MSR_TSC_DEADLINE])?.first().map_or(0, |(_, value)| *value);
    if let Some(offset) = offset {
        vcpu.set_tsc_offset(offset)?;
    }
    let data = match deadline {
        0 if restored => read_msrs(vcpu, &[MSR_TSC])?.first().map_or(0, |(_, value)| *value),
        deadline => deadline,
    };
    if data == 0 {
        return Ok(());
    }
    let entry = kvm_msr_entry { index: MSR_TSC_DEADLINE, data, ..Default::default() };
    if let Ok(msrs) = Msrs::from_entries(&[entry]) {
        vcpu.fd().set_msrs(&msrs).map_err(CallError::of("KVM_SET_MSRS"))?;
    }
    Ok(())
}

fn plain<T: Plain>(bytes: &[u8]) -> Result<T, RestoreVcpuError> {
    T::from_bytes(bytes).map_err(RestoreVcpuError::Malformed)
}

fn limit(what: &'static str, found: usize, limit: usize) -> Result<(), RestoreVcpuError> {
    if found > limit { Err(RestoreVcpuError::Limit { what, found, limit }) } else { Ok(()) }
}

fn check_tsc_khz(vcpu: &Vcpu, saved_khz: u32) -> Result<(), RestoreVcpuError> {
    let call = |name| move |error| RestoreVcpuError::Call(CallError::of(name)(error));
    let host_khz = vcpu.fd().get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?;
    if u64::from(saved_khz.abs_diff(host_khz)) * 1_000_000 > u64::from(host_khz) * TSC_TOLERANCE_PPM {
        return Err(RestoreVcpuError::TscFrequency { saved_khz, host_khz });
    }
    Ok(())
}

/// Reads the MSRs KVM lets us read; one it refuses is left out: its guest cannot have it either.
fn read_msrs(vcpu: &Vcpu, indices: &[u32]) -> Result<Vec<(u32, u64)>, CallError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entries: Vec<_> = chunk.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let Ok(mut msrs) = Msrs::from_entries(&entries) else { break };
        let done = vcpu.fd().get_msrs(&mut msrs).map_err(CallError::of("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice().iter().take(done).map(|entry| (entry.index, entry.data)));
        // KVM stops at the first it refuses.
        rest = &rest[if done < chunk.len() { done + 1 } else { done }..];
    }
    Ok(values)
}

/// Writes MSRs. One that KVM refuses is fine if it has the wanted value already (read-only ones do).
fn write_msrs(vcpu: &Vcpu, values: &[(u32, u64)]) -> Result<(), RestoreVcpuError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_PER_CALL)];
        let entries: Vec<_> = chunk
            .iter()
            .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
            .collect();
        let Ok(msrs) = Msrs::from_entries(&entries) else { break };
        let done = vcpu.fd().set_msrs(&msrs).map_err(CallError::of("KVM_SET_MSRS")).map_err(RestoreVcpuError::Call)?;
        let Some((index, value)) = chunk.get(done).copied() else {
            rest = &rest[done..];
            continue;
        };
        let held = read_msrs(vcpu, &[index]).map_err(RestoreVcpuError::Call)?;
        if held != [(index, value)] {
            return Err(RestoreVcpuError::Msr { index, value });
        }
        rest = &rest[done + 1..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saved::Section;

    fn example() -> VcpuV1 {
        VcpuV1 {
            mp_state: vec![1],
            regs: vec![2],
            sregs2: vec![3],
            xsave: vec![4],
            xcrs: vec![5],
            debug_regs: vec![6],
            lapic: vec![7],
            cpuid: vec![8],
            msrs: vec![(0x174, 9), (0x4B56_4D01, u64::MAX)],
            tsc_deadline: Some(10),
            events: vec![11],
            tsc_khz: 12,
            tsc_offset: u64::MAX,
            xsave_bytes: 4096,
            xcr0: 7,
        }
    }

    /// The golden keeps the encoding: changing it needs a new version.
    #[test]
    fn the_encoding_is_what_it_was() {
        let bytes = Section::new(0, &example()).unwrap().bytes;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../../tests/golden/saved_vcpu_v1.hex").trim_end());
    }
}
