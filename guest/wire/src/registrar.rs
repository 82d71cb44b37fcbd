//! What a guest and a registrar elsewhere say to each other over TCP: one line each way.
//!
//! ```text
//!   guest      REGISTER {"executor_id":"…","cluster_id":"…","vm":"…","generation":"<32 hex digits>","token":"…"}
//!   registrar  ACK {"epoch":7}        or        REFUSED {"reason":"…"}
//! ```
//!
//! Lines end with a line feed; after the verb and a blank comes one flat JSON object ([`crate::json`]). Other members
//! than these are passed over. No I/O here.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::Registration;
use crate::json::{self, Value};

/// Longest answer of a registrar, its line feed included.
pub const ANSWER_BYTES_MAX: usize = 4096;

/// What a registrar answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The guest is a member.
    Registered {
        /// The number of this registration.
        epoch: u64,
    },
    /// It is not.
    Refused {
        /// Why, for people.
        reason: String,
    },
}

/// A line that is no answer of a registrar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoAnswer;

impl fmt::Display for NoAnswer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("line is no answer of a registrar")
    }
}

impl core::error::Error for NoAnswer {}

/// The guest's line, with its line feed.
pub fn register_line(registration: &Registration) -> Vec<u8> {
    let Registration { executor_id, cluster_id, vm_id, generation, token } = registration;
    let generation = json::hex(generation);
    let mut line = Vec::from(*b"REGISTER ");
    let members = [
        ("executor_id", executor_id.as_str()),
        ("cluster_id", cluster_id),
        ("vm", vm_id),
        ("generation", &generation),
        ("token", token),
    ];
    json::push_object(&mut line, &members);
    line.push(b'\n');
    line
}

/// Reads a registrar's line, without its line feed.
pub fn read_answer(line: &[u8]) -> Result<Answer, NoAnswer> {
    if let Some(object) = line.strip_prefix(b"ACK ") {
        return match json::member(object, "epoch") {
            Some(Value::Bare(number)) => epoch(number).map(|epoch| Answer::Registered { epoch }).ok_or(NoAnswer),
            Some(Value::Text(_)) | None => Err(NoAnswer),
        };
    }
    match line.strip_prefix(b"REFUSED ").and_then(|object| json::member(object, "reason")) {
        Some(Value::Text(reason)) => Ok(Answer::Refused { reason }),
        Some(Value::Bare(_)) | None => Err(NoAnswer),
    }
}

fn epoch(number: &[u8]) -> Option<u64> {
    core::str::from_utf8(number).ok()?.parse().ok()
}
