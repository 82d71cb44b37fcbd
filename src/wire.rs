//! Floor 2: what the processes say to each other, and what hosts show each other. Types and their encoding only: no sockets
//! here.
//! The protocols' states and rules are in `PROTOCOL.md`.
#![doc = include_str!("wire/PROTOCOL.md")]
#![forbid(unsafe_code)]

pub mod certificate;
pub mod console_ring;
pub mod control;
pub mod filling;
pub mod frame;
pub mod intake;
pub mod last_words;
pub mod link;
pub mod nbd;
pub mod packed;
pub mod refusal;
pub mod stream;
pub mod volumed;
