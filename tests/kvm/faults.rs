//! Faults in the middle of migrations, at moments spread over the whole of one: afterwards exactly one copy of the VM
//! runs, or none if what was killed was its process. How many is read from the environment, as `prove` has it.

use std::fmt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::fabric::run;
use super::fixture::Agent;
use super::hand_over::processes;
use super::migrate::migrate;
use super::probe::number;
use super::prove::{Proof, REST_LIMIT, size};

/// Longest time a link is bad or a process stands still, in milliseconds.
const SPELL_MS_MAX: u64 = 4000;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// SIGKILL to the agent that sends, or to the one that receives; the next one is started at once.
    SourceAgent,
    TargetAgent,
    /// SIGKILL to the process that has the VM, or to the one that is to have it.
    SourceVmm,
    TargetVmm,
    /// The same, stopped for so long.
    SourceVmmStopped,
    TargetVmmStopped,
    /// The link between the hosts: nothing passes, one frame of five is lost, one of twenty is changed, or half a MB/s is
    /// the most.
    LinkCut,
    LinkLossy,
    LinkCorrupt,
    LinkSlow,
}

const ALL: [What; 10] = [
    What::SourceAgent,
    What::LinkCut,
    What::TargetVmm,
    What::LinkCorrupt,
    What::TargetAgent,
    What::SourceVmmStopped,
    What::LinkLossy,
    What::SourceVmm,
    What::TargetVmmStopped,
    What::LinkSlow,
];

/// What goes wrong, when after the request, and for how long if it passes.
#[derive(Debug, Clone, Copy)]
struct Fault {
    what: What,
    moment: Duration,
    spell: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (moment, spell) = (self.moment.as_millis(), self.spell.as_millis());
        let what = match self.what {
            What::SourceAgent => "agent at the source killed".to_owned(),
            What::TargetAgent => "agent at the target killed".to_owned(),
            What::SourceVmm => "VMM at the source killed".to_owned(),
            What::TargetVmm => "VMM at the target killed".to_owned(),
            What::SourceVmmStopped => format!("VMM at the source stopped for {spell} ms"),
            What::TargetVmmStopped => format!("VMM at the target stopped for {spell} ms"),
            What::LinkCut => format!("link cut for {spell} ms"),
            What::LinkLossy => format!("one frame of five lost for {spell} ms"),
            What::LinkCorrupt => format!("one frame of twenty changed for {spell} ms"),
            What::LinkSlow => format!("half a MB/s for {spell} ms"),
        };
        write!(out, "{what} after {moment} ms")
    }
}

/// Where a VM is after a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It runs, on this host.
    Runs(usize),
    /// Its process was killed, and that was its end.
    Failed,
}

/// A generator whose every number follows from its seed.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(1);
        hearth_guest_probe::datagram::mixed(self.0) % bound
    }
}

pub(crate) fn leave_one_copy(_shared: &Agent) {
    let (count, seed) = (size("HEARTH_PROVE_FAULTS", 10), size("HEARTH_PROVE_SEED", 1));
    println!("    {count} faults of the seed {seed}");
    let mut random = Seeded(seed << 32);
    let mut proof = Proof::start();
    let first = migrate(&proof.fabric, 0, 1);
    proof.here = 1;
    // How long one takes: moments are spread over that and a little more, half of them over the end of it, where it stands
    // still.
    let took_ms = u64::try_from(first.took.as_millis()).expect("a time");
    let mut ends: Vec<(What, bool, bool)> = Vec::new();
    let offset = random.below(10);
    for index in 0..count {
        let moment =
            if index / 10 % 2 == 0 { random.below(took_ms * 5 / 4) } else { took_ms / 2 + random.below(took_ms / 2) };
        let fault = Fault {
            what: ALL[usize::try_from((index + offset) % 10).expect("one of ten")],
            moment: Duration::from_millis(moment),
            spell: Duration::from_millis(100 + random.below(SPELL_MS_MAX)),
        };
        let begun = Instant::now();
        let (from, end) = (proof.here, proof.with(fault));
        let moved = end == End::Runs(1 - from);
        let outcome = match end {
            End::Runs(_) if moved => "it went",
            End::Runs(_) => "it stayed",
            End::Failed => "it failed",
        };
        println!(
            "    {fault}, leaving {}: {outcome} ({:.1} s)",
            proof.fabric.name(from),
            begun.elapsed().as_secs_f64()
        );
        ends.push((fault.what, moved, end == End::Failed));
    }
    for what in ALL {
        let of =
            |wanted: fn(bool, bool) -> bool| ends.iter().filter(|end| end.0 == what && wanted(end.1, end.2)).count();
        let (all, moved, failed) = (of(|_, _| true), of(|moved, _| moved), of(|_, failed| failed));
        println!("    {what:?}: {all}; it stayed {}, went {moved}, failed {failed} times", all - moved - failed);
    }
    proof.finish();
}

impl Proof {
    /// Has the VM go to the other host, and something go wrong at a moment of that.
    fn with(&mut self, fault: Fault) -> End {
        let when = format!("{fault}, leaving {}", self.fabric.name(self.here));
        let (from, to) = (self.here, 1 - self.here);
        let source = self.agent().vmm_pid("mover");
        let counter = self.count();
        let mut client = self.agent().command(["vm", "migrate", "mover", "--to", self.fabric.name(to)]);
        client.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut client = client.spawn().expect("run hearth");
        std::thread::sleep(fault.moment);
        self.strike(fault, source, &mut client);
        client.wait().expect("wait for the client");
        let end = self.at_rest(&when);
        match end {
            End::Runs(host) => {
                // Who had it when it was killed has it no more.
                let same = self.fabric.agent(host).vmm_pid("mover") == source;
                assert!(fault.what != What::SourceVmm || host == to || same, "{when}");
                self.here = host;
                self.is_whole(&when);
                let counted = self.one_copy_counted(counter, &when);
                assert!(number(&counted, "received") > 0, "{when}: its counter stands still: {counted}");
            }
            End::Failed => {
                let killed = matches!(fault.what, What::SourceVmm | What::TargetVmm);
                assert!(killed, "{when}: only a process's end ends a VM");
                self.one_copy_counted(counter, &when);
                for host in [from, to] {
                    let _ = self.fabric.agent(host).run(&["vm", "rm", "mover", "--timeout", "0"]);
                }
                self.is_forgotten(&when);
                self.launch();
            }
        }
        end
    }

    fn strike(&self, fault: Fault, source: u32, client: &mut Child) {
        let (from, to) = (self.here, 1 - self.here);
        let (wire, port) = self.fabric.port(to);
        // There is none at first; when the migration is over there will be none any more.
        let mut target = || {
            let other = || processes(&self.id).into_iter().find(|pid| *pid != source);
            loop {
                match other() {
                    None if client.try_wait().expect("look at the client").is_none() => {}
                    found => return found,
                }
            }
        };
        let ip = |words: &str| run("ip", &[&["-n", wire][..], &words.split_whitespace().collect::<Vec<_>>()].concat());
        let tc = |words: &str| run("tc", &[&["-n", wire][..], &words.split_whitespace().collect::<Vec<_>>()].concat());
        let nft = |script: &str| run("ip", &["netns", "exec", wire, "nft", script]);
        match fault.what {
            What::SourceAgent => self.fabric.agent(from).kill_and_restart(),
            What::TargetAgent => self.fabric.agent(to).kill_and_restart(),
            What::SourceVmm => signal(source, Signal::SIGKILL),
            What::TargetVmm => target().into_iter().for_each(|target| signal(target, Signal::SIGKILL)),
            What::SourceVmmStopped => stop(source, fault.spell),
            What::TargetVmmStopped => target().into_iter().for_each(|target| stop(target, fault.spell)),
            What::LinkCut => {
                ip(&format!("link set {port} nomaster"));
                std::thread::sleep(fault.spell);
                ip(&format!("link set {port} master fabric"));
            }
            What::LinkLossy | What::LinkCorrupt => {
                // A byte of the TCP payload; what is joined by pairs of interfaces has no checksum to be found out by.
                let rule = if fault.what == What::LinkLossy {
                    "numgen random mod 5 0 drop"
                } else {
                    "meta l4proto tcp numgen random mod 20 0 @th,512,8 set 0x55"
                };
                nft(&format!(
                    "add table bridge bad; add chain bridge bad between {{ type filter hook forward priority 0; }}; \
                     add rule bridge bad between {rule}"
                ));
                std::thread::sleep(fault.spell);
                nft("delete table bridge bad");
            }
            What::LinkSlow => {
                tc(&format!("qdisc add dev {port} root tbf rate 4mbit burst 32k latency 100ms"));
                std::thread::sleep(fault.spell);
                tc(&format!("qdisc delete dev {port} root"));
            }
        }
    }

    /// Waits until nothing is under way any more; where the VM is. The ledgers agree, and so do the processes.
    fn at_rest(&self, when: &str) -> End {
        let begun = Instant::now();
        loop {
            let vms = [0, 1].map(|host| self.vm_of(host));
            let states = [0, 1].map(|host: usize| vms[host]["state"].as_str().unwrap_or("none"));
            let end = match states {
                ["running", "none"] => Some(End::Runs(0)),
                ["handed_over", "running"] => Some(End::Runs(1)),
                ["failed", "none"] | ["handed_over", "failed"] => Some(End::Failed),
                _ => None,
            };
            let living = processes(&self.id);
            let as_told = match end {
                Some(End::Runs(host)) => living.len() == 1 && vms[host]["pid"] == living[0],
                Some(End::Failed) => living.is_empty(),
                None => false,
            };
            if let Some(end) = end.filter(|_| as_told) {
                if end == End::Failed {
                    let failed = vms.iter().find(|vm| vm["state"] == "failed").expect("one of them");
                    let code = failed["cause"]["code"].as_str().unwrap_or_default();
                    assert!(["vmm_killed", "lost_on_the_way"].contains(&code), "{when}: {failed:#}");
                }
                return end;
            }
            assert!(begun.elapsed() < REST_LIMIT, "{when}: {states:?}, {living:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Has a process stand still for so long.
fn stop(pid: u32, spell: Duration) {
    signal(pid, Signal::SIGSTOP);
    std::thread::sleep(spell);
    signal(pid, Signal::SIGCONT);
}

/// To a process, if it is there.
fn signal(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
}
