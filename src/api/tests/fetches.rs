//! Bundles from elsewhere, where nothing is anywhere: what can be asked wrongly, and that nothing comes of it.

use super::*;

const NOBODYS: &str = "b-aaaaaaaaaaaaaaaaaaaaaaaaaa";

#[tokio::test]
async fn what_cannot_be_fetched_is_refused_and_leaves_nothing() {
    let api = Api::configured("").await;
    let fetch = async |bundle: &str, from: &str| {
        api.post("/v1/bundle-fetches", &json!({ "bundle_id": bundle, "from": from })).await
    };
    for (from, wanted) in [
        ("", (400, "invalid_source")),
        ("bundles", (400, "invalid_source")),
        ("https://store/bundles", (400, "invalid_source")),
        ("http://user@store/", (400, "invalid_source")),
        ("peer:", (400, "invalid_source")),
        ("peer:two", (422, "unknown_peer")),
        ("/nowhere", (404, "bundle_not_there")),
        ("http://127.0.0.1:1", (503, "not_started")),
    ] {
        let refused = fetch(NOBODYS, from).await;
        assert_eq!(code(&refused), wanted, "{from}: {}", refused.1);
    }
    for bundle in ["web", "b-", "b-AAAAAAAAAAAAAAAAAAAAAAAAAA", "../etc"] {
        assert_eq!(fetch(bundle, "/srv/bundles").await.0, 400, "{bundle}");
    }
    let extra = json!({ "bundle_id": NOBODYS, "from": "/srv", "mode": "lazy" });
    assert_eq!(api.post("/v1/bundle-fetches", &extra).await.0, 400);
    assert_eq!(api.get("/v1/bundles").await.1, json!({ "bundles": [], "unreadable": [] }));
    for method in ["PUT", "DELETE"] {
        assert_eq!(code(&api.ask(method, "/v1/bundles/web/pin", &[], "").await), (404, "unknown_bundle"), "{method}");
    }
}

#[tokio::test]
async fn only_a_bundle_is_launched_lazily() {
    let api = Api::configured("").await;
    let refused = api.post("/v1/vms", &json!({ "mode": "lazy" })).await;
    assert_eq!(code(&refused), (400, "lazy_without_bundle"), "{}", refused.1);
    let refused = api.post("/v1/vms", &json!({ "mode": "lazy", "bundle": NOBODYS })).await;
    assert_eq!(code(&refused), (422, "unknown_bundle"), "{}", refused.1);
    assert_eq!(api.post("/v1/vms", &json!({ "mode": "eager", "bundle": NOBODYS })).await.0, 400);
    let (status, vm) = api.post("/v1/vms", &json!({ "name": "booted", "wait": "running" })).await;
    assert_eq!(status, 201, "{vm}");
    let memory = api.get("/v1/vms/booted/memory").await;
    let wanted = json!({ "vm_id": vm["id"], "bundle_id": null, "mode": null, "filling": null });
    assert_eq!(memory, (200, wanted));
    assert_eq!(code(&api.get("/v1/vms/other/memory").await), (404, "not_found"));
}
