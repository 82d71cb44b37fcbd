//! The console file: the last [`RING_BYTES`] bytes a guest wrote to its console. The agent makes the file, the VMM
//! keeps it current with plain writes, and whoever reads it later sees the last lines of a VM that was killed.
//!
//! ```text
//! magic "HRTHCON1" | written u64 little-endian | ring of 65,536 bytes: byte n of the console lies at n % 65,536
//! ```

/// First bytes of the file.
pub const MAGIC: [u8; 8] = *b"HRTHCON1";

/// Bytes before the ring.
pub const HEADER_BYTES: usize = 16;

/// Bytes of history: a boot with all kernel messages writes about 30 KiB.
pub const RING_BYTES: usize = 64 * 1024;

/// The header of a console that has been written this many bytes.
pub fn header(written: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..].copy_from_slice(&written.to_le_bytes());
    bytes
}

/// How many bytes a console has been written, by its header; `None` if it is not one. The bytes are untrusted.
pub fn written(header: &[u8; HEADER_BYTES]) -> Option<u64> {
    let (magic, written) = header.split_first_chunk::<8>()?;
    let written = written.first_chunk::<8>()?;
    (*magic == MAGIC).then(|| u64::from_le_bytes(*written))
}

/// Where in the ring byte number `position` of the console lies.
pub fn offset(position: u64) -> usize {
    // The remainder is below RING_BYTES, which fits.
    usize::try_from(position % RING_BYTES as u64).unwrap_or(0)
}

/// The history in a console file, oldest byte first; `None` if it is not one. The bytes are untrusted.
pub fn history(file: &[u8]) -> Option<Vec<u8>> {
    let (magic, rest) = file.split_first_chunk::<8>()?;
    let (written, ring) = rest.split_first_chunk::<8>()?;
    if *magic != MAGIC {
        return None;
    }
    let written = u64::from_le_bytes(*written);
    if written < RING_BYTES as u64 {
        return Some(ring.get(..offset(written)).unwrap_or(ring).to_vec());
    }
    let (newer, older) = ring.get(..RING_BYTES)?.split_at(offset(written));
    Some([older, newer].concat())
}

/// The last `count` lines of a history, lossily as text, without control characters that could act on a terminal.
pub fn last_lines(history: &[u8], count: usize) -> Vec<String> {
    let text = String::from_utf8_lossy(history);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let printable = |line: &&str| line.chars().filter(|c| !c.is_control() || *c == '\t').collect();
    lines[lines.len().saturating_sub(count)..].iter().map(printable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file_after(console: &[u8]) -> Vec<u8> {
        let mut file = header(console.len() as u64).to_vec();
        file.resize(HEADER_BYTES + RING_BYTES, 0);
        for (position, byte) in console.iter().enumerate() {
            file[HEADER_BYTES + offset(position as u64)] = *byte;
        }
        file
    }

    proptest! {
        #[test]
        fn the_newest_bytes_are_found(length in 0_usize..200_000) {
            let console: Vec<u8> = (0..=250_u8).cycle().take(length).collect();
            let newest = &console[console.len().saturating_sub(RING_BYTES)..];
            prop_assert_eq!(history(&file_after(&console)).unwrap(), newest);
        }

        #[test]
        fn garbage_never_panics(mut file in proptest::collection::vec(any::<u8>(), 0..100), magic: bool) {
            if magic && file.len() >= 8 {
                file[..8].copy_from_slice(&MAGIC);
            }
            if let Some(history) = history(&file) {
                last_lines(&history, 5);
            }
        }
    }

    #[test]
    fn last_lines_are_the_last_and_printable() {
        let lines = last_lines(b"one\r\n\x1b[31mtwo\n\nthree", 2);
        assert_eq!(lines, ["[31mtwo", "three"]);
    }
}
