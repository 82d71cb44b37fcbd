//! A guest sends packets, the host does what hosts do, and the stream machine keeps the protocol: nothing after a
//! reset, no data after SHUTDOWN, never more bytes held than the buffer has room for.
#![no_main]

use hearth::machine::virtio::vsock::packet::{Header, Operation};
use hearth::machine::virtio::vsock::stream::{Control, Reaction, Stage, Stream};
use libfuzzer_sys::fuzz_target;

const BUFFER: u32 = 4096;

fuzz_target!(|input: (bool, Vec<(u8, u32, [u8; 32], [u8; 12])>)| {
    let (ours, steps) = input;
    let first = Header::from_bytes(&[0x55; 44]);
    let mut stream = if ours { Stream::ask(BUFFER) } else { Stream::accept(BUFFER, &first) };
    let (mut held, mut reset, mut shut) = (0_u32, false, false);
    for (action, number, front, back) in steps {
        match action % 8 {
            0..3 => {
                let mut bytes = [0; 44];
                bytes[..32].copy_from_slice(&front);
                bytes[32..].copy_from_slice(&back);
                let header = Header::from_bytes(&bytes);
                assert_eq!(header.to_bytes(), bytes);
                let Some(operation) = header.operation() else { continue };
                if let Reaction::Data(count) = stream.packet(operation, &header) {
                    held += count;
                    assert!(held <= BUFFER);
                }
            }
            3 => stream.host_sent_all(),
            4 => stream.host_stopped_receiving(),
            5 => {
                let count = number.min(held);
                held -= count;
                stream.forwarded(count);
            }
            6 => {
                let count = number.min(stream.sendable());
                if count > 0 {
                    assert!(!reset && !shut && stream.stage() == Stage::Open);
                    stream.said(Control { operation: Operation::Data, flags: 0 }, count);
                }
            }
            _ => {
                if number == 0 {
                    stream.finish();
                }
                if let Some(control) = stream.control().or(stream.credit_question()) {
                    assert!(!reset);
                    stream.said(control, 0);
                    reset = control.operation == Operation::Reset;
                    shut |= control.operation == Operation::Shutdown && control.flags & 2 != 0;
                }
            }
        }
    }
});
