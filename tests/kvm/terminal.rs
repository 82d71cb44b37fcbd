//! The client at a real terminal: a pseudo-terminal that the test holds the other end of.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use rustix::termios::{LocalModes, tcgetattr, tcsetwinsize};

use super::fixture::Agent;

/// Longest wait for words: a guest that is emulated takes its time.
const PATIENCE: Duration = Duration::from_secs(30);

/// A client and its terminal.
struct Terminal {
    /// What a person would see, and type on.
    screen: File,
    /// The client's end, kept to look at its settings after the client has gone.
    client: OwnedFd,
    child: Child,
    seen: String,
}

impl Terminal {
    /// Starts a client command on a terminal of this size, which is its controlling one.
    fn start(agent: &Agent, (rows, columns): (u16, u16), words: &[&str]) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let ends = openpty(Some(&size), None).expect("a pseudo-terminal");
        let client = agent.command(words);
        let end = || ends.slave.try_clone().expect("a second handle");
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(client.get_program())
            .args(client.get_args())
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("run setsid");
        Self { screen: ends.master.into(), client: ends.slave, child, seen: String::new() }
    }

    fn press(&mut self, keys: &str) {
        self.screen.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Whether the screen shows `text` before `deadline`; what comes before and with it is gone then.
    fn shows_before(&mut self, text: &str, deadline: Instant) -> bool {
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return true;
            }
            let left = PollTimeout::try_from(deadline.saturating_duration_since(Instant::now())).expect("a bound");
            if poll(&mut [PollFd::new(self.screen.as_fd(), PollFlags::POLLIN)], left).expect("poll") == 0 {
                return false;
            }
            let mut buffer = [0; 4096];
            let count = match self.screen.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => other.expect("the terminal has something to show"),
            };
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }

    /// Waits until the screen shows `text`.
    fn wait_for(&mut self, text: &str) {
        assert!(self.shows_before(text, Instant::now() + PATIENCE), "{text:?} is not in {:?}", self.seen);
    }

    /// Whether keys are echoed and taken line by line, as before a program that draws for itself.
    fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.client).expect("the terminal's settings").local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// Waits for the client to end.
    fn end(&mut self) -> ExitStatus {
        self.child.wait().expect("wait")
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.screen, size).expect("resize");
    }
}

/// Ctrl-] leaves a console that is attached to: the terminal is as before, the VM runs on.
pub(crate) fn console_is_left_by_its_key(agent: &Agent) {
    let vm = agent.shared();
    let mut terminal = Terminal::start(agent, (24, 80), &["vm", "console", vm]);
    terminal.wait_for("Ctrl-] leaves it");
    agent.sh(vm, "echo live $((40 + 2)) words > /dev/console");
    terminal.wait_for("live 42 words");
    assert!(!terminal.is_cooked(), "every key goes to the guest while attached");
    terminal.press("\u{1d}");
    terminal.wait_for("left the console");
    let status = terminal.end();
    assert!(status.success(), "{status}");
    assert!(terminal.is_cooked(), "the terminal is set back");
    assert_eq!(agent.vm(vm)["state"], "running");
}

/// `vm exec -t` gives the program a terminal of the same size, which follows it, and Ctrl-C is the guest's.
pub(crate) fn exec_gives_a_terminal(agent: &Agent) {
    let vm = agent.shared();
    let script = "trap 'echo caught $((40 + 2)); exit 7' INT; tty; \
                  while read word; do echo \"$word: $(stty size)\"; done";
    let mut terminal = Terminal::start(agent, (33, 120), &["vm", "exec", "-t", vm, "--", "sh", "-c", script]);
    terminal.wait_for("/dev/pts/");
    assert!(!terminal.is_cooked(), "lines are edited in the guest");
    // Echoed by the guest's terminal, and then answered.
    terminal.press("first\r");
    terminal.wait_for("first\r\n");
    terminal.wait_for("first: 33 120");
    terminal.resize(50, 200);
    // The new size and keys go their own ways to the guest.
    let deadline = Instant::now() + PATIENCE;
    loop {
        terminal.press("again\r");
        terminal.wait_for("again: ");
        if terminal.shows_before("50 200", Instant::now() + Duration::from_millis(500)) {
            break;
        }
        assert!(Instant::now() < deadline, "the size does not follow: {:?}", terminal.seen);
    }
    terminal.press("\u{3}");
    terminal.wait_for("caught 42");
    assert_eq!(terminal.end().code(), Some(7));
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // After a failure: setsid's end does not end the client, the hang-up of its terminal does.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
