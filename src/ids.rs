//! Names of things: one newtype per kind, so that a VM id is never passed where an operation id is meant.
//!
//! A random id is its kind's prefix and 80 random bits in lower-case base32 (RFC 4648 alphabet, 16 characters).
//! There is no time in it: the first characters tell ids apart, so any unique prefix serves as a short id.
//! Randomness is handed in: this floor does no I/O, and a simulation wants the same ids for the same seed.
//! A bundle's id is made of 128 bits of a digest in the same way: whoever has the bundle can compute it.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Random bytes in an id.
pub const ID_RANDOM_BYTES: usize = 10;

/// Bytes of a digest in an id: as many as make a collision hopeless to look for.
pub const ID_DIGEST_BYTES: usize = 16;

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// Why a text is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// It does not start with the kind's prefix.
    #[error("{text:?} does not start with {prefix:?}")]
    Prefix {
        /// What was given.
        text: String,
        /// What it has to start with.
        prefix: &'static str,
    },
    /// The part after the prefix is not base32, or not of the right length.
    #[error("{text:?} is not {prefix:?} and {chars} characters of a-z and 2-7")]
    Suffix {
        /// What was given.
        text: String,
        /// The kind's prefix.
        prefix: &'static str,
        /// Characters after the prefix.
        chars: usize,
    },
}

/// Five bits a character; the last character's missing bits are zero.
fn base32(bytes: &[u8]) -> String {
    let mut bits: u32 = 0;
    let mut held = 0;
    let mut text = String::with_capacity(suffix_chars(bytes.len()));
    for byte in bytes {
        bits = (bits << 8) | u32::from(*byte);
        held += 8;
        while held >= 5 {
            held -= 5;
            text.push(char::from(ALPHABET[((bits >> held) & 31) as usize]));
        }
    }
    if held > 0 {
        text.push(char::from(ALPHABET[((bits << (5 - held)) & 31) as usize]));
    }
    text
}

/// Characters that hold this many bytes.
const fn suffix_chars(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

fn check(text: &str, prefix: &'static str, bytes: usize) -> Result<(), ParseIdError> {
    let Some(suffix) = text.strip_prefix(prefix) else {
        return Err(ParseIdError::Prefix { text: text.to_owned(), prefix });
    };
    let chars = suffix_chars(bytes);
    // The bits beyond the last byte are zero, or one id would have several spellings.
    let spare_bits = chars * 5 - bytes * 8;
    let digit = |byte: u8| ALPHABET.iter().position(|known| *known == byte);
    let last = suffix.bytes().last().and_then(digit);
    let ends_right = last.is_some_and(|last| last & ((1 << spare_bits) - 1) == 0);
    if suffix.len() == chars && ends_right && suffix.bytes().all(|byte| ALPHABET.contains(&byte)) {
        Ok(())
    } else {
        Err(ParseIdError::Suffix { text: text.to_owned(), prefix, chars })
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $from:ident: $bytes:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// What every id of this kind starts with.
            pub const PREFIX: &'static str = $prefix;

            /// The id made of these bytes.
            pub fn $from(bytes: [u8; $bytes]) -> Self {
                Self(format!("{}{}", $prefix, base32(&bytes)))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                check(text, $prefix, $bytes)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(text: String) -> Result<Self, ParseIdError> {
                check(&text, $prefix, $bytes)?;
                Ok(Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }
    };
}

id!(
    /// A virtual machine.
    VmId, "vm-", from_random: ID_RANDOM_BYTES
);
id!(
    /// A long piece of work that can be asked about.
    OperationId, "op-", from_random: ID_RANDOM_BYTES
);
id!(
    /// A session: VMs that may talk to each other.
    SessionId, "s-", from_random: ID_RANDOM_BYTES
);
id!(
    /// A cluster: VMs that register under a name each, and are given calculations.
    ClusterId, "c-", from_random: ID_RANDOM_BYTES
);
id!(
    /// A calculation: a program that runs in some member of a cluster.
    CalculationId, "calc-", from_random: ID_RANDOM_BYTES
);
id!(
    /// A machine's way from one host to another; the same on both.
    MigrationId, "m-", from_random: ID_RANDOM_BYTES
);
id!(
    /// A bundle: a guest frozen once. The bytes are the first of its manifest's blake3 digest.
    BundleId, "b-", from_digest: ID_DIGEST_BYTES
);

/// 128 random bits that differ for every launch of a VM, printed as 32 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Generation(pub [u8; 16]);

impl fmt::Display for Generation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl FromStr for Generation {
    type Err = ParseGenerationError;
    fn from_str(text: &str) -> Result<Self, ParseGenerationError> {
        let digits = text.as_bytes();
        let mut bytes = [0; 16];
        if digits.len() != 32 {
            return Err(ParseGenerationError { text: text.to_owned() });
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |d: u8| char::from(d).to_digit(16);
            match (digit(pair[0]), digit(pair[1])) {
                (Some(high), Some(low)) => *byte = u8::try_from(high * 16 + low).unwrap_or(u8::MAX),
                (None, _) | (_, None) => return Err(ParseGenerationError { text: text.to_owned() }),
            }
        }
        Ok(Self(bytes))
    }
}

/// A text is not a generation id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not 32 hexadecimal digits")]
pub struct ParseGenerationError {
    /// What was given.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_id_of_known_bytes_is_known() {
        assert_eq!(VmId::from_random([0; 10]).as_str(), "vm-aaaaaaaaaaaaaaaa");
        assert_eq!(VmId::from_random([255; 10]).as_str(), "vm-7777777777777777");
        // RFC 4648 section 10: "fooba" is MZXW6YTB.
        assert_eq!(OperationId::from_random(*b"foobafooba").as_str(), "op-mzxw6ytbmzxw6ytb");
        assert_eq!(BundleId::from_digest([0xff; 16]).as_str(), "b-77777777777777777777777774");
    }

    proptest! {
        #[test]
        fn ids_parse_back(random: [u8; ID_RANDOM_BYTES]) {
            let id = VmId::from_random(random);
            prop_assert_eq!(id.as_str().parse::<VmId>(), Ok(id.clone()));
            prop_assert!(id.as_str().parse::<OperationId>().is_err());
        }

        #[test]
        fn a_digest_has_one_spelling(bytes: [u8; ID_DIGEST_BYTES]) {
            let id = BundleId::from_digest(bytes);
            prop_assert_eq!(id.as_str().parse::<BundleId>(), Ok(id.clone()));
            let (start, last) = id.as_str().split_at(id.as_str().len() - 1);
            for other in ALPHABET.iter().map(|byte| char::from(*byte)).filter(|other| !last.contains(*other)) {
                if let Ok(parsed) = format!("{start}{other}").parse::<BundleId>() {
                    prop_assert_eq!(ALPHABET.iter().position(|known| char::from(*known) == other).unwrap() % 4, 0);
                    prop_assert_ne!(parsed, id.clone());
                }
            }
        }

        #[test]
        fn generations_parse_back(bytes: [u8; 16]) {
            prop_assert_eq!(Generation(bytes).to_string().parse(), Ok(Generation(bytes)));
        }

        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,40}") {
            let _ = text.parse::<VmId>();
            let _ = text.parse::<Generation>();
        }
    }
}
id! {
    /// A volume: a block device that outlives guests.
    VolumeId, "vol-", from_random: ID_RANDOM_BYTES
}
id! {
    /// A volume's content at one moment.
    VolumeSnapshotId, "vs-", from_random: ID_RANDOM_BYTES
}
id! {
    /// The right to use a volume, of one holder.
    LeaseId, "l-", from_random: ID_RANDOM_BYTES
}
