//! Messages of nfnetlink, written byte by byte (linux/netfilter/nfnetlink.h).

use crate::sys::netlink::connection::HEADER_BYTES;

/// Bytes of `struct nfgenmsg`.
pub(super) const GENERAL_HEADER_BYTES: usize = 4;

/// NFNL_SUBSYS_NFTABLES.
const NFTABLES: u16 = 10;

/// Kinds of messages.
pub(super) mod kind {
    const fn of_nftables(message: u16) -> u16 {
        super::NFTABLES << 8 | message
    }
    pub(in crate::sys::nft) const BATCH_BEGIN: u16 = 0x10;
    pub(in crate::sys::nft) const BATCH_END: u16 = 0x11;
    pub(in crate::sys::nft) const GET_TABLE: u16 = of_nftables(1);
    pub(in crate::sys::nft) const NEW_ELEMENTS: u16 = of_nftables(12);
    pub(in crate::sys::nft) const GET_ELEMENTS: u16 = of_nftables(13);
    pub(in crate::sys::nft) const DELETE_ELEMENTS: u16 = of_nftables(14);
    pub(in crate::sys::nft) const GET_GENERATION: u16 = of_nftables(16);
    pub(in crate::sys::nft) const GET_OBJECT: u16 = of_nftables(19);
}

/// NLA_F_NESTED.
const NESTED: u16 = 0x8000;

/// Messages, one after the other.
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    pub(super) fn bytes(self) -> Vec<u8> {
        self.0
    }

    /// A message about `family`, with the attributes that `fill` writes.
    pub(super) fn message(&mut self, kind: u16, flags: u16, number: u32, family: u8, fill: impl FnOnce(&mut Self)) {
        // Begin and end of a batch name the subsystem that it is for; elsewhere the field has no meaning.
        let resource = if kind == kind::BATCH_BEGIN || kind == kind::BATCH_END { NFTABLES } else { 0 };
        let start = self.0.len();
        self.0.extend([0; 4]);
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(flags.to_ne_bytes());
        self.0.extend(number.to_ne_bytes());
        self.0.extend([0; 4]);
        debug_assert_eq!(self.0.len() - start, HEADER_BYTES);
        self.0.extend([family, 0]);
        self.0.extend(resource.to_be_bytes());
        fill(self);
        let length = u32::try_from(self.0.len() - start).unwrap_or(u32::MAX);
        self.0[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// An attribute. One that is too long for its length field gets a length that the kernel refuses.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.filled(kind, |writer| writer.0.extend(value));
    }

    /// A string with its zero.
    pub(super) fn string(&mut self, kind: u16, value: &str) {
        self.filled(kind, |writer| {
            writer.0.extend(value.as_bytes());
            writer.0.push(0);
        });
    }

    /// An attribute of attributes.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        self.filled(kind | NESTED, fill);
    }

    fn filled(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        fill(self);
        let length = u16::try_from(self.0.len() - start).unwrap_or(0);
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netlink::connection::{attributes, string};

    #[test]
    fn what_is_written_is_read_back() {
        let mut writer = Writer::new();
        writer.message(kind::NEW_ELEMENTS, 5, 7, 1, |writer| {
            writer.string(1, "hearth");
            writer.nest(3, |writer| {
                writer.attribute(1, &[1, 2, 3]);
                writer.attribute(2, &[]);
            });
        });
        let bytes = writer.bytes();
        assert_eq!(bytes[..4], u32::try_from(bytes.len()).unwrap().to_ne_bytes());
        assert_eq!(bytes[HEADER_BYTES..HEADER_BYTES + 4], [1, 0, 0, 0]);
        let fields: Vec<(u16, &[u8])> = attributes(&bytes[HEADER_BYTES + GENERAL_HEADER_BYTES..]).collect();
        assert_eq!((fields[0].0, string(fields[0].1)), (1, "hearth".to_owned()));
        assert_eq!(attributes(fields[1].1).collect::<Vec<_>>(), [(1, &[1, 2, 3][..]), (2, &[][..])]);
        assert_eq!(fields.len(), 2);
        let mut begin = Writer::new();
        begin.message(kind::BATCH_BEGIN, 1, 1, 0, |_| {});
        assert_eq!(begin.bytes()[HEADER_BYTES..], [0, 0, 0, 10]);
    }
}
