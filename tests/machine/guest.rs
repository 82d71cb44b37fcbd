//! Tiny guests: machine code written instruction by instruction, wrapped into an ELF kernel that is loaded and entered at
//! 1 MiB in 64-bit mode with the first 4 GiB mapped to themselves.

use std::fs::File;
use std::io::Write;

/// Where the code is loaded.
pub(crate) const CODE: u32 = 0x10_0000;

/// Memory for the guest's own use, away from code and boot structures.
pub(crate) const DATA: u32 = 0x20_0000;

pub(crate) const SERIAL: u16 = 0x3F8;
pub(crate) const EVENT: u16 = 0x600;

/// Machine code in the making.
#[derive(Default, Clone)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// mov dx, port; mov al, value; out dx, al
    pub(crate) fn out(self, port: u16, value: u8) -> Self {
        self.bytes(&[0x66, 0xBA]).bytes(&port.to_le_bytes()).bytes(&[0xB0, value, 0xEE])
    }

    /// mov dx, port; out dx, al
    pub(crate) fn out_al(self, port: u16) -> Self {
        self.bytes(&[0x66, 0xBA]).bytes(&port.to_le_bytes()).bytes(&[0xEE])
    }

    /// mov dx, port; in al, dx
    pub(crate) fn in_al(self, port: u16) -> Self {
        self.bytes(&[0x66, 0xBA]).bytes(&port.to_le_bytes()).bytes(&[0xEC])
    }

    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(SERIAL, byte))
    }

    /// mov byte [address], value
    pub(crate) fn store8(self, address: u32, value: u8) -> Self {
        self.bytes(&[0xC6, 0x04, 0x25]).bytes(&address.to_le_bytes()).bytes(&[value])
    }

    /// mov dword [address], value
    pub(crate) fn store32(self, address: u32, value: u32) -> Self {
        // The address in a register: an absolute one would be sign-extended.
        self.bytes(&[0xB8]).bytes(&address.to_le_bytes()).bytes(&[0xC7, 0x00]).bytes(&value.to_le_bytes())
    }

    /// inc qword [address]
    pub(crate) fn increment(self, address: u32) -> Self {
        self.bytes(&[0x48, 0xFF, 0x04, 0x25]).bytes(&address.to_le_bytes())
    }

    /// mov ecx, index; mov eax, low; mov edx, high; wrmsr
    pub(crate) fn write_msr(self, index: u32, value: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        self.bytes(&[0xB9]).bytes(&index.to_le_bytes()).bytes(&[0xB8, a, b, c, d, 0xBA, e, f, g, h, 0x0F, 0x30])
    }

    /// rdtsc; mov [address], eax; mov [address + 4], edx
    pub(crate) fn store_tsc(self, address: u32) -> Self {
        self.bytes(&[0x0F, 0x31, 0x89, 0x04, 0x25])
            .bytes(&address.to_le_bytes())
            .bytes(&[0x89, 0x14, 0x25])
            .bytes(&(address + 4).to_le_bytes())
    }

    /// Writes `bytes` to `address`, one by one.
    pub(crate) fn copy(self, address: u32, bytes: &[u8]) -> Self {
        bytes.iter().zip(address..).fold(self, |code, (byte, at)| code.store8(at, *byte))
    }

    /// Runs `body` for ever.
    pub(crate) fn forever(self, body: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        let code = body(self);
        let back = i32::try_from(code.0.len() + 5 - start).unwrap();
        code.bytes(&[0xE9]).bytes(&(-back).to_le_bytes())
    }

    /// Runs `body` until it leaves the zero flag clear.
    pub(crate) fn until_not_zero(self, body: impl FnOnce(Self) -> Self) -> Self {
        let start = self.0.len();
        let code = body(self);
        let back = i8::try_from(code.0.len() + 2 - start).unwrap();
        code.bytes(&[0x74]).bytes(&(-back).to_le_bytes())
    }

    /// test al, mask
    pub(crate) fn test_al(self, mask: u8) -> Self {
        self.bytes(&[0xA8, mask])
    }

    /// cli; hlt; and again if it is woken
    pub(crate) fn halt(self) -> Self {
        self.bytes(&[0xFA]).forever(|code| code.bytes(&[0xF4]))
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// The code as a kernel.
    pub(crate) fn kernel(self) -> File {
        file(&elf(&self.0, 0x1_0000))
    }
}

/// A file with this content and no name.
pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF executable with one segment: `code` at [`CODE`], `in_memory` bytes or more.
pub(crate) fn elf(code: &[u8], in_memory: u64) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(b"\x7fELF\x02\x01\x01");
    header.resize(16, 0);
    header.extend(2_u16.to_le_bytes());
    header.extend(62_u16.to_le_bytes());
    header.extend(1_u32.to_le_bytes());
    header.extend(u64::from(CODE).to_le_bytes());
    header.extend(64_u64.to_le_bytes());
    header.extend([0; 8 + 4]);
    header.extend(64_u16.to_le_bytes());
    header.extend(56_u16.to_le_bytes());
    header.extend(1_u16.to_le_bytes());
    header.extend([0; 6]);
    assert_eq!(header.len(), 64);
    header.extend(1_u32.to_le_bytes());
    header.extend(7_u32.to_le_bytes());
    header.extend(120_u64.to_le_bytes());
    header.extend(u64::from(CODE).to_le_bytes());
    header.extend(u64::from(CODE).to_le_bytes());
    let length = code.len() as u64;
    header.extend(length.to_le_bytes());
    header.extend(length.max(in_memory).to_le_bytes());
    header.extend(0x1000_u64.to_le_bytes());
    header.extend(code);
    header
}
