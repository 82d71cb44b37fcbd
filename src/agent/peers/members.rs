//! The members of a session on other hosts: asked of all reachable peers at once, and kept for a moment, so that a
//! guest that asks without end costs the other hosts one question each in that time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Mutex as AsyncMutex;

use super::bodies::MemberBody;
use super::book::PeerState;
use crate::agent::shared::Shared;
use crate::agent::world::World;
use crate::clock::{Clock, Monotonic};
use crate::net::address::SessionNetworkId;

/// How long an answer is kept.
const FRESH: Duration = Duration::from_secs(1);

/// Sessions whose members are kept. Beyond, the oldest answers go.
const SESSIONS_MAX: usize = 1024;

/// Members of one session that are taken from one peer.
const MEMBERS_MAX: usize = 4096;

type Answer = Arc<AsyncMutex<Option<(Monotonic, Arc<Vec<MemberBody>>)>>>;

/// Answers that are kept.
#[derive(Default)]
pub(super) struct MembersCache {
    answers: Mutex<BTreeMap<u32, (Monotonic, Answer)>>,
}

impl MembersCache {
    /// The place of a session's answer. Who holds it asks; others wait for that answer.
    fn place(&self, session: SessionNetworkId, now: Monotonic) -> Answer {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.len() >= SESSIONS_MAX {
            answers.retain(|_, (used_at, _)| now.since(*used_at) < FRESH);
        }
        if answers.len() >= SESSIONS_MAX {
            return Answer::default();
        }
        let (used_at, answer) = answers.entry(session.into()).or_insert_with(|| (now, Answer::default()));
        *used_at = now;
        Arc::clone(answer)
    }
}

impl<W: World> Shared<W> {
    /// The members of a session on the hosts that can be reached.
    pub(crate) async fn members_elsewhere(&self, session: SessionNetworkId) -> Arc<Vec<MemberBody>> {
        let Some(fabric) = &self.config.fabric else { return Arc::default() };
        let place = self.peers.members.place(session, self.world.clock().monotonic());
        let mut answer = place.lock().await;
        let now = self.world.clock().monotonic();
        if let Some((_, members)) = answer.as_ref().filter(|(at, _)| now.since(*at) < FRESH) {
            return Arc::clone(members);
        }
        let reachable = |name: &str| self.peers.book().peer(name).state == PeerState::Reachable;
        let peers = fabric.peers.iter().filter(|peer| reachable(&peer.name));
        let asked = peers.map(|peer| async move {
            match self.members_at_peer(fabric, peer, session).await {
                Ok(mut members) => {
                    members.truncate(MEMBERS_MAX);
                    // A host is called what this host's configuration calls it: that is what a launch takes.
                    members.iter_mut().for_each(|member| member.host.clone_from(&peer.name));
                    members
                }
                Err(error) => {
                    tracing::debug!(peer = peer.name, error = %crate::report::chain(&error), "no members from it");
                    Vec::new()
                }
            }
        });
        let members: Arc<Vec<MemberBody>> = Arc::new(join_all(asked).await.into_iter().flatten().collect());
        *answer = Some((self.world.clock().monotonic(), Arc::clone(&members)));
        members
    }
}
