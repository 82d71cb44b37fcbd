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
//! Both sides speak [`VERSION`] and the one before it; the lower of the two Hellos is used.
//! Enum variants are only ever appended: postcard encodes a variant as its index.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

pub mod frame;

/// Version of this protocol that this build speaks.
///
/// * 1: identity, programs, quiesce, stats, clock, shutdown.
/// * 2: [`ToGuest::Network`].
pub const VERSION: u16 = 2;

/// The oldest version this build still understands.
pub const VERSION_MIN: u16 = 1;

/// vsock port the guest agent listens on.
pub const PORT: u32 = 1024;

/// Longest frame body in bytes. One MiB bounds what either side has to buffer for a frame it has not read yet.
pub const FRAME_BYTES_MAX: u32 = 1 << 20;

/// Most bytes of a stream put in one frame: small enough that several execs share one vsock fairly.
pub const STREAM_CHUNK_BYTES: usize = 32 * 1024;

/// Most words (`argv` plus `env`) of one [`Exec`].
pub const EXEC_WORDS_MAX: usize = 4096;

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
