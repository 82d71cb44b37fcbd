//! What the dirty log sees: the guest's writes, the VMM's writes, each consumer its own.

use hearth::machine::{BeginWith, PageRun};
use hearth::sys::kvm::CallError;
use hearth::units::{MIB, PAGE_BYTES, PageCount, PageIndex};
use vm_memory::{Bytes as _, GuestAddress};

use crate::guest::{Code, DATA, SERIAL};
use crate::host::boot;

const PAGES: PageCount = PageCount(16 * MIB / PAGE_BYTES);

fn page(address: u32) -> PageIndex {
    PageIndex(u64::from(address) / PAGE_BYTES)
}

/// Prints a letter, waits for a byte, writes to the page of the next letter.
fn step_by_step() -> Code {
    (0..4_u8)
        .fold(Code::new(), |code, step| {
            code.out(SERIAL, b'a' + step)
                .until_not_zero(|code| code.in_al(SERIAL + 5).test_al(1))
                .in_al(SERIAL)
                .store8(DATA + 0x1000 * u32::from(step), 1)
        })
        .print("done")
        .halt()
}

#[test]
fn writes_of_guest_and_vmm_are_seen_by_every_consumer() {
    let (mut machine, console) = boot(1, step_by_step().kernel());
    console.expect("a");
    assert_eq!(machine.dirty().consumers(), 0);
    let all = machine.dirty().subscribe(BeginWith::AllPages).unwrap();
    machine.pause().unwrap();
    let none = machine.dirty().subscribe(BeginWith::NoPages).unwrap();
    assert_eq!(none.harvest().unwrap(), PageCount(0));
    assert_eq!(all.harvest().unwrap(), PAGES);
    assert_eq!(all.take_batch(PageCount(u64::MAX)).unwrap().len(), 1);
    assert_eq!(all.harvest().unwrap(), PageCount(0));

    machine.resume().unwrap();
    machine.console_input(b"x");
    console.expect("b");
    machine.pause().unwrap();
    none.harvest().unwrap();
    for set in [all.snapshot(), none.snapshot()] {
        assert!(set.contains(page(DATA)) && !set.contains(page(DATA + 0x1000)), "{:?}", set.runs());
    }
    // One forgets, the other does not.
    assert!(!all.take_batch(PageCount(u64::MAX)).unwrap().is_empty());
    assert_eq!(all.harvest().unwrap(), PageCount(0));
    assert!(none.snapshot().contains(page(DATA)));

    machine.ram().write_obj(1_u8, GuestAddress(u64::from(DATA + 0x20_0000))).unwrap();
    all.harvest().unwrap();
    assert_eq!(all.snapshot().runs().len(), 1);
    assert!(all.snapshot().contains(page(DATA + 0x20_0000)));
    assert!(none.snapshot().contains(page(DATA + 0x20_0000)));

    // A page that was harvested before is seen again.
    machine.resume().unwrap();
    machine.console_input(b"xxx");
    console.expect("done");
    all.harvest().unwrap();
    for step in 1..4 {
        assert!(all.snapshot().contains(page(DATA + 0x1000 * step)));
    }
    drop((all, none));
    assert_eq!(machine.dirty().consumers(), 0);
}

#[test]
fn what_is_touched_while_a_consumer_begins_is_not_lost() {
    let (mut machine, console) = boot(1, step_by_step().kernel());
    console.expect("a");
    let touched = PageRun { first: page(DATA + 0x20_0000), count: PageCount(1) };
    let looks = std::cell::Cell::new(0);
    let consumer = machine.dirty().subscribe_touched::<CallError>(|| {
        looks.set(looks.get() + 1);
        if looks.get() == 1 {
            // The first look is over when the guest writes: that is in a log which is forgotten for what nobody touched.
            machine.console_input(b"x");
            console.expect("b");
            machine.ram().write_obj(1_u8, GuestAddress(u64::from(DATA + 0x30_0000))).unwrap();
            return Ok(vec![touched]);
        }
        let late = [DATA, DATA + 0x30_0000].map(|address| PageRun { first: page(address), count: PageCount(1) });
        Ok([&[touched], &late[..]].concat())
    });
    let consumer = consumer.unwrap();
    assert_eq!((looks.get(), consumer.snapshot().len()), (2, PageCount(3)));
    // What nobody has touched is in no log, and what is taken is seen again.
    machine.pause().unwrap();
    assert_eq!(consumer.take_batch(PageCount(u64::MAX)).unwrap().len(), 3);
    assert!(consumer.harvest().unwrap() < PageCount(8), "{:?}", consumer.snapshot().runs());
    consumer.take_batch(PageCount(u64::MAX)).unwrap();
    assert_eq!(consumer.harvest().unwrap(), PageCount(0));
    machine.resume().unwrap();
    machine.console_input(b"xxx");
    console.expect("done");
    consumer.harvest().unwrap();
    for step in 1..4 {
        assert!(consumer.snapshot().contains(page(DATA + 0x1000 * step)));
    }
    drop(consumer);
    assert_eq!(machine.dirty().consumers(), 0);
}

#[test]
fn a_page_written_all_the_time_is_seen_every_time() {
    let (machine, console) = boot(1, Code::new().print(">").forever(|code| code.increment(DATA)).kernel());
    console.expect(">");
    let consumer = machine.dirty().subscribe(BeginWith::NoPages).unwrap();
    for round in 0..10 {
        crate::host::wait_until(
            || consumer.harvest().unwrap() > PageCount(0),
            || format!("no write was seen in round {round}"),
        );
        assert!(consumer.snapshot().contains(page(DATA)));
        let batch = consumer.take_batch(PageCount(u64::MAX)).unwrap();
        assert!(!batch.is_empty() && !consumer.snapshot().contains(page(DATA)));
        consumer.put_back(&batch);
        assert!(consumer.snapshot().contains(page(DATA)));
        consumer.take_batch(PageCount(u64::MAX)).unwrap();
    }
}
