//! Bundles that go into files and come out of them, keys, and signatures.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::fake::{Fake, bundle};
use crate::run::{at, hearth, output, text};

fn word(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

#[test]
fn an_export_is_a_whole_file_or_none() {
    let (fake, directory) = (Fake::start(), tempfile::tempdir().expect("a directory"));
    let file = directory.path().join("web.hearth");
    let done = output(at(&fake.socket(), &["--json", "bundle", "export", "web", "--output", word(&file)]));
    assert!(done.status.success(), "{done:?}");
    let value: Value = serde_json::from_slice(&done.stdout).expect("a value");
    assert_eq!((&value["bytes"], &value["file"]), (&100_003.into(), &word(&file).into()), "{value}");
    let metadata = std::fs::metadata(&file).expect("the file");
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o777), (100_003, 0o600));
    let piped = output(at(&fake.socket(), &["bundle", "export", "web"]));
    assert!(piped.status.success() && piped.stdout == std::fs::read(&file).expect("the file"));
    // One that breaks off leaves what was there.
    let broken = output(at(&fake.socket(), &["bundle", "export", "broken", "--output", word(&file)]));
    let error = text(&broken.stderr);
    assert!(!broken.status.success() && error.contains("broke off") && error.contains("bundle verify"), "{error}");
    assert_eq!(std::fs::metadata(&file).expect("the file").len(), 100_003);
    let left = std::fs::read_dir(directory.path()).expect("the directory").count();
    assert_eq!(left, 1, "nothing half written");
    let piped = output(at(&fake.socket(), &["bundle", "export", "broken"]));
    assert!(!piped.status.success());
    let nowhere = output(at(&fake.socket(), &["bundle", "export", "web", "--output", "/absent/web.hearth"]));
    assert!(!nowhere.status.success() && text(&nowhere.stderr).contains("/absent"), "{nowhere:?}");
}

#[test]
fn an_import_sends_all_of_a_file() {
    let (fake, directory) = (Fake::start(), tempfile::tempdir().expect("a directory"));
    let file = directory.path().join("web.hearth");
    let bytes: Vec<u8> = (0..1_000_000_u32).map(|at| u8::try_from(at % 251).expect("a byte")).collect();
    hearth::sys::file::replace(&file, &bytes).expect("a file");
    let done = output(at(&fake.socket(), &["bundle", "import", word(&file)]));
    assert!(done.status.success(), "{done:?}");
    let said = text(&done.stderr);
    assert!(said.contains("was here already") && said.contains("not launched here"), "{said}");
    assert_eq!(text(&done.stdout).trim(), bundle()["id"].as_str().expect("an id"));
    let mut piped = at(&fake.socket(), &["--json", "bundle", "import", "-"]);
    piped.stdin(std::fs::File::open(&file).expect("the file"));
    assert!(output(piped).status.success());
    assert!(fake.notes.lock().expect("notes").input == [&bytes[..], &bytes].concat());
    let empty = output(at(&fake.socket(), &["bundle", "import", "/dev/null"]));
    assert!(!empty.status.success() && text(&empty.stderr).contains("before its end"), "{empty:?}");
    let absent = output(at(&fake.socket(), &["bundle", "import", "/absent"]));
    assert!(!absent.status.success() && text(&absent.stderr).contains("/absent"), "{absent:?}");
}

#[test]
fn a_key_is_made_once_and_signs_only_what_the_id_says() {
    let (fake, directory) = (Fake::start(), tempfile::tempdir().expect("a directory"));
    let key = directory.path().join("release.key");
    let made = output(hearth(&["bundle", "key", "--output", word(&key)]));
    assert!(made.status.success() && text(&made.stdout).starts_with("ed25519:"), "{made:?}");
    assert_eq!(std::fs::metadata(&key).expect("the key").permissions().mode() & 0o777, 0o600);
    let again = output(hearth(&["bundle", "key", "--output", word(&key)]));
    assert!(!again.status.success() && text(&again.stderr).contains("File exists"), "{again:?}");
    // The fake's digest is that of an id of zeros, which its bundle has.
    let signed = output(at(&fake.socket(), &["bundle", "sign", "web", "--key", word(&key)]));
    assert!(signed.status.success(), "{signed:?}");
    let bodies = fake.notes.lock().expect("notes").bodies.clone();
    assert_eq!(bodies.last().expect("a body")["key"], text(&made.stdout).trim());
    let other = format!("b-{}", "c".repeat(25) + "a");
    let refused = output(at(&fake.socket(), &["bundle", "sign", &other, "--key", word(&key)]));
    assert!(!refused.status.success() && text(&refused.stderr).contains("not signed"), "{refused:?}");
    let no_key = output(at(&fake.socket(), &["bundle", "sign", "web", "--key", "/dev/null"]));
    assert!(!no_key.status.success() && text(&no_key.stderr).contains("no private key"), "{no_key:?}");
    assert_eq!(fake.notes.lock().expect("notes").bodies.len(), bodies.len(), "nothing else was sent");
}
