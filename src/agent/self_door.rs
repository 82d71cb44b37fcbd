//! What a guest may ask of the agent about itself: who it is, who is in its session, and for more members.
//!
//! Who asks is known by the listener its request came in by, which only that VM reaches: whoever opens a VM's network
//! opens the listeners in its jail and hands them over with [`Shared::offer_metadata`]. Nothing a guest sends says who
//! it is. What can go wrong: a guest asks without end. It has one launch at a time, and the events it causes are few.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use super::Agent;
use super::config::FabricConfig;
use super::launch::{LaunchRequest, Launched};
use super::launch_error::LaunchError;
use super::ledger::{LedgerError, NewEvent, Write};
use super::peers::{MemberBody, MemberOrder, PeerError, PeerLaunch};
use super::record::{Subject, VmRecord};
use super::registrar::{RegistrationRefusal, RegistrationWords};
use super::session_error::SessionError;
use super::session_record::{JAILS_MAX, SessionRecord};
use super::shared::Shared;
use super::vm_actor::Verb;
use super::world::{Records, VmNetworks, World};
use crate::clock::{Clock, Monotonic};
use crate::ids::{SessionId, VmId};
use crate::report::Retry;

/// Most VMs of one launch by a guest or a peer.
pub const MEMBERS_AT_ONCE_MAX: u8 = 16;

/// Longest role in bytes.
pub const ROLE_BYTES_MAX: usize = 63;

/// Events about refused launches and registrations of one VM in [`DENIALS_WINDOW`].
const DENIALS_MAX: u32 = 8;

/// See [`DENIALS_MAX`].
const DENIALS_WINDOW: Duration = Duration::from_secs(60);

/// The way into one VM's metadata service.
#[derive(Debug)]
pub struct MetadataDoor {
    /// Whose it is.
    pub vm: VmId,
    /// Where its guest connects: listeners that nobody else reaches.
    pub listeners: Vec<TcpListener>,
    /// Becomes true, or is dropped, when the VM's network is closed: the service ends then.
    pub closed: watch::Receiver<bool>,
}

/// A VM and its session, as it is told itself.
#[derive(Debug, Clone)]
pub struct OwnView {
    /// The VM.
    pub vm: Arc<VmRecord>,
    /// Its session, if it is in one.
    pub session: Option<SessionRecord>,
}

/// The members of a VM's session.
#[derive(Debug, Clone, Default)]
pub struct OwnMembers {
    /// Those on this host, oldest first.
    pub here: Vec<Arc<VmRecord>>,
    /// Those on the hosts that can be reached.
    pub elsewhere: Arc<Vec<MemberBody>>,
}

/// VMs that a guest asks for. What is left out is as with the asking VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OwnLaunch {
    /// The session the guest believes to be in.
    pub session_network_id: u32,
    /// What the VMs are in it.
    pub role: Option<String>,
    /// How many.
    pub count: u8,
    /// Image to boot.
    pub image: Option<String>,
    /// Number of vCPUs of each.
    pub vcpus: Option<u32>,
    /// Guest memory of each in MiB.
    pub memory_mib: Option<u64>,
    /// The peer to launch them on; `None`: this host.
    pub peer: Option<String>,
}

/// What became of a guest's launch.
#[derive(Debug, Clone)]
pub enum OwnLaunched {
    /// VMs of this host.
    Here(Vec<Arc<VmRecord>>),
    /// VMs of a peer.
    Elsewhere(Vec<MemberBody>),
}

/// Why a guest is not given what it asks for.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// The VM is not there any more.
    #[error("the VM is gone")]
    Gone,
    /// It is in no session.
    #[error("this VM is in no session")]
    NoSession,
    /// It asked for VMs in a session that is not its own.
    #[error("session {asked} is not this VM's own")]
    Foreign {
        /// The network id it asked for.
        asked: u32,
    },
    /// It has a launch under way.
    #[error("this VM has a launch under way")]
    Busy,
    /// No host has this name.
    #[error("there is no host {host:?} in the fabric")]
    UnknownHost {
        /// What was given.
        host: String,
    },
    /// Another host did not do it.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The VMs were not made.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Its session is not usable.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// It is not registered like this.
    #[error(transparent)]
    Registration(RegistrationRefusal),
    /// The ledger was not read.
    #[error("read the ledger")]
    Ledger(#[from] LedgerError),
}

impl OwnError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Gone | Self::NoSession => Retry::Never,
            Self::Foreign { .. } | Self::UnknownHost { .. } => Retry::WithChange,
            Self::Busy => Retry::Later,
            Self::Peer(error) => error.retry(),
            Self::Launch(error) => error.retry(),
            Self::Session(error) => error.retry(),
            Self::Registration(refusal) => refusal.retry(),
            Self::Ledger(error) => error.retry(),
        }
    }
}

/// What guests may ask. `vm` is who asks, known by the way its request came.
pub trait SelfDoor: Send + Sync + 'static {
    /// The ways into VMs' metadata services, as networks are opened. `None` when somebody has it already.
    fn metadata(&self) -> Option<mpsc::Receiver<MetadataDoor>>;
    /// The VM and its session.
    fn own<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<OwnView, OwnError>>;
    /// What the members of its session are told by whoever made the session, if anything.
    fn own_user_data<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Option<String>, OwnError>>;
    /// The members of its session; none outside sessions.
    fn own_members<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<OwnMembers, OwnError>>;
    /// Registers it with its cluster: the number of the registration. It is not asked which VM it is.
    fn register_own<'a>(&'a self, vm: &'a VmId, words: RegistrationWords) -> BoxFuture<'a, Result<u64, OwnError>>;
    /// Launches VMs into its session, all or none.
    fn launch_own<'a>(&'a self, vm: &'a VmId, launch: OwnLaunch) -> BoxFuture<'a, Result<OwnLaunched, OwnError>>;
}

/// What the agent keeps of guests that ask.
pub(super) struct Asking {
    offers: mpsc::Sender<MetadataDoor>,
    offered: Mutex<Option<mpsc::Receiver<MetadataDoor>>>,
    /// VMs that have a launch under way.
    launching: Mutex<BTreeSet<VmId>>,
    /// Refused launches and registrations: since when they are counted, and how many.
    denials: Mutex<BTreeMap<VmId, (Monotonic, u32)>>,
    /// The VMs whose service was offered; dropping one's sender ends it.
    served: Mutex<BTreeMap<VmId, watch::Sender<bool>>>,
}

impl Asking {
    pub(super) fn new() -> Self {
        // One offer for each jail there can be: an offer is never waited for.
        let (offers, offered) = mpsc::channel(JAILS_MAX.into());
        Self {
            offers,
            offered: Mutex::new(Some(offered)),
            launching: Mutex::default(),
            denials: Mutex::default(),
            served: Mutex::default(),
        }
    }
}

/// A VM's launch is under way until this is dropped.
struct Turn<'a> {
    launching: &'a Mutex<BTreeSet<VmId>>,
    vm: VmId,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.launching.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.vm);
    }
}

impl<W: World> Shared<W> {
    /// Has a VM's metadata service served on listeners in its jail. Does not wait.
    pub(crate) fn offer_metadata(&self, door: MetadataDoor) {
        if let Err(error) = self.asking.offers.try_send(door) {
            tracing::warn!(error = %error, "a VM has no metadata service");
        }
    }

    /// Has the metadata service of a VM answer in its jail, on new sockets.
    pub(super) fn serve_metadata(&self, vm: &VmRecord) {
        let sockets = self.world.networks().metadata_sockets(vm);
        let listeners = sockets.and_then(|sockets| sockets.into_iter().map(TcpListener::from_std).collect());
        let listeners: Vec<TcpListener> = match listeners {
            Ok(listeners) => listeners,
            Err(error) => {
                tracing::warn!(vm = %vm.id, %error, "cannot listen at the metadata addresses");
                return;
            }
        };
        let (close, closed) = watch::channel(false);
        self.asking.served.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.id.clone(), close);
        self.offer_metadata(MetadataDoor { vm: vm.id.clone(), listeners, closed });
    }

    /// Ends the metadata service of a VM, if it has one.
    pub(super) fn end_metadata(&self, vm: &VmId) {
        self.asking.served.lock().unwrap_or_else(PoisonError::into_inner).remove(vm);
    }

    /// Begins a VM's launch, if it has none under way.
    fn turn(&self, vm: &VmId) -> Result<Turn<'_>, OwnError> {
        let launching = &self.asking.launching;
        let is_first = launching.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.clone());
        if is_first { Ok(Turn { launching, vm: vm.clone() }) } else { Err(OwnError::Busy) }
    }

    /// Whether a refusal of something a VM asked for is worth an event: it is, if the VM has not had many of them.
    pub(super) fn may_tell_denial(&self, vm: &VmId) -> bool {
        let now = self.world.clock().monotonic();
        let mut denials = self.asking.denials.lock().unwrap_or_else(PoisonError::into_inner);
        denials.retain(|_, (since, _)| now.since(*since) < DENIALS_WINDOW);
        let (_, count) = denials.entry(vm.clone()).or_insert((now, 0));
        *count = count.saturating_add(1);
        *count <= DENIALS_MAX
    }

    /// Tells of a launch that was refused, if the VM has not had many of them.
    async fn deny(&self, vm: &VmRecord, asked: u32) {
        if !self.may_tell_denial(&vm.id) {
            return;
        }
        let own = vm.network.as_ref().map(|network| u32::from(network.session_network_id));
        tracing::warn!(vm = %vm.id, asked, own, "a guest asked for VMs in a session that is not its own");
        let event = NewEvent {
            at: self.world.clock().wall(),
            kind: "launch_denied",
            subject: Subject::Vm(vm.id.clone()),
            operation: None,
            body: serde_json::json!({ "session_network_id": asked, "own_session_network_id": own }),
        };
        if let Err(error) = self.commit(vec![Write::Event(event)]).await {
            tracing::warn!(error = %crate::report::chain(&error), "cannot record a refused launch");
        }
    }
}

impl MemberOrder {
    /// Whether it can be carried out at all.
    pub(super) fn check(&self) -> Result<(), LaunchError> {
        if !(1..=MEMBERS_AT_ONCE_MAX).contains(&self.count) {
            return Err(LaunchError::Count { found: self.count.into() });
        }
        Ok(())
    }
}

impl<W: World> Agent<W> {
    /// [`Shared::offer_metadata`], for whoever has the agent.
    pub fn offer_metadata(&self, door: MetadataDoor) {
        self.shared.offer_metadata(door);
    }

    fn caller(&self, vm: &VmId) -> Result<Arc<VmRecord>, OwnError> {
        let vms = self.shared.vms();
        let found = vms.get(vm).map(|vm| vm.record.borrow().clone());
        found.ok_or(OwnError::Gone)
    }

    async fn own_session(&self, vm: &VmRecord) -> Result<Option<SessionRecord>, OwnError> {
        let Some(network) = &vm.network else { return Ok(None) };
        Ok(Some(self.find_session(network.session.as_str()).await?))
    }

    /// Launches VMs into a session of this host, all or none.
    pub(super) async fn launch_members(
        &self,
        session: &SessionId,
        order: &MemberOrder,
    ) -> Result<Vec<Arc<VmRecord>>, LaunchError> {
        order.check()?;
        let mut vms = Vec::new();
        for _ in 0..order.count {
            let request = LaunchRequest {
                image: order.image.clone(),
                vcpus: Some(order.vcpus),
                memory_mib: Some(order.memory_mib),
                session: Some(session.to_string()),
                addressing: Some(order.addressing),
                role: order.role.clone(),
                network_limits: order.network_limits,
                ..LaunchRequest::default()
            };
            match self.launch_vm(request).await {
                Ok(Launched::Vm(vm)) => vms.push(vm),
                // There was no key to answer by.
                Ok(Launched::Answered(_)) => {}
                Err(error) => {
                    self.take_back(vms);
                    return Err(error);
                }
            }
        }
        Ok(vms)
    }

    /// Removes VMs whose launch turned out to be one too few.
    fn take_back(&self, vms: Vec<Arc<VmRecord>>) {
        let agent = self.clone();
        tokio::spawn(async move {
            let handles = vms.iter().filter_map(|vm| agent.shared.vms().get(&vm.id).cloned());
            let handles: Vec<_> = handles.collect();
            join_all(handles.iter().map(|vm| async {
                if let Err(error) = agent.ask_actor(vm, Verb::Remove { grace: Duration::ZERO }).await {
                    tracing::warn!(vm = %vm.id, error = %crate::report::chain(&error), "cannot take a launch back");
                }
            }))
            .await;
        });
    }

    async fn launch_for_guest(self, vm: VmId, launch: OwnLaunch) -> Result<OwnLaunched, OwnError> {
        let caller = self.caller(&vm)?;
        let _turn = self.shared.turn(&vm)?;
        let Some(network) = caller.network.clone() else {
            self.shared.deny(&caller, launch.session_network_id).await;
            return Err(OwnError::NoSession);
        };
        if launch.session_network_id != u32::from(network.session_network_id) {
            self.shared.deny(&caller, launch.session_network_id).await;
            return Err(OwnError::Foreign { asked: launch.session_network_id });
        }
        let order = MemberOrder {
            role: launch.role,
            count: launch.count,
            image: launch.image.unwrap_or_else(|| caller.spec.image.clone()),
            vcpus: launch.vcpus.unwrap_or(caller.spec.vcpus.into()),
            memory_mib: launch.memory_mib.unwrap_or(caller.spec.memory_mib.into()),
            addressing: network.addressing,
            network_limits: caller.spec.network_limits,
        };
        order.check()?;
        let Some(host) = launch.peer else {
            return Ok(OwnLaunched::Here(self.launch_members(&network.session, &order).await?));
        };
        let fabric: &FabricConfig = self.usable_fabric().await?;
        let peer = fabric.peers.iter().find(|peer| peer.name == host).ok_or(OwnError::UnknownHost { host })?;
        // Not of a session that takes no more members here: they would be its first new ones elsewhere.
        let (session, _) = self.session_to_join(network.session.as_str()).await?;
        let user_data = self.user_data_of(&session.id).await?;
        let launch = PeerLaunch {
            session_network_id: launch.session_network_id,
            ipv4: session.ipv4,
            egress: session.egress.clone(),
            ttl_s: session.left_s(self.shared.steady()),
            user_data,
            order,
        };
        let mut vms = self.shared.launch_at_peer(fabric, peer, &launch).await?;
        vms.iter_mut().for_each(|vm| vm.host.clone_from(&peer.name));
        Ok(OwnLaunched::Elsewhere(vms))
    }

    async fn user_data_of(&self, session: &SessionId) -> Result<Option<String>, LedgerError> {
        let session = session.clone();
        self.shared.world.records().with(move |store| store.user_data(&session)).await
    }
}

impl<W: World> SelfDoor for Agent<W> {
    fn metadata(&self) -> Option<mpsc::Receiver<MetadataDoor>> {
        self.shared.asking.offered.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn own<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<OwnView, OwnError>> {
        async move {
            let vm = self.caller(vm)?;
            let session = self.own_session(&vm).await?;
            Ok(OwnView { vm, session })
        }
        .boxed()
    }

    fn own_user_data<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<Option<String>, OwnError>> {
        async move {
            let vm = self.caller(vm)?;
            match &vm.network {
                Some(network) => Ok(self.user_data_of(&network.session).await?),
                None => Ok(None),
            }
        }
        .boxed()
    }

    fn own_members<'a>(&'a self, vm: &'a VmId) -> BoxFuture<'a, Result<OwnMembers, OwnError>> {
        async move {
            let vm = self.caller(vm)?;
            let Some(network) = &vm.network else { return Ok(OwnMembers::default()) };
            let elsewhere = self.shared.members_elsewhere(network.session_network_id).await;
            Ok(OwnMembers { here: self.members(&network.session), elsewhere })
        }
        .boxed()
    }

    fn register_own<'a>(&'a self, vm: &'a VmId, words: RegistrationWords) -> BoxFuture<'a, Result<u64, OwnError>> {
        self.register_by_metadata(vm, words).boxed()
    }

    fn launch_own<'a>(&'a self, vm: &'a VmId, launch: OwnLaunch) -> BoxFuture<'a, Result<OwnLaunched, OwnError>> {
        // On a task of its own: a guest that hangs up does not leave half of the VMs.
        let (agent, vm) = (self.clone(), vm.clone());
        async move {
            let launching = tokio::spawn(agent.launch_for_guest(vm, launch));
            launching.await.unwrap_or(Err(OwnError::Launch(LaunchError::Ending)))
        }
        .boxed()
    }
}
