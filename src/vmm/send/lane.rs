//! One connection of a send: what is under way on it, and how much may be.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::{SILENCE_MAX, SILENCE_MAX_HELD, SendError};
use crate::clock::{Clock, Monotonic, SystemClock};
use crate::machine::PacketDoor;
use crate::vmm::socket::BoundedSocket;
use crate::vmm::tls::{End, Wire};
use crate::wire::control::SendSpec;
use crate::wire::link::{Link, LinkError};
use crate::wire::stream::{Hello, Kind, StreamError};

/// Longest time in which a connection says nothing while memory is sent. Less than the other end waits: one piece comes
/// between, which takes seconds at the slowest rate there is.
const SPEAK_AFTER: Duration = Duration::from_secs(10);

/// Most packets of one interface that are sent at once: more than a tap holds, which is a thousand by default.
const PACKETS_MAX: usize = 4096;

/// Bytes of guest memory on one connection that wait for their acknowledgement at most.
const WINDOW_BYTES: u64 = 16 << 20;

/// Frames on one connection that wait for their acknowledgement at most: a page that lies alone is a frame of its own.
const WINDOW_FRAMES: usize = 4096;

/// One connection, and what is under way on it.
pub(super) struct Lane {
    pub(super) link: Link<Wire>,
    number: usize,
    /// Frames that are not acknowledged, by number, and how many bytes of guest memory each holds.
    in_flight: VecDeque<(u32, u64)>,
    pub(super) in_flight_bytes: u64,
    clock: SystemClock,
    /// When the last frame was pushed.
    spoke: Monotonic,
}

impl Lane {
    pub(super) fn open(
        socket: OwnedFd,
        clock: SystemClock,
        (spec, version): (&SendSpec, u16),
        connection: u8,
    ) -> Result<Self, SendError> {
        let socket = BoundedSocket::new(socket, clock, SILENCE_MAX).map_err(SendError::Prepare)?;
        let wire = Wire::new(socket, spec.tls.as_ref(), End::Source)?;
        let link = Link::new(wire, Some(version));
        let (number, spoke) = (usize::from(connection), clock.monotonic());
        let mut lane = Self { link, number, in_flight: VecDeque::new(), in_flight_bytes: 0, clock, spoke };
        let hello = Hello { token: spec.token.0, connection, connections: spec.connections };
        lane.link.greet(hello).map_err(|source| lane.failed(source))?;
        Ok(lane)
    }

    pub(super) fn failed(&self, source: LinkError) -> SendError {
        SendError::Link { connection: self.number, source }
    }

    /// Sends a frame that will be acknowledged. Whoever sends many waits while it [is full](Self::is_full).
    pub(super) fn push(&mut self, kind: Kind, head: &[u8], body: &[u8], memory: u64) -> Result<(), SendError> {
        let number = self.link.sent();
        let pushed = self.link.push(kind, |bytes| {
            bytes.extend_from_slice(head);
            bytes.extend_from_slice(body);
            Ok::<_, StreamError>(())
        });
        pushed.map_err(|source| self.failed(source))?;
        self.spoke = self.clock.monotonic();
        self.in_flight.push_back((number, memory));
        self.in_flight_bytes += memory;
        Ok(())
    }

    /// Whether more waits to be acknowledged than may.
    pub(super) fn is_full(&self) -> bool {
        self.in_flight_bytes > WINDOW_BYTES || self.in_flight.len() > WINDOW_FRAMES
    }

    /// Whether anything waits to be acknowledged.
    pub(super) fn is_waiting(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Has the other end hear of this one, before it takes it for dead: what was pushed goes out, and if that was long ago,
    /// a frame that changes nothing (`round`: the round that is under way).
    pub(super) fn keep_alive(&mut self, round: u32) -> Result<(), SendError> {
        if self.clock.monotonic().since(self.spoke) >= SPEAK_AFTER {
            self.push(Kind::RoundEnd, &round.to_le_bytes(), &[], 0)?;
        }
        self.link.flush().map_err(|source| self.failed(source))
    }

    /// Sends the packets that wait, in order.
    pub(super) fn forward(&mut self, door: &PacketDoor, last: bool, packets: &mut u64) -> Result<(), SendError> {
        // The guest runs at the other end: nothing is waited for any longer than it has to be.
        self.link.connection_mut().hurry(SILENCE_MAX_HELD, None).map_err(SendError::Prepare)?;
        for index in door.interfaces() {
            // No more than a tap holds: what comes as fast as it is sent would never end.
            for _ in 0..PACKETS_MAX {
                let Some(packet) = door.take(index).map_err(SendError::Packets)? else { break };
                let pushed = self.link.push(Kind::Packet, |bytes| {
                    bytes.push(index);
                    bytes.extend_from_slice(&packet);
                    Ok::<_, StreamError>(())
                });
                pushed.map_err(|source| self.failed(source))?;
                *packets += 1;
            }
        }
        let ended = match last {
            true => self.link.send(Kind::PacketsEnd, &packets.to_le_bytes()),
            false => self.link.flush(),
        };
        ended.map_err(|source| self.failed(source))
    }

    /// Waits until at least one more frame is acknowledged.
    pub(super) fn take_ack(&mut self) -> Result<(), SendError> {
        self.link.flush().map_err(|source| self.failed(source))?;
        let mut body = Vec::new();
        let expected = self.link.expect(Kind::Ack, "an acknowledgement", &mut body);
        expected.map_err(|source| self.failed(source))?;
        // Its length was checked.
        let frames = u32::from_le_bytes(body.as_array().copied().unwrap_or([0; 4]));
        let before = self.in_flight.len();
        while let Some((number, memory)) = self.in_flight.front() {
            // Numbers wrap around; what is under way is far less than half of them.
            if frames.wrapping_sub(number.wrapping_add(1)) > u32::MAX / 2 {
                break;
            }
            self.in_flight_bytes -= memory;
            self.in_flight.pop_front();
        }
        if self.in_flight.len() == before {
            // Whoever says that again and again would keep a guest on its way for ever.
            let nothing_new =
                StreamError::Unexpected { found: Kind::Ack, wanted: "an acknowledgement of something new" };
            return Err(self.failed(nothing_new.into()));
        }
        Ok(())
    }
}
