//! The console of a machine: what the guest writes is kept in a bounded ring, mirrored to the console file, and sent
//! to whoever is attached; what they type goes to the serial port.
//!
//! The serial port writes on vCPU threads through [`Output`]; clients are served on the main thread. A client that
//! does not read never holds the guest up: it falls behind, and when it has fallen behind by more than the ring it is
//! told how much it missed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::wire::console_ring::{HEADER_BYTES, RING_BYTES, header, offset, written};

/// Most clients attached to one console.
pub(super) const CLIENTS_MAX: usize = 8;

/// Most bytes taken from one client at a time. The serial port has a small queue of its own: what it does not take
/// waits in the client's socket.
const INPUT_CHUNK_BYTES: usize = 256;

#[derive(Debug)]
struct Ring {
    bytes: Box<[u8]>,
    written: u64,
    file: File,
}

impl Ring {
    fn push(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(RING_BYTES) {
            let start = offset(self.written);
            let (tail, wrapped) = part.split_at(part.len().min(RING_BYTES - start));
            self.put(start, tail);
            self.put(0, wrapped);
            self.written += part.len() as u64;
        }
        // A full disk costs the history after a crash, not the guest's console: attached clients still see it.
        let _ = self.file.write_all_at(&header(self.written), 0);
    }

    /// Goes on from what is in the file, if that is a console's: of the same guest, in another process. Its bytes are the
    /// guest's, and so are these.
    fn go_on(&mut self) {
        let mut found = [0; HEADER_BYTES];
        if self.file.read_exact_at(&mut found, 0).is_err() {
            return;
        }
        // More than any console is ever written.
        let Some(written) = written(&found).filter(|written| *written < u64::MAX / 2) else { return };
        if self.file.read_exact_at(&mut self.bytes, HEADER_BYTES as u64).is_ok() {
            self.written = written;
        }
    }

    fn put(&mut self, start: usize, part: &[u8]) {
        self.bytes[start..start + part.len()].copy_from_slice(part);
        let _ = self.file.write_all_at(part, (HEADER_BYTES + start) as u64);
    }

    /// Position of the oldest byte still held.
    fn oldest(&self) -> u64 {
        self.written.saturating_sub(RING_BYTES as u64)
    }

    /// Bytes from `position` on that lie together in the ring.
    fn run_from(&self, position: u64) -> &[u8] {
        let count = usize::try_from(self.written - position).unwrap_or(RING_BYTES).min(RING_BYTES);
        let start = offset(position);
        &self.bytes[start..(start + count).min(RING_BYTES)]
    }
}

/// The writing side: handed to the serial port. Never blocks on a client.
#[derive(Debug)]
pub(super) struct Output {
    ring: Arc<Mutex<Ring>>,
    news: EventFd,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
        self.news.write(1)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Position of the next byte to send.
    position: u64,
    /// A notice of lost bytes that is not sent yet.
    notice: Vec<u8>,
}

/// Whether a client's socket took all there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    All,
    WouldBlock,
    HungUp,
}

impl Client {
    fn send(&mut self, ring: &Ring) -> Sent {
        loop {
            let lost = ring.oldest().saturating_sub(self.position);
            if lost > 0 {
                self.position = ring.oldest();
                self.notice = format!("\r\n[{lost} bytes of console output were not read in time]\r\n").into_bytes();
            }
            let from_notice = !self.notice.is_empty();
            let bytes = if from_notice { self.notice.as_slice() } else { ring.run_from(self.position) };
            if bytes.is_empty() {
                return Sent::All;
            }
            match self.stream.write(bytes) {
                Ok(0) => return Sent::HungUp,
                Ok(count) if from_notice => drop(self.notice.drain(..count)),
                Ok(count) => self.position += count as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::WouldBlock,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Sent::HungUp,
            }
        }
    }
}

/// The reading side: clients attached to the console.
#[derive(Debug)]
pub(super) struct Console {
    ring: Arc<Mutex<Ring>>,
    news: EventFd,
    listener: UnixListener,
    clients: BTreeMap<RawFd, Client>,
}

/// What to wait for on a client's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    /// Input from the client.
    Input,
    /// Input, and room for output.
    InputAndRoom,
    /// Nothing: the client is gone and its socket closed.
    Gone,
}

impl Console {
    /// A console that keeps `file` current, goes on from what is in it, and serves clients of `listener`.
    pub(super) fn new(file: File, listener: UnixListener) -> io::Result<(Self, Output)> {
        file.set_len((HEADER_BYTES + RING_BYTES) as u64)?;
        listener.set_nonblocking(true)?;
        let mut ring = Ring { bytes: vec![0; RING_BYTES].into_boxed_slice(), written: 0, file };
        ring.go_on();
        ring.push(&[]);
        let ring = Arc::new(Mutex::new(ring));
        let news = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let output = Output { ring: Arc::clone(&ring), news: news.try_clone()? };
        Ok((Self { ring, news, listener, clients: BTreeMap::new() }, output))
    }

    /// Goes on from what is in the file now: another process wrote to it until its guest stood still.
    pub(super) fn go_on(&self) {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).go_on();
    }

    /// Readable when a client wants in.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Readable when the guest wrote something.
    pub(super) fn news(&self) -> &EventFd {
        &self.news
    }

    /// Bytes the guest has written.
    pub(super) fn written(&self) -> u64 {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner).written
    }

    /// Takes one waiting client; gives its descriptor. One over the limit is hung up on.
    pub(super) fn accept(&mut self) -> Option<RawFd> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        if self.clients.len() >= CLIENTS_MAX {
            return None;
        }
        let position = self.ring.lock().unwrap_or_else(PoisonError::into_inner).oldest();
        let number = stream.as_raw_fd();
        self.clients.insert(number, Client { stream, position, notice: Vec::new() });
        Some(number)
    }

    /// Sends every client what it has not seen; gives what to wait for on each.
    pub(super) fn send_news(&mut self) -> Vec<(RawFd, Interest)> {
        // Only the count of news matters, and that we are about to look.
        let _ = self.news.read();
        let numbers: Vec<RawFd> = self.clients.keys().copied().collect();
        numbers.into_iter().map(|number| (number, self.send_to(number))).collect()
    }

    /// Sends one client what it has not seen.
    pub(super) fn send_to(&mut self, number: RawFd) -> Interest {
        let Some(client) = self.clients.get_mut(&number) else { return Interest::Gone };
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        match client.send(&ring) {
            Sent::All => Interest::Input,
            Sent::WouldBlock => Interest::InputAndRoom,
            Sent::HungUp => {
                self.clients.remove(&number);
                Interest::Gone
            }
        }
    }

    /// Reads what a client typed and hands it to `serial`, which says how many bytes it took; the rest is dropped, as
    /// a serial line without flow control does.
    pub(super) fn receive_from(&mut self, number: RawFd, serial: impl FnOnce(&[u8]) -> usize) -> Interest {
        let Some(client) = self.clients.get_mut(&number) else { return Interest::Gone };
        let mut bytes = [0; INPUT_CHUNK_BYTES];
        match client.stream.read(&mut bytes) {
            Ok(0) => {
                self.clients.remove(&number);
                Interest::Gone
            }
            Ok(count) => {
                serial(&bytes[..count]);
                Interest::Input
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Interest::Input
            }
            Err(_) => {
                self.clients.remove(&number);
                Interest::Gone
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::console_ring::history;

    fn console() -> (Console, Output, File, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile().unwrap();
        let listener = UnixListener::bind(dir.path().join("c")).unwrap();
        let (console, output) = Console::new(file.try_clone().unwrap(), listener).unwrap();
        (console, output, file, dir)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES + RING_BYTES];
        file.read_exact_at(&mut bytes, 0).unwrap();
        history(&bytes).unwrap()
    }

    #[test]
    fn the_file_holds_the_newest_bytes() {
        let (_console, mut output, file, _dir) = console();
        output.write_all(b"first line\n").unwrap();
        assert_eq!(content(&file), b"first line\n");
        let flood: Vec<u8> = (0..=250_u8).cycle().take(RING_BYTES * 2 + 77).collect();
        output.write_all(&flood).unwrap();
        assert_eq!(content(&file), flood[flood.len() - RING_BYTES..]);
    }

    #[test]
    fn another_process_goes_on_where_one_stopped() {
        let (_console, mut output, file, dir) = console();
        let listener = UnixListener::bind(dir.path().join("next")).unwrap();
        let (next, mut next_output) = Console::new(file.try_clone().unwrap(), listener).unwrap();
        let flood: Vec<u8> = (0..=250_u8).cycle().take(RING_BYTES + 77).collect();
        output.write_all(&flood).unwrap();
        next.go_on();
        assert_eq!(next.written(), flood.len() as u64);
        next_output.write_all(b"and on").unwrap();
        let whole = [flood.as_slice(), b"and on"].concat();
        assert_eq!(content(&file), whole[whole.len() - RING_BYTES..]);
        // What is no console's is not gone on from.
        file.write_all_at(b"something", 0).unwrap();
        next.go_on();
        assert_eq!(next.written(), whole.len() as u64);
    }

    #[test]
    fn a_client_gets_history_then_news_and_is_told_of_losses() {
        let (mut console, mut output, _file, dir) = console();
        output.write_all(b"before ").unwrap();
        let mut client = UnixStream::connect(dir.path().join("c")).unwrap();
        let number = console.accept().unwrap();
        assert_eq!(console.send_to(number), Interest::Input);
        output.write_all(b"after").unwrap();
        assert_eq!(console.send_news(), [(number, Interest::Input)]);
        let mut bytes = [0; 12];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"before after");

        // The client stops reading; the guest goes on writing far more than socket and ring hold.
        for _ in 0..40 {
            output.write_all(&[b'x'; RING_BYTES]).unwrap();
            console.send_news();
        }
        assert_eq!(console.send_to(number), Interest::InputAndRoom);
        client.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
        let mut seen = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match client.read(&mut chunk) {
                Ok(count) => seen.extend_from_slice(&chunk[..count]),
                Err(_) => {
                    if console.send_to(number) == Interest::Input && seen.ends_with(b"x") {
                        break;
                    }
                }
            }
        }
        while let Ok(count) = client.read(&mut chunk) {
            seen.extend_from_slice(&chunk[..count]);
        }
        let text = String::from_utf8(seen).unwrap();
        assert!(text.contains("bytes of console output were not read in time"), "{}", text.len());
        assert!(text.len() < 40 * RING_BYTES);
    }

    #[test]
    fn input_reaches_the_serial_port_and_a_hang_up_is_noticed() {
        let (mut console, _output, _file, dir) = console();
        let mut client = UnixStream::connect(dir.path().join("c")).unwrap();
        let number = console.accept().unwrap();
        client.write_all(b"ls\n").unwrap();
        let mut typed = Vec::new();
        let interest = console.receive_from(number, |bytes| {
            typed.extend_from_slice(bytes);
            bytes.len()
        });
        assert_eq!((interest, typed.as_slice()), (Interest::Input, &b"ls\n"[..]));
        drop(client);
        assert_eq!(console.receive_from(number, |_| 0), Interest::Gone);
        assert_eq!(console.receive_from(number, |_| 0), Interest::Gone);
    }

    #[test]
    fn clients_over_the_limit_are_hung_up_on() {
        let (mut console, _output, _file, dir) = console();
        let clients: Vec<_> = (0..=CLIENTS_MAX).map(|_| UnixStream::connect(dir.path().join("c")).unwrap()).collect();
        let taken: Vec<_> = clients.iter().map(|_| console.accept().is_some()).collect();
        assert_eq!(taken.iter().filter(|taken| **taken).count(), CLIENTS_MAX);
        assert_eq!(taken.last(), Some(&false));
    }
}
