//! Notice that something changed: multicast groups of netlink sockets.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{MsgFlags, recv};

/// Datagrams read by one [`Watch::drain`]: more are left for the next, so that a storm holds nobody.
const DRAIN_MAX: u32 = 1024;

/// Groups of rtnetlink (linux/rtnetlink.h).
const ROUTE_GROUPS: [u32; 6] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
];

/// The group of nftables (linux/netfilter/nfnetlink.h NFNLGRP_NFTABLES).
const NFTABLES_GROUP: u32 = 7;

/// A socket that becomes readable when something of its namespace changes: also by this program. What changed is not
/// said; look. It stays in the namespace it was opened in and keeps it from ending.
#[derive(Debug)]
pub struct Watch {
    socket: Socket,
}

impl Watch {
    /// Watches links, addresses, routes and neighbours of the calling thread's network namespace.
    pub fn links_and_routes() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE, &ROUTE_GROUPS)
    }

    /// Watches the nftables rules and sets of the calling thread's network namespace.
    pub fn rules() -> io::Result<Self> {
        Self::open(NETLINK_NETFILTER, &[NFTABLES_GROUP])
    }

    fn open(protocol: isize, groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.set_non_blocking(true)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Ok(Self { socket })
    }

    /// Takes what has come and says whether it was anything. When more came than the socket holds, that is a change
    /// too. Never blocks.
    pub fn drain(&self) -> io::Result<bool> {
        let mut changed = false;
        // What it says is not read: a datagram longer than this is cut.
        let mut buffer = [0; 64];
        for _ in 0..DRAIN_MAX {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(nix::Error::ENOBUFS) => changed = true,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Ok(changed),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(changed)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}
