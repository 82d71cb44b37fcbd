//! Commands that are one call: one JSON value for programs, a table for people, a clear error for both.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::Value;

use crate::fake::{Fake, SESSION, VM};
use crate::run::{at, code, output, piped, text};

/// Everything on standard output has to be one JSON value on one line.
fn one_value(stdout: &[u8]) -> Value {
    let text = text(stdout);
    assert_eq!(text.matches('\n').count(), 1, "{text:?}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"))
}

#[test]
fn json_is_exactly_one_value() {
    let fake = Fake::start();
    for words in [
        &["vm", "ls"][..],
        &["vm", "show", "web"],
        &["vm", "stop", "web", "--timeout", "5s"],
        &["vm", "pause", "web"],
        &["vm", "resume", "web"],
        &["vm", "stats", "web"],
        &["top", "--once", "--interval", "100ms"],
        &["vm", "rm", "web", "other"],
        &["vm", "rm", "--all"],
        &["vm", "launch"],
        &["vm", "launch", "--wait", "none"],
        &["vm", "exec", "web", "--", "both"],
        &["vm", "console", "web", "--history"],
        &["session", "create"],
        &["session", "ls"],
        &["session", "show", "etl"],
        &["session", "rm", "etl", "517"],
        &["session", "rm", "etl", "--drain"],
        &["image", "ls"],
        &["image", "show", "demo"],
        &["image", "import", "mine", "--kernel", "/proc/self/exe"],
        &["image", "import", "mine", "--rootfs", "/proc/self/exe", "--like", "demo", "--max-size", "64"],
        &["image", "import", "mine", "--oci", "/proc/self:web"],
        &["image", "rm", "demo"],
        &["operation", "ls"],
        &["operation", "show", "op-a"],
        &["events"],
        &["host", "show"],
        &["bench", "boot", "--count", "1", "--idle-seconds", "0"],
    ] {
        let output = output(at(&fake.socket(), &[&["--json"], words].concat()));
        assert!(matches!(output.status.code(), Some(0 | 3)), "{words:?}: {}", text(&output.stderr));
        assert!(one_value(&output.stdout).is_object(), "{words:?}");
    }
}

#[test]
fn lists_are_the_apis_own() {
    let fake = Fake::start();
    let value = |words: &[&str]| one_value(&output(at(&fake.socket(), &[&["--json"], words].concat())).stdout);
    assert_eq!(value(&["vm", "ls"])["vms"][0]["id"], VM);
    assert_eq!(value(&["image", "ls"])["images"][0]["name"], "demo");
    assert_eq!(value(&["events"])["events"][1]["seq"], 2);
    assert_eq!(value(&["vm", "rm", "--all"])["removed"][0], VM);
}

#[test]
fn people_get_tables() {
    let fake = Fake::start();
    for (words, wanted) in [
        (&["vm", "ls"][..], &["NAME", "web", VM, "running", "128 MiB"][..]),
        (&["vm", "show", "web"], &["web", "running", "kernel", "9.00 s", "generation"]),
        (
            &["vm", "stats", "web"],
            &["vmm resident", "does not answer", "NETWORK", "THROTTLED", "from guest", "1.5 KiB", "down"],
        ),
        (&["vm", "pause", "web"], &["web", "is paused"]),
        (&["session", "ls"], &["NETWORK ID", "etl", SESSION, "517", "active", "14"]),
        (&["session", "show", "etl"], &["517 (0x205)", "0.0.0.0/0:443/tcp (by NAT)", "10.3.129.69", "7 spoofed"]),
        (&["image", "ls"], &["NAME", "demo", "000000000000"]),
        (&["operation", "ls"], &["KIND", "vm_launch", "boot_guest"]),
        (&["operation", "show", "op-a"], &["STEP", "spawn vmm", "done", "2.00 ms"]),
        (&["events"], &["vm_state", VM]),
        (&["host", "show"], &["state directory", "/s", "1 alive"]),
        (
            &["host", "show"],
            &["fd3c:91aa:7e2:3::/64", "vxlan (id 5, port 4789)", "b (host 4) at 192.0.2.2", "conflicts"],
        ),
        (&["vm", "console", "web", "--history"], &["line one\nline two\n"]),
    ] {
        let output = output(at(&fake.socket(), words));
        assert_eq!(output.status.code(), Some(0), "{words:?}: {}", text(&output.stderr));
        let said = text(&output.stdout);
        for word in wanted {
            assert!(said.contains(word), "{words:?}: no {word:?} in\n{said}");
        }
    }
}

#[test]
fn calls_go_where_they_should() {
    let fake = Fake::start();
    for words in [
        &["vm", "rm", "web", "--timeout", "0"][..],
        &["vm", "stop", "web"],
        &["events", "--since", "7"],
        &["image", "rm", "demo"],
        &["session", "rm", "etl"],
        &["session", "rm", "etl", "--drain"],
        &["session", "rm", "etl", "--drain", "--timeout", "0"],
    ] {
        assert!(output(at(&fake.socket(), words)).status.success(), "{words:?}");
    }
    let wanted = [
        "DELETE /v1/vms/web?timeout_ms=0",
        "POST /v1/vms/web/stop",
        "GET /v1/events?since=7&follow=false",
        "DELETE /v1/images/demo",
        "DELETE /v1/sessions/etl",
        "DELETE /v1/sessions/etl?drain=true",
        "DELETE /v1/sessions/etl?drain=true&timeout_ms=0",
    ];
    assert_eq!(fake.noted(|notes| notes.calls.clone()), wanted);
}

#[test]
fn refusals_say_what_why_and_what_to_do() {
    let fake = Fake::start();
    for words in
        [&["vm", "show", "nobody"][..], &["--json", "vm", "show", "nobody"], &["vm", "exec", "nobody", "--", "x"]]
    {
        let output = output(at(&fake.socket(), words));
        assert_eq!(output.status.code(), Some(1), "{words:?}");
        assert!(output.stdout.is_empty(), "{words:?}");
        assert_eq!(text(&output.stderr), "error: this is refused: unknown_vm\nhelp: do it differently\n", "{words:?}");
    }
}

#[test]
fn answers_of_something_else_are_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("other.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let other = std::thread::spawn(move || {
        for answer in [
            &b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nwhat"[..],
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
            b"220 mail ready\r\n",
            b"",
        ] {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = [0; 1024];
            let _ = std::io::Read::read(&mut stream, &mut request);
            std::io::Write::write_all(&mut stream, answer).expect("answer");
        }
    });
    for wanted in ["unexpected answer with status 404: \"what\"", "cannot be read", "hung up", "hung up"] {
        let output = output(at(&socket, &["vm", "ls"]));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(wanted), "no {wanted:?} in {said}");
    }
    other.join().expect("the other server");
}

#[test]
fn a_file_that_is_missing_is_named() {
    let fake = Fake::start();
    let output = output(at(&fake.socket(), &["image", "import", "mine", "--kernel", "/nowhere/vmlinux"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nowhere/vmlinux"), "{}", text(&output.stderr));
    assert!(fake.noted(|notes| notes.calls.is_empty()));
}

#[test]
fn events_follow_until_nobody_reads() {
    let fake = Fake::start();
    let mut child = piped(at(&fake.socket(), &["--json", "events", "--follow"]));
    let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    for seq in 1..=5 {
        let event: Value = serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON");
        assert_eq!(event["seq"], seq);
    }
    drop(lines);
    assert_eq!(code(&mut child), 0);
    let mut complaints = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().expect("stderr"), &mut complaints).expect("text");
    assert_eq!(complaints, "");
}

#[test]
fn a_table_nobody_reads_is_no_failure() {
    let fake = Fake::start();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = at(&fake.socket(), &["vm", "ls"]);
    let output = command.stdout(Stdio::from(writer)).output().expect("run hearth");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}
