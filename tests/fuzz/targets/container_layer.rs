//! Archives of anybody: two layers on top of each other are refused, or become an initramfs that can be read back. Most
//! runs make headers whose checksums are right of the bytes, as nothing would get past them otherwise.
#![no_main]

use std::io::Cursor;

use hearth::container::{AGENT_PATH, Bounds, Container, Whiteouts, find_file};
use libfuzzer_sys::fuzz_target;
use tar::{EntryType, Header};

const AGENT: &[u8] = b"\x7fELF agent";
const BOUNDS: Bounds = Bounds { unpacked_bytes: 1 << 20, disk_bytes: 4 << 20 };
const KINDS: &[u8] = b"0123456759LKxgSVM\0";

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(count.min(bytes.len()));
    *bytes = rest;
    taken
}

fn archive(mut bytes: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    while let [kind, lengths, rest @ ..] = bytes {
        bytes = rest;
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::new(KINDS[usize::from(*kind) % KINDS.len()]));
        let name = take(&mut bytes, usize::from(lengths & 15));
        let link = take(&mut bytes, usize::from(lengths >> 6));
        let content = take(&mut bytes, usize::from(lengths >> 3 & 7) * 5);
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        // Now and then it says another size than there is.
        let more = if *kind > 250 { u64::from(*kind) << (lengths & 63) } else { 0 };
        header.set_size((content.len() as u64).saturating_add(more));
        header.set_mode(u32::from(*lengths));
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive
}

fuzz_target!(|bytes: &[u8]| {
    let [how, split, bytes @ ..] = bytes else { return };
    let (below, above) = bytes.split_at(usize::from(*split).min(bytes.len()));
    let layers = if how & 1 == 0 { [archive(below), archive(above)] } else { [below.to_vec(), above.to_vec()] };
    let whiteouts = if how & 2 == 0 { Whiteouts::Hide } else { Whiteouts::Plain };
    let spool = tempfile::tempfile().expect("a temporary file");
    let mut container = Container::new(spool, BOUNDS);
    for layer in &layers {
        if container.layer("a layer", whiteouts, layer.as_slice()).is_err() {
            return;
        }
    }
    let mut initramfs = Cursor::new(Vec::new());
    let written = container.write_initramfs(AGENT, &mut initramfs).expect("within bounds");
    assert_eq!(written.bytes, initramfs.get_ref().len() as u64);
    assert_eq!(find_file(&mut initramfs, AGENT_PATH).expect("the agent"), AGENT);
    // Damaged, it is refused or holds a program.
    let mut damaged = initramfs.into_inner();
    for (old, new) in damaged.iter_mut().skip(usize::from(*how)).zip(bytes) {
        *old ^= new;
    }
    let _ = find_file(&mut Cursor::new(damaged), "init");
});
