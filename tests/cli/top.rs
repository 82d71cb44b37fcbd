//! `hearth top`: tables and JSON for scripts, a screen on a terminal that is given back, and an agent that goes away.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use nix::pty::{Winsize, openpty};
use nix::sys::termios::{Termios, tcgetattr};
use serde_json::Value;

use crate::fake::Fake;
use crate::run::{at, code, output, piped, signal, text, wait_until};

/// What a terminal shows while it is another screen.
const SCREEN_END: &str = "\x1b[?25h\x1b[?1049l";

#[test]
fn one_table_has_rates_where_two_looks_can_be_compared() {
    let fake = Fake::start();
    let shown = output(at(&fake.socket(), &["top", "--once", "--interval", "100ms", "--sort", "name"]));
    assert_eq!((shown.status.code(), text(&shown.stderr)), (Some(0), String::new()));
    let table = text(&shown.stdout);
    let rows: Vec<String> = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        rows,
        [
            "NAME STATE CPU MEMORY FAULTS/S RX/S TX/S",
            "late running - 64.0 MiB of 128.0 MiB - - -",
            "restless running - 64.0 MiB of 128.0 MiB - - -",
            "web running 25.0 % 64.0 MiB of 128.0 MiB 50 1.0 KiB 0 B",
        ]
    );
}

#[test]
fn json_is_one_value_for_each_interval() {
    let fake = Fake::start();
    let mut child = piped(at(&fake.socket(), &["--json", "top", "--interval", "100ms"]));
    let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    for look in 2..=4 {
        let value: Value = serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON");
        assert_eq!(value["interval_ms"], 2000.0);
        let of = |name: &str| {
            let vms = value["vms"].as_array().expect("VMs");
            vms.iter().find(|vm| vm["name"] == name).cloned().expect("the VM")
        };
        assert_eq!((&of("web")["cpu_percent"], &of("web")["rx_bytes_per_s"]), (&25.0.into(), &1024.0.into()));
        assert_eq!((&of("restless")["cpu_percent"], &of("restless")["faults_per_s"]), (&Value::Null, &Value::Null));
        assert_eq!(of("late")["cpu_percent"].is_null(), look == 2);
    }
    drop(lines);
    assert_eq!(code(&mut child), 0);
}

#[test]
fn an_agent_that_goes_away_is_told() {
    let fake = Fake::start();
    let mut child = piped(at(&fake.socket(), &["top", "--interval", "100ms"]));
    let mut lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    assert!(lines.next().expect("a line").expect("text").starts_with("NAME"));
    drop(fake);
    while lines.next().is_some() {}
    assert_eq!(code(&mut child), 1);
    let mut said = String::new();
    child.stderr.take().expect("stderr").read_to_string(&mut said).expect("text");
    assert!(said.starts_with("error: the agent went away: ") && said.contains("help: its VMs run on"), "{said}");
}

/// The client on a terminal, and what it has shown there.
struct Terminal {
    child: Child,
    keys: File,
    slave: OwnedFd,
    before: Termios,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn start(mut command: Command) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).expect("a terminal");
        let before = tcgetattr(&pty.slave).expect("its settings");
        let end = || Stdio::from(pty.slave.try_clone().expect("the terminal"));
        let child = command.stdin(end()).stdout(end()).stderr(Stdio::piped()).spawn().expect("run hearth");
        let keys = File::from(pty.master);
        let mut reader = keys.try_clone().expect("the terminal");
        let shown = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 {
                    break;
                }
                sink.lock().expect("shown").extend_from_slice(&buffer[..count]);
            }
        });
        Self { child, keys, slave: pty.slave, before, shown }
    }

    fn shown(&self) -> String {
        text(&self.shown.lock().expect("shown"))
    }

    fn wait_for(&self, wanted: &str) {
        wait_until(wanted, || self.shown().contains(wanted));
    }

    fn press(&mut self, key: &[u8]) {
        self.keys.write_all(key).expect("press a key");
    }

    /// Its exit code and what it said on standard error, once the terminal is as it was.
    fn end(mut self) -> (i32, String) {
        let code = code(&mut self.child);
        self.wait_for(SCREEN_END);
        assert!(self.shown().ends_with(SCREEN_END), "{:?}", self.shown());
        assert_eq!(tcgetattr(&self.slave).expect("its settings"), self.before);
        let mut said = String::new();
        self.child.stderr.take().expect("stderr").read_to_string(&mut said).expect("text");
        (code, said)
    }
}

#[test]
fn a_terminal_is_drawn_on_and_given_back() {
    let fake = Fake::start();
    type End = fn(&mut Terminal);
    let ends: [(&str, End); 3] = [
        ("q", |terminal| terminal.press(b"q")),
        ("Ctrl-C", |terminal| terminal.press(b"\x03")),
        ("SIGTERM", |terminal| signal(&terminal.child, "TERM")),
    ];
    for (what, end) in ends {
        let mut terminal = Terminal::start(at(&fake.socket(), &["top", "--interval", "100ms"]));
        terminal.wait_for("running; every 0.1 s, by cpu");
        terminal.wait_for("25.0 %");
        terminal.press(b"m");
        terminal.wait_for("by memory");
        let shown = terminal.shown();
        assert!(shown.starts_with("\x1b[?1049h\x1b[?25l\x1b[H"), "{shown:?}");
        assert!(!shown.contains("\x1b[2J") && !shown.replace("\r\n", "").contains('\n'), "{shown:?}");
        end(&mut terminal);
        assert_eq!(terminal.end(), (0, String::new()), "{what}");
    }
}

#[test]
fn a_terminal_is_given_back_when_the_agent_goes_away() {
    let fake = Fake::start();
    let terminal = Terminal::start(at(&fake.socket(), &["top", "--interval", "100ms"]));
    terminal.wait_for("web");
    drop(fake);
    let (code, said) = terminal.end();
    assert_eq!(code, 1);
    assert!(said.starts_with("error: the agent went away: "), "{said}");
}

#[test]
fn without_an_agent_the_terminal_stays_as_it_is() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut terminal = Terminal::start(at(&directory.path().join("s"), &["top"]));
    assert_eq!(code(&mut terminal.child), 1);
    assert_eq!(terminal.shown(), "");
}
