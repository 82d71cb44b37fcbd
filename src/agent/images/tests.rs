//! Images made of anything but what they should be are refused, and say why.

use super::*;

fn store() -> (tempfile::TempDir, ImageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::new(dir.path().join("images"), 0);
    (dir, store)
}

fn import(dir: &Path, name: &str) -> ImageImport {
    let kernel = dir.join("vmlinux");
    file::replace(&kernel, b"kernel").unwrap();
    let kernel_path = kernel.to_str().unwrap().to_owned();
    let content = ImageContent::Files { kernel_path, initrd_path: None };
    ImageImport { name: name.to_owned(), content, command_line: Some("quiet".to_owned()) }
}

fn write(store: &ImageStore, name: &str, json: &str) {
    file::make_directories(&store.dir.join(name)).unwrap();
    file::replace(&store.dir.join(name).join("image.json"), json.as_bytes()).unwrap();
}

#[test]
fn an_import_is_listed_opened_and_removed() {
    let (dir, store) = store();
    assert!(store.list().is_empty());
    let image = store.import(&import(dir.path(), "demo"), false).unwrap();
    assert_eq!((image.kernel_bytes, image.command_line.as_str()), (6, "quiet"));
    assert_eq!(store.list(), [image]);
    assert!(store.open("demo").unwrap().initrd.is_none());
    assert!(matches!(store.import(&import(dir.path(), "demo"), false), Err(ImageError::Exists { .. })));
    store.remove("demo").unwrap();
    assert!(matches!(store.image("demo"), Err(ImageError::Unknown { .. })));
    assert_eq!(std::fs::read_dir(&store.dir).unwrap().count(), 0);
}

#[test]
fn a_failed_import_leaves_nothing() {
    let (dir, store) = store();
    let mut absent = import(dir.path(), "demo");
    if let ImageContent::Files { initrd_path, .. } = &mut absent.content {
        *initrd_path = Some("/absent/initrd".to_owned());
    }
    assert!(matches!(store.import(&absent, false), Err(ImageError::File { file, .. }) if file == "/absent/initrd"));
    assert_eq!(std::fs::read_dir(&store.dir).unwrap().count(), 0);
}

#[test]
fn malformed_images_are_refused() {
    let (_dir, store) = store();
    let cases = [
        ("", "image.json"),
        ("{", "image.json"),
        (r#"{"format":2,"name":"bad","kernel":"k"}"#, "format 2"),
        (r#"{"format":1,"name":"other","kernel":"k"}"#, "names it"),
        (r#"{"format":1,"name":"bad","kernel":"k","more":1}"#, "image.json"),
        (r#"{"format":1,"name":"bad","kernel":"../k"}"#, "cannot lead elsewhere"),
        (r#"{"format":1,"name":"bad","kernel":"/etc/passwd"}"#, "cannot lead elsewhere"),
        (r#"{"format":1,"name":"bad","kernel":"absent"}"#, "absent"),
        (r#"{"format":1,"name":"bad","kernel":"k","command_line":"a\nb"}"#, "printable"),
    ];
    for (json, word) in cases {
        write(&store, "bad", json);
        let error = store.image("bad").unwrap_err();
        let text = crate::report::chain(&error);
        assert!(text.contains(word), "{json}: {text}");
        assert!(store.list().is_empty());
    }
}

#[test]
fn names_are_dns_labels() {
    let long = "a".repeat(NAME_BYTES_MAX);
    for name in ["a", "demo", "a-1", long.as_str()] {
        assert!(is_name(name), "{name}");
    }
    let longer = "a".repeat(NAME_BYTES_MAX + 1);
    for name in ["", "-a", "a-", "1a", "A", "a_b", "a.b", "..", "a/b", "ä", longer.as_str()] {
        assert!(!is_name(name), "{name}");
    }
}
