//! Bounds of connections and of new work, over a real socket: clients that are many, slow or do not read, a full disk,
//! an agent that drains.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Api, code};
use crate::api::http::Bounds;

/// Longest wait for anything here.
const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::test]
async fn of_a_thousand_connections_the_bound_is_served_and_the_rest_refused() {
    let api = Api::start().await;
    let mut held = Vec::new();
    for _ in 0..1000 {
        let mut stream = api.connect().await;
        if held.len() >= 256 {
            // It may be refused before it has asked.
            let _ = stream.write_all(b"GET /v1/host HTTP/1.1\r\nhost: h\r\n\r\n").await;
        }
        held.push(stream);
    }
    // All were accepted: half of the bound is served, the rest is told so or closed.
    let (mut told, mut closed) = (0, 0);
    for stream in &mut held[256..] {
        let mut head = [0; 64];
        match tokio::time::timeout(PATIENCE, stream.read(&mut head)).await.expect("an answer or an end") {
            Ok(0) | Err(_) => closed += 1,
            Ok(count) => {
                assert!(head[..count].starts_with(b"HTTP/1.1 503"), "{}", String::from_utf8_lossy(&head[..count]));
                told += 1;
            }
        }
    }
    assert_eq!(told + closed, 744);
    assert!(told > 0, "some are told");
    assert_eq!(api.agent.connections().counts().0, 256);
    held.clear();
    // Places come back as the connections end.
    tokio::time::timeout(PATIENCE, async {
        while api.get("/v1/host").await.0 != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_connection_beyond_the_bound_hears_so() {
    let api = Api::configured("[limits]\nconnections_max = 4").await;
    let held = [api.connect().await, api.connect().await];
    let answer = api.get("/v1/host").await;
    assert_eq!(code(&answer), (503, "too_many_connections"), "{answer:?}");
    assert_eq!(answer.1["error"]["retry"], "later");
    drop(held);
}

#[tokio::test]
async fn a_head_that_drips_is_cut_off_and_others_are_answered() {
    let api = Api::bounded("", |bounds| Bounds { head: Duration::from_millis(300), ..bounds }).await;
    let mut slow = api.connect().await;
    slow.write_all(b"GET /v1/host HTTP/1.1\r\n").await.unwrap();
    let dripping = async {
        loop {
            if slow.write_all(b"x-a: b\r\n").await.is_err() {
                break;
            }
            let mut byte = [0];
            if let Ok(read) = tokio::time::timeout(Duration::from_millis(20), slow.read(&mut byte)).await {
                assert!(matches!(read, Ok(0) | Err(_)), "nothing is answered");
                break;
            }
        }
    };
    let (ended, answer) = tokio::join!(tokio::time::timeout(PATIENCE, dripping), api.get("/v1/host"));
    ended.expect("it is cut off");
    assert_eq!(answer.0, 200);
}

#[tokio::test]
async fn a_client_that_never_reads_is_left() {
    let api = Api::bounded("", |bounds| Bounds { stall: Duration::from_millis(300), ..bounds }).await;
    let mut mute = api.connect().await;
    // Answers of many requests in a row, and nobody takes them.
    let request = b"GET /v1/openapi.json HTTP/1.1\r\nhost: h\r\n\r\n".repeat(200);
    let (mut reading, mut writing) = mute.split();
    let flood = async { while writing.write_all(&request).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, flood).await.expect("the agent hangs up");
    assert_eq!(api.agent.connections().counts().2, 1);
    // What was sent before is bounded by the socket's buffer.
    let mut sent = Vec::new();
    let _ = reading.read_to_end(&mut sent).await;
    assert!(sent.len() < 4 << 20, "{}", sent.len());
    assert_eq!(api.get("/v1/host").await.0, 200);
}

#[tokio::test]
async fn a_full_disk_refuses_new_work_and_keeps_what_runs() {
    let api = Api::start().await;
    api.launch("a").await;
    let image = json!({ "name": "mine", "kernel_path": "/k" });
    api.host.set_disk_free((512 << 20) - 1);
    for (path, body) in [
        ("/v1/vms", json!({ "name": "b" })),
        ("/v1/bundles", json!({ "image": "demo" })),
        ("/v1/vms/a/snapshot", json!({})),
        ("/v1/images", image),
    ] {
        let answer = api.post(path, &body).await;
        assert_eq!(code(&answer), (507, "disk_reserve"), "{path}: {answer:?}");
        let error = &answer.1["error"];
        assert!(error["message"].as_str().unwrap().contains("has 511 MiB free, and 512 MiB are kept"), "{error}");
        assert!(error["detail"].as_str().unwrap().contains("hearth bundle rm"), "{error}");
    }
    assert_eq!(api.get("/v1/vms/a").await.1["state"], "running");
    assert_eq!(api.post("/v1/vms/a/pause", &json!({})).await.0, 200);
    api.host.set_disk_free(512 << 20);
    api.launch("b").await;
}

#[tokio::test]
async fn events_that_are_dropped_are_told_with_where_the_history_starts() {
    let api = Api::configured("[limits]\nevents_kept = 100").await;
    while api.agent.last_event().borrow().to_owned() < 200 {
        api.launch("a").await;
        assert_eq!(api.ask("DELETE", "/v1/vms/a?timeout_ms=0", &[], "").await.0, 204);
    }
    let answer = api.get("/v1/events?since=5").await;
    assert_eq!(code(&answer), (410, "events_dropped"), "{answer:?}");
    let error = &answer.1["error"];
    let start: u64 = error["message"].as_str().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(start > 64, "{error}");
    assert!(error["detail"].as_str().unwrap().ends_with(&format!("go on with since={}", start - 1)), "{error}");
    let rest = api
        .raw(format!("GET /v1/events?since={} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n", start - 1).as_bytes())
        .await;
    assert!(rest.contains(&format!("{{\"seq\":{start},")), "{rest}");
}

#[tokio::test]
async fn an_agent_that_drains_refuses_stops_and_says_so() {
    let api = Api::start().await;
    api.launch("a").await;
    api.launch("b").await;
    let answer = api.raw(b"POST /v1/drain HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let lines = answer.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let lines: Vec<_> = lines.filter(Value::is_object).collect();
    let last = lines.last().unwrap();
    assert_eq!(last, &json!({ "vms": 2, "stopped": 2, "left": [], "done": true }), "{answer}");
    assert_eq!(lines.iter().filter(|line| line["done"] == true).count(), 1);
    for path in ["/v1/vms", "/v1/sessions", "/v1/bundles", "/v1/clusters"] {
        assert_eq!(code(&api.post(path, &json!({})).await), (503, "draining"), "{path}");
    }
    assert_eq!(api.get("/v1/vms/a").await.1["state"], "stopped");
    assert!(api.agent.draining().borrow().is_over);
}
