//! What a host's KVM really does, found out with tiny VMs: KVM's capabilities say what it offers, not how it behaves.
//!
//! Each question is one VM with one vCPU, two MiB of memory, an identity-mapped long mode and a few bytes of code that
//! answers through a port. A fault (there is no IDT) ends as a triple fault, an instruction KVM cannot emulate as an
//! internal error: both are answers. All questions together take well under a second.

use std::fs::File;
use std::io;

use kvm_bindings::{
    KVM_CAP_ADJUST_CLOCK, KVM_CAP_BINARY_STATS_FD, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_GUEST_MEMFD, KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_IOEVENTFD, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NESTED_STATE,
    KVM_CAP_PIT2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_TSC_CONTROL, KVM_CAP_XSAVE2, Msrs, kvm_msr_entry, kvm_regs,
    kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuExit};
use serde::Serialize;
use vm_memory::{Bytes as _, GuestAddress};

use super::ram::{self, MakeRamError, RamBacking};
use crate::clock::Clock;
use crate::sys::kvm::{self, CallError, Capabilities, OpenKvmError, Vcpu, Vm};
use crate::sys::signal;
use crate::units::{Bytes, MIB};

/// Memory of a probe's VM.
const MEMORY: Bytes = Bytes(4 * MIB);

/// Page tables: one entry each in a PML4 and a PDPT, two in a page directory: a 2 MiB page for both rings and one for
/// ring 0 alone.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;

/// Present, writable, user (SDM volume 3 section 4.5): the probes run in both rings.
const PAGE_PRESENT_WRITABLE_USER: u64 = 0b111;

/// Present and writable for ring 0 alone.
const PAGE_PRESENT_WRITABLE: u64 = 0b011;

/// A page directory entry that maps a 2 MiB page.
const PAGE_LARGE: u64 = 1 << 7;

/// Where code and scratch memory lie: for both rings.
const CODE: u64 = 0x8000;
const SCRATCH: u64 = 0x1_0000;

/// The system call entry, in the page of ring 0, as a kernel has it.
const SYSCALL_ENTRY: u64 = 2 * MIB;

/// RFLAGS: bit 1 is always set; IOPL 3, so that ring 3 may answer through a port (SDM volume 1 section 3.4.3).
const RFLAGS: u64 = 1 << 1 | 3 << 12;

/// Port the probes answer through.
const ANSWER_PORT: u16 = 0x10;

/// `mov al, 1; out 0x10, al; hlt`: "I got here".
const ARRIVED: &[u8] = &[0xb0, 0x01, 0xe6, 0x10, 0xf4];

/// Turns of the timed loop; two instructions each. On emulated hardware this takes tens of milliseconds.
const LOOP_TURNS: u32 = 20_000;

/// Kernel-mode instructions per second below which kernel mode is taken to be emulated. Emulation manages a few
/// million, the slowest hardware a thousand million.
const EMULATED_BELOW_PER_SECOND: u64 = 100_000_000;

/// CPUID leaf of the hypervisor's signature (`Documentation/virt/kvm/x86/cpuid.rst`).
const SIGNATURE_LEAF: u32 = 0x4000_0000;

/// A signature no hypervisor has: a guest that sees it sees the CPUID it was given.
const OUR_SIGNATURE: u32 = u32::from_le_bytes(*b"HrtH");

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct KvmFacts {
    /// Version of the KVM API.
    pub api_version: i32,
    /// Twelve letters the guest sees in the hypervisor leaf.
    pub vendor_signature: String,
    /// Whether a guest sees the CPUID it was given.
    pub cpuid_honoured: bool,
    /// Whether a guest's kernel mode runs on the processor; otherwise it is emulated, about a thousand times slower.
    pub kernel_mode_native: bool,
    /// Measured instructions per second in kernel mode.
    pub kernel_mode_instructions_per_second: u64,
    /// Whether SYSCALL from user mode arrives in kernel mode.
    pub syscall_complete: bool,
    /// Instructions a guest's kernel cannot execute here although they are ordinary on this architecture.
    pub kernel_mode_lacks: Vec<&'static str>,
    /// Most vCPUs of a VM.
    pub vcpus_max: usize,
    /// Bytes of the extended register state.
    pub xsave_bytes: usize,
    /// Frequency of a guest's time-stamp counter in kHz.
    pub tsc_khz: u32,
    /// Whether a guest can be given another frequency.
    pub tsc_scaling: bool,
    /// Most bytes of a dirty ring; 0 without one.
    pub dirty_ring_bytes: u32,
    /// Whether pages of the dirty log can be re-protected apart from reading it.
    pub manual_dirty_log: bool,
    /// Whether a guest can be a hypervisor.
    pub nested_state: bool,
    /// Whether guests can have memory their host cannot read.
    pub guest_memfd: bool,
    /// Whether statistics can be read as a file.
    pub statistics: bool,
    /// Capabilities this VMM cannot do without that are absent.
    pub missing: Vec<&'static str>,
}

/// Why KVM could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ProbeKvmError {
    /// The file is not a usable `/dev/kvm`.
    #[error("open KVM")]
    Open(#[source] OpenKvmError),
    /// A tiny VM could not be made.
    #[error("make a probe's memory")]
    Ram(#[source] MakeRamError),
    /// KVM refused a call.
    #[error("ask KVM")]
    Call(#[source] CallError),
    /// Its memory could not be filled.
    #[error("fill a probe's memory")]
    Fill(#[source] vm_memory::GuestMemoryError),
    /// Its vCPU could not run.
    #[error("run a probe")]
    Run(#[source] io::Error),
}

/// Bits of CR0, CR4 and EFER the probes need (SDM volume 3 section 2.5).
const CR0_PROTECTED_PAGING: u64 = 1 | 1 << 1 | 1 << 5 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
const EFER_SCE: u64 = 1;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;

/// An instruction that is tried in kernel mode: name, bytes, bits of CR4 it wants. RDI points to scratch memory.
struct Instruction {
    name: &'static str,
    bytes: &'static [u8],
    cr4: u64,
}

const INSTRUCTIONS: &[Instruction] = &[
    Instruction { name: "fwait", bytes: &[0x9b], cr4: 0 },
    Instruction { name: "cmpxchg16b", bytes: &[0x48, 0x0f, 0xc7, 0x0f], cr4: 0 },
    Instruction { name: "popcnt", bytes: &[0xf3, 0x0f, 0xb8, 0xc1], cr4: 0 },
    Instruction { name: "xsave", bytes: &[0x0f, 0xae, 0x27], cr4: CR4_OSXSAVE },
    Instruction { name: "fxsave", bytes: &[0x0f, 0xae, 0x07], cr4: 0 },
    Instruction { name: "movaps", bytes: &[0x0f, 0x28, 0xc1], cr4: 0 },
    Instruction { name: "rdfsbase", bytes: &[0xf3, 0x48, 0x0f, 0xae, 0xc0], cr4: CR4_FSGSBASE },
    Instruction { name: "rdtscp", bytes: &[0x0f, 0x01, 0xf9], cr4: 0 },
    Instruction { name: "rep movsb", bytes: &[0xb9, 1, 0, 0, 0, 0x48, 0x89, 0xfe, 0xf3, 0xa4], cr4: 0 },
];

/// How a probe's code ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// It wrote this to the answer port.
    Answered(Vec<u32>),
    /// It faulted, or KVM could not go on.
    Failed,
}

struct Probe<'a> {
    kvm: &'a Kvm,
    capabilities: Capabilities,
}

impl Probe<'_> {
    /// A VM with `code` in long mode, about to run it in ring `ring`.
    fn vcpu(&self, code: &[u8], ring: u8, cr4: u64) -> Result<Vcpu, ProbeKvmError> {
        let ram = ram::make(RamBacking::SharedMemfd, MEMORY).map_err(ProbeKvmError::Ram)?;
        let entries = [
            (PML4, PDPT | PAGE_PRESENT_WRITABLE_USER),
            (PDPT, PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE_USER),
            (PAGE_DIRECTORY, PAGE_LARGE | PAGE_PRESENT_WRITABLE_USER),
            (PAGE_DIRECTORY + 8, SYSCALL_ENTRY | PAGE_LARGE | PAGE_PRESENT_WRITABLE),
        ];
        for (address, entry) in entries {
            ram.write_obj(entry, GuestAddress(address)).map_err(ProbeKvmError::Fill)?;
        }
        ram.write_slice(code, GuestAddress(CODE)).map_err(ProbeKvmError::Fill)?;
        ram.write_slice(ARRIVED, GuestAddress(SYSCALL_ENTRY)).map_err(ProbeKvmError::Fill)?;
        let vm = Vm::new(self.kvm, self.capabilities, ram).map_err(ProbeKvmError::Call)?;
        let vcpu = vm.create_vcpu(0).map_err(ProbeKvmError::Call)?;
        let mut sregs = vcpu.sregs2().map_err(ProbeKvmError::Call)?;
        sregs.cs = segment(0x08 | u16::from(ring), 0xb, ring, true);
        for data in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *data = segment(0x10 | u16::from(ring), 0x3, ring, false);
        }
        sregs.cr0 = CR0_PROTECTED_PAGING;
        sregs.cr3 = PML4;
        sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | cr4;
        sregs.efer = EFER_SCE | EFER_LONG_MODE;
        sregs.idt.limit = 0;
        vcpu.set_sregs2(&sregs).map_err(ProbeKvmError::Call)?;
        let regs = kvm_regs { rip: CODE, rflags: RFLAGS, rdi: SCRATCH, rsp: SCRATCH, ..kvm_regs::default() };
        vcpu.fd().set_regs(&regs).map_err(CallError::of("KVM_SET_REGS")).map_err(ProbeKvmError::Call)?;
        Ok(vcpu)
    }

    fn run(&self, code: &[u8], ring: u8, cr4: u64) -> Result<Ended, ProbeKvmError> {
        run_to_end(self.vcpu(code, ring, cr4)?)
    }
}

fn segment(selector: u16, kind: u8, ring: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: ring,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..kvm_segment::default()
    }
}

/// Runs until the code halts, fails, or has answered more often than any probe does.
fn run_to_end(vcpu: Vcpu) -> Result<Ended, ProbeKvmError> {
    const ANSWERS_MAX: usize = 8;
    let mut vcpu = vcpu.bind();
    let mut answers = Vec::new();
    while answers.len() < ANSWERS_MAX {
        let (exit, _) = vcpu.run().map_err(ProbeKvmError::Run)?;
        #[expect(clippy::wildcard_enum_match_arm, reason = "every other exit is a failure of the probe's code")]
        match exit {
            VcpuExit::IoOut(ANSWER_PORT, data) => {
                let mut word = [0; 4];
                let count = data.len().min(4);
                word[..count].copy_from_slice(&data[..count]);
                answers.push(u32::from_le_bytes(word));
                // The answer is complete; a halt would wait in the kernel for an interrupt that never comes.
                if answers.last() == Some(&1) || answers.len() == 3 {
                    return Ok(Ended::Answered(answers));
                }
            }
            _ => return Ok(Ended::Failed),
        }
    }
    Ok(Ended::Failed)
}

/// Asks everything.
pub fn probe(device: File, clock: &impl Clock) -> Result<KvmFacts, ProbeKvmError> {
    signal::install().map_err(ProbeKvmError::Run)?;
    let system = kvm::system(device).map_err(ProbeKvmError::Open)?;
    let value = |capability: u32| system.check_extension_raw(capability.into());
    let missing = missing(value);
    let capabilities = kvm::capabilities(&system).map_err(ProbeKvmError::Open)?;
    let probe = Probe { kvm: &system, capabilities };
    let per_second = instructions_per_second(&probe, clock)?;
    let vendor_signature = signature(&probe, None)?;
    let cpuid_honoured = signature(&probe, Some(OUR_SIGNATURE))? != vendor_signature;
    let vcpu = probe.vcpu(ARRIVED, 0, 0)?;
    let tsc_khz = vcpu.fd().get_tsc_khz().unwrap_or(0);
    Ok(KvmFacts {
        api_version: system.get_api_version(),
        vendor_signature,
        cpuid_honoured,
        kernel_mode_native: per_second >= EMULATED_BELOW_PER_SECOND,
        kernel_mode_instructions_per_second: per_second,
        syscall_complete: syscall_complete(&probe)?,
        kernel_mode_lacks: lacking(&probe)?,
        vcpus_max: capabilities.vcpus_max,
        xsave_bytes: usize::try_from(value(KVM_CAP_XSAVE2)).unwrap_or(0),
        tsc_khz,
        tsc_scaling: value(KVM_CAP_TSC_CONTROL) > 0,
        dirty_ring_bytes: u32::try_from(value(KVM_CAP_DIRTY_LOG_RING)).unwrap_or(0),
        manual_dirty_log: value(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) > 0,
        nested_state: value(KVM_CAP_NESTED_STATE) > 0,
        guest_memfd: value(KVM_CAP_GUEST_MEMFD) > 0,
        statistics: value(KVM_CAP_BINARY_STATS_FD) > 0,
        missing,
    })
}

fn missing(value: impl Fn(u32) -> i32) -> Vec<&'static str> {
    let needed = [
        (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"),
        (KVM_CAP_PIT2, "KVM_CAP_PIT2"),
        (KVM_CAP_IRQFD, "KVM_CAP_IRQFD"),
        (KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"),
        (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
        (KVM_CAP_ADJUST_CLOCK, "KVM_CAP_ADJUST_CLOCK"),
        (KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP"),
    ];
    needed.into_iter().filter(|(capability, _)| value(*capability) <= 0).map(|(_, name)| name).collect()
}

/// `mov ecx, turns; 1: dec ecx; jnz 1b`, timed.
fn instructions_per_second(probe: &Probe<'_>, clock: &impl Clock) -> Result<u64, ProbeKvmError> {
    let mut code = vec![0xb9];
    code.extend(LOOP_TURNS.to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, 0xfc]);
    code.extend(ARRIVED);
    let vcpu = probe.vcpu(&code, 0, 0)?;
    let started = clock.monotonic();
    let ended = run_to_end(vcpu)?;
    let nanos = u64::try_from(clock.monotonic().since(started).as_nanos()).unwrap_or(u64::MAX).max(1);
    match ended {
        Ended::Answered(_) => Ok(u64::from(LOOP_TURNS) * 2 * 1_000_000_000 / nanos),
        Ended::Failed => Ok(0),
    }
}

/// The hypervisor's signature as a guest's ring 3 sees it, with `first` as its first four letters if it is given.
fn signature(probe: &Probe<'_>, first: Option<u32>) -> Result<String, ProbeKvmError> {
    // mov eax, leaf; cpuid; mov eax, ebx; out; mov eax, ecx; out; mov eax, edx; out
    let mut code = vec![0xb8];
    code.extend(SIGNATURE_LEAF.to_le_bytes());
    code.extend([0x0f, 0xa2, 0x89, 0xd8, 0xe7, 0x10, 0x89, 0xc8, 0xe7, 0x10, 0x89, 0xd0, 0xe7, 0x10, 0xf4]);
    // Ring 3, where an emulating host runs the guest's own instructions.
    let vcpu = probe.vcpu(&code, 3, 0)?;
    let supported = probe.kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    let mut supported = supported.map_err(CallError::of("KVM_GET_SUPPORTED_CPUID")).map_err(ProbeKvmError::Call)?;
    for entry in supported.as_mut_slice().iter_mut().filter(|entry| entry.function == SIGNATURE_LEAF) {
        entry.ebx = first.unwrap_or(entry.ebx);
    }
    vcpu.fd().set_cpuid2(&supported).map_err(CallError::of("KVM_SET_CPUID2")).map_err(ProbeKvmError::Call)?;
    match run_to_end(vcpu)? {
        Ended::Answered(words) => {
            let letters = words.iter().flat_map(|word| word.to_le_bytes());
            Ok(letters.map(char::from).filter(char::is_ascii_graphic).collect())
        }
        Ended::Failed => Ok(String::new()),
    }
}

/// SYSCALL in ring 3: does the code at LSTAR run? Its page is for ring 0 alone.
fn syscall_complete(probe: &Probe<'_>) -> Result<bool, ProbeKvmError> {
    let vcpu = probe.vcpu(&[0x0f, 0x05], 3, 0)?;
    // STAR bits 47:32: the kernel's code selector; its data selector is the next (SDM volume 2, SYSCALL).
    let entries = [(MSR_STAR, 0x08_u64 << 32), (MSR_LSTAR, SYSCALL_ENTRY), (MSR_SFMASK, 0)];
    let entries = entries.map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() });
    let Ok(msrs) = Msrs::from_entries(&entries) else { return Ok(false) };
    let set = vcpu.fd().set_msrs(&msrs).map_err(CallError::of("KVM_SET_MSRS")).map_err(ProbeKvmError::Call)?;
    Ok(set == entries.len() && run_to_end(vcpu)? != Ended::Failed)
}

fn lacking(probe: &Probe<'_>) -> Result<Vec<&'static str>, ProbeKvmError> {
    let mut lacking = Vec::new();
    for instruction in INSTRUCTIONS {
        let code = [instruction.bytes, ARRIVED].concat();
        if probe.run(&code, 0, instruction.cr4)? == Ended::Failed {
            lacking.push(instruction.name);
        }
    }
    Ok(lacking)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;

    #[test]
    fn this_host_is_usable_and_tells_consistent_facts() {
        let device = File::options().read(true).write(true).open("/dev/kvm").expect("these tests need /dev/kvm");
        let facts = probe(device, &SystemClock::new()).unwrap();
        assert_eq!(facts.api_version, 12);
        assert!(facts.missing.is_empty(), "{facts:?}");
        assert!(facts.kernel_mode_instructions_per_second > 10_000, "{facts:?}");
        assert!(!facts.vendor_signature.is_empty(), "{facts:?}");
        assert!(facts.kernel_mode_native || !facts.kernel_mode_lacks.is_empty(), "emulators lack something: {facts:?}");
    }
}
