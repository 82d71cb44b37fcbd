//! Tests of `bundle::verify`.

use std::os::unix::fs::FileExt;

use super::*;
use crate::bundle::samples::{Rig, state};
use crate::sys::file;
use crate::units::MIB;

fn rig() -> Rig {
    Rig::new(4 * MIB)
}

/// The one thing that is wrong, which a launch in another process finds as well.
fn damage(rig: &Rig, id: &BundleId) -> Damage {
    rig.restarted().open_for_launch(id).unwrap_err();
    only(rig, id)
}

fn only(rig: &Rig, id: &BundleId) -> Damage {
    match rig.store.verify(id, &mut |_| ()) {
        Err(VerifyError::Damaged { first, others, .. }) if others.is_empty() => first,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_whole_bundle_is_whole() {
    let rig = rig();
    let id = rig.full("one", &[(0, b"a"), (MIB, b"b")]).id;
    assert_eq!(rig.store.verify(&id, &mut |_| ()).unwrap(), Verified { chunks: 16, sections: 2 });
    let child = rig.diff("child", &id, &[(1, 1)], &[(4096, b"c")]).id;
    assert_eq!(rig.store.verify(&child, &mut |_| ()).unwrap(), Verified { chunks: 1, sections: 2 });
    let absent = BundleId::from_digest([9; 16]);
    assert!(matches!(rig.store.verify(&absent, &mut |_| ()), Err(VerifyError::Read(ReadBundleError::Unknown { .. }))));
}

#[test]
fn one_flipped_bit_is_found_in_any_byte_of_manifest_and_state() {
    let rig = rig();
    let id = rig.full("one", &[(0, b"a")]).id;
    let length = |name| std::fs::metadata(rig.root.join(id.as_str()).join(name)).unwrap().len();
    for offset in 0..length(MANIFEST) {
        let bit = u8::try_from(offset % 8).unwrap();
        rig.flip(&id, MANIFEST, offset, bit);
        assert!(matches!(only(&rig, &id), Damage::Id { .. }), "byte {offset}");
        rig.flip(&id, MANIFEST, offset, bit);
    }
    for offset in 0..length(STATE) {
        rig.flip(&id, STATE, offset, 3);
        assert!(matches!(only(&rig, &id), Damage::State), "byte {offset}");
        rig.flip(&id, STATE, offset, 3);
    }
    rig.store.verify(&id, &mut |_| ()).unwrap();
}

#[test]
fn one_flipped_bit_of_memory_is_found_with_its_pages() {
    let rig = rig();
    let id = rig.full("one", &[(0, b"a"), (MIB, b"b"), (2 * MIB, b"c")]).id;
    rig.flip(&id, MEMORY, MIB + 77, 0);
    assert!(matches!(damage(&rig, &id), Damage::Chunk { index: 4, first_page: 256, last_page: 319 }));
    rig.flip(&id, MEMORY, MIB + 77, 0);
    rig.store.verify(&id, &mut |_| ()).unwrap();
    // The only byte that was not zero: the chunk is zero now.
    rig.flip(&id, MEMORY, 0, 0);
    rig.flip(&id, MEMORY, 0, 5);
    rig.flip(&id, MEMORY, 0, 6);
    assert!(matches!(damage(&rig, &id), Damage::Chunk { index: 0, .. }));
    rig.tamper(&id, MEMORY, |file| file.write_all_at(b"a", 0).unwrap());
    rig.flip(&id, MEMORY, 4 * MIB - 1, 7);
    assert!(matches!(damage(&rig, &id), Damage::NotZero { index: 15, first_page: 960, last_page: 1023 }));
    let text = damage(&rig, &id).to_string();
    assert_eq!(text, "memory.img was changed: chunk 15 was zero, guest pages 960 to 1023");
}

#[test]
fn all_damages_are_told() {
    let rig = rig();
    let id = rig.full("one", &[(0, b"a"), (MIB, b"b")]).id;
    rig.flip(&id, STATE, 20, 0);
    rig.flip(&id, MEMORY, 5, 0);
    rig.flip(&id, MEMORY, MIB + 5, 0);
    let error = rig.store.verify(&id, &mut |_| ()).unwrap_err();
    let VerifyError::Damaged { first: Damage::State, others, .. } = &error else { panic!("{error:?}") };
    assert!(matches!(others[..], [Damage::Chunk { index: 0, .. }, Damage::Chunk { index: 4, .. }]));
    assert_eq!(error.to_string(), format!("bundle {id} is damaged in 3 places"));
    assert_eq!(error.retry(), Retry::Never);
}

#[test]
fn missing_truncated_and_extra_files_are_found() {
    let rig = rig();
    for name in FILES {
        let id = rig.full("one", &[(0, b"a")]).id;
        let path = rig.root.join(id.as_str()).join(name);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(damage(&rig, &id), Damage::Missing { file } if file == name));
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(matches!(damage(&rig, &id), Damage::NotRegular { file } if file == name));
        std::fs::remove_file(&path).unwrap();
        let half = bytes.len() / 2;
        file::create(&path).unwrap().write_all_at(&bytes[..half], 0).unwrap();
        let found = damage(&rig, &id);
        if name == MANIFEST {
            assert!(matches!(found, Damage::Id { .. }), "{found:?}");
        } else {
            let Damage::Length { file, found, .. } = found else { panic!("{found:?}") };
            assert_eq!((file, found), (name, half as u64));
        }
        rig.store.remove(&id).unwrap();
    }
    let id = rig.full("one", &[(0, b"a")]).id;
    rig.tamper(&id, STATE, |file| file.set_len(state().len() as u64 + 1).unwrap());
    assert!(matches!(damage(&rig, &id), Damage::Length { file: STATE, .. }));
    rig.tamper(&id, STATE, |file| file.set_len(state().len() as u64).unwrap());
    file::create(&rig.root.join(id.as_str()).join("notes")).unwrap();
    assert!(matches!(only(&rig, &id), Damage::Extra { file } if file == "notes"));
}

#[test]
fn a_diff_answers_for_its_own_pages() {
    let rig = rig();
    let parent = rig.full("parent", &[(0, b"a"), (MIB, b"b")]).id;
    let child = rig.diff("child", &parent, &[(1, 2)], &[(4096, b"c")]).id;
    rig.flip(&child, MEMORY, 4096 + 100, 0);
    assert!(matches!(damage(&rig, &child), Damage::Chunk { index: 0, .. }));
    rig.flip(&child, MEMORY, 4096 + 100, 0);
    // Held as zero, without data.
    rig.flip(&child, MEMORY, 2 * 4096, 0);
    assert!(matches!(damage(&rig, &child), Damage::Chunk { index: 0, .. }));
    rig.flip(&child, MEMORY, 2 * 4096, 0);
    rig.flip(&child, MEMORY, 3 * MIB, 0);
    assert!(matches!(only(&rig, &child), Damage::NotHeld { first_page: 768, last_page: 768 }));
    rig.flip(&child, MEMORY, 3 * MIB, 0);
    rig.store.verify(&child, &mut |_| ()).unwrap();

    rig.flip(&parent, MEMORY, MIB, 0);
    let error = rig.store.verify(&child, &mut |_| ()).unwrap_err();
    let VerifyError::Parent { source: OpenBundleError::Read(ReadBundleError::Damaged { bundle, .. }), .. } = error
    else {
        panic!("{error:?}")
    };
    assert_eq!(bundle, parent);
    std::fs::remove_dir_all(rig.root.join(parent.as_str())).unwrap();
    let error = rig.store.verify(&child, &mut |_| ()).unwrap_err();
    assert!(matches!(error, VerifyError::Parent { .. }), "{error:?}");
}
