//! The kernel's networks by rtnetlink(7): links, addresses, routes, neighbours. What is there is listed; changes are
//! gathered in a [`Batch`] and made with one send.
//!
//! A [`Netlink`] works on the namespace it was opened in, for good, from whatever thread. It blocks, for microseconds
//! as a rule and 5 s at most. Changes are made so that making them twice is as good as once: what is there already is
//! replaced, what is gone already is not missed.
//!
//! Requests are built with the typed messages of `netlink-packet-route`. Answers are not read with them: a list holds
//! everything a host has, also of kinds they cannot read, of which only some attributes matter here.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

mod address;
mod batch;
pub(in crate::sys) mod connection;
mod link;
mod neighbour;
mod route;
mod watch;

pub use address::Address;
pub use batch::{Batch, RefusedChange, RunBatchError};
pub use link::{Link, LinkChange, LinkRef, MacAddress, NewVeth, NewVxlan, VethPeer, VxlanFacts};
pub use neighbour::{Forwarding, Neighbour};
pub use route::{Route, RouteKind};
pub use watch::Watch;

use connection::{Connection, attributes, i32_at};

/// linux/net_namespace.h: the number a namespace has in another one.
const NETNSA_NSID: u16 = 1;

/// Bytes of `struct rtgenmsg`, padded.
const GENERAL_HEADER_BYTES: usize = 4;

/// A connection to the kernel's network configuration of one namespace.
#[derive(Debug)]
pub struct Netlink {
    connection: Connection,
}

impl Netlink {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let connection = Connection::open(NETLINK_ROUTE)?;
        connection.set_strict()?;
        Ok(Self { connection })
    }

    /// Makes all changes of `batch`, in order. A change that is refused does not keep the others from being made; all
    /// that were refused are in the error.
    pub fn run(&mut self, batch: &Batch<'_>) -> Result<(), RunBatchError> {
        batch.run(&mut self.connection)
    }

    /// All links.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        self.list(link::all, link::read)
    }

    /// The link `name`; `None` if there is none.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let number = self.connection.numbers(1);
        let request = encode(link::by_name(name), NLM_F_REQUEST, number);
        match self.connection.ask(&request, number, |message| link::read(message.body)) {
            Ok(link) => Ok(Some(link)),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Packets that the link `name` was given to send and dropped: a tap, because nobody took those before from its queue.
    /// Fails with `ENODEV` if there is none.
    pub fn unsent(&mut self, name: &str) -> io::Result<u64> {
        let number = self.connection.numbers(1);
        let request = encode(link::with_statistics(name), NLM_F_REQUEST, number);
        self.connection.ask(&request, number, |message| link::read_unsent(message.body))
    }

    /// All addresses.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        self.list(address::all, address::read)
    }

    /// The routes of both families in the main table, and the unreachable ones; with `protocol`, only those made by it.
    pub fn routes(&mut self, protocol: Option<u8>) -> io::Result<Vec<Route>> {
        let mut routes = self.list(|| route::all(AddressFamily::Inet6, protocol), route::read)?;
        routes.extend(self.list(|| route::all(AddressFamily::Inet, protocol), route::read)?);
        // Kernels that do not filter give all.
        routes.retain(|route| protocol.is_none_or(|wanted| route.protocol == wanted));
        Ok(routes)
    }

    /// All neighbours of both families.
    pub fn neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        self.list(|| neighbour::all(AddressFamily::Unspec), neighbour::read)
    }

    /// What vxlan devices have been told of where hardware addresses are.
    pub fn forwardings(&mut self) -> io::Result<Vec<Forwarding>> {
        self.list(|| neighbour::all(AddressFamily::Bridge), neighbour::read_forwarding)
    }

    /// The number that `namespace` has in this one, which [`Link::peer_namespace`] gives; `None` while it has none,
    /// which is so until a link of this namespace has its peer there.
    pub fn number_of(&mut self, namespace: &impl AsFd) -> io::Result<Option<i32>> {
        let mut message = NsidMessage::default();
        let fd = u32::try_from(namespace.as_fd().as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
        message.attributes.push(NsidAttribute::Fd(fd));
        let number = self.connection.numbers(1);
        let request = encode(RouteNetlinkMessage::GetNsId(message), NLM_F_REQUEST, number);
        self.connection.ask(&request, number, |message| {
            let mut found = attributes(message.body.get(GENERAL_HEADER_BYTES..)?);
            let (_, value) = found.find(|(kind, _)| *kind == NETNSA_NSID)?;
            Some(i32_at(value, 0).filter(|id| *id >= 0))
        })
    }

    fn list<T>(
        &mut self,
        request: impl Fn() -> RouteNetlinkMessage,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let request = |number| encode(request(), NLM_F_REQUEST | NLM_F_DUMP, number);
        self.connection.dump(request, |message| read(message.body))
    }
}

/// A request as bytes.
fn encode(message: RouteNetlinkMessage, flags: u16, number: u32) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = number;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}
