//! Bytes from the other process: headers and bodies of the control protocol, and frames of a filling connection, are
//! refused or understood.
#![no_main]

use hearth::wire::control::{Answer, Request, StartMessage};
use hearth::wire::filling::{FRAME_BYTES, ToAgent, ToVmm};
use hearth::wire::frame::{BODY_BYTES_MAX, HEADER_BYTES, body_length, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([u8; HEADER_BYTES], [u8; FRAME_BYTES], Vec<u8>)| {
    let (header, filling, body) = input;
    if let Ok(said) = ToAgent::from_bytes(filling) {
        assert_eq!(said.to_bytes(), filling);
    }
    if let Ok(said) = ToVmm::from_bytes(filling) {
        assert_eq!(said.to_bytes(), filling);
    }
    for length in [body_length::<Request>(header), body_length::<Answer>(header)].into_iter().flatten() {
        assert!(length <= BODY_BYTES_MAX as usize);
    }
    if let Ok(request) = decode::<Request>(&body) {
        let _ = encode(&request);
    }
    if let Ok(answer) = decode::<Answer>(&body) {
        let _ = encode(&answer);
    }
    if let Ok(start) = StartMessage::parse(&body) {
        let _ = start.to_bytes();
    }
});
