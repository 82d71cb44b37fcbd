//! Changes to a namespace's network, gathered and made with one send.

use std::fmt;
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;

use super::address::{self, Address};
use super::connection::Connection;
use super::encode;
use super::link::{self, LinkChange, LinkRef, NewVeth, NewVxlan};
use super::neighbour::{self, Forwarding, Neighbour};
use super::route::{self, Route};

/// Requests in one send: the answers to all have to fit into the socket's buffer (some 200 do).
const SEND_MAX: usize = 64;

/// Changes, in the order they are made in.
#[derive(Debug, Default)]
pub struct Batch<'a> {
    requests: Vec<Request<'a>>,
}

#[derive(Debug)]
struct Request<'a> {
    what: What<'a>,
    message: RouteNetlinkMessage,
    flags: u16,
}

/// What a request is for, in words only when it fails.
#[derive(Debug, Clone)]
enum What<'a> {
    MakeLink(&'a str),
    ChangeLink(LinkRef<'a>),
    DeleteLink(LinkRef<'a>),
    Add(Address),
    Remove(Address),
    Put(Route),
    Delete(Route),
    Meet(Neighbour),
    Forget(Neighbour),
    Forward(Forwarding),
    Unforward(Forwarding),
}

impl What<'_> {
    /// Whether `errno` says that what is to go is gone already, perhaps with its link.
    fn is_gone(&self, errno: i32) -> bool {
        let gone: &[i32] = match self {
            Self::DeleteLink(_) => &[libc::ENODEV],
            Self::Remove(_) => &[libc::EADDRNOTAVAIL, libc::ENODEV],
            Self::Delete(_) => &[libc::ESRCH, libc::ENODEV, libc::ENETUNREACH],
            Self::Forget(_) | Self::Unforward(_) => &[libc::ENOENT, libc::ENODEV],
            Self::MakeLink(_)
            | Self::ChangeLink(_)
            | Self::Add(_)
            | Self::Put(_)
            | Self::Meet(_)
            | Self::Forward(_) => &[],
        };
        gone.contains(&errno)
    }
}

impl fmt::Display for What<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MakeLink(name) => write!(out, "make link {name}"),
            Self::ChangeLink(link) => write!(out, "change link {link}"),
            Self::DeleteLink(link) => write!(out, "delete link {link}"),
            Self::Add(Address { link, address, prefix_len }) => {
                write!(out, "add address {address}/{prefix_len} to link {link}")
            }
            Self::Remove(Address { link, address, prefix_len }) => {
                write!(out, "remove address {address}/{prefix_len} from link {link}")
            }
            Self::Put(route) => write!(out, "make route {route}"),
            Self::Delete(route) => write!(out, "delete route {route}"),
            Self::Meet(Neighbour { link, address, .. }) => write!(out, "make neighbour {address} on link {link}"),
            Self::Forget(Neighbour { link, address, .. }) => write!(out, "delete neighbour {address} on link {link}"),
            Self::Forward(Forwarding { link, to, .. }) => write!(out, "forward to {to} on link {link}"),
            Self::Unforward(Forwarding { link, to, .. }) => write!(out, "stop forwarding to {to} on link {link}"),
        }
    }
}

/// A change the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct RefusedChange {
    /// What was to be done.
    pub what: String,
    /// errno of the refusal.
    pub errno: i32,
    /// The kernel's words.
    #[source]
    pub source: io::Error,
}

/// Why a batch was not carried out, or not in all parts.
#[derive(Debug, thiserror::Error)]
pub enum RunBatchError {
    /// The kernel could not be asked; how many of the changes were made is not known.
    #[error("change the network by netlink")]
    Netlink(#[source] io::Error),
    /// Some were refused, the others were made.
    #[error("{} changes of the network refused, first: {}", .0.len(), .0.first().map(ToString::to_string).unwrap_or_default())]
    Refused(Vec<RefusedChange>),
}

const PUT: u16 = NLM_F_CREATE | NLM_F_REPLACE;

impl<'a> Batch<'a> {
    /// No changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many requests it has.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    fn push(&mut self, what: What<'a>, message: RouteNetlinkMessage, flags: u16) -> &mut Self {
        self.requests.push(Request { what, message, flags: flags | NLM_F_REQUEST });
        self
    }

    /// Makes a veth pair; refused (EEXIST) when a link has its name or index.
    pub fn make_veth(&mut self, new: &NewVeth<'a>) -> &mut Self {
        let message = RouteNetlinkMessage::NewLink(link::new_veth(new));
        self.push(What::MakeLink(new.name), message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Makes a vxlan device; refused (EEXIST) when a link has its name, index, or its identifier and port.
    pub fn make_vxlan(&mut self, new: &NewVxlan<'a>) -> &mut Self {
        let message = RouteNetlinkMessage::NewLink(link::new_vxlan(new));
        self.push(What::MakeLink(new.name), message, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Changes a link.
    pub fn set_link(&mut self, link: LinkRef<'a>, change: LinkChange) -> &mut Self {
        for message in link::change(link, change) {
            self.push(What::ChangeLink(link), RouteNetlinkMessage::SetLink(message), 0);
        }
        self
    }

    /// Deletes a link, and with it the peer of a veth, and all addresses, routes and neighbours on them.
    pub fn delete_link(&mut self, link: LinkRef<'a>) -> &mut Self {
        self.push(What::DeleteLink(link), RouteNetlinkMessage::DelLink(link::delete(link)), 0)
    }

    /// Gives a link an address, usable at once: no other owner of it is looked for.
    pub fn add_address(&mut self, address: Address) -> &mut Self {
        let message = RouteNetlinkMessage::NewAddress(address::message(&address));
        self.push(What::Add(address), message, PUT)
    }

    /// Takes an address off a link.
    pub fn delete_address(&mut self, address: Address) -> &mut Self {
        let message = RouteNetlinkMessage::DelAddress(address::message(&address));
        self.push(What::Remove(address), message, 0)
    }

    /// Makes a route in the place of one with the same destination and metric.
    pub fn put_route(&mut self, route: Route) -> &mut Self {
        let message = RouteNetlinkMessage::NewRoute(route::put(&route));
        self.push(What::Put(route), message, PUT)
    }

    /// Deletes a route: the one that is like it in all but `onlink`. What is `None`, and a metric of 0, is not
    /// compared.
    pub fn delete_route(&mut self, route: Route) -> &mut Self {
        let message = RouteNetlinkMessage::DelRoute(route::delete(&route));
        self.push(What::Delete(route), message, 0)
    }

    /// Makes a neighbour, permanent, in the place of what is known of its address. It has to have a hardware address.
    pub fn put_neighbour(&mut self, neighbour: Neighbour) -> &mut Self {
        let message = RouteNetlinkMessage::NewNeighbour(neighbour::message(&neighbour));
        self.push(What::Meet(neighbour), message, PUT)
    }

    /// Forgets a neighbour, whatever its hardware address.
    pub fn delete_neighbour(&mut self, neighbour: Neighbour) -> &mut Self {
        let message = RouteNetlinkMessage::DelNeighbour(neighbour::message(&neighbour));
        self.push(What::Forget(neighbour), message, 0)
    }

    /// Has a vxlan device send frames for a hardware address to one place, permanently.
    pub fn put_forwarding(&mut self, forwarding: Forwarding) -> &mut Self {
        let message = RouteNetlinkMessage::NewNeighbour(neighbour::forwarding_message(&forwarding));
        self.push(What::Forward(forwarding), message, PUT)
    }

    /// Takes that back.
    pub fn delete_forwarding(&mut self, forwarding: Forwarding) -> &mut Self {
        let message = RouteNetlinkMessage::DelNeighbour(neighbour::forwarding_message(&forwarding));
        self.push(What::Unforward(forwarding), message, 0)
    }

    pub(super) fn run(&self, connection: &mut Connection) -> Result<(), RunBatchError> {
        let mut refused = Vec::new();
        for requests in self.requests.chunks(SEND_MAX) {
            let count = u32::try_from(requests.len()).unwrap_or(u32::MAX);
            let first = connection.numbers(count);
            let last = first + (count - 1);
            let mut bytes = Vec::new();
            for (request, number) in requests.iter().zip(first..) {
                let acknowledge = if number == last { NLM_F_ACK } else { 0 };
                bytes.extend(encode(request.message.clone(), request.flags | acknowledge, number));
            }
            let answers = connection.transact(&bytes, first, last, false).map_err(RunBatchError::Netlink)?;
            for (number, refusal) in answers {
                let at = usize::try_from(number - first).unwrap_or(usize::MAX);
                let Some(request) = requests.get(at) else { continue };
                if !request.what.is_gone(refusal.errno) {
                    let (what, errno) = (request.what.to_string(), refusal.errno);
                    refused.push(RefusedChange { what, errno, source: refusal.into() });
                }
            }
        }
        if refused.is_empty() { Ok(()) } else { Err(RunBatchError::Refused(refused)) }
    }
}
