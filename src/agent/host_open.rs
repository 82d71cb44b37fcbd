//! What a machine is made of, opened for the VMM that makes it: a jailed process reaches nothing by a name.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use super::host_vmm::{HostVmm, Part, names};
use super::host_volumes::volume_socket;
use super::record::{DiskSpec, VmRecord};
use super::world::{AskError, FillingPlan, LaunchPlan, RestorePlan, UnsealPlan};
use crate::bundle::LaunchFiles;
use crate::ids::VmId;
use crate::net::desired::{self, jail_name};
use crate::sys::fd::bind_in_dir;
use crate::sys::{netns, tap};
use crate::units::NetLimits;
use crate::wire::control::{DeviceSpec, LaunchSpec, RestoreFillingSpec, RestoreSpec, UnsealSpec};

/// What a process is told of its missing pages by.
const USERFAULTFD: &str = "/dev/userfaultfd";

/// What the volume slots of a machine hold when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing: volumes are attached before it runs.
    Nothing,
    /// Those of its record: it had them when it was saved.
    Volumes,
}

impl HostVmm {
    /// A tap of the VM's jail: the one that is held for it, or attaches to it.
    pub(super) fn open_tap(&self, vm: &VmRecord, slot: u8) -> io::Result<File> {
        if let Some(held) = self.held.get(&vm.id, &desired::tap(slot)) {
            return held;
        }
        let jail = netns::open_named(&jail_name(self.host_number, vm.jail))?;
        netns::in_fd(&jail, || tap::open(&desired::tap(slot)))?
    }

    /// Opens what the VMM needs to boot, in the order the launch names it.
    pub(super) fn open_for(
        &self,
        vm: &VmRecord,
        dir: &File,
        plan: &LaunchPlan,
    ) -> Result<(LaunchSpec, Vec<OwnedFd>), AskError> {
        let LaunchPlan { image, vcpus, memory_bytes, command_line, disks, network_limits } = plan;
        let image = self.images.open(image).map_err(AskError::Image)?;
        let initrd = image.initrd.is_some();
        let mut files: Vec<OwnedFd> = vec![open_kvm()?, image.kernel.into()];
        files.extend(image.initrd.map(OwnedFd::from));
        let devices = self.open_devices(vm, dir, Part::Only, (disks, *network_limits, Held::Nothing), &mut files)?;
        let (vcpus, memory_bytes, command_line) = (*vcpus, *memory_bytes, command_line.clone());
        Ok((LaunchSpec { vcpus, memory_bytes, command_line, initrd, devices }, files))
    }

    /// Opens what the VMM needs to restore a machine, in the order the request names it.
    pub(super) fn open_to_restore(
        &self,
        vm: &VmRecord,
        dir: &File,
        plan: &RestorePlan,
    ) -> Result<(RestoreSpec, Vec<OwnedFd>), AskError> {
        let RestorePlan { bundle, .. } = plan;
        let bundle = self.bundles.open_for_launch(bundle).map_err(AskError::Bundle)?;
        self.open_launched(vm, dir, plan, bundle)
    }

    /// The same for one whose bundle is not whole.
    pub(super) fn open_to_fill(
        &self,
        vm: &VmRecord,
        dir: &File,
        plan: &RestorePlan,
        filling: &FillingPlan,
    ) -> Result<(RestoreFillingSpec, Vec<OwnedFd>), AskError> {
        let bundle = filling.partial.launch_files().map_err(AskError::Partial)?;
        let chunk_bytes = bundle.manifest.memory.chunk_bytes;
        let (restore, mut files) = self.open_launched(vm, dir, plan, bundle)?;
        let faults = File::options().read(true).write(true).open(USERFAULTFD).map_err(unopened(USERFAULTFD))?;
        let port = filling.port.0.try_clone().map_err(unopened(names::FILLING))?;
        files.extend([faults.into(), port]);
        Ok((RestoreFillingSpec { restore, chunk_bytes }, files))
    }

    fn open_launched(
        &self,
        vm: &VmRecord,
        dir: &File,
        plan: &RestorePlan,
        bundle: LaunchFiles,
    ) -> Result<(RestoreSpec, Vec<OwnedFd>), AskError> {
        let RestorePlan { memory_bytes, disks, network_limits, .. } = plan;
        let mut files: Vec<OwnedFd> = vec![open_kvm()?, bundle.state.into(), bundle.memory.into()];
        let devices = self.open_devices(vm, dir, Part::Only, (disks, *network_limits, Held::Nothing), &mut files)?;
        Ok((RestoreSpec { memory_bytes: *memory_bytes, devices }, files))
    }

    /// Opens what the VMM needs to unseal a machine, in the order the request names it.
    pub(super) fn open_to_unseal(
        &self,
        vm: &VmRecord,
        dir: &File,
        plan: &UnsealPlan,
    ) -> Result<(UnsealSpec, Vec<OwnedFd>), AskError> {
        let UnsealPlan { bundle, key, memory_bytes, disks, network_limits } = plan;
        let sealed = self.dirs.open_sealed(&vm.id).map_err(AskError::Sealed)?;
        let mut files: Vec<OwnedFd> = vec![open_kvm()?, sealed.into()];
        if let Some(bundle) = bundle {
            files.push(self.bundles.open_for_launch(bundle).map_err(AskError::Bundle)?.memory.into());
        }
        let devices = self.open_devices(vm, dir, Part::Only, (disks, *network_limits, Held::Volumes), &mut files)?;
        Ok((UnsealSpec { memory_bytes: *memory_bytes, devices, key: *key, image: bundle.is_some() }, files))
    }

    /// Console and devices.
    pub(super) fn open_devices(
        &self,
        vm: &VmRecord,
        dir: &File,
        part: Part,
        (disks, limits, held): (&[DiskSpec], NetLimits, Held),
        files: &mut Vec<OwnedFd>,
    ) -> Result<Vec<DeviceSpec>, AskError> {
        // Who takes a guest over goes on with its console.
        let ring = match part {
            Part::Only => self.dirs.create(&vm.id, names::CONSOLE_RING),
            Part::Successor => self.dirs.open_to_change(&vm.id, names::CONSOLE_RING),
        };
        files.push(ring.map_err(unopened(names::CONSOLE_RING))?.into());
        for name in [names::CONSOLE, names::VSOCK] {
            files.push(bind_in_dir(dir, &part.name(name)).map_err(unopened(name))?.into());
        }
        let mut devices = vec![DeviceSpec::Vsock, DeviceSpec::Rng];
        if vm.spec.balloon {
            devices.push(DeviceSpec::Balloon);
        }
        for (index, disk) in (0_u8..).zip(disks) {
            let file = File::options().read(true).write(!disk.read_only).open(&disk.path);
            files.push(file.map_err(unopened(&disk.path))?.into());
            devices.push(DeviceSpec::Block { index, read_only: disk.read_only });
        }
        for (slot, of) in vm.spec.volumes.iter().enumerate() {
            let index = vm.spec.volume_index(slot);
            let name = part.name(&volume_socket(index));
            files.push(bind_in_dir(dir, &name).map_err(unopened(&name))?.into());
            let used = of.used.as_ref().filter(|_| held == Held::Volumes);
            let (bytes, read_only) = used.map_or((0, false), |used| (used.bytes, used.read_only));
            let reconnect_ms = self.reconnect_s.saturating_mul(1000);
            devices.push(DeviceSpec::Volume { index, bytes, read_only: read_only || of.told_read_only, reconnect_ms });
        }
        for index in 0..vm.spec.interfaces {
            let tap = self.open_tap(vm, index).map_err(unopened(&desired::tap(index)))?;
            files.push(tap.into());
            let mac = interface_mac(&vm.id, index);
            devices.push(DeviceSpec::Net { index, mac, mtu: Some(self.mtu), limits });
        }
        Ok(devices)
    }
}

pub(super) fn open_pagemap(vm: &VmRecord) -> Result<OwnedFd, AskError> {
    let pid = vm.process.map_or(0, |process| process.pid);
    Ok(File::open(format!("/proc/{pid}/pagemap")).map_err(unopened("the VMM's page map"))?.into())
}

pub(super) fn unopened(what: &str) -> impl FnOnce(io::Error) -> AskError {
    let what = what.to_owned();
    move |source| AskError::Open { what, source }
}

pub(super) fn open_kvm() -> Result<OwnedFd, AskError> {
    let device = File::options().read(true).write(true).open("/dev/kvm");
    Ok(device.map_err(unopened("/dev/kvm"))?.into())
}

/// The first interface's hardware address: locally administered, and as unique as the VM's id.
pub(super) fn mac(vm: &VmId) -> [u8; 6] {
    interface_mac(vm, 0)
}

/// An interface's hardware address.
pub(super) fn interface_mac(vm: &VmId, index: u8) -> [u8; 6] {
    let digest = blake3::hash(vm.as_str().as_bytes());
    let [a, b, c, d, e, ..] = *digest.as_bytes();
    [0x02, a, b, c, d, e ^ index]
}
