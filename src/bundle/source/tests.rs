//! Tests of `bundle::source`.

use super::*;
use crate::bundle::samples::{GOLDEN_ID, Rig};
use crate::sys::file;
use proptest::prelude::*;

fn parsed(text: &str) -> Result<SourceSpec, ParseSourceError> {
    text.parse()
}

fn http(authority: &str, path: &str) -> SourceSpec {
    SourceSpec::Http { authority: authority.to_owned(), path: path.to_owned() }
}

#[test]
fn sources_are_read_and_told_back() {
    let peer = SourceSpec::Peer { name: "host-2".to_owned() };
    for (text, wanted, told) in [
        ("peer:host-2", peer, "peer:host-2"),
        ("/srv/bundles/", SourceSpec::Directory("/srv/bundles".into()), "/srv/bundles"),
        ("/", SourceSpec::Directory("/".into()), "/"),
        ("http://store", http("store", ""), "http://store"),
        ("http://store/", http("store", ""), "http://store"),
        ("http://Store.Example:8080/a/b//", http("store.example:8080", "/a/b"), "http://store.example:8080/a/b"),
        ("http://192.0.2.7:080/%7Ex", http("192.0.2.7:80", "/%7Ex"), "http://192.0.2.7:80/%7Ex"),
        ("http://[2001:DB8::7]:9/x", http("[2001:db8::7]:9", "/x"), "http://[2001:db8::7]:9/x"),
        ("http://[::1]", http("[::1]", ""), "http://[::1]"),
    ] {
        let found = parsed(text).unwrap();
        assert_eq!((&found, found.to_string().as_str()), (&wanted, told));
        assert_eq!(parsed(told).as_ref(), Ok(&wanted));
    }
}

#[test]
fn what_is_none_is_told_with_what_is_possible() {
    for text in ["", "store", "./here", "ftp://store/x", "HTTP://store", "peers:b", "http:/x", " /srv"] {
        let error = parsed(text).unwrap_err();
        assert!(matches!(error, ParseSourceError::Unknown { .. }), "{text}: {error}");
        assert!(error.to_string().contains("peer:NAME, an absolute path, and http://"), "{error}");
    }
    let error = parsed("https://store/x").unwrap_err().to_string();
    assert!(error.contains("verified by the bundle's id") && error.contains("proxy on this host"), "{error}");
    for text in ["peer:", "peer:B", "peer:a/b", &format!("peer:{}", "a".repeat(64))] {
        assert!(matches!(parsed(text), Err(ParseSourceError::Peer { .. })), "{text}");
    }
    for text in ["/a\nb", &format!("/{}", "a".repeat(1024))] {
        assert!(matches!(parsed(text), Err(ParseSourceError::Path { .. })), "{text}");
    }
    for text in [
        "http://",
        "http:///x",
        "http://:80/",
        "http://u@store/",
        "http://u:p@store/",
        "http://store:0/",
        "http://store:65536/",
        "http://store:/",
        "http://store:+80/",
        "http://store:8a/",
        "http://st ore/",
        "http://-a/",
        "http://a-/",
        "http://a..b/",
        "http://.a/",
        "http://1.2.3/",
        "http://1.2.3.4.5/",
        "http://999.1.1.1/",
        "http://[::1",
        "http://[::1]x/",
        "http://[1.2.3.4]/",
        "http://[fe80::1%25eth0]/",
        "http://a/?q",
        "http://a?q",
        "http://a/#f",
        "http://a#f",
        "http://a/../b",
        "http://a/./b",
        "http://a/b//c",
        "http://a/b c",
        "http://a/%zz",
        "http://a/%2",
        "http://a/\u{e9}",
        "http://\u{e9}/",
        "http://a/b\\c",
        "http://a/\r\nHost: b",
        &format!("http://{}/", "a".repeat(64)),
        &format!("http://{}a/", "a.".repeat(127)),
        &format!("http://a/{}", "b".repeat(1024)),
    ] {
        assert!(matches!(parsed(text), Err(ParseSourceError::Address { .. })), "{text}: {:?}", parsed(text));
    }
    assert_eq!(parsed("https://x").unwrap_err().retry(), Retry::WithChange);
}

#[test]
fn a_directory_is_read_as_a_store() {
    let rig = Rig::new(1 << 20);
    let id = rig.full("one", &[(0, b"first"), (300 << 10, b"more")]).id;
    let read = |part| read_from_directory(&rig.root, &id, part);
    let manifest = read(BundlePart::Manifest).unwrap();
    assert_eq!(crate::bundle::manifest::id_of(&manifest), id);
    assert_eq!(read(BundlePart::State).unwrap(), crate::bundle::samples::state());
    let memory = read(BundlePart::Memory { offset: 300 << 10, bytes: 8 }).unwrap();
    assert_eq!(memory, b"more\0\0\0\0");
    assert_eq!(read(BundlePart::Memory { offset: 1 << 20, bytes: 0 }).unwrap(), b"");
    let signatures = read(BundlePart::Signatures).unwrap();
    assert_eq!(crate::bundle::read_signatures(&signatures), Some(vec![]));
    for (offset, bytes) in [(1 << 20, 1), ((1 << 20) - 4, 5), (u64::MAX, 1), (u64::MAX - 1, 1 << 20)] {
        let found = read(BundlePart::Memory { offset, bytes });
        assert!(matches!(found, Err(ReadDirectoryError::Short { .. } | ReadDirectoryError::Io { .. })), "{found:?}");
    }
    let long = read(BundlePart::Memory { offset: 0, bytes: (1 << 20) + 1 });
    assert!(matches!(long, Err(ReadDirectoryError::Long { .. })), "{long:?}");
    let other: BundleId = GOLDEN_ID.parse().unwrap();
    for part in [BundlePart::Manifest, BundlePart::Signatures, BundlePart::Memory { offset: 0, bytes: 1 }] {
        let found = read_from_directory(&rig.root, &other, part);
        assert!(matches!(found, Err(ReadDirectoryError::NotThere { .. })), "{found:?}");
    }
    // What is a link, a directory or far too long is not read.
    let there = rig.root.join(other.as_str());
    std::fs::create_dir(&there).unwrap();
    std::os::unix::fs::symlink(rig.root.join(id.as_str()).join(MANIFEST), there.join(MANIFEST)).unwrap();
    std::fs::create_dir(there.join(MEMORY)).unwrap();
    file::create(&there.join(STATE)).unwrap().set_len(STATE_BYTES_MAX + 1).unwrap();
    let read = |part| read_from_directory(&rig.root, &other, part).unwrap_err();
    assert!(matches!(read(BundlePart::Manifest), ReadDirectoryError::NotThere { .. }));
    assert!(matches!(read(BundlePart::Memory { offset: 0, bytes: 1 }), ReadDirectoryError::NotThere { .. }));
    assert!(matches!(read(BundlePart::State), ReadDirectoryError::Long { .. }));
}

proptest! {
    #[test]
    fn what_is_told_is_read_the_same(
        source in prop_oneof![
            "peer:[a-z0-9-]{1,63}",
            "(/[ -.0-~]{1,20}){1,5}",
            "http://[a-z0-9]{1,20}(\\.[a-z][a-z0-9]{0,9}){1,3}(:[1-9][0-9]{0,3})?(/[a-z0-9~-]{1,9}){0,4}/{0,2}",
        ],
    ) {
        let found = parsed(&source).unwrap();
        prop_assert_eq!(parsed(&found.to_string()), Ok(found));
    }

    /// Whatever the text is, what it is taken for is told as a text that means the same, and fits into a request.
    #[test]
    fn anything_is_read_or_refused(
        text in prop_oneof![
            any::<String>(),
            "http://[\\PC]{0,40}",
            "http://[a-z.:@\\[\\]0-9/?#%]{0,40}",
            "(peer:|/|http://|https://)[ -~]{0,60}",
        ],
    ) {
        if let Ok(found) = parsed(&text) {
            let told = found.to_string();
            prop_assert_eq!(parsed(&told), Ok(found.clone()));
            prop_assert!(!told.chars().any(char::is_control));
            if let SourceSpec::Http { authority, path } = found {
                let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
                prop_assert!(plain(&authority) && plain(&path) && !authority.contains(['/', '@', '?', '#']));
                prop_assert!(path.is_empty() || path.starts_with('/') && !path.ends_with('/'));
                prop_assert!(!path.contains(['?', '#']) && !path.split('/').any(|part| part == ".."));
            }
        }
    }
}
