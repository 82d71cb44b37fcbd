//! An NBD server as a volume's is: it dials, and speaks first. Written from the protocol, not from the device; each part
//! can be done wrong by whoever drives it.

#![expect(clippy::disallowed_methods, reason = "waits are measured by the host's own clock")]

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const ZEROES: u16 = 6;

/// Flags, flush, trim, write-zeroes, multi-conn.
pub(crate) const FLAGS: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8;

/// What is on the volume.
pub(crate) type Content = Arc<Mutex<Vec<u8>>>;

#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) handle: u64,
    pub(crate) offset: u64,
    pub(crate) bytes: u32,
    pub(crate) data: Vec<u8>,
}

/// One connection of the server.
pub(crate) struct Dialled(pub(crate) UnixStream);

impl Dialled {
    /// Connects, as soon as somebody listens.
    pub(crate) fn to(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self(socket)
    }

    /// Connects and agrees upon an export; fails if it is hung up on.
    pub(crate) fn exporting(path: &Path, bytes: u64, flags: u16, blocks: Option<[u32; 3]>) -> io::Result<Self> {
        let mut dialled = Self::to(path);
        dialled.shake(bytes, flags, blocks)?;
        Ok(dialled)
    }

    fn shake(&mut self, bytes: u64, flags: u16, blocks: Option<[u32; 3]>) -> io::Result<()> {
        self.0.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
        let mut asked = [0; 4 + 16 + 8];
        self.0.read_exact(&mut asked)?;
        assert_eq!(asked, *b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x08\0\0\0\0\0\x01\0\x03");
        let mut info = vec![0, 0];
        info.extend(bytes.to_be_bytes());
        info.extend(flags.to_be_bytes());
        self.option_reply(3, &info)?;
        if let Some(sizes) = blocks {
            let mut info = vec![0, 3];
            info.extend(sizes.iter().flat_map(|size| size.to_be_bytes()));
            self.option_reply(3, &info)?;
        }
        self.option_reply(1, &[])
    }

    pub(crate) fn option_reply(&mut self, kind: u32, body: &[u8]) -> io::Result<()> {
        let mut bytes = b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x07".to_vec();
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        bytes.extend(body);
        self.0.write_all(&bytes)
    }

    /// The next request; `None` when it is hung up on.
    pub(crate) fn asked(&mut self) -> Option<Asked> {
        let mut head = [0; 28];
        self.0.read_exact(&mut head).ok()?;
        assert_eq!(head[..4], *b"\x25\x60\x95\x13");
        let at = |from: usize, to: usize| head[from..to].iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        let asked = Asked {
            flags: u16::try_from(at(4, 6)).unwrap(),
            command: u16::try_from(at(6, 8)).unwrap(),
            handle: at(8, 16),
            offset: at(16, 24),
            bytes: u32::try_from(at(24, 28)).unwrap(),
            data: Vec::new(),
        };
        let mut data = if asked.command == WRITE { vec![0; asked.bytes as usize] } else { Vec::new() };
        self.0.read_exact(&mut data).ok()?;
        Some(Asked { data, ..asked })
    }

    pub(crate) fn reply(&mut self, handle: u64, error: u32, data: &[u8]) -> io::Result<()> {
        let mut bytes = b"\x67\x44\x66\x98".to_vec();
        bytes.extend(error.to_be_bytes());
        bytes.extend(handle.to_be_bytes());
        bytes.extend(data);
        self.0.write_all(&bytes)
    }

    /// Does what is asked, and says so.
    pub(crate) fn carry_out(&mut self, asked: &Asked, content: &Content) -> io::Result<()> {
        assert_eq!(asked.flags & !2, 0, "only zeroes that keep their space have a flag");
        let from = usize::try_from(asked.offset).unwrap();
        let to = from + asked.bytes as usize;
        let data = {
            let mut content = content.lock().unwrap();
            match asked.command {
                READ => content[from..to].to_vec(),
                WRITE => {
                    content[from..to].copy_from_slice(&asked.data);
                    Vec::new()
                }
                ZEROES | TRIM => {
                    content[from..to].fill(0);
                    Vec::new()
                }
                FLUSH => Vec::new(),
                other => panic!("command {other}"),
            }
        };
        self.reply(asked.handle, 0, &data)
    }
}

/// Waits for something that no event tells the test of.
pub(crate) fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "still not: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
