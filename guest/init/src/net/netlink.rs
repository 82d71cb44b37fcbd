//! Talking netlink: requests written byte by byte, listings, and batches of changes.

use alloc::vec;
use alloc::vec::Vec;

use crate::sys::{Errno, Netlink};

// linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

/// Bytes of `struct nlmsghdr`: length, kind, flags, sequence, sender.
const HEADER_BYTES: usize = 16;
/// Where the flags are in it.
const FLAGS_AT: usize = 6;

/// Requests for one send, each with what it is for.
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Where the request being written begins.
    start: usize,
    sequence: u32,
    steps: Vec<Step>,
}

struct Step {
    sequence: u32,
    what: &'static str,
    /// Errors that mean there was nothing to do.
    passes: &'static [Errno],
}

impl Batch {
    /// Begins one more request, which `what` tells people when it fails with anything but `passes`.
    pub(super) fn request(&mut self, kind: u16, flags: u16, what: &'static str, passes: &'static [Errno]) -> &mut Self {
        self.start = self.bytes.len();
        self.sequence = self.sequence.wrapping_add(1);
        self.steps.push(Step { sequence: self.sequence, what, passes });
        self.raw(&[0; 4]).raw(&kind.to_le_bytes()).raw(&(NLM_F_REQUEST | flags).to_le_bytes());
        // The kernel fills in who asks.
        self.bytes.extend_from_slice(&self.sequence.to_le_bytes());
        self.raw(&[0; 4])
    }

    /// Appends to the request; a multiple of four bytes.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.close()
    }

    /// Appends an attribute to the request.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(&kind.to_le_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.close()
    }

    /// Writes the request's length as it is now.
    fn close(&mut self) -> &mut Self {
        let length = u32::try_from(self.bytes.len() - self.start).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(self.start..).and_then(<[u8]>::first_chunk_mut::<4>) {
            *place = length.to_le_bytes();
        }
        self
    }
}

/// A conversation with the kernel.
pub(super) struct Channel {
    socket: Netlink,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Channel {
    pub(super) fn open() -> Result<Self, Errno> {
        // The kernel's datagrams of a listing are at most 32 KiB.
        Ok(Self { socket: Netlink::new()?, sequence: 0, buffer: vec![0; 32 * 1024] })
    }

    /// An empty batch.
    pub(super) fn batch(&self) -> Batch {
        Batch { bytes: Vec::new(), start: 0, sequence: self.sequence, steps: Vec::new() }
    }

    /// Asks for a listing: `head` and then attributes; hands each entry's kind and content to `take`.
    pub(super) fn list(
        &mut self,
        kind: u16,
        head: &[u8],
        attributes: &[(u16, &[u8])],
        mut take: impl FnMut(u16, &[u8]),
    ) -> Result<(), Errno> {
        let mut batch = self.batch();
        batch.request(kind, NLM_F_DUMP, "", &[]).raw(head);
        for (kind, value) in attributes {
            batch.attribute(*kind, value);
        }
        self.sequence = batch.sequence;
        self.socket.send(&batch.bytes)?;
        let last = self.sequence;
        self.hear(|kind, sequence, body| {
            if sequence != last {
                return None;
            }
            match kind {
                NLMSG_DONE => Some(Ok(())),
                NLMSG_ERROR => Some(error_of(body).map_or(Ok(()), Err)),
                other => {
                    take(other, body);
                    None
                }
            }
        })?
    }

    /// Has all of a batch done, in order. Each request is tried whatever became of those before it; the first that
    /// failed is the error.
    pub(super) fn carry_out(&mut self, mut batch: Batch) -> Result<(), (Errno, &'static str)> {
        // Failures are always answered. One acknowledgement, of the last request, tells that all are done.
        let flags = batch.bytes.get_mut(batch.start..).and_then(|last| last.get_mut(FLAGS_AT));
        let Some(flags) = flags else { return Ok(()) };
        *flags |= NLM_F_ACK.to_le_bytes()[0];
        self.sequence = batch.sequence;
        let last = self.sequence;
        let mut failed = None;
        self.socket.send(&batch.bytes).map_err(|errno| (errno, "change the network"))?;
        let heard = self.hear(|kind, sequence, body| {
            let step = batch.steps.iter().find(|step| step.sequence == sequence)?;
            if kind != NLMSG_ERROR {
                return None;
            }
            if let Some(errno) = error_of(body)
                && failed.is_none()
                && !step.passes.contains(&errno)
            {
                failed = Some((errno, step.what));
            }
            (sequence == last).then_some(())
        });
        heard.map_err(|errno| (errno, "hear of the network's changes"))?;
        failed.map_or(Ok(()), Err)
    }

    /// Hands kind, sequence and content of each message to `take` until it gives a result.
    fn hear<T>(&mut self, mut take: impl FnMut(u16, u32, &[u8]) -> Option<T>) -> Result<T, Errno> {
        loop {
            let count = self.socket.receive(&mut self.buffer)?;
            let mut rest = self.buffer.get(..count).unwrap_or_default();
            while let Some(header) = rest.first_chunk::<HEADER_BYTES>() {
                let [l0, l1, l2, l3, k0, k1, _, _, s0, s1, s2, s3, ..] = *header;
                let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
                let body = rest.get(HEADER_BYTES..length).ok_or(Errno::PROTO)?;
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                let sequence = u32::from_le_bytes([s0, s1, s2, s3]);
                if let Some(result) = take(u16::from_le_bytes([k0, k1]), sequence, body) {
                    return Ok(result);
                }
            }
        }
    }
}

/// The error that an NLMSG_ERROR tells; none is an acknowledgement.
fn error_of(body: &[u8]) -> Option<Errno> {
    let code = body.first_chunk::<4>().map_or(-Errno::PROTO.number(), |code| i32::from_le_bytes(*code));
    (code != 0).then(|| Errno::from_number(code.saturating_neg()))
}

/// The value of one attribute in a list of them.
pub(super) fn attribute(list: Option<&[u8]>, wanted: u16) -> Option<&[u8]> {
    let mut rest = list?;
    while let Some(&[l0, l1, k0, k1]) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_le_bytes([l0, l1]));
        let value = rest.get(4..length)?;
        if u16::from_le_bytes([k0, k1]) == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}
