//! Echoes of ICMP and ICMPv6 over raw sockets.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use hearth_guest_probe::frames::{echo, icmp};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto, setsockopt, socket,
};
use nix::sys::time::TimeVal;

use crate::report::{Answers, Report};
use crate::words::{Words, socket_address};
use crate::{ProbeError, failed};

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let address = words.need("an address")?;
    let to = socket_address(&address, 0)?;
    let bytes: usize = words.option("bytes")?.unwrap_or(56);
    let count: u16 = words.option("count")?.unwrap_or(1);
    let wait = Duration::from_millis(words.option("wait-ms")?.unwrap_or(5000));
    words.end()?;
    let (family, protocol) = match to {
        SocketAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        SocketAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let socket =
        socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).map_err(failed("open a raw socket"))?;
    let [_, _, id @ ..] = std::process::id().to_be_bytes();
    let pinger = Pinger { socket, to, id: u16::from_be_bytes(id), bytes, wait };
    let mut answers = Answers::default();
    for number in 0..count {
        answers.take(pinger.ask(number));
    }
    Ok(answers.print(Report::new("ping").text("to", to.ip()).number("bytes", bytes)))
}

struct Pinger {
    socket: OwnedFd,
    to: SocketAddr,
    id: u16,
    bytes: usize,
    wait: Duration,
}

impl Pinger {
    fn ask(&self, number: u16) -> io::Result<Option<Duration>> {
        const REQUEST_V4: u8 = 8;
        const REQUEST_V6: u8 = 128;
        let payload: Vec<u8> = (0..self.bytes).map(|at| at.to_le_bytes()[0]).collect();
        let body = echo(self.id, number, &payload);
        // The kernel writes ICMPv6's checksum: it alone knows the source address.
        let question = match self.to {
            SocketAddr::V4(_) => icmp(REQUEST_V4, 0, &body),
            SocketAddr::V6(_) => [&[REQUEST_V6, 0, 0, 0], &body[..]].concat(),
        };
        let started = Instant::now();
        sendto(self.socket.as_raw_fd(), &question, &SockaddrStorage::from(self.to), MsgFlags::empty())?;
        let mut buffer = vec![0; 65_536];
        loop {
            let left = self.wait.checked_sub(started.elapsed()).filter(|left| left.as_millis() > 0);
            let left = TimeVal::new(0, 0).max(time_value(left.ok_or(ErrorKind::TimedOut)?));
            setsockopt(&self.socket, ReceiveTimeout, &left)?;
            let count = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let message = self.without_header(&buffer[..count]);
            // Type, code, checksum, then what was sent: everything else is somebody else's.
            if message.first() == Some(&self.reply()) && message.get(4..8) == body.get(..4) {
                return Ok((message[4..] == body).then(|| started.elapsed()));
            }
        }
    }

    const fn reply(&self) -> u8 {
        match self.to {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(_) => 129,
        }
    }

    /// IPv4's raw sockets give the header as well.
    fn without_header<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        match (self.to, packet.first()) {
            (SocketAddr::V4(_), Some(first)) => packet.get(usize::from(first & 15) * 4..).unwrap_or_default(),
            _ => packet,
        }
    }
}

fn time_value(time: Duration) -> TimeVal {
    TimeVal::new(time.as_secs().cast_signed(), time.subsec_micros().into())
}
