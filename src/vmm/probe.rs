//! `hearth vmm --probe`: what this host really offers, as JSON on standard output. It runs outside any jail and ends
//! at once; the agent asks it when it starts, and `hearth host probe` shows it to people.
//!
//! What guests need here follows from it: nobody types such kernel words by hand.

use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::clock::SystemClock;
use crate::machine::layout::LAYOUT_VERSION;
use crate::machine::probe::{KvmFacts, ProbeKvmError, probe as probe_kvm};
use crate::report;
use crate::sys::landlock::version as landlock_version;
use crate::sys::{netns, tap};

/// Kernel words for a guest whose kernel mode is emulated: wakes up the patches of the guest kernel, which also turn
/// off what the emulator cannot execute (`guest/kernel/README.md`).
const EMULATED_KERNEL_WORDS: &str = "hearth.softkvm";

/// Everything that was found.
#[derive(Debug, Serialize)]
pub(super) struct HostFacts {
    /// Whether VMs can run here.
    pub(super) usable: bool,
    /// Why not, or what will be missed; each with what to do about it.
    pub(super) problems: Vec<String>,
    /// Words for every guest's kernel command line on this host.
    pub(super) command_line_additions: String,
    /// How KVM behaves; null if it cannot be asked.
    pub(super) kvm: Option<KvmFacts>,
    /// The processor.
    pub(super) cpu: CpuFacts,
    /// Control groups.
    pub(super) cgroups: CgroupFacts,
    /// What confines a VMM beside them.
    pub(super) isolation: IsolationFacts,
    /// Networking.
    pub(super) network: NetworkFacts,
    /// The machines this program builds.
    pub(super) machine: MachineFacts,
}

/// The machines this program builds.
#[derive(Debug, Serialize)]
pub(super) struct MachineFacts {
    /// Version of the map of guest-physical addresses: saved machines of another one cannot be restored.
    pub(super) layout_version: u16,
}

/// The processor.
#[derive(Debug, Serialize)]
pub(super) struct CpuFacts {
    /// Model name.
    pub(super) model: String,
    /// Number of processors online.
    pub(super) count: usize,
    /// Memory of the host in bytes.
    pub(super) memory_bytes: u64,
}

/// Control groups.
#[derive(Debug, Serialize)]
pub(super) struct CgroupFacts {
    /// `v2`, `v1`, or `none` when nothing is mounted.
    pub(super) version: &'static str,
    /// Controllers that could be used.
    pub(super) controllers: Vec<String>,
}

/// What confines a VMM beside control groups.
#[derive(Debug, Serialize)]
pub(super) struct IsolationFacts {
    /// Version of the kernel's Landlock; null without. Where there is one, no VMM runs without it.
    pub(super) landlock_version: Option<u32>,
    /// The kernel ends a process for a system call that its filter forbids. No VMM runs without.
    pub(super) seccomp_kills: bool,
}

/// Networking.
#[derive(Debug, Serialize)]
pub(super) struct NetworkFacts {
    /// Whether a tap with vnet header can be made in a namespace of its own, or why not.
    pub(super) tap: String,
    /// Version of nft, or null without it.
    pub(super) nft: Option<String>,
    /// What nft and the kernel take together.
    pub(super) nft_features: Vec<&'static str>,
}

/// Prints the facts; whether VMs can run is in them.
pub(super) fn print() -> std::io::Result<()> {
    let facts = look();
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &facts)?;
    out.write_all(b"\n")
}

fn look() -> HostFacts {
    let mut problems = Vec::new();
    let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(device) => probe_kvm(device, &SystemClock::new()).map_err(|error| problems.push(refused(&error))).ok(),
        Err(error) => {
            problems.push(unopened(&error));
            None
        }
    };
    if let Some(missing) = kvm.as_ref().map(|facts| facts.missing.join(", ")).filter(|names| !names.is_empty()) {
        problems.push(format!("KVM lacks {missing}: a kernel of 6.1 or newer has them"));
    }
    let network = network();
    problems.extend(network.problems());
    let usable = problems.is_empty();
    let emulated = kvm.as_ref().is_some_and(|facts| !facts.kernel_mode_native || !facts.syscall_complete);
    HostFacts {
        usable,
        problems,
        command_line_additions: if emulated { EMULATED_KERNEL_WORDS.to_owned() } else { String::new() },
        kvm,
        cpu: cpu(),
        cgroups: cgroups(),
        isolation: IsolationFacts { landlock_version: landlock_version().ok(), seccomp_kills: seccomp_kills() },
        network,
        machine: MachineFacts { layout_version: LAYOUT_VERSION },
    }
}

fn seccomp_kills() -> bool {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    actions.split_whitespace().any(|action| action == "kill_process")
}

fn refused(error: &ProbeKvmError) -> String {
    format!("/dev/kvm is there but not usable: {}", report::chain(error))
}

fn unopened(error: &std::io::Error) -> String {
    let kind = error.kind();
    let advice = if kind == std::io::ErrorKind::NotFound {
        "enable virtualisation in the firmware (or nested virtualisation for this machine) and load kvm_intel or kvm_amd"
    } else if kind == std::io::ErrorKind::PermissionDenied {
        "run this as root, or give this user access to /dev/kvm"
    } else {
        "see the kernel's log (dmesg | grep -i kvm)"
    };
    format!("open /dev/kvm: {error}: {advice}")
}

fn cpu() -> CpuFacts {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let memory = field(&text("/proc/meminfo"), "MemTotal").unwrap_or_default();
    let memory_kib: u64 = memory.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0);
    CpuFacts {
        model: field(&text("/proc/cpuinfo"), "model name").unwrap_or_default(),
        count: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: memory_kib * 1024,
    }
}

fn cgroups() -> CgroupFacts {
    if let Ok(controllers) = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        let controllers = controllers.split_whitespace().map(str::to_owned).collect();
        return CgroupFacts { version: "v2", controllers };
    }
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let v1 = mounts.lines().filter(|line| line.split(' ').nth(2) == Some("cgroup"));
    let known = ["cpu", "cpuset", "memory", "pids", "blkio"];
    let options = v1.filter_map(|line| line.split(' ').nth(3)).flat_map(|options| options.split(','));
    let controllers: Vec<String> = options.filter(|option| known.contains(option)).map(str::to_owned).collect();
    CgroupFacts { version: if controllers.is_empty() { "none" } else { "v1" }, controllers }
}

/// [`NetworkFacts::tap`] where there are taps.
const TAP_OK: &str = "ok";

fn network() -> NetworkFacts {
    let tap = match netns::in_new(|| tap::open("probe0").map(drop)) {
        Ok(Ok(())) => TAP_OK.to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => format!("make a network namespace: {error}"),
    };
    let version = Command::new("nft").arg("--version").stdin(Stdio::null()).output().ok();
    let nft = version.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let nft_features = if nft.is_some() { nft_features() } else { Vec::new() };
    NetworkFacts { tap, nft, nft_features }
}

impl NetworkFacts {
    /// Why VMs can have no network here, and what to do about it. Every VM has a jail with rules.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.tap != TAP_OK {
            problems
                .push(format!("no tap can be made ({}): the kernel's module tun is needed (modprobe tun)", self.tap));
        }
        let lacks: Vec<&str> = NFT_NEEDED.iter().filter(|name| !self.nft_features.contains(name)).copied().collect();
        if self.nft.is_none() {
            problems
                .push("the program nft is not there: install nftables (Debian, Fedora: package nftables)".to_owned());
        } else if !lacks.is_empty() {
            problems.push(format!(
                "nftables lacks {}: nft 1.0 or newer is needed, and a kernel with nf_tables, nft_nat and nft_ct",
                lacks.join(", ")
            ));
        }
        problems
    }
}

/// Those of [`NFT_FEATURES`] that the rules of jails and hosts are made of.
const NFT_NEEDED: &[&str] = &["non-prefix masks", "counters", "nat"];

/// Features that rulesets want, each with a ruleset that needs it; loaded into a namespace that is thrown away.
const NFT_FEATURES: &[(&str, &str)] = &[
    ("non-prefix masks", "chain c {\n ip6 daddr & ffff:0:ffff:: == fd00:0:1:: accept\n }"),
    ("sets with time-outs", "set s {\n type ipv4_addr\n flags timeout\n }"),
    ("counters", "counter n {\n }\n chain c {\n counter name n drop\n }"),
    ("nat", "chain c {\n type nat hook postrouting priority 100\n masquerade\n }"),
    ("connection marks", "chain c {\n ct mark set 1\n }"),
    ("flowtable", "flowtable f {\n hook ingress priority 0\n devices = { lo }\n }"),
    ("queue", "chain c {\n type filter hook input priority 0\n queue num 0\n }"),
];

fn nft_features() -> Vec<&'static str> {
    let takes = |ruleset: &str| {
        let mut nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        if let Some(mut input) = nft.stdin.take() {
            input.write_all(ruleset.as_bytes())?;
        }
        nft.wait().map(|status| status.success())
    };
    let all = || {
        NFT_FEATURES
            .iter()
            .filter(|(_, ruleset)| {
                // Each in a namespace of its own would cost a millisecond more apiece and tell the same.
                takes(&format!("flush ruleset\ntable inet t {{\n{ruleset}\n}}\n")).unwrap_or(false)
            })
            .map(|(name, _)| *name)
            .collect()
    };
    netns::in_new(all).unwrap_or_default()
}
