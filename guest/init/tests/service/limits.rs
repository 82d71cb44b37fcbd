//! How many connections there may be, and what they leave.

use std::io::Write;
use std::process::Command;

use hearth_guest_wire::frame;
use hearth_guest_wire::{Exit, FromGuest, ToGuest, VERSION};

use super::agent::{Agent, Host, program, wait_for_end, wait_until};

#[test]
fn connections_above_the_limit_are_refused_and_come_back() {
    let agent = Agent::start();
    agent.settled_descriptors();
    let held: Vec<Host> = (0..64).map(|_| agent.greeted()).collect();
    assert_eq!(agent.connect().hear_failure().0, 24);
    drop(held);
    wait_until("a place is free", || {
        let mut host = agent.connect();
        let _ = host.stream.write_all(&frame::encode(&ToGuest::Hello { version: VERSION }).expect("a frame"));
        matches!(host.try_hear(), Some(FromGuest::Hello { .. }))
    });
}

#[test]
fn a_thousand_connections_leave_nothing_behind() {
    let agent = Agent::start();
    agent.run("true");
    let (descriptors, before_kib) = (agent.settled_descriptors(), agent.status("VmRSS"));
    for number in 0..1000 {
        match number % 4 {
            0 => drop(agent.greeted()),
            1 => drop(agent.connect()),
            2 => drop(agent.exec(program(&["sleep", "1000"]))),
            _ => {
                let (mut host, _) = agent.exec(program(&["true"]));
                assert_eq!(host.outcome().exit, Exit::Code(0));
            }
        }
    }
    wait_until("all descriptors are closed", || agent.open_descriptors() == descriptors);
    let after_kib = agent.status("VmRSS");
    assert!(after_kib < before_kib + 512, "from {before_kib} to {after_kib} KiB");
    let children = format!("/proc/{0}/task/{0}/children", agent.process.id());
    wait_until("all children are reaped", || std::fs::read_to_string(&children).is_ok_and(|list| list.is_empty()));
}

#[test]
fn a_service_ends_when_asked() {
    let mut agent = Agent::start();
    let (_host, pid) = agent.exec(program(&["sleep", "1000"]));
    let ended = Command::new("kill").arg(agent.process.id().to_string()).status().expect("kill runs");
    assert!(ended.success());
    assert_eq!(agent.process.wait().expect("it ends").code(), Some(0));
    wait_for_end(pid);
}
