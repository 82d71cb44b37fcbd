//! The agent as a service on the host: everything that needs no guest of its own.
//!
//! Each test starts the built program on a unix socket and speaks the protocol to it as the host's agent does.

#![expect(clippy::wildcard_enum_match_arm, reason = "a test refuses every other answer")]
#![expect(clippy::disallowed_methods, reason = "a test waits by the host's own clock")]

mod service {
    pub(crate) mod agent;
    mod frames;
    mod hardware;
    mod hooks;
    mod identity;
    mod join;
    mod limits;
    mod network;
    mod programs;
    mod requests;
    mod streams;
    mod terminals;
}
