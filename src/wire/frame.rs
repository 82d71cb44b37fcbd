//! Frames of the control socket: a fixed header that tells magic, version, kind and length before anything is
//! decoded; then postcard.
//!
//! ```text
//! magic u32 "HRTH" | version u16 | kind u16 | length u32 | length bytes of postcard        (little-endian)
//! ```
//! A zeroed header means nothing: magic, version, kind and length are all non-zero in a valid frame.

use serde::{Serialize, de::DeserializeOwned};

/// First bytes of every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"HRTH");

/// Version of the control protocol this build speaks. 2 has [`super::control::Request::Seal`], `Unseal` and `Balloon`, and
/// all of a machine's move from one VMM to another; 3 has `SendIn`; 4 has `CopyMemory`, `SaveRest` and `Prefault`; 5 has
/// `RestoreFilling`; 6 has volumes.
pub const VERSION: u16 = 6;

/// Oldest version this build still answers: a VMM outlives upgrades of the agent.
pub const VERSION_MIN: u16 = 2;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;

/// Longest body in bytes. The largest message is a launch with its command line (at most 2 KiB) and 19 devices.
pub const BODY_BYTES_MAX: u32 = 64 * 1024;

/// Which enum a frame's body holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// [`super::control::Request`], agent to VMM.
    Request = 1,
    /// [`super::control::Answer`], VMM to agent.
    Answer = 2,
}

/// A message that can be a frame.
pub trait Message: Serialize + DeserializeOwned {
    /// The kind its frames carry.
    const KIND: Kind;
}

/// Why bytes are not a frame of the wanted kind. The connection is of no further use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not this protocol.
    #[error("the first bytes are {found:#010x}, not this protocol's magic")]
    Magic {
        /// What was there.
        found: u32,
    },
    /// A version this build does not speak.
    #[error("protocol version {found}, this build speaks {VERSION_MIN} to {VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// A frame of another kind.
    #[error("frame kind {found}, expected {wanted:?}")]
    Kind {
        /// The kind found.
        found: u16,
        /// The kind that was expected here.
        wanted: Kind,
    },
    /// The length is zero or above the limit.
    #[error("frame of {found} bytes, 1 to {BODY_BYTES_MAX} are allowed")]
    Length {
        /// The length found.
        found: u64,
    },
    /// The body does not decode, or has bytes left over.
    #[error("frame body is not a message of this protocol")]
    Malformed,
}

/// The bytes of one frame, in this build's version.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, FrameError> {
    encode_in(VERSION, message)
}

/// The bytes of one frame in an earlier version. Whether the version has the message is the caller's to know.
pub fn encode_in<M: Message>(version: u16, message: &M) -> Result<Vec<u8>, FrameError> {
    if !(VERSION_MIN..=VERSION).contains(&version) {
        return Err(FrameError::Version { found: version });
    }
    let body = postcard::to_stdvec(message).map_err(|_| FrameError::Malformed)?;
    let length = match u32::try_from(body.len()) {
        Ok(length) if (1..=BODY_BYTES_MAX).contains(&length) => length,
        Ok(_) | Err(_) => return Err(FrameError::Length { found: body.len() as u64 }),
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend(version.to_le_bytes());
    bytes.extend((M::KIND as u16).to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(body);
    Ok(bytes)
}

/// The version a header names.
pub const fn version_of(header: [u8; HEADER_BYTES]) -> u16 {
    let [_, _, _, _, low, high, ..] = header;
    u16::from_le_bytes([low, high])
}

/// Checks a header; gives the body's length in bytes.
pub fn body_length<M: Message>(header: [u8; HEADER_BYTES]) -> Result<usize, FrameError> {
    let [m0, m1, m2, m3, _, _, k0, k1, l0, l1, l2, l3] = header;
    let magic = u32::from_le_bytes([m0, m1, m2, m3]);
    let version = version_of(header);
    let kind = u16::from_le_bytes([k0, k1]);
    let length = u32::from_le_bytes([l0, l1, l2, l3]);
    if magic != MAGIC {
        return Err(FrameError::Magic { found: magic });
    }
    if !(VERSION_MIN..=VERSION).contains(&version) {
        return Err(FrameError::Version { found: version });
    }
    if kind != M::KIND as u16 {
        return Err(FrameError::Kind { found: kind, wanted: M::KIND });
    }
    if !(1..=BODY_BYTES_MAX).contains(&length) {
        return Err(FrameError::Length { found: u64::from(length) });
    }
    Ok(length as usize)
}

/// Decodes a body that must hold exactly one message.
pub fn decode<M: Message>(body: &[u8]) -> Result<M, FrameError> {
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok(_) | Err(_) => Err(FrameError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::{Answer, Request};
    use proptest::prelude::*;

    fn split(bytes: &[u8]) -> ([u8; HEADER_BYTES], &[u8]) {
        let (header, body) = bytes.split_first_chunk().unwrap();
        (*header, body)
    }

    #[test]
    fn a_request_is_read_back() {
        let bytes = encode(&Request::Pause).unwrap();
        let (header, body) = split(&bytes);
        assert_eq!(body_length::<Request>(header), Ok(body.len()));
        assert_eq!(decode::<Request>(body), Ok(Request::Pause));
    }

    #[test]
    fn zeroes_other_kinds_and_bad_lengths_are_refused() {
        assert_eq!(body_length::<Request>([0; HEADER_BYTES]), Err(FrameError::Magic { found: 0 }));
        let (header, _) = split(&encode(&Request::Pause).unwrap());
        assert!(matches!(body_length::<Answer>(header), Err(FrameError::Kind { found: 1, .. })));
        for (length, fits) in [(0, false), (1, true), (BODY_BYTES_MAX, true), (BODY_BYTES_MAX + 1, false)] {
            let mut header = header;
            header[8..].copy_from_slice(&length.to_le_bytes());
            assert_eq!(body_length::<Request>(header).is_ok(), fits, "length {length}");
        }
        let mut newer = header;
        newer[4..6].copy_from_slice(&(VERSION + 1).to_le_bytes());
        assert_eq!(body_length::<Request>(newer), Err(FrameError::Version { found: VERSION + 1 }));
    }

    #[test]
    fn the_version_before_is_spoken_too() {
        for version in VERSION_MIN..=VERSION {
            let (header, body) = {
                let bytes = encode_in(version, &Request::Status).unwrap();
                let (header, body) = split(&bytes);
                (header, body.to_vec())
            };
            assert_eq!(version_of(header), version);
            assert_eq!(body_length::<Request>(header), Ok(body.len()));
        }
        for version in [VERSION_MIN - 1, VERSION + 1] {
            assert_eq!(encode_in(version, &Request::Status), Err(FrameError::Version { found: version }));
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(header: [u8; HEADER_BYTES], body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = body_length::<Request>(header);
            let _ = decode::<Request>(&body);
            let _ = decode::<Answer>(&body);
        }
    }
}
