//! Bundles that come in parts: begun, continued, published, and what a crash leaves of each.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use super::*;
use crate::bundle::places::FILES;
use crate::bundle::samples::{Rig, content as content_of, names};
use crate::bundle::working_set::WorkingSet;
use crate::bundle::{
    BundlePart, Damage, Manifest, PART_BYTES_MAX, Progress, ReadPartError, Run, Signed, read_signatures,
};
use crate::signing::PrivateKey;
use crate::sys::sparse;
use crate::units::PAGE_BYTES;
use proptest::prelude::*;

const MEMORY_BYTES: u64 = 2 << 20;
const CHUNK: u64 = 256 << 10;
const FROM: &str = "peer:b";

/// A host that has a bundle, and one that is to have it.
struct Two {
    here: Rig,
    there: Rig,
    id: BundleId,
}

impl Two {
    /// Chunks 0, 2, 3 and 7 have content.
    fn new() -> Self {
        let (here, there) = (Rig::new(MEMORY_BYTES), Rig::new(MEMORY_BYTES));
        let id = here.full("web", &[(0, b"first"), (2 * CHUNK + 5, &[7; 300_000]), (MEMORY_BYTES - 1, b"!")]).id;
        Self { here, there, id }
    }

    fn part(&self, part: BundlePart) -> Vec<u8> {
        self.here.store.read_part(&self.id, part).unwrap()
    }

    fn chunk(&self, chunk: u32) -> Vec<u8> {
        self.part(BundlePart::Memory { offset: u64::from(chunk) * CHUNK, bytes: CHUNK })
    }

    fn begin_at(&self, store: &Store) -> Result<(), PartialError> {
        let signatures = read_signatures(&self.part(BundlePart::Signatures)).unwrap();
        store.begin_partial(&self.id, &self.part(BundlePart::Manifest), &self.part(BundlePart::State), signatures, FROM)
    }

    fn begun(&self) -> Partial {
        self.begin_at(&self.there.store).unwrap();
        self.there.store.open_partial(&self.id).unwrap()
    }

    fn place(&self) -> PathBuf {
        self.there.root.join(".partial").join(self.id.as_str())
    }

    fn sign(&self, number: u8) -> BundleSignature {
        let key = PrivateKey::from_seed([number; 32]).unwrap();
        let digest = self.here.store.signed(&self.id).unwrap().manifest_digest;
        let one = BundleSignature { key: key.public(), signature: key.sign_bundle(digest.as_bytes()) };
        self.here.store.sign(&self.id, one).unwrap();
        one
    }

    fn memory(&self) -> Vec<u8> {
        content_of(&self.here.store.open_for_launch(&self.id).unwrap().memory)
    }
}

fn runs(runs: &[(u64, u64)]) -> Vec<Run> {
    runs.iter().copied().map(Run::from).collect()
}

#[test]
fn a_bundle_comes_chunk_by_chunk_and_becomes_one() {
    let two = Two::new();
    let signature = two.sign(1);
    let partial = two.begun();
    assert_eq!((partial.id(), partial.from(), partial.chunks(), partial.missing()), (&two.id, FROM, 8, 4));
    assert_eq!(partial.present_runs(), runs(&[(1, 1), (4, 3)]));
    assert_eq!(partial.missing_runs(), runs(&[(0, 1), (2, 2), (7, 1)]));
    assert_eq!((partial.progress().done_bytes, partial.progress().total_bytes), (0, 4 * CHUNK));
    let Signed { made_here, signatures, manifest_digest } = partial.signed().unwrap();
    assert_eq!((made_here, signatures), (false, vec![signature]));
    assert_eq!(manifest_digest, two.here.store.signed(&two.id).unwrap().manifest_digest);
    // Nobody sees it who looks for bundles.
    assert!(two.there.store.list().unwrap().is_empty() && two.there.store.find("web").is_err());
    assert!(two.there.store.open_for_launch(&two.id).is_err());
    for word in ["web", two.id.as_str(), &two.id.as_str()[..9]] {
        assert_eq!(two.there.store.find_partial(word).unwrap().as_ref(), Some(&two.id), "{word}");
    }
    assert_eq!(two.there.store.find_partial("other").unwrap(), None);
    assert!(matches!(partial.publish(), Err(PartialError::Missing { chunks: 4, .. })));

    let files = partial.launch_files().unwrap();
    assert_eq!(content_of(&files.state), two.part(BundlePart::State));
    assert!(files.memory.write_at(b"x", 0).is_err(), "it is for reading only");
    // What its guests reach first is known of it as well.
    let set = WorkingSet { guests: 1, read: runs(&[(1, 2)]), written: runs(&[(MEMORY_BYTES / PAGE_BYTES - 1, 1)]) };
    two.there.store.keep_working_set(&two.id, &set).unwrap();
    assert_eq!(two.there.store.working_set(&two.id).unwrap(), Some(set.clone()));
    for chunk in [2, 0, 7, 3] {
        assert!(!partial.is_present(chunk));
        assert_eq!(partial.install(chunk, &two.chunk(chunk)).unwrap(), Installed::New);
        assert_eq!(partial.install(chunk, &two.chunk(chunk)).unwrap(), Installed::Already);
        assert!(partial.is_present(chunk));
    }
    assert_eq!(partial.present_runs(), runs(&[(0, 8)]));
    assert!(partial.missing() == 0 && partial.progress().done_bytes == 4 * CHUNK);
    let committed = partial.publish().unwrap();
    assert!(committed.id == two.id && !committed.existed);
    let store = &two.there.store;
    assert_eq!(store.working_set(&two.id).unwrap(), Some(set));
    assert!(store.partials().unwrap().is_empty() && names(&two.there.root.join(".partial")).is_empty());
    let whole = store.open_for_launch(&two.id).unwrap().memory;
    assert_eq!(content_of(&whole), two.memory());
    // Who mapped it maps the same file, and what was a hole is one.
    let inode = |file: &File| file.metadata().unwrap().ino();
    assert_eq!(inode(&whole), inode(&files.memory));
    assert_eq!(sparse::data_ranges(&whole, CHUNK * 2).unwrap(), std::slice::from_ref(&(0..PAGE_BYTES)));
    let directory = two.there.root.join(two.id.as_str());
    assert_eq!(names(&directory), ["manifest.json", "memory.img", "state.bin"]);
    for name in FILES {
        let mode = std::fs::metadata(directory.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o400, "{name}");
    }
    two.there.restarted().verify(&two.id, &mut |_| ()).unwrap();
    let signed = two.there.restarted().signed(&two.id).unwrap();
    assert_eq!((signed.made_here, signed.signatures), (false, vec![signature]));
    assert!(matches!(two.begin_at(store), Err(PartialError::Whole { .. })));
    // The files that are open stay good.
    assert_eq!(content_of(&partial.launch_files().unwrap().memory), two.memory());
    assert_eq!(partial.install(0, &two.chunk(0)).unwrap(), Installed::Already);
}

#[test]
fn other_bytes_are_not_kept() {
    let two = Two::new();
    let partial = two.begun();
    let right = two.chunk(2);
    let mut wrong = right.clone();
    wrong[77] ^= 1;
    assert!(matches!(partial.install(2, &wrong), Err(InstallError::Digest { chunk: 2, .. })));
    assert!(matches!(partial.install(2, &two.chunk(3)), Err(InstallError::Digest { chunk: 2, .. })));
    assert!(matches!(partial.install(2, &right[1..]), Err(InstallError::Length { found: 262_143, wanted: CHUNK, .. })));
    assert!(matches!(partial.install(2, &[]), Err(InstallError::Length { .. })));
    for chunk in [1, 8, u32::MAX] {
        assert!(matches!(partial.install(chunk, &right), Err(InstallError::NoContent { .. })), "{chunk}");
        assert_eq!(partial.chunk_range(chunk), None);
    }
    assert!(partial.is_present(1) && !partial.is_present(8) && !partial.is_present(u32::MAX));
    assert_eq!(partial.chunk_range(7), Some(MEMORY_BYTES - CHUNK..MEMORY_BYTES));
    assert_eq!(partial.missing(), 4);
    let memory = partial.launch_files().unwrap().memory;
    assert!(sparse::data_ranges(&memory, MEMORY_BYTES).unwrap().is_empty(), "nothing was written");
}

#[test]
fn threads_install_the_same_chunks_once() {
    let two = Two::new();
    let partial = two.begun();
    let news: usize = std::thread::scope(|scope| {
        let one = || [0, 2, 3, 7].map(|chunk| partial.install(chunk, &two.chunk(chunk)).unwrap());
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
        let done = threads.into_iter().flat_map(|thread| thread.join().unwrap());
        done.filter(|installed| *installed == Installed::New).count()
    });
    assert_eq!(news, 4);
    partial.publish().unwrap();
}

#[test]
fn what_cannot_be_begun_is_told_and_leaves_nothing() {
    let two = Two::new();
    let (store, id) = (&two.there.store, &two.id);
    let (manifest, state) = (two.part(BundlePart::Manifest), two.part(BundlePart::State));
    let begin = |manifest: &[u8], state: &[u8], signatures, from: &str| {
        store.begin_partial(id, manifest, state, signatures, from).unwrap_err()
    };
    let mut other = manifest.clone();
    other[30] ^= 1;
    let damage = |error: PartialError| {
        let PartialError::Damaged { damage, .. } = error else { panic!("{error}") };
        damage
    };
    assert!(matches!(damage(begin(&other, &state, vec![], FROM)), Damage::Id { .. }));
    assert!(matches!(damage(begin(&manifest, &state[1..], vec![], FROM)), Damage::Length { .. }));
    let mut changed = state.clone();
    changed[0] ^= 1;
    assert!(matches!(damage(begin(&manifest, &changed, vec![], FROM)), Damage::State));
    let signature = two.sign(1);
    let of_another = BundleSignature { key: PrivateKey::from_seed([2; 32]).unwrap().public(), ..signature };
    assert!(matches!(begin(&manifest, &state, vec![signature, of_another], FROM), PartialError::Signature { .. }));
    assert!(matches!(begin(&manifest, &state, vec![signature; 65], FROM), PartialError::Signature { .. }));
    let long = "x".repeat(FROM_BYTES_MAX + 1);
    assert!(matches!(begin(&manifest, &state, vec![], &long), PartialError::From { .. }));
    // A version that does not exist yet, by its own id.
    let newer = String::from_utf8(manifest.clone()).unwrap().replacen("\"format\":1", "\"format\":9", 1);
    let id = manifest::id_of(newer.as_bytes());
    let error = store.begin_partial(&id, newer.as_bytes(), &state, vec![], FROM).unwrap_err();
    assert!(matches!(error, PartialError::Manifest { source: ReadManifestError::Format { found: 9 }, .. }));
    let diff = two.here.diff("diff", &two.id, &[(1, 1)], &[(4096, b"y")]).id;
    let bytes = two.here.store.read_part(&diff, BundlePart::Manifest).unwrap();
    let error = store.begin_partial(&diff, &bytes, &state, vec![], FROM).unwrap_err();
    assert!(matches!(&error, PartialError::Diff { parent, .. } if *parent == two.id));
    assert!(error.to_string().ends_with("compact it first") && error.retry() == Retry::WithChange);
    for directory in [".partial", ".signatures"] {
        assert!(names(&two.there.root.join(directory)).is_empty(), "{directory}");
    }
    assert!(matches!(store.open_partial(&two.id), Err(PartialError::Unknown { .. })));
    assert!(matches!(store.remove_partial(&two.id), Err(PartialError::Unknown { .. })));
}

#[test]
fn the_next_process_knows_what_is_here_by_looking() {
    let two = Two::new();
    let partial = two.begun();
    for chunk in [0, 2, 3] {
        partial.install(chunk, &two.chunk(chunk)).unwrap();
    }
    drop(partial);
    // A chunk is changed, another cut off in the middle, and there is something where memory is zero.
    let memory = File::options().read(true).write(true).open(two.place().join(MEMORY)).unwrap();
    memory.write_all_at(b"?", 2 * CHUNK + 9).unwrap();
    memory.write_all_at(&two.chunk(7)[..4096], 7 * CHUNK).unwrap();
    memory.write_all_at(b"x", 5 * CHUNK).unwrap();
    let store = two.there.restarted();
    assert!(store.sweep(&[]).unwrap().removed.is_empty());
    let partial = store.open_partial(&two.id).unwrap();
    assert_eq!(partial.missing_runs(), runs(&[(2, 1), (7, 1)]));
    assert_eq!(
        sparse::data_ranges(&memory, MEMORY_BYTES).unwrap().iter().filter(|data| data.start == 5 * CHUNK).count(),
        0
    );
    for chunk in [2, 7] {
        partial.install(chunk, &two.chunk(chunk)).unwrap();
    }
    drop(partial);
    // Too short and too long are neither a reason to begin anew.
    for (bytes, missing) in [(MEMORY_BYTES - 4096, 1), (MEMORY_BYTES + 4096, 1)] {
        memory.set_len(bytes).unwrap();
        assert_eq!(two.there.restarted().open_partial(&two.id).unwrap().missing(), missing, "{bytes}");
    }
    let partial = two.there.restarted().open_partial(&two.id).unwrap();
    partial.install(7, &two.chunk(7)).unwrap();
    // Damaged after it came: it is found before it is a bundle, and comes again.
    memory.write_all_at(b"?", 3 * CHUNK).unwrap();
    let error = partial.publish().unwrap_err();
    assert!(matches!(&error, PartialError::Damaged { damage: Damage::Chunk { index: 3, .. }, .. }), "{error}");
    assert_eq!(partial.missing_runs(), runs(&[(3, 1)]));
    partial.install(3, &two.chunk(3)).unwrap();
    partial.publish().unwrap();
    two.there.store.verify(&two.id, &mut |_| ()).unwrap();
}

#[test]
fn a_crash_while_it_is_begun_leaves_nothing_or_all() {
    let two = Two::new();
    let _signature = two.sign(1);
    two.begin_at(&two.there.store).unwrap();
    // Killed before the rename, at any of the files.
    let (place, new) = (two.place(), two.there.root.join(format!(".partial/.new-{}", two.id)));
    let left = ["source.json", "memory.img", "manifest.json", "state.bin"];
    for removed in 0..=left.len() {
        std::fs::rename(&place, &new).unwrap();
        for name in &left[..removed] {
            std::fs::remove_file(new.join(name)).unwrap();
        }
        let store = two.there.restarted();
        assert!(store.partials().unwrap().is_empty() && store.open_partial(&two.id).is_err());
        // The next try, without a sweep.
        two.begin_at(&store).unwrap();
        assert!(!new.exists() && store.open_partial(&two.id).unwrap().missing() == 4);
    }
    std::fs::rename(&place, &new).unwrap();
    let swept = two.there.restarted().sweep(&[]).unwrap();
    // It, and the signatures that came before it.
    assert_eq!((swept.removed.len(), swept.failed.len()), (2, 0), "{swept:?}");
    assert!(!new.exists() && names(&two.there.root.join(".signatures")).is_empty());
}

#[test]
fn beginning_again_keeps_what_is_here() {
    let two = Two::new();
    two.begun().install(0, &two.chunk(0)).unwrap();
    let signature = two.sign(1);
    // Its small files are damaged, which no chunk has to pay for.
    std::fs::remove_file(two.place().join(SOURCE)).unwrap();
    std::fs::set_permissions(two.place().join(STATE), std::fs::Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(two.place().join(STATE)).unwrap().write_all_at(b"?", 0).unwrap();
    let store = two.there.restarted();
    assert!(matches!(store.open_partial(&two.id), Err(PartialError::Damaged { damage: Damage::State, .. })));
    two.begin_at(&store).unwrap();
    let partial = store.open_partial(&two.id).unwrap();
    assert_eq!((partial.missing(), partial.from()), (3, FROM));
    assert_eq!(partial.signed().unwrap().signatures, [signature]);
    let small = (two.part(BundlePart::Manifest), two.part(BundlePart::State));
    store.begin_partial(&two.id, &small.0, &small.1, vec![], "/srv/bundles").unwrap();
    let partial = store.open_partial(&two.id).unwrap();
    assert_eq!((partial.from(), partial.missing()), ("/srv/bundles", 3));
    // What says where the rest comes from may be lost; what is here is here.
    for bytes in [&b""[..], b"{}", b"{\"format\":2,\"from\":\"x\"}", &[b' '; 100_000]] {
        file::replace(&two.place().join(SOURCE), bytes).unwrap();
        let partial = store.open_partial(&two.id).unwrap();
        assert_eq!((partial.from(), partial.missing()), ("", 3));
    }
}

#[test]
fn a_crash_while_it_is_published_is_gone_on_from() {
    let two = Two::new();
    let signature = two.sign(1);
    let partial = two.begun();
    for chunk in [0, 2, 3, 7] {
        partial.install(chunk, &two.chunk(chunk)).unwrap();
    }
    drop(partial);
    // Killed before the rename: the memory is for reading only, and the source is gone.
    file::make_read_only(&File::open(two.place().join(MEMORY)).unwrap()).unwrap();
    std::fs::remove_file(two.place().join(SOURCE)).unwrap();
    let store = two.there.restarted();
    store.sweep(&[]).unwrap();
    let partial = store.open_partial(&two.id).unwrap();
    assert_eq!((partial.missing(), partial.from()), (0, ""));
    partial.publish().unwrap();
    assert_eq!(store.signed(&two.id).unwrap().signatures, [signature]);
    // Killed after it.
    let store = two.there.restarted();
    assert!(store.sweep(&[]).unwrap().removed.is_empty() && store.partials().unwrap().is_empty());
    store.verify(&two.id, &mut |_| ()).unwrap();
    assert!(matches!(partial.publish(), Err(PartialError::Unknown { .. })));
}

#[test]
fn one_that_came_whole_meanwhile_stays() {
    let two = Two::new();
    let partial = two.begun();
    let mut bytes = Vec::new();
    two.here.store.open_export(&two.id).unwrap().write(&mut bytes).unwrap();
    two.there.store.import(bytes.as_slice(), "import", &mut |_| ()).unwrap();
    // Something runs from the part, and goes on.
    assert!(two.there.restarted().sweep(&[]).unwrap().removed.is_empty());
    for chunk in [0, 2, 3, 7] {
        partial.install(chunk, &two.chunk(chunk)).unwrap();
    }
    let signature = two.sign(1);
    two.there.store.sign(&two.id, signature).unwrap();
    let files = partial.launch_files().unwrap();
    assert!(partial.publish().unwrap().existed);
    assert!(names(&two.there.root.join(".partial")).is_empty());
    assert_eq!(content_of(&files.memory), two.memory());
    assert_eq!(two.there.store.signed(&two.id).unwrap().signatures, [signature]);
    two.there.store.remove(&two.id).unwrap();
    // With both, what lies beside stays until the last of them is gone.
    let partial = two.begun();
    two.there.store.import(bytes.as_slice(), "import", &mut |_| ()).unwrap();
    two.there.store.sign(&two.id, signature).unwrap();
    two.there.store.remove(&two.id).unwrap();
    assert_eq!(partial.signed().unwrap().signatures, [signature]);
    two.there.store.remove_partial(&two.id).unwrap();
    assert!(names(&two.there.root.join(".signatures")).is_empty());
}

#[test]
fn one_that_is_removed_is_gone_and_no_other_is_published_for_it() {
    let two = Two::new();
    two.sign(1);
    let partial = two.begun();
    for chunk in [0, 2, 3, 7] {
        partial.install(chunk, &two.chunk(chunk)).unwrap();
    }
    two.there.store.note_fetched(&two.id, FROM, crate::clock::UnixNanos(1)).unwrap();
    assert!(!two.there.store.fetched_list().unwrap()[0].is_whole);
    // `remove` is for whole ones.
    assert!(matches!(two.there.store.remove(&two.id), Err(crate::bundle::RemoveError::Unknown { .. })));
    two.there.store.remove_partial(&two.id).unwrap();
    for directory in [".partial", ".signatures", ".fetched"] {
        assert!(names(&two.there.root.join(directory)).is_empty(), "{directory}");
    }
    assert!(matches!(partial.publish(), Err(PartialError::Unknown { .. })));
    // Begun again, of which nothing is here: the old one does not pass for it.
    two.begin_at(&two.there.store).unwrap();
    assert!(matches!(partial.publish(), Err(PartialError::Unknown { .. })));
    assert_eq!(two.there.store.open_partial(&two.id).unwrap().missing(), 4);
    // Killed in the middle of a removal.
    let removing = two.there.root.join(format!(".partial/.removing-{}", two.id));
    std::fs::rename(two.place(), &removing).unwrap();
    let swept = two.there.restarted().sweep(&[]).unwrap();
    assert!(swept.removed.contains(&removing) && !removing.exists());
}

#[test]
fn parts_are_handed_on_as_far_as_they_are_here() {
    let two = Two::new();
    two.sign(1);
    let partial = two.begun();
    partial.install(2, &two.chunk(2)).unwrap();
    let read = |store: &Store, part| store.read_part(&two.id, part);
    let store = &two.there.store;
    for part in [BundlePart::Manifest, BundlePart::State, BundlePart::Signatures] {
        assert_eq!(read(store, part).unwrap(), two.part(part), "{part:?}");
    }
    let whole = two.memory();
    let of = |offset: u64, bytes: u64| BundlePart::Memory { offset, bytes };
    let slice = |offset: u64, bytes: u64| {
        whole[usize::try_from(offset).unwrap()..usize::try_from(offset + bytes).unwrap()].to_vec()
    };
    // Chunk 2, the end of the zeros before it and a piece of its middle.
    for (offset, bytes) in [(2 * CHUNK, CHUNK), (2 * CHUNK - 9, 20), (2 * CHUNK + 1000, 1), (CHUNK, CHUNK)] {
        assert_eq!(read(store, of(offset, bytes)).unwrap(), slice(offset, bytes), "{offset} {bytes}");
    }
    for (offset, bytes, wanted) in [(0, 1, 0), (2 * CHUNK, CHUNK + 1, 3), (MEMORY_BYTES - 1, 1, 7)] {
        let found = read(store, of(offset, bytes));
        assert!(matches!(found, Err(ReadPartError::NotHere { chunk, .. }) if chunk == wanted), "{found:?}");
    }
    for store in [store, &two.here.store, &two.here.restarted()] {
        for (offset, bytes) in [(MEMORY_BYTES, 1), (u64::MAX, 2), (0, PART_BYTES_MAX + 1), (MEMORY_BYTES - 1, 2)] {
            let found = read(store, of(offset, bytes));
            assert!(matches!(found, Err(ReadPartError::Beyond { .. })), "{found:?}");
        }
        assert_eq!(read(store, of(MEMORY_BYTES, 0)).unwrap(), b"");
    }
    // A whole one that this process has not verified yet is verified where it is read.
    let cold = two.here.restarted();
    for (offset, bytes) in [(0, PART_BYTES_MAX), (3 * CHUNK - 7, 99), (MEMORY_BYTES - 3, 3)] {
        assert_eq!(read(&cold, of(offset, bytes)).unwrap(), slice(offset, bytes));
    }
    two.here.flip(&two.id, MEMORY, 3 * CHUNK, 0);
    assert_eq!(read(&two.here.restarted(), of(0, 5)).unwrap(), b"first");
    let found = read(&two.here.restarted(), of(3 * CHUNK - 1, 2));
    let is_chunk = |damage: &Damage| matches!(damage, Damage::Chunk { index: 3, .. });
    assert!(
        matches!(&found, Err(ReadPartError::Read(ReadBundleError::Damaged { damage, .. })) if is_chunk(damage)),
        "{found:?}"
    );
    let absent = store.read_part(&crate::bundle::samples::GOLDEN_ID.parse().unwrap(), BundlePart::Manifest);
    assert!(matches!(absent, Err(ReadPartError::Read(ReadBundleError::Unknown { .. }))));
}

#[test]
fn memory_of_a_diff_is_read_as_its_guest_sees_it() {
    let two = Two::new();
    let diff = two.here.diff("diff", &two.id, &[(1, 1)], &[(4096, b"second")]).id;
    let read = |offset, bytes| two.here.store.read_part(&diff, BundlePart::Memory { offset, bytes }).unwrap();
    assert_eq!((read(0, 5), read(4096, 6)), (b"first".to_vec(), b"second".to_vec()));
    let manifest: std::sync::Arc<Manifest> = two.here.store.manifest(&diff).unwrap();
    assert!(manifest.is_diff());
}

#[test]
fn a_full_disk_is_said_and_costs_nothing_that_is_here() {
    let two = Two::new();
    two.sign(1);
    // Where the signatures are written first: a device that is always full.
    let full = two.there.root.join(".signatures").join(format!(".{}.json.new", two.id));
    std::os::unix::fs::symlink("/dev/full", &full).unwrap();
    let error = two.begin_at(&two.there.store).unwrap_err();
    assert!(matches!(error, PartialError::Signatures(SignError::NoSpace { .. })), "{error:?}");
    assert_eq!(error.retry(), Retry::Later);
    assert!(names(&two.there.root.join(".partial")).is_empty());
    let mut partial = two.begun();
    partial.install(0, &two.chunk(0)).unwrap();
    let device = File::options().read(true).write(true).open("/dev/full").unwrap();
    let memory = std::mem::replace(&mut partial.memory, device);
    let error = partial.install(2, &two.chunk(2)).unwrap_err();
    assert!(matches!(error, InstallError::NoSpace { chunk: 2, .. }) && error.retry() == Retry::Later, "{error:?}");
    assert_eq!((partial.missing(), partial.is_present(2)), (3, false));
    partial.memory = memory;
    for chunk in [2, 3, 7] {
        partial.install(chunk, &two.chunk(chunk)).unwrap();
    }
    partial.publish().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    /// Whatever memory holds, in whatever order it comes, whatever is damaged between two processes: what is said to be here
    /// is what the guest had, and in the end all of it is.
    #[test]
    fn any_memory_comes_in_any_order(
        writes in proptest::collection::vec((0_u64..64, 1_usize..9000, 1_u8..), 0..6),
        steps in proptest::collection::vec((0_u32..8, 0_u64..64, any::<bool>()), 0..12),
    ) {
        const CHUNK_BYTES: u64 = 256 << 10;
        // Six whole chunks and a piece of one.
        const BYTES: u64 = 6 * CHUNK_BYTES + (100 << 10);
        let (here, there) = (Rig::new(BYTES), Rig::new(BYTES));
        let content: Vec<_> = writes.iter().map(|(at, bytes, byte)| (at * 26_000, vec![*byte; *bytes])).collect();
        let content: Vec<(u64, &[u8])> = content.iter().map(|(at, bytes)| (*at, bytes.as_slice())).collect();
        let id = here.full("any", &content).id;
        let wanted = content_of(&here.store.open_for_launch(&id).unwrap().memory);
        let read = |part| here.store.read_part(&id, part).unwrap();
        let (manifest, state) = (read(BundlePart::Manifest), read(BundlePart::State));
        there.store.begin_partial(&id, &manifest, &state, vec![], FROM).unwrap();
        let mut partial = there.store.open_partial(&id).unwrap();
        let install = |partial: &Partial, chunk: u32| {
            let Some(range) = partial.chunk_range(chunk) else { return };
            let bytes = read(BundlePart::Memory { offset: range.start, bytes: range.end - range.start });
            partial.install(chunk, &bytes).unwrap();
        };
        for (chunk, at, is_damaged) in steps {
            install(&partial, chunk);
            if is_damaged {
                partial.memory.write_all_at(&[0xee; 100], at * 26_000).unwrap();
                partial = there.restarted().open_partial(&id).unwrap();
            }
            let memory = content_of(&partial.launch_files().unwrap().memory);
            for run in partial.present_runs() {
                let range = run.bytes(CHUNK_BYTES);
                let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end.min(BYTES)).unwrap();
                prop_assert!(memory[range.clone()] == wanted[range]);
            }
            let Progress { done_bytes, total_bytes } = partial.progress();
            prop_assert_eq!(done_bytes == total_bytes, partial.missing() == 0);
        }
        for chunk in 0..partial.chunks() {
            install(&partial, chunk);
        }
        partial.publish().unwrap();
        prop_assert!(content_of(&there.restarted().open_for_launch(&id).unwrap().memory) == wanted);
    }
}
