//! Bundles on their way from host to host, as bytes, and what is said of them there: signatures. What is between the
//! bytes and the disk is `crate::bundle`; here is who waits for whom, and what stops it.

use std::io::{self, Read, Write};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use super::Agent;
use super::bundles::{BundleError, BundleView};
use super::room::{NewWork, NoRoom};
use super::trust::Trust;
use super::world::{VmBundles, World, random_array};
use crate::bundle::BundleSignature;
use crate::ids::VmId;

/// Bytes of a bundle on their way; an error when they break off.
pub type Piece = io::Result<Bytes>;

/// Pieces that wait for who takes them. With [`PIECE_BYTES`] this bounds what a transfer holds.
pub const PIECES_MAX: usize = 4;

/// Bytes of a piece that is written.
const PIECE_BYTES: usize = 256 << 10;

/// After so many bytes it is looked again whether there is room.
const ROOM_BYTES: usize = 64 << 20;

/// A bundle that came.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The bundle.
    pub view: BundleView,
    /// Whether it was here before.
    pub existed: bool,
}

/// Bundles as files, as seen from above.
pub trait TransferDoor: Send + Sync + 'static {
    /// The bytes of a bundle and of what it builds on. It is not removed while they are written.
    fn export_bundle<'a>(
        &'a self,
        word: &'a str,
    ) -> BoxFuture<'a, Result<(BundleView, mpsc::Receiver<Piece>), BundleError>>;
    /// Has the bundles of these bytes, parents first: the last one is what was exported.
    fn import_bundle(&self, from: mpsc::Receiver<Piece>) -> BoxFuture<'_, Result<Vec<Imported>, BundleError>>;
    /// Keeps a signature of a bundle.
    fn sign_bundle<'a>(
        &'a self,
        word: &'a str,
        signature: BundleSignature,
    ) -> BoxFuture<'a, Result<BundleView, BundleError>>;
    /// Whether a bundle may be launched here.
    fn trust(&self, view: &BundleView) -> Trust;
}

impl<W: World> Agent<W> {
    async fn take_bundle_in(&self, mut from: mpsc::Receiver<Piece>) -> Result<Vec<Imported>, BundleError> {
        self.room(NewWork::Files).await?;
        let random = random_array(&self.shared.world);
        let random = random.map_err(|source| BundleError::Host { what: "read randomness", source })?;
        // A token becomes a directory's name.
        let token = format!("import-{}", VmId::from_random(random));
        let (to, pieces) = mpsc::channel(PIECES_MAX);
        let watched = async move {
            let mut unseen = 0;
            loop {
                let piece = tokio::select! {
                    biased;
                    () = to.closed() => return None,
                    piece = from.recv() => piece,
                };
                let piece = piece?;
                unseen += piece.as_ref().map_or(0, Bytes::len);
                if unseen >= ROOM_BYTES {
                    unseen = 0;
                    if let Err(full) = self.room(NewWork::Files).await {
                        // Why it broke off is told by who knows; if nobody listens any more, it has ended anyway.
                        let _ = to.send(Err(io::Error::other("no room"))).await;
                        return Some(full);
                    }
                }
                if to.send(piece).await.is_err() {
                    return None::<NoRoom>;
                }
            }
        };
        let bundles = self.shared.world.bundles();
        let (full, imported) = tokio::join!(watched, bundles.import(pieces, token));
        match full {
            Some(full) if imported.is_err() => Err(full.into()),
            Some(_) | None => imported,
        }
    }
}

impl<W: World> TransferDoor for Agent<W> {
    fn export_bundle<'a>(
        &'a self,
        word: &'a str,
    ) -> BoxFuture<'a, Result<(BundleView, mpsc::Receiver<Piece>), BundleError>> {
        async move {
            let view = self.shared.world.bundles().find(word).await?;
            let (to, pieces) = mpsc::channel(PIECES_MAX);
            self.shared.world.bundles().export(&view.id, to).await?;
            Ok((view, pieces))
        }
        .boxed()
    }

    fn import_bundle(&self, from: mpsc::Receiver<Piece>) -> BoxFuture<'_, Result<Vec<Imported>, BundleError>> {
        self.take_bundle_in(from).boxed()
    }

    fn sign_bundle<'a>(
        &'a self,
        word: &'a str,
        signature: BundleSignature,
    ) -> BoxFuture<'a, Result<BundleView, BundleError>> {
        async move {
            let bundles = self.shared.world.bundles();
            let bundle = bundles.find(word).await?.id;
            bundles.sign(&bundle, signature).await?;
            bundles.find(bundle.as_str()).await
        }
        .boxed()
    }

    fn trust(&self, view: &BundleView) -> Trust {
        self.shared.config.trust.judge(&view.signed)
    }
}

/// Pieces as what a thread reads. Their end is the end.
pub(super) struct Pieces {
    from: mpsc::Receiver<Piece>,
    now: Bytes,
}

impl Pieces {
    pub(super) fn new(from: mpsc::Receiver<Piece>) -> Self {
        Self { from, now: Bytes::new() }
    }
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.now.is_empty() {
            match self.from.blocking_recv() {
                Some(piece) => self.now = piece?,
                None => return Ok(0),
            }
        }
        let count = into.len().min(self.now.len());
        into[..count].copy_from_slice(&self.now.split_to(count));
        Ok(count)
    }
}

/// Pieces as what a thread writes to. What is small is put together; flush it at the end.
pub(super) struct PieceWriter {
    to: mpsc::Sender<Piece>,
    gathered: Vec<u8>,
}

impl PieceWriter {
    pub(super) fn new(to: mpsc::Sender<Piece>) -> Self {
        Self { to, gathered: Vec::with_capacity(PIECE_BYTES) }
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE_BYTES - self.gathered.len());
        self.gathered.extend_from_slice(&bytes[..count]);
        if self.gathered.len() == PIECE_BYTES {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        let full = std::mem::replace(&mut self.gathered, Vec::with_capacity(PIECE_BYTES));
        if full.is_empty() {
            return Ok(());
        }
        self.to.blocking_send(Ok(full.into())).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_what_was_written() {
        let (to, from) = mpsc::channel(PIECES_MAX);
        let written: Vec<u8> = (0..PIECE_BYTES * 9 / 2).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
        let expected = written.clone();
        let writer = std::thread::spawn(move || {
            let mut writer = PieceWriter::new(to);
            written.chunks(70_001).for_each(|part| writer.write_all(part).unwrap());
            writer.flush().unwrap();
        });
        let mut read = Vec::new();
        Pieces::new(from).read_to_end(&mut read).unwrap();
        writer.join().unwrap();
        assert!(read == expected);
    }

    #[test]
    fn nobody_to_take_them_and_a_break_are_errors() {
        let (to, from) = mpsc::channel(PIECES_MAX);
        drop(from);
        let mut writer = PieceWriter::new(to);
        assert!(writer.write_all(&[1; 10]).is_ok() && writer.flush().is_err());
        let (to, from) = mpsc::channel(PIECES_MAX);
        to.blocking_send(Ok(Bytes::from_static(b"some"))).unwrap();
        to.blocking_send(Err(io::ErrorKind::ConnectionReset.into())).unwrap();
        let mut read = Vec::new();
        let broken = Pieces::new(from).read_to_end(&mut read);
        assert_eq!((read.as_slice(), broken.unwrap_err().kind()), (&b"some"[..], io::ErrorKind::ConnectionReset));
    }
}
