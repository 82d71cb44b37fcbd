//! Containers become images, or nothing is left of them.

use super::*;
use crate::agent::images::*;
use crate::container::{Whiteouts, find_file};

fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        header.set_path(name).unwrap();
        header.set_cksum();
        archive.append(&header, *content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// A store with an image `demo`, whose initrd has an agent.
fn store() -> (tempfile::TempDir, ImageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::new(dir.path().join("images"), 0);
    let mut made =
        Container::new(tempfile::tempfile().unwrap(), Bounds { unpacked_bytes: 1 << 20, disk_bytes: 1 << 20 });
    let archive = tar(&[("init", b"\x7fELF the agent")]);
    made.layer("layer", Whiteouts::Plain, archive.as_slice()).unwrap();
    let initrd = file::create(&dir.path().join("initrd")).unwrap();
    made.write_initramfs(b"another", &initrd).unwrap();
    file::replace(&dir.path().join("vmlinux"), b"kernel").unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let content = ImageContent::Files { kernel_path: path("vmlinux"), initrd_path: Some(path("initrd")) };
    let order = ImageImport { name: "demo".to_owned(), content, command_line: Some("quiet loglevel=3".to_owned()) };
    store.import(&order, false).unwrap();
    (dir, store)
}

fn import(dir: &Path, name: &str, archive: &[u8]) -> ImageImport {
    let path = dir.join("rootfs.tar");
    file::replace(&path, archive).unwrap();
    let content = ImageContent::Container { source: Source::Rootfs(path), like: None, unpacked_bytes_max: 1 << 20 };
    ImageImport { name: name.to_owned(), content, command_line: None }
}

fn left(store: &ImageStore) -> Vec<String> {
    let entries = std::fs::read_dir(&store.dir).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_container_becomes_an_image_with_the_agent_of_another() {
    let (dir, store) = store();
    let image = store.import(&import(dir.path(), "web", &tar(&[("etc/os-release", b"ID=web")])), true).unwrap();
    assert_eq!(image.command_line, format!("quiet loglevel=3 rdinit=/.hearth/init {}", glibc_words("").unwrap()));
    // The archive, twice what it becomes, and what the other image needs.
    assert_eq!(image.memory_mib_min, MEMORY_MIB_MIN_DEFAULT + 1);
    let origin = image.container.clone().unwrap();
    assert_eq!((origin.like.as_str(), origin.layers, &origin.program), ("demo", 1, &None));
    assert_eq!(store.list().len(), 2);
    assert_eq!(left(&store), ["demo", "web"]);
    let mut files: Vec<_> = std::fs::read_dir(store.dir.join("web")).unwrap().map(|e| e.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["image.json", "initrd", "kernel"]);
    let mut opened = store.open("web").unwrap();
    let agent = find_file(opened.initrd.as_mut().unwrap(), AGENT_PATH).unwrap();
    assert_eq!(agent, b"\x7fELF the agent");
    // An image that was imported can be what another one is like.
    let mut next = import(dir.path(), "next", &tar(&[("init", b"of the container")]));
    if let ImageContent::Container { like, .. } = &mut next.content {
        *like = Some("web".to_owned());
    }
    next.command_line = Some("rdinit=/sbin/init".to_owned());
    let image = store.import(&next, false).unwrap();
    assert_eq!(image.command_line, "rdinit=/.hearth/init");
    let mut opened = store.open("next").unwrap();
    assert_eq!(find_file(opened.initrd.as_mut().unwrap(), AGENT_PATH).unwrap(), agent);
    // The images that were there before are as they were.
    assert!(store.image("demo").unwrap().container.is_none());
}

#[test]
fn a_container_that_is_refused_leaves_nothing() {
    let (dir, store) = store();
    let large = vec![1; 2 << 20];
    let cases: [(&[u8], &str); 5] = [
        (&tar(&[("a", b"1"), ("a", b"2")]), "image \"web\": the archive, entry \"a\": it is there twice in one layer"),
        (&tar(&[("large", &large)]), "left of what all layers may have"),
        (b"no archive", "the archive is damaged"),
        (&[0x9a; 1024], "the archive is damaged: what should be a header of tar is none"),
        (&tar(&[("a/TRAILER!!!", b"1"), (".hearth/init", b"2")]), "is the guest agent's"),
    ];
    for (archive, wanted) in cases {
        let error = store.import(&import(dir.path(), "web", archive), false).unwrap_err();
        let said = crate::report::chain(&error);
        assert!(said.contains(wanted) && error.retry() == Retry::WithChange, "{wanted}: {said}");
        assert_eq!(left(&store), ["demo"]);
    }
    let good = import(dir.path(), "web", &tar(&[("a", b"1")]));
    let full = ImageStore { reserve_bytes: u64::MAX, ..store.clone() };
    let error = full.import(&good, false).unwrap_err();
    let is_full = |error: &ContainerError| matches!(error, ContainerError::NoSpace { .. });
    assert!(matches!(&error, ImageError::Container { source, .. } if is_full(source)), "{error:?}");
    let turn = store.unpacking.lock().unwrap();
    assert!(matches!(store.import(&good, false), Err(ImageError::Busy { .. })));
    drop(turn);
    assert_eq!(left(&store), ["demo"]);
    // An image without a guest agent gives none.
    let none = dir.path().join("vmlinux").to_str().unwrap().to_owned();
    store.remove("demo").unwrap();
    assert!(matches!(store.import(&good, false), Err(ImageError::Unknown { name }) if name == "demo"));
    let content = ImageContent::Files { kernel_path: none, initrd_path: None };
    let bare = ImageImport { name: "bare".to_owned(), content, command_line: None };
    store.import(&bare, false).unwrap();
    let said = crate::report::chain(&store.import(&good, false).unwrap_err());
    assert_eq!(said, "image \"bare\": the initrd has no guest agent that could be put in: it has no initrd");
    assert_eq!(left(&store), ["bare"]);
}

#[test]
fn what_an_agents_end_has_left_is_removed_at_the_next_start() {
    let (dir, store) = store();
    let staging = store.dir.join(".web.new");
    let held = stage(&staging).unwrap().unwrap();
    file::replace(&staging.join("initrd"), b"half").unwrap();
    for name in [".demo.new.Xy12ab", ".lock.new", "web.new"] {
        file::make_directories(&store.dir.join(name)).unwrap();
    }
    // Another agent's, which goes on.
    store.remove_left_over();
    assert!(left(&store).contains(&".web.new".to_owned()));
    let order = import(dir.path(), "web", &tar(&[("a", b"1")]));
    assert!(matches!(store.import(&order, false), Err(ImageError::Busy { .. })));
    drop(held);
    store.remove_left_over();
    assert_eq!(left(&store), [".demo.new.Xy12ab", "demo", "web.new"]);
    // One that is left nevertheless is in nobody's way.
    file::make_directories(&staging).unwrap();
    file::replace(&staging.join("initrd"), b"half").unwrap();
    store.import(&order, false).unwrap();
    assert_eq!(left(&store), [".demo.new.Xy12ab", "demo", "web", "web.new"]);
}
