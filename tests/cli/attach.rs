//! Terminals: raw mode, size, detaching, and that the terminal is afterwards what it was before.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};

use hearth::api::stream::Frame;
use hearth::api::types::TerminalSize;
use nix::pty::{Winsize, openpty};
use rustix::termios::{LocalModes, tcgetattr, tcsetwinsize};

use crate::fake::Fake;
use crate::run::{at, code, output, piped, signal, text, wait_until};

/// A terminal: our end and the client's.
struct Terminal {
    ours: File,
    theirs: OwnedFd,
}

impl Terminal {
    fn open() -> Self {
        let size = Winsize { ws_row: 30, ws_col: 90, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).expect("a terminal");
        Self { ours: File::from(pty.master), theirs: pty.slave }
    }

    fn spawn(&self, mut command: Command) -> Child {
        let end = || Stdio::from(self.theirs.try_clone().expect("a descriptor"));
        command.stdin(end()).stdout(end()).stderr(Stdio::null()).spawn().expect("run hearth")
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.theirs).expect("its modes").local_modes.contains(LocalModes::ICANON)
    }

    fn read_until(&mut self, wanted: &str) {
        let mut seen = String::new();
        let mut bytes = [0; 256];
        while !seen.contains(wanted) {
            let count = self.ours.read(&mut bytes).expect("read");
            seen.push_str(&text(&bytes[..count]));
        }
    }
}

#[test]
fn a_console_is_raw_until_its_key() {
    let fake = Fake::start();
    let mut terminal = Terminal::open();
    let mut child = terminal.spawn(at(&fake.socket(), &["vm", "console", "web"]));
    terminal.read_until("login: ");
    wait_until("raw mode", || terminal.is_raw());
    terminal.ours.write_all(b"root\x03\r").expect("type");
    wait_until("what was typed arrives, Ctrl-C included", || fake.noted(|notes| notes.input == b"root\x03\r"));
    terminal.ours.write_all(b"a\x1db").expect("type");
    assert_eq!(code(&mut child), 0);
    assert!(!terminal.is_raw());
    wait_until("it hangs up", || fake.noted(|notes| notes.hung_up == 1));
    assert_eq!(fake.noted(|notes| notes.input.clone()), b"root\x03\ra");
    assert_eq!(fake.noted(|notes| notes.calls.clone()), ["POST /v1/vms/web/console?history_bytes=4096"]);
}

#[test]
fn a_console_ends_by_signal_with_the_terminal_as_it_was() {
    let fake = Fake::start();
    let mut terminal = Terminal::open();
    let mut child = terminal.spawn(at(&fake.socket(), &["vm", "console", "web"]));
    terminal.read_until("login: ");
    wait_until("raw mode", || terminal.is_raw());
    signal(&child, "TERM");
    assert_eq!(code(&mut child), 0);
    assert!(!terminal.is_raw());
}

#[test]
fn a_console_without_a_terminal_carries_every_byte() {
    let fake = Fake::start();
    let mut child = piped(at(&fake.socket(), &["vm", "console", "web"]));
    child.stdin.take().expect("stdin").write_all(b"a\x1db").expect("write");
    let mut seen = [0; 10];
    child.stdout.as_mut().expect("stdout").read_exact(&mut seen).expect("read");
    assert_eq!(&seen, b"login: a\x1db");
    assert!(child.try_wait().expect("wait").is_none(), "it goes on showing output");
    signal(&child, "INT");
    assert_eq!(code(&mut child), 0);
}

#[test]
fn an_attached_console_has_no_json() {
    let fake = Fake::start();
    let output = output(at(&fake.socket(), &["--json", "vm", "console", "web"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--history"));
}

#[test]
fn a_command_on_a_terminal_knows_its_size() {
    let fake = Fake::start();
    let mut terminal = Terminal::open();
    let mut child = terminal.spawn(at(&fake.socket(), &["vm", "exec", "-t", "web", "--", "request"]));
    terminal.read_until(r#""terminal":{"rows":30,"columns":90}"#);
    assert_eq!(code(&mut child), 0);
    assert!(!terminal.is_raw());

    let mut child = terminal.spawn(at(&fake.socket(), &["vm", "exec", "-t", "web", "--", "hang"]));
    terminal.read_until("begun");
    wait_until("raw mode", || terminal.is_raw());
    let size = rustix::termios::Winsize { ws_row: 50, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal.theirs, size).expect("resize");
    signal(&child, "WINCH");
    let resized = Frame::Resize(TerminalSize { rows: 50, columns: 132 });
    wait_until("the new size arrives", || fake.noted(|notes| notes.frames.contains(&resized)));
    signal(&child, "TERM");
    assert_eq!(code(&mut child), 7);
    assert!(!terminal.is_raw());
}
