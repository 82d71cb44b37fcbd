//! Hearth: a per-host microVM agent for Linux/KVM.
#![doc = include_str!("ARCHITECTURE.md")]
#![doc = include_str!("THREATS.md")]
// The fuzz targets (tests/fuzz) compile the floors that read what others send, and do without the rest, whose
// dependencies would take most of the time.

// Floor 0: vocabulary. std and serde; no I/O; the only clock reads are in `clock`.
mod base64;
pub mod clock;
pub mod ids;
pub mod lease;
pub mod report;
pub mod saved;
pub mod signing;
#[cfg(not(fuzzing))]
mod tls;
pub mod units;

// Floor 1: the kernel. The only unsafe code; no policy, no logging.
pub mod sys;

// Floor 2: the subjects. Siblings: none imports another.
pub mod bundle;
pub mod container;
pub mod machine;
#[cfg(not(fuzzing))]
pub mod net;
pub mod volume;
pub mod wire;

// Floor 3: the processes. They meet in `wire` and nowhere else.
#[cfg(not(fuzzing))]
pub mod agent;
#[cfg(not(fuzzing))]
pub mod vmm;
#[cfg(not(fuzzing))]
pub mod volumed;

// Floor 4: the doors.
#[cfg(not(fuzzing))]
pub mod api;
#[cfg(not(fuzzing))]
pub mod ctl;

// Beside the floors: words on the command line.
#[cfg(not(fuzzing))]
pub mod cli;

// Beside the floors: a host that is not there, for tests.
#[cfg(all(not(fuzzing), any(test, feature = "sim")))]
pub mod sim;
