//! Hosts whose network cannot be as it should: each says what is wrong and what to do, and nothing is left.

use std::process::{Command, Output};

use super::fabric::{Fabric, PREFIX, run};
use super::fixture::{Agent, need, text};

/// Refused, and told why by these words.
fn assert_refused(output: &Output, said: &[&str]) {
    let message = text(&output.stderr);
    assert!(!output.status.success(), "{message}");
    for word in said {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
}

pub(crate) fn hosts_say_what_is_wrong(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    routes_of_others_are_a_conflict(&fabric);
    sessions_that_cannot_be_are_refused(&fabric);
    a_host_without_nft_says_so(&fabric);
    fabric.finish();
}

/// While somebody else has a route to the fabric's addresses, no session is made or joined.
fn routes_of_others_are_a_conflict(fabric: &Fabric) {
    let (agent, name) = (fabric.agent(0), fabric.name(0));
    agent.ok(&["session", "create", "--id", "5", "--name", "early"]);
    for route in ["10.3.7.0/24", "fd3c:91aa:7e2:3:0:9::/96"] {
        run("ip", &["-n", name, "route", "add", route, "dev", "wire"]);
        assert_refused(&agent.run(&["session", "create"]), &["conflict", route, "remove them"]);
        assert_refused(&agent.run(&["vm", "launch", "--session", "early"]), &["conflict", route]);
        run("ip", &["-n", name, "route", "delete", route, "dev", "wire"]);
    }
    agent.ok(&["session", "create", "--id", "6", "--name", "late"]);
    assert_eq!(agent.json(&["vm", "ls"])["vms"].as_array().map(Vec::len), Some(0));
}

fn sessions_that_cannot_be_are_refused(fabric: &Fabric) {
    let agent = fabric.agent(0);
    agent.ok(&["session", "rm", "late"]);
    assert_refused(&agent.run(&["session", "create", "--id", "6"]), &["6", "rests for another"]);
    assert_refused(&agent.run(&["session", "create", "--id", "1023", "--ipv4"]), &["1023", "1022", "without IPv4"]);
    assert_refused(&agent.run(&["session", "create", "--id", "0xffffffff"]), &["4294967294"]);
    assert_refused(&agent.run(&["session", "create", "--id", "33578751"]), &["33578751", "reserved"]);
    assert_refused(&agent.run(&["vm", "launch", "--session", "nobody"]), &["nobody", "hearth session ls"]);
    let publish = ["vm", "launch", "--session", "early", "--publish", "0:7"];
    assert_refused(&agent.run(&publish), &["0:7"]);
}

/// An agent that finds no nft goes on, launches nothing, and leaves nothing.
fn a_host_without_nft_says_so(fabric: &Fabric) {
    let config = format!("[fabric]\nhost_number = 9\nipv6_prefix = \"{PREFIX}\"\n");
    let agent = Agent::start_without_programs(&config, fabric.name(2));
    agent.ok(&["session", "create", "--id", "5", "--name", "s"]);
    let wanted = ["nft is not there", "install nftables"];
    assert_refused(&agent.run(&["vm", "launch", "--name", "a", "--session", "s"]), &wanted);
    assert_eq!(agent.vm("a")["state"], "failed");
    let probe = Command::new(need("HEARTH_BINARY")).args(["vmm", "--probe"]).env("PATH", "/nowhere").output();
    let facts = text(&probe.expect("run hearth").stdout);
    assert!(facts.contains("\"usable\":false") && wanted.iter().all(|word| facts.contains(word)), "{facts}");
    agent.finish();
    let left = run("ip", &["-n", fabric.name(2), "-o", "link"]) + &run("ip", &["netns", "list"]);
    assert!(!left.contains("hth9"), "{left}");
}
