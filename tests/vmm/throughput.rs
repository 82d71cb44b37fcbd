//! How many bytes a second a machine is sent with, with TLS and without: between agents there is no stream without, so
//! this is where what it costs can be seen. Two VMMs and loopback; the guest is a few instructions that fill memory and
//! then do nothing. `scripts/bench-migrate` runs it with `HEARTH_STREAM_ROUNDS`, for figures that mean something.

use std::time::{Duration, Instant};

use hearth::wire::control::{Answer, Packing, ReceivedMemory, Request, SendPhases, SendSpec, StreamForm};
use hearth::wire::stream::VERSION;
use tiny::Code;

use crate::moved::{SPEC, TOKEN, arriving_sized, connections, moved_to_in, tls};
use crate::{NONCE, Vmm, console};

#[path = "../machine/guest.rs"]
#[expect(dead_code, reason = "the other guests of the machine tests")]
mod tiny;

const MIB: u64 = 1 << 20;

/// What the guest fills begins here; below is what it was loaded with.
const FILLED_FROM: u32 = 16 << 20;

/// A guest that writes to every page of its memory, once, and says so. Of a page that is not all zeroes all bytes are
/// sent, whatever they are.
fn filler(memory_bytes: u64) -> Code {
    let end = u32::try_from(memory_bytes).unwrap();
    Code::new()
        // mov rdi, FILLED_FROM
        .bytes(&[0x48, 0xC7, 0xC7])
        .bytes(&FILLED_FROM.to_le_bytes())
        // mov [rdi], edi; add rdi, 4096; cmp rdi, end; jb to the first of them
        .bytes(&[0x89, 0x3F, 0x48, 0x81, 0xC7, 0, 0x10, 0, 0, 0x48, 0x81, 0xFF])
        .bytes(&end.to_le_bytes())
        .bytes(&[0x72, 0xEE])
        .print("full")
        .halt()
}

fn full(memory_bytes: u64) -> Vmm {
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    let launched = vmm.launch_shaped((1, memory_bytes), "", &filler(memory_bytes).kernel(), &[]);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    let begun = Instant::now();
    while !console(&vmm).contains("full") {
        assert!(begun.elapsed() < Duration::from_secs(120), "its memory is not full; it said {:?}", console(&vmm));
        std::thread::sleep(Duration::from_millis(20));
    }
    vmm
}

fn sent(from: Vmm, memory_bytes: u64, count: u8, is_sealed: bool) -> (Vmm, SendPhases) {
    let (ours, theirs) = connections(count);
    let (source, target) = if is_sealed { Some(tls()).unzip() } else { (None, None) };
    let to = arriving_sized(&theirs, TOKEN, target, (ReceivedMemory::New, None), memory_bytes);
    drop(theirs);
    // As agents have it between hosts of this version.
    let form = StreamForm { version: VERSION, packing: Packing::None };
    let (next, sent) = moved_to_in(form, to, from, ours, SendSpec { tls: source, ..SPEC });
    let Answer::SentIn { phases, .. } = sent else { panic!("{sent:?}") };
    (next, phases)
}

#[test]
fn a_full_machine_is_sent_with_tls_and_without() {
    let rounds: Option<usize> = std::env::var("HEARTH_STREAM_ROUNDS").ok().map(|text| text.parse().expect("a number"));
    let sizes: &[u64] = if rounds.is_some() { &[128, 1024] } else { &[128] };
    for &mib in sizes {
        let mut vmm = full(mib * MIB);
        for (count, is_sealed) in [(1, false), (1, true), (2, false), (2, true)] {
            let mut all = Vec::new();
            for _ in 0..2 * rounds.unwrap_or(1) {
                let (next, phases) = sent(vmm, mib * MIB, count, is_sealed);
                vmm = next;
                assert!(phases.pages * 4096 > (mib - 17) * MIB, "{phases:?}");
                all.push(phases);
            }
            all.sort_by_key(|phases| phases.running_ns + phases.held_ns);
            let median = all[all.len() / 2];
            let took = Duration::from_nanos(median.running_ns + median.held_ns);
            let rate = u128::from(median.wire_bytes) * 1_000_000_000 / took.as_nanos() / u128::from(MIB);
            let held_us = median.held_ns / 1000;
            println!(
                r#"{{"mib":{mib},"connections":{count},"tls":{is_sealed},"mib_per_s":{rate},"total_ms":{},"held_us":{held_us},"count":{}}}"#,
                took.as_millis(),
                all.len(),
            );
        }
    }
}
