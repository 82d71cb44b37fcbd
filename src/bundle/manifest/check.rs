//! Whether a manifest can be true: a pure function over all of it. A manifest may come from another host or from a
//! broken disk, so nothing later is written for values that were not admitted here.

use super::{DeviceKind, DeviceSlot, FORMAT, GuestCpu, MachineShape, Manifest, MemoryMap, StateFile};
use crate::bundle::run::Run;
use crate::saved::codec::SECTIONS_MAX;
use crate::units::PAGE_BYTES;

/// Most guest memory: 1 TiB.
const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Most vCPUs.
const VCPUS_MAX: u16 = 32;

/// Sizes of a chunk: powers of two in this range.
const CHUNK_BYTES_MIN: u32 = 64 << 10;
const CHUNK_BYTES_MAX: u32 = 512 << 10;

/// Longest chain of diffs: each level is one more image to read before the first launch.
pub(in crate::bundle) const DEPTH_MAX: u8 = 8;

/// Most bytes of saved state: all sections at their largest would be 256 MiB; those of 32 vCPUs and all devices take
/// less than 8.
pub(in crate::bundle) const STATE_BYTES_MAX: u64 = 32 << 20;

/// Longest label (RFC 1035 section 2.3.4, as the names of VMs).
const NAME_BYTES_MAX: usize = 63;

/// Most slots of a machine's map.
const SLOTS_MAX: u8 = 64;

/// Longest text in a manifest: the kernel's command line is at most 2047 bytes.
const TEXT_BYTES_MAX: usize = 4096;

/// Most entries of a list of texts: CPU features are about 150.
const LIST_MAX: usize = 1024;

/// Smallest MTU of IPv6 (RFC 8200 section 5) is more, of IPv4 (RFC 791) this.
const MTU_MIN: u16 = 68;

/// What cannot be true of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidManifest {
    /// The field, with dots: `memory.chunks`.
    pub field: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

fn invalid<T>(field: &'static str, reason: impl Into<String>) -> Result<T, InvalidManifest> {
    Err(InvalidManifest { field, reason: reason.into() })
}

fn at_most(field: &'static str, found: u64, limit: u64) -> Result<(), InvalidManifest> {
    if found > limit { invalid(field, format!("{found} is over the limit of {limit}")) } else { Ok(()) }
}

pub(super) fn check(manifest: &Manifest) -> Result<(), InvalidManifest> {
    if manifest.format != FORMAT {
        return invalid("format", format!("{} is not {FORMAT}", manifest.format));
    }
    texts(manifest)?;
    if let Some(name) = &manifest.name {
        label("name", name)?;
    }
    if !manifest.leases.is_empty() {
        return invalid("leases", "a frozen guest holds nothing outside that its clones would share");
    }
    cpu(&manifest.cpu)?;
    machine(&manifest.machine)?;
    memory(&manifest.memory, manifest.machine.memory_bytes)?;
    pages(manifest)?;
    state(&manifest.state)
}

/// Whether a text may be a bundle's label.
pub(in crate::bundle) fn is_label(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed)
}

fn label(field: &'static str, text: &str) -> Result<(), InvalidManifest> {
    if is_label(text) { Ok(()) } else { invalid(field, format!("not 1 to {NAME_BYTES_MAX} of a-z, 0-9 and -")) }
}

/// No text is absurdly long, no list of texts either.
fn texts(manifest: &Manifest) -> Result<(), InvalidManifest> {
    let Manifest { hearth_version, host, cpu, identity, guest, provenance, runtime, .. } = manifest;
    let single = [
        ("hearth_version", hearth_version),
        ("host.provider", &host.provider),
        ("host.kernel_release", &host.kernel_release),
        ("cpu.vendor", &cpu.vendor),
        ("identity.hostname", &identity.hostname),
        ("guest.command_line", &guest.command_line),
        ("guest.image.name", &guest.image.name),
        ("provenance.host_name", &provenance.host_name),
    ];
    let optional = [
        ("provenance.ready_marker", provenance.ready_marker.as_ref()),
        ("runtime.name", runtime.as_ref().map(|runtime| &runtime.name)),
        ("runtime.version", runtime.as_ref().map(|runtime| &runtime.version)),
    ];
    let lists = [
        ("cpu.features", &cpu.features),
        ("identity.macs", &identity.macs),
        ("identity.addresses", &identity.addresses),
        ("provenance.warmup", &provenance.warmup),
    ];
    for (field, list) in lists {
        at_most(field, list.len() as u64, LIST_MAX as u64)?;
    }
    let optional = optional.into_iter().filter_map(|(field, text)| text.map(|text| (field, text)));
    let listed = lists.into_iter().flat_map(|(field, list)| list.iter().map(move |text| (field, text)));
    for (field, text) in single.into_iter().chain(optional).chain(listed) {
        at_most(field, text.len() as u64, TEXT_BYTES_MAX as u64)?;
    }
    if let Some(mac) = identity.macs.iter().find(|mac| !is_mac(mac)) {
        return invalid("identity.macs", format!("{mac:?} is no hardware address"));
    }
    Ok(())
}

fn is_mac(text: &str) -> bool {
    let mut count = 0;
    let digits = |part: &str| part.len() == 2 && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let all = text.split(':').inspect(|_| count += 1).all(digits);
    all && count == 6
}

fn cpu(cpu: &GuestCpu) -> Result<(), InvalidManifest> {
    if cpu.features.windows(2).any(|pair| pair[0] >= pair[1]) {
        return invalid("cpu.features", "not sorted, or one is there twice");
    }
    if cpu.features.iter().any(String::is_empty) {
        return invalid("cpu.features", "a feature has no name");
    }
    Ok(())
}

fn machine(machine: &MachineShape) -> Result<(), InvalidManifest> {
    if u64::from(machine.page_bytes) != PAGE_BYTES {
        return invalid("machine.page_bytes", format!("{} is not {PAGE_BYTES}", machine.page_bytes));
    }
    if machine.memory_bytes == 0 || !machine.memory_bytes.is_multiple_of(PAGE_BYTES) {
        return invalid("machine.memory_bytes", format!("{} is no number of pages", machine.memory_bytes));
    }
    at_most("machine.memory_bytes", machine.memory_bytes, MEMORY_BYTES_MAX)?;
    if machine.vcpus == 0 {
        return invalid("machine.vcpus", "there is none");
    }
    at_most("machine.vcpus", machine.vcpus.into(), VCPUS_MAX.into())?;
    if machine.devices.windows(2).any(|pair| pair[0].slot >= pair[1].slot) {
        return invalid("machine.devices", "slots do not ascend");
    }
    machine.devices.iter().try_for_each(device)
}

fn device(device: &DeviceSlot) -> Result<(), InvalidManifest> {
    const FIELD: &str = "machine.devices";
    let DeviceSlot { slot, kind, read_only, mac, mtu } = device;
    at_most(FIELD, (*slot).into(), (SLOTS_MAX - 1).into())?;
    let is_net = *kind == DeviceKind::Net;
    let is_block = matches!(kind, DeviceKind::Block | DeviceKind::Volume);
    if read_only.is_some() && !is_block {
        return invalid(FIELD, format!("slot {slot} is read-only or not, and is no disk"));
    }
    if (mac.is_some() || mtu.is_some()) && !is_net {
        return invalid(FIELD, format!("slot {slot} has a MAC or MTU, and is no network interface"));
    }
    if mac.as_ref().is_some_and(|mac| !is_mac(mac)) {
        return invalid(FIELD, format!("the MAC of slot {slot} is no hardware address"));
    }
    if mtu.is_some_and(|mtu| mtu < MTU_MIN) {
        return invalid(FIELD, format!("the MTU of slot {slot} is below {MTU_MIN}"));
    }
    Ok(())
}

/// Chunks and zero runs cover `0..count` exactly once.
fn memory(memory: &MemoryMap, memory_bytes: u64) -> Result<(), InvalidManifest> {
    let sizes = CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX;
    if !sizes.contains(&memory.chunk_bytes) || !memory.chunk_bytes.is_power_of_two() {
        return invalid("memory.chunk_bytes", format!("{} is not 64, 128, 256 or 512 KiB", memory.chunk_bytes));
    }
    if memory.chunks.windows(2).any(|pair| pair[0].index >= pair[1].index) {
        return invalid("memory.chunks", "they do not ascend");
    }
    let count = memory_bytes.div_ceil(memory.chunk_bytes.into());
    ascending("memory.zero_runs", &memory.zero_runs, count)?;
    let mut chunks = memory.chunks.iter().map(|chunk| chunk.index).peekable();
    let mut zeros = memory.zero_runs.iter().peekable();
    let mut next = 0;
    while next < count {
        if chunks.next_if_eq(&next).is_some() {
            next += 1;
        } else if let Some(run) = zeros.next_if(|run| run.first == next) {
            next = run.end().unwrap_or(count);
        } else {
            return invalid("memory.chunks", format!("chunk {next} of {count} is in no list, or is in two"));
        }
    }
    match (chunks.next(), zeros.next()) {
        (None, None) => Ok(()),
        (Some(index), _) => invalid("memory.chunks", format!("chunk {index} is zero as well, or beyond {count}")),
        (None, Some(run)) => invalid("memory.zero_runs", format!("the run at {} is beyond {count}", run.first)),
    }
}

/// Runs are not empty, ascend, do not overlap and end by `count`.
fn ascending(field: &'static str, runs: &[Run], count: u64) -> Result<(), InvalidManifest> {
    let mut next = 0;
    for run in runs {
        let Some(end) = run.end().filter(|end| run.count > 0 && *end <= count) else {
            return invalid(field, format!("[{}, {}] is no run within {count}", run.first, run.count));
        };
        if run.first < next {
            return invalid(field, format!("[{}, {}] overlaps the run before or comes too late", run.first, run.count));
        }
        next = end;
    }
    Ok(())
}

/// Held pages are there in a diff, and only there.
fn pages(manifest: &Manifest) -> Result<(), InvalidManifest> {
    match (&manifest.parent, &manifest.memory.pages) {
        (None, None) => Ok(()),
        (None, Some(_)) => invalid("memory.pages", "a bundle without a parent holds all pages"),
        (Some(_), None) => invalid("memory.pages", "a diff says which pages it holds"),
        (Some(parent), Some(runs)) => {
            if parent.depth == 0 {
                return invalid("parent.depth", "there is one below at least");
            }
            at_most("parent.depth", parent.depth.into(), DEPTH_MAX.into())?;
            ascending("memory.pages", runs, manifest.page_count())
        }
    }
}

fn state(state: &StateFile) -> Result<(), InvalidManifest> {
    at_most("state.bytes", state.bytes, STATE_BYTES_MAX)?;
    at_most("state.sections", state.sections.len() as u64, SECTIONS_MAX as u64)?;
    let mut names: Vec<_> = state.sections.iter().map(|section| (section.kind, section.instance)).collect();
    names.sort_unstable();
    if names.windows(2).any(|pair| pair[0] == pair[1]) {
        return invalid("state.sections", "one is there twice");
    }
    Ok(())
}
