//! The lines of ioctl(2): one for each request.

use super::When::Is;
use super::{BUILDING, CONTROL, Class, DEVICES, FILL, Line, STREAM, VCPU, VOLUME, line};
use crate::sys::kvm::requests as kvm;
use crate::sys::{tap, userfault};

const fn request(number: u32, classes: Class, reason: &'static str) -> Line {
    line(libc::SYS_ioctl, Is(1, number), classes, reason)
}

/// `FIONBIO` (ioctl_list(2)): its number has 16 bits.
#[expect(clippy::cast_possible_truncation, reason = "0x5421")]
const FIONBIO: u32 = libc::FIONBIO as u32;

pub(super) const LINES: &[Line] = &[
    // The guest runs.
    request(kvm::KVM_RUN, VCPU, "runs the guest"),
    request(kvm::KVM_KVMCLOCK_CTRL, VCPU, "tells the guest's watchdogs that it stood still"),
    request(kvm::KVM_TRANSLATE, VCPU, "names the instruction that KVM could not carry out"),
    // A vCPU's state: set while a machine is built, read by its thread when it is saved.
    request(kvm::KVM_GET_REGS, VCPU, "state"),
    request(kvm::KVM_SET_REGS, BUILDING, "first or saved state"),
    request(kvm::KVM_GET_SREGS2, BUILDING.and(VCPU), "state"),
    request(kvm::KVM_SET_SREGS2, BUILDING, "first or saved state"),
    request(kvm::KVM_GET_LAPIC, BUILDING.and(VCPU), "state"),
    request(kvm::KVM_SET_LAPIC, BUILDING, "first or saved state"),
    request(kvm::KVM_GET_MSRS, BUILDING.and(VCPU), "state"),
    request(kvm::KVM_SET_MSRS, BUILDING.and(VCPU), "first or saved state; the TSC as a machine goes on"),
    request(kvm::KVM_GET_CPUID2, VCPU, "state"),
    request(kvm::KVM_SET_CPUID2, BUILDING, "the guest's processor"),
    request(kvm::KVM_GET_MP_STATE, VCPU, "state"),
    request(kvm::KVM_SET_MP_STATE, BUILDING, "saved state"),
    request(kvm::KVM_GET_VCPU_EVENTS, VCPU, "state"),
    request(kvm::KVM_SET_VCPU_EVENTS, BUILDING, "saved state"),
    request(kvm::KVM_GET_DEBUGREGS, VCPU, "state"),
    request(kvm::KVM_SET_DEBUGREGS, BUILDING, "saved state"),
    request(kvm::KVM_GET_XSAVE2, VCPU, "state"),
    request(kvm::KVM_SET_XSAVE, BUILDING, "saved state"),
    request(kvm::KVM_GET_XCRS, VCPU, "state"),
    request(kvm::KVM_SET_XCRS, BUILDING, "saved state"),
    request(kvm::KVM_GET_TSC_KHZ, BUILDING.and(VCPU), "state"),
    request(kvm::KVM_SET_TSC_KHZ, BUILDING, "saved state"),
    request(kvm::KVM_GET_DEVICE_ATTR, BUILDING.and(VCPU), "the TSC's offset"),
    request(kvm::KVM_SET_DEVICE_ATTR, BUILDING.and(VCPU), "the TSC's offset as a machine goes on"),
    // The VM's state.
    request(kvm::KVM_GET_CLOCK, BUILDING.and(CONTROL), "kvmclock at a pause"),
    request(kvm::KVM_SET_CLOCK, BUILDING.and(CONTROL), "kvmclock as a machine goes on"),
    request(kvm::KVM_GET_IRQCHIP, CONTROL, "state"),
    request(kvm::KVM_SET_IRQCHIP, BUILDING, "saved state"),
    request(kvm::KVM_GET_PIT2, CONTROL, "state"),
    request(kvm::KVM_SET_PIT2, BUILDING, "saved state"),
    // A machine is made.
    request(kvm::KVM_GET_API_VERSION, BUILDING, "is this KVM?"),
    request(kvm::KVM_CHECK_EXTENSION, BUILDING.and(VCPU), "what it can do; the size of a vCPU's state"),
    request(kvm::KVM_GET_SUPPORTED_CPUID, BUILDING, "what processor a guest can be given"),
    request(kvm::KVM_GET_MSR_INDEX_LIST, BUILDING, "which registers are state"),
    request(kvm::KVM_GET_VCPU_MMAP_SIZE, BUILDING, "size of the page shared with a vCPU"),
    request(kvm::KVM_CREATE_VM, BUILDING, "the machine"),
    request(kvm::KVM_CREATE_VCPU, BUILDING, "its vCPUs"),
    request(kvm::KVM_SET_USER_MEMORY_REGION, BUILDING.and(STREAM), "its memory; KVM's dirty log on and off"),
    request(kvm::KVM_GET_DIRTY_LOG, STREAM, "which pages the guest wrote"),
    request(kvm::KVM_CLEAR_DIRTY_LOG, STREAM, "which pages it writes from here on"),
    request(kvm::KVM_SET_TSS_ADDR, BUILDING, "pages that KVM needs on some processors"),
    request(kvm::KVM_SET_IDENTITY_MAP_ADDR, BUILDING, "pages that KVM needs on some processors"),
    request(kvm::KVM_CREATE_IRQCHIP, BUILDING, "interrupt controllers"),
    request(kvm::KVM_CREATE_PIT2, BUILDING, "timer"),
    request(kvm::KVM_ENABLE_CAP, BUILDING, "the dirty log's manual mode"),
    request(kvm::KVM_IRQFD, BUILDING, "a device's interrupt line"),
    request(kvm::KVM_IOEVENTFD, BUILDING, "a queue's notification"),
    // Memory that is not all here.
    request(userfault::REQUEST_NEW, BUILDING, "tells of threads that wait for memory"),
    request(userfault::REQUEST_API, BUILDING, "which version of that"),
    request(userfault::REQUEST_REGISTER, BUILDING, "for which memory"),
    request(userfault::REQUEST_WAKE, FILL, "memory is here: who waits goes on"),
    // Taps and sockets.
    request(tap::REQUEST_HEADER_BYTES, BUILDING.and(CONTROL), "a tap, or the one in a lost one's place"),
    request(tap::REQUEST_OFFLOADS, BUILDING.and(CONTROL).and(DEVICES).and(VCPU), "what the guest's driver takes"),
    request(
        FIONBIO,
        BUILDING.and(CONTROL).and(DEVICES).and(STREAM).and(FILL).and(VOLUME),
        "sockets that were handed over, and their connections",
    ),
];
