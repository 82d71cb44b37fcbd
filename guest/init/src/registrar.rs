//! Registering with a registrar elsewhere: one TCP connection, one line each way, all of it while others are served.

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use hearth_guest_wire::registrar::{ANSWER_BYTES_MAX, Answer, read_answer, register_line};
use hearth_guest_wire::{Endpoint, Join, Registration};

use crate::identity::failed;
use crate::link::Refusal;
use crate::sys::{self, Epoll, Errno, Fd, Happened, Interest};

/// A conversation with a registrar.
pub(crate) struct RegistrarCall {
    socket: Fd,
    join: Join,
    line: Vec<u8>,
    sent: usize,
    answer: Vec<u8>,
    writable: bool,
    readable: bool,
}

impl RegistrarCall {
    /// Begins to connect.
    pub(crate) fn place(
        endpoint: Endpoint,
        join: Join,
        registration: &Registration,
        epoll: &Epoll,
        token: u64,
    ) -> Result<Box<Self>, Refusal> {
        let socket = sys::connect_tcp(endpoint).map_err(failed("reach the registrar"))?;
        epoll.add(&socket, token, Interest::Edges).map_err(failed("listen to the registrar"))?;
        let line = register_line(registration);
        Ok(Box::new(Self { socket, join, line, sent: 0, answer: Vec::new(), writable: false, readable: false }))
    }

    /// What was to be joined. Ends the conversation.
    pub(crate) fn into_join(self) -> Join {
        self.join
    }

    /// Remembers what the loop heard.
    pub(crate) fn note(&mut self, happened: Happened) {
        self.writable |= happened.writable;
        self.readable |= happened.readable;
    }

    /// Does what can be done now; the epoch of the registration once it is made.
    pub(crate) fn go_on(&mut self, scratch: &mut [u8]) -> Option<Result<u64, Refusal>> {
        while self.writable && self.sent < self.line.len() {
            match sys::send(&self.socket, self.line.get(self.sent..).unwrap_or_default()) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                // What became of the connection attempt comes here, too.
                Err(errno) => return Some(Err(failed("reach the registrar")(errno))),
            }
        }
        while self.readable && self.sent == self.line.len() {
            let room = scratch.len().min(ANSWER_BYTES_MAX + 1 - self.answer.len());
            match sys::receive(&self.socket, scratch.get_mut(..room).unwrap_or_default()) {
                Ok(count @ 1..) => self.answer.extend_from_slice(scratch.get(..count).unwrap_or_default()),
                Ok(_) => return Some(Err(nonsense("the registrar hung up before it answered"))),
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(errno) => return Some(Err(failed("hear the registrar")(errno))),
            }
            if let Some(line) = self.answer.split_inclusive(|byte| *byte == b'\n').next()
                && let Some(line) = line.strip_suffix(b"\n")
                && self.answer.len() <= ANSWER_BYTES_MAX
            {
                return Some(understand(line));
            }
            if self.answer.len() > ANSWER_BYTES_MAX {
                return Some(Err(nonsense("the registrar's answer is too long")));
            }
        }
        None
    }
}

fn understand(line: &[u8]) -> Result<u64, Refusal> {
    match read_answer(line) {
        Ok(Answer::Registered { epoch }) => Ok(epoch),
        Ok(Answer::Refused { reason }) => {
            Err(Refusal { errno: Errno::ACCES, what: Some(format!("the registrar refuses: {reason}")) })
        }
        Err(_) => Err(nonsense("the registrar's answer is none")),
    }
}

fn nonsense(what: &str) -> Refusal {
    Refusal { errno: Errno::PROTO, what: Some(String::from(what)) }
}
