//! Programs' streams: whole, bounded, and closed when the host goes.

use std::io::Write;
use std::net::Shutdown as Half;
use std::thread;
use std::time::Duration;

use hearth_guest_wire::frame;
use hearth_guest_wire::{Exit, STREAM_CHUNK_BYTES, ToGuest};

use super::agent::{Agent, Host, exists, pattern, program, shell, wait_for_end};

#[test]
fn eight_mebibytes_come_back_as_they_went() {
    let agent = Agent::start();
    let sent = pattern(8 << 20);
    let (mut host, _) = agent.exec(program(&["cat"]));
    let mut to = host.stream.try_clone().expect("a second handle");
    let bytes = sent.clone();
    let writer = thread::spawn(move || {
        for chunk in bytes.chunks(STREAM_CHUNK_BYTES) {
            to.write_all(&frame::encode(&ToGuest::Stdin(chunk.to_vec())).expect("a frame")).expect("the agent reads");
        }
        to.write_all(&frame::encode(&ToGuest::StdinClosed).expect("a frame")).expect("the agent reads");
    });
    let outcome = host.outcome();
    writer.join().expect("the writer ends");
    assert_eq!(outcome.exit, Exit::Code(0));
    assert!(outcome.stdout == sent, "{} of {} bytes, or others", outcome.stdout.len(), sent.len());
}

#[test]
fn sixteen_programs_run_at_once() {
    let agent = Agent::start();
    thread::scope(|scope| {
        for number in 0..16_u8 {
            let agent = &agent;
            scope.spawn(move || {
                let sent = pattern(200_000 + usize::from(number));
                let (mut host, _) = agent.exec(shell(&format!("cat; exit {number}")));
                for chunk in sent.chunks(10_000) {
                    host.say(&ToGuest::Stdin(chunk.to_vec()));
                    // Keeps the program's output from filling the sockets while nobody reads here.
                    if chunk.len() < 10_000 {
                        break;
                    }
                }
                host.say(&ToGuest::StdinClosed);
                let outcome = host.outcome();
                assert_eq!(outcome.exit, Exit::Code(number));
                assert!(outcome.stdout == sent);
            });
        }
    });
}

#[test]
fn a_closed_connection_kills_the_group() {
    let agent = Agent::start();
    for half in [None, Some(Half::Write)] {
        let (host, pid) = agent.exec(shell("sleep 1000 & sleep 1000"));
        match half {
            Some(half) => host.stream.shutdown(half).expect("half a close"),
            None => drop(host),
        }
        wait_for_end(pid);
    }
}

#[test]
fn a_closed_connection_kills_even_when_input_is_stuck() {
    let agent = Agent::start();
    let (mut host, pid) = agent.exec(program(&["sleep", "1000"]));
    host.stream.set_write_timeout(Some(Duration::from_millis(300))).expect("time-outs can be set");
    let frame = frame::encode(&ToGuest::Stdin(vec![7; STREAM_CHUNK_BYTES])).expect("a frame");
    // More than the pipe, the agent and the socket hold.
    let stuck = (0..1000).any(|_| host.stream.write_all(&frame).is_err());
    assert!(stuck, "the agent stops reading what its program does not take");
    drop(host);
    wait_for_end(pid);
}

#[test]
fn a_reader_that_never_reads_costs_bounded_memory() {
    let agent = Agent::start();
    let before_kib = agent.status("VmRSS");
    let hosts: Vec<(Host, u32)> = (0..8).map(|_| agent.exec(program(&["cat", "/dev/zero"]))).collect();
    let pids: Vec<u32> = hosts.iter().map(|(_, pid)| *pid).collect();
    agent.wait_for_rest(&pids);
    let with_kib = agent.status("VmRSS");
    assert!(with_kib < before_kib + 4096, "from {before_kib} to {with_kib} KiB");
    assert_eq!(agent.run("echo others go on").text(), "others go on\n");
    drop(hosts);
}

#[test]
fn a_slow_reader_gets_everything() {
    let agent = Agent::start();
    let (mut host, pid) = agent.exec(program(&["head", "-c", "3000000", "/dev/zero"]));
    agent.wait_for_rest(&[pid]);
    assert!(exists(pid), "the program waits for its reader");
    assert_eq!(host.outcome().stdout.len(), 3_000_000);
}

#[test]
fn what_a_program_left_in_its_pipes_is_delivered_late_too() {
    let agent = Agent::start();
    // The background process holds the pipes open; 60,000 bytes are in them when the program ends.
    let (mut host, _) = agent.exec(shell("head -c 60000 /dev/zero; sleep 5 & exit 4"));
    host.wait_until_all_is_said();
    let outcome = host.outcome();
    assert_eq!((outcome.stdout.len(), outcome.exit), (60_000, Exit::Code(4)));
}

#[test]
fn input_chunks_are_bounded() {
    let agent = Agent::start();
    let (mut host, _) = agent.exec(program(&["cat"]));
    host.say(&ToGuest::Stdin(vec![1; STREAM_CHUNK_BYTES]));
    host.say(&ToGuest::StdinClosed);
    assert_eq!(host.outcome().stdout.len(), STREAM_CHUNK_BYTES);
    let (mut host, _) = agent.exec(program(&["cat"]));
    host.say(&ToGuest::Stdin(vec![1; STREAM_CHUNK_BYTES + 1]));
    assert_eq!(host.hear_failure().0, 71);
}
