//! The daemon killed at random moments under clients that write: whatever was acknowledged is there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::client::{Client, ClientError};
use crate::daemon::{Daemon, random};

const BLOCK_BYTES: usize = 4096;
const BLOCKS: u64 = 1024;

/// Times the daemon is killed.
const KILLS: u32 = 12;

/// A writer with a part of the volume of its own: blocks with a number each that only grows.
struct Writer {
    socket: PathBuf,
    export: String,
    first: u64,
    /// The last number of each block that was acknowledged, and the one that may be there.
    acknowledged: Vec<u64>,
    sent: Vec<u64>,
    next: u64,
}

fn block(number: u64, at: u64) -> Vec<u8> {
    [number.to_le_bytes(), at.to_le_bytes()].concat().into_iter().cycle().take(BLOCK_BYTES).collect()
}

impl Writer {
    fn verify(&self, client: &mut Client) -> Result<(), ClientError> {
        for at in 0..BLOCKS {
            let offset = (self.first + at) * BLOCK_BYTES as u64;
            let found = client.read(offset, u32::try_from(BLOCK_BYTES).expect("a length"))?;
            let number = u64::from_le_bytes(*found.first_chunk().expect("a number"));
            let (least, most) = (
                self.acknowledged[usize::try_from(at).expect("an index")],
                self.sent[usize::try_from(at).expect("an index")],
            );
            assert!(
                (least..=most).contains(&number),
                "block {at} holds {number}: {least} was acknowledged, {most} sent"
            );
            let wanted = if number == 0 { vec![0; BLOCK_BYTES] } else { block(number, at) };
            assert!(found == wanted, "block {at} is neither the one nor the other");
        }
        Ok(())
    }

    /// Connects, verifies what is there, and writes on until the connection breaks.
    fn write(&mut self, writes: &AtomicU64) -> Result<(), ClientError> {
        let mut client = Client::connect(&self.socket, &self.export)?;
        self.verify(&mut client)?;
        loop {
            // No generator is needed: a step that meets all blocks in a strange order.
            self.next += 1;
            let at = self.next * 509 % BLOCKS;
            let index = usize::try_from(at).expect("an index");
            self.sent[index] = self.next;
            client.write((self.first + at) * BLOCK_BYTES as u64, &block(self.next, at))?;
            self.acknowledged[index] = self.next;
            writes.fetch_add(1, Ordering::Relaxed);
            if self.next.is_multiple_of(97) {
                client.flush()?;
            }
        }
    }

    fn run(mut self, is_over: &AtomicBool, writes: &AtomicU64) -> Self {
        while !is_over.load(Ordering::Relaxed) {
            match self.write(writes) {
                Err(ClientError::Broken(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        self
    }
}

fn writer(socket: &Path, export: &str, number: u64) -> Writer {
    let blocks = usize::try_from(BLOCKS).expect("a number");
    Writer {
        socket: socket.to_owned(),
        export: export.to_owned(),
        first: number * BLOCKS,
        acknowledged: vec![0; blocks],
        sent: vec![0; blocks],
        next: 0,
    }
}

#[test]
fn whatever_was_acknowledged_is_there() {
    let mut daemon = Daemon::new();
    let (_, _, export) = daemon.writable(16 << 20);
    let (is_over, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (0..3)
        .map(|number| {
            let writer = writer(&daemon.nbd_socket(), &export, number);
            let (is_over, writes) = (Arc::clone(&is_over), Arc::clone(&writes));
            std::thread::spawn(move || writer.run(&is_over, &writes))
        })
        .collect();
    for _ in 0..KILLS {
        let [moment] = random::<1>();
        let (began, before) = (Instant::now(), writes.load(Ordering::Relaxed));
        // Some writes, and then some moment.
        while writes.load(Ordering::Relaxed) < before + 20 && began.elapsed() < crate::daemon::SOON {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(u64::from(moment) / 2));
        daemon.kill();
        daemon.start_again();
    }
    is_over.store(true, Ordering::Relaxed);
    daemon.kill();
    let writers: Vec<_> = writers.into_iter().map(|writer| writer.join().expect("a writer")).collect();
    daemon.start_again();
    for writer in &writers {
        let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
        writer.verify(&mut client).expect("what is there");
        assert!(writer.next > 200, "only {} writes", writer.next);
    }
}

#[test]
fn what_is_under_way_at_the_end_is_answered_and_what_was_written_is_recorded() {
    let mut daemon = Daemon::with(|start| start.record = Some(start.store.with_file_name("record")));
    let (_, _, export) = daemon.writable(4 << 20);
    let writer = writer(&daemon.nbd_socket(), &export, 0);
    let writes = Arc::new(AtomicU64::new(0));
    let writing = std::thread::spawn({
        let (mut writer, writes) = (writer, Arc::clone(&writes));
        move || {
            let ended = writer.write(&writes);
            (writer, ended)
        }
    });
    crate::daemon::eventually("it writes", || writes.load(Ordering::Relaxed) > 100);
    assert!(daemon.terminate().success(), "{}", daemon.log());
    let (writer, ended) = writing.join().expect("a writer");
    assert!(matches!(ended, Err(ClientError::Broken(_))), "{ended:?}");
    let record = std::fs::read(daemon.path("record")).expect("the record");
    let has = |word: &[u8]| record.windows(word.len()).any(|found| found == word);
    assert!(has(b"\"op\":\"write\"") && has(b"\"op\":\"sync_end\"") && has(&block(1, 509)));
    daemon.start_again();
    let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    writer.verify(&mut client).expect("what is there");
}
