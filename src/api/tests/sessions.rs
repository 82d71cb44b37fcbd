//! Sessions over the API: who may join, what is refused and by which word, and what ends them.

use super::*;

const FABRIC: &str = "[fabric]\nhost_number = 3\nipv6_prefix = 'fd3c:91aa:7e2::/48'\n";

const PEER: &str = "[[peers]]\nname = 'b'\naddress = '2001:db8::2'\nhost_number = 7\n";

#[tokio::test]
async fn vms_of_a_session_have_its_addresses() {
    let api = Api::configured(FABRIC).await;
    let (status, session) = api.post("/v1/sessions", &json!({ "name": "etl", "session_network_id": 517 })).await;
    assert_eq!((status, &session["ipv4"], &session["state"]), (201, &json!(true), &json!("active")));
    assert_eq!((&session["members"], &session["expires_at"]), (&json!([]), &Value::Null));
    let id = session["id"].as_str().unwrap();
    for word in [id, &id[..6], "etl", "517"] {
        assert_eq!(api.get(&format!("/v1/sessions/{word}")).await.1["id"], id, "{word}");
    }
    // The numbers of the design: host 3, session 517, VMs 1 and 2.
    for (vm, word, addresses) in [
        ("a", "etl", ["fd3c:91aa:7e2:3:0:205:0:1", "10.3.129.65"]),
        ("b", "517", ["fd3c:91aa:7e2:3:0:205:0:2", "10.3.129.66"]),
    ] {
        let request = json!({ "name": vm, "session": word, "addressing": "invariant", "wait": "running" });
        let (status, vm) = api.post("/v1/vms", &request).await;
        assert_eq!((status, &vm["addresses"]), (201, &json!(addresses)), "{vm}");
        assert_eq!((&vm["session_id"], &vm["session_network_id"]), (&json!(id), &json!(517)));
    }
    let alone = api.launch("alone").await;
    assert_eq!((&alone["addresses"], &alone["session_id"]), (&json!([]), &Value::Null));
    let shown = api.get("/v1/sessions/etl").await.1;
    assert_eq!(shown["members"].as_array().unwrap().len(), 2);
    assert_eq!(shown["members"][1]["addresses"][1], "10.3.129.66");
    let none = json!({ "spoof": 0, "foreign_session": 0, "not_allowed": 0, "queue_full": 0 });
    assert_eq!((&shown["drops"], &shown["members"][0]["drops"]), (&none, &none));
    // A VM that ended keeps its place in the list, but has no address any more.
    assert_eq!(api.post("/v1/vms/a/stop", &json!({ "timeout_ms": 0 })).await.1["addresses"], json!([]));
    assert_eq!(api.get("/v1/sessions/etl").await.1["members"][0]["addresses"], json!([]));
    let (_, again) = api.post("/v1/vms", &json!({ "session": "etl", "wait": "running" })).await;
    assert_eq!(again["addresses"][1], "10.3.129.67", "the address of one that ended rests");
    assert_eq!(code(&api.ask("DELETE", "/v1/sessions/etl", &[], "").await), (409, "session_in_use"));
    assert_eq!(api.ask("DELETE", "/v1/sessions/etl?drain=true&timeout_ms=0", &[], "").await.0, 204);
    assert_eq!(api.get("/v1/vms").await.1["vms"].as_array().unwrap().len(), 1, "the others stay");
    assert_eq!(api.get("/v1/sessions").await.1, json!({ "sessions": [] }));
    let rests = api.post("/v1/sessions", &json!({ "session_network_id": 517 })).await;
    assert_eq!(code(&rests), (409, "session_id_quarantined"));
    assert!(rests.1["error"]["message"].as_str().unwrap().contains("rests for another "), "{}", rests.1);
    assert_eq!(code(&api.post("/v1/vms", &json!({ "session": "517" })).await), (409, "session_id_quarantined"));
}

#[tokio::test]
async fn numbers_are_chosen_where_none_is_given() {
    let api = Api::configured(FABRIC).await;
    let number = async |api: &Api, body: Value| api.post("/v1/sessions", &body).await.1["session_network_id"].clone();
    assert_eq!(number(&api, json!({})).await, 1);
    assert_eq!(number(&api, json!({})).await, 2);
    assert_eq!(number(&api, json!({ "ipv4": false })).await, 0x3_0001);
    let with_peer = Api::configured(&[FABRIC, PEER].concat()).await;
    assert_eq!(number(&with_peer, json!({})).await, 0x3_0001);
    let (status, wide) = with_peer.post("/v1/sessions", &json!({ "name": "wide" })).await;
    assert_eq!((status, &wide["ipv4"]), (201, &json!(false)));
    let (_, vm) = with_peer.post("/v1/vms", &json!({ "session": "wide", "wait": "running" })).await;
    assert_eq!(vm["addresses"], json!(["fd3c:91aa:7e2:3:3:2:0:1"]));
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_its_word() {
    let api = Api::configured(FABRIC).await;
    assert_eq!(api.post("/v1/sessions", &json!({ "name": "etl", "session_network_id": 5 })).await.0, 201);
    let rule = |cidr: &str| json!({ "egress": { "nat": true, "allow": [{ "cidr": cidr }] } });
    let ports = |from: u32, to: u32, protocol: &str| json!({ "egress": { "allow": [{ "cidr": "::/0", "protocol": protocol, "ports": [from, to] }] } });
    for (body, wanted) in [
        (json!({ "session_network_id": 5 }), (409, "session_id_taken")),
        (json!({ "name": "etl" }), (409, "name_taken")),
        (json!({ "name": "5" }), (400, "invalid_name")),
        (json!({ "session_network_id": 0 }), (422, "session_id_reserved")),
        (json!({ "session_network_id": u32::MAX }), (422, "session_id_reserved")),
        (json!({ "session_network_id": 0x0200_5eff }), (422, "session_id_reserved")),
        (json!({ "session_network_id": 1023, "ipv4": true }), (422, "session_id_too_wide_for_ipv4")),
        (json!({ "session_network_id": 1_u64 << 32 }), (400, "invalid_value")),
        (json!({ "ttl_s": 0 }), (400, "invalid_ttl")),
        (json!({ "ttl_s": u32::MAX }), (400, "invalid_ttl")),
        (json!({ "user_data": "x".repeat(16 * 1024 + 1) }), (400, "user_data_too_long")),
        (json!({ "colour": "red" }), (400, "unknown_field")),
        (json!({ "egress": { "nat": true } }), (400, "invalid_egress")),
        (rule("192.0.2.1/24"), (400, "invalid_egress")),
        (rule("fd3c:91aa:7e2:9::/64"), (400, "invalid_egress")),
        (rule("169.254.169.254/32"), (400, "invalid_egress")),
        (ports(5, 4, "tcp"), (400, "invalid_egress")),
        (ports(0, 4, "tcp"), (400, "invalid_egress")),
        (ports(4, 5, "icmp"), (400, "invalid_egress")),
        (ports(4, 65_536, "tcp"), (400, "invalid_value")),
    ] {
        let answer = api.post("/v1/sessions", &body).await;
        assert_eq!(code(&answer), wanted, "{}: {}", &body.to_string()[..body.to_string().len().min(90)], answer.1);
    }
    for (body, wanted) in [
        (json!({ "session": "nobody" }), (404, "unknown_session")),
        (json!({ "session": "517" }), (404, "unknown_session")),
        (json!({ "session": "" }), (404, "unknown_session")),
        (json!({ "addressing": "guest" }), (400, "addressing_without_session")),
        (json!({ "session": "etl", "addressing": "none" }), (400, "invalid_value")),
    ] {
        assert_eq!(code(&api.post("/v1/vms", &body).await), wanted, "{body}");
    }
    for path in ["/v1/sessions/nobody", "/v1/sessions/s-", "/v1/sessions/517", "/v1/sessions/-5"] {
        assert_eq!(code(&api.get(path).await), (404, "unknown_session"), "{path}");
        assert_eq!(code(&api.ask("DELETE", path, &[], "").await), (404, "unknown_session"), "{path}");
    }
    assert_eq!(code(&api.ask("DELETE", "/v1/sessions/etl?force=1", &[], "").await), (400, "unknown_field"));
    let only_v6 = Api::configured(&[FABRIC, "ipv4 = false\n"].concat()).await;
    assert_eq!(code(&only_v6.post("/v1/sessions", &json!({ "ipv4": true })).await), (422, "no_ipv4"));
    let with_peer = Api::configured(&[FABRIC, PEER].concat()).await;
    let chosen = with_peer.post("/v1/sessions", &json!({ "ipv4": true })).await;
    assert_eq!(code(&chosen), (422, "session_id_too_wide_for_ipv4"));
    assert_eq!(with_peer.get("/v1/vms").await.1, json!({ "vms": [] }), "nothing came of it");
}

#[tokio::test]
async fn a_session_with_ipv4_has_room_for_62_and_no_more() {
    let api = Api::configured(&[FABRIC, "[limits]\nvms_max = 100\nmemory_reserve_mib = 0\n"].concat()).await;
    assert_eq!(api.post("/v1/sessions", &json!({ "name": "full" })).await.0, 201);
    let request = json!({ "session": "full", "memory_mib": 64 });
    for number in 1..=62 {
        // Each ends at once, and its address rests all the same.
        let (status, vm) = api.post("/v1/vms", &request).await;
        assert_eq!(status, 202, "{number}: {vm}");
        let path = format!("/v1/vms/{}?timeout_ms=0", vm["id"].as_str().unwrap());
        assert_eq!(api.ask("DELETE", &path, &[], "").await.0, 204);
    }
    assert_eq!(code(&api.post("/v1/vms", &request).await), (409, "local_space_exhausted"));
}

#[tokio::test]
async fn without_a_fabric_there_are_no_sessions() {
    let api = Api::start().await;
    for answer in [
        api.post("/v1/sessions", &json!({})).await,
        api.post("/v1/vms", &json!({ "session": "etl" })).await,
        api.get("/v1/fabric").await,
    ] {
        assert_eq!(code(&answer), (409, "no_fabric"));
        assert!(answer.1["error"]["detail"].as_str().unwrap().contains("add [fabric]"), "{}", answer.1);
    }
    assert_eq!(api.get("/v1/sessions").await, (200, json!({ "sessions": [] })));
    assert_eq!(api.get("/v1/host").await.1["fabric"], Value::Null);
    api.launch("alone").await;
}

#[tokio::test]
async fn the_fabric_is_told() {
    let api = Api::configured(&[FABRIC, PEER].concat()).await;
    let (status, fabric) = api.get("/v1/fabric").await;
    let wanted = json!({
        "ipv6_prefix": "fd3c:91aa:7e2::/48", "host_number": 3, "ipv6_subnet": "fd3c:91aa:7e2:3::/64",
        "ipv4": { "net": "10.0.0.0/8", "subnet": "10.3.0.0/16", "host_bits": 8, "session_bits": 10, "local_bits": 6 },
        "mtu": 1500, "underlay": "routed", "vxlan_id": null, "vxlan_port": null, "quarantine_s": 120,
        "peer_transport": "plain",
        "peers": [{
            "name": "b", "address": "2001:db8::2", "host_number": 7,
            "state": "unknown", "reason": null, "last_hello_ago_ms": null,
        }],
        "conflicts": [],
    });
    assert_eq!((status, &fabric), (200, &wanted));
    assert_eq!(api.get("/v1/host").await.1["fabric"], wanted);
}

#[tokio::test]
async fn a_repeated_create_is_the_same_session() {
    let api = Api::configured(FABRIC).await;
    let more = ["content-type: application/json", "idempotency-key: one"];
    let first = api.ask("POST", "/v1/sessions", &more, r#"{"name":"etl"}"#).await;
    assert_eq!(first.0, 201);
    assert_eq!(api.ask("POST", "/v1/sessions", &more, r#"{"name":"etl"}"#).await, first);
    let other = api.ask("POST", "/v1/sessions", &more, r#"{"name":"other"}"#).await;
    assert_eq!(code(&other), (409, "idempotency_mismatch"));
    let at_once = ["content-type: application/json", "idempotency-key: two"];
    let (a, b) = tokio::join!(
        api.ask("POST", "/v1/sessions", &at_once, r#"{"name":"twin"}"#),
        api.ask("POST", "/v1/sessions", &at_once, r#"{"name":"twin"}"#)
    );
    assert_eq!((a.0, &a.1["id"]), (b.0, &b.1["id"]));
    assert_eq!(api.get("/v1/sessions").await.1["sessions"].as_array().unwrap().len(), 2);
}
