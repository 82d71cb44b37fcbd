//! Running the binary.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything in these tests: many times what a loaded machine needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// `hearth WORDS`, without a socket from outside.
pub(crate) fn hearth(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.args(words).env_remove("HEARTH_SOCKET").stdin(Stdio::null());
    command
}

/// `hearth --socket S WORDS`.
pub(crate) fn at(socket: &Path, words: &[&str]) -> Command {
    let mut command = hearth(&[]);
    command.arg("--socket").arg(socket).args(words);
    command
}

/// Runs it to its end.
pub(crate) fn output(mut command: Command) -> Output {
    command.output().expect("run hearth")
}

/// Starts it with all three streams in our hands.
pub(crate) fn piped(mut command: Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run hearth")
}

/// Bytes as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Sends a signal by its name.
pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()).status().expect("run kill");
    assert!(status.success());
}

/// Waits until `done` says so.
#[track_caller]
#[expect(clippy::disallowed_methods, reason = "a test waits by the real clock")]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The exit code, once it ended; a signal that ended it is no exit code.
#[track_caller]
pub(crate) fn code(child: &mut Child) -> i32 {
    let mut status = None;
    wait_until("the client ends", || {
        status = child.try_wait().expect("wait");
        status.is_some()
    });
    status.and_then(|status| status.code()).expect("it ends on its own")
}
