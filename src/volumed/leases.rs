//! The leases of a volume on the disk: a file beside the volume, one record a line, each durable before it is answered.
//!
//! ```text
//! <first 16 hexadecimal digits of the BLAKE3 of what follows the space> <JSON>\n
//! ```
//! The first record of a file that was written anew is all that was known then. What follows the last end of a line was
//! being written when the process or the host ended, so nobody was told of it: it is cut off. Anything else that is not a
//! record is damage, and then nobody knows who may write: the volume is served to nobody until a person looked at it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ids::LeaseId;
use crate::lease::{LeaseEntry, LeaseEvent, LeaseRefusal, Leases};
use crate::sys::file;

/// The file of a volume's directory.
pub(super) const FILE: &str = "leases";

/// Bytes after which the file is written anew. A record has about 400.
const BYTES_MAX: u64 = 256 * 1024;

/// Longest file that is read: what is written anew is far below, and a file grows by one step beyond its bound.
const READ_BYTES_MAX: u64 = 8 * BYTES_MAX;

/// Hexadecimal digits of a check.
const CHECK_CHARS: usize = 16;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    /// All that was known when the file was written anew.
    Known(Box<Leases>),
    /// What happened, all of it at once.
    Happened(Vec<LeaseEntry>),
}

/// Why the leases of a volume are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeaseLogError {
    /// The disk did not do it.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file is not what was written.
    #[error("{} is damaged in line {line}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Why nothing changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChangeError {
    /// The leases speak against it.
    #[error(transparent)]
    Refused(#[from] LeaseRefusal),
    /// They are not known, in words.
    #[error("the leases are not known, so nobody is served: {0}")]
    Unknown(String),
    /// It could not be written down.
    #[error("write down what happened to the leases")]
    NotWritten(#[source] io::Error),
}

/// The leases of one volume, in memory and on the disk.
#[derive(Debug)]
pub(super) struct LeaseBook {
    path: PathBuf,
    /// Why they are not known, in words.
    damage: Option<String>,
    leases: Leases,
    /// The latest set of connections from another host, of leases that are used so.
    sets: BTreeMap<LeaseId, u64>,
    /// Open since the first change.
    file: Option<File>,
    bytes: u64,
}

impl LeaseBook {
    /// Reads a volume's leases. All that are in force count as seen at `now_ms`. Damage is kept, not an error here.
    pub(super) fn open(path: &Path, now_ms: u64) -> Self {
        let mut book = Self {
            path: path.to_owned(),
            damage: None,
            leases: Leases::default(),
            sets: BTreeMap::new(),
            file: None,
            bytes: 0,
        };
        if let Err(error) = book.read(now_ms) {
            book.damage = Some(crate::report::chain(&error));
        }
        book
    }

    /// The leases, unless nobody knows them.
    pub(super) fn known(&self) -> Result<&Leases, &str> {
        match &self.damage {
            Some(damage) => Err(damage),
            None => Ok(&self.leases),
        }
    }

    /// Notes that somebody uses a lease.
    pub(super) fn saw(&mut self, id: &LeaseId, now_ms: u64) {
        self.leases.saw(id, now_ms);
    }

    /// The latest set of connections with this lease from another host; 0 if there was none.
    pub(super) fn set_of(&self, id: &LeaseId) -> u64 {
        self.sets.get(id).copied().unwrap_or(0)
    }

    /// From now on an earlier set's requests are refused. To be called alone.
    pub(super) fn begin_set(&mut self, id: &LeaseId, set: u64) {
        let Self { leases, sets, .. } = self;
        sets.retain(|id, _| leases.find(id).is_some());
        sets.insert(id.clone(), set);
    }

    fn io(&self, what: &'static str) -> impl FnOnce(io::Error) -> LeaseLogError {
        let path = self.path.clone();
        move |source| LeaseLogError::Io { what, path, source }
    }

    fn read(&mut self, now_ms: u64) -> Result<(), LeaseLogError> {
        let mut file = match File::options().read(true).write(true).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.io("open")(error)),
        };
        let mut content = Vec::new();
        (&file).take(READ_BYTES_MAX + 1).read_to_end(&mut content).map_err(self.io("read"))?;
        let damaged = |line: usize, what| LeaseLogError::Damaged { path: self.path.clone(), line, what };
        if content.len() as u64 > READ_BYTES_MAX {
            return Err(damaged(0, "it is longer than it ever becomes"));
        }
        let whole = whole_bytes(&content);
        let lines = content[..whole].split_inclusive(|byte| *byte == b'\n');
        let mut leases = Leases::default();
        for (at, line) in lines.enumerate() {
            match read_record(line).map_err(|what| damaged(at + 1, what))? {
                Record::Known(known) if at == 0 => leases = *known,
                Record::Known(_) => return Err(damaged(at + 1, "it stands in the first line only")),
                Record::Happened(entries) => entries.into_iter().for_each(|entry| leases.apply(entry, now_ms)),
            }
        }
        leases.saw_all(now_ms);
        if whole < content.len() {
            file.set_len(whole as u64).and_then(|()| file.sync_all()).map_err(self.io("cut the torn end of"))?;
        }
        file.seek(SeekFrom::End(0)).map_err(self.io("go to the end of"))?;
        (self.leases, self.bytes, self.file) = (leases, whole as u64, Some(file));
        Ok(())
    }

    /// Writes down what happened, all or nothing, and takes it in. When this returns, it is durable.
    pub(super) fn happened(&mut self, events: Vec<LeaseEvent>, wall_ms: u64, now_ms: u64) -> Result<(), ChangeError> {
        self.known().map_err(|damage| ChangeError::Unknown(damage.to_owned()))?;
        if events.is_empty() {
            return Ok(());
        }
        let entries: Vec<_> = events.into_iter().map(|event| LeaseEntry { at_ms: wall_ms, event }).collect();
        let record = line(&Record::Happened(entries.clone())).map_err(ChangeError::NotWritten)?;
        self.append(&record).map_err(ChangeError::NotWritten)?;
        for entry in entries {
            self.leases.apply(entry, now_ms);
        }
        if self.bytes > BYTES_MAX {
            self.write_anew();
        }
        Ok(())
    }

    fn append(&mut self, record: &[u8]) -> io::Result<()> {
        let is_new = self.file.is_none();
        let mut file = match self.file.take() {
            Some(file) => file,
            None => file::create(&self.path)?,
        };
        let written = file.write_all(record);
        let durable = match &written {
            Ok(()) => file.sync_data().and_then(|()| if is_new { file::sync_parent(&self.path) } else { Ok(()) }),
            Err(_) => Ok(()),
        };
        if written.is_err() {
            // Nobody is told of it, so the next record must not stand behind half of this one.
            let cut = file.set_len(self.bytes).and_then(|()| file.seek(SeekFrom::Start(self.bytes)));
            if cut.is_err() {
                self.damage = Some(format!("{}: half a record could not be cut off", self.path.display()));
            }
        }
        if let Err(error) = &durable {
            // Whether it is on the disk is not known, nor will another attempt tell.
            self.damage = Some(format!("{}: what was written could not be made durable: {error}", self.path.display()));
        }
        self.file = Some(file);
        written.and(durable)?;
        self.bytes += record.len() as u64;
        Ok(())
    }

    /// A file of one record in the place of the long one. If it cannot be, the long one serves as well.
    fn write_anew(&mut self) {
        let Ok(record) = line(&Record::Known(Box::new(self.leases.clone()))) else { return };
        if file::replace(&self.path, &record).is_err() {
            return;
        }
        match File::options().read(true).append(true).open(&self.path) {
            Ok(file) => (self.file, self.bytes) = (Some(file), record.len() as u64),
            Err(error) => self.damage = Some(format!("open {} again: {error}", self.path.display())),
        }
    }
}

/// How many bytes are whole lines. A last line with zeroes in it was not on the disk yet when the host lost its power.
fn whole_bytes(content: &[u8]) -> usize {
    let end = content.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let begin = content[..end.saturating_sub(1)].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    if content[begin..end].contains(&0) { begin } else { end }
}

fn check(json: &[u8]) -> String {
    let mut digits = blake3::hash(json).to_hex().to_string();
    digits.truncate(CHECK_CHARS);
    digits
}

fn line(record: &Record) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(record)?;
    Ok([check(&json).as_bytes(), b" ", &json, b"\n"].concat())
}

fn read_record(line: &[u8]) -> Result<Record, &'static str> {
    let (check_of, rest) = line.split_at_checked(CHECK_CHARS).ok_or("it is too short")?;
    let json = rest.strip_prefix(b" ").and_then(|json| json.strip_suffix(b"\n")).ok_or("it has no check")?;
    if check(json).as_bytes() != check_of {
        return Err("its check is not that of what it says");
    }
    serde_json::from_slice(json).map_err(|_| "it says nothing that is known here")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Acquire, LeaseEnd, LeaseMode, LeaseSecret, Step};

    fn acquire(book: &mut LeaseBook, number: u8, mode: LeaseMode) -> LeaseId {
        let id = LeaseId::from_random([number; 10]);
        let wanted = Acquire {
            id: id.clone(),
            mode,
            holder: "test".to_owned(),
            vm: None,
            host: None,
            ttl_s: None,
            secret: LeaseSecret::from_random([number; 16]),
            break_others: false,
        };
        let Step { events, .. } = book.known().unwrap().acquire(&wanted).unwrap();
        book.happened(events, 1, 1).unwrap();
        id
    }

    #[test]
    fn what_happened_is_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut book = LeaseBook::open(&path, 0);
        assert_eq!(book.known().unwrap().all().count(), 0);
        let active = acquire(&mut book, 1, LeaseMode::Active);
        let standby = acquire(&mut book, 2, LeaseMode::Standby);
        let step = book.known().unwrap().convert(&active, &standby, 1).unwrap();
        book.happened(step.events, 2, 2).unwrap();
        let again = LeaseBook::open(&path, 9);
        let leases = again.known().unwrap();
        assert!(leases.may_write(&standby, 2) && !leases.may_write(&active, 1));
        assert_eq!(leases.history().count(), 3);
    }

    #[test]
    fn a_torn_end_is_cut_and_anything_else_is_damage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let active = acquire(&mut LeaseBook::open(&path, 0), 1, LeaseMode::Active);
        let whole = std::fs::read(&path).unwrap();
        let put = |content: &[u8]| file::replace(&path, content).unwrap();
        for cut in (0..whole.len()).step_by(7) {
            // The second record is there up to some byte of it.
            put(&[&whole[..], &whole[..cut]].concat());
            let mut book = LeaseBook::open(&path, 0);
            assert!(book.known().unwrap().may_write(&active, 1), "cut at {cut}");
            assert_eq!(std::fs::read(&path).unwrap(), whole);
            // What follows is written behind what is whole.
            let ended = LeaseEvent::Ended { id: active.clone(), why: LeaseEnd::Released };
            book.happened(vec![ended], 1, 1).unwrap();
            assert_eq!(LeaseBook::open(&path, 0).known().unwrap().all().count(), 0);
        }
        put(&[&whole[..], &[0; 40], b"\n"].concat());
        assert!(LeaseBook::open(&path, 0).known().is_ok(), "a block that was not written");
        for at in (0..whole.len() - 1).step_by(7) {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            put(&[&flipped[..], &whole].concat());
            let mut book = LeaseBook::open(&path, 0);
            assert!(book.known().is_err(), "byte {at}");
            assert!(matches!(book.happened(vec![], 1, 1), Err(ChangeError::Unknown(_))));
        }
    }

    #[test]
    fn a_long_file_is_written_anew_and_forgets_nothing_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut book = LeaseBook::open(&path, 0);
        let active = acquire(&mut book, 1, LeaseMode::Active);
        let mut most = 0;
        for number in 0..500_u32 {
            let id = LeaseId::from_random([&number.to_be_bytes()[..], &[9; 6]].concat().try_into().unwrap());
            let standby = Acquire {
                id: id.clone(),
                mode: LeaseMode::Standby,
                holder: "another".to_owned(),
                vm: None,
                host: None,
                ttl_s: None,
                secret: LeaseSecret::from_random([9; 16]),
                break_others: false,
            };
            let step = book.known().unwrap().acquire(&standby).unwrap();
            book.happened(step.events, 1, 1).unwrap();
            let events = book.known().unwrap().release(&id, None).unwrap();
            book.happened(events, 1, 1).unwrap();
            most = most.max(std::fs::metadata(&path).unwrap().len());
        }
        assert!(most < 2 * BYTES_MAX, "{most} bytes");
        let again = LeaseBook::open(&path, 1);
        let leases = again.known().unwrap();
        assert!(leases.may_write(&active, 1));
        assert_eq!(leases.history().count(), crate::lease::HISTORY_MAX);
        assert_eq!(leases, book.known().unwrap());
    }
}
