//! Programs with a terminal.

use hearth_guest_wire::{Exit, FromGuest, TerminalSize, ToGuest};

use super::agent::{Agent, Host, shell, wait_for_end};

#[test]
fn a_terminal_is_one_and_follows_its_size() {
    let agent = Agent::start();
    let mut exec = shell("tty >/dev/null && echo terminal; stty size; read word; echo got $word; stty size; cat");
    exec.terminal = Some(TerminalSize { rows: 33, columns: 120 });
    let (mut host, _) = agent.exec(exec);
    let mut seen = String::new();
    let mut until = |host: &mut Host, mark: &str| {
        while !seen.contains(mark) {
            match host.hear() {
                FromGuest::Stdout(bytes) => seen.push_str(std::str::from_utf8(&bytes).expect("text")),
                other => panic!("out of place: {other:?}"),
            }
        }
    };
    until(&mut host, "33 120");
    host.say(&ToGuest::Resize { rows: 50, columns: 200 });
    host.say(&ToGuest::Stdin(b"hello\n".to_vec()));
    until(&mut host, "50 200");
    host.say(&ToGuest::StdinClosed);
    assert_eq!(host.outcome().exit, Exit::Code(0));
    assert!(seen.contains("terminal") && seen.contains("got hello"), "{seen}");
}

#[test]
fn a_terminal_that_loses_its_host_is_hung_up() {
    let agent = Agent::start();
    let mut exec = shell("trap '' HUP; sleep 1000");
    exec.terminal = Some(TerminalSize { rows: 24, columns: 80 });
    let (host, pid) = agent.exec(exec);
    drop(host);
    wait_for_end(pid);
}
