//! Bytes of another host, before anything of it is known: a certificate is refused or understood.
#![no_main]

use hearth::wire::certificate::{AgentCertificate, CERTIFICATE_BYTES_MAX};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(read) = AgentCertificate::read(bytes) {
        assert!(bytes.len() <= CERTIFICATE_BYTES_MAX);
        // What counts is what is there: key and proof are pieces of it.
        let within = |piece: &[u8]| bytes.windows(piece.len()).any(|window| window == piece);
        assert!(within(read.public_key) && within(&read.proof.to_extension()));
    }
});
