//! Balloons over the API: set, shown, and what is refused.

use serde_json::json;

use super::Api;

#[tokio::test]
async fn a_balloon_is_set_shown_and_bounded() {
    let api = Api::start().await;
    api.launch("web").await;
    let (_, before) = api.get("/v1/vms/web/stats").await;
    let fresh = json!({"target_bytes": 0, "actual_bytes": 0, "reported_bytes": 0, "guest": null});
    assert_eq!(before["balloon"], fresh);
    let (status, set) = api.post("/v1/vms/web/balloon", &json!({"target_mib": 96})).await;
    assert_eq!((status, &set["target_bytes"]), (200, &json!(96 << 20)), "{set}");
    let (_, after) = api.get("/v1/vms/web/stats").await;
    assert_eq!(after["balloon"]["actual_bytes"], json!(96 << 20));
    let (status, refused) = api.post("/v1/vms/web/balloon", &json!({"target_mib": 97})).await;
    assert_eq!((status, &refused["error"]["code"]), (422, &json!("balloon_too_large")), "{refused}");
    assert!(refused["error"]["message"].as_str().unwrap().contains("at most 96 are possible"), "{refused}");
    for body in [json!({}), json!({ "target_mib":  -1 }), json!({ "target_mib":  1, "more": 2 })] {
        let (status, _) = api.post("/v1/vms/web/balloon", &body).await;
        assert!((400..=422).contains(&status), "{body}: {status}");
    }
    let (status, _) = api.post("/v1/vms/nobody/balloon", &json!({"target_mib": 1})).await;
    assert_eq!(status, 404);
    assert_eq!(api.post("/v1/vms/web/stop", &json!({ "timeout_ms": 0 })).await.1["state"], "stopped");
    let (status, refused) = api.post("/v1/vms/web/balloon", &json!({"target_mib": 1})).await;
    assert_eq!(status, 409, "{refused}");
}
