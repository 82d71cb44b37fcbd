//! A stream of numbered datagrams, at a fixed rate.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use hearth_guest_probe::datagram::Datagram;

use crate::report::Report;
use crate::stdin::Stdin;
use crate::words::{Words, socket_address};
use crate::{ProbeError, failed};

/// How many say at the end how many there were: one of them will come.
const LAST: u64 = 3;

/// Longest wait between two looks at whether to end.
const LOOK: Duration = Duration::from_millis(200);

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let by = words.need("udp")?;
    let address = words.need("an address")?;
    let port = words.need("a port")?;
    let port = port.parse().map_err(|error| ProbeError::Words(format!("{port}: {error}")))?;
    let to = socket_address(&address, port)?;
    let rate: u32 = words.option_needed("rate")?;
    let seconds: u64 = words.option_needed("seconds")?;
    let bytes: usize = words.option("bytes")?.unwrap_or(64);
    let stream = words.option("stream")?.unwrap_or_else(|| u64::from(std::process::id()));
    let from: Option<IpAddr> = words.option("from")?;
    let mut stdin = Stdin::of(&mut words)?;
    words.end()?;
    if by != "udp" || rate == 0 {
        return Err(ProbeError::Words(format!("by {by}, {rate} in a second?")));
    }
    let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((from.unwrap_or(any), 0)).map_err(failed("take the address to send from"))?;
    let mut sender = Sender { socket, to, stream, bytes, sent: 0, unsent: 0, longest_late: Duration::ZERO };
    Report::new("send").number("sending", true).print();
    let begun = Instant::now();
    let mut number = 0;
    let most = u64::from(rate).saturating_mul(seconds);
    while number < most && !stdin.has_ended()? {
        let due = Duration::from_nanos(number.saturating_mul(1_000_000_000) / u64::from(rate));
        match due.checked_sub(begun.elapsed()).filter(|early| !early.is_zero()) {
            Some(early) => thread::sleep(early.min(LOOK)),
            None => {
                sender.longest_late = sender.longest_late.max(begun.elapsed().saturating_sub(due));
                sender.send(number, None);
                number += 1;
            }
        }
    }
    let total = number + LAST;
    for number in number..total {
        sender.send(number, Some(total));
    }
    let took = begun.elapsed();
    Report::new("send")
        .text("to", to)
        .number("stream", stream)
        .number("total", total)
        .number("sent", sender.sent)
        .number("unsent", sender.unsent)
        .number("seconds", took.as_secs_f64())
        .number("late_ms_max", sender.longest_late.as_millis())
        .print();
    Ok(sender.unsent == 0)
}

struct Sender {
    socket: UdpSocket,
    to: SocketAddr,
    stream: u64,
    bytes: usize,
    sent: u64,
    unsent: u64,
    /// How far behind its time one was sent.
    longest_late: Duration,
}

impl Sender {
    fn send(&mut self, number: u64, total: Option<u64>) {
        let datagram = Datagram { stream: self.stream, number, total };
        // What this host's network refuses for now is lost like what the network loses later, but known.
        match self.socket.send_to(&datagram.to_bytes(self.bytes), self.to) {
            Ok(_) => self.sent += 1,
            Err(_) => self.unsent += 1,
        }
    }
}
