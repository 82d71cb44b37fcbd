//! Standard clients against our server.

use std::path::Path;
use std::process::Command;

use hearth::ids::{VolumeId, VolumeSnapshotId};
use hearth::wire::volumed::{Answer, Ask, Origin};

use crate::daemon::{Daemon, random};

const MIB: u64 = 1 << 20;

/// Runs a client; what it printed. One that is not installed fails the test.
fn run(program: &str, words: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (Debian: qemu-utils, libnbd-bin): {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(text) } else { Err(text) }
}

fn done(program: &str, words: &[&str]) -> String {
    run(program, words).unwrap_or_else(|text| panic!("{program} {words:?}: {text}"))
}

/// An image with some data, a hole, and data that is zeroes.
fn image(path: &Path, bytes: u64) {
    let text = path.to_str().expect("a path");
    done("qemu-img", &["create", "-q", "-f", "raw", text, &bytes.to_string()]);
    let words = ["-f", "raw", "-c", "write -P 0x5a 64k 200k", "-c", "write -P 0xa5 3M 1M", "-c", "write -P 0 5M 128k"];
    done("qemu-io", &[&words[..], &[text]].concat());
}

#[test]
fn an_image_becomes_a_volume_and_comes_back() {
    let daemon = Daemon::new();
    let image_path = daemon.path("image.raw");
    image(&image_path, 8 * MIB);
    let image_text = image_path.to_str().expect("a path");
    // By a client.
    let (volume, _, export) = daemon.writable(8 * MIB);
    let uri = daemon.uri(&export);
    done("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", image_text, &uri]);
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", image_text, &uri]);
    assert!(daemon.show(&volume).allocated_bytes < 4 * MIB, "it is thin");
    // By the daemon itself.
    let other = VolumeId::from_random(random());
    let origin = Origin::File { path: image_path.clone() };
    let made =
        daemon.ask(Ask::Create { id: other.clone(), name: Some("other".to_owned()), bytes: None, origin, now_ms: 1 });
    let Answer::Volume { volume: made } = made else { panic!("{made:?}") };
    assert_eq!((made.bytes, made.name.as_deref()), (8 * MIB, Some("other")));
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", image_text, &daemon.uri(other.as_str())]);
    // All of it, by another client, in many requests at once.
    let copy = daemon.path("copy.raw");
    done("nbdcopy", &[&daemon.uri(other.as_str()), copy.to_str().expect("a path")]);
    assert!(std::fs::read(&copy).expect("the copy") == std::fs::read(&image_path).expect("the image"));
    let (_, _, third) = daemon.writable(8 * MIB);
    done("nbdcopy", &["--flush", image_text, &daemon.uri(&third)]);
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", image_text, &daemon.uri(&third)]);
    let digest = |id: &VolumeId| daemon.ask(Ask::Digest { id: id.clone() });
    assert_eq!(digest(&volume), digest(&other));
    let Answer::Digest { blake3, bytes } = digest(&volume) else { panic!("no digest") };
    let whole = blake3::hash(&std::fs::read(&image_path).expect("the image"));
    assert_eq!((blake3.as_str(), bytes), (whole.to_hex().as_str(), 8 * MIB));
}

#[test]
fn patterns_are_what_was_written_also_in_clones_and_snapshots() {
    let daemon = Daemon::new();
    let (volume, _, export) = daemon.writable(16 * MIB);
    let io = |export: &str, commands: &[&str]| {
        let uri = daemon.uri(export);
        let mut words = vec!["-f", "raw"];
        commands.iter().for_each(|command| words.extend(["-c", command]));
        words.push(&uri);
        let text = done("qemu-io", &words);
        assert!(!text.contains("verification failed"), "{text}");
    };
    io(
        &export,
        &[
            "write -P 1 0 1M",
            "write -P 2 512 1536",
            "write -f -P 3 1000k 4k",
            "aio_write -P 4 2M 3M",
            "aio_write -P 5 6M 64k",
            "aio_flush",
            "write -z 2M 1M",
            "write -z -u 3M 64k",
            "discard 6M 64k",
            "flush",
        ],
    );
    let was =
        ["read -P 1 0 512", "read -P 2 512 1536", "read -P 1 2k 998k", "read -P 3 1000k 4k", "read -P 0 2M 1088k"];
    io(&export, &was);
    io(&export, &["read -P 4 3136k 1984k", "read -P 0 6M 64k"]);
    let snapshot = VolumeSnapshotId::from_random(random());
    let taken = Ask::Snapshot { volume: volume.clone(), id: snapshot.clone(), name: None, now_ms: 2 };
    assert!(matches!(daemon.ask(taken), Answer::Snapshot { .. }));
    io(&export, &["write -P 9 0 16M", "read -P 9 0 16M"]);
    let verify = |export: &str| {
        let uri = daemon.uri(export);
        let mut words = vec!["-r", "-f", "raw"];
        was.iter().for_each(|command| words.extend(["-c", command]));
        words.push(&uri);
        let text = done("qemu-io", &words);
        assert!(!text.contains("verification failed"), "{export}: {text}");
    };
    verify(snapshot.as_str());
    let clone = VolumeId::from_random(random());
    let origin = Origin::Snapshot { id: snapshot };
    daemon.ask(Ask::Create { id: clone.clone(), name: None, bytes: None, origin, now_ms: 3 });
    verify(clone.as_str());
    let Answer::Leases { leases, epoch, .. } = daemon.ask(Ask::Leases { volume: clone }) else { panic!("no leases") };
    assert!(leases.is_empty() && epoch == 0, "a clone has no lease");
}

#[test]
fn what_an_export_is_can_be_read() {
    let daemon = Daemon::new();
    let (volume, _, export) = daemon.writable(4 * MIB);
    done("qemu-io", &["-f", "raw", "-c", "write -P 1 1M 64k", &daemon.uri(&export)]);
    let info = done("nbdinfo", &["--json", &daemon.uri(&export)]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    let export_info = &info["exports"][0];
    assert_eq!(info["structured"], true);
    assert_eq!(export_info["export-size"], 4 * MIB);
    assert_eq!(export_info["contexts"][0], "base:allocation");
    assert_eq!(export_info["block_size_minimum"], 512);
    for (can, whether) in [
        ("can_cache", true),
        ("can_df", true),
        ("can_fast_zero", true),
        ("can_flush", true),
        ("can_fua", true),
        ("can_multi_conn", true),
        ("can_trim", true),
        ("can_zero", true),
        ("is_read_only", false),
    ] {
        assert_eq!(export_info[can], whether, "{can}");
    }
    let looked = done("nbdinfo", &["--json", &daemon.uri(volume.as_str())]);
    let looked: serde_json::Value = serde_json::from_str(&looked).expect("JSON");
    assert_eq!(looked["exports"][0]["is_read_only"], true);
    let map = done("nbdinfo", &["--map", "--json", &daemon.uri(&export)]);
    let map: serde_json::Value = serde_json::from_str(&map).expect("JSON");
    let extents: Vec<_> = map
        .as_array()
        .expect("a list")
        .iter()
        .map(|extent| (extent["offset"].as_u64(), extent["length"].as_u64(), extent["type"].as_u64()))
        .collect();
    let whole = [(0, MIB, 3), (MIB, 65536, 0), (MIB + 65536, 3 * MIB - 65536, 3)];
    assert_eq!(extents, whole.map(|(offset, length, kind)| (Some(offset), Some(length), Some(kind))));
    let list = done("nbdinfo", &["--list", "--json", &daemon.uri("")]);
    assert!(list.contains(volume.as_str()), "{list}");
    run("nbdinfo", &[&daemon.uri("vol-aaaaaaaaaaaaaaaa")]).expect_err("there is none");
    let refused =
        run("qemu-img", &["info", "-f", "raw", &daemon.uri("vol-aaaaaaaaaaaaaaaa")]).expect_err("there is none");
    assert!(refused.contains("there is no volume vol-aaaaaaaaaaaaaaaa"), "{refused}");
}
