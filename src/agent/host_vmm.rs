//! VMM processes of this host: started and held by `sys::process`, spoken to over the sockets in their directories.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_blocking;

use super::config::Waits;
use super::host_disk::VmDirs;
use super::images::ImageStore;
use super::record::{DiskSpec, ProcessRecord, VmRecord};
use super::world::{
    Ask, AskError, LaunchPlan, OpenStreamError, ProcessEnd, ProcessUsage, RestorePlan, StartVmmError, VmmHost,
    VmmProcess,
};
use crate::bundle::Store;
use crate::ids::VmId;
use crate::net::desired::{self, jail_name};
use crate::sys::fd::{bind_in_dir, connect_in_dir, send_with_fds};
use crate::sys::process::{self, SpawnNetwork, SpawnVmm};
use crate::sys::{netns, tap};
use crate::units::{MIB, NetLimits};
use crate::wire::control::{
    Answer, DeviceSpec, INTERFACES_MAX, LaunchSpec, Request, RestoreSpec, SavedPages, StartMessage,
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
    pub(in crate::agent) const LOG: &str = "vmm.log";
    pub(in crate::agent) const PAGES: &str = "pages";
}

/// Longest line a VMM answers a stream's request with.
const STREAM_LINE_BYTES_MAX: usize = 256;

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
}

/// A held VMM process.
#[derive(Debug, Clone)]
pub struct HostProcess(Arc<Held>);

#[derive(Debug)]
struct Held {
    record: ProcessRecord,
    pidfd: AsyncFd<OwnedFd>,
    end: Mutex<Option<ProcessEnd>>,
}

impl HostProcess {
    /// Call inside the runtime.
    fn hold(record: ProcessRecord, pidfd: OwnedFd) -> io::Result<Self> {
        #[expect(deprecated, reason = "what replaces it is unsafe; an OwnedFd is never replaced while it is held")]
        let pidfd = AsyncFd::new(pidfd)?;
        Ok(Self(Arc::new(Held { record, pidfd, end: Mutex::new(None) })))
    }

    fn proc_file(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.0.record.pid)).ok()
    }

    /// Reaps the process, once, and remembers how it ended.
    fn look(&self) -> io::Result<Option<ProcessEnd>> {
        let mut end = self.0.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.is_none() {
            let pidfd = self.0.pidfd.get_ref();
            *end = match process::reap(pidfd)? {
                Some(status) => Some(match (status.code(), status.signal()) {
                    (Some(code), _) => ProcessEnd::Exited(code),
                    (None, Some(signal)) => ProcessEnd::Signalled(signal),
                    (None, None) => ProcessEnd::Unknown,
                }),
                None if process::has_ended(pidfd)? => Some(ProcessEnd::Unknown),
                None => None,
            };
        }
        Ok(*end)
    }
}

impl VmmProcess for HostProcess {
    fn record(&self) -> ProcessRecord {
        self.0.record
    }

    fn kill(&self) -> io::Result<()> {
        process::kill(self.0.pidfd.get_ref())
    }

    async fn ended(&self) -> ProcessEnd {
        loop {
            match self.look() {
                Ok(Some(end)) => return end,
                Ok(None) => {}
                Err(error) => tracing::warn!(pid = self.0.record.pid, %error, "cannot look at the VMM process"),
            }
            match self.0.pidfd.readable().await {
                // Readable means ended, for good: the next look sees it.
                Ok(mut ready) => {
                    if !matches!(self.look(), Ok(Some(_))) {
                        ready.clear_ready();
                    }
                }
                // Only when the runtime shuts down.
                Err(_) => std::future::pending().await,
            }
        }
    }

    fn usage(&self) -> ProcessUsage {
        let status = self.proc_file("status");
        let resident = status.as_deref().and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok()
        });
        ProcessUsage { resident_bytes: resident.map(|kib| kib * 1024), cpu: self.cpu_time() }
    }
}

impl HostProcess {
    /// Fields 14 and 15 of `/proc/PID/stat`, in clock ticks of 10 ms (USER_HZ is 100 on every Linux for x86).
    fn cpu_time(&self) -> Option<Duration> {
        let stat = self.proc_file("stat")?;
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ').skip(11);
        let ticks = |field: Option<&str>| field.and_then(|field| field.parse::<u64>().ok());
        let (user, system) = (ticks(fields.next())?, ticks(fields.next())?);
        Some(Duration::from_millis(user.saturating_add(system).saturating_mul(10)))
    }
}

fn joined<T>(result: Result<io::Result<T>, tokio::task::JoinError>) -> io::Result<T> {
    result.unwrap_or_else(|_| Err(io::Error::other("the agent is ending")))
}

/// The VMM whose arguments name this VM. Reads the arguments of every process: for recovery only.
fn search(id: &VmId) -> io::Result<Option<(ProcessRecord, OwnedFd)>> {
    for entry in std::fs::read_dir("/proc")? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let Ok(pid) = name.parse::<i32>() else { continue };
        let Ok(words) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let mut words = words.split(|byte| *byte == 0).skip(1);
        if words.next() != Some(b"vmm") || words.next() != Some(id.as_str().as_bytes()) {
            continue;
        }
        let Ok(start_ticks) = process::start_ticks(pid) else { continue };
        if let Some(pidfd) = process::find(pid, start_ticks)? {
            return Ok(Some((ProcessRecord { pid, start_ticks }, pidfd)));
        }
    }
    Ok(None)
}

impl VmmHost for HostVmm {
    type Process = HostProcess;
    type Stream = tokio::net::UnixStream;

    async fn start(&self, vm: &VmRecord) -> Result<HostProcess, StartVmmError> {
        let (dirs, vm, host_number) = (self.dirs.clone(), vm.clone(), self.host_number);
        let started = spawn_blocking(move || start(&dirs, &vm, host_number)).await;
        let started = started.map_err(|_| StartVmmError::Spawn {
            step: "wait for it".to_owned(),
            source: io::Error::other("the agent is ending"),
        })?;
        let (record, pidfd) = started?;
        HostProcess::hold(record, pidfd)
            .map_err(|source| StartVmmError::Spawn { step: "watch the process".to_owned(), source })
    }

    async fn find(&self, vm: &VmRecord) -> io::Result<Option<HostProcess>> {
        let (known, id) = (vm.process, vm.id.clone());
        let found = joined(
            spawn_blocking(move || {
                if let Some(known) = known
                    && let Some(pidfd) = process::find(known.pid, known.start_ticks)?
                {
                    return Ok(Some((known, pidfd)));
                }
                search(&id)
            })
            .await,
        )?;
        found.map(|(record, pidfd)| HostProcess::hold(record, pidfd)).transpose()
    }

    async fn find_stray(&self, vm: &VmId) -> io::Result<Option<HostProcess>> {
        let id = vm.clone();
        let found = joined(spawn_blocking(move || search(&id)).await)?;
        found.map(|(record, pidfd)| HostProcess::hold(record, pidfd)).transpose()
    }

    async fn ask(&self, vm: &VmRecord, epoch: u64, ask: Ask) -> Result<Answer, AskError> {
        let (host, vm) = (self.clone(), vm.clone());
        let answer = spawn_blocking(move || host.ask_blocking(&vm, epoch, &ask)).await;
        answer.unwrap_or_else(|_| Err(AskError::Socket(io::Error::other("the agent is ending"))))
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

fn start(dirs: &VmDirs, vm: &VmRecord, host_number: u16) -> Result<(ProcessRecord, OwnedFd), StartVmmError> {
    let failed = |what| move |source| StartVmmError::File { what, source };
    let jail = netns::open_named(&jail_name(host_number, vm.jail)).map_err(failed("the VM's network namespace"))?;
    let dir = dirs.open(&vm.id).map_err(failed("the VM's directory"))?;
    let control = bind_in_dir(&dir, names::CONTROL).map_err(failed(names::CONTROL))?;
    let last_words = dirs.create(&vm.id, names::LAST_WORDS).map_err(failed(names::LAST_WORDS))?;
    let log = dirs.create(&vm.id, names::LOG).map_err(failed(names::LOG))?;
    let message = StartMessage { vm_id: vm.id.clone(), nonce: vm.nonce, uid: vm.uid }.to_bytes();
    let exe = File::open("/proc/self/exe").map_err(failed("this program's own file"))?;
    let spawned = process::spawn_vmm(&SpawnVmm {
        exe: exe.as_fd(),
        arguments: &["vmm", vm.id.as_str()],
        start_message: &message,
        control: control.as_fd(),
        last_words: last_words.as_fd(),
        log: log.as_fd(),
        network: SpawnNetwork::In(jail.as_fd()),
    });
    let spawned =
        spawned.map_err(|error| StartVmmError::Spawn { step: error.step.to_owned(), source: error.source })?;
    Ok((ProcessRecord { pid: spawned.pid, start_ticks: spawned.start_ticks }, spawned.pidfd))
}

impl HostVmm {
    async fn connect(&self, vm: &VmId, name: &str) -> Result<tokio::net::UnixStream, OpenStreamError> {
        let dir = self.dirs.open(vm).map_err(OpenStreamError::Socket)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&dir)));
        tokio::net::UnixStream::connect(path).await.map_err(OpenStreamError::Socket)
    }

    fn ask_blocking(&self, vm: &VmRecord, epoch: u64, ask: &Ask) -> Result<Answer, AskError> {
        let limit = Duration::from_secs(
            match ask {
                Ask::Launch(_) | Ask::Restore(_) | Ask::Save { .. } => self.waits.vmm_launch_s,
                Ask::Status | Ask::Pause | Ask::Resume | Ask::Network | Ask::ReplaceTap { .. } => {
                    self.waits.vmm_answer_s
                }
            }
            .into(),
        );
        let dir = self.dirs.open(&vm.id).map_err(AskError::Socket)?;
        let mut socket = connect_in_dir(&dir, names::CONTROL).map_err(AskError::Socket)?;
        socket.set_read_timeout(Some(limit)).map_err(AskError::Socket)?;
        socket.set_write_timeout(Some(limit)).map_err(AskError::Socket)?;
        let hello = Request::Hello { nonce: vm.nonce, epoch };
        let welcome = match exchange(&mut socket, &hello, &[], limit)? {
            Answer::Welcome(status) => status,
            Answer::Launched(_)
            | Answer::Done
            | Answer::Status(_)
            | Answer::Refused(_)
            | Answer::Network(_)
            | Answer::Saved(_) => {
                return Err(AskError::Unexpected);
            }
        };
        match ask {
            Ask::Status => Ok(Answer::Status(welcome)),
            Ask::Pause => exchange(&mut socket, &Request::Pause, &[], limit),
            Ask::Resume => exchange(&mut socket, &Request::Resume, &[], limit),
            Ask::Network => exchange(&mut socket, &Request::Network, &[], limit),
            Ask::ReplaceTap { index } => {
                let index = *index;
                let tap = self.open_tap(vm, index);
                let tap = tap.map_err(|source| AskError::Open { what: desired::tap(index), source })?;
                exchange(&mut socket, &Request::ReplaceTap { index }, &[tap.into()], limit)
            }
            Ask::Launch(plan) => {
                let (spec, files) = self.open_for(vm, &dir, plan)?;
                exchange(&mut socket, &Request::Launch(spec), &files, limit)
            }
            Ask::Restore(plan) => {
                let (spec, files) = self.open_to_restore(vm, &dir, plan)?;
                exchange(&mut socket, &Request::Restore(spec), &files, limit)
            }
            Ask::Save { pages } => {
                let files = self.open_to_save(vm, *pages)?;
                exchange(&mut socket, &Request::Save { pages: *pages }, &files, limit)
            }
        }
    }

    /// Attaches to a tap of the VM's jail.
    fn open_tap(&self, vm: &VmRecord, slot: u8) -> io::Result<File> {
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
        let devices = self.open_devices(vm, dir, (disks, *network_limits), &mut files)?;
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
        let RestorePlan { bundle, memory_bytes, disks, network_limits } = plan;
        let bundle = self.bundles.open_for_launch(bundle).map_err(AskError::Bundle)?;
        let mut files: Vec<OwnedFd> = vec![open_kvm()?, bundle.state.into(), bundle.memory.into()];
        let devices = self.open_devices(vm, dir, (disks, *network_limits), &mut files)?;
        Ok((RestoreSpec { memory_bytes: *memory_bytes, devices }, files))
    }

    /// Console and devices.
    fn open_devices(
        &self,
        vm: &VmRecord,
        dir: &File,
        (disks, limits): (&[DiskSpec], NetLimits),
        files: &mut Vec<OwnedFd>,
    ) -> Result<Vec<DeviceSpec>, AskError> {
        let ring = self.dirs.create(&vm.id, names::CONSOLE_RING);
        files.push(ring.map_err(unopened(names::CONSOLE_RING))?.into());
        files.push(bind_in_dir(dir, names::CONSOLE).map_err(unopened(names::CONSOLE))?.into());
        files.push(bind_in_dir(dir, names::VSOCK).map_err(unopened(names::VSOCK))?.into());
        let mut devices = vec![DeviceSpec::Vsock, DeviceSpec::Rng];
        for (index, disk) in (0_u8..).zip(disks) {
            let file = File::options().read(true).write(!disk.read_only).open(&disk.path);
            files.push(file.map_err(unopened(&disk.path))?.into());
            devices.push(DeviceSpec::Block { index, read_only: disk.read_only });
        }
        for index in 0..vm.spec.interfaces {
            let tap = self.open_tap(vm, index).map_err(unopened(&desired::tap(index)))?;
            files.push(tap.into());
            let mac = interface_mac(&vm.id, index);
            devices.push(DeviceSpec::Net { index, mac, mtu: Some(self.mtu), limits });
        }
        Ok(devices)
    }

    /// Files to save a machine into, in the order the request names them.
    fn open_to_save(&self, vm: &VmRecord, pages: SavedPages) -> Result<Vec<OwnedFd>, AskError> {
        let pid = vm.process.map_or(0, |process| process.pid);
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(unopened("the VMM's page map"))?;
        let token = vm.id.as_str();
        // What an earlier try left is not whole.
        if let Some(earlier) = self.bundles.reopen(token).map_err(AskError::Stage)? {
            earlier.discard().map_err(AskError::Stage)?;
        }
        let memory_bytes = u64::from(vm.spec.memory_mib).saturating_mul(MIB);
        let staging = self.bundles.stage(token, memory_bytes).map_err(AskError::Stage)?;
        let state = staging.state_file().map_err(AskError::Stage)?;
        let memory = staging.memory_file().map_err(AskError::Stage)?;
        let mut files: Vec<OwnedFd> = vec![pagemap.into(), state.into(), memory.into()];
        if pages == SavedPages::Changed {
            let list = self.dirs.create(&vm.id, names::PAGES).map_err(unopened("the list of pages"))?;
            files.push(list.into());
        }
        Ok(files)
    }
}

fn unopened(what: &str) -> impl FnOnce(io::Error) -> AskError {
    let what = what.to_owned();
    move |source| AskError::Open { what, source }
}

fn open_kvm() -> Result<OwnedFd, AskError> {
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

fn exchange(
    socket: &mut UnixStream,
    request: &Request,
    files: &[OwnedFd],
    limit: Duration,
) -> Result<Answer, AskError> {
    let failed = |source: io::Error| {
        // A read time-out of a socket shows as either, by platform.
        let late = [io::ErrorKind::WouldBlock, io::ErrorKind::TimedOut].contains(&source.kind());
        if late { AskError::TimedOut { limit } } else { AskError::Socket(source) }
    };
    let bytes = frame::encode(request).map_err(AskError::Frame)?;
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
        answer @ (Answer::Welcome(_)
        | Answer::Launched(_)
        | Answer::Done
        | Answer::Status(_)
        | Answer::Network(_)
        | Answer::Saved(_)) => Ok(answer),
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
        other @ (Refusal::HelloFirst | Refusal::WrongNonce | Refusal::StaleEpoch { .. } | Refusal::State { .. }) => {
            other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_is_told_to_all_who_wait() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let pid = child.id().cast_signed();
        let record = ProcessRecord { pid, start_ticks: process::start_ticks(pid).unwrap() };
        let pidfd = process::find(pid, record.start_ticks).unwrap().unwrap();
        let held = HostProcess::hold(record, pidfd).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(20), held.ended()).await.is_err());
        assert!(held.usage().resident_bytes.is_some());
        let other = held.clone();
        let waiting = tokio::spawn(async move { other.ended().await });
        held.kill().unwrap();
        assert_eq!(held.ended().await, ProcessEnd::Signalled(9));
        assert_eq!(waiting.await.unwrap(), ProcessEnd::Signalled(9));
        let _ = child.wait();
    }
}
