//! Documents of anybody's OCI layout: index, manifest and configuration are refused or understood.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use hearth::container::{Bounds, Container, Source};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

const BOUNDS: Bounds = Bounds { unpacked_bytes: 1 << 20, disk_bytes: 4 << 20 };

/// The documents are at most as long as an input, so their digests are few files: one each.
fn blob(layout: &Path, bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    std::fs::write(layout.join("blobs/sha256").join(&hex), bytes).expect("a blob");
    hex
}

fuzz_target!(|bytes: &[u8]| {
    static LAYOUT: OnceLock<tempfile::TempDir> = OnceLock::new();
    let layout = LAYOUT.get_or_init(|| {
        let layout = tempfile::tempdir().expect("a directory");
        std::fs::create_dir_all(layout.path().join("blobs/sha256")).expect("directories");
        std::fs::write(layout.path().join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#).expect("a file");
        layout
    });
    let layout = layout.path();
    let mut parts = bytes.splitn(3, |byte| *byte == 0);
    let (how, document, config) =
        (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let digest = blob(layout, document);
    let config_digest = blob(layout, config);
    // The bytes are the index itself, or what an index names; the configuration can be named by what they say.
    let index = match how {
        [] | [_] => document.to_vec(),
        [kind, ..] => {
            let kind = if kind & 1 == 0 { "manifest" } else { "index" };
            let size = document.len();
            format!(
                r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.{kind}.v1+json","digest":"sha256:{digest}","size":{size}}}]}}"#
            )
            .into_bytes()
        }
    };
    std::fs::write(layout.join("index.json"), index).expect("an index");
    let source = Source::Oci { layout: layout.to_owned(), reference: how.first().map(|_| "web".to_owned()) };
    let spool = || tempfile::tempfile().expect("a temporary file");
    let _ = Container::unpack(&source, spool(), BOUNDS);
    let _ = Container::unpack(&Source::Oci { layout: layout.to_owned(), reference: None }, spool(), BOUNDS);
    // A manifest whose configuration is the rest.
    let manifest = format!(
        r#"{{"config":{{"digest":"sha256:{config_digest}","size":{}}},"layers":[]}}"#,
        config.len()
    );
    let manifest_digest = blob(layout, manifest.as_bytes());
    let index = format!(
        r#"{{"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:{manifest_digest}","size":{}}}]}}"#,
        manifest.len()
    );
    std::fs::write(layout.join("index.json"), index).expect("an index");
    if let Ok(container) = Container::unpack(&Source::Oci { layout: layout.to_owned(), reference: None }, spool(), BOUNDS)
    {
        assert_eq!(container.layers(), 0);
    }
    for name in [digest, config_digest, manifest_digest] {
        let _ = std::fs::remove_file(layout.join("blobs/sha256").join(name));
    }
});
