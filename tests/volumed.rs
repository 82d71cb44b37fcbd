//! The volume daemon as a built binary, without an agent and without VMs: real sockets, our own small client, and the real
//! clients `qemu-img`, `qemu-io`, `nbdinfo`, `nbdcopy` and `nbdfuse` (Debian: qemu-utils, libnbd-bin, e2fsprogs), without
//! which these tests fail. Root, since one of them mounts.

#![expect(clippy::disallowed_methods, reason = "it looks from outside, by the host's own clock and files")]
#![expect(clippy::wildcard_enum_match_arm, reason = "a test names what it waits for")]

// What the crate's own tests use to make a disk again names them so.
use hearth::sys;

#[path = "volumed/client.rs"]
mod client;
#[path = "volumed/daemon.rs"]
mod daemon;
#[path = "volumed/durable.rs"]
mod durable;
#[path = "volumed/fenced.rs"]
mod fenced;
#[path = "volumed/hostile.rs"]
mod hostile;
#[path = "volumed/killed.rs"]
mod killed;
#[path = "volumed/real_clients.rs"]
mod real_clients;
#[path = "volumed/remote.rs"]
mod remote;
