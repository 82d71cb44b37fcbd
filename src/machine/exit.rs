//! Why a vCPU left guest mode, in our words.
//!
//! Exits KVM knows and this VMM does not are carried by number; internal errors carry KVM's suberror and the
//! instruction's bytes, which is how a host whose KVM cannot execute something is diagnosed.

use std::fmt;
use std::io;

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes as _, GuestAddress};

use crate::sys::kvm::{InternalErrorDetail, RunDetail, Vcpu};

/// Longest x86 instruction (SDM volume 2 section 2.3.11).
const INSTRUCTION_BYTES_MAX: usize = 15;

/// An exit that is not an access to a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// A signal or immediate_exit: look for commands.
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// KVM cannot go on.
    InternalError(InternalErrorDetail),
    /// The vCPU is unusable.
    Failed(VcpuFailure),
}

/// Why a vCPU cannot go on, other than KVM's own internal errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuFailure {
    /// The processor refused to enter guest mode.
    EntryFailed {
        /// The hardware's reason.
        reason: u64,
        /// The host's processor.
        cpu: u32,
    },
    /// The host has no memory behind an address of guest memory.
    MemoryFault {
        /// The address.
        address: u64,
        /// The size of the access.
        bytes: u64,
    },
    /// An exit this VMM has no answer to.
    UnknownExit {
        /// Its number in `include/uapi/linux/kvm.h`; 0 when KVM itself did not know.
        reason: u32,
    },
    /// KVM_RUN failed.
    Run {
        /// The system's error number.
        errno: i32,
    },
    /// A pending access did not complete, so the vCPU's state cannot be read.
    PendingAccess,
}

impl fmt::Display for VcpuFailure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EntryFailed { reason, cpu } => {
                write!(out, "processor {cpu} of the host refused to enter guest mode, reason {reason:#x}")
            }
            Self::MemoryFault { address, bytes } => {
                write!(out, "the host has no memory for {bytes} bytes at {address:#x}")
            }
            Self::UnknownExit { reason } => write!(out, "unknown exit {reason}"),
            Self::Run { errno } => write!(out, "KVM_RUN failed: {}", io::Error::from_raw_os_error(*errno)),
            Self::PendingAccess => write!(out, "a pending access did not complete"),
        }
    }
}

/// An instruction or event KVM could not handle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`: 1 emulation, 2 simultaneous exceptions, 3 event delivery, 4 unexpected exit.
    pub suberror: u32,
    /// KVM's own words about it.
    pub words: Vec<u64>,
    /// Instruction pointer.
    pub rip: u64,
    /// Bytes at the instruction pointer; empty when they cannot be read.
    pub instruction: Vec<u8>,
}

impl fmt::Display for InternalError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "suberror {} at {:#x}, instruction", self.suberror, self.rip)?;
        self.instruction.iter().try_for_each(|byte| write!(out, " {byte:02x}"))?;
        if !self.words.is_empty() {
            write!(out, ", words")?;
            self.words.iter().try_for_each(|word| write!(out, " {word:#x}"))?;
        }
        Ok(())
    }
}

impl InternalError {
    /// Completes what KVM said with where it happened, as far as the vCPU can tell.
    pub fn locate(detail: InternalErrorDetail, vcpu: &Vcpu) -> Self {
        let rip = vcpu.fd().get_regs().map_or(0, |regs| regs.rip);
        let said = detail.emulation.map(|failure| failure.instruction).filter(|bytes| !bytes.is_empty());
        let instruction = said.unwrap_or_else(|| bytes_at(vcpu, rip));
        Self { suberror: detail.suberror, words: detail.words, rip, instruction }
    }
}

/// The bytes of an instruction by the guest's own page tables.
fn bytes_at(vcpu: &Vcpu, rip: u64) -> Vec<u8> {
    let base = vcpu.sregs2().map_or(0, |sregs| if sregs.efer & (1 << 10) == 0 { sregs.cs.base } else { 0 });
    let linear = base.wrapping_add(rip);
    let Some(at) = vcpu.fd().translate_gva(linear).ok().filter(|at| at.valid != 0) else { return Vec::new() };
    // Not over the end of the page: the next one may be elsewhere.
    let in_page = usize::try_from(0x1000 - (linear & 0xfff)).unwrap_or(0);
    let mut bytes = [0; INSTRUCTION_BYTES_MAX];
    let wanted = in_page.min(bytes.len());
    let read = vcpu.vm().ram().read(&mut bytes[..wanted], GuestAddress(at.physical_address)).unwrap_or(0);
    bytes[..read].to_vec()
}

/// Sorts an exit that carries no device access. Accesses are handled where they happen, since their data lives in the
/// vCPU's shared page; what is not one of ours becomes an unknown exit.
pub fn sort(exit: &VcpuExit<'_>, detail: RunDetail) -> Exit {
    let unknown = |reason| Exit::Failed(VcpuFailure::UnknownExit { reason });
    if let Some(detail) = detail.internal_error {
        return Exit::InternalError(detail);
    }
    #[expect(clippy::wildcard_enum_match_arm, reason = "most variants are other architectures or never enabled")]
    match exit {
        VcpuExit::Intr => Exit::Interrupted,
        VcpuExit::Shutdown => Exit::Shutdown,
        // Only without in-kernel interrupt controllers, which this VMM always has.
        VcpuExit::Hlt => unknown(kvm_bindings::KVM_EXIT_HLT),
        VcpuExit::FailEntry(reason, cpu) => Exit::Failed(VcpuFailure::EntryFailed { reason: *reason, cpu: *cpu }),
        VcpuExit::MemoryFault { gpa, size, .. } => {
            Exit::Failed(VcpuFailure::MemoryFault { address: *gpa, bytes: *size })
        }
        VcpuExit::Unsupported(reason) => unknown(*reason),
        VcpuExit::SystemEvent(..) => unknown(kvm_bindings::KVM_EXIT_SYSTEM_EVENT),
        VcpuExit::Debug(_) => unknown(kvm_bindings::KVM_EXIT_DEBUG),
        VcpuExit::Hypercall(_) => unknown(kvm_bindings::KVM_EXIT_HYPERCALL),
        VcpuExit::InternalError => unknown(kvm_bindings::KVM_EXIT_INTERNAL_ERROR),
        _ => unknown(kvm_bindings::KVM_EXIT_UNKNOWN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_exits_keep_their_number() {
        let exit = sort(&VcpuExit::Unsupported(31), RunDetail::default());
        assert_eq!(exit, Exit::Failed(VcpuFailure::UnknownExit { reason: 31 }));
        assert_eq!(sort(&VcpuExit::Shutdown, RunDetail::default()), Exit::Shutdown);
    }

    #[test]
    fn an_internal_error_prints_what_a_diagnosis_needs() {
        let error = InternalError { suberror: 1, words: vec![2], rip: 0x1000, instruction: vec![0xf3, 0x0f, 0xb8] };
        assert_eq!(error.to_string(), "suberror 1 at 0x1000, instruction f3 0f b8, words 0x2");
    }
}
