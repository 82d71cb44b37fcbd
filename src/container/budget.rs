//! What all layers together may take: bytes once unzipped, entries, bytes of names. What goes beyond ends the import before
//! it is there, so that a small file that unpacks to a large one costs no more than the bound.

use std::cell::Cell;
use std::io::{self, Read};

use super::fault::Fault;

/// Most entries of all layers, directories that are only named among them.
const ENTRIES_MAX: u64 = 1_000_000;

/// Most bytes of names and links' targets of all layers.
const TEXT_BYTES_MAX: u64 = 128 * 1024 * 1024;

/// What is left. Shared by the reader of an archive and by who looks at its entries.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    bytes: Cell<u64>,
    entries: Cell<u64>,
    text: Cell<u64>,
    over: Cell<bool>,
}

impl Budget {
    pub(super) const fn new(bytes: u64) -> Self {
        Self {
            limit: bytes,
            bytes: Cell::new(bytes),
            entries: Cell::new(ENTRIES_MAX),
            text: Cell::new(TEXT_BYTES_MAX),
            over: Cell::new(false),
        }
    }

    /// The bound on bytes.
    pub(super) const fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that are left.
    pub(super) const fn left(&self) -> u64 {
        self.bytes.get()
    }

    /// Whether more was read than may be.
    pub(super) const fn is_over(&self) -> bool {
        self.over.get()
    }

    /// One more entry, with so many bytes of names.
    pub(super) fn entry(&self, text: usize) -> Result<(), Fault> {
        let text = u64::try_from(text).map_err(|_| Fault::TooMany)?;
        self.entries.set(self.entries.get().checked_sub(1).ok_or(Fault::TooMany)?);
        self.text.set(self.text.get().checked_sub(text).ok_or(Fault::TooMany)?);
        Ok(())
    }
}

/// A reader that takes what it reads from a budget.
pub(super) struct Bounded<'a, R> {
    pub(super) from: R,
    pub(super) budget: &'a Budget,
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.budget.bytes.get();
        // One byte more than there may be tells an end from a bound.
        let wanted = usize::try_from(left.saturating_add(1)).map_or(buffer.len(), |most| buffer.len().min(most));
        let count = self.from.read(buffer.get_mut(..wanted).unwrap_or_default())?;
        match left.checked_sub(u64::try_from(count).unwrap_or(u64::MAX)) {
            Some(left) => {
                self.budget.bytes.set(left);
                Ok(count)
            }
            None => {
                self.budget.over.set(true);
                Err(io::Error::other("more than may be unpacked"))
            }
        }
    }
}
