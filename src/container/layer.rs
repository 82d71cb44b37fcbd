//! One layer: a tar archive (pax and ustar of POSIX, GNU's long names), put on top of those before it. Headers are read
//! one by one, those that extend the next one among them, so that nothing is kept that has no bound.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use tar::{Archive, Header};

use super::budget::{Bounded, Budget};
use super::cpio::FILE_BYTES_MAX;
use super::fault::{ContainerError, Fault, shown};
use super::spool::{Spool, SpoolError};
use super::tree::{Kind, Metadata, PATH_BYTES_MAX, Path, Tree};
use super::{LeftOut, Whiteouts};
use crate::units::Bytes;

/// Longest extended header: names, and attributes of up to 64 KiB each.
const EXTENSION_BYTES_MAX: u64 = 1024 * 1024;

/// How packed archives begin, but for those of gzip, which are read.
const PACKED: &[(&[u8], &str)] =
    &[(&[0x28, 0xb5, 0x2f, 0xfd], "zstd"), (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"), (b"BZh", "bzip2")];

/// How an archive begins that gzip packed.
const GZIP: &[u8] = &[0x1f, 0x8b];

/// What is said of bytes that are no header.
const NO_HEADER: &str = "what should be a header of tar is none: it is another kind of file, or was changed";

/// The archive itself. What it is packed by is looked at, not asked for.
pub(super) fn unzip<'r>(layer: &str, stored: &'r mut impl BufRead) -> Result<Box<dyn Read + 'r>, ContainerError> {
    let damaged = |source| ContainerError::Damaged { layer: layer.to_owned(), source };
    let begins = stored.fill_buf().map_err(damaged)?;
    if let Some((_, packer)) = PACKED.iter().find(|(magic, _)| begins.starts_with(magic)) {
        return Err(ContainerError::Packed { layer: layer.to_owned(), packer: (*packer).to_owned() });
    }
    if begins.is_empty() {
        return Err(damaged(io::Error::new(io::ErrorKind::UnexpectedEof, "it is empty")));
    }
    Ok(if begins.starts_with(GZIP) { Box::new(MultiGzDecoder::new(stored)) } else { Box::new(stored) })
}

/// A layer that is put on top.
pub(super) struct Layer<'a> {
    /// What it is called in errors.
    pub(super) name: &'a str,
    /// Its number from below.
    pub(super) number: u32,
    /// What its whiteouts do.
    pub(super) whiteouts: Whiteouts,
}

/// What headers before an entry's own say of it.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    bytes: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    time: Option<u32>,
    attributes: u64,
}

/// Where what an archive holds goes.
pub(super) struct Target<'a> {
    pub(super) tree: &'a mut Tree,
    pub(super) spool: &'a mut Spool,
    pub(super) budget: &'a Budget,
    pub(super) left_out: &'a mut LeftOut,
}

/// What an entry is, by the letter of its type.
enum Type {
    File,
    HardLink,
    Link,
    Device,
    Directory,
    Pipe,
}

/// An entry that is not an extended header.
struct Entry<'a> {
    header: &'a Header,
    bytes: u64,
    path: &'a [u8],
    extended: Extended,
}

impl Layer<'_> {
    /// Reads all of `unzipped`.
    pub(super) fn apply(&self, unzipped: &mut dyn Read, target: &mut Target<'_>) -> Result<(), ContainerError> {
        let budget = target.budget;
        let mut archive = Archive::new(Bounded { from: unzipped, budget });
        let mut extended = Extended::default();
        let mut said = String::new();
        for entry in archive.entries().map_err(self.damaged(budget))?.raw(true) {
            let mut entry = entry.map_err(self.damaged(budget))?;
            let header = entry.header().clone();
            let bytes = entry.size();
            let path = extended.path.clone().unwrap_or_else(|| header.path_bytes().into_owned());
            said = shown(&path);
            if bytes > budget.left() {
                let fault = Fault::Size { says: Bytes(bytes), left: Bytes(budget.left()) };
                return Err(self.faulty(&said, fault));
            }
            match header.entry_type().as_byte() {
                b'L' => extended.path = Some(until_null(self.extension(&mut entry, bytes, &said, budget)?)),
                b'K' => extended.link = Some(until_null(self.extension(&mut entry, bytes, &said, budget)?)),
                b'x' => {
                    let text = self.extension(&mut entry, bytes, &said, budget)?;
                    extended.read(&text).map_err(|fault| self.faulty(&said, fault))?;
                }
                b'g' => {
                    let text = self.extension(&mut entry, bytes, &said, budget)?;
                    check_global(&text).map_err(|fault| self.faulty(&said, fault))?;
                }
                _ => {
                    let extended = std::mem::take(&mut extended);
                    let described = Entry { header: &header, bytes, path: &path, extended };
                    self.put(&described, &mut entry, target).map_err(|error| match error {
                        PutError::Fault(fault) => self.faulty(&said, fault),
                        PutError::Spool(SpoolError::Cut) => self.faulty(&said, Fault::CutOff),
                        PutError::Spool(SpoolError::Read(source)) => self.damaged(budget)(source),
                        PutError::Spool(SpoolError::Keep(error)) => error,
                    })?;
                }
            }
        }
        if extended.path.is_some() || extended.link.is_some() {
            return Err(self.faulty(&said, Fault::CutOff));
        }
        // What lies behind the archive's end counts too, and has to be readable: a checksum is at the end.
        io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop).map_err(self.damaged(budget))
    }

    /// The content of an extended header.
    fn extension(
        &self,
        entry: &mut impl Read,
        bytes: u64,
        said: &str,
        budget: &Budget,
    ) -> Result<Vec<u8>, ContainerError> {
        if bytes > EXTENSION_BYTES_MAX {
            return Err(self.faulty(said, Fault::Extension { reason: "is longer than 1 MiB" }));
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(self.damaged(budget))?;
        let is_whole = u64::try_from(content.len()).is_ok_and(|length| length == bytes);
        if is_whole { Ok(content) } else { Err(self.faulty(said, Fault::CutOff)) }
    }

    /// Puts an entry where it belongs.
    fn put(&self, entry: &Entry<'_>, content: &mut impl Read, target: &mut Target<'_>) -> Result<(), PutError> {
        let Entry { header, bytes, path, extended } = entry;
        let Target { tree, spool, budget, left_out } = target;
        if extended.bytes.is_some_and(|says| says != *bytes) {
            return Err(Fault::Disagreement.into());
        }
        let link = extended.link.clone();
        let link = link.unwrap_or_else(|| header.link_name_bytes().unwrap_or_default().into_owned());
        budget.entry(path.len() + link.len())?;
        let named = Path::parse(path)?;
        if self.whiteouts == Whiteouts::Hide
            && let Some(hidden) = named.hides()?
        {
            return Ok(tree.hide(&hidden, self.number)?);
        }
        let Some(kind) = entry.kind()? else { return Ok(()) };
        left_out.attributes += extended.attributes;
        let metadata = extended.metadata(header)?;
        let made = |text| budget.entry(text);
        let kind = match kind {
            Type::Directory => return Ok(tree.put_directory(&named, metadata, self.number, made)?),
            Type::HardLink => {
                let target = if link.is_empty() { Err(Fault::EmptyLink) } else { Path::parse(&link) };
                return Ok(tree.put_hard_link(&named, &target?, self.number, made)?);
            }
            Type::Device => {
                left_out.devices += 1;
                return Ok(());
            }
            Type::File if *bytes > FILE_BYTES_MAX => return Err(Fault::FileTooLarge { says: Bytes(*bytes) }.into()),
            Type::File => Kind::File(spool.take(content, *bytes).map_err(PutError::Spool)?),
            Type::Link if link.is_empty() => return Err(Fault::EmptyLink.into()),
            Type::Link if link.contains(&0) => return Err(Fault::NullByte.into()),
            Type::Link if link.len() > PATH_BYTES_MAX => return Err(Fault::PathTooLong.into()),
            Type::Link => Kind::Link(link),
            Type::Pipe => Kind::Pipe,
        };
        Ok(tree.put(&named, (kind, metadata), self.number, made)?)
    }

    fn damaged<'b>(&'b self, budget: &'b Budget) -> impl Fn(io::Error) -> ContainerError + 'b {
        |source| {
            let layer = self.name.to_owned();
            if budget.is_over() {
                ContainerError::TooLarge { layer, limit: Bytes(budget.limit()) }
            } else {
                let words = source.to_string();
                // Where a header is none, its reader's words are mostly the header.
                let is_readable = words.bytes().all(|byte| (b' '..=b'~').contains(&byte));
                let words = if is_readable { words } else { NO_HEADER.to_owned() };
                let source = io::Error::new(source.kind(), words);
                ContainerError::Damaged { layer, source }
            }
        }
    }

    fn faulty(&self, entry: &str, fault: Fault) -> ContainerError {
        ContainerError::Entry { layer: self.name.to_owned(), entry: entry.to_owned(), fault }
    }
}

/// Why an entry is not put anywhere.
enum PutError {
    Fault(Fault),
    Spool(SpoolError),
}

impl From<Fault> for PutError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Entry<'_> {
    /// What it is; `None` for what is not a part of the file system.
    fn kind(&self) -> Result<Option<Type>, Fault> {
        Ok(Some(match self.header.entry_type().as_byte() {
            // As archives were before there was a type for directories.
            b'0' | 0 if self.path.ends_with(b"/") => Type::Directory,
            b'0' | 0 | b'7' => Type::File,
            b'1' => Type::HardLink,
            b'2' => Type::Link,
            b'3' | b'4' => Type::Device,
            b'5' => Type::Directory,
            b'6' => Type::Pipe,
            b'S' => return Err(Fault::Sparse),
            // A volume's label, as GNU tar writes it.
            b'V' => return Ok(None),
            other => return Err(Fault::Kind { kind: char::from(other) }),
        }))
    }
}

fn until_null(mut text: Vec<u8>) -> Vec<u8> {
    if text.last() == Some(&0) {
        text.pop();
    }
    text
}

/// The first record of an extended header: name, value and what comes after it. Values may hold anything, line ends too;
/// only the length tells where one ends.
fn record(text: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let digits = text.iter().position(|byte| *byte == b' ')?;
    let length = text.get(..digits)?;
    let length = if length.iter().all(u8::is_ascii_digit) { std::str::from_utf8(length).ok()? } else { return None };
    let length: usize = length.parse().ok()?;
    let record = text.get(digits + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=').filter(|at| *at > 0)?;
    Some((record.get(..equals)?, record.get(equals + 1..)?, text.get(length..)?))
}

/// An extended header for all entries of an archive says what program made it, and no more.
fn check_global(text: &[u8]) -> Result<(), Fault> {
    let mut extended = Extended::default();
    extended.read(text)?;
    let Extended { path, link, bytes, uid, gid, time: _, attributes: _ } = extended;
    let says = path.is_some() || link.is_some() || bytes.is_some() || uid.is_some() || gid.is_some();
    if says { Err(Fault::Extension { reason: "gives all entries one name, size or owner" }) } else { Ok(()) }
}

impl Extended {
    /// Takes what an extended header says: records "length name=value" (POSIX, pax, "Extended Header").
    fn read(&mut self, text: &[u8]) -> Result<(), Fault> {
        let number = |value: &[u8], field| -> Result<u64, Fault> {
            let digits = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            digits.and_then(|digits| digits.parse().ok()).ok_or(Fault::Number { field })
        };
        let id = |value: &[u8], field| u32::try_from(number(value, field)?).map_err(|_| Fault::Number { field });
        let mut rest = text;
        while !rest.is_empty() {
            let (key, value, after) = record(rest).ok_or(Fault::Extension { reason: "is malformed" })?;
            rest = after;
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.bytes = Some(number(value, "size")?),
                b"uid" => self.uid = Some(id(value, "uid")?),
                b"gid" => self.gid = Some(id(value, "gid")?),
                b"mtime" => self.time = Some(seconds(value)?),
                b"hdrcharset" if value == b"BINARY" || value == b"ISO-IR 10646 2000 UTF-8" => {}
                b"hdrcharset" => return Err(Fault::Extension { reason: "has names in a character set of their own" }),
                key if key.starts_with(b"GNU.sparse.") => return Err(Fault::Sparse),
                key if key.starts_with(b"SCHILY.xattr.") || key.starts_with(b"LIBARCHIVE.xattr.") => {
                    self.attributes += 1;
                }
                key if key.starts_with(b"SCHILY.acl.") => self.attributes += 1,
                // Names of owners, other times, comments.
                _ => {}
            }
        }
        Ok(())
    }

    fn metadata(&self, header: &Header) -> Result<Metadata, Fault> {
        let fields = header.as_old();
        // What is left blank is zero, as other readers have it.
        let number = |given: &[u8], read: io::Result<u64>, field| {
            let is_blank = given.iter().all(|byte| matches!(byte, 0 | b' '));
            if is_blank { Ok(0) } else { read.map_err(|_| Fault::Number { field }) }
        };
        let id = |given: &[u8], read, field| {
            number(given, read, field).and_then(|id| u32::try_from(id).map_err(|_| Fault::Number { field }))
        };
        let mode = header.mode().map(u64::from);
        Ok(Metadata {
            mode: id(&fields.mode, mode, "mode")? & 0o7777,
            uid: self.uid.map_or_else(|| id(&fields.uid, header.uid(), "uid"), Ok)?,
            gid: self.gid.map_or_else(|| id(&fields.gid, header.gid(), "gid"), Ok)?,
            time: match self.time {
                Some(time) => time,
                None => saturated(number(&fields.mtime, header.mtime(), "time")?),
            },
        })
    }
}

/// Whole seconds of a time "1700000000.123", as near as 32 bits come.
fn seconds(value: &[u8]) -> Result<u32, Fault> {
    let wrong = Fault::Number { field: "time" };
    let text = std::str::from_utf8(value).map_err(|_| wrong.clone())?;
    let whole = text.split('.').next().unwrap_or(text);
    match whole.strip_prefix('-') {
        Some(_) => Ok(0),
        None => whole.parse().map(saturated).map_err(|_| wrong),
    }
}

fn saturated(seconds: u64) -> u32 {
    // GNU's way of writing a time before 1970 is a number with its highest bits set.
    if seconds > i64::MAX.unsigned_abs() { 0 } else { u32::try_from(seconds).unwrap_or(u32::MAX) }
}
