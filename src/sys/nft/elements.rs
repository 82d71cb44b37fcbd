//! Elements of sets and maps: changes to several sets in one transaction, and what is in them.

use std::fmt;
use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST};

use super::message::{Writer, kind};
use super::{Table, fields};
use crate::sys::netlink::connection::{Connection, Message, attributes};

/// Longest key and longest value, in bytes (NFT_DATA_VALUE_MAXLEN).
pub const VALUE_BYTES_MAX: usize = 64;

/// Elements in one message: a list is shorter than 64 KiB.
const ELEMENTS_MAX: usize = 128;

/// An element of a set or map. Bytes are as packets have them, in network order; the parts of a concatenation are
/// padded with zeroes to four bytes each.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element {
    /// What is looked up; the first of a range.
    pub key: Vec<u8>,
    /// The last of a range, in sets of concatenations with intervals. The kernel gives it for all elements of such a
    /// set.
    pub key_end: Option<Vec<u8>>,
    /// What a map gives for it.
    pub value: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Add,
    Delete,
    Clear,
}

/// Changes to one set.
#[derive(Debug)]
struct Change<'a> {
    action: Action,
    table: Table<'a>,
    set: &'a str,
    elements: Vec<&'a Element>,
}

impl fmt::Display for Change<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { action, table, set, .. } = self;
        match action {
            Action::Add => write!(out, "add to set {set} of table {table}"),
            Action::Delete => write!(out, "delete from set {set} of table {table}"),
            Action::Clear => write!(out, "clear set {set} of table {table}"),
        }
    }
}

/// Changes to sets, in the order they are made in.
#[derive(Debug, Default)]
pub struct ElementBatch<'a> {
    changes: Vec<Change<'a>>,
}

/// A change to a set that was refused.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct RefusedElements {
    /// What was to be done, with which set and table.
    pub what: String,
    /// errno of the refusal.
    pub errno: i32,
    /// The kernel's words, or for errno where it has none.
    #[source]
    pub source: io::Error,
}

/// Why sets were not changed. Nothing was, then.
#[derive(Debug, thiserror::Error)]
pub enum RunElementsError {
    /// The kernel could not be asked. When it did not answer, the changes may have been made.
    #[error("change sets of nftables by netlink")]
    Netlink(#[source] io::Error),
    /// These were refused, and so the whole batch.
    #[error("sets of nftables not changed: {}", .0.first().map(ToString::to_string).unwrap_or_default())]
    Refused(Vec<RefusedElements>),
}

impl<'a> ElementBatch<'a> {
    /// No changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    fn push(&mut self, action: Action, table: Table<'a>, set: &'a str, element: Option<&'a Element>) -> &mut Self {
        if let Some(last) = self.changes.last_mut()
            && action != Action::Clear
            && (last.action, last.table, last.set) == (action, table, set)
            && last.elements.len() < ELEMENTS_MAX
        {
            last.elements.extend(element);
        } else {
            self.changes.push(Change { action, table, set, elements: element.into_iter().collect() });
        }
        self
    }

    /// Adds an element. One that is there already is no error, unless it is in a map and has another value (EEXIST).
    pub fn add(&mut self, table: Table<'a>, set: &'a str, element: &'a Element) -> &mut Self {
        self.push(Action::Add, table, set, Some(element))
    }

    /// Deletes an element, which has to be there (ENOENT).
    pub fn delete(&mut self, table: Table<'a>, set: &'a str, element: &'a Element) -> &mut Self {
        self.push(Action::Delete, table, set, Some(element))
    }

    /// Deletes all elements of a set. With additions after it, the set has those and no others, whatever it had.
    pub fn clear(&mut self, table: Table<'a>, set: &'a str) -> &mut Self {
        self.push(Action::Clear, table, set, None)
    }

    pub(super) fn run(&self, connection: &mut Connection) -> Result<(), RunElementsError> {
        let Some(last_change) = self.changes.len().checked_sub(1) else { return Ok(()) };
        self.check()?;
        let count = u32::try_from(self.changes.len()).unwrap_or(u32::MAX - 2);
        let begin = connection.numbers(count + 2);
        let last = begin + count;
        let mut request = Writer::new();
        request.message(kind::BATCH_BEGIN, NLM_F_REQUEST, begin, 0, |_| {});
        for ((at, change), number) in self.changes.iter().enumerate().zip(begin + 1..) {
            let acknowledge = if at == last_change { NLM_F_ACK } else { 0 };
            change.write(&mut request, NLM_F_REQUEST | acknowledge, number);
        }
        request.message(kind::BATCH_END, NLM_F_REQUEST, last + 1, 0, |_| {});
        let answers = connection.transact(&request.bytes(), begin, last, true).map_err(RunElementsError::Netlink)?;
        let mut refused = Vec::new();
        for (number, refusal) in answers {
            let change = (number - begin).checked_sub(1).and_then(|at| self.changes.get(usize::try_from(at).ok()?));
            let errno = refusal.errno;
            let what = change.map_or_else(|| "commit".to_owned(), ToString::to_string);
            let source = match (&refusal.text, errno, change.map(|change| change.action)) {
                (None, libc::ENOENT, Some(Action::Delete)) => missing("no such element, set or table"),
                (None, libc::ENOENT, Some(_)) => missing("no such set or table"),
                _ => refusal.into(),
            };
            refused.push(RefusedElements { what, errno, source });
        }
        if refused.is_empty() { Ok(()) } else { Err(RunElementsError::Refused(refused)) }
    }

    /// Refuses what has no room in a message.
    fn check(&self) -> Result<(), RunElementsError> {
        let is_long = |element: &&Element| {
            let parts = [Some(&element.key), element.key_end.as_ref(), element.value.as_ref()];
            parts.into_iter().flatten().any(|part| part.len() > VALUE_BYTES_MAX)
        };
        let refused = |change: &Change<'_>| RefusedElements {
            what: change.to_string(),
            errno: libc::EINVAL,
            source: io::Error::new(io::ErrorKind::InvalidInput, "a key or value of more than 64 bytes"),
        };
        let long: Vec<_> =
            self.changes.iter().filter(|change| change.elements.iter().any(is_long)).map(refused).collect();
        if long.is_empty() { Ok(()) } else { Err(RunElementsError::Refused(long)) }
    }
}

fn missing(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, what)
}

/// Attributes (linux/netfilter/nf_tables.h).
mod attribute {
    pub(super) const LIST_TABLE: u16 = 1;
    pub(super) const LIST_SET: u16 = 2;
    pub(super) const LIST_ELEMENTS: u16 = 3;
    pub(super) const LIST_ELEMENT: u16 = 1;
    pub(super) const KEY: u16 = 1;
    pub(super) const DATA: u16 = 2;
    pub(super) const KEY_END: u16 = 10;
    pub(super) const DATA_VALUE: u16 = 1;
}

/// Names the set a message is about.
pub(super) fn of_set(request: &mut Writer, table: Table<'_>, set: &str) {
    request.string(attribute::LIST_TABLE, table.name);
    request.string(attribute::LIST_SET, set);
}

impl Change<'_> {
    fn write(&self, request: &mut Writer, flags: u16, number: u32) {
        let (kind, flags) = match self.action {
            Action::Add => (kind::NEW_ELEMENTS, flags | NLM_F_CREATE),
            Action::Delete | Action::Clear => (kind::DELETE_ELEMENTS, flags),
        };
        request.message(kind, flags, number, self.table.family.number(), |request| {
            of_set(request, self.table, self.set);
            // A deletion that names no elements is one of all.
            if self.action == Action::Clear {
                return;
            }
            request.nest(attribute::LIST_ELEMENTS, |request| {
                for element in &self.elements {
                    request.nest(attribute::LIST_ELEMENT, |request| write_element(request, element));
                }
            });
        });
    }
}

fn write_element(request: &mut Writer, element: &Element) {
    let parts = [
        (attribute::KEY, Some(&element.key)),
        (attribute::KEY_END, element.key_end.as_ref()),
        (attribute::DATA, element.value.as_ref()),
    ];
    for (kind, part) in parts {
        if let Some(part) = part {
            request.nest(kind, |request| request.attribute(attribute::DATA_VALUE, part));
        }
    }
}

/// The elements in one message of a list. What maps to a verdict has no value here.
pub(super) fn read(message: &Message<'_>) -> Vec<Element> {
    let lists = fields(message).filter(|(kind, _)| *kind == attribute::LIST_ELEMENTS);
    lists.flat_map(|(_, list)| attributes(list)).filter_map(|(_, element)| read_element(element)).collect()
}

fn read_element(bytes: &[u8]) -> Option<Element> {
    let of = |wanted: u16| {
        let (_, nested) = attributes(bytes).find(|(kind, _)| *kind == wanted)?;
        attributes(nested).find(|(kind, _)| *kind == attribute::DATA_VALUE).map(|(_, value)| value.to_vec())
    };
    Some(Element { key: of(attribute::KEY)?, key_end: of(attribute::KEY_END), value: of(attribute::DATA) })
}
