//! The way to other agents, as the agent sees it: requests, answers, and what can be wrong with a connection. How they
//! travel is not known here.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::proof::{CertificateError, ProofError};

/// A request to another agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCall {
    /// HTTP method.
    pub method: &'static str,
    /// Path.
    pub path: String,
    /// JSON body; empty without one.
    pub body: Vec<u8>,
    /// Value of [`HEAD_HEADER`](super::HEAD_HEADER); `None` when there is no key.
    pub head: Option<String>,
}

/// An answer of another agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAnswer {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
    /// Value of [`SEAL_HEADER`](super::SEAL_HEADER), if there is one.
    pub seal: Option<String>,
}

/// Whom a request is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callee {
    /// Its name here.
    pub name: String,
    /// Where its agent listens.
    pub at: SocketAddr,
    /// The number that it has to prove before it is told anything. `None`: that of any host with the key. So is a hello
    /// sent, by which two hosts find out that they disagree on a number.
    pub number: Option<u16>,
    /// How long the caller waits for the answer.
    pub limit: Duration,
}

/// The way to other agents. What it gives may be dropped at any time.
pub trait PeerLink: Send + Sync + 'static {
    /// Opens a way for one request. Whoever has one waiting (a handshake takes milliseconds) has it for [`LINE_LIFE`]:
    /// then the other end may have closed it.
    fn open(&self, to: Callee) -> BoxFuture<'_, Result<Box<dyn PeerLine>, LinkError>>;

    /// Sends one request and reads the answer, both bounded in size.
    fn call(&self, to: Callee, call: PeerCall) -> BoxFuture<'_, Result<PeerAnswer, LinkError>> {
        Box::pin(async move { self.open(to).await?.call(call).await })
    }
}

/// An open way to another agent, known to be the right one.
pub trait PeerLine: Send + Sync + 'static {
    /// Sends the request and reads the answer, both bounded in size.
    fn call(self: Box<Self>, call: PeerCall) -> BoxFuture<'static, Result<PeerAnswer, LinkError>>;
}

/// How long a line is certainly open that nothing was said on: less than agents wait for a request.
pub const LINE_LIFE: Duration = Duration::from_secs(4);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The way failed.
    #[error(transparent)]
    Way(#[from] io::Error),
    /// There is a way, but not one that is known to be private and to lead to the right host.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Why a connection between agents is not used: what is wrong with the other end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// It does not speak TLS.
    #[error(
        "it speaks without TLS: its agent is of an older version, or has no fabric.key_file; set fabric.plain_peers = \
         true here while you upgrade"
    )]
    Plain,
    /// It does not speak at all like an agent.
    #[error("its first byte is of neither TLS nor HTTP")]
    Garbage,
    /// It has no certificate.
    #[error("it has no certificate, by which agents know each other")]
    NoCertificate,
    /// Its certificate proves nothing.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// It is another host than the one that was called.
    #[error(
        "it proves to be host number {proven}, but [[peers]] here says {wanted}: correct one of the two, or the address"
    )]
    OtherHost {
        /// The number of its certificate.
        proven: u16,
        /// The number of the one that was called.
        wanted: u16,
    },
    /// It did not take this host's certificate.
    #[error("it does not take this host's certificate: fabric.key_file has to be the same on both hosts")]
    Refused,
    /// It did not agree on what is spoken inside.
    #[error("it speaks TLS, but not as agents do to each other")]
    OtherProtocol,
    /// It took too long.
    #[error(
        "it did not finish the TLS handshake within {} ms: its agent is overloaded, or what listens there is something \
         else",
        limit.as_millis()
    )]
    TimedOut {
        /// How long was waited.
        limit: Duration,
    },
    /// The handshake failed otherwise.
    #[error("the TLS handshake failed: {why}")]
    Failed {
        /// How, in the words of the library or the system.
        why: String,
    },
}

impl TlsError {
    /// The error's name, as in counters.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Plain => "peer_plain",
            Self::Garbage => "peer_garbage",
            Self::NoCertificate => "peer_no_certificate",
            Self::Proof(ProofError::Certificate(_)) => "peer_other_certificate",
            Self::Proof(ProofError::OtherKey) | Self::Refused => "peer_key_refused",
            Self::OtherHost { .. } => "peer_other_host",
            Self::OtherProtocol => "peer_other_protocol",
            Self::TimedOut { .. } => "peer_handshake_timeout",
            Self::Failed { .. } => "peer_handshake_failed",
        }
    }

    /// Whether waiting may help.
    pub const fn is_passing(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Failed { .. })
    }
}

impl From<CertificateError> for TlsError {
    fn from(error: CertificateError) -> Self {
        Self::Proof(error.into())
    }
}

/// How a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// By TLS, from the host that has proved this number.
    Tls {
        /// The number.
        number: u16,
    },
    /// As it is.
    Plain,
}
