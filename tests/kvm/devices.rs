//! Devices as the guest's drivers use them: a disk and a network interface.

use std::process::Command;
use std::time::{Duration, Instant};

use super::fixture::{Agent, text};

/// Size of the disk in MiB.
const DISK_MIB: u64 = 8;

pub(crate) fn blk_file_system_written_in_the_guest_is_clean(agent: &Agent) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let disk = directory.path().join("disk");
    std::fs::File::create(&disk).and_then(|file| file.set_len(DISK_MIB << 20)).expect("a disk file");
    let read_only = directory.path().join("read-only");
    std::fs::write(&read_only, vec![b'r'; 1 << 20]).expect("a second disk");
    let disks = [disk.to_str().expect("a path"), &format!("{}:ro", read_only.display())];
    agent.launch("disks", &["--disk", disks[0], "--disk", disks[1]]);
    let sh = |script: &str| agent.sh("disks", script);
    assert_eq!(sh("cat /sys/block/vda/size"), (DISK_MIB * 2048).to_string());
    assert_eq!(sh("head -c 4 /dev/vdb"), "rrrr");
    assert_eq!(sh("cat /sys/block/vdb/ro; echo x 2>/dev/null > /dev/vdb; sync; head -c 1 /dev/vdb"), "1\nr");
    sh("mke2fs -q /dev/vda 2>/dev/null || mke2fs /dev/vda >/dev/null");
    sh("mkdir -p /tmp/m && mount /dev/vda /tmp/m");
    let sum = sh(
        "dd if=/dev/urandom of=/tmp/m/random bs=16k count=8 2>/dev/null; for i in $(seq 15); do echo $i > /tmp/m/f$i; done; rm /tmp/m/f7; sync; md5sum < /tmp/m/random",
    );
    sh("umount /tmp/m");
    agent.ok(&["vm", "rm", "disks"]);

    let check = Command::new("e2fsck").args(["-f", "-n"]).arg(&disk).output().expect("run e2fsck");
    assert!(check.status.success(), "e2fsck: {}\n{}", text(&check.stdout), text(&check.stderr));
    let listing = Command::new("debugfs").args(["-R", "ls -p /"]).arg(&disk).output().expect("run debugfs");
    let listing = text(&listing.stdout);
    assert!(listing.contains("/f15/") && !listing.contains("/f7/"), "{listing}");
    let dumped = directory.path().join("random");
    let dump = format!("dump /random {}", dumped.display());
    Command::new("debugfs").arg("-R").arg(dump).arg(&disk).output().expect("run debugfs");
    let here = Command::new("md5sum")
        .stdin(std::fs::File::open(&dumped).expect("the dumped file"))
        .output()
        .expect("run md5sum");
    assert_eq!(text(&here.stdout).split_whitespace().next(), sum.split_whitespace().next());
    assert!(std::fs::read(&read_only).expect("the read-only disk").iter().all(|byte| *byte == b'r'));
}

/// Runs a program of the host in a VM's network namespace.
fn outside(agent: &Agent, vm: &str, words: &[&str]) -> String {
    let namespace = format!("--net=/proc/{}/ns/net", agent.vmm_pid(vm));
    let output = Command::new("nsenter").arg(&namespace).args(words).output().expect("run nsenter");
    assert!(output.status.success(), "{words:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// The guest's link-local address, as its jail names it.
fn link_local(agent: &Agent, vm: &str) -> String {
    let address = agent.sh(vm, r"ip addr show dev eth0 | sed -n 's/.*inet6 \(fe80[^/]*\).*/\1/p'");
    assert!(address.starts_with("fe80:"), "{address}");
    format!("{address}%tap0")
}

pub(crate) fn net_frames_pass_both_ways(agent: &Agent) {
    let vm = agent.shared();
    let outside = |words: &[&str]| outside(agent, vm, words);
    // A VM without a session has its link-local address, and its jail to talk to.
    let address = link_local(agent, vm);
    outside(&["ping", "-c", "3", "-W", "10", &address]);
    agent.sh(vm, "ping -c 3 -W 10 -I eth0 fe80::1");
    // More than fits one frame, both ways, by a real stack on each side.
    outside(&["ping", "-c", "2", "-s", "8000", "-W", "10", &address]);
    let counters =
        agent.sh(vm, "cat /sys/class/net/eth0/statistics/rx_packets /sys/class/net/eth0/statistics/tx_packets");
    for counter in counters.lines() {
        assert!(counter.parse::<u64>().expect("a counter") >= 8, "{counters}");
    }
    let stats = agent.json(&["vm", "stats", vm]);
    let interface = &stats["network"][0];
    assert_eq!((&interface["slot"], &interface["link_up"]), (&0.into(), &true.into()), "{stats:#}");
    for direction in ["rx", "tx"] {
        let count = |name: &str| interface[direction][name].as_u64().expect("a counter");
        // The guest counts what it was given and what it gave away; nothing is between that and the device.
        assert!(count("packets") >= 8 && count("bytes") > 16_000, "{stats:#}");
    }
}

/// What is over a limit comes later, and comes.
pub(crate) fn net_limits_delay_and_lose_nothing(agent: &Agent) {
    agent.launch("slow", &["--rx-packets", "20/5", "--tx-limit", "1M/2k"]);
    let outside = |words: &[&str]| outside(agent, "slow", words);
    let address = link_local(agent, "slow");
    outside(&["ping", "-c", "1", "-W", "10", &address]);
    let rx = || agent.json(&["vm", "stats", "slow"])["network"][0]["rx"].clone();
    let packets = |rx: &serde_json::Value| rx["packets"].as_u64().expect("a counter");
    let (before, begun) = (packets(&rx()), Instant::now());
    // It does not wait for all answers: some come too late for it.
    outside(&["ping", "-q", "-c", "40", "-i", "0.01", "-s", "1000", "-W", "1", &address]);
    let mut after = rx();
    while packets(&after) < before + 40 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{after:#}");
        std::thread::sleep(Duration::from_millis(20));
        after = rx();
    }
    // 40 packets less the burst, at 20 a second; the sending took less than half a second.
    assert!(begun.elapsed() >= Duration::from_millis(1_700), "{:?} {after:#}", begun.elapsed());
    assert!(after["throttled"].as_u64().is_some_and(|times| times >= 10) && after["dropped"] == 0, "{after:#}");
    agent.ok(&["vm", "rm", "slow", "--timeout", "0"]);
}
