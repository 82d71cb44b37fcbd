//! Sessions: making them, finding them, and telling who is in one. How they end is in [`super::session_end`].
//!
//! The ledger is the only place sessions are kept in; nothing of them is remembered beside it. What two requests could
//! both take (names, numbers) is found and written in one transaction.

use std::sync::Arc;
use std::time::Duration;

use super::config::FabricConfig;
use super::egress::{self, Egress};
use super::images::is_name;
use super::launch::Key;
use super::ledger::{LedgerError, NewSession, NumberChoice, SessionRefusal, StoredAnswer, Write};
use super::peers::PeerView;
use super::record::{SCHEMA_VERSION, VmRecord};
use super::session_error::{SessionError, join_refused, refused_number};
use super::session_record::{SessionRecord, SessionState, USER_DATA_BYTES_MAX};
use super::shared::session_event;
use super::world::{Drops, Records, VmNetworks, World, random_array};
use super::{Agent, Store};
use crate::clock::{Clock, Steady, UnixNanos};
use crate::ids::SessionId;
use crate::net::address::{AddressError, SessionNetworkId, V4Widths};

/// Longest life that can be given to a session: ten years, so that its end has a date.
pub const TTL_S_MAX: u32 = 10 * 366 * 24 * 3600;

/// A session to make.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SessionRequest {
    /// Its name, if it gets one.
    pub name: Option<String>,
    /// Its number in the fabric; `None` to choose one.
    pub session_network_id: Option<u32>,
    /// Whether members get IPv4 addresses; `None`: if the number fits.
    pub ipv4: Option<bool>,
    /// What members may reach outside the fabric.
    pub egress: Egress,
    /// Seconds until it ends by itself.
    pub ttl_s: Option<u32>,
    /// What members read from the metadata service.
    pub user_data: Option<String>,
    /// What makes a repetition of this request known.
    pub key: Option<Key>,
}

/// What became of a request for a session.
#[derive(Debug, Clone)]
pub enum SessionCreated {
    /// A session was made, or the same request had made it.
    Session(SessionView),
    /// The same request was answered like this.
    Answered(StoredAnswer),
}

/// A session and who is in it.
#[derive(Debug, Clone)]
pub struct SessionView {
    /// The session.
    pub record: SessionRecord,
    /// When it ends by itself, as the wall clock is now.
    pub expires_at: Option<UnixNanos>,
    /// Its VMs on this host, oldest first.
    pub members: Vec<Member>,
}

/// A VM in a session.
#[derive(Debug, Clone)]
pub struct Member {
    /// The VM.
    pub vm: Arc<VmRecord>,
    /// Packets its jail dropped.
    pub drops: Drops,
}

/// The fabric as this agent sees it.
#[derive(Debug, Clone)]
pub struct FabricView {
    /// What is configured.
    pub config: FabricConfig,
    /// What speaks against it at the moment; while there is anything, no session is made or joined.
    pub conflicts: Vec<String>,
    /// The other hosts, in the order they are configured.
    pub peers: Vec<PeerView>,
}

impl<W: World> Agent<W> {
    /// The fabric, if there is one and nothing speaks against it.
    pub(super) async fn usable_fabric(&self) -> Result<&FabricConfig, SessionError> {
        let fabric = self.shared.config.fabric.as_ref().ok_or(SessionError::NoFabric)?;
        super::network::look_for_conflicts(&self.shared).await.map_err(SessionError::Ledger)?;
        let reasons = self.shared.conflicts();
        if reasons.is_empty() { Ok(fabric) } else { Err(SessionError::FabricConflict { reasons }) }
    }

    /// Checks and records a session.
    pub(super) async fn make_session(&self, request: SessionRequest) -> Result<SessionCreated, SessionError> {
        // Held through the record: of two requests with one key, the second finds what the first made.
        let _admission = self.shared.admission.lock().await;
        if let Some(key) = &request.key
            && let Some(earlier) = self.earlier_session(key).await?
        {
            return Ok(earlier);
        }
        let fabric = self.usable_fabric().await?;
        check(&request, fabric)?;
        let (choice, ipv4) = choose(fabric, request.session_network_id, request.ipv4)?;
        let random = random_array(&self.shared.world);
        let id = random.map_err(|source| SessionError::Host { what: "read randomness", source })?;
        let now = self.shared.world.clock().wall();
        let steady = self.shared.steady();
        let after = |ttl_s: u32| steady.after(Duration::from_secs(ttl_s.into()));
        let SessionRequest { name, egress, ttl_s, user_data, key, .. } = request;
        let draft = Draft {
            id: SessionId::from_random(id),
            name: name.clone(),
            ipv4,
            egress,
            now,
            steady,
            expires_at: ttl_s.map(after),
            user_data,
            key,
        };
        let make = move |store: &mut Store| store.create_session(choice, steady, |number| draft.session(number));
        let made = self.shared.world.records().with(make);
        let (record, last) = made.await.map_err(|error| refused_number(error, choice, name, steady))?;
        self.shared.wake_readers(last);
        tracing::info!(session = %record.id, name = record.name, number = %record.session_network_id, "session made");
        // Whoever ends expired sessions has to know of this one's end.
        self.shared.sessions_changed.notify_one();
        Ok(SessionCreated::Session(self.view_of(record, Vec::new())))
    }

    async fn earlier_session(&self, key: &Key) -> Result<Option<SessionCreated>, SessionError> {
        let Some(row) = self.key_row(key).await.map_err(SessionError::Ledger)? else { return Ok(None) };
        if row.body_hash != key.body_hash {
            return Err(SessionError::KeyMismatch);
        }
        if let Some(answer) = row.answer {
            return Ok(Some(SessionCreated::Answered(answer)));
        }
        // Recorded but not answered: the client hung up, or an agent ended between.
        match self.find_session(&row.object).await {
            Ok(record) => Ok(Some(SessionCreated::Session(self.view(record).await))),
            Err(SessionError::Unknown { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The session a word means: its id, its name, its network id, or the start of its id.
    pub(super) async fn find_session(&self, word: &str) -> Result<SessionRecord, SessionError> {
        let unknown = || SessionError::Unknown { word: word.to_owned() };
        let asked = word.to_owned();
        let exact = self.shared.world.records().with(move |store| store.session(&asked)).await;
        if let Some(found) = exact.map_err(SessionError::Ledger)? {
            return Ok(found);
        }
        let start = word.strip_prefix(SessionId::PREFIX).unwrap_or(word).to_owned();
        // A number that is no session's is not the start of an id by chance.
        let is_number = !word.starts_with(SessionId::PREFIX) && word.bytes().all(|byte| byte.is_ascii_digit());
        if start.is_empty() || is_number {
            return Err(unknown());
        }
        let prefix = format!("{}{start}", SessionId::PREFIX);
        let found = self.shared.world.records().with(move |store| store.sessions_by_prefix(&prefix)).await;
        let mut found = found.map_err(SessionError::Ledger)?;
        match (found.pop(), found.len()) {
            (Some(session), 0) => Ok(session),
            (Some(_), more) => Err(SessionError::Ambiguous { word: word.to_owned(), count: more + 1 }),
            (None, _) => Err(unknown()),
        }
    }

    /// The session a VM is to join, and the highest local id that fits its addresses. Whether VMs may join it is
    /// looked at again when the VM is recorded.
    pub(super) async fn session_to_join(&self, word: &str) -> Result<(SessionRecord, u32), SessionError> {
        let fabric = self.usable_fabric().await?;
        let session = match self.find_session(word).await {
            Err(SessionError::Unknown { word }) => return Err(self.resting_or_unknown(word).await?),
            found => found?,
        };
        let now = self.shared.steady();
        let refused = |refusal| join_refused(&session, u32::MAX, refusal);
        if session.is_expired(now) {
            return Err(refused(SessionRefusal::Expired));
        }
        match session.state {
            SessionState::Draining => Err(refused(SessionRefusal::Draining)),
            SessionState::Active => {
                let max = local_max(fabric, &session);
                Ok((session, max))
            }
        }
    }

    /// Why there is no session of this word: it may have been one a moment ago.
    async fn resting_or_unknown(&self, word: String) -> Result<SessionError, SessionError> {
        let Some(id) = word.parse::<u32>().ok().and_then(|number| SessionNetworkId::try_from(number).ok()) else {
            return Ok(SessionError::Unknown { word });
        };
        let now = self.shared.steady();
        let until = self.shared.world.records().with(move |store| store.resting_until(id, now)).await;
        Ok(match until.map_err(SessionError::Ledger)? {
            Some(until) => SessionError::Resting { number: id.into(), left: now.until(until) },
            None => SessionError::Unknown { word },
        })
    }

    /// All sessions, oldest first.
    pub(super) async fn list_sessions(&self) -> Result<Vec<SessionView>, LedgerError> {
        let sessions = self.shared.world.records().with(|store| store.sessions()).await?;
        let mut views = Vec::with_capacity(sessions.len());
        for session in sessions {
            views.push(self.view(session).await);
        }
        Ok(views)
    }

    /// A session and who is in it.
    pub(super) async fn view(&self, record: SessionRecord) -> SessionView {
        let mut members = Vec::new();
        for vm in self.members(&record.id) {
            members.push(Member { drops: self.drops(&vm).await, vm });
        }
        self.view_of(record, members)
    }

    fn view_of(&self, record: SessionRecord, members: Vec<Member>) -> SessionView {
        let (now, wall) = (self.shared.steady(), self.shared.world.clock().wall());
        let shown = |at: Steady| UnixNanos(wall.0.saturating_add(at.0).saturating_sub(now.0));
        SessionView { expires_at: record.expires_at.map(shown), record, members }
    }

    /// The VMs of a session, oldest first.
    pub(super) fn members(&self, session: &SessionId) -> Vec<Arc<VmRecord>> {
        let mut vms = self.records();
        vms.retain(|vm| vm.network.as_ref().is_some_and(|network| network.session == *session));
        vms
    }

    /// Packets a VM's jail dropped; none for a VM that has no jail any more.
    async fn drops(&self, vm: &VmRecord) -> Drops {
        if !vm.state.holds_resources() {
            return Drops::default();
        }
        match self.shared.world.networks().drops(vm).await {
            Ok(drops) => drops,
            Err(error) => {
                // A jail that is being made has no counters yet.
                tracing::debug!(vm = %vm.id, error = %crate::report::chain(&error), "cannot read what the jail dropped");
                Drops::default()
            }
        }
    }

    /// The fabric as this agent sees it, if it has one.
    pub(super) fn fabric_view(&self) -> Option<FabricView> {
        let config = self.shared.config.fabric.clone()?;
        let peers = self.shared.peers.views(&config.peers, self.shared.world.clock().monotonic());
        Some(FabricView { config, conflicts: self.shared.conflicts(), peers })
    }
}

/// A session to be, but for its number. Becomes a session on the ledger's thread, so it asks nobody anything there.
struct Draft {
    id: SessionId,
    name: Option<String>,
    ipv4: bool,
    egress: Egress,
    now: UnixNanos,
    steady: Steady,
    expires_at: Option<Steady>,
    user_data: Option<String>,
    key: Option<Key>,
}

impl Draft {
    fn session(self, number: SessionNetworkId) -> NewSession {
        let record = SessionRecord {
            schema_version: SCHEMA_VERSION,
            id: self.id,
            name: self.name,
            session_network_id: number,
            ipv4: self.ipv4,
            egress: self.egress,
            created_at: self.now,
            expires_at: self.expires_at,
            state: SessionState::Active,
        };
        let mut writes = vec![session_event(self.now, "session_created", &record)];
        let (key, steady) = (self.key, self.steady);
        writes.extend(key.map(|key| Write::Key(key.row(record.id.to_string(), steady))));
        NewSession { record, user_data: self.user_data, writes }
    }
}

/// What can be said of a request without looking at other sessions.
fn check(request: &SessionRequest, fabric: &FabricConfig) -> Result<(), SessionError> {
    if let Some(name) = request.name.as_ref().filter(|name| !is_name(name)) {
        return Err(SessionError::Name { name: name.clone() });
    }
    if let Some(found) = request.ttl_s.filter(|ttl_s| !(1..=TTL_S_MAX).contains(ttl_s)) {
        return Err(SessionError::Ttl { found });
    }
    if let Some(found) = request.user_data.as_ref().map(String::len).filter(|found| *found > USER_DATA_BYTES_MAX) {
        return Err(SessionError::UserData { found });
    }
    Ok(egress::check(&request.egress, &fabric.fabric)?)
}

/// How the number is found, and whether the session has IPv4.
fn choose(
    fabric: &FabricConfig,
    number: Option<u32>,
    ipv4: Option<bool>,
) -> Result<(NumberChoice, bool), SessionError> {
    let widths = fabric.fabric.v4_widths();
    if ipv4 == Some(true) && widths.is_none() {
        return Err(SessionError::NoIpv4);
    }
    if let Some(number) = number {
        let number = SessionNetworkId::try_from(number).map_err(SessionError::Reserved)?;
        let fits = fabric.fabric.has_v4(number);
        if ipv4 == Some(true)
            && let Some(widths) = widths.filter(|_| !fits)
        {
            let (max, bits) = (widths.session_max(), widths.session_bits());
            return Err(SessionError::TooWide(AddressError::SessionTooWide { found: number.into(), max, bits }));
        }
        return Ok((NumberChoice::Exactly(number), ipv4.unwrap_or(fits)));
    }
    match widths.filter(|_| ipv4 != Some(false) && fabric.peers.is_empty()) {
        Some(widths) => Ok((NumberChoice::Next { first: 1, last: widths.session_max() }, true)),
        None => {
            // Numbers below the host's own are unique in the fabric without asking anybody.
            let above = u32::from(u16::from(fabric.host)) << 16;
            let (first, last) = (above | 1, above | 0xffff);
            if ipv4 == Some(true) {
                Err(SessionError::ChosenTooWide { first })
            } else {
                Ok((NumberChoice::Next { first, last }, false))
            }
        }
    }
}

/// The highest local id that fits a session's addresses.
fn local_max(fabric: &FabricConfig, session: &SessionRecord) -> u32 {
    let widths = fabric.fabric.v4_widths().filter(|_| session.ipv4);
    // All ones are reserved.
    widths.map_or(u32::MAX - 1, V4Widths::local_max)
}

/// A session, for sentences.
pub(super) fn called(session: &SessionRecord) -> String {
    match &session.name {
        Some(name) => format!("{name} ({})", session.id),
        None => session.id.to_string(),
    }
}

#[cfg(test)]
mod tests;
