//! When pre-copy goes on, slows the guest down, stops it for the last pages, or gives up: a pure function of what the rounds
//! did so far. No clock is read and nothing is sent here.
//!
//! A round sends the pages that were dirty when it began; what the guest writes meanwhile is dirty after it. With `d` bytes
//! left after a round, sent at rate `r`, and a part `f` of the pause that does not depend on them (vCPUs out, state, the
//! target's start), the pause would be `d / r + f`.
//!
//! ```text
//! pause fits the bound ─▶ Critical
//! dirty > 0.9 × dirty of the round before, three times ─▶ does not converge
//!         may throttle ─▶ Throttle: the vCPUs run 80, 60, 40, 20 % of the time
//!         else         ─▶ Critical if it is forced, Abort if not
//! rounds or time used up ─▶ the same two
//! ```

use std::time::Duration;

use crate::units::{Bytes, PAGE_BYTES};

/// What is done with a guest that writes faster than its pages can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unconverged {
    /// It stays where it is.
    #[default]
    Abort,
    /// It is moved all the same, with a pause as long as it takes.
    Force,
}

/// Bounds of a pre-copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Longest pause that is aimed at.
    pub pause_max: Duration,
    /// Rounds after which no other begins.
    pub rounds_max: u32,
    /// Time after which no other round begins.
    pub deadline: Duration,
    /// Whether vCPUs may be slowed down.
    pub throttle: bool,
    /// What is done when all this did not help.
    pub unconverged: Unconverged,
}

/// What a round did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// Bytes of guest memory that it carried to the target; zero pages count as they are in memory.
    pub sent: Bytes,
    /// How long that took, until the last was acknowledged.
    pub took: Duration,
    /// Bytes that were dirty when it was over.
    pub dirty: Bytes,
}

/// What comes after a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Another round.
    Round,
    /// Another round, with the vCPUs running this share of the time, in percent.
    Throttle(u8),
    /// The guest is held and the rest is sent.
    Critical,
    /// The guest stays.
    Abort(Abort),
}

/// Why a pre-copy was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Abort {
    /// It wrote as fast as its pages were sent.
    #[error("the guest writes memory as fast as it can be sent: {dirty} were left after {rounds} rounds")]
    Unconverged {
        /// Rounds made.
        rounds: u32,
        /// What was left.
        dirty: Bytes,
    },
    /// All rounds were made.
    #[error("{rounds} rounds were made and {dirty} are left")]
    Rounds {
        /// Rounds made.
        rounds: u32,
        /// What was left.
        dirty: Bytes,
    },
    /// The time was used up.
    #[error("the time for it was used up after {rounds} rounds, and {dirty} are left")]
    Deadline {
        /// Rounds made.
        rounds: u32,
        /// What was left.
        dirty: Bytes,
    },
}

/// Rounds in a row that have to make hardly any progress before a guest counts as one that does not converge.
const STUBBORN_ROUNDS: u32 = 3;

/// Shares of the time in which vCPUs run, one after the other, in percent.
const SHARES: [u8; 4] = [80, 60, 40, 20];

/// A pre-copy under way.
#[derive(Debug, Clone)]
pub struct PreCopy {
    policy: Policy,
    /// The part of the pause that does not depend on what is left.
    pause_fixed: Duration,
    rounds: u32,
    passed: Duration,
    /// Bytes sent and the time that took, over the rounds: the rate that counts. Early rounds are long and say most.
    sent: u64,
    sending: Duration,
    last_dirty: Option<u64>,
    stubborn: u32,
    /// How many of [`SHARES`] are used.
    throttled: usize,
}

impl PreCopy {
    /// Begins one whose pause takes `pause_fixed` beside the last pages.
    pub const fn new(policy: Policy, pause_fixed: Duration) -> Self {
        Self {
            policy,
            pause_fixed,
            rounds: 0,
            passed: Duration::ZERO,
            sent: 0,
            sending: Duration::ZERO,
            last_dirty: None,
            stubborn: 0,
            throttled: 0,
        }
    }

    /// How long the guest would be held if it were now, with `dirty` left.
    pub fn pause_expected(&self, dirty: Bytes) -> Duration {
        let nanos = u128::from(dirty.0) * self.sending.as_nanos() / u128::from(self.sent.max(1));
        let sending = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.pause_fixed.saturating_add(sending)
    }

    /// Bytes a second that were sent so far; `None` before the first round took any time.
    pub fn rate(&self) -> Option<Bytes> {
        let nanos = self.sending.as_nanos();
        let rate = (u128::from(self.sent) * 1_000_000_000).checked_div(nanos)?;
        Some(Bytes(u64::try_from(rate).unwrap_or(u64::MAX)))
    }

    /// What comes after a round. Ends with `Critical` or `Abort` after [`Policy::rounds_max`] rounds at the latest.
    pub fn after(&mut self, round: Round) -> Decision {
        self.rounds = self.rounds.saturating_add(1);
        self.passed = self.passed.saturating_add(round.took);
        self.sent = self.sent.saturating_add(round.sent.0);
        self.sending = self.sending.saturating_add(round.took);
        // Less than a page is nothing: such a round says nothing about the guest.
        let hardly_less = |before: u64| round.dirty.0 > PAGE_BYTES && round.dirty.0 > before / 10 * 9;
        let stubborn = self.last_dirty.replace(round.dirty.0).is_some_and(hardly_less);
        self.stubborn = if stubborn { self.stubborn + 1 } else { 0 };
        if round.dirty.0 == 0 || self.pause_expected(round.dirty) <= self.policy.pause_max {
            return Decision::Critical;
        }
        let (rounds, dirty) = (self.rounds, round.dirty);
        if rounds >= self.policy.rounds_max {
            return self.give_up(Abort::Rounds { rounds, dirty });
        }
        if self.passed >= self.policy.deadline {
            return self.give_up(Abort::Deadline { rounds, dirty });
        }
        if self.stubborn < STUBBORN_ROUNDS {
            return Decision::Round;
        }
        self.stubborn = 0;
        match SHARES.get(self.throttled).filter(|_| self.policy.throttle) {
            Some(share) => {
                self.throttled += 1;
                Decision::Throttle(*share)
            }
            None => self.give_up(Abort::Unconverged { rounds, dirty }),
        }
    }

    const fn give_up(&self, abort: Abort) -> Decision {
        match self.policy.unconverged {
            Unconverged::Abort => Decision::Abort(abort),
            Unconverged::Force => Decision::Critical,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::MIB;
    use proptest::prelude::*;

    const POLICY: Policy = Policy {
        pause_max: Duration::from_millis(10),
        rounds_max: 30,
        deadline: Duration::from_secs(60),
        throttle: true,
        unconverged: Unconverged::Abort,
    };

    /// A link of `rate` MiB/s and a guest that dirties `writes` MiB/s of its `memory` MiB while it runs all the time.
    fn simulate(policy: Policy, memory: u64, rate: u64, writes: u64) -> (Decision, u32, u64) {
        let mut copy = PreCopy::new(policy, Duration::from_millis(2));
        let (mut left, mut share) = (memory * MIB, 100_u8);
        for round in 1.. {
            let micros = left * 1_000_000 / (rate * MIB);
            let dirty = (writes * u64::from(share) * micros * MIB / 100_000_000).min(memory * MIB);
            let took = Duration::from_micros(micros);
            match copy.after(Round { sent: Bytes(left), took, dirty: Bytes(dirty) }) {
                Decision::Round => {}
                Decision::Throttle(to) => share = to,
                end @ (Decision::Critical | Decision::Abort(_)) => return (end, round, dirty),
            }
            left = dirty;
        }
        unreachable!("rounds are bounded")
    }

    #[test]
    fn an_idle_guest_is_held_after_one_round_and_a_slow_writer_after_a_few() {
        assert_eq!(simulate(POLICY, 1024, 1000, 0), (Decision::Critical, 1, 0));
        let (end, rounds, left) = simulate(POLICY, 1024, 1000, 100);
        assert_eq!(end, Decision::Critical);
        assert!((2..=4).contains(&rounds), "{rounds} rounds");
        // Eight milliseconds of a thousand MiB a second.
        assert!(left <= 8 * MIB, "{left} bytes left");
    }

    #[test]
    fn who_writes_faster_than_can_be_sent_is_slowed_down_or_stays() {
        let (end, ..) = simulate(Policy { throttle: false, ..POLICY }, 256, 100, 200);
        assert!(matches!(end, Decision::Abort(Abort::Unconverged { .. })), "{end:?}");
        let (end, ..) = simulate(Policy { throttle: false, unconverged: Unconverged::Force, ..POLICY }, 256, 100, 200);
        assert_eq!(end, Decision::Critical);
        // At 20 % it writes 40 MiB/s.
        let patient = Policy { deadline: Duration::from_secs(600), rounds_max: 100, ..POLICY };
        let (end, _, left) = simulate(patient, 256, 100, 200);
        assert_eq!(end, Decision::Critical);
        assert!(left < 256 * MIB, "{left} bytes left");
        let (end, ..) = simulate(POLICY, 256, 1, 200);
        assert!(matches!(end, Decision::Abort(Abort::Deadline { rounds: 1, .. })), "{end:?}");
        let (end, rounds, _) = simulate(Policy { rounds_max: 2, ..POLICY }, 256, 100, 90);
        assert!(matches!(end, Decision::Abort(Abort::Rounds { rounds: 2, .. })) && rounds == 2, "{end:?}");
    }

    proptest! {
        #[test]
        fn it_ends_and_never_holds_longer_than_it_may(
            rounds in proptest::collection::vec((0_u64..1 << 40, 0_u64..10_000_000_000, 0_u64..1 << 40), 1..80),
            throttle: bool, rounds_max in 1_u32..60, pause_ms in 0_u64..1000,
        ) {
            let pause_max = Duration::from_millis(pause_ms);
            let policy = Policy { throttle, rounds_max, pause_max, ..POLICY };
            let mut copy = PreCopy::new(policy, Duration::from_millis(1));
            let mut shares = vec![100];
            for (made, (sent, took, dirty)) in (1..).zip(rounds) {
                let dirty = Bytes(dirty);
                match copy.after(Round { sent: Bytes(sent), took: Duration::from_nanos(took), dirty }) {
                    Decision::Critical => {
                        prop_assert!(dirty.0 == 0 || copy.pause_expected(dirty) <= pause_max);
                        return Ok(());
                    }
                    Decision::Abort(_) => {
                        prop_assert!(copy.pause_expected(dirty) > pause_max);
                        return Ok(());
                    }
                    Decision::Throttle(share) => {
                        prop_assert!(throttle && share < *shares.last().unwrap());
                        shares.push(share);
                    }
                    Decision::Round => {}
                }
                prop_assert!(made < rounds_max);
            }
        }
    }
}
