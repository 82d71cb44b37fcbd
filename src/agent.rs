//! Floor 3: the agent, one per host. It owns the ledger, starts VMMs and speaks to guests; it never maps a guest's
//! memory and never touches KVM. What is above it comes in by [`Door`] only.
//!
//! Start-up: lock the state directory, open the ledger, take the next epoch, give every recorded VM its actor (which
//! looks for its VMM and continues what is unfinished), sweep what no record knows in the background; then the door is
//! open. A VM is not waited for.
#![forbid(unsafe_code)]

mod admit;
mod adoption;
mod arrivals;
mod arrive;
mod away;
mod backups;
mod balloon;
mod bundle_door;
mod bundle_names;
mod bundles;
mod calculation_record;
mod calculation_run;
mod calculations;
mod cgroup;
mod cluster;
mod cluster_door;
mod cluster_end;
mod cluster_error;
mod cluster_record;
mod command_line;
pub mod config;
mod connections;
mod door;
mod drain;
mod effect;
mod egress;
mod exec;
mod failure;
mod fetch_door;
mod fetched;
mod filling;
#[cfg(test)]
mod fixture;
mod guest;
mod guest_network;
mod health;
mod held_taps;
mod host_ask;
mod host_bundles;
mod host_disk;
mod host_fetched;
mod host_move;
mod host_network;
mod host_open;
mod host_probe;
mod host_process;
mod host_save;
mod host_touched;
mod host_vmm;
mod host_volumes;
mod host_world;
mod images;
mod isolation;
mod launch;
mod launch_error;
mod ledger;
pub mod log;
mod member;
mod metrics;
mod migration_record;
mod migration_view;
mod migrations;
mod network;
pub mod peers;
mod pool;
mod record;
mod recover;
mod register;
mod registrar;
mod relaunch;
mod remove_all;
mod room;
mod self_door;
mod serve;
mod session;
mod session_end;
mod session_error;
mod session_record;
mod shared;
mod sources;
mod streams;
mod support;
mod swap;
mod swap_watch;
mod traffic;
mod transfer;
mod trust;
mod usage;
mod vm_actor;
mod vm_state;
mod volume_change;
mod volume_door;
mod volume_names;
mod volume_watch;
pub mod volumes;
mod work;
pub mod world;

use std::sync::Arc;

pub use crate::sys::host::raise_descriptors;
pub use arrivals::Decision;
pub use arrive::ArriveError;
pub use backups::{BackUpError, BackedUp};
pub use balloon::BalloonError;
pub use bundle_door::{BuildRequest, BundleDoor, BundleWork, SnapshotRequest};
pub use bundles::{BundleError, BundleListed, BundleView, CommitOrder};
pub use calculation_record::{CalculationCause, CalculationOutput, CalculationRecord, CalculationState};
pub use calculations::{CalculationRequest, CalculationTaken};
pub use cgroup::Controller;
pub use cluster::{ClusterCreated, ClusterRequest, ClusterView};
pub use cluster_door::ClusterDoor;
pub use cluster_error::{CalculationError, ClusterError};
pub use cluster_record::{ClusterRecord, ClusterState, Membership, Registered, Token};
pub use connections::Connections;
pub use door::{Door, FindError, GuestStats, HostView, NotRunning, VmError, VmStats};
pub use drain::{DRAIN_GRACE, Draining};
pub use effect::Effect;
pub use egress::{Cidr, CidrError, EGRESS_RULES_MAX, Egress, EgressError, EgressRule, Protocol};
pub use exec::{
    AnyStream, ExecError, ExecExit, ExecInput, ExecOutput, ExecReceiver, ExecSender, ExecSession, ExecSpec,
};
pub use fetch_door::{FetchDoor, MemoryView};
pub use fetched::{Coming, FetchView, FetchedBundles};
pub use filling::VmFilling;
pub use guest::GuestError;
pub use health::{LedgerView, Pressure, Warning};
pub use host_world::{HostWorld, OpenHostError};
pub use images::{ContainerOrigin, ContainerProgram, Image, ImageError, NAME_BYTES_MAX};
pub use isolation::{GroupLimit, HostIsolation, ThreadFilter, VmJail};
pub use launch::{KEY_LIFETIME_NS, Key, LaunchRequest, Launched, VolumeWish};
pub use launch_error::LaunchError;
pub use ledger::{
    Backup, BackupError, CalculationChange, Claim, ClusterRefusal, EVENTS_PAGE, Grant, KeyRow, LedgerError, Loaded,
    LocalLease, NewSession, NumberChoice, RestoreError, SessionRefusal, Store, StoredAnswer, Taken, Write,
    backups as ledger_backups, dump as dump_ledger, restore as restore_ledger,
};
pub use migration_record::{
    Compress, MigrationRecord, MovePolicy, MoveRecord, PauseSteps, PolicyError, Uncompressed, WhenUnconverged,
};
pub use migration_view::{Direction, MigrationProgress, MigrationState, MigrationView};
pub use migrations::{MigrateError, MigrateOrder, MigrationDoor, MigrationEstimate};
pub use pool::{POOL_SIZE_MAX, PoolDoor, PoolError, PoolView};
pub use record::{
    BuildSpec, BundleOrder, DiskSpec, EventRecord, OperationError, OperationRecord, OperationState, ProcessRecord,
    QuarantineRecord, Remains, StepRecord, StepState, Subject, SwapPolicy, SwapRecord, Timings, VmRecord, VmSpec,
    VolumeSlot, WakeCause,
};
pub use registrar::{Admission, RegistrationRefusal, RegistrationWords, admit as admit_registration};
pub use room::NoRoom;
pub use self_door::{
    MEMBERS_AT_ONCE_MAX, MetadataDoor, OwnError, OwnLaunch, OwnLaunched, OwnMembers, OwnView, ROLE_BYTES_MAX, SelfDoor,
};
pub use session::{FabricView, Member, SessionCreated, SessionRequest, SessionView, TTL_S_MAX};
pub use session_error::SessionError;
pub use session_record::{Addressing, NetworkRecord, PublishedPort, SessionRecord, SessionState, USER_DATA_BYTES_MAX};
pub use sources::{SourceDoor, SourceError, StoreLink, StoreLinkError, UNKNOWN_BUNDLE};
pub use support::{SupportError, SupportRequest, support_bundle};
pub use swap::{HostLoad, Need, SwapDecision, Verdict, Weighed};
pub use transfer::{Imported, PIECES_MAX, Piece, TransferDoor};
pub use trust::{Trust, TrustConfig};
pub use usage::{Usages, VmUsage};
pub use vm_actor::{Arrival, SwapOrder, Verb, VerbError};
pub use vm_state::{Denied, FailureCause, Goal, SwapMode, VmState};
pub use volume_change::{VolumeChange, VolumeChangeError};
pub use volume_door::{
    ChangesView, DigestView, LeaseRequest, LeasesView, VmVolumesView, VolumeDoor, VolumeError, VolumeOrigin,
    VolumeRequest,
};
pub use volumes::{AskVolumesError, UsePhase, VolumeLimits, VolumeUse};

pub use crate::bundle::archive::ArchiveError;
pub use crate::bundle::manifest::{DeviceKind, Manifest, Recipe};
pub use crate::bundle::{
    BundlePart, BundleSignature, CommitError, ExportError, FetchedBundle, FetchedError, FindError as FindBundleError,
    ImportError, OpenBundleError, ParseSourceError, PartialError, ReadBundleError, ReadPartError, RemoveError,
    SignError, SourceSpec, StageError, Verified, VerifyError,
};
pub use crate::container::{ContainerError, Source as ContainerSource};
pub use crate::wire::control::{
    BalloonStatus, FlowStatus, GuestMemoryStatus, InterfaceStatus, VolumeFlow, VolumeStatus,
};
pub use crate::wire::volumed::{Refusal as VolumeRefusal, Run as VolumeRun, SnapshotReport, VolumeReport};
pub use world::{Drops, HostFacts, ImageContent, ImageImport, ProcessUsage};

use shared::{Begun, Shared, VmHandle};
use world::{Records, VmDisk, World};

use crate::clock::Clock;

/// An agent over a world. Clones are the same agent.
pub struct Agent<W: World> {
    shared: Arc<Shared<W>>,
}

impl<W: World> Clone for Agent<W> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<W: World> std::fmt::Debug for Agent<W> {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Agent").field("epoch", &self.shared.epoch).finish_non_exhaustive()
    }
}

impl<W: World> Agent<W> {
    /// Starts an agent: takes the next epoch and gives every recorded VM its actor. Runs inside a tokio runtime.
    pub async fn start(world: W, config: config::Config) -> Result<Self, LedgerError> {
        let (kept, days) = (config.limits.events_kept, config.limits.events_kept_days);
        let age = std::time::Duration::from_secs(u64::from(days) * 24 * 3600);
        let (up, wall) = (world.uptime(), world.clock().wall());
        let rest_max = config.uids.quarantine().max(session_end::quarantine(&config));
        let uid_rest = config.uids.quarantine();
        let begin = move |store: &mut Store| {
            store.keep_events(kept, age)?;
            let steady = store.steady(up, wall, rest_max)?;
            // No agent of before lends anything any more.
            store.release_strays(steady.after(uid_rest))?;
            Ok((store.begin()?, steady, store.file().is_some()))
        };
        let (loaded, steady, has_file) = world.records().with(begin).await?;
        let Loaded { vms, mut operations, epoch, last_event } = loaded;
        let shared = Arc::new(Shared::new(world, config, Begun { epoch, last_event, steady }));
        tracing::info!(epoch, vms = vms.len(), unfinished = operations.len(), "ledger read");
        shared.set_conflict("configuration", recover::moved_fabric(&shared.config, &vms)).await?;
        network::start(&shared).await;
        recover::sweep_saved(&shared, &operations).await;
        if !vms.is_empty() {
            shared.begin_adoption(vms.len());
        }
        for vm in vms {
            let unfinished = operations.iter().position(|operation| operation.vm == vm.id);
            let operation = unfinished.map(|index| operations.remove(index));
            let recovered = Box::new(vm_actor::Recovered { operation });
            vm_actor::start(&shared, vm, vm_actor::Begin::Recover(recovered), None);
        }
        recover::end_orphans(&shared, operations).await?;
        tokio::spawn(recover::sweep(Arc::clone(&shared)));
        if has_file {
            tokio::spawn(backups::keep(Arc::clone(&shared)));
        }
        let agent = Self { shared };
        tokio::spawn(agent.clone().end_sessions());
        tokio::spawn(agent.clone().look_after_clusters());
        tokio::spawn(agent.clone().give_out_calculations());
        tokio::spawn(agent.clone().watch_idle_vms());
        tokio::spawn(agent.clone().look_after_those_away());
        tokio::spawn(agent.clone().keep_pools());
        tokio::spawn(Arc::clone(&agent.shared).go_on_filling());
        tokio::spawn(agent.clone().look_after_volumes());
        Ok(agent)
    }

    /// All records, oldest first.
    fn records(&self) -> Vec<Arc<VmRecord>> {
        let mut records: Vec<_> = self.shared.vms().values().map(|vm| vm.record.borrow().clone()).collect();
        records.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        records
    }

    /// The VM a word means.
    fn find(&self, word: &str) -> Result<VmHandle, FindError> {
        let vms = self.shared.vms();
        let exact = vms.values().find(|vm| vm.id.as_str() == word || vm.name.as_deref() == Some(word));
        if let Some(vm) = exact {
            return Ok(vm.clone());
        }
        let start = word.strip_prefix(crate::ids::VmId::PREFIX).unwrap_or(word);
        let short = |vm: &&VmHandle| {
            let id = vm.id.as_str().trim_start_matches(crate::ids::VmId::PREFIX);
            !start.is_empty() && id.starts_with(start)
        };
        let mut found: Vec<&VmHandle> = vms.values().filter(short).collect();
        match (found.pop(), found.len()) {
            (Some(vm), 0) => Ok(vm.clone()),
            (Some(_), more) => Err(FindError::Ambiguous { word: word.to_owned(), count: more + 1 }),
            (None, _) => Err(FindError::Unknown { word: word.to_owned() }),
        }
    }

    async fn import(&self, import: ImageImport) -> Result<Image, ImageError> {
        self.room(room::NewWork::Files).await?;
        self.shared.world.disk().import_image(import).await
    }

    async fn remove_unused_image(&self, name: &str) -> Result<(), ImageError> {
        let vms = self.records().iter().filter(|vm| vm.state.holds_resources() && vm.spec.image == name).count();
        if vms > 0 {
            return Err(ImageError::InUse { name: name.to_owned(), vms });
        }
        self.shared.world.disk().remove_image(name).await
    }
}

#[cfg(test)]
pub(crate) mod golden {
    //! Golden files: what a test makes has to be what is checked in. `HEARTH_BLESS=1` writes them anew.

    /// Compares `text` with `tests/golden/NAME`.
    pub(crate) fn check(name: &str, text: &str) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if std::env::var_os("HEARTH_BLESS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            crate::sys::file::replace(&path, text.as_bytes()).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(golden == text, "{name} is not as in {}; if it should be: HEARTH_BLESS=1\n{text}", path.display());
    }
}
