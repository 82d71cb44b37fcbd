//! The allocator: power-of-two size classes with a free list each, carved from mapped chunks.
//!
//! This program is one thread with a few dozen live objects, most of them stream buffers of one size that come and
//! go, so freed blocks are kept by class and used again, last freed first: their pages are already there, and a page
//! fault is what costs most on an emulated kernel. Blocks above the largest class are mapped and unmapped one by one.
#![expect(unsafe_code, reason = "an allocator hands out raw memory")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr;

use super::raw::syscall;

/// Smallest block: what a free-list link needs, and the alignment of everything.
const SMALLEST_BYTES: usize = 16;

/// Largest class: 16 bytes << 17 = 2 MiB, a whole longest frame with its header.
const CLASSES: usize = 18;

/// Bytes mapped at a time for small blocks; untouched pages of it cost nothing.
const CHUNK_BYTES: usize = 1 << 20;

const MMAP: u64 = 9;
const MUNMAP: u64 = 11;
const PROT_READ_WRITE: u32 = 3;
const MAP_PRIVATE_ANONYMOUS: u32 = 0x22;

/// A free block's first word: the next free block of its class.
struct Link {
    next: *mut Link,
}

struct State {
    free: [*mut Link; CLASSES],
    chunk: *mut u8,
    chunk_bytes: usize,
}

/// The global allocator of this program.
pub(super) struct Heap(UnsafeCell<State>);

// SAFETY: this program has one thread. The children that share its memory for a while (`sys::process`) allocate nothing.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap =
    Heap(UnsafeCell::new(State { free: [ptr::null_mut(); CLASSES], chunk: ptr::null_mut(), chunk_bytes: 0 }));

/// The class whose blocks hold `layout`, or `None` when it is mapped by itself.
fn class_of(layout: Layout) -> Option<usize> {
    // Blocks of a class are aligned to their size up to a page: chunks start on pages and are carved largest-aligned.
    let bytes = layout.size().max(layout.align()).max(SMALLEST_BYTES).checked_next_power_of_two()?;
    let class = usize::try_from(bytes.trailing_zeros() - SMALLEST_BYTES.trailing_zeros()).ok()?;
    (class < CLASSES).then_some(class)
}

const fn class_bytes(class: usize) -> usize {
    SMALLEST_BYTES << class
}

/// Fresh zeroed pages, or null.
fn map(bytes: usize) -> *mut u8 {
    // SAFETY: an anonymous private mapping at an address of the kernel's choice touches nothing that exists.
    let result =
        unsafe { syscall!(MMAP, ptr::null::<u8>(), bytes, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1_i32, 0_u64) };
    match result.map(usize::try_from) {
        Ok(Ok(address)) => ptr::with_exposed_provenance_mut(address),
        Ok(Err(_)) | Err(_) => ptr::null_mut(),
    }
}

impl State {
    /// A block of `class`: the last one freed, or a new one.
    fn take(&mut self, class: usize) -> *mut u8 {
        let block = self.free[class];
        if !block.is_null() {
            // SAFETY: blocks in a free list are ours, at least a Link long and aligned, and hold a valid Link.
            self.free[class] = unsafe { (*block).next };
            return block.cast();
        }
        self.carve(class_bytes(class))
    }

    /// The next `bytes` (a power of two) of the chunk, from a new chunk when it does not hold them.
    fn carve(&mut self, bytes: usize) -> *mut u8 {
        let align = bytes.min(4096);
        let skip = self.chunk.align_offset(align);
        if self.chunk.is_null() || skip.saturating_add(bytes) > self.chunk_bytes {
            let fresh_bytes = bytes.max(CHUNK_BYTES);
            let fresh = map(fresh_bytes);
            if fresh.is_null() {
                return fresh;
            }
            // What is left of the old chunk is given up: address space, and pages that were never touched.
            (self.chunk, self.chunk_bytes) = (fresh, fresh_bytes);
            return self.carve(bytes);
        }
        // SAFETY: skip + bytes lie within the chunk, as was just checked.
        let (block, rest) = unsafe { (self.chunk.add(skip), self.chunk.add(skip + bytes)) };
        self.chunk = rest;
        self.chunk_bytes -= skip + bytes;
        block
    }
}

// SAFETY: `alloc` gives blocks of at least the size and alignment asked for (up to a page, see `class_of`; larger
// alignments are refused with null) that overlap no live block, because a block is either live or in one free list.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > 4096 {
            return ptr::null_mut();
        }
        match class_of(layout) {
            // SAFETY: one thread, and no reference to the state outlives a method of this impl.
            Some(class) => unsafe { (*self.0.get()).take(class) },
            None => map(layout.size()),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread, and no reference to the state outlives this line.
        let used = class_of(layout).is_some_and(|class| unsafe { !(*self.0.get()).free[class].is_null() });
        // SAFETY: the same contract.
        let block = unsafe { self.alloc(layout) };
        if used && !block.is_null() {
            // SAFETY: the block holds `layout.size()` bytes.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        // A block never used before is fresh pages, zeroed by the kernel when they are first touched.
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(class) = class_of(layout) else {
            // SAFETY: `block` was mapped by `alloc` with this size, and its owner gives it up.
            let _ = unsafe { syscall!(MUNMAP, block, layout.size()) };
            return;
        };
        let link: *mut Link = block.cast();
        // SAFETY: one thread; `block` came from `take(class)`, so it is aligned and large enough for a Link.
        unsafe {
            let state = &mut *self.0.get();
            (*link).next = state.free[class];
            state.free[class] = link;
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let Ok(new_layout) = Layout::from_size_align(new_size, layout.align()) else {
            return ptr::null_mut();
        };
        let (old_class, new_class) = (class_of(layout), class_of(new_layout));
        if old_class.is_some() && old_class == new_class {
            return block;
        }
        // SAFETY: a fresh block does not overlap the old one; both hold the smaller of the sizes.
        unsafe {
            let fresh = self.alloc(new_layout);
            if !fresh.is_null() {
                ptr::copy_nonoverlapping(block, fresh, layout.size().min(new_size));
                self.dealloc(block, layout);
            }
            fresh
        }
    }
}
