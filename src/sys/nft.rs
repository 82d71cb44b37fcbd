//! nftables: whole rulesets as text for nft(8), and what changes often by nfnetlink: the elements of sets and maps,
//! counters, and the generation, which tells that somebody changed something.
//!
//! nft is one process of some milliseconds for an atomic load. An [`Nft`] is a socket of the namespace it was opened
//! in, usable from any thread; it answers in microseconds and waits for 5 s at most. The few messages it needs are
//! encoded here (linux/netfilter/nf_tables.h).

use std::fmt;
use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::sys::netlink::connection::{Connection, Message, attributes, string};

mod elements;
mod message;
mod program;

pub use crate::sys::netlink::Watch;
pub use elements::{Element, ElementBatch, RefusedElements, RunElementsError, VALUE_BYTES_MAX};
pub use program::{NftError, RULESET_BYTES_MAX, list, load};

use message::{Writer, kind};

/// Family of a table: which packets it sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// ARP.
    Arp,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl Family {
    const ALL: [Self; 4] = [Self::Inet, Self::Arp, Self::Ip, Self::Ip6];

    /// linux/netfilter.h NFPROTO_...
    const fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Arp => 3,
            Self::Ip6 => 10,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.number() == number)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Inet => "inet",
            Self::Arp => "arp",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

/// A table, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Table<'a> {
    /// Its family.
    pub family: Family,
    /// Its name, unique in the family.
    pub name: &'a str,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {}", self.family, self.name)
    }
}

/// A named counter of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// Its name.
    pub name: String,
    /// Packets counted.
    pub packets: u64,
    /// Bytes counted.
    pub bytes: u64,
}

/// A connection to the kernel's nftables of one namespace.
#[derive(Debug)]
pub struct Nft {
    connection: Connection,
}

/// Attributes of the answers (linux/netfilter/nf_tables.h).
mod attribute {
    pub(super) const GEN_ID: u16 = 1;
    pub(super) const TABLE_NAME: u16 = 1;
    pub(super) const OBJ_TABLE: u16 = 1;
    pub(super) const OBJ_NAME: u16 = 2;
    pub(super) const OBJ_TYPE: u16 = 3;
    pub(super) const OBJ_DATA: u16 = 4;
    pub(super) const COUNTER_BYTES: u16 = 1;
    pub(super) const COUNTER_PACKETS: u16 = 2;
}

/// How often a set is read until two listings agree.
const ELEMENT_LISTINGS_MAX: usize = 16;

/// NFT_OBJECT_COUNTER.
const COUNTER: u32 = 1;

impl Nft {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let connection = Connection::open(NETLINK_NETFILTER)?;
        connection.make_room_for_large_requests();
        Ok(Self { connection })
    }

    /// Makes all changes of `batch` at once, or none: packets see the sets as before or as after.
    pub fn run(&mut self, batch: &ElementBatch<'_>) -> Result<(), RunElementsError> {
        batch.run(&mut self.connection)
    }

    /// The number of the present state of everything in nftables here; each change, also one of elements, and also by
    /// this program, makes another.
    pub fn generation(&mut self) -> io::Result<u32> {
        let number = self.connection.numbers(1);
        let mut request = Writer::new();
        request.message(kind::GET_GENERATION, NLM_F_REQUEST, number, 0, |_| {});
        self.connection.ask(&request.bytes(), number, |message| {
            let (_, value) = fields(message).find(|(kind, _)| *kind == attribute::GEN_ID)?;
            Some(u32::from_be_bytes(value.try_into().ok()?))
        })
    }

    /// The tables of the families known here.
    pub fn tables(&mut self) -> io::Result<Vec<(Family, String)>> {
        self.list(
            kind::GET_TABLE,
            0,
            |_| {},
            |message| {
                let family = Family::from_number(*message.body.first()?)?;
                let (_, name) = fields(message).find(|(kind, _)| *kind == attribute::TABLE_NAME)?;
                Some((family, string(name)))
            },
        )
    }

    /// The named counters of `table`; none if it is not there.
    pub fn counters(&mut self, table: Table<'_>) -> io::Result<Vec<Counter>> {
        let ask = |request: &mut Writer| {
            request.string(attribute::OBJ_TABLE, table.name);
            request.attribute(attribute::OBJ_TYPE, &COUNTER.to_be_bytes());
        };
        self.list(kind::GET_OBJECT, table.family.number(), ask, |message| {
            // Kernels that do not filter give those of all tables.
            let of = |wanted: u16| fields(message).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
            let right = of(attribute::OBJ_TABLE).map(string)? == table.name
                && of(attribute::OBJ_TYPE)? == COUNTER.to_be_bytes();
            let mut counter = Counter { name: of(attribute::OBJ_NAME).map(string)?, packets: 0, bytes: 0 };
            for (kind, value) in attributes(of(attribute::OBJ_DATA)?) {
                match kind {
                    attribute::COUNTER_BYTES => counter.bytes = u64::from_be_bytes(value.try_into().ok()?),
                    attribute::COUNTER_PACKETS => counter.packets = u64::from_be_bytes(value.try_into().ok()?),
                    _ => {}
                }
            }
            right.then_some(counter)
        })
    }

    /// What is in `set` of `table`, in order. Fails with `NotFound` if it is not there, and with `WouldBlock` if it
    /// changes too fast to be read.
    ///
    /// The kernel moves a set that grew to a larger table in the background. A listing of several messages that this
    /// overtakes repeats some elements and misses others, and nothing in it says so: it counts if a second one agrees.
    pub fn elements(&mut self, table: Table<'_>, set: &str) -> io::Result<Vec<Element>> {
        let mut last = self.elements_once(table, set)?;
        for _ in 1..ELEMENT_LISTINGS_MAX {
            let next = self.elements_once(table, set)?;
            if next == last {
                return Ok(last);
            }
            last = next;
        }
        let what = format!("set {set} of table {table} was another each of {ELEMENT_LISTINGS_MAX} times it was read");
        Err(io::Error::new(io::ErrorKind::WouldBlock, what))
    }

    fn elements_once(&mut self, table: Table<'_>, set: &str) -> io::Result<Vec<Element>> {
        let ask = |request: &mut Writer| elements::of_set(request, table, set);
        let parts =
            self.list(kind::GET_ELEMENTS, table.family.number(), ask, |message| Some(elements::read(message)))?;
        let mut found = parts.concat();
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    fn list<T>(
        &mut self,
        kind: u16,
        family: u8,
        ask: impl Fn(&mut Writer),
        read: impl Fn(&Message<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let request = |number| {
            let mut request = Writer::new();
            request.message(kind, NLM_F_REQUEST | NLM_F_DUMP, number, family, &ask);
            request.bytes()
        };
        self.connection.dump(request, read)
    }
}

/// The attributes after the header of a message.
fn fields<'a>(message: &Message<'a>) -> impl Iterator<Item = (u16, &'a [u8])> {
    attributes(message.body.get(message::GENERAL_HEADER_BYTES..).unwrap_or_default())
}
