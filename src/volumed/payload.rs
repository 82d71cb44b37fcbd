//! Memory for the bytes of reads and writes. A connection has a little of its own; what a large request needs beyond it is
//! taken from a stock that all share, so that however many clients ask for however much, it is bounded.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Bytes a connection has of its own: what clients ask for at once, mostly.
const OWN_BYTES: usize = 1 << 20;

/// Bytes of the stock: eight of the largest requests.
const STOCK_BYTES: usize = 8 * crate::wire::nbd::PAYLOAD_BYTES_MAX as usize;

/// What all connections share.
#[derive(Debug, Clone)]
pub(super) struct Stock(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    left: Mutex<usize>,
    given_back: Condvar,
}

impl Stock {
    pub(super) fn new() -> Self {
        Self(Arc::new(Shared { left: Mutex::new(STOCK_BYTES), given_back: Condvar::new() }))
    }
}

/// The memory of one connection.
#[derive(Debug)]
pub(super) struct Payload {
    stock: Stock,
    taken: usize,
    bytes: Vec<u8>,
}

impl Payload {
    pub(super) fn new(stock: &Stock) -> Self {
        Self { stock: stock.clone(), taken: 0, bytes: Vec::new() }
    }

    /// Room for so many bytes, which is at most the largest request; waits for others if the stock is used up. What was in
    /// it before is of no interest.
    pub(super) fn room(&mut self, bytes: usize) -> &mut [u8] {
        self.give_back();
        if bytes > OWN_BYTES {
            let shared = &self.stock.0;
            let left = shared.left.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = bytes.min(STOCK_BYTES);
            let left = shared.given_back.wait_while(left, |left| *left < wanted);
            *left.unwrap_or_else(PoisonError::into_inner) -= wanted;
            self.taken = wanted;
        }
        if self.bytes.len() < bytes {
            self.bytes.resize(bytes, 0);
        }
        &mut self.bytes[..bytes]
    }

    /// What is in it.
    pub(super) fn filled(&self, bytes: usize) -> &[u8] {
        &self.bytes[..bytes]
    }

    /// Gives back what goes beyond a connection's own.
    pub(super) fn give_back(&mut self) {
        if self.taken > 0 {
            self.bytes = Vec::new();
            *self.stock.0.left.lock().unwrap_or_else(PoisonError::into_inner) += self.taken;
            self.taken = 0;
            self.stock.0.given_back.notify_all();
        }
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_requests_wait_for_each_other_and_small_ones_do_not() {
        let stock = Stock::new();
        let most = crate::wire::nbd::PAYLOAD_BYTES_MAX as usize;
        let mut holders: Vec<_> = (0..STOCK_BYTES / most).map(|_| Payload::new(&stock)).collect();
        for holder in &mut holders {
            assert_eq!(holder.room(most).len(), most);
        }
        assert_eq!(Payload::new(&stock).room(OWN_BYTES).len(), OWN_BYTES);
        let waiting = std::thread::spawn({
            let stock = stock.clone();
            move || Payload::new(&stock).room(most).len()
        });
        drop(holders.pop());
        assert_eq!(waiting.join().unwrap(), most);
        drop(holders);
        assert_eq!(*stock.0.left.lock().unwrap(), STOCK_BYTES);
    }
}
