//! Three hosts on one machine: network namespaces joined by a bridge, an agent in each.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::fixture::{Agent, text};

/// Runs a command that has to succeed; its standard output.
pub(crate) fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("run {program}: {error}"));
    assert!(output.status.success(), "{program} {words:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Names of the hosts' namespaces.
const HOSTS: [&str; 3] = ["htest-a", "htest-b", "htest-c"];

/// The namespace of the bridge.
const WIRE: &str = "htest-wire";

/// The hosts' numbers in their fabric.
const NUMBERS: [u16; 3] = [3, 4, 5];

/// The fabric's prefix.
pub(crate) const PREFIX: &str = "fd3c:91aa:7e2::/48";

/// Whoever is outside of the fabric: the bridge itself.
pub(crate) const OUTSIDE: [&str; 2] = ["fd00:f::1", "192.0.2.1"];

/// What is particular to a host.
#[derive(Default)]
pub(crate) struct Host {
    /// The agent's program, if it is another one than is tested.
    pub(crate) program: Option<PathBuf>,
    /// Its directory, if that was prepared before: `state` in it is to be its state directory.
    pub(crate) directory: Option<tempfile::TempDir>,
    /// Lines of `[limits]` in its configuration.
    pub(crate) limits: &'static str,
}

/// Hosts and what joins them; gone when dropped.
pub(crate) struct Fabric {
    agents: Vec<Option<Agent>>,
    key: tempfile::NamedTempFile,
}

impl Fabric {
    /// Makes the hosts and starts their agents.
    pub(crate) fn start(underlay: &str) -> Self {
        Self::start_by(underlay, [None, None, None])
    }

    /// The same, with agents by other programs than the one that is tested: of an earlier version.
    pub(crate) fn start_by(underlay: &str, programs: [Option<PathBuf>; 3]) -> Self {
        Self::start_each(underlay, programs.map(|program| Host { program, ..Host::default() }))
    }

    /// The same, with whatever is particular to each host.
    pub(crate) fn start_each(underlay: &str, hosts: [Host; 3]) -> Self {
        // Made readable for its owner alone.
        let key = tempfile::NamedTempFile::new().expect("a file for the key");
        std::fs::write(&key, "of this test's hosts alone: 32 bytes or more").expect("write the key");
        let mut fabric = Self { agents: Vec::new(), key };
        fabric.wire();
        for (number, host) in hosts.into_iter().enumerate() {
            let config = config(number, underlay, fabric.key.path(), host.limits);
            let directory = host.directory.unwrap_or_else(|| tempfile::tempdir().expect("a temporary directory"));
            fabric.agents.push(Some(Agent::start_prepared(&config, HOSTS[number], directory, host.program)));
        }
        fabric
    }

    fn wire(&self) {
        for name in HOSTS.iter().chain([&WIRE]) {
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
            run("ip", &["netns", "add", name]);
        }
        run("ip", &["-n", WIRE, "link", "add", "fabric", "type", "bridge"]);
        run("ip", &["-n", WIRE, "link", "set", "fabric", "up"]);
        run("ip", &["-n", WIRE, "address", "add", &format!("{}/64", OUTSIDE[0]), "dev", "fabric", "nodad"]);
        run("ip", &["-n", WIRE, "address", "add", &format!("{}/24", OUTSIDE[1]), "dev", "fabric"]);
        for (name, number) in HOSTS.iter().zip(NUMBERS) {
            let port = format!("port{number}");
            let peer = ["type", "veth", "peer", "name", "wire", "netns", name];
            run("ip", &[&["-n", WIRE, "link", "add", port.as_str()], peer.as_slice()].concat());
            run("ip", &["-n", WIRE, "link", "set", &port, "master", "fabric", "up"]);
            run("ip", &["-n", name, "link", "set", "lo", "up"]);
            run("ip", &["-n", name, "link", "set", "wire", "up"]);
            run("ip", &["-n", name, "address", "add", &format!("fd00:f::{number}/64"), "dev", "wire", "nodad"]);
            run("ip", &["-n", name, "address", "add", &format!("192.0.2.{number}/24"), "dev", "wire"]);
        }
    }

    /// The agent of a host, 0 to 2.
    pub(crate) fn agent(&self, host: usize) -> &Agent {
        self.agents[host].as_ref().expect("the agent runs")
    }

    /// A program of this machine, outside of the fabric.
    pub(crate) fn outside(&self, program: &Path) -> Command {
        inside(WIRE, program)
    }

    /// A program of this machine, in a host's own namespace.
    pub(crate) fn on(&self, host: usize, program: &Path) -> Command {
        inside(HOSTS[host], program)
    }

    /// Gives a host an address of a session of its own: what is there is a member of it, by its address alone.
    pub(crate) fn join(&self, host: usize, session: u16) -> String {
        let prefix = PREFIX.trim_end_matches("::/48");
        let address = format!("{prefix}:{:x}:0:{session:x}:0:3e7", NUMBERS[host]);
        run("ip", &["-n", HOSTS[host], "address", "add", &format!("{address}/128"), "dev", "wire", "nodad"]);
        address
    }

    /// A host's end of the wire, in the namespace of the bridge.
    pub(crate) fn port(&self, host: usize) -> (&'static str, String) {
        (WIRE, format!("port{}", NUMBERS[host]))
    }

    /// A host's name.
    pub(crate) fn name(&self, host: usize) -> &'static str {
        HOSTS[host]
    }

    /// A host's rules without counters, and those of the jails its VMs are in.
    pub(crate) fn rules_of_members(&self, host: usize) -> String {
        let mut all = run("ip", &["netns", "exec", HOSTS[host], "nft", "-s", "list", "ruleset"]);
        for jail in self.jails(host) {
            let rules = run("ip", &["netns", "exec", &jail, "nft", "-s", "list", "ruleset"]);
            // A jail that was made ahead has nobody's hardware address in it.
            if rules.contains("elements = {") {
                all += &format!("-- {jail}\n{rules}");
            }
        }
        all
    }

    /// Names of a host's jails.
    pub(crate) fn jails(&self, host: usize) -> Vec<String> {
        let prefix = format!("hth{}-", NUMBERS[host]);
        let names = run("ip", &["netns", "list"]);
        let names = names.lines().filter_map(|line| line.split_whitespace().next());
        names.filter(|name| name.starts_with(&prefix)).map(str::to_owned).collect()
    }

    /// Ends the agents and removes the hosts; nothing may be left in them.
    pub(crate) fn finish(mut self) {
        for (host, agent) in self.agents.iter_mut().enumerate() {
            agent.take().expect("the agent runs").finish();
            let name = HOSTS[host];
            let prefix = format!("hth{}", NUMBERS[host]);
            let links = run("ip", &["-n", name, "-o", "link"]);
            assert!(!links.contains(&prefix), "links of {name}: {links}");
            let namespaces = run("ip", &["netns", "list"]);
            assert!(!namespaces.contains(&format!("{prefix}-")), "jails of {name}: {namespaces}");
        }
    }
}

/// A program in a named network namespace.
pub(crate) fn inside(namespace: &str, program: &Path) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg(program);
    command
}

impl Drop for Fabric {
    fn drop(&mut self) {
        // Only after a failure is there still one.
        self.agents.clear();
        for name in HOSTS.iter().chain([&WIRE]) {
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

fn config(host: usize, underlay: &str, key: &Path, limits: &str) -> String {
    let (name, number, key) = (HOSTS[host], NUMBERS[host], key.display());
    let mut text = format!(
        "host_name = \"{name}\"\n[limits]\n{limits}\n[fabric]\nhost_number = {number}\nipv6_prefix = \"{PREFIX}\"\n\
         underlay = \"{underlay}\"\nlisten = \"[fd00:f::{number}]:7787\"\nkey_file = \"{key}\"\n"
    );
    for (peer, name) in HOSTS.iter().enumerate().filter(|(peer, _)| *peer != host) {
        let number = NUMBERS[peer];
        text += &format!("[[peers]]\nname = \"{name}\"\naddress = \"fd00:f::{number}\"\nhost_number = {number}\n");
    }
    text
}
