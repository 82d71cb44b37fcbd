//! `hearth bench launch --firecracker`, against a process that speaks as much of Firecracker's API as the bench uses, as
//! strictly: unknown words and calls at the wrong time are refused with a `fault_message`.
//!
//! That process is this test binary, started by a script once more as the one test [`a_firecracker`].

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::fake::Fake;
use crate::run::{at, code, output, piped, signal, text, wait_until};

/// What the fake process gets from its script.
const ARGUMENTS: &str = "FAKE_FIRECRACKER_ARGUMENTS";
const FATE: &str = "FAKE_FIRECRACKER_FATE";

/// An image's files, a directory for temporary files, and a program.
struct Ground {
    directory: tempfile::TempDir,
    fake: Fake,
}

impl Ground {
    fn with(fate: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let image = directory.path().join("images/demo");
        std::fs::create_dir_all(&image).expect("a directory");
        std::fs::create_dir(directory.path().join("tmp")).expect("a directory");
        let write = |path: PathBuf, text: &str| {
            let mut file =
                std::fs::OpenOptions::new().write(true).create(true).truncate(true).open(path).expect("a file");
            file.write_all(text.as_bytes()).expect("write");
        };
        write(image.join("image.json"), r#"{"kernel": "vmlinux", "initrd": "initrd", "command_line": "quiet"}"#);
        write(image.join("vmlinux"), "kernel");
        write(image.join("initrd"), "initrd");
        let program = directory.path().join("firecracker");
        let (pids, this) = (directory.path().join("pids"), std::env::current_exe().expect("this program"));
        let script = format!(
            "#!/bin/sh\n\
             if [ \"$1\" = --version ]; then echo 'Firecracker v1.13.1'; echo; exit 0; fi\n\
             echo $$ >> '{}'\n\
             {ARGUMENTS}=\"$*\" {FATE}={fate} exec '{}' --exact firecracker::a_firecracker --nocapture\n",
            pids.display(),
            this.display(),
        );
        write(program.clone(), &script);
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("its mode");
        Self { directory, fake: Fake::start() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, program: &Path) -> Command {
        let words = ["--json", "bench", "launch", "--bundle", "web", "--count", "2", "--boot", "0"];
        let mut command = at(&self.fake.socket(), &words);
        command.arg("--firecracker").arg(program).arg("--images").arg(self.path("images"));
        command.env("TMPDIR", self.path("tmp"));
        command
    }

    fn run(&self) -> Output {
        output(self.command(&self.path("firecracker")))
    }

    /// How many were started; none of them lives, no file of theirs is left, and neither is a VM.
    fn nothing_is_left(&self) -> usize {
        let pids = std::fs::read_to_string(self.path("pids")).unwrap_or_default();
        for pid in pids.lines() {
            wait_until("the process is gone", || {
                let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                !text(&words).contains("a_firecracker")
            });
        }
        let left: Vec<_> = std::fs::read_dir(self.path("tmp")).expect("a directory").collect();
        assert!(left.is_empty(), "{left:?}");
        let calls = self.fake.noted(|notes| notes.calls.clone());
        let count = |start: &str| calls.iter().filter(|call| call.starts_with(start)).count();
        assert_eq!(count("POST /v1/vms"), count("DELETE /v1/vms/bench-"), "{calls:?}");
        pids.lines().count()
    }
}

#[test]
fn its_restores_are_measured() {
    let ground = Ground::with("works");
    let output = ground.run();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let anchor = &report["firecracker"];
    assert_eq!(anchor["version"], "Firecracker v1.13.1");
    let figure = |name: &str| anchor[name]["min"].as_f64().expect("a figure");
    assert_eq!(anchor["load_ms"]["count"], 2);
    assert!(figure("spawn_ms") > 0.0 && figure("load_ms") > 0.0, "{anchor}");
    // A nanosecond is less than what is measured, and more than what sums of fractions lose.
    assert!(figure("resumed_ms") + 1e-6 >= figure("spawn_ms") + figure("load_ms"), "{anchor}");
    assert_eq!(ground.nothing_is_left(), 3, "one that is saved, two that are restored");
}

#[test]
fn a_program_that_is_none_is_named() {
    let ground = Ground::with("works");
    let output = output(ground.command(Path::new("/nowhere/firecracker")));
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("firecracker: ask its version: run /nowhere/firecracker: No such file"), "{said}");
    assert_eq!(ground.nothing_is_left(), 0);
}

#[test]
fn what_it_says_against_a_call_is_told() {
    let ground = Ground::with("refuses");
    let output = ground.run();
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("firecracker: /snapshot/load: Load snapshot error: CPU template mismatch (400)"), "{said}");
    assert!(!said.contains("Hearth's"), "it is no agent: {said}");
    assert_eq!(ground.nothing_is_left(), 2);
}

#[test]
fn a_process_that_dies_is_noticed_with_its_last_words() {
    for (fate, call, started) in [
        ("dies-at-start", "wait for its socket", 1),
        ("dies-at-boot", "boot a guest", 1),
        ("dies-at-load", "/snapshot/load", 2),
    ] {
        let ground = Ground::with(fate);
        let output = ground.run();
        assert_eq!(output.status.code(), Some(1), "{fate}");
        let said = text(&output.stderr);
        let wanted = format!("firecracker: {call}: it ended (exit status: 148): ");
        assert!(said.contains(&wanted) && said.contains("bad system call"), "{fate}: {said}");
        assert_eq!(ground.nothing_is_left(), started, "{fate}");
    }
}

#[test]
fn an_interrupted_bench_leaves_no_process() {
    let ground = Ground::with("hangs");
    let mut child = piped(ground.command(&ground.path("firecracker")));
    wait_until("the second process is asked", || ground.path("tmp/asked").exists());
    signal(&child, "INT");
    assert_eq!(code(&mut child), 130);
    std::fs::remove_file(ground.path("tmp/asked")).expect("the mark");
    assert_eq!(ground.nothing_is_left(), 2);
}

/// In a run of the tests: that the script's program is this one. Started by the script: Firecracker, until it is killed.
#[test]
fn a_firecracker() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else {
        let words = ["--exact", "firecracker::a_firecracker", "--list"];
        let listed = Command::new(std::env::current_exe().expect("this program")).args(words).output().expect("run it");
        assert!(text(&listed.stdout).contains("firecracker::a_firecracker: test"), "{}", text(&listed.stdout));
        return;
    };
    let fate = std::env::var(FATE).expect("the script says it");
    let words: Vec<&str> = arguments.split(' ').collect();
    let ["--api-sock", socket, "--id", id] = words[..] else { die(153, "Arguments parsing error") };
    if id.is_empty() || id.len() > 64 || !id.chars().all(|found| found.is_ascii_alphanumeric() || found == '-') {
        die(153, "Invalid instance ID");
    }
    if fate == "dies-at-start" {
        die(148, "Shutting down VM after intercepting a bad system call: SIGSYS");
    }
    let listener = UnixListener::bind(socket).unwrap_or_else(|_| die(1, "Failed to open the API socket"));
    let mut machine = Firecracker { fate, ..Firecracker::default() };
    for stream in listener.incoming() {
        machine.serve(stream.expect("a client"));
    }
}

#[expect(clippy::disallowed_methods, clippy::exit, reason = "this process is a program of its own, not a test")]
fn die(code: i32, last_words: &str) -> ! {
    eprintln!("{last_words}");
    std::process::exit(code)
}

/// One microVM, as far as its API shows.
#[derive(Default)]
struct Firecracker {
    fate: String,
    kernel: Option<String>,
    has_machine: bool,
    runs: bool,
    is_paused: bool,
}

/// `Err` is a `fault_message`.
type Answer = Result<(), String>;

impl Firecracker {
    /// One request; as the real server, it takes a body of the announced length only, and answers 204 without one.
    fn serve(&mut self, stream: UnixStream) {
        let mut reader = BufReader::new(&stream);
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            // A launcher that only looked whether somebody listens.
            return;
        }
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).expect("a header");
            if header.trim().is_empty() {
                break;
            }
            if let Some((_, value)) =
                header.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            {
                length = value.trim().parse().expect("a length");
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("the whole body");
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match serde_json::from_slice::<BTreeMap<String, Value>>(&body) {
            Ok(body) => self.answer(words[0], words[1], &body),
            Err(error) => Err(format!("An error occurred when deserializing the json body of a request: {error}.")),
        };
        let text = match answer {
            Ok(()) => "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n".to_owned(),
            Err(fault) => {
                let body = serde_json::json!({ "fault_message": fault }).to_string();
                let head = "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json";
                format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
            }
        };
        (&stream).write_all(text.as_bytes()).expect("answer");
        if self.runs && self.fate == "dies-at-boot" {
            die(148, "Shutting down VM after intercepting a bad system call: SIGSYS");
        }
    }

    fn answer(&mut self, method: &str, path: &str, body: &BTreeMap<String, Value>) -> Answer {
        match (method, path) {
            ("PUT", "/boot-source") => {
                only(body, &["kernel_image_path", "boot_args", "initrd_path"])?;
                for file in ["kernel_image_path", "initrd_path"] {
                    std::fs::metadata(word(body, file)?)
                        .map_err(|error| format!("The {file} cannot be opened: {error}"))?;
                }
                self.kernel = Some(word(body, "kernel_image_path")?.to_owned());
                Ok(())
            }
            ("PUT", "/machine-config") => {
                only(body, &["vcpu_count", "mem_size_mib", "smt", "track_dirty_pages"])?;
                self.has_machine = body["vcpu_count"].as_u64() == Some(1) && body["mem_size_mib"].as_u64() == Some(128);
                if self.has_machine { Ok(()) } else { Err("The memory size (MiB) is invalid.".to_owned()) }
            }
            ("PUT", "/actions") => self.start(body),
            ("PATCH", "/vm") => {
                only(body, &["state"])?;
                if !self.runs {
                    return Err("The requested operation is not supported before starting the microVM.".to_owned());
                }
                self.is_paused = word(body, "state")? == "Paused";
                Ok(())
            }
            ("PUT", "/snapshot/create") => {
                only(body, &["snapshot_type", "snapshot_path", "mem_file_path"])?;
                if !self.is_paused || word(body, "snapshot_type")? != "Full" {
                    return Err("Create snapshot error: the microVM is not paused".to_owned());
                }
                for file in ["snapshot_path", "mem_file_path"] {
                    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(word(body, file)?);
                    file.and_then(|mut file| file.write_all(b"saved")).map_err(|error| error.to_string())?;
                }
                Ok(())
            }
            ("PUT", "/snapshot/load") => self.load(body),
            (_, _) => Err(format!("Invalid request method and/or path: {method} {path}.")),
        }
    }

    fn start(&mut self, body: &BTreeMap<String, Value>) -> Answer {
        only(body, &["action_type"])?;
        if word(body, "action_type")? != "InstanceStart" || self.kernel.is_none() || !self.has_machine {
            return Err("Cannot start microvm without kernel configuration.".to_owned());
        }
        self.runs = true;
        if self.fate == "dies-at-boot" {
            return Ok(());
        }
        println!("hearth-init: begins");
        // More than a pipe holds: somebody has to read a guest's console.
        std::thread::spawn(|| (0..4096).for_each(|line| println!("{line:0>60}")));
        Ok(())
    }

    fn load(&mut self, body: &BTreeMap<String, Value>) -> Answer {
        only(body, &["snapshot_path", "mem_backend", "resume_vm", "track_dirty_pages"])?;
        if self.runs || self.kernel.is_some() || self.has_machine {
            return Err("Loading a microVM snapshot not allowed after configuring boot-specific resources.".to_owned());
        }
        let backend: BTreeMap<String, Value> =
            serde_json::from_value(body["mem_backend"].clone()).map_err(|error| error.to_string())?;
        only(&backend, &["backend_type", "backend_path"])?;
        let state = word(body, "snapshot_path")?;
        for file in [state, word(&backend, "backend_path")?] {
            let saved = std::fs::read(file).map_err(|error| format!("Load snapshot error: {error}"))?;
            assert_eq!(saved, b"saved");
        }
        if word(&backend, "backend_type")? != "File" || body["resume_vm"] != true {
            return Err("Load snapshot error: it would not run".to_owned());
        }
        match self.fate.as_str() {
            "refuses" => Err("Load snapshot error: CPU template mismatch".to_owned()),
            "dies-at-load" => die(148, "Shutting down VM after intercepting a bad system call: SIGSYS"),
            "hangs" => {
                let mark = Path::new(state).ancestors().nth(2).expect("a directory").join("asked");
                std::fs::OpenOptions::new().write(true).create_new(true).open(mark).expect("a mark");
                loop {
                    std::thread::park();
                }
            }
            _ => {
                println!("a restored guest's console, which nobody reads");
                self.runs = true;
                Ok(())
            }
        }
    }
}

/// Refuses what a body may not hold.
fn only(body: &BTreeMap<String, Value>, known: &[&str]) -> Answer {
    match body.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            Err(format!("An error occurred when deserializing the json body of a request: unknown field `{key}`."))
        }
    }
}

fn word<'a>(body: &'a BTreeMap<String, Value>, key: &str) -> Result<&'a str, String> {
    body.get(key).and_then(Value::as_str).ok_or_else(|| format!("missing field `{key}`"))
}
