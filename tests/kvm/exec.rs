//! Commands in a guest.

use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::fixture::{Agent, status_kib, text};

pub(crate) fn prints_the_guests_kernel(agent: &Agent) {
    let guest = agent.ok(&["vm", "exec", agent.shared(), "--", "uname", "-a"]);
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the host's release");
    assert!(guest.starts_with("Linux ") && guest.contains("x86_64"), "{guest}");
    assert!(!guest.contains(host.trim()), "that is the host's kernel: {guest}");
    assert_eq!(agent.sh(agent.shared(), "hostname"), agent.shared());
}

pub(crate) fn returns_exit_codes_and_signals(agent: &Agent) {
    let vm = agent.shared();
    for (script, wanted) in
        [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
    {
        let output = agent.run(&["vm", "exec", vm, "--", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(wanted), "{script}: {}", text(&output.stderr));
    }
    let output =
        agent.run(&["vm", "exec", vm, "--env", "WORD=given", "--", "sh", "-c", "echo out $WORD; echo err >&2"]);
    assert_eq!((text(&output.stdout).trim(), text(&output.stderr).trim()), ("out given", "err"));
}

pub(crate) fn of_a_missing_program_says_so(agent: &Agent) {
    let output = agent.run(&["vm", "exec", agent.shared(), "--", "no-such-program"]);
    assert!(!output.status.success());
    let said = text(&output.stderr);
    assert!(said.contains("no-such-program"), "{said}");
}

pub(crate) fn carries_8_mib_both_ways(agent: &Agent) {
    let mut sent = vec![0; 8 << 20];
    std::fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut sent)).expect("random bytes");
    let received = through_cat(agent, agent.shared(), &sent);
    assert_eq!(blake3::hash(&received), blake3::hash(&sent), "{} bytes came back of {}", received.len(), sent.len());
}

pub(crate) fn runs_16_at_once(agent: &Agent) {
    let vm = agent.shared();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16_u8)
            .map(|number| {
                scope.spawn(move || {
                    let sent: Vec<u8> = (0..40_000_u32).map(|at| (at % 251) as u8 ^ number).collect();
                    assert!(through_cat(agent, vm, &sent) == sent, "exec {number}");
                })
            })
            .collect();
        for thread in threads {
            thread.join().expect("one of 16");
        }
    });
}

fn through_cat(agent: &Agent, vm: &str, sent: &[u8]) -> Vec<u8> {
    let mut child = agent
        .command(["vm", "exec", vm, "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run hearth");
    let mut stdin = child.stdin.take().expect("its standard input");
    let mut stdout = child.stdout.take().expect("its standard output");
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(sent).expect("write"));
        stdout.read_to_end(&mut received).expect("read");
    });
    assert!(child.wait().expect("wait").success());
    received
}

pub(crate) fn ends_at_its_time_out(agent: &Agent) {
    let started = Instant::now();
    let output = agent.run(&["vm", "exec", agent.shared(), "--timeout", "1s", "--", "sleep", "60"]);
    assert_eq!(output.status.code(), Some(124), "{}", text(&output.stderr));
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    assert_eq!(agent.sh(agent.shared(), "ps | grep -c '[s]leep 60' || true"), "0");
}

pub(crate) fn with_a_reader_that_never_reads_stays_bounded(agent: &Agent) {
    let vm = agent.shared();
    let vmm = agent.vmm_pid(vm);
    let before = (status_kib(agent.pid(), "VmRSS"), status_kib(vmm, "VmRSS"));
    let mut child = agent
        .command(["vm", "exec", vm, "--", "dd", "if=/dev/zero", "bs=64k", "count=1600"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("run hearth");
    // 100 MiB on their way to a pipe nobody reads: the guest's dd has to stand still after what the buffers take.
    let mut last = String::new();
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let written = agent.sh(
            vm,
            "grep wchar /proc/$(pidof dd)/io 2>/dev/null || echo cpu $(cut -d' ' -f14,15 /proc/$(pidof dd)/stat)",
        );
        if written == last {
            break;
        }
        assert!(Instant::now() < deadline, "dd goes on: {written}");
        last = written;
    }
    let after = (status_kib(agent.pid(), "VmRSS"), status_kib(vmm, "VmRSS"));
    assert!(after.0 < before.0 + 8 * 1024, "agent: {} KiB grew to {} KiB", before.0, after.0);
    // The VMM's resident memory holds the guest's own pages too; 32 MiB leaves room for those.
    assert!(after.1 < before.1 + 32 * 1024, "VMM: {} KiB grew to {} KiB", before.1, after.1);
    child.kill().expect("end the client");
    child.wait().expect("wait");
    wait_until_gone(agent, vm, "dd");
}

pub(crate) fn ends_the_program_when_the_client_hangs_up(agent: &Agent) {
    let vm = agent.shared();
    let mut child = agent
        .command(["vm", "exec", vm, "--", "sh", "-c", "echo started; sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("run hearth");
    let mut word = [0; 7];
    child.stdout.take().expect("its standard output").read_exact(&mut word).expect("read");
    assert_eq!(&word, b"started");
    child.kill().expect("end the client");
    child.wait().expect("wait");
    wait_until_gone(agent, vm, "sleep");
}

fn wait_until_gone(agent: &Agent, vm: &str, program: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !agent.sh(vm, &format!("pidof {program} || true")).is_empty() {
        assert!(Instant::now() < deadline, "{program} runs on in the guest");
        std::thread::sleep(Duration::from_millis(200));
    }
}
