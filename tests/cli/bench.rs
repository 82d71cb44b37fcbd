//! Benches: what they ask for, what they print, and that they leave nothing, whatever ends them.

use serde_json::Value;

use crate::fake::{Fake, Fate};
use crate::run::{at, code, output, piped, signal, text, wait_until};

#[test]
fn a_bench_measures_and_leaves_nothing() {
    let fake = Fake::start();
    let words = ["--json", "bench", "boot", "--count", "3", "--idle-seconds", "1"];
    let output = output(at(&fake.socket(), &words));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["phases_ms"]["kernel"]["p50"], 9000.0);
    assert_eq!(report["phases_ms"]["exec"]["count"], 3);
    assert!(report["phases_ms"]["total"]["min"].as_f64().expect("a number") > 9533.0);
    assert!(report["vmm_overhead_bytes"]["p50"].as_f64().expect("a number") > 0.0, "{report:#}");
    assert!(report["idle_cpu_percent"]["max"].as_f64().is_some());
    assert!(report["agent_resident_after_bytes"].as_u64().expect("a number") > 0);
    let calls = fake.noted(|notes| notes.calls.clone());
    assert_eq!(calls.iter().filter(|call| call.starts_with("DELETE /v1/vms/bench-")).count(), 3, "{calls:?}");
    assert!(fake.noted(|notes| notes.bodies.iter().all(|body| body["wait"] == "running")));
}

#[test]
fn a_bench_prints_a_table() {
    let fake = Fake::start();
    let words = ["bench", "boot", "--count", "2", "--idle-seconds", "0", "--together"];
    let output = output(at(&fake.socket(), &words));
    let said = text(&output.stdout);
    for wanted in ["PHASE", "P99", "spawn", "2.00 ms", "vmm overhead", "agent memory with 2 VMs"] {
        assert!(said.contains(wanted), "no {wanted:?} in\n{said}");
    }
    let calls = fake.noted(|notes| notes.calls.clone());
    let first_delete = calls.iter().position(|call| call.starts_with("DELETE")).expect("they are removed");
    assert!(calls[first_delete..].iter().all(|call| call.starts_with("DELETE")), "{calls:?}");
}

#[test]
fn a_bench_that_is_interrupted_removes_its_vm() {
    let fake = Fake::with_fate(Fate::Hangs);
    let mut child = piped(at(&fake.socket(), &["bench", "boot"]));
    wait_until("it launches", || fake.noted(|notes| !notes.bodies.is_empty()));
    signal(&child, "INT");
    assert_eq!(code(&mut child), 130);
    assert!(fake.noted(|notes| notes.calls.iter().any(|call| call.starts_with("DELETE /v1/vms/bench-"))));
}

#[test]
fn snapshots_are_measured_by_turns_and_removed() {
    let fake = Fake::start();
    let words = ["--json", "bench", "snapshot", "--bundle", "web", "--count", "2", "--idle", "50ms"];
    let output = output(at(&fake.socket(), &words));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let (full, diff) = (&report["series"][0], &report["series"][1]);
    assert_eq!((&full["name"], &full["count"], &full["quiesced"]), (&"full".into(), &2.into(), &0.into()));
    assert_eq!((&diff["name"], &diff["count"], &diff["quiesced"]), (&"diff".into(), &2.into(), &2.into()));
    let live = &report["series"][2];
    assert_eq!((&live["name"], &live["count"], &live["pause_ms"]["p50"]), (&"live".into(), &2.into(), &9.0.into()));
    assert_eq!((&full["pause_ms"]["p99"], &diff["pause_ms"]["p50"]), (&900.0.into(), &20.0.into()));
    assert_eq!(full["memory_bytes"]["max"], f64::from(64 << 20));
    let asked = fake.noted(|notes| notes.bodies.clone());
    let asked: Vec<_> = asked.iter().filter_map(|body| Some([body.get("diff")?, body.get("live")?])).collect();
    let turn = [[false, false], [true, false], [false, true]];
    assert_eq!(asked, [turn, turn].concat());
    let removed = fake.noted(|notes| notes.calls.clone());
    let removed: Vec<_> = removed.iter().filter(|call| call.starts_with("DELETE")).collect();
    // The bundle that it was launched from stays: it was there before.
    assert_eq!(removed.iter().filter(|call| call.starts_with("DELETE /v1/bundles/bench-")).count(), 6, "{removed:?}");
    assert!(removed.last().is_some_and(|call| call.starts_with("DELETE /v1/vms/bench-")), "{removed:?}");
}

#[test]
fn snapshots_make_a_table() {
    let fake = Fake::start();
    let output = output(at(&fake.socket(), &["bench", "snapshot", "--count", "1", "--idle", "1ms"]));
    let said = text(&output.stdout);
    for wanted in
        ["WHAT", "full: pause", "900.0 ms", "diff: pause", "20.0 ms", "live: pause", "64.0 MiB", "in 1 of them"]
    {
        assert!(said.contains(wanted), "no {wanted:?} in\n{said}");
    }
    assert!(said.lines().all(|line| line.chars().count() <= 80), "{said}");
    let calls = fake.noted(|notes| notes.calls.clone());
    assert!(calls.last().is_some_and(|call| call.starts_with("DELETE /v1/bundles/bench-")), "{calls:?}");
    assert!(calls.last().is_some_and(|call| call.contains("-source-")), "the built bundle goes last: {calls:?}");
}

#[test]
fn snapshots_that_are_interrupted_leave_nothing() {
    for name in ["INT", "TERM"] {
        let fake = Fake::with_fate(Fate::HangsSnapshots);
        let mut child = piped(at(&fake.socket(), &["bench", "snapshot"]));
        wait_until("it snapshots", || fake.noted(|notes| notes.calls.iter().any(|call| call.ends_with("/snapshot"))));
        signal(&child, name);
        assert_eq!(code(&mut child), 130);
        let calls = fake.noted(|notes| notes.calls.clone());
        let removed: Vec<_> = calls.iter().filter(|call| call.starts_with("DELETE")).collect();
        // First the VM, so that no snapshot of it can come any more; then what it made and what it was made of.
        let order = ["/v1/vms/", "/v1/vms/", "/v1/bundles/", "/v1/bundles/"];
        assert_eq!(removed.len(), order.len(), "{removed:?}");
        assert!(removed.iter().zip(order).all(|(call, path)| call.contains(path)), "{removed:?}");
        assert!(removed[2].contains("-full-") && removed[3].contains("-source-"), "{removed:?}");
    }
}

#[test]
fn a_build_that_is_interrupted_is_given_up() {
    let fake = Fake::with_fate(Fate::Hangs);
    let mut child = piped(at(&fake.socket(), &["bench", "launch"]));
    wait_until("it builds", || fake.noted(|notes| notes.calls.iter().any(|call| call.contains("/v1/operations/"))));
    signal(&child, "INT");
    assert_eq!(code(&mut child), 130);
    let calls = fake.noted(|notes| notes.calls.clone());
    assert!(calls.iter().any(|call| call.starts_with("DELETE /v1/vms/vm-")), "{calls:?}");
    assert!(calls.last().is_some_and(|call| call.starts_with("DELETE /v1/bundles/bench-")), "{calls:?}");
}

#[test]
fn clones_have_a_bound_that_can_be_set() {
    let fake = Fake::with_fate(Fate::Hangs);
    let words = ["bench", "clone", "--bundle", "web", "--at-once", "3", "--timeout", "200ms"];
    let output = output(at(&fake.socket(), &words));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("did not answer within"), "{}", text(&output.stderr));
    let calls = fake.noted(|notes| notes.calls.clone());
    assert_eq!(calls.iter().filter(|call| call.starts_with("DELETE /v1/vms/bench-")).count(), 3, "{calls:?}");
}
