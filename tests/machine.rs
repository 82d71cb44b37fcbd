//! Tier 3: machines with tiny guests on real KVM. What a guest does is a few instructions, so that a failure points at
//! the machine. Needs /dev/kvm and fails without it.

#[path = "machine/clock.rs"]
mod clock;
#[path = "machine/dirty.rs"]
mod dirty;
#[path = "machine/guest.rs"]
mod guest;
#[path = "machine/host.rs"]
mod host;
#[path = "machine/linux.rs"]
mod linux;
#[path = "machine/refused.rs"]
mod refused;
#[path = "machine/saved.rs"]
mod saved;

use guest::{Code, DATA, EVENT, SERIAL};
use hearth::machine::{MachineEvent, MachineState, RebootRequest};
use host::{boot, event, number, wait_until};

#[test]
fn a_guest_prints_and_halts() {
    let (machine, console) = boot(1, Code::new().print("hi\n").halt().kernel());
    console.expect("hi\n");
    let phases = machine.phases();
    assert!(phases.started <= phases.memory_ready && Some(phases.memory_ready) <= phases.kernel_loaded);
    assert!(phases.kernel_loaded.unwrap() <= phases.built && Some(phases.built) <= phases.first_entry);
    assert_eq!(machine.counters().console_bytes, 3);
    machine.stop();
}

#[test]
fn a_counter_stops_goes_on_and_never_goes_back() {
    let (mut machine, _) = boot(1, Code::new().forever(|code| code.increment(DATA)).kernel());
    let mut last = 0;
    for _ in 0..5 {
        wait_until(|| number(&machine, DATA) > last, || "the counter stands still".to_owned());
        machine.pause().unwrap();
        assert_eq!(machine.state(), MachineState::Paused);
        let stopped = number(&machine, DATA);
        assert!(stopped > last);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(number(&machine, DATA), stopped);
        machine.resume().unwrap();
        last = stopped;
    }
}

#[test]
fn input_reaches_the_guest() {
    let echo = Code::new()
        .print(">")
        .forever(|code| code.until_not_zero(|code| code.in_al(SERIAL + 5).test_al(1)).in_al(SERIAL).out_al(SERIAL));
    let (machine, console) = boot(1, echo.kernel());
    console.expect(">");
    assert_eq!(machine.console_input(b"over and out"), 12);
    console.expect(">over and out");
}

#[test]
fn the_guest_says_how_it_ends() {
    let cases = [
        (EVENT, 1, MachineEvent::GuestPanic),
        (EVENT, 2, MachineEvent::PowerOff),
        (EVENT, 3, MachineEvent::Reboot(RebootRequest::EventPort)),
        (0x64, 0xFE, MachineEvent::Reboot(RebootRequest::KeyboardController)),
    ];
    for (port, byte, expected) in cases {
        let (mut machine, console) = boot(1, Code::new().out(port, byte).print("still here").halt().kernel());
        assert_eq!(event(&machine), expected);
        machine.pause().unwrap();
        assert_eq!(console.text(), "", "the guest went on after {expected:?}");
        machine.save().unwrap();
    }
}

#[test]
fn a_triple_fault_is_told() {
    // ud2 with an empty interrupt table
    let (machine, _) = boot(1, Code::new().bytes(&[0x0F, 0x0B]).kernel());
    assert_eq!(event(&machine), MachineEvent::TripleFault { vcpu: 0 });
}

#[test]
fn a_second_vcpu_is_started_by_the_first() {
    // Real-mode code for the second vCPU at 0x8000: mov dx, 0x3f8; mov al, 'B'; out dx, al; cli; hlt
    let second = [0xBA, 0xF8, 0x03, 0xB0, b'B', 0xEE, 0xFA, 0xF4];
    let (icr_high, icr_low) = (0xFEE0_0310, 0xFEE0_0300);
    let code = Code::new()
        .print("A")
        .copy(0x8000, &second)
        // To APIC id 1: INIT, then SIPI with vector 8, which is address 0x8000.
        .store32(icr_high, 1 << 24)
        .store32(icr_low, 0x4500)
        .store32(icr_high, 1 << 24)
        .store32(icr_low, 0x4608)
        .halt();
    let (mut machine, console) = boot(2, code.kernel());
    console.expect("AB");
    machine.pause().unwrap();
    let (sections, memory) = (machine.save().unwrap(), host::memory_image(&machine));
    machine.stop();
    let mut restored = host::restore(memory, sections, &console).unwrap();
    restored.resume().unwrap();
    restored.pause().unwrap();
    assert_eq!(console.text(), "AB");
}

#[test]
fn unknown_addresses_read_as_ones_and_are_counted() {
    // Port 0x1234, then memory in the device hole: mov eax, 0xc0000000; mov al, [rax]
    let code = Code::new().in_al(0x1234).out_al(SERIAL).bytes(&[0xB8, 0, 0, 0, 0xC0, 0x8A, 0x00]).out_al(SERIAL);
    let (machine, _) = boot(1, code.out(EVENT, 2).halt().kernel());
    assert_eq!(event(&machine), MachineEvent::PowerOff);
    let counters = machine.counters();
    assert_eq!((counters.unknown_ports, counters.unknown_mmio, counters.console_bytes), (1, 1, 2));
}

#[test]
fn string_instructions_print_every_byte_in_order() {
    let text = b"a string that is longer than one word\n";
    // mov rsi, DATA; mov ecx, length; mov dx, 0x3f8; cld; rep outsb
    let length = u32::try_from(text.len()).unwrap();
    let code = Code::new()
        .copy(DATA, text)
        .bytes(&[0x48, 0xC7, 0xC6])
        .bytes(&DATA.to_le_bytes())
        .bytes(&[0xB9])
        .bytes(&length.to_le_bytes())
        .bytes(&[0x66, 0xBA, 0xF8, 0x03, 0xFC, 0xF3, 0x6E]);
    let (_machine, console) = boot(1, code.halt().kernel());
    console.expect(std::str::from_utf8(text).unwrap());
    assert_eq!(console.text().as_bytes(), text);
}

#[test]
fn an_instruction_kvm_cannot_execute_is_told_with_its_bytes() {
    // Where KVM emulates the kernel's instructions, some end here; where it runs them, the guest prints and ends.
    let popcnt = [0xF3, 0x48, 0x0F, 0xB8, 0xC3];
    let (machine, _) = boot(1, Code::new().bytes(&popcnt).out(EVENT, 2).halt().kernel());
    let told = event(&machine);
    if let MachineEvent::InternalError { vcpu: 0, error } = told {
        assert_eq!((error.suberror, error.rip), (1, u64::from(guest::CODE)));
        assert_eq!(error.instruction[..popcnt.len()], popcnt);
    } else {
        assert_eq!(told, MachineEvent::PowerOff);
    }
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode() {
    // The setup sectors hold only a header; the code begins 0x200 bytes after them.
    let mut image = vec![0; 2 * 512 + 0x200];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]);
    put(0x1FE, &[0x55, 0xAA]);
    put(0x202, b"HdrS");
    put(0x206, &0x020F_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &[1]);
    put(0x258, &u64::from(guest::CODE).to_le_bytes());
    put(0x260, &0x1_0000_u32.to_le_bytes());
    image.extend(Code::new().print("bz").halt().into_bytes());
    let (_machine, console) = boot(1, guest::file(&image));
    console.expect("bz");
}

#[test]
fn many_vcpus_pause_and_stop() {
    let (mut machine, console) = boot(32, Code::new().print(">").forever(|code| code.increment(DATA)).kernel());
    console.expect(">");
    for _ in 0..10 {
        machine.pause().unwrap();
        machine.resume().unwrap();
    }
    assert_eq!(machine.guest_regions().len(), 1);
    machine.stop();
}
