//! Headers and ranges of disk requests: what is accepted lies inside the disk, and a read-only disk accepts no change.
#![no_main]

use hearth::machine::virtio::block::request::{Buffers, Disk, Range, Request, parse, range_bytes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ([u8; 16], u32, u32, u64, bool, Vec<u8>)| {
    let (header, from_guest, to_guest, sectors, read_only, mut ranges) = input;
    let disk = Disk { sectors: sectors >> 9, read_only };
    let buffers = Buffers { from_guest: from_guest as usize, to_guest: to_guest as usize };
    ranges.resize(range_bytes(buffers.from_guest), 0x5a);
    let check = |range: &Range| {
        let end = range.offset.checked_add(range.bytes).expect("the end of a range");
        assert!(end <= disk.sectors * 512 && range.bytes % 512 == 0);
    };
    match parse(&header, buffers, &ranges, disk) {
        Ok(Request::Read(range)) => check(&range),
        Ok(Request::Write(range) | Request::Zero { range, .. }) => {
            assert!(!read_only);
            check(&range);
        }
        Ok(Request::Discard(ranges)) => {
            assert!(!read_only);
            ranges.iter().for_each(check);
        }
        Ok(Request::Flush | Request::Id) | Err(_) => {}
    }
});
