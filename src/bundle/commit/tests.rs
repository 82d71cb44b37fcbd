//! Tests of `bundle::commit`.

use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use super::*;
use crate::bundle::manifest::STATE_BYTES_MAX;
use crate::bundle::places::{MEMORY, STATE};
use crate::bundle::samples::{DIRECTORIES, GOLDEN_MEMORY, Rig, content, draft, names};
use crate::sys::sparse;
use crate::units::{MIB, PAGE_BYTES};

fn rig() -> Rig {
    Rig::new(4 * MIB)
}

fn pages_with_data(file: &File) -> Vec<u64> {
    let ranges = sparse::data_ranges(file, 4 * MIB).unwrap();
    ranges.into_iter().flat_map(|range| range.start / PAGE_BYTES..range.end / PAGE_BYTES).collect()
}

#[test]
fn a_committed_bundle_is_three_files_that_nobody_writes() {
    let rig = rig();
    let committed = rig.full("one", &[(0, b"first"), (3 * MIB, b"later")]);
    let directory = rig.root.join(committed.id.as_str());
    assert_eq!(names(&directory), ["manifest.json", "memory.img", "state.bin"]);
    for name in FILES {
        let found = std::fs::metadata(directory.join(name)).unwrap();
        assert_eq!(found.permissions().mode() & 0o777, 0o400, "{name}");
    }
    assert_eq!(names(&rig.root), [&DIRECTORIES[..], &[committed.id.as_str()]].concat(), "nothing is staged");
    let manifest = &committed.manifest;
    assert_eq!(manifest.memory.chunks.iter().map(|chunk| chunk.index).collect::<Vec<_>>(), [0, 12]);
    assert_eq!(manifest.memory.zero_runs, [(1, 11), (13, 3)].map(Run::from));
    assert_eq!(manifest.state.sections.len(), 2);
    assert_eq!(rig.restarted().manifest(&committed.id).unwrap(), *manifest);
}

#[test]
fn holes_stay_and_allocated_zeros_become_holes() {
    let rig = rig();
    let zeros = vec![0; 1 << 20];
    let committed = rig.full("one", &[(MIB, &zeros), (4096 * 5, b"x")]);
    let file = File::open(rig.root.join(committed.id.as_str()).join(MEMORY)).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
    assert!(file.metadata().unwrap().blocks() * 512 <= 16 << 10, "one page of data");
    assert_eq!(pages_with_data(&file), [5]);
    assert_eq!(committed.manifest.memory.chunks.len(), 1);
}

#[test]
fn progress_counts_data_and_not_holes() {
    let rig = Rig::new(64 * MIB);
    let data = vec![7; 20 << 20];
    let staging = rig.staged("one", &[(8 * MIB, &data)]);
    let mut seen = Vec::new();
    staging.commit(draft(64 * MIB), Contents::Full, &mut |progress| seen.push(progress)).unwrap();
    assert!(seen.len() >= 3 && seen.is_sorted_by_key(|progress| progress.done_bytes));
    assert!(seen.iter().all(|progress| progress.total_bytes == 20 << 20));
    assert_eq!(seen.last().unwrap().done_bytes, 20 << 20);
}

#[test]
fn the_same_bundle_again_is_a_success() {
    let rig = rig();
    let first = rig.full("one", &[(0, b"a")]);
    let again = rig.full("one", &[(0, b"a")]);
    assert!(!first.existed && again.existed);
    assert_eq!(first.id, again.id);
    assert_eq!(names(&rig.root).len(), DIRECTORIES.len() + 1, "nothing is staged");
}

#[test]
fn a_crash_at_any_step_leaves_nothing_to_see() {
    // As far as the VMM and the commit come before the rename: the directory, some of the files, all of them.
    let model = rig();
    let whole = model.full("model", &[(0, b"a")]);
    let whole = model.root.join(whole.id.as_str());
    for files in 0..=FILES.len() {
        let rig = rig();
        let staging = rig.store.stage("half", 4 * MIB).unwrap();
        for name in &[STATE, MEMORY, MANIFEST][..files] {
            std::fs::copy(whole.join(name), staging.directory.join(name)).unwrap();
        }
        drop(staging);
        let store = rig.restarted();
        assert!(store.list().unwrap().is_empty(), "{files} files");
        assert!(store.find("model").is_err());
        if files >= 2 {
            let staging = store.reopen("half").unwrap().unwrap();
            let committed = staging.commit(rig.named("again"), Contents::Full, &mut |_| ()).unwrap();
            store.verify(&committed.id, &mut |_| ()).unwrap();
        } else {
            assert_eq!(store.sweep(&[]).unwrap().removed.len(), 1);
            assert_eq!(names(&rig.root), DIRECTORIES);
        }
    }
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let rig = rig();
    let staging = rig.staged("one", &[(0, b"a")]);
    // Where the manifest is written first: a device that is always full.
    std::os::unix::fs::symlink("/dev/full", staging.directory.join(".manifest.json.new")).unwrap();
    let error = staging.commit(draft(4 * MIB), Contents::Full, &mut |_| ()).unwrap_err();
    assert!(matches!(error, CommitError::NoSpace { .. }), "{error:?}");
    assert_eq!(error.retry(), Retry::Later);
    assert_eq!(names(&rig.root), DIRECTORIES);
}

/// What the commit says, after which nothing is staged.
fn refused(rig: &Rig, staging: Staging, draft: ManifestDraft, contents: Contents) -> CommitError {
    let staged = staging.directory.clone();
    let error = staging.commit(draft, contents, &mut |_| ()).unwrap_err();
    assert!(!staged.exists());
    assert!(rig.store.list().unwrap().iter().all(|listed| listed.manifest.is_ok()));
    error
}

#[test]
fn what_is_no_bundle_is_refused() {
    let rig = rig();
    let full = |staging, draft| refused(&rig, staging, draft, Contents::Full);

    let staging = rig.staged("one", &[]);
    staging.memory_file().unwrap().set_len(MIB).unwrap();
    assert!(matches!(full(staging, draft(4 * MIB)), CommitError::Length { file: MEMORY, found: MIB, .. }));

    let staging = rig.staged("one", &[]);
    staging.state_file().unwrap().write_all_at(b"X", 40).unwrap();
    assert!(matches!(full(staging, draft(4 * MIB)), CommitError::State { source: CodecError::Digest, .. }));

    let staging = rig.staged("one", &[]);
    staging.state_file().unwrap().set_len(STATE_BYTES_MAX + 1).unwrap();
    assert!(matches!(full(staging, draft(4 * MIB)), CommitError::Length { file: STATE, .. }));

    let mut absurd = draft(4 * MIB);
    absurd.machine.vcpus = 99;
    assert!(matches!(full(rig.staged("one", &[]), absurd), CommitError::Invalid { .. }));
    let absurd = draft(!4095);
    assert!(matches!(full(rig.staged("one", &[]), absurd), CommitError::Invalid { .. }));
}

#[test]
fn what_is_no_diff_is_refused() {
    let rig = rig();
    let parent = rig.full("parent", &[(0, b"a")]).id;
    let diff = |parent: &BundleId, pages: &[(u64, u64)]| Contents::Diff {
        parent: parent.clone(),
        pages: pages.iter().copied().map(Run::from).collect(),
    };
    let error = refused(&rig, rig.staged("one", &[]), draft(4 * MIB), diff(&parent, &[(1024, 1)]));
    assert!(matches!(error, CommitError::Invalid { ref source, .. } if source.field == "memory.pages"), "{error:?}");
    let error = refused(&rig, rig.staged("one", &[]), draft(4 * MIB), diff(&parent, &[(0, u64::MAX)]));
    assert!(matches!(error, CommitError::Invalid { .. }));
    let absent = BundleId::from_digest([1; 16]);
    let error = refused(&rig, rig.staged("one", &[]), draft(4 * MIB), diff(&absent, &[]));
    assert!(matches!(error, CommitError::Parent { .. }));
    let error = refused(&rig, rig.staged("one", &[]), draft(8 * MIB), diff(&parent, &[]));
    assert!(matches!(error, CommitError::ParentMemory { .. }));
    let mut id = parent;
    for depth in 1..=8 {
        id = rig.diff(&format!("depth-{depth}"), &id, &[(depth, 1)], &[]).id;
    }
    let error = refused(&rig, rig.staged("one", &[]), draft(4 * MIB), diff(&id, &[]));
    assert!(matches!(error, CommitError::Invalid { ref source, .. } if source.field == "parent.depth"), "{error:?}");
}

#[test]
fn a_diff_keeps_only_what_it_holds() {
    let rig = rig();
    let parent = rig.full("parent", &[(0, b"a"), (MIB, b"b")]).id;
    // Page 3 was written by the VMM and is not among the pages: the parent's holds.
    let committed = rig.diff("child", &parent, &[(1, 1)], &[(4096, b"new"), (3 * 4096, b"stray")]);
    let file = File::open(rig.root.join(committed.id.as_str()).join(MEMORY)).unwrap();
    assert_eq!(pages_with_data(&file), [1]);
    let memory = content(&rig.store.open_for_launch(&committed.id).unwrap().memory);
    assert_eq!((&memory[4096..4099], &memory[3 * 4096..3 * 4096 + 5]), (&b"new"[..], &[0; 5][..]));
    rig.store.verify(&committed.id, &mut |_| ()).unwrap();
}

/// What is committed today is the bundle in `tests/golden/bundle_v1`. `HEARTH_BLESS=1` writes that one anew, which
/// bundles already made do not survive: a new version is the way to change the format.
#[test]
fn the_golden_bundle_is_made_again() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bundle_v1");
    let rig = Rig::new(MIB);
    let staging = rig.staged("golden", GOLDEN_MEMORY);
    let committed = staging.commit(draft(MIB), Contents::Full, &mut |_| ()).unwrap();
    let made = rig.root.join(committed.id.as_str());
    for name in [MANIFEST, STATE] {
        let bytes = std::fs::read(made.join(name)).unwrap();
        if std::env::var_os("HEARTH_BLESS").is_some() {
            file::create(&golden.join(name)).unwrap().write_all(&bytes).unwrap();
        }
        assert_eq!(bytes, std::fs::read(golden.join(name)).unwrap(), "{name}");
    }
}
