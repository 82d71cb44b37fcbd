//! Whether a host can run a bundle, or a guest of another host: a pure comparison of what it needs with what the host is.
//! All that differs is told at once, since people want to know what would have to change.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::manifest::{Arch, Backing, FORMAT, Manifest};
use crate::report::Retry;

/// Largest difference of time-stamp counters that a guest does not have to know of, in millionths: what Linux itself
/// takes for the same frequency when it calibrates (arch/x86/kernel/tsc.c), and what KVM allows without scaling
/// (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a host is, as far as bundles care. The agent fills it from the probe and /proc/cpuinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// Its architecture.
    pub arch: Arch,
    /// The hypervisor's signature as a guest sees it.
    pub provider: String,
    /// Whether a guest's kernel mode is emulated.
    pub kernel_mode_emulated: bool,
    /// Whether guests see the CPUID they are given.
    pub cpuid_honoured: bool,
    /// Frequency of a guest's time-stamp counter.
    pub tsc_khz: u32,
    /// Whether a guest can be given another one.
    pub tsc_scaling: bool,
    /// Vendor of the processor.
    pub cpu_vendor: String,
    /// Features a guest can have.
    pub cpu_features: BTreeSet<String>,
    /// Version of the machine's map this program builds.
    pub layout_version: u16,
    /// Versions of the guest protocol this program speaks.
    pub agent_protocols: RangeInclusive<u16>,
    /// Backings of guest memory this program and kernel have.
    pub backings: Vec<Backing>,
}

/// What a guest that runs, or was frozen, needs of a host: it has seen what there was where it was booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNeeds {
    /// The architecture.
    pub arch: Arch,
    /// The hypervisor's signature.
    pub provider: String,
    /// Whether its kernel mode is emulated.
    pub kernel_mode_emulated: bool,
    /// Whether it sees the CPUID it is given.
    pub cpuid_honoured: bool,
    /// Frequency of its time-stamp counter.
    pub tsc_khz: u32,
    /// Vendor of the processor.
    pub cpu_vendor: String,
    /// Features it may use.
    pub cpu_features: BTreeSet<String>,
    /// Version of its machine's map.
    pub layout_version: u16,
}

impl GuestNeeds {
    /// What a guest needs that was booted on this host.
    pub fn of(host: &HostFacts) -> Self {
        Self {
            arch: host.arch,
            provider: host.provider.clone(),
            kernel_mode_emulated: host.kernel_mode_emulated,
            cpuid_honoured: host.cpuid_honoured,
            tsc_khz: host.tsc_khz,
            cpu_vendor: host.cpu_vendor.clone(),
            cpu_features: host.cpu_features.clone(),
            layout_version: host.layout_version,
        }
    }

    fn frozen(manifest: &Manifest) -> Self {
        Self {
            arch: manifest.arch,
            provider: manifest.host.provider.clone(),
            kernel_mode_emulated: manifest.host.kernel_mode_emulated,
            cpuid_honoured: manifest.host.cpuid_honoured,
            tsc_khz: manifest.host.tsc_khz,
            cpu_vendor: manifest.cpu.vendor.clone(),
            cpu_features: manifest.cpu.features.iter().cloned().collect(),
            layout_version: manifest.machine.layout_version,
        }
    }
}

/// One fact that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Which.
    pub fact: &'static str,
    /// What is needed.
    pub needed: String,
    /// What the host has.
    pub host: String,
}

/// A guest cannot run on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this host differs: {}", text(differences))]
pub struct Incompatible {
    /// In what; never empty.
    pub differences: Vec<Difference>,
}

impl Incompatible {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        Retry::Never
    }
}

fn text(differences: &[Difference]) -> String {
    let one = |it: &Difference| format!("{}: {} is needed, the host has {}", it.fact, it.needed, it.host);
    differences.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Whether this host can run this bundle.
pub fn admit(needs: &Manifest, host: &HostFacts) -> Result<(), Incompatible> {
    let mut differences = Vec::new();
    let mut differs = |fact, needed: String, host: String| differences.push(Difference { fact, needed, host });
    if needs.format != FORMAT {
        differs("format", needs.format.to_string(), FORMAT.to_string());
    }
    if !host.agent_protocols.contains(&needs.guest.agent_protocol) {
        differs("agent_protocol", needs.guest.agent_protocol.to_string(), protocols(host));
    }
    if !host.backings.contains(&needs.machine.backing) {
        differs(
            "memory_backing",
            backing(needs.machine.backing),
            host.backings.iter().copied().map(backing).collect::<Vec<_>>().join(" "),
        );
    }
    compare(&GuestNeeds::frozen(needs), host, &mut differences);
    verdict(differences)
}

/// Whether a guest that runs elsewhere can go on on this host.
pub fn admit_guest(needs: &GuestNeeds, agent_protocol: Option<u16>, host: &HostFacts) -> Result<(), Incompatible> {
    let mut differences = Vec::new();
    if let Some(spoken) = agent_protocol.filter(|spoken| !host.agent_protocols.contains(spoken)) {
        differences.push(Difference { fact: "agent_protocol", needed: spoken.to_string(), host: protocols(host) });
    }
    compare(needs, host, &mut differences);
    verdict(differences)
}

fn verdict(differences: Vec<Difference>) -> Result<(), Incompatible> {
    if differences.is_empty() { Ok(()) } else { Err(Incompatible { differences }) }
}

fn protocols(host: &HostFacts) -> String {
    format!("{} to {}", host.agent_protocols.start(), host.agent_protocols.end())
}

fn compare(needs: &GuestNeeds, host: &HostFacts, differences: &mut Vec<Difference>) {
    let mut differs = |fact, needed: String, host: String| differences.push(Difference { fact, needed, host });
    if needs.arch != host.arch {
        differs("arch", needs.arch.as_str().to_owned(), host.arch.as_str().to_owned());
    }
    if needs.provider != host.provider {
        differs("provider", needs.provider.clone(), host.provider.clone());
    }
    if needs.kernel_mode_emulated != host.kernel_mode_emulated {
        let word = |emulated| if emulated { "emulated" } else { "native" }.to_owned();
        differs("kernel_mode", word(needs.kernel_mode_emulated), word(host.kernel_mode_emulated));
    }
    if needs.cpuid_honoured != host.cpuid_honoured {
        let word = |honoured| if honoured { "as given" } else { "the hardware's" }.to_owned();
        differs("cpuid", word(needs.cpuid_honoured), word(host.cpuid_honoured));
    }
    if needs.cpu_vendor != host.cpu_vendor {
        differs("cpu_vendor", needs.cpu_vendor.clone(), host.cpu_vendor.clone());
    }
    let missing: Vec<&str> = needs.cpu_features.difference(&host.cpu_features).map(String::as_str).collect();
    if !missing.is_empty() {
        differs("cpu_features", missing.join(" "), "none of these".to_owned());
    }
    if !host.tsc_scaling && !same_frequency(needs.tsc_khz, host.tsc_khz) {
        differs("tsc_khz", needs.tsc_khz.to_string(), host.tsc_khz.to_string());
    }
    if needs.layout_version != host.layout_version {
        differs("layout_version", needs.layout_version.to_string(), host.layout_version.to_string());
    }
}

fn backing(backing: Backing) -> String {
    match backing {
        Backing::PrivateFile => "private_file",
        Backing::SharedMemfd => "shared_memfd",
        Backing::Anonymous => "anonymous",
    }
    .to_owned()
}

fn same_frequency(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
mod tests;
