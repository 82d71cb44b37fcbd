//! What is known of other hosts: which peers answer, and who said what speaks against the fabric. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::bodies::Conflict;
use crate::clock::Monotonic;

/// Most hosts whose hellos showed a conflict that are remembered.
const CALLERS_MAX: usize = 16;

/// How long a conflict is believed that somebody told of without a key, and not again.
pub(super) const UNSIGNED_LIFETIME: Duration = Duration::from_secs(60);

/// How a peer is reached.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PeerState {
    /// Not asked yet.
    #[default]
    Unknown,
    /// It answers.
    Reachable,
    /// It does not answer.
    Unreachable {
        /// Why not, as a chain.
        why: String,
    },
    /// It answers, but it is not to be believed, or does not believe this host: another key, most likely, or no TLS.
    Refused {
        /// Why, as a chain.
        why: String,
    },
    /// It answers, and something speaks against being of one fabric with it.
    Conflict,
}

impl PeerState {
    /// The state's name, as in answers.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Reachable => "reachable",
            Self::Unreachable { .. } => "unreachable",
            Self::Refused { .. } => "refused",
            Self::Conflict => "conflict",
        }
    }

    /// Why it is not reachable, if it is not.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Unreachable { why } | Self::Refused { why } => Some(why),
            Self::Unknown | Self::Reachable | Self::Conflict => None,
        }
    }
}

/// What is known of one peer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct PeerEntry {
    pub(super) state: PeerState,
    /// When it last answered.
    pub(super) heard_at: Option<Monotonic>,
}

/// A host whose hello showed a conflict.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Caller {
    heard_at: Monotonic,
    /// Whether it has the key.
    signed: bool,
}

/// What is known of other hosts.
#[derive(Debug, Default)]
pub(super) struct Book {
    peers: BTreeMap<String, PeerEntry>,
    callers: BTreeMap<IpAddr, Caller>,
}

/// What a caller's hello changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CallerChange {
    /// Nothing.
    None,
    /// There is a conflict.
    Raised,
    /// There is none any more.
    Over,
}

impl Book {
    /// Notes how a peer is; returns how it was.
    pub(super) fn set_peer(&mut self, name: &str, state: PeerState, heard_at: Option<Monotonic>) -> PeerState {
        let entry = self.peers.entry(name.to_owned()).or_default();
        entry.heard_at = heard_at.or(entry.heard_at);
        std::mem::replace(&mut entry.state, state)
    }

    /// What is known of a peer.
    pub(super) fn peer(&self, name: &str) -> PeerEntry {
        self.peers.get(name).cloned().unwrap_or_default()
    }

    /// Notes what a hello from `from` showed.
    ///
    /// One without a key may be anybody's. It raises a conflict, once, and neither changes nor ends one; it is believed
    /// for [`UNSIGNED_LIFETIME`]. So nobody without the key can undo what was seen, or fill the events.
    pub(super) fn heard(
        &mut self,
        from: IpAddr,
        conflict: Option<&Conflict>,
        signed: bool,
        now: Monotonic,
    ) -> CallerChange {
        let has_room = self.callers.len() < CALLERS_MAX;
        let known = self.callers.get_mut(&from);
        match (conflict, known) {
            (Some(_), Some(known)) => {
                known.heard_at = now;
                // What a host with the key says may have changed: it is told again.
                if signed {
                    known.signed = true;
                    return CallerChange::Raised;
                }
                CallerChange::None
            }
            (Some(_), None) if has_room => {
                self.callers.insert(from, Caller { heard_at: now, signed });
                CallerChange::Raised
            }
            (None, Some(_)) if signed => {
                self.callers.remove(&from);
                CallerChange::Over
            }
            (Some(_), None) | (None, Some(_) | None) => CallerChange::None,
        }
    }

    /// Forgets what was said without a key and not said again; returns by whom.
    pub(super) fn fade(&mut self, now: Monotonic) -> Vec<IpAddr> {
        let is_over = |caller: &Caller| !caller.signed && now.since(caller.heard_at) >= UNSIGNED_LIFETIME;
        let over: Vec<IpAddr> =
            self.callers.iter().filter(|(_, caller)| is_over(caller)).map(|(from, _)| *from).collect();
        for from in &over {
            self.callers.remove(from);
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const SAME: Conflict = Conflict::SameNumber { number: 3 };

    fn from(last: u8) -> IpAddr {
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    fn at(seconds: u64) -> Monotonic {
        Monotonic(0).after(Duration::from_secs(seconds))
    }

    #[test]
    fn without_a_key_a_conflict_is_raised_once_and_fades() {
        let mut book = Book::default();
        assert_eq!(book.heard(from(1), Some(&SAME), false, at(0)), CallerChange::Raised);
        assert_eq!(book.heard(from(1), Some(&SAME), false, at(30)), CallerChange::None);
        assert_eq!(book.heard(from(1), None, false, at(31)), CallerChange::None);
        assert!(book.fade(at(89)).is_empty());
        assert_eq!(book.fade(at(90)), [from(1)]);
        assert!(book.fade(at(91)).is_empty());
        assert_eq!(book.heard(from(2), None, false, at(100)), CallerChange::None);
    }

    #[test]
    fn with_a_key_a_conflict_stays_until_it_is_over() {
        let mut book = Book::default();
        assert_eq!(book.heard(from(1), Some(&SAME), true, at(0)), CallerChange::Raised);
        assert!(book.fade(at(100_000)).is_empty());
        assert_eq!(book.heard(from(1), None, false, at(1)), CallerChange::None);
        assert_eq!(book.heard(from(1), None, true, at(2)), CallerChange::Over);
        assert_eq!(book.heard(from(1), None, true, at(3)), CallerChange::None);
    }

    #[test]
    fn callers_are_bounded() {
        let mut book = Book::default();
        let raised = (0..100).filter(|last| book.heard(from(*last), Some(&SAME), false, at(0)) == CallerChange::Raised);
        assert_eq!(raised.count(), CALLERS_MAX);
        assert_eq!(book.fade(at(60)).len(), CALLERS_MAX);
        assert_eq!(book.heard(from(200), Some(&SAME), false, at(61)), CallerChange::Raised);
    }

    #[test]
    fn what_was_heard_of_a_peer_is_kept() {
        let mut book = Book::default();
        assert_eq!(book.set_peer("b", PeerState::Reachable, Some(at(5))), PeerState::Unknown);
        let gone = PeerState::Unreachable { why: "no".to_owned() };
        assert_eq!(book.set_peer("b", gone.clone(), None), PeerState::Reachable);
        assert_eq!(book.peer("b"), PeerEntry { state: gone, heard_at: Some(at(5)) });
        assert_eq!(book.peer("c"), PeerEntry::default());
    }
}
