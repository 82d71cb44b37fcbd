//! Pause and resume: the guest's time stands still and goes on; its wall clock is put right.

use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::fixture::Agent;

/// How long the guest is paused.
const PAUSE: Duration = Duration::from_secs(4);

/// Most a guest's wall clock may be off after a resume.
const WALL_CLOCK_OFF_MAX: f64 = 0.1;

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

fn number(text: &str) -> f64 {
    text.trim().parse().unwrap_or_else(|_| panic!("a number, not {text:?}"))
}

pub(crate) fn stops_the_counter_and_resume_goes_on(agent: &Agent) {
    let vm = agent.shared();
    // Appended: a file that is written anew is empty for a moment.
    let counting = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo $i >> /tmp/counter; sleep 0.05; done";
    let mut child = agent
        .command(["vm", "exec", vm, "--", "sh", "-c", counting])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("run hearth");
    std::thread::sleep(Duration::from_secs(1));
    let uptime = || number(agent.sh(vm, "cut -d' ' -f1 /proc/uptime").as_str());
    let counter = || number(agent.sh(vm, "tail -n 1 /tmp/counter").as_str());

    let (host_before, uptime_before, counter_before) = (now(), uptime(), counter());
    agent.ok(&["vm", "pause", vm]);
    assert_eq!(agent.vm(vm)["state"], "paused");
    let vmm = agent.vmm_pid(vm);
    let cpu_before = cpu_ticks(vmm);
    std::thread::sleep(PAUSE);
    assert!(cpu_ticks(vmm) <= cpu_before + 2, "a paused VM uses the processor");
    agent.ok(&["vm", "resume", vm]);
    let (uptime_after, counter_after, host_after) = (uptime(), counter(), now());

    let passed = host_after - host_before;
    let guest_passed = uptime_after - uptime_before;
    assert!(guest_passed >= 0.0, "the guest's clock went back by {guest_passed} s");
    let paused = PAUSE.as_secs_f64();
    assert!(
        guest_passed < passed - paused + 0.5,
        "{guest_passed} s passed in the guest, {passed} s outside, {paused} s paused"
    );
    assert!(counter_after > counter_before, "the counter does not go on");
    let most = (passed - paused + 0.5) / 0.05;
    assert!(
        counter_after - counter_before < most,
        "the counter ran on: {counter_before} to {counter_after}, at most {most}"
    );

    let asked = now();
    let stats = agent.json(&["vm", "stats", vm]);
    let answered = now();
    let wall: jiff::Timestamp = stats["guest"]["wall_clock"].as_str().expect("a time").parse().expect("a time");
    let wall = wall.as_duration().as_secs_f64();
    let allowed = asked - WALL_CLOCK_OFF_MAX..answered + WALL_CLOCK_OFF_MAX;
    assert!(allowed.contains(&wall), "the guest's wall clock says {wall}, the host's {asked} to {answered}");
    let busy = in_top(agent, vm);
    assert!(busy["cpu_percent"].as_f64().is_some_and(|percent| percent > 0.5), "{busy:#}");
    assert!(busy["resident_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 20), "{busy:#}");
    agent.ok(&["vm", "pause", vm]);
    let paused = in_top(agent, vm);
    assert!(paused["cpu_percent"].as_f64() < busy["cpu_percent"].as_f64(), "{paused:#}");
    assert_eq!((&paused["state"], &paused["rx_packets_per_s"]), (&"paused".into(), &0.0.into()), "{paused:#}");
    agent.ok(&["vm", "resume", vm]);
    let table = agent.ok(&["top", "--once", "--interval", "200ms", "--sort", "memory"]);
    let row = table.lines().find(|line| line.contains(vm)).unwrap_or_else(|| panic!("a row of {vm}: {table}"));
    assert!(row.contains("running"), "{table}");
    let _ = child.kill();
    let _ = child.wait();
}

/// A VM's row of `hearth top`.
fn in_top(agent: &Agent, vm: &str) -> Value {
    let look = agent.json(&["top", "--once", "--interval", "1"]);
    let rows = look["vms"].as_array().expect("rows");
    rows.iter().find(|row| row["name"] == vm).unwrap_or_else(|| panic!("a row of {vm}: {look:#}")).clone()
}

/// Processor time of a process in ticks of 10 ms: user and system.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its stat");
    let fields: Vec<&str> = stat.rsplit_once(") ").expect("a name").1.split(' ').collect();
    fields[11].parse::<u64>().expect("ticks") + fields[12].parse::<u64>().expect("ticks")
}
