//! What is to be done next about machines that are kept ready: a pure function of what there is. Launches go first: while
//! they are on their way, and where memory is short, none is made.

use std::time::Duration;

use crate::ids::BundleId;

/// Time after which a bundle of which no machine could be made ready is tried again, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// A bundle's pool, as the plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PoolFacts {
    /// Its bundle.
    pub(super) bundle: BundleId,
    /// How many are wanted.
    pub(super) size: usize,
    /// How many are ready.
    pub(super) ready: usize,
    /// How often in a row none could be made, and how long ago that was.
    pub(super) failed: Option<(u32, Duration)>,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Make one of this bundle ready.
    Make(BundleId),
    /// End one of this bundle.
    End(BundleId),
    /// Nothing, until something changes or so much time has passed.
    Rest(Option<Duration>),
}

/// Decides. `is_busy`: launches are on their way. `is_short`: memory that was promised is more than there is.
pub(super) fn next(pools: &[PoolFacts], is_busy: bool, is_short: bool) -> Next {
    if let Some(pool) = pools.iter().find(|pool| pool.ready > pool.size) {
        return Next::End(pool.bundle.clone());
    }
    if is_short {
        // VMs have the memory that these would want to have.
        let fullest = pools.iter().max_by_key(|pool| pool.ready).filter(|pool| pool.ready > 0);
        return fullest.map_or(Next::Rest(None), |pool| Next::End(pool.bundle.clone()));
    }
    let wanting = || pools.iter().filter(|pool| pool.ready < pool.size);
    if is_busy {
        return Next::Rest(None);
    }
    // The one that lacks most, by its size.
    let lacks = |pool: &&PoolFacts| (pool.size - pool.ready).saturating_mul(1000) / pool.size.max(1);
    let due = wanting().filter(|pool| wait(pool).is_none()).max_by_key(lacks);
    match due {
        Some(pool) => Next::Make(pool.bundle.clone()),
        None => Next::Rest(wanting().filter_map(wait).min()),
    }
}

/// How long this pool is left alone after failures; `None`: not at all.
fn wait(pool: &PoolFacts) -> Option<Duration> {
    let (times, ago) = pool.failed?;
    let (first, longest) = AGAIN;
    let whole = first.saturating_mul(1_u32.checked_shl(times.saturating_sub(1)).unwrap_or(u32::MAX)).min(longest);
    Some(whole.saturating_sub(ago)).filter(|left| !left.is_zero())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pool(number: u8, size: usize, ready: usize) -> PoolFacts {
        PoolFacts { bundle: BundleId::from_digest([number; 16]), size, ready, failed: None }
    }

    #[test]
    fn what_lacks_most_is_filled_first_and_what_is_too_much_goes() {
        let pools = [pool(1, 4, 3), pool(2, 2, 1), pool(3, 0, 0)];
        assert_eq!(next(&pools, false, false), Next::Make(pools[1].bundle.clone()));
        assert_eq!(next(&pools, true, false), Next::Rest(None), "launches go first");
        assert_eq!(next(&pools, false, true), Next::End(pools[0].bundle.clone()), "VMs go before what is ready");
        let pools = [pool(1, 4, 3), pool(2, 1, 2)];
        assert_eq!(next(&pools, true, false), Next::End(pools[1].bundle.clone()));
        assert_eq!(next(&[pool(1, 2, 2)], false, false), Next::Rest(None));
        assert_eq!(next(&[], false, true), Next::Rest(None));
    }

    #[test]
    fn what_fails_is_tried_ever_more_seldom() {
        let after = |times, ago_s| {
            let failed = Some((times, Duration::from_secs(ago_s)));
            next(&[PoolFacts { failed, ..pool(1, 1, 0) }], false, false)
        };
        assert_eq!(after(1, 0), Next::Rest(Some(Duration::from_secs(1))));
        assert!(matches!(after(1, 1), Next::Make(_)));
        assert_eq!(after(4, 2), Next::Rest(Some(Duration::from_secs(6))));
        assert_eq!(after(90, 0), Next::Rest(Some(Duration::from_secs(60))));
        assert!(matches!(after(90, 60), Next::Make(_)));
    }

    proptest! {
        #[test]
        fn it_comes_to_rest_with_what_is_wanted(sizes in proptest::collection::vec((0_usize..5, 0_usize..9), 0..5)) {
            let mut pools: Vec<PoolFacts> = (0..).zip(sizes).map(|(at, (size, ready))| pool(at, size, ready)).collect();
            for _ in 0..100 {
                let at = |bundle: &BundleId| pools.iter().position(|pool| pool.bundle == *bundle);
                match next(&pools, false, false) {
                    Next::Make(bundle) => { let at = at(&bundle).unwrap(); pools[at].ready += 1 }
                    Next::End(bundle) => { let at = at(&bundle).unwrap(); pools[at].ready -= 1 }
                    Next::Rest(_) => break,
                }
            }
            prop_assert!(pools.iter().all(|pool| pool.ready == pool.size));
            prop_assert_eq!(next(&pools, false, false), Next::Rest(None));
        }
    }
}
