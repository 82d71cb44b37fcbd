//! vsock packets (virtio 1.2 section 5.10.6): the 44 header bytes, taken apart and put together. Pure; fuzzed.

use crate::machine::virtio::spec::vsock::{HEADER_BYTES, TYPE_STREAM};

/// What a packet is for (5.10.6, `VIRTIO_VSOCK_OP_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    /// Asks for a connection.
    Request = 1,
    /// Accepts one.
    Response = 2,
    /// There is no such connection, or not any more.
    Reset = 3,
    /// The sender will send, or receive, no more.
    Shutdown = 4,
    /// Bytes.
    Data = 5,
    /// Tells how much room the sender has.
    CreditUpdate = 6,
    /// Asks for that.
    CreditRequest = 7,
}

impl Operation {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];
}

/// The two ends of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    /// Port on the host's side.
    pub host: u32,
    /// Port on the guest's side.
    pub guest: u32,
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub source_cid: u64,
    /// Context id of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes after the header.
    pub length: u32,
    /// Socket type.
    pub kind: u16,
    /// What it is for; not yet known to be an [`Operation`].
    pub operation: u16,
    /// Depends on the operation.
    pub flags: u32,
    /// Bytes of buffer the sender has for this stream.
    pub buffer: u32,
    /// Bytes the sender has taken out of it so far, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Takes a header apart.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut at = Fields { bytes };
        Self {
            source_cid: u64::from_le_bytes(at.take()),
            destination_cid: u64::from_le_bytes(at.take()),
            source_port: u32::from_le_bytes(at.take()),
            destination_port: u32::from_le_bytes(at.take()),
            length: u32::from_le_bytes(at.take()),
            kind: u16::from_le_bytes(at.take()),
            operation: u16::from_le_bytes(at.take()),
            flags: u32::from_le_bytes(at.take()),
            buffer: u32::from_le_bytes(at.take()),
            forwarded: u32::from_le_bytes(at.take()),
        }
    }

    /// Puts it together.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let parts: [&[u8]; 10] = [
            &self.source_cid.to_le_bytes(),
            &self.destination_cid.to_le_bytes(),
            &self.source_port.to_le_bytes(),
            &self.destination_port.to_le_bytes(),
            &self.length.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.operation.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buffer.to_le_bytes(),
            &self.forwarded.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// What it is for, if that is known.
    pub fn operation(&self) -> Option<Operation> {
        Operation::ALL.into_iter().find(|known| *known as u16 == self.operation)
    }

    /// Whether it belongs to a stream socket.
    pub fn is_stream(&self) -> bool {
        self.kind == TYPE_STREAM
    }
}

struct Fields<'a> {
    bytes: &'a [u8],
}

impl Fields<'_> {
    /// The next field. The fields above add up to the header's size, so it is there; a missing one would read as 0.
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.bytes.split_first_chunk::<N>() else { return [0; N] };
        self.bytes = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes: [u8; HEADER_BYTES] = std::array::from_fn(|at| u8::try_from(at).unwrap());
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.source_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.destination_port, 0x1716_1514);
        assert_eq!((header.kind, header.operation), (0x1d1c, 0x1f1e));
        assert_eq!(header.forwarded, 0x2b2a_2928);
        assert_eq!(header.operation(), None);
    }

    proptest! {
        #[test]
        fn headers_survive(bytes: [u8; 32], more: [u8; 12]) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            prop_assert_eq!(Header::from_bytes(&all).to_bytes(), all);
        }
    }
}
