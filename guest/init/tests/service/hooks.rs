//! Programs that take note of an identity.

use hearth_guest_wire::{FromGuest, HOOKS_MAX, HookFailure, HooksRan, ToGuest};

use super::agent::{Agent, Host, exists, identity, wait_until};

/// A guest that is somebody, and the connection on which it was told.
fn somebody() -> Option<(Agent, Host)> {
    let agent = Agent::start_guest_by(&["--uts", "--mount"], "")?;
    let mut host = agent.greeted();
    host.has_done(&ToGuest::Identity(identity("named", 0x1a)));
    agent.must("mkdir -p /etc/hearth/identity.d /run/hearth/identity.d");
    Some((agent, host))
}

/// Makes a hook of a shell script.
fn hook(agent: &Agent, path: &str, script: &str) {
    agent.must(&format!("cat > {path} <<'END' && chmod +x {path}\n#!/bin/sh\n{script}\nEND\n"));
}

fn run_hooks(host: &mut Host, timeout_ms: u32) -> HooksRan {
    host.say(&ToGuest::RunHooks { timeout_ms });
    match host.hear() {
        FromGuest::HooksRan(ran) => ran,
        other => panic!("expected the hooks' outcome, heard {other:?}"),
    }
}

fn failure(name: &str, reason: &str) -> HookFailure {
    HookFailure { name: name.to_owned(), reason: reason.to_owned() }
}

#[test]
fn without_hooks_nothing_is_run() {
    let Some(agent) = Agent::start_guest_by(&["--uts", "--mount"], "") else { return };
    let mut host = agent.greeted();
    assert_eq!(host.has_failed(&ToGuest::RunHooks { timeout_ms: 1000 }).0, 61, "nobody yet");
    host.has_done(&ToGuest::Identity(identity("named", 1)));
    assert_eq!(run_hooks(&mut host, 0), HooksRan::default());
    agent.must("mkdir -p /etc/hearth/identity.d/folder /run/hearth/identity.d; echo > /etc/hearth/identity.d/README");
    assert_eq!(run_hooks(&mut host, 0), HooksRan::default());
}

#[test]
fn hooks_run_in_order_and_know_who_the_guest_is() {
    let Some((agent, mut host)) = somebody() else { return };
    let note = "echo \"${0##*/}\" $HEARTH_VM_ID $HEARTH_HOSTNAME $HEARTH_GENERATION $INHERITED $(pwd) >> /run/noted";
    for path in ["/etc/hearth/identity.d/30-c", "/run/hearth/identity.d/20-b", "/etc/hearth/identity.d/10-a"] {
        hook(&agent, path, note);
    }
    // Of one name: the image's goes first. Hidden ones are not meant.
    hook(&agent, "/run/hearth/identity.d/40-d", &format!("echo also >> /run/noted; {note}"));
    hook(&agent, "/etc/hearth/identity.d/40-d", note);
    hook(&agent, "/etc/hearth/identity.d/.50-e", note);
    let expected: String = ["10-a", "20-b", "30-c", "40-d", "also\n40-d"]
        .iter()
        .map(|name| format!("{name} vm-test named {} yes /\n", "1a".repeat(16)))
        .collect();
    for _ in 0..2 {
        assert_eq!(run_hooks(&mut host, 20_000), HooksRan { ran: 5, failed: Vec::new() });
        assert_eq!(agent.must("cat /run/noted; rm /run/noted"), expected);
    }
    // Another identity is another environment.
    host.has_done(&ToGuest::Identity(identity("renamed", 0x2b)));
    run_hooks(&mut host, 20_000);
    let noted = agent.must("cat /run/noted");
    assert!(noted.contains(&format!("renamed {}", "2b".repeat(16))) && !noted.contains("named 1a"), "{noted}");
}

#[test]
fn hooks_that_fail_are_told_and_the_others_run() {
    let Some((agent, mut host)) = somebody() else { return };
    hook(&agent, "/run/hearth/identity.d/1-code", "exit 3");
    hook(&agent, "/run/hearth/identity.d/2-signal", "kill -9 $$");
    agent.must("echo 'no program' > /run/hearth/identity.d/3-garbage; chmod +x /run/hearth/identity.d/3-garbage");
    // Standard input is at its end at once.
    hook(&agent, "/run/hearth/identity.d/4-fine", "read line || echo fine > /run/noted");
    let failed = vec![
        failure("1-code", "exit code 3"),
        failure("2-signal", "ended by signal 9"),
        failure("3-garbage", "could not be started: errno 8"),
    ];
    assert_eq!(run_hooks(&mut host, 20_000), HooksRan { ran: 3, failed });
    assert_eq!(agent.must("cat /run/noted"), "fine\n");
}

#[test]
fn a_time_out_kills_the_one_that_runs_and_starts_no_other() {
    let Some((agent, mut host)) = somebody() else { return };
    hook(&agent, "/run/hearth/identity.d/1-quick", "echo quick > /run/noted");
    hook(&agent, "/run/hearth/identity.d/2-slow", "sleep 1000 & echo $! > /run/pid; exec sleep 1000");
    hook(&agent, "/run/hearth/identity.d/3-late", "echo late > /run/noted");
    let failed = vec![failure("2-slow", "timed out"), failure("3-late", "not started: the time was over")];
    assert_eq!(run_hooks(&mut host, 2000), HooksRan { ran: 2, failed });
    let background: u32 = agent.must("cat /run/pid").trim().parse().expect("a process id");
    wait_until("the hook's group is gone", || !exists(background));
    assert_eq!(agent.must("cat /run/noted"), "quick\n");
    // No time at all: the first may have been quicker than the timer.
    assert!(run_hooks(&mut host, 0).failed.len() >= 2);
}

#[test]
fn others_are_served_while_hooks_run() {
    let Some((agent, mut host)) = somebody() else { return };
    agent.must("mkfifo /run/go");
    hook(&agent, "/run/hearth/identity.d/1-waits", "read line < /run/go");
    host.say(&ToGuest::RunHooks { timeout_ms: 20_000 });
    // What comes on the same connection waits for its turn.
    host.say(&ToGuest::Thaw);
    assert_eq!(agent.run("echo served").text(), "served\n");
    agent.must("echo > /run/go");
    assert_eq!(host.hear(), FromGuest::HooksRan(HooksRan { ran: 1, failed: Vec::new() }));
    assert_eq!(host.hear(), FromGuest::Done);
}

#[test]
fn a_host_that_goes_away_ends_its_hooks() {
    let Some((agent, mut host)) = somebody() else { return };
    agent.must("mkfifo /run/begun");
    hook(&agent, "/run/hearth/identity.d/1-stays", "echo $$ > /run/begun; exec sleep 1000");
    host.say(&ToGuest::RunHooks { timeout_ms: 1_000_000 });
    let pid: u32 = agent.must("cat /run/begun").trim().parse().expect("a process id");
    assert!(exists(pid));
    drop(host);
    wait_until("the hook is gone", || !exists(pid));
}

#[test]
fn more_hooks_than_allowed_are_refused() {
    let Some((agent, mut host)) = somebody() else { return };
    let fill = format!(
        "cd /etc/hearth/identity.d; for i in $(seq {HOOKS_MAX}); do printf '#!/bin/true\\n' > $i; done; chmod +x *"
    );
    agent.must(&fill);
    assert_eq!(run_hooks(&mut host, 20_000).ran, 64);
    hook(&agent, "/run/hearth/identity.d/one-more", "true");
    assert_eq!(host.has_failed(&ToGuest::RunHooks { timeout_ms: 1000 }), (7, String::from("more than 64 hooks")));
}
