//! Bytes from another host's VMM: headers, greetings and page numbers of a migration are refused or understood.
#![no_main]

use hearth::units::{PageCount, PageIndex};
use hearth::wire::stream::{BODY_BYTES_MAX, HEADER_BYTES, Header, Hello, Kind, Pages};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([u8; HEADER_BYTES], u32, [u8; 12], [u8; 34], u16, Vec<u8>)| {
    let (header, sequence, pages, hello, memory, body) = input;
    let memory = u64::from(memory);
    if let Ok(header) = Header::read(&header, sequence) {
        assert!(header.length <= BODY_BYTES_MAX && header.sequence == sequence);
        // What is accepted says the same again.
        if header.length as usize == body.len() && header.check(&[&body]).is_ok() {
            assert!(Header::for_body(header.kind, sequence, &[&body]).is_ok());
        }
    }
    let there = |first: PageIndex| PageCount(memory.saturating_sub(first.0));
    for (kind, bytes) in [(Kind::ZeroPages, 12), (Kind::Pages, 12 + 4096), (Kind::Pages, BODY_BYTES_MAX)] {
        if let Ok((first, count)) = Pages::from_bytes(pages).check(kind, bytes, there) {
            assert!(count.0 > 0 && first.0 + count.0 <= memory);
        }
    }
    if let Ok(hello) = Hello::from_bytes(hello) {
        assert!(hello.connection < hello.connections);
    }
});
