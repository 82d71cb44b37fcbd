//! The virtio devices, driven as a guest drives them: registers, rings in guest memory, interrupts; and as the host
//! drives them: sockets, files, taps. Tier 1, except `net`, which needs root for a network namespace of its own.

#[path = "virtio/balloon.rs"]
mod balloon;
#[path = "virtio/block.rs"]
mod block;
#[path = "virtio/block_model.rs"]
mod block_model;
#[path = "virtio/driver.rs"]
mod driver;
#[path = "virtio/net.rs"]
mod net;
#[path = "virtio/net_forwarded.rs"]
mod net_forwarded;
#[path = "virtio/net_limits.rs"]
mod net_limits;
#[path = "virtio/net_link.rs"]
mod net_link;
#[path = "virtio/net_speed.rs"]
mod net_speed;
#[path = "virtio/random.rs"]
mod random;
#[path = "virtio/rng.rs"]
mod rng;
#[path = "virtio/saved.rs"]
mod saved;
#[path = "virtio/volume.rs"]
mod volume;
#[path = "virtio/volume_server.rs"]
mod volume_server;
#[path = "virtio/vsock.rs"]
mod vsock;
#[path = "virtio/vsock_guest.rs"]
mod vsock_guest;
