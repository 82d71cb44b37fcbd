//! What the target of a migration takes from one of its connections: a machine of states that is given one frame after
//! the other, whose header and checksum were checked ([`super::stream`]), and says what is to be done with each. It does
//! nothing itself: no socket, no memory of a guest. What has no place where it comes is refused, and nothing follows.
//!
//! ```text
//! Hello ─▶ pages, zeroes, ends of rounds ... ─▶ State ... ─▶ End          on connection 0
//! Hello ─▶ pages, zeroes, ends of rounds ...                              on the others
//! ```

use super::packed;
use super::stream::{Hello, Kind, PAGES_HEAD_BYTES, Pages, STATE_BYTES_MAX, StreamError, state_digest};
use crate::units::{PAGE_BYTES, PageCount, PageIndex};

/// Frames and bytes of guest memory that are acknowledged at once. The other end's window is many times as large.
const ACK_FRAMES: u32 = 64;
const ACK_BYTES: u64 = 2 << 20;

/// What is to be done with a frame.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// The connection is greeted: the same is answered.
    Greet(Hello),
    /// Put what these pages hold, as many bytes as they have, into memory.
    Put(PageIndex, PageCount, &'a [u8]),
    /// Make these pages zero.
    PutZeroes(PageIndex, PageCount),
    /// Nothing.
    Nothing,
    /// All is here: the state, whose digest is the one that was sent.
    State(Vec<u8>),
}

/// One connection, as its target sees it.
#[derive(Debug)]
pub struct Intake {
    token: [u8; 32],
    connections: u8,
    takes_pages: bool,
    /// Which of the connections it is, once it was greeted.
    number: Option<u8>,
    state: Vec<u8>,
    /// What a frame of packed pages holds.
    unpacked: Vec<u8>,
    /// What waits for its acknowledgement.
    frames: u32,
    bytes: u64,
    ack_is_due: bool,
    is_over: bool,
}

impl Intake {
    /// A connection of the stream that begins with this token and has so many. `takes_pages`: there is memory to put pages
    /// into that nobody else has.
    pub const fn new(token: [u8; 32], connections: u8, takes_pages: bool) -> Self {
        Self {
            token,
            connections,
            takes_pages,
            number: None,
            state: Vec::new(),
            unpacked: Vec::new(),
            frames: 0,
            bytes: 0,
            ack_is_due: false,
            is_over: false,
        }
    }

    /// What is to be done with the next frame. `memory` gives how many pages of guest memory there are from one on, without
    /// a gap.
    pub fn take<'a>(
        &'a mut self,
        kind: Kind,
        body: &'a [u8],
        memory: impl FnOnce(PageIndex) -> PageCount,
    ) -> Result<Step<'a>, StreamError> {
        let Some(number) = self.number.filter(|_| !self.is_over) else { return self.greet(kind, body) };
        // Whatever is wrong with it, there is no going on.
        self.is_over = true;
        let step = match kind {
            Kind::Pages | Kind::PackedPages | Kind::ZeroPages if self.takes_pages && self.state.is_empty() => {
                return self.take_pages(kind, body, memory);
            }
            Kind::RoundEnd if self.state.is_empty() => {
                self.ack_is_due = true;
                Step::Nothing
            }
            Kind::State if number == 0 => {
                if self.state.len() + body.len() > STATE_BYTES_MAX {
                    return Err(StreamError::TooMuchState);
                }
                self.state.extend_from_slice(body);
                Step::Nothing
            }
            Kind::End if number == 0 => {
                let state = std::mem::take(&mut self.state);
                return if state_digest(&state) == *body {
                    Ok(Step::State(state))
                } else {
                    Err(StreamError::OtherState)
                };
            }
            found @ (Kind::Hello
            | Kind::Pages
            | Kind::PackedPages
            | Kind::ZeroPages
            | Kind::RoundEnd
            | Kind::State
            | Kind::End
            | Kind::Packet
            | Kind::PacketsEnd
            | Kind::Ack
            | Kind::Ready
            | Kind::Abort) => {
                return Err(StreamError::Unexpected { found, wanted: "guest memory" });
            }
        };
        self.is_over = false;
        Ok(step)
    }

    fn greet(&mut self, kind: Kind, body: &[u8]) -> Result<Step<'_>, StreamError> {
        let hello = body.as_array().filter(|_| kind == Kind::Hello && !self.is_over);
        let hello = Hello::from_bytes(*hello.ok_or(StreamError::Unexpected { found: kind, wanted: "Hello" })?)?;
        let expected = Hello { token: self.token, connection: hello.connection, connections: self.connections };
        hello.check(expected)?;
        self.number = Some(hello.connection);
        Ok(Step::Greet(expected))
    }

    fn take_pages<'a>(
        &'a mut self,
        kind: Kind,
        body: &'a [u8],
        memory: impl FnOnce(PageIndex) -> PageCount,
    ) -> Result<Step<'a>, StreamError> {
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let short = StreamError::Length { kind, found: length, min: PAGES_HEAD_BYTES, max: u32::MAX };
        let (head, content) = body.split_first_chunk().ok_or(short)?;
        let (first, count) = Pages::from_bytes(*head).check(kind, length, memory)?;
        let bytes = count.0 * PAGE_BYTES;
        let step = if kind == Kind::ZeroPages {
            Step::PutZeroes(first, count)
        } else if kind == Kind::PackedPages {
            // Bounded by the check.
            let wanted = usize::try_from(bytes).unwrap_or(usize::MAX);
            packed::unpack(content, wanted, &mut self.unpacked)?;
            Step::Put(first, count, &self.unpacked)
        } else {
            Step::Put(first, count, content)
        };
        self.frames += 1;
        // What the other end counts: pages with their bytes, however they came.
        self.bytes += if kind == Kind::ZeroPages { 0 } else { bytes };
        self.ack_is_due = self.frames >= ACK_FRAMES || self.bytes >= ACK_BYTES;
        self.is_over = false;
        Ok(step)
    }

    /// Whether all that came is to be acknowledged now that it was dealt with.
    pub const fn ack_is_due(&mut self) -> bool {
        if self.ack_is_due {
            (self.frames, self.bytes, self.ack_is_due) = (0, 0, false);
            return true;
        }
        false
    }

    /// Which of the connections it is; `None` before it was greeted.
    pub const fn number(&self) -> Option<u8> {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::packed::Packer;
    use crate::wire::stream::PAGES_MAX;

    const TOKEN: [u8; 32] = [7; 32];

    /// A guest of 600 pages.
    fn memory(first: PageIndex) -> PageCount {
        PageCount(600_u64.saturating_sub(first.0))
    }

    /// A connection that was greeted.
    fn greeted(number: u8) -> Intake {
        let mut intake = Intake::new(TOKEN, 2, true);
        let hello = Hello { token: TOKEN, connection: number, connections: 2 };
        assert_eq!(intake.take(Kind::Hello, &hello.to_bytes(), memory), Ok(Step::Greet(hello)));
        assert_eq!(intake.number(), Some(number));
        intake
    }

    fn body(first: u64, count: u64, content: &[u8]) -> Vec<u8> {
        let head = Pages::new(PageIndex(first), PageCount(count)).unwrap().to_bytes();
        [&head, content].concat()
    }

    fn unexpected(result: Result<Step<'_>, StreamError>) -> bool {
        matches!(result, Err(StreamError::Unexpected { .. }))
    }

    #[test]
    fn nothing_comes_before_hello_and_strangers_are_told_apart() {
        assert!(unexpected(Intake::new(TOKEN, 2, true).take(Kind::RoundEnd, &[0; 4], memory)));
        for (hello, what) in [
            (Hello { token: [8; 32], connection: 0, connections: 2 }, "token"),
            (Hello { token: TOKEN, connection: 0, connections: 3 }, "number of connections"),
        ] {
            let refused = Intake::new(TOKEN, 2, true).take(Kind::Hello, &hello.to_bytes(), memory).map(drop);
            assert_eq!(refused, Err(StreamError::Foreign { what }));
        }
        let hello = Hello { token: TOKEN, connection: 0, connections: 2 };
        assert!(unexpected(greeted(0).take(Kind::Hello, &hello.to_bytes(), memory)));
    }

    #[test]
    fn pages_are_put_however_they_come() {
        let mut intake = greeted(1);
        let content = [[1; 4096], [2; 4096]].concat();
        let block = Packer::default().pack(&content).unwrap().to_vec();
        let wanted = Step::Put(PageIndex(598), PageCount(2), &content);
        assert_eq!(intake.take(Kind::Pages, &body(598, 2, &content), memory), Ok(wanted));
        let wanted = Step::Put(PageIndex(598), PageCount(2), &content);
        assert_eq!(intake.take(Kind::PackedPages, &body(598, 2, &block), memory), Ok(wanted));
        let zeroes = Step::PutZeroes(PageIndex(0), PageCount(600));
        assert_eq!(intake.take(Kind::ZeroPages, &body(0, 600, &[]), memory), Ok(zeroes));
        // Another length than was said, and pages that are none.
        for (first, count) in [(0, 1), (0, 3), (599, 2)] {
            let mut intake = greeted(1);
            assert!(intake.take(Kind::PackedPages, &body(first, count, &block), memory).is_err(), "{first} {count}");
            assert!(unexpected(intake.take(Kind::RoundEnd, &[0; 4], memory)), "nothing follows what was wrong");
        }
        let mut shared = Intake::new(TOKEN, 2, false);
        shared.number = Some(1);
        assert!(unexpected(shared.take(Kind::Pages, &body(598, 2, &content), memory)));
    }

    /// The other end lets 16 MiB of memory wait, however few bytes they are on the wire: it must never wait for more.
    #[test]
    fn acknowledgements_count_memory_and_not_the_bytes_it_was_packed_to() {
        let content = vec![3; PAGES_MAX as usize * 4096];
        let block = Packer::default().pack(&content).unwrap().to_vec();
        let mut intake = greeted(0);
        let mut due = Vec::new();
        for _ in 0..4 {
            intake.take(Kind::PackedPages, &body(0, 256, &block), memory).unwrap();
            due.push(intake.ack_is_due());
        }
        assert_eq!(due, [false, true, false, true]);
        for _ in 0..63 {
            intake.take(Kind::ZeroPages, &body(0, 1, &[]), memory).unwrap();
            assert!(!intake.ack_is_due());
        }
        intake.take(Kind::ZeroPages, &body(0, 1, &[]), memory).unwrap();
        assert!(intake.ack_is_due());
        intake.take(Kind::RoundEnd, &[0; 4], memory).unwrap();
        assert!(intake.ack_is_due());
        assert!(!intake.ack_is_due());
    }

    #[test]
    fn the_state_is_whole_or_it_is_none() {
        let mut intake = greeted(0);
        for part in [&b"st"[..], b"ate"] {
            assert_eq!(intake.take(Kind::State, part, memory), Ok(Step::Nothing));
            assert!(!intake.ack_is_due());
        }
        let digest = state_digest(b"state");
        assert_eq!(intake.take(Kind::End, &digest, memory), Ok(Step::State(b"state".to_vec())));
        assert!(unexpected(intake.take(Kind::End, &digest, memory)), "once");
        let mut intake = greeted(0);
        intake.take(Kind::State, b"stale", memory).unwrap();
        assert_eq!(intake.take(Kind::End, &digest, memory), Err(StreamError::OtherState));
        // Pages after it were not there when its source stood still.
        let mut intake = greeted(0);
        intake.take(Kind::State, b"state", memory).unwrap();
        assert!(unexpected(intake.take(Kind::ZeroPages, &body(0, 1, &[]), memory)));
        assert!(unexpected(greeted(1).take(Kind::State, b"state", memory)));
        assert!(unexpected(greeted(1).take(Kind::End, &digest, memory)));
        let mut intake = greeted(0);
        for _ in 0..STATE_BYTES_MAX >> 20 {
            intake.take(Kind::State, &[1; 1 << 20], memory).unwrap();
        }
        assert_eq!(intake.take(Kind::State, &[1], memory), Err(StreamError::TooMuchState));
    }
}
