//! Bundles that are not what they were, hosts that are not what they should be, disks that are full: nothing starts that
//! should not, and nothing is left.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use hearth::bundle::manifest::Manifest;
use hearth::bundle::{Contents, ManifestDraft, Store};
use hearth::ids::BundleId;
use serde_json::Value;

use super::fabric::run;
use super::fixture::{Agent, text, vmms};
use super::lab::Lab;

fn last_event(agent: &Agent) -> String {
    let events = agent.json(&["events"]);
    events["events"]
        .as_array()
        .and_then(|events| events.last())
        .map_or(0, |event| event["seq"].as_u64().unwrap_or(0))
        .to_string()
}

/// A launch that has to be refused before there is a process; the error.
fn refused(agent: &Agent, bundle: &str, status: u16, code: &str) -> String {
    let (before, running) = (last_event(agent), vmms());
    let body = format!(r#"{{"bundle":"{bundle}","wait":"running"}}"#);
    let words = ["--header", "content-type: application/json", "--data", &body];
    let (found, answer) = agent.curl(&words, "/v1/vms");
    let error: Value = serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{answer}: {error}"));
    assert_eq!((found, &error["error"]["code"]), (status, &code.into()), "{answer}");
    let events = agent.json(&["events", "--since", &before]);
    assert_eq!(events["events"].as_array().map(Vec::len), Some(0), "a VM was begun: {events:#}");
    assert_eq!(vmms(), running);
    answer
}

pub(crate) fn harmed_bundles_start_nothing(_shared: &Agent) {
    let lab = Lab::start("htest-harm", 24);
    let agent = lab.agent();
    let bundle = lab.build("good", &[]);
    let id = bundle["id"].as_str().expect("an id").to_owned();
    let directory = agent.state().join("bundles").join(&id);
    refused(agent, "nobody", 422, "unknown_bundle");

    a_flipped_byte_is_found(agent, &directory);
    let memory = File::options().read(true).write(true).open(directory.join("memory.img")).expect("the memory image");
    let length = memory.metadata().expect("its length").len();
    let mut last = [0; 4096];
    memory.read_exact_at(&mut last, length - 4096).expect("read its last page");
    memory.set_len(length - 4096).expect("cut it");
    refused(agent, "good", 422, "bundle_corrupt");
    memory.write_all_at(&last, length - 4096).expect("write its last page again");
    lab.clone_of("good", "whole-again");
    agent.ok(&["vm", "rm", "whole-again", "--timeout", "0"]);

    for (name, fact, change) in [
        (
            "other-provider",
            "provider",
            (|draft| draft.host.provider = "NotAKvmAtAll".to_owned()) as fn(&mut ManifestDraft),
        ),
        ("other-cpu", "cpu_features", |draft| draft.cpu.features.push("zz_from_the_future".to_owned())),
        ("other-arch", "arch", |draft| draft.arch = hearth::bundle::manifest::Arch::Aarch64),
    ] {
        foreign(&agent.state().join("bundles"), &id, name, change);
        let answer = refused(agent, name, 409, "incompatible_host");
        assert!(answer.contains(&format!("{fact}:")), "{answer}");
    }
    let shape = agent.run(&["vm", "launch", "--bundle", "good", "--memory", "128"]);
    assert!(text(&shape.stderr).contains("was frozen with 64"), "{}", text(&shape.stderr));
    lab.ends();
}

/// One byte of each file, and what it was before.
fn a_flipped_byte_is_found(agent: &Agent, directory: &Path) {
    for name in ["memory.img", "state.bin", "manifest.json"] {
        let file = File::options().read(true).write(true).open(directory.join(name)).expect("a file of the bundle");
        let length = file.metadata().expect("its length").len();
        // In memory: a page of the kernel, which is loaded from 16 MiB on.
        let at = if name == "memory.img" { 17 << 20 } else { length / 2 };
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 1], at).expect("write");
        let answer = refused(agent, "good", 422, code_of(name));
        if name == "memory.img" {
            let chunk = at / (256 << 10);
            assert!(answer.contains(&format!("chunk {chunk}")), "{answer}");
            let verified = agent.run(&["bundle", "verify", "good"]);
            assert!(text(&verified.stderr).contains(&format!("chunk {chunk}")), "{}", text(&verified.stderr));
        }
        file.write_all_at(&byte, at).expect("write");
        agent.ok(&["bundle", "verify", "good"]);
    }
}

/// A manifest that was changed is no longer that of the name.
fn code_of(name: &str) -> &'static str {
    if name == "manifest.json" { "unknown_bundle" } else { "bundle_corrupt" }
}

/// The same bundle, as if it had been made on another host.
fn foreign(root: &Path, id: &str, name: &str, change: fn(&mut ManifestDraft)) {
    let store = Store::open(root).expect("the store");
    let id: BundleId = id.parse().expect("an id");
    let files = store.open_for_launch(&id).expect("the bundle");
    let manifest: Manifest = (*files.manifest).clone();
    let mut draft = ManifestDraft {
        hearth_version: manifest.hearth_version,
        arch: manifest.arch,
        name: Some(name.to_owned()),
        host: manifest.host,
        cpu: manifest.cpu,
        machine: manifest.machine,
        identity: manifest.identity,
        guest: manifest.guest,
        provenance: manifest.provenance,
        runtime: None,
    };
    change(&mut draft);
    let staging = store.stage(name, draft.machine.memory_bytes).expect("stage");
    let from = root.join(id.as_str());
    for (file, to) in [("state.bin", staging.state_file()), ("memory.img", staging.memory_file())] {
        let mut to = to.expect("a staged file");
        std::io::copy(&mut File::open(from.join(file)).expect("open"), &mut to).expect("copy");
    }
    staging.commit(draft, Contents::Full, &mut |_| {}).expect("commit");
}

/// Unmounts when dropped.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

pub(crate) fn a_full_disk_costs_no_vm(_shared: &Agent) {
    let lab = Lab::start("htest-full", 25);
    let agent = lab.agent();
    let root = agent.state().join("bundles");
    run("mount", &["-t", "tmpfs", "-o", "size=18m", "none", root.to_str().expect("a path")]);
    let mounted = Mounted(root.clone());
    let bundle = lab.build("base", &[]);
    lab.clone_of("base", "writer");
    agent.sh("writer", "echo before > /tmp/note");
    let full = agent.run(&["vm", "snapshot", "writer", "--bundle-name", "too-much"]);
    let error = text(&full.stderr);
    assert!(!full.status.success() && error.contains("No space left"), "{error}");
    assert_eq!(agent.sh("writer", "cat /tmp/note"), "before", "the VM goes on");
    assert_eq!(agent.vm("writer")["state"], "running");
    let left: Vec<String> = std::fs::read_dir(&root)
        .expect("the store")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| {
            ![".fetched", ".flat", ".partial", ".signatures", ".working-sets"].contains(&name.as_str())
                && *name != bundle["id"]
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
    agent.sh("writer", "echo after >> /tmp/note");
    agent.ok(&["vm", "snapshot", "writer", "--bundle-name", "difference", "--diff"]);
    agent.ok(&["vm", "rm", "writer", "--timeout", "0"]);
    // A difference is launched from an image that is composed of it, which takes as much as a whole one.
    run("mount", &["-o", "remount,size=64m", root.to_str().expect("a path")]);
    lab.clone_of("difference", "reader");
    assert_eq!(agent.sh("reader", "cat /tmp/note"), "before\nafter");
    agent.ok(&["vm", "rm", "reader", "--timeout", "0"]);
    for bundle in ["difference", "base"] {
        agent.ok(&["bundle", "rm", bundle]);
    }
    drop(mounted);
    lab.ends();
}
