//! Archives and layouts as they are, and as they should not be.

use proptest::prelude::*;
use tar::EntryType;

use super::samples::*;
use super::*;
use crate::report::chain;

fn refused(whiteouts: Whiteouts, layers: &[Vec<u8>]) -> String {
    chain(&layered(whiteouts, layers).expect_err("refused"))
}

#[test]
fn a_root_file_system_stays_what_it_was() {
    let archive = Tar::default()
        .directory("./")
        .directory("./etc/")
        .file("./etc/os-release", b"ID=test\n")
        .hard_link("./etc/release", "./etc/os-release")
        .link("./bin", "../../usr/bin")
        .entry(EntryType::Fifo, "run/pipe", "", b"")
        .file("empty", b"")
        .end();
    for stored in [archive.clone(), gzip(&archive), [gzip(&archive[..512]), gzip(&archive[512..])].concat()] {
        let container = layered(Whiteouts::Plain, &[stored]).unwrap();
        let found = written(&container);
        assert_eq!(
            found.keys().map(String::as_str).collect::<Vec<_>>(),
            [".", "bin", "empty", "etc", "etc/os-release", "etc/release", "run", "run/pipe"]
        );
        let (first, last) = (&found["etc/os-release"], &found["etc/release"]);
        // The last of an inode's names has the content.
        assert_eq!((first.inode, first.names, first.content.as_slice()), (last.inode, 2, &b""[..]));
        assert_eq!((last.mode, last.owner, last.time), (0o104_750, (7, 8), 1_700_000_000));
        assert_eq!(last.content, b"ID=test\n");
        assert_eq!(
            (found["bin"].mode & 0o170_000, found["bin"].content.as_slice()),
            (0o120_000, &b"../../usr/bin"[..])
        );
        assert_eq!(found["run/pipe"].mode & 0o170_000, 0o010_000);
        // Only what is in it was named.
        assert_eq!((found["run"].mode, found["run"].owner), (0o040_755, (0, 0)));
        assert_eq!(found["etc"].owner, (7, 8));
    }
}

#[test]
fn long_names_owners_and_times_come_from_extended_headers() {
    let long = format!("a/{}/{}", "b".repeat(200), "c".repeat(200));
    let target = "t".repeat(300);
    let archive = Tar::default()
        .extended(&[
            ("path", long.as_bytes()),
            ("uid", b"3000000000"),
            ("gid", b"5"),
            ("mtime", b"1600000000.75"),
            ("SCHILY.xattr.security.capability", b"\0\n="),
            ("LIBARCHIVE.creationtime", b"1"),
        ])
        .file("short", b"1")
        .entry(EntryType::GNULongName, "././@LongLink", "", format!("{long}2\0").as_bytes())
        .entry(EntryType::GNULongLink, "././@LongLink", "", format!("{target}\0").as_bytes())
        .link("short", "short")
        .extended(&[("mtime", b"-5.5")])
        .file("old", b"2")
        .entry(EntryType::XGlobalHeader, "g", "", b"18 comment=abcdef\n")
        .entry(EntryType::Char, "dev/null", "", b"")
        .entry(EntryType::Block, "dev/sda", "", b"")
        .end();
    let container = layered(Whiteouts::Plain, &[archive]).unwrap();
    let found = written(&container);
    assert_eq!((found[&long].owner, found[&long].time), ((3_000_000_000, 5), 1_600_000_000));
    assert_eq!(found[&format!("{long}2")].content, target.as_bytes());
    assert_eq!(found["old"].time, 0);
    assert_eq!(container.left_out(), LeftOut { devices: 2, attributes: 1 });
    assert!(!found.keys().any(|name| name.starts_with("dev")));
}

#[test]
fn entries_that_lead_elsewhere_or_say_what_cannot_be_are_refused() {
    let tar = Tar::default;
    let deep = "d/".repeat(300);
    let long = "n".repeat(256);
    let endless = "p/".repeat(2500);
    let cases: Vec<(Tar, &str)> = vec![
        (tar().file("../evil", b"x"), "has a \"..\""),
        (tar().file("a/../../evil", b"x"), "has a \"..\""),
        (tar().directory(".."), "has a \"..\""),
        (tar().file("/etc/passwd", b"x"), "is absolute"),
        (tar().link("out", "/etc").file("out/passwd", b"x"), "through the symbolic link \"out\""),
        (tar().link("up", "..").directory("up/evil"), "through the symbolic link"),
        (tar().link("up", "..").link("up/evil", "x"), "through the symbolic link"),
        (tar().link("up", "..").hard_link("up/evil", "up"), "through the symbolic link"),
        (tar().file("a", b"x").file("a/b", b"y"), "through \"a\", which is not a directory"),
        (tar().hard_link("a", "../../etc/shadow"), "has a \"..\""),
        (tar().hard_link("a", "/etc/shadow"), "is absolute"),
        (tar().hard_link("a", "etc/shadow"), "hard link to \"etc/shadow\", which is not there"),
        (tar().hard_link("a", ""), "leads nowhere"),
        (tar().directory("d").hard_link("a", "d"), "hard link to the directory \"d\""),
        (tar().link("l", "d").hard_link("a", "l/x"), "which is not there"),
        (tar().link("l", ""), "leads nowhere"),
        (tar().file("a", b"x").file("a", b"y"), "twice in one layer"),
        (tar().file("a", b"x").directory("a"), "twice in one layer"),
        (tar().file("a/b", b"x").file("a", b"x"), "twice in one layer"),
        (tar().directory("a").file("a", b"x"), "twice in one layer"),
        (tar().file(".", b"x"), "twice in one layer"),
        (tar().file(".hearth/init", b"x"), "is the guest agent's"),
        (tar().directory(".hearth"), "is the guest agent's"),
        (tar().file("TRAILER!!!", b"x"), "ends an archive"),
        (tar().file("", b"x"), "has no name"),
        (tar().extended(&[("path", b"a\0b")]).file("a", b"x"), "null byte"),
        (tar().extended(&[("path", b"../x")]).file("a", b"x"), "has a \"..\""),
        (tar().extended(&[("linkpath", b"../x")]).hard_link("b", "a"), "has a \"..\""),
        (tar().extended(&[("path", deep.as_bytes())]).directory("a"), "more than 256 directories"),
        (tar().extended(&[("path", long.as_bytes())]).file("a", b"x"), "longer than 255 bytes"),
        (tar().extended(&[("path", endless.as_bytes())]).file("a", b"x"), "longer than 4095 bytes"),
        (tar().extended(&[("linkpath", endless.as_bytes())]).link("a", "b"), "longer than 4095 bytes"),
        (tar().extended(&[("size", b"4")]).file("a", b"x"), "disagree about its size"),
        (tar().extended(&[("size", b"-4")]).file("a", b"x"), "its size is not a number"),
        (tar().extended(&[("uid", b"4294967296")]).file("a", b"x"), "its uid is not a number"),
        (tar().extended(&[("mtime", b"soon")]).file("a", b"x"), "its time is not a number"),
        (tar().extended(&[("hdrcharset", b"KOI8-R")]).file("a", b"x"), "character set"),
        (tar().extended(&[("GNU.sparse.major", b"1")]).file("a", b"x"), "sparse"),
        (tar().entry(EntryType::XHeader, "x", "", b"999999 path=a\n").file("a", b"x"), "malformed"),
        (tar().entry(EntryType::XGlobalHeader, "g", "", b"9 path=a\n").file("a", b"x"), "all entries one name"),
        (tar().extended(&[("path", b"last")]), "ends in the middle"),
        (tar().entry(EntryType::GNULongName, "L", "", b"last\0"), "ends in the middle"),
        (tar().entry(EntryType::GNUSparse, "a", "", b"x"), "sparse"),
        (tar().entry(EntryType::new(b'M'), "a", "", b"x"), "type 'M'"),
        (tar().raw(EntryType::Regular, b"huge", b"", 1 << 60, b"x"), "left of what all layers may have"),
        (tar().raw(EntryType::Directory, b"huge", b"", u64::MAX / 2, b""), "left of what all layers may have"),
        (tar().raw(EntryType::GNULongName, b"L", b"", 2 << 20, b"x"), "longer than 1 MiB"),
        (tar().raw(EntryType::XHeader, b"x", b"", 2 << 20, b"x"), "longer than 1 MiB"),
    ];
    for (archive, wanted) in cases {
        let said = refused(Whiteouts::Plain, &[archive.clone().end()]);
        assert!(said.starts_with("layer 1, entry \"") && said.contains(wanted), "{wanted}: {said}");
    }
    // What a lower layer has leads no further.
    let (below, above) = (tar().link("lib", "/usr/lib").end(), tar().file("lib/evil.so", b"x").end());
    let said = refused(Whiteouts::Hide, &[below, above]);
    assert_eq!(said, "layer 2, entry \"lib/evil.so\": its path goes through the symbolic link \"lib\"");
}

#[test]
fn archives_that_are_none_are_refused() {
    let whole = Tar::default().file("a", &[7; 3000]).file("b", b"x").end();
    let zipped = gzip(&whole);
    let mut broken = zipped.clone();
    let end = broken.len() - 6;
    broken[end] ^= 1;
    let mut wrong = whole.clone();
    wrong[0] = b'z';
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "it is empty"),
        (b"not an archive, and shorter than one".to_vec(), "layer 1 is damaged"),
        (vec![b'x'; 2048], "layer 1 is damaged"),
        (wrong, "layer 1 is damaged"),
        (whole[..1024].to_vec(), "entry \"a\": the archive ends in the middle of it"),
        (zipped[..zipped.len() - 9].to_vec(), "layer 1 is damaged"),
        (broken, "layer 1 is damaged"),
        ([zipped.as_slice(), b"more"].concat(), "layer 1 is damaged"),
        (b"\x28\xb5\x2f\xfd...".to_vec(), "packed by zstd, and only gzip or nothing is read"),
        (b"\xfd7zXZ\0...".to_vec(), "packed by xz"),
        (b"BZh9...".to_vec(), "packed by bzip2"),
    ];
    for (archive, wanted) in cases {
        let said = refused(Whiteouts::Plain, &[archive]);
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
}

#[test]
fn what_is_beyond_a_bound_is_not_unpacked() {
    let tight = Bounds { unpacked_bytes: 1 << 20, disk_bytes: 2 << 20 };
    let unpack = |bounds, archive: &[u8]| {
        let file = spool();
        let mut container = Container::new(file.try_clone().unwrap(), bounds);
        let refused = container.layer("layer 1", Whiteouts::Plain, archive).expect_err("refused");
        assert!(file.metadata().unwrap().len() <= 1 << 20);
        (chain(&refused), refused.retry())
    };
    // A thousandth of what it becomes: nothing but zeros behind the end of the archive.
    let mut bomb = Tar::default().file("a", b"x").end();
    bomb.resize(64 << 20, 0);
    let (said, _) = unpack(tight, &gzip(&bomb));
    assert_eq!(said, "layer 1 goes beyond the 1 MiB that all layers may have once they are unpacked");
    // Many files, each of them small enough.
    let many = (0..30).fold(Tar::default(), |tar, number| tar.file(&format!("f{number}"), &[1; 40_000])).end();
    let (said, _) = unpack(tight, &gzip(&many));
    assert!(said.contains("layer 1, entry \"f2") && said.contains("are left of what all layers may have"), "{said}");
    // The initramfs would not fit on the disk beside it.
    let large = Tar::default().file("large", &[1; 800_000]).end();
    let (said, retry) = unpack(Bounds { disk_bytes: 1 << 20, ..tight }, &large);
    assert!(said.contains("the disk of the images has left"), "{said}");
    assert_eq!(retry, crate::report::Retry::Later);
    let bounds = Bounds { unpacked_bytes: u64::MAX, disk_bytes: u64::MAX };
    let huge = Tar::default().raw(EntryType::Regular, b"huge", b"", 5 << 30, b"x").end();
    assert!(unpack(bounds, &huge).0.contains("smaller than 4 GiB"));
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_of_their_own_layer() {
    let below = Tar::default()
        .file("etc/passwd", b"1")
        .file("etc/old/a", b"1")
        .file("var/cache/b", b"1")
        .file("kept", b"1")
        .link("link", "kept")
        .end();
    let above = Tar::default()
        .file("var/cache/c", b"2")
        .file("etc/old/new", b"2")
        .file("var/cache/.wh..wh..opq", b"")
        .file("etc/.wh.old", b"")
        .file("etc/.wh.absent", b"")
        .file("absent/.wh.x", b"")
        .file(".wh.link", b"")
        .file(".wh..wh.plnk", b"")
        .file(".wh..wh.aufs/x", b"")
        .end();
    let layers = [below, above];
    let hidden = layered(Whiteouts::Hide, &layers).unwrap();
    let expected =
        ["etc", "etc/old", "etc/old/new", "etc/passwd", "kept", "var", "var/cache", "var/cache/c"].map(str::to_owned);
    assert_eq!(names(&hidden), expected);
    let plain = layered(Whiteouts::Plain, &layers).unwrap();
    assert!(names(&plain).contains(&"etc/.wh.old".to_owned()));
    for name in [".wh.", ".wh..", ".wh...", "a/.wh...", ".wh.x/y"] {
        let said = refused(Whiteouts::Hide, &[Tar::default().file(name, b"").end()]);
        assert!(said.contains("hides nothing that has a name"), "{name}: {said}");
    }
    let through = [Tar::default().link("l", "/").end(), Tar::default().file("l/.wh.etc", b"").end()];
    assert!(refused(Whiteouts::Hide, &through).contains("through the symbolic link"));
}

#[test]
fn a_layer_replaces_what_is_below_by_what_it_has() {
    let below =
        Tar::default().file("a/x", b"1").file("b", b"1").hard_link("c", "b").link("d", "e").directory("f").end();
    let above = Tar::default()
        .file("a", b"2")
        .directory("b")
        .file("b/y", b"2")
        .file("d", b"2")
        .directory("f")
        .file("f/z", b"2");
    let container = layered(Whiteouts::Hide, &[below, above.end()]).unwrap();
    let found = written(&container);
    let expected = [("a", &b"2"[..]), ("b", b""), ("b/y", b"2"), ("c", b"1"), ("d", b"2"), ("f", b""), ("f/z", b"2")];
    let found: Vec<_> = found.iter().map(|(name, entry)| (name.as_str(), entry.content.as_slice())).collect();
    assert_eq!(found, expected);
}

#[test]
fn a_layouts_layers_and_program_are_found() {
    let layout = LayoutDirectory::new();
    let below = layout.blob(
        "application/vnd.oci.image.layer.v1.tar+gzip",
        &gzip(&Tar::default().file("a", b"1").file("b", b"1").end()),
    );
    let above = layout.blob("application/vnd.oci.image.layer.v1.tar", &Tar::default().file(".wh.a", b"").end());
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"},
        "config": {"Env": ["A=1"], "Entrypoint": ["/run"], "Cmd": ["it"], "WorkingDir": "/srv", "User": "7:8", "Labels": null}
    });
    let mut image = layout.image(&config, &[below, above]);
    layout.index(&[image.clone()]);
    let container = layout.unpack(None).unwrap();
    assert_eq!((names(&container), container.layers()), (vec!["b".to_owned()], 2));
    let program = Program {
        arguments: vec!["/run".to_owned(), "it".to_owned()],
        environment: vec!["A=1".to_owned()],
        directory: "/srv".to_owned(),
        user: "7:8".to_owned(),
    };
    assert_eq!(container.origin().program, Some(program));
    assert_eq!(container.origin().manifest.as_deref(), image["digest"].as_str());

    // One of several, by name, by digest, by platform in an index of its own.
    let other = layout.image(&serde_json::json!({"architecture": "amd64", "os": "linux", "config": null}), &[]);
    image["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "web:1"});
    layout.index(&[image.clone(), other.clone()]);
    assert_eq!(names(&layout.unpack(Some("web:1")).unwrap()), ["b"]);
    assert_eq!(names(&layout.unpack(other["digest"].as_str()).unwrap()), Vec::<String>::new());
    for (reference, wanted) in
        [(None, "say DIR:NAME; it has web:1"), (Some("db"), "no image \"db\""), (Some(""), "no image")]
    {
        let said = chain(&layout.unpack(reference).expect_err("refused"));
        assert!(said.contains(wanted), "{said}");
    }
    let arm = serde_json::json!({"architecture": "arm64", "os": "linux"});
    let (mut ours, mut theirs) = (image.clone(), other.clone());
    ours["platform"] = serde_json::json!({"architecture": "amd64", "os": "linux"});
    theirs["platform"] = arm;
    let nested = serde_json::json!({"schemaVersion": 2, "manifests": [theirs, ours]});
    let nested = layout.blob("application/vnd.oci.image.index.v1+json", nested.to_string().as_bytes());
    layout.index(&[nested]);
    assert_eq!(names(&layout.unpack(None).unwrap()), ["b"]);
}

/// What is said of a layout whose image `make` makes.
fn refused_layout(make: impl FnOnce(&LayoutDirectory) -> serde_json::Value) -> String {
    let layout = LayoutDirectory::new();
    let manifest = make(&layout);
    layout.index(&[manifest]);
    chain(&layout.unpack(None).expect_err("refused"))
}

fn amd64() -> serde_json::Value {
    serde_json::json!({"architecture": "amd64", "os": "linux"})
}

fn one_layer(layout: &LayoutDirectory) -> serde_json::Value {
    let archive = gzip(&Tar::default().file("a", b"1").end());
    layout.blob("application/vnd.oci.image.layer.v1.tar+gzip", &archive)
}

#[test]
fn layers_that_are_not_what_they_are_said_to_be_are_refused() {
    let none = format!("sha256:{}", "0".repeat(64));
    let other = format!("sha512:{}", "0".repeat(128));
    let cases: Vec<(&str, serde_json::Value, &str)> = vec![
        ("size", 5.into(), "and should have 5"),
        ("size", (-5).into(), "manifest: invalid value"),
        ("digest", "sha256:../../../etc/passwd".into(), "is not sha256 and 64 digits"),
        ("digest", other.into(), "is not sha256"),
        ("digest", none.into(), "No such file"),
        ("mediaType", "application/vnd.oci.image.layer.v1.tar+zstd".into(), "packed by zstd"),
        ("mediaType", "text/plain".into(), "text/plain is not a layer"),
    ];
    for (field, value, wanted) in cases {
        let said = refused_layout(|layout| {
            let mut layer = one_layer(layout);
            layer[field] = value;
            layout.image(&amd64(), &[layer])
        });
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let said = refused_layout(|layout| {
        let layer = one_layer(layout);
        let name = layer["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
        let mut other = gzip(&Tar::default().file("a", b"1").end());
        *other.last_mut().unwrap() ^= 1;
        layout.write(&format!("blobs/sha256/{name}"), &other);
        layout.image(&amd64(), &[layer])
    });
    assert!(said.contains("it is not what it was: its digest is sha256:"), "{said}");
}

#[test]
fn layouts_that_are_not_what_they_say_are_refused() {
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    let arm = serde_json::json!({"architecture": "arm64", "os": "linux"});
    let said = [
        (refused_layout(|layout| layout.image(&arm, &[])), "it is for linux/arm64, and guests are linux/amd64"),
        (refused_layout(|layout| layout.image(&serde_json::json!({}), &[])), "config: missing field"),
        (refused_layout(|layout| layout.blob(MANIFEST, b"{")), "manifest: EOF"),
        (refused_layout(|layout| layout.blob(MANIFEST, b"[[[[")), "manifest: "),
        (refused_layout(|layout| layout.blob("text/plain", b"{}")), "text/plain is not an image"),
        (
            refused_layout(|layout| {
                let many: Vec<_> = (0..600).map(|_| one_layer(layout)).collect();
                layout.image(&amd64(), &many)
            }),
            "more than 512 layers",
        ),
    ];
    for (said, wanted) in said {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let layout = LayoutDirectory::new();
    layout.index(&[]);
    assert!(chain(&layout.unpack(None).expect_err("refused")).contains("there is no image"));
    layout.write("oci-layout", br#"{"imageLayoutVersion":"2.0"}"#);
    assert!(chain(&layout.unpack(None).expect_err("refused")).contains("version 2.0"));
    let link = layout.path().join("link");
    std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
    let blobs = layout.path().join("blobs");
    for (path, wanted) in [(link, "not a regular file"), (blobs, "not a regular"), ("/absent".into(), "No such file")] {
        let said = chain(&Container::unpack(&Source::Rootfs(path), spool(), AMPLE).expect_err("refused"));
        assert!(said.contains(wanted), "{said}");
    }
}

#[test]
fn an_agent_is_found_in_an_archive_or_said_to_be_missing() {
    let container = layered(Whiteouts::Plain, &[Tar::default().file("init", b"no program").end()]).unwrap();
    let mut archive = io::Cursor::new(Vec::new());
    container.write_initramfs(AGENT, &mut archive).unwrap();
    assert_eq!(find_file(&mut archive, "/.hearth/init").unwrap(), AGENT);
    let mut said = |path: &str| chain(&find_file(&mut archive, path).expect_err("none"));
    assert!(said("/init").contains("not an ELF program"));
    assert!(said("/.hearth").contains("there is no"));
    let whole = archive.into_inner();
    for (bytes, wanted) in [
        (Vec::new(), "is not a cpio archive, or ends too early"),
        (gzip(&whole).repeat(2), "not an uncompressed cpio archive"),
        (whole[..200].to_vec(), "ends too early"),
    ] {
        let said = chain(&find_file(&mut io::Cursor::new(bytes), "/init").expect_err("none"));
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever an archive is, it is refused or becomes an initramfs that can be read back.
    #[test]
    fn no_archive_leads_anywhere(bytes in prop::collection::vec(any::<u8>(), 0..2000), at in 0_usize..3000, name in "[./a-c]{1,12}") {
        let mut archive = Tar::default().directory("a").file(&name, b"x").link("b", "..").hard_link("c", "b").end();
        let _ = layered(Whiteouts::Hide, std::slice::from_ref(&bytes));
        let begin = at.min(archive.len() - 1);
        for (old, new) in archive[begin..].iter_mut().zip(bytes) {
            *old ^= new;
        }
        if let Ok(container) = layered(Whiteouts::Hide, &[archive]) {
            written(&container);
        }
    }

    #[test]
    fn no_archive_of_programs_breaks_the_search(bytes in prop::collection::vec(any::<u8>(), 0..400), at in 0_usize..600) {
        let container = layered(Whiteouts::Plain, &[Tar::default().file("init", AGENT).end()]).unwrap();
        let mut archive = Vec::new();
        container.write_initramfs(AGENT, &mut archive).unwrap();
        for (old, new) in archive.iter_mut().skip(at).zip(bytes) {
            *old ^= new;
        }
        let _ = find_file(&mut io::Cursor::new(archive), "/init");
    }
}
