//! Migrations as they are asked for: of clones whose bundle the other host has, by several connections, watched, slow,
//! cancelled, refused meanwhile, by whoever takes them, and of all VMs of a host.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::{Fabric, run};
use super::fixture::{Agent, text};
use super::{probe, witness};

/// Writes 4 MiB again and again, faster than a slow stream takes it.
const WRITE: &str = "cd /tmp; setsid ./probe rewrite --mib 4 --seconds 600 > written 2>&1 < /dev/null &
until case $(cat written) in *'\"passes\":1,'*) true ;; *) false ;; esac; do sleep 0.1; done";

fn bundles(agent: &Agent) -> std::path::PathBuf {
    agent.state().join("bundles")
}

/// Waits until a migration satisfies something.
fn wait_for(agent: &Agent, id: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let migration = agent.json(&["migration", "show", id]);
        if is_so(&migration) {
            return migration;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "never {what}: {migration:#}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "never {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn state(migration: &Value) -> &str {
    migration["state"].as_str().expect("a state")
}

pub(crate) fn are_watched_cancelled_and_refused(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    let bundle = a.json(&["bundle", "build", "--name", "base", "--memory", "128"]);
    let id = bundle["id"].as_str().expect("an id");
    // As people copy bundles: the directory is all of it.
    copy(&bundles(a).join(id), &bundles(b).join(id));
    fetched_from_a_peer(&fabric, id);
    let user_data = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(&user_data, "of the session").expect("write it");
    let path = user_data.path().display().to_string();
    a.ok(&["session", "create", "--id", "517", "--ttl", "1h", "--user-data", &path]);
    for agent in [a, b] {
        agent.ok(&["volume", "create", "--name", "later", "--size", "4"]);
    }
    for name in ["one", "two"] {
        a.ok(&["vm", "launch", "--bundle", "base", "--name", name, "--session", "517"]);
    }
    there_by_several_connections_and_back(&fabric, id);
    witness::of_moves_in_the_guest(&fabric, "one");
    slow_and_cancelled(&fabric);
    slowed_down(&fabric);
    unconverged(&fabric);
    stopped_meanwhile(&fabric);
    evacuated(&fabric);
    for agent in [a, b] {
        agent.ok(&["volume", "rm", "later"]);
    }
    fabric.finish();
}

/// A guest runs on one host while its bundle comes from another.
fn fetched_from_a_peer(fabric: &Fabric, bundle: &str) {
    let (c, from) = (fabric.agent(2), format!("peer:{}", fabric.name(0)));
    c.ok(&["bundle", "fetch", bundle, "--from", &from]);
    c.ok(&["vm", "launch", "--bundle", bundle, "--lazy", "--name", "early"]);
    assert_eq!(c.sh("early", "hostname"), "early");
    c.ok(&["bundle", "fetch", bundle, "--from", &from, "--wait"]);
    c.ok(&["bundle", "verify", "base"]);
    c.ok(&["vm", "rm", "early", "--timeout", "0"]);
}

fn copy(from: &Path, to: &Path) {
    run("cp", &["-a", &from.display().to_string(), &to.display().to_string()]);
}

/// Only what a clone has written goes over, and what its session is known for goes with it.
fn there_by_several_connections_and_back(fabric: &Fabric, bundle: &str) {
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    a.fill_file("one", "/tmp/kept", 3_000_000);
    let estimate = a.json(&["vm", "migrate", "one", "--to", fabric.name(1), "--estimate"]);
    assert_eq!((&estimate["has_base"], &estimate["based_on"]), (&true.into(), &0.into()), "{estimate:#}");
    // Who is in the guest meanwhile is cut off, and told so.
    let mut inside: Vec<_> = [&["vm", "exec", "one", "--", "sleep", "600"][..], &["vm", "console", "one"]]
        .into_iter()
        .map(|words| {
            let mut client = a.command(words);
            client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run hearth")
        })
        .collect();
    wait_until("the program runs", || a.run(&["vm", "exec", "one", "--", "pidof", "sleep"]).status.success());
    let told = a.ok(&["vm", "migrate", "one", "--to", fabric.name(1), "--connections", "4"]);
    println!("    {}", told.trim());
    let [program, _console] = [0, 1].map(|_| inside.remove(0).wait_with_output().expect("its end"));
    let said = text(&program.stderr);
    assert!(!program.status.success() && said.contains("hung up"), "{said}");
    refused_each(a, 409);
    let there = b.vm("one");
    assert_eq!((&there["bundle_id"], &there["state"]), (&bundle.into(), &"running".into()));
    b.sh("one", "md5sum -c /tmp/kept.sum");
    let list = a.json(&["migration", "ls"]);
    let last = &list["migrations"][0];
    assert_eq!((state(last), &last["direction"]), ("completed", &"out".into()), "{last:#}");
    let (pages, steps) = (last["moved"]["pages"].as_u64().expect("pages"), &last["moved"]["steps"]);
    // 3 MB of it were just written; all it has touched is several times as much.
    assert!((700..6000).contains(&pages), "{last:#}");
    let parts = ["stop_ms", "last_pages_ms", "ready_ms", "decide_ms", "start_ms"];
    let sum: f64 = parts.iter().map(|part| steps[part].as_f64().expect("a time")).sum();
    let pause = last["pause_ms"].as_f64().expect("a pause");
    assert!(sum > 0.5 * pause && sum < pause + 1.0, "the steps {steps} are the pause {pause}");
    let there = b.json(&["migration", "show", last["id"].as_str().expect("an id")]);
    assert_eq!((state(&there), &there["direction"]), ("completed", &"in".into()), "{there:#}");
    // Its session has the same end and says the same.
    let session = b.json(&["session", "show", "517"]);
    assert!(session["expires_at"].is_string(), "{session:#}");
    let request = r"GET /v1/self/user-data HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n";
    let said = b.sh("one", &format!("printf '{request}' | nc -w 60 169.254.169.254 80"));
    assert!(said.ends_with("of the session"), "{said}");
    b.ok(&["vm", "migrate", "one", "--to", "auto"]);
    a.sh("one", "md5sum -c /tmp/kept.sum");
    assert_eq!(a.vm("one")["bundle_id"], *bundle);
    let estimate = a.json(&["vm", "migrate", "one", "--to", "auto", "--estimate"]);
    println!("    {}", a.ok(&["vm", "migrate", "one", "--to", fabric.name(1), "--estimate"]).replace('\n', "\n    "));
    assert!(estimate["to"] == fabric.name(1) || estimate["to"] == fabric.name(2), "{estimate:#}");
}

/// One that takes long is seen on its way, keeps others from the VM, and is given up.
fn slow_and_cancelled(fabric: &Fabric) {
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    a.sh("one", WRITE);
    let slow = ["vm", "migrate", "one", "--to", fabric.name(1), "--rate", "1M", "--no-wait"];
    let begun = a.json(&slow);
    let id = begun["migration_id"].as_str().expect("an id").to_owned();
    let seen = wait_for(a, &id, "copying", |now| state(now) == "copying" && now["progress"]["sent_bytes"] != 0);
    assert!(seen["progress"]["round_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{seen:#}");
    let (status, answer) = a.curl(&["-X", "POST", "-D", "-"], "/v1/vms/one/pause");
    assert_eq!(status, 423, "{answer}");
    refused_each(a, 423);
    refused_each(b, 423);
    assert!(answer.to_lowercase().contains("retry-after: 1") && answer.contains("vm_moving"), "{answer}");
    let second = text(&a.run(&["vm", "migrate", "one", "--to", fabric.name(1)]).stderr);
    assert!(second.contains("sending"), "{second}");
    // What changes nothing is as ever.
    assert!(a.ok(&["vm", "stats", "one"]).contains("answers"));
    assert_eq!(a.sh("one", "echo here"), "here");
    let told = a.ok(&["migration", "cancel", &id]);
    assert!(told.contains("cancelled; one goes on here"), "{told}");
    assert_eq!(a.vm("one")["state"], "running");
    nothing_is_left_there(b);
    a.sh("one", "md5sum -c /tmp/kept.sum");
    let again = text(&a.run(&["migration", "cancel", &id]).stderr);
    assert!(again.contains("cannot be cancelled: it is cancelled"), "{again}");
}

/// Everything that would change the VM is refused, with this status.
fn refused_each(agent: &Agent, wanted: u16) {
    for (path, body) in [
        ("pause", ""),
        ("resume", ""),
        ("snapshot", "{}"),
        ("snapshot", r#"{"live":true}"#),
        ("hand-over", ""),
        ("swap-out", r#"{"mode":"hibernate"}"#),
        ("balloon", r#"{"target_mib":1}"#),
        ("volumes", r#"{"volume":"later"}"#),
    ] {
        let mut words = vec!["-X", "POST"];
        if !body.is_empty() {
            words.extend(["--json", body]);
        }
        let (status, answer) = agent.curl(&words, &format!("/v1/vms/one/{path}"));
        assert_eq!(status, wanted, "{path} {body}: {answer}");
    }
}

/// The other host forgets what came of it, once it has heard that it does not come.
fn nothing_is_left_there(agent: &Agent) {
    let begun = Instant::now();
    while agent.json(&["vm", "ls"])["vms"] != serde_json::json!([]) {
        assert!(begun.elapsed() < Duration::from_secs(30), "{:#}", agent.json(&["vm", "ls"]));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Time that a VM's vCPU spends on a processor in a second, in hundredths.
fn busy(agent: &Agent, vm: &str) -> u64 {
    let ticks = || -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", agent.vmm_pid(vm))).expect("threads");
        let stats = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok());
        let of_vcpu = stats.filter(|stat| stat.contains("(vcpu"));
        let used = of_vcpu.map(|stat| {
            let (_, fields) = stat.rsplit_once(')').expect("a name");
            // utime and stime, proc_pid_stat(5).
            let fields = fields.split_whitespace().skip(11).take(2);
            fields.map(|field| field.parse::<u64>().expect("a number")).sum::<u64>()
        });
        used.sum()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(1));
    ticks() - before
}

/// A guest that writes faster than it is sent has its vCPUs rest more and more, and none of that is left behind.
fn slowed_down(fabric: &Fabric) {
    let a = fabric.agent(0);
    let before = busy(a, "one");
    let words = ["vm", "migrate", "one", "--to", fabric.name(1), "--rate", "4M", "--rounds", "1000", "--no-wait"];
    let id = a.json(&words)["migration_id"].as_str().expect("an id").to_owned();
    let share = |now: &Value| now["progress"]["vcpu_share"].as_u64();
    let seen = wait_for(a, &id, "slowed down", |now| share(now).is_some_and(|share| share <= 20));
    let slowed = busy(a, "one");
    a.ok(&["migration", "cancel", &id]);
    let after = busy(a, "one");
    println!(
        "    its vCPU ran {before} hundredths of a second, {slowed} of one when it was to run {} % of the time, and \
         {after} after that",
        share(&seen).expect("a share")
    );
    // The host has other work as well: a fifth of what it ran before is not to be counted on.
    assert!(slowed * 10 < before * 7 && slowed * 10 < after * 7, "{before}, {slowed}, {after}: {seen:#}");
    assert_eq!(a.sh("one", "md5sum -c /tmp/kept.sum"), "/tmp/kept: OK");
}

/// A guest that writes faster than it is sent stays when that is asked for, and its vCPUs run as before; or goes all the
/// same.
fn unconverged(fabric: &Fabric) {
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    let to = fabric.name(1);
    let narrow = ["vm", "migrate", "one", "--to", to, "--rate", "2M", "--rounds", "4", "--no-throttle"];
    let refused = text(&a.run(&[&narrow[..], &["--on-nonconverge", "abort"]].concat()).stderr);
    println!("    {}", refused.trim().replace('\n', "\n    "));
    assert!(refused.contains("round"), "{refused}");
    assert_eq!(a.vm("one")["state"], "running");
    let forced = a.ok(&[&narrow[..], &["--on-nonconverge", "force"]].concat());
    println!("    forced: {}", forced.trim());
    b.sh("one", "md5sum -c /tmp/kept.sum; kill $(pidof probe)");
    b.ok(&["vm", "migrate", "one", "--to", fabric.name(0)]);
}

/// A stop wins over a migration that is under way.
fn stopped_meanwhile(fabric: &Fabric) {
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    probe::install(a, "two");
    a.sh("two", WRITE);
    a.json(&["vm", "migrate", "two", "--to", fabric.name(1), "--rate", "1M", "--no-wait"]);
    a.ok(&["vm", "rm", "two", "--timeout", "0"]);
    assert!(!a.run(&["vm", "show", "two"]).status.success());
    nothing_is_left_there(b);
}

/// All that can go goes; what stays is told with the reason.
fn evacuated(fabric: &Fabric) {
    let a = fabric.agent(0);
    for name in ["three", "four", "tied"] {
        let mut words = vec!["vm", "launch", "--bundle", "base", "--name", name, "--session", "517"];
        if name == "tied" {
            words.extend(["--publish", "18080:80"]);
        }
        a.ok(&words);
    }
    let output = a.run(&["host", "evacuate", "--at-once", "3"]);
    let said = text(&output.stdout);
    println!("    {}", said.trim().replace('\n', "\n    "));
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.lines().any(|line| line.starts_with("tied") && line.contains("ports of this host")), "{said}");
    for name in ["one", "three", "four"] {
        assert_eq!(a.vm(name)["state"], "handed_over", "{name}");
        let host = a.vm(name)["handed_to"].as_str().expect("a host").to_owned();
        let there = fabric.agent(if host == fabric.name(1) { 1 } else { 2 });
        assert_eq!(there.sh(name, "echo here"), "here");
        there.ok(&["vm", "migrate", name, "--to", fabric.name(0)]);
    }
    for name in ["one", "three", "four", "tied"] {
        a.ok(&["vm", "rm", name, "--timeout", "0"]);
    }
    let metrics = a.curl(&[], "/metrics").1;
    for wanted in
        ["hearth_move_pause_seconds_count{way=\"migration\"}", "hearth_move_sent_bytes_total{way=\"migration\"}"]
    {
        assert!(metrics.contains(wanted), "{wanted} in {metrics}");
    }
}
