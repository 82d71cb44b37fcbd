//! One vCPU: running it on its thread, and the state calls `kvm-ioctls` lacks.
#![expect(unsafe_code, reason = "kvm_run's unions, xsave buffers of run-time length, ioctls that kvm-ioctls lacks")]

use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::raw::c_ulong;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Xsave,
    kvm_device_attr, kvm_run, kvm_sregs2,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_with_mut_ref, ioctl_with_ref};

use super::{CallError, Vm, number};
use crate::sys::signal;

/// Bytes of an xsave area without extended features: `struct kvm_xsave` (api.rst section 4.42).
pub(super) const XSAVE_BYTES_MIN: usize = 4096;

/// `_IOR(KVMIO, 0xcc, struct kvm_sregs2)`, api.rst section 4.131.
const KVM_GET_SREGS2: c_ulong = number(_IOC_READ, 0xcc, size_of::<kvm_sregs2>());

/// `_IOW(KVMIO, 0xcd, struct kvm_sregs2)`, api.rst section 4.132.
const KVM_SET_SREGS2: c_ulong = number(_IOC_WRITE, 0xcd, size_of::<kvm_sregs2>());

/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`, api.rst section 4.80; on a vCPU: devices/vcpu.rst section 4.
const KVM_SET_DEVICE_ATTR: c_ulong = number(_IOC_WRITE, 0xe1, size_of::<kvm_device_attr>());

/// `_IOW(KVMIO, 0xe2, struct kvm_device_attr)`, api.rst section 4.80.
const KVM_GET_DEVICE_ATTR: c_ulong = number(_IOC_WRITE, 0xe2, size_of::<kvm_device_attr>());

/// A vCPU that no thread runs yet. Keeps its [`Vm`].
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
    // After `fd`: dropped later, so that guest memory stays mapped while the vCPU exists.
    vm: Arc<Vm>,
}

/// What KVM said about an internal error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalErrorDetail {
    /// `KVM_INTERNAL_ERROR_*`.
    pub suberror: u32,
    /// KVM's own words, as many as it gave.
    pub words: Vec<u64>,
    /// For a failed emulation with its bytes known: the instruction.
    pub emulation: Option<EmulationFailure>,
}

/// An instruction KVM could not emulate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmulationFailure {
    /// Its first bytes.
    pub instruction: Vec<u8>,
}

/// What `kvm-ioctls` leaves out of an exit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunDetail {
    /// For a port access: bytes of one operand (string instructions carry several in one exit).
    pub operand_bytes: usize,
    /// For an internal error: what KVM said.
    pub internal_error: Option<InternalErrorDetail>,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, vm: Arc<Vm>) -> Self {
        Self { fd, vm }
    }

    /// The vCPU, for every call `kvm-ioctls` offers as safe.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Its VM.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// Segment, control and page-directory registers.
    pub fn sregs2(&self) -> Result<kvm_sregs2, CallError> {
        let mut sregs = kvm_sregs2::default();
        // SAFETY: `self.fd` is a vCPU and the argument is the ioctl's own struct, valid for writes.
        match unsafe { ioctl_with_mut_ref(&self.fd, KVM_GET_SREGS2, &mut sregs) } {
            0 => Ok(sregs),
            _ => Err(CallError::last("KVM_GET_SREGS2")),
        }
    }

    /// Sets what [`Vcpu::sregs2`] gets. The kernel checks the values.
    pub fn set_sregs2(&self, sregs: &kvm_sregs2) -> Result<(), CallError> {
        // SAFETY: `self.fd` is a vCPU and the argument is the ioctl's own struct, which the kernel only reads.
        match unsafe { ioctl_with_ref(&self.fd, KVM_SET_SREGS2, sregs) } {
            0 => Ok(()),
            _ => Err(CallError::last("KVM_SET_SREGS2")),
        }
    }

    /// The xsave area: [`super::Capabilities::xsave_bytes`] bytes.
    pub fn xsave(&self) -> Result<Vec<u8>, CallError> {
        const CALL: &str = "KVM_GET_XSAVE2";
        let mut xsave = self.empty_xsave(CALL)?;
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says (`empty_xsave` makes it so), which is what the kernel
        // writes; dynamic xsave features, which could make it longer, are never requested by this process.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(CallError::of(CALL))?;
        let fixed = xsave.as_fam_struct_ref().xsave.region;
        let mut bytes: Vec<u8> = fixed.iter().chain(xsave.as_slice()).flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(self.vm.capabilities().xsave_bytes);
        Ok(bytes)
    }

    /// Sets the xsave area; refuses a length other than this host's.
    pub fn set_xsave(&self, bytes: &[u8]) -> Result<(), CallError> {
        const CALL: &str = "KVM_SET_XSAVE";
        if bytes.len() != self.vm.capabilities().xsave_bytes {
            return Err(CallError { call: CALL, source: io::ErrorKind::InvalidInput.into() });
        }
        let mut xsave = self.empty_xsave(CALL)?;
        let words = bytes.chunks(size_of::<u32>()).map(|chunk| {
            let mut word = [0; size_of::<u32>()];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        });
        let (fixed, rest): (Vec<_>, Vec<_>) = words.enumerate().partition(|(at, _)| *at < XSAVE_BYTES_MIN / 4);
        // SAFETY: only the content of the fixed part is changed; the length field stays as the wrapper set it.
        let region = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
        fixed.into_iter().for_each(|(at, word)| region[at] = word);
        let extra = xsave.as_mut_slice();
        rest.into_iter().zip(extra).for_each(|((_, word), slot)| *slot = word);
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says, which is what the kernel reads. The kernel checks the
        // values.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(CallError::of(CALL))
    }

    fn empty_xsave(&self, call: &'static str) -> Result<Xsave, CallError> {
        let extra = self.vm.capabilities().xsave_bytes.saturating_sub(XSAVE_BYTES_MIN);
        Xsave::new(extra.div_ceil(size_of::<u32>()))
            .map_err(|_| CallError { call, source: io::ErrorKind::OutOfMemory.into() })
    }

    /// What is added to the host's TSC to give the guest's.
    pub fn tsc_offset(&self) -> Result<u64, CallError> {
        let mut offset = 0_u64;
        let attribute = tsc_offset_attribute((&raw mut offset).expose_provenance() as u64);
        // SAFETY: `self.fd` is a vCPU, the argument is the ioctl's own struct, and the attribute's address is valid
        // for writes of the 8 bytes this attribute has.
        match unsafe { ioctl_with_ref(&self.fd, KVM_GET_DEVICE_ATTR, &attribute) } {
            0 => Ok(offset),
            _ => Err(CallError::last("KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)")),
        }
    }

    /// Sets what [`Vcpu::tsc_offset`] gets.
    pub fn set_tsc_offset(&self, offset: u64) -> Result<(), CallError> {
        let attribute = tsc_offset_attribute((&raw const offset).expose_provenance() as u64);
        // SAFETY: `self.fd` is a vCPU, the argument is the ioctl's own struct, and the attribute's address is valid
        // for reads of the 8 bytes this attribute has.
        match unsafe { ioctl_with_ref(&self.fd, KVM_SET_DEVICE_ATTR, &attribute) } {
            0 => Ok(()),
            _ => Err(CallError::last("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)")),
        }
    }

    /// Ties the vCPU to the calling thread, where the kick signal makes it leave guest mode.
    pub fn bind(mut self) -> BoundVcpu {
        let run = std::ptr::from_mut(self.fd.get_kvm_run());
        // SAFETY: `run` points to the mapped `kvm_run` of this vCPU, valid until the vCPU is dropped; the field is one
        // byte, so aligned; all accesses from here on (the kernel's, the handler's, ours) are single-byte.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut (*run).immediate_exit) };
        signal::bind(std::ptr::from_ref(immediate_exit));
        BoundVcpu { vcpu: self, run, _this_thread: PhantomData }
    }
}

fn tsc_offset_attribute(address: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: u64::from(KVM_VCPU_TSC_OFFSET), addr: address }
}

/// A vCPU tied to this thread.
#[derive(Debug)]
pub struct BoundVcpu {
    vcpu: Vcpu,
    run: *mut kvm_run,
    _this_thread: PhantomData<*const ()>,
}

impl BoundVcpu {
    /// The vCPU, for its state.
    pub fn vcpu(&self) -> &Vcpu {
        &self.vcpu
    }

    /// Enters guest mode until the guest needs something, an error happens, or the kick signal arrives (`Interrupted`;
    /// so does a vCPU that is not started yet, as `WouldBlock`).
    pub fn run(&mut self) -> io::Result<(VcpuExit<'_>, RunDetail)> {
        let exit = self.vcpu.fd.run()?;
        // SAFETY: `run` points to the mapped `kvm_run` of `self.vcpu`, and the kernel does not write it outside
        // KVM_RUN.
        let reason = unsafe { (*self.run).exit_reason };
        let mut detail = RunDetail::default();
        if reason == KVM_EXIT_IO {
            // SAFETY: as above; the exit reason says that `io` is the union's valid member.
            detail.operand_bytes = usize::from(unsafe { (*self.run).__bindgen_anon_1.io.size });
        }
        if reason == KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: as above; the exit reason says that `internal` is the union's valid member.
            let internal = unsafe { (*self.run).__bindgen_anon_1.internal };
            // SAFETY: as above; `emulation_failure` overlays `internal` and is only numbers, and it is used only when
            // the suberror and flags say that it is meant.
            let failure = unsafe { (*self.run).__bindgen_anon_1.emulation_failure };
            // SAFETY: the union has this one member.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
            let has_bytes = internal.suberror == KVM_INTERNAL_ERROR_EMULATION
                && count > 0
                && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
            let length = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            detail.internal_error = Some(InternalErrorDetail {
                suberror: internal.suberror,
                words: internal.data[..count].to_vec(),
                emulation: has_bytes.then(|| EmulationFailure { instruction: bytes.insn_bytes[..length].to_vec() }),
            });
        }
        Ok((exit, detail))
    }

    /// Makes the next [`BoundVcpu::run`] complete a pending access and come back at once.
    pub fn request_immediate_exit(&mut self) {
        self.immediate_exit().store(1, Ordering::Relaxed);
    }

    /// Takes back a request for an immediate exit. Clear it before looking for commands, so that a kick that comes in
    /// between is not lost.
    pub fn clear_immediate_exit(&mut self) {
        self.immediate_exit().store(0, Ordering::Relaxed);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: as in `Vcpu::bind`; the reference does not outlive `self`, which owns the mapping.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.run).immediate_exit) }
    }
}

impl Drop for BoundVcpu {
    fn drop(&mut self) {
        signal::unbind();
    }
}
