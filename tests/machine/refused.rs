//! Bad input to a boot: each gets its own error, and nothing panics.

use std::fs::File;

use hearth::machine::{BootError, BuildError, Entry, KernelImageError, Machine, MachineSpec, RamBacking};
use hearth::units::{Bytes, MIB};

use crate::guest::{CODE, Code, elf, file};
use crate::host::{Console, kvm, spec};

fn refused(change: impl FnOnce(&mut MachineSpec)) -> BuildError {
    let mut spec = spec(1, Code::new().halt().kernel(), &Console::default());
    change(&mut spec);
    Machine::build(kvm(), spec).unwrap_err()
}

fn kernel_refused(bytes: &[u8]) -> KernelImageError {
    let error = refused(|spec| spec.kernel = file(bytes));
    if let BuildError::Boot(BootError::Kernel(error)) = error { error } else { panic!("{error:?}") }
}

#[test]
fn files_that_are_not_kernels() {
    use KernelImageError as E;
    assert!(matches!(kernel_refused(b""), E::NotAKernel));
    assert!(matches!(kernel_refused(&[0xA5; 100_000]), E::NotAKernel));
    assert!(matches!(kernel_refused(b"\x7fELF and then something else"), E::Truncated { .. }));
    let whole = elf(&[0x90; 5000], 0);
    for length in [64, 119, 120, 121, 5000] {
        assert!(matches!(kernel_refused(&whole[..length]), E::Truncated { .. }), "{length}");
    }
    let folder = File::open("/").unwrap();
    let error = refused(|spec| spec.kernel = folder);
    assert!(matches!(error, BuildError::Boot(BootError::Kernel(E::Read(_) | E::NotAKernel))), "{error:?}");
}

#[test]
fn what_does_not_fit_memory() {
    let large = elf(&[0x90; 16], 20 * MIB);
    let error = refused(|spec| spec.kernel = file(&large));
    assert!(matches!(error, BuildError::Boot(BootError::KernelDoesNotFit { .. })), "{error:?}");
    let error = refused(|spec| spec.kernel = file(&elf(&[0x90; 16], u64::MAX - u64::from(CODE))));
    assert!(matches!(error, BuildError::Boot(BootError::KernelDoesNotFit { .. })), "{error:?}");

    let initrd = tempfile::tempfile().unwrap();
    initrd.set_len(1 << 40).unwrap();
    let error = refused(|spec| spec.initrd = Some(initrd));
    assert!(matches!(error, BuildError::Boot(BootError::InitrdDoesNotFit { .. })), "{error:?}");
    let error = refused(|spec| spec.initrd = Some(file(&vec![0; 7 << 20])));
    assert!(matches!(error, BuildError::Boot(BootError::MemoryTooSmall { .. })), "{error:?}");
    let text = hearth::report::chain(&error);
    assert_eq!(text, "boot: 16 MiB of memory; this kernel and initrd need at least 24 MiB");

    for memory in [0, MIB, 16 * MIB + 1, 1 << 50, u64::MAX] {
        let error = refused(|spec| spec.memory = Bytes(memory));
        assert!(matches!(error, BuildError::Ram(_)), "{memory}: {error:?}");
    }
}

#[test]
fn counts_and_words_out_of_bounds() {
    for vcpus in [0, 33, 255] {
        let error = refused(|spec| spec.vcpus = vcpus);
        assert!(matches!(error, BuildError::VcpuCount { found, .. } if found == vcpus), "{error:?}");
    }
    let error = refused(|spec| spec.command_line = "x".repeat(2048));
    assert!(matches!(error, BuildError::Boot(BootError::CommandLineTooLong { found }) if found > 2048), "{error:?}");
    let error = refused(|spec| spec.command_line = "a\0b".to_owned());
    assert!(matches!(error, BuildError::Boot(BootError::CommandLineCharacter { .. })), "{error:?}");
    let error = refused(|spec| spec.entry = Entry::Pvh);
    assert!(matches!(error, BuildError::Boot(BootError::NoPvhEntry)), "{error:?}");
    let error = refused(|spec| spec.backing = RamBacking::PrivateFile(file(b"short")));
    assert!(matches!(error, BuildError::Ram(_)), "{error:?}");
    let not_kvm =
        Machine::build(File::open("/dev/null").unwrap(), spec(1, Code::new().halt().kernel(), &Console::default()));
    assert!(matches!(not_kvm, Err(BuildError::Kvm(_))));
}

#[test]
fn no_change_of_a_kernel_panics() {
    let good = elf(&Code::new().halt().into_bytes(), 0x1_0000);
    let mut random = 7_u64;
    let mut next = |limit: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap() % limit
    };
    let mut built = 0;
    for _ in 0..300 {
        let mut bytes = good.clone();
        for _ in 0..=next(5) {
            let at = next(120);
            bytes[at] = [0, 1, 0x7F, 0x80, 0xFF][next(5)];
        }
        bytes.truncate(bytes.len() - next(3) * next(8));
        let spec = spec(1, file(&bytes), &Console::default());
        built += usize::from(Machine::build(kvm(), spec).is_ok());
    }
    eprintln!("{built} of 300 changed kernels were taken");
}
