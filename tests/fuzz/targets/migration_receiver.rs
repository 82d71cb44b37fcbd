//! The target's end of a migration's connection, as the machine of states that it is: frames with right headers and
//! whatever bodies, in whatever order, and garbage between them. It refuses or goes on; what it put into guest memory is
//! what the frames said, nothing else of it was touched, and nothing beyond it; it takes no memory for lengths that
//! nobody sent; and the machine is whole after End with the right digest only.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use hearth::machine::PageRun;
use hearth::machine::pages::ArrivingRam;
use hearth::machine::ram::GuestRam;
use hearth::units::{PageCount, PageIndex};
use hearth::wire::intake::{Intake, Step};
use hearth::wire::link::Link;
use hearth::wire::packed::Packer;
use hearth::wire::stream::{
    BODY_BYTES_MAX, HEADER_BYTES, Header, Hello, Kind, PAGES_MAX, STATE_BYTES_MAX, StreamError, VERSION, state_digest,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const PAGE: usize = 4096;
const TOKEN: [u8; 32] = [7; 32];

/// Pages of the guest: two pieces with a gap between them.
const PIECES: [(u64, u64); 2] = [(0, 24), (40, 8)];

/// What the receiver may hold besides the state that came: one frame and what it unpacks to, each grown once.
const HELD_BYTES_MAX: usize = 4 * BODY_BYTES_MAX as usize;

/// Counts what is held, and the most that was.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system allocator's; here it is only counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What was sent, and what is answered.
struct Wire<'a> {
    sent: &'a [u8],
    answered: Vec<u8>,
}

impl Read for Wire<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.sent.read(bytes)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.answered.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The source: frames in a row.
struct Source {
    version: u16,
    sequence: u32,
    sent: Vec<u8>,
    state: Vec<u8>,
    packer: Packer,
}

/// One thing that it sends: what, of which pages, with what in them, and whether a bit of it flips.
type Part = (u8, u8, u16, Vec<u8>, Option<(u16, u8)>);

impl Source {
    fn frame(&mut self, kind: Kind, body: &[u8]) {
        // What no header can be made for is sent by garbage.
        if let Ok(header) = Header::for_body(self.version, kind, self.sequence, &[body]) {
            self.sent.extend_from_slice(&header);
            self.sent.extend_from_slice(body);
            self.sequence += 1;
        }
    }

    fn part(&mut self, (what, first, count, fill, flipped): Part) {
        let begun = self.sent.len();
        // Mostly pages that there are.
        let head = |count: u16| [&u64::from(first % 56).to_le_bytes()[..], &u32::from(count).to_le_bytes()].concat();
        let few = count % 9;
        let content = || -> Vec<u8> {
            let fill = if fill.is_empty() { &[1][..] } else { &fill };
            fill.iter().copied().cycle().take(usize::from(few) * PAGE).collect()
        };
        match what % 16 {
            0 => {
                let hello = Hello { token: TOKEN, connection: first % 3, connections: 2 + u8::from(first > 200) };
                self.frame(Kind::Hello, &hello.to_bytes());
            }
            1..=3 => self.frame(Kind::Pages, &[head(few), content()].concat()),
            4..=6 => {
                // Packed as it has to be, or for another number of pages.
                let says = if what < 192 { few } else { count };
                let block = self.packer.pack(&content()).map(<[u8]>::to_vec).unwrap_or_default();
                self.frame(Kind::PackedPages, &[head(says), block].concat());
            }
            7 => self.frame(Kind::PackedPages, &[head(count % 300), fill].concat()),
            8 => self.frame(Kind::ZeroPages, &head(count % 70)),
            9 => self.frame(Kind::RoundEnd, &u32::from(count).to_le_bytes()),
            10 => {
                self.frame(Kind::State, &fill);
                self.state.extend_from_slice(&fill);
            }
            11 => {
                let mut digest = state_digest(&self.state);
                digest[0] ^= u8::from(count == 1);
                self.frame(Kind::End, &digest);
            }
            12 => {
                let others = [Kind::Ack, Kind::Ready, Kind::Abort, Kind::Packet, Kind::PacketsEnd, Kind::Hello, Kind::End];
                self.frame(others[usize::from(first) % others.len()], &fill);
            }
            13 => self.version = 1 + u16::from(first) % VERSION,
            // A header that says more than comes.
            14 => {
                if let Ok(mut header) = Header::for_body(self.version, Kind::Pages, self.sequence, &[&[0; 12 + PAGE]]) {
                    header[8..12].copy_from_slice(&(12 + u32::from(count) * 4096).to_le_bytes());
                    self.sent.extend_from_slice(&header);
                }
            }
            _ => self.sent.extend_from_slice(&fill),
        }
        if let Some((at, bit)) = flipped.filter(|_| self.sent.len() > begun) {
            let at = begun + usize::from(at) % (self.sent.len() - begun);
            self.sent[at] ^= 1 << (bit % 8);
        }
    }
}

/// Guest memory as it has to be.
struct Model(Vec<(u64, [u8; PAGE])>);

impl Model {
    fn put(&mut self, first: PageIndex, count: PageCount, content: impl Fn(usize) -> [u8; PAGE]) {
        for at in 0..count.0 {
            let page = self.0.iter_mut().find(|(page, _)| *page == first.0 + at);
            let page = page.expect("no page was let through that the guest has not");
            page.1 = content(usize::try_from(at).unwrap());
        }
    }
}

/// Takes what comes, as `vmm/receive` does; whether the machine is whole. `state`: what the frames of the state said.
fn receive(link: &mut Link<Wire<'_>>, ram: &ArrivingRam, takes_pages: bool, model: &mut Model) -> Option<Vec<u8>> {
    let mut intake = Intake::new(TOKEN, 2, takes_pages);
    let (mut body, mut said) = (Vec::new(), Vec::new());
    loop {
        let kind = link.receive(&mut body).ok()?;
        let was_greeted = intake.number();
        let step = match intake.take(kind, &body, |first| ram.pages_from(first)) {
            Ok(step) => step,
            Err(error) => {
                assert!(!matches!(error, StreamError::Magic { .. } | StreamError::Checksum { .. }), "{error:?}");
                // Nothing follows.
                assert!(intake.take(Kind::RoundEnd, &[0; 4], |first| ram.pages_from(first)).is_err());
                return None;
            }
        };
        assert_eq!(was_greeted.is_none(), matches!(step, Step::Greet(_)), "Hello first, and once");
        match step {
            Step::Greet(hello) => link.send(Kind::Hello, &hello.to_bytes()).unwrap(),
            Step::Put(first, count, content) => {
                assert!(takes_pages && count.0 <= PAGES_MAX.into() && content.len() as u64 == count.0 * 4096);
                model.put(first, count, |at| content[at * PAGE..][..PAGE].try_into().unwrap());
                ram.put(PageRun { first, count }, content).expect("what was checked is there");
            }
            Step::PutZeroes(first, count) => {
                assert!(takes_pages);
                model.put(first, count, |_| [0; PAGE]);
                ram.put_zeroes(PageRun { first, count }).expect("what was checked is there");
            }
            Step::Nothing if kind == Kind::State => said.extend_from_slice(&body),
            Step::Nothing => assert_eq!(kind, Kind::RoundEnd),
            Step::State(state) => {
                assert_eq!((kind, intake.number()), (Kind::End, Some(0)));
                assert!(state == said && state_digest(&state) == body[..] && state.len() <= STATE_BYTES_MAX);
                assert!(!intake.ack_is_due());
                return Some(state);
            }
        }
        if intake.ack_is_due() {
            link.send(Kind::Ack, &link.received().to_le_bytes()).unwrap();
        }
    }
}

fuzz_target!(|input: (bool, u8, Vec<Part>)| {
    let (begins_right, flags, parts) = input;
    let (takes_pages, of_image) = (flags & 7 != 0, flags & 8 != 0);
    let mut source =
        Source { version: VERSION, sequence: 0, sent: Vec::new(), state: Vec::new(), packer: Packer::default() };
    if begins_right {
        source.version = 1 + u16::from(flags >> 4) % VERSION;
        source.frame(Kind::Hello, &Hello { token: TOKEN, connection: flags >> 7, connections: 2 }.to_bytes());
    }
    for part in parts.into_iter().take(40) {
        source.part(part);
    }
    let ranges = PIECES.map(|(first, pages)| (GuestAddress(first * 4096), usize::try_from(pages).unwrap() * PAGE));
    let memory = GuestRam::from_ranges(&ranges).unwrap();
    let ram = ArrivingRam::new(memory.clone(), of_image);
    let pages = PIECES.iter().flat_map(|(first, pages)| *first..first + pages);
    let mut model = Model(pages.map(|page| (page, [0; PAGE])).collect());

    let before = HELD.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let mut link = Link::new(Wire { sent: &source.sent, answered: Vec::new() }, None);
    let state = receive(&mut link, &ram, takes_pages, &mut model);
    let held = MOST.load(Ordering::Relaxed) - before;
    // The state is held here as well, and grows by doubling.
    assert!(held <= HELD_BYTES_MAX + 8 * source.state.len(), "{held} bytes were held for {}", source.sent.len());

    // Nothing was answered but Hello and acknowledgements: that it stands ready is said by who made a machine of it.
    let (mut answered, mut sequence) = (&link.connection_mut().answered[..], 0);
    while let Some((header, rest)) = answered.split_first_chunk::<HEADER_BYTES>() {
        let header = Header::read(header, sequence).expect("a right header");
        let (body, rest) = rest.split_at(header.length as usize);
        header.check(&[body]).expect("a right checksum");
        assert_eq!(header.kind, if sequence == 0 { Kind::Hello } else { Kind::Ack });
        (answered, sequence) = (rest, sequence + 1);
    }
    assert!(answered.is_empty() && (state.is_none() || sequence > 0));
    // All of guest memory, and nothing else of it than was said.
    let mut page = [0; PAGE];
    for (index, wanted) in &model.0 {
        memory.read_slice(&mut page, GuestAddress(index * 4096)).unwrap();
        assert!(page == *wanted, "page {index}");
    }
});
