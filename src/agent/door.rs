//! What the rest of the program may ask of the agent. Object-safe, so that what is above does not depend on the
//! agent's world: the HTTP side is tested over a simulated one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::backups::{BackUpError, BackedUp};
use super::balloon::BalloonError;
use super::bundle_door::BundleDoor;
use super::bundles::BundleError;
use super::cluster_door::ClusterDoor;
use super::config::Limits;
use super::connections::Connections;
use super::drain::Draining;
use super::exec::{AnyStream, ExecError, ExecSession, ExecSpec};
use super::fetch_door::FetchDoor;
use super::guest::GuestError;
use super::health::{LedgerView, Pressure, Warning};
use super::images::{Image, ImageError};
use super::isolation::VmJail;
use super::launch::{Key, LaunchRequest, Launched};
use super::launch_error::LaunchError;
use super::ledger::{KeyRow, LedgerError, StoredAnswer};
use super::migrations::{MigrateError, MigrationDoor};
use super::peers::PeerDoor;
use super::pool::PoolDoor;
use super::record::{EventRecord, OperationRecord, VmRecord};
use super::self_door::SelfDoor;
use super::session::{FabricView, SessionCreated, SessionRequest, SessionView};
use super::session_error::SessionError;
use super::sources::SourceDoor;
use super::swap::SwapDecision;
use super::transfer::TransferDoor;
use super::usage::Usages;
use super::vm_actor::{Verb, VerbError};
use super::vm_state::{Denied, VmState};
use super::volume_door::VolumeDoor;
use super::world::{HostFacts, ImageImport, OpenStreamError, ProcessUsage};
use crate::clock::UnixNanos;
use crate::report::Retry;
use crate::wire::control::{BalloonStatus, InterfaceStatus, Status};

/// No VM is meant by a word, or more than one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// No VM has this id or name.
    #[error("there is no VM {word:?}")]
    Unknown {
        /// What was given.
        word: String,
    },
    /// Several ids start like this.
    #[error("{word:?} is the start of {count} VMs' ids; give more of it")]
    Ambiguous {
        /// What was given.
        word: String,
        /// How many it could be.
        count: usize,
    },
}

/// Why something asked of one VM was not done.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It is not clear of which.
    #[error(transparent)]
    Find(#[from] FindError),
    /// Not in its state.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// Its actor did not do it.
    #[error(transparent)]
    Verb(#[from] VerbError),
    /// The program did not run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The guest agent does not answer.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// No bundle is made of it.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// What became of it could not be read.
    #[error(transparent)]
    Ledger(LedgerError),
    /// Only a VM from a bundle differs from one.
    #[error("{vm} was not launched from a bundle, so there is none to take the difference to: make a full one")]
    NoParent {
        /// Which VM.
        vm: String,
    },
    /// It cannot be moved there.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// Its balloon did not get its target.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// Its console is not there.
    #[error("attach to the console of {vm}")]
    Console {
        /// Which VM's.
        vm: String,
        /// What failed.
        #[source]
        source: OpenStreamError,
    },
    /// Its console's history is not there.
    #[error("read the console history of {vm}")]
    History {
        /// Which VM's.
        vm: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

impl VmError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Find(_) => Retry::Never,
            Self::Denied(_) => Retry::WithChange,
            Self::Verb(error) => error.retry(),
            Self::Exec(error) => error.retry(),
            Self::Bundle(error) => error.retry(),
            Self::Ledger(error) => error.retry(),
            Self::Balloon(error) => error.retry(),
            Self::Migrate(error) => error.retry(),
            Self::NoParent { .. } => Retry::WithChange,
            Self::Guest(_) | Self::Console { .. } | Self::History { .. } => Retry::Later,
        }
    }
}

/// The launch that was waited for did not end in a running VM.
#[derive(Debug, Clone, thiserror::Error)]
#[error("launch {}: the VM is {}", vm.id, describe(&vm.state))]
pub struct NotRunning {
    /// The VM as it is now.
    pub vm: Arc<VmRecord>,
}

fn describe(state: &VmState) -> String {
    let VmState::Failed { cause } = state else { return state.name().to_owned() };
    match cause.detail() {
        Some(detail) => format!("failed ({}): {detail}", cause.name()),
        None => format!("failed ({})", cause.name()),
    }
}

/// What a VM uses and says of itself.
#[derive(Debug, Clone, Default)]
pub struct VmStats {
    /// Process id of its VMM and what that uses.
    pub process: Option<(i32, ProcessUsage)>,
    /// What the VMM says.
    pub vmm: Option<Status>,
    /// What passed its network interfaces, as the VMM says.
    pub network: Vec<InterfaceStatus>,
    /// What its balloon holds, as the VMM says.
    pub balloon: Option<BalloonStatus>,
    /// What the guest agent says.
    pub guest: Option<GuestStats>,
}

/// What a guest agent says of its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestStats {
    /// Nanoseconds since the guest kernel started.
    pub uptime_ns: u64,
    /// Its wall clock.
    pub wall_ns: u64,
    /// Memory the kernel manages.
    pub memory_total_bytes: u64,
    /// Memory available without swapping.
    pub memory_available_bytes: u64,
    /// Processes.
    pub processes: u32,
    /// Load average over one minute in hundredths.
    pub load1_hundredths: u32,
    /// Programs started by exec that have not ended.
    pub execs_running: u32,
}

/// This host and its agent.
#[derive(Debug, Clone)]
pub struct HostView {
    /// What the host has.
    pub facts: HostFacts,
    /// When the agent started.
    pub started_at: UnixNanos,
    /// Where it keeps its state.
    pub state_dir: String,
    /// How many agents had this ledger before, and this one.
    pub epoch: u64,
    /// VMs by state.
    pub vm_states: BTreeMap<String, u32>,
    /// Guest memory of VMs that live.
    pub promised_bytes: u64,
    /// Bounds of new work.
    pub limits: Limits,
    /// Whether no new work is taken because the agent will end.
    pub is_draining: bool,
    /// Connections of clients that are open.
    pub connections: usize,
    /// How pressed the host is.
    pub pressure: Pressure,
    /// What speaks against session networks.
    pub conflicts: Vec<String>,
    /// The ledger; `None` when it does not answer.
    pub ledger: Option<LedgerView>,
    /// What to look at.
    pub warnings: Vec<Warning>,
}

/// The agent, as seen from above.
pub trait Door:
    PeerDoor
    + SelfDoor
    + BundleDoor
    + ClusterDoor
    + MigrationDoor
    + PoolDoor
    + SourceDoor
    + TransferDoor
    + FetchDoor
    + VolumeDoor
{
    /// Admits and records a VM, and starts its launch.
    fn launch(&self, request: LaunchRequest) -> BoxFuture<'_, Result<Launched, LaunchError>>;
    /// Waits until a launch ended.
    fn launched(&self, vm: Arc<VmRecord>) -> BoxFuture<'_, Result<Arc<VmRecord>, NotRunning>>;
    /// Looks an idempotency key up.
    fn key(&self, key: Key) -> BoxFuture<'_, Result<Option<KeyRow>, LedgerError>>;
    /// Remembers the answer to a create with a key.
    fn remember(&self, key: Key, object: String, answer: StoredAnswer) -> BoxFuture<'_, Result<(), LedgerError>>;
    /// The fabric as this agent sees it, if it has one.
    fn fabric(&self) -> Option<FabricView>;
    /// Checks and records a session.
    fn create_session(&self, request: SessionRequest) -> BoxFuture<'_, Result<SessionCreated, SessionError>>;
    /// All sessions, oldest first.
    fn sessions(&self) -> BoxFuture<'_, Result<Vec<SessionView>, LedgerError>>;
    /// The session a word means: its id, its name, its network id, or the start of its id.
    fn session<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<SessionView, SessionError>>;
    /// Removes a session without VMs; with `drain` its VMs first, whose guests have `grace` to power off.
    fn remove_session<'a>(
        &'a self,
        word: &'a str,
        drain: bool,
        grace: Duration,
    ) -> BoxFuture<'a, Result<(), SessionError>>;
    /// All VMs, oldest first.
    fn vms(&self) -> Vec<Arc<VmRecord>>;
    /// The VM a word means: its id, its name, or the start of its id.
    fn vm(&self, word: &str) -> Result<Arc<VmRecord>, FindError>;
    /// Asks something of a VM and waits for its answer.
    fn ask<'a>(&'a self, word: &'a str, verb: Verb) -> BoxFuture<'a, Result<Arc<VmRecord>, VmError>>;
    /// What all VMs use, oldest first. No guest is asked.
    fn usage(&self) -> BoxFuture<'_, Usages>;
    /// Starts a program in a guest.
    fn exec<'a>(&'a self, word: &'a str, spec: ExecSpec) -> BoxFuture<'a, Result<ExecSession, VmError>>;
    /// A stream to a guest's console, from the last `history_bytes` of what it wrote before on.
    fn console<'a>(&'a self, word: &'a str, history_bytes: usize) -> BoxFuture<'a, Result<AnyStream, VmError>>;
    /// A guest's console history, at most the last `bytes_max`.
    fn console_history<'a>(&'a self, word: &'a str, bytes_max: usize) -> BoxFuture<'a, Result<Vec<u8>, VmError>>;
    /// What a VM uses and says of itself.
    fn stats<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(Arc<VmRecord>, VmStats), VmError>>;
    /// Asks a guest to give this much of its memory back, and says how far it is.
    fn set_balloon<'a>(&'a self, word: &'a str, target_mib: u64) -> BoxFuture<'a, Result<BalloonStatus, VmError>>;
    /// The newest decisions about idle VMs, newest first.
    fn swap_decisions(&self) -> BoxFuture<'_, Result<Vec<SwapDecision>, LedgerError>>;
    /// What of a VM's jail is in force; nothing while it has no VMM.
    fn jail<'a>(&'a self, vm: &'a VmRecord) -> BoxFuture<'a, Option<VmJail>>;
    /// One operation, by id or the start of it.
    fn operation<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<Option<OperationRecord>, LedgerError>>;
    /// The operations that are kept, newest first.
    fn operations(&self) -> BoxFuture<'_, Result<Vec<OperationRecord>, LedgerError>>;
    /// Some events after a number, oldest first; none when there are none yet.
    fn events(&self, since: u64) -> BoxFuture<'_, Result<Vec<EventRecord>, LedgerError>>;
    /// The number of the last event, to wait on.
    fn last_event(&self) -> watch::Receiver<u64>;
    /// The usable images.
    fn images(&self) -> BoxFuture<'_, Result<Vec<Image>, ImageError>>;
    /// One image.
    fn image<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Image, ImageError>>;
    /// Makes an image of files of this host.
    fn import_image(&self, import: ImageImport) -> BoxFuture<'_, Result<Image, ImageError>>;
    /// Removes an image no VM was made of.
    fn remove_image<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ImageError>>;
    /// This host and its agent.
    fn host(&self) -> BoxFuture<'_, std::io::Result<HostView>>;
    /// Copies the ledger to a new file, or to where automatic backups are kept.
    fn back_up_ledger(&self, to: Option<PathBuf>) -> BoxFuture<'_, Result<BackedUp, BackUpError>>;
    /// Metrics in Prometheus' text format.
    fn metrics(&self) -> BoxFuture<'_, String>;
    /// Counts an API request by its route's pattern and status.
    fn count_request(&self, route: &str, status: u16);
    /// Counts a request that was answered with an error, by its code.
    fn count_refusal(&self, code: &str);
    /// Seconds since the epoch and such: the agent's clock.
    fn now(&self) -> UnixNanos;
    /// Fresh random bytes for a request's id.
    fn request_id(&self) -> String;
    /// Takes no new work from now on and stops all VMs, whose guests have `grace` to power off; the agent ends then.
    fn drain(&self, grace: Duration) -> watch::Receiver<Draining>;
    /// How far draining is.
    fn draining(&self) -> watch::Receiver<Draining>;
    /// Connections of clients: bounded and counted.
    fn connections(&self) -> Arc<Connections>;
    /// Takes away of the host's network what no VM needs: the agent ends.
    fn close(&self) -> BoxFuture<'_, ()>;
    /// Becomes `Some` when the agent cannot go on.
    fn broken(&self) -> watch::Receiver<Option<String>>;
}
