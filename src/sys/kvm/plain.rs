//! KVM's structs as bytes of one exact length. This is what saved state holds: the bindings' own serde reads short
//! input as zeros, so nothing but the exact length is accepted here.
#![expect(unsafe_code, reason = "views of C structs as bytes; sizes and the absence of padding are asserted per type")]

use std::mem::size_of;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_pit_state2, kvm_regs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs,
};

/// Bytes that are not a value of the wanted struct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {found} bytes, exactly {wanted} are a value")]
pub struct WrongLength {
    /// The C struct's name.
    pub name: &'static str,
    /// Bytes given.
    pub found: usize,
    /// Bytes needed.
    pub wanted: usize,
}

mod sealed {
    /// # Safety
    /// The type is `repr(C)`, made of integers only, without padding between or after its fields, and valid for
    /// every pattern of bytes.
    pub unsafe trait Plain: Copy {}
}

/// A KVM struct that is only numbers.
pub trait Plain: sealed::Plain {
    /// The C struct's name.
    const NAME: &'static str;

    /// The struct's bytes.
    fn to_bytes(&self) -> Vec<u8> {
        let start: *const u8 = std::ptr::from_ref(self).cast();
        // SAFETY: `start` is valid for reads of `size_of::<Self>()` bytes for the life of `self`, bytes need no
        // alignment, and every byte is initialised since a `sealed::Plain` has no padding.
        unsafe { std::slice::from_raw_parts(start, size_of::<Self>()) }.to_vec()
    }

    /// The struct with these bytes; any other number of bytes is refused.
    fn from_bytes(bytes: &[u8]) -> Result<Self, WrongLength> {
        if bytes.len() != size_of::<Self>() {
            return Err(WrongLength { name: Self::NAME, found: bytes.len(), wanted: size_of::<Self>() });
        }
        // SAFETY: `bytes` is valid for reads of `size_of::<Self>()` bytes (checked above), the read is unaligned,
        // and every pattern of bytes is a valid `sealed::Plain`.
        Ok(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

/// Declares a struct plain. The size is written down because it is part of the saved format; the sum of the fields in
/// `include/uapi/asm/kvm.h` equals it, which is the absence of padding.
macro_rules! plain {
    ($($name:ident: $bytes:literal),* $(,)?) => {$(
        const _: () = assert!(size_of::<$name>() == $bytes);
        // SAFETY: bindgen's `repr(C)` struct of integers and arrays of them (`kvm_irqchip` holds a union whose
        // 512-byte member covers it); reserved fields are explicit, so the asserted size is the sum of the fields
        // and there is no padding; all patterns of bytes are valid integers.
        unsafe impl sealed::Plain for $name {}
        impl Plain for $name {
            const NAME: &'static str = stringify!($name);
        }
    )*};
}

plain! {
    kvm_regs: 144,
    kvm_sregs2: 320,
    kvm_lapic_state: 1024,
    kvm_mp_state: 4,
    kvm_vcpu_events: 64,
    kvm_debugregs: 128,
    kvm_xcrs: 392,
    kvm_cpuid_entry2: 40,
    kvm_irqchip: 520,
    kvm_pit_state2: 112,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_length_is_a_value() {
        let regs = kvm_regs { rax: 1, rip: 0x1000, rflags: 2, ..Default::default() };
        let bytes = regs.to_bytes();
        assert_eq!(kvm_regs::from_bytes(&bytes).unwrap(), regs);
        assert!(kvm_regs::from_bytes(&bytes[1..]).is_err());
        assert!(kvm_regs::from_bytes(&[]).is_err());
        let mut longer = bytes;
        longer.push(0);
        assert_eq!(
            kvm_regs::from_bytes(&longer).unwrap_err(),
            WrongLength { name: "kvm_regs", found: 145, wanted: 144 }
        );
    }
}
