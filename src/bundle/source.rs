//! Where a bundle that is here in part has its rest from: another agent, a directory, or an HTTP store. The words for it and
//! the layout of stores; who asks over a network is others' business.
//!
//! A store is trusted in nothing: what comes from it is compared with the bundle's id, whoever may have changed it on the
//! way.

use std::fmt;
use std::io::{self, Read};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::manifest::{MANIFEST_BYTES_MAX, STATE_BYTES_MAX, is_label};
use super::part::{BundlePart, PART_BYTES_MAX};
use super::places::{MANIFEST, MEMORY, SIGNATURES, STATE};
use super::signatures::FILE_BYTES_MAX as SIGNATURES_BYTES_MAX;
use crate::ids::BundleId;
use crate::report::Retry;
use crate::sys::file;

/// Longest path of a directory, or of a store below its host, in bytes.
const PATH_BYTES_MAX: usize = 1024;

/// Longest name of a host (RFC 1035 section 2.3.4, without the final dot).
const HOST_BYTES_MAX: usize = 253;

/// The other agent's scheme.
const PEER: &str = "peer:";

/// The scheme of stores.
const HTTP: &str = "http://";

/// Where a bundle comes from. As text: `peer:NAME`, an absolute path, or `http://HOST[:PORT][/PATH]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceSpec {
    /// Another agent of the fabric.
    Peer {
        /// Its name in `[[peers]]`.
        name: String,
    },
    /// A directory laid out as a store's root.
    Directory(PathBuf),
    /// The same, by HTTP.
    Http {
        /// Host, and port if there is one, as in a URL.
        authority: String,
        /// What comes before the store's paths: empty, or a path that begins with a slash and ends without one.
        path: String,
    },
}

/// Why a text is not a source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSourceError {
    /// Nothing that is known.
    #[error(
        "{text:?} is no source of bundles: peer:NAME, an absolute path, and http://HOST[:PORT][/PATH] are possible"
    )]
    Unknown {
        /// What was given.
        text: String,
    },
    /// Encrypted.
    #[error(
        "{text:?}: stores by https are not possible yet. What comes is verified by the bundle's id, whoever changes it on the \
         way, so http:// is safe to launch from; where nobody may see what is fetched, put a proxy on this host in front \
         (http://127.0.0.1:PORT/PATH) that speaks TLS to the store"
    )]
    Tls {
        /// What was given.
        text: String,
    },
    /// Not a name of a peer.
    #[error("{text:?} names no peer: 1 to 63 of a-z, 0-9 and - are possible after peer:, as in [[peers]]")]
    Peer {
        /// What was given.
        text: String,
    },
    /// Not a path.
    #[error(
        "{text:?} is no directory: an absolute path of up to {PATH_BYTES_MAX} bytes, without control characters, is possible"
    )]
    Path {
        /// What was given.
        text: String,
    },
    /// Not the address of a store.
    #[error("{text:?} is no address of a store: {reason}; http://HOST[:PORT][/PATH] is possible")]
    Address {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl ParseSourceError {
    /// Whether the same text may be one later.
    pub const fn retry(&self) -> Retry {
        Retry::WithChange
    }
}

/// The start of a text that may be anything, for an error.
fn shown(text: &str) -> String {
    text.chars().take(120).collect()
}

impl FromStr for SourceSpec {
    type Err = ParseSourceError;

    fn from_str(text: &str) -> Result<Self, ParseSourceError> {
        if let Some(name) = text.strip_prefix(PEER) {
            if is_label(name) {
                return Ok(Self::Peer { name: name.to_owned() });
            }
            return Err(ParseSourceError::Peer { text: shown(text) });
        }
        if text.starts_with('/') {
            return directory(text).ok_or_else(|| ParseSourceError::Path { text: shown(text) });
        }
        if let Some(rest) = text.strip_prefix(HTTP) {
            return http(rest).map_err(|reason| ParseSourceError::Address { text: shown(text), reason });
        }
        Err(if text.starts_with("https://") {
            ParseSourceError::Tls { text: shown(text) }
        } else {
            ParseSourceError::Unknown { text: shown(text) }
        })
    }
}

impl fmt::Display for SourceSpec {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer { name } => write!(out, "{PEER}{name}"),
            Self::Directory(path) => path.display().fmt(out),
            Self::Http { authority, path } => write!(out, "{HTTP}{authority}{path}"),
        }
    }
}

fn directory(text: &str) -> Option<SourceSpec> {
    if text.len() > PATH_BYTES_MAX || text.chars().any(char::is_control) {
        return None;
    }
    let trimmed = text.trim_end_matches('/');
    Some(SourceSpec::Directory(if trimmed.is_empty() { "/" } else { trimmed }.into()))
}

fn http(rest: &str) -> Result<SourceSpec, &'static str> {
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err("there is no user or password in it");
    }
    let (host, port) = split_port(authority)?;
    check_host(host)?;
    let digits = |port: &&str| (1..=5).contains(&port.len()) && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = match port {
        None => None,
        Some(port) => {
            let number = Some(port).filter(digits).and_then(|port| port.parse::<u16>().ok());
            Some(number.filter(|port| *port != 0).ok_or("its port is none of 1 to 65535")?)
        }
    };
    let host = host.to_ascii_lowercase();
    let authority = port.map_or_else(|| host.clone(), |port| format!("{host}:{port}"));
    let path = path.trim_end_matches('/');
    check_path(path)?;
    Ok(SourceSpec::Http { authority, path: path.to_owned() })
}

fn split_port(authority: &str) -> Result<(&str, Option<&str>), &'static str> {
    // An IPv6 address has colons of its own.
    let after_host = if authority.starts_with('[') {
        authority.find(']').map(|at| at + 1).ok_or("the bracket of its IPv6 address does not close")?
    } else {
        authority.find(':').unwrap_or(authority.len())
    };
    let (host, rest) = authority.split_at(after_host);
    match rest.strip_prefix(':') {
        Some(port) => Ok((host, Some(port))),
        None if rest.is_empty() => Ok((host, None)),
        None => Err("something follows its IPv6 address"),
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    if host.is_empty() {
        return Err("it has no host");
    }
    if let Some(address) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return address.parse::<Ipv6Addr>().map(drop).map_err(|_| "what is in brackets is no IPv6 address");
    }
    let is_dotted = host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if is_dotted {
        return host.parse::<Ipv4Addr>().map(drop).map_err(|_| "its host is no IPv4 address");
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if host.len() > HOST_BYTES_MAX || !host.split('.').all(label) {
        return Err("its host is no name: 1 to 63 of a-z, 0-9 and - between dots are possible, 253 in all");
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.len() > PATH_BYTES_MAX {
        return Err("its path is longer than 1024 bytes");
    }
    if path.contains(['?', '#']) {
        return Err("there is no query or fragment in it");
    }
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        // RFC 3986 section 3.3, without what is there for historical reasons.
        let is_plain = byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&byte);
        let is_escape = byte == b'%'
            && [rest.next(), rest.next()].iter().all(|next| next.is_some_and(|next| next.is_ascii_hexdigit()));
        if !is_plain && !is_escape {
            return Err("a character of its path has to be written as % and two hexadecimal digits");
        }
    }
    if path.split('/').skip(1).any(|segment| matches!(segment, "" | "." | "..")) {
        return Err("a part of its path is empty, . or ..");
    }
    Ok(())
}

/// Where a part of a bundle lies in a store, and which bytes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorePath {
    /// Below the store's root, without a leading slash.
    pub path: String,
    /// Its first byte, if it is a range.
    pub offset: Option<u64>,
    /// How many bytes it has: exactly, in a range; at most, else.
    pub bytes: u64,
}

/// Where a part of a bundle lies in a store.
pub fn part_path(bundle: &BundleId, part: BundlePart) -> StorePath {
    let whole = |path, bytes| StorePath { path, offset: None, bytes };
    match part {
        BundlePart::Manifest => whole(format!("{bundle}/{MANIFEST}"), MANIFEST_BYTES_MAX as u64),
        BundlePart::State => whole(format!("{bundle}/{STATE}"), STATE_BYTES_MAX),
        BundlePart::Signatures => whole(format!("{SIGNATURES}/{bundle}.json"), SIGNATURES_BYTES_MAX),
        BundlePart::Memory { offset, bytes } => {
            StorePath { path: format!("{bundle}/{MEMORY}"), offset: Some(offset), bytes }
        }
    }
}

/// Why a directory does not give a part of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum ReadDirectoryError {
    /// It is not there, or is something else than a file.
    #[error("there is no file {}", path.display())]
    NotThere {
        /// The file.
        path: PathBuf,
    },
    /// It ends before what was asked for.
    #[error("{} ends before byte {end}", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Where it has to go on to.
        end: u64,
    },
    /// It is longer than it may be, or more was asked for than is read at once.
    #[error("{} is longer than {most} bytes", path.display())]
    Long {
        /// The file.
        path: PathBuf,
        /// How long it may be.
        most: u64,
    },
    /// The disk did not answer.
    #[error("read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

impl ReadDirectoryError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            // Somebody may be copying it there, or mount it.
            Self::NotThere { .. } | Self::Short { .. } | Self::Io { .. } => Retry::Later,
            Self::Long { .. } => Retry::WithChange,
        }
    }
}

/// Reads a part of a bundle from a directory that is laid out as a store's root. Nothing of it is verified.
pub fn read_from_directory(
    directory: &Path,
    bundle: &BundleId,
    part: BundlePart,
) -> Result<Vec<u8>, ReadDirectoryError> {
    let StorePath { path, offset, bytes: most } = part_path(bundle, part);
    let path = directory.join(path);
    let file = match file::open_regular(&path) {
        Ok(Some(file)) => file,
        Ok(None) => return Err(ReadDirectoryError::NotThere { path }),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Err(ReadDirectoryError::NotThere { path });
        }
        Err(source) => return Err(ReadDirectoryError::Io { path, source }),
    };
    let Some(offset) = offset else {
        let mut content = Vec::new();
        return match file.take(most.saturating_add(1)).read_to_end(&mut content) {
            Ok(_) if content.len() as u64 > most => Err(ReadDirectoryError::Long { path, most }),
            Ok(_) => Ok(content),
            Err(source) => Err(ReadDirectoryError::Io { path, source }),
        };
    };
    if most > PART_BYTES_MAX {
        return Err(ReadDirectoryError::Long { path, most: PART_BYTES_MAX });
    }
    let mut content = vec![0; usize::try_from(most).unwrap_or(0)];
    match file.read_exact_at(&mut content, offset) {
        Ok(()) => Ok(content),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(ReadDirectoryError::Short { path, end: offset.saturating_add(most) })
        }
        Err(source) => Err(ReadDirectoryError::Io { path, source }),
    }
}

#[cfg(test)]
mod tests;
