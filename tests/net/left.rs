//! What a network leaves on its host: what iproute2 and nft show, compared before and after.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use hearth::sys::netns;

use crate::host::run;

/// What is looked at in a network namespace, besides its links. Routes of the kernel's own table follow from addresses.
const SHOWN: [&str; 5] =
    ["ip -o address", "ip -4 route", "ip -6 route", "ip neighbour show nud permanent", "nft -s list ruleset"];

/// What is there, line by line, each with what it is a line of.
pub(crate) type Looks = BTreeSet<String>;

/// Of a link that is not ours, the kernel's own doings: link-local addresses come and change while it looks whether
/// somebody has them.
fn is_the_kernels(line: &str) -> bool {
    line.contains("fe80::") && !line.contains("hth")
}

/// A link's name, settings and address; not its number, and not how it fares.
fn link(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let name = words[1].split('@').next().unwrap_or_default();
    let is_up = words[2].split(['<', ',', '>']).any(|flag| flag == "UP");
    let after = |name: &str| words.iter().skip_while(|word| !word.starts_with(name)).nth(1).copied().unwrap_or("");
    format!("{name} up={is_up} mtu={} {}", after("mtu"), after("link/"))
}

/// What is in a network namespace.
pub(crate) fn look_inside(namespace: &OwnedFd) -> Looks {
    let inside = || {
        let links = run("ip -o link");
        let mut all: Looks = links.lines().map(|line| format!("ip link: {}", link(line))).collect();
        for words in SHOWN {
            let shown = run(words);
            let lines = shown.lines().filter(|line| !is_the_kernels(line));
            // Before an address is its link's number, which the kernel gives only once.
            let lines = lines.map(|line| line.split_once(": ").map_or(line, |(_, rest)| rest));
            all.extend(lines.map(|line| format!("{words}: {}", line.trim())));
        }
        all
    };
    netns::in_fd(namespace, inside).unwrap()
}

/// A host as it is: the namespaces' names, and what is in its own.
pub(crate) fn look(host: &OwnedFd) -> Looks {
    let names = run("ip netns list");
    let names = names.lines().filter_map(|line| line.split(' ').next()).map(|name| format!("ip netns: {name}"));
    look_inside(host).into_iter().chain(names).collect()
}

/// Fails if something came or went.
pub(crate) fn assert_same(before: &Looks, now: &Looks, when: impl std::fmt::Display) {
    let more: Vec<&String> = now.difference(before).collect();
    let less: Vec<&String> = before.difference(now).collect();
    assert!(more.is_empty() && less.is_empty(), "{when}: more than before: {more:#?}, less: {less:#?}");
}
