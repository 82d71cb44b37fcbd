//! Numbers of the ioctls that a VMM makes, for filters of system calls. `kvm-ioctls` has the same numbers, but keeps
//! them to itself.
//!
//! Source: `include/uapi/linux/kvm.h`; each is documented under its name in `Documentation/virt/kvm/api.rst` section 4.
//! The kernel looks at the low 32 bits of a request (`sys_ioctl` takes an unsigned int).

use std::mem::size_of;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_device_attr, kvm_dirty_log,
    kvm_enable_cap, kvm_ioeventfd, kvm_irqchip, kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msr_list, kvm_msrs,
    kvm_pit_config, kvm_pit_state2, kvm_regs, kvm_sregs2, kvm_translation, kvm_userspace_memory_region,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// Bits of a request that tell the direction (`include/uapi/asm-generic/ioctl.h`).
const NONE: u32 = 0;
const WRITE: u32 = 1 << 30;
const READ: u32 = 2 << 30;

/// A request's number from its direction, sequence number and argument size.
const fn number(direction: u32, sequence: u32, bytes: usize) -> u32 {
    assert!(bytes < 1 << 14, "ioctl numbers have 14 bits for the size");
    #[expect(clippy::cast_possible_truncation, reason = "asserted to fit 14 bits")]
    let bytes = bytes as u32;
    direction | bytes << 16 | KVMIO << 8 | sequence
}

macro_rules! requests {
    ($($name:ident = $direction:expr, $sequence:literal, $bytes:expr;)*) => {$(
        #[doc = concat!("`", stringify!($name), "`.")]
        pub const $name: u32 = number($direction, $sequence, $bytes);
    )*};
}

requests! {
    KVM_GET_API_VERSION = NONE, 0x00, 0;
    KVM_CREATE_VM = NONE, 0x01, 0;
    KVM_GET_MSR_INDEX_LIST = READ | WRITE, 0x02, size_of::<kvm_msr_list>();
    KVM_CHECK_EXTENSION = NONE, 0x03, 0;
    KVM_GET_VCPU_MMAP_SIZE = NONE, 0x04, 0;
    KVM_GET_SUPPORTED_CPUID = READ | WRITE, 0x05, size_of::<kvm_cpuid2>();
    KVM_CREATE_VCPU = NONE, 0x41, 0;
    KVM_SET_USER_MEMORY_REGION = WRITE, 0x46, size_of::<kvm_userspace_memory_region>();
    KVM_SET_TSS_ADDR = NONE, 0x47, 0;
    KVM_SET_IDENTITY_MAP_ADDR = WRITE, 0x48, size_of::<u64>();
    KVM_CREATE_IRQCHIP = NONE, 0x60, 0;
    KVM_GET_IRQCHIP = READ | WRITE, 0x62, size_of::<kvm_irqchip>();
    KVM_SET_IRQCHIP = READ, 0x63, size_of::<kvm_irqchip>();
    KVM_IRQFD = WRITE, 0x76, size_of::<kvm_irqfd>();
    KVM_CREATE_PIT2 = WRITE, 0x77, size_of::<kvm_pit_config>();
    KVM_IOEVENTFD = WRITE, 0x79, size_of::<kvm_ioeventfd>();
    KVM_SET_CLOCK = WRITE, 0x7b, size_of::<kvm_clock_data>();
    KVM_GET_CLOCK = READ, 0x7c, size_of::<kvm_clock_data>();
    KVM_RUN = NONE, 0x80, 0;
    KVM_GET_REGS = READ, 0x81, size_of::<kvm_regs>();
    KVM_SET_REGS = WRITE, 0x82, size_of::<kvm_regs>();
    KVM_TRANSLATE = READ | WRITE, 0x85, size_of::<kvm_translation>();
    KVM_GET_MSRS = READ | WRITE, 0x88, size_of::<kvm_msrs>();
    KVM_SET_MSRS = WRITE, 0x89, size_of::<kvm_msrs>();
    KVM_GET_LAPIC = READ, 0x8e, size_of::<kvm_lapic_state>();
    KVM_SET_LAPIC = WRITE, 0x8f, size_of::<kvm_lapic_state>();
    KVM_SET_CPUID2 = WRITE, 0x90, size_of::<kvm_cpuid2>();
    KVM_GET_CPUID2 = READ | WRITE, 0x91, size_of::<kvm_cpuid2>();
    KVM_GET_MP_STATE = READ, 0x98, size_of::<kvm_mp_state>();
    KVM_SET_MP_STATE = WRITE, 0x99, size_of::<kvm_mp_state>();
    KVM_GET_PIT2 = READ, 0x9f, size_of::<kvm_pit_state2>();
    KVM_SET_PIT2 = WRITE, 0xa0, size_of::<kvm_pit_state2>();
    KVM_GET_VCPU_EVENTS = READ, 0x9f, size_of::<kvm_vcpu_events>();
    KVM_SET_VCPU_EVENTS = WRITE, 0xa0, size_of::<kvm_vcpu_events>();
    KVM_GET_DEBUGREGS = READ, 0xa1, size_of::<kvm_debugregs>();
    KVM_SET_DEBUGREGS = WRITE, 0xa2, size_of::<kvm_debugregs>();
    KVM_SET_TSC_KHZ = NONE, 0xa2, 0;
    KVM_GET_TSC_KHZ = NONE, 0xa3, 0;
    KVM_ENABLE_CAP = WRITE, 0xa3, size_of::<kvm_enable_cap>();
    KVM_SET_XSAVE = WRITE, 0xa5, size_of::<kvm_xsave>();
    KVM_GET_XCRS = READ, 0xa6, size_of::<kvm_xcrs>();
    KVM_SET_XCRS = WRITE, 0xa7, size_of::<kvm_xcrs>();
    KVM_KVMCLOCK_CTRL = NONE, 0xad, 0;
    KVM_GET_SREGS2 = READ, 0xcc, size_of::<kvm_sregs2>();
    KVM_SET_SREGS2 = WRITE, 0xcd, size_of::<kvm_sregs2>();
    KVM_GET_XSAVE2 = READ, 0xcf, size_of::<kvm_xsave>();
    KVM_GET_DIRTY_LOG = WRITE, 0x42, size_of::<kvm_dirty_log>();
    KVM_CLEAR_DIRTY_LOG = READ | WRITE, 0xc0, size_of::<kvm_clear_dirty_log>();
    KVM_SET_DEVICE_ATTR = WRITE, 0xe1, size_of::<kvm_device_attr>();
    KVM_GET_DEVICE_ATTR = WRITE, 0xe2, size_of::<kvm_device_attr>();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        // As strace(1) prints them with -X raw on x86-64.
        let known = [
            (KVM_GET_API_VERSION, 0xae00),
            (KVM_CREATE_VCPU, 0xae41),
            (KVM_GET_DIRTY_LOG, 0x4010_ae42),
            (KVM_SET_USER_MEMORY_REGION, 0x4020_ae46),
            (KVM_SET_IRQCHIP, 0x8208_ae63),
            (KVM_IRQFD, 0x4020_ae76),
            (KVM_IOEVENTFD, 0x4040_ae79),
            (KVM_RUN, 0xae80),
            (KVM_GET_REGS, 0x8090_ae81),
            (KVM_GET_MSRS, 0xc008_ae88),
            (KVM_SET_CPUID2, 0x4008_ae90),
            (KVM_GET_SREGS2, 0x8140_aecc),
            (KVM_GET_XSAVE2, 0x9000_aecf),
            (KVM_CLEAR_DIRTY_LOG, 0xc018_aec0),
        ];
        for (found, wanted) in known {
            assert_eq!(found, wanted, "{found:#x} is not {wanted:#x}");
        }
    }
}
