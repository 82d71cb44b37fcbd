//! Asking peers. Every question has a bound in time; none is asked twice by itself.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::ahead::LineAhead;
use super::auth::Signed;
use super::bodies::{LaunchedBody, MemberBody, MembersBody, PeerLaunch};
use super::book::PeerState;
use super::link::{Callee, LinkError, PeerAnswer, PeerCall, PeerLine, TlsError};
use super::{HELLO_PATH, LAUNCH_PATH, PEER_PORT_DEFAULT, SESSIONS_PATH, now_ms};
use crate::agent::config::{FabricConfig, Peer};
use crate::agent::shared::Shared;
use crate::agent::world::{World, random_array};
use crate::clock::Clock;
use crate::net::address::SessionNetworkId;
use crate::report::Retry;

/// Longest wait for a peer to record VMs: admission reads its host and its ledger.
const LAUNCH_LIMIT: Duration = Duration::from_secs(15);

/// Longest wait for a peer's members of a session.
pub(super) const MEMBERS_LIMIT: Duration = Duration::from_secs(2);

/// Why a peer did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The agent does not speak to peers.
    #[error("this agent does not speak to other hosts (yet)")]
    NotStarted,
    /// Hosts without a key only say hello.
    #[error("this host has no fabric.key_file, without which hosts do nothing for each other")]
    NoKey,
    /// The way to it failed.
    #[error("reach host {peer}")]
    Unreachable {
        /// Its name.
        peer: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The connection to it is not one to say anything on.
    #[error("speak with host {peer}")]
    Tls {
        /// Its name.
        peer: String,
        /// What is wrong with it.
        #[source]
        source: TlsError,
    },
    /// It did not answer in time.
    #[error("host {peer} did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// Its name.
        peer: String,
        /// How long was waited.
        limit: Duration,
    },
    /// Its answer has no MAC of the fabric's key.
    #[error("host {peer} answered without the fabric's key")]
    Unsealed {
        /// Its name.
        peer: String,
    },
    /// It does not know this host's key.
    #[error("host {peer} does not take this host's key: fabric.key_file has to be the same on both")]
    KeyRefused {
        /// Its name.
        peer: String,
    },
    /// It said no.
    #[error("host {peer}: {message}")]
    Refused {
        /// Its name.
        peer: String,
        /// HTTP status.
        status: u16,
        /// Its word for it.
        code: String,
        /// What it says.
        message: String,
        /// Whether the same request may succeed later.
        retry: Retry,
    },
    /// Its answer cannot be understood.
    #[error("understand the answer of host {peer}")]
    Malformed {
        /// Its name.
        peer: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// A request could not be made.
    #[error("make a request to host {peer}")]
    Request {
        /// Its name.
        peer: String,
        /// What is wrong.
        #[source]
        source: std::io::Error,
    },
}

impl PeerError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoKey | Self::KeyRefused { .. } | Self::Unsealed { .. } => Retry::WithChange,
            Self::Refused { retry, .. } => *retry,
            Self::NotStarted | Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Request { .. } => Retry::Later,
            Self::Tls { source, .. } => {
                if source.is_passing() {
                    Retry::Later
                } else {
                    Retry::WithChange
                }
            }
            Self::Malformed { .. } => Retry::Never,
        }
    }

    /// How a peer that failed like this is reached.
    pub(super) fn state(&self) -> PeerState {
        let why = crate::report::chain(self);
        match self {
            Self::Tls { source, .. } if !source.is_passing() => PeerState::Refused { why },
            Self::Unsealed { .. } | Self::KeyRefused { .. } | Self::Refused { .. } | Self::Malformed { .. } => {
                PeerState::Refused { why }
            }
            Self::NotStarted
            | Self::NoKey
            | Self::Unreachable { .. }
            | Self::Tls { .. }
            | Self::TimedOut { .. }
            | Self::Request { .. } => PeerState::Unreachable { why },
        }
    }
}

/// An answer that says no, as far as it is understood.
#[derive(serde::Deserialize)]
struct ErrorEnvelope {
    error: ErrorWords,
}

#[derive(serde::Deserialize)]
struct ErrorWords {
    code: String,
    message: String,
    #[serde(default)]
    retry: Option<Retry>,
}

/// Bytes of another host's words that are repeated.
const WORDS_BYTES_MAX: usize = 512;

fn cut(text: String) -> String {
    text.chars().filter(|character| !character.is_control()).take(WORDS_BYTES_MAX).collect()
}

fn refused(peer: String, status: u16, body: &[u8]) -> PeerError {
    let said = serde_json::from_slice::<ErrorEnvelope>(body).ok();
    let (code, message, retry) = match said {
        Some(ErrorEnvelope { error }) => (cut(error.code), cut(error.message), error.retry),
        None => ("peer_refused".to_owned(), format!("status {status}"), None),
    };
    let retry = retry.unwrap_or(if status >= 500 { Retry::Later } else { Retry::WithChange });
    PeerError::Refused { peer, status, code, message, retry }
}

impl Peer {
    /// Where its agent listens.
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port.unwrap_or(PEER_PORT_DEFAULT))
    }
}

impl<W: World> Shared<W> {
    /// Asks a peer; what it answers is sealed with the key, if there is one, and a success.
    pub(super) async fn ask_peer<T: DeserializeOwned>(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        call: PeerCall,
        limit: Duration,
    ) -> Result<T, PeerError> {
        self.ask_peer_on(None, fabric, peer, call, limit).await
    }

    /// The same on a line that is open already, if there is one.
    async fn ask_peer_on<T: DeserializeOwned>(
        &self,
        line: Option<Box<dyn PeerLine>>,
        fabric: &FabricConfig,
        peer: &Peer,
        call: PeerCall,
        limit: Duration,
    ) -> Result<T, PeerError> {
        let name = || peer.name.clone();
        let started = self.peers.started.get().ok_or(PeerError::NotStarted)?;
        let mut call = call;
        let nonce: [u8; 16] =
            random_array(&self.world).map_err(|source| PeerError::Request { peer: name(), source })?;
        if let Some(key) = &started.setup.key {
            let what = Signed { method: call.method, path: &call.path, body: &call.body };
            let (from, to) = (fabric.host.into(), peer.host.into());
            call.head = Some(key.sign(from, to, now_ms(self.world.clock()), nonce, &what).to_string());
        }
        let link = Arc::clone(&started.setup.link);
        // A hello is for whoever is there: it is how two find out that they disagree on a number.
        let number = (call.path != HELLO_PATH).then(|| peer.host.into());
        let callee = Callee { name: name(), at: peer.socket(), number, limit };
        let asking = match line {
            Some(line) => line.call(call),
            None => link.call(callee, call),
        };
        let answer = match timeout(limit, asking).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(LinkError::Way(source))) => return Err(PeerError::Unreachable { peer: name(), source }),
            Ok(Err(LinkError::Tls(source))) => return Err(PeerError::Tls { peer: name(), source }),
            Err(_) => return Err(PeerError::TimedOut { peer: name(), limit }),
        };
        let PeerAnswer { status, body, seal } = answer;
        if let Some(key) = &started.setup.key {
            let sealed = seal.as_deref().is_some_and(|seal| key.has_sealed(seal, nonce, status, &body));
            if !sealed {
                // Who does not know the key cannot seal that it does not.
                let refused = status == 401;
                return Err(if refused {
                    PeerError::KeyRefused { peer: name() }
                } else {
                    PeerError::Unsealed { peer: name() }
                });
            }
        }
        if !(200..300).contains(&status) {
            return Err(refused(name(), status, &body));
        }
        serde_json::from_slice(&body).map_err(|source| PeerError::Malformed { peer: name(), source })
    }

    /// [`Self::ask_peer`] for what is only done with a key.
    pub(super) async fn ask_peer_signed<T: DeserializeOwned>(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        call: PeerCall,
        limit: Duration,
    ) -> Result<T, PeerError> {
        let started = self.peers.started.get().ok_or(PeerError::NotStarted)?;
        if started.setup.key.is_none() {
            return Err(PeerError::NoKey);
        }
        self.ask_peer(fabric, peer, call, limit).await
    }

    /// [`Self::ask_peer_signed`] on a line that is held ready, for a question that may come twice: if the line turns out to
    /// be of no use any more there is no answer, and it has to be asked again without one.
    pub(super) async fn ask_peer_ahead<T: DeserializeOwned>(
        &self,
        line: LineAhead,
        fabric: &FabricConfig,
        peer: &Peer,
        call: PeerCall,
        limit: Duration,
    ) -> Option<Result<T, PeerError>> {
        let line = line.if_open(self.world.clock().monotonic())?;
        self.peers.started.get()?.setup.key.as_ref()?;
        match self.ask_peer_on(Some(line), fabric, peer, call, limit).await {
            Err(PeerError::Unreachable { .. } | PeerError::Tls { .. }) => None,
            answer => Some(answer),
        }
    }

    /// Has a peer launch VMs.
    pub(crate) async fn launch_at_peer(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        launch: &PeerLaunch,
    ) -> Result<Vec<MemberBody>, PeerError> {
        let body = serde_json::to_vec(launch);
        let body = body.map_err(|source| PeerError::Malformed { peer: peer.name.clone(), source })?;
        let call = PeerCall { method: "POST", path: LAUNCH_PATH.to_owned(), body, head: None };
        let LaunchedBody { vms } = self.ask_peer_signed(fabric, peer, call, LAUNCH_LIMIT).await?;
        Ok(vms)
    }

    /// A peer's members of a session.
    pub(super) async fn members_at_peer(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        session: SessionNetworkId,
    ) -> Result<Vec<MemberBody>, PeerError> {
        let path = format!("{SESSIONS_PATH}{session}/members");
        let call = PeerCall { method: "GET", path, body: Vec::new(), head: None };
        let MembersBody { members } = self.ask_peer_signed(fabric, peer, call, MEMBERS_LIMIT).await?;
        Ok(members)
    }
}
