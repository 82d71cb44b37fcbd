//! One request to a VMM, and its answer: what it is bounded by, which descriptors go with it, what is believed of it.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::guest::printable;
use super::host_open::{open_pagemap, unopened};
use super::host_save::{COPY_S_MAX, copy_spec};
use super::host_touched::prefault_spec;
use super::host_vmm::{HostVmm, names};
use super::record::VmRecord;
use super::world::{Ask, AskError, RestorePlan};
use crate::net::desired;
use crate::sys::fd::{connect_in_dir, send_with_fds};
use crate::wire::control::{Answer, INTERFACES_MAX, Request, VOLUME_SLOTS_MAX};
use crate::wire::frame::{self, HEADER_BYTES};
use crate::wire::refusal::Refusal;

impl HostVmm {
    pub(super) fn ask_blocking(&self, vm: &VmRecord, epoch: u64, ask: &Ask) -> Result<Answer, AskError> {
        let limit = Duration::from_secs(
            match ask {
                Ask::Launch(_)
                | Ask::Restore(_)
                | Ask::Unseal(_)
                | Ask::Save { .. }
                | Ask::SaveRest { .. }
                | Ask::Seal { .. } => self.waits.vmm_launch_s,
                Ask::CopyMemory { .. } => COPY_S_MAX.saturating_add(self.waits.vmm_launch_s),
                Ask::Status
                | Ask::CancelSend
                | Ask::SendProgress
                | Ask::Pause
                | Ask::Resume
                | Ask::AttachVolume(_)
                | Ask::DetachVolume { .. }
                | Ask::ResizeVolume { .. }
                | Ask::LimitVolume { .. }
                | Ask::Volumes
                | Ask::Network
                | Ask::ReplaceTap { .. }
                | Ask::Prefault(_)
                | Ask::Balloon { .. } => self.waits.vmm_answer_s,
            }
            .into(),
        );
        // One whose memory is on its way may have to wait for it before it answers.
        let for_memory = if vm.spec.lazy { self.waits.memory_s } else { 0 };
        let limit = limit + Duration::from_secs(for_memory.into());
        let dir = self.dirs.open(&vm.id).map_err(AskError::Socket)?;
        let mut socket = connect_in_dir(&dir, names::CONTROL).map_err(AskError::Socket)?;
        socket.set_read_timeout(Some(limit)).map_err(AskError::Socket)?;
        socket.set_write_timeout(Some(limit)).map_err(AskError::Socket)?;
        let hello = Request::Hello { nonce: vm.nonce, epoch };
        let mut exchange = |request: &Request, files: &[OwnedFd]| exchange(&mut socket, vm, request, files, limit);
        let welcome = match exchange(&hello, &[])? {
            Answer::Welcome(status) => status,
            Answer::Launched(_)
            | Answer::Done
            | Answer::Status(_)
            | Answer::Refused(_)
            | Answer::Network(_)
            | Answer::Saved(_)
            | Answer::Balloon(_)
            | Answer::Sent(_)
            | Answer::SentIn { .. }
            | Answer::Sending(_)
            | Answer::Copied(_)
            | Answer::Volumes(_)
            | Answer::Forwarded { .. } => {
                return Err(AskError::Unexpected);
            }
        };
        match ask {
            Ask::Status => Ok(Answer::Status(welcome)),
            Ask::CancelSend => exchange(&Request::CancelSend, &[]),
            Ask::SendProgress => exchange(&Request::SendProgress, &[]),
            Ask::Pause => exchange(&Request::Pause, &[]),
            Ask::Resume => exchange(&Request::Resume, &[]),
            Ask::Network => exchange(&Request::Network, &[]),
            Ask::ReplaceTap { index } => {
                let index = *index;
                let tap = self.open_tap(vm, index);
                let tap = tap.map_err(|source| AskError::Open { what: desired::tap(index), source })?;
                exchange(&Request::ReplaceTap { index }, &[tap.into()])
            }
            Ask::Balloon { target_bytes } => exchange(&Request::Balloon { target_bytes: *target_bytes }, &[]),
            Ask::AttachVolume(spec) => exchange(&Request::AttachVolume(*spec), &[]),
            Ask::DetachVolume { index, force } => {
                exchange(&Request::DetachVolume { index: *index, force: *force }, &[])
            }
            Ask::ResizeVolume { index, bytes } => {
                exchange(&Request::ResizeVolume { index: *index, bytes: *bytes }, &[])
            }
            Ask::LimitVolume { index, iops, bytes_per_s } => {
                let (index, iops, bytes_per_s) = (*index, *iops, *bytes_per_s);
                exchange(&Request::LimitVolume { index, iops, bytes_per_s }, &[])
            }
            Ask::Volumes => exchange(&Request::Volumes, &[]),
            Ask::Prefault(set) => exchange(&Request::Prefault(prefault_spec(set)), &[]),
            Ask::Launch(plan) => {
                let (spec, files) = self.open_for(vm, &dir, plan)?;
                exchange(&Request::Launch(spec), &files)
            }
            Ask::Restore(plan @ RestorePlan { filling: Some(filling), .. }) => {
                let (spec, files) = self.open_to_fill(vm, &dir, plan, filling)?;
                exchange(&Request::RestoreFilling(spec), &files)
            }
            Ask::Restore(plan) => {
                let (spec, files) = self.open_to_restore(vm, &dir, plan)?;
                exchange(&Request::Restore(spec), &files)
            }
            Ask::Save { pages } => {
                let files = self.open_to_save(vm, *pages)?;
                exchange(&Request::Save { pages: *pages }, &files)
            }
            Ask::CopyMemory { pages } => {
                let files = self.open_to_copy(vm)?;
                exchange(&Request::CopyMemory(copy_spec(*pages)), &files)
            }
            Ask::SaveRest { pages } => {
                let files = self.open_for_rest(vm, *pages)?;
                exchange(&Request::SaveRest, &files)
            }
            Ask::Seal { pages, key } => {
                let pagemap = open_pagemap(vm)?;
                let file = self.dirs.create(&vm.id, names::SEALING).map_err(unopened("a file to seal the VM in"))?;
                exchange(&Request::Seal { pages: *pages, key: *key }, &[pagemap, file.into()])
            }
            Ask::Unseal(plan) => {
                let (spec, files) = self.open_to_unseal(vm, &dir, plan)?;
                exchange(&Request::Unseal(spec), &files)
            }
        }
    }
}

pub(super) fn exchange(
    socket: &mut UnixStream,
    vm: &VmRecord,
    request: &Request,
    files: &[OwnedFd],
    limit: Duration,
) -> Result<Answer, AskError> {
    let failed = |source: io::Error| {
        // A read time-out of a socket shows as either, by platform.
        let late = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&source.kind());
        if late { AskError::TimedOut { limit } } else { AskError::Socket(source) }
    };
    let (speaks, needs) = (vm.wire_version, request.since_version());
    if speaks < needs {
        return Err(AskError::OlderVmm { speaks, needs });
    }
    // In the version the VMM was started with.
    let bytes = frame::encode_in(speaks, request).map_err(AskError::Frame)?;
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    send_with_fds(socket, &bytes, &files).map_err(failed)?;
    let mut header = [0; HEADER_BYTES];
    socket.read_exact(&mut header).map_err(failed)?;
    let length = frame::body_length::<Answer>(header).map_err(AskError::Frame)?;
    let mut body = vec![0; length];
    socket.read_exact(&mut body).map_err(failed)?;
    match frame::decode(&body).map_err(AskError::Frame)? {
        Answer::Refused(refusal) => Err(AskError::Refused(bounded(refusal))),
        // No more of them than there can be.
        Answer::Network(interfaces) if interfaces.len() > INTERFACES_MAX => Err(AskError::Unexpected),
        Answer::Volumes(volumes) if volumes.len() > VOLUME_SLOTS_MAX => Err(AskError::Unexpected),
        Answer::Volumes(mut volumes) => {
            // A VMM's words end up in answers.
            for volume in &mut volumes {
                volume.trouble = volume.trouble.as_deref().map(printable);
            }
            Ok(Answer::Volumes(volumes))
        }
        answer @ (Answer::Welcome(_)
        | Answer::Launched(_)
        | Answer::Done
        | Answer::Status(_)
        | Answer::Network(_)
        | Answer::Saved(_)
        | Answer::Balloon(_)
        | Answer::Sent(_)
        | Answer::SentIn { .. }
        | Answer::Sending(_)
        | Answer::Copied(_)
        | Answer::Forwarded { .. }) => Ok(answer),
    }
}

/// A VMM's words end up in records and answers.
fn bounded(refusal: Refusal) -> Refusal {
    match refusal {
        Refusal::BadRequest { reason } => Refusal::BadRequest { reason: printable(&reason) },
        Refusal::BadImage { reason } => Refusal::BadImage { reason: printable(&reason) },
        Refusal::Host { reason } => Refusal::Host { reason: printable(&reason) },
        Refusal::BadState { reason } => Refusal::BadState { reason: printable(&reason) },
        Refusal::Stream { reason } => Refusal::Stream { reason: printable(&reason) },
        other @ (Refusal::HelloFirst
        | Refusal::WrongNonce
        | Refusal::StaleEpoch { .. }
        | Refusal::State { .. }
        | Refusal::Sending
        | Refusal::Cancelled
        | Refusal::Filling
        | Refusal::VolumeInUse { .. }) => other,
    }
}
