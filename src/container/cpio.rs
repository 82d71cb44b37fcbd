//! The archive that Linux unpacks as its initramfs: cpio in the "newc" format, written and looked into. What follows is
//! the whole of it (the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`, `init/initramfs.c`).
//!
//! An archive is a sequence of entries. An entry is a header of 110 ASCII characters, a name, a content:
//!
//! | characters | what |
//! |---|---|
//! | 6 | `070701` |
//! | 13 × 8 | hexadecimal numbers: inode, mode with its type, uid, gid, names of the inode, time, bytes of the content, two of the device it lay on, two of the device it is, bytes of the name with its null byte, 0 |
//!
//! The name ends with a null byte; zeros after it have the content begin at a multiple of four bytes, zeros after the
//! content the next header. Directories come before what is in them: nothing makes them otherwise. A symbolic link's
//! content is its target. Names of one inode share its number; of those, the last one has the content and the others
//! have none. An entry `TRAILER!!!` ends it. A number has 32 bits: so a file has less than 4 GiB, times end in 2106, and
//! there is no place for extended attributes.

use std::io::{Read, Seek, SeekFrom, Write};

use super::fault::ContainerError;
use super::tree::{Inodes, Metadata};
use super::{AGENT_BYTES_MAX, AGENT_PATH, not_written};
use crate::units::MIB;

/// Most bytes of an initramfs. It has to lie below the end of low memory beside the kernel (`machine/layout`), and what it
/// becomes is in memory three times while it is unpacked.
pub const INITRAMFS_BYTES_MAX: u64 = 2048 * MIB;

/// Most bytes of one file.
pub(super) const FILE_BYTES_MAX: u64 = u32::MAX as u64;

/// The entry that ends an archive.
pub(super) const TRAILER: &[u8] = b"TRAILER!!!";

const MAGIC: &[u8] = b"070701";
const HEADER_BYTES: usize = 110;

/// Types of inodes, as in a mode (inode(7)).
pub(super) const S_IFIFO: u32 = 0o010_000;
pub(super) const S_IFDIR: u32 = 0o040_000;
pub(super) const S_IFREG: u32 = 0o100_000;
pub(super) const S_IFLNK: u32 = 0o120_000;
const S_IFMT: u32 = 0o170_000;

/// Most entries that are looked at for a file.
const SEARCHED_MAX: u32 = 1_000_000;

/// What a header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    /// Number of the inode.
    pub(super) inode: u32,
    /// How many names it has.
    pub(super) names: u32,
    /// Its type.
    pub(super) kind: u32,
    /// Who owns it, and so on.
    pub(super) metadata: Metadata,
    /// Bytes that follow.
    pub(super) bytes: u64,
}

/// An archive that is being written.
pub(super) struct Writer<W> {
    to: W,
    written: u64,
}

impl<W: Write> Writer<W> {
    pub(super) const fn new(to: W) -> Self {
        Self { to, written: 0 }
    }

    /// The guest agent and its directory: first, so that it is found without looking at all the rest.
    pub(super) fn write_agent(&mut self, agent: &[u8], inodes: &mut Inodes) -> Result<(), ContainerError> {
        let bytes = u64::try_from(agent.len()).unwrap_or(u64::MAX);
        let metadata = Metadata { mode: 0o755, ..Metadata::default() };
        if let Some((directory, _)) = AGENT_PATH.rsplit_once('/') {
            let header = Header { inode: inodes.next_number(), names: 2, kind: S_IFDIR, metadata, bytes: 0 };
            self.header(directory.as_bytes(), header)?;
        }
        let header = Header { inode: inodes.next_number(), names: 1, kind: S_IFREG, metadata, bytes };
        self.entry(AGENT_PATH.as_bytes(), header, |to| to.write_all(agent))
    }

    /// An entry without a content.
    pub(super) fn header(&mut self, name: &[u8], header: Header) -> Result<(), ContainerError> {
        self.entry(name, header, |_| Ok(()))
    }

    /// An entry whose content `content` writes: as many bytes as the header says.
    pub(super) fn entry(
        &mut self,
        name: &[u8],
        header: Header,
        content: impl FnOnce(&mut W) -> std::io::Result<()>,
    ) -> Result<(), ContainerError> {
        let Header { inode, names, kind, metadata: Metadata { mode, uid, gid, time }, bytes } = header;
        let name_bytes = u64::try_from(name.len()).map_err(|_| ContainerError::DoesNotFit)? + 1;
        let head = HEADER_BYTES as u64 + name_bytes;
        let end = padded(self.written + head).checked_add(bytes).ok_or(ContainerError::DoesNotFit)?;
        if bytes > FILE_BYTES_MAX || end > INITRAMFS_BYTES_MAX {
            return Err(ContainerError::DoesNotFit);
        }
        let mode = kind | mode & !S_IFMT;
        write!(
            self.to,
            "070701{inode:08x}{mode:08x}{uid:08x}{gid:08x}{names:08x}{time:08x}{bytes:08x}\
             {zero:08x}{zero:08x}{zero:08x}{zero:08x}{name_bytes:08x}{zero:08x}",
            zero = 0
        )
        .and_then(|()| self.to.write_all(name))
        .and_then(|()| self.to.write_all(&[0]))
        .map_err(not_written)?;
        self.written += head;
        self.pad()?;
        content(&mut self.to).map_err(not_written)?;
        self.written += bytes;
        self.pad()
    }

    /// Ends the archive; its size.
    pub(super) fn finish(mut self) -> Result<u64, ContainerError> {
        let header = Header { inode: 0, names: 1, kind: 0, metadata: Metadata::default(), bytes: 0 };
        self.header(TRAILER, header)?;
        self.to.flush().map_err(not_written)?;
        Ok(self.written)
    }

    fn pad(&mut self) -> Result<(), ContainerError> {
        let end = padded(self.written);
        let zeros = usize::try_from(end - self.written).unwrap_or(0);
        self.to.write_all([0; 3].get(..zeros).unwrap_or_default()).map_err(not_written)?;
        self.written = end;
        Ok(())
    }
}

const fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(4)
}

/// The content of the regular file `path` in an archive, if it is a program that fits.
pub fn find_file(archive: &mut (impl Read + Seek), path: &str) -> Result<Vec<u8>, ContainerError> {
    let wrong = |reason: &str| ContainerError::Agent { reason: reason.to_owned() };
    let io = |source: std::io::Error| wrong(&format!("it cannot be read ({source})"));
    let path = path.trim_start_matches('/').as_bytes();
    let length = archive.seek(SeekFrom::End(0)).map_err(io)?;
    archive.rewind().map_err(io)?;
    let mut at = 0;
    for _ in 0..SEARCHED_MAX {
        let mut header = [0; HEADER_BYTES];
        archive.read_exact(&mut header).map_err(|_| wrong("it is not a cpio archive, or ends too early"))?;
        if !header.starts_with(MAGIC) {
            return Err(wrong("it is not an uncompressed cpio archive"));
        }
        let field = |number: usize| {
            let digits = header.get(MAGIC.len() + 8 * number..MAGIC.len() + 8 * (number + 1));
            let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
            let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
            digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).ok_or_else(|| wrong("a header is malformed"))
        };
        let (mode, bytes, name_bytes) = (field(1)?, u64::from(field(6)?), u64::from(field(11)?));
        if name_bytes == 0 || name_bytes > 4096 {
            return Err(wrong("a name in it is malformed"));
        }
        let mut name = Vec::new();
        archive.by_ref().take(name_bytes).read_to_end(&mut name).map_err(io)?;
        let name = name.strip_suffix(&[0]).ok_or_else(|| wrong("a name in it is malformed"))?;
        let content = padded(at + HEADER_BYTES as u64 + name_bytes);
        if name == TRAILER {
            break;
        }
        at = padded(content + bytes);
        if at > padded(length) {
            return Err(wrong("it ends too early"));
        }
        let name = name.strip_prefix(b"./").unwrap_or(name);
        if name != path || mode & S_IFMT != S_IFREG || bytes == 0 {
            archive.seek(SeekFrom::Start(at)).map_err(io)?;
            continue;
        }
        if bytes > AGENT_BYTES_MAX {
            return Err(wrong("it is too large for a guest agent"));
        }
        archive.seek(SeekFrom::Start(content)).map_err(io)?;
        let mut found = Vec::new();
        archive.by_ref().take(bytes).read_to_end(&mut found).map_err(io)?;
        return if found.starts_with(b"\x7fELF") && found.len() as u64 == bytes {
            Ok(found)
        } else {
            Err(wrong("it is not an ELF program"))
        };
    }
    Err(wrong(&format!("there is no /{}", path.escape_ascii())))
}
