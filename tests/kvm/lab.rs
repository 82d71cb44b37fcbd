//! A host of its own for tests of bundles: an agent with a fabric, in a network namespace of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::run;
use super::fixture::Agent;

/// The fabric's network id that clones join.
pub(crate) const SESSION: &str = "77";

/// Files of bundles that were built, by the words of the build.
static BUILT: Mutex<BTreeMap<String, PathBuf>> = Mutex::new(BTreeMap::new());

/// Where they are.
fn kept() -> PathBuf {
    std::env::temp_dir().join(format!("hearth-tests-{}", std::process::id()))
}

/// Removes them, after the last test.
pub(crate) fn forget_bundles() {
    let _ = std::fs::remove_dir_all(kept());
}

/// An agent in a namespace; both are gone when dropped.
pub(crate) struct Lab {
    namespace: &'static str,
    agent: Option<Agent>,
}

impl Lab {
    /// Starts the agent.
    pub(crate) fn start(namespace: &'static str, number: u16) -> Self {
        Self::start_with(namespace, number, "")
    }

    /// Starts the agent with more in its configuration.
    pub(crate) fn start_with(namespace: &'static str, number: u16, more: &str) -> Self {
        Self::start_on(namespace, number, more, tempfile::tempdir().expect("a temporary directory"), None)
    }

    /// Starts the agent in a directory that was prepared before, and by a clock, as [`Agent::start_on`] has it.
    pub(crate) fn start_on(
        namespace: &'static str,
        number: u16,
        more: &str,
        directory: tempfile::TempDir,
        clock: Option<(String, String)>,
    ) -> Self {
        let _ = Command::new("ip").args(["netns", "delete", namespace]).output();
        run("ip", &["netns", "add", namespace]);
        run("ip", &["-n", namespace, "link", "set", "lo", "up"]);
        let config = format!(
            "host_name = \"{namespace}\"\n{more}\n\
             [fabric]\nhost_number = {number}\nipv6_prefix = \"fd3c:91aa:7e3::/48\"\n"
        );
        let lab = Self { namespace, agent: Some(Agent::start_on(&config, namespace, directory, clock)) };
        lab.agent().ok(&["session", "create", "--id", SESSION, "--name", "clones"]);
        lab
    }

    /// The agent.
    pub(crate) fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("the agent runs")
    }

    /// Has a bundle; gives it. What was built by the same words before, by whichever agent, is imported: that takes a
    /// moment, a boot takes seconds.
    pub(crate) fn build(&self, name: &str, more: &[&str]) -> Value {
        let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
        let key = [&[name], more].concat().join("\0");
        if let Some(file) = built.get(&key) {
            self.agent().ok(&["bundle", "import", file.to_str().expect("a path")]);
            return self.agent().json(&["bundle", "show", name]);
        }
        let bundle = self.build_itself(name, more);
        std::fs::create_dir_all(kept()).expect("make a directory for bundles");
        let file = kept().join(format!("{}.hearth", built.len()));
        self.agent().ok(&["bundle", "export", name, "--output", file.to_str().expect("a path")]);
        built.insert(key, file);
        bundle
    }

    /// Builds a bundle, by this agent; gives it.
    pub(crate) fn build_itself(&self, name: &str, more: &[&str]) -> Value {
        let words: Vec<&str> =
            ["bundle", "build", "--name", name, "--memory", "64"].iter().chain(more).copied().collect();
        let bundle = self.agent().json(&words);
        // The VM that it was is forgotten a moment after it became one.
        let begun = Instant::now();
        let is_build = |vm: &Value| vm["role"] == "bundle-build";
        while self.agent().json(&["vm", "ls"])["vms"].as_array().is_some_and(|vms| vms.iter().any(is_build)) {
            assert!(begun.elapsed() < Duration::from_secs(20), "the VM of a build stays");
            std::thread::sleep(Duration::from_millis(20));
        }
        bundle
    }

    /// Launches a VM of a bundle into the session.
    pub(crate) fn clone_of(&self, bundle: &str, name: &str) -> Value {
        self.agent().json(&["vm", "launch", "--bundle", bundle, "--session", "clones", "--name", name])
    }

    /// Removes the VMs that are left, then ends as [`Lab::ends`].
    pub(crate) fn ends_with_vms(self) {
        for vm in self.agent().json(&["vm", "ls"])["vms"].as_array().expect("a list") {
            self.agent().ok(&["vm", "rm", vm["id"].as_str().expect("an id"), "--timeout", "0"]);
        }
        self.ends();
    }

    /// Ends the agent while machines are kept ready; nothing may be left but what is for the next one.
    pub(crate) fn ends_with_a_pool(mut self) {
        self.agent.take().expect("the agent runs").end();
        let links = run("ip", &["-n", self.namespace, "-o", "link"]);
        assert!(!links.contains("hth"), "links: {links}");
    }

    /// Removes the bundles and ends the agent; nothing may be left.
    pub(crate) fn ends(mut self) {
        let agent = self.agent.take().expect("the agent runs");
        for bundle in bundles(&agent) {
            agent.ok(&["bundle", "rm", &bundle]);
        }
        agent.finish();
        let links = run("ip", &["-n", self.namespace, "-o", "link"]);
        assert!(!links.contains("hth"), "links: {links}");
    }
}

/// Ids of all bundles, those that others build on last.
fn bundles(agent: &Agent) -> Vec<String> {
    let list = agent.json(&["bundle", "ls"]);
    let mut bundles: Vec<&Value> = list["bundles"].as_array().expect("a list").iter().collect();
    // A child is younger than its parent.
    bundles.sort_by_key(|bundle| std::cmp::Reverse(bundle["created_at"].as_str().expect("a time").to_owned()));
    bundles.iter().map(|bundle| bundle["id"].as_str().expect("an id").to_owned()).collect()
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Only after a failure is there still one; it takes its VMs with it.
        drop(self.agent.take());
        let _ = Command::new("ip").args(["netns", "delete", self.namespace]).output();
    }
}
