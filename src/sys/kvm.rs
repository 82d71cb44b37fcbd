//! KVM: a VM that owns the memory its guest runs in, and what `kvm-ioctls` leaves unsafe or lacks (memory slots, dirty
//! log into a reused buffer, manual re-protection, SREGS2, xsave with a checked length, TSC offset, details of exits).
//!
//! [`Vm`] keeps guest memory mapped and every [`Vcpu`] keeps its [`Vm`]: no guest can run on memory that is gone.
//! Everything `kvm-ioctls` offers as safe is reached through [`Vm::fd`] and [`Vcpu::fd`].
#![expect(unsafe_code, reason = "ioctls that kvm-ioctls does not wrap or leaves unsafe")]

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::raw::c_ulong;
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SREGS2, KVM_CAP_XSAVE2,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVMIO,
    kvm_clear_dirty_log, kvm_dirty_log, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref};

use super::ram::GuestRam;
use crate::units::{PAGE_BYTES, PageCount};

pub mod plain;
pub mod requests;
mod vcpu;

pub use vcpu::{BoundVcpu, EmulationFailure, InternalErrorDetail, RunDetail, Vcpu};

/// Pages in one word of a dirty log; KVM re-protects in multiples of it.
pub const PAGES_PER_WORD: u64 = 64;

/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`, api.rst section 4.117.
const KVM_CLEAR_DIRTY_LOG: c_ulong = number(_IOC_READ | _IOC_WRITE, 0xc0, size_of::<kvm_clear_dirty_log>());

/// `_IOW(KVMIO, 0x42, struct kvm_dirty_log)`, api.rst section 4.8.
const KVM_GET_DIRTY_LOG: c_ulong = number(_IOC_WRITE, 0x42, size_of::<kvm_dirty_log>());

/// An ioctl's number from its direction, sequence number and argument size.
const fn number(direction: u32, sequence: u32, size: usize) -> c_ulong {
    assert!(size < 1 << 14, "ioctl numbers have 14 bits for the size");
    #[expect(clippy::cast_possible_truncation, reason = "asserted to fit 14 bits")]
    ioctl_expr(direction, KVMIO, sequence, size as u32)
}

/// A call into KVM that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}")]
pub struct CallError {
    /// The ioctl, by its name in the kernel's documentation.
    pub call: &'static str,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl CallError {
    /// Names the call a `kvm-ioctls` error came from.
    pub fn of(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self { call, source: error.into() }
    }

    fn last(call: &'static str) -> Self {
        Self { call, source: io::Error::last_os_error() }
    }
}

/// Why a file is not a usable `/dev/kvm`.
#[derive(Debug, thiserror::Error)]
pub enum OpenKvmError {
    /// It does not answer KVM's first question.
    #[error("the file handed in is not /dev/kvm")]
    NotKvm,
    /// KVM of another era.
    #[error("KVM has API version {found}, {KVM_API_VERSION} is needed")]
    ApiVersion {
        /// The version it has.
        found: i32,
    },
    /// A capability that every supported kernel (6.1 and later) has is missing.
    #[error("KVM lacks {name}")]
    Lacks {
        /// The capability, by its name in the kernel's documentation.
        name: &'static str,
    },
}

/// What this host's KVM can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Bytes of a vCPU's xsave area.
    pub xsave_bytes: usize,
    /// Whether pages of the dirty log can be re-protected apart from reading it, beginning with all set.
    pub manual_dirty_log: bool,
    /// Most vCPUs of a VM.
    pub vcpus_max: usize,
}

/// The system handle made from an open `/dev/kvm`.
pub fn system(device: File) -> Result<Kvm, OpenKvmError> {
    // SAFETY: the descriptor is open and owned (`into_raw_fd` gave up the only owner), and `Kvm` becomes its owner.
    let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
    match kvm.get_api_version() {
        found if u32::try_from(found) == Ok(KVM_API_VERSION) => Ok(kvm),
        found if found < 0 => Err(OpenKvmError::NotKvm),
        found => Err(OpenKvmError::ApiVersion { found }),
    }
}

/// What `kvm` can do; refuses one without what the VMM cannot do without.
pub fn capabilities(kvm: &Kvm) -> Result<Capabilities, OpenKvmError> {
    let value = |capability: u32| kvm.check_extension_raw(c_ulong::from(capability));
    for (capability, name) in [(KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"), (KVM_CAP_SREGS2, "KVM_CAP_SREGS2")] {
        if value(capability) <= 0 {
            return Err(OpenKvmError::Lacks { name });
        }
    }
    let xsave_bytes = usize::try_from(value(KVM_CAP_XSAVE2)).unwrap_or(0).max(vcpu::XSAVE_BYTES_MIN);
    let manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let offered = u32::try_from(value(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)).unwrap_or(0);
    Ok(Capabilities { xsave_bytes, manual_dirty_log: offered & manual == manual, vcpus_max: kvm.get_max_vcpus() })
}

/// A VM and the memory its guest runs in. Memory slot i is region i.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    // After `fd`: dropped later. vCPUs hold the whole `Vm`.
    ram: GuestRam,
    capabilities: Capabilities,
}

impl Vm {
    /// A VM whose guest-physical memory is `ram`.
    pub fn new(kvm: &Kvm, capabilities: Capabilities, ram: GuestRam) -> Result<Arc<Self>, CallError> {
        let fd = kvm.create_vm().map_err(CallError::of("KVM_CREATE_VM"))?;
        let vm = Self { fd, ram, capabilities };
        if capabilities.manual_dirty_log {
            let mut enable = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            enable.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
            vm.fd.enable_cap(&enable).map_err(CallError::of("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"))?;
        }
        for slot in 0..vm.ram.num_regions() {
            vm.set_slot(slot, 0)?;
        }
        Ok(Arc::new(vm))
    }

    /// The VM, for every call `kvm-ioctls` offers as safe.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What the host's KVM can do.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Whether KVM keeps a log of the pages the guest writes, for all memory slots.
    pub fn set_dirty_logging(&self, on: bool) -> Result<(), CallError> {
        let flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        (0..self.ram.num_regions()).try_for_each(|slot| self.set_slot(slot, flags))
    }

    fn set_slot(&self, slot: usize, flags: u32) -> Result<(), CallError> {
        const CALL: &str = "KVM_SET_USER_MEMORY_REGION";
        let missing = || CallError { call: CALL, source: io::ErrorKind::NotFound.into() };
        let region = self.ram.iter().nth(slot).ok_or_else(missing)?;
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|_| missing())?;
        let plan = kvm_userspace_memory_region {
            slot: u32::try_from(slot).map_err(|_| missing())?,
            flags,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host.expose_provenance() as u64,
        };
        // SAFETY: the host range is the whole of a mapped region of `self.ram`, which stays mapped until this `Vm` is
        // dropped; every `Vcpu` holds the `Vm`, so the guest does not run after that. Regions of a `GuestRam` do not
        // overlap.
        unsafe { self.fd.set_user_memory_region(plan) }.map_err(CallError::of(CALL))
    }

    /// Words in the dirty log of a slot: one bit per page. `None` when there is no such slot.
    pub fn log_words(&self, slot: usize) -> Option<usize> {
        let region = self.ram.iter().nth(slot)?;
        usize::try_from(region.len().div_ceil(PAGE_BYTES * PAGES_PER_WORD)).ok()
    }

    /// Copies the log of a slot into `log`, whose length becomes that of the log. With manual re-protection the pages
    /// stay logged until [`Vm::clear_dirty_log`]; without it, they are forgotten by reading.
    pub fn dirty_log(&self, slot: usize, log: &mut Vec<u64>) -> Result<(), CallError> {
        const CALL: &str = "KVM_GET_DIRTY_LOG";
        let missing = || CallError { call: CALL, source: io::ErrorKind::NotFound.into() };
        log.clear();
        log.resize(self.log_words(slot).ok_or_else(missing)?, 0);
        let mut request =
            kvm_dirty_log { slot: u32::try_from(slot).map_err(|_| missing())?, ..kvm_dirty_log::default() };
        request.__bindgen_anon_1.dirty_bitmap = log.as_mut_ptr().cast();
        // SAFETY: `self.fd` is a VM, the argument is the ioctl's own struct, and `dirty_bitmap` is valid for writes
        // of one bit per page of the slot rounded up to 64 bits, which is how `log` was sized above; slots never
        // change their size.
        match unsafe { ioctl_with_ref(&self.fd, KVM_GET_DIRTY_LOG, &request) } {
            0 => Ok(()),
            _ => Err(CallError::last(CALL)),
        }
    }

    /// Re-protects the pages of a slot that are set in `bits`, beginning with page `64 * first_word`: later writes to
    /// them are logged again. Call it before reading the pages.
    pub fn clear_dirty_log(&self, slot: usize, first_word: usize, bits: &[u64]) -> Result<(), CallError> {
        const CALL: &str = "KVM_CLEAR_DIRTY_LOG";
        let refused = |kind: io::ErrorKind| CallError { call: CALL, source: kind.into() };
        let words = self.log_words(slot).ok_or_else(|| refused(io::ErrorKind::NotFound))?;
        let pages = self.slot_pages(slot).ok_or_else(|| refused(io::ErrorKind::NotFound))?.0;
        let end = first_word.checked_add(bits.len()).filter(|end| *end <= words);
        let end = end.ok_or_else(|| refused(io::ErrorKind::InvalidInput))?;
        if bits.is_empty() {
            return Ok(());
        }
        // All words but a slot's last are whole; the last may end inside a word.
        let first_page = first_word as u64 * PAGES_PER_WORD;
        let end_page = (end as u64 * PAGES_PER_WORD).min(pages);
        let mut request = kvm_clear_dirty_log {
            slot: u32::try_from(slot).map_err(|_| refused(io::ErrorKind::NotFound))?,
            num_pages: u32::try_from(end_page - first_page).map_err(|_| refused(io::ErrorKind::InvalidInput))?,
            first_page,
            ..kvm_clear_dirty_log::default()
        };
        request.__bindgen_anon_1.dirty_bitmap = bits.as_ptr().cast_mut().cast();
        // SAFETY: `self.fd` is a VM, the argument is the ioctl's own struct, and `dirty_bitmap` is valid for reads of
        // `num_pages` bits rounded up to 64: `num_pages` is at most 64 per word of `bits`. The kernel only reads it.
        match unsafe { ioctl_with_mut_ref(&self.fd, KVM_CLEAR_DIRTY_LOG, &mut request) } {
            0 => Ok(()),
            _ => Err(CallError::last(CALL)),
        }
    }

    fn slot_pages(&self, slot: usize) -> Option<PageCount> {
        Some(PageCount(self.ram.iter().nth(slot)?.len() / PAGE_BYTES))
    }

    /// A vCPU; `index` is its APIC id as well.
    pub fn create_vcpu(self: &Arc<Self>, index: u8) -> Result<Vcpu, CallError> {
        let fd = self.fd.create_vcpu(u64::from(index)).map_err(CallError::of("KVM_CREATE_VCPU"))?;
        Ok(Vcpu::new(fd, Arc::clone(self)))
    }
}
