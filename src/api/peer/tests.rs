//! Two agents with a link of the test between them, in virtual time; then over sockets of this machine.

use std::net::SocketAddr;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

mod moving;
mod parts;

use super::*;
use crate::agent::peers::{Callee, LinkError, PeerAnswer, PeerCall, PeerKey, PeerLink, PeerSetup};
use crate::agent::{OwnError, OwnLaunch, OwnLaunched, SessionError, SessionRequest};
use crate::api::fabric_fixture::{Host, Wire, config};
use crate::api::peer_link::HttpLink;
use crate::api::peer_tls::PeerTls;

const A: &str = "2001:db8::a";
const B: &str = "2001:db8::b";
const KEY: &[u8] = &[7; 32];

/// Two hosts of one fabric, with agents that say hello.
async fn two(key_a: Option<&[u8]>, key_b: Option<&[u8]>) -> (Wire, Host, Host) {
    let wire = Wire::default();
    let a = Host::start("a", config(1, "", &[("b", B, 2)])).await;
    let b = Host::start("b", config(2, "", &[("a", A, 1)])).await;
    wire.plug(&a, A, key_a).await;
    wire.plug(&b, B, key_b).await;
    (wire, a, b)
}

async fn two_reachable() -> (Wire, Host, Host) {
    let (wire, a, b) = two(Some(KEY), Some(KEY)).await;
    a.until("b reachable", |a| a.peer_state("b") == "reachable").await;
    b.until("a reachable", |b| b.peer_state("a") == "reachable").await;
    (wire, a, b)
}

fn error(answer: &PeerAnswer) -> (u16, String) {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    (answer.status, body["error"]["code"].as_str().unwrap_or_default().to_owned())
}

async fn refuses_sessions(host: &Host) -> bool {
    let made = host.door.create_session(SessionRequest::default()).await;
    matches!(made, Err(SessionError::FabricConflict { .. }))
}

#[tokio::test(start_paused = true)]
async fn peers_that_do_not_answer_are_shown_and_refuse_nothing() {
    let (wire, a, b) = two_reachable().await;
    assert!(a.conflicts().is_empty() && b.conflicts().is_empty());
    wire.is_cut.store(true, Ordering::Relaxed);
    a.until("b unreachable", |a| a.peer_state("b") == "unreachable").await;
    let fabric = a.door.fabric().unwrap();
    assert!(fabric.peers[0].heard_ago.is_some_and(|ago| ago < Duration::from_secs(30)), "{fabric:?}");
    assert!(fabric.peers[0].state.why().is_some());
    a.session(5).await;
    wire.is_cut.store(false, Ordering::Relaxed);
    a.until("b reachable again", |a| a.peer_state("b") == "reachable").await;
    assert!(a.events("fabric_conflict").await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn two_hosts_with_one_number_both_refuse_until_one_has_another() {
    let wire = Wire::default();
    let a = Host::start("a", config(1, "", &[("b", B, 2)])).await;
    // Its administrator took the wrong number, for itself and for the other host.
    let b = Host::start("b", config(1, "", &[("a", A, 2)])).await;
    wire.plug(&a, A, Some(KEY)).await;
    wire.plug(&b, B, Some(KEY)).await;
    for host in [&a, &b] {
        host.until("a conflict", |host| !host.conflicts().is_empty()).await;
        assert!(refuses_sessions(host).await);
        let told = host.conflicts().join("; ");
        assert!(told.contains("both have fabric.host_number 1"), "{told}");
        assert!(!host.events("fabric_conflict").await.is_empty());
    }
    a.until("b in conflict", |a| a.peer_state("b") == "conflict").await;
    wire.unplug(B);
    let b = Host::start("b", config(2, "", &[("a", A, 1)])).await;
    wire.plug(&b, B, Some(KEY)).await;
    a.until("no conflict", |a| a.conflicts().is_empty()).await;
    b.until("a reachable", |b| b.peer_state("a") == "reachable").await;
    a.session(5).await;
    b.session(5).await;
    assert!(!a.events("fabric_conflict_over").await.is_empty());
    assert!(b.conflicts().is_empty());
}

#[tokio::test(start_paused = true)]
async fn another_prefix_width_or_number_is_a_conflict_on_both_sides() {
    for (number, more, told_a, told_b) in [
        (2, "ipv4 = false", "of another fabric", "of another fabric"),
        (3, "", "[[peers]] here says 2", "takes this host for number 2"),
    ] {
        let wire = Wire::default();
        let a = Host::start("a", config(1, "", &[("b", B, 2)])).await;
        let b = Host::start("b", config(number, more, &[])).await;
        wire.plug(&a, A, Some(KEY)).await;
        wire.plug(&b, B, Some(KEY)).await;
        a.until("a conflict", |a| a.conflicts().iter().any(|told| told.contains(told_a))).await;
        b.until("a conflict", |b| b.conflicts().iter().any(|told| told.contains(told_b))).await;
        assert!(refuses_sessions(&a).await && refuses_sessions(&b).await);
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_key_hosts_say_hello_and_nothing_more() {
    let (_wire, a, b) = two(None, None).await;
    a.until("b reachable", |a| a.peer_state("b") == "reachable").await;
    b.until("a reachable", |b| b.peer_state("a") == "reachable").await;
    a.session(5).await;
    let vm = a.vm("one", Some(5)).await;
    let launch = OwnLaunch { session_network_id: 5, count: 1, peer: Some("b".to_owned()), ..OwnLaunch::default() };
    let refused = a.door.launch_own(&vm.id, launch).await;
    assert!(matches!(refused, Err(OwnError::Peer(crate::agent::peers::PeerError::NoKey))), "{refused:?}");
    assert!(b.door.vms().is_empty());
}

#[tokio::test(start_paused = true)]
async fn without_a_key_a_caller_raises_a_conflict_that_fades() {
    let wire = Wire::default();
    let a = Host::start("a", config(1, "", &[])).await;
    wire.plug(&a, A, None).await;
    let hello = |number: u16| PeerCall {
        method: "POST",
        path: HELLO_PATH.to_owned(),
        body: serde_json::to_vec(&json!({
            "ipv6_prefix": "fd3c:91aa:7e2::", "ipv4_bits": [8, 10, 6], "host_number": number,
            "instance": "1", "life": "1", "name": "x", "version": "1", "peer_host_number": null,
        }))
        .unwrap(),
        head: None,
    };
    let (from, to) = (B.parse().unwrap(), A.parse().unwrap());
    assert_eq!(wire.deliver(from, to, hello(1)).await.unwrap().status, 200);
    assert_eq!(a.conflicts().len(), 1);
    // It can neither take that back nor add to it.
    assert_eq!(wire.deliver(from, to, hello(2)).await.unwrap().status, 200);
    assert_eq!(wire.deliver(from, to, hello(1)).await.unwrap().status, 200);
    assert_eq!(a.conflicts().len(), 1);
    assert_eq!(a.events("fabric_conflict").await.len(), 1);
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert!(a.conflicts().is_empty());
    assert_eq!(a.events("fabric_conflict_over").await.len(), 1);
    for nonsense in ["{}", "", "[", "null"] {
        let call = PeerCall { body: nonsense.as_bytes().to_vec(), ..hello(1) };
        assert_eq!(wire.deliver(from, to, call).await.unwrap().status, 400, "{nonsense}");
    }
}

#[tokio::test(start_paused = true)]
async fn another_key_or_none_is_ignored_and_counted() {
    for other in [None, Some(&[8; 32][..])] {
        let (_wire, a, b) = two(Some(KEY), other).await;
        // With a key of its own, B says why as well; without one, B's answers are what A refuses.
        a.until("b refused", |a| a.peer_state("b") == "refused").await;
        b.until("a refused", |b| b.peer_state("a") == "refused").await;
        assert!(a.conflicts().is_empty() && b.conflicts().is_empty());
        let reason = if other.is_some() { "peer_key_refused" } else { "peer_unsigned" };
        let counted = format!("hearth_peer_refusals_total{{reason=\"{reason}\"}}");
        let metrics = a.door.metrics().await;
        assert!(metrics.contains(&counted), "{metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_launches_members_on_another_host_and_both_see_all() {
    let (wire, a, b) = two_reachable().await;
    let request = SessionRequest {
        session_network_id: Some(517),
        user_data: Some("for all".to_owned()),
        ttl_s: Some(5000),
        ..SessionRequest::default()
    };
    a.door.create_session(request).await.unwrap();
    let first = a.vm("one", Some(517)).await;
    let launch = OwnLaunch {
        session_network_id: 517,
        role: Some("worker".to_owned()),
        count: 2,
        peer: Some("b".to_owned()),
        ..OwnLaunch::default()
    };
    let OwnLaunched::Elsewhere(made) = a.door.launch_own(&first.id, launch.clone()).await.unwrap() else {
        panic!("b was asked for")
    };
    let addresses: Vec<String> = made.iter().flat_map(|vm| &vm.addresses).map(ToString::to_string).collect();
    // Fabric, host 2, session 517, VMs 1 and 2; 10, 2, 517 * 64 + 1 and 2.
    let wanted = ["fd3c:91aa:7e2:2:0:205:0:1", "10.2.129.65", "fd3c:91aa:7e2:2:0:205:0:2", "10.2.129.66"];
    assert_eq!(addresses, wanted);
    let theirs = b.door.vm(made[0].id.as_str()).unwrap();
    assert_eq!((theirs.spec.role.as_deref(), theirs.spec.memory_mib), (Some("worker"), 128));
    assert_eq!(b.door.own_user_data(&theirs.id).await.unwrap().as_deref(), Some("for all"));
    let expires = b.door.session("517").await.unwrap().expires_at.unwrap();
    let left_s = (expires.0 - b.door.now().0) / 1_000_000_000;
    assert!((4900..=5000).contains(&left_s), "{left_s}");
    for (host, own) in [(&a, &first.id), (&b, &theirs.id)] {
        let members = host.door.own_members(own).await.unwrap();
        let hosts = members.elsewhere.iter().map(|member| member.host.as_str());
        assert_eq!(members.here.len() + members.elsewhere.len(), 3, "{members:?}");
        assert!(hosts.into_iter().all(|name| name != host.name));
    }
    // Once more, into the session that is there now; and one that no host knows.
    let more = OwnLaunch { count: 1, ..launch.clone() };
    assert!(a.door.launch_own(&first.id, more).await.is_ok());
    let nowhere = OwnLaunch { peer: Some("c".to_owned()), ..launch.clone() };
    assert!(matches!(a.door.launch_own(&first.id, nowhere).await, Err(OwnError::UnknownHost { .. })));
    // What the other host says no to is told with its words, and nothing is left of it.
    let odd = OwnLaunch { image: Some("absent".to_owned()), ..launch.clone() };
    match a.door.launch_own(&first.id, odd).await {
        Err(OwnError::Peer(crate::agent::peers::PeerError::Refused { status: 422, code, .. })) => {
            assert_eq!(code, "unknown_image");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(b.door.vms().len(), 3);
    wire.is_cut.store(true, Ordering::Relaxed);
    let cut = a.door.launch_own(&first.id, launch).await;
    assert!(matches!(cut, Err(OwnError::Peer(crate::agent::peers::PeerError::Unreachable { .. }))), "{cut:?}");
    // Members of hosts that do not answer are left out.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(a.door.own_members(&first.id).await.unwrap().elsewhere.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_launch_is_taken_once_unchanged_and_by_the_host_it_is_for() {
    let (wire, a, b) = two_reachable().await;
    a.session(5).await;
    let vm = a.vm("one", Some(5)).await;
    let launch = OwnLaunch { session_network_id: 5, count: 1, peer: Some("b".to_owned()), ..OwnLaunch::default() };
    a.door.launch_own(&vm.id, launch).await.unwrap();
    assert_eq!(b.door.vms().len(), 1);
    let sent = wire.sent.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let sent = sent.into_iter().find(|call| call.path == LAUNCH_PATH).unwrap();
    let (from_a, to_b): (IpAddr, IpAddr) = (A.parse().unwrap(), B.parse().unwrap());
    let again = wire.deliver(from_a, to_b, sent.clone()).await.unwrap();
    assert_eq!(error(&again), (403, "peer_replay".to_owned()));
    let text = String::from_utf8(sent.body.clone()).unwrap();
    let more = PeerCall { body: text.replace("\"count\":1", "\"count\":9").into_bytes(), ..sent.clone() };
    assert_ne!(more.body, sent.body);
    assert_eq!(error(&wire.deliver(from_a, to_b, more).await.unwrap()), (401, "peer_key_refused".to_owned()));
    let unsigned = PeerCall { head: None, ..sent.clone() };
    assert_eq!(error(&wire.deliver(from_a, to_b, unsigned).await.unwrap()), (401, "peer_unsigned".to_owned()));
    let nonsense = PeerCall { head: Some("1 2 3".to_owned()), ..sent.clone() };
    assert_eq!(error(&wire.deliver(from_a, to_b, nonsense).await.unwrap()), (401, "peer_key_refused".to_owned()));
    let elsewhere = wire.deliver(to_b, from_a, sent.clone()).await.unwrap();
    assert_eq!(error(&elsewhere), (421, "peer_other_host".to_owned()));
    // The next agent has no nonces of the one before.
    b.sim.end_life();
    let b = Host::start_on(b.sim, "b", config(2, "", &[("a", A, 1)])).await;
    wire.plug(&b, B, Some(KEY)).await;
    let stale = wire.deliver(from_a, to_b, sent.clone()).await.unwrap();
    assert_eq!(error(&stale), (403, "peer_request_stale".to_owned()));
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_ne!(wire.deliver(from_a, to_b, sent).await.unwrap().status, 202);
    assert_eq!(b.door.vms().len(), 1);
}

/// Two hosts with sockets of this machine.
async fn over_sockets() -> (Host, Host, SocketAddr, watch::Sender<bool>) {
    over_sockets_with(2, KEY).await
}

/// The same, where the second host has this number, whatever the first one takes it for, and this key.
async fn over_sockets_with(number: u16, key: &[u8]) -> (Host, Host, SocketAddr, watch::Sender<bool>) {
    let (end, ending) = watch::channel(false);
    let a_listens = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let b_listens = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (a_at, b_at) = (a_listens.local_addr().unwrap(), b_listens.local_addr().unwrap());
    let at = |mut config: crate::agent::config::Config, address: SocketAddr| {
        // No configuration may name a loopback address.
        let peer = &mut config.fabric.as_mut().unwrap().peers[0];
        (peer.address, peer.port) = (address.ip(), Some(address.port()));
        config
    };
    let a = Host::start("a", at(config(1, "", &[("b", B, 2)]), b_at)).await;
    let b = Host::start("b", at(config(number, "", &[("a", A, 1)]), a_at)).await;
    for (host, listener, key) in [(&a, a_listens, KEY), (&b, b_listens, key)] {
        let name = host.name.as_str();
        let key = PeerKey::new(key);
        let tls = PeerTls::new(&key, host.door.fabric().unwrap().config.host.into()).unwrap();
        tokio::spawn(serve(listener, Some(tls.clone()), Arc::clone(&host.door), name.into(), ending.clone()));
        let link = Arc::new(HttpLink::new(Some(tls), false));
        let setup = PeerSetup { key: Some(key), link, host: name.to_owned() };
        host.door.start_peers(setup).await.unwrap();
    }
    (a, b, b_at, end)
}

#[tokio::test]
async fn over_real_sockets_peers_meet_and_launch() {
    let (a, b, at, end) = over_sockets().await;
    // The first hello of one may have come before the other answered.
    a.until("b reachable", |a| a.peer_state("b") == "reachable").await;
    a.session(5).await;
    let vm = a.vm("one", Some(5)).await;
    let launch = OwnLaunch { session_network_id: 5, count: 1, peer: Some("b".to_owned()), ..OwnLaunch::default() };
    assert!(matches!(a.door.launch_own(&vm.id, launch).await, Ok(OwnLaunched::Elsewhere(vms)) if vms.len() == 1));
    assert_eq!(b.door.vms().len(), 1);
    assert_eq!(a.door.own_members(&vm.id).await.unwrap().elsewhere.len(), 1);
    // One host has its connections, and no more.
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS_PER_HOST_MAX {
        idle.push(TcpStream::connect(at).await.unwrap());
    }
    let mut beyond = TcpStream::connect(at).await.unwrap();
    let mut byte = [0];
    assert!(matches!(beyond.read(&mut byte).await, Ok(0) | Err(_)));
    drop(idle);
    end.send_replace(true);
    b.until("nobody listening", |_| std::net::TcpStream::connect(at).is_err()).await;
}

#[tokio::test]
async fn over_real_sockets_a_line_held_ready_is_for_one_call_to_the_right_host() {
    let (_a, _b, at, _end) = over_sockets().await;
    let link = HttpLink::new(Some(PeerTls::new(&PeerKey::new(KEY), 1).unwrap()), false);
    let callee = |number| Callee { name: "b".to_owned(), at, number: Some(number), limit: ARRIVE_LIMIT };
    let call = || PeerCall { method: "POST", path: HELLO_PATH.to_owned(), body: b"{}".to_vec(), head: None };
    let [first, second] = [link.open(callee(2)).await.unwrap(), link.open(callee(2)).await.unwrap()];
    assert_eq!(error(&second.call(call()).await.unwrap()), (401, "peer_unsigned".to_owned()));
    assert!(matches!(link.open(callee(3)).await, Err(LinkError::Tls(TlsError::OtherHost { proven: 2, wanted: 3 }))));
    // The one that waited longer.
    assert_eq!(error(&first.call(call()).await.unwrap()), (401, "peer_unsigned".to_owned()));
}

#[tokio::test]
async fn over_real_sockets_another_key_is_shown_with_what_to_do() {
    let (a, b, _at, _end) = over_sockets_with(2, &[8; 32]).await;
    for (host, other) in [(&a, "b"), (&b, "a")] {
        host.until("other refused", |host| host.peer_state(other) == "refused").await;
        let fabric = host.door.fabric().unwrap();
        let told = fabric.peers[0].state.why().unwrap().to_owned();
        let wanted = format!(
            "speak with host {other}: its certificate was made with another key: fabric.key_file has to be the same on \
             both hosts"
        );
        assert_eq!(told, wanted);
        assert!(fabric.conflicts.is_empty());
    }
}

#[tokio::test]
async fn over_real_sockets_another_number_is_a_conflict_on_both_sides() {
    let (a, b, _at, _end) = over_sockets_with(3, KEY).await;
    a.until("a conflict", |a| a.conflicts().iter().any(|told| told.contains("[[peers]] here says 2"))).await;
    b.until("a conflict", |b| b.conflicts().iter().any(|told| told.contains("takes this host for number 2"))).await;
    assert!(refuses_sessions(&a).await && refuses_sessions(&b).await);
}

#[tokio::test]
async fn over_real_sockets_what_is_too_much_is_refused() {
    let (_a, _b, at, _end) = over_sockets().await;
    let ask = |request: String| async move {
        let mut stream = TcpStream::connect(at).await.unwrap();
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    };
    let long = "x".repeat(REQUEST_BYTES_MAX + 1);
    let head = |length: usize| format!("POST {HELLO_PATH} HTTP/1.1\r\nhost: h\r\ncontent-length: {length}\r\n\r\n");
    assert!(ask(format!("{}{long}", head(long.len()))).await.starts_with("HTTP/1.1 413"));
    assert!(ask(format!("{}{{}}", head(2))).await.starts_with("HTTP/1.1 401"));
    assert!(
        ask(format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(HEAD_BYTES_MAX))).await.starts_with("HTTP/1.1 431")
    );
}

#[tokio::test(start_paused = true)]
async fn a_slow_caller_is_cut_off() {
    let (_a, _b, at, _end) = over_sockets().await;
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(b"POST /peer/v1/hello HTTP/1.1\r\n").await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    assert!(!answer.starts_with("HTTP/1.1 2"), "{answer}");
}
