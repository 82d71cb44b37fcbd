//! Hears every frame on every link of a namespace, and sends packets that nobody vouches for.

use std::net::{SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hearth::sys::netns;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recv, sendto, setsockopt,
    socket, sockopt,
};

/// A packet socket of all links.
pub(crate) struct Sniffer(OwnedFd);

impl Sniffer {
    /// Of this thread's namespace.
    pub(crate) fn here() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        Self(socket)
    }

    /// Of another namespace.
    pub(crate) fn in_fd(namespace: &impl AsFd) -> Self {
        netns::in_fd(namespace, Self::here).unwrap()
    }

    /// What was heard since the last time. Nothing may have been missed.
    pub(crate) fn heard(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 65_536];
        loop {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => frames.push(buffer[..length].to_vec()),
                Err(Errno::EAGAIN) => return frames,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What was heard with these bytes in it.
    pub(crate) fn heard_with(&self, marker: &str) -> Vec<Vec<u8>> {
        self.heard().into_iter().filter(|frame| has(frame, marker)).collect()
    }
}

/// Sends whole packets, addresses and all, as only root can.
pub(crate) struct RawPackets {
    v6: OwnedFd,
    v4: OwnedFd,
}

impl RawPackets {
    /// From this thread's namespace.
    pub(crate) fn open() -> Self {
        let raw = |family| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).unwrap();
        Self { v6: raw(AddressFamily::Inet6), v4: raw(AddressFamily::Inet) }
    }

    /// Sends a packet to where it says.
    pub(crate) fn send(&self, packet: &[u8]) {
        let sent = if packet[0] >> 4 == 4 {
            let to: [u8; 4] = packet[16..20].try_into().unwrap();
            let to = SockaddrIn::from(SocketAddrV4::new(to.into(), 0));
            sendto(self.v4.as_raw_fd(), packet, &to, MsgFlags::empty())
        } else {
            let to: [u8; 16] = packet[24..40].try_into().unwrap();
            let to = SockaddrIn6::from(SocketAddrV6::new(to.into(), 0, 0, 0));
            sendto(self.v6.as_raw_fd(), packet, &to, MsgFlags::empty())
        };
        assert_eq!(sent.unwrap(), packet.len());
    }
}

/// Whether the text is in the frame.
pub(crate) fn has(frame: &[u8], text: &str) -> bool {
    frame.windows(text.len()).any(|window| window == text.as_bytes())
}
