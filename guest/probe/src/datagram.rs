//! Numbered datagrams: a head, and a filling that follows from it, so that whoever receives one can tell that every byte
//! of it is as it was sent. Pure.
//!
//! ```text
//! 0        8         16        24        32           40
//! "hearth#1" stream    number    total     checksum     filling ...      all little-endian
//! ```

/// What every one begins with.
pub const MAGIC: [u8; 8] = *b"hearth#1";

/// Length of the head, and so of the shortest.
pub const HEAD_BYTES: usize = 40;

/// Longest: what an Ethernet frame carries of UDP over IPv6.
pub const BYTES_MAX: usize = 1452;

/// A numbered datagram's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram {
    /// Which sender's: one that begins anew takes another.
    pub stream: u64,
    /// Its number, from 0. `u64::MAX` is none.
    pub number: u64,
    /// How many there are, when the sender knows: in the last ones.
    pub total: Option<u64>,
}

/// Why bytes are no numbered datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// They are something else.
    Foreign,
    /// They were one.
    Corrupt,
}

impl Datagram {
    /// As it is sent, `bytes` long, within the bounds there are.
    pub fn to_bytes(self, bytes: usize) -> Vec<u8> {
        let bytes = bytes.clamp(HEAD_BYTES, BYTES_MAX);
        let mut content = Vec::with_capacity(bytes + 8);
        content.extend(MAGIC);
        for field in [self.stream, self.number, self.total.unwrap_or(0), 0] {
            content.extend(field.to_le_bytes());
        }
        let mut state = self.stream ^ self.number.rotate_left(32);
        while content.len() < bytes {
            state = mixed(state);
            content.extend(state.to_le_bytes());
        }
        content.truncate(bytes);
        let checksum = checksum(&content);
        content[32..HEAD_BYTES].copy_from_slice(&checksum.to_le_bytes());
        content
    }

    /// What these bytes are, if every one of them is as it was sent.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Unreadable> {
        if bytes.get(..8) != Some(&MAGIC) {
            return Err(Unreadable::Foreign);
        }
        let field = |at: usize| {
            let field = bytes.get(at..at + 8).and_then(|field| field.try_into().ok());
            field.map(u64::from_le_bytes).ok_or(Unreadable::Corrupt)
        };
        let (stream, number, total, sum) = (field(8)?, field(16)?, field(24)?, field(32)?);
        if sum != checksum(bytes) || number == u64::MAX {
            return Err(Unreadable::Corrupt);
        }
        Ok(Self { stream, number, total: Some(total).filter(|total| *total > 0) })
    }
}

/// Of everything but its own place, by eight bytes at once: what runs in a guest has to be quick.
fn checksum(bytes: &[u8]) -> u64 {
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let (before, after) = (bytes.get(..32).unwrap_or(bytes), bytes.get(HEAD_BYTES..).unwrap_or_default());
    let words = before.chunks(8).chain(after.chunks(8)).map(word);
    words.fold(bytes.len() as u64, |sum, word| mixed(sum ^ word))
}

/// A number that differs in about every second bit when one bit of the other does (splitmix64's step).
pub const fn mixed(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_sent_is_read_and_any_change_is_seen(
            stream in any::<u64>(),
            number in 0..u64::MAX,
            total in prop::option::of(1_u64..),
            bytes in 0_usize..1600,
            at in any::<prop::sample::Index>(),
            flip in 1_u8..,
        ) {
            let datagram = Datagram { stream, number, total };
            let mut content = datagram.to_bytes(bytes);
            prop_assert_eq!(content.len(), bytes.clamp(HEAD_BYTES, BYTES_MAX));
            prop_assert_eq!(Datagram::from_bytes(&content), Ok(datagram));
            let at = at.index(content.len());
            content[at] ^= flip;
            let wanted = if at < 8 { Unreadable::Foreign } else { Unreadable::Corrupt };
            prop_assert_eq!(Datagram::from_bytes(&content), Err(wanted));
            content[at] ^= flip;
            content.pop();
            prop_assert!(Datagram::from_bytes(&content).is_err(), "one that is cut");
        }
    }

    #[test]
    fn what_is_none_is_foreign() {
        assert_eq!(Datagram::from_bytes(b""), Err(Unreadable::Foreign));
        assert_eq!(Datagram::from_bytes(b"hearth#1"), Err(Unreadable::Corrupt));
    }
}
