//! Words: what is refused before anything is touched, and what help says.

use crate::run::{at, hearth, output, text};

const NOUNS: [&str; 16] = [
    "vm",
    "session",
    "cluster",
    "bundle",
    "volume",
    "image",
    "operation",
    "migration",
    "top",
    "events",
    "host",
    "bench",
    "ledger",
    "support-bundle",
    "completions",
    "man",
];

#[test]
fn wrong_words_are_usage_errors() {
    for words in [
        &[][..],
        &["frobnicate"],
        &["vm"],
        &["vm", "frobnicate"],
        &["vm", "show"],
        &["vm", "show", "a/b"],
        &["vm", "show", ".."],
        &["vm", "launch", "extra"],
        &["vm", "launch", "--name", "Not A Name"],
        &["vm", "launch", "--vcpus", "many"],
        &["vm", "launch", "--memory", "-1"],
        &["vm", "launch", "--wait", "forever"],
        &["vm", "launch", "--idempotency-key", "a\nb"],
        &["vm", "launch", "--disk=a", "--disk=b", "--disk=c", "--disk=d", "--disk=e", "--disk=f", "--disk=g"],
        &["vm", "exec", "web"],
        &["vm", "exec", "web", "uname"],
        &["vm", "exec", "web", "--env", "novalue", "--", "true"],
        &["vm", "exec", "web", "--timeout", "soon", "--", "true"],
        &["vm", "exec", "web", "-t", "-n", "--", "sh"],
        &["vm", "rm"],
        &["vm", "rm", "web", "--all"],
        &["vm", "launch", "--addressing", "guest"],
        &["vm", "launch", "--session", "a/b"],
        &["session"],
        &["session", "create", "--id", "0"],
        &["session", "create", "--id", "4294967295"],
        &["session", "create", "--name", "7"],
        &["session", "create", "--ipv4", "--no-ipv4"],
        &["session", "create", "--nat"],
        &["session", "create", "--egress", "10.0.0.0"],
        &["session", "create", "--egress", "10.0.0.0/8:70000"],
        &["session", "create", "--ttl", "0"],
        &["session", "show"],
        &["session", "rm"],
        &["session", "rm", "etl", "--timeout", "5s"],
        &["events", "--since", "yesterday"],
        &["bench", "boot", "--count", "0"],
        &["bench", "snapshot", "--idle", "soon"],
        &["bench", "migrate", "--to", "b", "--back-socket", "b.sock", "--back-to", "a", "--writes", "10"],
        &["bench", "migrate", "--to", "b", "--back-socket", "b.sock", "--back-to", "a", "--populate", "64"],
        &["bench", "migrate", "--to", "b", "--back-socket", "b.sock", "--back-to", "a", "--overhead", "10M"],
        &["ledger"],
        &["ledger", "restore"],
        &["top", "--interval", "0"],
        &["top", "--sort", "age"],
        &["top", "web"],
        &["completions"],
        &["completions", "tcsh"],
        &["man", "--dir"],
        &["image", "import", "mine"],
        &["image", "import", "mine", "--kernel", "k", "--rootfs", "r.tar"],
        &["image", "import", "mine", "--rootfs", "r.tar", "--oci", "layout"],
        &["image", "import", "mine", "--rootfs", "r.tar", "--initrd", "i"],
        &["image", "import", "mine", "--kernel", "k", "--like", "demo"],
        &["image", "import", "mine", "--kernel", "k", "--max-size", "1"],
        &["image", "import", "mine", "--rootfs", "r.tar", "--max-size", "0"],
        &["image", "import", "mine", "--oci", "layout:"],
        &["image", "import", "mine", "--oci", ":web"],
        &["agent", "--log-format", "poem"],
    ] {
        let output = output(hearth(words));
        assert_eq!(output.status.code(), Some(2), "hearth {words:?}: {}", text(&output.stderr));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "hearth {words:?}");
    }
}

#[test]
fn every_noun_has_help() {
    for noun in NOUNS.into_iter().chain(["agent"]) {
        let output = output(hearth(&[noun, "--help"]));
        assert_eq!(output.status.code(), Some(0), "{noun}");
        assert!(text(&output.stdout).contains("Usage:") && output.stderr.is_empty(), "{noun}");
    }
    for verb in ["launch", "ls", "show", "rm", "stop", "pause", "resume", "stats", "exec", "console"] {
        let output = output(hearth(&["vm", verb, "--help"]));
        assert!(output.status.success() && text(&output.stdout).contains("Usage: hearth vm"), "{verb}");
    }
}

#[test]
fn sessions_have_help_with_examples() {
    for (verb, wanted) in [("create", "--egress 0.0.0.0/0:443"), ("rm", "--drain"), ("ls", "List"), ("show", "members")]
    {
        let output = output(hearth(&["session", verb, "--help"]));
        let help = text(&output.stdout);
        assert!(output.status.success() && help.contains("Usage: hearth session") && help.contains(wanted), "{help}");
    }
}

#[test]
fn help_shows_what_there_is_and_nothing_else() {
    let help = text(&output(hearth(&["--help"])).stdout);
    for noun in NOUNS {
        assert!(help.lines().any(|line| line.trim_start().starts_with(noun)), "no {noun} in {help}");
    }
    for later in ["volumed", "vmm"] {
        assert!(!help.lines().any(|line| line.trim_start().starts_with(later)), "{later} in {help}");
    }
    assert!(text(&output(hearth(&["--version"])).stdout).starts_with("hearth "));
}

#[test]
fn without_an_agent_the_message_says_what_to_do() {
    let directory = tempfile::tempdir().expect("a directory");
    let nowhere = directory.path().join("api.sock");
    let dead = directory.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).expect("a socket"));
    for socket in [&nowhere, &dead] {
        for words in [&["vm", "ls"][..], &["--json", "vm", "ls"], &["vm", "exec", "web", "--", "true"], &["events"]] {
            let output = output(at(socket, words));
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{words:?}");
            assert!(output.stdout.is_empty(), "{words:?}");
            let wanted = format!("no agent answers at {}: start it with `hearth agent`", socket.display());
            assert!(said.contains(&wanted), "{said}");
        }
    }
}

#[test]
fn the_socket_may_come_from_the_environment_and_words_win() {
    let run = |words: &[&str]| {
        let mut command = hearth(words);
        command.env("HEARTH_SOCKET", "/nowhere/of/environment");
        text(&output(command).stderr)
    };
    assert!(run(&["vm", "ls"]).contains("/nowhere/of/environment"));
    assert!(run(&["vm", "ls", "--socket", "/nowhere/of/words"]).contains("/nowhere/of/words"));
}
