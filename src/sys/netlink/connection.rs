//! A netlink socket that is asked and answers (netlink(7), RFC 3549): framing, sequence numbers, acknowledgements,
//! dumps. What the messages mean is for others: `netlink` (rtnetlink) and `nft` (nfnetlink).
//!
//! Requests are numbered; an answer to an earlier request, one that was given up, is passed over. Only the last request
//! of a send asks for an acknowledgement: the kernel works through them in order and always reports what it refuses.

use std::io;
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_CAPPED, NLM_F_DUMP_INTR, NlaBuffer, NlasIterator};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// How long an answer may take, in seconds. The kernel answers within the call; only a lock held by a slow driver or
/// by the teardown of many namespaces is waited for.
const ANSWER_S: i64 = 5;

/// How often a dump is begun again because what it lists changed meanwhile.
const DUMP_TRIES: u32 = 16;

/// Signals that may interrupt one wait.
const INTERRUPTS_MAX: u32 = 64;

/// More than the kernel puts in one datagram of a dump (32 KiB).
const RECEIVE_BYTES: usize = 1 << 16;

/// Room for a request with an element for every VM of a host.
const REQUEST_BYTES: usize = 1 << 21;

/// Bytes of `struct nlmsghdr`.
pub(in crate::sys) const HEADER_BYTES: usize = 16;

/// One message: kind, flags and sequence number of its header, and what follows the header.
pub(in crate::sys) struct Message<'a> {
    pub(in crate::sys) kind: u16,
    pub(in crate::sys) flags: u16,
    pub(in crate::sys) sequence: u32,
    pub(in crate::sys) body: &'a [u8],
}

/// The kernel's no.
#[derive(Debug)]
pub(in crate::sys) struct Refusal {
    /// errno.
    pub(in crate::sys) errno: i32,
    /// What the kernel says about it (extended acknowledgement), if anything.
    pub(in crate::sys) text: Option<String>,
}

impl From<Refusal> for io::Error {
    fn from(refusal: Refusal) -> Self {
        let error = Self::from_raw_os_error(refusal.errno);
        match refusal.text {
            Some(text) => Self::new(error.kind(), format!("{error}: {text}")),
            None => error,
        }
    }
}

/// A blocking netlink socket of the namespace it was opened in.
#[derive(Debug)]
pub(in crate::sys) struct Connection {
    socket: Socket,
    sequence: u32,
    buffer: Box<[u8]>,
}

impl Connection {
    /// Opens one in the calling thread's network namespace.
    pub(in crate::sys) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        // Only the kernel.
        socket.connect(&SocketAddr::new(0, 0))?;
        // Errors in words; and without a copy of the request.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_S, 0))?;
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(ANSWER_S, 0))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BYTES].into_boxed_slice() })
    }

    /// Has the kernel refuse dump requests with parts it does not know, and honour the filters it does.
    pub(in crate::sys) fn set_strict(&self) -> io::Result<()> {
        self.socket.set_netlink_get_strict_chk(true)
    }

    /// Takes requests of up to about 2 MiB, where the system's usual limit is 200 KiB. Needs CAP_NET_ADMIN, as do the
    /// requests; without it the limit stays.
    pub(in crate::sys) fn make_room_for_large_requests(&self) {
        let _ = setsockopt(&self.socket, sockopt::SndBufForce, &REQUEST_BYTES);
    }

    /// `count` numbers for requests; the first of them. They follow each other.
    pub(in crate::sys) fn numbers(&mut self, count: u32) -> u32 {
        // 0 is what the kernel's own messages have.
        if self.sequence.checked_add(count).is_none() {
            self.sequence = 0;
        }
        let first = self.sequence + 1;
        self.sequence += count;
        first
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        for _ in 0..INTERRUPTS_MAX {
            match send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    /// Receives one datagram.
    fn receive(&mut self) -> io::Result<&[u8]> {
        for _ in 0..INTERRUPTS_MAX {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC) {
                Ok(bytes) => {
                    let whole = self.buffer.get(..bytes);
                    return whole.ok_or_else(|| invalid("a netlink datagram longer than any"));
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel did not answer by netlink"));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    /// Sends requests numbered from `first` to `last`, of which the last asks for an acknowledgement, and waits for it.
    /// Returns what was refused, by number. A refusal of `first` may be one of all (nfnetlink) and is the end when
    /// `first_is_all`.
    pub(in crate::sys) fn transact(
        &mut self,
        requests: &[u8],
        first: u32,
        last: u32,
        first_is_all: bool,
    ) -> io::Result<Vec<(u32, Refusal)>> {
        self.send(requests)?;
        let mut refused = Vec::new();
        loop {
            let mut done = false;
            for message in messages(self.receive()?) {
                if message.kind != ERROR || !(first..=last).contains(&message.sequence) {
                    continue;
                }
                let answer = refusal(&message)?;
                done |= message.sequence == last || (first_is_all && message.sequence == first && answer.is_some());
                refused.extend(answer.map(|refusal| (message.sequence, refusal)));
            }
            if done {
                return Ok(refused);
            }
        }
    }

    /// Sends one request that has one answer, and hands that to `read`.
    pub(in crate::sys) fn ask<T>(
        &mut self,
        request: &[u8],
        number: u32,
        read: impl Fn(&Message<'_>) -> Option<T>,
    ) -> io::Result<T> {
        self.send(request)?;
        loop {
            let Some(message) = messages(self.receive()?).find(|message| message.sequence == number) else { continue };
            if message.kind == ERROR {
                let refusal = refusal(&message)?;
                return Err(refusal.map_or_else(|| invalid("an acknowledgement in place of an answer"), Into::into));
            }
            return read(&message).ok_or_else(|| invalid("an answer by netlink that makes no sense"));
        }
    }

    /// Sends a request for a list and hands every entry to `read`, which leaves out what is `None`. `request` is given
    /// the number; it is sent again when the list changed while it was read, so the answer is of one moment.
    pub(in crate::sys) fn dump<T>(
        &mut self,
        request: impl Fn(u32) -> Vec<u8>,
        read: impl Fn(&Message<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let number = self.numbers(1);
            self.send(&request(number))?;
            match self.dump_once(number, &read) {
                Ok(Some(list)) => return Ok(list),
                Ok(None) => {}
                // The answer was longer than the socket's buffer has room for at this moment.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "the network changed during every listing of it"))
    }

    /// Reads a dump to its end, also when it turns out to be torn, which gives `None`.
    fn dump_once<T>(&mut self, number: u32, read: &impl Fn(&Message<'_>) -> Option<T>) -> io::Result<Option<Vec<T>>> {
        let mut list = Vec::new();
        let mut torn = false;
        loop {
            for message in messages(self.receive()?).filter(|message| message.sequence == number) {
                torn |= message.flags & NLM_F_DUMP_INTR != 0;
                if message.kind == ERROR {
                    let refusal = refusal(&message)?;
                    return Err(refusal.map_or_else(|| invalid("an acknowledgement in place of a list"), Into::into));
                }
                if message.kind == DONE {
                    let code = i32_at(message.body, 0).unwrap_or(0);
                    if code < 0 {
                        return if -code == libc::EINTR { Ok(None) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    return Ok((!torn).then_some(list));
                }
                list.extend(read(&message));
            }
        }
    }
}

/// Kinds of messages of every netlink protocol (linux/netlink.h).
const ERROR: u16 = 2;
const DONE: u16 = 3;

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What an acknowledgement says: `None` is yes.
fn refusal(message: &Message<'_>) -> io::Result<Option<Refusal>> {
    let code = i32_at(message.body, 0).ok_or_else(|| invalid("a netlink error without a code"))?;
    if code == 0 {
        return Ok(None);
    }
    let echoed = u32_at(message.body, 4).and_then(|length| usize::try_from(length).ok()).unwrap_or(HEADER_BYTES);
    let capped = message.flags & NLM_F_CAPPED != 0;
    let skipped = 4 + if capped { HEADER_BYTES } else { echoed.next_multiple_of(4) };
    let after = message.body.get(skipped..).unwrap_or_default();
    let text = attributes(after).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG).map(|(_, value)| string(value));
    Ok(Some(Refusal { errno: code.saturating_neg(), text }))
}

/// linux/netlink.h: text of an extended acknowledgement.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The messages of a datagram; what is cut off at its end is passed over.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let whole = rest.get(..length)?;
        let body = whole.get(HEADER_BYTES..)?;
        let message = Message { kind: u16_at(rest, 4)?, flags: u16_at(rest, 6)?, sequence: u32_at(rest, 8)?, body };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`: kind and value. Stops at what is not one.
pub(in crate::sys) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let nlas = NlasIterator::new(bytes).map_while(Result::ok);
    nlas.map(move |nla: NlaBuffer<&[u8]>| (nla.kind(), value_of(&nla)))
}

fn value_of<'a>(nla: &NlaBuffer<&'a [u8]>) -> &'a [u8] {
    let whole: &'a [u8] = (*nla).into_inner();
    whole.get(4..4 + nla.value_length()).unwrap_or_default()
}

pub(in crate::sys) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(in crate::sys) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(in crate::sys) fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A string that ends with a zero.
pub(in crate::sys) fn string(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        bytes.extend([sequence.to_ne_bytes(), [0; 4]].concat());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn an_error_is_read_with_its_words_whether_the_request_is_echoed_or_not() {
        let words = [&[9, 0, 1, 0][..], b"no !\0", &[0; 3]].concat();
        let code = (-libc::ENOENT).to_ne_bytes();
        let echoed = message(7, 0, 3, b"abcde");
        let (header, padded) = (&echoed[..HEADER_BYTES], &echoed[..]);
        for (flags, request) in [(0, padded), (NLM_F_CAPPED, header)] {
            let bytes = message(ERROR, flags, 3, &[&code[..], request, &words].concat());
            let found: Vec<Message<'_>> = messages(&bytes).collect();
            let refusal = refusal(&found[0]).unwrap().unwrap();
            assert_eq!((refusal.errno, refusal.text.as_deref()), (libc::ENOENT, Some("no !")));
            let error = io::Error::from(refusal);
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
            assert!(error.to_string().ends_with("no !"), "{error}");
        }
        let yes = message(ERROR, 0, 3, &[0; 20]);
        assert!(refusal(&messages(&yes).next().unwrap()).unwrap().is_none());
    }

    #[test]
    fn numbers_never_are_0_and_never_run_over() {
        let mut connection = Connection::open(netlink_sys::protocols::NETLINK_ROUTE).unwrap();
        assert_eq!((connection.numbers(1), connection.numbers(3), connection.numbers(1)), (1, 2, 5));
        connection.sequence = u32::MAX - 1;
        assert_eq!((connection.numbers(2), connection.numbers(1)), (1, 3));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for message in messages(&bytes) {
                let _ = refusal(&message);
                for (_, value) in attributes(message.body) {
                    let _ = attributes(value).count();
                }
            }
            prop_assert!(attributes(&bytes).count() <= bytes.len() / 4);
        }

        #[test]
        fn messages_are_found_one_after_the_other(bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..5)) {
            let bytes: Vec<u8> = bodies.iter().flat_map(|body| message(9, 0, 5, body)).collect();
            let found: Vec<&[u8]> = messages(&bytes).map(|message| message.body).collect();
            prop_assert_eq!(found, bodies.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }
    }
}
