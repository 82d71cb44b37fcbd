//! The main thread: waits for agents, console clients and the machine's own end, and does one thing at a time.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::balloon;
use super::connection::{Connection, ReceiveError};
use super::console::{Console, Interest};
use super::fill::FillThread;
use super::launch::{Launch, LaunchRequestError, Restore, SavedMachine};
use super::receive::StoppedBetween;
use super::rings::Rings;
use super::save::{self, SaveFiles, SealFiles};
use super::send::SendThread;
use super::session::Ownership;
use super::{VmmError, bounded};
use super::{log, seccomp, volumes};
use crate::clock::{Clock, Monotonic, SystemClock};
use crate::machine::virtio::{FlowCounts, NetCounts};
use crate::machine::{
    self, Entry, GuestTime, Machine, MachineEvent, MachineSpec, Phases, RamBacking, ReplaceTapError, SealKey, Sealed,
    VolumeChange,
};
use crate::report;
use crate::units::Bytes;
use crate::wire::control::{
    Answer, FlowStatus, InterfaceStatus, LaunchPhases, LaunchSpec, MachineState, Nonce, Request, SavePhases,
    SavedPages, Status,
};
use crate::wire::last_words::LastWords;
use crate::wire::refusal::Refusal;

mod copying;
mod filling;
mod moving;
mod refusals;

use copying::Copying;
use moving::{Arriving, PACKETS_MAX, Sending};
use refusals::{bad_request, host, refusal_of, refusal_to_save, refusal_to_unseal};

/// Most agents connected at once: one owner, one that takes over, and some that are being refused.
const CONNECTIONS_MAX: usize = 8;

/// Events taken from the kernel at a time.
const EVENTS_PER_WAIT: usize = 16;

/// A machine with its console.
struct Guest {
    machine: Machine,
    console: Console,
    state: MachineState,
    /// When it was first resumed.
    resumed: Option<Monotonic>,
    /// The thread that could send it elsewhere.
    sender: SendThread,
    /// The thread that fills its memory, if it was not all here.
    fill: Option<FillThread>,
    /// When it stopped, if it came from another VMM and has not run here. Its clocks are to show how long that was: its
    /// wall clock stays right.
    arrived: Option<StoppedBetween>,
    /// When packets from where it was before are waited for no longer.
    door_opens: Option<Monotonic>,
}

/// The loop.
pub(super) struct EventLoop {
    epoll: Epoll,
    control: UnixListener,
    ownership: Ownership,
    connections: BTreeMap<RawFd, Connection>,
    /// The connection whose request is answered later.
    waiting: Option<Connection>,
    guest: Option<Guest>,
    sending: Option<Sending>,
    copying: Option<Copying>,
    arriving: Option<Arriving>,
    rings: Rings,
    clock: Arc<SystemClock>,
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> VmmError {
    move |source| VmmError::Loop { what, source }
}

impl EventLoop {
    /// A loop that serves `control`; the disks of its machine are to have these rings.
    pub(super) fn new(control: UnixListener, nonce: Nonce, rings: Rings) -> Result<Self, VmmError> {
        control.set_nonblocking(true).map_err(failed("prepare the control socket"))?;
        let this = Self {
            epoll: Epoll::new().map_err(failed("make an epoll"))?,
            control,
            ownership: Ownership::new(nonce),
            connections: BTreeMap::new(),
            waiting: None,
            guest: None,
            sending: None,
            copying: None,
            arriving: None,
            rings,
            clock: Arc::new(SystemClock::new()),
        };
        this.watch(this.control.as_raw_fd(), EventSet::IN).map_err(failed("wait for agents"))?;
        Ok(this)
    }

    fn watch(&self, number: RawFd, events: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, number, EpollEvent::new(events, number.cast_unsigned().into()))
    }

    fn watch_again(&self, number: RawFd, interest: Interest) {
        let events = match interest {
            Interest::Input => EventSet::IN,
            Interest::InputAndRoom => EventSet::IN | EventSet::OUT,
            Interest::Gone => return,
        };
        // The descriptor is open and was added: the kernel has nothing to refuse.
        let _ =
            self.epoll.ctl(ControlOperation::Modify, number, EpollEvent::new(events, number.cast_unsigned().into()));
    }

    /// Serves until the machine or the agent ends it.
    pub(super) fn run(mut self) -> Result<LastWords, VmmError> {
        let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
        loop {
            let count = match self.epoll.wait(self.patience_ms(), &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed("wait for events")(error)),
            };
            self.keep_time();
            for event in &events[..count] {
                if let Some(words) = self.serve(event.fd(), event.event_set()) {
                    if let Some(guest) = self.guest.take() {
                        guest.end();
                    }
                    return Ok(words);
                }
            }
        }
    }

    /// How long to wait for events, as epoll_wait(2) has it.
    fn patience_ms(&self) -> i32 {
        let Some(due) = self.due() else { return -1 };
        // Rounded up: what is due has to be due when the wait is over.
        let left = due.since(self.clock.monotonic()).as_micros().div_ceil(1000);
        i32::try_from(left).unwrap_or(i32::MAX)
    }

    /// Serves one event; gives last words when it is the end.
    fn serve(&mut self, number: RawFd, events: EventSet) -> Option<LastWords> {
        if number == self.control.as_raw_fd() {
            self.accept_agent();
            return None;
        }
        if self.connections.contains_key(&number) {
            return self.serve_agent(number);
        }
        if self.waiting.as_ref().is_some_and(|waiting| waiting.number() == number) {
            // It hung up, or asks before it was answered: nobody waits for what it asked any more.
            self.stop_waiting();
            return None;
        }
        if self.is_arriving(number) {
            self.hear_of_arrival();
            return None;
        }
        if self.guest.as_ref().is_some_and(|guest| guest.sender.bell().as_raw_fd() == number) {
            self.hear_of_send();
            return None;
        }
        let guest = self.guest.as_mut()?;
        if number == guest.machine.events().as_fd().as_raw_fd() {
            return guest.machine.events().take().map(end_of);
        }
        if number == guest.console.listener().as_raw_fd() {
            if let Some(client) = guest.console.accept() {
                let interest = guest.console.send_to(client);
                if interest != Interest::Gone && self.watch(client, EventSet::IN).is_ok() {
                    self.watch_again(client, interest);
                }
            }
        } else if number == guest.console.news().as_raw_fd() {
            for (client, interest) in guest.console.send_news() {
                self.watch_again(client, interest);
            }
        } else {
            let machine = &guest.machine;
            let mut interest = Interest::Input;
            if events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
                interest = guest.console.receive_from(number, |bytes| machine.console_input(bytes));
            }
            if interest != Interest::Gone {
                interest = guest.console.send_to(number);
            }
            self.watch_again(number, interest);
        }
        None
    }

    fn accept_agent(&mut self) {
        // A connection that cannot be taken is hung up on: the agent tries again.
        let Ok((stream, _)) = self.control.accept() else { return };
        let number = stream.as_raw_fd();
        let Ok(connection) = Connection::new(stream) else { return };
        if self.connections.len() < CONNECTIONS_MAX && self.watch(number, EventSet::IN).is_ok() {
            self.connections.insert(number, connection);
        }
    }

    fn serve_agent(&mut self, number: RawFd) -> Option<LastWords> {
        let mut connection = self.connections.remove(&number)?;
        let (request, descriptors) = match connection.receive() {
            Ok(received) => received,
            Err(ReceiveError::HungUp) => return None,
            Err(error) => {
                log::say(format_args!("control connection ended: {}", report::chain(&error)));
                return None;
            }
        };
        let stop = matches!(request, Request::Stop);
        let Some(answer) = self.answer(&mut connection, request, descriptors) else {
            self.waiting = Some(connection);
            return None;
        };
        let refused_hello = connection.epoch.is_none();
        let stop = stop && !matches!(answer, Answer::Refused(_));
        if connection.answer(&answer).is_ok() && !refused_hello {
            self.connections.insert(number, connection);
        }
        stop.then_some(LastWords::Stopped)
    }

    /// The answer; `None` if it comes later.
    fn answer(&mut self, connection: &mut Connection, request: Request, descriptors: Vec<OwnedFd>) -> Option<Answer> {
        let result = if let Request::Hello { nonce, epoch } = request {
            self.hello(connection, nonce, epoch).map(Some)
        } else {
            self.ownership.admits(connection.epoch).and_then(|()| self.carry_out(request, descriptors))
        };
        result.unwrap_or_else(|refusal| Some(Answer::Refused(refusal)))
    }

    /// Answers the connection that waits; false if it does not, or cannot be answered.
    fn answer_waiting(&mut self, answer: &Answer) -> bool {
        let Some(mut connection) = self.waiting.take() else { return false };
        let answered = connection.answer(answer).is_ok();
        if answered {
            self.connections.insert(connection.number(), connection);
        }
        answered
    }

    /// Nobody waits for what takes long any more: it is given up.
    fn stop_waiting(&mut self) {
        self.waiting = None;
        self.cancel_send();
        self.cancel_copy();
        // Its threads end with their connections.
        drop(self.take_arriving());
    }

    fn hello(&mut self, connection: &mut Connection, nonce: Nonce, epoch: u64) -> Result<Answer, Refusal> {
        self.ownership.hello(nonce, epoch)?;
        connection.epoch = Some(epoch);
        // Only the newest epoch is served, on as many connections as it makes; closing a socket also ends its watch.
        self.connections.retain(|_, other| other.epoch.is_none_or(|other| other >= epoch));
        if self.waiting.as_ref().is_some_and(|waiting| waiting.epoch.is_some_and(|other| other < epoch)) {
            self.stop_waiting();
        }
        Ok(Answer::Welcome(self.status()))
    }

    fn carry_out(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Option<Answer>, Refusal> {
        let answer = match request {
            // Dealt with before.
            Request::Hello { .. } => Err(Refusal::HelloFirst),
            // One answer that comes later at a time.
            Request::Send(_)
            | Request::SendIn { .. }
            | Request::Receive(_)
            | Request::ForwardPackets { .. }
            | Request::CopyMemory(_)
            | Request::SaveRest
                if self.waiting.is_some() =>
            {
                Err(Refusal::Sending)
            }
            Request::Send(spec) => return self.send(spec, None, descriptors).map(|()| None),
            Request::SendIn { spec, form } => return self.send(spec, Some(form), descriptors).map(|()| None),
            Request::Receive(spec) => return self.receive(&spec, descriptors).map(|()| None),
            Request::ForwardPackets { last } => return self.forward_packets(last).map(|()| None),
            Request::CopyMemory(spec) => return self.copy_memory(spec, descriptors).map(|()| None),
            Request::SaveRest => return self.save_rest(descriptors).map(|()| None),
            Request::Prefault(spec) => self.prefault(spec).map(|()| Answer::Done),
            Request::SendProgress => Ok(Answer::Sending(self.send_progress())),
            Request::CancelSend => {
                self.cancel_send();
                self.cancel_copy();
                Ok(Answer::Done)
            }
            Request::Launch(spec) => self.launch(spec, descriptors).map(Answer::Launched),
            Request::Pause => {
                self.not_sending()?;
                self.change(MachineState::Running, MachineState::Paused)
            }
            Request::Resume => {
                self.forget_send()?;
                let resumed = self.change(MachineState::Paused, MachineState::Running)?;
                self.forget_rested_copy();
                Ok(resumed)
            }
            Request::Status => Ok(Answer::Status(self.status())),
            Request::Stop => Ok(Answer::Done),
            Request::Network => Ok(Answer::Network(self.guest.as_ref().map_or_else(Vec::new, interfaces))),
            Request::ReplaceTap { index } => self.replace_tap(index, descriptors),
            Request::Restore(spec) => self.restore(Restore::new(&spec, descriptors)).map(Answer::Launched),
            Request::RestoreFilling(spec) => self.restore(Restore::filling(&spec, descriptors)).map(Answer::Launched),
            Request::Save { pages } => self.save(pages, descriptors).map(Answer::Saved),
            Request::Seal { pages, key } => self.seal(pages, SealKey(key.0), descriptors).map(Answer::Saved),
            Request::Unseal(spec) => self.restore(Restore::sealed(&spec, descriptors)).map(Answer::Launched),
            Request::AttachVolume(spec) => {
                let (index, change) = volumes::attach(spec);
                self.change_volume(index, change)
            }
            Request::DetachVolume { index, force } => self.change_volume(index, VolumeChange::Detach { force }),
            Request::ResizeVolume { index, bytes } => self.change_volume(index, VolumeChange::Resize { bytes }),
            Request::LimitVolume { index, iops, bytes_per_s } => {
                self.change_volume(index, volumes::limit(iops, bytes_per_s))
            }
            Request::Volumes => {
                let machine = self.guest.as_ref().map(|guest| &guest.machine);
                Ok(Answer::Volumes(machine.map_or_else(Vec::new, volumes::status)))
            }
            Request::Balloon { target_bytes } => {
                let guest = self.guest.as_ref().ok_or(Refusal::State { state: MachineState::Empty })?;
                balloon::answer(&guest.machine, target_bytes).map(Answer::Balloon)
            }
        };
        answer.map(Some)
    }

    /// Refuses to make a machine where there is one, or one is on its way.
    fn must_be_empty(&self) -> Result<(), Refusal> {
        match &self.guest {
            Some(guest) => Err(Refusal::State { state: guest.state }),
            None if self.arriving.is_some() => Err(Refusal::State { state: MachineState::Empty }),
            None => Ok(()),
        }
    }

    /// The machine, if it is there and stands still.
    fn paused(&self) -> Result<&Machine, Refusal> {
        self.not_sending()?;
        match &self.guest {
            Some(guest) if guest.state == MachineState::Paused => Ok(&guest.machine),
            Some(guest) => Err(Refusal::State { state: guest.state }),
            None => Err(Refusal::State { state: MachineState::Empty }),
        }
    }

    fn save(&self, pages: SavedPages, descriptors: Vec<OwnedFd>) -> Result<SavePhases, Refusal> {
        let machine = self.paused()?;
        self.all_there()?;
        let files = SaveFiles::new(pages, descriptors).map_err(|error| bad_request(&error))?;
        save::save(machine, pages, files, self.clock.as_ref()).map_err(|error| refusal_to_save(&error))
    }

    fn seal(&self, pages: SavedPages, key: SealKey, descriptors: Vec<OwnedFd>) -> Result<SavePhases, Refusal> {
        let machine = self.paused()?;
        self.all_there()?;
        let files = SealFiles::new(descriptors).map_err(|error| bad_request(&error))?;
        save::seal(machine, (pages, key), files, self.clock.as_ref()).map_err(|error| refusal_to_save(&error))
    }

    fn replace_tap(&mut self, index: u8, mut descriptors: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        let guest = self.guest.as_ref().ok_or(Refusal::State { state: MachineState::Empty })?;
        let bad = |reason: String| Refusal::BadRequest { reason };
        let (tap, 0) = (descriptors.pop(), descriptors.len()) else {
            return Err(bad(format!("{} descriptors came with the request, it names 1", descriptors.len() + 1)));
        };
        let tap = tap.ok_or_else(|| bad("no descriptor came with the request, it names 1".to_owned()))?;
        let replaced = guest.machine.replace_tap(index, tap.into());
        replaced.map(|()| Answer::Done).map_err(|error| match error {
            ReplaceTapError::NoInterface { .. } => bad(error.to_string()),
            ReplaceTapError::Host { .. } => host(&error),
        })
    }

    fn change_volume(&self, index: u8, change: VolumeChange) -> Result<Answer, Refusal> {
        let guest = self.guest.as_ref().ok_or(Refusal::State { state: MachineState::Empty })?;
        // From where it is sent on, what is attached is what the other end was told.
        self.not_sending()?;
        volumes::change(&guest.machine, index, change).map(|()| Answer::Done)
    }

    fn change(&mut self, from: MachineState, to: MachineState) -> Result<Answer, Refusal> {
        let guest = self.guest.as_mut().ok_or(Refusal::State { state: MachineState::Empty })?;
        if guest.state == to {
            return Ok(Answer::Done);
        }
        if guest.state != from {
            return Err(Refusal::State { state: guest.state });
        }
        if to == MachineState::Running {
            guest.resumed.get_or_insert_with(|| self.clock.monotonic());
            let time = guest.arrived.map_or(GuestTime::Stands, |stopped| stopped.until(self.clock.monotonic()));
            guest.machine.resume_with(time).map_err(|error| host(&error))?;
            if guest.arrived.take().is_some() {
                guest.door_opens = Some(self.clock.monotonic().after(PACKETS_MAX));
            }
        } else {
            guest.machine.pause().map_err(|error| host(&error))?;
        }
        guest.state = to;
        Ok(Answer::Done)
    }

    fn launch(&mut self, spec: LaunchSpec, descriptors: Vec<OwnedFd>) -> Result<LaunchPhases, Refusal> {
        self.must_be_empty()?;
        let launch = Launch::new(spec, descriptors);
        let mut launch = launch.map_err(|error| Refusal::BadRequest { reason: error.to_string() })?;
        self.rings.hand_out(&mut launch.devices);
        let console = Console::new(launch.console_file, launch.console_listener);
        let (console, output) = console.map_err(|error| host(&error))?;
        let spec = MachineSpec {
            vcpus: launch.spec.vcpus,
            memory: Bytes(launch.spec.memory_bytes),
            backing: RamBacking::SharedMemfd,
            kernel: launch.kernel,
            initrd: launch.initrd,
            command_line: launch.spec.command_line,
            entry: Entry::Linux64,
            devices: launch.devices,
            console: Box::new(output),
            clock: Arc::clone(&self.clock) as Arc<dyn Clock>,
        };
        let machine = Machine::build(launch.kvm, spec).map_err(|error| refusal_of(&error))?;
        self.adopt_guest(machine, console, None)
    }

    /// Builds a paused machine from saved state.
    fn restore(&mut self, request: Result<Restore, LaunchRequestError>) -> Result<LaunchPhases, Refusal> {
        self.must_be_empty()?;
        let begun = self.clock.monotonic();
        let mut restore = request.map_err(|error| bad_request(&error))?;
        match restore.from {
            // Where memory may be missing, a disk's thread waits for it, and not the one that serves all devices.
            SavedMachine::Filling { .. } => self.rings = Rings::default(),
            SavedMachine::Bundle { .. } | SavedMachine::Sealed { .. } => self.rings.hand_out(&mut restore.devices),
        }
        let bad = |reason| Refusal::BadState { reason: bounded(reason) };
        // Declared before the machine: it is the last to look at its memory if nothing comes of it.
        let mut fill = None;
        let (sections, backing, sealed) = match restore.from {
            SavedMachine::Bundle { state, memory } => (save::read_state(state), RamBacking::PrivateFile(memory), None),
            SavedMachine::Filling { state, memory } => {
                let (thread, ram) = filling::begin(memory, Bytes(restore.memory_bytes))?;
                fill = Some(thread);
                (save::read_state(state), RamBacking::Mapped(ram), None)
            }
            SavedMachine::Sealed { file, key, memory } => {
                let opened = Sealed::open(key, file).map_err(|error| refusal_to_unseal(&error))?;
                let backing = memory.map_or(RamBacking::SharedMemfd, RamBacking::PrivateFile);
                (save::decode_state(&opened.state), backing, Some(opened))
            }
        };
        let sections = sections.map_err(|error| bad(report::chain(&error)))?;
        let read_ns = nanos(begun, self.clock.monotonic());
        let console = Console::new(restore.console_file, restore.console_listener);
        let (console, output) = console.map_err(|error| host(&error))?;
        let from = machine::RestoreSpec {
            backing,
            sealed,
            devices: restore.devices,
            console: Box::new(output),
            clock: Arc::clone(&self.clock) as Arc<dyn Clock>,
        };
        let machine = Machine::restore(restore.kvm, from, sections).map_err(|error| refusal_of(&error))?;
        let found = machine.shape().memory;
        if found != Bytes(restore.memory_bytes) {
            return Err(bad(format!("the saved machine has {found} of memory, not {}", Bytes(restore.memory_bytes))));
        }
        let phases = self.adopt_guest(machine, console, None)?;
        if let Some(guest) = self.guest.as_mut() {
            guest.fill = fill;
        }
        Ok(LaunchPhases { load_ns: read_ns, ..phases })
    }

    /// From here on the machine's and its console's events are served.
    fn adopt_guest(
        &mut self,
        machine: Machine,
        console: Console,
        arrived: Option<StoppedBetween>,
    ) -> Result<LaunchPhases, Refusal> {
        let sender = SendThread::start(*self.clock).map_err(|error| host(&error))?;
        for number in [
            machine.events().as_fd().as_raw_fd(),
            console.listener().as_raw_fd(),
            console.news().as_raw_fd(),
            sender.bell().as_raw_fd(),
        ] {
            self.watch(number, EventSet::IN).map_err(|error| host(&error))?;
        }
        // Nothing of the guest has run. From here on this thread makes no machine, no thread, no file.
        seccomp::narrow_control().map_err(|error| host(&error))?;
        let phases = phases_of(machine.phases());
        self.guest = Some(Guest {
            machine,
            console,
            state: MachineState::Paused,
            resumed: None,
            sender,
            fill: None,
            arrived,
            door_opens: None,
        });
        Ok(phases)
    }

    fn status(&self) -> Status {
        let Some(guest) = &self.guest else {
            return Status {
                state: MachineState::Empty,
                first_entry_ns: 0,
                memory_bytes: 0,
                stray_accesses: 0,
                console_bytes: 0,
                guest_memory_host_address: 0,
            };
        };
        let counters = guest.machine.counters();
        let regions = guest.machine.guest_regions();
        let first_entry = guest.machine.phases().first_entry.zip(guest.resumed);
        Status {
            state: guest.state,
            first_entry_ns: first_entry.map_or(0, |(entry, resumed)| nanos(resumed, entry)),
            memory_bytes: regions.iter().map(|region| region.bytes.0).sum(),
            stray_accesses: counters.unknown_ports + counters.unknown_mmio,
            console_bytes: guest.console.written(),
            guest_memory_host_address: regions.first().map_or(0, |region| region.host_address as u64),
        }
    }
}

/// What passed the guest's network interfaces.
fn interfaces(guest: &Guest) -> Vec<InterfaceStatus> {
    let flow = |counts: FlowCounts| {
        let FlowCounts { frames, bytes, dropped, throttled } = counts;
        FlowStatus { frames, bytes, dropped, throttled }
    };
    let counts = guest.machine.network().into_iter();
    counts
        .map(|(index, NetCounts { link_up, rx, tx })| InterfaceStatus { index, link_up, rx: flow(rx), tx: flow(tx) })
        .collect()
}

fn nanos(from: Monotonic, to: Monotonic) -> u64 {
    u64::try_from(to.since(from).as_nanos()).unwrap_or(u64::MAX)
}

fn phases_of(phases: Phases) -> LaunchPhases {
    let loaded = phases.kernel_loaded.unwrap_or(phases.memory_ready);
    LaunchPhases {
        vm_ns: nanos(phases.started, phases.memory_ready),
        load_ns: nanos(phases.memory_ready, loaded),
        devices_ns: nanos(loaded, phases.built),
    }
}

fn end_of(event: MachineEvent) -> LastWords {
    match event {
        MachineEvent::GuestPanic => LastWords::GuestPanic,
        MachineEvent::PowerOff => LastWords::GuestPoweredOff,
        MachineEvent::Reboot(_) => LastWords::GuestRebooted,
        MachineEvent::TripleFault { vcpu } => LastWords::GuestFault { detail: format!("triple fault of vCPU {vcpu}") },
        MachineEvent::InternalError { vcpu, error } => {
            LastWords::GuestFault { detail: bounded(format!("KVM cannot go on with vCPU {vcpu}: {error}")) }
        }
        MachineEvent::VcpuFailed { vcpu, failure } => {
            LastWords::VmmError { detail: bounded(format!("vCPU {vcpu} stopped: {failure}")) }
        }
    }
}
