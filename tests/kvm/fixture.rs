//! An agent with its own state directory, and what the host looks like from outside.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read as _, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for an agent to say that it is ready.
const READY_SECONDS_MAX: u64 = 30;

/// Name of the guest that tests share.
const SHARED: &str = "shared";

pub(crate) fn need(name: &str) -> PathBuf {
    let value = std::env::var_os(name);
    PathBuf::from(value.unwrap_or_else(|| panic!("{name} is not set: run these tests by scripts/test kvm")))
}

/// An agent under test.
pub(crate) struct Agent {
    directory: tempfile::TempDir,
    child: Mutex<Child>,
    place: Mutex<Place>,
}

/// Where an agent runs.
#[derive(Default)]
struct Place {
    /// A named network namespace: a host of its own as far as its network goes.
    namespace: Option<String>,
    /// It finds no programs, nft among them.
    without_programs: bool,
    /// A library that it is to be loaded with, and the file where that finds how far the wall clock is off.
    clock: Option<(String, String)>,
    /// The program, if it is not the one that is tested.
    program: Option<PathBuf>,
}

impl Place {
    fn program(&self) -> PathBuf {
        self.program.clone().unwrap_or_else(|| need("HEARTH_BINARY"))
    }
}

impl Agent {
    /// Starts an agent on an empty state directory.
    pub(crate) fn start() -> Self {
        Self::start_with("", None)
    }

    /// Starts an agent with this configuration on an empty state directory, in a named network namespace: a host of
    /// its own as far as its network goes.
    pub(crate) fn start_with(config: &str, namespace: Option<&str>) -> Self {
        Self::start_by(config, namespace, None)
    }

    /// The same, by another program if there is one: an earlier version.
    pub(crate) fn start_by(config: &str, namespace: Option<&str>, program: Option<PathBuf>) -> Self {
        Self::start_at(config, Place { namespace: namespace.map(str::to_owned), program, ..Place::default() })
    }

    /// Starts an agent in a named network namespace whose directory was prepared before: `state` in it is to be its state
    /// directory. `clock`: a library that the agent is loaded with, and the file that says how far its wall clock is off.
    pub(crate) fn start_on(
        config: &str,
        namespace: &str,
        directory: tempfile::TempDir,
        clock: Option<(String, String)>,
    ) -> Self {
        Self::start_in(directory, config, Place { namespace: Some(namespace.to_owned()), clock, ..Place::default() })
    }

    /// The same, by another program if there is one.
    pub(crate) fn start_prepared(
        config: &str,
        namespace: &str,
        directory: tempfile::TempDir,
        program: Option<PathBuf>,
    ) -> Self {
        Self::start_in(directory, config, Place { namespace: Some(namespace.to_owned()), program, ..Place::default() })
    }

    /// Ends the agent as systemd does and starts the program that is tested instead.
    pub(crate) fn upgrade(&self) {
        terminate(self.pid());
        assert!(self.ended().success());
        self.place().program = None;
        self.start_again();
    }

    fn place(&self) -> std::sync::MutexGuard<'_, Place> {
        self.place.lock().expect("the place")
    }

    /// Starts one that finds no nft.
    pub(crate) fn start_without_programs(config: &str, namespace: &str) -> Self {
        Self::start_at(
            config,
            Place { namespace: Some(namespace.to_owned()), without_programs: true, ..Place::default() },
        )
    }

    fn start_at(config: &str, place: Place) -> Self {
        Self::start_in(tempfile::tempdir().expect("a temporary directory"), config, place)
    }

    fn start_in(directory: tempfile::TempDir, config: &str, place: Place) -> Self {
        std::fs::write(directory.path().join("hearth.toml"), config).expect("a configuration");
        let child = Mutex::new(spawn_agent(directory.path(), &place));
        Self { directory, child, place: Mutex::new(place) }
    }

    /// The state directory.
    pub(crate) fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// The configuration.
    pub(crate) fn configuration(&self) -> PathBuf {
        self.directory.path().join("hearth.toml")
    }

    /// The API socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    /// The agent's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.lock().expect("the agent").id()
    }

    /// A client command; the words follow `hearth --socket S`.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(need("HEARTH_BINARY"));
        command.arg("--socket").arg(self.socket()).args(words);
        command
    }

    /// Runs a client command to its end.
    pub(crate) fn run(&self, words: &[&str]) -> Output {
        self.command(words).stdin(Stdio::null()).output().expect("run hearth")
    }

    /// Runs a client command that has to succeed; its standard output.
    pub(crate) fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "hearth {words:?}: {}\n{}", output.status, text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs a client command with `--json` that has to succeed; its one value.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        let words: Vec<&str> = ["--json"].iter().chain(words).copied().collect();
        let answer = self.ok(&words);
        serde_json::from_str(&answer).unwrap_or_else(|error| panic!("hearth {words:?} printed {answer:?}: {error}"))
    }

    /// Runs a command in a guest; its standard output without the last line end.
    pub(crate) fn sh(&self, vm: &str, script: &str) -> String {
        self.ok(&["vm", "exec", vm, "--", "sh", "-c", script]).trim_end().to_owned()
    }

    /// Makes a file of random bytes in a guest, and one beside it with its sum, for `md5sum -c`. The host's are sent: where
    /// a guest's kernel is emulated, it makes 44 KB of its own a second.
    pub(crate) fn fill_file(&self, vm: &str, path: &str, bytes: u64) {
        let random = File::open("/dev/urandom").expect("randomness");
        let mut command = self.command(["vm", "exec", vm, "--", "sh", "-c"]);
        command.arg(format!("cat > {path} && md5sum {path} > {path}.sum"));
        let mut child = command.stdin(Stdio::piped()).spawn().expect("run hearth");
        let mut stdin = child.stdin.take().expect("its input");
        std::io::copy(&mut random.take(bytes), &mut stdin).expect("send");
        drop(stdin);
        assert!(child.wait().expect("wait").success(), "fill {path} in {vm}");
    }

    /// A VM as the API shows it.
    pub(crate) fn vm(&self, vm: &str) -> Value {
        self.json(&["vm", "show", vm])
    }

    /// Process id of a VM's VMM.
    pub(crate) fn vmm_pid(&self, vm: &str) -> u32 {
        let pid = self.vm(vm)["pid"].as_u64().expect("a running VM has a pid");
        u32::try_from(pid).expect("a pid")
    }

    /// Boots a guest and waits until it runs.
    pub(crate) fn launch(&self, name: &str, more: &[&str]) {
        let words: Vec<&str> =
            ["vm", "launch", "--name", name, "--wait", "running"].iter().chain(more).copied().collect();
        self.ok(&words);
    }

    /// The guest that tests share; booted when first asked for.
    pub(crate) fn shared(&self) -> &'static str {
        if self.run(&["vm", "show", SHARED]).status.success() {
            assert_eq!(self.vm(SHARED)["state"], "running", "the shared guest");
        } else {
            self.launch(SHARED, &[]);
        }
        SHARED
    }

    /// Waits until a VM is in `state`; gives the VM.
    pub(crate) fn wait_for_state(&self, vm: &str, state: &str) -> Value {
        let mut found = self.vm(vm);
        let deadline = Instant::now() + Duration::from_secs(60);
        while found["state"] != state {
            assert!(Instant::now() < deadline, "{vm} is not {state}: {found:#}");
            std::thread::sleep(Duration::from_millis(100));
            found = self.vm(vm);
        }
        found
    }

    /// A request by curl: status and body.
    pub(crate) fn curl(&self, words: &[&str], path: &str) -> (u16, String) {
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--max-time", "60", "--unix-socket"])
            .arg(self.socket())
            .args(["--write-out", "\n%{http_code}"])
            .args(words)
            .arg(format!("http://hearth{path}"))
            .output()
            .expect("run curl");
        let answer = text(&output.stdout);
        let (body, status) = answer.rsplit_once('\n').unwrap_or(("", &answer));
        (status.parse().unwrap_or(0), body.to_owned())
    }

    /// Kills the agent with SIGKILL and starts the next one on the same state directory.
    pub(crate) fn kill_and_restart(&self) {
        self.kill();
        self.start_again();
    }

    /// Whether the agent has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.child.lock().expect("the agent").try_wait().expect("look at the agent").is_some()
    }

    /// Waits until the agent ends by itself; how it did.
    pub(crate) fn ended(&self) -> std::process::ExitStatus {
        let mut child = self.child.lock().expect("the agent");
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = child.try_wait().expect("wait for the agent") {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the agent with SIGKILL.
    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().expect("the agent");
        child.kill().expect("kill the agent");
        child.wait().expect("wait for the agent");
    }

    /// Starts the next agent on the same state directory.
    pub(crate) fn start_again(&self) {
        *self.child.lock().expect("the agent") = spawn_agent(self.directory.path(), &self.place());
    }

    /// What an agent says that does not start on this state directory.
    pub(crate) fn refusal(&self) -> String {
        let mut child = agent_command(self.directory.path(), &self.place()).spawn().expect("run hearth");
        let deadline = Instant::now() + Duration::from_secs(30);
        while child.try_wait().expect("wait for the agent").is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        let output = child.wait_with_output().expect("wait for the agent");
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        text(&output.stderr)
    }

    /// Asks for a drain as an administrator does; what is said.
    pub(crate) fn drain(&self) -> Output {
        agent_command(self.directory.path(), &self.place()).arg("--drain").output().expect("run hearth")
    }

    /// The end of the agent's log.
    pub(crate) fn log_tail(&self) -> String {
        let log = std::fs::read(self.directory.path().join("agent.log")).unwrap_or_default();
        let log = text(&log);
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Removes every VM and stops the agent; it has to end well and its directory has to be clean.
    pub(crate) fn finish(self) {
        for vm in self.json(&["vm", "ls"])["vms"].as_array().expect("a list") {
            self.ok(&["vm", "rm", vm["id"].as_str().expect("an id")]);
        }
        self.has_no_directories();
        self.end();
    }

    fn has_no_directories(&self) {
        let left = std::fs::read_dir(self.state().join("vms")).map(Iterator::count).unwrap_or(0);
        assert_eq!(left, 0, "directories of what is gone");
    }

    /// Stops the agent, which has no VMs; it has to end well, and what it kept for itself is gone with it.
    pub(crate) fn end(self) {
        let mut child = self.child.lock().expect("the agent");
        terminate(child.id());
        let status = child.wait().expect("wait for the agent");
        assert!(status.success(), "the agent ended with {status}");
        assert!(!self.socket().exists(), "the API socket is left");
        self.has_no_directories();
    }
}

impl Drop for Agent {
    /// After a test that failed: ends what runs, as well as it can be done.
    fn drop(&mut self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(child.try_wait(), Ok(Some(_))) {
            return;
        }
        // VMs outlive their agent.
        let _ = self.run(&["vm", "rm", "--all", "--timeout", "0"]);
        terminate(child.id());
        let _ = child.wait();
        if let Some(daemon) = volume_daemon(&self.state()) {
            let _ = Command::new("kill").args(["-KILL", &daemon.to_string()]).status();
        }
    }
}

/// The process that serves the volumes of this state directory: the one that has it locked.
pub(crate) fn volume_daemon(state: &Path) -> Option<u32> {
    let runtime = state.join("volumed");
    let mine = |pid: &u32| {
        let links = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        links.filter_map(|link| std::fs::read_link(link.path()).ok()).any(|file| file.starts_with(&runtime))
    };
    let is_daemon = |pid: &u32| {
        std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words.starts_with(b"hearth\0volumed\0"))
    };
    vmms().into_iter().filter(is_daemon).find(mine)
}

fn agent_command(directory: &Path, place: &Place) -> Command {
    let mut command = match &place.namespace {
        // Only the network differs: unlike `ip netns exec`, this leaves mounts, and so named namespaces, shared.
        Some(namespace) => {
            let mut command = Command::new("nsenter");
            command.arg(format!("--net=/run/netns/{namespace}"));
            if place.without_programs {
                command.args(["env", "PATH=/nowhere"]);
            }
            if let Some((library, file)) = &place.clock {
                // Only the wall clock, read anew each time.
                command.args(["env", "DONT_FAKE_MONOTONIC=1", "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_RESET=1"]);
                command.args([format!("FAKETIME_TIMESTAMP_FILE={file}"), format!("LD_PRELOAD={library}")]);
            }
            command.arg(place.program());
            command
        }
        None => Command::new(place.program()),
    };
    command
        .arg("agent")
        .arg("--config")
        .arg(directory.join("hearth.toml"))
        .arg("--state-dir")
        .arg(directory.join("state"))
        .arg("--socket")
        .arg(directory.join("api.sock"))
        .env("HEARTH_IMAGES", need("HEARTH_IMAGES"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

fn spawn_agent(directory: &Path, place: &Place) -> Child {
    let mut child = agent_command(directory, place).spawn().expect("start an agent");
    let stderr = BufReader::new(child.stderr.take().expect("its standard error"));
    let mut log = File::options().create(true).append(true).open(directory.join("agent.log")).expect("a log file");
    let (ready, said_ready) = mpsc::channel();
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            if line.split_whitespace().any(|word| word == "ready") {
                let _ = ready.send(());
            }
            let _ = writeln!(log, "{line}");
        }
    });
    if said_ready.recv_timeout(Duration::from_secs(READY_SECONDS_MAX)).is_err() {
        let _ = child.kill();
        let _ = child.wait();
        let log = std::fs::read_to_string(directory.join("agent.log")).unwrap_or_default();
        panic!("the agent did not say ready; its log:\n{log}");
    }
    child
}

/// Asks a process of ours to end.
pub(crate) fn terminate(pid: u32) {
    let status = Command::new("kill").args(["-TERM", &pid.to_string()]).status().expect("run kill");
    assert!(status.success());
}

/// Bytes as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A number from a line of `/proc/PID/status`, in KiB.
pub(crate) fn status_kib(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process's status");
    let line = status.lines().find(|line| line.starts_with(field)).expect("the field");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

/// Open descriptors of a process.
pub(crate) fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count).unwrap_or(0)
}

/// What tests must leave as they found it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Host {
    vmms: BTreeSet<u32>,
    links: String,
    namespaces: String,
    mounts: usize,
    tables: String,
}

impl Host {
    /// The host as it is.
    pub(crate) fn look() -> Self {
        Self {
            vmms: vmms(),
            links: of_command("ip", &["-o", "link"]).lines().filter_map(|line| line.split(':').nth(1)).collect(),
            namespaces: of_command("ip", &["netns", "list"]),
            // The directory of named namespaces becomes a mount point once, as ip-netns(8) has it, and stays one.
            mounts: std::fs::read_to_string("/proc/self/mounts")
                .expect("mounts")
                .lines()
                .filter(|line| line.split(' ').nth(1) != Some("/run/netns"))
                .count(),
            tables: of_command("nft", &["list", "tables"]),
        }
    }

    /// Fails if something was left or taken.
    pub(crate) fn assert_same_as_now(&self) {
        assert_eq!(*self, Self::look(), "the host is not as it was");
    }
}

fn of_command(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("run {program}: {error}"));
    text(&output.stdout)
}

/// Processes that are a VMM or a volume daemon, by their command line.
pub(crate) fn vmms() -> BTreeSet<u32> {
    let processes = std::fs::read_dir("/proc").expect("/proc").filter_map(Result::ok);
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_vmm = |pid: &u32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = words.split(|byte| *byte == 0).collect();
        let ours = [Some(&b"vmm".as_slice()), Some(&b"volumed".as_slice())];
        words.first().is_some_and(|word| word.ends_with(b"hearth")) && ours.contains(&words.get(1))
    };
    pids.filter(is_vmm).collect()
}
