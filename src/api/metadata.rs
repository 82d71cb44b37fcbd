//! The metadata service: what a guest reads and asks for at 169.254.169.254 and fe80::a9fe:a9fe, port 80.
//!
//! One task per VM, over the listeners in its jail; which VM asks is known by the listener, and nothing in a request
//! can say otherwise. A guest may be hostile: it has few connections, one request on each, a bound on bytes and time,
//! and a pace. What it sends too much of waits in its own listener's backlog and costs others nothing.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tower::ServiceExt;

use super::body::{is_json, parse, read_within};
use super::error::ApiError;
use crate::agent::peers::{LaunchedBody, MemberBody, MembersBody};
use crate::agent::{Door, MetadataDoor, OwnLaunch, OwnLaunched, RegistrationWords};
use crate::ids::{ClusterId, SessionId, VmId};
use crate::report::Retry;

/// Most connections of one VM at once.
const CONNECTIONS_MAX: usize = 8;

/// Most connections of one VM that are begun in a second.
const PACE_PER_S: u32 = 64;

/// Longest head of a request in bytes: hyper's smallest.
const HEAD_BYTES_MAX: usize = 8192;

/// Most headers of a request.
const HEADERS_MAX: usize = 32;

/// Longest body of a request.
const BODY_BYTES_MAX: usize = 16 * 1024;

/// Longest time for a head, and for a body, to arrive.
const ARRIVE_LIMIT: Duration = Duration::from_secs(5);

/// Longest life of a connection: slow readers are cut off, and a launch on another host has answered by then.
const CONNECTION_LIMIT: Duration = Duration::from_secs(30);

/// What handlers work with.
#[derive(Clone)]
struct Service {
    door: Arc<dyn Door>,
    host: Arc<str>,
}

/// Which VM asks.
#[derive(Debug, Clone)]
struct Caller(VmId);

/// `GET /v1/self`.
#[derive(Debug, Serialize)]
struct SelfBody<'a> {
    id: &'a VmId,
    name: Option<&'a str>,
    hostname: &'a str,
    generation: &'a str,
    host: &'a str,
    session: Option<SelfSession<'a>>,
    cluster: Option<SelfCluster<'a>>,
    addresses: Vec<std::net::IpAddr>,
    role: Option<&'a str>,
}

/// The session in [`SelfBody`].
#[derive(Debug, Serialize)]
struct SelfSession<'a> {
    id: &'a SessionId,
    name: Option<&'a str>,
    session_network_id: u32,
}

/// The cluster in [`SelfBody`].
#[derive(Debug, Serialize)]
struct SelfCluster<'a> {
    id: &'a ClusterId,
    executor_id: &'a str,
    /// The number of its registration; null before it is registered.
    epoch: Option<u64>,
}

/// `POST /v1/self/register`. Which VM asks is not asked.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SelfRegisterRequest {
    executor_id: String,
    cluster_id: String,
    generation: String,
    token: String,
}

/// The answer to a registration.
#[derive(Debug, Serialize)]
struct RegisteredBody {
    epoch: u64,
}

/// `POST /v1/self/launch`. What is left out is as with the asking VM.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SelfLaunchRequest {
    session_network_id: u32,
    role: Option<String>,
    #[serde(default = "one")]
    count: u8,
    image: Option<String>,
    vcpus: Option<u32>,
    memory_mib: Option<u64>,
    host: Option<String>,
}

const fn one() -> u8 {
    1
}

/// All routes.
fn router(door: Arc<dyn Door>, host: &str) -> Router {
    Router::new()
        .route("/v1/self", get(show))
        .route("/v1/self/members", get(members))
        .route("/v1/self/user-data", get(user_data))
        .route("/v1/self/launch", post(launch))
        .route("/v1/self/register", post(register))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .with_state(Service { door, host: host.into() })
}

async fn unknown_route(request: Request) -> ApiError {
    let message = format!("there is nothing at {:?}", request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, "not_found", message, Retry::Never)
        .with_detail("/v1/self, /v1/self/members, /v1/self/user-data, /v1/self/launch and /v1/self/register are there")
}

async fn wrong_method(method: Method, request: Request) -> ApiError {
    let message = format!("{method} is not possible for {:?}", request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message, Retry::Never)
}

async fn show(State(service): State<Service>, Extension(Caller(vm)): Extension<Caller>) -> Result<Response, ApiError> {
    let own = service.door.own(&vm).await?;
    let session = own.session.as_ref().map(|session| SelfSession {
        id: &session.id,
        name: session.name.as_deref(),
        session_network_id: session.session_network_id.into(),
    });
    let cluster = own.vm.spec.cluster.as_ref().map(|member| SelfCluster {
        id: &member.cluster,
        executor_id: &member.executor_id,
        epoch: own.vm.registration.map(|registered| registered.epoch),
    });
    let body = SelfBody {
        id: &own.vm.id,
        name: own.vm.name.as_deref(),
        hostname: own.vm.hostname(),
        generation: &own.vm.generation,
        host: &service.host,
        session,
        cluster,
        addresses: own.vm.addresses(),
        role: own.vm.spec.role.as_deref(),
    };
    Ok(Json(body).into_response())
}

async fn members(
    State(service): State<Service>,
    Extension(Caller(vm)): Extension<Caller>,
) -> Result<Json<MembersBody>, ApiError> {
    let own = service.door.own_members(&vm).await?;
    let here = own.here.iter().map(|vm| MemberBody::of(vm, &service.host));
    Ok(Json(MembersBody { members: here.chain(own.elsewhere.iter().cloned()).collect() }))
}

async fn user_data(
    State(service): State<Service>,
    Extension(Caller(vm)): Extension<Caller>,
) -> Result<Response, ApiError> {
    let Some(data) = service.door.own_user_data(&vm).await? else {
        let message = "this VM's session has no user data, or it is in no session";
        return Err(ApiError::new(StatusCode::NOT_FOUND, "no_user_data", message, Retry::Never));
    };
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], data).into_response())
}

async fn launch(
    State(service): State<Service>,
    Extension(Caller(vm)): Extension<Caller>,
    request: Request,
) -> Result<(StatusCode, Json<LaunchedBody>), ApiError> {
    let (parts, body) = request.into_parts();
    is_json(&parts.headers)?;
    let body = read_within(body, BODY_BYTES_MAX, ARRIVE_LIMIT).await?;
    let SelfLaunchRequest { session_network_id, role, count, image, vcpus, memory_mib, host } = parse(&body)?;
    let peer = host.filter(|host| **host != *service.host);
    let launch = OwnLaunch { session_network_id, role, count, image, vcpus, memory_mib, peer };
    let vms = match service.door.launch_own(&vm, launch).await? {
        OwnLaunched::Here(vms) => vms.iter().map(|vm| MemberBody::of(vm, &service.host)).collect(),
        OwnLaunched::Elsewhere(vms) => vms,
    };
    Ok((StatusCode::ACCEPTED, Json(LaunchedBody { vms })))
}

async fn register(
    State(service): State<Service>,
    Extension(Caller(vm)): Extension<Caller>,
    request: Request,
) -> Result<Json<RegisteredBody>, ApiError> {
    let (parts, body) = request.into_parts();
    is_json(&parts.headers)?;
    let body = read_within(body, BODY_BYTES_MAX, ARRIVE_LIMIT).await?;
    let SelfRegisterRequest { executor_id, cluster_id, generation, token } = parse(&body)?;
    let words = RegistrationWords { executor_id, cluster_id, vm_id: None, generation, token };
    Ok(Json(RegisteredBody { epoch: service.door.register_own(&vm, words).await? }))
}

/// Serves the VMs that come through `doors` until `ending` becomes true.
pub(super) async fn serve(
    doors: mpsc::Receiver<MetadataDoor>,
    door: Arc<dyn Door>,
    host: Arc<str>,
    ending: watch::Receiver<bool>,
) {
    let router = router(door, &host);
    let (mut doors, mut ending) = (doors, ending);
    let mut vms = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            _ = ending.wait_for(|ending| *ending) => break,
            Some(_) = vms.join_next() => {}
            door = doors.recv() => match door {
                Some(door) => drop(vms.spawn(serve_vm(door, router.clone()))),
                None => break,
            },
        }
    }
    // What is under way ends with its task.
}

/// Serves one VM until its network is closed.
async fn serve_vm(door: MetadataDoor, router: Router) {
    let MetadataDoor { vm, listeners, mut closed } = door;
    let mut connections = JoinSet::new();
    let (mut window, mut begun) = (Instant::now(), 0);
    loop {
        if window.elapsed() >= Duration::from_secs(1) {
            (window, begun) = (Instant::now(), 0);
        }
        let has_room = connections.len() < CONNECTIONS_MAX && begun < PACE_PER_S;
        let accepted = tokio::select! {
            biased;
            // An error means that whoever could tell is gone: closed as well.
            _ = closed.wait_for(|closed| *closed) => break,
            Some(_) = connections.join_next() => continue,
            () = sleep_until(window + Duration::from_secs(1)), if begun >= PACE_PER_S => continue,
            accepted = accept(&listeners), if has_room => accepted,
        };
        match accepted {
            Ok(stream) => {
                begun += 1;
                connections.spawn(connection(stream, vm.clone(), router.clone()));
            }
            Err(error) => {
                tracing::debug!(%error, %vm, "cannot accept a guest's connection");
                // Counted, so that it is tried again in the next second at the latest.
                begun += 1;
            }
        }
    }
    tracing::debug!(%vm, "metadata service ends");
}

/// The next connection of any listener.
async fn accept(listeners: &[TcpListener]) -> io::Result<TcpStream> {
    poll_fn(|context| {
        for listener in listeners {
            if let Poll::Ready(accepted) = listener.poll_accept(context) {
                return Poll::Ready(accepted.map(|(stream, _)| stream));
            }
        }
        Poll::Pending
    })
    .await
}

async fn connection(stream: TcpStream, vm: VmId, router: Router) {
    let caller = Caller(vm.clone());
    let service = service_fn(move |mut request: axum::http::Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        let answering = router.clone().oneshot(request.map(Body::new));
        async move { answering.await.map_err(|never: Infallible| never) }
    });
    let mut builder = http1::Builder::new();
    // A client that has said all it wants may say so, as nc does at the end of its input: its answer may take longer.
    builder.half_close(true);
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(ARRIVE_LIMIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false);
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_LIMIT, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, %vm, "a guest's connection ended"),
        Err(_) => tracing::debug!(%vm, "a guest's connection took too long"),
    }
}

#[cfg(test)]
mod tests;
