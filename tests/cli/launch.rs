//! Launches: what is asked for, what is waited for, and what is left when they fail.

use serde_json::json;

use crate::fake::{Fake, Fate, SESSION, VM};
use crate::run::{at, code, output, piped, signal, text, wait_until};

#[test]
fn a_launch_asks_for_what_was_said() {
    let fake = Fake::start();
    let words = [
        "vm",
        "launch",
        "--name",
        "db",
        "--vcpus",
        "2",
        "--memory",
        "512",
        "--disk",
        "data.img",
        "--disk",
        "/b.img:ro",
        "--rx-limit",
        "10M/64k",
        "--tx-packets",
        "5k",
        "--session",
        "etl",
        "--addressing",
        "invariant",
        "--wait",
        "none",
        "--idempotency-key",
        "once",
    ];
    let mut command = at(&fake.socket(), &words);
    command.current_dir(fake.directory());
    assert!(output(command).status.success());
    let data = fake.directory().canonicalize().expect("a directory").join("data.img");
    let wanted = json!({
        "name": "db", "vcpus": 2, "memory_mib": 512, "wait": "none",
        "session": "etl", "addressing": "invariant",
        "disks": [{"path": data, "read_only": false}, {"path": "/b.img", "read_only": true}],
        "network_limits": {
            "rx": {"bytes_per_s": 10_000_000, "burst_bytes": 64_000, "packets_per_s": null, "burst_packets": null},
            "tx": {"bytes_per_s": null, "burst_bytes": null, "packets_per_s": 5_000, "burst_packets": null},
        },
    });
    assert_eq!(fake.noted(|notes| (notes.bodies.clone(), notes.keys.clone())), (vec![wanted], vec!["once".to_owned()]));
}

#[test]
fn a_session_asks_for_what_was_said() {
    let fake = Fake::start();
    let data = fake.directory().join("data.txt");
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&data)
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"role=reader"))
        .expect("a file");
    let data = data.to_str().expect("a path");
    let words = ["session", "create", "--id", "0x205", "--name", "etl", "--no-ipv4", "--ttl", "1h", "--nat"];
    let more = ["--egress", "::/0:443", "--egress", "192.0.2.0/24/icmp", "--user-data", data, "--idempotency-key", "k"];
    let output = output(at(&fake.socket(), &[&words[..], &more].concat()));
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), format!("{SESSION}\n")));
    let wanted = json!({
        "name": "etl", "session_network_id": 517, "ipv4": false, "ttl_s": 3600, "user_data": "role=reader",
        "egress": {"nat": true, "allow": [
            {"cidr": "::/0", "protocol": "tcp", "ports": [443, 443]},
            {"cidr": "192.0.2.0/24", "protocol": "icmp", "ports": null},
        ]},
    });
    assert_eq!(fake.noted(|notes| (notes.bodies.clone(), notes.keys.clone())), (vec![wanted], vec!["k".to_owned()]));
}

#[test]
fn a_session_without_words_asks_for_nothing_special() {
    let fake = Fake::start();
    assert!(output(at(&fake.socket(), &["session", "create"])).status.success());
    assert_eq!(fake.noted(|notes| notes.bodies.clone()), [json!({})]);
}

#[test]
fn user_data_that_is_missing_or_long_is_named() {
    let fake = Fake::start();
    let long = fake.directory().join("long.txt");
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&long).expect("a file");
    file.set_len(16 * 1024 + 1).expect("its length");
    for (path, wanted) in [("/nowhere/data", "/nowhere/data"), (long.to_str().expect("a path"), "longer than 16384")] {
        let output = output(at(&fake.socket(), &["session", "create", "--user-data", path]));
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(wanted), "{}", text(&output.stderr));
    }
    assert!(fake.noted(|notes| notes.calls.is_empty()));
}

#[test]
fn a_session_in_use_is_not_removed() {
    let fake = Fake::start();
    let output = output(at(&fake.socket(), &["session", "rm", "used"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("session_in_use"), "{}", text(&output.stderr));
}

#[test]
fn a_launch_waits_and_prints_the_id() {
    let fake = Fake::start();
    let output = output(at(&fake.socket(), &["vm", "launch"]));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("{VM}\n"));
    assert!(text(&output.stderr).contains("hearth vm exec web -- uname -a"), "{}", text(&output.stderr));
    assert!(fake.noted(|notes| notes.calls.iter().filter(|call| call.contains("/operations/")).count()) >= 3);
}

#[test]
fn a_failed_launch_shows_the_console() {
    let fake = Fake::with_fate(Fate::Panics);
    let output = output(at(&fake.socket(), &["--json", "vm", "launch"]));
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    for wanted in ["the guest's kernel panicked", "| Kernel panic - not syncing", "| \\u{1b}[2Jescape"] {
        assert!(said.contains(wanted), "no {wanted:?} in {said}");
    }
}

#[test]
fn a_refused_launch_is_an_error() {
    let fake = Fake::start();
    let output = output(at(&fake.socket(), &["vm", "launch", "--image", "nowhere"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("unknown_image"));
}

#[test]
fn ctrl_c_ends_the_waiting_and_not_the_vm() {
    let fake = Fake::with_fate(Fate::Hangs);
    let mut child = piped(at(&fake.socket(), &["vm", "launch"]));
    wait_until("it waits", || fake.noted(|notes| notes.calls.len() > 2));
    signal(&child, "INT");
    assert_eq!(code(&mut child), 130);
    assert!(!fake.noted(|notes| notes.calls.iter().any(|call| call.starts_with("DELETE"))));
}
