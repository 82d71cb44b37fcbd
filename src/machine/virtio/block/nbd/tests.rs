//! Against the protocol's own bytes, and against any other.

use super::*;
use proptest::prelude::*;

fn greeting(flags: u16) -> Vec<u8> {
    [&GREETING.to_be_bytes()[..], &OPTION.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn reply(kind: u32, body: &[u8]) -> Vec<u8> {
    let bytes = u32::try_from(body.len()).unwrap();
    let head = [&OPTION_REPLY.to_be_bytes()[..], &OPT_GO.to_be_bytes(), &kind.to_be_bytes(), &bytes.to_be_bytes()];
    [&head.concat(), body].concat()
}

fn export(bytes: u64, flags: u16) -> Vec<u8> {
    reply(REP_INFO, &[&INFO_EXPORT.to_be_bytes()[..], &bytes.to_be_bytes(), &flags.to_be_bytes()].concat())
}

fn blocks(min: u32, max: u32) -> Vec<u8> {
    let body = [&INFO_BLOCK_SIZE.to_be_bytes()[..], &min.to_be_bytes(), &4096_u32.to_be_bytes(), &max.to_be_bytes()];
    reply(REP_INFO, &body.concat())
}

/// What all of it comes to, cut into pieces of at most `piece`.
fn run(all: &[u8], piece: usize) -> (Vec<u8>, Result<Option<Export>, HandshakeError>) {
    let (mut handshake, mut said, mut rest) = (Handshake::new(), Vec::new(), all);
    while !rest.is_empty() {
        let (now, later) = rest.split_at(piece.min(handshake.wants()).min(rest.len()));
        rest = later;
        match handshake.take(now) {
            Ok(Step::More) => {}
            Ok(Step::Say(bytes)) => said.extend(bytes),
            Ok(Step::Ready(export)) => return (said, Ok(Some(export))),
            Err(error) => return (said, Err(error)),
        }
    }
    (said, Ok(None))
}

#[test]
fn a_handshake_as_the_protocol_has_it() {
    let extra = reply(REP_INFO, &[0, 2, b'x']);
    let all = [greeting(3), export(1 << 20, 0x165), extra, blocks(512, 1 << 25), reply(REP_ACK, &[])].concat();
    for piece in [1, 7, 4096] {
        let (said, result) = run(&all, piece);
        let wanted = Export { bytes: 1 << 20, flags: 0x165, block_bytes_min: 512, block_bytes_max: 1 << 25 };
        assert_eq!(result, Ok(Some(wanted)));
        assert_eq!(said, b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x08\0\0\0\0\0\x01\0\x03");
    }
    // One that says little.
    let (_, result) = run(&[greeting(1), export(5, 0x164), reply(REP_ACK, &[])].concat(), 100);
    let wanted = Export { bytes: 5, flags: 0, block_bytes_min: 1, block_bytes_max: 32 << 20 };
    assert_eq!(result, Ok(Some(wanted)));
}

#[test]
fn what_is_no_handshake_is_refused() {
    let bad = |all: &[Vec<u8>]| run(&all.concat(), 64).1.unwrap_err();
    assert_eq!(bad(&[vec![0; 18]]), HandshakeError::Greeting);
    assert_eq!(bad(&[greeting(2)]), HandshakeError::NotFixed);
    assert_eq!(bad(&[greeting(3), vec![9; 20]]), HandshakeError::Reply);
    assert_eq!(bad(&[greeting(3), reply(REP_ACK, &[])]), HandshakeError::NoExport);
    assert_eq!(bad(&[greeting(3), reply(2, &[])]), HandshakeError::Reply);
    assert_eq!(bad(&[greeting(3), reply(REP_INFO, &[0, 0, 1])]), HandshakeError::Reply);
    assert_eq!(bad(&[greeting(3), reply(REP_INFO, &[0, 3, 1])]), HandshakeError::Reply);
    assert_eq!(bad(&[greeting(3), reply(REP_INFO, &[0])]), HandshakeError::Reply);
    assert_eq!(bad(&[greeting(3), reply(REP_ERROR | 6, b"no")]), HandshakeError::Refused { kind: REP_ERROR | 6 });
    let sizes = bad(&[greeting(3), export(5, 1), blocks(3, 100), reply(REP_ACK, &[])]);
    assert_eq!(sizes, HandshakeError::BlockSizes { min: 3, max: 100 });
    let mut long = reply(REP_INFO, &[]);
    long[16..20].copy_from_slice(&4097_u32.to_be_bytes());
    assert_eq!(bad(&[greeting(3), long]), HandshakeError::Reply);
    assert_eq!(bad(&[greeting(3), export(5, 1).repeat(17)]), HandshakeError::Flood);
}

#[test]
fn a_request_as_the_protocol_has_it() {
    let request = Request { command: Command::WriteZeroes, flags: NO_HOLE, handle: 7, offset: 1 << 40, bytes: 4096 };
    let bytes = request.to_bytes();
    assert_eq!(bytes, *b"\x25\x60\x95\x13\0\x02\0\x06\0\0\0\0\0\0\0\x07\0\0\x01\0\0\0\0\0\0\0\x10\0");
}

#[test]
fn replies_and_their_errors() {
    let reply = |error: u32| {
        let mut bytes = *b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x09";
        bytes[4..8].copy_from_slice(&error.to_be_bytes());
        Reply::parse(&bytes).unwrap()
    };
    assert_eq!(reply(0), Reply { handle: 9, verdict: Verdict::Done });
    assert_eq!(reply(1).verdict, Verdict::Fenced);
    assert_eq!(reply(108).verdict, Verdict::ShutDown);
    assert_eq!(reply(28).verdict, Verdict::Failed(28));
    assert_eq!(Reply::parse(&[0x66; REPLY_BYTES]), Err(NoReply { found: 0x6666_6666 }));
}

proptest! {
    #[test]
    fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..400), piece in 1_usize..50) {
        let _ = run(&bytes, piece);
        let _ = run(&[greeting(3), bytes].concat(), piece);
    }

    #[test]
    fn replies_of_any_kind_end(
        replies in proptest::collection::vec((0_u32..6, proptest::collection::vec(0_u8..5, 0..20)), 0..30),
    ) {
        let replies = replies.iter().flat_map(|(kind, body)| reply(*kind, body));
        let (said, result) = run(&greeting(3).into_iter().chain(replies).collect::<Vec<_>>(), 64);
        prop_assert_eq!(said.len(), 28);
        if let Ok(Some(export)) = result {
            prop_assert!(export.block_bytes_min <= export.block_bytes_max);
        }
    }

    #[test]
    fn any_reply_is_read_or_refused(bytes: [u8; REPLY_BYTES]) {
        prop_assert_eq!(Reply::parse(&bytes).is_ok(), bytes[..4] == SIMPLE_REPLY.to_be_bytes());
    }
}
