//! Saving and restoring: equal sections, a guest that goes on, and every kind of wrong state refused.

use hearth::machine::{BuildError, Machine, MachineState};
use hearth::saved::{Section, SectionKind, SectionName, Sections, codec};

use crate::guest::{Code, DATA, SERIAL};
use crate::host::{Console, boot, memory_image, number, restore, wait_until};

fn counting() -> Code {
    Code::new().print(">").forever(|code| code.increment(DATA))
}

/// A guest that has run and is paused.
fn paused(vcpus: u8) -> Machine {
    let (mut machine, console) = boot(vcpus, counting().kernel());
    console.expect(">");
    wait_until(|| number(&machine, DATA) > 0, || "the guest does not count".to_owned());
    machine.pause().unwrap();
    machine
}

fn rebuilt(sections: impl IntoIterator<Item = Section>) -> Sections {
    let mut all = Sections::new();
    sections.into_iter().for_each(|section| all.push(section).unwrap());
    all
}

#[test]
fn saved_restored_and_saved_again_is_equal() {
    for vcpus in [1, 2, 3] {
        let machine = paused(vcpus);
        let first = machine.save().unwrap();
        assert_eq!(machine.save().unwrap(), first, "saving changes something");
        let memory = memory_image(&machine);
        machine.stop();
        let restored = restore(memory, first.clone(), &Console::default()).unwrap();
        assert_eq!(restored.state(), MachineState::Paused);
        let second = restored.save().unwrap();
        for (before, after) in first.iter().zip(second.iter()) {
            assert_eq!(before, after, "section {}", before.name);
        }
        assert_eq!(second, first);
    }
}

#[test]
fn a_restored_guest_goes_on_where_it_was() {
    let mut machine = paused(1);
    for _ in 0..5 {
        let count = number(&machine, DATA);
        let (bytes, memory) = (codec::to_bytes(&machine.save().unwrap()).unwrap(), memory_image(&machine));
        machine.stop();
        machine = restore(memory, codec::from_bytes(&bytes).unwrap(), &Console::default()).unwrap();
        assert_eq!(number(&machine, DATA), count);
        machine.resume().unwrap();
        wait_until(|| number(&machine, DATA) > count, || "the restored guest does not count".to_owned());
        machine.pause().unwrap();
    }
}

#[test]
fn a_guest_saved_between_the_halves_of_an_access_repeats_and_loses_nothing() {
    // Prints a, b, ... z for ever: every exit is an access, so every pause is next to one.
    let mut code = Code::new();
    code = code.forever(|code| ('a'..='z').fold(code, |code, letter| code.out(SERIAL, letter as u8)));
    let (mut machine, console) = boot(1, code.kernel());
    for _ in 0..20 {
        std::thread::sleep(std::time::Duration::from_millis(3));
        machine.pause().unwrap();
        let (sections, memory) = (machine.save().unwrap(), memory_image(&machine));
        machine.stop();
        machine = restore(memory, sections, &console).unwrap();
        machine.resume().unwrap();
    }
    machine.stop();
    let text = console.text();
    assert!(text.len() > 26, "{text:?}");
    for (at, letter) in text.bytes().enumerate() {
        assert_eq!(letter, b'a' + u8::try_from(at % 26).unwrap(), "at {at} of {text:?}");
    }
}

#[test]
fn sections_that_do_not_belong_are_refused() {
    let machine = paused(2);
    let good = machine.save().unwrap();
    let refuse = |sections: Sections, why: &str| {
        let error = restore(memory_image(&machine), sections, &Console::default()).expect_err(why);
        hearth::report::chain(&error)
    };
    for missing in good.iter() {
        let text = refuse(rebuilt(good.iter().filter(|section| *section != missing).cloned()), "a section is missing");
        assert!(text.contains(&format!("section {} is missing", missing.name)), "{text}");
    }
    let foreign =
        Section { name: SectionName { kind: SectionKind::Net, instance: 9 }, version: 1, bytes: vec![1, 2, 3] };
    let text = refuse(rebuilt(good.iter().cloned().chain([foreign])), "a leftover");
    assert!(text.contains("Net/9 belongs to nothing"), "{text}");
    let third = good.iter().find(|section| section.name.kind == SectionKind::Vcpu).cloned().unwrap();
    let third = Section { name: SectionName { instance: 2, ..third.name }, ..third };
    let text = refuse(rebuilt(good.iter().cloned().chain([third])), "a third vCPU");
    assert!(text.contains("Vcpu/2 belongs to nothing"), "{text}");
}

#[test]
fn truncated_prolonged_and_newer_sections_are_refused() {
    let machine = paused(1);
    let good = machine.save().unwrap();
    let names: Vec<SectionName> = good.iter().map(|section| section.name).collect();
    let changed = |name: SectionName, change: &dyn Fn(&mut Section)| {
        rebuilt(good.iter().cloned().map(|mut section| {
            if section.name == name {
                change(&mut section);
            }
            section
        }))
    };
    let refused = |sections: Sections, what: &str| {
        let result = restore(memory_image(&machine), sections, &Console::default());
        assert!(result.is_err(), "{what} was taken");
    };
    for name in names {
        let length = good.iter().find(|section| section.name == name).unwrap().bytes.len();
        for cut in [0, 1, length / 2, length - 1] {
            refused(changed(name, &|section| section.bytes.truncate(cut)), &format!("{name} cut to {cut}"));
        }
        refused(changed(name, &|section| section.bytes.push(0)), &format!("{name} and a byte"));
        refused(changed(name, &|section| section.version += 1), &format!("{name} of the next version"));
    }
}

#[test]
fn no_change_of_a_section_panics() {
    let machine = paused(1);
    let good = machine.save().unwrap();
    let memory = memory_image(&machine);
    let mut taken = 0;
    // A fixed sequence: a failure can be repeated. Multiplier and increment of Knuth's MMIX generator.
    let mut random = 1_u64;
    let mut next = |limit: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap() % limit
    };
    for _ in 0..150 {
        let mut sections: Vec<Section> = good.iter().cloned().collect();
        let at = next(sections.len());
        let section = &mut sections[at];
        for _ in 0..=next(4) {
            let byte = next(section.bytes.len());
            section.bytes[byte] ^= 1 << next(8);
        }
        let result = restore(memory.try_clone().unwrap(), rebuilt(sections), &Console::default());
        if let Ok(mut machine) = result {
            taken += 1;
            // Whatever the guest does with such a state is its own affair; ours is to stay in control.
            machine.resume().unwrap();
            machine.pause().unwrap();
        }
    }
    eprintln!("{taken} of 150 changed states were taken");
}

#[test]
fn a_machine_of_another_shape_is_refused() {
    let machine = paused(1);
    let sections = machine.save().unwrap();
    let short = crate::guest::file(&[0; 4096]);
    let error = restore(short, sections, &Console::default()).unwrap_err();
    assert!(matches!(error, BuildError::Ram(_)), "{error:?}");
}

#[test]
fn verbs_are_refused_in_the_wrong_state() {
    let (mut machine, _) = boot(1, Code::new().halt().kernel());
    assert!(machine.resume().is_err());
    assert!(machine.save().is_err());
    machine.pause().unwrap();
    assert!(machine.pause().is_err());
    machine.save().unwrap();
    machine.resume().unwrap();
}
