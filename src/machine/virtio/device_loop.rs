//! The one thread that serves all devices of a machine.
//!
//! Each slot has an epoll instance of its own for its queues and descriptors; the loop's instance holds those, and one
//! event for commands. A slot with events, or with work left from its last turn, gets one bounded turn in each round,
//! so a flood on one device delays the others by a turn and no more. While paused the thread waits for a command and
//! for nothing else: what happens on descriptors stays in the kernel.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VirtioSlot;
use super::model::Turn;
use super::slot::Shared;
use crate::machine::layout::VIRTIO_SLOTS;
use crate::saved::{SaveSectionError, Section};
use crate::sys::thread::{self, ThreadClass};

/// Most events of one round: every slot and the command event.
const EVENTS_PER_ROUND: usize = VIRTIO_SLOTS as usize + 1;

/// Token of the command event; slots use their index.
const COMMAND_TOKEN: u64 = u64::MAX;

enum Command {
    Pause(SyncSender<()>),
    Resume(SyncSender<()>),
    Stop,
}

/// The one thread that serves all devices of a machine. Starts paused.
#[derive(Debug)]
pub struct DeviceLoop {
    slots: Vec<Arc<VirtioSlot>>,
    commands: Sender<Command>,
    commanded: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceLoop {
    /// Starts the thread.
    pub fn start(slots: Vec<Arc<VirtioSlot>>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let commanded = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let event = EpollEvent::new(EventSet::IN, COMMAND_TOKEN);
        epoll.ctl(ControlOperation::Add, commanded.as_raw_fd(), event)?;
        for (token, slot) in (0_u64..).zip(&slots) {
            let event = EpollEvent::new(EventSet::IN, token);
            epoll.ctl(ControlOperation::Add, slot.shared.epoll.as_raw_fd(), event)?;
        }
        let (commands, inbox) = channel();
        let shared = slots.iter().map(|slot| slot.shared.clone()).collect();
        let mut body = Loop { epoll, commanded: commanded.clone(), inbox, slots: shared, more: Vec::new() };
        let thread = thread::start(ThreadClass::Devices, "devices".to_owned(), move || body.run())?;
        Ok(Self { slots, commands, commanded, thread: Some(thread) })
    }

    /// Returns when no device writes guest memory or finishes requests any more.
    pub fn pause(&self) {
        self.ask(Command::Pause);
    }

    /// Lets the devices work (again); works through every queue and raises every interrupt once.
    pub fn resume(&self) {
        self.ask(Command::Resume);
    }

    /// The devices it serves.
    pub fn slots(&self) -> &[Arc<VirtioSlot>] {
        &self.slots
    }

    /// The sections of all devices; only while paused.
    pub fn save(&self) -> Result<Vec<Section>, SaveSectionError> {
        let mut sections = Vec::with_capacity(2 * self.slots.len());
        for slot in &self.slots {
            sections.extend(slot.shared.save()?);
        }
        Ok(sections)
    }

    /// Ends the thread.
    pub fn stop(self) {}

    fn ask(&self, command: impl FnOnce(SyncSender<()>) -> Command) {
        let (answer, answered) = sync_channel(1);
        self.tell(command(answer));
        // The thread only ends on Stop, which needs this loop by value.
        let _ = answered.recv();
    }

    fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
        let _ = self.commanded.write(1);
    }
}

impl Drop for DeviceLoop {
    fn drop(&mut self) {
        self.tell(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Loop {
    epoll: Epoll,
    commanded: Arc<EventFd>,
    inbox: Receiver<Command>,
    slots: Vec<Arc<Shared>>,
    /// Slots with work left that no event will announce, each once.
    more: Vec<usize>,
}

enum Next {
    Serve,
    Wait,
    Stop,
}

impl Loop {
    fn run(&mut self) {
        let mut next = Next::Wait;
        loop {
            next = match next {
                Next::Wait => match self.inbox.recv() {
                    Ok(command) => self.obey(command, Next::Wait),
                    Err(_) => Next::Stop,
                },
                Next::Serve => self.round(),
                Next::Stop => return,
            }
        }
    }

    fn obey(&mut self, command: Command, current: Next) -> Next {
        match command {
            Command::Pause(done) => {
                self.slots.iter().for_each(|slot| slot.pause());
                self.more.clear();
                let _ = done.send(());
                Next::Wait
            }
            Command::Resume(done) => {
                if matches!(current, Next::Wait) {
                    self.more.clear();
                    for (at, slot) in self.slots.iter().enumerate() {
                        if slot.resume() == Turn::More {
                            self.more.push(at);
                        }
                    }
                }
                let _ = done.send(());
                Next::Serve
            }
            Command::Stop => {
                self.slots.iter().for_each(|slot| slot.pause());
                Next::Stop
            }
        }
    }

    fn round(&mut self) -> Next {
        let mut events = [EpollEvent::default(); EVENTS_PER_ROUND];
        let patience = if self.more.is_empty() { -1 } else { 0 };
        // EINTR is the one error left to a wait on an epoll instance of our own: another round.
        let count = self.epoll.wait(patience, &mut events).unwrap_or(0);
        let mut ready = std::mem::take(&mut self.more);
        for event in &events[..count] {
            match usize::try_from(event.data()) {
                Ok(at) if at < self.slots.len() => {
                    if !ready.contains(&at) {
                        ready.push(at);
                    }
                }
                Ok(_) | Err(_) => {
                    let _ = self.commanded.read();
                    while let Ok(command) = self.inbox.try_recv() {
                        match self.obey(command, Next::Serve) {
                            Next::Serve => {}
                            other @ (Next::Wait | Next::Stop) => return other,
                        }
                    }
                }
            }
        }
        for at in ready {
            if self.slots[at].turn() == Turn::More {
                self.more.push(at);
            }
        }
        Next::Serve
    }
}
