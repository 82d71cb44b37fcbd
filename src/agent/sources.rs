//! Where the rest of a bundle comes from that is here in part: another agent, a directory, or an HTTP store. Nothing of what
//! comes is believed: whoever asks compares it with the bundle's id.
//!
//! HTTP is not known here: stores are reached by a [`StoreLink`] that is handed over at the start.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::Agent;
use super::peers::{PIECE_BYTES_MAX, PartBody, PartName, PartOrder, PeerError};
use super::shared::Shared;
use super::world::{VmBundles, World};
use crate::bundle::{BundlePart, PART_BYTES_MAX, ReadDirectoryError, SourceSpec, StorePath, part_path};
use crate::ids::BundleId;
use crate::report::Retry;

/// The way to HTTP stores.
pub trait StoreLink: Send + Sync + 'static {
    /// The bytes that lie at a path of a store: exactly those of `range`, or all, of which there are `bytes_max` at most.
    /// Bounded in time. May be dropped at any time.
    fn get<'a>(
        &'a self,
        authority: &'a str,
        path: &'a str,
        range: Option<Range<u64>>,
        bytes_max: u64,
    ) -> BoxFuture<'a, Result<Bytes, StoreLinkError>>;
}

/// Why a store does not give what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum StoreLinkError {
    /// The way to it failed.
    #[error(transparent)]
    Way(#[from] io::Error),
    /// It took too long.
    #[error("it did nothing for {} s", limit.as_secs())]
    Stalled {
        /// How long was waited.
        limit: Duration,
    },
    /// All of it took too long.
    #[error("it was not done within {} s", limit.as_secs())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
    },
    /// There is nothing.
    #[error("there is nothing at {path:?} (status {status})")]
    NotThere {
        /// Where.
        path: String,
        /// HTTP status.
        status: u16,
    },
    /// It is somewhere else.
    #[error(
        "it says that {path:?} is at {to:?} (status {status}), and redirects are not followed: name that store instead"
    )]
    Redirected {
        /// Where it was looked for.
        path: String,
        /// Where it is, as the store says.
        to: String,
        /// HTTP status.
        status: u16,
    },
    /// It answers with something else.
    #[error("it answers status {status} for {path:?}")]
    Status {
        /// For what.
        path: String,
        /// HTTP status.
        status: u16,
    },
    /// It gives files only whole.
    #[error(
        "it does not do ranges (status {status} to a request for one): use a server that does, as most do for plain files"
    )]
    NoRanges {
        /// HTTP status.
        status: u16,
    },
    /// It answered with another range.
    #[error("it was asked for bytes {first} to {last} and answered with {found:?}")]
    OtherRange {
        /// The first byte that was asked for.
        first: u64,
        /// The last one.
        last: u64,
        /// What it says that it gives.
        found: String,
    },
    /// It packs what it sends.
    #[error("it sends {encoding:?} although it was asked for the bytes as they are")]
    Encoded {
        /// How they are packed.
        encoding: String,
    },
    /// More came than there may be.
    #[error("{path:?} is longer than {most} bytes")]
    Long {
        /// What.
        path: String,
        /// How many there may be.
        most: u64,
    },
    /// Less came.
    #[error("{path:?} ends after {found} of {wanted} bytes")]
    Short {
        /// What.
        path: String,
        /// Bytes that came.
        found: u64,
        /// Bytes there have to be.
        wanted: u64,
    },
}

impl StoreLinkError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Way(_) | Self::Stalled { .. } | Self::TimedOut { .. } | Self::Short { .. } => Retry::Later,
            Self::Status { status, .. } if *status >= 500 || *status == 429 => Retry::Later,
            Self::Status { .. }
            | Self::NotThere { .. }
            | Self::Redirected { .. }
            | Self::NoRanges { .. }
            | Self::OtherRange { .. }
            | Self::Encoded { .. }
            | Self::Long { .. } => Retry::WithChange,
        }
    }
}

/// Why a part of a bundle did not come.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The source does not have it.
    #[error("{from} does not have {part} of bundle {bundle}: copy the bundle there, or name a source that has it")]
    NotThere {
        /// The source.
        from: String,
        /// The bundle.
        bundle: BundleId,
        /// What of it.
        part: &'static str,
    },
    /// The peer is not one.
    #[error(
        "bundle {bundle} comes from {from}, and no peer of this host has that name: add it to [[peers]], or name another source"
    )]
    UnknownPeer {
        /// The source.
        from: String,
        /// The bundle.
        bundle: BundleId,
    },
    /// The peer did not give it.
    #[error("have {part} of bundle {bundle} from {from}")]
    Peer {
        /// The source.
        from: String,
        /// The bundle.
        bundle: BundleId,
        /// What of it.
        part: &'static str,
        /// Why not.
        #[source]
        source: PeerError,
    },
    /// The peer gave something that cannot be it.
    #[error("{from} does not give {part} of bundle {bundle} as it was asked to: its agent may be of another version")]
    OtherPiece {
        /// The source.
        from: String,
        /// The bundle.
        bundle: BundleId,
        /// What of it.
        part: &'static str,
    },
    /// The directory did not give it.
    #[error("have {part} of bundle {bundle} from {from}")]
    Directory {
        /// The source.
        from: String,
        /// The bundle.
        bundle: BundleId,
        /// What of it.
        part: &'static str,
        /// Why not.
        #[source]
        source: ReadDirectoryError,
    },
    /// The store did not give it.
    #[error("have {part} of bundle {bundle} from {from}")]
    Store {
        /// The source.
        from: String,
        /// The bundle.
        bundle: BundleId,
        /// What of it.
        part: &'static str,
        /// Why not.
        #[source]
        source: StoreLinkError,
    },
    /// More memory was asked for than is had at once.
    #[error("{bytes} bytes of memory of bundle {bundle} were asked for: {PART_BYTES_MAX} are possible at once")]
    TooMany {
        /// The bundle.
        bundle: BundleId,
        /// How many.
        bytes: u64,
    },
    /// This agent does not speak to stores.
    #[error("have bundle {bundle} from {from}: this agent does not speak to stores (yet)")]
    NotStarted {
        /// The source.
        from: String,
        /// The bundle.
        bundle: BundleId,
    },
}

impl SourceError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NotThere { .. } | Self::UnknownPeer { .. } | Self::OtherPiece { .. } => Retry::WithChange,
            Self::Peer { source, .. } => source.retry(),
            Self::Directory { source, .. } => source.retry(),
            Self::Store { source, .. } => source.retry(),
            Self::TooMany { .. } => Retry::Never,
            Self::NotStarted { .. } => Retry::Later,
        }
    }
}

/// An agent's way to stores.
#[derive(Default)]
pub(super) struct Sources {
    link: OnceLock<Arc<dyn StoreLink>>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Sources").field("started", &self.link.get().is_some()).finish()
    }
}

/// Stores, as seen from above.
pub trait SourceDoor: Send + Sync + 'static {
    /// Hands over the way to HTTP stores. The second time it does nothing.
    fn start_sources(&self, link: Arc<dyn StoreLink>);
}

impl<W: World> SourceDoor for Agent<W> {
    fn start_sources(&self, link: Arc<dyn StoreLink>) {
        // The first one stays.
        let _ = self.shared.sources.link.set(link);
    }
}

impl<W: World> Agent<W> {
    /// Has a part of a bundle from a source, unverified. No signatures are no bytes.
    pub async fn read_source(
        &self,
        source: &SourceSpec,
        bundle: &BundleId,
        part: BundlePart,
    ) -> Result<Bytes, SourceError> {
        read_part(&self.shared, source, bundle, part).await
    }
}

/// Has a part of a bundle from a source, unverified. No signatures are no bytes; of memory it is exactly what was asked for.
pub(super) async fn read_part<W: World>(
    shared: &Shared<W>,
    source: &SourceSpec,
    bundle: &BundleId,
    part: BundlePart,
) -> Result<Bytes, SourceError> {
    if let BundlePart::Memory { bytes, .. } = part
        && bytes > PART_BYTES_MAX
    {
        return Err(SourceError::TooMany { bundle: bundle.clone(), bytes });
    }
    let wanted = Wanted { source, bundle, part };
    let read = match source {
        SourceSpec::Peer { name } => wanted.ask_peer(shared, name).await,
        SourceSpec::Directory(directory) => {
            let read = shared.world.bundles().read_directory(directory, bundle, part).await;
            read.map(Bytes::from).map_err(|source| wanted.not_from_directory(source))
        }
        SourceSpec::Http { authority, path } => wanted.ask_store(shared, authority, path).await,
    };
    match read {
        // Most bundles have none, and a store need not have the directory.
        Err(SourceError::NotThere { .. }) if part == BundlePart::Signatures => Ok(Bytes::new()),
        read => read,
    }
}

/// A part of a bundle that is to come from somewhere.
struct Wanted<'a> {
    source: &'a SourceSpec,
    bundle: &'a BundleId,
    part: BundlePart,
}

impl Wanted<'_> {
    /// The part in words.
    const fn what(&self) -> &'static str {
        match self.part {
            BundlePart::Manifest => "the manifest",
            BundlePart::State => "the saved state",
            BundlePart::Signatures => "the signatures",
            BundlePart::Memory { .. } => "memory",
        }
    }

    /// The source in words.
    fn from(&self) -> String {
        match self.source {
            SourceSpec::Peer { name } => format!("host {name}"),
            SourceSpec::Directory(path) => format!("directory {}", path.display()),
            SourceSpec::Http { .. } => format!("store {}", self.source),
        }
    }

    fn not_there(&self) -> SourceError {
        SourceError::NotThere { from: self.from(), bundle: self.bundle.clone(), part: self.what() }
    }

    fn not_from_directory(&self, source: ReadDirectoryError) -> SourceError {
        if matches!(source, ReadDirectoryError::NotThere { .. }) {
            return self.not_there();
        }
        SourceError::Directory { from: self.from(), bundle: self.bundle.clone(), part: self.what(), source }
    }

    fn not_from_store(&self, source: StoreLinkError) -> SourceError {
        if matches!(source, StoreLinkError::NotThere { .. }) {
            return self.not_there();
        }
        SourceError::Store { from: self.from(), bundle: self.bundle.clone(), part: self.what(), source }
    }

    fn not_from_peer(&self, source: PeerError) -> SourceError {
        if matches!(&source, PeerError::Refused { code, .. } if code == UNKNOWN_BUNDLE) {
            return self.not_there();
        }
        SourceError::Peer { from: self.from(), bundle: self.bundle.clone(), part: self.what(), source }
    }

    async fn ask_store<W: World>(&self, shared: &Shared<W>, authority: &str, base: &str) -> Result<Bytes, SourceError> {
        let Some(link) = shared.sources.link.get() else {
            return Err(SourceError::NotStarted { from: self.from(), bundle: self.bundle.clone() });
        };
        let StorePath { path, offset, bytes } = part_path(self.bundle, self.part);
        if offset.is_some() && bytes == 0 {
            // There is no such range in HTTP.
            return Ok(Bytes::new());
        }
        let range = offset.map(|offset| offset..offset.saturating_add(bytes));
        let got = link.get(authority, &format!("{base}/{path}"), range, bytes).await;
        got.map_err(|source| self.not_from_store(source))
    }

    async fn ask_peer<W: World>(&self, shared: &Shared<W>, name: &str) -> Result<Bytes, SourceError> {
        let found = shared.config.fabric.as_ref().and_then(|fabric| {
            let peer = fabric.peers.iter().find(|peer| peer.name == name)?;
            Some((fabric, peer))
        });
        let Some((fabric, peer)) = found else {
            return Err(SourceError::UnknownPeer { from: self.source.to_string(), bundle: self.bundle.clone() });
        };
        let StorePath { offset, bytes: most, .. } = part_path(self.bundle, self.part);
        let name = match self.part {
            BundlePart::Manifest => PartName::Manifest,
            BundlePart::State => PartName::State,
            BundlePart::Signatures => PartName::Signatures,
            BundlePart::Memory { .. } => PartName::Memory,
        };
        let mut content = Vec::new();
        // Of memory it is known how much there is; of the others each answer tells.
        let mut wanted = offset.map(|_| most);
        while wanted.is_none_or(|wanted| (content.len() as u64) < wanted) {
            let so_far = content.len() as u64;
            let left =
                wanted.map_or(PIECE_BYTES_MAX, |wanted| u32::try_from(wanted - so_far).unwrap_or(PIECE_BYTES_MAX));
            let order = PartOrder {
                bundle_id: self.bundle.clone(),
                part: name,
                offset: offset.unwrap_or(0).saturating_add(so_far),
                bytes: left.min(PIECE_BYTES_MAX),
            };
            let body =
                shared.piece_from_peer(fabric, peer, &order).await.map_err(|source| self.not_from_peer(source))?;
            let PartBody { bytes, total_bytes } = body;
            let other =
                || SourceError::OtherPiece { from: self.from(), bundle: self.bundle.clone(), part: self.what() };
            if offset.is_none() {
                wanted = Some(total_bytes.filter(|total| *total <= most).ok_or_else(other)?);
            }
            content.extend_from_slice(&bytes);
            // Each answer gives something, and none too much: so this ends.
            let is_over = wanted.is_some_and(|wanted| content.len() as u64 == wanted);
            if bytes.len() as u64 > u64::from(order.bytes)
                || wanted.is_some_and(|wanted| content.len() as u64 > wanted)
                || bytes.is_empty() && !is_over
            {
                return Err(other());
            }
        }
        Ok(content.into())
    }
}

/// What a peer says that does not have a bundle.
pub const UNKNOWN_BUNDLE: &str = "unknown_bundle";
