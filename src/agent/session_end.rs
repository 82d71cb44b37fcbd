//! How sessions end: asked to, or because their time has run out. A session that ends is `draining` in the ledger
//! first; then its VMs are removed, then it is, and its number rests. Whatever dies between, the next agent goes on.

use std::time::Duration;

use tokio::time::timeout;

use super::Agent;
use super::config::{Config, FabricConfig};
use super::ledger::{LedgerError, Write};
use super::session::called;
use super::session_error::{SessionError, join_refused};
use super::session_record::{SessionRecord, SessionState};
use super::shared::session_event;
use super::world::{Records, World};
use crate::clock::Clock;
use crate::ids::SessionId;

/// How long a guest may take to power off when its session's time has run out.
const EXPIRY_GRACE: Duration = Duration::from_secs(10);

/// Longest time between two looks for sessions that have to end: the host's clock may be set forward, and a client's
/// drain may have failed.
const LOOK_INTERVAL: Duration = Duration::from_secs(60);

/// Time until a session that could not be drained is drained again.
const DRAIN_AGAIN: Duration = Duration::from_secs(5);

/// How long the number of a session rests when there is no fabric (any more) that says it.
const QUARANTINE_DEFAULT: Duration = Duration::from_secs(120);

impl<W: World> Agent<W> {
    /// Removes a session without VMs; with `drain`, its VMs first.
    pub(super) async fn end_session(&self, word: &str, drain: bool, grace: Duration) -> Result<(), SessionError> {
        if !drain {
            let _admission = self.shared.admission.lock().await;
            let session = self.find_session(word).await?;
            return self.forget_session(&session).await;
        }
        let session = self.begin_drain(word).await?;
        self.drain_session(&session, grace).await
    }

    /// From here on no VM joins: those that did are known to the agent.
    async fn begin_drain(&self, word: &str) -> Result<SessionRecord, SessionError> {
        // A launch holds this from its record until its VM is known.
        let _admission = self.shared.admission.lock().await;
        let mut session = self.find_session(word).await?;
        if session.state == SessionState::Active {
            session.state = SessionState::Draining;
            let (now, kind) = (self.shared.world.clock().wall(), "session_draining");
            let writes = vec![session_event(now, kind, &session), Write::Session(Box::new(session.clone()))];
            self.shared.commit(writes).await.map_err(SessionError::Ledger)?;
            tracing::info!(session = %session.id, name = session.name, "session draining");
        }
        Ok(session)
    }

    /// Removes a draining session's VMs, then it. May be done by several at once.
    async fn drain_session(&self, session: &SessionRecord, grace: Duration) -> Result<(), SessionError> {
        let mut failures = self.remove_all(&self.members(&session.id), grace).await;
        match self.forget_session(session).await {
            Ok(()) | Err(SessionError::Unknown { .. }) => Ok(()),
            Err(SessionError::InUse { members, .. }) => {
                let why = failures.pop().unwrap_or_else(|| "they are still being removed".to_owned());
                Err(SessionError::NotDrained { session: called(session), left: members, why })
            }
            Err(error) => Err(error),
        }
    }

    /// Deletes a session without VMs; its number rests.
    async fn forget_session(&self, session: &SessionRecord) -> Result<(), SessionError> {
        let now = self.shared.world.clock().wall();
        let until = self.shared.steady().after(quarantine(&self.shared.config));
        let writes = vec![session_event(now, "session_removed", session)];
        let id = session.id.clone();
        let removed = self.shared.world.records().with(move |store| store.remove_session(&id, until, &writes)).await;
        match removed {
            Ok(last) => {
                self.shared.wake_readers(last);
                tracing::info!(session = %session.id, name = session.name, "session removed");
                Ok(())
            }
            Err(LedgerError::Session(refusal)) => Err(join_refused(session, u32::MAX, refusal)),
            Err(error) => Err(SessionError::Ledger(error)),
        }
    }

    /// For good: ends sessions whose time has run out, and goes on with those that were being drained.
    pub(super) async fn end_sessions(self) {
        loop {
            let wait = match self.end_due_sessions().await {
                Ok(wait) => wait,
                Err(error) => {
                    tracing::warn!(error = %crate::report::chain(&error), "cannot end sessions");
                    DRAIN_AGAIN
                }
            };
            // A session made since the look above has left its mark here, so it is not slept over.
            let _ = timeout(wait, self.shared.sessions_changed.notified()).await;
        }
    }

    /// One look at all sessions; how long until the next.
    async fn end_due_sessions(&self) -> Result<Duration, SessionError> {
        let sessions = self.shared.world.records().with(|store| store.sessions()).await;
        let mut wait = LOOK_INTERVAL;
        for session in sessions.map_err(SessionError::Ledger)? {
            let now = self.shared.steady();
            match (session.state, session.expires_at) {
                (SessionState::Active, Some(expires)) if expires > now => {
                    wait = wait.min(now.until(expires));
                    continue;
                }
                (SessionState::Active, None) => continue,
                (SessionState::Active, Some(_)) | (SessionState::Draining, _) => {}
            }
            if let Err(error) = self.end_due_session(&session.id).await {
                tracing::warn!(session = %session.id, error = %crate::report::chain(&error), "cannot end a session");
                wait = wait.min(DRAIN_AGAIN);
            }
        }
        Ok(wait)
    }

    async fn end_due_session(&self, id: &SessionId) -> Result<(), SessionError> {
        match self.end_session(id.as_str(), true, EXPIRY_GRACE).await {
            Err(SessionError::Unknown { .. }) => Ok(()),
            ended => ended,
        }
    }
}

/// How long local ids and session network ids rest.
pub(super) fn quarantine(config: &Config) -> Duration {
    config.fabric.as_ref().map_or(QUARANTINE_DEFAULT, FabricConfig::quarantine)
}
