//! Guests that give memory back, and have it again.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::Agent;
use super::swap::guest_resident_kib;

/// What the guest is asked to give.
const TARGET_MIB: u64 = 96;

/// How long a guest on a slow host may take to find and hand over that much.
const PATIENCE: Duration = Duration::from_secs(120);

fn balloon(agent: &Agent, vm: &str) -> Value {
    agent.json(&["vm", "stats", vm])["balloon"].clone()
}

fn bytes(balloon: &Value, field: &str) -> u64 {
    balloon[field].as_u64().unwrap_or_else(|| panic!("{field} in {balloon}"))
}

/// Looks until it is so: the guest says nothing when it is done, and its numbers are all there is.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "{what}: not within {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Uses 16 MiB. An emulated kernel takes half a minute for them.
const FILL: &str = "dd if=/dev/zero of=/tmp/fill bs=65536 count=256 2>/dev/null && echo full";

/// Least of that which has to leave the host, in KiB: pages that were never touched are given as well, and take nothing.
/// Half of it or so is given; what the guest keeps free may be the other half.
const GIVEN_KIB: u64 = 4 << 10;

pub(crate) fn gives_memory_back_and_has_it_again(agent: &Agent) {
    let vm = "balloon";
    agent.launch(vm, &["--memory", "128"]);
    let pid = agent.vmm_pid(vm);
    agent.sh(vm, "head -c 65536 /bin/busybox > /tmp/kept; md5sum < /tmp/kept > /tmp/kept.sum");
    assert_eq!(agent.sh(vm, FILL).trim(), "full");
    let full_kib = guest_resident_kib(pid);
    agent.sh(vm, "rm /tmp/fill");
    let target = TARGET_MIB.to_string();
    agent.ok(&["vm", "balloon", vm, "--target", &target]);
    until("the balloon is filled", || bytes(&balloon(agent, vm), "actual_bytes") == TARGET_MIB << 20);
    until("its memory left the host", || guest_resident_kib(pid) + GIVEN_KIB <= full_kib);
    let given_kib = guest_resident_kib(pid);

    // What the guest says of itself, asked for by looking.
    until("the guest's kernel tells of the balloon", || {
        let stats = balloon(agent, vm)["guest"].clone();
        let number = |field: &str| stats[field].as_u64().unwrap_or(0);
        number("total_bytes") > 0
            && number("free_bytes") > 0
            && number("free_bytes") + (TARGET_MIB << 20) <= 128 << 20
            && number("available_bytes") > 0
    });
    let shown = agent.ok(&["vm", "stats", vm]);
    assert!(shown.contains("balloon holds") && shown.contains("guest available"), "{shown}");

    agent.ok(&["vm", "balloon", vm, "--target", "0"]);
    until("the balloon is empty", || bytes(&balloon(agent, vm), "actual_bytes") == 0);
    assert_eq!(agent.sh(vm, "md5sum < /tmp/kept | cmp - /tmp/kept.sum && echo same").trim(), "same");
    println!("    guest memory resident: {full_kib} KiB in use, {given_kib} KiB with {TARGET_MIB} MiB in the balloon");

    let refused = agent.run(&["vm", "balloon", vm, "--target", "97"]);
    let said = super::fixture::text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("at most 96 are possible"), "{said}");
    agent.ok(&["vm", "rm", vm]);
}

/// Without being asked for anything. Linux reports nothing while it has less free than 32 of its largest blocks, which
/// are 4 MiB in a kernel without huge pages (mm/page_reporting.c): a guest of 128 MiB never has.
pub(crate) fn free_memory_is_reported(agent: &Agent) {
    let vm = "balloon-reports";
    agent.launch(vm, &["--memory", "256"]);
    let pid = agent.vmm_pid(vm);
    assert_eq!(agent.sh(vm, FILL).trim(), "full");
    let full_kib = guest_resident_kib(pid);
    agent.sh(vm, "rm /tmp/fill");
    until("the guest reports what it freed", || guest_resident_kib(pid) + GIVEN_KIB <= full_kib);
    assert!(bytes(&balloon(agent, vm), "reported_bytes") >= GIVEN_KIB << 10);
    println!("    guest memory resident: {full_kib} KiB in use, {} KiB once reported", guest_resident_kib(pid));
    assert_eq!(agent.sh(vm, "echo on").trim(), "on");
    agent.ok(&["vm", "rm", vm]);
}

/// A clone's balloon goes on as the bundle's was: its memory comes from a private file.
pub(crate) fn of_a_clone_goes_on_as_it_was(agent: &Agent) {
    let (vm, clone, bundle) = ("balloon-original", "balloon-clone", "balloon");
    agent.launch(vm, &["--memory", "128"]);
    agent.ok(&["vm", "balloon", vm, "--target", "16"]);
    until("the balloon is filled", || bytes(&balloon(agent, vm), "actual_bytes") == 16 << 20);
    agent.ok(&["vm", "snapshot", vm, "--bundle-name", bundle]);
    agent.ok(&["vm", "launch", "--bundle", bundle, "--name", clone]);
    let pid = agent.vmm_pid(clone);
    assert_eq!(bytes(&balloon(agent, clone), "actual_bytes"), 16 << 20);
    agent.ok(&["vm", "balloon", clone, "--target", "0"]);
    until("the balloon is empty", || bytes(&balloon(agent, clone), "actual_bytes") == 0);
    assert_eq!(agent.sh(clone, FILL).trim(), "full");
    let full_kib = guest_resident_kib(pid);
    agent.sh(clone, "rm /tmp/fill");
    agent.ok(&["vm", "balloon", clone, "--target", &TARGET_MIB.to_string()]);
    // Less than of a guest that booted: pages of the bundle that it only read are not its own.
    until("its memory left the host", || guest_resident_kib(pid) + GIVEN_KIB / 2 <= full_kib);
    println!("    a clone's guest memory resident: {full_kib} KiB in use, {} given", guest_resident_kib(pid));
    assert_eq!(agent.sh(clone, "echo on").trim(), "on");
    agent.ok(&["vm", "rm", clone, vm]);
    agent.ok(&["bundle", "rm", bundle]);
}
