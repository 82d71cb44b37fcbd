//! Requests that are no program: stats, syncs, an identity.

use std::process::Command;

use hearth_guest_wire::{Address, Exit, FromGuest, Identity, Interface, Shutdown, ToGuest};

use super::agent::{Agent, program};

#[test]
fn stats_tell_of_this_machine() {
    let agent = Agent::start();
    let (_cat, _) = agent.exec(program(&["cat"]));
    let mut host = agent.greeted();
    host.say(&ToGuest::Stats);
    let FromGuest::Stats(stats) = host.hear() else { panic!("expected stats") };
    assert_eq!(stats.execs_running, 1);
    assert!(stats.processes > 1);
    assert!(stats.memory_available_bytes > 0 && stats.memory_available_bytes < stats.memory_total_bytes);
    assert!(stats.uptime_ns > 0 && stats.unix_ns > 1_600_000_000_000_000_000);
}

#[test]
fn a_sync_that_has_no_time_says_so() {
    let agent = Agent::start();
    let mut host = agent.greeted();
    host.say(&ToGuest::Quiesce { timeout_ms: 0 });
    // Either answer is true on a fast disk; there is exactly one, and the connection goes on.
    assert!(matches!(host.hear(), FromGuest::Quiesced { .. }));
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear(), FromGuest::Done);
}

#[test]
fn a_service_does_not_touch_its_machine() {
    let agent = Agent::start();
    let mut host = agent.greeted();
    for request in [ToGuest::SetClock { unix_ns: 1 }, ToGuest::Shutdown(Shutdown::PowerOff)] {
        host.say(&request);
        let answer = host.hear();
        assert!(matches!(answer, FromGuest::Failed { errno: 1, .. }), "{answer:?}");
    }
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear(), FromGuest::Done);
}

fn identity(hostname: &str, interfaces: Vec<Interface>) -> Identity {
    Identity {
        vm_id: String::from("vm-test"),
        hostname: String::from(hostname),
        generation: [1; 16],
        entropy: [[7; 32]; 2],
        // The clock is the machine's: left alone.
        unix_ns: 0,
        interfaces,
    }
}

#[test]
fn an_identity_is_applied_and_another_replaces_it() {
    let user = Command::new("id").arg("-u").output().expect("id runs");
    if user.stdout != b"0\n" {
        eprintln!("skipped: namespaces are made by root only");
        return;
    }
    // A network and a name of its own: nothing of the machine is changed.
    let agent = Agent::start_by(&["unshare", "--net", "--uts", env!("CARGO_BIN_EXE_init")], &["--guest"]);
    let made = agent.run(
        "ip link add eth0 address 02:00:00:00:00:01 type veth peer name far && ip link set far up \
         && ip link add eth1 address 02:00:00:00:00:02 type veth peer name away",
    );
    assert_eq!(made.exit, Exit::Code(0), "{}", String::from_utf8_lossy(&made.stderr));
    let mut host = agent.greeted();
    let first = vec![
        Interface {
            mac: [2, 0, 0, 0, 0, 1],
            addresses: vec![
                Address::V4([10, 9, 8, 7], 24),
                Address::V6([0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5], 64),
            ],
            mtu: 1400,
        },
        Interface { mac: [2, 0, 0, 0, 0, 2], addresses: vec![Address::V4([10, 1, 1, 1], 32)], mtu: 0 },
    ];
    // Twice: the second time nothing is left to change.
    for _ in 0..2 {
        host.say(&ToGuest::Identity(identity("first-name", first.clone())));
        assert_eq!(host.hear(), FromGuest::Done);
        let seen = agent.run("hostname; ip -o addr show eth0; ip -o addr show eth1; ip -o link show eth0");
        let seen = seen.text();
        assert!(seen.starts_with("first-name\n"), "{seen}");
        for part in ["10.9.8.7/24 brd 10.9.8.255", "fd00:1::5/64 scope global nodad", "10.1.1.1/32", "mtu 1400", ",UP"]
        {
            assert!(seen.contains(part), "{part} in {seen}");
        }
    }

    let second =
        vec![Interface { mac: [2, 0, 0, 0, 0, 1], addresses: vec![Address::V4([10, 9, 8, 9], 24)], mtu: 1400 }];
    host.say(&ToGuest::Identity(identity("second-name", second)));
    assert_eq!(host.hear(), FromGuest::Done);
    let seen = agent.run("hostname; ip -o addr show eth0");
    let seen = seen.text();
    assert!(seen.starts_with("second-name\n") && seen.contains("10.9.8.9/24"), "{seen}");
    assert!(!seen.contains("10.9.8.7") && !seen.contains("fd00:1::5") && seen.contains("fe80:"), "{seen}");

    let unknown = vec![Interface { mac: [2, 0, 0, 0, 0, 9], addresses: Vec::new(), mtu: 0 }];
    host.say(&ToGuest::Identity(identity("third-name", unknown)));
    let answer = host.hear();
    let FromGuest::Failed { errno: 19, what } = answer else { panic!("{answer:?}") };
    assert_eq!(what, "no interface is 02:00:00:00:00:09");
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear(), FromGuest::Done);
}
