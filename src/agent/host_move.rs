//! A machine's move from one VMM process to another. Within this host: one is told to send, the other to receive, over a pair of
//! connected sockets. Memory that is a file of the process's own is mapped by the other as well, and none of it is sent;
//! of memory that is a bundle's image, which both map, only what differs is. Between hosts: this one's end of it.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use super::host_ask::exchange;
use super::host_open::{Held, open_kvm, open_pagemap, unopened};
use super::host_vmm::{HostVmm, Part, names};
use super::host_volumes::volume_socket;
use super::migration_record::WhenUnconverged;
use super::record::VmRecord;
use super::world::{AskError, ReceiveOrder, SendOrder, SentMachine};
use crate::sys::fd::connect_in_dir;
use crate::sys::process;
use crate::units::MIB;
use crate::wire::control::{
    Answer, PackedPhases, ReceiveSpec, ReceivedMemory, Request, SendPhases, SendSpec, SentPages, StreamForm,
    StreamToken,
};
use crate::wire::frame;

/// Longest pause that is aimed at while pages are sent, in milliseconds.
const PAUSE_MS_MAX: u32 = 5;

/// Rounds after which the guest is held all the same: here memory is copied faster than any guest writes it for long.
const ROUNDS_MAX: u32 = 10;

/// Time after which it is, in milliseconds.
const DEADLINE_MS: u64 = 30_000;

/// Longest wait for a machine to come: its source says when it gives up, and hangs up then.
const RECEIVE_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Longest wait for the connection between two hosts.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// Longest wait for packets to go over while the guest stands still for them.
const FORWARD_LIMIT: Duration = Duration::from_secs(1);

/// What the two ends of one move within a host know. They are joined by descriptors, so it keeps nobody out.
const TOKEN: StreamToken = StreamToken([0x68; 32]);

impl HostVmm {
    pub(super) fn move_blocking(&self, vm: &VmRecord, epoch: u64) -> Result<SendPhases, AskError> {
        // Asked of both ends first: a process that cannot send is told of before anything is begun.
        let mut source = self.conversation(vm, epoch, Part::Only)?;
        // The other one is of this agent's version, whatever the record's is.
        let next = VmRecord { wire_version: frame::VERSION, ..vm.clone() };
        let mut target = self.conversation(&next, epoch, Part::Successor)?;
        let (sending, receiving) = UnixStream::pair().map_err(AskError::Socket)?;
        let limit = self.move_limit();
        let (send, send_files) = self.to_send(vm, sending.into())?;
        let (receive, receive_files) = self.to_receive(vm, receiving.into())?;
        thread::scope(|scope| {
            let receive = move || {
                let answer = exchange(&mut target, &next, &receive, &receive_files, limit);
                // What is held of the connection would keep the other end waiting.
                drop(receive_files);
                answer
            };
            let receiving = thread::Builder::new().name("receive".to_owned()).spawn_scoped(scope, receive);
            let receiving = receiving.map_err(AskError::Socket)?;
            let sent = exchange(&mut source, vm, &send, &send_files, limit);
            drop(send_files);
            let received = receiving.join().unwrap_or(Err(AskError::Unexpected));
            match (sent, received) {
                (Ok(Answer::Sent(phases)), Ok(Answer::Launched(_))) => Ok(phases),
                // What the end that has the machine says is the better reason, unless it only heard of the other's.
                (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
                (Err(sent), Err(AskError::Refused(_) | AskError::Socket(_))) => Err(sent),
                (Err(_), Err(received)) => Err(received),
                (Ok(_), Ok(_)) => Err(AskError::Unexpected),
            }
        })
    }

    pub(super) fn take_over_blocking(&self, vm: &VmRecord, epoch: u64) -> io::Result<()> {
        let is_done = !self.dirs.has(&vm.id, &names::next(names::CONTROL));
        if !is_done {
            // Of the process before, if it lives: the packets it took before it stood still. The new one does not wait
            // for them longer than a moment.
            let before = VmRecord { process: None, ..vm.clone() };
            let asked = self.conversation(&before, epoch, Part::Only);
            let asked = asked.and_then(|socket| patient(&socket, FORWARD_LIMIT).map(|()| socket));
            let forward = Request::ForwardPackets { last: true };
            let limit = FORWARD_LIMIT;
            let forwarded = asked.and_then(|mut socket| exchange(&mut socket, &before, &forward, &[], limit));
            if let Err(error) = forwarded {
                tracing::warn!(vm = %vm.id, error = %crate::report::chain(&error), "packets that had just come may be lost");
            }
        }
        for slot in 0..vm.spec.volumes.len() {
            let name = volume_socket(vm.spec.volume_index(slot));
            self.dirs.rename(&vm.id, &names::next(&name), &name)?;
        }
        // The name by which it is told that all is done goes last.
        for name in names::OWN.iter().rev() {
            self.dirs.rename(&vm.id, &names::next(name), name)?;
        }
        Ok(())
    }

    fn move_limit(&self) -> Duration {
        Duration::from_secs(self.waits.vmm_launch_s.into())
    }

    /// A greeted conversation with one of the VM's processes.
    fn conversation(&self, vm: &VmRecord, epoch: u64, part: Part) -> Result<UnixStream, AskError> {
        let limit = self.move_limit();
        let dir = self.dirs.open(&vm.id).map_err(AskError::Socket)?;
        let mut socket = connect_in_dir(&dir, &part.name(names::CONTROL)).map_err(AskError::Socket)?;
        socket.set_read_timeout(Some(limit)).map_err(AskError::Socket)?;
        socket.set_write_timeout(Some(limit)).map_err(AskError::Socket)?;
        let hello = Request::Hello { nonce: vm.nonce, epoch };
        let Answer::Welcome(_) = exchange(&mut socket, vm, &hello, &[], limit)? else {
            return Err(AskError::Unexpected);
        };
        Ok(socket)
    }

    fn to_send(&self, vm: &VmRecord, connection: OwnedFd) -> Result<(Request, Vec<OwnedFd>), AskError> {
        let pages = if vm.spec.bundle.is_some() { SentPages::Changed } else { SentPages::None };
        let spec = SendSpec {
            token: TOKEN,
            connections: 1,
            pages,
            pause_ms_max: PAUSE_MS_MAX,
            rounds_max: ROUNDS_MAX,
            deadline_ms: DEADLINE_MS,
            force: true,
            throttle: true,
            rate_bytes_max: None,
            tls: None,
        };
        Ok((Request::Send(spec), vec![open_pagemap(vm)?, connection]))
    }

    fn to_receive(&self, vm: &VmRecord, connection: OwnedFd) -> Result<(Request, Vec<OwnedFd>), AskError> {
        let (memory, file) = match &vm.spec.bundle {
            Some(bundle) => {
                let image = self.bundles.open_for_launch(bundle).map_err(AskError::Bundle)?.memory;
                (ReceivedMemory::Image, OwnedFd::from(image))
            }
            None => (ReceivedMemory::Shared, guest_memory(vm).map_err(unopened("the VM's memory"))?),
        };
        let mut files = vec![open_kvm()?, file];
        let dir = self.dirs.open(&vm.id).map_err(AskError::Socket)?;
        let devices = (vm.spec.disks.as_slice(), vm.spec.network_limits, Held::Volumes);
        let devices = self.open_devices(vm, &dir, Part::Successor, devices, &mut files)?;
        files.push(connection);
        let memory_bytes = u64::from(vm.spec.memory_mib).saturating_mul(MIB);
        let spec = ReceiveSpec { token: TOKEN, connections: 1, memory, memory_bytes, devices, tls: None };
        Ok((Request::Receive(spec), files))
    }
}

impl HostVmm {
    pub(super) fn send_blocking(
        &self,
        vm: &VmRecord,
        epoch: u64,
        streams: Vec<TcpStream>,
        order: SendOrder,
    ) -> Result<SentMachine, AskError> {
        let mut source = self.conversation(vm, epoch, Part::Only)?;
        let SendOrder { terms, policy, form, is_base_there, .. } = order;
        let spec = SendSpec {
            token: terms.token,
            connections: policy.connections,
            pages: if is_base_there { SentPages::Changed } else { SentPages::All },
            pause_ms_max: policy.pause_ms_max,
            rounds_max: policy.rounds_max,
            deadline_ms: u64::from(policy.deadline_s) * 1000,
            force: policy.unconverged == WhenUnconverged::Force,
            throttle: policy.throttle,
            rate_bytes_max: policy.rate_bytes_max,
            tls: Some(terms.tls),
        };
        let mut files = vec![open_pagemap(vm)?];
        files.extend(streams.into_iter().map(OwnedFd::from));
        // A round that has begun is ended, however slow it is: silence ends it, or whoever cancels.
        let limit = RECEIVE_LIMIT + self.move_limit();
        patient(&source, limit)?;
        // A VMM of the version before has one form.
        let request = if form == StreamForm::PLAIN { Request::Send(spec) } else { Request::SendIn { spec, form } };
        let answer = exchange(&mut source, vm, &request, &files, limit)?;
        if let Answer::Sent(phases) = answer {
            return Ok(SentMachine { phases, packed: PackedPhases::default() });
        }
        let Answer::SentIn { phases, packed } = answer else { return Err(AskError::Unexpected) };
        Ok(SentMachine { phases, packed })
    }

    pub(super) fn receive_blocking(
        &self,
        vm: &VmRecord,
        epoch: u64,
        streams: Vec<TcpStream>,
        order: ReceiveOrder,
    ) -> Result<Answer, AskError> {
        let mut target = self.conversation(vm, epoch, Part::Only)?;
        let mut files = vec![open_kvm()?];
        let ReceiveOrder { terms, connections, on_base, .. } = order;
        let memory = match vm.spec.bundle.as_ref().filter(|_| on_base) {
            Some(bundle) => {
                files.push(self.bundles.open_for_launch(bundle).map_err(AskError::Bundle)?.memory.into());
                ReceivedMemory::Image
            }
            None => ReceivedMemory::New,
        };
        let dir = self.dirs.open(&vm.id).map_err(AskError::Socket)?;
        let devices = (vm.spec.disks.as_slice(), vm.spec.network_limits, Held::Volumes);
        let devices = self.open_devices(vm, &dir, Part::Only, devices, &mut files)?;
        files.extend(streams.into_iter().map(OwnedFd::from));
        let memory_bytes = u64::from(vm.spec.memory_mib).saturating_mul(MIB);
        let (token, tls) = (terms.token, Some(terms.tls));
        let spec = ReceiveSpec { token, connections, memory, memory_bytes, devices, tls };
        let limit = RECEIVE_LIMIT + self.move_limit();
        patient(&target, limit)?;
        exchange(&mut target, vm, &Request::Receive(spec), &files, limit)
    }

    pub(super) fn forward_blocking(&self, vm: &VmRecord, epoch: u64) -> Result<u64, AskError> {
        let mut source = self.conversation(vm, epoch, Part::Only)?;
        let mut forward = |last| {
            let forward = Request::ForwardPackets { last };
            let Answer::Forwarded { packets } = exchange(&mut source, vm, &forward, &[], self.move_limit())? else {
                return Err(AskError::Unexpected);
            };
            Ok(packets)
        };
        // What was on its way to the taps when the routes changed has come to them by the second time.
        Ok(forward(false)? + forward(true)?)
    }
}

/// Waits so long for the next answer.
fn patient(socket: &UnixStream, limit: Duration) -> Result<(), AskError> {
    socket.set_read_timeout(Some(limit)).map_err(AskError::Socket)
}

/// So many connections to where a machine is waited for.
pub(super) async fn connect_to(to: SocketAddr, connections: u8) -> io::Result<Vec<TcpStream>> {
    let connecting = async {
        let mut streams = Vec::new();
        for _ in 0..connections {
            streams.push(blocking(tokio::net::TcpStream::connect(to).await?)?);
        }
        Ok(streams)
    };
    tokio::time::timeout(CONNECT_LIMIT, connecting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// So many connections from this host; those of others are closed.
pub(super) async fn accept_from(
    listener: &tokio::net::TcpListener,
    from: IpAddr,
    connections: u8,
) -> io::Result<Vec<TcpStream>> {
    let accepting = async {
        let mut streams = Vec::new();
        while streams.len() < usize::from(connections) {
            let (stream, peer) = listener.accept().await?;
            if peer.ip().to_canonical() == from.to_canonical() {
                streams.push(blocking(stream)?);
            }
        }
        Ok(streams)
    };
    tokio::time::timeout(CONNECT_LIMIT, accepting).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

fn blocking(stream: tokio::net::TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// The memory file of the VM's process.
fn guest_memory(vm: &VmRecord) -> io::Result<OwnedFd> {
    let gone = || io::Error::new(io::ErrorKind::NotFound, "its process has none");
    let process = vm.process.ok_or_else(gone)?;
    let pidfd = process::find(process.pid, process.start_ticks)?.ok_or_else(gone)?;
    process::copy_guest_memory(process.pid, &pidfd)?.ok_or_else(gone)
}
