//! Bytes from another host's VMM: headers, greetings and page numbers of a migration are refused or understood.
#![no_main]

use hearth::units::{PageCount, PageIndex};
use hearth::wire::packed::unpack;
use hearth::wire::stream::{BODY_BYTES_MAX, HEADER_BYTES, Header, Hello, Kind, PAGES_MAX, Pages};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([u8; HEADER_BYTES], u32, [u8; 12], [u8; 34], u16, u16, Vec<u8>)| {
    let (header, sequence, pages, hello, memory, wanted_pages, body) = input;
    let memory = u64::from(memory);
    if let Ok(header) = Header::read(&header, sequence) {
        assert!(header.length <= BODY_BYTES_MAX && header.sequence == sequence);
        assert!(header.version >= header.kind.since_version());
        // What is accepted says the same again.
        if header.length as usize == body.len() && header.check(&[&body]).is_ok() {
            assert!(Header::for_body(header.version, header.kind, sequence, &[&body]).is_ok());
        }
    }
    let there = |first: PageIndex| PageCount(memory.saturating_sub(first.0));
    let packed = u32::try_from(12 + body.len().max(1)).unwrap();
    for (kind, bytes) in [
        (Kind::ZeroPages, 12),
        (Kind::Pages, 12 + 4096),
        (Kind::Pages, BODY_BYTES_MAX),
        (Kind::PackedPages, packed),
    ] {
        if let Ok((first, count)) = Pages::from_bytes(pages).check(kind, bytes, there) {
            assert!(count.0 > 0 && first.0 + count.0 <= memory);
            assert!(kind == Kind::ZeroPages || count.0 <= PAGES_MAX.into());
        }
    }
    // A block becomes as many bytes as was said, or is none; whatever it is, no more than a frame's pages are held.
    for wanted in [usize::from(wanted_pages) * 4096, usize::MAX] {
        let mut unpacked = Vec::new();
        let is_block = unpack(&body, wanted, &mut unpacked).is_ok();
        assert!(unpacked.capacity() <= PAGES_MAX as usize * 4096 && (!is_block || unpacked.len() == wanted));
    }
    if let Ok(hello) = Hello::from_bytes(hello) {
        assert!(hello.connection < hello.connections);
    }
});
