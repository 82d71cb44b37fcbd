//! Which fetched bundles give way when they take more space than they may. Pure.

use crate::clock::UnixNanos;
use crate::ids::BundleId;

/// A bundle that was fetched, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub id: BundleId,
    /// Bytes it takes on disk.
    pub disk_bytes: u64,
    /// When it was last used.
    pub last_used: UnixNanos,
    /// Whether somebody wants to keep it.
    pub pinned: bool,
    /// Whether something runs from it, or is about to.
    pub in_use: bool,
}

/// The bundles to remove so that all take `cap_bytes` at most: least recently used ones first, and none that is pinned or in
/// use, which may leave more than that.
pub fn to_remove(bundles: &[Candidate], cap_bytes: u64) -> Vec<BundleId> {
    let sum = bundles.iter().fold(0_u64, |sum, bundle| sum.saturating_add(bundle.disk_bytes));
    let mut excess = sum.saturating_sub(cap_bytes);
    let mut free: Vec<&Candidate> = bundles.iter().filter(|bundle| !bundle.pinned && !bundle.in_use).collect();
    free.sort_by(|a, b| (a.last_used, &a.id).cmp(&(b.last_used, &b.id)));
    let mut removed = Vec::new();
    for bundle in free {
        if excess == 0 {
            break;
        }
        // One that takes nothing is no help.
        if bundle.disk_bytes > 0 {
            excess = excess.saturating_sub(bundle.disk_bytes);
            removed.push(bundle.id.clone());
        }
    }
    removed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(number: usize) -> BundleId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        BundleId::from_digest(bytes)
    }

    fn candidates(written: &[(u64, u64, bool, bool)]) -> Vec<Candidate> {
        let one = |(number, (disk_bytes, last_used, pinned, in_use)): (usize, &(u64, u64, bool, bool))| Candidate {
            id: id(number),
            disk_bytes: *disk_bytes,
            last_used: UnixNanos(*last_used),
            pinned: *pinned,
            in_use: *in_use,
        };
        written.iter().enumerate().map(one).collect()
    }

    #[test]
    fn the_least_recently_used_gives_way_first() {
        let bundles =
            candidates(&[(10, 3, false, false), (10, 1, false, false), (10, 2, true, false), (10, 0, false, true)]);
        assert!(to_remove(&bundles, 40).is_empty());
        assert_eq!(to_remove(&bundles, 39), [id(1)]);
        assert_eq!(to_remove(&bundles, 20), [id(1), id(0)]);
        assert_eq!(to_remove(&bundles, 0), [id(1), id(0)], "the others stay whatever they take");
        assert!(to_remove(&candidates(&[(u64::MAX, 0, true, false), (u64::MAX, 0, false, true)]), 5).is_empty());
    }

    proptest! {
        #[test]
        fn no_more_goes_than_has_to_and_none_that_is_wanted(
            written in proptest::collection::vec((0_u64..100, 0_u64..8, any::<bool>(), any::<bool>()), 0..20),
            cap_bytes in 0_u64..800,
        ) {
            let bundles = candidates(&written);
            let removed = to_remove(&bundles, cap_bytes);
            let is_removed = |bundle: &&Candidate| removed.contains(&bundle.id);
            let sum = |of: &mut dyn Iterator<Item = &Candidate>| of.map(|bundle| bundle.disk_bytes).sum::<u64>();
            let left = sum(&mut bundles.iter().filter(|bundle| !is_removed(bundle)));
            prop_assert!(bundles.iter().filter(is_removed).all(|bundle| !bundle.pinned && !bundle.in_use));
            let free = |bundle: &&Candidate| !bundle.pinned && !bundle.in_use && bundle.disk_bytes > 0;
            // It is enough, or nothing else could go.
            let could = bundles.iter().filter(free).any(|bundle| !is_removed(&bundle));
            prop_assert!(left <= cap_bytes || !could);
            // Without the last one it would not have been enough.
            if let Some(last) = removed.last() {
                let last = bundles.iter().find(|bundle| bundle.id == *last).map_or(0, |bundle| bundle.disk_bytes);
                prop_assert!(left + last > cap_bytes);
            }
            // Nothing that stays was used before something that went.
            let oldest_kept = bundles.iter().filter(free).filter(|bundle| !is_removed(bundle)).map(|one| one.last_used).min();
            let newest_gone = bundles.iter().filter(is_removed).map(|one| one.last_used).max();
            prop_assert!(oldest_kept.zip(newest_gone).is_none_or(|(kept, gone)| gone <= kept));
            let mut turned = bundles.clone();
            turned.reverse();
            prop_assert_eq!(to_remove(&turned, cap_bytes), removed, "whatever order they come in");
        }
    }
}
