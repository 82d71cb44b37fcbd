//! Tier 0: the laws of the source tree, kept by program. Floors (who may name whom), where unsafe code lives and how
//! much of it, module documentation, banned names, leftovers, script headers, saved types with goldens.
//! Sizes are printed as advice; everything else fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// A floor's law: a module of the crate, the modules of ours it may name, and the outside crates it may name.
struct Floor {
    module: &'static str,
    ours: &'static [&'static str],
    outside: &'static [&'static str],
}

/// Crates every floor may use: they are vocabulary.
const EVERYWHERE: &[&str] = &["std", "core", "alloc", "serde", "thiserror", "proptest", "tempfile", "insta"];

/// DESIGN: the floors. A module may name itself and what its line lists; `sys::file` allows that part of `sys` only,
/// `!sys::kvm` takes a part away.
const FLOORS: &[Floor] = &[
    Floor { module: "base64", ours: &[], outside: &[] },
    Floor { module: "ids", ours: &[], outside: &[] },
    Floor { module: "lease", ours: &["ids"], outside: &[] },
    Floor { module: "signing", ours: &["base64"], outside: &["ring"] },
    // `ring`: the provider of that name, in rustls.
    Floor { module: "tls", ours: &[], outside: &["rustls", "ring"] },
    Floor { module: "units", ours: &[], outside: &[] },
    Floor { module: "clock", ours: &[], outside: &[] },
    Floor { module: "report", ours: &[], outside: &[] },
    Floor { module: "saved", ours: &[], outside: &["postcard", "blake3"] },
    Floor {
        module: "sys",
        ours: &["ids", "units", "clock", "report", "saved"],
        outside: &[
            "nix",
            "libc",
            "linux_raw_sys",
            "kvm_bindings",
            "kvm_ioctls",
            "vm_memory",
            "vmm_sys_util",
            "caps",
            "getrandom",
            "io_uring",
            "landlock",
            "netlink_packet_core",
            "netlink_packet_route",
            "netlink_sys",
            "rustix",
        ],
    },
    Floor {
        module: "bundle",
        ours: &["ids", "units", "clock", "report", "saved", "signing", "sys::file", "sys::sparse", "sys::extent"],
        outside: &["serde_json", "blake3"],
    },
    Floor {
        module: "container",
        ours: &["ids", "units", "clock", "report", "sys::file"],
        outside: &["serde_json", "flate2", "sha2", "tar"],
    },
    Floor {
        module: "volume",
        ours: &[
            "ids",
            "units",
            "clock",
            "report",
            "saved",
            "sys::file",
            "sys::sparse",
            "sys::extent",
            "sys::vectored",
            "sys::host",
        ],
        outside: &["serde_json", "blake3"],
    },
    Floor {
        module: "wire",
        ours: &["ids", "units", "clock", "report", "saved", "lease"],
        outside: &["postcard", "serde_json", "serde_bytes", "blake3", "lz4_flex", "twox_hash"],
    },
    Floor {
        module: "machine",
        ours: &["ids", "units", "clock", "report", "saved", "sys"],
        outside: &[
            "kvm_bindings",
            "kvm_ioctls",
            "vm_memory",
            "vmm_sys_util",
            "linux_loader",
            "virtio_queue",
            "virtio_bindings",
            "virtio_vsock",
            "vm_superio",
            "aes_gcm",
            "aead_stream",
            "libc",
            "nix",
            "serde_bytes",
            "getrandom",
        ],
    },
    Floor {
        module: "net",
        ours: &["ids", "units", "clock", "report", "sys", "!sys::kvm", "!sys::ram"],
        outside: &["nix", "libc"],
    },
    Floor {
        module: "vmm",
        ours: &["ids", "units", "clock", "report", "saved", "tls", "sys", "wire", "machine"],
        outside: &["vmm_sys_util", "libc", "nix", "serde_json", "kvm_ioctls", "seccompiler", "rustls"],
    },
    Floor {
        module: "volumed",
        ours: &[
            "base64",
            "ids",
            "units",
            "clock",
            "report",
            "lease",
            "tls",
            "sys",
            "!sys::kvm",
            "!sys::ram",
            "wire",
            "volume",
        ],
        outside: &["serde_json", "blake3", "nix", "rustls", "rcgen", "ring"],
    },
    Floor {
        module: "agent",
        ours: &[
            "base64",
            "ids",
            "units",
            "clock",
            "report",
            "lease",
            "saved",
            "signing",
            "sys",
            "!sys::kvm",
            "!sys::ram",
            "wire",
            "bundle",
            "container",
            "net",
            "api",
            "sim",
        ],
        outside: &[
            "rcgen",
            "tokio",
            "tokio_util",
            "rusqlite",
            "serde_json",
            "toml",
            "tar",
            "tracing",
            "tracing_subscriber",
            "prometheus_client",
            "sd_notify",
            "hearth_guest_wire",
            "jiff",
            "getrandom",
            "blake3",
            "bytes",
            "futures_util",
            "libc",
            "nix",
        ],
    },
    Floor {
        module: "api",
        // `sim` for its tests: the API is tested over a simulated host.
        ours: &["base64", "ids", "lease", "units", "clock", "report", "signing", "tls", "agent", "sim"],
        outside: &[
            "tokio",
            "tokio_util",
            "rustls",
            // The provider of that name, in rustls.
            "ring",
            "tokio_rustls",
            "axum",
            "utoipa",
            "utoipa_axum",
            "hyper",
            "hyper_util",
            "http_body_util",
            "bytes",
            "tower",
            "tower_http",
            "serde_json",
            "tracing",
            "futures_util",
            "jiff",
            "blake3",
            "prometheus_client",
        ],
    },
    Floor {
        module: "ctl",
        ours: &["ids", "units", "clock", "report", "signing", "cli", "api::types", "api::stream"],
        outside: &[
            "tokio",
            "tokio_util",
            "hyper",
            "hyper_util",
            "http_body_util",
            "bytes",
            "futures_util",
            "serde_json",
            "indicatif",
            "comfy_table",
            "futures_util",
            "jiff",
            "rustix",
        ],
    },
    Floor {
        module: "sim",
        ours: &[
            "ids", "lease", "units", "clock", "report", "saved", "signing", "wire", "bundle", "agent", "sys", "net",
        ],
        outside: &["tokio", "tokio_util", "hearth_guest_wire", "serde_json", "bytes"],
    },
];

/// Files that may hold unsafe code, with how many `unsafe` blocks and functions they have. The counts only go down
/// without a word; to raise one, say why in the commit.
const UNSAFE: &[(&str, usize)] = &[
    ("src/sys/discard.rs", 1),
    ("src/sys/fill.rs", 1),
    ("src/sys/fd.rs", 3),
    ("src/sys/kvm.rs", 4),
    ("src/sys/kvm/plain.rs", 3),
    ("src/sys/kvm/vcpu.rs", 14),
    ("src/sys/landlock.rs", 1),
    ("src/sys/pageout.rs", 1),
    ("src/sys/process.rs", 11),
    ("src/sys/signal.rs", 1),
    ("src/sys/tap.rs", 5),
    ("src/sys/thread.rs", 1),
    ("src/sys/uring.rs", 2),
    ("src/sys/uring/tests.rs", 1),
    ("src/sys/userfault.rs", 6),
    ("src/sys/vectored.rs", 5),
];

/// Words that say nothing about what a thing provides.
const BANNED_NAMES: &[&str] = &["Manager", "Helper", "Util", "Utils", "Common", "Impl", "Inner"];

/// Words a SAFETY comment may not contain: they mark a condition nobody keeps.
const BANNED_IN_SAFETY: &[&str] = &["unless", "should", "trust"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(below: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, files: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(dir) else { return };
        for entry in entries {
            let path = entry.expect("a directory entry").path();
            if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
                walk(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let mut files = Vec::new();
    walk(&root().join(below), &mut files);
    files.sort();
    files
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The source without comments and without the insides of string and character literals.
fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        if rest.starts_with("//") {
            at += rest.find('\n').unwrap_or(rest.len());
        } else if rest.starts_with("/*") {
            at += rest.find("*/").map_or(rest.len(), |end| end + 2);
        } else if let Some(hashes) = raw_string(rest) {
            let close = format!("\"{}", "#".repeat(hashes));
            let open = hashes + 2;
            at += open + rest[open..].find(&close).map_or(rest.len() - open, |end| end + close.len());
            code.push_str("\"\"");
        } else if bytes[at] == b'"' {
            at += 1;
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at += 1;
            code.push_str("\"\"");
        } else if bytes[at] == b'\''
            && (rest[1..].starts_with('\\') || rest.char_indices().nth(2).is_some_and(|(_, c)| c == '\''))
        {
            let skip = if rest[1..].starts_with('\\') { 3 } else { 1 };
            at += skip + rest[skip..].find('\'').map_or(rest.len() - skip, |end| end + 1);
            code.push_str("' '");
        } else {
            let character = rest.chars().next().unwrap_or(' ');
            code.push(character);
            at += character.len_utf8();
        }
    }
    code
}

fn raw_string(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix('r')?;
    let hashes = after.bytes().take_while(|byte| *byte == b'#').count();
    after[hashes..].starts_with('"').then_some(hashes)
}

/// Every path the code names, `a::b::c`, with `use` groups spelled out.
fn paths(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let characters: Vec<char> = code.chars().collect();
    let mut at = 0;
    while at < characters.len() {
        if !is_word(characters[at]) || (at > 0 && (is_word(characters[at - 1]) || characters[at - 1] == ':')) {
            at += 1;
            continue;
        }
        let mut prefix = String::new();
        at = walk_path(&characters, at, &mut prefix, &mut found);
    }
    found
}

/// Reads one path from `at`; a group after `::{` is walked with the prefix. Returns where reading goes on.
fn walk_path(characters: &[char], mut at: usize, prefix: &mut String, found: &mut BTreeSet<String>) -> usize {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    loop {
        let start = at;
        while at < characters.len() && is_word(characters[at]) {
            at += 1;
        }
        prefix.extend(&characters[start..at]);
        if !(characters.get(at) == Some(&':') && characters.get(at + 1) == Some(&':')) {
            found.insert(prefix.clone());
            return at.max(start + 1);
        }
        at += 2;
        if characters.get(at) == Some(&'{') {
            return walk_group(characters, at + 1, prefix, found);
        }
        prefix.push_str("::");
    }
}

fn walk_group(characters: &[char], mut at: usize, prefix: &str, found: &mut BTreeSet<String>) -> usize {
    while let Some(character) = characters.get(at) {
        match character {
            '}' => return at + 1,
            c if c.is_alphanumeric() || *c == '_' => {
                let mut longer = format!("{prefix}::");
                at = walk_path(characters, at, &mut longer, found);
            }
            _ => at += 1,
        }
    }
    at
}

/// The module a file of `src/` belongs to: its first path component.
fn module_of(path: &Path) -> String {
    let relative = path.strip_prefix(root().join("src")).expect("a file of src");
    let first = relative.components().next().expect("a first component").as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

fn allows(floor: &Floor, path: &str) -> bool {
    let below = |law: &str| path == law || path.strip_prefix(law).is_some_and(|rest| rest.starts_with("::"));
    let denied = floor.ours.iter().filter_map(|law| law.strip_prefix('!')).any(below);
    !denied && (below(floor.module) || floor.ours.iter().any(|law| below(law)))
}

/// Outside crates as they are named in code.
fn dependencies() -> BTreeSet<String> {
    let manifest = read(&root().join("Cargo.toml"));
    let section = manifest.split("\n[dependencies]\n").nth(1).expect("a dependencies section");
    let section = section.split("\n[").next().unwrap_or(section);
    let names = section.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name);
    names.filter(|name| !name.starts_with('#')).map(|name| name.replace('-', "_")).collect()
}

fn fail_if_any(problems: Vec<String>, law: &str) {
    let mut text = String::new();
    for problem in &problems {
        let _ = writeln!(text, "  {problem}");
    }
    assert!(problems.is_empty(), "{law}:\n{text}");
}

#[test]
fn floors_name_only_what_they_may() {
    let dependencies = dependencies();
    let mut problems = Vec::new();
    for file in rust_files("src") {
        let module = module_of(&file);
        if matches!(module.as_str(), "lib" | "main" | "cli") {
            continue;
        }
        let Some(floor) = FLOORS.iter().find(|floor| floor.module == module) else {
            problems.push(format!("{}: module `{module}` has no floor in this test", shown(&file)));
            continue;
        };
        let code = code_only(&read(&file));
        for path in paths(&code) {
            let ours = path.strip_prefix("crate::");
            if ours.is_some_and(|ours| !allows(floor, ours)) {
                problems.push(format!("{}: `{module}` may not name `{path}`", shown(&file)));
            }
            let first = path.split("::").next().unwrap_or("");
            let allowed = floor.outside.contains(&first) || EVERYWHERE.contains(&first);
            if path.contains("::") && dependencies.contains(first) && !allowed {
                problems.push(format!("{}: `{module}` may not name the crate `{first}`", shown(&file)));
            }
        }
        if code.contains("super::super") {
            problems.push(format!("{}: `super::super` hides which floor is meant", shown(&file)));
        }
    }
    fail_if_any(problems, "floors");
}

#[test]
fn a_path_scanner_that_sees_groups() {
    let code = "use crate::{agent::Agent, sys::{fd, kvm}}; fn f() -> kvm_ioctls::Kvm { std::io::stdin() }";
    let found = paths(code);
    for path in ["crate::agent::Agent", "crate::sys::fd", "crate::sys::kvm", "kvm_ioctls::Kvm"] {
        assert!(found.contains(path), "{path} in {found:?}");
    }
    assert!(!allows(FLOORS.iter().find(|floor| floor.module == "agent").unwrap(), "sys::kvm::Slot"));
    assert_eq!(code_only("a // b\n\"c::d\" r#\"e\"# 'f' '\\n' g"), "a \n\"\" \"\" ' ' ' ' g");
}

#[test]
fn unsafe_code_is_where_it_belongs_and_argued() {
    let mut problems = Vec::new();
    let mut counts = BTreeMap::new();
    for file in rust_files("src") {
        let source = read(&file);
        let name = shown(&file);
        let code = code_only(&source);
        let count =
            code.matches("unsafe {").count() + code.matches("unsafe fn").count() + code.matches("unsafe impl").count();
        if count > 0 {
            counts.insert(name.clone(), count);
        }
        let states_law = source.contains("#![forbid(unsafe_code)]") || source.contains("#![expect(unsafe_code");
        if file.parent() == Some(&root().join("src"))
            && !states_law
            && !["src/lib.rs", "src/main.rs", "src/sys.rs"].contains(&name.as_str())
        {
            problems.push(format!("{name}: a floor's root says #![forbid(unsafe_code)]"));
        }
        for comment in source.split("// SAFETY:").skip(1) {
            let comment: Vec<&str> = comment.lines().take_while(|line| !line.trim().is_empty()).collect();
            let end = comment.iter().skip(1).position(|line| !line.trim_start().starts_with("//"));
            let text = comment[..end.map_or(comment.len(), |end| end + 1)].join(" ");
            for word in
                BANNED_IN_SAFETY.iter().filter(|word| text.split(|c: char| !c.is_alphabetic()).any(|w| w == **word))
            {
                problems.push(format!("{name}: a SAFETY comment says \"{word}\""));
            }
        }
    }
    let allowed: BTreeMap<String, usize> = UNSAFE.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
    if counts != allowed {
        problems.push(format!("the list UNSAFE in this test says {allowed:#?}, the tree has {counts:#?}"));
    }
    fail_if_any(problems, "unsafe code");
}

#[test]
fn every_module_says_what_it_is() {
    let mut problems = Vec::new();
    for file in rust_files("src").into_iter().chain(rust_files("guest")).chain(rust_files("tests")) {
        if !read(&file).trim_start().starts_with("//!") {
            problems.push(format!("{}: no module documentation", shown(&file)));
        }
        if file.file_name().is_some_and(|name| name == "mod.rs") {
            problems.push(format!("{}: write `foo.rs` beside `foo/`, not `mod.rs`", shown(&file)));
        }
    }
    fail_if_any(problems, "module documentation");
}

#[test]
fn no_banned_names_and_no_leftovers() {
    let mut problems = Vec::new();
    let leftovers = [concat!("FIX", "ME"), concat!("XX", "X"), concat!("todo", "!("), concat!("unimplemented", "!(")];
    for file in rust_files("src").into_iter().chain(rust_files("guest")).chain(rust_files("tests")) {
        let source = read(&file);
        let code = code_only(&source);
        for keyword in ["struct ", "enum ", "trait ", "type ", "mod "] {
            for named in code.split(keyword).skip(1) {
                let name: String = named.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                if let Some(banned) = BANNED_NAMES
                    .iter()
                    .find(|banned| name.ends_with(*banned) || name.to_lowercase() == banned.to_lowercase())
                {
                    problems.push(format!("{}: `{name}` says \"{banned}\", not what it provides", shown(&file)));
                }
            }
        }
        for word in leftovers.iter().filter(|word| source.contains(**word)) {
            problems.push(format!("{}: {word}", shown(&file)));
        }
        if source.contains(concat!("#[", "ignore")) {
            problems.push(format!("{}: an ignored test tests nothing", shown(&file)));
        }
    }
    fail_if_any(problems, "names and leftovers");
}

#[test]
fn every_file_is_part_of_the_crate() {
    let mut problems = Vec::new();
    for file in rust_files("src") {
        let name = file.file_stem().expect("a name").to_string_lossy().into_owned();
        let parent = file.parent().expect("a parent");
        if parent == root().join("src") && ["lib", "main"].contains(&name.as_str()) {
            continue;
        }
        let owners = if parent == root().join("src") {
            vec![parent.join("lib.rs"), parent.join("main.rs")]
        } else {
            vec![parent.with_extension("rs")]
        };
        let declared =
            owners.iter().filter(|owner| owner.exists()).any(|owner| read(owner).contains(&format!("mod {name};")));
        if !declared {
            problems.push(format!("{}: no `mod {name};` declares it", shown(&file)));
        }
    }
    fail_if_any(problems, "orphan files");
}

#[test]
fn scripts_say_what_they_do_need_and_leave() {
    let mut problems = Vec::new();
    for entry in std::fs::read_dir(root().join("scripts")).expect("scripts/") {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            continue;
        }
        let text = read(&path);
        let header: String =
            text.lines().skip(1).take_while(|line| line.starts_with('#')).collect::<Vec<_>>().join("\n").to_lowercase();
        for word in ["needs:", "leaves"] {
            if !header.contains(word) {
                problems.push(format!("{}: the header comment has no \"{word}\"", shown(&path)));
            }
        }
        if !text.contains("set -euo pipefail") {
            problems.push(format!("{}: no `set -euo pipefail`", shown(&path)));
        }
    }
    fail_if_any(problems, "scripts");
}

#[test]
fn saved_types_carry_their_version_in_their_name() {
    let mut problems = Vec::new();
    for file in rust_files("src") {
        let source = read(&file);
        let product = source.split("#[cfg(test)]").next().unwrap_or(&source);
        for named in product.split("impl Saved for ").skip(1) {
            let name: String = named.chars().take_while(|c| c.is_alphanumeric()).collect();
            let version: String = name.chars().rev().take_while(char::is_ascii_digit).collect();
            if version.is_empty() || !name.trim_end_matches(|c: char| c.is_ascii_digit()).ends_with('V') {
                problems.push(format!("{}: saved type `{name}` is not called ...V<version>", shown(&file)));
            }
        }
    }
    fail_if_any(problems, "saved types");
}

/// Advice, not law: long files are where two subjects share one.
#[test]
fn long_files_are_listed() {
    for file in rust_files("src") {
        let lines = read(&file).lines().count();
        if lines > 600 {
            println!("{}: {lines} lines; does one file tell two stories?", shown(&file));
        }
    }
}
