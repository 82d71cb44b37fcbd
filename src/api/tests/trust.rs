//! Bundles as files, signatures, and launches of what nobody who is trusted signed.

use super::clusters::wait_for;
use super::*;
use crate::signing::{PrivateKey, PublicKey};

fn key(number: u8) -> PrivateKey {
    PrivateKey::from_seed([number; 32]).unwrap()
}

fn public(number: u8) -> PublicKey {
    key(number).public()
}

/// What a client sends to sign a bundle.
fn signature(number: u8, bundle: &Value) -> Value {
    let digest: Vec<u8> = (0..32)
        .map(|at| u8::from_str_radix(&bundle["manifest_digest"].as_str().unwrap()[at * 2..at * 2 + 2], 16).unwrap())
        .collect();
    let signature = key(number).sign_bundle(&digest.try_into().unwrap());
    json!({ "key": public(number).to_string(), "signature": signature.to_string() })
}

impl Api {
    /// With a bundle `warm`, and nothing else any more.
    async fn with_bundle(text: &str) -> (Self, Value) {
        let api = Self::configured(text).await;
        let (status, operation) = api.post("/v1/bundles", &json!({ "name": "warm", "warmup": "true" })).await;
        assert_eq!(status, 202, "{operation}");
        let path = format!("/v1/operations/{}", operation["id"].as_str().unwrap());
        wait_for(&api, &path, "done", |found| found["state"] == "succeeded").await;
        wait_for(&api, "/v1/vms", "gone", |found| *found == json!({ "vms": [] })).await;
        let bundle = api.get("/v1/bundles/warm").await.1;
        (api, bundle)
    }

    async fn launch_warm(&self, name: &str) -> (u16, Value) {
        self.post("/v1/vms", &json!({ "name": name, "bundle": "warm", "wait": "running" })).await
    }

    /// The bytes of a bundle's file.
    async fn exported(&self, word: &str) -> Vec<u8> {
        // HTTP/1.0 ends what it sends with the connection.
        let answer = self.raw(format!("GET /v1/bundles/{word}/export HTTP/1.0\r\nhost: h\r\n\r\n").as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("200 OK") && head.contains("application/octet-stream"), "{head}");
        body.as_bytes().to_vec()
    }

    async fn import(&self, bytes: &[u8]) -> (u16, Value) {
        self.ask("POST", "/v1/bundle-imports", &[], std::str::from_utf8(bytes).unwrap()).await
    }
}

#[tokio::test]
async fn what_nobody_trusted_signed_is_refused_before_anything_is_there() {
    let text = format!("[bundles]\ntrusted_keys = ['{}']", public(1));
    let (api, bundle) = Api::with_bundle(&text).await;
    assert_eq!((&bundle["trust"], &bundle["signed_by"]), (&json!("untrusted"), &json!([])), "{bundle}");
    let refused = async |why: &str| {
        for answer in [api.launch_warm("w").await, api.ask_pool(&json!({ "size": 1 })).await] {
            assert_eq!(code(&answer), (403, "bundle_untrusted"), "{}", answer.1);
            let error = &answer.1["error"];
            assert!(error["message"].as_str().unwrap().contains(why), "{error}");
            assert!(error["detail"].as_str().unwrap().contains("hearth bundle sign"), "{error}");
        }
        assert_eq!((api.host.living(), api.host.directories(), api.host.jailed()), (vec![], vec![], vec![]));
        assert_eq!(api.get("/v1/vms").await.1, json!({ "vms": [] }));
    };
    refused("no signature").await;
    let path = "/v1/bundles/warm/signatures";
    assert_eq!(api.post(path, &signature(2, &bundle)).await.0, 201);
    refused(&public(2).to_string()).await;
    // Of another bundle, by the trusted key.
    let other = json!({ "manifest_digest": "00".repeat(32) });
    assert_eq!(code(&api.post(path, &signature(1, &other)).await), (422, "bad_signature"));
    for wrong in [
        json!({ "key": "ed25519:AAAA", "signature": signature(1, &bundle)["signature"] }),
        json!({ "key": public(1).to_string(), "signature": "AAAA" }),
        json!({ "key": public(1).to_string() }),
    ] {
        assert_eq!(code(&api.post(path, &wrong).await), (400, "invalid_value"), "{wrong}");
    }
    let absent = api.post("/v1/bundles/absent/signatures", &signature(1, &bundle)).await;
    assert_eq!(code(&absent), (404, "unknown_bundle"));
    let (status, signed) = api.post(path, &signature(1, &bundle)).await;
    assert_eq!((status, &signed["trust"]), (201, &json!("signed")), "{signed}");
    assert_eq!(signed["signed_by"].as_array().unwrap().len(), 2);
    assert_eq!(api.launch_warm("w").await.0, 201);
    assert_eq!(api.ask_pool(&json!({ "size": 1 })).await.0, 200);
}

impl Api {
    async fn ask_pool(&self, body: &Value) -> (u16, Value) {
        self.ask("PUT", "/v1/pools/warm", &["content-type: application/json"], &body.to_string()).await
    }
}

#[tokio::test]
async fn what_was_made_here_may_be_enough() {
    let text = format!("[bundles]\ntrusted_keys = ['{}']\ntrust_local = true", public(1));
    let (api, bundle) = Api::with_bundle(&text).await;
    assert_eq!(bundle["trust"], "made_here");
    assert_eq!(api.launch_warm("w").await.0, 201);
    assert_eq!(api.ask("DELETE", "/v1/vms/w?timeout_ms=0", &[], "").await.0, 204);
    // The same content from elsewhere is not.
    let bytes = api.exported("warm").await;
    assert_eq!(api.ask("DELETE", "/v1/bundles/warm", &[], "").await.0, 204);
    let (status, imported) = api.import(&bytes).await;
    assert_eq!((status, &imported["bundle"]["trust"]), (201, &json!("untrusted")), "{imported}");
    assert_eq!(code(&api.launch_warm("w").await), (403, "bundle_untrusted"));
    assert_eq!(api.post("/v1/bundles/warm/compact", &json!({})).await.1["trust"], "untrusted");
}

#[tokio::test]
async fn a_file_is_taken_whole_or_not_at_all() {
    let (api, bundle) = Api::with_bundle("").await;
    assert_eq!(bundle["trust"], "unchecked");
    let bytes = api.exported("warm").await;
    let (status, again) = api.import(&bytes).await;
    assert_eq!((status, &again["existed"], &again["parents"]), (200, &json!(true), &json!([])), "{again}");
    assert_eq!(api.ask("DELETE", "/v1/bundles/warm", &[], "").await.0, 204);
    assert_eq!(code(&api.import(&bytes[..bytes.len() - 1]).await), (422, "import_corrupt"));
    assert!(api.host.bundles().is_empty());
    let (status, imported) = api.import(&bytes).await;
    assert_eq!((status, &imported["existed"], &imported["bundle"]["id"]), (201, &json!(false), &bundle["id"]));
    assert_eq!(code(&api.get("/v1/bundles/absent/export").await), (404, "unknown_bundle"));
    api.host.set_disk_free(0);
    assert_eq!(code(&api.import(&bytes).await), (507, "disk_reserve"));
}
