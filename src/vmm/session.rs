//! Who may ask: the rules of Hello, as a pure value. One agent at a time owns a VMM; a newer epoch takes over.

use crate::wire::control::Nonce;
use crate::wire::refusal::Refusal;

/// What this VMM knows of its agents.
#[derive(Debug)]
pub(super) struct Ownership {
    nonce: Nonce,
    /// The highest epoch that was welcomed; 0 before the first.
    epoch: u64,
}

impl Ownership {
    /// A VMM nobody has spoken to.
    pub(super) const fn new(nonce: Nonce) -> Self {
        Self { nonce, epoch: 0 }
    }

    /// Hello: from here on older epochs are refused.
    pub(super) fn hello(&mut self, nonce: Nonce, epoch: u64) -> Result<(), Refusal> {
        if nonce != self.nonce {
            return Err(Refusal::WrongNonce);
        }
        if epoch < self.epoch {
            return Err(Refusal::StaleEpoch { offered: epoch, current: self.epoch });
        }
        self.epoch = epoch;
        Ok(())
    }

    /// Whether a connection that said Hello with this epoch may go on asking.
    pub(super) fn admits(&self, epoch: Option<u64>) -> Result<(), Refusal> {
        match epoch {
            None => Err(Refusal::HelloFirst),
            Some(offered) if offered < self.epoch => Err(Refusal::StaleEpoch { offered, current: self.epoch }),
            Some(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NONCE: Nonce = Nonce([7; 16]);

    #[test]
    fn a_newer_agent_fences_the_older() {
        let mut ownership = Ownership::new(NONCE);
        assert_eq!(ownership.admits(None), Err(Refusal::HelloFirst));
        assert_eq!(ownership.hello(Nonce([8; 16]), 9), Err(Refusal::WrongNonce));
        ownership.hello(NONCE, 1).unwrap();
        ownership.admits(Some(1)).unwrap();
        ownership.hello(NONCE, 2).unwrap();
        assert_eq!(ownership.admits(Some(1)), Err(Refusal::StaleEpoch { offered: 1, current: 2 }));
        assert_eq!(ownership.hello(NONCE, 1), Err(Refusal::StaleEpoch { offered: 1, current: 2 }));
    }

    proptest! {
        #[test]
        fn only_the_highest_epoch_is_served(epochs in proptest::collection::vec(1_u64..20, 1..20)) {
            let mut ownership = Ownership::new(NONCE);
            for epoch in &epochs {
                let _ = ownership.hello(NONCE, *epoch);
            }
            let highest = epochs.iter().max().copied();
            for epoch in epochs {
                prop_assert_eq!(ownership.admits(Some(epoch)).is_ok(), Some(epoch) == highest);
            }
        }
    }
}
