//! KVM's two ways to tell which pages a guest wrote: a bitmap of each memory slot (`KVM_GET_DIRTY_LOG` and
//! `KVM_CLEAR_DIRTY_LOG`, which Hearth uses) and a ring of each vCPU (`KVM_CAP_DIRTY_LOG_RING`). What reading and
//! re-protecting takes, and what it costs the guest, for guests of two sizes that write few pages and many.
//!
//! One thread does everything by turns: the guest writes a word to each of so many pages and exits, then the pages are read
//! and re-protected. So neither waits for the other, and both times are processor times. The guest runs at privilege
//! level 3, which even hosts that emulate a guest's kernel run on the processor.
//!
//! Usage, as root: `cargo bench --bench dirty_log`. Prints one JSON object a line; the figures that decided are in
//! `src/ARCHITECTURE.md`.

#![expect(unsafe_code, reason = "memory slots, the ring's mapping, and ioctls that kvm-ioctls does not wrap")]
#![expect(clippy::disallowed_methods, reason = "it measures by the host's own clock")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log,
    kvm_dirty_gfn, kvm_dirty_log, kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Where the guest's page tables and code are; what it writes begins at [`WRITTEN_FROM`].
const TABLES: u64 = 0x10_0000;
const CODE: u64 = 0x20_0000;
const WRITTEN_FROM: u64 = 16 * MIB;

/// Entries of the ring: 1 MiB of 16 bytes each, which is the most there is.
const RING_ENTRIES: usize = 65_536;

/// Passes that are measured, after one that is not.
const PASSES: usize = 15;

/// Flags of an entry: a page was written; its entry was read and may be used again (api.rst section 8.29).
const KVM_DIRTY_GFN_F_DIRTY: u32 = 1;
const KVM_DIRTY_GFN_F_RESET: u32 = 2;

/// The ring is full (api.rst section 5).
const KVM_EXIT_DIRTY_RING_FULL: u32 = 31;

const KVM_GET_DIRTY_LOG: u64 = 0x4010_ae42;
const KVM_CLEAR_DIRTY_LOG: u64 = 0xc018_aec0;
const KVM_RESET_DIRTY_RINGS: u64 = 0xaec7;

/// How written pages are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    Off,
    Bitmap,
    Ring,
}

/// An anonymous or shared mapping; unmapped when dropped.
struct Mapping {
    at: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn new(length: usize, flags: i32, fd: i32, offset: i64) -> io::Result<Self> {
        // SAFETY: no address is asked for, so nothing that is mapped is replaced; the kernel checks the rest.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at: NonNull::new(at.cast()).expect("a mapping is nowhere near zero"), length })
    }

    /// Writes bytes into it.
    fn write(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).expect("below the length");
        assert!(at + bytes.len() <= self.length);
        // SAFETY: the range is inside of the mapping, by the assertion; no vCPU runs, as there is one thread.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.as_ptr().add(at), bytes.len()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's own, and whoever used it is dropped before (see `Guest`).
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.length) };
    }
}

/// The guest. Fields are dropped in their order: memory goes after what uses it.
struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    ring: Option<Mapping>,
    /// The next entry of the ring.
    next: usize,
    memory: Mapping,
    log: Log,
    bitmap: Vec<u64>,
    /// How often the ring was full in the middle of a pass.
    full: u32,
    /// What harvesting took that a pass was interrupted for.
    harvested_meanwhile: Duration,
}

impl Guest {
    /// Makes one that writes to so many pages in each pass, spread over its memory.
    fn new(kvm: &Kvm, log: Log, bytes: u64, pages: u64) -> Self {
        let vm = kvm.create_vm().expect("make a VM");
        let enable = |cap: u32, value: u64| {
            let mut wanted = kvm_enable_cap { cap, ..Default::default() };
            wanted.args[0] = value;
            vm.enable_cap(&wanted).expect("enable a capability");
        };
        match log {
            Log::Off => {}
            Log::Bitmap => {
                let how = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
                enable(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, how.into());
            }
            Log::Ring => enable(KVM_CAP_DIRTY_LOG_RING, (RING_ENTRIES * size_of::<kvm_dirty_gfn>()) as u64),
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let length = usize::try_from(bytes).expect("fits");
        let mut memory = Mapping::new(length, flags, -1, 0).expect("map the guest's memory");
        // Huge pages are split by either log: what is measured is what a guest of small pages has.
        // SAFETY: the range is the mapping's own; the advice changes no content.
        unsafe { libc::madvise(memory.at.as_ptr().cast(), length, libc::MADV_NOHUGEPAGE) };
        load(&mut memory, bytes, pages);
        let vcpu = vm.create_vcpu(0).expect("make a vCPU");
        let ring = (log == Log::Ring).then(|| {
            let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE.cast_signed();
            let length = RING_ENTRIES * size_of::<kvm_dirty_gfn>();
            Mapping::new(length, libc::MAP_SHARED, vcpu.as_raw_fd(), offset).expect("map the ring")
        });
        let words = usize::try_from(bytes / PAGE / 64).expect("fits");
        let mut guest = Self {
            vcpu,
            vm,
            ring,
            next: 0,
            memory,
            log,
            bitmap: vec![0; words],
            full: 0,
            harvested_meanwhile: Duration::ZERO,
        };
        guest.map(0);
        guest.enter();
        // All pages are there before anything is logged.
        guest.pass();
        if log != Log::Off {
            guest.map(KVM_MEM_LOG_DIRTY_PAGES);
        }
        guest
    }

    fn map(&self, flags: u32) {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags,
            guest_phys_addr: 0,
            memory_size: self.memory.length as u64,
            userspace_addr: self.memory.at.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the range is mapped until `memory` is dropped, which is after VM and vCPU.
        unsafe { self.vm.set_user_memory_region(region) }.expect("set the memory slot");
    }

    /// 64-bit mode at level 3, with all of memory mapped to itself, and ports allowed.
    fn enter(&self) {
        let mut sregs = self.vcpu.get_sregs().expect("read the registers");
        let segment = |selector, type_| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl: 3,
            db: u8::from(type_ == 3),
            s: 1,
            l: u8::from(type_ == 11),
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(0x33, 11);
        (sregs.ds, sregs.es, sregs.ss) = (segment(0x2b, 3), segment(0x2b, 3), segment(0x2b, 3));
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0033, TABLES, 0x20, 0x500);
        self.vcpu.set_sregs(&sregs).expect("set the registers");
        let mut regs = self.vcpu.get_regs().expect("read the registers");
        // RFLAGS with I/O privilege level 3.
        (regs.rip, regs.rflags) = (CODE, 0x3002);
        self.vcpu.set_regs(&regs).expect("set the registers");
    }

    /// The guest writes to all its pages once; gives the time that it took it, without that of harvests in between.
    fn pass(&mut self) -> Duration {
        self.harvested_meanwhile = Duration::ZERO;
        let begun = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(_, _)) => return begun.elapsed().saturating_sub(self.harvested_meanwhile),
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                    self.full += 1;
                    let from = Instant::now();
                    self.harvest();
                    self.harvested_meanwhile += from.elapsed();
                }
                Ok(exit) => panic!("the guest left by {exit:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => panic!("run the guest: {error}"),
            }
        }
    }

    /// Finds the pages that were written and re-protects them; how many there were.
    fn harvest(&mut self) -> u64 {
        match self.log {
            Log::Off => 0,
            Log::Bitmap => self.harvest_bitmap(),
            Log::Ring => self.harvest_ring(),
        }
    }

    fn harvest_bitmap(&mut self) -> u64 {
        let mut request = kvm_dirty_log { slot: 0, ..Default::default() };
        request.__bindgen_anon_1.dirty_bitmap = self.bitmap.as_mut_ptr().cast();
        // SAFETY: the bitmap has a bit for each page of the slot.
        let got = unsafe { libc::ioctl(self.vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &raw const request) };
        assert_eq!(got, 0, "KVM_GET_DIRTY_LOG: {}", io::Error::last_os_error());
        let found = self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
        let Some(first) = self.bitmap.iter().position(|word| *word != 0) else { return 0 };
        let last = self.bitmap.iter().rposition(|word| *word != 0).unwrap_or(first);
        let mut request = kvm_clear_dirty_log {
            slot: 0,
            num_pages: u32::try_from((last - first + 1) * 64).expect("fits"),
            first_page: first as u64 * 64,
            ..Default::default()
        };
        request.__bindgen_anon_1.dirty_bitmap = self.bitmap[first..=last].as_mut_ptr().cast();
        // SAFETY: the bitmap has a bit for each of these pages.
        let cleared = unsafe { libc::ioctl(self.vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw mut request) };
        assert_eq!(cleared, 0, "KVM_CLEAR_DIRTY_LOG: {}", io::Error::last_os_error());
        found
    }

    fn harvest_ring(&mut self) -> u64 {
        let ring = self.ring.as_ref().expect("one that logs so has a ring");
        let mut found = 0;
        loop {
            // SAFETY: `next` is below RING_ENTRIES, which is what the mapping holds; it is aligned as the kernel's is.
            let entry = unsafe { ring.at.as_ptr().cast::<kvm_dirty_gfn>().add(self.next) };
            // SAFETY: the flags are shared with the kernel, by atomic accesses of both (api.rst section 8.29).
            let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_DIRTY == 0 {
                break;
            }
            // SAFETY: the kernel does not write to an entry that is dirty.
            let page = usize::try_from(unsafe { (*entry).offset }).expect("a page of the slot");
            // Into a bitmap, which is what a consumer needs: a page may come more than once.
            self.bitmap[page / 64] |= 1 << (page % 64);
            flags.store(KVM_DIRTY_GFN_F_RESET, Ordering::Release);
            self.next = (self.next + 1) % RING_ENTRIES;
            found += 1;
        }
        // SAFETY: the call has no argument.
        let reset = unsafe { libc::ioctl(self.vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) };
        assert!(reset >= 0, "KVM_RESET_DIRTY_RINGS: {}", io::Error::last_os_error());
        found
    }
}

/// Page tables and code.
fn load(memory: &mut Mapping, bytes: u64, pages: u64) {
    // Present, writable, for level 3; the last level maps 2 MiB each.
    let entry = |address: u64| (address | 7).to_le_bytes();
    memory.write(TABLES, &entry(TABLES + PAGE));
    for gib in 0..4 {
        memory.write(TABLES + PAGE + gib * 8, &entry(TABLES + (2 + gib) * PAGE));
        for large in 0..512 {
            memory.write(TABLES + (2 + gib) * PAGE + large * 8, &entry((gib << 30) | (large << 21) | 0x80));
        }
    }
    let stride = (bytes - WRITTEN_FROM) / pages / PAGE * PAGE;
    let small = |value: u64| u32::try_from(value).expect("below 2 GiB").to_le_bytes();
    let mut code = Vec::new();
    // mov rdi, WRITTEN_FROM; mov rcx, pages; inc rbx
    code.extend([0x48, 0xC7, 0xC7].into_iter().chain(small(WRITTEN_FROM)));
    code.extend([0x48, 0xC7, 0xC1].into_iter().chain(small(pages)));
    code.extend([0x48, 0xFF, 0xC3]);
    // mov [rdi], rbx; add rdi, stride; dec rcx; jnz to the first of them
    code.extend([0x48, 0x89, 0x1F, 0x48, 0x81, 0xC7].into_iter().chain(small(stride)));
    code.extend([0x48, 0xFF, 0xC9, 0x75, 0xF1]);
    // out 0x10, al; jmp to the beginning
    let back = i8::try_from(code.len() + 4).expect("short");
    code.extend([0xE6, 0x10, 0xEB, (-back).cast_unsigned()]);
    memory.write(CODE, &code);
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn measure(kvm: &Kvm, log: Log, bytes: u64, pages: u64) {
    let mut guest = Guest::new(kvm, log, bytes, pages);
    // The first harvest protects everything.
    guest.harvest();
    guest.pass();
    guest.harvest();
    guest.full = 0;
    let (mut passes, mut harvests, mut found) = (Vec::new(), Vec::new(), 0);
    for _ in 0..PASSES {
        passes.push(guest.pass());
        let (meanwhile, from) = (guest.harvested_meanwhile, Instant::now());
        found = guest.harvest();
        harvests.push(from.elapsed() + meanwhile);
    }
    println!(
        r#"{{"memory_mib":{},"pages":{pages},"log":"{log:?}","guest_us":{},"harvest_us":{},"found_last":{found},"ring_full":{}}}"#,
        bytes / MIB,
        median(passes).as_micros(),
        median(harvests).as_micros(),
        f64::from(guest.full) / PASSES as f64,
    );
}

fn main() {
    let kvm = Kvm::new().expect("open /dev/kvm");
    let ring = kvm.check_extension_int(Cap::DirtyLogRing);
    println!(r#"{{"ring_bytes_max":{ring},"ring_entries":{RING_ENTRIES}}}"#);
    for (mib, pages) in
        [(128, 16), (128, 1024), (128, 24_576), (2048, 16), (2048, 1024), (2048, 24_576), (2048, 400_000)]
    {
        for log in [Log::Off, Log::Bitmap, Log::Ring] {
            measure(&kvm, log, mib * MIB, pages);
        }
    }
}
