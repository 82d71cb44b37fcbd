//! Answering other hosts' agents: HTTP inside of TLS, on the network between hosts. Small on purpose: one request per
//! connection, few paths, everything bounded. Whether a request is to be believed is the agent's to say; its answer is
//! sealed with the fabric's key.
//!
//! Agents of the version before speak HTTP without TLS at the same port; which of the two it is, the first byte says.
//! Without `fabric.plain_peers` these are read as well, and refused in words that they can show.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{Id, JoinSet};
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use super::body::{parse, read_within};
use super::error::ApiError;
use super::handlers::vms::to_json;
use super::peer_tls::PeerTls;
use crate::agent::peers::{
    ARRIVAL_CHECK_PATH, ARRIVALS_PATH, ArrivalOrder, BUNDLE_PART_PATH, Channel, HEAD_HEADER, HELLO_PATH, Hello,
    LAUNCH_PATH, LINE_LIFE, LaunchedBody, MIGRATIONS_PATH, MemberBody, MembersBody, PartOrder, PeerLaunch,
    REQUEST_BYTES_MAX, RequestHead, SEAL_HEADER, SESSIONS_PATH, Signed, TlsError, Unadmitted, VOLUMES_PATH,
    VolumeOrder,
};
use crate::agent::{Decision, Door, VolumeError};
use crate::ids::{MigrationId, VmId};
use crate::report::Retry;

/// Most connections at once.
const CONNECTIONS_MAX: usize = 64;

/// Most connections of one host at once.
const CONNECTIONS_PER_HOST_MAX: usize = 8;

/// Longest head of a request in bytes: hyper's smallest.
const HEAD_BYTES_MAX: usize = 8192;

/// Most headers of a request.
const HEADERS_MAX: usize = 32;

/// First byte of a connection by TLS: a record of a handshake.
const HANDSHAKE: u8 = 0x16;

/// Longest time for a handshake, for a head, and for a body, to arrive.
pub(super) const ARRIVE_LIMIT: Duration = Duration::from_secs(5);

/// A line that is held ready is open for longer than it is taken to be.
const _: () = assert!(LINE_LIFE.as_millis() < ARRIVE_LIMIT.as_millis());

/// Longest life of a connection: a launch of the most VMs, written to disk one by one.
const CONNECTION_LIMIT: Duration = Duration::from_secs(30);

/// Serves until `ending` becomes true: by TLS, if there is a key, and as it is.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<PeerTls>,
    door: Arc<dyn Door>,
    host: Arc<str>,
    mut ending: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut callers: BTreeMap<Id, IpAddr> = BTreeMap::new();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = ending.wait_for(|ending| *ending) => break,
            Some(ended) = connections.join_next_with_id() => {
                callers.remove(&match ended {
                    Ok((id, ())) => id,
                    Err(error) => error.id(),
                });
                continue;
            }
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => accepted,
        };
        match accepted {
            Ok((stream, address)) => {
                let from = address.ip().to_canonical();
                if callers.values().filter(|caller| **caller == from).count() >= CONNECTIONS_PER_HOST_MAX {
                    // Closed unanswered: a host that keeps its bound never sees this.
                    continue;
                }
                let serving = connection(stream, from, tls.clone(), Arc::clone(&door), Arc::clone(&host));
                callers.insert(connections.spawn(serving).id(), from);
            }
            Err(error) => {
                // Too many open files, most likely: later ones may fit again.
                tracing::warn!(%error, "cannot accept a connection of another host");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A connection that can be asked on.
enum Opened {
    Tls(Box<TlsStream<TcpStream>>, u16),
    Plain(TcpStream),
    /// Closed before anything was said.
    Nothing,
}

async fn open(stream: TcpStream, tls: Option<PeerTls>) -> Result<Opened, TlsError> {
    // Without a key everything is HTTP. A host that has one sees what is answered to its handshake.
    let Some(tls) = tls else { return Ok(Opened::Plain(stream)) };
    let mut first = [0];
    match timeout(ARRIVE_LIMIT, stream.peek(&mut first)).await {
        Ok(Ok(1..)) => {}
        Ok(Ok(0) | Err(_)) => return Ok(Opened::Nothing),
        Err(_) => return Err(TlsError::TimedOut { limit: ARRIVE_LIMIT }),
    }
    match first[0] {
        HANDSHAKE => {
            let (stream, number) = tls.accept(stream, ARRIVE_LIMIT).await?;
            Ok(Opened::Tls(Box::new(stream), number))
        }
        // A method.
        b'A'..=b'Z' => Ok(Opened::Plain(stream)),
        _ => Err(TlsError::Garbage),
    }
}

async fn connection(stream: TcpStream, from: IpAddr, tls: Option<PeerTls>, door: Arc<dyn Door>, host: Arc<str>) {
    let serving = async {
        match open(stream, tls).await {
            Ok(Opened::Tls(stream, number)) => speak(*stream, from, Channel::Tls { number }, door, host).await,
            Ok(Opened::Plain(stream)) => speak(stream, from, Channel::Plain, door, host).await,
            Ok(Opened::Nothing) => {}
            Err(error) => {
                door.peer_turned_away(&error);
                tracing::debug!(%from, %error, "a connection of another host is not taken");
            }
        }
    };
    if timeout(CONNECTION_LIMIT, serving).await.is_err() {
        tracing::debug!(%from, "a connection of another host took too long");
    }
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    from: IpAddr,
    channel: Channel,
    door: Arc<dyn Door>,
    host: Arc<str>,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let (door, host) = (Arc::clone(&door), Arc::clone(&host));
        async move { Ok::<_, Infallible>(answer(&*door, &host, from, channel, request.map(Body::new)).await) }
    });
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(ARRIVE_LIMIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, %from, "a connection of another host ended");
    }
}

/// One request, from the host at `from`.
pub(super) async fn answer(
    door: &dyn Door,
    host: &str,
    from: IpAddr,
    channel: Channel,
    request: Request<Body>,
) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or_else(String::new, ToString::to_string);
    let body = match read_within(body, REQUEST_BYTES_MAX, ARRIVE_LIMIT).await {
        Ok(body) => body,
        Err(error) => return response(door, None, error.status, to_json(&error.body())),
    };
    let head = parts.headers.get(HEAD_HEADER).map(|value| value.to_str().unwrap_or_default());
    let what = Signed { method: parts.method.as_str(), path: &path, body: &body };
    let head = match door.admit_peer(&what, head, channel) {
        Ok(head) => head,
        Err(Unadmitted { refusal, head }) => {
            tracing::debug!(%from, path, error = %refusal, "a request of another host is not taken");
            let error = ApiError::from(refusal);
            return response(door, head.as_ref(), error.status, to_json(&error.body()));
        }
    };
    let asked = Asked { door, host, from, number: head.as_ref().map_or(0, |head| head.from), signed: head.is_some() };
    let (status, body) = match asked.dispatch(&parts.method, &path, &body).await {
        Ok(answer) => answer,
        Err(error) => (error.status, to_json(&error.body())),
    };
    response(door, head.as_ref(), status, body)
}

fn response(door: &dyn Door, head: Option<&RequestHead>, status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let seal = head.and_then(|head| door.seal_for_peer(head, status.as_u16(), body.as_bytes()));
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seal) = seal.and_then(|seal| HeaderValue::from_str(&seal).ok()) {
        response.headers_mut().insert(SEAL_HEADER, seal);
    }
    response
}

/// What another host says of a machine that stands ready here.
fn decision(word: &str) -> Option<Decision> {
    match word {
        "commit" => Some(Decision::HandedOver),
        "cancel" => Some(Decision::Kept),
        _ => None,
    }
}

/// An admitted request.
struct Asked<'a> {
    door: &'a dyn Door,
    host: &'a str,
    from: IpAddr,
    /// The asking host's number, as the key's holder says; 0 without a key, which asks nothing that matters.
    number: u16,
    signed: bool,
}

impl Asked<'_> {
    async fn dispatch(&self, method: &Method, path: &str, body: &[u8]) -> Result<(StatusCode, String), ApiError> {
        if method == Method::POST && path == HELLO_PATH {
            let hello: Hello = parse(body)?;
            let mine = self.door.hello(self.from, hello, self.signed).await?;
            return Ok((StatusCode::OK, to_json(&mine)));
        }
        // The agent admits nothing else without a key.
        if method == Method::POST && path == LAUNCH_PATH {
            let launch: PeerLaunch = parse(body)?;
            tracing::info!(from = %self.from, session = launch.session_network_id, "another host launches VMs");
            let vms = self.door.launch_for_peer(launch).await?;
            let vms = vms.iter().map(|vm| MemberBody::of(vm, self.host)).collect();
            return Ok((StatusCode::ACCEPTED, to_json(&LaunchedBody { vms })));
        }
        if method == Method::POST && path == ARRIVALS_PATH {
            let order: ArrivalOrder = parse(body)?;
            tracing::info!(from = %self.from, vm = %order.vm, migration = %order.migration, "another host hands a VM over");
            let ready = self.door.arrive(self.from, order).await?;
            return Ok((StatusCode::OK, to_json(&ready)));
        }
        if method == Method::POST && path == ARRIVAL_CHECK_PATH {
            let order: ArrivalOrder = parse(body)?;
            return Ok((StatusCode::OK, to_json(&self.door.check_arrival(order).await?)));
        }
        if method == Method::POST && path == BUNDLE_PART_PATH {
            let order: PartOrder = parse(body)?;
            return Ok((StatusCode::OK, to_json(&self.door.bundle_piece(order).await?)));
        }
        if method == Method::POST && path == VOLUMES_PATH {
            let order: VolumeOrder = parse(body)?;
            return Ok((StatusCode::OK, to_json(&self.door.volumes_for_peer(order).await.map_err(VolumeError::Ask)?)));
        }
        let arrival = path.strip_prefix(ARRIVALS_PATH).and_then(|rest| rest.strip_prefix('/')?.split_once('/'));
        if let Some((id, word)) = arrival.filter(|_| method == Method::POST)
            && let Ok(id) = id.parse::<MigrationId>()
            && let Some(decision) = decision(word)
        {
            let body = self.door.decided(self.number, id, decision).await?;
            return Ok((StatusCode::OK, to_json(&body)));
        }
        let migration = path.strip_prefix(MIGRATIONS_PATH).and_then(|id| id.parse::<MigrationId>().ok());
        if let Some(id) = migration.filter(|_| method == Method::GET) {
            return Ok((StatusCode::OK, to_json(&self.door.decision(&id))));
        }
        let vm = path.strip_prefix(LAUNCH_PATH).and_then(|rest| rest.strip_prefix('/')?.parse::<VmId>().ok());
        if let Some(id) = vm.filter(|_| method == Method::GET) {
            return Ok((StatusCode::OK, to_json(&self.door.presence(&id))));
        }
        let session = path.strip_prefix(SESSIONS_PATH).and_then(|rest| rest.strip_suffix("/members"));
        if let Some(session) = session.and_then(|session| session.parse().ok()).filter(|_| method == Method::GET) {
            let members = self.door.members_here(session);
            let members = members.iter().map(|vm| MemberBody::of(vm, self.host)).collect();
            return Ok((StatusCode::OK, to_json(&MembersBody { members })));
        }
        let message = format!("there is nothing at {method} {path:?} for other hosts");
        Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", message, Retry::Never))
    }
}

#[cfg(test)]
mod tests;
