//! VMM processes of this host: started and held by `sys::process`, spoken to over the sockets in their directories.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
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
use super::images::ImageStore;
use super::record::{ProcessRecord, VmRecord};
use super::vm_state::VmState;
use super::world::{
    Ask, AskError, FillingPort, OpenStreamError, ReceiveOrder, SendOrder, SentMachine, StartVmmError, StreamIdentity,
    VmmHost, VmmProcess,
};
use crate::bundle::Store;
use crate::bundle::working_set::WorkingSet;
use crate::ids::VmId;
use crate::net::desired::{self, jail_name};
use crate::net::rules::host_tag;
use crate::sys::cgroup::Group;
use crate::sys::fd::bind_in_dir;
use crate::sys::jail::FILE_BYTES_SPARE;
use crate::sys::process::{self, SpawnNetwork, SpawnVmm};
use crate::sys::{netns, tap};
use crate::units::MIB;
use crate::wire::control::{Answer, SendPhases, StartMessage, StreamKey};

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
}
