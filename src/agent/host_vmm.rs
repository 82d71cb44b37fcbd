//! VMM processes of this host: started and held by `sys::process`, spoken to over the sockets in their directories.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_blocking;

use super::cgroup::HostCgroups;
use super::config::Waits;
use super::held_taps::HeldTaps;
use super::host_disk::VmDirs;
use super::host_move::{accept_from, connect_to};
use super::host_process::{HostProcess, Started, joined, search, search_all};
use super::host_save::{COPY_S_MAX, copy_spec};
use super::host_touched::prefault_spec;
use super::host_volumes::volume_socket;
use super::images::ImageStore;
use super::record::{DiskSpec, ProcessRecord, VmRecord};
use super::vm_state::VmState;
use super::world::{
    Ask, AskError, FillingPlan, FillingPort, LaunchPlan, OpenStreamError, ReceiveOrder, RestorePlan, SendOrder,
    SentMachine, StartVmmError, StreamIdentity, UnsealPlan, VmmHost, VmmProcess,
};
use crate::bundle::working_set::WorkingSet;
use crate::bundle::{LaunchFiles, Store};
use crate::ids::VmId;
use crate::net::desired::{self, jail_name};
use crate::net::rules::host_tag;
use crate::sys::cgroup::Group;
use crate::sys::fd::{bind_in_dir, connect_in_dir, send_with_fds};
use crate::sys::jail::FILE_BYTES_SPARE;
use crate::sys::process::{self, SpawnNetwork, SpawnVmm};
use crate::sys::{netns, tap};
use crate::units::{MIB, NetLimits};
use crate::wire::control::{
    Answer, DeviceSpec, INTERFACES_MAX, LaunchSpec, Request, RestoreFillingSpec, RestoreSpec, SendPhases, StartMessage,
    StreamKey, UnsealSpec, VOLUME_SLOTS_MAX,
};
use crate::wire::frame::{self, HEADER_BYTES};
use crate::wire::refusal::Refusal;

/// Names of what is in a VM's directory.
pub(super) mod names {
    pub(in crate::agent) const CONTROL: &str = "control.sock";
    pub(in crate::agent) const VSOCK: &str = "vsock.sock";
    pub(in crate::agent) const CONSOLE: &str = "console.sock";
    pub(in crate::agent) const CONSOLE_RING: &str = "console";
    pub(in crate::agent) const LAST_WORDS: &str = "last-words";
    pub(in crate::agent) const FILLING: &str = "filling.sock";
    pub(in crate::agent) const LOG: &str = "vmm.log";
    pub(in crate::agent) const PAGES: &str = "pages";
    pub(in crate::agent) const SEALED: &str = "sealed";
    pub(in crate::agent) const SEALING: &str = "sealing";

    /// What a VMM has of its own that is named: the one that takes a VM over gets these names when it has.
    pub(in crate::agent) const OWN: [&str; 4] = [CONTROL, VSOCK, CONSOLE, LAST_WORDS];

    /// The name of one of these until then.
    pub(in crate::agent) fn next(name: &str) -> String {
        format!("{name}.next")
    }
}

/// Longest line a VMM answers a stream's request with.
const STREAM_LINE_BYTES_MAX: usize = 256;

/// Longest wait for a process that was killed to be gone.
const END_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait for the VMM to take a console client.
const CONSOLE_LIMIT: Duration = Duration::from_secs(5);

/// VMM processes of this host.
#[derive(Debug, Clone)]
pub struct HostVmm {
    pub(super) dirs: VmDirs,
    pub(super) images: ImageStore,
    pub(super) bundles: Store,
    pub(super) waits: Waits,
    /// This host's number, which the names of its jails begin with.
    pub(super) host_number: u16,
    /// Bytes per packet that guests are told.
    pub(super) mtu: u16,
    /// Where this host listens for machines of others.
    pub(super) listens_at: Option<IpAddr>,
    /// Seconds that a guest waits for a volume without a connection.
    pub(super) reconnect_s: u32,
    /// Taps of VMs whose memory is out.
    pub(super) held: HeldTaps,
    /// The VMs' control groups.
    pub(super) cgroups: HostCgroups,
}

impl VmmHost for HostVmm {
    type Process = HostProcess;
    type Stream = tokio::net::UnixStream;
    type Listener = tokio::net::TcpListener;

    async fn start(&self, vm: &VmRecord) -> Result<HostProcess, StartVmmError> {
        self.start_as(vm, Part::Only).await
    }

    async fn start_successor(&self, vm: &VmRecord) -> Result<HostProcess, StartVmmError> {
        self.start_as(vm, Part::Successor).await
    }

    async fn move_machine(&self, vm: &VmRecord, epoch: u64) -> Result<SendPhases, AskError> {
        let (host, vm) = (self.clone(), vm.clone());
        let moved = spawn_blocking(move || host.move_blocking(&vm, epoch)).await;
        moved.unwrap_or_else(|_| Err(AskError::Socket(io::Error::other("the agent is ending"))))
    }

    fn certificate(&self) -> io::Result<StreamIdentity> {
        // Nobody looks at the name: the certificate itself is known to the other end.
        let made = rcgen::generate_simple_self_signed(vec!["hearth".to_owned()]).map_err(io::Error::other)?;
        let key = StreamKey(made.signing_key.serialize_der());
        Ok(StreamIdentity { certificate: made.cert.der().to_vec(), key })
    }

    async fn listen(&self) -> io::Result<(tokio::net::TcpListener, u16)> {
        let none = || io::Error::new(io::ErrorKind::Unsupported, "fabric.listen says no address of this host");
        let address = self.listens_at.ok_or_else(none)?;
        let listener = tokio::net::TcpListener::bind(std::net::SocketAddr::new(address, 0)).await?;
        let port = listener.local_addr()?.port();
        Ok((listener, port))
    }

    async fn receive_machine(
        &self,
        vm: &VmRecord,
        epoch: u64,
        listener: tokio::net::TcpListener,
        order: ReceiveOrder,
    ) -> Result<Answer, AskError> {
        let streams = accept_from(&listener, order.from, order.connections).await.map_err(AskError::Socket)?;
        let (host, vm) = (self.clone(), vm.clone());
        let received = spawn_blocking(move || host.receive_blocking(&vm, epoch, streams, order)).await;
        received.unwrap_or_else(|_| Err(AskError::Socket(io::Error::other("the agent is ending"))))
    }

    async fn send_machine(&self, vm: &VmRecord, epoch: u64, order: SendOrder) -> Result<SentMachine, AskError> {
        let streams = connect_to(order.to, order.policy.connections).await.map_err(AskError::Socket)?;
        let (host, vm) = (self.clone(), vm.clone());
        let sent = spawn_blocking(move || host.send_blocking(&vm, epoch, streams, order)).await;
        sent.unwrap_or_else(|_| Err(AskError::Socket(io::Error::other("the agent is ending"))))
    }

    async fn forward_packets(&self, vm: &VmRecord, epoch: u64) -> Result<u64, AskError> {
        let (host, vm) = (self.clone(), vm.clone());
        let forwarded = spawn_blocking(move || host.forward_blocking(&vm, epoch)).await;
        forwarded.unwrap_or_else(|_| Err(AskError::Socket(io::Error::other("the agent is ending"))))
    }

    async fn take_over(&self, vm: &VmRecord, epoch: u64) -> io::Result<()> {
        let (host, vm) = (self.clone(), vm.clone());
        joined(spawn_blocking(move || host.take_over_blocking(&vm, epoch)).await)
    }

    async fn end_others(&self, vm: &VmRecord) -> io::Result<()> {
        let (id, own, number) = (vm.id.clone(), vm.process, self.host_number);
        let found = joined(spawn_blocking(move || search_all(&id, number)).await)?;
        for found in found.into_iter().filter(|(record, _)| Some(*record) != own) {
            let other = self.adopt(&vm.id, found)?;
            other.kill()?;
            let gone = tokio::time::timeout(END_LIMIT, other.ended()).await;
            gone.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it is not gone after it was killed"))?;
        }
        let (host, id) = (self.clone(), vm.id.clone());
        joined(spawn_blocking(move || host.dirs.remove_files(&id, &names::OWN.map(names::next))).await)
    }

    async fn find(&self, vm: &VmRecord) -> io::Result<Option<HostProcess>> {
        let (known, id, state, number) = (vm.process, vm.id.clone(), vm.state.clone(), self.host_number);
        let found = joined(
            spawn_blocking(move || {
                if let Some(known) = known
                    && let Some(pidfd) = process::find(known.pid, known.start_ticks)?
                {
                    return Ok(Some((known, pidfd)));
                }
                // While it is handed over there may be another one.
                if matches!(state, VmState::HandingOver { .. }) { Ok(None) } else { search(&id, number) }
            })
            .await,
        )?;
        found.map(|found| self.adopt(&vm.id, found)).transpose()
    }

    async fn find_stray(&self, vm: &VmId) -> io::Result<Option<HostProcess>> {
        let (id, number) = (vm.clone(), self.host_number);
        let found = joined(spawn_blocking(move || search(&id, number)).await)?;
        found.map(|found| self.adopt(vm, found)).transpose()
    }

    async fn ask(&self, vm: &VmRecord, epoch: u64, ask: Ask) -> Result<Answer, AskError> {
        let (host, vm) = (self.clone(), vm.clone());
        let answer = spawn_blocking(move || host.ask_blocking(&vm, epoch, &ask)).await;
        answer.unwrap_or_else(|_| Err(AskError::Socket(io::Error::other("the agent is ending"))))
    }

    async fn touched(&self, vm: &VmRecord, epoch: u64) -> Result<WorkingSet, AskError> {
        let (host, vm) = (self.clone(), vm.clone());
        let touched = spawn_blocking(move || host.touched_blocking(&vm, epoch)).await;
        touched.unwrap_or_else(|_| Err(AskError::Socket(io::Error::other("the agent is ending"))))
    }

    async fn bind_to_fill(&self, vm: &VmRecord) -> io::Result<(FillingPort, Self::Stream)> {
        let dir = self.dirs.open(&vm.id)?;
        let port = FillingPort(Arc::new(bind_in_dir(&dir, names::FILLING)?.into()));
        let near = self.connect(&vm.id, names::FILLING).await.map_err(io::Error::other)?;
        Ok((port, near))
    }

    async fn connect_to_fill(&self, vm: &VmRecord) -> io::Result<Option<Self::Stream>> {
        match self.connect(&vm.id, names::FILLING).await {
            Ok(near) => Ok(Some(near)),
            Err(OpenStreamError::Socket(error))
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                Ok(None)
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }

    async fn guest(&self, vm: &VmId, port: u32) -> Result<Self::Stream, OpenStreamError> {
        let mut stream = self.connect(vm, names::VSOCK).await?;
        let line = format!("CONNECT {port}\n");
        stream.write_all(line.as_bytes()).await.map_err(OpenStreamError::Socket)?;
        let line = read_line(&mut stream).await?;
        if line.starts_with("OK ") {
            return Ok(stream);
        }
        match line.strip_prefix("ERR ") {
            Some(reason) => Err(OpenStreamError::Refused { reason: super::guest::printable(reason) }),
            None => Err(OpenStreamError::Malformed),
        }
    }

    async fn hold_taps(&self, vm: &VmRecord) -> io::Result<()> {
        if self.held.has(&vm.id) {
            return Ok(());
        }
        let (host, vm, process) = (self.clone(), vm.clone(), self.find(vm).await?);
        joined(
            spawn_blocking(move || {
                let taps = match process {
                    Some(process) => tap::held_by(process.record().pid, process.pidfd())?,
                    None => (0..vm.spec.interfaces)
                        .map(|index| Ok((desired::tap(index), host.open_tap(&vm, index)?)))
                        .collect::<io::Result<Vec<_>>>()?,
                };
                host.held.put(vm.id, taps);
                Ok(())
            })
            .await,
        )
    }

    async fn packet_waits(&self, vm: &VmId) {
        self.held.packet(vm).await;
    }

    fn release_taps(&self, vm: &VmId) {
        self.held.release(vm);
    }

    async fn console(&self, vm: &VmId) -> Result<Self::Stream, OpenStreamError> {
        match tokio::time::timeout(CONSOLE_LIMIT, self.connect(vm, names::CONSOLE)).await {
            Ok(stream) => stream,
            Err(_) => Err(OpenStreamError::TimedOut { limit: CONSOLE_LIMIT }),
        }
    }
}

async fn read_line(stream: &mut tokio::net::UnixStream) -> Result<String, OpenStreamError> {
    let mut line = Vec::with_capacity(16);
    loop {
        // One byte at a time: what follows the line belongs to whoever gets the stream.
        let byte = stream.read_u8().await.map_err(OpenStreamError::Socket)?;
        if byte == b'\n' {
            return String::from_utf8(line).map_err(|_| OpenStreamError::Malformed);
        }
        if line.len() == STREAM_LINE_BYTES_MAX {
            return Err(OpenStreamError::Malformed);
        }
        line.push(byte);
    }
}

/// The largest file that a VMM has to write, and some to spare.
fn file_bytes_max(vm: &VmRecord) -> io::Result<u64> {
    let memory = u64::from(vm.spec.memory_mib).saturating_mul(MIB);
    // Sealed, each 64 KiB have a tag of 16 bytes: less than a thousandth.
    let mut most = memory.saturating_add(memory / 1024);
    for disk in &vm.spec.disks {
        most = most.max(std::fs::metadata(&disk.path)?.len());
    }
    Ok(most.saturating_add(FILE_BYTES_SPARE))
}

/// What the volume slots of a machine hold when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing: volumes are attached before it runs.
    Nothing,
    /// Those of its record: it had them when it was saved.
    Volumes,
}

/// Which of a VM's processes one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The one it has.
    Only,
    /// The one that is to take it over.
    Successor,
}

impl Part {
    /// The name in the VM's directory of what is called `name` for the only one.
    pub(super) fn name(self, name: &str) -> String {
        match self {
            Self::Only => name.to_owned(),
            Self::Successor => names::next(name),
        }
    }
}

impl HostVmm {
    async fn start_as(&self, vm: &VmRecord, part: Part) -> Result<HostProcess, StartVmmError> {
        let (host, vm) = (self.clone(), vm.clone());
        let started = spawn_blocking(move || host.start_blocking(&vm, part)).await;
        let started = started.map_err(|_| StartVmmError::Spawn {
            step: "wait for it".to_owned(),
            source: io::Error::other("the agent is ending"),
        })?;
        HostProcess::hold(started?, self.cgroups.clone())
            .map_err(|source| StartVmmError::Spawn { step: "watch the process".to_owned(), source })
    }

    /// Removes the control groups of VMMs that ended while there was no agent.
    pub(super) fn sweep_groups(&self) {
        match self.cgroups.sweep() {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::info!(?removed, "removed control groups that an earlier agent left"),
            Err(error) => tracing::warn!(%error, "cannot look for control groups that an earlier agent left"),
        }
    }

    fn adopt(&self, vm: &VmId, (record, pidfd): (ProcessRecord, OwnedFd)) -> io::Result<HostProcess> {
        let group = self.cgroups.group_of(vm, record.pid);
        HostProcess::hold(Started { record, pidfd, group }, self.cgroups.clone())
    }

    fn start_blocking(&self, vm: &VmRecord, part: Part) -> Result<Started, StartVmmError> {
        let failed = |what| move |source| StartVmmError::File { what, source };
        let beside = vm.process.filter(|_| part == Part::Successor).map(|process| process.pid);
        let group = self.cgroups.make(vm, beside).map_err(failed("the VM's control group"))?;
        let started = self.spawn(vm, part, group.as_ref());
        if let (Err(_), Some(group)) = (&started, &group) {
            self.cgroups.end(group);
        }
        let (record, pidfd) = started?;
        Ok(Started { record, pidfd, group })
    }

    fn spawn(
        &self,
        vm: &VmRecord,
        part: Part,
        group: Option<&Group>,
    ) -> Result<(ProcessRecord, OwnedFd), StartVmmError> {
        let failed = |what| move |source| StartVmmError::File { what, source };
        let jail = netns::open_named(&jail_name(self.host_number, vm.jail));
        let jail = jail.map_err(failed("the VM's network namespace"))?;
        let dir = self.dirs.open(&vm.id).map_err(failed("the VM's directory"))?;
        let control = bind_in_dir(&dir, &part.name(names::CONTROL)).map_err(failed(names::CONTROL))?;
        let last_words = self.dirs.create(&vm.id, &part.name(names::LAST_WORDS));
        let last_words = last_words.map_err(failed(names::LAST_WORDS))?;
        // Both write to the one log.
        let log = self.dirs.append(&vm.id, names::LOG).map_err(failed(names::LOG))?;
        let file_bytes_max = file_bytes_max(vm).map_err(failed("the VM's disks"))?;
        let message = StartMessage { vm_id: vm.id.clone(), nonce: vm.nonce, uid: vm.uid, file_bytes_max }.to_bytes();
        let exe = File::open("/proc/self/exe").map_err(failed("this program's own file"))?;
        let group = group.map(Group::open).transpose().map_err(failed("the VM's control group"))?;
        let spawned = process::spawn_vmm(&SpawnVmm {
            exe: exe.as_fd(),
            // The last tells it from a VMM of another host on this machine that has or had the same VM.
            arguments: &["vmm", vm.id.as_str(), &host_tag(self.host_number)],
            start_message: &message,
            control: control.as_fd(),
            last_words: last_words.as_fd(),
            log: log.as_fd(),
            network: SpawnNetwork::In(jail.as_fd()),
            group: group.as_ref().map(AsFd::as_fd),
        });
        let spawned =
            spawned.map_err(|error| StartVmmError::Spawn { step: error.step.to_owned(), source: error.source })?;
        Ok((ProcessRecord { pid: spawned.pid, start_ticks: spawned.start_ticks }, spawned.pidfd))
    }

    async fn connect(&self, vm: &VmId, name: &str) -> Result<tokio::net::UnixStream, OpenStreamError> {
        let dir = self.dirs.open(vm).map_err(OpenStreamError::Socket)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&dir)));
        tokio::net::UnixStream::connect(path).await.map_err(OpenStreamError::Socket)
    }

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

    /// A tap of the VM's jail: the one that is held for it, or attaches to it.
    fn open_tap(&self, vm: &VmRecord, slot: u8) -> io::Result<File> {
        if let Some(held) = self.held.get(&vm.id, &desired::tap(slot)) {
            return held;
        }
        let jail = netns::open_named(&jail_name(self.host_number, vm.jail))?;
        netns::in_fd(&jail, || tap::open(&desired::tap(slot)))?
    }

    /// Opens what the VMM needs to boot, in the order the launch names it.
    fn open_for(&self, vm: &VmRecord, dir: &File, plan: &LaunchPlan) -> Result<(LaunchSpec, Vec<OwnedFd>), AskError> {
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
    fn open_to_restore(
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
    fn open_to_fill(
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
    fn open_to_unseal(
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

/// What a process is told of its missing pages by.
const USERFAULTFD: &str = "/dev/userfaultfd";

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
                volume.trouble = volume.trouble.as_deref().map(super::guest::printable);
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
    use super::guest::printable;
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
