//! A file system of this host's kernel on a volume, and then a loss of power at any moment: the daemon records what it does
//! to its files, disks are made again from the record with an arbitrary part of what was not synced, and in each of them
//! the file system is whole and has every file whose fsync had returned.
//!
//! ```text
//! files, fsync -> ext4 -> loop device -> nbdfuse -> hearth volumed -> the store's files, the record
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use hearth::ids::VolumeId;
use hearth::volume::{Options, Store};
use serde_json::Value;

use self::replayed::{Kept, Replayed};
use crate::daemon::{Daemon, eventually};

#[path = "../../src/volume/tests/replayed.rs"]
mod replayed;

const VOLUME_BYTES: u64 = 32 << 20;

/// Moments of a loss of power.
const CUTS: usize = 200;

/// Writers at once, each with a directory of its own, and files of each.
const WRITERS: u64 = 3;
const FILES: u64 = 40;

/// A file that a writer was told is on the disk. Moments are lengths of the record.
#[derive(Debug)]
struct Written {
    name: String,
    content: Vec<u8>,
    /// Its fsync had returned.
    from: usize,
    /// Its removal had not begun.
    until: usize,
}

/// Numbers that are the same for the same seed (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end.max(1)
    }
}

/// Runs a program; what it said. Its exit code is one of these.
fn run(program: &str, words: &[&str], codes: &[i32]) -> Result<String, String> {
    let output = Command::new(program).args(words).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (Debian: libnbd-bin, e2fsprogs): {error}"));
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let is_good = output.status.code().is_some_and(|code| codes.contains(&code));
    if is_good { Ok(text) } else { Err(format!("{program} {words:?}: {}: {text}", output.status)) }
}

fn done(program: &str, words: &[&str]) -> String {
    run(program, words, &[0]).unwrap_or_else(|text| panic!("{text}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

/// A file system that is mounted, in the mount namespace of the thread that made it: however that ends, nothing stays.
struct Mounted {
    at: PathBuf,
    image: PathBuf,
    fuse: Child,
}

impl Mounted {
    fn new(daemon: &Daemon, export: &str) -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace, as root");
        done("mount", &["--make-rprivate", "/"]);
        let (image, at) = (daemon.path("image"), daemon.path("mounted"));
        File::create(&image).expect("a file to mount on");
        std::fs::create_dir(&at).expect("a directory to mount on");
        let fuse = Command::new("nbdfuse").arg(&image).arg(daemon.uri(export)).stdin(Stdio::null()).spawn();
        let fuse = fuse.expect("nbdfuse (Debian: libnbd-bin)");
        let mounted = Self { at, image, fuse };
        eventually("nbdfuse serves a file", || {
            std::fs::metadata(&mounted.image).is_ok_and(|found| found.len() == VOLUME_BYTES)
        });
        let features = "lazy_itable_init=0,lazy_journal_init=0";
        let words = ["-q", "-F", "-b", "4096", "-J", "size=4", "-E", features, text(&mounted.image)];
        done("mkfs.ext4", &words);
        // The loop device is given back by itself when nothing is mounted on it any more.
        done("mount", &["-o", "loop,commit=1", text(&mounted.image), text(&mounted.at)]);
        mounted
    }

    fn unmount(mut self) {
        done("umount", &[text(&self.at)]);
        done("umount", &[text(&self.image)]);
        assert!(self.fuse.wait().expect("wait").success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // After a failure, in whatever state it is. The namespace takes what is left with it.
        if std::thread::panicking() {
            let _ = Command::new("umount").args(["-l", text(&self.at), text(&self.image)]).status();
            let _ = self.fuse.kill();
            let _ = self.fuse.wait();
        }
    }
}

fn record_bytes(record: &Path) -> usize {
    usize::try_from(std::fs::metadata(record).expect("the record").len()).expect("a length")
}

/// Writes files, one after another, and removes some.
fn write_files(mounted: &Path, record: &Path, writer: u64) -> Vec<Written> {
    let mut numbers = Numbers(writer);
    let directory = format!("w{writer}");
    std::fs::create_dir(mounted.join(&directory)).expect("a directory");
    let mut files: Vec<Written> = Vec::new();
    for number in 0..FILES {
        let name = format!("{directory}/{number}");
        let length = 1 + numbers.below([300, 5000, 70_000, 200_000][usize::try_from(number % 4).expect("an index")]);
        let line = format!("{name} ").into_bytes();
        let content: Vec<u8> = line.into_iter().cycle().take(usize::try_from(length).expect("a length")).collect();
        let mut file = File::create(mounted.join(&name)).expect("a file");
        file.write_all(&content).expect("a write");
        file.sync_all().expect("an fsync");
        files.push(Written { name, content, from: record_bytes(record), until: usize::MAX });
        if number % 5 == 4 {
            // Its blocks become another file's.
            let gone = usize::try_from(numbers.below(number)).expect("an index");
            if files[gone].until == usize::MAX {
                files[gone].until = record_bytes(record);
                std::fs::remove_file(mounted.join(&files[gone].name)).expect("a removal");
            }
        }
    }
    files
}

/// The changes of a record, and where each ends.
fn read_record(mut bytes: &[u8]) -> Vec<(usize, Kept)> {
    let whole = bytes.len();
    let mut changes = Vec::new();
    while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        let head: Value = serde_json::from_slice(&bytes[..end]).expect("a line of JSON");
        bytes = &bytes[end + 1..];
        let number = |key: &str| head[key].as_u64().expect("a number");
        let path = |key: &str| PathBuf::from(head[key].as_str().expect("a path"));
        let change = match head["op"].as_str().expect("an operation") {
            "create" => Kept::Create(number("file"), path("path")),
            "open" => Kept::Open(number("file"), path("path")),
            "write" => {
                let (written, rest) = bytes.split_at(usize::try_from(number("length")).expect("a length"));
                bytes = rest;
                Kept::Write(number("file"), number("offset"), written.to_vec())
            }
            "punch" => Kept::Punch(number("file"), number("offset"), number("length")),
            "truncate" => Kept::Truncate(number("file"), number("length")),
            "share" => Kept::Share(number("from"), number("to")),
            "sync_begin" => Kept::SyncBegin(number("file")),
            "sync_end" => Kept::SyncEnd(number("file")),
            "make_directory" => Kept::MakeDirectory(path("path")),
            "rename" => Kept::Rename(path("from"), path("to")),
            "remove" => Kept::Remove(path("path")),
            "sync_directory" => Kept::SyncDirectory(path("path")),
            other => panic!("{other} is unknown"),
        };
        changes.push((whole - bytes.len(), change));
    }
    assert!(bytes.is_empty(), "half a record");
    changes
}

/// What is written by the tests that judge: where no disk is waited for, if the host has that and nobody says where.
fn directory() -> tempfile::TempDir {
    if std::env::var_os("TMPDIR").is_some() {
        return tempfile::tempdir().expect("a directory");
    }
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

/// The volume of a store that lost power, as a raw image.
fn export(store: &Path, id: &VolumeId, image: &Path) -> Result<(), String> {
    let store = Store::open(store, &Options::new("another boot")).map_err(|error| format!("open: {error}"))?;
    let volume = store.volume(id).ok_or("the volume is gone")?;
    if let Some(damage) = volume.damage().first() {
        return Err(format!("the volume is damaged: {damage}"));
    }
    let file = File::create(image).expect("an image");
    file.set_len(VOLUME_BYTES).expect("an image");
    let mut piece = vec![0; 1 << 20];
    for offset in (0..VOLUME_BYTES).step_by(piece.len()) {
        volume.read_at(&mut piece, offset).map_err(|error| format!("read: {error}"))?;
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(&piece, offset).expect("an image");
        }
    }
    Ok(())
}

/// Judges one cut: the file system, once its journal was replayed, and the files.
fn judge(replayed: &Replayed, id: &VolumeId, files: &[Written], cut: usize, seed: u64) -> Result<usize, String> {
    let mut numbers = Numbers(seed);
    let of_ten = [0, 1, 5, 9][usize::try_from(numbers.below(4)).expect("an index")];
    let dir = directory();
    let (store, image, out) = (dir.path().join("store"), dir.path().join("image"), dir.path().join("out"));
    replayed.write_to(&store, &mut || numbers.below(10) < of_ten);
    export(&store, id, &image)?;
    run("e2fsck", &["-y", "-E", "journal_only", text(&image)], &[0, 1])?;
    run("e2fsck", &["-f", "-n", text(&image)], &[0])?;
    std::fs::create_dir(&out).expect("a directory");
    run("debugfs", &["-R", &format!("rdump / {}", text(&out)), text(&image)], &[0])?;
    let promised = files.iter().filter(|file| (file.from..=file.until).contains(&cut));
    let mut count = 0;
    for file in promised {
        let found = std::fs::read(out.join(&file.name)).map_err(|error| format!("{}: {error}", file.name))?;
        if found != file.content {
            return Err(format!("{} holds something else", file.name));
        }
        count += 1;
    }
    Ok(count)
}

/// Many of the moments are those when an fsync had just returned, the others any.
fn cuts(changes: &[(usize, Kept)], files: &[Written], count: usize) -> BTreeSet<usize> {
    let mut numbers = Numbers(7);
    let first = files.iter().map(|file| file.from).min().expect("a file");
    let ends: Vec<usize> = changes.iter().map(|(end, _)| *end).filter(|end| *end >= first).collect();
    let mut pick = |from: &[usize]| from[usize::try_from(numbers.below(from.len() as u64)).expect("an index")];
    // When it was looked at, a record may have been half written.
    let sharp: Vec<usize> =
        files.iter().filter_map(|file| ends.iter().rev().find(|end| **end <= file.from).copied()).collect();
    let mut cuts = BTreeSet::new();
    for attempt in 0..count * 20 {
        if cuts.len() == count {
            break;
        }
        cuts.insert(if attempt % 2 == 0 { pick(&sharp) } else { pick(&ends) });
    }
    assert_eq!(cuts.len(), count, "{} moments are too few", ends.len());
    cuts
}

/// Makes a file system on a volume and writes to it; what was recorded of that, and what the writers were told.
fn work() -> (VolumeId, Vec<u8>, Vec<Written>) {
    let mut daemon = Daemon::with(|start| start.record = Some(start.store.with_file_name("record")));
    let (volume, _, export) = daemon.writable(VOLUME_BYTES);
    let record = daemon.path("record");
    let mounted = Mounted::new(&daemon, &export);
    let all = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (at, record, all) = (&mounted.at, &record, &all);
            scope.spawn(move || {
                let files = write_files(at, record, writer);
                all.lock().expect("files").extend(files);
            });
        }
    });
    mounted.unmount();
    assert!(daemon.terminate().success(), "{}", daemon.log());
    let recorded = std::fs::read(&record).expect("the record");
    (volume, recorded, all.into_inner().expect("files"))
}

#[test]
fn a_file_system_is_whole_after_any_loss_of_power_and_has_what_was_synced() {
    // A thread of its own, which has the mount namespace.
    let (volume, recorded, files) =
        std::thread::spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let changes = read_record(&recorded);
    let mut replayed = Replayed::new();
    let (mut promises, moments) = (0, cuts(&changes, &files, CUTS));
    for (end, change) in &changes {
        replayed.step(change);
        if moments.contains(end) {
            let judged = judge(&replayed, &volume, &files, *end, *end as u64);
            promises += judged.unwrap_or_else(|text| panic!("power is lost after {end} bytes of the record: {text}"));
        }
    }
    assert!(promises > CUTS * 10, "only {promises} files were looked for");
    the_judge_is_judged(&volume, &changes, &files);
}

/// A daemon that never synced would be found out.
fn the_judge_is_judged(volume: &VolumeId, changes: &[(usize, Kept)], files: &[Written]) {
    let mut layers = BTreeMap::new();
    let mut replayed = Replayed::new();
    let (mut found, moments) = (false, cuts(changes, files, 20));
    for (end, change) in changes {
        if let Kept::Create(file, path) | Kept::Open(file, path) = change {
            layers.insert(*file, path.starts_with("layers"));
        }
        let is_left_out =
            matches!(change, Kept::SyncBegin(file) | Kept::SyncEnd(file) if layers.get(file) == Some(&true));
        if !is_left_out {
            replayed.step(change);
        }
        found = moments.contains(end) && judge(&replayed, volume, files, *end, 0).is_err();
        if found {
            break;
        }
    }
    assert!(found, "syncs of layers are left out, and nothing is lost");
}
