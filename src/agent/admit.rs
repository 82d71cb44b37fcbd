//! Pure: may this VM be made? Decided before anything is made, so a refusal leaves nothing behind.

use super::command_line::command_line;
use super::config::Limits;
use super::egress::Protocol;
use super::images::{Image, is_name};
use super::launch::{LaunchRequest, VolumeWish};
use super::launch_error::LaunchError;
use super::record::{BuildSpec, DiskSpec, VmRecord, VmSpec, VolumeSlot};
use super::self_door::ROLE_BYTES_MAX;
use super::session_record::PublishedPort;
use super::volumes::ROOT;
use super::world::HostFacts;
use crate::bundle::Manifest;
use crate::bundle::manifest::{DeviceKind, DeviceSlot};
use crate::ids::BundleId;
use crate::units::MIB;
use crate::wire::control::COMMAND_LINE_BYTES_MAX;

/// Most disks of one VM: the block slots of the guest-physical map.
pub(crate) const DISKS_MAX: usize = 6;

/// Most published ports of one VM.
const PORTS_MAX: usize = 32;

/// Bytes of command line the VMM needs for the words that announce devices: 19 slots at most, of up to 48 bytes each.
pub(crate) const DEVICE_WORDS_BYTES_MAX: usize = 19 * 48;

/// What a decision is made from.
pub(crate) struct Facts<'a> {
    pub(crate) limits: &'a Limits,
    pub(crate) host: &'a HostFacts,
    pub(crate) image: &'a Image,
    /// The bundle, when it is launched from one.
    pub(crate) bundle: Option<(&'a BundleId, &'a Manifest)>,
    /// Words guests on this host need.
    pub(crate) additions: &'a str,
    /// The VMs there are.
    pub(crate) vms: &'a [std::sync::Arc<VmRecord>],
}

/// The VM to make, or why not.
pub(crate) fn admit(request: &LaunchRequest, facts: &Facts<'_>) -> Result<VmSpec, LaunchError> {
    let Facts { limits, host, image, bundle, additions, vms } = facts;
    if let Some(name) = &request.name {
        if !is_name(name) {
            return Err(LaunchError::Name { name: name.clone() });
        }
        if vms.iter().any(|vm| vm.name.as_ref() == Some(name)) {
            return Err(LaunchError::NameTaken { name: name.clone() });
        }
    }
    let shape = match bundle {
        Some((id, manifest)) => frozen_shape(request, id, manifest)?,
        None => Shape {
            vcpus: request.vcpus.unwrap_or(VCPUS_DEFAULT),
            memory_mib: request.memory_mib.unwrap_or(MEMORY_MIB_DEFAULT),
            interfaces: request.interfaces,
            balloon: true,
        },
    };
    let vcpus = match u8::try_from(shape.vcpus) {
        Ok(vcpus) if vcpus >= 1 && shape.vcpus <= limits.vcpus_max => vcpus,
        Ok(_) | Err(_) => return Err(LaunchError::Vcpus { found: shape.vcpus, max: limits.vcpus_max }),
    };
    let memory_mib = memory(shape.memory_mib, facts)?;
    let has_root = request.volumes.iter().any(|wish| wish.mount.as_deref() == Some(ROOT));
    let whole = command_line(additions, &image.command_line, has_root).len();
    let max = COMMAND_LINE_BYTES_MAX - DEVICE_WORDS_BYTES_MAX;
    if whole > max {
        return Err(LaunchError::CommandLine { image: image.name.clone(), found: whole, max });
    }
    disks(&request.disks, vms)?;
    let volumes = volume_slots(request, bundle.map(|(id, manifest)| (id, manifest)))?;
    if let Some(role) = &request.role
        && (role.is_empty() || role.len() > ROLE_BYTES_MAX || role.contains(char::is_control))
    {
        return Err(LaunchError::Role { role: role.clone() });
    }
    request.network_limits.check()?;
    if vms.len() >= limits.vms_max as usize {
        return Err(LaunchError::TooManyVms { max: limits.vms_max });
    }
    let _ = host;
    let (disks, network_limits) = (request.disks.clone(), request.network_limits);
    let interfaces = interfaces(shape.interfaces)?;
    if let Some((build, _)) = &request.build {
        check_build(build)?;
    }
    ports(&request.published, vms)?;
    Ok(VmSpec {
        image: image.name.clone(),
        vcpus,
        memory_mib,
        disks,
        role: request.role.clone(),
        network_limits,
        interfaces,
        bundle: bundle.map(|(id, _)| id.clone()),
        lazy: request.lazy,
        build: request.build.as_ref().map(|(build, _)| build.clone()),
        // Known once the VM has an id.
        cluster: None,
        swap: request.swap.clone(),
        balloon: shape.balloon,
        volumes,
    })
}

/// Number of vCPUs when nothing is said.
const VCPUS_DEFAULT: u32 = 1;

/// Guest memory when nothing is said.
const MEMORY_MIB_DEFAULT: u64 = 128;

/// What a machine is.
struct Shape {
    vcpus: u32,
    memory_mib: u64,
    interfaces: Option<u8>,
    balloon: bool,
}

/// A bundle's machine: what it was frozen with, and nothing else can be asked for.
fn frozen_shape(request: &LaunchRequest, bundle: &BundleId, manifest: &Manifest) -> Result<Shape, LaunchError> {
    let count = |kind| manifest.machine.devices.iter().filter(|device| device.kind == kind).count() as u64;
    let (vcpus, memory_mib) = (u32::from(manifest.machine.vcpus), manifest.machine.memory_bytes / MIB);
    let (disks, interfaces) = (count(DeviceKind::Block), count(DeviceKind::Net));
    let asked = [
        ("vcpus", request.vcpus.map(u64::from), vcpus.into()),
        ("memory_mib", request.memory_mib, memory_mib),
        ("interfaces", request.interfaces.map(u64::from), interfaces),
        ("disks", Some(request.disks.len() as u64), disks),
    ];
    for (what, found, frozen) in asked {
        if let Some(found) = found.filter(|found| *found != frozen) {
            return Err(LaunchError::BundleShape { bundle: bundle.clone(), what, found, frozen });
        }
    }
    let balloon = count(DeviceKind::Balloon) > 0;
    Ok(Shape { vcpus, memory_mib, interfaces: u8::try_from(interfaces).ok(), balloon })
}

/// Longest line that warms a guest up, and longest marker, in bytes.
const WARMUP_BYTES_MAX: usize = 16 * 1024;
const MARKER_BYTES_MAX: usize = 256;

/// Longest time a guest may be warmed up, in seconds.
const WARMUP_S_MAX: u32 = 24 * 3600;

fn check_build(build: &BuildSpec) -> Result<(), LaunchError> {
    let wrong = |reason: String| Err(LaunchError::Build { reason });
    let BuildSpec { warmup, ready_marker, timeout_s } = build;
    if let Some(length) = warmup.as_ref().map(String::len)
        && !(1..=WARMUP_BYTES_MAX).contains(&length)
    {
        return wrong(format!("warmup has {length} bytes: 1 to {WARMUP_BYTES_MAX} are possible"));
    }
    if let Some(length) = ready_marker.as_ref().map(String::len)
        && !(1..=MARKER_BYTES_MAX).contains(&length)
    {
        return wrong(format!("ready_marker has {length} bytes: 1 to {MARKER_BYTES_MAX} are possible"));
    }
    if !(1..=WARMUP_S_MAX).contains(timeout_s) {
        return wrong(format!("timeout_s {timeout_s}: 1 to {WARMUP_S_MAX} are possible"));
    }
    Ok(())
}

/// How many network interfaces a VM gets: one, when nothing is said.
fn interfaces(found: Option<u8>) -> Result<u8, LaunchError> {
    let max = crate::net::desired::TAPS_MAX;
    match found.unwrap_or(1) {
        count if (1..=max).contains(&count) => Ok(count),
        found => Err(LaunchError::Interfaces { found, max }),
    }
}

/// Whether the host's ports that are to lead to a VM are free: each leads to one.
fn ports(wanted: &[PublishedPort], vms: &[std::sync::Arc<VmRecord>]) -> Result<(), LaunchError> {
    if wanted.len() > PORTS_MAX {
        return Err(LaunchError::TooManyPorts { found: wanted.len(), max: PORTS_MAX });
    }
    let living = vms.iter().filter(|vm| vm.state.holds_resources());
    let mut taken: Vec<(Protocol, u16)> = living
        .filter_map(|vm| vm.network.as_ref())
        .flat_map(|network| network.published.iter().map(|port| (port.protocol, port.host_port)))
        .collect();
    for port in wanted {
        let is_possible = matches!(port.protocol, Protocol::Tcp | Protocol::Udp);
        if !is_possible || port.host_port == 0 || port.guest_port == 0 {
            return Err(LaunchError::Port { host_port: port.host_port, guest_port: port.guest_port });
        }
        let key = (port.protocol, port.host_port);
        if taken.contains(&key) {
            return Err(LaunchError::PortTaken { port: port.host_port });
        }
        taken.push(key);
    }
    Ok(())
}

/// Guest memory of the VMs that live, in bytes.
pub(crate) fn promised_bytes(vms: &[std::sync::Arc<VmRecord>]) -> u64 {
    let living = vms.iter().filter(|vm| vm.state.holds_resources());
    living.map(|vm| u64::from(vm.spec.memory_mib).saturating_mul(MIB)).sum()
}

fn memory(asked_mib: u64, facts: &Facts<'_>) -> Result<u32, LaunchError> {
    let Facts { limits, host, image, vms, .. } = facts;
    if asked_mib < image.memory_mib_min {
        let (image, min_mib) = (image.name.clone(), image.memory_mib_min);
        return Err(LaunchError::MemoryTooSmall { image, found_mib: asked_mib, min_mib });
    }
    // Promised memory is not all touched yet, so both are asked: what the host has in all, and what it has now.
    let unpromised = (host.memory_bytes / MIB).saturating_sub(limits.memory_reserve_mib);
    let unpromised = unpromised.saturating_sub(promised_bytes(vms) / MIB);
    let available = (host.memory_available_bytes / MIB).saturating_sub(limits.memory_reserve_mib);
    let free_mib = unpromised.min(available);
    match u32::try_from(asked_mib) {
        Ok(memory_mib) if asked_mib <= free_mib => Ok(memory_mib),
        Ok(_) | Err(_) => {
            Err(LaunchError::MemoryTooLarge { found_mib: asked_mib, free_mib, total_mib: host.memory_bytes / MIB })
        }
    }
}

/// The slots for volumes that a VM gets, those it begins with first: of a bundle, the ones that it was frozen with.
fn volume_slots(
    request: &LaunchRequest,
    bundle: Option<(&BundleId, &Manifest)>,
) -> Result<Vec<VolumeSlot>, LaunchError> {
    for (index, wish) in request.volumes.iter().enumerate() {
        if request.volumes[..index].iter().any(|other| other.volume == wish.volume) {
            return Err(LaunchError::VolumeTwice { volume: wish.volume.clone() });
        }
        if let Some(mount) = wish.mount.as_ref().filter(|mount| *mount != ROOT && !is_mount(mount)) {
            return Err(LaunchError::Mount { mount: mount.clone() });
        }
    }
    let mut roots = request.volumes.iter().filter(|wish| wish.mount.as_deref() == Some(ROOT));
    match (roots.next(), roots.next(), bundle) {
        (Some(first), Some(second), _) => {
            return Err(LaunchError::TwoRoots { first: first.volume.clone(), second: second.volume.clone() });
        }
        (Some(root), None, Some(_)) => return Err(LaunchError::RootInBundle { volume: root.volume.clone() }),
        (Some(_), None, None) | (None, _, _) => {}
    }
    if request.build.is_some() && !request.volumes.is_empty() {
        return Err(LaunchError::VolumesInBuild);
    }
    let told = |wish: &VolumeWish| VolumeSlot { told_read_only: wish.read_only, used: None };
    let spare = std::iter::repeat_n(VolumeSlot::default(), request.spare_disks.into());
    let Some((bundle, manifest)) = bundle else {
        let slots: Vec<_> = request.volumes.iter().map(told).chain(spare).collect();
        let found = request.disks.len().saturating_add(slots.len());
        return if found > DISKS_MAX { Err(LaunchError::TooManyDisks { found }) } else { Ok(slots) };
    };
    let devices = manifest.machine.devices.iter().filter(|device| device.kind == DeviceKind::Volume);
    let frozen = |device: &DeviceSlot| VolumeSlot { told_read_only: device.read_only == Some(true), used: None };
    let slots: Vec<_> = devices.map(frozen).collect();
    let asked = request.volumes.len().saturating_add(request.spare_disks.into());
    if asked > slots.len() {
        let (found, frozen) = (asked as u64, slots.len() as u64);
        return Err(LaunchError::BundleShape { bundle: bundle.clone(), what: "volumes", found, frozen });
    }
    Ok(slots)
}

/// Whether a guest that runs can be asked to mount something there: not in the place of its root, by whatever name.
pub(super) fn is_mount(mount: &str) -> bool {
    let Some(names) = mount.strip_prefix('/') else { return false };
    let names = names.strip_suffix('/').unwrap_or(names);
    mount.len() <= MOUNT_BYTES_MAX
        && !mount.contains(char::is_control)
        && names.split('/').all(|name| !matches!(name, "" | "." | ".."))
}

/// Longest path that something is mounted at, in bytes.
const MOUNT_BYTES_MAX: usize = 255;

fn disks(asked: &[DiskSpec], vms: &[std::sync::Arc<VmRecord>]) -> Result<(), LaunchError> {
    if asked.len() > DISKS_MAX {
        return Err(LaunchError::TooManyDisks { found: asked.len() });
    }
    for (index, disk) in asked.iter().enumerate() {
        if !disk.path.starts_with('/') || disk.path.contains('\0') {
            return Err(LaunchError::DiskPath { path: disk.path.clone() });
        }
        let living = vms.iter().filter(|vm| vm.state.holds_resources()).flat_map(|vm| &vm.spec.disks);
        let others = living.chain(&asked[..index]);
        let clash = others.filter(|other| other.path == disk.path).any(|other| !(other.read_only && disk.read_only));
        if clash {
            return Err(LaunchError::DiskInUse { path: disk.path.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
