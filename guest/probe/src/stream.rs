//! Numbered datagrams counted: as a program receives them, or as frames that leave by an interface.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use hearth_guest_probe::datagram::{Datagram, MAGIC, Unreadable};
use hearth_guest_probe::numbers::Tally;
use nix::fcntl::FcntlArg::F_SETFL;
use nix::fcntl::{OFlag, fcntl};
use nix::sys::socket::{LinkAddr, bind, recvfrom};

use crate::packet::{PACKET_OUTGOING, after, link_address, packet_socket, wait_until, widen};
use crate::report::Report;
use crate::stdin::{Stdin, wait_for_end};
use crate::words::Words;
use crate::{ProbeError, failed};

/// Longest wait between two looks at whether to end.
const LOOK: Duration = Duration::from_millis(200);

/// Most runs of missing numbers that are named.
const HOLES_SHOWN: usize = 16;

/// After the sender said how many there are, those that are missing are waited for so long.
const PATIENCE: Duration = Duration::from_secs(3);

/// `count udp`.
pub(crate) fn count(mut words: Words) -> Result<bool, ProbeError> {
    let port = words.need("a port")?;
    let port: u16 = port.parse().map_err(|error| ProbeError::Words(format!("{port}: {error}")))?;
    let limit = Duration::from_secs(words.option_needed("seconds")?);
    let first: Option<u64> = words.option("first")?;
    let stream = words.option("stream")?;
    let read: Option<String> = words.option("read")?;
    let mut stdin = Stdin::of(&mut words)?;
    words.end()?;
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let only_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let socket = UdpSocket::bind(both).or_else(|_| UdpSocket::bind(only_v4)).map_err(failed("listen for UDP"))?;
    let room = widen(&socket);
    socket.set_read_timeout(Some(LOOK)).map_err(failed("set a limit to waiting"))?;
    Report::new("count").number("listening", true).number("port", port).number("room_bytes", room).print();
    let deadline = Instant::now() + limit;
    match read.as_deref() {
        None => {}
        // What comes meanwhile stays where the kernel put it.
        Some("late") => drop(wait_for_end(limit)?),
        Some(other) => return Err(ProbeError::Words(format!("--read {other}?"))),
    }
    let mut counted = Counted::new(stream, first);
    let mut buffer = vec![0; 65_536];
    while Instant::now() < deadline && !counted.is_whole() {
        match socket.recv_from(&mut buffer) {
            Ok((length, _)) => {
                counted.take(&buffer[..length]);
                // A stream may never pause; one that is read late is read to its end.
                if read.is_none() && stdin.has_ended()? {
                    break;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                // Only when nothing is left to be read.
                if counted.is_waited_for() || stdin.has_ended()? {
                    break;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("receive")(error)),
        }
    }
    Ok(counted.print(Report::new("count")))
}

/// `watch`.
pub(crate) fn watch(mut words: Words) -> Result<bool, ProbeError> {
    let interface: String = words.option_needed("interface")?;
    let limit = Duration::from_secs(words.option_needed("seconds")?);
    let stream = words.option("stream")?;
    let mut stdin = Stdin::of(&mut words)?;
    words.end()?;
    let socket = packet_socket()?;
    widen(&socket);
    bind(socket.as_raw_fd(), &link_address(&interface)?).map_err(failed("listen on the interface"))?;
    Report::new("watch").number("listening", true).print();
    let deadline = Instant::now() + limit;
    let mut counted = Counted::new(stream, None);
    let mut frames: u64 = 0;
    let mut buffer = vec![0; 65_536 + 64];
    while Instant::now() < deadline {
        if !wait_until(&socket, deadline.min(Instant::now() + LOOK))? {
            if stdin.has_ended()? {
                break;
            }
            continue;
        }
        let Some((length, from)) = next_frame(&socket, &mut buffer)? else { break };
        if from.is_some_and(|from| from.pkttype() == PACKET_OUTGOING) {
            frames += 1;
            let frame = &buffer[..length.min(buffer.len())];
            if let Some(rest) = after(frame, &MAGIC) {
                counted.take(&frame[frame.len() - rest.len() - MAGIC.len()..]);
            }
        }
    }
    Ok(counted.print(Report::new("watch").text("interface", interface).number("frames", frames)))
}

/// The next frame; none if the interface went away. That is told before what came until then, which is still read.
fn next_frame(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Option<(usize, Option<LinkAddr>)>, ProbeError> {
    use nix::errno::Errno::{EAGAIN, EINTR, ENETDOWN, ENODEV, ENXIO};
    loop {
        let received = recvfrom::<LinkAddr>(socket.as_raw_fd(), buffer);
        match received {
            Ok(received) => return Ok(Some(received)),
            Err(EINTR) => {}
            Err(ENETDOWN) => {
                fcntl(socket, F_SETFL(OFlag::O_NONBLOCK)).map_err(failed("read what is left"))?;
            }
            Err(EAGAIN | ENODEV | ENXIO) => return Ok(None),
            Err(errno) => return Err(failed("receive a frame")(errno)),
        }
    }
}

/// What came of one stream.
struct Counted {
    /// Which: the first one that is seen, if none is named.
    stream: Option<u64>,
    tally: Tally,
    total: Option<u64>,
    foreign: u64,
    corrupt: u64,
    last_at: Option<Instant>,
    longest_gap: Duration,
    gap_before: u64,
}

impl Counted {
    fn new(stream: Option<u64>, first: Option<u64>) -> Self {
        Self {
            stream,
            tally: first.map_or_else(Tally::new, Tally::from_number),
            total: None,
            foreign: 0,
            corrupt: 0,
            last_at: None,
            longest_gap: Duration::ZERO,
            gap_before: 0,
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        let datagram = match Datagram::from_bytes(bytes) {
            Ok(datagram) if self.stream.is_none_or(|stream| stream == datagram.stream) => datagram,
            Ok(_) | Err(Unreadable::Foreign) => return self.foreign += 1,
            Err(Unreadable::Corrupt) => return self.corrupt += 1,
        };
        self.stream = Some(datagram.stream);
        self.total = self.total.or(datagram.total);
        let now = Instant::now();
        let gap = self.last_at.map_or(Duration::ZERO, |last| now - last);
        if gap > self.longest_gap {
            (self.longest_gap, self.gap_before) = (gap, datagram.number);
        }
        self.last_at = Some(now);
        self.tally.take(datagram.number);
    }

    /// Whether the end was told and nothing is missing.
    fn is_whole(&self) -> bool {
        self.total.is_some() && self.tally.lost(self.total) == 0
    }

    /// Whether the end was told and what is missing was waited for.
    fn is_waited_for(&self) -> bool {
        self.total.is_some() && self.last_at.is_some_and(|last| last.elapsed() >= PATIENCE)
    }

    fn print(&self, report: Report) -> bool {
        let (first, last) = self.tally.bounds().unwrap_or((0, 0));
        let lost = self.tally.lost(self.total);
        let holes: Vec<String> =
            self.tally.missing().take(HOLES_SHOWN).map(|hole| format!("[{},{}]", hole.start, hole.end - 1)).collect();
        report
            .number("stream", self.stream.unwrap_or(0))
            .number("ended", self.total.is_some())
            .number("total", self.total.unwrap_or(0))
            .number("received", self.tally.received())
            .number("first", first)
            .number("last", last)
            .number("lost", lost)
            .number("holes", format!("[{}]", holes.join(",")))
            .number("longest_hole", self.tally.longest_hole(self.total))
            .number("duplicates", self.tally.duplicates())
            .number("out_of_order", self.tally.out_of_order())
            .number("untold", self.tally.untold())
            .number("corrupt", self.corrupt)
            .number("foreign", self.foreign)
            .number("longest_gap_ms", self.longest_gap.as_secs_f64() * 1000.0)
            .number("gap_before", self.gap_before)
            .print();
        let wrong = [lost, self.tally.duplicates(), self.tally.out_of_order(), self.tally.untold(), self.corrupt];
        wrong.iter().all(|count| *count == 0)
    }
}
