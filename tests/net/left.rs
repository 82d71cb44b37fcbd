//! What a network leaves on its host: everything iproute2 and nft show, compared before and after.

use std::os::fd::OwnedFd;

use hearth::sys::netns;

use crate::host::run;

/// What is looked at, in one host's namespace.
const SHOWN: [&str; 6] = [
    "ip -o link",
    "ip -o address",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip neighbour show nud permanent",
    "nft -s list ruleset",
];

/// A host as it is: its namespaces by name, and what is in its own.
pub(crate) fn look(host: &OwnedFd) -> String {
    let namespaces = run("ip netns list");
    let shown = netns::in_fd(host, || SHOWN.map(|words| format!("## {words}\n{}", run(words)))).unwrap();
    format!("## ip netns list\n{namespaces}{}", shown.concat())
}
