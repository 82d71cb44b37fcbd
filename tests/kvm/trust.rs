//! A bundle that leaves its host as one file: into the empty store of another agent, cut off, and signed by a key that
//! nobody there knows.

use std::path::Path;

use super::fixture::{Agent, text};
use super::lab::Lab;

/// Names in an agent's store of bundles that are no directories it keeps.
fn stored(agent: &Agent) -> Vec<String> {
    let entries = std::fs::read_dir(agent.state().join("bundles")).expect("the store");
    let names = entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"));
    names
        .filter(|name| ![".fetched", ".flat", ".partial", ".signatures", ".working-sets"].contains(&name.as_str()))
        .collect()
}

fn refused(agent: &Agent, words: &[&str], wanted: &str) {
    let output = agent.run(words);
    let error = text(&output.stderr);
    assert!(!output.status.success() && error.contains(wanted), "{words:?}: {error}");
}

fn word(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}

pub(crate) fn a_bundle_leaves_its_host_and_is_asked_who_signed_it(_shared: &Agent) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let [release, stranger, file, cut] =
        ["release.key", "stranger.key", "web.hearth", "cut.hearth"].map(|name| directory.path().join(name));
    let here = Lab::start("htest-trust-a", 40);
    let agent = here.agent();
    let key = agent.ok(&["bundle", "key", "--output", word(&release)]).trim().to_owned();
    let unknown = agent.ok(&["bundle", "key", "--output", word(&stranger)]).trim().to_owned();
    assert!(key.starts_with("ed25519:") && key != unknown, "{key} {unknown}");
    refused(agent, &["bundle", "key", "--output", word(&release)], "File exists");

    let there = Lab::start_with("htest-trust-b", 41, &format!("[bundles]\ntrusted_keys = [\"{key}\"]\n"));
    let other = there.agent();
    // A difference, so that what it builds on has to come as well.
    here.build_itself("base", &["--warmup", "head -c 16 /dev/urandom | md5sum > /tmp/token"]);
    here.clone_of("base", "writer");
    agent.sh("writer", "echo kept > /tmp/note");
    agent.ok(&["vm", "snapshot", "writer", "--bundle-name", "web", "--diff"]);
    let token = agent.sh("writer", "cat /tmp/token");
    agent.ok(&["vm", "rm", "writer", "--timeout", "0"]);
    agent.ok(&["bundle", "sign", "web", "--key", word(&stranger)]);
    agent.ok(&["bundle", "export", "web", "--output", word(&file)]);
    let bytes = std::fs::read(&file).expect("the file");
    println!("    {} KiB of two bundles", bytes.len() >> 10);

    // Cut off, changed, with something behind it, and something else: nothing is left of any.
    for (content, wanted) in [
        (bytes[..bytes.len() / 2].to_vec(), "before its end"),
        (bytes[..bytes.len() - 1].to_vec(), "before its end"),
        ([&bytes[..], b"x"].concat(), "goes on after its end"),
        (changed(&bytes, bytes.len() / 3), "import a bundle"),
        (b"something else".to_vec(), "no exported bundle"),
        (Vec::new(), "before its end"),
    ] {
        std::fs::write(&cut, content).expect("a file");
        refused(other, &["bundle", "import", word(&cut)], wanted);
        assert_eq!(stored(other), Vec::<String>::new(), "{wanted}");
    }

    let imported = other.json(&["bundle", "import", word(&file)]);
    assert_eq!(imported["parents"].as_array().map(Vec::len), Some(1), "{imported:#}");
    assert_eq!((&imported["existed"], &imported["bundle"]["trust"]), (&false.into(), &"untrusted".into()));
    assert_eq!(other.json(&["bundle", "import", word(&file)])["existed"], true);
    other.ok(&["bundle", "verify", "web"]);
    for words in [&["vm", "launch", "--bundle", "web"][..], &["pool", "set", "web", "1"]] {
        refused(other, words, &unknown);
        refused(other, words, "hearth bundle sign");
    }
    assert_eq!(other.json(&["vm", "ls"])["vms"], serde_json::json!([]));
    assert_eq!(std::fs::read_dir(other.state().join("vms")).map_or(0, Iterator::count), 0, "nothing was made");

    // Signed where it was made, it is exported again and brings the signature along; the rest is there already.
    agent.ok(&["bundle", "sign", "web", "--key", word(&release)]);
    agent.ok(&["bundle", "export", "web", "--output", word(&file)]);
    let again = other.json(&["bundle", "import", word(&file)]);
    assert_eq!((&again["existed"], &again["bundle"]["trust"]), (&true.into(), &"signed".into()), "{again:#}");
    let shown = other.ok(&["bundle", "show", "web"]);
    assert!(shown.contains(&key) && shown.contains(&unknown), "{shown}");
    there.clone_of("web", "reader");
    assert_eq!(other.sh("reader", "cat /tmp/note"), "kept");
    assert_eq!(other.sh("reader", "cat /tmp/token"), token);

    // The list is asked at launches: a VM that is there wakes without.
    other.ok(&["vm", "swap-out", "reader", "--mode", "hibernate"]);
    let text = std::fs::read_to_string(other.configuration()).expect("the configuration");
    std::fs::write(other.configuration(), text.replace(&key, "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="))
        .expect("another list");
    other.kill_and_restart();
    assert_eq!(other.sh("reader", "cat /tmp/note"), "kept");
    refused(other, &["vm", "launch", "--bundle", "web"], "trusts other keys");
    there.ends_with_vms();
    here.ends();
}

/// With another bit in a byte.
fn changed(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut other = bytes.to_vec();
    other[at] ^= 1;
    other
}
