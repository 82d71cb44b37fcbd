//! Bytes from a guest, or from an agent that is not one: refused or understood, never held beyond one frame, and what
//! was understood is the same when it is said again.
#![no_main]

use hearth_guest_wire::frame::{Decoder, encode};
use hearth_guest_wire::{FromGuest, ToGuest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, Vec<u8>)| {
    let (at, bytes) = input;
    let (early, late) = bytes.split_at(usize::from(at).min(bytes.len()));
    let mut from_guest = Decoder::new();
    let mut to_guest = Decoder::new();
    for part in [early, late] {
        from_guest.push(part);
        while let Ok(Some(message)) = from_guest.next::<FromGuest>() {
            let again = encode(&message).expect("it fitted once");
            let mut decoder = Decoder::new();
            decoder.push(&again);
            assert_eq!(decoder.next::<FromGuest>(), Ok(Some(message)));
            assert!(!decoder.is_mid_frame());
        }
        to_guest.push(part);
        while let Ok(Some(message)) = to_guest.next::<ToGuest>() {
            let again = encode(&message).expect("it fitted once");
            let mut decoder = Decoder::new();
            decoder.push(&again);
            assert_eq!(decoder.next::<ToGuest>(), Ok(Some(message)));
        }
    }
});
