//! Answering peers: whose request is it, and is it to be believed; then what it asks for.

use std::net::IpAddr;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::auth::{ReplayError, RequestHead, Signed};
use super::bodies::{Hello, PeerLaunch, hello};
use super::book::CallerChange;
use super::hello::{greet, let_fade};
use super::link::{Channel, TlsError};
use super::moving::{ArrivalOrder, ArrivalReady, ArrivalVerdict, DecisionBody, PresenceBody};
use super::parts::{PartBody, PartOrder, PieceError};
use super::volumes::{VolumeBody, VolumeOrder};
use super::{HELLO_PATH, Identity, PeerSetup, Started, now_ms};
use crate::agent::Agent;
use crate::agent::arrivals::Decision;
use crate::agent::arrive::ArriveError;
use crate::agent::launch_error::LaunchError;
use crate::agent::ledger::LedgerError;
use crate::agent::record::VmRecord;
use crate::agent::session::{SessionCreated, SessionRequest};
use crate::agent::session_error::SessionError;
use crate::agent::session_record::SessionRecord;
use crate::agent::volumes::AskVolumesError;
use crate::agent::world::{Records, World, random_array};
use crate::clock::Clock;
use crate::ids::{MigrationId, VmId};

/// Why another agent is not answered what it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PeerRefusal {
    /// The agent is not that far, or has no fabric.
    #[error("this agent does not speak to other hosts (yet)")]
    NotStarted,
    /// There is no MAC, and there has to be one.
    #[error("the request is not signed")]
    Unsigned,
    /// The MAC is none of the fabric's key, or is not one at all.
    #[error("the request is not signed with this host's key")]
    WrongKey,
    /// Without a key, hosts only say hello.
    #[error("this host has no fabric.key_file, without which hosts do nothing for each other")]
    NoKey,
    /// It came without TLS, and this host's configuration does not say that such are taken.
    #[error(
        "host number {own} takes requests by TLS only: upgrade the agent of the one that asks, or set \
         fabric.plain_peers = true on number {own} for as long as that takes"
    )]
    Plain {
        /// This host's number.
        own: u16,
    },
    /// It says that it is of another host than the connection's certificate.
    #[error("the request says it is of host number {says}, but the connection is of host number {proven}")]
    OtherSender {
        /// The number of the certificate.
        proven: u16,
        /// The number of the request.
        says: u16,
    },
    /// It is of a host that is no peer.
    #[error("host number {number} is none of the [[peers]] of this host, whose number is {own}: add it there")]
    NotAPeer {
        /// The other host's number.
        number: u16,
        /// This host's number.
        own: u16,
    },
    /// It was meant for another host.
    #[error("the request is for host number {to}, but this host is {own}")]
    OtherHost {
        /// Whom it was meant for.
        to: u16,
        /// This host's number.
        own: u16,
    },
    /// It was sent before this agent started, which may have taken it before.
    #[error("the request was sent before this agent started; send it again")]
    BeforeStart,
    /// It is not taken now.
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

impl PeerRefusal {
    /// The refusal's name, as in answers and counters.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotStarted => "peers_not_started",
            Self::Unsigned => "peer_unsigned",
            Self::WrongKey => "peer_key_refused",
            Self::NoKey => "peer_key_missing",
            Self::Plain { .. } => "peer_plain",
            Self::OtherSender { .. } => "peer_other_sender",
            Self::NotAPeer { .. } => "peer_unknown_host",
            Self::OtherHost { .. } => "peer_other_host",
            Self::BeforeStart => "peer_request_stale",
            Self::Replay(ReplayError::Time { .. }) => "peer_clock_difference",
            Self::Replay(ReplayError::Again) => "peer_replay",
            Self::Replay(ReplayError::Busy) => "peer_busy",
        }
    }
}

/// A request that is not admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unadmitted {
    /// Why.
    pub refusal: PeerRefusal,
    /// Its head, when the answer may be sealed: it was signed with the key, for this host, and was not taken while its
    /// sender may still wait for an answer. Else there is none: without TLS, somebody on the way could put the refusal of
    /// a copy, or of another host, in the place of the answer.
    pub head: Option<RequestHead>,
}

impl From<PeerRefusal> for Unadmitted {
    fn from(refusal: PeerRefusal) -> Self {
        Self { refusal, head: None }
    }
}

/// What other agents may ask of this one. Nothing here knows how the request came.
pub trait PeerDoor: Send + Sync + 'static {
    /// Starts to say hello to the configured peers, and to answer them. The second time it does nothing.
    fn start_peers(&self, setup: PeerSetup) -> BoxFuture<'_, Result<(), LedgerError>>;

    /// Checks a request: signed with the key, by the host that the connection is of, for this host, of now, and taken
    /// for the first time. `None` when there is no key here, which leaves hello only.
    fn admit_peer(
        &self,
        what: &Signed<'_>,
        head: Option<&str>,
        channel: Channel,
    ) -> Result<Option<RequestHead>, Unadmitted>;

    /// Counts a connection that nothing was asked on, because of what was wrong with its other end.
    fn peer_turned_away(&self, error: &TlsError);

    /// The MAC of the answer to an admitted request.
    fn seal_for_peer(&self, head: &RequestHead, status: u16, body: &[u8]) -> Option<String>;

    /// Answers a hello from this address. `signed`: whether it was signed with the key.
    fn hello(&self, from: IpAddr, hello: Hello, signed: bool) -> BoxFuture<'_, Result<Hello, PeerRefusal>>;

    /// Launches VMs for another host, all or none.
    fn launch_for_peer(&self, launch: PeerLaunch) -> BoxFuture<'_, Result<Vec<Arc<VmRecord>>, LaunchError>>;

    /// Waits for a machine that another host, at this address, wants to hand over; gives the place to send it to.
    fn arrive(&self, from: IpAddr, order: ArrivalOrder) -> BoxFuture<'_, Result<ArrivalReady, ArriveError>>;

    /// Whether a machine of another host could come, if it came now.
    fn check_arrival(&self, order: ArrivalOrder) -> BoxFuture<'_, Result<ArrivalVerdict, ArriveError>>;

    /// The other host, of this number, has decided whose a machine is that is on its way here: waits until it runs, or is gone.
    fn decided(
        &self,
        from: u16,
        id: MigrationId,
        decision: Decision,
    ) -> BoxFuture<'_, Result<DecisionBody, ArriveError>>;

    /// Whose a machine is that is on its way from here.
    fn decision(&self, id: &MigrationId) -> DecisionBody;

    /// What a VM does here, if there is one of this id.
    fn presence(&self, vm: &VmId) -> PresenceBody;

    /// A piece of a part of a bundle that is here, all of it or in part.
    fn bundle_piece(&self, order: PartOrder) -> BoxFuture<'_, Result<PartBody, PieceError>>;

    /// What the volume daemon of this host says about leases.
    fn volumes_for_peer(&self, order: VolumeOrder) -> BoxFuture<'_, Result<VolumeBody, AskVolumesError>>;

    /// This host's members of a session; none when there is no such session.
    fn members_here(&self, session_network_id: u32) -> Vec<Arc<VmRecord>>;
}

/// The word that names whoever found a caller's conflict.
pub(super) fn source(from: IpAddr) -> String {
    format!("hello from {from}")
}

impl<W: World> Agent<W> {
    async fn begin_peers(&self, setup: PeerSetup) -> Result<(), LedgerError> {
        let shared = &self.shared;
        let Some(fabric) = &shared.config.fabric else { return Ok(()) };
        // A clock's time is what is left when randomness fails: it differs as well.
        let otherwise = shared.world.clock().wall().0.to_le_bytes();
        let [first, life] = [(); 2].map(|()| u64::from_le_bytes(random_array(&shared.world).unwrap_or(otherwise)));
        let instance = shared.world.records().with(move |store| store.instance(first)).await?;
        let started = Started { setup, identity: Identity { instance, life } };
        if shared.peers.started.set(started).is_err() {
            return Ok(());
        }
        for peer in fabric.peers.clone() {
            tokio::spawn(greet(Arc::clone(shared), fabric.clone(), peer));
        }
        tokio::spawn(let_fade(Arc::clone(shared)));
        Ok(())
    }

    fn admit_request(
        &self,
        what: &Signed<'_>,
        head: Option<&str>,
        channel: Channel,
    ) -> Result<Option<RequestHead>, Unadmitted> {
        let shared = &self.shared;
        let started = shared.peers.started.get().ok_or(PeerRefusal::NotStarted)?;
        let fabric = shared.config.fabric.as_ref().ok_or(PeerRefusal::NotStarted)?;
        let is_hello = what.path == HELLO_PATH;
        let Some(key) = &started.setup.key else {
            return if is_hello { Ok(None) } else { Err(PeerRefusal::NoKey.into()) };
        };
        let head: RequestHead = head.ok_or(PeerRefusal::Unsigned)?.parse().map_err(|_| PeerRefusal::WrongKey)?;
        if !key.has_signed(&head, what) {
            return Err(PeerRefusal::WrongKey.into());
        }
        // From here on the sender has the key, and can be told what is wrong.
        let own = fabric.host.into();
        let refused = |refusal| Err(Unadmitted { refusal, head: (is_hello || head.to == own).then_some(head) });
        if channel == Channel::Plain && !fabric.plain_peers {
            return refused(PeerRefusal::Plain { own });
        }
        // Nonces are forgotten when an agent ends. A hello taken twice does no harm.
        if !is_hello && head.at_ms < shared.started_at().0 / 1_000_000 {
            return refused(PeerRefusal::BeforeStart);
        }
        // A hello for another host, or from one, is how two find out that they disagree on a number.
        if !is_hello && head.to != own {
            return refused(PeerRefusal::OtherHost { to: head.to, own });
        }
        match channel {
            Channel::Tls { number } if number != head.from => {
                return refused(PeerRefusal::OtherSender { proven: number, says: head.from });
            }
            Channel::Tls { .. } | Channel::Plain => {}
        }
        if !is_hello && !fabric.peers.iter().any(|peer| u16::from(peer.host) == head.from) {
            return refused(PeerRefusal::NotAPeer { number: head.from, own });
        }
        match shared.peers.nonces().take(&head, now_ms(shared.world.clock())) {
            Ok(()) => Ok(Some(head)),
            Err(error @ ReplayError::Time { .. }) => refused(error.into()),
            Err(error @ (ReplayError::Again | ReplayError::Busy)) => Err(PeerRefusal::from(error).into()),
        }
    }

    async fn answer_hello(&self, from: IpAddr, theirs: Hello, signed: bool) -> Result<Hello, PeerRefusal> {
        let shared = &self.shared;
        let started = shared.peers.started.get().ok_or(PeerRefusal::NotStarted)?;
        let fabric = shared.config.fabric.as_ref().ok_or(PeerRefusal::NotStarted)?;
        let peer = fabric.peers.iter().find(|peer| peer.address == from);
        let mine = hello(fabric, &started.identity, &started.setup.host, peer);
        let conflict = mine.conflict_with(&theirs, peer.map(|peer| peer.host.into()));
        let now = shared.world.clock().monotonic();
        let change = shared.peers.book().heard(from, conflict.as_ref(), signed, now);
        let who = match peer {
            Some(peer) => format!("peer {} ({from})", peer.name),
            None => format!("the host at {from}"),
        };
        match change {
            CallerChange::None => {}
            CallerChange::Raised => {
                shared.say_conflict(&source(from), conflict.map(|conflict| conflict.told(&who))).await;
            }
            CallerChange::Over => shared.say_conflict(&source(from), None).await,
        }
        Ok(mine)
    }

    /// The session a peer launches into, made if it is not there.
    pub(in crate::agent) async fn session_for_peer(
        &self,
        number: u32,
        request: SessionRequest,
    ) -> Result<SessionRecord, SessionError> {
        let word = number.to_string();
        match self.find_session(&word).await {
            Err(SessionError::Unknown { .. }) => {}
            found => return found,
        }
        match self.make_session(SessionRequest { session_network_id: Some(number), ..request }).await {
            Ok(SessionCreated::Session(view)) => Ok(view.record),
            // Another launch was faster.
            Ok(SessionCreated::Answered(_)) | Err(SessionError::NumberTaken { .. }) => self.find_session(&word).await,
            Err(error) => Err(error),
        }
    }
}

impl<W: World> PeerDoor for Agent<W> {
    fn start_peers(&self, setup: PeerSetup) -> BoxFuture<'_, Result<(), LedgerError>> {
        self.begin_peers(setup).boxed()
    }

    fn admit_peer(
        &self,
        what: &Signed<'_>,
        head: Option<&str>,
        channel: Channel,
    ) -> Result<Option<RequestHead>, Unadmitted> {
        let admitted = self.admit_request(what, head, channel);
        admitted.inspect_err(|unadmitted| self.shared.metrics.peer_refused(unadmitted.refusal.name()))
    }

    fn peer_turned_away(&self, error: &TlsError) {
        self.shared.metrics.peer_refused(error.name());
    }

    fn seal_for_peer(&self, head: &RequestHead, status: u16, body: &[u8]) -> Option<String> {
        let key = self.shared.peers.started.get()?.setup.key.as_ref()?;
        Some(key.seal(head.nonce, status, body))
    }

    fn hello(&self, from: IpAddr, hello: Hello, signed: bool) -> BoxFuture<'_, Result<Hello, PeerRefusal>> {
        self.answer_hello(from, hello, signed).boxed()
    }

    fn launch_for_peer(&self, launch: PeerLaunch) -> BoxFuture<'_, Result<Vec<Arc<VmRecord>>, LaunchError>> {
        // On a task of its own: a peer that hangs up does not leave half of the VMs.
        let agent = self.clone();
        async move {
            let launching = tokio::spawn(async move {
                launch.order.check()?;
                let request = SessionRequest {
                    ipv4: Some(launch.ipv4),
                    egress: launch.egress.clone(),
                    ttl_s: launch.ttl_s,
                    user_data: launch.user_data.clone(),
                    ..SessionRequest::default()
                };
                let session = agent.session_for_peer(launch.session_network_id, request).await?;
                agent.launch_members(&session.id, &launch.order).await
            });
            launching.await.unwrap_or(Err(LaunchError::Ending))
        }
        .boxed()
    }

    fn arrive(&self, from: IpAddr, order: ArrivalOrder) -> BoxFuture<'_, Result<ArrivalReady, ArriveError>> {
        // On a task of its own: what was recorded is begun, whoever hangs up.
        let agent = self.clone();
        async move {
            let arriving = tokio::spawn(async move { agent.take_machine(from, order).await });
            arriving.await.unwrap_or(Err(ArriveError::Ending))
        }
        .boxed()
    }

    fn check_arrival(&self, order: ArrivalOrder) -> BoxFuture<'_, Result<ArrivalVerdict, ArriveError>> {
        self.check_machine(order).boxed()
    }

    fn decided(
        &self,
        from: u16,
        id: MigrationId,
        decision: Decision,
    ) -> BoxFuture<'_, Result<DecisionBody, ArriveError>> {
        self.note_decision(from, id, decision).boxed()
    }

    fn decision(&self, id: &MigrationId) -> DecisionBody {
        DecisionBody::of(self.decision_on(id))
    }

    fn presence(&self, vm: &VmId) -> PresenceBody {
        PresenceBody { state: self.presence_of(vm) }
    }

    fn bundle_piece(&self, order: PartOrder) -> BoxFuture<'_, Result<PartBody, PieceError>> {
        self.read_piece(order)
    }

    fn volumes_for_peer(&self, order: VolumeOrder) -> BoxFuture<'_, Result<VolumeBody, AskVolumesError>> {
        self.answer_for_volumes(order)
    }

    fn members_here(&self, session_network_id: u32) -> Vec<Arc<VmRecord>> {
        let mut vms = self.records();
        let is_member = |vm: &VmRecord| {
            vm.network.as_ref().is_some_and(|network| u32::from(network.session_network_id) == session_network_id)
        };
        vms.retain(|vm| is_member(vm));
        vms
    }
}
