//! Serving HTTP on a unix socket: connections are bounded in number, requests in header size and time, and each knows
//! who is at the other end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::StatusCode;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

use super::error::ApiError;
use super::stall::Reading;
use crate::agent::Connections;
use crate::agent::config::Limits;
use crate::report::Retry;

/// Longest head of a request in bytes: a path, a few headers and a key.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Most headers of a request.
const HEADERS_MAX: usize = 64;

/// Longest time for the head of a request to arrive, also of the next one on a connection kept open. A client sends a
/// head at once; one that keeps connections for later has to be ready to open a new one.
const HEAD_LIMIT: Duration = Duration::from_secs(15);

/// How long a client may take nothing of its answer. A pager that somebody reads in may hold an answer up for minutes.
const STALL_LIMIT: Duration = Duration::from_secs(300);

/// Connections beyond the bound that are told so at once; more are closed without a word.
const REFUSALS_MAX: usize = 64;

/// How long a refused client may take to say what it wants: its answer is lost when the connection is closed before.
const REFUSAL_LIMIT: Duration = Duration::from_millis(500);

/// How long nothing is accepted after the system refused a connection, for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bounds of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Most connections at once.
    pub(super) connections_max: usize,
    /// See [`HEAD_LIMIT`].
    pub(super) head: Duration,
    /// See [`STALL_LIMIT`].
    pub(super) stall: Duration,
}

impl Bounds {
    /// What agents do.
    pub(super) fn of(config: &Limits) -> Self {
        let connections_max = usize::try_from(config.connections_max).unwrap_or(usize::MAX);
        Self { connections_max, head: HEAD_LIMIT, stall: STALL_LIMIT }
    }
}

/// What serving connections needs.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) router: Router,
    pub(super) bounds: Bounds,
    pub(super) connections: Arc<Connections>,
}

/// How long requests may go on after the agent was told to end.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Who is at the other end of a connection, as the kernel says.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Client {
    /// User id.
    pub(super) uid: u32,
    /// Group id.
    pub(super) gid: u32,
    /// Process id, 0 when unknown.
    pub(super) pid: i32,
}

impl Client {
    fn of(stream: &UnixStream) -> Self {
        match stream.peer_cred() {
            Ok(found) => Self { uid: found.uid(), gid: found.gid(), pid: found.pid().unwrap_or(0) },
            Err(_) => Self::default(),
        }
    }
}

/// Serves until `ending` becomes true, then waits a little for what is under way.
pub(super) async fn serve(listener: UnixListener, service: Service, mut ending: watch::Receiver<bool>) {
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = ended(&mut ending) => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let client = Client::of(&stream);
                match service.connections.take(client.pid, service.bounds.connections_max) {
                    Some(place) => {
                        let serving = connection(stream, client, service.clone(), ending.clone());
                        connections.spawn(async move {
                            serving.await;
                            drop(place);
                        });
                    }
                    None => {
                        tracing::debug!(pid = client.pid, uid = client.uid, "a connection beyond the bound");
                        if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
                            connections.spawn(async move {
                                refuse(stream).await;
                                drop(permit);
                            });
                        }
                    }
                }
            }
            Err(error) => {
                // Too many open files, most likely: later ones may fit again.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(END_LIMIT, all).await.is_err() {
        tracing::info!("requests under way are cut off");
    }
}

/// Waits until the agent is told to end.
async fn ended(ending: &mut watch::Receiver<bool>) {
    // An error means that whoever could tell is gone: the same.
    let _ = ending.wait_for(|ending| *ending).await;
}

/// Says that there are too many connections, once the client has said something.
async fn refuse(mut stream: UnixStream) {
    let error = ApiError::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "too_many_connections",
        "too many connections to this agent are open",
        Retry::Later,
    )
    .with_detail("close some: one process may have half of limits.connections_max");
    let body = serde_json::to_string(&error.body()).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let refusing = async {
        let mut head = [0; 4096];
        // What it is does not matter.
        let _ = stream.read(&mut head).await;
        // It may have gone.
        let _ = stream.write_all(answer.as_bytes()).await;
        let _ = stream.shutdown().await;
    };
    let _ = tokio::time::timeout(REFUSAL_LIMIT, refusing).await;
}

async fn connection(stream: UnixStream, client: Client, service: Service, mut ending: watch::Receiver<bool>) {
    let Service { router, bounds, connections } = service;
    let stream = Reading::new(stream, bounds.stall, connections);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(client);
        let answering = router.clone().oneshot(request.map(Body::new));
        async move { answering.await.map_err(|never: Infallible| never) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.head)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    let serving = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut serving = std::pin::pin!(serving);
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = ended(&mut ending) => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, pid = client.pid, "a connection ended");
    }
}
