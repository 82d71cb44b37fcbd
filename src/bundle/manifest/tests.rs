//! Tests of `bundle::manifest`.

use proptest::prelude::*;

use super::*;
use crate::bundle::samples;
use crate::units::MIB;

const MEMORY_BYTES: u64 = 2 * MIB;
const CHUNKS: u64 = MEMORY_BYTES / CHUNK_BYTES as u64;

fn digest() -> Digest {
    Digest::of(b"chunk")
}

/// Two chunks with content, the others zero.
fn manifest() -> Manifest {
    let chunks = vec![Chunk { index: 1, digest: digest() }, Chunk { index: 4, digest: digest() }];
    let zero_runs = [(0, 1), (2, 2), (5, CHUNKS - 5)].map(Run::from).to_vec();
    let memory = MemoryMap { chunk_bytes: CHUNK_BYTES, chunks, zero_runs, pages: None };
    let state = StateFile { bytes: 100, digest: digest(), sections: Vec::new() };
    samples::draft(MEMORY_BYTES).complete(memory, state, None)
}

fn diff() -> Manifest {
    let mut diff = manifest();
    diff.parent = Some(Parent { bundle: BundleId::from_digest([1; 16]), depth: 1 });
    diff.memory.pages = Some([(0, 3), (64, 1)].map(Run::from).to_vec());
    diff
}

fn field_of(change: impl FnOnce(&mut Manifest), mut manifest: Manifest) -> &'static str {
    change(&mut manifest);
    // What is refused here is refused in a file.
    let bytes = serde_json::to_vec(&manifest).unwrap();
    match (manifest.check(), read(&bytes)) {
        (Err(error), Err(ReadManifestError::Invalid(same))) => {
            assert_eq!(error, same);
            error.field
        }
        (here, there) => panic!("{here:?}, from a file {there:?}"),
    }
}

#[test]
fn a_manifest_is_read_back() {
    for manifest in [manifest(), diff()] {
        let bytes = manifest.to_bytes().unwrap();
        assert_eq!(read(&bytes).unwrap(), manifest);
        assert_eq!(read(&bytes).unwrap().to_bytes().unwrap(), bytes, "one manifest, one text");
        assert!(!String::from_utf8(bytes).unwrap().contains("/work"), "no path of this host");
    }
}

#[test]
fn the_version_of_a_manifest_of_the_future_is_told() {
    let future = br#"{"shape": {"of": ["another", "kind"]}, "format": 7, "memory": null}"#;
    assert!(matches!(read(future), Err(ReadManifestError::Format { found: 7 })));
    assert!(matches!(read(br#"{"format": 0}"#), Err(ReadManifestError::Format { found: 0 })));
    assert!(matches!(read(br#"{"format": "1"}"#), Err(ReadManifestError::NoFormat(_))));
    assert!(matches!(read(b"{}"), Err(ReadManifestError::NoFormat(_))));
    assert!(matches!(read(br#"{"format": 1}"#), Err(ReadManifestError::Syntax(_))));
    assert!(matches!(read(&vec![b' '; MANIFEST_BYTES_MAX + 1]), Err(ReadManifestError::Size { .. })));
}

#[test]
fn unknown_fields_and_architectures_are_refused() {
    let text = String::from_utf8(manifest().to_bytes().unwrap()).unwrap();
    let more = text.replacen('{', r#"{"more":1,"#, 1);
    assert!(matches!(read(more.as_bytes()), Err(ReadManifestError::Syntax(_))));
    let error = read(text.replace("x86_64", "mips").as_bytes()).unwrap_err();
    let ReadManifestError::Syntax(cause) = error else { panic!("{error:?}") };
    assert!(cause.to_string().contains(r#"arch: "mips""#), "{cause}");
}

#[test]
fn memory_is_covered_exactly_once() {
    let chunks = |change: fn(&mut MemoryMap)| field_of(|manifest| change(&mut manifest.memory), manifest());
    assert_eq!(chunks(|memory| memory.chunks.swap(0, 1)), "memory.chunks");
    assert_eq!(chunks(|memory| memory.chunks[1].index = 1), "memory.chunks");
    assert_eq!(chunks(|memory| memory.chunks[1].index = 5), "memory.chunks");
    assert_eq!(chunks(|memory| memory.chunks.push(Chunk { index: CHUNKS, digest: digest() })), "memory.chunks");
    assert_eq!(chunks(|memory| memory.chunks.push(Chunk { index: u64::MAX, digest: digest() })), "memory.chunks");
    assert_eq!(chunks(|memory| memory.chunks.clear()), "memory.chunks");
    assert_eq!(chunks(|memory| memory.zero_runs[1].count = 1), "memory.chunks");
    assert_eq!(chunks(|memory| memory.zero_runs[1].count = 3), "memory.chunks");
    assert_eq!(chunks(|memory| memory.zero_runs[1].count = 9), "memory.zero_runs");
    assert_eq!(chunks(|memory| memory.zero_runs[1].count = u64::MAX), "memory.zero_runs");
    assert_eq!(chunks(|memory| memory.zero_runs[1].count = 0), "memory.zero_runs");
    assert_eq!(chunks(|memory| memory.zero_runs.swap(0, 1)), "memory.zero_runs");
    assert_eq!(chunks(|memory| memory.zero_runs.push(Run { first: CHUNKS, count: 1 })), "memory.zero_runs");
    for bytes in [0, 1, 4096, (64 << 10) - 1, 96 << 10, 1 << 20] {
        assert_eq!(field_of(|manifest| manifest.memory.chunk_bytes = bytes, manifest()), "memory.chunk_bytes");
    }
}

#[test]
fn absurd_sizes_are_refused() {
    let machine = |change: fn(&mut MachineShape)| field_of(|manifest| change(&mut manifest.machine), manifest());
    assert_eq!(machine(|machine| machine.memory_bytes = 0), "machine.memory_bytes");
    assert_eq!(machine(|machine| machine.memory_bytes += 1), "machine.memory_bytes");
    assert_eq!(machine(|machine| machine.memory_bytes = (1 << 40) + 4096), "machine.memory_bytes");
    assert_eq!(machine(|machine| machine.memory_bytes = !4095), "machine.memory_bytes");
    assert_eq!(machine(|machine| machine.page_bytes = 8192), "machine.page_bytes");
    assert_eq!(machine(|machine| machine.vcpus = 0), "machine.vcpus");
    assert_eq!(machine(|machine| machine.vcpus = 33), "machine.vcpus");
    assert_eq!(machine(|machine| machine.devices.swap(0, 1)), "machine.devices");
    assert_eq!(machine(|machine| machine.devices[0].mtu = Some(1500)), "machine.devices");
    assert_eq!(machine(|machine| machine.devices[0].read_only = Some(true)), "machine.devices");
    assert_eq!(machine(|machine| machine.devices[3].mtu = Some(67)), "machine.devices");
    assert_eq!(machine(|machine| machine.devices[3].mac = Some("02:00".to_owned())), "machine.devices");
    assert_eq!(machine(|machine| machine.devices[3].slot = 64), "machine.devices");
    assert_eq!(field_of(|manifest| manifest.state.bytes = (32 << 20) + 1, manifest()), "state.bytes");
    let section = SectionEntry { kind: 1, instance: 0, version: 1 };
    assert_eq!(field_of(|manifest| manifest.state.sections = vec![section; 2], manifest()), "state.sections");
    assert_eq!(field_of(|manifest| manifest.state.sections = vec![section; 257], manifest()), "state.sections");
    let mut largest = manifest();
    largest.machine.memory_bytes = 1 << 40;
    largest.memory.chunks.clear();
    largest.memory.zero_runs = vec![Run { first: 0, count: (1 << 40) / u64::from(CHUNK_BYTES) }];
    largest.machine.vcpus = 32;
    largest.state.bytes = 32 << 20;
    largest.check().unwrap();
}

#[test]
fn names_lists_and_leases_are_bounded() {
    for name in ["", "Warm", "a/b", "..", &"a".repeat(64)] {
        assert_eq!(field_of(|manifest| manifest.name = Some(name.to_owned()), manifest()), "name");
    }
    assert_eq!(field_of(|manifest| manifest.leases.push("v-1".to_owned()), manifest()), "leases");
    assert_eq!(field_of(|manifest| manifest.cpu.features.swap(0, 1), manifest()), "cpu.features");
    assert_eq!(field_of(|manifest| manifest.cpu.features[0].clear(), manifest()), "cpu.features");
    assert_eq!(field_of(|manifest| manifest.identity.macs[0].push('0'), manifest()), "identity.macs");
    assert_eq!(field_of(|manifest| manifest.guest.command_line = "x".repeat(4097), manifest()), "guest.command_line");
    let warmup = vec![String::new(); 1025];
    assert_eq!(field_of(|manifest| manifest.provenance.warmup = warmup, manifest()), "provenance.warmup");
}

#[test]
fn held_pages_are_a_diffs_and_in_range() {
    let pages = |runs: &[(u64, u64)]| {
        let runs: Vec<Run> = runs.iter().copied().map(Run::from).collect();
        field_of(|manifest| manifest.memory.pages = Some(runs), diff())
    };
    assert_eq!(pages(&[(0, 0)]), "memory.pages");
    assert_eq!(pages(&[(0, 513)]), "memory.pages");
    assert_eq!(pages(&[(512, 1)]), "memory.pages");
    assert_eq!(pages(&[(1, u64::MAX)]), "memory.pages");
    assert_eq!(pages(&[(0, 2), (1, 2)]), "memory.pages");
    assert_eq!(pages(&[(5, 1), (1, 1)]), "memory.pages");
    assert_eq!(field_of(|manifest| manifest.memory.pages = None, diff()), "memory.pages");
    assert_eq!(field_of(|manifest| manifest.parent = None, diff()), "memory.pages");
    for (depth, valid) in [(0, false), (1, true), (8, true), (9, false)] {
        let mut diff = diff();
        diff.parent.as_mut().unwrap().depth = depth;
        assert_eq!(diff.check().is_ok(), valid, "depth {depth}");
    }
}

/// The manifest every later version must go on reading. To change the format: a new version, and a golden beside it.
#[test]
fn the_golden_bundle_is_read() {
    let bytes = include_bytes!("../../../tests/golden/bundle_v1/manifest.json");
    let state = include_bytes!("../../../tests/golden/bundle_v1/state.bin");
    let manifest = read(bytes).unwrap();
    assert_eq!(manifest.state.digest, Digest::of(state));
    assert_eq!(crate::saved::codec::from_bytes(state).unwrap().len(), manifest.state.sections.len());
    assert_eq!(manifest.to_bytes().unwrap(), bytes, "what is written today");
    assert_eq!(manifest.machine.memory_bytes, MIB);
}

proptest! {
    #[test]
    fn any_cover_of_memory_is_valid(marks in proptest::collection::vec(any::<bool>(), 8)) {
        let mut covered = manifest();
        covered.memory.chunks.clear();
        covered.memory.zero_runs.clear();
        for (index, has_content) in (0..).zip(&marks) {
            if *has_content {
                covered.memory.chunks.push(Chunk { index, digest: digest() });
            } else {
                crate::bundle::run::push(&mut covered.memory.zero_runs, index);
            }
        }
        prop_assert_eq!(covered.check(), Ok(()));
        for (index, has_content) in (0..).zip(&marks) {
            prop_assert_eq!(covered.memory.digest(index).is_some(), *has_content);
        }
        let bytes = covered.to_bytes().unwrap();
        prop_assert_eq!(read(&bytes).unwrap(), covered);
    }

    #[test]
    fn a_changed_manifest_has_another_id_and_is_no_surprise(at in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let mut bytes = diff().to_bytes().unwrap();
        let id = id_of(&bytes);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert_ne!(id_of(&bytes), id);
        let _ = read(&bytes);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read(&bytes).is_err());
    }
}
