//! Frames as an honest and as a hostile guest sends them: pure builders, for the `probe` program that tests run inside
//! guests, and for tests that write frames into a tap themselves.
#![forbid(unsafe_code)]

pub mod forge;
pub mod frames;
