//! The floors of the crate that read what others send, compiled again for fuzzing: with coverage counters, every check
//! on, and without the agent's dependencies, which would take most of the time. The files beside this one are links to
//! the crate's.

pub mod clock;
pub mod ids;
pub mod machine;
pub mod report;
pub mod saved;
pub mod sys;
pub mod units;
pub mod wire;
