//! VMM processes of a simulated host. They live on when the agent dies, answer only who knows their nonce and has the
//! newest epoch, and end when their guest does.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::time::sleep;

use super::guest::{self, Fate};
use super::road::Guest;
use super::{SimHost, State};
use crate::agent::world::{
    Ask, AskError, FillingPort, OpenStreamError, ProcessEnd, ProcessUsage, ReceiveOrder, SendOrder, SentMachine,
    StartVmmError, StreamIdentity, VmmHost, VmmProcess,
};
use crate::agent::{ProcessRecord, VmJail, VmRecord, VmState, VolumeUse};
use crate::bundle::working_set::WorkingSet;
use crate::ids::VmId;
use crate::wire::control::{
    Answer, BalloonStatus, CopyPhases, InterfaceStatus, LaunchPhases, MachineState, Nonce, PackedPhases, Packing,
    SavePhases, SavedPages, SendPhase, SendPhases, SendProgress, Status, StreamKey, VOLUME_SLOTS_MAX, VolumeStatus,
};
use crate::wire::last_words::LastWords;
use crate::wire::refusal::Refusal;

/// How long a VMM writes its machine.
const SAVE_NS: u64 = 5_000_000;

/// How long it copies its memory while its guest runs.
const COPY: Duration = Duration::from_millis(20);

/// Which of the names in a VM's directory lead to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    /// Those of the one a VM has.
    Own,
    /// Those of the one that is to take it over.
    Next,
    /// None any more.
    None,
}

/// A VMM process, alive or ended.
pub(super) struct Vmm {
    pub(super) pid: i32,
    pub(super) vm: VmId,
    pub(super) uid: u32,
    pub(super) nonce: Nonce,
    pub(super) epoch: u64,
    pub(super) machine: MachineState,
    pub(super) fate: Fate,
    /// Whether its guest was made from a bundle: it answers at once.
    pub(super) restored: bool,
    /// What the guest has in memory: another number each time its vCPUs begin to run.
    pub(super) memory: u64,
    /// Bytes of its balloon, which obeys at once.
    balloon: u64,
    /// Its volumes by slot; a slot without one is not there.
    volumes: BTreeMap<u8, VolumeStatus>,
    /// Until when it writes its machine to files, and answers nobody.
    pub(super) busy_until_ns: u64,
    /// When the guest agent begins to answer.
    pub(super) answers_at_ns: Option<u64>,
    /// When it ends by itself, and with which words.
    pub(super) ends_at_ns: Option<(u64, LastWords)>,
    pub(super) end: Option<ProcessEnd>,
    /// Whether an agent ended it.
    pub(super) ended_by_agent: bool,
    pub(super) words: Option<LastWords>,
    /// Whether its machine stands ready elsewhere.
    is_sent: bool,
    /// The pages of its memory that were copied while it ran, and are to be completed.
    copied: Option<SavedPages>,
    /// Which of the names in its directory lead to it.
    names: Names,
    /// The agent's life it was started in: only that one can learn how it ended.
    pub(super) life: u64,
}

/// The volumes that a machine holds that had them when it was saved.
fn held(record: &VmRecord) -> BTreeMap<u8, VolumeStatus> {
    let status = |(index, used): (u8, &VolumeUse)| {
        let (bytes, read_only) = (used.bytes, used.read_only);
        (index, VolumeStatus { index, bytes, read_only, ..VolumeStatus::default() })
    };
    record.spec.volume_uses().map(status).collect()
}

impl Vmm {
    /// Does to a volume slot what is asked.
    fn change_volume(&mut self, ask: &Ask) -> Result<(), &'static str> {
        if let Ask::AttachVolume(spec) = ask {
            if usize::from(spec.index) >= VOLUME_SLOTS_MAX {
                return Err("there is no such volume slot");
            }
            if self.volumes.contains_key(&spec.index) {
                return Err("a volume is attached already");
            }
            let (index, bytes, read_only) = (spec.index, spec.bytes, spec.read_only);
            let status = VolumeStatus { index, bytes, read_only, connections: 4, ..VolumeStatus::default() };
            self.volumes.insert(index, status);
            return Ok(());
        }
        let none = "no volume is attached";
        if let Ask::DetachVolume { index, .. } = ask {
            return self.volumes.remove(index).map(|_| ()).ok_or(none);
        }
        if let Ask::ResizeVolume { index, bytes } = ask {
            let volume = self.volumes.get_mut(index).ok_or(none)?;
            if *bytes < volume.bytes {
                return Err("a volume does not shrink");
            }
            volume.bytes = *bytes;
        }
        Ok(())
    }
}

impl State {
    /// Lets happen what was due.
    pub(super) fn settle(&mut self) {
        let now = self.now_ns();
        let due: Vec<(i32, LastWords)> = self
            .vmms
            .values()
            .filter(|vmm| vmm.end.is_none() && vmm.machine == MachineState::Running)
            .filter_map(|vmm| vmm.ends_at_ns.clone().filter(|(at, _)| *at <= now).map(|(_, words)| (vmm.pid, words)))
            .collect();
        for (pid, words) in due {
            self.end_vmm(pid, ProcessEnd::Exited(0), Some(words));
        }
    }

    pub(super) fn end_vmm(&mut self, pid: i32, end: ProcessEnd, words: Option<LastWords>) {
        if let Some(vmm) = self.vmms.get_mut(&pid).filter(|vmm| vmm.end.is_none()) {
            vmm.end = Some(end);
            vmm.words = words;
            self.end_save(pid);
        }
    }

    pub(super) fn living(&mut self, vm: &VmId) -> Option<&mut Vmm> {
        self.settle();
        self.vmms.values_mut().find(|vmm| vmm.vm == *vm && vmm.end.is_none() && vmm.names == Names::Own)
    }

    /// The process of a record, or one of its VM's if the record's is gone.
    fn found(&mut self, record: &VmRecord) -> Option<i32> {
        self.settle();
        let alive = |vmm: &&Vmm| vmm.vm == record.id && vmm.end.is_none();
        let known = record.process.map(|process| process.pid);
        let recorded = self.vmms.values().filter(alive).find(|vmm| Some(vmm.pid) == known);
        let any = matches!(record.state, VmState::HandingOver { .. }).then_some(()).is_none();
        recorded.or_else(|| self.vmms.values().filter(alive).find(|_| any)).map(|vmm| vmm.pid)
    }

    fn start(&mut self, record: &VmRecord, names: Names) -> i32 {
        self.settle();
        for vmm in self.vmms.values_mut().filter(|vmm| vmm.vm == record.id && vmm.names == names) {
            // Its names are the new one's.
            vmm.names = Names::None;
        }
        for vmm in self.vmms.values().filter(|vmm| vmm.end.is_none()) {
            if vmm.vm == record.id && (names == Names::Own || Some(vmm.pid) != record.process.map(|own| own.pid)) {
                self.violations.push(format!("{} has one VMM too many", record.id));
            }
            if vmm.uid == record.uid && vmm.vm != record.id {
                self.violations.push(format!("{} and {} have the same uid", record.id, vmm.vm));
            }
        }
        if !self.directories.contains(&record.id) {
            self.violations.push(format!("{} was started without a directory", record.id));
        }
        let pid = self.next_pid;
        self.next_pid += 1;
        let odd = self.faults.odd_guest_permille;
        let fate = if self.roll(odd) { Fate::odd(self.next_random()) } else { Fate::Obeys };
        let vmm = Vmm {
            pid,
            vm: record.id.clone(),
            uid: record.uid,
            nonce: record.nonce,
            epoch: 0,
            machine: MachineState::Empty,
            fate,
            restored: false,
            memory: 0,
            balloon: 0,
            volumes: BTreeMap::new(),
            busy_until_ns: 0,
            answers_at_ns: None,
            ends_at_ns: None,
            end: None,
            ended_by_agent: false,
            words: None,
            is_sent: false,
            copied: None,
            names,
            life: self.life,
        };
        self.vmms.insert(pid, vmm);
        pid
    }

    /// Notes a guest that runs twice, or that goes on from before it last ran.
    fn may_run(&mut self, vm: &VmId, pid: i32, memory: u64) {
        let twin =
            |vmm: &&Vmm| vmm.vm == *vm && vmm.pid != pid && vmm.end.is_none() && vmm.machine == MachineState::Running;
        if self.vmms.values().any(|vmm| twin(&vmm)) {
            self.violations.push(format!("{vm} runs twice"));
        }
        if memory != 0 && !self.ran_last(vm, memory) {
            self.violations.push(format!("{vm} goes on from before it last ran"));
        }
    }

    /// What one process has goes to the other: both stand still then.
    fn move_machine(&mut self, record: &VmRecord, epoch: u64) -> Result<SendPhases, AskError> {
        let gone = || AskError::Socket(io::ErrorKind::ConnectionRefused.into());
        let next = |vmm: &&mut Vmm| vmm.vm == record.id && vmm.end.is_none() && vmm.names == Names::Next;
        let source = self.living(&record.id).ok_or_else(gone)?;
        if source.nonce != record.nonce {
            return Err(AskError::Refused(Refusal::WrongNonce));
        }
        source.epoch = epoch;
        if source.machine == MachineState::Empty {
            return Err(AskError::Refused(Refusal::State { state: MachineState::Empty }));
        }
        let (pid, own) = (source.pid, record.process.map(|process| process.pid));
        if Some(pid) != own {
            self.violations.push(format!("{} is moved from a process that is not its own", record.id));
        }
        let target = self.vmms.values_mut().find(next).ok_or_else(gone)?.pid;
        let Some(source) = self.vmms.get_mut(&pid) else { return Err(gone()) };
        if source.is_sent {
            return Err(AskError::Refused(Refusal::Sending));
        }
        source.machine = MachineState::Paused;
        source.is_sent = true;
        let guest = (source.fate, source.restored, source.memory, source.balloon);
        let volumes = source.volumes.clone();
        let times = (source.answers_at_ns, source.ends_at_ns.clone());
        let Some(target) = self.vmms.get_mut(&target) else { return Err(gone()) };
        target.epoch = epoch;
        target.machine = MachineState::Paused;
        (target.fate, target.restored, target.memory, target.balloon) = guest;
        target.volumes = volumes;
        (target.answers_at_ns, target.ends_at_ns) = times;
        Ok(SendPhases { held_ns: 1_000_000, pages: 10, wire_bytes: 50_000, ..SendPhases::default() })
    }

    /// What a machine is on its way to another host: it stands still here from now on.
    fn give_guest(&mut self, record: &VmRecord, epoch: u64) -> Result<Guest, AskError> {
        let gone = || AskError::Socket(io::ErrorKind::ConnectionRefused.into());
        let vmm = self.living(&record.id).ok_or_else(gone)?;
        if vmm.machine == MachineState::Empty {
            return Err(AskError::Refused(Refusal::State { state: vmm.machine }));
        }
        vmm.epoch = epoch;
        vmm.machine = MachineState::Paused;
        vmm.is_sent = true;
        Ok(Guest { fate: vmm.fate, memory: vmm.memory, answers: vmm.answers_at_ns.is_some() })
    }

    /// The machine of another host.
    fn take_guest(&mut self, record: &VmRecord, epoch: u64, guest: Guest) -> Result<(), AskError> {
        let gone = || AskError::Socket(io::ErrorKind::ConnectionRefused.into());
        let now = self.now_ns();
        let vmm = self.living(&record.id).ok_or_else(gone)?;
        if vmm.machine != MachineState::Empty {
            return Err(AskError::Refused(Refusal::State { state: vmm.machine }));
        }
        vmm.epoch = epoch;
        vmm.machine = MachineState::Paused;
        vmm.restored = true;
        vmm.volumes = held(record);
        (vmm.fate, vmm.memory) = (guest.fate, guest.memory);
        vmm.answers_at_ns = guest.answers.then_some(now);
        Ok(())
    }

    /// A machine that was to be sent, and was not.
    fn goes_on(&mut self, vm: &VmId) {
        let memory = self.next_random();
        let Some(vmm) = self.living(vm).filter(|vmm| vmm.machine == MachineState::Paused) else { return };
        let (pid, before) = (vmm.pid, vmm.memory);
        vmm.machine = MachineState::Running;
        vmm.is_sent = false;
        vmm.memory = memory;
        self.may_run(vm, pid, before);
        self.note_run(vm, memory);
    }

    /// The names go over to the record's process.
    fn take_over(&mut self, record: &VmRecord) {
        let own = record.process.map(|process| process.pid);
        if !self.vmms.values().any(|vmm| Some(vmm.pid) == own && vmm.names == Names::Next) {
            return;
        }
        for vmm in self.vmms.values_mut().filter(|vmm| vmm.vm == record.id) {
            vmm.names = if Some(vmm.pid) == own { Names::Own } else { Names::None };
        }
    }

    /// How long a VMM still answers nobody.
    fn busy(&mut self, vm: &VmId) -> Option<Duration> {
        let now = self.now_ns();
        let until = self.living(vm)?.busy_until_ns;
        (until > now).then(|| Duration::from_nanos(until - now))
    }

    fn answer(&mut self, record: &VmRecord, epoch: u64, ask: &Ask) -> Result<Answer, AskError> {
        let (now, boot, memory) = (self.now_ns(), self.boot, self.next_random());
        if let Ask::Restore(plan) = ask {
            self.open_bundle(&record.id, &plan.bundle).map_err(|error| AskError::Bundle(error.into()))?;
        }
        let gone = || AskError::Socket(io::ErrorKind::ConnectionRefused.into());
        let unsealed = if let Ask::Unseal(plan) = ask { Some(self.unseal(&record.id, plan.key)?) } else { None };
        let vmm = self.living(&record.id).ok_or_else(gone)?;
        if vmm.nonce != record.nonce {
            return Err(AskError::Refused(Refusal::WrongNonce));
        }
        if epoch < vmm.epoch {
            return Err(AskError::Refused(Refusal::StaleEpoch { offered: epoch, current: vmm.epoch }));
        }
        if epoch > vmm.epoch {
            // What was copied for an agent that is gone is completed by nobody.
            vmm.copied = None;
        }
        vmm.epoch = epoch;
        let denied = |state| Err(AskError::Refused(Refusal::State { state }));
        match (ask, vmm.machine) {
            (Ask::Status, state) => Ok(Answer::Status(Status {
                state,
                first_entry_ns: 1000,
                memory_bytes: 1 << 27,
                stray_accesses: 0,
                console_bytes: 10,
                guest_memory_host_address: 0,
            })),
            (Ask::Network, MachineState::Empty) => Ok(Answer::Network(Vec::new())),
            (Ask::Network, MachineState::Paused | MachineState::Running) => {
                Ok(Answer::Network(vec![InterfaceStatus { link_up: true, ..InterfaceStatus::default() }]))
            }
            (Ask::Balloon { .. }, MachineState::Paused | MachineState::Running) if !record.spec.balloon => {
                let reason = "the machine has no balloon".to_owned();
                Err(AskError::Refused(Refusal::BadRequest { reason }))
            }
            (Ask::Balloon { target_bytes }, MachineState::Paused | MachineState::Running) => {
                vmm.balloon = target_bytes.unwrap_or(vmm.balloon);
                let (target_bytes, actual_bytes) = (vmm.balloon, vmm.balloon);
                Ok(Answer::Balloon(BalloonStatus { target_bytes, actual_bytes, ..BalloonStatus::default() }))
            }
            (Ask::Volumes, _) => {
                let slots = (0..record.spec.volumes.len()).map(|slot| record.spec.volume_index(slot));
                let empty = |index| VolumeStatus { index, ..VolumeStatus::default() };
                let slot = |index| vmm.volumes.get(&index).cloned().unwrap_or_else(|| empty(index));
                Ok(Answer::Volumes(slots.map(slot).collect()))
            }
            (
                Ask::AttachVolume(_) | Ask::DetachVolume { .. } | Ask::ResizeVolume { .. } | Ask::LimitVolume { .. },
                MachineState::Paused | MachineState::Running,
            ) => match vmm.change_volume(ask) {
                Ok(()) => Ok(Answer::Done),
                Err(reason) => Err(AskError::Refused(Refusal::BadRequest { reason: reason.to_owned() })),
            },
            (Ask::CancelSend, _) => {
                vmm.is_sent = false;
                vmm.copied = None;
                Ok(Answer::Done)
            }
            (Ask::SendProgress, _) => {
                let phase = if vmm.is_sent { SendPhase::Ready } else { SendPhase::None };
                Ok(Answer::Sending(SendProgress { phase, ..SendProgress::default() }))
            }
            // Until that is given up, or it goes on.
            (Ask::Save { .. } | Ask::Seal { .. } | Ask::Pause, _) if vmm.is_sent => {
                Err(AskError::Refused(Refusal::Sending))
            }
            (Ask::Prefault(_) | Ask::ReplaceTap { .. }, MachineState::Paused | MachineState::Running) => {
                Ok(Answer::Done)
            }
            (Ask::Launch(_), MachineState::Empty) => {
                vmm.machine = MachineState::Paused;
                Ok(Answer::Launched(LaunchPhases::default()))
            }
            (Ask::Restore(_), MachineState::Empty) => {
                vmm.machine = MachineState::Paused;
                vmm.restored = true;
                Ok(Answer::Launched(LaunchPhases::default()))
            }
            (Ask::Unseal(_), MachineState::Empty) => {
                vmm.volumes = held(record);
                vmm.machine = MachineState::Paused;
                vmm.restored = true;
                if let Some((memory, fate)) = unsealed {
                    (vmm.memory, vmm.fate) = (memory, fate);
                }
                Ok(Answer::Launched(LaunchPhases::default()))
            }
            (Ask::Seal { key, .. }, MachineState::Paused) => {
                let guest = (vmm.memory, vmm.fate);
                self.seal(&record.id, *key, guest);
                Ok(Answer::Saved(SavePhases { memory_bytes: 1 << 20, ..SavePhases::default() }))
            }
            (Ask::CopyMemory { .. }, MachineState::Running) if vmm.is_sent => Err(AskError::Refused(Refusal::Sending)),
            (Ask::CopyMemory { pages }, MachineState::Running) => {
                vmm.copied = Some(*pages);
                let pid = vmm.pid;
                self.begin_copy(&record.id, pid, *pages);
                Ok(Answer::Copied(CopyPhases { rounds: 2, memory_bytes: 1 << 20, ..CopyPhases::default() }))
            }
            (Ask::SaveRest { pages }, MachineState::Paused) if vmm.copied != Some(*pages) => {
                let reason = "no memory was copied before".to_owned();
                Err(AskError::Refused(Refusal::BadRequest { reason }))
            }
            (Ask::SaveRest { pages }, MachineState::Paused) => {
                vmm.copied = None;
                vmm.busy_until_ns = now.saturating_add(SAVE_NS);
                let (saved, whole_at) = ((vmm.pid, *pages, vmm.memory), vmm.busy_until_ns);
                self.complete_copy(&record.id, saved, whole_at);
                Ok(Answer::Saved(SavePhases { memory_bytes: 1 << 12, ..SavePhases::default() }))
            }
            (Ask::Save { pages: SavedPages::Changed }, MachineState::Paused) if !vmm.restored => {
                let reason = "this machine was not made from a memory image".to_owned();
                Err(AskError::Refused(Refusal::BadRequest { reason }))
            }
            (Ask::Save { pages }, MachineState::Paused) => {
                vmm.busy_until_ns = now.saturating_add(SAVE_NS);
                let (saved, whole_at) = ((vmm.pid, *pages, vmm.memory), vmm.busy_until_ns);
                self.begin_save(&record.id, saved, whole_at);
                Ok(Answer::Saved(SavePhases { memory_bytes: 1 << 20, ..SavePhases::default() }))
            }
            (Ask::Resume, MachineState::Paused) => {
                let (pid, before) = (vmm.pid, vmm.memory);
                self.may_run(&record.id, pid, before);
                let vmm = self.living(&record.id).ok_or_else(gone)?;
                vmm.machine = MachineState::Running;
                vmm.is_sent = false;
                vmm.memory = memory;
                let boot = if vmm.restored { Duration::ZERO } else { boot };
                vmm.fate.begin(now, boot, &mut vmm.answers_at_ns, &mut vmm.ends_at_ns);
                self.note_run(&record.id, memory);
                Ok(Answer::Done)
            }
            (Ask::Pause, MachineState::Running) => {
                vmm.machine = MachineState::Paused;
                Ok(Answer::Done)
            }
            (
                Ask::Launch(_)
                | Ask::Restore(_)
                | Ask::Unseal(_)
                | Ask::Save { .. }
                | Ask::CopyMemory { .. }
                | Ask::SaveRest { .. }
                | Ask::Seal { .. }
                | Ask::Resume
                | Ask::Pause
                | Ask::ReplaceTap { .. }
                | Ask::Prefault(_)
                | Ask::Balloon { .. }
                | Ask::AttachVolume(_)
                | Ask::DetachVolume { .. }
                | Ask::ResizeVolume { .. }
                | Ask::LimitVolume { .. },
                state,
            ) => denied(state),
        }
    }
}

/// A held simulated process.
#[derive(Debug, Clone)]
pub struct SimProcess {
    host: SimHost,
    record: ProcessRecord,
}

impl VmmProcess for SimProcess {
    fn record(&self) -> ProcessRecord {
        self.record
    }

    fn kill(&self) -> io::Result<()> {
        let mut state = self.host.state();
        if let Some(vmm) = state.vmms.get_mut(&self.record.pid) {
            vmm.ended_by_agent |= vmm.end.is_none();
        }
        state.end_vmm(self.record.pid, ProcessEnd::Signalled(9), None);
        drop(state);
        self.host.changed.notify_waiters();
        Ok(())
    }

    async fn ended(&self) -> ProcessEnd {
        loop {
            let changed = self.host.changed.notified();
            let wait = {
                let mut state = self.host.state();
                state.settle();
                let (now, life) = (state.now_ns(), state.life);
                let Some(vmm) = state.vmms.get(&self.record.pid) else { return ProcessEnd::Unknown };
                match vmm.end {
                    Some(end) if vmm.life == life => return end,
                    Some(_) => return ProcessEnd::Unknown,
                    None => vmm
                        .ends_at_ns
                        .as_ref()
                        .filter(|_| vmm.machine == MachineState::Running)
                        .map(|(at, _)| Duration::from_nanos(at.saturating_sub(now).max(1))),
                }
            };
            match wait {
                Some(wait) => {
                    tokio::select! {
                        biased;
                        () = changed => {}
                        () = sleep(wait) => {}
                    }
                }
                None => changed.await,
            }
        }
    }

    fn usage(&self) -> ProcessUsage {
        ProcessUsage::default()
    }

    async fn page_out(&self) -> io::Result<()> {
        self.host.point(true).await
    }

    fn page_in(&self) {}

    fn jail(&self) -> Option<VmJail> {
        None
    }
}

impl SimHost {
    async fn while_busy(&self, vm: &VmId) {
        loop {
            let busy = self.state().busy(vm);
            let Some(busy) = busy else { return };
            sleep(busy).await;
        }
    }

    fn process(&self, pid: i32) -> SimProcess {
        let start_ticks = u64::try_from(pid).unwrap_or(0);
        SimProcess { host: self.clone(), record: ProcessRecord { pid, start_ticks } }
    }
}

impl VmmHost for SimHost {
    type Process = SimProcess;
    type Stream = DuplexStream;
    type Listener = u16;

    async fn start(&self, vm: &VmRecord) -> Result<SimProcess, StartVmmError> {
        let failed = |source| StartVmmError::Spawn { step: "simulate".to_owned(), source };
        self.point(true).await.map_err(failed)?;
        let pid = self.state().start(vm, Names::Own);
        self.point(false).await.map_err(failed)?;
        Ok(self.process(pid))
    }

    async fn find(&self, vm: &VmRecord) -> io::Result<Option<SimProcess>> {
        self.point(true).await?;
        let found = self.state().found(vm);
        Ok(found.map(|pid| self.process(pid)))
    }

    async fn find_stray(&self, vm: &VmId) -> io::Result<Option<SimProcess>> {
        self.point(true).await?;
        let found = self.state().living(vm).map(|vmm| vmm.pid);
        Ok(found.map(|pid| self.process(pid)))
    }

    async fn ask(&self, vm: &VmRecord, epoch: u64, ask: Ask) -> Result<Answer, AskError> {
        self.point(true).await.map_err(AskError::Socket)?;
        self.while_busy(&vm.id).await;
        let answer = self.state().answer(vm, epoch, &ask);
        self.changed.notify_waiters();
        if matches!(ask, Ask::CopyMemory { .. }) && answer.is_ok() {
            sleep(COPY).await;
            let given_up = Err(AskError::Refused(Refusal::Cancelled));
            let ended = Err(AskError::Socket(io::ErrorKind::ConnectionReset.into()));
            let copied = self.state().living(&vm.id).map(|vmm| vmm.copied);
            self.point(false).await.map_err(AskError::Socket)?;
            return copied.map_or(ended, |copied| if copied.is_some() { answer } else { given_up });
        }
        if matches!(ask, Ask::Save { .. } | Ask::SaveRest { .. }) {
            // The agent may die here, and the answer may get lost: the VMM writes on.
            self.point(true).await.map_err(AskError::Socket)?;
            self.while_busy(&vm.id).await;
            // One that ended meanwhile answers nothing.
            if answer.is_ok() && self.state().living(&vm.id).is_none() {
                return Err(AskError::Socket(io::ErrorKind::ConnectionReset.into()));
            }
        }
        self.point(false).await.map_err(AskError::Socket)?;
        answer
    }

    async fn touched(&self, _: &VmRecord, _: u64) -> Result<WorkingSet, AskError> {
        Ok(WorkingSet::default())
    }

    async fn bind_to_fill(&self, _: &VmRecord) -> io::Result<(FillingPort, Self::Stream)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn connect_to_fill(&self, _: &VmRecord) -> io::Result<Option<Self::Stream>> {
        Ok(None)
    }

    async fn guest(&self, vm: &VmId, port: u32) -> Result<DuplexStream, OpenStreamError> {
        self.point(true).await.map_err(OpenStreamError::Socket)?;
        if port != hearth_guest_wire::PORT {
            return Err(OpenStreamError::Refused { reason: "nothing listens there".to_owned() });
        }
        let ready = {
            let mut state = self.state();
            let now = state.now_ns();
            let gone = || OpenStreamError::Socket(io::ErrorKind::ConnectionRefused.into());
            let vmm = state.living(vm).ok_or_else(gone)?;
            vmm.machine == MachineState::Running && vmm.answers_at_ns.is_some_and(|at| at <= now)
        };
        if !ready {
            return Err(OpenStreamError::Refused { reason: "the guest is not up".to_owned() });
        }
        let (here, there) = tokio::io::duplex(64 * 1024);
        tokio::spawn(guest::serve(self.clone(), vm.clone(), there));
        Ok(here)
    }

    async fn hold_taps(&self, vm: &VmRecord) -> io::Result<()> {
        self.point(true).await?;
        Self::hold(self, &vm.id);
        self.point(false).await
    }

    async fn packet_waits(&self, vm: &VmId) {
        self.packet(vm).await;
    }

    async fn start_successor(&self, vm: &VmRecord) -> Result<SimProcess, StartVmmError> {
        let failed = |source| StartVmmError::Spawn { step: "simulate".to_owned(), source };
        self.point(true).await.map_err(failed)?;
        let pid = self.state().start(vm, Names::Next);
        self.point(false).await.map_err(failed)?;
        Ok(self.process(pid))
    }

    async fn move_machine(&self, vm: &VmRecord, epoch: u64) -> Result<SendPhases, AskError> {
        self.point(true).await.map_err(AskError::Socket)?;
        self.while_busy(&vm.id).await;
        let moved = self.state().move_machine(vm, epoch);
        self.changed.notify_waiters();
        // The answer of one of the two may get lost.
        self.point(true).await.map_err(AskError::Socket)?;
        moved
    }

    fn certificate(&self) -> io::Result<StreamIdentity> {
        Ok(StreamIdentity { certificate: vec![1], key: StreamKey(vec![2]) })
    }

    async fn listen(&self) -> io::Result<(u16, u16)> {
        self.point(true).await?;
        let port = self.road.open();
        Ok((port, port))
    }

    async fn receive_machine(
        &self,
        vm: &VmRecord,
        epoch: u64,
        listener: u16,
        _order: ReceiveOrder,
    ) -> Result<Answer, AskError> {
        self.point(true).await.map_err(AskError::Socket)?;
        let lost = || AskError::Socket(io::ErrorKind::ConnectionReset.into());
        let (guest, answer) = self.road.wait(listener).await.ok_or_else(lost)?;
        let taken = self.state().take_guest(vm, epoch, guest);
        let is_taken = taken.is_ok();
        // Who sent it hears of it, or not.
        let _ = answer.send(is_taken);
        self.changed.notify_waiters();
        self.point(true).await.map_err(AskError::Socket)?;
        taken.map(|()| Answer::Launched(LaunchPhases::default()))
    }

    async fn send_machine(&self, vm: &VmRecord, epoch: u64, order: SendOrder) -> Result<SentMachine, AskError> {
        self.point(true).await.map_err(AskError::Socket)?;
        self.while_busy(&vm.id).await;
        let guest = self.state().give_guest(vm, epoch)?;
        self.changed.notify_waiters();
        let sent = self.road.send(order.to.port(), guest).await;
        if sent != Some(true) {
            // It goes on by itself, as a machine does that could not be sent.
            self.state().goes_on(&vm.id);
            self.changed.notify_waiters();
            return Err(AskError::Refused(Refusal::Stream { reason: "the other end hung up".to_owned() }));
        }
        self.point(true).await.map_err(AskError::Socket)?;
        let phases = SendPhases { held_ns: 1_000_000, pages: 10, wire_bytes: 50_000, ..SendPhases::default() };
        let packed = match order.form.packing {
            Packing::None => PackedPhases::default(),
            Packing::Lz4 => PackedPhases { pages: 8, bytes: 9_000 },
        };
        Ok(SentMachine { phases, packed })
    }

    async fn forward_packets(&self, _vm: &VmRecord, _epoch: u64) -> Result<u64, AskError> {
        self.point(true).await.map_err(AskError::Socket)?;
        Ok(0)
    }

    async fn take_over(&self, vm: &VmRecord, _epoch: u64) -> io::Result<()> {
        self.point(true).await?;
        self.state().take_over(vm);
        self.point(false).await
    }

    async fn end_others(&self, vm: &VmRecord) -> io::Result<()> {
        self.point(true).await?;
        let others: Vec<i32> = {
            let state = self.state();
            let own = vm.process.map(|process| process.pid);
            let other = |vmm: &&Vmm| vmm.vm == vm.id && vmm.end.is_none() && Some(vmm.pid) != own;
            state.vmms.values().filter(other).map(|vmm| vmm.pid).collect()
        };
        for pid in others {
            self.process(pid).kill()?;
        }
        self.point(false).await
    }

    fn release_taps(&self, vm: &VmId) {
        self.release(vm);
    }

    async fn console(&self, _vm: &VmId) -> Result<DuplexStream, OpenStreamError> {
        let (here, mut there) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            // An echo after the history, until the client goes.
            let _ = tokio::io::AsyncWriteExt::write_all(&mut there, b"simulated\n").await;
            let (mut read, mut write) = tokio::io::split(there);
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
        Ok(here)
    }
}
