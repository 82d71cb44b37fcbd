//! The serial console.

use std::time::{Duration, Instant};

use super::fixture::{Agent, status_kib};

pub(crate) fn shows_history_and_takes_input(agent: &Agent) {
    let vm = agent.shared();
    agent.sh(vm, "echo a line for the console > /dev/console");
    let deadline = Instant::now() + Duration::from_secs(10);
    while !agent.ok(&["vm", "console", vm, "--history"]).contains("a line for the console") {
        assert!(Instant::now() < deadline, "the console's history lacks the line");
        std::thread::sleep(Duration::from_millis(100));
    }
    // What is typed reaches the guest: a program there reads one line from its console.
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| agent.sh(vm, "echo listening > /dev/console; head -n 1 < /dev/console"));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !agent.ok(&["vm", "console", vm, "--history"]).contains("listening") {
            assert!(Instant::now() < deadline, "the reader does not listen");
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut child = agent
            .command(["vm", "console", vm])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("run hearth");
        let mut stdin = child.stdin.take().expect("its standard input");
        std::io::Write::write_all(&mut stdin, b"typed words\n").expect("type");
        assert_eq!(reader.join().expect("the reader"), "typed words");
        drop(stdin);
        let _ = child.kill();
        let _ = child.wait();
    });
}

pub(crate) fn flood_is_bounded(agent: &Agent) {
    let vm = agent.shared();
    let vmm = agent.vmm_pid(vm);
    let before = status_kib(vmm, "VmRSS");
    // More than the history holds; a byte costs a port exit, so more would only take longer.
    agent.sh(
        vm,
        "dd if=/dev/zero bs=4096 count=20 2>/dev/null | tr '\\0' 'x' > /dev/console; echo the end > /dev/console",
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while !agent.ok(&["vm", "console", vm, "--history"]).contains("the end") {
        assert!(Instant::now() < deadline, "the flood does not end");
        std::thread::sleep(Duration::from_millis(200));
    }
    let history = agent.ok(&["vm", "console", vm, "--history"]);
    assert!(history.len() <= 64 * 1024, "{} bytes of history", history.len());
    let after = status_kib(vmm, "VmRSS");
    assert!(after < before + 16 * 1024, "{before} KiB grew to {after} KiB");
    assert_eq!(agent.sh(vm, "echo alive"), "alive");
}
