//! The transmission phase: requests of one connection, one after another, each carried out if its lease may now.

use std::io;

use super::line::{Line, MESSAGE_PATIENCE};
use super::log::say;
use super::payload::Payload;
use super::registry::{Bound, Stale};
use crate::report;
use crate::volume::{ErrorKind, StatusRun, VolumeError};
use crate::wire::nbd::negotiate::Agreed;
use crate::wire::nbd::reply::{self, EXTENTS_MAX, Extent};
use crate::wire::nbd::request::{Limits, Part, REQUEST_BYTES, Request, RequestHeader};
use crate::wire::nbd::{ErrorNumber, NbdError, PAYLOAD_BYTES_MAX, export_flag};

/// Reads from this length on are told their holes.
const HOLES_FROM_BYTES: u32 = 64 * 1024;

/// Most parts of a read.
const READ_RUNS_MAX: usize = 256;

/// Bytes read at once for CACHE.
const CACHE_BYTES: usize = 1 << 20;

/// Why a connection ended other than in order.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    /// The socket failed, or the other end hung up within a message.
    #[error("the connection broke")]
    Socket(#[from] io::Error),
    /// What came is not the protocol.
    #[error("what came is no NBD")]
    Nbd(#[from] NbdError),
}

/// Why a request was not done: what the client is told.
#[derive(Debug)]
struct Failure {
    number: ErrorNumber,
    text: String,
}

impl From<VolumeError> for Failure {
    fn from(error: VolumeError) -> Self {
        let number = match error.kind() {
            ErrorKind::NoSpace => ErrorNumber::NoSpace,
            ErrorKind::ReadOnly => ErrorNumber::Permission,
            ErrorKind::BadRequest => ErrorNumber::Invalid,
            ErrorKind::Taken
            | ErrorKind::Cancelled
            | ErrorKind::Damaged
            | ErrorKind::NotFound
            | ErrorKind::InUse
            | ErrorKind::Io => ErrorNumber::Io,
        };
        Self { number, text: report::chain(&error) }
    }
}

impl From<Stale> for Failure {
    fn from(stale: Stale) -> Self {
        Self { number: ErrorNumber::Permission, text: stale.to_string() }
    }
}

impl From<ErrorNumber> for Failure {
    fn from(number: ErrorNumber) -> Self {
        let text = match number {
            ErrorNumber::Permission => "this export is only read",
            ErrorNumber::NoSpace => "a write beyond the end",
            ErrorNumber::Overflow => "more than a read may be",
            ErrorNumber::Io
            | ErrorNumber::Memory
            | ErrorNumber::Invalid
            | ErrorNumber::NotSupported
            | ErrorNumber::Shutdown => "a request that makes no sense here",
        };
        Self { number, text: text.to_owned() }
    }
}

/// One connection in the transmission phase.
#[derive(Debug)]
pub(super) struct Transmission<'a> {
    line: &'a mut Line,
    payload: Payload,
    bound: Bound,
    limits: Limits,
    /// Whom the log is told of.
    peer: &'a str,
    /// The log was told of a failure of this connection.
    told: bool,
}

impl<'a> Transmission<'a> {
    pub(super) fn new(line: &'a mut Line, payload: Payload, agreed: Agreed<Bound>, peer: &'a str) -> Self {
        let Agreed { export, bound, structured, allocation } = agreed;
        let limits =
            Limits { size: export.size, flags: export.flags, block_bytes: export.block_bytes, structured, allocation };
        Self { line, payload, bound, limits, peer, told: false }
    }

    /// Carries out requests until the client ends or hangs up between two of them.
    pub(super) fn run(mut self) -> Result<(), ServeError> {
        let mut bytes = [0; REQUEST_BYTES];
        while self.line.read_message(&mut bytes, None)? {
            let header = RequestHeader::read(bytes)?;
            let payload_bytes = header.payload_bytes() as usize;
            if payload_bytes > 0 {
                let deadline = self.line.within(MESSAGE_PATIENCE);
                self.line.read_all(self.payload.room(payload_bytes), deadline)?;
            }
            // A volume that grew meanwhile can be asked for more.
            self.limits.size = self.bound.size_bytes();
            match header.check(&self.limits) {
                Ok(Request::Disconnect) => return Ok(()),
                Ok(request) => self.answer(header.cookie, request)?,
                Err(number) => self.fail(header.cookie, &number.into())?,
            }
            self.payload.give_back();
        }
        Ok(())
    }

    fn answer(&mut self, cookie: u64, request: Request) -> Result<(), ServeError> {
        let done = match request {
            Request::Read { part, whole } => return self.read(cookie, part, whole),
            Request::BlockStatus { part, first_only } => return self.block_status(cookie, part, first_only),
            Request::Write { part, stable } => {
                let Self { payload, bound, .. } = self;
                let bytes = payload.filled(part.length as usize);
                change(bound, stable, |volume| volume.write_at(bytes, part.offset))
            }
            Request::Trim { part, stable } => {
                change(&self.bound, stable, |volume| volume.discard(part.offset, part.length.into()))
            }
            Request::WriteZeroes { no_hole: true, only_fast: true, .. } => Err(Failure {
                number: ErrorNumber::NotSupported,
                text: "zeroes that keep their room are no faster than a write".to_owned(),
            }),
            Request::WriteZeroes { part, stable, no_hole, only_fast: _ } => {
                change(&self.bound, stable, |volume| volume.zero(part.offset, part.length.into(), no_hole))
            }
            Request::Flush => self.flush(),
            Request::Cache { part } => self.cache(part),
            Request::Disconnect => Ok(()),
        };
        match done {
            Ok(()) if self.limits.structured => self.line.write(&reply::none(cookie))?,
            Ok(()) => self.line.write(&reply::simple(cookie, None))?,
            Err(failure) => self.fail(cookie, &failure)?,
        }
        Ok(())
    }

    /// Who may not read may not flush: a stale client that is told "done" would believe its writes are there. Nor is one
    /// told so of a volume that became damaged since: what it wrote before may not be there.
    fn flush(&self) -> Result<(), Failure> {
        self.bound.carry_out(false, |_| ())?;
        match self.bound.volume() {
            Some(volume) if self.limits.flags & export_flag::READ_ONLY == 0 => Ok(volume.flush()?),
            // Nothing was written.
            Some(_) | None => Ok(()),
        }
    }

    fn cache(&mut self, part: Part) -> Result<(), Failure> {
        let mut left = part.length.min(PAYLOAD_BYTES_MAX) as usize;
        let mut offset = part.offset;
        while left > 0 {
            let piece = left.min(CACHE_BYTES);
            let Self { payload, bound, .. } = self;
            let room = payload.room(piece);
            bound.carry_out(false, |bound| bound.read_at(room, offset))??;
            (left, offset) = (left - piece, offset + piece as u64);
        }
        Ok(())
    }

    fn read(&mut self, cookie: u64, part: Part, whole: bool) -> Result<(), ServeError> {
        let Self { payload, bound, limits, .. } = self;
        let room = payload.room(part.length as usize);
        let tells_holes = limits.structured && !whole && part.length >= HOLES_FROM_BYTES;
        let done = bound.carry_out(false, |bound| {
            if !tells_holes {
                bound.read_at(room, part.offset)?;
                return Ok(vec![StatusRun { offset: part.offset, length: part.length.into(), is_data: true }]);
            }
            let runs = runs_of(bound, part)?;
            for run in runs.iter().filter(|run| run.is_data) {
                let from = index(run.offset - part.offset);
                bound.read_at(&mut room[from..from + index(run.length)], run.offset)?;
            }
            Ok::<_, VolumeError>(runs)
        });
        let runs = match done {
            Ok(Ok(runs)) => runs,
            Ok(Err(error)) => return self.fail(cookie, &error.into()),
            Err(stale) => return self.fail(cookie, &stale.into()),
        };
        if !self.limits.structured {
            let bytes = self.payload.filled(part.length as usize);
            return Ok(self.line.write_behind(&reply::simple(cookie, None), bytes)?);
        }
        let count = runs.len();
        for (at, run) in runs.into_iter().enumerate() {
            let last = at + 1 == count;
            let length = u32::try_from(run.length).unwrap_or(u32::MAX);
            if !run.is_data {
                self.line.write(&reply::hole(last, cookie, run.offset, length))?;
                continue;
            }
            let from = index(run.offset - part.offset);
            let bytes = &self.payload.filled(part.length as usize)[from..from + index(run.length)];
            self.line.write_behind(&reply::data_head(last, cookie, run.offset, length), bytes)?;
        }
        Ok(())
    }

    fn block_status(&mut self, cookie: u64, part: Part, first_only: bool) -> Result<(), ServeError> {
        let most = if first_only { 1 } else { EXTENTS_MAX };
        let done = self.bound.carry_out(false, |bound| bound.status(part.offset, part.length.into(), most));
        let runs = match done {
            Ok(Ok(runs)) => runs,
            Ok(Err(error)) => return self.fail(cookie, &error.into()),
            Err(stale) => return self.fail(cookie, &stale.into()),
        };
        let extents: Vec<_> = runs
            .into_iter()
            .map(|run| Extent {
                length: u32::try_from(run.length).unwrap_or(u32::MAX),
                hole: !run.is_data,
                zero: !run.is_data,
            })
            .collect();
        Ok(self.line.write(&reply::block_status(cookie, &extents))?)
    }

    fn fail(&mut self, cookie: u64, failure: &Failure) -> Result<(), ServeError> {
        // The log is told once for each connection, whatever a client keeps asking.
        if !std::mem::replace(&mut self.told, true) {
            say(format_args!("{}: a request was refused ({:?}): {}", self.peer, failure.number, failure.text));
        }
        if self.limits.structured {
            self.line.write(&reply::error(cookie, failure.number, &failure.text))?;
        } else {
            self.line.write(&reply::simple(cookie, Some(failure.number)))?;
        }
        Ok(())
    }
}

/// Changes a volume; onto stable storage, if that is wanted. The change is carried out under the lease, waiting for the disk
/// is not: whoever converts the lease need not wait for it, as it is as done as it gets.
fn change(
    bound: &Bound,
    stable: bool,
    work: impl FnOnce(&crate::volume::Volume) -> Result<(), VolumeError>,
) -> Result<(), Failure> {
    let Some(volume) = bound.volume() else { return Err(Stale::ReadOnly.into()) };
    bound.carry_out(true, |_| work(volume))??;
    if stable {
        volume.flush()?;
    }
    Ok(())
}

/// Which parts of a read are data: all of it is told of.
fn runs_of(bound: &Bound, part: Part) -> Result<Vec<StatusRun>, VolumeError> {
    let mut runs = bound.status(part.offset, part.length.into(), READ_RUNS_MAX)?;
    let end = part.offset + u64::from(part.length);
    let told = runs.last().map_or(part.offset, |run| run.offset + run.length);
    if told < end {
        // So many parts that the rest is read as it is.
        runs.push(StatusRun { offset: told, length: end - told, is_data: true });
    }
    Ok(runs)
}

/// A length within a request: it fits.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
