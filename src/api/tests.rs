//! The API over a simulated host, in real time, on a real socket.

mod balloon;
mod bundles;
mod clusters;
mod fetches;
mod limits;
mod sessions;
mod trust;

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::http;
use super::routes::router;
use super::stream::{Exit, Frame};
use crate::agent::config::{Overrides, load};
use crate::agent::{Agent, Door};
use crate::sim::{Faults, SimHost};

#[test]
fn the_document_is_as_in_the_golden_file() {
    let document: Value = serde_json::from_str(&super::document()).unwrap();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            for (status, response) in operation["responses"].as_object().unwrap() {
                let described = response["description"].as_str().is_some_and(|text| !text.is_empty());
                assert!(described, "{method} {path}: {status} has no description, which OpenAPI demands");
            }
        }
    }
    crate::agent::golden::check("openapi.json", &super::document());
}

/// A served agent.
struct Api {
    host: SimHost,
    agent: Arc<dyn Door>,
    dir: tempfile::TempDir,
    _end: watch::Sender<bool>,
}

impl Api {
    async fn start() -> Self {
        Self::configured("").await
    }

    /// With a configuration of this text.
    async fn configured(text: &str) -> Self {
        Self::bounded(text, |bounds| bounds).await
    }

    /// With other bounds of connections than agents have.
    async fn bounded(text: &str, bounds: impl FnOnce(http::Bounds) -> http::Bounds) -> Self {
        let host = SimHost::new(1);
        host.set_boot(Duration::from_millis(20));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        let config = load(Overrides { config: Some(file.path().into()), ..Overrides::default() }).unwrap();
        let bounds = bounds(http::Bounds::of(&config.limits));
        let agent: Arc<dyn Door> = Arc::new(Agent::start(host.begin_life(Faults::default()), config).await.unwrap());
        let dir = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(dir.path().join("api.sock")).unwrap();
        let (end, ending) = watch::channel(false);
        let connections = agent.connections();
        let service = http::Service { router: router(Arc::clone(&agent), "here"), bounds, connections };
        tokio::spawn(http::serve(listener, service, ending));
        Self { host, agent, dir, _end: end }
    }

    async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("api.sock")).await.unwrap()
    }

    /// Sends a request as it is and reads the answer to the end of the connection.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect().await;
        // A server that refuses before it has read all may close while this writes.
        let _ = stream.write_all(request).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn ask(&self, method: &str, path: &str, more: &[&str], body: &str) -> (u16, Value) {
        let more: String = more.iter().map(|line| format!("{line}\r\n")).collect();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: {length}\r\n");
        let answer = self.raw(format!("{head}{more}\r\n{body}").as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let value = serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()));
        (status, value)
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.ask("GET", path, &[], "").await
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        self.ask("POST", path, &["content-type: application/json"], &body.to_string()).await
    }

    async fn launch(&self, name: &str) -> Value {
        let (status, vm) = self.post("/v1/vms", &json!({ "name": name, "wait": "running" })).await;
        assert_eq!(status, 201, "{vm}");
        vm
    }

    /// Upgrades; the connection, or the status and body that said no.
    async fn upgrade(&self, path: &str, body: &str) -> UnixStream {
        let mut stream = self.connect().await;
        let length = body.len();
        let head = format!("POST {path} HTTP/1.1\r\nhost: h\r\nconnection: Upgrade\r\nupgrade: hearth-stream/1\r\n");
        let rest = format!("content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(format!("{head}{rest}").as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        stream
    }
}

fn code(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["error"]["code"].as_str().unwrap_or_default())
}

async fn frame(stream: &mut UnixStream, buffer: &mut BytesMut) -> Option<Frame> {
    loop {
        if let Some(frame) = Frame::decode(buffer).unwrap() {
            return Some(frame);
        }
        if stream.read_buf(buffer).await.unwrap() == 0 {
            return None;
        }
    }
}

async fn send(stream: &mut UnixStream, frame: Frame) {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    stream.write_all(&bytes).await.unwrap();
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..500 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 5 s: {what}");
}

#[tokio::test]
async fn a_vm_is_launched_used_and_removed() {
    let api = Api::start().await;
    let vm = api.launch("web").await;
    let id = vm["id"].as_str().unwrap();
    assert_eq!((vm["state"].as_str(), vm["name"].as_str()), (Some("running"), Some("web")));
    assert!(vm["timings"]["total_ms"].as_f64().unwrap() > 10.0);
    for word in [id, "web", &id[..8], &id[3..8]] {
        assert_eq!(api.get(&format!("/v1/vms/{word}")).await.1["id"], id, "{word}");
    }
    let run = json!({ "argv": ["echo", "a", "b"] });
    let (status, result) = api.post("/v1/vms/web/exec", &run).await;
    assert_eq!((status, &result["exit_code"], &result["stdout"]["text"]), (200, &json!(0), &json!("a b\n")));
    let absent = api.post("/v1/vms/web/exec", &json!({ "argv": ["absent"] })).await;
    assert_eq!(code(&absent), (422, "program_not_found"));
    assert_eq!(api.post("/v1/vms/web/pause", &json!({})).await.1["state"], "paused");
    assert_eq!(code(&api.post("/v1/vms/web/exec", &run).await), (409, "illegal_state"));
    assert_eq!(api.ask("POST", "/v1/vms/web/resume", &[], "").await.1["state"], "running");
    let (status, stats) = api.get("/v1/vms/web/stats").await;
    assert_eq!((status, stats["vmm"]["console_bytes"].as_u64()), (200, Some(10)));
    assert_eq!(api.post("/v1/vms/web/stop", &json!({ "timeout_ms": 0 })).await.1["state"], "stopped");
    assert_eq!(code(&api.post("/v1/vms/web/pause", &json!({})).await), (409, "illegal_state"));
    assert_eq!(api.ask("DELETE", "/v1/vms/web", &[], "").await.0, 204);
    assert_eq!(code(&api.get("/v1/vms/web").await), (404, "not_found"));
    assert_eq!(api.get("/v1/vms").await.1, json!({ "vms": [] }));
    assert!(api.host.living().is_empty());
}

#[tokio::test]
async fn bad_requests_are_told_what_is_wrong() {
    let api = Api::start().await;
    let typed = ["content-type: application/json"];
    let long = format!("{{\"name\":\"{}\"}}", "x".repeat(super::body::BODY_BYTES_MAX));
    let cases = [
        ("POST", "/v1/vms", &typed[..], r#"{"colour":"red"}"#, (400, "unknown_field")),
        ("POST", "/v1/vms", &typed[..], "{", (400, "bad_json")),
        ("POST", "/v1/vms", &typed[..], "", (400, "bad_json")),
        ("POST", "/v1/vms", &typed[..], r#"{"vcpus":"two"}"#, (400, "invalid_value")),
        ("POST", "/v1/vms", &typed[..], r#"{"vcpus":0}"#, (400, "invalid_vcpus")),
        ("POST", "/v1/vms", &typed[..], r#"{"vcpus":1000}"#, (400, "invalid_vcpus")),
        ("POST", "/v1/vms", &typed[..], r#"{"memory_mib":4}"#, (400, "memory_too_small")),
        ("POST", "/v1/vms", &typed[..], r#"{"memory_mib":99999999}"#, (409, "insufficient_memory")),
        // What the host has, but has not free.
        ("POST", "/v1/vms", &typed[..], r#"{"memory_mib":65500}"#, (503, "insufficient_memory")),
        ("POST", "/v1/vms", &typed[..], r#"{"image":"absent"}"#, (422, "unknown_image")),
        ("POST", "/v1/vms", &typed[..], r#"{"name":"Not A Name"}"#, (400, "invalid_name")),
        ("POST", "/v1/vms", &typed[..], r#"{"disks":[{"path":"relative"}]}"#, (400, "invalid_disk")),
        ("POST", "/v1/vms", &typed[..], r#"{"disks":[{"path":"/absent"}]}"#, (422, "bad_disk")),
        ("POST", "/v1/vms", &typed[..], &long, (413, "body_too_large")),
        ("POST", "/v1/vms", &["content-type: text/plain"], "{}", (415, "unsupported_media_type")),
        ("POST", "/v1/vms", &[], "{}", (415, "unsupported_media_type")),
        ("PATCH", "/v1/vms", &[], "", (405, "method_not_allowed")),
        ("GET", "/v1/nowhere", &[], "", (404, "not_found")),
        ("GET", "/v1/vms/vm-aaaaaaaaaaaaaaaa", &[], "", (404, "not_found")),
        ("GET", "/v1/vms/vm-", &[], "", (404, "not_found")),
        ("GET", "/v1/operations/op-a", &[], "", (404, "not_found")),
        ("GET", "/v1/events?since=x", &[], "", (400, "invalid_query")),
        ("GET", "/v1/events?until=1", &[], "", (400, "unknown_field")),
        ("POST", "/v1/vms/x/console", &[], "", (426, "upgrade_required")),
        ("POST", "/v1/vms/x/exec", &["connection: upgrade", "upgrade: websocket"], "", (400, "unknown_upgrade")),
    ];
    for (method, path, more, body, wanted) in cases {
        let answer = api.ask(method, path, more, body).await;
        let shown = &body[..body.len().min(60)];
        assert_eq!(code(&answer), wanted, "{method} {path} {shown}: {}", answer.1);
        assert!(answer.1["error"]["message"].is_string() && answer.1["error"]["retry"].is_string());
    }
    let garbage = api.raw(b"\x00\x01\x02 nonsense\r\n\r\n").await;
    assert!(garbage.is_empty() || garbage.starts_with("HTTP/1.1 400"), "{garbage}");
    let head = format!("GET /v1/vms HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", "y".repeat(64 * 1024));
    let large = api.raw(head.as_bytes()).await;
    assert!(large.starts_with("HTTP/1.1 431"), "{}", &large[..large.len().min(80)]);
    assert_eq!(api.get("/v1/vms").await.1, json!({ "vms": [] }), "nothing came of it");
}

#[tokio::test]
async fn a_repeated_create_is_the_same_create() {
    let api = Api::start().await;
    let more = ["content-type: application/json", "idempotency-key: one"];
    let body = r#"{"name":"web","wait":"running"}"#;
    let first = api.ask("POST", "/v1/vms", &more, body).await;
    assert_eq!(first.0, 201);
    assert_eq!(api.post("/v1/vms/web/stop", &json!({})).await.0, 200);
    assert_eq!(api.ask("POST", "/v1/vms", &more, body).await, first, "as it was answered then");
    let other = api.ask("POST", "/v1/vms", &more, r#"{"name":"other"}"#).await;
    assert_eq!(code(&other), (409, "idempotency_mismatch"));
    assert_eq!(code(&api.post("/v1/vms", &json!({ "name": "web" })).await), (409, "name_taken"));
    let long = format!("idempotency-key: {}", "k".repeat(super::body::KEY_BYTES_MAX + 1));
    let long = api.ask("POST", "/v1/vms", &["content-type: application/json", &long], body).await;
    assert_eq!(code(&long), (400, "invalid_key"));
    assert_eq!(api.get("/v1/vms").await.1["vms"].as_array().unwrap().len(), 1);
    let at_once = ["content-type: application/json", "idempotency-key: two"];
    let body = r#"{"name":"twin","wait":"running"}"#;
    let (a, b) = tokio::join!(api.ask("POST", "/v1/vms", &at_once, body), api.ask("POST", "/v1/vms", &at_once, body));
    assert_eq!((a.0, &a.1["id"]), (b.0, &b.1["id"]));
}

#[tokio::test]
async fn events_are_in_order_and_followed() {
    let api = Api::start().await;
    let mut follower = api.connect().await;
    follower.write_all(b"GET /v1/events?follow=true HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    let vm = api.launch("web").await;
    assert_eq!(api.ask("DELETE", "/v1/vms/web?timeout_ms=0", &[], "").await.0, 204);
    let text = api.get("/v1/events").await.1;
    // Between them are the sizes of chunks.
    let lines = text.as_str().unwrap().lines().filter(|line| line.starts_with('{'));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<u64> = lines.iter().map(|event| event["seq"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=u64::try_from(lines.len()).unwrap()).collect::<Vec<_>>());
    let of_vm = |event: &&Value| event["object"] == vm["id"] && event["kind"] == "vm_state";
    let states: Vec<&str> =
        lines.iter().filter(of_vm).map(|event| event["detail"]["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["launching", "running", "stopping", "stopped", "gone"]);
    let mut seen = String::new();
    let mut chunk = [0; 4096];
    while !seen.contains("vm_removed") {
        let count = follower.read(&mut chunk).await.unwrap();
        assert!(count > 0, "{seen}");
        seen.push_str(&String::from_utf8_lossy(&chunk[..count]));
    }
    let metrics = api.get("/metrics").await.1;
    assert!(metrics.as_str().unwrap().contains("hearth_operations_total{goal=\"launch\",result=\"succeeded\"} 1"));
}

#[tokio::test]
async fn a_program_is_spoken_to_by_frames() {
    let api = Api::start().await;
    api.launch("web").await;
    let mut stream = api.upgrade("/v1/vms/web/exec", r#"{"argv":["cat"]}"#).await;
    let mut buffer = BytesMut::new();
    let sent = vec![7; 200_000];
    send(&mut stream, Frame::Stdin(sent.clone().into())).await;
    send(&mut stream, Frame::StdinClosed).await;
    let mut got = Vec::new();
    let last = loop {
        let next = frame(&mut stream, &mut buffer).await.unwrap();
        let Frame::Stdout(bytes) = next else { break next };
        got.extend_from_slice(&bytes);
    };
    assert_eq!(last, Frame::Exit(Exit::Code(0)));
    assert!(got == sent);
    assert_eq!(frame(&mut stream, &mut buffer).await, None);
    until("the stream to the guest ends", || api.host.guest_streams() == 0).await;
}

#[tokio::test]
async fn a_client_that_hangs_up_ends_its_program() {
    let api = Api::start().await;
    api.launch("web").await;
    until("launched", || api.host.guest_streams() == 0).await;
    let idle = api.upgrade("/v1/vms/web/exec", r#"{"argv":["cat"]}"#).await;
    until("it runs", || api.host.guest_streams() == 1).await;
    drop(idle);
    until("an idle one ends", || api.host.guest_streams() == 0).await;
    // Its output is not read, so its input is not either; then it goes.
    let mut stuck = api.upgrade("/v1/vms/web/exec", r#"{"argv":["cat"]}"#).await;
    let mut bytes = BytesMut::new();
    Frame::Stdin(vec![7; 8 << 20].into()).encode(&mut bytes);
    let flooded = tokio::time::timeout(Duration::from_millis(300), stuck.write_all(&bytes)).await;
    assert!(flooded.is_err(), "8 MiB do not fit into what lies between");
    drop(stuck);
    until("a stuck one ends", || api.host.guest_streams() == 0).await;
    // Without an upgrade it is the same.
    let mut plain = api.connect().await;
    let head = "POST /v1/vms/web/exec HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\n";
    let body = r#"{"argv":["never"]}"#;
    plain.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await.unwrap();
    until("it runs", || api.host.guest_streams() == 1).await;
    drop(plain);
    until("a plain one ends", || api.host.guest_streams() == 0).await;
}

#[tokio::test]
async fn a_console_is_attached_to() {
    let api = Api::start().await;
    api.launch("web").await;
    let mut buffer = BytesMut::new();
    let mut stream = api.upgrade("/v1/vms/web/console?history_bytes=4", "").await;
    let mut seen = Vec::new();
    send(&mut stream, Frame::Stdin(b"typed"[..].into())).await;
    while !seen.ends_with(b"typed") {
        let Some(Frame::Stdout(bytes)) = frame(&mut stream, &mut buffer).await else { panic!("{seen:?}") };
        seen.extend_from_slice(&bytes);
    }
    assert_eq!(seen, b"ted\ntyped");
    let (status, history) = api.get("/v1/vms/web/console?history_bytes=4").await;
    assert_eq!((status, history.as_str()), (200, Some("ted\n")));
}

#[tokio::test]
async fn network_limits_are_kept_and_what_passed_is_shown() {
    let api = Api::start().await;
    let limits = json!({"rx": {"bytes_per_s": 10_000_000}, "tx": {"packets_per_s": 100, "burst_packets": 7}});
    let body = json!({"name": "slow", "wait": "running", "network_limits": limits});
    let (status, vm) = api.post("/v1/vms", &body).await;
    assert_eq!(status, 201, "{vm}");
    let nothing = json!(null);
    assert_eq!(
        vm["network_limits"],
        json!({
            "rx": {"bytes_per_s": 10_000_000, "burst_bytes": 1_000_000, "packets_per_s": nothing, "burst_packets": nothing},
            "tx": {"bytes_per_s": nothing, "burst_bytes": nothing, "packets_per_s": 100, "burst_packets": 7},
        })
    );
    for (limits, word) in [
        (json!({"rx": {"bytes_per_s": 0}}), "rx.bytes_per_s 0"),
        (json!({"tx": {"packets_per_s": u64::MAX}}), "tx.packets_per_s"),
        (json!({"tx": {"burst_bytes": 5000}}), "tx.burst_bytes"),
        (json!({"rx": {"bytes_per_s": 5000, "burst_bytes": 1}}), "rx.burst_bytes 1: 1514 to"),
    ] {
        let (status, refused) = api.post("/v1/vms", &json!({"network_limits": limits})).await;
        assert_eq!((status, &refused["error"]["code"]), (400, &json!("invalid_network_limits")), "{refused}");
        assert!(refused["error"]["message"].as_str().unwrap().contains(word), "{refused}");
    }
    let (status, _) = api.post("/v1/vms", &json!({"network_limits": {"sideways": {}}})).await;
    assert!((400..500).contains(&status), "{status}");
    let (_, stats) = api.get("/v1/vms/slow/stats").await;
    let flow = json!({"packets": 0, "bytes": 0, "dropped": 0, "throttled": 0});
    assert_eq!(stats["network"], json!([{"slot": 0, "link_up": true, "rx": flow, "tx": flow}]));
}

/// The first reader of the metrics finds no sample and is not kept waiting for one; a later one finds it, until the VM
/// is gone.
#[tokio::test]
async fn usage_is_of_all_vms_and_asks_no_guest() {
    let api = Api::start().await;
    let web = api.launch("web").await;
    api.launch("idle").await;
    assert_eq!(api.post("/v1/vms/idle/stop", &json!({})).await.0, 200);
    let (status, first) = api.get("/v1/usage").await;
    assert_eq!(status, 200, "{first}");
    let [of_web, of_idle] = first["vms"].as_array().unwrap().as_slice() else { panic!("two VMs: {first}") };
    assert_eq!((&of_web["id"], &of_web["name"], &of_web["state"]), (&web["id"], &json!("web"), &json!("running")));
    assert_eq!((&of_web["process"]["pid"], &of_web["network"]["rx_bytes"]), (&web["pid"], &json!(0)));
    assert_eq!((&of_idle["state"], &of_idle["process"]), (&json!("stopped"), &Value::Null));
    assert_eq!(of_idle["network"], Value::Null);
    let (_, second) = api.get("/v1/usage").await;
    assert!(second["at_ms"].as_f64().unwrap() > first["at_ms"].as_f64().unwrap(), "{second}");
}

#[tokio::test]
async fn metrics_show_the_traffic_of_living_vms() {
    let api = Api::start().await;
    let id = api.launch("web").await["id"].as_str().unwrap().to_owned();
    let shown = async || {
        let (status, text) = api.get("/metrics").await;
        assert_eq!(status, 200);
        let line = format!("hearth_vm_network_bytes_total{{vm=\"{id}\",interface=\"0\",direction=\"rx\"}} 0\n");
        text.as_str().unwrap().contains(&line)
    };
    assert!(!shown().await);
    let later = async { while !shown().await {} };
    tokio::time::timeout(Duration::from_secs(10), later).await.expect("a sample");
    let (status, _) = api.ask("DELETE", "/v1/vms/web?timeout_ms=0", &[], "").await;
    assert_eq!(status, 204);
    assert!(!shown().await);
}
