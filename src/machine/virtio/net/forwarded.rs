//! Frames that reached a guest's interface on the host it left: they are forwarded to the host it is on now, and get to
//! the guest before anything the interface's new tap has for it.

use std::collections::VecDeque;

/// Most frames and bytes that wait for a guest's buffers: what the other host's tap can hold, many times over.
pub(super) const FRAMES_MAX: usize = 8192;
pub(super) const BYTES_MAX: usize = 16 << 20;

/// The queue.
#[derive(Debug, Default)]
pub(super) struct Forwarded {
    frames: VecDeque<Box<[u8]>>,
    bytes: usize,
    /// Whether more may come, which have to be waited for.
    expected: bool,
}

impl Forwarded {
    /// From here on the tap waits until [`Forwarded::end`].
    pub(super) fn expect(&mut self) {
        self.expected = true;
    }

    /// No more will come.
    pub(super) fn end(&mut self) {
        self.expected = false;
    }

    /// Adds a frame with its header; false if there is no room for it.
    pub(super) fn push(&mut self, frame: Box<[u8]>) -> bool {
        let fits = self.frames.len() < FRAMES_MAX && self.bytes + frame.len() <= BYTES_MAX;
        if fits {
            self.bytes += frame.len();
            self.frames.push_back(frame);
        }
        fits
    }

    /// The next frame.
    pub(super) fn pop(&mut self) -> Option<Box<[u8]>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }

    /// Whether the tap's frames have to wait.
    pub(super) fn goes_first(&self) -> bool {
        self.expected || !self.frames.is_empty()
    }

    /// Whether there is a frame.
    pub(super) fn has_some(&self) -> bool {
        !self.frames.is_empty()
    }

    /// Forgets the frames.
    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_in_order_and_are_bounded() {
        let mut forwarded = Forwarded::default();
        assert!(!forwarded.goes_first());
        forwarded.expect();
        assert!(forwarded.goes_first() && !forwarded.has_some());
        for number in 0..FRAMES_MAX {
            assert!(forwarded.push(Box::new(number.to_le_bytes())));
        }
        assert!(!forwarded.push(Box::new([0])), "one more than there is room for");
        forwarded.end();
        for number in 0..FRAMES_MAX {
            assert!(forwarded.goes_first());
            assert_eq!(*forwarded.pop().unwrap(), number.to_le_bytes());
        }
        assert!(!forwarded.goes_first() && forwarded.pop().is_none());
        let large = || vec![0; BYTES_MAX / 4].into_boxed_slice();
        assert_eq!(
            [large(), large(), large(), large(), large()].map(|frame| forwarded.push(frame)),
            [true, true, true, true, false]
        );
        forwarded.clear();
        assert!(forwarded.push(large()));
    }
}
