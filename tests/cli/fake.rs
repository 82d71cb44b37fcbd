//! An agent that is none: it answers the routes of `/v1` with made-up VMs, notes what it was asked, and speaks
//! hearth-stream/1 with commands that are named after what they do.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path as Of, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::{Bytes, BytesMut};
use hearth::api::stream::{Exit, Frame};
use hearth::api::types::{ErrorBody, ErrorDetail, ExecRequest, RetryHint, UPGRADE_PROTOCOL};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Id of every VM that is launched here.
pub(crate) const VM: &str = "vm-aaaaaaaaaaaaaaaa";

/// Id of every session.
pub(crate) const SESSION: &str = "s-aaaaaaaaaaaaaaaa";

/// Id of every bundle.
const BUNDLE: &str = "b-aaaaaaaaaaaaaaaaaaaaaaaaaa";

const OPERATION: &str = "op-aaaaaaaaaaaaaaaa";

/// What the fake was asked, and what it shall do.
#[derive(Default)]
pub(crate) struct Notes {
    /// `METHOD path?query`, in order.
    pub(crate) calls: Vec<String>,
    /// Bodies of creates.
    pub(crate) bodies: Vec<Value>,
    /// Idempotency keys of creates.
    pub(crate) keys: Vec<String>,
    /// Bytes of input that came over streams.
    pub(crate) input: Vec<u8>,
    /// Frames other than input that came over streams.
    pub(crate) frames: Vec<Frame>,
    /// Bytes a `flood` has written.
    pub(crate) flooded: usize,
    /// Streams whose client went away.
    pub(crate) hung_up: usize,
    /// How often it was looked at what VMs use.
    usages: u32,
    /// How often the operation was looked at.
    looks: usize,
}

/// What launches shall come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Runs,
    Panics,
    Hangs,
    HangsSnapshots,
}

#[derive(Clone)]
struct Shared {
    notes: Arc<Mutex<Notes>>,
    fate: Fate,
}

/// A fake agent; it ends when dropped.
pub(crate) struct Fake {
    pub(crate) notes: Arc<Mutex<Notes>>,
    directory: tempfile::TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub(crate) fn start() -> Self {
        Self::with_fate(Fate::Runs)
    }

    pub(crate) fn with_fate(fate: Fate) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        let notes = Arc::new(Mutex::new(Notes::default()));
        let routes = routes(Shared { notes: Arc::clone(&notes), fate });
        let listener = {
            let _entered = runtime.enter();
            tokio::net::UnixListener::bind(directory.path().join("api.sock")).expect("a socket")
        };
        runtime.spawn(async move { axum::serve(listener, routes).await });
        Self { notes, directory, _runtime: runtime }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn noted<T>(&self, look: impl FnOnce(&Notes) -> T) -> T {
        look(&self.notes.lock().expect("notes"))
    }
}

fn routes(shared: Shared) -> Router {
    Router::new()
        .route("/v1/vms", get(|| async { ok(json!({"vms": [vm("running")]})) }).post(launch))
        .route("/v1/vms/{vm}", get(show).delete(|| async { StatusCode::NO_CONTENT }))
        .route("/v1/vms/{vm}/stop", post(|| async { ok(vm("stopped")) }))
        .route("/v1/vms/{vm}/pause", post(|| async { ok(vm("paused")) }))
        .route("/v1/vms/{vm}/resume", post(|| async { ok(vm("running")) }))
        .route("/v1/vms/{vm}/stats", get(|| async { ok(stats()) }))
        .route("/v1/usage", get(usage))
        .route("/v1/vms/{vm}/exec", post(exec))
        .route("/v1/vms/{vm}/snapshot", post(snapshot))
        .route("/v1/bundles", post(build))
        .route("/v1/bundles/{bundle}/export", get(export))
        .route("/v1/bundles/{bundle}/signatures", post(sign))
        .route("/v1/bundle-imports", post(import))
        .route("/v1/bundles/{bundle}", get(|| async { ok(bundle()) }).delete(|| async { StatusCode::NO_CONTENT }))
        .route("/v1/vms/{vm}/console", get(|| async { "line one\nline two\n" }).post(console))
        .route("/v1/sessions", get(|| async { ok(json!({"sessions": [session()]})) }).post(create_session))
        .route("/v1/sessions/{session}", get(|| async { ok(session()) }).delete(remove_session))
        .route("/v1/images", get(|| async { ok(json!({"images": [image()]})) }).post(|| async { ok(image()) }))
        .route("/v1/images/{image}", get(|| async { ok(image()) }).delete(|| async { StatusCode::NO_CONTENT }))
        .route("/v1/operations", get(|| async { ok(json!({"operations": [operation("running")]})) }))
        .route("/v1/operations/{operation}", get(look))
        .route("/v1/events", get(events))
        .route("/v1/host", get(|| async { ok(host()) }))
        .fallback(|| async { (StatusCode::NOT_FOUND, "not here") })
        .layer(axum::middleware::from_fn_with_state(shared.clone(), note))
        .with_state(shared)
}

fn stats() -> Value {
    let flow = json!({"packets": 3, "bytes": 1536, "dropped": 0, "throttled": 1});
    let interface = json!({"slot": 0, "link_up": false, "rx": flow, "tx": flow});
    json!({"id": VM, "vmm": vmm(), "network": [interface], "guest": null})
}

/// Two seconds later with each look. `web` uses the same all the time, `late` comes with the second look, and `restless`
/// is in another process each time.
async fn usage(State(shared): State<Shared>) -> Response {
    let look = {
        let mut notes = shared.notes.lock().expect("notes");
        notes.usages += 1;
        notes.usages
    };
    let vm = |id: &str, name: &str, pid: u32, count: u32| {
        json!({
            "id": id, "name": name, "state": "running", "vcpus": 1, "memory_mib": 128, "a_field_of_a_later_version": 1,
            "process": {"pid": pid, "cpu_ms": count * 500, "resident_bytes": 64 << 20, "swapped_bytes": 0,
                        "faults": count * 100, "major_faults": 0},
            "network": {"rx_bytes": count * 2048, "tx_bytes": 0, "rx_packets": count, "tx_packets": 0},
        })
    };
    let mut vms = vec![vm(VM, "web", 10, look), vm("vm-baaaaaaaaaaaaaaa", "restless", 10 + look, 1000 / look)];
    if look > 1 {
        vms.push(vm("vm-caaaaaaaaaaaaaaa", "late", 11, look));
    }
    ok(json!({"at_ms": f64::from(look) * 2000.0, "vms": vms}))
}

async fn note(State(shared): State<Shared>, request: Request, next: axum::middleware::Next) -> Response {
    let call = format!("{} {}", request.method(), request.uri());
    if let Some(key) = request.headers().get("idempotency-key") {
        shared.notes.lock().expect("notes").keys.push(key.to_str().expect("a key").to_owned());
    }
    shared.notes.lock().expect("notes").calls.push(call);
    next.run(request).await
}

fn ok(value: Value) -> Response {
    axum::Json(value).into_response()
}

pub(crate) fn refusal(status: StatusCode, code: &str) -> Response {
    let error = ErrorDetail {
        code: code.to_owned(),
        message: format!("this is refused: {code}"),
        detail: Some("do it differently".to_owned()),
        retry: RetryHint::WithChange,
    };
    (status, axum::Json(ErrorBody { error })).into_response()
}

fn vm(state: &str) -> Value {
    json!({
        "id": VM, "name": "web", "state": state, "cause": null, "image": "demo", "bundle_id": null,
        "session_network_id": null, "addresses": [], "generation": "0".repeat(32), "host": "h", "vcpus": 1,
        "memory_mib": 128, "disks": [], "created_at": "2026-01-02T03:04:05Z", "pid": std::process::id(),
        "operation_id": OPERATION, "last_console_lines": [], "a_field_of_a_later_version": 1,
        "timings": {"spawn_ms": 2.0, "load_ms": 30.0, "first_entry_ms": 1.0, "kernel_ms": 9000.0, "init_ms": 500.0,
                    "total_ms": 9533.0},
    })
}

fn vmm() -> Value {
    json!({"pid": std::process::id(), "memory_bytes": 4096, "guest_memory_host_address": 4096, "stray_accesses": 0,
           "console_bytes": 100, "resident_bytes": 1, "cpu_ms": 1.5})
}

fn image() -> Value {
    json!({"name": "demo", "digest": "0".repeat(64), "kernel_bytes": 1, "initrd_bytes": null, "command_line": "quiet",
           "memory_mib_min": 64, "container": {"source": "/r.tar", "manifest": null, "layers": 1, "like": "demo",
           "devices_left_out": 2, "attributes_left_out": 0, "program": {"arguments": ["/run"], "environment": [],
           "directory": "/", "user": ""}}, "created_at": "2026-01-02T03:04:05Z"})
}

pub(crate) fn bundle() -> Value {
    json!({"id": BUNDLE, "name": null, "image": "demo", "vcpus": 1, "memory_mib": 128, "interfaces": 1, "disks": 0,
           "disk_bytes": 5 << 20, "parent": null, "vms": 0, "recipe": "build", "warmup": null, "ready_marker": null,
           "source_vm": null, "manifest_digest": "00".repeat(32), "signed_by": [], "trust": "untrusted", "created_at": "2026-01-02T03:04:05Z",
           "built_on": {"name": "h", "provider": "kvm", "kernel_release": "6.1", "tsc_khz": 1, "kernel_mode_emulated": false}})
}

/// A file of a bundle; that of `broken` stops before its end.
async fn export(Of(bundle): Of<String>) -> Response {
    let mut pieces = vec![Ok(Bytes::from(vec![7; 100_000])), Ok(Bytes::from_static(b"end"))];
    if bundle == "broken" {
        pieces.push(Err(std::io::Error::other("damaged")));
    }
    // What was written so far is on its way before the next piece is asked for.
    let pieces = futures_util::StreamExt::then(futures_util::stream::iter(pieces), |piece| async {
        tokio::task::yield_now().await;
        piece
    });
    Body::from_stream(pieces).into_response()
}

/// Takes any file but an empty one.
async fn import(State(shared): State<Shared>, body: Bytes) -> Response {
    if body.is_empty() {
        let detail = ErrorDetail {
            code: "import_truncated".to_owned(),
            message: "it ends after 0 bytes, before its end".to_owned(),
            detail: None,
            retry: RetryHint::WithChange,
        };
        return (StatusCode::UNPROCESSABLE_ENTITY, axum::Json(ErrorBody { error: detail })).into_response();
    }
    shared.notes.lock().expect("notes").input.extend_from_slice(&body);
    ok(json!({"bundle": bundle(), "existed": true, "parents": []}))
}

async fn sign(State(shared): State<Shared>, axum::Json(body): axum::Json<Value>) -> Response {
    shared.notes.lock().expect("notes").bodies.push(body);
    ok(bundle())
}

/// The operation of a build: it makes a bundle.
async fn build(State(shared): State<Shared>, axum::Json(body): axum::Json<Value>) -> Response {
    shared.notes.lock().expect("notes").bodies.push(body);
    (StatusCode::ACCEPTED, ok(operation("running"))).into_response()
}

async fn snapshot(State(shared): State<Shared>, axum::Json(body): axum::Json<Value>) -> Response {
    let (diff, live) = (body["diff"] == true, body["live"] == true);
    shared.notes.lock().expect("notes").bodies.push(body);
    if shared.fate == Fate::HangsSnapshots {
        std::future::pending::<()>().await;
    }
    let mut operation = operation("succeeded");
    operation["bundle_id"] = json!(BUNDLE);
    operation["pause_ms"] = json!(match (diff, live) {
        (_, true) => 9.0,
        (true, false) => 20.0,
        (false, false) => 900.0,
    });
    operation["memory_bytes"] = json!(if diff { 1 << 20 } else { 64 << 20 });
    operation["quiesced"] = json!(diff || live);
    ok(operation)
}

fn session() -> Value {
    let drops = json!({"spoof": 7, "foreign_session": 2, "not_allowed": 1, "queue_full": 4});
    json!({"id": SESSION, "name": "etl", "session_network_id": 517, "state": "active", "ipv4": true,
           "egress": {"nat": true, "allow": [{"cidr": "0.0.0.0/0", "protocol": "tcp", "ports": [443, 443]}]},
           "created_at": "2026-01-02T03:04:05Z", "expires_at": null, "drops": drops,
           "members": [{"id": VM, "name": "web", "state": "running", "drops": drops,
                        "addresses": ["fd3c:91aa:7e2:3:0:205:0:5", "10.3.129.69"]}]})
}

async fn create_session(State(shared): State<Shared>, axum::Json(body): axum::Json<Value>) -> Response {
    shared.notes.lock().expect("notes").bodies.push(body);
    (StatusCode::CREATED, ok(session())).into_response()
}

async fn remove_session(Of(name): Of<String>) -> Response {
    if name == "used" {
        return refusal(StatusCode::CONFLICT, "session_in_use");
    }
    StatusCode::NO_CONTENT.into_response()
}

fn operation(state: &str) -> Value {
    let step = |name: &str, state: &str, took: Option<f64>| json!({"name": name, "state": state, "took_ms": took});
    json!({"id": OPERATION, "kind": "vm_launch", "object": VM, "state": state, "error": null,
           "steps": [step("spawn_vmm", "done", Some(2.0)), step("boot_guest", "running", None)],
           "created_at": "2026-01-02T03:04:05Z", "finished_at": null})
}

fn host() -> Value {
    json!({"name": "h", "version": "0.1.0", "agent_pid": std::process::id(), "started_at": "2026-01-02T03:04:05Z",
           "state_dir": "/s", "cpus": 2, "memory_bytes": 1 << 30, "memory_available_bytes": 1 << 20,
           "vms": {"alive": 1, "changing": 0, "failed": 0, "total": 1}, "probe": null,
           "fabric": {"ipv6_prefix": "fd3c:91aa:7e2::/48", "host_number": 3, "ipv6_subnet": "fd3c:91aa:7e2:3::/64",
                      "ipv4": null, "mtu": 1430, "underlay": "vxlan", "vxlan_id": 5, "vxlan_port": 4789,
                      "quarantine_s": 120, "conflicts": ["host number 3 is used by 192.0.2.9 as well"],
                      "peers": [{"name": "b", "address": "192.0.2.2", "host_number": 4}]}})
}

async fn launch(State(shared): State<Shared>, axum::Json(body): axum::Json<Value>) -> Response {
    let wait = body["wait"] == "running";
    let image = body["image"].clone();
    shared.notes.lock().expect("notes").bodies.push(body);
    if image == "nowhere" {
        return refusal(StatusCode::NOT_FOUND, "unknown_image");
    }
    if wait && shared.fate == Fate::Hangs {
        std::future::pending::<()>().await;
    }
    if wait { (StatusCode::CREATED, ok(vm("running"))).into_response() } else { ok(vm("launching")) }
}

async fn show(State(shared): State<Shared>, Of(name): Of<String>) -> Response {
    if name == "nobody" {
        return refusal(StatusCode::NOT_FOUND, "unknown_vm");
    }
    if shared.fate == Fate::Panics {
        let mut vm = vm("failed");
        vm["cause"] = json!({"code": "guest_panic", "detail": "the guest's kernel panicked"});
        vm["last_console_lines"] = json!(["Kernel panic - not syncing", "\u{1b}[2Jescape"]);
        return ok(vm);
    }
    ok(vm("running"))
}

async fn look(State(shared): State<Shared>) -> Response {
    let looks = {
        let mut notes = shared.notes.lock().expect("notes");
        notes.looks += 1;
        notes.looks
    };
    if shared.fate == Fate::Hangs || looks < 3 {
        return ok(operation("running"));
    }
    if matches!(shared.fate, Fate::Runs | Fate::HangsSnapshots) {
        let mut operation = operation("succeeded");
        operation["bundle_id"] = json!(BUNDLE);
        return ok(operation);
    }
    let mut operation = operation("failed");
    operation["error"] =
        json!({"code": "guest_panic", "message": "the guest's kernel panicked", "detail": null, "retry": "never"});
    ok(operation)
}

async fn events(request: Request) -> Response {
    let event = |seq: u64| {
        let event = json!({"seq": seq, "at": "2026-01-02T03:04:05Z", "kind": "vm_state", "object": VM, "detail": {}});
        Ok::<_, Infallible>(Bytes::from(format!("{event}\n")))
    };
    let first = futures_util::stream::iter([event(1), event(2)]);
    if !request.uri().query().unwrap_or_default().contains("follow=true") {
        return Body::from_stream(first).into_response();
    }
    let endless = futures_util::stream::unfold(3, move |seq| async move {
        tokio::time::sleep(Duration::from_millis(20)).await;
        Some((event(seq), seq + 1))
    });
    Body::from_stream(futures_util::StreamExt::chain(first, endless)).into_response()
}

async fn exec(State(shared): State<Shared>, Of(name): Of<String>, mut request: Request) -> Response {
    if name == "nobody" {
        return refusal(StatusCode::NOT_FOUND, "unknown_vm");
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let body = axum::body::to_bytes(request.into_body(), 1 << 20).await.expect("a body");
    let request: ExecRequest = serde_json::from_slice(&body).expect("an exec request");
    tokio::spawn(async move {
        let link = Link { io: TokioIo::new(upgrade.await.expect("an upgrade")), buffer: BytesMut::new(), shared };
        link.command(request).await;
    });
    switching()
}

async fn console(State(shared): State<Shared>, mut request: Request) -> Response {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut link = Link { io: TokioIo::new(upgrade.await.expect("an upgrade")), buffer: BytesMut::new(), shared };
        link.say("login: ").await;
        link.cat().await;
    });
    switching()
}

fn switching() -> Response {
    let headers = [("connection", "upgrade"), ("upgrade", UPGRADE_PROTOCOL)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

/// The agent's side of a stream.
struct Link {
    io: TokioIo<Upgraded>,
    buffer: BytesMut,
    shared: Shared,
}

impl Link {
    /// Does what the command's name says.
    async fn command(mut self, request: ExecRequest) {
        let argument = request.argv.get(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        match request.argv[0].as_str() {
            "true" => self.send(Frame::Exit(Exit::Code(0))).await,
            "exit" => self.send(Frame::Exit(Exit::Code(argument))).await,
            "die" => self.send(Frame::Exit(Exit::Signal(argument))).await,
            "late" => self.send(Frame::Exit(Exit::TimedOut)).await,
            "request" => {
                self.say(&serde_json::to_string(&request).expect("JSON")).await;
                self.send(Frame::Exit(Exit::Code(0))).await;
            }
            "both" => {
                self.say("to stdout").await;
                self.send(Frame::Stderr(Bytes::from_static(b"to stderr"))).await;
                self.send(Frame::Exit(Exit::Code(3))).await;
            }
            "cat" => {
                self.cat().await;
                self.send(Frame::Exit(Exit::Code(0))).await;
            }
            "flood" => self.flood().await,
            "hang" => self.hang().await,
            "mute" => std::future::pending().await,
            "refuse" => {
                let error = ErrorDetail {
                    code: "guest_gone".to_owned(),
                    message: "the guest is gone".to_owned(),
                    detail: None,
                    retry: RetryHint::Never,
                };
                self.send(Frame::Error(Box::new(ErrorBody { error }))).await;
            }
            "garbage" => {
                let _ = self.io.write_all(b"HTTP/1.1 500 no\r\n").await;
            }
            // "break": hangs up without a last frame.
            _ => self.say("half a ").await,
        }
    }

    async fn send(&mut self, frame: Frame) {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes);
        let _ = self.io.write_all(&bytes).await;
        let _ = self.io.flush().await;
    }

    async fn say(&mut self, text: &str) {
        self.send(Frame::Stdout(Bytes::copy_from_slice(text.as_bytes()))).await;
    }

    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = Frame::decode(&mut self.buffer).expect("frames of the client are well-formed") {
                return Some(frame);
            }
            if self.io.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                self.shared.notes.lock().expect("notes").hung_up += 1;
                return None;
            }
        }
    }

    /// Gives input back until it ends.
    async fn cat(&mut self) {
        while let Some(frame) = self.next().await {
            match frame {
                Frame::Stdin(bytes) => {
                    self.shared.notes.lock().expect("notes").input.extend_from_slice(&bytes);
                    self.send(Frame::Stdout(bytes)).await;
                }
                Frame::StdinClosed => return,
                other @ (Frame::Stdout(_)
                | Frame::Stderr(_)
                | Frame::Resize(_)
                | Frame::Exit(_)
                | Frame::Error(_)
                | Frame::Signal(_)) => self.shared.notes.lock().expect("notes").frames.push(other),
            }
        }
    }

    /// Says when it begins, and ends with 7 after a signal.
    async fn hang(&mut self) {
        self.say("begun").await;
        while let Some(frame) = self.next().await {
            let is_signal = matches!(frame, Frame::Signal(_));
            self.shared.notes.lock().expect("notes").frames.push(frame);
            if is_signal {
                self.send(Frame::Exit(Exit::Code(7))).await;
                return;
            }
        }
    }

    /// Writes as fast as it is read, until the client hangs up.
    async fn flood(&mut self) {
        let mut bytes = BytesMut::new();
        Frame::Stdout(Bytes::from(vec![b'x'; 64 * 1024])).encode(&mut bytes);
        while self.io.write_all(&bytes).await.is_ok() {
            self.shared.notes.lock().expect("notes").flooded += bytes.len();
        }
        self.shared.notes.lock().expect("notes").hung_up += 1;
    }
}
