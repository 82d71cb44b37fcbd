//! Raw frames by packet sockets: sent, and counted.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use hearth_guest_probe::forge::{Kind, Party, Scene, frames};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, getsockopt, recvfrom, sendto,
    setsockopt, socket,
};

use crate::report::Report;
use crate::words::{Words, parse_mac};
use crate::{ProbeError, failed};

/// Room for what comes while this program does not run: a guest stands still when it moves.
const BUFFER_BYTES: usize = 32 << 20;

/// What the kernel says of frames that this host sent.
pub(crate) const PACKET_OUTGOING: u8 = 4;

pub(crate) fn kinds() -> Result<bool, ProbeError> {
    for kind in Kind::FORGED {
        println!("{}", kind.name());
    }
    Ok(true)
}

pub(crate) fn forge(mut words: Words) -> Result<bool, ProbeError> {
    let interface: String = words.option_needed("interface")?;
    let mut party = |name: &str| {
        let v4: Option<Ipv4Addr> = words.option(&format!("{name}4"))?;
        let v6: Ipv6Addr = words.option_needed(&format!("{name}6"))?;
        Ok(Party { v4, v6 })
    };
    let (own, other, victim) = (party("own")?, party("as")?, party("to")?);
    let mac = std::fs::read_to_string(format!("/sys/class/net/{interface}/address"));
    let mac = mac.map_err(failed("read the interface's hardware address"))?;
    let mac = parse_mac(&mac).ok_or_else(|| ProbeError::Words(format!("{interface} has no hardware address")))?;
    let gateway_mac = words.mac("gateway-mac")?;
    let marker = words.option_needed("marker")?;
    let repeat: u32 = words.option("repeat")?.unwrap_or(1);
    let mut wanted = Vec::new();
    while let Some(name) = words.next() {
        match (name.as_str(), Kind::named(&name)) {
            ("all", _) => wanted.extend(Kind::FORGED),
            (_, Some(kind)) => wanted.push(kind),
            (_, None) => return Err(ProbeError::Words(format!("no kind of frames is called {name}"))),
        }
    }
    words.end()?;
    let scene = Scene { mac, gateway_mac, own, other, victim, marker };
    let address = link_address(&interface)?;
    let socket = packet_socket()?;
    let (mut sent, mut refused) = (BTreeMap::new(), BTreeMap::new());
    for _ in 0..repeat {
        for kind in &wanted {
            for frame in frames(*kind, &scene) {
                match send_frame(&socket, &address, &frame) {
                    Ok(()) => *sent.entry(kind.name()).or_insert(0) += 1,
                    // Too short for this kernel's Ethernet, or too long.
                    Err(Errno::EINVAL | Errno::EMSGSIZE) => *refused.entry(kind.name()).or_insert(0) += 1,
                    Err(errno) => return Err(failed("send a frame")(errno)),
                }
            }
        }
    }
    let total: u64 = sent.values().sum();
    let report = Report::new("forge").text("marker", &scene.marker).number("sent", total);
    report.numbers("sent_by_kind", sent).numbers("refused_by_kind", refused).print();
    Ok(total > 0)
}

/// Sends, and waits while the interface's queue is full.
fn send_frame(socket: &OwnedFd, address: &LinkAddr, frame: &[u8]) -> Result<(), Errno> {
    loop {
        match sendto(socket.as_raw_fd(), frame, address, MsgFlags::empty()) {
            Err(Errno::ENOBUFS) => {
                poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], PollTimeout::from(10_u8))?;
            }
            other => return other.map(drop),
        }
    }
}

pub(crate) fn count(mut words: Words) -> Result<bool, ProbeError> {
    let interface: String = words.option_needed("interface")?;
    let marker: String = words.option_needed("marker")?;
    let until: Option<String> = words.option("until")?;
    let seconds: u64 = words.option_needed("seconds")?;
    words.end()?;
    let socket = packet_socket()?;
    widen(&socket);
    bind(socket.as_raw_fd(), &link_address(&interface)?).map_err(failed("listen on the interface"))?;
    Report::new("count").number("listening", true).print();
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let mut counted = Counted::default();
    let mut buffer = vec![0; 65_536 + 64];
    while !counted.ended && wait_until(&socket, deadline)? {
        let (length, from) =
            recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer).map_err(failed("receive a frame"))?;
        // A frame that was sent here is none that came in.
        if from.is_none_or(|from| from.pkttype() != PACKET_OUTGOING) {
            counted.take(&buffer[..length.min(buffer.len())], &marker, until.as_deref());
        }
    }
    let by_kind = counted.by_kind.iter().map(|(kind, count)| (kind.as_str(), *count));
    let report = Report::new("count").text("marker", &marker).number("frames", counted.frames);
    report.number("marked", counted.marked).numbers("by_kind", by_kind).number("ended", counted.ended).print();
    Ok(true)
}

/// Whether a frame can be received before `deadline`.
pub(crate) fn wait_until(socket: &OwnedFd, deadline: Instant) -> Result<bool, ProbeError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], left) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed("wait for a frame")(errno)),
        }
    }
}

#[derive(Default)]
struct Counted {
    frames: u64,
    marked: u64,
    by_kind: BTreeMap<String, u64>,
    ended: bool,
}

impl Counted {
    fn take(&mut self, frame: &[u8], marker: &str, until: Option<&str>) {
        self.frames += 1;
        if let Some(rest) = after(frame, marker.as_bytes()) {
            self.marked += 1;
            // What follows the marker, as `forge` writes it.
            let name = rest.strip_prefix(b":").and_then(|rest| rest.split(|byte| *byte == b';').next());
            let kind = name.and_then(|name| Kind::named(std::str::from_utf8(name).ok()?));
            *self.by_kind.entry(kind.map_or("other", Kind::name).to_owned()).or_insert(0) += 1;
        }
        self.ended |= until.is_some_and(|until| after(frame, until.as_bytes()).is_some());
    }
}

/// What follows the first place where `wanted` is.
pub(crate) fn after<'a>(frame: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let at = frame.windows(wanted.len().max(1)).position(|window| window == wanted)?;
    frame.get(at + wanted.len()..)
}

/// Gives a socket as much room as it may have; how much that is.
pub(crate) fn widen(socket: &impl AsFd) -> usize {
    if setsockopt(socket, RcvBufForce, &BUFFER_BYTES).is_err() {
        let _ = setsockopt(socket, RcvBuf, &BUFFER_BYTES);
    }
    getsockopt(socket, RcvBuf).unwrap_or(0)
}

pub(crate) fn packet_socket() -> Result<OwnedFd, ProbeError> {
    let opened = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll);
    opened.map_err(failed("open a packet socket"))
}

/// The interface as packet sockets are bound to and send by it.
pub(crate) fn link_address(interface: &str) -> Result<LinkAddr, ProbeError> {
    let mut addresses = getifaddrs().map_err(failed("list interfaces"))?;
    let found = addresses.find_map(|entry| {
        let address = entry.address.as_ref()?.as_link_addr().copied();
        address.filter(|_| entry.interface_name == interface)
    });
    found.ok_or_else(|| failed("find the interface")(std::io::Error::from(ErrorKind::NotFound)))
}
