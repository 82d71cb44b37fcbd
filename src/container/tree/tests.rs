//! Layers on top of each other are what a slow and plain way of putting them together makes of them.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What a layer does, on few names, so that it meets what is there.
#[derive(Debug, Clone)]
enum Step {
    Directory(String),
    File(String),
    Link(String),
    Hide(String),
    HideAll(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec("[ab]", 1..4).prop_map(|names| names.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        path().prop_map(Step::Directory),
        path().prop_map(Step::File),
        path().prop_map(Step::Link),
        path().prop_map(Step::Hide),
        path().prop_map(Step::HideAll),
    ]
}

/// A path's type and layer: `d`, `f` or `l`; directories that are only named have no layer.
type Flat = BTreeMap<String, (char, Option<u32>)>;

fn whiteout(path: &str, name: &str) -> String {
    match path.rsplit_once('/') {
        Some((parent, _)) => format!("{parent}/{name}"),
        None => name.to_owned(),
    }
}

fn apply(tree: &mut Tree, step: &Step, layer: u32) -> Result<(), Fault> {
    let metadata = Metadata { mode: layer, ..Metadata::default() };
    let free = |_| Ok(());
    match step {
        Step::Directory(path) => tree.put_directory(&Path::parse(path.as_bytes())?, metadata, layer, free),
        Step::File(path) => tree.put(&Path::parse(path.as_bytes())?, (Kind::Pipe, metadata), layer, free),
        Step::Link(path) => {
            let link = Kind::Link(b"a".to_vec());
            tree.put(&Path::parse(path.as_bytes())?, (link, metadata), layer, free)
        }
        Step::Hide(path) => {
            let name = path.rsplit('/').next().unwrap_or(path);
            let path = whiteout(path, &format!(".wh.{name}"));
            let path = Path::parse(path.as_bytes())?;
            tree.hide(&path.hides()?.expect("a whiteout"), layer)
        }
        Step::HideAll(path) => {
            let path = format!("{path}/.wh..wh..opq");
            let path = Path::parse(path.as_bytes())?;
            tree.hide(&path.hides()?.expect("a whiteout"), layer)
        }
    }
}

fn flat(tree: &Tree) -> Flat {
    fn walk(tree: &Tree, directory: &Directory, above: &str, into: &mut Flat) {
        for (name, node) in &directory.names {
            let path = format!("{above}{}", std::str::from_utf8(name).unwrap());
            match node {
                Node::Directory(below) => {
                    into.insert(path.clone(), ('d', below.declared.map(|(layer, _)| layer)));
                    walk(tree, below, &format!("{path}/"), into);
                }
                Node::Leaf { inode, layer } => {
                    let kind = match tree.inodes[*inode].0 {
                        Kind::Link(_) => 'l',
                        Kind::File(_) | Kind::Pipe => 'f',
                    };
                    into.insert(path, (kind, Some(*layer)));
                }
            }
        }
    }
    let mut into = Flat::new();
    walk(tree, &tree.root, "", &mut into);
    into
}

/// The plain way: all whiteouts first, by prefixes of paths; then what the layer has.
fn plainly(mut below: Flat, steps: &[Step], layer: u32) -> Flat {
    let is_below = |path: &str, of: &str| path.strip_prefix(of).is_some_and(|rest| rest.starts_with('/'));
    for step in steps {
        match step {
            Step::Hide(hidden) => below.retain(|path, _| path != hidden && !is_below(path, hidden)),
            Step::HideAll(hidden) => below.retain(|path, _| !is_below(path, hidden)),
            Step::Directory(_) | Step::File(_) | Step::Link(_) => {}
        }
    }
    for step in steps {
        let (path, kind) = match step {
            Step::Directory(path) => (path, 'd'),
            Step::File(path) => (path, 'f'),
            Step::Link(path) => (path, 'l'),
            Step::Hide(_) | Step::HideAll(_) => continue,
        };
        let parents = path.match_indices('/').map(|(at, _)| path[..at].to_owned());
        for parent in parents {
            below.entry(parent).or_insert(('d', None));
        }
        if kind != 'd' {
            below.retain(|other, _| !is_below(other, path));
        }
        below.insert(path.clone(), (kind, Some(layer)));
    }
    below
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn layers_become_what_they_become_plainly(layers in prop::collection::vec(prop::collection::vec(step(), 0..6), 1..4)) {
        let mut tree = Tree::default();
        let mut expected = Flat::new();
        for (layer, steps) in (1..).zip(&layers) {
            if steps.iter().try_for_each(|step| apply(&mut tree, step, layer)).is_err() {
                return Ok(());
            }
            expected = plainly(expected, steps, layer);
            prop_assert_eq!(flat(&tree), expected.clone());
        }
    }

    /// Where an archive has its whiteouts makes no difference to what is hidden.
    #[test]
    fn whiteouts_may_come_first_or_last(below in prop::collection::vec(step(), 0..8), above in prop::collection::vec(step(), 0..6)) {
        let is_whiteout = |step: &&Step| matches!(step, Step::Hide(_) | Step::HideAll(_));
        let made = |first: bool| {
            let mut tree = Tree::default();
            for step in &below {
                // What does not fit is left out: the same in both.
                let _ = apply(&mut tree, step, 1);
            }
            let steps = above.iter().filter(|step| is_whiteout(step) == first);
            let steps = steps.chain(above.iter().filter(|step| is_whiteout(step) != first));
            steps.map(|step| apply(&mut tree, step, 2)).collect::<Result<Vec<_>, _>>().ok().map(|_| flat(&tree))
        };
        if let (Some(one), Some(other)) = (made(true), made(false)) {
            prop_assert_eq!(one, other);
        }
    }

    #[test]
    fn a_path_that_is_taken_leads_nowhere_else(path in prop::collection::vec(prop_oneof![Just(b'.'), Just(b'/'), any::<u8>()], 0..300)) {
        if let Ok(Path(names)) = Path::parse(&path) {
            for name in names {
                prop_assert!(!name.is_empty() && name.len() <= NAME_BYTES_MAX && name != b"." && name != b"..");
                prop_assert!(!name.contains(&b'/') && !name.contains(&0));
            }
        }
    }
}
