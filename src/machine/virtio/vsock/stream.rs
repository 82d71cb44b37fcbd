//! One stream between a host program and a guest program, as a pure state machine: what was said, what is owed, and
//! how many bytes may move (virtio 1.2 sections 5.10.6.3 to 5.10.6.6). No socket and no queue here; `connection` does
//! what this decides.
//!
//! ```text
//!            REQUEST sent, RESPONSE came              each end stops sending or receiving
//!  Asking ──────────────────────────────▶ Open ──────────────────────────────────────────▶ Open, half closed ...
//!     │ RST came                            │ guest: SHUTDOWN of both, host has taken all bytes ─▶ RST sent ─▶ Over
//!     ▼                                     │ host gone: SHUTDOWN of both sent ─▶ RST came ─▶ Over
//!   Over                                    └ RST came, or a rule was broken (RST sent) ─▶ Over
//! ```
//! Each end tells the other the size of its buffer and how much it has taken out of it; the sender never has more than
//! that under way. Counts are modulo 2^32, as on the wire.

use super::packet::{Header, Operation};
use crate::machine::virtio::spec::vsock::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The host asked for it. `sent`: the guest has been told.
    Asking {
        /// Whether the REQUEST is on its way.
        sent: bool,
    },
    /// Both ends know of it.
    Open,
    /// The guest knows that it is gone, or there is only that left to say.
    Over,
}

/// Which directions are still used, as each end promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The host may still send.
    pub host_sends: bool,
    /// The host still takes bytes.
    pub host_receives: bool,
    /// The guest may still send.
    pub guest_sends: bool,
    /// The guest still takes bytes.
    pub guest_receives: bool,
}

/// What a packet from the guest means for the host's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing but what is owed to the guest.
    None,
    /// The guest accepted: tell the host program.
    Accepted,
    /// The guest refused: tell the host program.
    Refused,
    /// So many bytes follow; hand them over and call [`Stream::forwarded`].
    Data(u32),
    /// The guest sends no more, or takes no more: look at [`Stream::ends`].
    EndsChanged,
    /// The stream is gone.
    Gone,
}

/// What is to be said to the guest next, besides data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// The operation.
    pub operation: Operation,
    /// Its flags.
    pub flags: u32,
}

/// A stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    stage: Stage,
    ends: Ends,
    /// Our buffer for bytes from the guest, and how many came, went on to the host, and were told to have gone on.
    buffer: u32,
    received: u32,
    forwarded: u32,
    told: u32,
    /// The guest's buffer, what it has taken out of it, and what we sent.
    guest_buffer: u32,
    guest_forwarded: u32,
    sent: u32,
    owes_response: bool,
    owes_reset: bool,
    owes_credit: bool,
    /// SHUTDOWN flags that were told to the guest.
    shutdown_told: u32,
    /// Whether the guest was asked for credit since it last gave some.
    asked_credit: bool,
}

impl Stream {
    fn new(stage: Stage, buffer: u32) -> Self {
        Self {
            stage,
            ends: Ends { host_sends: true, host_receives: true, guest_sends: true, guest_receives: true },
            buffer,
            received: 0,
            forwarded: 0,
            told: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            sent: 0,
            owes_response: false,
            owes_reset: false,
            owes_credit: false,
            shutdown_told: 0,
            asked_credit: false,
        }
    }

    /// The host asks for a stream; it has `buffer` bytes of room.
    pub fn ask(buffer: u32) -> Self {
        Self::new(Stage::Asking { sent: false }, buffer)
    }

    /// The guest asked for a stream with `request`, and the host accepts.
    pub fn accept(buffer: u32, request: &Header) -> Self {
        let mut stream = Self::new(Stage::Open, buffer);
        stream.owes_response = true;
        stream.take_credit(request);
        stream
    }

    /// Where it is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Which directions are still used.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// Whether the guest has closed both directions.
    pub fn guest_closed(&self) -> bool {
        !self.ends.guest_sends && !self.ends.guest_receives
    }

    /// Whether the host has closed both directions.
    pub fn host_closed(&self) -> bool {
        !self.ends.host_sends && !self.ends.host_receives
    }

    /// Whether there is nothing more to say or to hear.
    pub fn is_finished(&self) -> bool {
        self.stage == Stage::Over && !self.owes_reset
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = header.forwarded;
        if self.credit() > 0 {
            self.asked_credit = false;
        }
    }

    /// Bytes the guest has room for. A guest that claims to have taken more than was sent gets nothing.
    pub fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Bytes that may be sent to the guest now.
    pub fn sendable(&self) -> u32 {
        let open = self.stage == Stage::Open && self.ends.host_sends && self.ends.guest_receives;
        if open && !self.owes_response { self.credit() } else { 0 }
    }

    /// The guest says something. Only [`Operation::Data`] has a length.
    pub fn packet(&mut self, operation: Operation, header: &Header) -> Reaction {
        if self.stage == Stage::Over {
            if operation == Operation::Reset {
                self.owes_reset = false;
            }
            return Reaction::None;
        }
        self.take_credit(header);
        match (operation, self.stage) {
            (Operation::Reset, Stage::Asking { .. }) => {
                self.stage = Stage::Over;
                Reaction::Refused
            }
            (Operation::Reset, Stage::Open | Stage::Over) => {
                self.stage = Stage::Over;
                Reaction::Gone
            }
            (Operation::Response, Stage::Asking { sent: true }) => {
                self.stage = Stage::Open;
                Reaction::Accepted
            }
            (Operation::Shutdown, Stage::Open) => {
                self.ends.guest_receives &= header.flags & SHUTDOWN_RECEIVE == 0;
                self.ends.guest_sends &= header.flags & SHUTDOWN_SEND == 0;
                Reaction::EndsChanged
            }
            (Operation::Data, Stage::Open) => self.data(header.length),
            (Operation::CreditUpdate, Stage::Open) => Reaction::None,
            (Operation::CreditRequest, Stage::Open) => {
                self.owes_credit = true;
                Reaction::None
            }
            (
                Operation::Request
                | Operation::Response
                | Operation::Shutdown
                | Operation::Data
                | Operation::CreditUpdate
                | Operation::CreditRequest,
                _,
            ) => self.abort(),
        }
    }

    fn data(&mut self, length: u32) -> Reaction {
        let under_way = self.received.wrapping_sub(self.forwarded);
        if !self.ends.guest_sends || length > self.buffer.saturating_sub(under_way) {
            return self.abort();
        }
        self.received = self.received.wrapping_add(length);
        Reaction::Data(length)
    }

    /// A rule was broken, or the host's side failed: the guest will be told that the stream is gone.
    pub fn abort(&mut self) -> Reaction {
        if self.stage != Stage::Over {
            // The guest does not know of a stream it was not told of.
            self.owes_reset = self.stage != Stage::Asking { sent: false };
            self.stage = Stage::Over;
        }
        Reaction::Gone
    }

    /// So many bytes from the guest went on to the host, or were thrown away because the host takes none.
    pub fn forwarded(&mut self, count: u32) {
        self.forwarded = self.forwarded.wrapping_add(count);
        // Half of the buffer: the guest can fill the other half while it hears of this one.
        if self.forwarded.wrapping_sub(self.told) >= self.buffer / 2 {
            self.owes_credit = true;
        }
    }

    /// The host sends no more; everything it sent is on its way.
    pub fn host_sent_all(&mut self) {
        self.ends.host_sends = false;
    }

    /// The host takes no more bytes.
    pub fn host_stopped_receiving(&mut self) {
        self.ends.host_receives = false;
    }

    /// The guest has closed both directions and the host has everything: say the last word (5.10.6.5).
    pub fn finish(&mut self) {
        if self.stage == Stage::Open && self.guest_closed() {
            self.abort();
        }
    }

    /// What is to be said next, if anything but data is.
    pub fn control(&self) -> Option<Control> {
        let say = |operation, flags| Some(Control { operation, flags });
        match self.stage {
            Stage::Over => self.owes_reset.then_some(Control { operation: Operation::Reset, flags: 0 }),
            Stage::Asking { sent: false } => say(Operation::Request, 0),
            Stage::Asking { sent: true } => None,
            Stage::Open if self.owes_response => say(Operation::Response, 0),
            Stage::Open if self.shutdown_told != self.shutdown_flags() => {
                say(Operation::Shutdown, self.shutdown_flags())
            }
            Stage::Open if self.owes_credit => say(Operation::CreditUpdate, 0),
            Stage::Open => None,
        }
    }

    /// Bytes wait for the guest but it has no room: ask, once.
    pub fn credit_question(&self) -> Option<Control> {
        let wanted = self.stage == Stage::Open
            && self.ends.host_sends
            && self.ends.guest_receives
            && self.credit() == 0
            && !self.asked_credit;
        wanted.then_some(Control { operation: Operation::CreditRequest, flags: 0 })
    }

    fn shutdown_flags(&self) -> u32 {
        let receive = if self.ends.host_receives { 0 } else { SHUTDOWN_RECEIVE };
        let send = if self.ends.host_sends { 0 } else { SHUTDOWN_SEND };
        receive | send
    }

    /// A packet with this operation goes to the guest now, with `length` bytes; returns the credit fields for it.
    pub fn said(&mut self, control: Control, length: u32) -> (u32, u32) {
        match control.operation {
            Operation::Request => self.stage = Stage::Asking { sent: true },
            Operation::Response => self.owes_response = false,
            Operation::Reset => self.owes_reset = false,
            Operation::Shutdown => self.shutdown_told = control.flags,
            Operation::Data => self.sent = self.sent.wrapping_add(length),
            Operation::CreditUpdate => {}
            Operation::CreditRequest => self.asked_credit = true,
        }
        // Every packet tells of our buffer.
        self.owes_credit = false;
        self.told = self.forwarded;
        (self.buffer, self.forwarded)
    }
}

#[cfg(test)]
mod tests;
