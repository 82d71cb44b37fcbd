//! Reads a kernel file's headers before anything is loaded: format, where it goes, where it ends, where it begins.
//!
//! The file is untrusted. Every number in it is checked against the file's length and against the addresses a kernel
//! may use, so that loading cannot read past the file, write outside the kernel's place or take long.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use crate::machine::layout::HIGH_MEMORY;
use crate::report::Retry;
use crate::units::GuestPhys;
#[cfg(test)]
use crate::units::{Bytes, MIB};

/// Most program headers: Linux has five; a hundred is a sign of something else.
const PROGRAM_HEADERS_MAX: u16 = 64;

/// Most bytes of one note segment: notes are searched entry by entry.
const NOTE_BYTES_MAX: u64 = 64 * 1024;

/// Bytes of an ELF64 header and of a program header (System V ABI, ELF-64 object file format).
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;

/// Program header types.
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// First bytes of an ELF file: magic, 64-bit class, little-endian.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const ELF_CLASS_64: u8 = 2;
const ELF_LITTLE_ENDIAN: u8 = 1;

/// EM_X86_64.
const MACHINE_X86_64: u16 = 62;

/// The setup header of a bzImage (Documentation/arch/x86/boot.rst): bytes to read, and offsets in the file.
const SETUP_BYTES: usize = 0x264;
const SETUP_SECTORS: usize = 0x1F1;
const BOOT_FLAG: usize = 0x1FE;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const LOAD_FLAGS: usize = 0x211;
const EXTENDED_LOAD_FLAGS: usize = 0x236;
const PREFERRED_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

/// First protocol with a 64-bit entry.
const PROTOCOL_MIN: u16 = 0x020C;

/// Distance of the 64-bit entry from the start of a bzImage's protected-mode code.
const BZIMAGE_ENTRY: u64 = 0x200;

/// A sector of the setup code.
const SECTOR_BYTES: u64 = 512;

/// What a kernel file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An ELF executable (vmlinux).
    Elf,
    /// A compressed kernel that unpacks itself.
    BzImage,
}

/// A kernel file's headers, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelShape {
    /// What it is.
    pub format: Format,
    /// Lowest address it is loaded to.
    pub start: GuestPhys,
    /// First address after everything it uses at its start.
    pub end: GuestPhys,
    /// Its 64-bit entry.
    pub entry: GuestPhys,
    segments: Vec<(u64, u64)>,
}

impl KernelShape {
    /// Whether an address lies in what is loaded.
    pub fn holds(&self, address: GuestPhys) -> bool {
        self.segments.iter().any(|(start, end)| (*start..*end).contains(&address.0))
    }
}

/// Why a file is not a kernel this VMM boots.
#[derive(Debug, thiserror::Error)]
pub enum KernelImageError {
    /// It could not be read.
    #[error("read it")]
    Read(#[source] io::Error),
    /// Neither an ELF file nor a bzImage.
    #[error("it is neither an ELF vmlinux nor a bzImage")]
    NotAKernel,
    /// It ends before what its headers say.
    #[error("it is truncated: {what} ends at byte {wanted}, the file has {found}")]
    Truncated {
        /// What is cut.
        what: &'static str,
        /// Where it would end.
        wanted: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// For another processor.
    #[error("it is not for 64-bit x86")]
    WrongMachine,
    /// Headers that contradict each other or go over a limit.
    #[error("its headers are malformed: {reason}")]
    Malformed {
        /// What is wrong.
        reason: &'static str,
    },
    /// It wants to be loaded over the boot structures.
    #[error("it loads to {start}, below {HIGH_MEMORY}")]
    TooLow {
        /// Where it wants to go.
        start: GuestPhys,
    },
    /// The entry is not in what is loaded.
    #[error("its entry {entry} is not in what it loads")]
    EntryOutside {
        /// The entry.
        entry: GuestPhys,
    },
}

impl KernelImageError {
    /// Whether the same file may do later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Read(_) => Retry::Later,
            Self::NotAKernel
            | Self::Truncated { .. }
            | Self::WrongMachine
            | Self::Malformed { .. }
            | Self::TooLow { .. }
            | Self::EntryOutside { .. } => Retry::WithChange,
        }
    }
}

/// Reads and checks the headers.
pub(super) fn examine(file: &mut File) -> Result<KernelShape, KernelImageError> {
    let length = file.seek(SeekFrom::End(0)).map_err(KernelImageError::Read)?;
    file.rewind().map_err(KernelImageError::Read)?;
    let wanted = u64::try_from(SETUP_BYTES).unwrap_or(u64::MAX);
    let mut head = Vec::with_capacity(SETUP_BYTES);
    file.take(wanted).read_to_end(&mut head).map_err(KernelImageError::Read)?;
    if head.starts_with(&ELF_MAGIC) {
        return examine_elf(file, &head, length);
    }
    // A bzImage shorter than its own header is cut; anything else that short is nothing we know.
    if field::<4>(&head, HEADER_MAGIC) == Some(*b"HdrS") && field::<2>(&head, BOOT_FLAG) == Some([0x55, 0xAA]) {
        return examine_bzimage(&head, length);
    }
    Err(KernelImageError::NotAKernel)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A little-endian number; zero where the slice ends, which the callers exclude by checking lengths first.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    field(bytes, at).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    field(bytes, at).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    field(bytes, at).map_or(0, u64::from_le_bytes)
}

fn examine_elf(file: &mut File, head: &[u8], length: u64) -> Result<KernelShape, KernelImageError> {
    let malformed = |reason| KernelImageError::Malformed { reason };
    if head.len() < ELF_HEADER_BYTES {
        return Err(KernelImageError::Truncated { what: "the ELF header", wanted: 64, found: length });
    }
    if head[4] != ELF_CLASS_64 || head[5] != ELF_LITTLE_ENDIAN || u16_at(head, 18) != MACHINE_X86_64 {
        return Err(KernelImageError::WrongMachine);
    }
    let entry = u64_at(head, 24);
    let table = u64_at(head, 32);
    let (entry_bytes, count) = (u16_at(head, 54), u16_at(head, 56));
    if usize::from(entry_bytes) != PROGRAM_HEADER_BYTES {
        return Err(malformed("program headers have another size"));
    }
    if count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(malformed("number of program headers"));
    }
    let table_bytes = usize::from(count) * PROGRAM_HEADER_BYTES;
    within("the program headers", table, table_bytes as u64, length)?;
    let mut headers = vec![0; table_bytes];
    file.seek(SeekFrom::Start(table)).map_err(KernelImageError::Read)?;
    file.read_exact(&mut headers).map_err(KernelImageError::Read)?;

    let mut segments = Vec::new();
    for header in headers.chunks_exact(PROGRAM_HEADER_BYTES) {
        let (offset, start) = (u64_at(header, 8), u64_at(header, 24));
        let (in_file, in_memory) = (u64_at(header, 32), u64_at(header, 40));
        match u32_at(header, 0) {
            PT_NOTE => {
                within("a note", offset, in_file, length)?;
                if in_file > NOTE_BYTES_MAX {
                    return Err(malformed("a note is too long"));
                }
            }
            PT_LOAD if in_memory > 0 => {
                within("a segment", offset, in_file, length)?;
                if in_file > in_memory {
                    return Err(malformed("a segment is larger in the file than in memory"));
                }
                let end = start.checked_add(in_memory).ok_or(malformed("a segment ends after the last address"))?;
                if start < HIGH_MEMORY.0 {
                    return Err(KernelImageError::TooLow { start: GuestPhys(start) });
                }
                segments.push((start, end));
            }
            PT_LOAD if in_file > 0 => return Err(malformed("a segment is larger in the file than in memory")),
            _ => {}
        }
    }
    segments.sort_unstable();
    if segments.windows(2).any(|pair| pair[0].1 > pair[1].0) {
        return Err(malformed("segments overlap"));
    }
    let (Some((start, _)), Some((_, end))) = (segments.first().copied(), segments.last().copied()) else {
        return Err(malformed("nothing to load"));
    };
    let shape = KernelShape {
        format: Format::Elf,
        start: GuestPhys(start),
        end: GuestPhys(end),
        entry: GuestPhys(entry),
        segments,
    };
    if !shape.holds(shape.entry) {
        return Err(KernelImageError::EntryOutside { entry: shape.entry });
    }
    Ok(shape)
}

fn examine_bzimage(head: &[u8], length: u64) -> Result<KernelShape, KernelImageError> {
    let malformed = |reason| KernelImageError::Malformed { reason };
    if head.len() < SETUP_BYTES {
        return Err(KernelImageError::Truncated {
            what: "the setup header",
            wanted: SETUP_BYTES as u64,
            found: length,
        });
    }
    if u16_at(head, PROTOCOL_VERSION) < PROTOCOL_MIN || u16_at(head, EXTENDED_LOAD_FLAGS) & 1 == 0 {
        return Err(malformed("a bzImage without a 64-bit entry"));
    }
    if head[LOAD_FLAGS] & 1 == 0 {
        return Err(malformed("a zImage"));
    }
    // Zero means four (boot.rst, setup_sects); the boot sector comes on top.
    let sectors = u64::from(if head[SETUP_SECTORS] == 0 { 4 } else { head[SETUP_SECTORS] });
    let setup = (sectors + 1) * SECTOR_BYTES;
    within("the setup code", 0, setup + 1, length)?;
    let code = length - setup;
    let start = u64_at(head, PREFERRED_ADDRESS);
    if start < HIGH_MEMORY.0 {
        return Err(KernelImageError::TooLow { start: GuestPhys(start) });
    }
    let taken = code.max(u64::from(u32_at(head, INIT_SIZE))).max(BZIMAGE_ENTRY + 1);
    // Its own place in the boot parameters is a 32-bit number.
    let end = start.checked_add(taken).filter(|end| *end <= u64::from(u32::MAX));
    let end = end.ok_or(malformed("it ends after 4 GiB"))?;
    Ok(KernelShape {
        format: Format::BzImage,
        start: GuestPhys(start),
        end: GuestPhys(end),
        entry: GuestPhys(start + BZIMAGE_ENTRY),
        segments: vec![(start, end)],
    })
}

fn within(what: &'static str, offset: u64, bytes: u64, length: u64) -> Result<(), KernelImageError> {
    let wanted = offset.checked_add(bytes).ok_or(KernelImageError::Malformed { reason: "an offset overflows" })?;
    if wanted > length { Err(KernelImageError::Truncated { what, wanted, found: length }) } else { Ok(()) }
}

/// The smallest ELF kernel there is: one segment with `code` at 1 MiB, entered at its start. For tests.
#[cfg(test)]
pub(super) fn tiny_elf(code: &[u8], in_memory: Bytes) -> Vec<u8> {
    let mut file = vec![0; ELF_HEADER_BYTES + PROGRAM_HEADER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &ELF_MAGIC);
    put(4, &[ELF_CLASS_64, ELF_LITTLE_ENDIAN, 1]);
    put(16, &2_u16.to_le_bytes());
    put(18, &MACHINE_X86_64.to_le_bytes());
    put(24, &MIB.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(54, &56_u16.to_le_bytes());
    put(56, &1_u16.to_le_bytes());
    put(64, &PT_LOAD.to_le_bytes());
    put(72, &120_u64.to_le_bytes());
    put(88, &MIB.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &in_memory.0.to_le_bytes());
    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn examined(bytes: &[u8]) -> Result<KernelShape, KernelImageError> {
        examine(&mut file(bytes))
    }

    fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut elf = tiny_elf(&[0x90; 16], Bytes(MIB));
        elf[at..at + bytes.len()].copy_from_slice(bytes);
        elf
    }

    #[test]
    fn a_small_elf_is_understood() {
        let shape = examined(&tiny_elf(&[0x90; 16], Bytes(MIB))).unwrap();
        assert_eq!((shape.start, shape.end, shape.entry), (GuestPhys(MIB), GuestPhys(2 * MIB), GuestPhys(MIB)));
        assert!(shape.holds(GuestPhys(2 * MIB - 1)) && !shape.holds(GuestPhys(2 * MIB)));
    }

    #[test]
    fn what_is_not_a_kernel_is_named() {
        use KernelImageError as E;
        assert!(matches!(examined(b""), Err(E::NotAKernel)));
        assert!(matches!(examined(&[0; 4096]), Err(E::NotAKernel)));
        assert!(matches!(examined(b"\x7fELF"), Err(E::Truncated { what: "the ELF header", .. })));
        assert!(matches!(examined(&patched(4, &[1])), Err(E::WrongMachine)));
        assert!(matches!(examined(&patched(18, &[183])), Err(E::WrongMachine)));
        assert!(matches!(examined(&patched(56, &[0xff, 0xff])), Err(E::Malformed { .. })));
        assert!(matches!(examined(&patched(56, &[0, 0])), Err(E::Malformed { .. })));
        assert!(matches!(examined(&patched(56, &[2, 0])), Err(E::Truncated { what: "the program headers", .. })));
        assert!(matches!(examined(&patched(32, &u64::MAX.to_le_bytes())), Err(E::Malformed { .. })));
        assert!(matches!(examined(&patched(72, &200_u64.to_le_bytes())), Err(E::Truncated { what: "a segment", .. })));
        assert!(matches!(examined(&patched(88, &0_u64.to_le_bytes())), Err(E::TooLow { .. })));
        assert!(matches!(examined(&patched(88, &u64::MAX.to_le_bytes())), Err(E::Malformed { .. })));
        assert!(matches!(examined(&patched(96, &(2 * MIB).to_le_bytes())), Err(E::Truncated { .. })));
        assert!(matches!(examined(&patched(104, &1_u64.to_le_bytes())), Err(E::Malformed { .. })));
        assert!(matches!(examined(&patched(24, &0_u64.to_le_bytes())), Err(E::EntryOutside { .. })));
    }

    #[test]
    fn a_truncated_elf_is_told_at_every_length() {
        let elf = tiny_elf(&[0x90; 16], Bytes(MIB));
        for length in 4..elf.len() {
            assert!(matches!(examined(&elf[..length]), Err(KernelImageError::Truncated { .. })), "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_what_passes_is_in_bounds(
            at in 0_usize..120, bytes in proptest::collection::vec(any::<u8>(), 1..12), cut in 0_usize..140,
        ) {
            let mut elf = tiny_elf(&[0x90; 16], Bytes(MIB));
            for (offset, byte) in bytes.iter().enumerate() {
                if let Some(place) = elf.get_mut(at + offset) { *place = *byte; }
            }
            elf.truncate(cut.max(4));
            if let Ok(shape) = examined(&elf) {
                prop_assert!(shape.start >= HIGH_MEMORY && shape.end > shape.start && shape.holds(shape.entry));
            }
        }

        #[test]
        fn no_setup_header_panics(bytes in proptest::collection::vec(any::<u8>(), SETUP_BYTES..8192)) {
            let mut image = bytes;
            image[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xAA]);
            image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
            if let Ok(shape) = examined(&image) {
                prop_assert!(shape.start >= HIGH_MEMORY && shape.holds(shape.entry));
            }
        }
    }
}
