//! The guest's clocks over pauses and restores, as the guest computes them: from KVM's clock page and its own TSC.

use std::time::Duration;

use hearth::clock::{Clock, Monotonic, SystemClock};
use hearth::machine::{GuestTime, Machine};
use vm_memory::{Bytes as _, GuestAddress};

use crate::guest::{Code, DATA};
use crate::host::{Console, boot, memory_image, number, restore, wait_until};

/// MSR_KVM_SYSTEM_TIME_NEW (Documentation/virt/kvm/x86/msr.rst): where KVM keeps the clock page; bit 0 enables it.
const SYSTEM_TIME: u32 = 0x4B56_4D01;

/// Where the guest keeps its clock page, its TSC, and the number of times it looked.
const PAGE: u32 = DATA + 0x100;
const TSC: u32 = DATA;
const LOOKS: u32 = DATA + 8;

/// How long the guest stands still in these tests; far above what a pause or a restore itself takes.
const STILL: Duration = Duration::from_millis(700);

fn clock_guest() -> Code {
    Code::new().write_msr(SYSTEM_TIME, u64::from(PAGE) | 1).forever(|code| code.store_tsc(TSC).increment(LOOKS))
}

/// The guest's two clocks at one moment, and the host's before and after.
struct Look {
    begun: Monotonic,
    ended: Monotonic,
    tsc: u64,
    clock: Duration,
}

/// Lets the guest look at its clocks and stops it.
fn look(host: &SystemClock, machine: &mut Machine) -> Look {
    let begun = host.monotonic();
    let before = number(machine, LOOKS);
    wait_until(|| number(machine, LOOKS) > before + 10, || "the guest does not run".to_owned());
    machine.pause().unwrap();
    // struct pvclock_vcpu_time_info: version, pad, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags.
    let word = |at: u32| machine.ram().read_obj::<u64>(GuestAddress(u64::from(PAGE + at))).unwrap();
    let (at_tsc, at_ns, scale) = (word(8), word(16), word(24));
    let (multiplier, shift) = (scale & 0xFFFF_FFFF, (scale >> 32).to_le_bytes()[0].cast_signed());
    let tsc = number(machine, TSC);
    let passed = i128::from(tsc.wrapping_sub(at_tsc).cast_signed());
    let shifted = if shift >= 0 { passed << shift } else { passed >> -shift };
    let nanos = i128::from(at_ns) + ((shifted * i128::from(multiplier)) >> 32);
    let clock = Duration::from_nanos(u64::try_from(nanos).expect("a clock before its zero"));
    Look { begun, ended: host.monotonic(), tsc, clock }
}

/// Both clocks went on, and the guest's by no more than the host's without [`STILL`].
fn stood_still(before: &Look, after: &Look) {
    assert!(after.tsc > before.tsc, "the TSC went back by {}", before.tsc - after.tsc);
    let ran = after.ended.since(before.begun) - STILL;
    let (from, to) = (before.clock, after.clock);
    assert!(to > from && to - from <= ran, "from {from:?} to {to:?} in {ran:?}");
}

#[test]
fn the_clock_stands_still_during_a_pause() {
    let host = SystemClock::new();
    let (mut machine, _) = boot(1, clock_guest().kernel());
    let mut before = look(&host, &mut machine);
    for _ in 0..3 {
        std::thread::sleep(STILL);
        machine.resume().unwrap();
        let after = look(&host, &mut machine);
        stood_still(&before, &after);
        before = after;
    }
}

#[test]
fn the_clock_stands_still_over_a_restore() {
    let host = SystemClock::new();
    let (mut machine, _) = boot(1, clock_guest().kernel());
    let mut before = look(&host, &mut machine);
    for _ in 0..3 {
        let (sections, memory) = (machine.save().unwrap(), memory_image(&machine));
        machine.stop();
        std::thread::sleep(STILL);
        machine = restore(memory, sections, &Console::default()).unwrap();
        machine.resume().unwrap();
        let after = look(&host, &mut machine);
        stood_still(&before, &after);
        before = after;
    }
}

#[test]
fn the_clock_follows_real_time_when_asked() {
    let host = SystemClock::new();
    let (mut machine, _) = boot(1, clock_guest().kernel());
    let before = look(&host, &mut machine);
    std::thread::sleep(STILL);
    machine.resume_with(GuestTime::Passes { at_least_ns: 0, at_most_ns: u64::MAX }).unwrap();
    let after = look(&host, &mut machine);
    let passed = after.clock - before.clock;
    let real = after.ended.since(before.begun);
    assert!(passed >= STILL && passed <= real, "{passed:?} in {real:?}");
}

/// As when it is restored on another host while its pause is a part of its time: there KVM knows of no clocks yet.
#[test]
fn the_clock_follows_real_time_over_a_restore() {
    let host = SystemClock::new();
    let (mut machine, _) = boot(1, clock_guest().kernel());
    let mut before = look(&host, &mut machine);
    for _ in 0..3 {
        let (sections, memory) = (machine.save().unwrap(), memory_image(&machine));
        machine.stop();
        std::thread::sleep(STILL);
        machine = restore(memory, sections, &Console::default()).unwrap();
        machine.resume_with(GuestTime::Passes { at_least_ns: 0, at_most_ns: u64::MAX }).unwrap();
        let after = look(&host, &mut machine);
        assert!(after.tsc > before.tsc, "the TSC went back by {}", before.tsc - after.tsc);
        let passed = after.clock - before.clock;
        let real = after.ended.since(before.begun);
        assert!(passed >= STILL && passed <= real, "{passed:?} in {real:?}");
        before = after;
    }
}
