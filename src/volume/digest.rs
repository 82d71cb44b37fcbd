//! The digest of all bytes of a volume. What is known to be zero is not read.

use std::ops::ControlFlow;

use super::error::VolumeError;
use super::view::StatusRun;

/// Bytes read at once, and between two reports.
const PIECE_BYTES: u64 = 1 << 20;

/// How far a long piece of work is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are done.
    pub done_bytes: u64,
    /// Bytes there are.
    pub total_bytes: u64,
}

/// Told now and then how far the work is; may end it.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

pub(super) fn digest(
    size_bytes: u64,
    status: impl Fn(u64, u64) -> Result<Vec<StatusRun>, VolumeError>,
    read: impl Fn(&mut [u8], u64) -> Result<(), VolumeError>,
    on_progress: OnProgress<'_>,
) -> Result<[u8; 32], VolumeError> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; usize::try_from(PIECE_BYTES.min(size_bytes)).unwrap_or(0)];
    let mut at = 0;
    while at < size_bytes {
        let piece = PIECE_BYTES.min(size_bytes - at);
        let first = status(at, piece)?.into_iter().next();
        let (length, is_data) = first.map_or((piece, true), |run| (run.length.min(piece), run.is_data));
        let bytes = usize::try_from(length).unwrap_or(0);
        if is_data {
            let buffer = &mut buffer[..bytes];
            read(buffer, at)?;
            hasher.update(buffer);
        } else {
            let mut rest = bytes;
            while rest > 0 {
                let now = rest.min(ZEROS.len());
                hasher.update(&ZEROS[..now]);
                rest -= now;
            }
        }
        at += length;
        if on_progress(Progress { done_bytes: at, total_bytes: size_bytes }).is_break() {
            return Err(VolumeError::Cancelled);
        }
    }
    Ok(*hasher.finalize().as_bytes())
}
