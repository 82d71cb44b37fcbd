//! The first thread's part of a machine's move to another VMM, or from one: it owns the machine, so it is the one that
//! holds the guest, collects its state, makes a machine of what came, and answers the agent. See [`crate::vmm::send`]
//! and [`crate::vmm::receive`] for the threads that move the bytes.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{EventLoop, bad_request, host, nanos, refusal_of};
use crate::clock::{Clock, Monotonic};
use crate::machine::layout::Slot;
use crate::machine::virtio::Backend;
use crate::machine::{ConsoleSink, Machine, RamBacking, RestoreSpec, ram};
use crate::report;
use crate::saved::codec;
use crate::units::Bytes;
use crate::vmm::bounded;
use crate::vmm::console::Console;
use crate::vmm::launch::Arrival as ArrivalFiles;
use crate::vmm::receive::{Arrival, Receiving, StoppedBetween};
use crate::vmm::save;
use crate::vmm::send::{Job, News, Outgoing, SendError};
use crate::wire::control::{
    Answer, LaunchPhases, MachineState, PackedPhases, ReceiveSpec, SendPhase, SendPhases, SendProgress, SendSpec,
    StreamForm,
};
use crate::wire::refusal::Refusal;

/// One turn of vCPUs that are slowed down: they rest for a part of each.
const THROTTLE_PERIOD: Duration = Duration::from_millis(20);

/// How long a machine that goes on here waits for packets from where it was, before it takes those that came here.
pub(super) const PACKETS_MAX: Duration = Duration::from_secs(1);

/// A machine that is being sent.
pub(super) struct Sending {
    /// Whether its guest ran when that began: then it goes on if nothing comes of it.
    ran: bool,
    /// Whether the form of its stream was named: then the answer has more.
    names_form: bool,
    /// When it was held, and how long that and collecting its state took.
    held: Option<Held>,
    /// Why the state could not be collected.
    failed: Option<String>,
    /// Share of the time in which its vCPUs run, in percent.
    share: u8,
    /// When they rest next.
    rests: Monotonic,
    /// Whether the agent was told that the machine stands ready at the other end: from there on it alone decides.
    answered: bool,
}

struct Held {
    since: Monotonic,
    pause_ns: u64,
    collect_ns: u64,
}

/// A machine on its way here.
pub(super) struct Arriving {
    receiving: Receiving,
    kvm: File,
    devices: Vec<(Slot, Backend)>,
    console: Console,
    output: ConsoleSink,
    memory: Bytes,
}

impl EventLoop {
    /// Refuses what must not happen to a machine that is being sent, or whose memory is being copied.
    pub(super) fn not_sending(&self) -> Result<(), Refusal> {
        if self.sending.is_some() || self.is_copying() { Err(Refusal::Sending) } else { Ok(()) }
    }

    /// Begins a send, in a form that is named or that every other end knows; the answer comes later.
    pub(super) fn send(
        &mut self,
        spec: SendSpec,
        form: Option<StreamForm>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), Refusal> {
        self.not_sending()?;
        self.all_there()?;
        self.forget_copy();
        let guest = self.guest.as_ref().ok_or(Refusal::State { state: MachineState::Empty })?;
        let (names_form, form) = (form.is_some(), form.unwrap_or(StreamForm::PLAIN));
        Outgoing::check(&spec, form, descriptors.len()).map_err(|reason| Refusal::BadRequest { reason })?;
        let mut sockets = descriptors;
        let pagemap = File::from(sockets.remove(0));
        let ran = guest.state == MachineState::Running;
        let (ram, dirty) = (guest.machine.ram().clone(), guest.machine.dirty().clone());
        guest.sender.tell(Job::Send(Box::new(Outgoing { sockets, spec, form, pagemap, ram, dirty, runs: ran })));
        let rests = self.clock.monotonic();
        self.sending = Some(Sending { ran, names_form, held: None, failed: None, share: 100, rests, answered: false });
        Ok(())
    }

    /// Gives up a send. One that was answered is forgotten: the machine stays here, as it is.
    pub(super) fn cancel_send(&mut self) {
        match (&self.guest, &self.sending) {
            (Some(guest), Some(Sending { answered: false, .. })) => guest.sender.tell(Job::Cancel),
            (Some(guest), Some(Sending { answered: true, .. })) => {
                guest.sender.tell(Job::Forget);
                self.sending = None;
            }
            (_, _) => {}
        }
    }

    /// How far a send is, or a copy of memory. It is one as long as this thread knows of it, also when the other one has given it up already.
    pub(super) fn send_progress(&self) -> SendProgress {
        let (Some(guest), Some(_)) = (&self.guest, &self.sending) else {
            let phase = if self.is_copying() { SendPhase::Copying } else { SendPhase::None };
            return SendProgress { phase, ..SendProgress::default() };
        };
        let progress = guest.sender.progress();
        let phase = if progress.phase == SendPhase::None { SendPhase::Critical } else { progress.phase };
        SendProgress { phase, ..progress }
    }

    /// Whether the agent may let the machine go on here: always, but not while it is being sent.
    pub(super) fn forget_send(&mut self) -> Result<(), Refusal> {
        match (&self.guest, &self.sending) {
            (_, None) if self.is_resting() => Err(Refusal::Sending),
            (_, None) => Ok(()),
            (Some(guest), Some(Sending { answered: true, .. })) => {
                guest.sender.tell(Job::Forget);
                self.sending = None;
                Ok(())
            }
            (_, Some(_)) => Err(Refusal::Sending),
        }
    }

    /// What the sending thread has come to.
    pub(super) fn hear_of_send(&mut self) {
        while let Some(news) = self.guest.as_ref().and_then(|guest| guest.sender.news()) {
            match news {
                News::Throttle(share) => {
                    if let Some(sending) = self.sending.as_mut() {
                        (sending.share, sending.rests) = (share, self.clock.monotonic());
                    }
                }
                News::Converged => self.hold_and_collect(),
                News::Forwarded(Ok(packets)) => {
                    self.answer_waiting(&Answer::Forwarded { packets });
                }
                News::Forwarded(Err(error)) => {
                    let reason = bounded(report::chain(&error));
                    self.answer_waiting(&Answer::Refused(Refusal::Stream { reason }));
                }
                News::Sent(phases, packed) => self.sent(phases, packed),
                News::Failed(error) => self.send_failed(&error),
                News::Copied(result) => self.copied(result),
                News::Rested(result) => self.rested(result),
            }
        }
    }

    /// Holds the guest, has the last pages sent, and collects the state meanwhile.
    fn hold_and_collect(&mut self) {
        let (Some(guest), Some(sending)) = (self.guest.as_mut(), self.sending.as_mut()) else { return };
        let since = self.clock.monotonic();
        sending.share = 100;
        if sending.ran {
            if let Err(error) = guest.machine.pause() {
                sending.failed = Some(report::chain(&error));
                return guest.sender.tell(Job::Cancel);
            }
            guest.state = MachineState::Paused;
        }
        let paused = self.clock.monotonic();
        guest.sender.tell(Job::Held);
        let collected = guest.machine.save().map_err(|error| report::chain(&error));
        let encoded = collected.and_then(|sections| codec::to_bytes(&sections).map_err(|error| report::chain(&error)));
        let held = Held { since, pause_ns: nanos(since, paused), collect_ns: nanos(paused, self.clock.monotonic()) };
        sending.held = Some(held);
        match encoded {
            Ok(state) => guest.sender.tell(Job::State(state)),
            Err(reason) => {
                sending.failed = Some(reason);
                guest.sender.tell(Job::Cancel);
            }
        }
    }

    fn sent(&mut self, phases: SendPhases, packed: PackedPhases) {
        let (Some(sending), now) = (self.sending.as_mut(), self.clock.monotonic()) else { return };
        let held = sending.held.as_ref();
        let phases = SendPhases {
            pause_ns: held.map_or(0, |held| held.pause_ns),
            collect_ns: held.map_or(0, |held| held.collect_ns),
            held_ns: held.map_or(0, |held| nanos(held.since, now)),
            ..phases
        };
        sending.answered = true;
        // An agent that did not get the answer has decided nothing, and cannot any more.
        let answer = if sending.names_form { Answer::SentIn { phases, packed } } else { Answer::Sent(phases) };
        if !self.answer_waiting(&answer) {
            self.send_failed(&SendError::Cancelled);
        }
    }

    /// The guest goes on as if nothing had been.
    fn send_failed(&mut self, error: &SendError) {
        let Some(sending) = self.sending.take() else { return };
        let mut reason = sending.failed.unwrap_or_else(|| report::chain(error));
        if let Some(guest) = self.guest.as_mut() {
            guest.sender.tell(Job::Forget);
            if sending.ran && guest.state == MachineState::Paused {
                match guest.machine.resume() {
                    Ok(()) => guest.state = MachineState::Running,
                    Err(error) => reason = format!("{reason}; the guest does not go on: {}", report::chain(&error)),
                }
            }
        }
        let cancelled = matches!(error, SendError::Cancelled) && reason == report::chain(error);
        let refusal = if cancelled { Refusal::Cancelled } else { Refusal::Stream { reason: bounded(reason) } };
        self.answer_waiting(&Answer::Refused(refusal));
    }

    /// Sends the packets that wait for a machine that stands ready at the other end; the answer comes later.
    pub(super) fn forward_packets(&mut self, last: bool) -> Result<(), Refusal> {
        match (&self.guest, &self.sending) {
            (Some(guest), Some(Sending { answered: true, .. })) => {
                guest.sender.tell(Job::Packets { door: guest.machine.packets(), last });
                Ok(())
            }
            (Some(guest), _) => Err(Refusal::State { state: guest.state }),
            (None, _) => Err(Refusal::State { state: MachineState::Empty }),
        }
    }

    /// When this thread has something to do by itself.
    pub(super) fn due(&self) -> Option<Monotonic> {
        let rests = self.sending.as_ref().filter(|sending| sending.share < 100).map(|sending| sending.rests);
        let opens = self.guest.as_ref().and_then(|guest| guest.door_opens);
        [rests, opens].into_iter().flatten().min()
    }

    /// Does what is due.
    pub(super) fn keep_time(&mut self) {
        let now = self.clock.monotonic();
        let Some(guest) = self.guest.as_mut() else { return };
        if guest.door_opens.is_some_and(|opens| opens <= now) {
            guest.door_opens = None;
            guest.machine.packets().end();
        }
        if let Some(sending) = self.sending.as_mut().filter(|sending| sending.share < 100 && sending.rests <= now) {
            let rest = THROTTLE_PERIOD.saturating_mul((100 - sending.share).into()) / 100;
            guest.machine.rest_vcpus(rest);
            sending.rests = now.after(THROTTLE_PERIOD);
        }
    }

    /// Begins to take a machine; the answer comes later.
    pub(super) fn receive(&mut self, spec: &ReceiveSpec, descriptors: Vec<OwnedFd>) -> Result<(), Refusal> {
        self.must_be_empty()?;
        let files = ArrivalFiles::new(spec, descriptors).map_err(|error| bad_request(&error))?;
        let memory = Bytes(spec.memory_bytes);
        let ram = ram::make(files.memory, memory).map_err(|error| host(&error))?;
        let console = Console::new(files.console_file, files.console_listener);
        let (console, output) = console.map_err(|error| host(&error))?;
        let receiving = Receiving::start(ram, spec, files.sockets, *self.clock);
        let receiving = receiving.map_err(|error| host(&error))?;
        self.watch(receiving.bell().as_raw_fd(), EventSet::IN).map_err(|error| host(&error))?;
        let (kvm, devices) = (files.kvm, files.devices);
        self.arriving = Some(Arriving { receiving, kvm, devices, console, output: Box::new(output), memory });
        Ok(())
    }

    /// Whether a descriptor is the bell of a machine on its way here.
    pub(super) fn is_arriving(&self, number: i32) -> bool {
        self.arriving.as_ref().is_some_and(|arriving| arriving.receiving.bell().as_raw_fd() == number)
    }

    /// What the receiving threads have come to.
    pub(super) fn hear_of_arrival(&mut self) {
        let Some(arrival) = self.arriving.as_ref().and_then(|arriving| arriving.receiving.arrival()) else { return };
        let Some(arriving) = self.take_arriving() else { return };
        let answer = match arrival {
            Arrival::Failed(error) => Answer::Refused(Refusal::Stream { reason: bounded(report::chain(&error)) }),
            Arrival::State { state, stopped } => {
                self.make_of(arriving, &state, stopped).map_or_else(Answer::Refused, Answer::Launched)
            }
        };
        // An agent that hung up will end this VMM, or ask what there is.
        self.answer_waiting(&answer);
    }

    /// From here on its bell is not listened to: threads that still have it may ring it.
    pub(super) fn take_arriving(&mut self) -> Option<Arriving> {
        let arriving = self.arriving.take()?;
        // It was added and is open: the kernel has nothing to refuse.
        let bell = arriving.receiving.bell().as_raw_fd();
        let _ = self.epoll.ctl(ControlOperation::Delete, bell, EpollEvent::default());
        Some(arriving)
    }

    fn make_of(&mut self, arriving: Arriving, state: &[u8], stopped: StoppedBetween) -> Result<LaunchPhases, Refusal> {
        let Arriving { receiving, kvm, mut devices, console, output, memory } = arriving;
        console.go_on();
        self.rings.hand_out(&mut devices);
        let made =
            save::decode_state(state).map_err(|error| Refusal::BadState { reason: bounded(report::chain(&error)) });
        let made = made.and_then(|sections| {
            let clock = Arc::clone(&self.clock) as Arc<dyn Clock>;
            let backing = RamBacking::Mapped(receiving.ram());
            let from = RestoreSpec { backing, sealed: None, devices, console: output, clock };
            Machine::restore(kvm, from, sections).map_err(|error| refusal_of(&error))
        });
        let made = made.and_then(|machine| match machine.shape().memory == memory {
            true => self.adopt_guest(machine, console, Some(stopped)),
            false => Err(Refusal::BadState {
                reason: format!("the machine that came has {} of memory, not {memory}", machine.shape().memory),
            }),
        });
        let door = self.guest.as_ref().map(|guest| guest.machine.packets());
        let told = match (&made, door) {
            (Ok(_), Some(door)) => {
                // Packets that waited where it was are to reach it before those that wait here.
                door.expect();
                Ok(door)
            }
            (Err(refusal), _) => Err(refusal.to_string()),
            (Ok(_), None) => Err("the machine is gone".to_owned()),
        };
        receiving.tell(told);
        made
    }
}
