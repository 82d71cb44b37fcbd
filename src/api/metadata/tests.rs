//! The metadata service over a simulated host, at real sockets of this machine.

use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::agent::config::Config;
use crate::agent::{ClusterCreated, ClusterRequest, LaunchRequest, Launched, SessionCreated, SessionRequest, VmState};
use crate::api::fabric_fixture::{Host, config};
use crate::sim::Manners;

/// A host whose VMs' metadata services are at loopback sockets.
struct Guests {
    host: Host,
    end: watch::Sender<bool>,
}

/// One VM's way to its metadata service.
struct Guest {
    at: Vec<SocketAddr>,
    closed: watch::Sender<bool>,
}

impl Guests {
    async fn start(config: Config) -> Self {
        let host = Host::start("here", config).await;
        let (end, ending) = watch::channel(false);
        let doors = host.door.metadata().unwrap();
        // There is one service.
        assert!(host.door.metadata().is_none());
        tokio::spawn(serve(doors, Arc::clone(&host.door), "here".into(), ending));
        Self { host, end }
    }

    async fn guest(&self, vm: &VmId) -> Guest {
        let listeners = [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("[::1]:0").await.unwrap()];
        let at = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let (closed, closing) = watch::channel(false);
        let door = MetadataDoor { vm: vm.clone(), listeners: listeners.into(), closed: closing };
        self.host.agent.offer_metadata(door);
        Guest { at, closed }
    }
}

impl Guest {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.at[0]).await.unwrap()
    }

    async fn raw(&self, at: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(at).await.unwrap();
        // A server that refuses before it has read all may close while this writes.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn ask(&self, method: &str, path: &str, more: &str, body: &str) -> (u16, Value) {
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: h\r\n{more}content-length: {length}\r\n\r\n");
        let answer = self.raw(self.at[0], &format!("{head}{body}")).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned())))
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.ask("GET", path, "", "").await
    }

    async fn launch(&self, body: &Value) -> (u16, Value) {
        self.ask("POST", "/v1/self/launch", "content-type: application/json\r\n", &body.to_string()).await
    }
}

fn code(answer: &(u16, Value)) -> (u16, &str) {
    (answer.0, answer.1["error"]["code"].as_str().unwrap_or_default())
}

async fn alone() -> Guests {
    Guests::start(config(3, "", &[])).await
}

#[tokio::test]
async fn a_guest_learns_who_it_is_and_who_is_with_it() {
    let guests = alone().await;
    let request = SessionRequest {
        name: Some("etl".to_owned()),
        session_network_id: Some(517),
        user_data: Some("#!/bin/sh\n".to_owned()),
        ..SessionRequest::default()
    };
    let SessionCreated::Session(session) = guests.host.door.create_session(request).await.unwrap() else {
        panic!("there was no key")
    };
    guests.host.session(518).await;
    let (one, two) = (guests.host.vm("one", Some(517)).await, guests.host.vm("two", Some(517)).await);
    guests.host.vm("other", Some(518)).await;
    let guest = guests.guest(&one.id).await;
    let (status, own) = guest.get("/v1/self").await;
    let wanted = json!({
        "id": one.id, "name": "one", "hostname": "one", "generation": one.generation, "host": "here",
        "session": { "id": session.record.id, "name": "etl", "session_network_id": 517 },
        "cluster": null, "addresses": ["fd3c:91aa:7e2:3:0:205:0:1", "10.3.129.65"], "role": null,
    });
    assert_eq!((status, own), (200, wanted));
    let (status, members) = guest.get("/v1/self/members").await;
    let second = json!({
        "id": two.id, "name": "two", "addresses": ["fd3c:91aa:7e2:3:0:205:0:2", "10.3.129.66"],
        "host": "here", "role": null, "state": "running",
    });
    assert_eq!((status, members["members"].as_array().unwrap().len(), &members["members"][1]), (200, 2, &second));
    assert_eq!(guest.get("/v1/self/user-data").await, (200, json!("#!/bin/sh\n")));
    // The other address leads to the same VM; what a request says of itself does not.
    let lie = format!("GET /v1/self HTTP/1.1\r\nhost: {}\r\nx-forwarded-for: ::1\r\nx-hearth-vm: {0}\r\n\r\n", two.id);
    assert!(guest.raw(guest.at[1], &lie).await.contains(one.id.as_str()));
}

#[tokio::test]
async fn a_vm_without_a_session_learns_who_it_is_and_launches_nothing() {
    let guests = alone().await;
    let vm = guests.host.vm("lone", None).await;
    let guest = guests.guest(&vm.id).await;
    let (status, own) = guest.get("/v1/self").await;
    assert_eq!((status, &own["session"], &own["addresses"]), (200, &Value::Null, &json!([])));
    assert_eq!(guest.get("/v1/self/members").await, (200, json!({ "members": [] })));
    assert_eq!(code(&guest.get("/v1/self/user-data").await), (404, "no_user_data"));
    assert_eq!(code(&guest.launch(&json!({ "session_network_id": 5 })).await), (403, "no_session"));
    let events = guests.host.events("launch_denied").await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].subject.to_string(), vm.id.as_str());
    assert_eq!(events[0].body, json!({ "session_network_id": 5, "own_session_network_id": null }));
}

#[tokio::test]
async fn a_guest_launches_into_its_own_session_only() {
    let guests = alone().await;
    guests.host.session(5).await;
    guests.host.session(6).await;
    let vm = guests.host.vm("one", Some(5)).await;
    let guest = guests.guest(&vm.id).await;
    let (status, made) = guest.launch(&json!({ "session_network_id": 5, "role": "worker", "count": 2 })).await;
    assert_eq!((status, made["vms"].as_array().unwrap().len()), (202, 2), "{made}");
    assert_eq!(made["vms"][1]["addresses"], json!(["fd3c:91aa:7e2:3:0:5:0:3", "10.3.1.67"]));
    assert_eq!((&made["vms"][0]["host"], &made["vms"][0]["role"]), (&json!("here"), &json!("worker")));
    let record = guests.host.door.vm(made["vms"][0]["id"].as_str().unwrap()).unwrap();
    assert_eq!((record.spec.vcpus, record.spec.memory_mib, record.spec.image.as_str()), (1, 128, "demo"));
    let larger = json!({ "session_network_id": 5, "host": "here", "vcpus": 2, "memory_mib": 256 });
    let (status, larger) = guest.launch(&larger).await;
    assert_eq!(status, 202, "{larger}");
    let record = guests.host.door.vm(larger["vms"][0]["id"].as_str().unwrap()).unwrap();
    assert_eq!((record.spec.vcpus, record.spec.memory_mib), (2, 256));
    // Foreign, unknown and reserved ones alike; each is told, but not without end.
    for (asked, denied) in [(6, 1), (7, 2), (0, 3)] {
        assert_eq!(code(&guest.launch(&json!({ "session_network_id": asked })).await), (403, "foreign_session"));
        let events = guests.host.events("launch_denied").await;
        let body = json!({ "session_network_id": asked, "own_session_network_id": 5 });
        assert_eq!((events.len(), events.last().map(|event| &event.body)), (denied, Some(&body)));
    }
    for _ in 0..20 {
        assert_eq!(code(&guest.launch(&json!({ "session_network_id": 6 })).await), (403, "foreign_session"));
    }
    assert_eq!(guests.host.events("launch_denied").await.len(), 8);
    assert_eq!(guests.host.door.vms().len(), 4);
}

#[tokio::test]
async fn what_cannot_be_understood_or_done_is_refused() {
    let guests = alone().await;
    guests.host.session(5).await;
    let vm = guests.host.vm("one", Some(5)).await;
    let guest = guests.guest(&vm.id).await;
    for (body, wanted) in [
        (json!({}), (400, "invalid_value")),
        (json!({ "session_network_id": 5, "counts": 1 }), (400, "unknown_field")),
        (json!({ "session_network_id": "5" }), (400, "invalid_value")),
        (json!({ "session_network_id": 5, "count": 0 }), (400, "invalid_count")),
        (json!({ "session_network_id": 5, "count": 17 }), (400, "invalid_count")),
        (json!({ "session_network_id": 5, "role": "" }), (400, "invalid_role")),
        (json!({ "session_network_id": 5, "role": "x".repeat(64) }), (400, "invalid_role")),
        (json!({ "session_network_id": 5, "host": "nowhere" }), (422, "unknown_host")),
        (json!({ "session_network_id": 5, "image": "absent" }), (422, "unknown_image")),
        (json!({ "session_network_id": 5, "vcpus": 1000 }), (400, "invalid_vcpus")),
        (json!({ "session_network_id": 5, "role": "x".repeat(BODY_BYTES_MAX) }), (413, "body_too_large")),
    ] {
        assert_eq!(code(&guest.launch(&body).await), wanted, "{body}");
    }
    assert_eq!(code(&guest.ask("POST", "/v1/self/launch", "", "{}").await), (415, "unsupported_media_type"));
    assert_eq!(code(&guest.get("/v1/self/launch").await), (405, "method_not_allowed"));
    assert_eq!(code(&guest.get("/v1/vms").await), (404, "not_found"));
    let long = format!("GET /v1/self HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(HEAD_BYTES_MAX));
    assert!(guest.raw(guest.at[0], &long).await.starts_with("HTTP/1.1 431"));
    assert_eq!(guests.host.door.vms().len(), 1);
}

#[tokio::test]
async fn a_launch_that_does_not_fit_as_a_whole_leaves_nothing() {
    let mut config = config(3, "", &[]);
    config.limits.vms_max = 3;
    let guests = Guests::start(config).await;
    guests.host.session(5).await;
    let vm = guests.host.vm("one", Some(5)).await;
    let guest = guests.guest(&vm.id).await;
    assert_eq!(code(&guest.launch(&json!({ "session_network_id": 5, "count": 3 })).await), (409, "too_many_vms"));
    guests.host.until("one VM left", |host| host.door.vms().len() == 1).await;
    let (status, made) = guest.launch(&json!({ "session_network_id": 5, "count": 2 })).await;
    assert_eq!(status, 202, "{made}");
}

#[tokio::test]
async fn a_guest_that_floods_costs_others_nothing() {
    let guests = alone().await;
    let (one, two) = (guests.host.vm("one", None).await, guests.host.vm("two", None).await);
    let (flooding, other) = (guests.guest(&one.id).await, guests.guest(&two.id).await);
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS_MAX * 4 {
        idle.push(flooding.connect().await);
    }
    assert_eq!(other.get("/v1/self").await.1["id"], two.id.as_str());
    // Beyond its connections, its own requests wait until one of them ends.
    let mut waiting = flooding.connect().await;
    waiting.write_all(b"GET /v1/self HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let early = tokio::time::timeout(Duration::from_millis(200), waiting.read_to_string(&mut answer)).await;
    assert!(early.is_err(), "{answer}");
    drop(idle);
    waiting.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(one.id.as_str()), "{answer}");
}

#[tokio::test]
async fn a_guest_that_asks_too_often_is_slowed_down() {
    let guests = alone().await;
    let vm = guests.host.vm("one", None).await;
    let guest = guests.guest(&vm.id).await;
    let begun = Instant::now();
    for _ in 0..=PACE_PER_S * 2 {
        assert_eq!(guest.get("/v1/self").await.0, 200);
    }
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_slow_guest_is_cut_off() {
    let guests = alone().await;
    let vm = guests.host.vm("one", None).await;
    let guest = guests.guest(&vm.id).await;
    let head = "POST /v1/self/launch HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n";
    for beginning in ["GET /v1/self HTTP/1.1\r\n".to_owned(), format!("{head}\r\n{{")] {
        let answer = guest.raw(guest.at[0], &beginning).await;
        assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
    }
}

#[tokio::test]
async fn a_closed_network_has_no_service() {
    let guests = alone().await;
    let (one, two) = (guests.host.vm("one", None).await, guests.host.vm("two", None).await);
    let (first, second) = (guests.guest(&one.id).await, guests.guest(&two.id).await);
    assert_eq!(first.get("/v1/self").await.0, 200);
    let mut open = first.connect().await;
    first.closed.send_replace(true);
    // Its connections end with it.
    let mut byte = [0];
    assert!(matches!(open.read(&mut byte).await, Ok(0) | Err(_)));
    let is_gone = |at: SocketAddr| move |_: &Host| std::net::TcpStream::connect(at).is_err();
    guests.host.until("no service", is_gone(first.at[0])).await;
    assert_eq!(second.get("/v1/self").await.0, 200);
    // A VM that is gone is told nothing, and whoever cannot tell any more has closed it.
    guests.host.door.ask("two", crate::agent::Verb::Remove { grace: Duration::ZERO }).await.unwrap();
    assert_eq!(code(&second.get("/v1/self").await), (404, "vm_gone"));
    let at = second.at[0];
    drop(second);
    guests.host.until("no service", is_gone(at)).await;
    guests.end.send_replace(true);
}

/// A program in a guest whose agent stays silent registers it; nobody else's words do, and once is enough.
#[tokio::test]
async fn a_guest_registers_itself_and_nobody_else() {
    let guests = alone().await;
    let door = &guests.host.door;
    let request = ClusterRequest { name: Some("c".to_owned()), ..ClusterRequest::default() };
    let Ok(ClusterCreated::Cluster(cluster)) = door.create_cluster(request).await else { panic!("a cluster") };
    let member = |executor: &str| LaunchRequest {
        image: "demo".to_owned(),
        cluster: Some("c".to_owned()),
        executor_id: Some(executor.to_owned()),
        ..LaunchRequest::default()
    };
    guests.host.sim.set_manners(&[Manners::Silent]);
    let Ok(Launched::Vm(vm)) = door.launch(member("e-1")).await else { panic!("a launch") };
    guests.host.until("registering", |host| host.door.vm(vm.id.as_str()).unwrap().state == VmState::Registering).await;
    let guest = guests.guest(&vm.id).await;
    let words = json!({
        "executor_id": "e-1", "cluster_id": cluster.record.id, "generation": vm.generation,
        "token": cluster.record.token.secret(),
    });
    let register = async |guest: &Guest, body: &Value| {
        guest.ask("POST", "/v1/self/register", "content-type: application/json\r\n", &body.to_string()).await
    };
    let with = |key: &str, value: Value| {
        let mut words = words.clone();
        words[key] = value;
        words
    };
    for (wrong, wanted) in [
        (with("executor_id", json!("e-2")), (403, "wrong_executor")),
        (with("token", json!("a guess")), (403, "wrong_token")),
        (with("cluster_id", json!("c-aaaaaaaaaaaaaaaa")), (403, "wrong_cluster")),
        (with("generation", json!("0".repeat(32))), (403, "wrong_generation")),
        (with("vm_id", json!(vm.id)), (400, "unknown_field")),
    ] {
        assert_eq!(code(&register(&guest, &wrong).await), wanted);
    }
    guests.host.sim.heard_of_registration(&vm.id);
    assert_eq!(register(&guest, &words).await, (200, json!({ "epoch": 1 })));
    let vm = door.launched(vm).await.unwrap();
    assert_eq!((&vm.state, vm.registration.map(|registered| registered.epoch)), (&VmState::Running, Some(1)));
    assert_eq!(code(&register(&guest, &words).await), (409, "already_registered"));
    assert_eq!(guest.get("/v1/self").await.1["cluster"]["epoch"], 1);
    // Another guest that has come by all of its words is still another.
    let Ok(Launched::Vm(other)) = door.launch(member("e-2")).await else { panic!("a launch") };
    let other = door.launched(other).await.unwrap();
    let thief = guests.guest(&other.id).await;
    assert_eq!(code(&register(&thief, &words).await), (403, "wrong_executor"));
    let lone = guests.host.vm("lone", None).await;
    assert_eq!(code(&register(&guests.guest(&lone.id).await, &words).await), (409, "not_in_cluster"));
    let refused = guests.host.events("registration_refused").await;
    let refused: Vec<_> = refused.iter().map(|event| event.body["code"].as_str().unwrap()).collect();
    let wanted =
        ["wrong_executor", "wrong_token", "wrong_cluster", "wrong_generation", "already_registered", "wrong_executor"];
    assert_eq!(refused, wanted);
    assert_eq!(guests.host.sim.violations(), Vec::<String>::new());
}
