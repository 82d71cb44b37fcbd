//! A VM's end of its tap: frames are written and read as its network device would.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv6Addr;
use std::os::fd::AsFd;

use hearth::net::member::{GATEWAY_V6, Member, TAP_MAC, link_local};
use hearth::sys::{netns, tap};
use hearth_guest_probe::frames::{echo, ethernet, ethertype, icmpv6, ipv6, protocol};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sniff::has;

/// Bytes of the header before each frame.
pub(crate) const HEADER_BYTES: usize = 12;

/// Longest wait for a frame, in milliseconds.
const WAIT_MS: u16 = 5_000;

/// Attached to a tap.
pub(crate) struct TapEnd(pub(crate) File);

impl TapEnd {
    /// Attaches to a tap in a namespace.
    pub(crate) fn attach(namespace: &impl AsFd, name: &str) -> Self {
        Self(netns::in_fd(namespace, || tap::open(name)).unwrap().unwrap())
    }

    /// Sends a frame; whether the tap takes it (not one too short for Ethernet).
    pub(crate) fn try_send(&self, frame: &[u8]) -> bool {
        let with_header = [&[0; HEADER_BYTES], frame].concat();
        match (&self.0).write(&with_header) {
            Ok(written) => written == with_header.len(),
            Err(error) if error.kind() == ErrorKind::InvalidInput => false,
            Err(error) => panic!("{error}"),
        }
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &[u8]) {
        assert!(self.try_send(frame), "{frame:02x?}");
    }

    /// A frame that is there already.
    pub(crate) fn take(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65_536 + HEADER_BYTES];
        match (&self.0).read(&mut buffer) {
            Ok(length) => Some(buffer[HEADER_BYTES..length].to_vec()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// All frames that are there with this text in them.
    pub(crate) fn take_with(&self, text: &str) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.take()).filter(|frame| has(frame, text)).collect()
    }

    /// The next frame that is as wanted, waiting for it.
    pub(crate) fn wait_for(&self, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        self.wait_within(WAIT_MS, wanted)
    }

    /// The next frame that is as wanted, if it comes within the limit.
    pub(crate) fn wait_within(&self, limit_ms: u16, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        loop {
            while let Some(frame) = self.take() {
                if wanted(&frame) {
                    return Some(frame);
                }
            }
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(limit_ms)).unwrap() == 0 {
                return None;
            }
        }
    }

    /// Waits until the jail answers. Of what comes in the moment after a tap was attached to, the kernel loses some:
    /// it starts the interface's queue a little later and tells nobody.
    pub(crate) fn wait_for_gateway(&self, member: &Member) {
        let from = link_local(member.mac);
        let request = icmpv6(from, GATEWAY_V6, (128, 0), &echo(7, 7, b"are you there"));
        let frame = self.framed(member, &ipv6(from, GATEWAY_V6, protocol::ICMPV6, &request));
        let is_answer = |frame: &[u8]| is_v6_from(frame, GATEWAY_V6) && has(frame, "are you there");
        let answered = (0..100).any(|_| {
            self.send(&frame);
            self.wait_within(50, is_answer).is_some()
        });
        assert!(answered, "the jail does not answer");
    }

    /// A frame from a VM's interface to its jail.
    pub(crate) fn framed(&self, member: &Member, packet: &[u8]) -> Vec<u8> {
        let kind = if packet[0] >> 4 == 4 { ethertype::IPV4 } else { ethertype::IPV6 };
        ethernet(TAP_MAC, member.mac, kind, packet)
    }
}

fn is_v6_from(frame: &[u8], from: Ipv6Addr) -> bool {
    frame.len() >= 54 && frame[12..14] == ethertype::IPV6.to_be_bytes() && frame[22..38] == from.octets()
}
