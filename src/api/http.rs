//! Serving HTTP on a unix socket: connections are bounded in number, requests in header size and time, and each knows
//! who is at the other end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tower::ServiceExt;

/// Most connections at once; more wait in the socket's backlog.
const CONNECTIONS_MAX: usize = 512;

/// Longest head of a request in bytes: a path, a few headers and a key.
const HEAD_BYTES_MAX: usize = 16 * 1024;

/// Most headers of a request.
const HEADERS_MAX: usize = 64;

/// Longest time for the head of a request to arrive, also of the next one on a connection kept open.
const HEAD_LIMIT: Duration = Duration::from_secs(60);

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

/// Serves until `ending` becomes true, then waits a little for what is under way.
pub(super) async fn serve(listener: UnixListener, router: Router, mut ending: watch::Receiver<bool>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let permit = tokio::select! {
            biased;
            () = ended(&mut ending) => break,
            permit = Arc::clone(&room).acquire_owned() => permit,
        };
        let accepted = tokio::select! {
            biased;
            () = ended(&mut ending) => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let serving = connection(stream, router.clone(), ending.clone());
                connections.spawn(async move {
                    serving.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Too many open files, most likely: later ones may fit again.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
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

async fn connection(stream: UnixStream, router: Router, mut ending: watch::Receiver<bool>) {
    let client = match stream.peer_cred() {
        Ok(found) => Client { uid: found.uid(), gid: found.gid(), pid: found.pid().unwrap_or(0) },
        Err(_) => Client::default(),
    };
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(client);
        let answering = router.clone().oneshot(request.map(Body::new));
        async move { answering.await.map_err(|never: Infallible| never) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
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
