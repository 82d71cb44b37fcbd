//! The codec gives back what it was given, in any cut, and never panics.

use super::*;
use crate::api::types::{ErrorDetail, RetryHint};
use proptest::prelude::*;

fn error(message: String) -> Frame {
    let error = ErrorDetail { code: "gone".to_owned(), message, detail: None, retry: RetryHint::Never };
    Frame::Error(Box::new(ErrorBody { error }))
}

fn frames() -> impl Strategy<Value = Frame> {
    let bytes = || proptest::collection::vec(any::<u8>(), 1..200).prop_map(Bytes::from);
    prop_oneof![
        bytes().prop_map(Frame::Stdin),
        bytes().prop_map(Frame::Stdout),
        bytes().prop_map(Frame::Stderr),
        (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| Frame::Resize(TerminalSize { rows, columns })),
        any::<u8>().prop_map(|code| Frame::Exit(Exit::Code(code))),
        any::<u8>().prop_map(|number| Frame::Exit(Exit::Signal(number))),
        Just(Frame::Exit(Exit::TimedOut)),
        Just(Frame::StdinClosed),
        ".{0,50}".prop_map(error),
        (1..=SIGNAL_MAX).prop_map(Frame::Signal),
    ]
}

fn header(kind: u8, length: usize) -> BytesMut {
    let [l0, l1, l2, ..] = length.to_le_bytes();
    BytesMut::from([kind, l0, l1, l2].as_slice())
}

#[test]
fn the_length_is_bounded() {
    assert!(matches!(Frame::decode(&mut header(1, PAYLOAD_BYTES_MAX)), Ok(None)));
    let over = PAYLOAD_BYTES_MAX + 1;
    assert!(matches!(Frame::decode(&mut header(1, over)), Err(StreamError::Length { length }) if length == over));
}

#[test]
fn unknown_kinds_are_refused() {
    for kind in [0, 9, 255] {
        assert!(matches!(Frame::decode(&mut header(kind, 0)), Err(StreamError::Kind { kind: k }) if k == kind));
    }
}

#[test]
fn malformed_payloads_are_refused() {
    for (kind, payload) in [
        (4, &[1, 0, 2][..]),
        (5, &[]),
        (5, &[0]),
        (5, &[3, 0]),
        (5, &[2, 1]),
        (6, &[0]),
        (7, b"{}"),
        (8, &[]),
        (8, &[0]),
        (8, &[65]),
    ] {
        let mut buffer = header(kind, payload.len());
        buffer.extend_from_slice(payload);
        assert!(Frame::decode(&mut buffer).is_err(), "kind {kind}, payload {payload:?}");
    }
}

#[test]
fn long_bytes_are_cut_and_empty_ones_left_out() {
    let mut buffer = BytesMut::new();
    Frame::Stdout(Bytes::from(vec![7; PAYLOAD_BYTES_MAX + 1])).encode(&mut buffer);
    Frame::Stderr(Bytes::new()).encode(&mut buffer);
    let mut lengths = Vec::new();
    while let Some(Frame::Stdout(bytes)) = Frame::decode(&mut buffer).unwrap() {
        lengths.push(bytes.len());
    }
    assert_eq!(lengths, [PAYLOAD_BYTES_MAX, 1]);
    assert!(buffer.is_empty());
}

#[test]
fn an_error_too_long_keeps_its_code() {
    let mut buffer = BytesMut::new();
    error("x".repeat(PAYLOAD_BYTES_MAX)).encode(&mut buffer);
    let Some(Frame::Error(body)) = Frame::decode(&mut buffer).unwrap() else { panic!("an error frame") };
    assert_eq!(body.error.code, "gone");
}

proptest! {
    #[test]
    fn frames_are_read_back_in_any_cut(sent in proptest::collection::vec(frames(), 0..8), cut in 1_usize..50) {
        let mut bytes = BytesMut::new();
        sent.iter().for_each(|frame| frame.encode(&mut bytes));
        let (mut buffer, mut read) = (BytesMut::new(), Vec::new());
        for chunk in bytes.chunks(cut) {
            buffer.extend_from_slice(chunk);
            while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
                read.push(frame);
            }
        }
        prop_assert_eq!(read, sent);
        prop_assert!(buffer.is_empty());
    }

    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), kind in 0_u8..10, length in 0_usize..20) {
        let mut buffer = BytesMut::from(bytes.as_slice());
        let _ = Frame::decode(&mut buffer);
        let mut buffer = header(kind, length);
        buffer.extend_from_slice(&bytes);
        while let Ok(Some(_)) = Frame::decode(&mut buffer) {}
    }
}
