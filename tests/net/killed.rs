//! An agent's network part is killed between any two steps of setting up and taking down; the next one finishes what
//! was begun, or undoes it, and nothing is left.

use hearth::net::host::HostNetwork;
use hearth::net::member::{Addressing, Member};

use crate::host::{on_own_host, run};
use crate::left::{Looks, assert_same, look, look_inside};
use crate::traced::{is_to_be_killed, killed_before};
use crate::world::{NUMBERS, assert_done, member, spec};

/// The jail's number.
const JAIL: u16 = 5;

/// More steps than there are.
const STEPS_MAX: u32 = 1000;

/// By how many steps one time may differ from another: polls that find something at once.
const WAITS_MORE_OR_LESS: u32 = 4;

fn vm() -> Member {
    member(NUMBERS[0], 517, 1, Addressing::Invariant)
}

/// With all kinds of objects: also a device on the host that is in no jail.
fn network() -> HostNetwork {
    HostNetwork::open(spec(NUMBERS[0], true)).unwrap()
}

/// A host with a way to its peer.
fn wire() {
    run("ip link set lo up");
    run("ip link add wire type veth peer name other");
    run("ip link set wire up");
    run("ip link set other up");
    run("ip address add fd00:f::3/64 dev wire nodad");
}

/// Sets up as an agent does: its host's part, a jail made ahead, its VM in it.
fn set_up(network: &HostNetwork) {
    assert_done(&network.settle_host());
    assert_done(&network.settle_jail(JAIL, 1, None).unwrap());
    assert_done(&network.settle_jail(JAIL, 1, Some(vm())).unwrap());
}

/// Takes down whatever is there, as an agent does that knows of no VM.
fn take_down(network: &HostNetwork) {
    for jail in network.jails().unwrap() {
        assert_done(&network.remove_jail(jail));
    }
    assert_done(&network.clear_host());
}

/// The tests that are the process to be killed when they are started as one.
const SET_UP: &str = "killed::a_set_up_that_was_killed_anywhere_is_undone";
const TAKE_DOWN: &str = "killed::a_removal_that_was_killed_anywhere_is_finished";

/// Kills `part` before each of its steps, and has the next agent do `then`.
fn killed_everywhere(part: &str, before: impl Fn(), then: impl Fn(u32)) {
    for step in 1..STEPS_MAX {
        before();
        let ended = killed_before(part, step);
        if !ended.is_killed() {
            assert!(ended.status.success(), "{part}: {ended:?}");
            // How often it waits for others depends on how fast they are.
            let all = (step - 1).saturating_sub(WAITS_MORE_OR_LESS)..step;
            assert!(ended.steps > 20 && all.contains(&ended.steps), "{part}: {ended:?} where step {step} was to come");
            println!("{part}: killed before each of {} steps", ended.steps);
            take_down(&network());
            return;
        }
        then(step);
    }
    panic!("{part} does not end");
}

/// The namespace all is in.
fn here() -> std::os::fd::OwnedFd {
    hearth::sys::netns::own().unwrap()
}

/// The host and the jail.
fn look_with_jail(network: &HostNetwork) -> Looks {
    let jail = look_inside(&network.namespace(JAIL).unwrap());
    look(&here()).into_iter().chain(jail.into_iter().map(|line| format!("jail: {line}"))).collect()
}

#[test]
fn a_set_up_that_was_killed_anywhere_is_undone() {
    if is_to_be_killed() {
        return set_up(&network());
    }
    on_own_host(|| {
        wire();
        let before = look(&here());
        let is_undone = |step| {
            take_down(&network());
            assert_same(&before, &look(&here()), format_args!("killed before step {step}"));
        };
        killed_everywhere(SET_UP, || (), is_undone);
        assert_same(&before, &look(&here()), "not killed");
    });
}

#[test]
fn a_set_up_that_was_killed_anywhere_is_finished() {
    on_own_host(|| {
        wire();
        let before = look(&here());
        let undisturbed = network();
        set_up(&undisturbed);
        let whole = look_with_jail(&undisturbed);
        take_down(&undisturbed);
        let is_finished = |step| {
            let next = network();
            set_up(&next);
            assert_same(&whole, &look_with_jail(&next), format_args!("killed before step {step}"));
            take_down(&next);
            assert_same(&before, &look(&here()), format_args!("killed before step {step}"));
        };
        killed_everywhere(SET_UP, || (), is_finished);
    });
}

#[test]
fn a_removal_that_was_killed_anywhere_is_finished() {
    if is_to_be_killed() {
        return take_down(&network());
    }
    on_own_host(|| {
        wire();
        let before = look(&here());
        let is_finished = |step| {
            take_down(&network());
            assert_same(&before, &look(&here()), format_args!("killed before step {step}"));
        };
        killed_everywhere(TAKE_DOWN, || set_up(&network()), is_finished);
        assert_same(&before, &look(&here()), "not killed");
    });
}
