//! What a volume's server says, up to its first replies: the handshake asks for no more than it uses, and comes to an end;
//! nothing of a server's choosing makes the client say more than its one option.
#![no_main]

use hearth::machine::virtio::block::nbd::{Handshake, REPLY_BYTES, Reply, Step};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, u8, &[u8])| {
    let (greeted, piece, mut rest) = input;
    let mut handshake = Handshake::new();
    let mut said = 0;
    if greeted {
        assert!(matches!(handshake.take(b"NBDMAGICIHAVEOPT\0\x03"), Ok(Step::Say(_))));
        said += 1;
    }
    let piece = usize::from(piece).max(1);
    while !rest.is_empty() {
        let wants = handshake.wants();
        assert!((1..=4096).contains(&wants));
        let (now, later) = rest.split_at(piece.min(wants).min(rest.len()));
        rest = later;
        match handshake.take(now) {
            Ok(Step::More) => {}
            Ok(Step::Say(bytes)) => {
                said += 1;
                assert!(said == 1 && bytes.len() == 28);
            }
            Ok(Step::Ready(export)) => {
                assert!(export.block_bytes_min.is_power_of_two() && export.block_bytes_min <= export.block_bytes_max);
                break;
            }
            Err(_) => return,
        }
    }
    for reply in rest.as_chunks::<REPLY_BYTES>().0 {
        let _ = Reply::parse(reply);
    }
});
