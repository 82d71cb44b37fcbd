//! Tests of `bundle::store`.

use super::*;
use crate::bundle::samples::{DIRECTORIES, Rig, names};
use crate::bundle::{RemoveError, StageError};
use crate::units::MIB;

fn rig() -> Rig {
    Rig::new(MIB)
}

#[test]
fn bundles_are_listed_and_found_by_id_start_or_name() {
    let rig = rig();
    assert!(rig.store.list().unwrap().is_empty());
    let (a, b) = (rig.full("first", &[(0, b"a")]).id, rig.full("second", &[(0, b"b")]).id);
    let listed: Vec<BundleId> = rig.restarted().list().unwrap().into_iter().map(|listed| listed.id).collect();
    assert!(listed.contains(&a) && listed.contains(&b) && listed.len() == 2);
    assert_eq!(rig.store.find(a.as_str()).unwrap(), a);
    assert_eq!(rig.store.find(&a.as_str()[..12]).unwrap(), a);
    assert_eq!(rig.store.find("second").unwrap(), b);
    for word in ["", "b-", "third", "b-aaaaaaaaaaaaaaaaaaaaaaaaaa", "../first"] {
        assert!(matches!(rig.store.find(word), Err(FindError::Unknown { .. })), "{word}");
    }
    let again = rig.full("second", &[(0, b"c")]).id;
    let Err(FindError::Ambiguous { candidates, .. }) = rig.store.find("second") else { panic!("two have this name") };
    assert!(candidates.contains(&b) && candidates.contains(&again));
}

#[test]
fn an_unreadable_bundle_is_listed_with_the_reason() {
    let rig = rig();
    let id = rig.full("one", &[(0, b"a")]).id;
    rig.flip(&id, MANIFEST, 30, 0);
    let listed = rig.store.list().unwrap();
    let [Listed { manifest: Err(ReadBundleError::Damaged { damage: Damage::Id { .. }, .. }), .. }] = &listed[..] else {
        panic!("{listed:?}")
    };
    assert!(rig.store.find("one").is_err());
    assert_eq!(rig.store.find(id.as_str()).unwrap(), id, "it can still be removed");
    rig.store.remove(&id).unwrap();
}

#[test]
fn a_sweep_removes_what_is_half_made_and_nothing_else() {
    let rig = rig();
    let id = rig.full("whole", &[(0, b"a")]).id;
    let child = rig.diff("child", &id, &[(1, 1)], &[(4096, b"b")]).id;
    rig.store.open_for_launch(&child).unwrap();
    let _lost = rig.staged("lost", &[(0, b"b")]);
    let _kept = rig.staged("kept", &[(0, b"c")]);
    std::fs::create_dir(rig.root.join(".removing-x")).unwrap();
    file::create(&rig.root.join(".flat/.half.new")).unwrap();
    let swept = rig.restarted().sweep(&["kept"]).unwrap();
    assert_eq!((swept.removed.len(), swept.failed.len()), (3, 0));
    assert_eq!(
        names(&rig.root),
        [
            ".fetched",
            ".flat",
            ".partial",
            ".signatures",
            ".staging-kept",
            ".working-sets",
            id.as_str().min(child.as_str()),
            id.as_str().max(child.as_str())
        ]
    );
    assert_eq!(names(&rig.root.join(".flat")), [format!("{child}.img")]);
    assert!(rig.restarted().reopen("kept").unwrap().is_some());
    assert!(rig.restarted().reopen("lost").unwrap().is_none());
}

#[test]
fn a_token_is_a_label_and_has_one_holder() {
    let rig = rig();
    let staging = rig.store.stage("op-1", MIB).unwrap();
    assert!(matches!(rig.store.stage("op-1", MIB), Err(StageError::Exists { .. })));
    for token in ["", "..", "a/b", "A"] {
        assert!(matches!(rig.store.stage(token, MIB), Err(StageError::Token { .. })), "{token}");
    }
    staging.discard().unwrap();
    assert_eq!(names(&rig.root), DIRECTORIES);
    assert!(matches!(rig.store.stage("op-2", u64::MAX), Err(StageError::File { .. })));
    assert_eq!(names(&rig.root), DIRECTORIES, "what could not be staged is gone");
}

#[test]
fn a_parent_is_not_removed_before_its_children() {
    let rig = rig();
    let parent = rig.full("parent", &[(0, b"a")]).id;
    let child = rig.diff("child", &parent, &[(1, 1)], &[(4096, b"b")]).id;
    rig.store.open_for_launch(&child).unwrap();
    assert_eq!(rig.store.children(&parent).unwrap(), std::slice::from_ref(&child));
    let Err(RemoveError::HasChildren { children, .. }) = rig.store.remove(&parent) else { panic!("it has a child") };
    assert_eq!(children, std::slice::from_ref(&child));
    rig.store.remove(&child).unwrap();
    rig.store.remove(&parent).unwrap();
    assert!(matches!(rig.store.remove(&parent), Err(RemoveError::Unknown { .. })));
    assert!(matches!(rig.store.manifest(&parent), Err(ReadBundleError::Unknown { .. })));
    assert_eq!(names(&rig.root), DIRECTORIES);
    assert!(names(&rig.root.join(".flat")).is_empty());
}
