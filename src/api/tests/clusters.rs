//! Clusters over the API: who registers, who does not, and what runs in members.

use super::*;
use crate::sim::Manners;

/// Waits for something that an answer of the API shows.
pub(super) async fn wait_for(api: &Api, path: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..400 {
        let (_, value) = api.get(path).await;
        if is(&value) {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("{path} after 10 s: not {what}: {}", api.get(path).await.1);
}

/// All events, oldest first: one a line, between the lengths of the answer's chunks.
async fn events(api: &Api) -> Vec<Value> {
    let (status, found) = api.get("/v1/events?since=0").await;
    assert_eq!(status, 200, "{found}");
    let text = found.as_str().unwrap_or_default();
    text.lines().filter(|line| line.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn place(events: &[Value], kind: &str, detail: &[(&str, &Value)]) -> Option<usize> {
    events
        .iter()
        .position(|event| event["kind"] == kind && detail.iter().all(|(key, value)| event["detail"][*key] == **value))
}

#[tokio::test]
async fn a_member_registers_and_calculates() {
    let api = Api::start().await;
    let (status, made) = api.post("/v1/clusters", &json!({ "name": "etl" })).await;
    assert_eq!((status, made["token"].as_str().map(str::len)), (201, Some(32)), "{made}");
    assert_eq!((&made["registration_deadline_s"], &made["state"]), (&json!(30), &json!("active")));
    let id = made["id"].as_str().unwrap();
    for word in [id, &id[..6], "etl"] {
        let (status, shown) = api.get(&format!("/v1/clusters/{word}")).await;
        assert_eq!((status, &shown["id"], &shown["token"]), (200, &json!(id), &Value::Null));
    }
    let request = json!({ "name": "one", "cluster": "etl", "executor_id": "e-1", "wait": "registered" });
    let (status, vm) = api.post("/v1/vms", &request).await;
    assert_eq!((status, &vm["state"], &vm["executor_id"]), (201, &json!("running"), &json!("e-1")), "{vm}");
    assert_eq!(vm["cluster_id"], id);
    assert!(vm["registered_at"].is_string() && vm["timings"]["registered_ms"].is_number(), "{vm}");
    let taken = api.post("/v1/vms", &json!({ "cluster": "etl", "executor_id": "e-1" })).await;
    assert_eq!(code(&taken), (409, "executor_id_taken"), "{}", taken.1);
    let unnamed = api.post("/v1/vms", &json!({ "cluster": id, "wait": "running" })).await.1;
    assert_eq!(unnamed["executor_id"], unnamed["id"]);
    let members = api.get("/v1/clusters/etl/members").await.1;
    assert_eq!((&members["members"][0]["epoch"], &members["members"][1]["epoch"]), (&json!(1), &json!(2)));
    let run = json!({ "argv": ["echo", "hello"], "executor_id": "e-1" });
    let (status, calculation) = api.post("/v1/clusters/etl/calculations", &run).await;
    assert_eq!((status, &calculation["state"]), (202, &json!("queued")), "{calculation}");
    let path = format!("/v1/clusters/etl/calculations/{}", calculation["id"].as_str().unwrap());
    let (_, ended) = api.get(&format!("{path}?wait_ms=10000")).await;
    assert_eq!((&ended["state"], &ended["exit_code"], &ended["member"]), (&json!("succeeded"), &json!(0), &vm["id"]));
    assert_eq!((&ended["stdout"]["text"], &ended["executor_id"]), (&json!("hello\n"), &json!("e-1")));
    // The order shows that nothing was given to a member before its registration.
    let events = events(&api).await;
    let registered = place(&events, "member_registered", &[("executor_id", &json!("e-1"))]).unwrap();
    let runs = place(&events, "vm_state", &[("state", &json!("running"))]).unwrap();
    let begun = place(&events, "calculation_state", &[("state", &json!("running")), ("member", &vm["id"])]).unwrap();
    assert!(registered < runs && runs < begun, "{registered} {runs} {begun}");
    assert_eq!(code(&api.ask("DELETE", "/v1/clusters/etl", &[], "").await), (409, "cluster_in_use"));
    assert_eq!(api.ask("DELETE", "/v1/clusters/etl?drain=true&timeout_ms=0", &[], "").await.0, 204);
    assert_eq!(api.get("/v1/vms").await.1, json!({ "vms": [] }));
    assert_eq!(code(&api.get(&path).await), (404, "unknown_cluster"));
    assert_eq!(api.host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn calculations_end_as_their_programs_do() {
    let api = Api::start().await;
    api.post("/v1/clusters", &json!({ "name": "c" })).await;
    // Before anybody has registered they wait; one whose time is up is not run.
    let (_, late) = api.post("/v1/clusters/c/calculations", &json!({ "argv": ["true"], "timeout_s": 1 })).await;
    let (_, early) = api.post("/v1/clusters/c/calculations", &json!({ "argv": ["exit", "3"] })).await;
    let at = |calculation: &Value| format!("/v1/clusters/c/calculations/{}", calculation["id"].as_str().unwrap());
    let late = wait_for(&api, &at(&late), "over", |one| one["state"] == "failed").await;
    assert_eq!((&late["cause"], &late["member"]), (&json!("nobody_took_it"), &Value::Null));
    assert_eq!(api.get(&at(&early)).await.1["state"], "queued");
    let (_, vm) = api.post("/v1/vms", &json!({ "name": "m", "cluster": "c", "wait": "registered" })).await;
    let early = wait_for(&api, &at(&early), "over", |one| one["state"] == "failed").await;
    assert_eq!((&early["cause"], &early["exit_code"], &early["member"]), (&json!("exit_code"), &json!(3), &vm["id"]));
    let run = async |body: Value| {
        let (status, begun) = api.post("/v1/clusters/c/calculations", &body).await;
        assert_eq!(status, 202, "{begun}");
        api.get(&format!("{}?wait_ms=10000", at(&begun))).await.1
    };
    let absent = run(json!({ "argv": ["absent"], "member": "m" })).await;
    assert_eq!((&absent["state"], &absent["cause"]), (&json!("failed"), &json!("not_started")));
    let fed = run(json!({ "argv": ["cat"], "stdin_base64": "/wBhYmM=" })).await;
    assert_eq!((&fed["state"], &fed["stdout"]["base64"]), (&json!("succeeded"), &json!("/wBhYmM=")));
    let (_, never) = api.post("/v1/clusters/c/calculations", &json!({ "argv": ["never"] })).await;
    wait_for(&api, &at(&never), "running", |one| one["state"] == "running").await;
    assert_eq!(api.ask("DELETE", "/v1/vms/m?timeout_ms=0", &[], "").await.0, 204);
    let lost = wait_for(&api, &at(&never), "lost", |one| one["state"] == "lost").await;
    assert_eq!(lost["exit_code"], Value::Null);
    let all = api.get("/v1/clusters/c/calculations").await.1;
    assert_eq!((all["calculations"].as_array().unwrap().len(), &all["calculations"][0]["id"]), (5, &lost["id"]));
    assert_eq!(api.host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_member_that_lies_is_refused_and_launched_anew_once() {
    let api = Api::start().await;
    api.post("/v1/clusters", &json!({ "name": "c", "registration_deadline_s": 1 })).await;
    for (executor, manners, refusal) in [
        ("token", Manners::WrongToken, "wrong_token"),
        ("vm", Manners::OtherVm, "wrong_vm"),
        ("executor", Manners::OtherExecutor, "wrong_executor"),
        ("generation", Manners::OldGeneration, "wrong_generation"),
    ] {
        api.host.set_manners(&[manners, Manners::Honest]);
        let request = json!({ "cluster": "c", "executor_id": executor, "wait": "registered" });
        let failed = api.post("/v1/vms", &request).await;
        assert_eq!(code(&failed), (504, "not_registered"), "{}", failed.1);
        let members = wait_for(&api, "/v1/clusters/c/members", "launched anew", |list| {
            let members = list["members"].as_array().unwrap();
            members.iter().any(|one| one["executor_id"] == executor && one["registered_at"].is_string())
        });
        let members = members.await;
        let mine: Vec<_> =
            members["members"].as_array().unwrap().iter().filter(|one| one["executor_id"] == executor).collect();
        assert_eq!((mine.len(), &mine[0]["state"], &mine[1]["attempt"]), (2, &json!("failed"), &json!(2)));
        assert_eq!(mine[1]["replaces"], mine[0]["id"]);
        let events = events(&api).await;
        let (executor, refusal) = (json!(executor), json!(refusal));
        assert!(place(&events, "registration_refused", &[("code", &refusal), ("executor_id", &executor)]).is_some());
        assert!(place(&events, "member_relaunched", &[("replaces", &mine[0]["id"])]).is_some());
    }
    assert_eq!(api.host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_member_that_stays_silent_twice_is_lost() {
    let api = Api::start().await;
    api.post("/v1/clusters", &json!({ "name": "c", "registration_deadline_s": 2 })).await;
    api.host.set_manners(&[Manners::Silent, Manners::Silent, Manners::HangsUp]);
    let (_, vm) = api.post("/v1/vms", &json!({ "cluster": "c", "executor_id": "e", "wait": "none" })).await;
    let queued = api.post("/v1/clusters/c/calculations", &json!({ "argv": ["true"], "executor_id": "e" })).await;
    assert_eq!(code(&queued), (409, "not_registered"), "{}", queued.1);
    let members = wait_for(&api, "/v1/clusters/c/members", "failed twice", |list| {
        list["members"].as_array().unwrap().iter().filter(|one| one["state"] == "failed").count() == 2
    });
    assert_eq!(members.await["members"][0]["id"], vm["id"]);
    for _ in 0..200 {
        if place(&events(&api).await, "member_lost", &[]).is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert!(place(&events(&api).await, "member_lost", &[("attempt", &json!(2))]).is_some());
    assert_eq!(api.get("/v1/vms").await.1["vms"].as_array().unwrap().len(), 2, "and not launched a third time");
    // The executor id is free again; one that did not hear is told again.
    let (status, next) =
        api.post("/v1/vms", &json!({ "cluster": "c", "executor_id": "e", "wait": "registered" })).await;
    assert_eq!((status, &next["state"]), (201, &json!("running")), "{next}");
    let registrations = events(&api).await.iter().filter(|event| event["kind"] == "member_registered").count();
    assert_eq!(registrations, 1, "it is the same registration");
    assert_eq!(api.host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn registrars_elsewhere_and_clusters_nobody_made() {
    let api = Api::start().await;
    let elsewhere = json!({ "name": "far", "endpoint": "192.0.2.7:7070" });
    assert_eq!(api.post("/v1/clusters", &elsewhere).await.1["endpoint"], "192.0.2.7:7070");
    let (status, vm) = api.post("/v1/vms", &json!({ "cluster": "far", "wait": "registered" })).await;
    assert_eq!((status, vm["registered_at"].is_string()), (201, true), "{vm}");
    let (_, alone) = api.post("/v1/vms", &json!({ "executor_id": "e", "wait": "registered" })).await;
    assert_eq!(api.get("/v1/clusters/default").await.1["id"], alone["cluster_id"]);
    let again = api.post("/v1/vms", &json!({ "executor_id": "e" })).await;
    assert_eq!(code(&again), (409, "executor_id_taken"));
    for (path, body, wanted) in [
        ("/v1/clusters", json!({ "name": "far" }), (409, "name_taken")),
        ("/v1/clusters", json!({ "name": "Far" }), (400, "invalid_name")),
        ("/v1/clusters", json!({ "token": "short" }), (400, "invalid_token")),
        ("/v1/clusters", json!({ "endpoint": "somewhere:80" }), (400, "invalid_endpoint")),
        ("/v1/clusters", json!({ "endpoint": "[fe80::1]:80" }), (400, "invalid_endpoint")),
        ("/v1/clusters", json!({ "registration_deadline_s": 0 }), (400, "invalid_deadline")),
        ("/v1/clusters", json!({ "colour": "red" }), (400, "unknown_field")),
        ("/v1/vms", json!({ "cluster": "nobody" }), (422, "unknown_cluster")),
        ("/v1/vms", json!({ "cluster": "far", "executor_id": "a b" }), (400, "invalid_executor_id")),
        ("/v1/vms", json!({ "executor_id": "x".repeat(64) }), (400, "invalid_executor_id")),
        ("/v1/clusters/far/calculations", json!({ "argv": [] }), (400, "invalid_value")),
        ("/v1/clusters/far/calculations", json!({ "argv": ["x"], "timeout_s": 0 }), (400, "invalid_timeout")),
        ("/v1/clusters/far/calculations", json!({ "argv": ["x"], "stdin_base64": "?" }), (400, "invalid_value")),
        ("/v1/clusters/far/calculations", json!({ "argv": ["x".repeat(65 * 1024)] }), (400, "words_too_long")),
        ("/v1/clusters/far/calculations", json!({ "argv": ["x"], "member": "nobody" }), (422, "unknown_member")),
        ("/v1/clusters/far/calculations", json!({ "argv": ["x"], "executor_id": "nobody" }), (422, "unknown_member")),
        ("/v1/clusters/nobody/calculations", json!({ "argv": ["x"] }), (404, "unknown_cluster")),
    ] {
        let answer = api.post(path, &body).await;
        assert_eq!(code(&answer), wanted, "{path}: {}", answer.1);
    }
    assert_eq!(code(&api.get("/v1/clusters/far/calculations/calc-a").await), (404, "unknown_calculation"));
    assert_eq!(code(&api.get("/v1/clusters/nobody/members").await), (404, "unknown_cluster"));
    assert_eq!(api.host.violations(), Vec::<String>::new());
}

#[tokio::test]
async fn a_repeated_request_is_the_same_cluster_and_calculation() {
    let api = Api::start().await;
    let more = ["content-type: application/json", "idempotency-key: one"];
    let first = api.ask("POST", "/v1/clusters", &more, r#"{"name":"c"}"#).await;
    assert_eq!(first.0, 201);
    assert_eq!(api.ask("POST", "/v1/clusters", &more, r#"{"name":"c"}"#).await, first);
    let other = api.ask("POST", "/v1/clusters", &more, r#"{"name":"d"}"#).await;
    assert_eq!(code(&other), (409, "idempotency_mismatch"));
    let run = async || api.ask("POST", "/v1/clusters/c/calculations", &more, r#"{"argv":["true"]}"#).await;
    let (a, b) = tokio::join!(run(), run());
    assert_eq!((a.0, &a.1["id"]), (202, &b.1["id"]));
    assert_eq!(api.get("/v1/clusters/c/calculations").await.1["calculations"].as_array().unwrap().len(), 1);
}
