//! What processor a guest sees: pure functions over CPUID entries, no KVM calls.
//!
//! [`template`] starts from what KVM supports on this host, hides what the VMM does not virtualise or cannot carry
//! through a restore, and writes the parts that differ per vCPU (APIC id, topology). [`missing`] compares two processors:
//! the reasons why a guest that knows one cannot run on the other. A KVM that does not honour CPUID shows its guests the
//! hardware's regardless; those guests are told on their command line what to leave alone.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaves with feature bits or topology (SDM volume 2, CPUID; AMD APM volume 3 appendix E; cpuid.rst of KVM).
const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const THERMAL: u32 = 6;
const STRUCTURED: u32 = 7;
const PERFORMANCE: u32 = 0xA;
const TOPOLOGY: u32 = 0xB;
const XSAVE: u32 = 0xD;
const RESOURCE_MONITORING: u32 = 0xF;
const RESOURCE_ALLOCATION: u32 = 0x10;
const ENCLAVES: u32 = 0x12;
const TRACE: u32 = 0x14;
const TOPOLOGY_V2: u32 = 0x1F;
const KVM_FEATURES: u32 = 0x4000_0001;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const POWER: u32 = 0x8000_0007;
const SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001D;
const AMD_TOPOLOGY: u32 = 0x8000_001E;

/// Leaf 1 ECX: 64-bit debug store, MONITOR, CPL debug store, VMX, SMX, SpeedStep, thermal monitor 2, PDCM, DCA: power,
/// debug and virtualisation of the host itself.
const FEATURES_ECX_HIDDEN: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15 | 1 << 18;

/// Leaf 1 ECX: a hypervisor is there.
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;

/// Leaf 1 EDX: debug store, ACPI thermal, thermal monitor, pending break.
const FEATURES_EDX_HIDDEN: u32 = 1 << 21 | 1 << 22 | 1 << 29 | 1 << 31;

/// Leaf 1 EDX: more than one logical processor.
const FEATURES_EDX_MULTITHREADED: u32 = 1 << 28;

/// Leaf 6 EAX: the APIC timer runs in all power states; the only thing about power that is true for a guest.
const THERMAL_EAX_ARAT: u32 = 1 << 2;

/// Leaf 7 EBX: enclaves, cache monitoring and allocation, processor trace. They need state this VMM does not carry.
const STRUCTURED_EBX_HIDDEN: u32 = 1 << 2 | 1 << 12 | 1 << 15 | 1 << 25;

/// Leaf 7 ECX: WAITPKG (stalls a vCPU in user mode), enclave launch control, protection keys for supervisor pages.
const STRUCTURED_ECX_HIDDEN: u32 = 1 << 5 | 1 << 30 | 1 << 31;

/// Leaf 7 EDX: architectural last-branch records, which need MSRs of the performance unit; AMX tile features, whose
/// state needs a permission this process does not ask for.
const STRUCTURED_EDX_HIDDEN: u32 = 1 << 19 | 1 << 22 | 1 << 24 | 1 << 25;

/// Leaf 0xD sub-leaf 0 EAX: AMX tile configuration and data, for the same reason.
const XSAVE_EAX_HIDDEN: u32 = 1 << 17 | 1 << 18;

/// KVM's own features: asynchronous page faults (a fault in flight across a save would be a token nobody completes),
/// the page-range hypercall and migration control (for encrypted guests).
const KVM_FEATURES_HIDDEN: u32 = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 16 | 1 << 17;

/// Extended ECX: SVM, IBS, SKINIT, watchdog, performance counters.
const EXTENDED_ECX_HIDDEN: u32 = 1 << 2 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 23 | 1 << 24 | 1 << 28;

/// Power EDX: the TSC counts at a constant rate in all states. True, but a guest that sees it prefers the TSC to
/// kvmclock as its clock, and the TSC goes on during a pause.
const POWER_EDX_INVARIANT_TSC: u32 = 1 << 8;

/// Topology levels of leaves 0xB and 0x1F.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The processor vCPU `index` of `count` sees, from what KVM supports.
pub fn template(supported: &[kvm_cpuid_entry2], index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2))
        .map(|entry| adjusted(*entry, index, count))
        .collect();
    let known = |leaf: u32| supported.iter().any(|entry| entry.function == leaf);
    for leaf in [TOPOLOGY, TOPOLOGY_V2].into_iter().filter(|leaf| known(*leaf)) {
        entries.extend(topology(leaf, index, count));
    }
    entries.sort_by_key(|entry| (entry.function, entry.index));
    entries
}

fn adjusted(mut entry: kvm_cpuid_entry2, index: u8, count: u8) -> kvm_cpuid_entry2 {
    let many = count > 1;
    match entry.function {
        FEATURES => {
            // EBX: APIC id, logical processors, cache-line flush size (kept), brand index (kept).
            entry.ebx = entry.ebx & 0xFFFF | u32::from(count) << 16 | u32::from(index) << 24;
            entry.ecx = entry.ecx & !FEATURES_ECX_HIDDEN | FEATURES_ECX_HYPERVISOR;
            entry.edx &= !(FEATURES_EDX_HIDDEN | FEATURES_EDX_MULTITHREADED);
            entry.edx |= if many { FEATURES_EDX_MULTITHREADED } else { 0 };
        }
        CACHES | AMD_CACHES => {
            let level = entry.eax >> 5 & 7;
            // EAX bits 25:14: who shares this cache, minus one: a core its own levels 1 and 2, all cores the third.
            let sharing = if level >= 3 { u32::from(count) - 1 } else { 0 };
            entry.eax = entry.eax & !(0xFFF << 14) | sharing << 14;
            if entry.function == CACHES && entry.eax & 0x1F != 0 {
                // EAX bits 31:26: cores in the package, minus one.
                entry.eax = entry.eax & !(0x3F << 26) | (u32::from(count) - 1) << 26;
            }
        }
        THERMAL => {
            entry.eax &= THERMAL_EAX_ARAT;
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        STRUCTURED if entry.index == 0 => {
            entry.ebx &= !STRUCTURED_EBX_HIDDEN;
            entry.ecx &= !STRUCTURED_ECX_HIDDEN;
            entry.edx &= !STRUCTURED_EDX_HIDDEN;
        }
        PERFORMANCE | RESOURCE_MONITORING | RESOURCE_ALLOCATION | ENCLAVES | TRACE => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        XSAVE if entry.index == 0 => entry.eax &= !XSAVE_EAX_HIDDEN,
        KVM_FEATURES => entry.eax &= !KVM_FEATURES_HIDDEN,
        EXTENDED_FEATURES => entry.ecx &= !EXTENDED_ECX_HIDDEN,
        POWER => {
            (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0);
            entry.edx &= !POWER_EDX_INVARIANT_TSC;
        }
        // ECX: APIC id size and number of threads, which only AMD fills in.
        SIZES if entry.ecx != 0 => {
            entry.ecx = id_bits(count) << 12 | (u32::from(count) - 1);
        }
        AMD_TOPOLOGY => {
            // APIC id; one thread per core, core id; one node.
            entry.eax = u32::from(index);
            entry.ebx = u32::from(index);
            entry.ecx = 0;
        }
        _ => {}
    }
    entry
}

/// Bits of an APIC id that number the cores of a package of `count`.
fn id_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// Extended topology: one thread per core, all cores in one package.
fn topology(leaf: u32, index: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |level: u32, shift: u32, processors: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: level | kind << 8,
        edx: u32::from(index),
        padding: [0; 3],
    };
    [level(0, 0, 1, LEVEL_THREAD), level(1, id_bits(count), u32::from(count), LEVEL_CORE), level(2, 0, 0, 0)]
}

/// A register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Feature bits one processor has and another lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MissingFeatures {
    /// The leaf.
    pub function: u32,
    /// The sub-leaf.
    pub index: u32,
    /// The register.
    pub register: Register,
    /// The bits.
    pub bits: u32,
}

/// Registers whose bits are features, each of which the other processor must have.
const FEATURE_REGISTERS: [(u32, u32, &[Register]); 8] = [
    (FEATURES, 0, &[Register::Ecx, Register::Edx]),
    (STRUCTURED, 0, &[Register::Ebx, Register::Ecx, Register::Edx]),
    (STRUCTURED, 1, &[Register::Eax, Register::Ebx, Register::Ecx, Register::Edx]),
    (XSAVE, 0, &[Register::Eax, Register::Edx]),
    (XSAVE, 1, &[Register::Eax, Register::Ecx]),
    (KVM_FEATURES, 0, &[Register::Eax]),
    (EXTENDED_FEATURES, 0, &[Register::Ecx, Register::Edx]),
    (SIZES, 0, &[Register::Ebx]),
];

/// Bits of leaf 1 ECX that say how a guest is set up, not what the processor can do: OSXSAVE and the hypervisor bit.
const FEATURES_ECX_STATE: u32 = 1 << 27 | FEATURES_ECX_HYPERVISOR;

/// What a guest that was given `wanted` would miss on a host that supports `offered`.
pub fn missing(wanted: &[kvm_cpuid_entry2], offered: &[kvm_cpuid_entry2]) -> Vec<MissingFeatures> {
    let mut all = Vec::new();
    for (function, index, registers) in FEATURE_REGISTERS {
        for register in registers {
            let ignored = if (function, *register) == (FEATURES, Register::Ecx) { FEATURES_ECX_STATE } else { 0 };
            // HTT follows the number of vCPUs.
            let ignored =
                if (function, *register) == (FEATURES, Register::Edx) { FEATURES_EDX_MULTITHREADED } else { ignored };
            let bits =
                value(wanted, function, index, *register) & !value(offered, function, index, *register) & !ignored;
            if bits != 0 {
                all.push(MissingFeatures { function, index, register: *register, bits });
            }
        }
    }
    all
}

fn value(entries: &[kvm_cpuid_entry2], function: u32, index: u32, register: Register) -> u32 {
    let found = entries.iter().find(|entry| entry.function == function && entry.index == index);
    found.map_or(0, |entry| match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn everything() -> Vec<kvm_cpuid_entry2> {
        [FEATURES, STRUCTURED, PERFORMANCE, TOPOLOGY, KVM_FEATURES, EXTENDED_FEATURES, POWER]
            .map(|function| entry(function, 0, [u32::MAX; 4]))
            .to_vec()
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
    }

    #[test]
    fn what_is_not_virtualised_is_hidden() {
        let entries = template(&everything(), 0, 1);
        let features = find(&entries, FEATURES, 0);
        assert_eq!(features.ecx & 1 << 5, 0, "VMX");
        assert_ne!(features.ecx & FEATURES_ECX_HYPERVISOR, 0);
        assert_eq!(features.edx & FEATURES_EDX_MULTITHREADED, 0);
        assert_eq!(find(&entries, PERFORMANCE, 0).eax, 0);
        assert_eq!(find(&entries, POWER, 0).edx & POWER_EDX_INVARIANT_TSC, 0);
        assert_eq!(find(&entries, KVM_FEATURES, 0).eax & KVM_FEATURES_HIDDEN, 0);
        assert_eq!(find(&entries, EXTENDED_FEATURES, 0).ecx & 1 << 2, 0, "SVM");
    }

    #[test]
    fn each_vcpu_has_its_own_id_in_one_package() {
        for count in [1, 2, 3, 32] {
            for index in 0..count {
                let entries = template(&everything(), index, count);
                let features = find(&entries, FEATURES, 0);
                assert_eq!(features.ebx >> 24, u32::from(index));
                assert_eq!(features.ebx >> 16 & 0xFF, u32::from(count));
                let cores = find(&entries, TOPOLOGY, 1);
                assert_eq!((cores.ebx, cores.edx), (u32::from(count), u32::from(index)));
                assert!(u32::from(index) >> cores.eax == 0, "all in package 0");
                assert_eq!(find(&entries, TOPOLOGY, 2).ecx, 2);
            }
        }
    }

    #[test]
    fn a_guest_needs_the_features_it_was_given_and_no_others() {
        let guest = template(&everything(), 1, 2);
        assert_eq!(missing(&guest, &everything()), []);
        let mut host = everything();
        host[1].ebx = !(1 << 16);
        let lacking = MissingFeatures { function: STRUCTURED, index: 0, register: Register::Ebx, bits: 1 << 16 };
        assert_eq!(missing(&guest, &host), [lacking]);
        assert_eq!(missing(&host, &[]).len(), 8);
    }
}
