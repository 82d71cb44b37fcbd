//! Exported here and imported there; cut off, changed and out of order.

use super::*;
use crate::bundle::archive::Writer;
use crate::bundle::samples::{DIRECTORIES, Rig, content, draft, names, state};
use crate::bundle::{Contents, Export, ExportError, ManifestDraft, RemoveError, SignError};
use crate::signing::PrivateKey;
use proptest::prelude::*;

const MEMORY_BYTES: u64 = 1 << 20;

fn export(store: &Store, id: &BundleId) -> Vec<u8> {
    let mut bytes = Vec::new();
    store.open_export(id).unwrap().write(&mut bytes).unwrap();
    bytes
}

fn import(rig: &Rig, bytes: &[u8]) -> Result<Vec<Committed>, ImportError> {
    rig.store.import(bytes, "import", &mut |_| ())
}

/// Nothing is there but what a store begins with.
fn assert_nothing(rig: &Rig) {
    assert_eq!(names(&rig.root), DIRECTORIES);
    assert!(names(&rig.root.join(".signatures")).is_empty());
}

fn memory(store: &Store, id: &BundleId) -> Vec<u8> {
    content(&store.open_for_launch(id).unwrap().memory)
}

fn sign(rig: &Rig, id: &BundleId, number: u8) -> BundleSignature {
    let key = PrivateKey::from_seed([number; 32]).unwrap();
    let digest = rig.store.signed(id).unwrap().manifest_digest;
    let one = BundleSignature { key: key.public(), signature: key.sign_bundle(digest.as_bytes()) };
    rig.store.sign(id, one).unwrap();
    one
}

#[test]
fn a_bundle_arrives_as_it_was_with_its_signatures() {
    let (here, there) = (Rig::new(MEMORY_BYTES), Rig::new(MEMORY_BYTES));
    let id = here.full("web", &[(0, b"first"), (300 << 10, &[7; 9000]), (MEMORY_BYTES - 1, b"!")]).id;
    let signature = sign(&here, &id, 1);
    let bytes = export(&here.store, &id);
    assert!(bytes.len() < 40 << 10, "holes are not sent: {}", bytes.len());
    let imported = import(&there, &bytes).unwrap();
    assert_eq!((imported.len(), &imported[0].id, imported[0].existed), (1, &id, false));
    assert_eq!(memory(&there.store, &id), memory(&here.store, &id));
    there.store.verify(&id, &mut |_| ()).unwrap();
    assert_eq!(there.restarted().open_for_launch(&id).unwrap().manifest, here.store.manifest(&id).unwrap());
    let signed = there.store.signed(&id).unwrap();
    assert_eq!((signed.made_here, signed.signatures), (false, vec![signature]));
    assert_eq!(names(&there.root), [&DIRECTORIES[..], &[id.as_str()]].concat());
    // Again: it is there, and a signature that is new is added.
    sign(&here, &id, 2);
    let again = import(&there, &export(&here.store, &id)).unwrap();
    assert!(again[0].existed && there.store.signed(&id).unwrap().signatures.len() == 2);
    assert_eq!(names(&there.root).len(), DIRECTORIES.len() + 1);
    // What is exported there is, byte by byte, what was exported here.
    assert_eq!(export(&there.store, &id), export(&here.store, &id));
    // Made here as well, it is.
    there.full("web", &[(0, b"first"), (300 << 10, &[7; 9000]), (MEMORY_BYTES - 1, b"!")]);
    assert!(there.store.signed(&id).unwrap().made_here);
}

#[test]
fn a_diff_brings_what_it_builds_on() {
    let (here, there) = (Rig::new(MEMORY_BYTES), Rig::new(MEMORY_BYTES));
    let base = here.full("base", &[(0, &[1; 8192]), (600 << 10, b"kept")]).id;
    let middle = here.diff("middle", &base, &[(1, 1), (9, 1)], &[(4096, b"second")]).id;
    let top = here.diff("top", &middle, &[(0, 1), (200, 2)], &[(200 << 12, b"third")]).id;
    let imported = import(&there, &export(&here.store, &top)).unwrap();
    let ids: Vec<_> = imported.iter().map(|one| &one.id).collect();
    assert_eq!(ids, [&base, &middle, &top]);
    for id in [&base, &middle, &top] {
        assert_eq!(memory(&there.store, id), memory(&here.store, id));
        there.store.verify(id, &mut |_| ()).unwrap();
    }
    // A part of it is there: the rest comes.
    there.store.remove(&top).unwrap();
    let existed: Vec<_> = import(&there, &export(&here.store, &top)).unwrap().iter().map(|one| one.existed).collect();
    assert_eq!(existed, [true, true, false]);
}

#[test]
fn cut_off_at_any_byte_it_leaves_nothing() {
    let (here, there) = (Rig::new(64 << 10), Rig::new(64 << 10));
    let base = here.full("base", &[(0, b"x")]).id;
    let top = here.diff("top", &base, &[(1, 1)], &[(4096, b"y")]).id;
    sign(&here, &top, 1);
    let bytes = export(&here.store, &top);
    // Each byte of what is between the pages, and some of those in them.
    let is_in_page = |at: usize| bytes[at.saturating_sub(16)..(at + 16).min(bytes.len())].iter().all(|byte| *byte == 0);
    for length in (0..bytes.len()).filter(|at| !is_in_page(*at) || at.is_multiple_of(512)) {
        let found = import(&there, &bytes[..length]);
        assert!(matches!(found, Err(ImportError::Archive(ArchiveError::Truncated { .. }))), "{length}: {found:?}");
    }
    assert_nothing(&there);
    let longer = import(&there, &[&bytes[..], b"x"].concat());
    assert!(matches!(longer, Err(ImportError::Archive(ArchiveError::Trailing { .. }))), "{longer:?}");
    assert_nothing(&there);
}

#[test]
fn another_byte_anywhere_is_noticed_and_leaves_nothing() {
    let (here, there) = (Rig::new(64 << 10), Rig::new(64 << 10));
    let id = here.full("base", &[(0, b"x")]).id;
    sign(&here, &id, 1);
    let bytes = export(&here.store, &id);
    for at in (0..bytes.len()).filter(|at| bytes[*at] != 0 || at.is_multiple_of(128)) {
        let mut other = bytes.clone();
        other[at] ^= 1 << (at % 8);
        let found = import(&there, &other);
        assert!(found.is_err(), "byte {at}: {found:?}");
    }
    assert_nothing(&there);
    import(&there, &bytes).unwrap();
}

/// A stream of these bundles, as somebody writes it who makes good digests of bad things.
struct Forged {
    manifest: Vec<u8>,
    state: Vec<u8>,
    memory: Vec<(u64, Vec<u8>)>,
    signatures: Vec<BundleSignature>,
}

impl Forged {
    fn of(rig: &Rig, id: &BundleId) -> Self {
        let read = |name: &str| std::fs::read(rig.root.join(id.as_str()).join(name)).unwrap();
        let memory = vec![(0, read(MEMORY)[..4096].to_vec())];
        Self { manifest: read("manifest.json"), state: read(STATE), memory, signatures: Vec::new() }
    }

    fn write(all: &[&Self]) -> Vec<u8> {
        let mut writer = Writer::begin(Vec::new()).unwrap();
        for one in all {
            writer.manifest(&one.manifest).unwrap();
            writer.state(&one.state).unwrap();
            one.memory.iter().for_each(|(offset, bytes)| writer.memory(*offset, bytes).unwrap());
            one.signatures.iter().for_each(|one| writer.signature(one).unwrap());
        }
        writer.end().unwrap()
    }
}

#[test]
fn what_has_a_good_digest_and_is_wrong_is_refused() {
    let (here, there) = (Rig::new(64 << 10), Rig::new(64 << 10));
    let base = here.full("base", &[(0, b"x")]).id;
    let other = here.full("other", &[(0, b"z")]).id;
    let diff = here.diff("diff", &base, &[(1, 1)], &[]).id;
    let signature = sign(&here, &base, 1);
    let of = |id: &BundleId| Forged::of(&here, id);
    let refused = |all: &[&Forged]| {
        let error = import(&there, &Forged::write(all)).unwrap_err();
        assert_nothing(&there);
        error
    };
    let damage = |error: ImportError| {
        let ImportError::Damaged { damage, .. } = error else { panic!("{error:?}") };
        damage
    };
    let mut diff_alone = of(&diff);
    diff_alone.memory.clear();
    assert!(matches!(refused(&[&diff_alone]), ImportError::Parent { .. }));
    assert!(matches!(refused(&[&of(&other), &diff_alone]), ImportError::Parent { .. }));
    assert!(matches!(refused(&[&of(&base), &of(&other)]), ImportError::Unrelated { .. }));
    assert!(matches!(damage(refused(&[&Forged { memory: vec![], ..of(&base) }])), Damage::Chunk { index: 0, .. }));
    let beyond = Forged { memory: vec![(60 << 10, vec![1; 8192])], ..of(&base) };
    assert!(matches!(damage(refused(&[&beyond])), Damage::Length { file: MEMORY, .. }));
    let outside = Forged { memory: vec![(8192, vec![1])], ..of(&diff) };
    assert!(matches!(damage(refused(&[&of(&base), &outside])), Damage::NotHeld { first_page: 2, .. }));
    let shorter = Forged { state: state()[1..].to_vec(), ..of(&base) };
    assert!(matches!(damage(refused(&[&shorter])), Damage::Length { file: STATE, .. }));
    let mut changed = of(&base);
    changed.state[0] ^= 1;
    assert!(matches!(damage(refused(&[&changed])), Damage::State));
    let wrong = Forged { signatures: vec![signature], ..of(&other) };
    assert!(matches!(refused(&[&wrong]), ImportError::Signature { .. }));
    let no_manifest = Forged { manifest: b"{\"format\":9}".to_vec(), ..of(&base) };
    assert!(matches!(refused(&[&no_manifest]), ImportError::Manifest(ReadManifestError::Format { found: 9 })));
    let good = [of(&base), diff_alone];
    assert_eq!(import(&there, &Forged::write(&[&good[0], &good[1]])).unwrap().len(), 2);
}

#[test]
fn what_a_killed_agent_was_importing_is_swept() {
    let (here, there) = (Rig::new(64 << 10), Rig::new(64 << 10));
    let id = here.full("base", &[(0, b"x")]).id;
    let bytes = export(&here.store, &id);
    let mut coming = Vec::new();
    let cut = there.store.take_in(&bytes[..bytes.len() - 40], "import-1", &mut coming);
    assert!(cut.is_err() && coming.len() == 1);
    // As a kill leaves it.
    drop(coming);
    assert!(names(&there.root).contains(&".staging-import-1-0".to_owned()));
    let next = there.restarted();
    assert_eq!(next.sweep(&[]).unwrap().removed.len(), 1);
    assert_nothing(&there);
    assert!(next.list().unwrap().is_empty());
}

#[test]
fn nobody_removes_what_is_being_exported() {
    let here = Rig::new(MEMORY_BYTES);
    let base = here.full("base", &[(0, b"x")]).id;
    let top = here.diff("top", &base, &[(1, 1)], &[(4096, b"y")]).id;
    let exports: [Export; 2] = std::array::from_fn(|_| here.store.open_export(&top).unwrap());
    for export in exports {
        assert!(matches!(here.store.remove(&top), Err(RemoveError::Exported { .. })));
        export.write(Vec::new()).unwrap();
    }
    here.store.remove(&top).unwrap();
    here.store.remove(&base).unwrap();
    assert!(matches!(here.store.open_export(&base), Err(ExportError::Read(_))));
}

#[test]
fn what_is_damaged_is_not_exported() {
    for (name, offset) in [("manifest.json", 100), (STATE, 3), (MEMORY, 4096 + 7), (MEMORY, (512 << 10) + 1)] {
        let here = Rig::new(MEMORY_BYTES);
        let id = here.full("base", &[(0, &[5; 8192])]).id;
        here.flip(&id, name, offset, 2);
        let exported = here.restarted().open_export(&id).and_then(|export| export.write(Vec::new()));
        assert!(matches!(exported, Err(ExportError::Read(_))), "{name}: {exported:?}");
    }
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let (here, there) = (Rig::new(64 << 10), Rig::new(64 << 10));
    let id = here.full("base", &[(0, b"x")]).id;
    sign(&here, &id, 1);
    let bytes = export(&here.store, &id);
    // Where the signatures are written first: a device that is always full.
    let full = there.root.join(".signatures").join(format!(".{id}.json.new"));
    std::os::unix::fs::symlink("/dev/full", &full).unwrap();
    let error = import(&there, &bytes).unwrap_err();
    let is_told =
        matches!(&error, ImportError::Commit(CommitError::Signatures { source: SignError::NoSpace { .. }, .. }));
    assert!(is_told && error.retry() == Retry::Later, "{error:?}");
    assert_nothing(&there);
    import(&there, &bytes).unwrap();
    std::fs::remove_dir_all(&there.root).unwrap();
    assert!(matches!(import(&there, &bytes), Err(ImportError::Stage(StageError::File { .. }))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_memory_arrives(
        writes in proptest::collection::vec((0_u64..64, 1_usize..9000, any::<u8>()), 0..6),
        pages in proptest::collection::btree_set(0_u64..64, 0..8),
    ) {
        let (here, there) = (Rig::new(256 << 10), Rig::new(256 << 10));
        let bytes: Vec<_> = writes.iter().map(|(_, length, byte)| vec![*byte; *length]).collect();
        let place = |(page, length, _): &(u64, usize, u8)| (page << 12).min((256 << 10) - *length as u64);
        let writes: Vec<_> = writes.iter().map(place).zip(bytes.iter().map(Vec::as_slice)).collect();
        let base = here.full("base", &writes).id;
        let pages: Vec<_> = pages.into_iter().map(|page| (page, 1)).collect();
        let staging = here.staged("top", &writes);
        let draft = ManifestDraft { name: None, ..draft(256 << 10) };
        let runs = pages.iter().copied().map(crate::bundle::Run::from).collect();
        let contents = Contents::Diff { parent: base.clone(), pages: runs };
        let top = staging.commit(draft, contents, &mut |_| ()).unwrap().id;
        import(&there, &export(&here.store, &top)).unwrap();
        prop_assert_eq!(memory(&there.store, &top), memory(&here.store, &top));
        prop_assert_eq!(memory(&there.store, &base), memory(&here.store, &base));
    }
}
