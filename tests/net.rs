//! What the host's kernel does for networks: named namespaces, links and routes, nft. Tier net: root and a real kernel;
//! every test has a network and a `/run` of its own, so that it sees nothing of the host's and leaves nothing, even
//! when it is killed.

#[path = "net/allowed.rs"]
mod allowed;
#[path = "net/cgroup.rs"]
mod cgroup;
#[path = "net/guest.rs"]
mod guest;
#[path = "net/host.rs"]
mod host;
#[path = "net/hostile.rs"]
mod hostile;
#[path = "net/killed.rs"]
mod killed;
#[path = "net/left.rs"]
mod left;
#[path = "net/many.rs"]
mod many;
#[path = "net/netlink.rs"]
mod netlink;
#[path = "net/netns.rs"]
mod netns;
#[path = "net/nft.rs"]
mod nft;
#[path = "net/sniff.rs"]
mod sniff;
#[path = "net/speed.rs"]
mod speed;
#[path = "net/tap_end.rs"]
mod tap_end;
#[path = "net/traced.rs"]
mod traced;
#[path = "net/watch.rs"]
mod watch;
#[path = "net/world.rs"]
mod world;
