//! Programs: what they are given, how they end, what they leave behind.

use std::collections::BTreeSet;

use hearth_guest_wire::{EXEC_WORDS_MAX, Exit, FromGuest, ToGuest};

use super::agent::{Agent, Outcome, exists, program, shell, wait_for_end, wait_until};

#[test]
fn exit_codes_and_both_streams_arrive() {
    let agent = Agent::start();
    for code in [0, 1, 42, 255] {
        let outcome = agent.run(&format!("echo out; echo err >&2; exit {code}"));
        assert_eq!(outcome, Outcome { stdout: b"out\n".to_vec(), stderr: b"err\n".to_vec(), exit: Exit::Code(code) });
    }
}

#[test]
fn a_program_that_ends_by_a_signal_says_which() {
    let agent = Agent::start();
    assert_eq!(agent.run("kill -9 $$").exit, Exit::Signal(9));
    assert_eq!(agent.run("kill -15 $$").exit, Exit::Signal(15));
}

#[test]
fn a_signal_reaches_the_whole_group() {
    let agent = Agent::start();
    let (mut host, pid) = agent.exec(shell("trap 'echo caught; exit 3' TERM; echo up; sleep 100 & wait"));
    assert_eq!(host.hear(), FromGuest::Stdout(b"up\n".to_vec()));
    host.say(&ToGuest::Signal { number: 15 });
    let outcome = host.outcome();
    assert_eq!((outcome.text(), outcome.exit), ("caught\n", Exit::Code(3)));
    wait_for_end(pid);
}

#[test]
fn a_signal_that_does_not_exist_changes_nothing() {
    let agent = Agent::start();
    let (mut host, _) = agent.exec(program(&["cat"]));
    host.say(&ToGuest::Signal { number: 200 });
    host.say(&ToGuest::Stdin(b"still here".to_vec()));
    host.say(&ToGuest::StdinClosed);
    assert_eq!(host.outcome().text(), "still here");
}

#[test]
fn a_time_out_kills_the_group() {
    let agent = Agent::start();
    let mut exec = shell("echo begun; sleep 100 & sleep 100");
    exec.timeout_ms = 200;
    let (mut host, pid) = agent.exec(exec);
    let outcome = host.outcome();
    assert_eq!((outcome.text(), outcome.exit), ("begun\n", Exit::TimedOut));
    wait_for_end(pid);
}

#[test]
fn a_time_out_that_is_not_reached_says_nothing() {
    let agent = Agent::start();
    let mut exec = shell("exit 5");
    exec.timeout_ms = 20_000;
    let (mut host, _) = agent.exec(exec);
    assert_eq!(host.outcome().exit, Exit::Code(5));
}

#[test]
fn missing_programs_and_directories_are_named() {
    let agent = Agent::start();
    let mut elsewhere = shell("true");
    elsewhere.cwd = String::from("/no/such/place");
    let mut bad_word = shell("true");
    bad_word.env.push(String::from("NOVALUE"));
    let mut null_word = shell("true");
    null_word.argv.push(String::from("a\0b"));
    let cases = [
        (program(&["no-such-program"]), 2, "no-such-program"),
        (program(&["/no/such/program"]), 2, "/no/such/program"),
        (program(&["/etc/passwd"]), 13, "/etc/passwd"),
        (program(&["/etc"]), 13, "/etc"),
        (program(&[]), 22, "program"),
        (program(&[""]), 2, "name"),
        (elsewhere, 2, "/no/such/place"),
        (bad_word, 22, "environment"),
        (null_word, 22, "null"),
    ];
    for (exec, errno, named) in cases {
        let mut host = agent.greeted();
        host.say(&ToGuest::Exec(exec));
        let (heard, what) = host.hear_failure();
        assert_eq!(heard, errno, "{what}");
        assert!(what.contains(named), "{what}");
    }
    assert_eq!(agent.run("echo fine").text(), "fine\n");
}

#[test]
fn words_at_their_limit_are_taken_and_one_more_is_not() {
    let agent = Agent::start();
    let mut exec = shell("echo $#");
    exec.argv.push(String::from("sh"));
    let fixed = exec.argv.len();
    exec.argv.resize(EXEC_WORDS_MAX, String::from("w"));
    let (mut host, _) = agent.exec(exec.clone());
    assert_eq!(host.outcome().text(), format!("{}\n", EXEC_WORDS_MAX - fixed));

    exec.env.push(String::from("ONE=more"));
    let mut host = agent.greeted();
    host.say(&ToGuest::Exec(exec));
    assert_eq!(host.hear_failure().0, 7);
}

#[test]
fn environment_and_directory_are_those_asked_for() {
    let agent = Agent::start();
    let mut exec = shell("echo $INHERITED $GIVEN $PWD; cd /; echo \"$PATH\"");
    exec.env = vec![String::from("GIVEN=a b"), String::from("GIVEN=c"), String::from("PATH=/bin:/usr/bin")];
    exec.cwd = String::from("/proc");
    let (mut host, _) = agent.exec(exec);
    assert_eq!(host.outcome().text(), "yes c /proc\n/bin:/usr/bin\n");
}

#[test]
fn a_program_starts_with_clean_signals_and_descriptors() {
    let agent = Agent::start();
    let outcome = agent.run("grep '^SigBlk' /proc/self/status; ls /proc/$$/fd; echo $$; ps -o pgid=,sid= -p $$");
    let words: Vec<&str> = outcome.text().split_whitespace().collect();
    let [name, blocked, descriptors @ .., own, group, session] = words.as_slice() else { panic!("{words:?}") };
    assert_eq!((*name, *blocked), ("SigBlk:", "0000000000000000"));
    // The descriptors of the shell itself, while it waits for `ls`: a pipeline would add its own, more or fewer with
    // each shell. Nothing of the agent's is among them, though what the agent itself was started with is.
    let mut expected = started_with();
    expected.extend([0, 1, 2]);
    let descriptors: BTreeSet<u32> = descriptors.iter().map(|word| word.parse().expect("a number")).collect();
    assert_eq!(descriptors, expected);
    assert_eq!((own, own), (group, session), "a group and a session of its own");
}

#[test]
fn a_background_process_does_not_keep_the_connection() {
    let agent = Agent::start();
    let outcome = agent.run("sleep 20 & echo $!; exit 6");
    assert_eq!(outcome.exit, Exit::Code(6));
    let background: u32 = outcome.text().trim().parse().expect("a process id");
    assert!(exists(background), "what a program leaves behind lives on");
    // Even one that never stops writing.
    let outcome = agent.run("while :; do echo x; done & echo $! >&2; exit 7");
    assert_eq!(outcome.exit, Exit::Code(7));
    let noisy: u32 = std::str::from_utf8(&outcome.stderr).expect("text").trim().parse().expect("a process id");
    wait_for_end(noisy);
    assert_eq!(agent.run(&format!("kill {background}")).exit, Exit::Code(0));
}

#[test]
fn orphans_are_reaped() {
    let agent = Agent::start();
    let outcome = agent.run("for i in 1 2 3 4 5; do (sleep 0.3 </dev/null >/dev/null 2>&1 & echo $!); done");
    let orphans: Vec<u32> = outcome.text().lines().map(|line| line.parse().expect("a process id")).collect();
    assert_eq!(orphans.len(), 5);
    wait_until("no zombie is left", || !orphans.iter().any(|pid| exists(*pid)));
}

/// Descriptors that programs of this process inherit: those that whoever started it left open.
fn started_with() -> BTreeSet<u32> {
    const CLOSE_ON_EXEC: u32 = 0o2_000_000;
    let inherited = |name: &String| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{name}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        flags.is_some_and(|flags| u32::from_str_radix(flags.trim(), 8).is_ok_and(|flags| flags & CLOSE_ON_EXEC == 0))
    };
    let entries = std::fs::read_dir("/proc/self/fd").expect("descriptors");
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(inherited).filter_map(|name| name.parse().ok()).collect()
}
