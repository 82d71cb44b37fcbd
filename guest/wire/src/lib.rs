//! Messages between the Hearth agent (host) and the agent inside a guest (`guest/init`).
//!
//! The guest listens on one vsock port, [`PORT`]; the host always connects, so a channel that broke (a restore,
//! a reset) is simply opened again. Each connection starts with [`ToGuest::Hello`] answered by
//! [`FromGuest::Hello`]; then it carries either any number of control requests, one answer each, or exactly one
//! [`ToGuest::Exec`] with its streams. Frames are a little-endian `u32` length, 1 to [`FRAME_BYTES_MAX`], then that
//! many bytes of postcard. A frame that does not decode, leaves bytes over or is out of place is answered by
//! [`FromGuest::Failed`] and ends the connection. A program's connection that is closed by the host, or half closed,
//! ends the program: its process group is killed.
//!
//! Both sides speak [`VERSION_MIN`] to [`VERSION`]; the lower of the two Hellos is used.
//! Enum variants are only ever appended: postcard encodes a variant as its index.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

pub mod frame;
pub mod json;
pub mod registrar;

/// Version of this protocol that this build speaks.
///
/// * 1: identity, programs, quiesce, stats, clock, shutdown.
/// * 2: [`ToGuest::Network`].
/// * 3: [`ToGuest::Hardware`], [`ToGuest::RunHooks`], [`ToGuest::Join`] and its answers.
/// * 4: [`ToGuest::Root`].
/// * 5: [`ToGuest::Secrets`].
pub const VERSION: u16 = 5;

/// The oldest version this build still understands.
pub const VERSION_MIN: u16 = 2;

/// The version that a host has to know to have this guest go on there, when the guest's is `spoken`: what is newer than this
/// has to do with how a guest begins or with copies of it, and whoever speaks it speaks this as well. So a guest can go to a host that has not
/// been upgraded yet.
#[must_use]
pub const fn version_to_go_on(spoken: u16) -> u16 {
    const HOOKS: u16 = 3;
    if spoken < HOOKS { spoken } else { HOOKS }
}

/// vsock port the guest agent listens on.
pub const PORT: u32 = 1024;

/// Longest frame body in bytes. One MiB bounds what either side has to buffer for a frame it has not read yet.
pub const FRAME_BYTES_MAX: u32 = 1 << 20;

/// Most bytes of a stream put in one frame: small enough that several execs share one vsock fairly.
pub const STREAM_CHUNK_BYTES: usize = 32 * 1024;

/// Most words (`argv` plus `env`) of one [`Exec`].
pub const EXEC_WORDS_MAX: usize = 4096;

/// Most programs that one [`ToGuest::RunHooks`] runs; with more of them none is run.
pub const HOOKS_MAX: usize = 64;

/// Most names of [`FromGuest::Secrets`].
pub const SECRETS_MAX: usize = 16;

/// Most bytes of each text of a [`Join`].
pub const JOIN_TEXT_BYTES_MAX: usize = 4096;

/// What the host says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// First frame of every connection: the version the host speaks.
    Hello {
        /// [`VERSION`] of the sender.
        version: u16,
    },
    /// Who this guest is. Answered by [`FromGuest::Done`] once applied.
    Identity(Identity),
    /// Bring file systems to rest: sync, bounded by `timeout_ms`. Answered by [`FromGuest::Quiesced`].
    Quiesce {
        /// Longest wait in milliseconds.
        timeout_ms: u32,
    },
    /// End of a quiesce. Answered by [`FromGuest::Done`].
    Thaw,
    /// Ask for [`FromGuest::Stats`].
    Stats,
    /// Set the wall clock. Answered by [`FromGuest::Done`].
    SetClock {
        /// Nanoseconds since the Unix epoch, UTC.
        unix_ns: u64,
    },
    /// End the guest. Answered by [`FromGuest::Done`] before it goes down.
    Shutdown(Shutdown),
    /// Run a program; this connection now belongs to it.
    Exec(Exec),
    /// Bytes for the program's standard input (at most [`STREAM_CHUNK_BYTES`]).
    Stdin(#[serde(with = "bytes")] Vec<u8>),
    /// End of standard input. A program with a terminal gets an end-of-file character.
    StdinClosed,
    /// Send a signal to the program's process group. Not answered; nothing happens once the program has ended.
    Signal {
        /// Linux signal number, 1 to 64.
        number: u8,
    },
    /// New size of the program's terminal, when it has one. Not answered.
    Resize {
        /// Rows of text.
        rows: u16,
        /// Columns of text.
        columns: u16,
    },
    /// The guest's network, instead of the one before. Answered by [`FromGuest::Done`] once applied: old addresses are
    /// gone by then and the new ones usable. May be sent at any time and any number of times. Since version 2.
    Network(Vec<NetworkInterface>),
    /// Other hardware addresses for interfaces: after a restore a device has another one than the guest's kernel
    /// remembers. Answered by [`FromGuest::Done`] once applied, or by [`FromGuest::Failed`] with nothing changed when
    /// one of the interfaces is missing.
    ///
    /// All are found by the addresses they have when the message comes, so two of them may swap. When no interface has
    /// `from` but one has `to`, it is left alone; when all have what they are to have, nothing is changed, unless the
    /// message only permutes addresses. The IPv6 link-local address follows. What the kernel knew of neighbours on
    /// these interfaces is gone: a [`ToGuest::Network`], which finds them by the new addresses, is to come next.
    /// Since version 3.
    Hardware(Vec<HardwareAddress>),
    /// Run the programs with which the image's software takes note of a new identity: the executables in
    /// `/etc/hearth/identity.d` and `/run/hearth/identity.d`, in the order of their names, one after the other, with
    /// `HEARTH_VM_ID`, `HEARTH_HOSTNAME` and `HEARTH_GENERATION` (32 hexadecimal digits) in their environment.
    /// Answered by [`FromGuest::HooksRan`], at once when there are none. Since version 3.
    RunHooks {
        /// Longest time for all of them together in milliseconds. The process group of one that runs then is killed,
        /// and the rest are not started.
        timeout_ms: u32,
    },
    /// Become a member of a cluster, under the identity given last. Without one: [`FromGuest::Failed`]. Since version 3.
    ///
    /// Without an endpoint the host's agent is the registrar, on this connection: answered by [`FromGuest::Register`],
    /// after which only [`ToGuest::Registered`] or [`ToGuest::RegistrationRefused`] is understood. With one the guest
    /// registers there ([`registrar`]): answered by [`FromGuest::Joined`], or by [`FromGuest::Failed`] when the
    /// registrar refuses, does not answer in time or answers something else. A guest that is registered already, by
    /// the same words under the same identity, is answered from memory: a second registration would be refused.
    Join(Join),
    /// Answer to [`FromGuest::Register`]: it is a member. Answered by [`FromGuest::Done`]. Since version 3.
    Registered {
        /// The number the registrar gave this registration.
        epoch: u64,
    },
    /// Answer to [`FromGuest::Register`]: it is not. Answered by [`FromGuest::Done`]; nothing is remembered. Since
    /// version 3.
    RegistrationRefused {
        /// Why, for people: a lower-case fragment.
        reason: String,
    },
    /// Go on with the root file system of a disk, instead of the one in memory, whose files are given up. Comes before
    /// [`ToGuest::Identity`], which is written down in the new one. Answered by [`FromGuest::Done`] once programs find
    /// themselves there, also when they did before, or by [`FromGuest::Failed`] with nothing changed. Since version 4.
    Root {
        /// The disk, as `/dev/vda`.
        disk: String,
        /// Mount it for reading only.
        read_only: bool,
    },
    /// Ask for [`FromGuest::Secrets`]. Since version 5.
    Secrets,
}

/// What the guest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// Answer to [`ToGuest::Hello`].
    Hello {
        /// [`VERSION`] of the sender.
        version: u16,
        /// Nanoseconds the guest agent has been running. The guest's clock starts some way into the kernel's boot, so
        /// this tells the host when the agent started, which the guest's uptime would not.
        running_ns: u64,
    },
    /// The request was carried out.
    Done,
    /// The request failed; the connection stays usable, except that a failed [`ToGuest::Exec`] ends it.
    Failed {
        /// Linux errno, 0 when there is none.
        errno: i32,
        /// What failed, for people: a lower-case fragment.
        what: String,
    },
    /// Answer to [`ToGuest::Quiesce`].
    Quiesced {
        /// Whether everything was written in time.
        complete: bool,
        /// How long it took, in milliseconds.
        took_ms: u32,
    },
    /// Answer to [`ToGuest::Stats`].
    Stats(Stats),
    /// The program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Bytes the program wrote to standard output.
    Stdout(#[serde(with = "bytes")] Vec<u8>),
    /// Bytes the program wrote to standard error.
    Stderr(#[serde(with = "bytes")] Vec<u8>),
    /// The program ended and what it wrote is delivered; last frame of the connection. When another process holds its
    /// streams open (one it left in the background), what was written before its end is delivered, what comes within a
    /// fifth of a second after it may be, and the other process lives on.
    Exited(Exit),
    /// Answer to [`ToGuest::RunHooks`]. Since version 3.
    HooksRan(HooksRan),
    /// Answer to a [`ToGuest::Join`] without an endpoint: the guest asks to be registered. Since version 3.
    Register(Registration),
    /// Answer to a [`ToGuest::Join`] with an endpoint: the registrar there has taken the guest. Since version 3.
    Joined {
        /// The number the registrar gave this registration.
        epoch: u64,
    },
    /// Answer to [`ToGuest::Secrets`]: the names of what programs of the guest say they hold that no copy of it is to have,
    /// the first [`SECRETS_MAX`] of them. Since version 5.
    Secrets(Vec<String>),
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It exited with this code.
    Code(u8),
    /// It was ended by this signal.
    Signal(u8),
    /// It ran past its time-out and was killed.
    TimedOut,
}

/// How to end the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shutdown {
    /// SIGTERM to all, sync, power off.
    PowerOff,
    /// SIGTERM to all, sync, reboot.
    Reboot,
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Exec {
    /// Program and arguments; a program without a slash is searched in the environment's `PATH`.
    pub argv: Vec<String>,
    /// `NAME=value` words added to (or replacing those of) the agent's own environment.
    pub env: Vec<String>,
    /// Working directory; empty means `/`.
    pub cwd: String,
    /// Milliseconds until the program's process group is killed; 0 means never.
    pub timeout_ms: u32,
    /// Give it a terminal (standard input, output and error are then one stream, [`FromGuest::Stdout`]).
    pub terminal: Option<TerminalSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Rows of text.
    pub rows: u16,
    /// Columns of text.
    pub columns: u16,
}

/// Who a guest is: applied before anything else reaches it from outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The VM's id, as the host prints it.
    pub vm_id: String,
    /// Host name to set.
    pub hostname: String,
    /// 128-bit VM generation id: differs for every launch.
    pub generation: [u8; 16],
    /// 64 fresh random bytes, credited to the kernel's pool.
    pub entropy: [[u8; 32]; 2],
    /// Wall clock: nanoseconds since the Unix epoch, UTC; 0 leaves it alone.
    pub unix_ns: u64,
    /// Interfaces to bring up.
    pub interfaces: Vec<Interface>,
}

/// One network interface of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Hardware address it is found by.
    pub mac: [u8; 6],
    /// Addresses with prefix lengths.
    pub addresses: Vec<Address>,
    /// Bytes per packet above the link layer; 0 leaves it alone.
    pub mtu: u16,
}

/// An address with its prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Address {
    /// IPv4 address, prefix length 0 to 32.
    V4([u8; 4], u8),
    /// IPv6 address, prefix length 0 to 128.
    V6([u8; 16], u8),
}

/// One network interface of a guest with its way out.
///
/// The interface comes up with exactly these addresses, besides its IPv6 link-local one, and takes no configuration
/// from the link (router advertisements). Gateways become permanent neighbours and are on the link whatever the
/// addresses' prefixes say. For each family the first interface with a gateway of it has the guest's default route;
/// a default route that an earlier message made and this one does not is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInterface {
    /// Hardware address it is found by.
    pub mac: [u8; 6],
    /// Bytes per packet above the link layer; 0 leaves it alone.
    pub mtu: u16,
    /// Addresses with prefix lengths. None: the interface is up with its link-local address only.
    pub addresses: Vec<Address>,
    /// Routers on its link, the preferred one of each family first.
    pub gateways: Vec<Gateway>,
}

/// A router on a guest's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    /// Address it is known by.
    pub address: GatewayAddress,
    /// Hardware address that packets to it are sent to.
    pub mac: [u8; 6],
}

/// The address of a [`Gateway`]; it serves that family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GatewayAddress {
    /// IPv4 address.
    V4([u8; 4]),
    /// IPv6 address, link-local or not.
    V6([u8; 16]),
}

/// Another hardware address for an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwareAddress {
    /// The one it is found by.
    pub from: [u8; 6],
    /// The one it gets.
    pub to: [u8; 6],
}

/// What became of the programs of a [`ToGuest::RunHooks`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct HooksRan {
    /// How many were started.
    pub ran: u16,
    /// Those that did not end with code 0, or were not started; at most [`HOOKS_MAX`].
    pub failed: Vec<HookFailure>,
}

/// A hook that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookFailure {
    /// File name.
    pub name: String,
    /// What became of it, for people: a lower-case fragment.
    pub reason: String,
}

/// Membership in a cluster, as the host offers it to a guest. Texts are at most [`JOIN_TEXT_BYTES_MAX`] bytes each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The cluster.
    pub cluster_id: String,
    /// Who the guest is in it.
    pub executor_id: String,
    /// Shows the registrar that the guest may join.
    pub token: String,
    /// Where the registrar listens (TCP); none: it is the host's agent, on this connection.
    pub endpoint: Option<Endpoint>,
    /// Longest time to reach an endpoint and hear its answer, in milliseconds. Not looked at without one.
    pub timeout_ms: u32,
}

/// An address and TCP port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    /// IPv4.
    V4([u8; 4], u16),
    /// IPv6; not link-local, which would need an interface as well.
    V6([u8; 16], u16),
}

/// A guest's request to be registered as a member of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// [`Join::executor_id`].
    pub executor_id: String,
    /// [`Join::cluster_id`].
    pub cluster_id: String,
    /// [`Identity::vm_id`] of the identity given last.
    pub vm_id: String,
    /// [`Identity::generation`] of the identity given last.
    pub generation: [u8; 16],
    /// [`Join::token`].
    pub token: String,
}

/// What the guest says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Stats {
    /// Nanoseconds since the guest kernel started (CLOCK_BOOTTIME).
    pub uptime_ns: u64,
    /// Wall clock, nanoseconds since the Unix epoch.
    pub unix_ns: u64,
    /// Bytes of memory the kernel manages.
    pub memory_total_bytes: u64,
    /// Bytes of memory available without swapping.
    pub memory_available_bytes: u64,
    /// Processes, kernel threads not counted.
    pub processes: u32,
    /// Load average over one minute, in hundredths.
    pub load1_hundredths: u32,
    /// Programs started by [`Exec`] that have not ended.
    pub execs_running: u32,
}

/// Byte strings instead of sequences of integers: one copy, not one call for each byte.
mod bytes {
    use alloc::vec::Vec;
    use core::fmt;
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Vec<u8>;
            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("bytes")
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }
            fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        from.deserialize_bytes(Bytes)
    }
}
