//! Migrations as they are asked for and looked at: where a VM may go, how far it is, what became of it. A migration is the
//! operations that carry its id: that of the machine's sending and that of its leaving at the source, that of its
//! arriving at the target. What is here only reads them; the VMs' actors do the work.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};

use super::Agent;
use super::bundles::BundleError;
use super::config::{FabricConfig, Peer};
use super::door::VmError;
use super::ledger::LedgerError;
use super::migration_record::{Compress, MigrationRecord, MovePolicy, MoveRecord, PolicyError, Uncompressed};
use super::migration_view::{Direction, MigrationState, MigrationView, views};
use super::peers::{ArrivalOrder, ArrivalVerdict, PeerError};
use super::record::VmRecord;
use super::vm_actor::Verb;
use super::vm_state::VmState;
use super::world::{Ask, Records, VmmHost, VmmProcess, World, random_array};
use crate::ids::MigrationId;
use crate::net::address::HostNumber;
use crate::report::{Retry, chain};
use crate::units::MIB;
use crate::wire::control::{Answer, SendPhase};

/// The word for whichever host takes it.
const AUTO: &str = "auto";

/// Migrations that an estimate is based on, at most.
const ESTIMATED_FROM_MAX: usize = 10;

/// Why a VM is not moved to another host.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// There is no other host.
    #[error("this host has no [fabric] in its configuration, so it knows no other host")]
    NoFabric,
    /// The word is no peer's name.
    #[error("there is no peer {word:?} in the configuration; there are: {known}")]
    UnknownPeer {
        /// The word.
        word: String,
        /// The peers there are.
        known: String,
    },
    /// It is this host.
    #[error("{word:?} is this host")]
    SameHost {
        /// The word.
        word: String,
    },
    /// The VM has something that only this host has.
    #[error("{vm} cannot leave this host: {what}")]
    Tied {
        /// The VM.
        vm: String,
        /// What it has.
        what: &'static str,
    },
    /// A number of the policy is not possible.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// None of the other hosts would take it.
    #[error("no other host takes {vm}: {}", why.join("; "))]
    NoTarget {
        /// The VM.
        vm: String,
        /// Each of them, and why not.
        why: Vec<String>,
    },
    /// The other host would not take it, or does not answer.
    #[error("ask whether it would take {vm}")]
    Refused {
        /// The VM.
        vm: String,
        /// What it says.
        #[source]
        source: Box<PeerError>,
    },
    /// What the VM needs of a host is not known.
    #[error("find out what {vm} needs of a host")]
    Needs {
        /// The VM.
        vm: String,
        /// Why not.
        #[source]
        source: Box<BundleError>,
    },
    /// Its disks cannot be looked at.
    #[error("look at the disks of {vm}")]
    Disks {
        /// The VM.
        vm: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// There is no such migration.
    #[error("there is no migration {word:?} on this host, or it is not kept any more")]
    UnknownMigration {
        /// What was given.
        word: String,
    },
    /// It cannot be cancelled any more, or not here.
    #[error("migration {id} cannot be cancelled: it is {state}")]
    NotCancellable {
        /// Which.
        id: MigrationId,
        /// What it is doing.
        state: &'static str,
    },
    /// Its addresses are another host's, which alone can lead there.
    #[error("{vm} has addresses of host number {home}: from here it can only go back there")]
    NotHome {
        /// The VM.
        vm: String,
        /// Whose addresses it has.
        home: u16,
    },
}

impl MigrateError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::NoTarget { .. } | Self::Refused { .. } | Self::Needs { .. } | Self::Disks { .. } => Retry::Later,
            Self::UnknownMigration { .. } | Self::NotCancellable { .. } => Retry::Never,
            Self::NoFabric
            | Self::UnknownPeer { .. }
            | Self::SameHost { .. }
            | Self::Tied { .. }
            | Self::Policy(_)
            | Self::NotHome { .. } => Retry::WithChange,
        }
    }
}

/// A migration to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrateOrder {
    /// The peer's name, or [`AUTO`].
    pub to: String,
    /// How.
    pub policy: MovePolicy,
    /// Whether to answer when it is over, and not when it has begun.
    pub wait: bool,
}

impl MigrateOrder {
    /// To this host, as migrations are ordinarily, and answered when it is over.
    pub fn to(peer: &str) -> Self {
        Self { to: peer.to_owned(), policy: MovePolicy::default(), wait: true }
    }
}

/// What a migration is likely to be like.
#[derive(Debug, Clone)]
pub struct MigrationEstimate {
    /// The host it would go to.
    pub to: String,
    /// Whether the bundle it was launched from is there: then only what differs from it is copied.
    pub has_base: bool,
    /// Memory that host could give to guests, in bytes.
    pub memory_available_bytes: u64,
    /// Bytes of guest memory to copy once, at most: what the VM has touched.
    pub copy_bytes: u64,
    /// Whether its pages would be compressed.
    pub compress: Compress,
    /// Why not, if that was asked for.
    pub uncompressed: Option<Uncompressed>,
    /// Bytes a second, by the last migrations to that host and the limit that was asked for; `None` without any.
    pub rate_bytes: Option<u64>,
    /// How long no vCPU will run, in microseconds, by the same; `None` without any.
    pub pause_us: Option<u64>,
    /// How many migrations that is based on.
    pub based_on: usize,
}

/// Whether a VM can go to another host, and how.
pub(super) fn check_to_migrate(
    vm: &VmRecord,
    word: &str,
    fabric: Option<&FabricConfig>,
    own_name: Option<&str>,
) -> Result<(String, HostNumber), MigrateError> {
    let fabric = fabric.ok_or(MigrateError::NoFabric)?;
    let Some(peer) = fabric.peers.iter().find(|peer| peer.name == word) else {
        if own_name == Some(word) {
            return Err(MigrateError::SameHost { word: word.to_owned() });
        }
        let known: Vec<&str> = fabric.peers.iter().map(|peer| peer.name.as_str()).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(MigrateError::UnknownPeer { word: word.to_owned(), known });
    };
    check_ties(vm)?;
    check_home(vm, peer)?;
    Ok((peer.name.clone(), peer.host))
}

/// Whether a VM has something that only this host has.
fn check_ties(vm: &VmRecord) -> Result<(), MigrateError> {
    let tie = if vm.spec.disks.iter().any(|disk| !disk.shared) {
        Some("it has a disk that only this host sees: one that others see as well is launched with --disk FILE:shared")
    } else if vm.spec.cluster.is_some() {
        Some("it is a member of a cluster, whose registrar is here")
    } else if vm.network.as_ref().is_some_and(|network| !network.published.is_empty()) {
        Some("ports of this host lead to it")
    } else if vm.spec.build.is_some() {
        Some("it is there to become a bundle here")
    } else {
        None
    };
    match tie {
        Some(what) => Err(MigrateError::Tied { vm: called(vm), what }),
        None => Ok(()),
    }
}

/// From elsewhere a VM can only go back to the host whose addresses it has.
fn check_home(vm: &VmRecord, peer: &Peer) -> Result<(), MigrateError> {
    match vm.network.as_ref().and_then(|network| network.home) {
        Some(home) if home != u16::from(peer.host) => Err(MigrateError::NotHome { vm: called(vm), home }),
        Some(_) | None => Ok(()),
    }
}

fn called(vm: &VmRecord) -> String {
    vm.name.clone().unwrap_or_else(|| vm.id.to_string())
}

/// Migrations, as seen from above.
pub trait MigrationDoor: Send + Sync + 'static {
    /// Moves a VM to another host.
    fn migrate<'a>(&'a self, word: &'a str, order: MigrateOrder) -> BoxFuture<'a, Result<Arc<VmRecord>, VmError>>;
    /// What moving it there would be like; nothing is moved.
    fn estimate_migration<'a>(
        &'a self,
        word: &'a str,
        order: MigrateOrder,
    ) -> BoxFuture<'a, Result<MigrationEstimate, VmError>>;
    /// The migrations that are kept, newest first.
    fn migrations(&self) -> BoxFuture<'_, Result<Vec<MigrationView>, LedgerError>>;
    /// One of them, by its id or the start of it.
    fn migration<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<MigrationView, VmError>>;
    /// Gives one up: answered when the VM is as it was.
    fn cancel_migration<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<MigrationView, VmError>>;
}

impl<W: World> Agent<W> {
    async fn migrate_vm(&self, word: &str, order: MigrateOrder) -> Result<Arc<VmRecord>, VmError> {
        order.policy.check().map_err(MigrateError::from)?;
        let handle = self.find(word)?;
        let vm = handle.record.borrow().clone();
        let (peer, host) = self.target_of(&vm, &order).await?;
        let random = random_array(&self.shared.world).unwrap_or_default();
        let policy = order.policy;
        let way = MigrationRecord { id: MigrationId::from_random(random), peer, host: host.into(), policy };
        let id = way.id.clone();
        if order.wait {
            return self.ask_actor(&handle, Verb::Migrate(way)).await;
        }
        let mut record = handle.record.clone();
        let (agent, handle) = (self.clone(), handle.clone());
        let mut asking = tokio::spawn(async move { agent.ask_actor(&handle, Verb::Migrate(way)).await });
        let has_begun = |vm: &Arc<VmRecord>| vm.migration.as_ref().is_some_and(|way| way.id == id);
        tokio::select! {
            biased;
            // Refused, or over already.
            answer = &mut asking => answer.unwrap_or_else(|_| Err(VmError::Verb(gone(&vm)))),
            begun = record.wait_for(has_begun) => match begun {
                Ok(vm) => Ok(Arc::clone(&vm)),
                Err(_) => Err(VmError::Verb(gone(&vm))),
            },
        }
    }

    /// The host a VM is to go to.
    async fn target_of(&self, vm: &VmRecord, order: &MigrateOrder) -> Result<(String, HostNumber), VmError> {
        let (fabric, own) = (self.shared.config.fabric.as_ref(), self.shared.config.host_name.as_deref());
        let is_peer = |fabric: &FabricConfig| fabric.peers.iter().any(|peer| peer.name == order.to);
        if order.to != AUTO || fabric.is_some_and(is_peer) {
            return Ok(check_to_migrate(vm, &order.to, fabric, own)?);
        }
        let fabric = fabric.ok_or(MigrateError::NoFabric)?;
        check_ties(vm)?;
        if vm.state != VmState::Running {
            return Err(super::vm_state::Denied { state: vm.state.clone() }.into());
        }
        let asked = join_all(fabric.peers.iter().map(|peer| async move {
            let verdict = match check_home(vm, peer) {
                Ok(()) => self.ask_to_take(vm, fabric, peer).await,
                Err(error) => Err(error),
            };
            (peer, verdict)
        }));
        let (mut why, mut best) = (Vec::new(), None::<(&Peer, u64)>);
        for (peer, verdict) in asked.await {
            match verdict {
                Ok(verdict) if best.is_none_or(|(_, most)| verdict.memory_available_bytes > most) => {
                    best = Some((peer, verdict.memory_available_bytes));
                }
                Ok(_) => {}
                Err(error) => why.push(format!("{}: {}", peer.name, chain(&error))),
            }
        }
        match best {
            Some((peer, _)) => Ok((peer.name.clone(), peer.host)),
            None => {
                if fabric.peers.is_empty() {
                    why.push("this host knows none; [[peers]] in its configuration names them".to_owned());
                }
                Err(MigrateError::NoTarget { vm: called(vm), why }.into())
            }
        }
    }

    /// Asks a host whether it would take a VM.
    async fn ask_to_take(
        &self,
        vm: &VmRecord,
        fabric: &FabricConfig,
        peer: &Peer,
    ) -> Result<ArrivalVerdict, MigrateError> {
        let needs = self.shared.needs_of(vm).await;
        let needs = needs.map_err(|source| MigrateError::Needs { vm: called(vm), source: Box::new(source) })?;
        let session = match &vm.network {
            Some(network) => self.shared.session_of(network.session.clone()).await.ok().flatten(),
            None => None,
        };
        let session = match session {
            Some(session) => self.shared.arriving_session(&session).await.ok(),
            None => None,
        };
        let random = random_array(&self.shared.world).unwrap_or_default();
        let (id, policy) = (MigrationId::from_random(random), MovePolicy::default());
        let way = MigrationRecord { id, peer: peer.name.clone(), host: peer.host.into(), policy };
        let disks = self.shared.identify_disks(vm).await;
        let disks = disks.map_err(|source| MigrateError::Disks { vm: called(vm), source })?;
        let order = ArrivalOrder::of(vm, &way, session, (fabric.host.into(), needs, disks), (&[], [0; 32]));
        let asked = self.shared.check_at_peer(fabric, peer, &order).await;
        asked.map_err(|source| MigrateError::Refused { vm: called(vm), source: Box::new(source) })
    }

    async fn estimate(&self, word: &str, order: MigrateOrder) -> Result<MigrationEstimate, VmError> {
        order.policy.check().map_err(MigrateError::from)?;
        let vm = self.find(word)?.record.borrow().clone();
        let (to, host) = self.target_of(&vm, &order).await?;
        let peers = self.shared.config.fabric.as_ref();
        let peer = peers.and_then(|fabric| Some((fabric, fabric.peers.iter().find(|peer| peer.host == host)?)));
        let (fabric, peer) = peer.ok_or(MigrateError::NoFabric)?;
        let verdict = self.ask_to_take(&vm, fabric, peer).await?;
        let process = self.shared.world.vmm().find(&vm).await.ok().flatten();
        let resident = process.and_then(|process| process.usage().resident_bytes);
        let memory = u64::from(vm.spec.memory_mib).saturating_mul(MIB);
        let known = self.shared.world.records().with(|store| store.operations()).await.map_err(VmError::Ledger)?;
        let known = views(&known).into_iter().filter(|known| {
            known.direction == Direction::Out
                && known.way.host == u16::from(host)
                && known.state == MigrationState::Completed
        });
        let known: Vec<MoveRecord> = known.filter_map(|known| known.moved).take(ESTIMATED_FROM_MAX).collect();
        let rate = median(known.iter().filter_map(MoveRecord::rate_bytes));
        let limit = order.policy.rate_bytes_max;
        let (form, uncompressed) = order.policy.compress.agreed(vm.wire_version, verdict.stream_version);
        Ok(MigrationEstimate {
            to,
            has_base: verdict.has_base,
            memory_available_bytes: verdict.memory_available_bytes,
            copy_bytes: resident.map_or(memory, |resident| resident.min(memory)),
            compress: form.packing.into(),
            uncompressed,
            rate_bytes: rate.map(|rate| limit.map_or(rate, |limit| rate.min(limit))).or(limit),
            pause_us: median(known.iter().filter_map(|moved| moved.pause_us)),
            based_on: known.len(),
        })
    }

    async fn all_migrations(&self) -> Result<Vec<MigrationView>, LedgerError> {
        let operations = self.shared.world.records().with(|store| store.operations()).await?;
        let mut all = views(&operations);
        for view in &mut all {
            let record = self.shared.vms().get(&view.vm).map(|vm| vm.record.borrow().clone());
            view.vm_name = record.as_ref().and_then(|record| record.name.clone());
            if let Some(record) = record.filter(|_| view.state == MigrationState::Copying) {
                self.look_at(view, &record).await;
            }
        }
        Ok(all)
    }

    /// How far the copying is, by the VMM that does it.
    async fn look_at(&self, view: &mut MigrationView, vm: &VmRecord) {
        let asked = self.shared.world.vmm().ask(vm, self.shared.epoch, Ask::SendProgress).await;
        // Without an answer it is as far as the ledger says.
        let Ok(Answer::Sending(progress)) = asked else { return };
        if matches!(progress.phase, SendPhase::Critical | SendPhase::Ready) {
            view.state = MigrationState::Critical;
        }
        view.progress = Some(progress.into());
    }

    async fn one_migration(&self, word: &str) -> Result<MigrationView, VmError> {
        let all = self.all_migrations().await.map_err(VmError::Ledger)?;
        let mut found = all.into_iter().filter(|view| view.way.id.as_str().starts_with(word));
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one),
            // Both ways of one migration cannot be here: hosts do not send to themselves.
            (Some(one), Some(_)) if one.way.id.as_str() == word => Ok(one),
            (_, _) => Err(MigrateError::UnknownMigration { word: word.to_owned() }.into()),
        }
    }

    async fn cancel(&self, word: &str) -> Result<MigrationView, VmError> {
        let view = self.one_migration(word).await?;
        let id = view.way.id.clone();
        let is_on_its_way = matches!(
            view.state,
            MigrationState::Preparing
                | MigrationState::Copying
                | MigrationState::Critical
                | MigrationState::RollingBack
        );
        if !is_on_its_way {
            return Err(MigrateError::NotCancellable { id, state: view.state.name() }.into());
        }
        let handle = self.find(view.vm.as_str())?;
        match self.ask_actor(&handle, Verb::CancelMigration(id.clone())).await {
            Ok(_) => self.one_migration(id.as_str()).await,
            Err(VmError::Verb(_)) => {
                let state = self.one_migration(id.as_str()).await?.state.name();
                Err(MigrateError::NotCancellable { id, state }.into())
            }
            Err(error) => Err(error),
        }
    }
}

fn gone(vm: &VmRecord) -> super::vm_actor::VerbError {
    super::vm_actor::VerbError::Gone { vm: vm.id.to_string() }
}

fn median(values: impl Iterator<Item = u64>) -> Option<u64> {
    let mut values: Vec<u64> = values.collect();
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

impl<W: World> MigrationDoor for Agent<W> {
    fn migrate<'a>(&'a self, word: &'a str, order: MigrateOrder) -> BoxFuture<'a, Result<Arc<VmRecord>, VmError>> {
        self.migrate_vm(word, order).boxed()
    }

    fn estimate_migration<'a>(
        &'a self,
        word: &'a str,
        order: MigrateOrder,
    ) -> BoxFuture<'a, Result<MigrationEstimate, VmError>> {
        self.estimate(word, order).boxed()
    }

    fn migrations(&self) -> BoxFuture<'_, Result<Vec<MigrationView>, LedgerError>> {
        self.all_migrations().boxed()
    }

    fn migration<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<MigrationView, VmError>> {
        self.one_migration(word).boxed()
    }

    fn cancel_migration<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<MigrationView, VmError>> {
        self.cancel(word).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_the_middle_of_what_was() {
        assert_eq!(median([].into_iter()), None);
        assert_eq!(median([3, 1, 2].into_iter()), Some(2));
    }
}
