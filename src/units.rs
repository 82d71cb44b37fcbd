//! Quantities with their units in the type: bytes, pages, guest-physical addresses, rates.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

mod rate;

pub use rate::{BURST_BYTES, BYTES_PER_S, FRAMES, FlowLimits, NetLimitError, NetLimits, Rate};

/// Bytes in a page of guest memory. x86-64's base page; the unit of dirty logs and of bundles.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes in one MiB.
pub const MIB: u64 = 1 << 20;

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Bytes(pub u64);

impl Bytes {
    /// This many MiB; `None` when that does not fit 64 bits.
    pub const fn from_mib(mib: u64) -> Option<Self> {
        match mib.checked_mul(MIB) {
            Some(bytes) => Some(Self(bytes)),
            None => None,
        }
    }

    /// Whole pages that hold this many bytes: rounds up.
    pub const fn pages_up(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_BYTES))
    }

    /// Whole pages inside this many bytes: rounds down.
    pub const fn pages_down(self) -> PageCount {
        PageCount(self.0 / PAGE_BYTES)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const GIB: u64 = 1 << 30;
        match self.0 {
            bytes if bytes >= GIB && bytes.is_multiple_of(GIB) => write!(out, "{} GiB", bytes / GIB),
            bytes if bytes >= MIB && bytes.is_multiple_of(MIB) => write!(out, "{} MiB", bytes / MIB),
            bytes if bytes >= 1024 && bytes.is_multiple_of(1024) => write!(out, "{} KiB", bytes / 1024),
            bytes => write!(out, "{bytes} bytes"),
        }
    }
}

/// A number of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct PageCount(pub u64);

impl PageCount {
    /// Bytes in this many pages; `None` when that does not fit 64 bits.
    pub const fn bytes(self) -> Option<Bytes> {
        match self.0.checked_mul(PAGE_BYTES) {
            Some(bytes) => Some(Bytes(bytes)),
            None => None,
        }
    }
}

/// The number of a page of guest-physical memory: address divided by [`PAGE_BYTES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageIndex(pub u64);

/// A guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestPhys(pub u64);

impl GuestPhys {
    /// The page this address lies in.
    pub const fn page(self) -> PageIndex {
        PageIndex(self.0 / PAGE_BYTES)
    }
}

impl fmt::Display for GuestPhys {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_round_as_they_say() {
        assert_eq!(Bytes(PAGE_BYTES + 1).pages_up(), PageCount(2));
        assert_eq!(Bytes(PAGE_BYTES + 1).pages_down(), PageCount(1));
        assert_eq!(Bytes(0).pages_up(), PageCount(0));
        assert_eq!(PageCount(u64::MAX).bytes(), None);
        assert_eq!(Bytes::from_mib(u64::MAX), None);
    }

    #[test]
    fn bytes_print_in_their_largest_whole_unit() {
        assert_eq!(Bytes(128 * MIB).to_string(), "128 MiB");
        assert_eq!(Bytes(1 << 31).to_string(), "2 GiB");
        assert_eq!(Bytes(4097).to_string(), "4097 bytes");
    }
}
