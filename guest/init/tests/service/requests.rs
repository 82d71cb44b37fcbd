//! Requests that are no program and change nothing: stats, syncs, and what a service refuses.

use hearth_guest_wire::{FromGuest, Shutdown, ToGuest};

use super::agent::{Agent, identity, program};

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
fn a_quiesced_guest_that_is_never_thawed_goes_on() {
    // What a restored guest sees: its connections are gone, and nobody knows of the quiesce.
    let agent = Agent::start();
    let mut host = agent.greeted();
    host.say(&ToGuest::Quiesce { timeout_ms: 20_000 });
    assert!(matches!(host.hear(), FromGuest::Quiesced { complete: true, .. }));
    drop(host);
    assert_eq!(agent.run("echo written > /dev/null; echo fine").text(), "fine\n");
    let mut host = agent.greeted();
    host.say(&ToGuest::Quiesce { timeout_ms: 20_000 });
    assert!(matches!(host.hear(), FromGuest::Quiesced { complete: true, .. }));
}

#[test]
fn a_service_does_not_touch_its_machine() {
    let agent = Agent::start();
    let mut host = agent.greeted();
    for request in [
        ToGuest::SetClock { unix_ns: 1 },
        ToGuest::Shutdown(Shutdown::PowerOff),
        ToGuest::Identity(identity("other", 1)),
        ToGuest::Hardware(Vec::new()),
        ToGuest::Root { disk: "/dev/vda".to_owned(), read_only: false },
    ] {
        host.say(&request);
        let answer = host.hear();
        assert!(matches!(answer, FromGuest::Failed { errno: 1, .. }), "{answer:?}");
    }
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear(), FromGuest::Done);
}
