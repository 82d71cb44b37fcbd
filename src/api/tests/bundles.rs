//! Bundles over the API: made, listed, launched from, and what is refused by which word.

use super::clusters::wait_for;
use super::*;

const TYPED: &str = "content-type: application/json";

impl Api {
    async fn remove(&self, path: &str) -> (u16, Value) {
        self.ask("DELETE", path, &[], "").await
    }

    /// Waits for an operation to end.
    async fn ended(&self, operation: &Value) -> Value {
        let path = format!("/v1/operations/{}", operation["id"].as_str().unwrap());
        wait_for(self, &path, "ended", |found| found["state"] != "running").await
    }

    /// A bundle of this name, built; its id.
    async fn build(&self, name: &str) -> String {
        let (status, operation) = self.post("/v1/bundles", &json!({ "name": name, "warmup": "true" })).await;
        assert_eq!((status, &operation["kind"]), (202, &json!("bundle_build")), "{operation}");
        let done = self.ended(&operation).await;
        assert_eq!((&done["state"], &done["error"]), (&json!("succeeded"), &Value::Null));
        done["bundle_id"].as_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn a_bundle_is_built_listed_and_launched_from() {
    let api = Api::start().await;
    let id = api.build("warm").await;
    let (_, list) = api.get("/v1/bundles").await;
    assert_eq!((list["bundles"].as_array().unwrap().len(), &list["unreadable"]), (1, &json!([])));
    let bundle = &list["bundles"][0];
    assert_eq!((&bundle["id"], &bundle["name"], &bundle["recipe"]), (&json!(id), &json!("warm"), &json!("build")));
    assert_eq!((&bundle["vcpus"], &bundle["memory_mib"], &bundle["vms"]), (&json!(1), &json!(128), &json!(0)));
    // What it was built of is forgotten once it is cleaned up.
    wait_for(&api, "/v1/vms", "gone", |found| *found == json!({ "vms": [] })).await;
    for (name, word) in [("a", "warm"), ("b", &id[..]), ("c", &id[..9])] {
        let (status, vm) = api.post("/v1/vms", &json!({ "name": name, "bundle": word, "wait": "running" })).await;
        assert_eq!((status, &vm["bundle_id"], &vm["state"]), (201, &json!(id), &json!("running")), "{word}: {vm}");
    }
    assert_eq!(api.get("/v1/bundles/warm").await.1["vms"], 3);
    assert_eq!(code(&api.remove("/v1/bundles/warm").await), (409, "bundle_in_use"));
    for name in ["a", "b", "c"] {
        assert_eq!(api.remove(&format!("/v1/vms/{name}?timeout_ms=0")).await.0, 204);
    }
    assert_eq!(api.post("/v1/bundles/warm/verify", &json!({})).await.1["id"], json!(id));
    assert_eq!(api.remove("/v1/bundles/warm").await.0, 204);
    assert_eq!(code(&api.get("/v1/bundles/warm").await), (404, "unknown_bundle"));
    assert!(api.host.bundles().is_empty());
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_its_word() {
    let api = Api::start().await;
    api.build("warm").await;
    api.launch("plain").await;
    for (path, body, wanted) in [
        ("/v1/vms", json!({ "bundle": "absent" }), (422, "unknown_bundle")),
        ("/v1/vms", json!({ "bundle": "warm", "image": "demo" }), (400, "image_and_bundle")),
        ("/v1/vms", json!({ "bundle": "warm", "vcpus": 2 }), (409, "bundle_differs")),
        ("/v1/vms", json!({ "bundle": "warm", "memory_mib": 256 }), (409, "bundle_differs")),
        ("/v1/vms", json!({ "bundle": "warm", "interfaces": 2 }), (409, "bundle_differs")),
        ("/v1/vms", json!({ "bundle": "warm", "disks": [{ "path": "/there" }] }), (409, "bundle_differs")),
        ("/v1/bundles", json!({ "name": "warm" }), (409, "name_taken")),
        ("/v1/bundles", json!({ "name": "Not A Name" }), (400, "invalid_name")),
        ("/v1/bundles", json!({ "image": "absent" }), (422, "unknown_image")),
        ("/v1/bundles", json!({ "timeout_s": 0 }), (400, "invalid_value")),
        ("/v1/bundles", json!({ "warmup": "" }), (400, "invalid_value")),
        ("/v1/bundles", json!({ "colour": "red" }), (400, "unknown_field")),
        ("/v1/vms/plain/snapshot", json!({ "bundle_name": "warm" }), (409, "name_taken")),
        ("/v1/vms/plain/snapshot", json!({ "bundle_name": "-" }), (400, "invalid_name")),
        ("/v1/vms/plain/snapshot", json!({ "diff": true }), (409, "no_parent")),
        ("/v1/vms/absent/snapshot", json!({}), (404, "not_found")),
        ("/v1/bundles/warm/compact", json!({ "bundle_name": "warm" }), (409, "name_taken")),
        ("/v1/bundles/absent/compact", json!({}), (404, "unknown_bundle")),
        ("/v1/bundles/absent/verify", json!({}), (404, "unknown_bundle")),
    ] {
        let answer = api.post(path, &body).await;
        assert_eq!(code(&answer), wanted, "{path} {body}: {}", answer.1);
    }
    assert_eq!(code(&api.remove("/v1/bundles/absent").await), (404, "unknown_bundle"));
    assert_eq!(api.host.bundles().len(), 1, "nothing came of it");
}

#[tokio::test]
async fn snapshots_are_taken_of_vms_that_are_up() {
    let api = Api::start().await;
    api.build("warm").await;
    assert_eq!(api.post("/v1/vms", &json!({ "name": "web", "bundle": "warm", "wait": "running" })).await.0, 201);
    let (status, full) = api.post("/v1/vms/web/snapshot", &json!({})).await;
    assert_eq!((status, &full["state"], &full["quiesced"]), (200, &json!("succeeded"), &json!(true)), "{full}");
    assert!(full["pause_ms"].as_f64().unwrap() > 0.0 && full["memory_bytes"].as_u64().unwrap() > 0);
    assert_eq!(api.get("/v1/vms/web").await.1["state"], "running");
    assert_eq!(api.post("/v1/vms/web/pause", &json!({})).await.0, 200);
    let wanted = json!({ "bundle_name": "diff", "diff": true });
    let (status, diff) = api.post("/v1/vms/web/snapshot", &wanted).await;
    assert_eq!((status, &diff["kind"]), (200, &json!("vm_snapshot")), "{diff}");
    assert_eq!(api.get("/v1/vms/web").await.1["state"], "paused", "as before");
    let (_, shown) = api.get("/v1/bundles/diff").await;
    assert_eq!((&shown["recipe"], &shown["parent"]), (&json!("snapshot"), &api.get("/v1/bundles/warm").await.1["id"]));
    assert_eq!(api.remove("/v1/vms/web?timeout_ms=0").await.0, 204);
    assert_eq!(code(&api.remove("/v1/bundles/warm").await), (409, "bundle_in_use"), "the diff builds on it");
    let (status, flat) = api.post("/v1/bundles/diff/compact", &json!({ "bundle_name": "flat" })).await;
    assert_eq!((status, &flat["parent"], &flat["recipe"]), (201, &Value::Null, &json!("compaction")), "{flat}");
    for name in ["diff", "warm"] {
        assert_eq!(api.remove(&format!("/v1/bundles/{name}")).await.0, 204);
    }
    api.host.set_boot(Duration::from_secs(60));
    assert_eq!(api.post("/v1/vms", &json!({ "name": "slow" })).await.0, 202);
    let early = api.post("/v1/vms/slow/snapshot", &json!({})).await;
    assert_eq!(code(&early), (409, "illegal_state"));
}

#[tokio::test]
async fn a_repeated_build_is_the_same_operation() {
    let api = Api::start().await;
    let more = [TYPED, "idempotency-key: one"];
    let first = api.ask("POST", "/v1/bundles", &more, r#"{"name":"warm"}"#).await;
    assert_eq!(first.0, 202);
    assert_eq!(api.ask("POST", "/v1/bundles", &more, r#"{"name":"warm"}"#).await, first);
    let other = api.ask("POST", "/v1/bundles", &more, r#"{"name":"other"}"#).await;
    assert_eq!(code(&other), (409, "idempotency_mismatch"));
    assert_eq!(api.ended(&first.1).await["state"], "succeeded");
    assert_eq!(api.ask("POST", "/v1/bundles", &more, r#"{"name":"warm"}"#).await, first, "also when it is there");
    let more = [TYPED, "idempotency-key: two"];
    let body = r#"{"name":"twin"}"#;
    let (a, b) = tokio::join!(api.ask("POST", "/v1/bundles", &more, body), api.ask("POST", "/v1/bundles", &more, body));
    assert_eq!((a.0, &a.1["id"]), (b.0, &b.1["id"]));
    api.ended(&a.1).await;
    assert_eq!(api.host.bundles().len(), 2);
}
