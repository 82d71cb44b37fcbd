//! Frames between a VMM whose guest's memory is only partly on this host and its agent: which chunks of the memory image
//! are wanted, and which are in the file now. `PROTOCOL.md` has the rules.
//!
//! ```text
//! kind u32 | a u32 | b u32 | 0 u32        (little-endian; what a kind has no use for is 0)
//! ```
//! Chunk n is the image's bytes from n times the chunk's size on; the last one may be shorter.

/// Bytes of a frame, of either direction.
pub const FRAME_BYTES: usize = 16;

const WANTED: u32 = 1;
const MAPPED: u32 = 2;
const PRESENT: u32 = 3;

/// What the VMM says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToAgent {
    /// Somebody waits for this chunk. Said once for each chunk on a connection.
    Wanted {
        /// Which.
        chunk: u32,
    },
    /// How many chunks are mapped by now, in all: when a connection begins, and after chunks became present.
    Mapped {
        /// Their number.
        chunks: u32,
    },
}

/// What the agent says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToVmm {
    /// These chunks are in the file, whole and verified, or are holes that are to be; they stay as they are.
    Present {
        /// The first.
        first: u32,
        /// How many, from 1.
        count: u32,
    },
}

/// Why bytes are not a frame. The connection is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FillingError {
    /// No kind that this end takes.
    #[error("a frame of kind {found}")]
    Kind {
        /// The kind found.
        found: u32,
    },
    /// A word that its kind has no use for.
    #[error("a frame of kind {kind} with {found} where 0 belongs")]
    Unused {
        /// Its kind.
        kind: u32,
        /// What is there.
        found: u32,
    },
    /// No chunk at all.
    #[error("a run of no chunks, from {first} on")]
    Empty {
        /// The first.
        first: u32,
    },
}

impl ToAgent {
    /// The frame.
    pub fn to_bytes(self) -> [u8; FRAME_BYTES] {
        match self {
            Self::Wanted { chunk } => frame([WANTED, chunk, 0, 0]),
            Self::Mapped { chunks } => frame([MAPPED, chunks, 0, 0]),
        }
    }

    /// Reads a frame. Whether there is such a chunk is the reader's to know.
    pub fn from_bytes(bytes: [u8; FRAME_BYTES]) -> Result<Self, FillingError> {
        let [kind, a, b, last] = words(bytes);
        let this = match kind {
            WANTED => Self::Wanted { chunk: a },
            MAPPED => Self::Mapped { chunks: a },
            found => return Err(FillingError::Kind { found }),
        };
        unused(kind, [b, last]).map(|()| this)
    }
}

impl ToVmm {
    /// The frame.
    pub fn to_bytes(self) -> [u8; FRAME_BYTES] {
        let Self::Present { first, count } = self;
        frame([PRESENT, first, count, 0])
    }

    /// Reads a frame. Whether there are such chunks is the reader's to know.
    pub fn from_bytes(bytes: [u8; FRAME_BYTES]) -> Result<Self, FillingError> {
        match words(bytes) {
            [PRESENT, first, 0, _] => Err(FillingError::Empty { first }),
            [PRESENT, first, count, last] => unused(PRESENT, [last, 0]).map(|()| Self::Present { first, count }),
            [found, ..] => Err(FillingError::Kind { found }),
        }
    }
}

fn frame(words: [u32; 4]) -> [u8; FRAME_BYTES] {
    let mut bytes = [0; FRAME_BYTES];
    for (part, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *part = word.to_le_bytes();
    }
    bytes
}

fn words(bytes: [u8; FRAME_BYTES]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, part) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*part);
    }
    words
}

fn unused(kind: u32, words: [u32; 2]) -> Result<(), FillingError> {
    match words.into_iter().find(|word| *word != 0) {
        Some(found) => Err(FillingError::Unused { kind, found }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn frames_are_what_they_were() {
        let wanted = ToAgent::Wanted { chunk: 0x0102 }.to_bytes();
        assert_eq!(wanted, [1, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let mapped = ToAgent::Mapped { chunks: 7 }.to_bytes();
        assert_eq!(mapped, [2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let present = ToVmm::Present { first: 9, count: 0x0100_0000 }.to_bytes();
        assert_eq!(present, [3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn what_means_nothing_here_is_refused() {
        // A zeroed frame, the other end's, and one of a later version.
        for kind in [0, PRESENT, 4, u32::MAX] {
            assert_eq!(ToAgent::from_bytes(frame([kind, 1, 0, 0])), Err(FillingError::Kind { found: kind }));
        }
        for kind in [0, WANTED, MAPPED, 4, u32::MAX] {
            assert_eq!(ToVmm::from_bytes(frame([kind, 1, 1, 0])), Err(FillingError::Kind { found: kind }));
        }
        for (words, found) in [([WANTED, 1, 2, 0], 2), ([WANTED, 1, 0, 3], 3), ([MAPPED, 1, 4, 0], 4)] {
            assert_eq!(ToAgent::from_bytes(frame(words)), Err(FillingError::Unused { kind: words[0], found }));
        }
        let unused = ToVmm::from_bytes(frame([PRESENT, 1, 1, 5]));
        assert_eq!(unused, Err(FillingError::Unused { kind: PRESENT, found: 5 }));
        assert_eq!(ToVmm::from_bytes(frame([PRESENT, 8, 0, 0])), Err(FillingError::Empty { first: 8 }));
    }

    proptest! {
        #[test]
        fn a_frame_is_read_back(a: u32, count in 1_u32..) {
            for said in [ToAgent::Wanted { chunk: a }, ToAgent::Mapped { chunks: a }] {
                prop_assert_eq!(ToAgent::from_bytes(said.to_bytes()), Ok(said));
            }
            let present = ToVmm::Present { first: a, count };
            prop_assert_eq!(ToVmm::from_bytes(present.to_bytes()), Ok(present));
        }

        #[test]
        fn what_is_understood_says_the_same_again(kind in 0_u32..5, words: [u32; 3], few in 0_u32..2) {
            let bytes = frame([kind, words[0], words[1] * few, words[2] * few]);
            if let Ok(said) = ToAgent::from_bytes(bytes) {
                prop_assert_eq!(said.to_bytes(), bytes);
            }
            if let Ok(said) = ToVmm::from_bytes(bytes) {
                prop_assert_eq!(said.to_bytes(), bytes);
            }
        }
    }
}
