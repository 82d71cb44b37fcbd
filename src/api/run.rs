//! `hearth agent`: from its options to its end.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::http;
use super::listen::{self, ListenError};
use super::peer_link::HttpLink;
use super::peer_tls::PeerTls;
use super::routes::router;
use super::store_link::HttpStores;
use super::{metadata, peer};
use crate::agent::config::{self, ConfigError, Overrides};
use crate::agent::log::{self, LogFormat};
use crate::agent::peers::{PeerKey, PeerKeyError, PeerSetup};
use crate::agent::raise_descriptors;
use crate::agent::{Agent, DRAIN_GRACE, Door, Draining, HostWorld, LedgerError, OpenHostError};

/// Threads that serve the API and the VMs' actors. What blocks has threads of its own.
const WORKERS: usize = 2;

/// What the command line says.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// What wins over the configuration file.
    pub overrides: Overrides,
    /// Stop the VMs at the end.
    pub drain: bool,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// Why the agent did not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The runtime could not be made.
    #[error("start the agent's threads")]
    Runtime(#[source] std::io::Error),
    /// The state directory could not be taken.
    #[error(transparent)]
    Open(#[from] OpenHostError),
    /// The ledger could not be read.
    #[error("read the ledger")]
    Ledger(#[from] LedgerError),
    /// There is no socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The fabric's key is not usable.
    #[error(transparent)]
    PeerKey(#[from] PeerKeyError),
    /// There is no certificate to be known by.
    #[error("make this host's certificate for other hosts")]
    PeerTls(#[source] std::io::Error),
    /// Other hosts' agents could not be listened for.
    #[error("listen on {address} for other hosts (fabric.listen)")]
    PeerListen {
        /// Where.
        address: SocketAddr,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Some VMs did not stop when the agent drained.
    #[error("drained, but these VMs did not stop: {}; the next agent on this state directory finds them", .left.join(", "))]
    NotDrained {
        /// Names or ids.
        left: Vec<String>,
    },
    /// The ledger failed while the agent ran.
    #[error("the ledger failed: {why}; the VMs go on, and the next agent finds them")]
    Broken {
        /// How, as a chain.
        why: String,
    },
}

/// Runs the agent until SIGTERM or SIGINT. VMs go on unless it drains.
pub fn run(options: RunOptions) -> Result<(), RunError> {
    log::start(options.log_format);
    let config = config::load(options.overrides.clone())?;
    match raise_descriptors() {
        Ok(descriptors) => tracing::debug!(descriptors, "descriptors this agent may open"),
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open descriptors"),
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build();
    let runtime = runtime.map_err(RunError::Runtime)?;
    let result = runtime.block_on(serve(config, &options));
    // Blocking work under way (a VMM that does not answer) is not waited for: the next agent looks again.
    runtime.shutdown_background();
    result
}

/// Stops all VMs: what a signal asks an agent for that was started with `--drain`.
async fn drain(agent: &dyn Door) -> Result<(), RunError> {
    match agent.drain(DRAIN_GRACE).wait_for(|draining| draining.is_over).await {
        Ok(drained) => drained_result(&drained),
        Err(_) => Ok(()),
    }
}

fn drained_result(drained: &Draining) -> Result<(), RunError> {
    if drained.left.is_empty() { Ok(()) } else { Err(RunError::NotDrained { left: drained.left.clone() }) }
}

async fn serve(config: config::Config, options: &RunOptions) -> Result<(), RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Runtime)?;
    let world = HostWorld::open(&config)?;
    if let Err(error) = log::keep_log(&config.state_dir) {
        tracing::warn!(%error, "cannot keep a copy of the log in the state directory");
    }
    // Before the VMs are touched: an agent that cannot be asked should not act.
    let socket = listen::bind(&config.socket).await?;
    let path = config.socket.clone();
    let fabric = config.fabric.clone();
    let bounds = http::Bounds::of(&config.limits);
    let key = fabric.as_ref().and_then(|fabric| fabric.key_file.as_deref()).map(PeerKey::read).transpose()?;
    let tls = match (&fabric, &key) {
        (Some(fabric), Some(key)) => Some(PeerTls::new(key, fabric.host.into()).map_err(RunError::PeerTls)?),
        (_, _) => None,
    };
    let peers = match fabric.as_ref().and_then(|fabric| fabric.listen) {
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            Some(listener.map_err(|source| RunError::PeerListen { address, source })?)
        }
        None => None,
    };
    let agent: Arc<dyn Door> = Arc::new(Agent::start(world, config).await?);
    let host = agent.host().await.map_or_else(|_| "localhost".to_owned(), |view| view.facts.name);
    agent.start_sources(Arc::new(HttpStores::default()));
    let (end, ending) = watch::channel(false);
    if let Some(fabric) = &fabric {
        if fabric.plain_peers {
            tracing::warn!("fabric.plain_peers is set: hosts may speak without TLS; remove it when all are upgraded");
        }
        let link = Arc::new(HttpLink::new(tls.clone(), fabric.plain_peers));
        agent.start_peers(PeerSetup { key, link, host: host.clone() }).await?;
    }
    if let Some(listener) = peers {
        tokio::spawn(peer::serve(listener, tls, Arc::clone(&agent), host.as_str().into(), ending.clone()));
    }
    if let Some(doors) = agent.metadata() {
        tokio::spawn(metadata::serve(doors, Arc::clone(&agent), host.as_str().into(), ending.clone()));
    }
    let service = http::Service { router: router(Arc::clone(&agent), &host), bounds, connections: agent.connections() };
    let serving = tokio::spawn(http::serve(socket.listener, service, ending));
    tracing::info!(socket = %path.display(), host, version = env!("CARGO_PKG_VERSION"), "serving");
    log::say_ready(options.log_format);
    let (mut broken, mut draining) = (agent.broken(), agent.draining());
    let result = tokio::select! {
        drained = draining.wait_for(|draining| draining.is_over) => match drained {
            Ok(drained) => drained_result(&drained),
            Err(_) => Ok(()),
        },
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        why = broken.wait_for(Option::is_some) => {
            Err(RunError::Broken { why: why.ok().and_then(|why| why.clone()).unwrap_or_default() })
        }
    };
    log::say_stopping();
    let result = if options.drain && result.is_ok() { drain(agent.as_ref()).await } else { result };
    agent.close().await;
    end.send_replace(true);
    // Its connections have a bound of their own.
    let _ = serving.await;
    drop(socket.file);
    result
}
