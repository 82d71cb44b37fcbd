//! The other hosts of the fabric: telling each other who one is (hello), seeing what speaks against being of one
//! fabric, and asking each other for VMs and members of sessions.
//!
//! Neither HTTP nor TLS is known here: requests go out by a [`PeerLink`], and come in by [`PeerDoor`]; what a
//! certificate has to prove is in `proof`. Tasks: one per peer that says
//! hello, and one that lets faded conflicts go. What can go wrong: a peer does not answer (shown, nothing is refused),
//! it has another key (shown and counted), or the hosts contradict each other (both refuse new members of sessions).

mod ahead;
mod answers;
mod auth;
mod bodies;
mod book;
mod calls;
mod hello;
mod link;
mod members;
mod moving;
mod parts;
mod proof;
mod volumes;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::config::Peer;
use crate::clock::{Clock, Monotonic};

pub use answers::{PeerDoor, PeerRefusal, Unadmitted};
pub use auth::{CLOCK_DIFFERENCE_MS, KEY_BYTES_MIN, PeerKey, PeerKeyError, RequestHead, Signed};
pub use bodies::{Conflict, Hello, LaunchedBody, MemberBody, MemberOrder, MembersBody, PeerLaunch};
pub use book::PeerState;
pub use calls::PeerError;
pub use link::{Callee, Channel, LINE_LIFE, LinkError, PeerAnswer, PeerCall, PeerLine, PeerLink, TlsError};
pub use moving::{ArrivalOrder, ArrivalReady, ArrivalVerdict, ArrivingSession, DecisionBody, PresenceBody};
pub use parts::{PIECE_BYTES_MAX, PartBody, PartName, PartOrder, PieceError};
pub use proof::{CertificateError, HostCertificate, ProofError, ProvenHost};
pub use volumes::{VolumeBody, VolumeOrder};

pub(super) use ahead::{LineAhead, Place};
use auth::Nonces;
use book::Book;
use members::MembersCache;

/// The port of a peer whose address is given without one.
pub const PEER_PORT_DEFAULT: u16 = 7787;

/// The path of [`Hello`].
pub const HELLO_PATH: &str = "/peer/v1/hello";

/// The path of [`PeerLaunch`].
pub const LAUNCH_PATH: &str = "/peer/v1/vms";

/// The path of [`ArrivalOrder`], and what those of machines on their way start with.
pub const ARRIVALS_PATH: &str = "/peer/v1/arrivals";

/// The path of an [`ArrivalOrder`] that is only asked about.
pub const ARRIVAL_CHECK_PATH: &str = "/peer/v1/arrivals/check";

/// What the paths of migrations from a host start with.
pub const MIGRATIONS_PATH: &str = "/peer/v1/migrations/";

/// What the paths of sessions start with.
pub const SESSIONS_PATH: &str = "/peer/v1/sessions/";

/// The path of [`PartOrder`].
pub const BUNDLE_PART_PATH: &str = "/peer/v1/bundles/part";

/// The path of [`VolumeOrder`].
pub const VOLUMES_PATH: &str = "/peer/v1/volumes";

/// The header with a request's [`RequestHead`].
pub const HEAD_HEADER: &str = "hearth-peer";

/// The header with an answer's MAC.
pub const SEAL_HEADER: &str = "hearth-peer-seal";

/// Longest body of a request between agents: a launch with user data and egress rules.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// Longest body of an answer between agents: a piece of a bundle, or the members of a session.
pub const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// What [`PeerDoor::start_peers`] needs.
#[derive(Clone)]
pub struct PeerSetup {
    /// The fabric's key, if there is one.
    pub key: Option<PeerKey>,
    /// The way to other agents.
    pub link: Arc<dyn PeerLink>,
    /// This host's name.
    pub host: String,
}

impl std::fmt::Debug for PeerSetup {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("PeerSetup").field("key", &self.key).field("host", &self.host).finish_non_exhaustive()
    }
}

/// Which agent this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    /// Differs for every state directory.
    instance: u64,
    /// Differs for every start of an agent.
    life: u64,
}

/// A started agent's way to its peers.
struct Started {
    setup: PeerSetup,
    identity: Identity,
}

/// An agent's part in the fabric.
#[derive(Default)]
pub(super) struct Peers {
    started: OnceLock<Started>,
    book: Mutex<Book>,
    nonces: Mutex<Nonces>,
    members: MembersCache,
    /// An owner more for each line that is held ready.
    lines: Arc<()>,
}

/// What is known of a peer.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// What is configured.
    pub peer: Peer,
    /// How it is reached.
    pub state: PeerState,
    /// How long ago it last answered; `None`: it has not.
    pub heard_ago: Option<Duration>,
}

impl Peers {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nonces(&self) -> MutexGuard<'_, Nonces> {
        self.nonces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of peers, in the order they are configured.
    pub(super) fn views(&self, peers: &[Peer], now: Monotonic) -> Vec<PeerView> {
        let book = self.book();
        let view = |peer: &Peer| {
            let entry = book.peer(&peer.name);
            PeerView { peer: peer.clone(), state: entry.state, heard_ago: entry.heard_at.map(|at| now.since(at)) }
        };
        peers.iter().map(view).collect()
    }
}

/// Milliseconds since the Unix epoch.
fn now_ms(clock: &impl Clock) -> u64 {
    clock.wall().0 / 1_000_000
}
