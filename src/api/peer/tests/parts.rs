//! Bundles that come from another host piece by piece.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::*;
use crate::agent::peers::{BUNDLE_PART_PATH, PIECE_BYTES_MAX, PeerError};
use crate::agent::{BundlePart, SourceError, SourceSpec, StoreLink, StoreLinkError};
use crate::ids::BundleId;

const GOLDEN: &[u8] = include_bytes!("../../../../tests/golden/bundle_v1/manifest.json");

/// Has the golden bundle at a host: a simulated one is its manifest.
async fn import(host: &Host) -> BundleId {
    let (to, pieces) = tokio::sync::mpsc::channel(1);
    to.send(Ok(Bytes::from_static(GOLDEN))).await.unwrap();
    drop(to);
    host.door.import_bundle(pieces).await.unwrap().remove(0).view.id
}

fn from_b() -> SourceSpec {
    "peer:b".parse().unwrap()
}

fn memory(offset: u64, bytes: u64) -> BundlePart {
    BundlePart::Memory { offset, bytes }
}

#[tokio::test(start_paused = true)]
async fn a_bundle_of_another_host_is_read_in_parts() {
    let (wire, a, b) = two_reachable().await;
    let id = import(&b).await;
    let read = async |part| a.agent.read_source(&from_b(), &id, part).await;
    assert_eq!(read(BundlePart::Manifest).await.unwrap(), GOLDEN);
    assert_eq!(read(BundlePart::Signatures).await.unwrap(), "");
    assert_eq!(read(BundlePart::State).await.unwrap(), "");
    for (offset, bytes) in [(0, 1), (77, 4096), ((1 << 20) - 3, 3), (0, 1 << 20), (5, 0)] {
        let found = read(memory(offset, bytes)).await.unwrap();
        assert!(found.len() as u64 == bytes && found.iter().all(|byte| *byte == 0), "{offset} {bytes}");
    }
    // The MiB came in pieces of what an answer may hold.
    let sent = wire.sent.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let pieces = sent.iter().filter(|call| call.path == BUNDLE_PART_PATH).count();
    assert_eq!(pieces, 3 + 3 + 2, "{pieces}");
    for (offset, bytes) in [(1 << 20, 1), (u64::MAX, 1), ((1 << 20) - 1, 2)] {
        let error = read(memory(offset, bytes)).await.unwrap_err();
        let SourceError::Peer { source: PeerError::Refused { status: 416, code, .. }, .. } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(code, "part_beyond_end");
    }
    assert!(matches!(read(memory(0, (1 << 20) + 1)).await, Err(SourceError::TooMany { .. })));
}

#[tokio::test(start_paused = true)]
async fn what_another_host_does_not_have_is_told() {
    let (wire, a, b) = two_reachable().await;
    let id: BundleId = "b-77777777777777777777777774".parse().unwrap();
    let error = a.agent.read_source(&from_b(), &id, BundlePart::Manifest).await.unwrap_err();
    assert!(matches!(error, SourceError::NotThere { .. }), "{error:?}");
    let told = error.to_string();
    assert!(
        told.contains("host b does not have the manifest of bundle b-") && told.contains("copy the bundle"),
        "{told}"
    );
    assert_eq!(a.agent.read_source(&from_b(), &id, BundlePart::Signatures).await.unwrap(), "");
    let nobody = "peer:c".parse().unwrap();
    let error = a.agent.read_source(&nobody, &id, BundlePart::Manifest).await.unwrap_err();
    assert!(matches!(error, SourceError::UnknownPeer { .. }) && error.to_string().contains("[[peers]]"), "{error}");
    let id = import(&b).await;
    wire.is_cut.store(true, Ordering::Relaxed);
    let error = a.agent.read_source(&from_b(), &id, BundlePart::Manifest).await.unwrap_err();
    assert!(matches!(error, SourceError::Peer { source: PeerError::Unreachable { .. }, .. }), "{error:?}");
    assert_eq!(error.retry(), Retry::Later);
    let (_wire, a, _b) = two(None, None).await;
    let error = a.agent.read_source(&from_b(), &id, BundlePart::Manifest).await.unwrap_err();
    assert!(matches!(error, SourceError::Peer { source: PeerError::NoKey, .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_piece_is_asked_for_with_the_key_and_within_bounds() {
    let (wire, a, b) = two_reachable().await;
    let id = import(&b).await;
    let order = |part: &str, offset: u64, bytes: u64| json!({ "bundle_id": id.as_str(), "part": part, "offset": offset, "bytes": bytes });
    let key = PeerKey::new(KEY);
    let ask = async |body: Value, nonce: u8| {
        let body = serde_json::to_vec(&body).unwrap();
        let what = Signed { method: "POST", path: BUNDLE_PART_PATH, body: &body };
        let at_ms = a.door.now().0 / 1_000_000;
        let head = key.sign(1, 2, at_ms, [nonce; 16], &what).to_string();
        let call = PeerCall { method: "POST", path: BUNDLE_PART_PATH.to_owned(), body, head: Some(head) };
        wire.deliver(A.parse().unwrap(), B.parse().unwrap(), call).await.unwrap()
    };
    let answer = ask(order("manifest", 5, 10), 1).await;
    let body: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!((answer.status, &body["total_bytes"]), (200, &json!(GOLDEN.len())));
    assert_eq!(crate::base64::decode(body["bytes"].as_str().unwrap()).unwrap(), GOLDEN[5..15]);
    let over = u64::from(PIECE_BYTES_MAX) + 1;
    let total = GOLDEN.len() as u64;
    for (nonce, (body, status, code)) in (10..).zip([
        (order("manifest", 0, over), 400, "part_bytes"),
        (order("memory", 0, over), 400, "part_bytes"),
        (order("memory", 0, 0), 400, "part_bytes"),
        (order("memory", 0, 1 << 40), 400, "invalid_value"),
        (order("manifest", total + 1, 1), 416, "part_beyond_end"),
        (order("manifest", u64::MAX, 1), 416, "part_beyond_end"),
        (order("memory", 1 << 20, 1), 416, "part_beyond_end"),
        (order("disk", 0, 1), 400, "invalid_value"),
        (json!({ "bundle_id": "b-UPPER", "part": "state", "offset": 0, "bytes": 1 }), 400, "invalid_value"),
        (json!({ "bundle_id": "../../etc", "part": "state", "offset": 0, "bytes": 1 }), 400, "invalid_value"),
        (json!({ "bundle_id": id.as_str(), "part": "state", "offset": -1, "bytes": 1 }), 400, "invalid_value"),
        (json!({ "bundle_id": id.as_str(), "part": "state" }), 400, "invalid_value"),
        (
            json!({ "bundle_id": "b-77777777777777777777777774", "part": "state", "offset": 0, "bytes": 1 }),
            404,
            "unknown_bundle",
        ),
        (json!([]), 400, "invalid_value"),
    ]) {
        let shown = body.to_string();
        assert_eq!(error(&ask(body, nonce).await), (status, code.to_owned()), "{shown}");
    }
    // At its end there is nothing, which is no error.
    assert_eq!(ask(order("manifest", total, 1), 2).await.status, 200);
    // Without the key, with another one, and by GET.
    let body = serde_json::to_vec(&order("manifest", 0, 1)).unwrap();
    let call = PeerCall { method: "POST", path: BUNDLE_PART_PATH.to_owned(), body, head: None };
    let answer = wire.deliver(A.parse().unwrap(), B.parse().unwrap(), call.clone()).await.unwrap();
    assert_eq!(error(&answer), (401, "peer_unsigned".to_owned()));
    let what = Signed { method: "POST", path: BUNDLE_PART_PATH, body: &call.body };
    let head = PeerKey::new(&[9; 32]).sign(1, 2, a.door.now().0 / 1_000_000, [3; 16], &what).to_string();
    let other = PeerCall { head: Some(head), ..call };
    let answer = wire.deliver(A.parse().unwrap(), B.parse().unwrap(), other).await.unwrap();
    assert_eq!(error(&answer), (401, "peer_key_refused".to_owned()));
}

/// A store that has one file, and nothing else.
struct OneFile;

impl StoreLink for OneFile {
    fn get<'a>(
        &'a self,
        authority: &'a str,
        path: &'a str,
        range: Option<std::ops::Range<u64>>,
        bytes_max: u64,
    ) -> BoxFuture<'a, Result<Bytes, StoreLinkError>> {
        Box::pin(async move {
            assert!(range.is_none_or(|range| range.end - range.start == bytes_max && bytes_max > 0));
            match (authority, path.strip_prefix("/base/b-").and_then(|rest| rest.split_once('/'))) {
                ("store:8080", Some((_, "manifest.json"))) => Ok(Bytes::from_static(GOLDEN)),
                ("store:8080", Some((_, "memory.img"))) => Err(StoreLinkError::NoRanges { status: 200 }),
                (_, _) => Err(StoreLinkError::NotThere { path: path.to_owned(), status: 404 }),
            }
        })
    }
}

#[tokio::test(start_paused = true)]
async fn stores_are_asked_by_the_link_and_directories_by_the_disk() {
    let a = Host::start("a", config(1, "", &[])).await;
    let id: BundleId = "b-77777777777777777777777774".parse().unwrap();
    let store: SourceSpec = "http://store:8080/base/".parse().unwrap();
    let read = async |from: &SourceSpec, part| a.agent.read_source(from, &id, part).await;
    let error = read(&store, BundlePart::Manifest).await.unwrap_err();
    assert!(matches!(error, SourceError::NotStarted { .. }), "{error:?}");
    a.door.start_sources(Arc::new(OneFile));
    assert_eq!(read(&store, BundlePart::Manifest).await.unwrap(), GOLDEN);
    assert_eq!(read(&store, BundlePart::Signatures).await.unwrap(), "");
    assert_eq!(read(&store, memory(9, 0)).await.unwrap(), "");
    assert!(matches!(read(&store, BundlePart::State).await, Err(SourceError::NotThere { .. })));
    let error = read(&store, memory(0, 9)).await.unwrap_err();
    let told = crate::report::chain(&error);
    assert!(
        told.starts_with("have memory of bundle b-7777") && told.contains("from store http://store:8080/base: it does"),
        "{told}"
    );
    assert_eq!(error.retry(), Retry::WithChange);

    let directory = tempfile::tempdir().unwrap();
    let from = SourceSpec::Directory(directory.path().to_owned());
    assert!(matches!(read(&from, BundlePart::Manifest).await, Err(SourceError::NotThere { .. })));
    assert_eq!(read(&from, BundlePart::Signatures).await.unwrap(), "");
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/bundle_v1");
    std::os::unix::fs::symlink(golden, directory.path().join(id.as_str())).unwrap();
    assert_eq!(read(&from, BundlePart::Manifest).await.unwrap(), GOLDEN);
    assert!(matches!(
        read(&from, memory(1 << 40, 9)).await,
        Err(SourceError::Directory { .. } | SourceError::NotThere { .. })
    ));
}
