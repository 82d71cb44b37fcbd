//! The stream machine, step by step and in random histories.

use super::*;
use proptest::prelude::*;

const BUFFER: u32 = 1000;

fn header(operation: Operation, length: u32, flags: u32) -> Header {
    Header {
        source_cid: 3,
        destination_cid: 2,
        source_port: 1024,
        destination_port: 1 << 30,
        length,
        kind: 1,
        operation: operation as u16,
        flags,
        buffer: BUFFER,
        forwarded: 0,
    }
}

fn hear(stream: &mut Stream, operation: Operation) -> Reaction {
    stream.packet(operation, &header(operation, 0, 0))
}

fn say(stream: &mut Stream) -> Option<Operation> {
    let control = stream.control()?;
    stream.said(control, 0);
    Some(control.operation)
}

fn open() -> Stream {
    let mut stream = Stream::ask(BUFFER);
    assert_eq!(say(&mut stream), Some(Operation::Request));
    assert_eq!(hear(&mut stream, Operation::Response), Reaction::Accepted);
    stream
}

#[test]
fn the_host_asks_and_the_guest_accepts_or_refuses() {
    assert_eq!(open().stage(), Stage::Open);
    let mut refused = Stream::ask(BUFFER);
    assert_eq!(say(&mut refused), Some(Operation::Request));
    assert_eq!(hear(&mut refused, Operation::Reset), Reaction::Refused);
    assert!(refused.is_finished());
}

#[test]
fn the_guest_asks_and_hears_before_it_gets_bytes() {
    let mut stream = Stream::accept(BUFFER, &header(Operation::Request, 0, 0));
    assert_eq!(stream.sendable(), 0);
    assert_eq!(say(&mut stream), Some(Operation::Response));
    assert_eq!(stream.sendable(), BUFFER);
}

#[test]
fn a_stream_the_guest_was_not_told_of_ends_silently() {
    let mut stream = Stream::ask(BUFFER);
    stream.abort();
    assert!(stream.is_finished());
    let mut told = Stream::ask(BUFFER);
    say(&mut told);
    told.abort();
    assert_eq!(say(&mut told), Some(Operation::Reset));
    assert!(told.is_finished());
}

#[test]
fn each_direction_closes_alone() {
    let mut stream = open();
    stream.host_sent_all();
    assert_eq!(stream.control(), Some(Control { operation: Operation::Shutdown, flags: SHUTDOWN_SEND }));
    say(&mut stream);
    assert_eq!((stream.control(), stream.sendable()), (None, 0));
    let data = header(Operation::Data, 10, 0);
    assert_eq!(stream.packet(Operation::Data, &data), Reaction::Data(10));
    assert_eq!(
        stream.packet(Operation::Shutdown, &header(Operation::Shutdown, 0, SHUTDOWN_SEND)),
        Reaction::EndsChanged
    );
    assert!(!stream.guest_closed());
    // A sender that promised to send no more and does is cut off.
    assert_eq!(stream.packet(Operation::Data, &data), Reaction::Gone);
    assert_eq!(say(&mut stream), Some(Operation::Reset));
}

#[test]
fn the_last_word_follows_both_directions() {
    let mut stream = open();
    stream.packet(Operation::Shutdown, &header(Operation::Shutdown, 0, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    assert_eq!(stream.control(), None);
    stream.finish();
    assert_eq!(say(&mut stream), Some(Operation::Reset));
    assert!(stream.is_finished());

    let mut stream = open();
    stream.host_sent_all();
    stream.host_stopped_receiving();
    assert_eq!(
        stream.control(),
        Some(Control { operation: Operation::Shutdown, flags: SHUTDOWN_SEND | SHUTDOWN_RECEIVE })
    );
    say(&mut stream);
    assert_eq!(hear(&mut stream, Operation::Reset), Reaction::Gone);
    assert!(stream.is_finished());
}

#[test]
fn credit_ends_at_the_buffer_in_both_directions() {
    let mut stream = open();
    assert_eq!(stream.sendable(), BUFFER);
    stream.said(Control { operation: Operation::Data, flags: 0 }, BUFFER);
    assert_eq!(stream.sendable(), 0);
    let question = stream.credit_question().unwrap();
    stream.said(question, 0);
    assert_eq!(stream.credit_question(), None, "asked once");
    let mut update = header(Operation::CreditUpdate, 0, 0);
    update.forwarded = 400;
    assert_eq!(stream.packet(Operation::CreditUpdate, &update), Reaction::None);
    assert_eq!(stream.sendable(), 400);

    let mut at_limit = open();
    assert_eq!(at_limit.packet(Operation::Data, &header(Operation::Data, BUFFER, 0)), Reaction::Data(BUFFER));
    let mut above = open();
    assert_eq!(above.packet(Operation::Data, &header(Operation::Data, BUFFER + 1, 0)), Reaction::Gone);
    at_limit.forwarded(BUFFER / 2 - 1);
    assert_eq!(at_limit.control(), None);
    at_limit.forwarded(1);
    assert_eq!(say(&mut at_limit), Some(Operation::CreditUpdate));
    assert_eq!(at_limit.control(), None);
}

#[test]
fn a_guest_that_claims_bytes_it_never_got_gets_none() {
    let mut stream = open();
    let mut lie = header(Operation::CreditUpdate, 0, 0);
    lie.forwarded = 1;
    stream.packet(Operation::CreditUpdate, &lie);
    assert_eq!(stream.sendable(), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Packet(u16, u32, u32, u32),
    HostSentAll,
    HostStopped,
    Abort,
    Finish,
    Say,
    Send(u32),
    Forward(u32),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1_u16..8, 0_u32..1200, 0_u32..4, 0_u32..2000).prop_map(|(o, l, f, w)| Step::Packet(o, l, f, w)),
        1 => Just(Step::HostSentAll),
        1 => Just(Step::HostStopped),
        1 => Just(Step::Abort),
        1 => Just(Step::Finish),
        6 => Just(Step::Say),
        3 => (1_u32..1500).prop_map(Step::Send),
        3 => (1_u32..1500).prop_map(Step::Forward),
    ]
}

proptest! {
    /// Whatever the guest and the host do: one RST at most and nothing after it, no data after SHUTDOWN, never more
    /// bytes under way than the receiver has room for, and what is owed can be said.
    #[test]
    fn every_history_keeps_the_protocol(ours: bool, steps in proptest::collection::vec(any_step(), 0..64)) {
        let mut stream =
            if ours { Stream::ask(BUFFER) } else { Stream::accept(BUFFER, &header(Operation::Request, 0, 0)) };
        let (mut heard_room, mut sent, mut held) = (if ours { 0 } else { BUFFER }, 0_u32, 0_u32);
        let (mut resets, mut shutdown) = (0, 0);
        for step in steps {
            match step {
                Step::Packet(operation, length, flags, forwarded) => {
                    let mut header = header(Operation::Request, length, flags);
                    (header.operation, header.forwarded) = (operation, forwarded);
                    let before = stream.stage();
                    let reaction = stream.packet(header.operation().unwrap(), &header);
                    if before != Stage::Over {
                        heard_room = BUFFER.saturating_sub(sent.wrapping_sub(forwarded));
                    }
                    if let Reaction::Data(count) = reaction {
                        held += count;
                        prop_assert!(held <= BUFFER);
                    }
                }
                Step::HostSentAll => stream.host_sent_all(),
                Step::HostStopped => stream.host_stopped_receiving(),
                Step::Abort => { stream.abort(); }
                Step::Finish => stream.finish(),
                Step::Say => {
                    let before = stream.clone();
                    if let Some(control) = stream.control().or(stream.credit_question()) {
                        prop_assert_eq!(resets, 0, "nothing is said after a reset");
                        stream.said(control, 0);
                        resets += u32::from(control.operation == Operation::Reset);
                        if control.operation == Operation::Shutdown {
                            prop_assert_ne!(control.flags & !shutdown, 0);
                            shutdown = control.flags;
                        }
                        prop_assert_ne!(&before, &stream, "saying something settles it");
                    }
                }
                Step::Send(count) => {
                    let count = count.min(stream.sendable());
                    if count > 0 {
                        prop_assert_eq!((resets, shutdown & SHUTDOWN_SEND), (0, 0));
                        prop_assert!(count <= heard_room);
                        heard_room -= count;
                        sent = sent.wrapping_add(count);
                        stream.said(Control { operation: Operation::Data, flags: 0 }, count);
                    }
                }
                Step::Forward(count) => {
                    let count = count.min(held);
                    held -= count;
                    stream.forwarded(count);
                }
            }
        }
        // Everything owed comes to an end.
        for _ in 0..8 {
            if let Some(control) = stream.control() {
                stream.said(control, 0);
            }
        }
        prop_assert_eq!(stream.control(), None);
    }
}
