//! What befalls a host under running VMs: a file system that turns read-only, a wall clock that is set, a ledger that is put
//! back to what it was, an end by request, packets for a VM that sleeps. The VMs run on, and the next agent knows them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use super::fabric::run;
use super::fixture::{Agent, text};
use super::lab::Lab;
use super::probe;

/// The library by which one program sees another wall clock (faketime(1)).
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// A file system of its own, of a file; unmounted and detached when dropped.
struct FileSystem {
    at: PathBuf,
    device: String,
}

impl FileSystem {
    /// ext4, which turns read-only when it finds itself damaged.
    fn make(file: &Path, at: &Path) -> Self {
        let (file, to) = (file.to_str().expect("a path"), at.to_str().expect("a path"));
        run("truncate", &["--size", "512M", file]);
        run("mkfs.ext4", &["-q", "-m", "0", file]);
        let device = run("losetup", &["--find", "--show", file]).trim().to_owned();
        run("mkdir", &["--parents", to]);
        let this = Self { at: at.to_owned(), device };
        this.mount();
        this
    }

    fn mount(&self) {
        run("mount", &["-o", "errors=remount-ro", &self.device, self.at.to_str().expect("a path")]);
    }

    /// Makes the kernel find an error in it.
    fn turn_read_only(&self) {
        let name = self.device.trim_start_matches("/dev/");
        std::fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test").expect("ext4 takes an error");
        let refused = std::fs::write(self.at.join("probe"), "").expect_err("it is read-only");
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }

    /// What an administrator does about it.
    fn repair(&self) {
        run("umount", &[self.at.to_str().expect("a path")]);
        // It exits with 1: errors were corrected.
        let checked = Command::new("e2fsck").args(["-f", "-y", &self.device]).output().expect("run e2fsck");
        assert!(matches!(checked.status.code(), Some(0 | 1)), "{}", text(&checked.stdout));
        self.mount();
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).output();
        let _ = Command::new("losetup").args(["--detach", &self.device]).output();
        // The agent's directory could not go while this was in it.
        let _ = std::fs::remove_dir_all(self.at.parent().expect("the agent's directory"));
    }
}

fn said(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    text(&output.stderr)
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn wait_until_gone(pid: u32) {
    let begun = Instant::now();
    while is_there(pid) {
        assert!(begun.elapsed() < Duration::from_secs(20), "process {pid} goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn a_file_system_that_turns_read_only_costs_no_vm(_shared: &Agent) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let disk = FileSystem::make(&directory.path().join("disk"), &directory.path().join("state"));
    let lab = Lab::start_on("htest-readonly", 34, "[limits]\ndisk_reserve_mib = 16\n", directory, None);
    let agent = lab.agent();
    lab.build("base", &[]);
    lab.clone_of("base", "steady");
    let pid = agent.vmm_pid("steady");

    disk.turn_read_only();
    // What would have to be written down is refused. What runs goes on, is shown and is reached.
    let refused = said(&agent.run(&["vm", "launch", "--bundle", "base", "--name", "later"]));
    println!("    a launch: {}", refused.trim_end());
    assert!(refused.contains("the file system of the state directory"), "{refused}");
    assert_eq!(agent.sh("steady", "echo here"), "here");
    assert_eq!(agent.json(&["vm", "ls"])["vms"].as_array().map(Vec::len), Some(1));
    let shown = agent.ok(&["host", "show"]);
    println!("    host show: {}", shown.lines().next().unwrap_or_default());
    assert!(shown.starts_with("! ledger: it cannot be written"), "{shown}");
    agent.kill();
    let refused = agent.refusal();
    println!("    the next agent: {}", refused.lines().last().unwrap_or_default());
    assert!(refused.contains("ead-only file system"), "{refused}");
    assert!(is_there(pid), "the VM runs");

    // Once it was repaired, which takes that nobody has files of it open, what was there is there.
    run("kill", &["-KILL", &pid.to_string()]);
    wait_until_gone(pid);
    disk.repair();
    agent.start_again();
    let ended = agent.wait_for_state("steady", "failed");
    assert_eq!(ended["cause"]["code"], "vmm_gone", "{ended:#}");
    lab.clone_of("base", "again");
    assert_eq!(agent.sh("again", "echo works"), "works");
    lab.ends_with_vms();
    drop(disk);
}

pub(crate) fn a_wall_clock_that_is_set_changes_no_vm(_shared: &Agent) {
    const HOUR_S: i64 = 3600;
    assert!(Path::new(FAKETIME).exists(), "{FAKETIME} is missing: run these tests by scripts/test kvm");
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("clock");
    let set = |hours: i64| std::fs::write(&file, format!("{:+}\n", hours * HOUR_S)).expect("set the clock");
    set(0);
    let clock = Some((FAKETIME.to_owned(), file.to_str().expect("a path").to_owned()));
    let lab = Lab::start_on("htest-clock", 35, "", directory, clock);
    let agent = lab.agent();
    lab.build("base", &[]);
    agent.ok(&["session", "create", "--name", "short", "--ttl", "1h"]);
    let own = |name: &str| {
        agent.json(&["vm", "launch", "--bundle", "base", "--session", "short", "--name", name]);
        agent.vm(name)["addresses"][0].as_str().expect("an address").to_owned()
    };
    let mut had = vec![own("first"), own("second")];
    let pid = agent.vmm_pid("first");
    for hours in [24, -24] {
        agent.ok(&["vm", "rm", "second", "--timeout", "0"]);
        set(hours);
        // Whatever has an end is looked at when there is one more of it.
        let other = format!("other{}", hours.unsigned_abs() + u64::from(hours < 0));
        agent.ok(&["session", "create", "--name", &other]);
        assert_eq!(agent.sh("first", "echo here"), "here", "{hours} hours");
        let address = own("second");
        assert!(!had.contains(&address), "{address} has not rested");
        had.push(address);
        // A guest has the time of its host.
        let asked = agent.sh("second", "date +%s").parse::<i64>().expect("seconds");
        let now = i64::try_from(unix_seconds()).expect("seconds") + hours * HOUR_S;
        assert!((asked - now).abs() < 60, "{asked} in the guest, {now} here");
        agent.kill_and_restart();
        assert_eq!((agent.vmm_pid("first"), agent.vm("first")["state"].clone()), (pid, "running".into()));
        let session = agent.json(&["session", "show", "short"]);
        assert_eq!((&session["state"], session["members"].as_array().map(Vec::len)), (&"active".into(), Some(2)));
    }
    // One that sleeps for seconds sleeps for no day.
    set(0);
    agent.ok(&["vm", "swap-out", "first", "--mode", "hibernate", "--wake-after", "5s"]);
    set(-24);
    agent.kill_and_restart();
    agent.wait_for_state("first", "running");
    lab.ends_with_vms();
}

fn unix_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs()
}

pub(crate) fn a_drain_stops_the_vms_and_says_so(_shared: &Agent) {
    let lab = Lab::start("htest-drain", 36);
    let agent = lab.agent();
    lab.build("base", &[]);
    for name in ["one", "two", "three"] {
        lab.clone_of("base", name);
    }
    agent.ok(&["vm", "swap-out", "three", "--mode", "hibernate"]);
    let drained = agent.drain();
    assert_eq!(drained.status.code(), Some(0), "{}", text(&drained.stderr));
    println!("    {}", text(&drained.stderr).lines().last().unwrap_or_default());
    assert!(text(&drained.stderr).contains("2 VMs have stopped"), "{}", text(&drained.stderr));
    assert!(agent.ended().success());
    agent.start_again();
    for name in ["one", "two"] {
        assert_eq!(agent.vm(name)["state"], "stopped", "{name}");
    }
    // Whoever sleeps runs nowhere: it is as it was.
    assert_eq!(agent.vm("three")["state"], "swapped_out");
    assert_eq!(agent.sh("three", "echo awake"), "awake");
    lab.ends_with_vms();
}

pub(crate) fn a_ledger_put_back_finds_the_vms_it_knows(_shared: &Agent) {
    let lab = Lab::start("htest-putback", 37);
    let agent = lab.agent();
    lab.build("base", &[]);
    lab.clone_of("base", "kept");
    lab.clone_of("base", "removed");
    let copy = agent.state().join("copy.db");
    let copy = copy.to_str().expect("a path");
    agent.ok(&["ledger", "backup", "--output", copy]);
    agent.ok(&["vm", "rm", "removed", "--timeout", "0"]);
    lab.clone_of("base", "later");
    let (kept, later) = (agent.vmm_pid("kept"), agent.vmm_pid("later"));

    agent.kill();
    // Its log as well, from which SQLite would mend it.
    for file in ["ledger.db", "ledger.db-wal"] {
        let file = agent.state().join(file);
        let mut bytes = std::fs::read(&file).expect("the ledger");
        bytes[..100].fill(0x5a);
        std::fs::write(&file, bytes).expect("damage it");
    }
    let refused = agent.refusal();
    assert!(refused.contains("ledger restore"), "{refused}");
    let state = agent.state();
    let words = ["ledger", "restore", copy, "--state-dir", state.to_str().expect("a path"), "--config"];
    let mut restore = Command::new(super::fixture::need("HEARTH_BINARY"));
    let restored = restore.args(words).arg(agent.configuration()).output().expect("run hearth");
    assert!(restored.status.success(), "{}", text(&restored.stderr));
    agent.start_again();

    // Known then and alive: adopted. Known then and gone: told. Not known then: taken down.
    assert_eq!((agent.vm("kept")["state"].clone(), agent.vmm_pid("kept")), ("running".into(), kept));
    assert_eq!(agent.sh("kept", "echo here"), "here");
    assert_eq!(agent.wait_for_state("removed", "failed")["name"], "removed");
    wait_until_gone(later);
    assert!(said(&agent.run(&["vm", "show", "later"])).contains("later"));
    lab.clone_of("base", "after");
    assert_eq!(agent.sh("after", "echo works"), "works");
    lab.ends_with_vms();
}

pub(crate) fn packets_beyond_a_sleepers_queue_are_counted(_shared: &Agent) {
    /// What the tap is to hold instead of 1,000 packets, and more than that.
    const QUEUE: u64 = 100;
    const SENT: u64 = 300;
    let lab = Lab::start("htest-queue", 39);
    let agent = lab.agent();
    lab.build("base", &[]);
    lab.clone_of("base", "sleeper");
    lab.clone_of("base", "sender");
    for name in ["sleeper", "sender"] {
        probe::install(agent, name);
    }
    let to = agent.vm("sleeper")["addresses"][0].as_str().expect("an address").to_owned();
    let dropped = || {
        let session = agent.json(&["session", "show", "clones"]);
        let members = session["members"].as_array().expect("members").clone();
        let member = members.iter().find(|member| member["name"] == "sleeper").expect("it");
        member["drops"]["queue_full"].as_u64().expect("a number")
    };
    for jail in run("ip", &["netns", "list"]).lines().filter(|jail| jail.starts_with("hth39-")) {
        let jail = jail.split(' ').next().expect("a name");
        run("ip", &["-n", jail, "link", "set", "tap0", "txqueuelen", &QUEUE.to_string()]);
    }
    // The kernel's own words while nobody had the tap open.
    let before = dropped();
    let policy = r#"{"mode":"never","wake":["api"]}"#;
    let put = ["--request", "PUT", "--header", "content-type: application/json", "--data", policy];
    let (status, body) = agent.curl(&put, "/v1/vms/sleeper/swap-policy");
    assert_eq!(status, 200, "{body}");
    agent.ok(&["vm", "swap-out", "sleeper", "--mode", "hibernate"]);
    // Nobody answers, so it fails after the last.
    let sent = probe::run(agent, "sender", &format!("ask udp {to} 7777 --count {SENT} --wait-ms 1"));
    assert_eq!(sent.status.code(), Some(1), "{}{}", text(&sent.stdout), text(&sent.stderr));
    let lost = dropped() - before;
    println!("    {SENT} packets to one that sleeps: {lost} dropped and counted");
    // A few of the kernel's own may have come between.
    assert!((SENT - QUEUE..=SENT - QUEUE + 20).contains(&lost), "{lost} of {SENT}");
    assert_eq!(agent.vm("sleeper")["state"], "swapped_out");
    // Those before the bound are handed over.
    agent.ok(&["vm", "wake", "sleeper"]);
    let received = agent.sh("sleeper", "grep eth0 /proc/net/dev | tr -s ' ' | cut -d' ' -f4");
    let received: u64 = received.parse().expect("a number");
    assert!(received >= SENT - lost, "{received} packets reached the guest of {}", SENT - lost);
    lab.ends_with_vms();
}
