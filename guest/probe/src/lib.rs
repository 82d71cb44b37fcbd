//! Frames as an honest and as a hostile guest sends them, numbered datagrams and what became of them: pure, for the
//! `probe` program that tests run inside guests, and for tests that write frames into a tap themselves.
#![forbid(unsafe_code)]

pub mod datagram;
pub mod forge;
pub mod frames;
pub mod gaps;
pub mod numbers;
