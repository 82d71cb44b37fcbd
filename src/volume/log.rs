//! The records of a map, one after the other. A record is appended when what it speaks of is written; a barrier when that
//! is durable.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::disk::DiskFile;
use super::format::{RECORD_BYTES, Record, Salt, encode_record};

/// Space is added to the file in steps of this, as zeroes. Then most records change neither the file's length nor its
/// blocks, and a barrier is durable without the file system's journal.
const ROOM_BYTES: u64 = 4096;

/// Barriers that may follow before the next record of another kind.
const BARRIERS: u64 = 2;

/// The open file of a map.
#[derive(Debug)]
pub(super) struct Log {
    file: DiskFile,
    salt: Salt,
    start: u64,
    tail: Mutex<Tail>,
}

/// Where a log ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tail {
    /// The slot that comes next.
    pub(super) slots: u64,
    /// How many slots a durable barrier covers.
    pub(super) covered: u64,
    /// The slot behind the last record that is no barrier.
    pub(super) last: u64,
    /// Bytes the file has.
    pub(super) room: u64,
    /// A record may be half written: no other may follow it.
    pub(super) is_broken: bool,
}

/// Why records were not appended.
#[derive(Debug)]
pub(super) enum AppendError {
    /// Nothing of them was written.
    Nothing(io::Error),
    /// It is not known what was written.
    Broken(io::Error),
}

impl Log {
    pub(super) const fn new(file: DiskFile, salt: Salt, start: u64, tail: Tail) -> Self {
        Self { file, salt, start, tail: Mutex::new(tail) }
    }

    /// The log of a map that was just written.
    pub(super) const fn empty(file: DiskFile, salt: Salt, start: u64) -> Self {
        Self::new(file, salt, start, Tail { slots: 0, covered: 0, last: 0, room: start, is_broken: false })
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes before the records.
    pub(super) const fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of records.
    pub(super) fn bytes(&self) -> u64 {
        self.tail().slots * RECORD_BYTES as u64
    }

    /// Bytes the file takes on the disk.
    pub(super) fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    pub(super) fn append(&self, records: &[Record]) -> Result<(), AppendError> {
        if records.is_empty() {
            return Ok(());
        }
        // Held while writing: a process that ends leaves no gap between two records.
        let mut tail = self.tail();
        self.append_to(&mut tail, records)?;
        tail.last = tail.slots;
        Ok(())
    }

    fn append_to(&self, tail: &mut Tail, records: &[Record]) -> Result<(), AppendError> {
        if tail.is_broken {
            return Err(AppendError::Broken(io::Error::other("the map could not be written before")));
        }
        let mut bytes = Vec::with_capacity(records.len() * RECORD_BYTES);
        for (slot, record) in (tail.slots..).zip(records) {
            bytes.extend(encode_record(&self.salt, slot, *record));
        }
        let at = self.start + tail.slots * RECORD_BYTES as u64;
        let end = at + bytes.len() as u64;
        // A full disk is met here, where nothing but zeroes is half written, and not by the barriers to come: there is at
        // most the one of a flush that runs, and that of the next.
        let wanted = end + BARRIERS * RECORD_BYTES as u64;
        if end > tail.room || (wanted > tail.room && !matches!(records, [Record::Barrier { .. }])) {
            let room = wanted.next_multiple_of(ROOM_BYTES);
            let zeros = vec![0; usize::try_from(room - tail.room).unwrap_or(0)];
            self.file.write_all_at(&zeros, tail.room).map_err(AppendError::Nothing)?;
            tail.room = room;
        }
        if let Err(error) = self.file.write_all_at(&bytes, at) {
            tail.is_broken = true;
            return Err(AppendError::Broken(error));
        }
        tail.slots += records.len() as u64;
        Ok(())
    }

    /// Makes durable what was written to `top`, and all records that were appended before. A record may be durable before
    /// what it speaks of, but no barrier is: after a loss of power only what a barrier covers is believed.
    ///
    /// For one thread at a time. An error leaves it unknown what is durable; the kernel may never tell again.
    pub(super) fn sync(&self, top: &DiskFile) -> io::Result<()> {
        // What is appended from here on may speak of bytes that the first call does not see.
        let (covers, is_new) = {
            let tail = self.tail();
            (tail.slots, tail.last > tail.covered)
        };
        top.sync_data()?;
        if !is_new {
            return Ok(());
        }
        self.file.sync_data()?;
        {
            let mut tail = self.tail();
            self.append_to(&mut tail, &[Record::Barrier { covers }]).map_err(|error| match error {
                AppendError::Nothing(error) | AppendError::Broken(error) => error,
            })?;
        }
        self.file.sync_data()?;
        let mut tail = self.tail();
        tail.covered = tail.covered.max(covers);
        Ok(())
    }
}
