//! Guests that run while their bundle is still on its way: what they reach comes first, all of it is what it has to be,
//! and what does not come ends them instead of letting them wait for ever.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::fixture::Agent;
use super::lab::Lab;
use super::store::{Manner, Store};

/// Longest wait for what has to come.
const LIMIT: Duration = Duration::from_secs(90);

/// Fills some 6 MiB of a guest with what nobody can guess, no two chunks alike, and keeps their digest. Not all of it out of
/// the kernel's generator, which takes 20 seconds for a MiB where the kernel is emulated.
const FILL: &str = "s=$(head -c 4000 /dev/urandom | od -x); i=0; while [ $i -lt 320 ]; do echo $i \"$s\"; i=$((i+1)); \
                    done > /tmp/fill; md5sum < /tmp/fill > /tmp/digest; echo kept > /tmp/note";

/// Looks whether the guest still has them.
const CHECK: &str = "[ \"$(md5sum < /tmp/fill)\" = \"$(cat /tmp/digest)\" ] && cat /tmp/note";

fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LIMIT, "{what}: not within {} s", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn fetched(agent: &Agent, bundle: &str) -> Value {
    agent.json(&["bundle", "show", bundle])["fetch"].clone()
}

fn is_whole(agent: &Agent, bundle: &str) -> bool {
    fetched(agent, bundle).is_null()
}

fn filling(agent: &Agent, vm: &str) -> Value {
    agent.json(&["vm", "memory", vm])["filling"].clone()
}

fn events(agent: &Agent, kind: &str) -> usize {
    let events = agent.json(&["events"]);
    events["events"].as_array().expect("events").iter().filter(|event| event["kind"] == kind).count()
}

fn lazily(lab: &Lab, bundle: &str, name: &str) -> Value {
    lab.agent().json(&["vm", "launch", "--bundle", bundle, "--lazy", "--session", "clones", "--name", name])
}

/// A bundle that is in a store, and not here.
fn away(lab: &Lab, store: &Store) -> String {
    let bundle = lab.build("base", &["--warmup", FILL]);
    let id = bundle["id"].as_str().expect("an id").to_owned();
    store.put(&lab.agent().state().join("bundles"), &id);
    lab.agent().ok(&["bundle", "rm", &id]);
    id
}

fn bundle_event_reason(vm: &Value) -> &str {
    vm["cause"]["detail"].as_str().unwrap_or_default()
}

pub(crate) fn guests_run_while_their_memory_comes(_shared: &Agent) {
    let lab = Lab::start("htest-lazy-a", 42);
    let agent = lab.agent();
    let store = Store::open("htest-lazy-a");
    let id = away(&lab, &store);

    // Slow: the guest answers long before all of it is here.
    store.is(Manner::After(Duration::from_millis(400)));
    let begun = Instant::now();
    agent.ok(&["bundle", "fetch", &id, "--from", &store.source()]);
    let refused = agent.run(&["vm", "launch", "--bundle", &id]);
    let error = super::fixture::text(&refused.stderr);
    assert!(!refused.status.success() && error.contains("on its way") && error.contains("--lazy"), "{error}");
    lazily(&lab, &id, "first");
    let answered = begun.elapsed();
    let (now, coming) = (filling(agent, "first"), fetched(agent, &id));
    assert!(coming["fetched_bytes"].as_u64() < coming["total_bytes"].as_u64(), "{coming:#}");
    assert!(now["chunks_mapped"].as_u64() < now["chunks_total"].as_u64(), "{now:#}");
    println!(
        "    the guest answered after {} ms, with {} of {} bytes here, after {} requests",
        answered.as_millis(),
        coming["fetched_bytes"],
        coming["total_bytes"],
        store.requests()
    );
    for words in [&["vm", "snapshot", "first"][..], &["vm", "swap-out", "first", "--mode", "hibernate"]] {
        let refused = agent.run(words);
        let error = super::fixture::text(&refused.stderr);
        assert!(!refused.status.success() && error.contains("are here by now"), "{words:?}: {error}");
    }
    assert_eq!(agent.curl(&["-X", "POST"], "/v1/vms/first/snapshot").0, 423);
    // What it reads it waits for; it is what it was.
    assert_eq!(agent.sh("first", CHECK), "kept");
    wait_for("all of it is here", || is_whole(agent, &id));
    wait_for("all of it is mapped", || filling(agent, "first").is_null());
    assert_eq!(events(agent, "bundle_fetched"), 1);
    agent.ok(&["bundle", "verify", &id]);
    assert_eq!(agent.sh("first", CHECK), "kept");

    // It is a VM like any other from here on, and a bundle like any other.
    agent.ok(&["vm", "snapshot", "first", "--diff", "--bundle-name", "later"]);
    agent.ok(&["vm", "swap-out", "first", "--mode", "hibernate"]);
    assert_eq!(agent.sh("first", CHECK), "kept");
    lab.clone_of("later", "second");
    assert_eq!(agent.sh("second", CHECK), "kept");
    let mode = agent.json(&["vm", "memory", "second"]);
    assert_eq!((&mode["mode"], &mode["filling"]), (&"mmap".into(), &Value::Null));
    lab.ends_with_vms();
}

/// FAMILIES.md A2, check 6.
pub(crate) fn half_of_it_is_away(_shared: &Agent) {
    let lab = Lab::start_with("htest-lazy-e", 47, "[waits]\nmemory_s = 4\n");
    let agent = lab.agent();
    let store = Store::open("htest-lazy-e");
    let id = away(&lab, &store);
    let manifest = std::fs::read_to_string(store.directory().join(&id).join("manifest.json")).expect("a manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("JSON");
    let (chunks, chunk_bytes) = (&manifest["memory"]["chunks"], &manifest["memory"]["chunk_bytes"]);
    let (chunks, chunk_bytes) = (chunks.as_array().expect("chunks").len(), chunk_bytes.as_u64().expect("bytes"));
    let half = chunks / 2;
    let half_bytes = half as u64 * chunk_bytes;

    // Half of it comes, and nobody launched it so far.
    store.is(Manner::Until(half));
    agent.ok(&["bundle", "fetch", &id, "--from", &store.source()]);
    wait_for("half of it is here", || fetched(agent, &id)["fetched_bytes"] == half_bytes);

    // Cut off while it is launched: told in bounded time, with nothing left of it.
    store.is(Manner::Gone);
    let begun = Instant::now();
    let cut = agent.run(&["vm", "launch", "--bundle", &id, "--lazy", "--session", "clones", "--name", "cut"]);
    if cut.status.success() {
        // All it needed to say who it is was in the first half.
        let read = agent.run(&["vm", "exec", "cut", "--", "sh", "-c", CHECK]);
        assert!(!read.status.success(), "it has all of a memory of which half is here");
    }
    let vm = agent.wait_for_state("cut", "failed");
    assert_eq!(vm["cause"]["code"], "bundle_unavailable", "{vm:#}");
    assert!(begun.elapsed() < Duration::from_secs(30), "it ended after {:?}", begun.elapsed());
    println!(
        "    {half} of {chunks} chunks here, cut off: {} after {} ms: {}",
        if cut.status.success() { "it ran, and failed" } else { "the launch failed" },
        begun.elapsed().as_millis(),
        bundle_event_reason(&vm)
    );
    agent.ok(&["vm", "rm", "cut"]);
    assert_eq!(fetched(agent, &id)["fetched_bytes"], half_bytes);

    // It comes again, slowly: what is launched runs long before all is here, and has all of it.
    store.is(Manner::After(Duration::from_millis(800)));
    let vm = lazily(&lab, &id, "half");
    let coming = fetched(agent, &id);
    assert!(coming["fetched_bytes"].as_u64().is_some_and(|bytes| bytes >= half_bytes), "{coming:#}");
    assert!(coming["fetched_bytes"].as_u64() < coming["total_bytes"].as_u64(), "{coming:#}");
    println!(
        "    and launched with half of it here: resumed {} ms after the call, answered after {}; {} of {} bytes here",
        vm["timings"]["resumed_ms"], vm["timings"]["answered_ms"], coming["fetched_bytes"], coming["total_bytes"]
    );
    // Nobody who reads all of it has to wait for so long.
    store.is(Manner::After(Duration::from_millis(50)));
    assert_eq!(agent.sh("half", CHECK), "kept");
    wait_for("all of it is here", || is_whole(agent, &id));
    agent.ok(&["vm", "rm", "half", "--timeout", "0"]);
    agent.ok(&["bundle", "rm", &id]);
    half_of_a_directory(&lab, &store, &id);
    lab.ends_with_vms();
}

/// A directory whose memory image ends half-way, and is all there later.
fn half_of_a_directory(lab: &Lab, store: &Store, id: &str) {
    let agent = lab.agent();
    let (image, rest) = (store.directory().join(id).join("memory.img"), store.directory().join("rest.img"));
    std::fs::copy(&image, &rest).expect("a copy");
    let file = std::fs::File::options().write(true).open(&image).expect("the image");
    file.set_len(file.metadata().expect("its length").len() / 2).expect("cut it");
    drop(file);
    let directory = store.directory().to_str().expect("text");
    agent.ok(&["bundle", "fetch", id, "--from", directory]);
    wait_for("half of it does not come", || fetched(agent, id)["trouble"].is_string());
    let launched = std::thread::scope(|scope| {
        let launching = scope.spawn(|| lazily(lab, id, "by-hand"));
        // It waits for what the directory does not have, if it needs any of it; then it is there.
        wait_for("it is being launched", || agent.json(&["vm", "ls"])["vms"][0]["name"] == "by-hand");
        std::fs::rename(&rest, &image).expect("the rest of it");
        launching.join().expect("the launch")
    });
    assert_eq!(launched["state"], "running");
    assert_eq!(agent.sh("by-hand", CHECK), "kept");
    wait_for("all of it is here", || is_whole(agent, id));
    agent.ok(&["bundle", "verify", id]);
}

pub(crate) fn thirty_at_once_of_a_bundle_that_is_coming(_shared: &Agent) {
    let lab = Lab::start("htest-lazy-b", 43);
    let agent = lab.agent();
    let store = Store::open("htest-lazy-b");
    let id = away(&lab, &store);
    store.is(Manner::After(Duration::from_millis(100)));
    agent.ok(&["bundle", "fetch", &id, "--from", &store.source()]);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..30 {
            let (lab, id) = (&lab, &id);
            scope.spawn(move || lazily(lab, id, &format!("clone-{number}")));
        }
    });
    println!("    thirty run after {} ms, after {} requests", begun.elapsed().as_millis(), store.requests());
    for number in 0..30 {
        let name = format!("clone-{number}");
        assert_eq!(agent.sh(&name, "cat /tmp/note; hostname"), format!("kept\n{name}"));
    }
    wait_for("all of it is here", || is_whole(agent, &id));
    // Each part came once, whoever waited for it.
    let chunks = std::fs::read_to_string(store.directory().join(&id).join("manifest.json")).expect("a manifest");
    let chunks: Value = serde_json::from_str(&chunks).expect("JSON");
    let with_content = chunks["memory"]["chunks"].as_array().expect("chunks").len();
    assert_eq!(store.requests(), with_content);
    assert_eq!(agent.sh("clone-17", CHECK), "kept");
    lab.ends_with_vms();
}

pub(crate) fn what_does_not_come_ends_who_waits_for_it(_shared: &Agent) {
    let lab = Lab::start_with("htest-lazy-c", 44, "[waits]\nmemory_s = 4\n");
    let agent = lab.agent();
    let store = Store::open("htest-lazy-c");
    let id = away(&lab, &store);

    // Some of it comes, then the store says nothing more.
    store.is(Manner::After(Duration::from_millis(400)));
    agent.ok(&["bundle", "fetch", &id, "--from", &store.source()]);
    lazily(&lab, &id, "waiting");
    store.is(Manner::Silent);
    let (begun, coming) = (Instant::now(), fetched(agent, &id));
    println!("    {} of {} bytes are here when the store falls silent", coming["fetched_bytes"], coming["total_bytes"]);
    let failed = agent.run(&["vm", "exec", "waiting", "--", "sh", "-c", CHECK]);
    let vm = agent.wait_for_state("waiting", "failed");
    let took = begun.elapsed();
    assert!(!failed.status.success());
    assert_eq!(vm["cause"]["code"], "bundle_unavailable", "{vm:#}");
    assert!(bundle_event_reason(&vm).contains(&store.source()), "{vm:#}");
    assert!(took < Duration::from_secs(30), "it ended after {took:?}");
    println!("    it failed after {} ms: {}", took.as_millis(), bundle_event_reason(&vm));
    agent.ok(&["vm", "rm", "waiting"]);

    // A liar is found out, is said to lie, and ends nobody who does not wait for it; when it tells the truth, all comes.
    store.is(Manner::Lying);
    wait_for("it is found out", || {
        fetched(agent, &id)["trouble"].as_str().is_some_and(|trouble| trouble.contains("its digest differs"))
    });
    store.is(Manner::Gone);
    wait_for("it is gone", || fetched(agent, &id)["trouble"].is_string());
    assert!(events(agent, "bundle_fetch_failing") >= 1);

    // What is here stays here, whoever is killed.
    let before = fetched(agent, &id)["fetched_bytes"].as_u64().expect("bytes");
    agent.kill_and_restart();
    wait_for("the next agent goes on", || fetched(agent, &id)["trouble"].is_string());
    assert!(fetched(agent, &id)["fetched_bytes"].as_u64() >= Some(before));
    store.is(Manner::After(Duration::ZERO));
    wait_for("all of it is here", || is_whole(agent, &id));
    agent.ok(&["bundle", "verify", &id]);
    lab.clone_of(&id, "late");
    assert_eq!(agent.sh("late", CHECK), "kept");
    lab.ends_with_vms();
}

pub(crate) fn agents_that_end_meanwhile(_shared: &Agent) {
    let lab = Lab::start("htest-lazy-d", 45);
    let agent = lab.agent();
    let store = Store::open("htest-lazy-d");
    let id = away(&lab, &store);
    store.is(Manner::After(Duration::from_millis(500)));
    // Cut off while the first of it comes: nothing of it is visible, or all that is needed to go on.
    agent.ok(&["bundle", "fetch", &id, "--from", &store.source()]);
    lazily(&lab, &id, "kept");
    for round in 0..3 {
        agent.kill_and_restart();
        assert_eq!(agent.sh("kept", "cat /tmp/note"), "kept", "round {round}");
    }
    // A VMM that is killed while it waits takes nothing with it.
    lazily(&lab, &id, "killed");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(agent.vmm_pid("killed")).expect("a pid")),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("kill it");
    agent.wait_for_state("killed", "failed");
    assert_eq!(agent.sh("kept", CHECK), "kept");
    wait_for("all of it is here", || is_whole(agent, &id));
    wait_for("all of it is mapped", || filling(agent, "kept").is_null());
    assert_eq!(agent.sh("kept", CHECK), "kept");
    agent.kill_and_restart();
    assert_eq!(agent.sh("kept", CHECK), "kept");

    // The same from a directory; a bundle that is on its way is removed without a trace.
    agent.ok(&["vm", "rm", "kept", "--timeout", "0"]);
    agent.ok(&["vm", "rm", "killed"]);
    agent.ok(&["bundle", "rm", &id]);
    store.is(Manner::Silent);
    agent.ok(&["bundle", "fetch", &id, "--from", &store.source()]);
    agent.ok(&["bundle", "rm", &id]);
    let left = agent.state().join("bundles/.partial");
    assert_eq!(std::fs::read_dir(left).map_or(0, Iterator::count), 0);
    let directory = store.directory().to_str().expect("text").to_owned();
    agent.ok(&["bundle", "fetch", &id, "--from", &directory, "--wait"]);
    assert!(is_whole(agent, &id));
    lab.clone_of(&id, "again");
    assert_eq!(agent.sh("again", CHECK), "kept");

    // Bad requests.
    let strange = "b-aaaaaaaaaaaaaaaaaaaaaaaaaa";
    for (words, wanted) in [
        (&["bundle", "fetch", strange, "--from", directory.as_str()][..], "fetch a bundle"),
        (&["bundle", "fetch", strange, "--from", "https://store/bundles"], "https"),
        (&["bundle", "fetch", strange, "--from", "peer:nobody"], "nobody"),
        (&["bundle", "fetch", strange, "--from", "relative"], "from"),
        (&["vm", "launch", "--bundle", strange, "--lazy"], "no bundle"),
    ] {
        let refused = agent.run(words);
        let error = super::fixture::text(&refused.stderr);
        assert!(!refused.status.success() && error.contains(wanted), "{words:?}: {error}");
    }
    lab.ends_with_vms();
}
