//! Bundles that were fetched, of which only some can stay; and those of them that may be launched.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::{Agent, text};
use super::lab::Lab;
use super::store::{Manner, Store};

/// Longest wait for a bundle to give way.
const LIMIT: Duration = Duration::from_secs(30);

/// Ids of the bundles that are here.
fn here(agent: &Agent) -> Vec<String> {
    let list = agent.json(&["bundle", "ls"]);
    let ids = list["bundles"].as_array().expect("a list").iter().map(|bundle| bundle["id"].as_str().expect("an id"));
    ids.map(str::to_owned).collect()
}

/// Waits until these bundles are here and no others.
fn are_here(agent: &Agent, mut wanted: Vec<&str>) {
    wanted.sort_unstable();
    let begun = Instant::now();
    loop {
        let mut found = here(agent);
        found.sort_unstable();
        if found == wanted {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{found:?} are here, and not {wanted:?}\n{}", agent.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn evicted(agent: &Agent) -> Vec<String> {
    let events = agent.json(&["events"]);
    let events = events["events"].as_array().expect("events").iter();
    let evicted = events.filter(|event| event["kind"] == "bundle_evicted");
    evicted.map(|event| event["detail"]["bundle_id"].as_str().expect("an id").to_owned()).collect()
}

/// Starts the agent with another table `[bundles]`.
fn configured(agent: &Agent, bundles: &str) {
    let text = std::fs::read_to_string(agent.configuration()).expect("the configuration");
    let (before, _) = text.split_once("[bundles]").expect("a table");
    let (_, after) = text.split_once("[fabric]").expect("a table");
    std::fs::write(agent.configuration(), format!("{before}[bundles]\n{bundles}\n[fabric]{after}")).expect("write it");
    agent.kill_and_restart();
}

fn fetch(agent: &Agent, bundle: &str, store: &Store) {
    agent.ok(&["bundle", "fetch", bundle, "--from", &store.source(), "--wait"]);
}

pub(crate) fn what_is_unused_for_longest_gives_way(_shared: &Agent) {
    let lab = Lab::start_with("htest-kept", 48, "[bundles]\n");
    let agent = lab.agent();
    let store = Store::open("htest-kept");
    let base = lab.build("base", &["--warmup", "echo kept > /tmp/note"]);
    lab.clone_of("base", "writer");
    let snapshot = |name: &str| agent.json(&["vm", "snapshot", "writer", "--bundle-name", name]);
    let bundles = [base, snapshot("second"), snapshot("third")];
    agent.ok(&["vm", "rm", "writer", "--timeout", "0"]);
    let [first, second, third] = bundles.each_ref().map(|bundle| bundle["id"].as_str().expect("an id"));
    let sizes = [first, second, third].map(|id| {
        store.put(&agent.state().join("bundles"), id);
        let bytes = agent.json(&["bundle", "show", id])["disk_bytes"].as_u64().expect("bytes");
        agent.ok(&["bundle", "rm", id]);
        bytes
    });
    are_here(agent, vec![]);

    // Room for two of them.
    let most = (sizes.iter().sum::<u64>() - sizes.iter().min().expect("three") / 2) >> 20;
    configured(agent, &format!("fetched_mib = {most}"));
    println!("    room for {most} MiB, three bundles of {:?}", sizes.map(|bytes| bytes >> 20));
    for bundle in [first, second] {
        fetch(agent, bundle, &store);
    }
    are_here(agent, vec![first, second]);
    // The first one is used now, so it is the second that goes.
    lab.clone_of(first, "user");
    agent.ok(&["vm", "rm", "user", "--timeout", "0"]);
    fetch(agent, third, &store);
    are_here(agent, vec![first, third]);
    assert_eq!(evicted(agent), [second]);
    assert!(!agent.state().join("bundles").join(second).exists());
    let launched = text(&agent.run(&["vm", "launch", "--bundle", second]).stderr);
    assert!(launched.contains("no bundle"), "{launched}");

    // What somebody wants to keep stays, and so does what a VM runs from: more than there is room for.
    assert_eq!(agent.json(&["bundle", "pin", third])["fetched"]["pinned"], true);
    lab.clone_of(first, "runs");
    fetch(agent, second, &store);
    are_here(agent, vec![first, second, third]);
    assert_eq!(evicted(agent), [second]);
    // Neither is forgotten by the next agent.
    agent.kill_and_restart();
    assert_eq!(agent.sh("runs", "cat /tmp/note"), "kept");
    are_here(agent, vec![first, second, third]);

    // Until nobody wants it: then what is not this one goes, and of these only what nothing runs from.
    assert_eq!(agent.json(&["bundle", "unpin", third])["fetched"]["pinned"], false);
    are_here(agent, vec![first, third]);
    assert_eq!(evicted(agent), [second, second]);
    agent.ok(&["vm", "rm", "runs", "--timeout", "0"]);
    only_signed_ones_are_launched(&lab, &store, third);
    lab.ends_with_vms();
}

/// Also while they are on their way.
fn only_signed_ones_are_launched(lab: &Lab, store: &Store, bundle: &str) {
    let agent = lab.agent();
    let keys = tempfile::tempdir().expect("a temporary directory");
    let file = keys.path().join("release.key").to_str().expect("text").to_owned();
    let key = agent.ok(&["bundle", "key", "--output", &file]).trim().to_owned();
    configured(agent, &format!("trusted_keys = [\"{key}\"]"));
    agent.ok(&["bundle", "rm", bundle]);
    store.is(Manner::After(Duration::from_millis(700)));
    let fetch = || agent.ok(&["bundle", "fetch", bundle, "--from", &store.source()]);
    let is_coming = || !agent.json(&["bundle", "show", bundle])["fetch"].is_null();
    fetch();
    let lazily = ["vm", "launch", "--bundle", bundle, "--lazy", "--session", "clones", "--name", "signed"];
    let refused = text(&agent.run(&lazily).stderr);
    assert!(is_coming() && refused.contains("hearth bundle sign"), "{refused}");
    assert_eq!(agent.json(&["vm", "ls"])["vms"], Value::Array(vec![]), "nothing was made");
    agent.ok(&["bundle", "rm", bundle]);

    // Signed where it comes from.
    let directory = store.directory().to_str().expect("text").to_owned();
    agent.ok(&["bundle", "fetch", bundle, "--from", &directory, "--wait"]);
    agent.ok(&["bundle", "sign", bundle, "--key", &file]);
    let signatures = format!(".signatures/{bundle}.json");
    std::fs::create_dir_all(store.directory().join(".signatures")).expect("a directory");
    std::fs::copy(agent.state().join("bundles").join(&signatures), store.directory().join(&signatures))
        .expect("a copy");
    agent.ok(&["bundle", "rm", bundle]);
    fetch();
    agent.ok(&lazily);
    assert!(is_coming(), "it was launched before all of it was here");
    assert_eq!(agent.sh("signed", "cat /tmp/note"), "kept");
}
