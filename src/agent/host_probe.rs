//! What this host's KVM really does, as `hearth vmm --probe` finds out once, in the background, when the agent starts.

use std::collections::BTreeSet;
use std::io;
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use hearth_guest_wire::VERSION;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use super::guest_network::HOOKS_SINCE_VERSION;
use crate::bundle::Digest;
use crate::bundle::admit::HostFacts;
use crate::bundle::manifest::{Arch, Backing, BuildHost, GuestCpu};

/// Longest answer of the probe.
const ANSWER_BYTES_MAX: u64 = 256 * 1024;

/// Longest run of the probe: it tries KVM with tiny guests.
const LIMIT: Duration = Duration::from_secs(30);

/// How far the probe is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Probe {
    Running,
    Done(Option<serde_json::Value>),
}

/// The probe and what it found. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct HostProbe {
    probe: watch::Receiver<Probe>,
}

/// What of the answer bundles depend on.
#[derive(Deserialize)]
struct Answer {
    kvm: Option<Kvm>,
    machine: Machine,
}

#[derive(Deserialize)]
struct Kvm {
    vendor_signature: String,
    cpuid_honoured: bool,
    kernel_mode_native: bool,
    syscall_complete: bool,
    tsc_khz: u32,
    tsc_scaling: bool,
}

#[derive(Deserialize)]
struct Machine {
    layout_version: u16,
}

impl HostProbe {
    /// Starts the probe. Call inside the runtime.
    pub(super) fn start() -> Self {
        let (said, probe) = watch::channel(Probe::Running);
        tokio::spawn(async move {
            let found = match tokio::time::timeout(LIMIT, run()).await {
                Ok(Ok(found)) => Some(found),
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the host probe failed");
                    None
                }
                Err(_) => {
                    tracing::warn!(limit = ?LIMIT, "the host probe did not end in time");
                    None
                }
            };
            said.send_replace(Probe::Done(found));
        });
        Self { probe }
    }

    /// What was found; waits for it. `None`: the probe failed.
    async fn found(&self) -> Option<serde_json::Value> {
        let mut probe = self.probe.clone();
        match probe.wait_for(|probe| *probe != Probe::Running).await.as_deref() {
            Ok(Probe::Done(found)) => found.clone(),
            Ok(Probe::Running) | Err(_) => None,
        }
    }

    /// What was found so far.
    pub(super) fn so_far(&self) -> Option<serde_json::Value> {
        match &*self.probe.borrow() {
            Probe::Done(found) => found.clone(),
            Probe::Running => None,
        }
    }

    /// Words that guests on this host need on their kernel's command line.
    pub(super) async fn command_line_additions(&self) -> String {
        let found = self.found().await;
        let words = found.as_ref().and_then(|found| found.get("command_line_additions")?.as_str());
        words.unwrap_or_default().to_owned()
    }

    /// What bundles depend on; `None`: the probe failed, or KVM does not work.
    pub(super) async fn facts(&self) -> Option<HostFacts> {
        let Answer { kvm, machine } = serde_json::from_value(self.found().await?).ok()?;
        let (kvm, processor) = (kvm?, processor());
        Some(HostFacts {
            arch: Arch::X86_64,
            provider: kvm.vendor_signature,
            kernel_mode_emulated: !kvm.kernel_mode_native || !kvm.syscall_complete,
            cpuid_honoured: kvm.cpuid_honoured,
            tsc_khz: kvm.tsc_khz,
            tsc_scaling: kvm.tsc_scaling,
            cpu_vendor: processor.vendor.clone(),
            cpu_features: processor.features.iter().cloned().collect(),
            layout_version: machine.layout_version,
            agent_protocols: HOOKS_SINCE_VERSION..=VERSION,
            backings: vec![Backing::PrivateFile],
        })
    }
}

/// The host's part of a manifest.
pub(super) fn build_host(facts: &HostFacts) -> BuildHost {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    BuildHost {
        provider: facts.provider.clone(),
        kernel_mode_emulated: facts.kernel_mode_emulated,
        cpuid_honoured: facts.cpuid_honoured,
        tsc_khz: facts.tsc_khz,
        kernel_release: release.trim().to_owned(),
    }
}

/// This host's processor, which its guests see.
pub(super) fn processor() -> &'static GuestCpu {
    static PROCESSOR: OnceLock<GuestCpu> = OnceLock::new();
    PROCESSOR.get_or_init(|| parse_processor(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()))
}

/// The first processor of /proc/cpuinfo.
fn parse_processor(text: &str) -> GuestCpu {
    let first = text.split("\n\n").next().unwrap_or_default();
    let field = |name: &str| {
        let mut lines = first.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.trim() == name).map_or("", |(_, value)| value.trim())
    };
    let number = |name| field(name).parse().unwrap_or(0);
    let features: BTreeSet<String> = field("flags").split_whitespace().map(str::to_owned).collect();
    let (vendor, family, model, stepping) =
        (field("vendor_id").to_owned(), number("cpu family"), number("model"), number("stepping"));
    let features: Vec<String> = features.into_iter().collect();
    let all = format!("{vendor} {family} {model} {stepping} {}", features.join(" "));
    GuestCpu { vendor, family, model, stepping, features, leaves_digest: Digest::of(all.as_bytes()) }
}

async fn run() -> io::Result<serde_json::Value> {
    let mut command = tokio::process::Command::new("/proc/self/exe");
    command.args(["vmm", "--probe"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.kill_on_drop(true).spawn()?;
    let mut text = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(ANSWER_BYTES_MAX).read_to_end(&mut text).await?;
    }
    child.wait().await?;
    serde_json::from_slice(&text).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processor_counts() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: X\n\
                    stepping\t: 8\nflags\t\t: fpu sse2 avx fpu\n\nprocessor\t: 1\nvendor_id\t: other\n";
        let cpu = parse_processor(text);
        assert_eq!((cpu.vendor.as_str(), cpu.family, cpu.model, cpu.stepping), ("GenuineIntel", 6, 143, 8));
        assert_eq!(cpu.features, ["avx", "fpu", "sse2"]);
        assert_eq!(parse_processor("").features, Vec::<String>::new());
    }
}
