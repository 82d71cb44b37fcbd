//! How hosts of one fabric know each other: each request and each answer between agents carries a MAC made with the key
//! they share. Pure.
//!
//! A request's MAC covers method, path, body, who sends it to whom, when, and a nonce; an answer's covers status, body
//! and the request's nonce. A request is taken once: its nonce is remembered for as long as its time is taken. The
//! connections are encrypted as well (`proof`); who asks, and what, is known without relying on that.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Greatest difference between the clocks of two hosts, in milliseconds.
pub const CLOCK_DIFFERENCE_MS: u64 = 60_000;

/// Fewest bytes of a key file.
pub const KEY_BYTES_MIN: usize = 32;

/// Most bytes of a key file: a larger one is another file.
const KEY_BYTES_MAX: u64 = 4096;

/// Most nonces that are remembered: a thousand requests a second for as long as their times are taken.
const NONCES_MAX: usize = 65_536;

/// What sets this use of the key apart from any other.
const REQUESTS_CONTEXT: &str = "hearth 2026-11 requests and answers between agents";

/// The same for what proves whose a certificate is.
const CERTIFICATES_CONTEXT: &str = "hearth 2026-11 certificates of agents";

/// The key that the hosts of a fabric share, as what is made of it for each of its uses.
#[derive(Clone)]
pub struct PeerKey {
    requests: [u8; 32],
    certificates: [u8; 32],
}

impl fmt::Debug for PeerKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("PeerKey")
    }
}

/// Why a key file is not taken.
#[derive(Debug, thiserror::Error)]
pub enum PeerKeyError {
    /// It could not be read.
    #[error("read fabric.key_file {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is not a file.
    #[error("fabric.key_file {} is not a regular file", path.display())]
    NotAFile {
        /// Its path.
        path: PathBuf,
    },
    /// Everybody may read or write it.
    #[error("fabric.key_file {} is open to everybody (mode {mode:03o}): chmod 600 it, and make a new key", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Too short, or too long to be a key.
    #[error(
        "fabric.key_file {} has {found} bytes, {KEY_BYTES_MIN} to {KEY_BYTES_MAX} are possible: \
         head -c 32 /dev/urandom makes a key",
        path.display()
    )]
    Length {
        /// Its path.
        path: PathBuf,
        /// How many bytes it has.
        found: u64,
    },
}

impl PeerKey {
    /// The key that is made of these bytes.
    pub fn new(secret: &[u8]) -> Self {
        Self {
            requests: blake3::derive_key(REQUESTS_CONTEXT, secret),
            certificates: blake3::derive_key(CERTIFICATES_CONTEXT, secret),
        }
    }

    #[cfg(test)]
    pub(super) fn for_requests(&self) -> &[u8; 32] {
        &self.requests
    }

    pub(super) fn for_certificates(&self) -> &[u8; 32] {
        &self.certificates
    }

    /// Reads a key file. Each byte of it counts, a newline at its end as well.
    pub fn read(path: &Path) -> Result<Self, PeerKeyError> {
        let failed = |source| PeerKeyError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            return Err(PeerKeyError::NotAFile { path: path.to_owned() });
        }
        let mode = found.mode() & 0o777;
        if mode & 0o007 != 0 {
            return Err(PeerKeyError::Open { path: path.to_owned(), mode });
        }
        let mut secret = Vec::new();
        file.take(KEY_BYTES_MAX + 1).read_to_end(&mut secret).map_err(failed)?;
        if secret.len() < KEY_BYTES_MIN || secret.len() as u64 > KEY_BYTES_MAX {
            return Err(PeerKeyError::Length { path: path.to_owned(), found: found.len().max(secret.len() as u64) });
        }
        Ok(Self::new(&secret))
    }

    fn mac(&self, kind: &str, words: &[&str], body: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.requests);
        for word in [kind].iter().chain(words) {
            // Lengths first: no two lists of words make the same bytes.
            hasher.update(&(word.len() as u64).to_le_bytes());
            hasher.update(word.as_bytes());
        }
        hasher.update(blake3::hash(body).as_bytes());
        hasher.finalize()
    }

    fn request_mac(&self, head: &RequestHead, what: &Signed<'_>) -> blake3::Hash {
        let RequestHead { from, to, at_ms, nonce, .. } = head;
        let words = [what.method, what.path, &from.to_string(), &to.to_string(), &at_ms.to_string(), &hex(nonce)];
        self.mac("request", &words, what.body)
    }

    /// Signs a request from a host to another one.
    pub fn sign(&self, from: u16, to: u16, at_ms: u64, nonce: [u8; 16], what: &Signed<'_>) -> RequestHead {
        let unsigned = RequestHead { from, to, at_ms, nonce, mac: [0; 32] };
        let mac = *self.request_mac(&unsigned, what).as_bytes();
        RequestHead { mac, ..unsigned }
    }

    /// Whether a request was signed with this key.
    pub fn has_signed(&self, head: &RequestHead, what: &Signed<'_>) -> bool {
        // Hashes are compared in constant time.
        self.request_mac(head, what) == blake3::Hash::from_bytes(head.mac)
    }

    /// The MAC of an answer to the request with this nonce.
    pub fn seal(&self, nonce: [u8; 16], status: u16, body: &[u8]) -> String {
        self.mac("answer", &[&status.to_string(), &hex(&nonce)], body).to_hex().to_string()
    }

    /// Whether an answer was sealed with this key.
    pub fn has_sealed(&self, seal: &str, nonce: [u8; 16], status: u16, body: &[u8]) -> bool {
        let made = self.mac("answer", &[&status.to_string(), &hex(&nonce)], body);
        blake3::Hash::from_hex(seal).is_ok_and(|seal| seal == made)
    }
}

/// What of a request is signed beside its head.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// HTTP method.
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// Body.
    pub body: &'a [u8],
}

/// Who asks whom and when, with the MAC. As text: `1 FROM TO MILLISECONDS NONCE MAC`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHead {
    /// The sender's host number.
    pub from: u16,
    /// The host number the request is meant for.
    pub to: u16,
    /// When it was sent, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Differs for each request.
    pub nonce: [u8; 16],
    mac: [u8; 32],
}

impl fmt::Display for RequestHead {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, at_ms, nonce, mac } = self;
        write!(out, "1 {from} {to} {at_ms} {} {}", hex(nonce), hex(mac))
    }
}

/// A text is not a request's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the head of a request between agents")]
pub struct ParseHeadError;

impl FromStr for RequestHead {
    type Err = ParseHeadError;

    fn from_str(text: &str) -> Result<Self, ParseHeadError> {
        let words: Vec<&str> = text.splitn(7, ' ').collect();
        let &["1", from, to, at_ms, nonce, mac] = words.as_slice() else { return Err(ParseHeadError) };
        Ok(Self {
            from: from.parse().map_err(|_| ParseHeadError)?,
            to: to.parse().map_err(|_| ParseHeadError)?,
            at_ms: at_ms.parse().map_err(|_| ParseHeadError)?,
            nonce: unhex(nonce).ok_or(ParseHeadError)?,
            mac: unhex(mac).ok_or(ParseHeadError)?,
        })
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    if text.len() != N * 2 {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// Why a signed request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// Sent at another time than this host's.
    #[error(
        "it says it was sent at another time ({difference_ms} ms away); {CLOCK_DIFFERENCE_MS} ms are possible: set the \
         clocks of both hosts"
    )]
    Time {
        /// How far away.
        difference_ms: u64,
    },
    /// Taken before.
    #[error("it was taken before")]
    Again,
    /// More requests than can be told apart.
    #[error("too many requests at a time")]
    Busy,
}

/// The nonces of requests that were taken.
#[derive(Debug, Default)]
pub(super) struct Nonces {
    taken: BTreeSet<(u64, [u8; 16])>,
    /// Nonces from before may be forgotten: requests from before are not taken, even when the clock goes back. It follows
    /// what was taken, not the clock: one that was ahead for a while, and is right again, costs nothing.
    horizon_ms: u64,
}

impl Nonces {
    /// Takes a request that was signed, once, and only around its time.
    pub(super) fn take(&mut self, head: &RequestHead, now_ms: u64) -> Result<(), ReplayError> {
        let difference_ms = now_ms.abs_diff(head.at_ms);
        let oldest_ms = now_ms.saturating_sub(CLOCK_DIFFERENCE_MS);
        while let Some((at_ms, _)) = self.taken.first().copied().filter(|(at_ms, _)| *at_ms < oldest_ms) {
            self.taken.pop_first();
            self.horizon_ms = self.horizon_ms.max(at_ms.saturating_add(1));
        }
        if difference_ms > CLOCK_DIFFERENCE_MS || head.at_ms < self.horizon_ms {
            return Err(ReplayError::Time { difference_ms });
        }
        if self.taken.contains(&(head.at_ms, head.nonce)) {
            return Err(ReplayError::Again);
        }
        if self.taken.len() >= NONCES_MAX {
            return Err(ReplayError::Busy);
        }
        self.taken.insert((head.at_ms, head.nonce));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    const WHAT: Signed<'static> = Signed { method: "POST", path: "/peer/v1/vms", body: b"{}" };

    fn key() -> PeerKey {
        PeerKey::new(&[7; 32])
    }

    #[test]
    fn every_part_of_a_request_counts() {
        let head = key().sign(3, 5, 1_000, [1; 16], &WHAT);
        assert!(key().has_signed(&head, &WHAT));
        assert!(!PeerKey::new(&[8; 32]).has_signed(&head, &WHAT));
        for other in [
            Signed { method: "GET", ..WHAT },
            Signed { path: "/peer/v1/vmsx", ..WHAT },
            Signed { body: b"{ }", ..WHAT },
            // The same bytes, cut elsewhere.
            Signed { method: "POST/", path: "peer/v1/vms", ..WHAT },
        ] {
            assert!(!key().has_signed(&head, &other), "{other:?}");
        }
        for other in [
            RequestHead { from: 4, ..head },
            RequestHead { to: 6, ..head },
            RequestHead { at_ms: 1_001, ..head },
            RequestHead { nonce: [2; 16], ..head },
        ] {
            assert!(!key().has_signed(&other, &WHAT), "{other:?}");
        }
    }

    #[test]
    fn every_part_of_an_answer_counts() {
        let seal = key().seal([1; 16], 200, b"body");
        assert!(key().has_sealed(&seal, [1; 16], 200, b"body"));
        assert!(!key().has_sealed(&seal, [2; 16], 200, b"body"));
        assert!(!key().has_sealed(&seal, [1; 16], 201, b"body"));
        assert!(!key().has_sealed(&seal, [1; 16], 200, b"Body"));
        assert!(!key().has_sealed("", [1; 16], 200, b"body"));
        assert!(!PeerKey::new(&[8; 32]).has_sealed(&seal, [1; 16], 200, b"body"));
    }

    #[test]
    fn a_request_is_taken_once_and_around_its_time() {
        let mut nonces = Nonces::default();
        let head = |at_ms, nonce| key().sign(3, 5, at_ms, [nonce; 16], &WHAT);
        let now = 10_000_000;
        assert_eq!(nonces.take(&head(now, 1), now), Ok(()));
        assert_eq!(nonces.take(&head(now, 1), now), Err(ReplayError::Again));
        assert_eq!(nonces.take(&head(now, 1), now + CLOCK_DIFFERENCE_MS), Err(ReplayError::Again));
        assert!(matches!(nonces.take(&head(now, 1), now + CLOCK_DIFFERENCE_MS + 1), Err(ReplayError::Time { .. })));
        // Its nonce is forgotten now. The clock goes back: it is still not taken.
        assert!(nonces.taken.is_empty());
        assert!(matches!(nonces.take(&head(now, 1), now), Err(ReplayError::Time { .. })));
        let later = now + CLOCK_DIFFERENCE_MS + 1;
        assert_eq!(nonces.take(&head(later + CLOCK_DIFFERENCE_MS, 2), later), Ok(()));
        let far = ReplayError::Time { difference_ms: CLOCK_DIFFERENCE_MS + 1 };
        assert_eq!(nonces.take(&head(later + CLOCK_DIFFERENCE_MS + 1, 3), later), Err(far));
    }

    #[test]
    fn nonces_are_bounded() {
        let mut nonces = Nonces::default();
        let head = |nonce: usize| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&nonce.to_le_bytes());
            RequestHead { from: 1, to: 2, at_ms: 500, nonce: bytes, mac: [0; 32] }
        };
        for nonce in 0..NONCES_MAX {
            assert_eq!(nonces.take(&head(nonce), 500), Ok(()));
        }
        assert_eq!(nonces.take(&head(NONCES_MAX), 500), Err(ReplayError::Busy));
        let later = RequestHead { at_ms: 100_000, ..head(0) };
        assert_eq!(nonces.take(&later, 100_000), Ok(()));
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a file of a test, which need not survive anything")]
    fn a_key_file_is_long_enough_and_not_open_to_everybody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let read = |bytes: &[u8], mode| {
            let _ = std::fs::remove_file(&path);
            std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            PeerKey::read(&path)
        };
        assert!(read(&[1; 32], 0o600).is_ok());
        assert!(read(&[1; 4096], 0o640).is_ok());
        assert!(matches!(read(&[1; 31], 0o600), Err(PeerKeyError::Length { found: 31, .. })));
        assert!(matches!(read(&[1; 4097], 0o600), Err(PeerKeyError::Length { found: 4097, .. })));
        assert!(matches!(read(&[1; 32], 0o644), Err(PeerKeyError::Open { mode: 0o644, .. })));
        assert!(matches!(read(&[1; 32], 0o602), Err(PeerKeyError::Open { .. })));
        assert!(matches!(PeerKey::read(dir.path()), Err(PeerKeyError::NotAFile { .. })));
        assert!(matches!(PeerKey::read(&dir.path().join("absent")), Err(PeerKeyError::Read { .. })));
    }

    proptest! {
        #[test]
        fn heads_parse_back(from: u16, to: u16, at_ms: u64, nonce: [u8; 16]) {
            let head = key().sign(from, to, at_ms, nonce, &WHAT);
            prop_assert_eq!(head.to_string().parse(), Ok(head));
        }

        #[test]
        fn any_text_parses_or_is_refused(text in "(1 )?.{0,120}") {
            let _ = text.parse::<RequestHead>();
        }
    }
}
