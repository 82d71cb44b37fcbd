//! Saying hello: to each peer every few seconds, for as long as the agent lives. What a peer's answer shows is believed
//! until another answer of it shows something else.

use std::sync::Arc;
use std::time::Duration;

use super::bodies::{Hello, hello};
use super::book::{PeerState, UNSIGNED_LIFETIME};
use super::calls::PeerError;
use super::{HELLO_PATH, PeerCall};
use crate::agent::config::{FabricConfig, Peer};
use crate::agent::shared::Shared;
use crate::agent::world::{World, random_array};
use crate::clock::Clock;

/// Time between two hellos to a peer that answers.
const INTERVAL: Duration = Duration::from_secs(5);

/// Time until the second hello to a peer that did not answer the first: hosts are often started together.
const INTERVAL_FIRST: Duration = Duration::from_secs(1);

/// Longest time between two hellos to a peer that does not.
const INTERVAL_MAX: Duration = Duration::from_secs(30);

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(2);

/// The next wait after one to a peer that does not answer.
fn longer(wait: Duration) -> Duration {
    (wait * 2).min(INTERVAL_MAX)
}

/// A wait that differs by up to a fifth, so that hosts that started together do not stay together.
fn with_jitter(wait: Duration, random: u8) -> Duration {
    wait * (200 + u32::from(random) * 100 / 255 - 50) / 200
}

/// The word that names whoever found a peer's conflict.
fn source(peer: &Peer) -> String {
    format!("peer {}", peer.name)
}

/// For good: says hello to one peer.
pub(super) async fn greet<W: World>(shared: Arc<Shared<W>>, fabric: FabricConfig, peer: Peer) {
    let mut wait = INTERVAL_FIRST;
    loop {
        wait = if shared.greet_once(&fabric, &peer).await { INTERVAL } else { longer(wait) };
        let random: [u8; 1] = random_array(&shared.world).unwrap_or_default();
        tokio::time::sleep(with_jitter(wait, random[0])).await;
    }
}

/// For good: lets go what was said without a key and not said again.
pub(super) async fn let_fade<W: World>(shared: Arc<Shared<W>>) {
    loop {
        tokio::time::sleep(UNSIGNED_LIFETIME / 12).await;
        let over = shared.peers.book().fade(shared.world.clock().monotonic());
        for from in over {
            shared.say_conflict(&super::answers::source(from), None).await;
        }
    }
}

impl<W: World> Shared<W> {
    /// Says hello once; whether the peer answered.
    async fn greet_once(&self, fabric: &FabricConfig, peer: &Peer) -> bool {
        let answer = self.hello_to(fabric, peer).await;
        let now = self.world.clock().monotonic();
        let (state, conflict, heard_at) = match &answer {
            Ok((conflict, _)) => {
                let state = if conflict.is_some() { PeerState::Conflict } else { PeerState::Reachable };
                (state, Some(conflict.clone()), Some(now))
            }
            Err(error) => (error.state(), None, None),
        };
        let before = self.peers.book().set_peer(&peer.name, state.clone(), heard_at);
        if before.name() != state.name() {
            let address = peer.socket();
            match state.why() {
                Some(why) => tracing::warn!(peer = peer.name, %address, state = state.name(), why, "peer"),
                None => tracing::info!(peer = peer.name, %address, state = state.name(), "peer"),
            }
        }
        // A peer that does not answer shows nothing: what it showed before stays.
        if let Some(conflict) = conflict {
            self.say_conflict(&source(peer), conflict).await;
        }
        answer.is_ok()
    }

    /// Says hello; what the answer shows.
    async fn hello_to(&self, fabric: &FabricConfig, peer: &Peer) -> Result<(Option<String>, Hello), PeerError> {
        let started = self.peers.started.get().ok_or(PeerError::NotStarted)?;
        let mine = hello(fabric, &started.identity, &started.setup.host, Some(peer));
        let body = serde_json::to_vec(&mine);
        let body = body.map_err(|source| PeerError::Malformed { peer: peer.name.clone(), source })?;
        let call = PeerCall { method: "POST", path: HELLO_PATH.to_owned(), body, head: None };
        let theirs: Hello = self.ask_peer(fabric, peer, call, LIMIT).await?;
        let who = format!("peer {} ({})", peer.name, peer.socket());
        let conflict = mine.conflict_with(&theirs, Some(peer.host.into()));
        Ok((conflict.map(|conflict| conflict.told(&who)), theirs))
    }

    /// Says what somebody finds wrong with the fabric, or that nothing is any more.
    pub(super) async fn say_conflict(&self, source: &str, reason: Option<String>) {
        if let Err(error) = self.set_conflict(source, reason).await {
            // The refusal stands; only its event is missing.
            tracing::warn!(error = %crate::report::chain(&error), "cannot record a fabric conflict");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_bound_and_differ() {
        let mut wait = INTERVAL;
        let mut waits = Vec::new();
        for _ in 0..5 {
            wait = longer(wait);
            waits.push(wait.as_secs());
        }
        assert_eq!(waits, [10, 20, 30, 30, 30]);
        assert_eq!(with_jitter(INTERVAL, 0), Duration::from_millis(3750));
        assert_eq!(with_jitter(INTERVAL, 255), Duration::from_millis(6250));
    }
}
