//! Making a VM: admission, reservation, and the hand-over to its actor. One launch is admitted at a time, so that two
//! cannot both fit where only one does; the launches themselves go on side by side.

use std::sync::Arc;

use super::Agent;
use super::admit::{Facts, admit};
use super::images::ImageError;
use super::ledger::{KeyRow, LedgerError, StoredAnswer, Taken, Write};
use super::record::{DiskSpec, SCHEMA_VERSION, Timings, VmRecord, VmSpec};
use super::vm_actor::{Begin, operation_for, start};
use super::vm_state::{Event, Goal, VmState, step};
use super::world::{Records, VmDisk, World, random_array, random_nonce};
use crate::clock::{Clock, UnixNanos};
use crate::ids::{Generation, OperationId, VmId};
use crate::report::Retry;
use crate::units::{NetLimitError, NetLimits};

/// How long an idempotency key is remembered: a client that repeats a request after a day means a new one.
pub const KEY_LIFETIME_NS: u64 = 24 * 3600 * 1_000_000_000;

/// A VM to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchRequest {
    /// Its name, if it gets one.
    pub name: Option<String>,
    /// Image to boot.
    pub image: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Disks to attach.
    pub disks: Vec<DiskSpec>,
    /// What may pass its network interface.
    pub network_limits: NetLimits,
    /// What makes a repetition of this request known.
    pub key: Option<Key>,
}

/// An idempotency key as a client sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The client's word.
    pub key: String,
    /// Method and path.
    pub route: String,
    /// blake3 of the body.
    pub body_hash: [u8; 32],
}

/// What became of a launch request.
#[derive(Debug, Clone)]
pub enum Launched {
    /// A VM was made, or the same request had made it.
    Vm(Arc<VmRecord>),
    /// The same request was answered like this.
    Answered(StoredAnswer),
}

/// Why no VM was made. Nothing is left of the attempt.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Not a name.
    #[error("{name:?} is not a name: 1 to 63 of a-z, 0-9 and -, starting with a letter")]
    Name {
        /// What was given.
        name: String,
    },
    /// A VM has this name.
    #[error("there is a VM named {name:?} already")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The image is not usable.
    #[error("use the image")]
    Image(#[source] ImageError),
    /// Too few or too many vCPUs.
    #[error("vcpus {found}: 1 to {max} are possible")]
    Vcpus {
        /// What was asked for.
        found: u32,
        /// The most there can be.
        max: u32,
    },
    /// Less memory than the image needs.
    #[error("memory {found_mib} MiB: image {image:?} needs at least {min_mib} MiB")]
    MemoryTooSmall {
        /// The image.
        image: String,
        /// What was asked for.
        found_mib: u64,
        /// What is needed.
        min_mib: u64,
    },
    /// More memory than is free.
    #[error("memory {found_mib} MiB: {free_mib} MiB of this host's {total_mib} MiB are free for VMs")]
    MemoryTooLarge {
        /// What was asked for.
        found_mib: u64,
        /// What is free.
        free_mib: u64,
        /// What the host has.
        total_mib: u64,
    },
    /// The kernel would cut the command line off.
    #[error("the command line of image {image:?} is {found} bytes long with this host's additions: at most {max} fit")]
    CommandLine {
        /// The image.
        image: String,
        /// How long it is.
        found: usize,
        /// How long it may be.
        max: usize,
    },
    /// More disks than slots.
    #[error("{found} disks: at most 6 are possible")]
    TooManyDisks {
        /// How many.
        found: usize,
    },
    /// Not a path of a disk.
    #[error("{path:?} is not an absolute path")]
    DiskPath {
        /// What was given.
        path: String,
    },
    /// Somebody writes this disk.
    #[error("disk {path:?} is used by another VM, and one of them would write it")]
    DiskInUse {
        /// Its path.
        path: String,
    },
    /// The disk cannot be opened.
    #[error("open disk {path:?}")]
    Disk {
        /// Its path.
        path: String,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Nobody can mean such a limit.
    #[error(transparent)]
    NetworkLimits(#[from] NetLimitError),
    /// This host has its most VMs.
    #[error("this host has {max} VMs, which is its limit; remove some")]
    TooManyVms {
        /// The limit.
        max: u32,
    },
    /// All user ids rest.
    #[error("no user id is free for the VM")]
    NoUid,
    /// The key was used for something else.
    #[error("the idempotency key was used with another body")]
    KeyMismatch,
    /// The agent is ending.
    #[error("the agent is ending")]
    Ending,
    /// The host refused something.
    #[error("{what}")]
    Host {
        /// What.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It could not be recorded.
    #[error("record the VM")]
    Ledger(#[source] LedgerError),
}

impl LaunchError {
    /// Whether the same request may succeed later.
    pub const fn retry(&self) -> Retry {
        match self {
            Self::Name { .. }
            | Self::NameTaken { .. }
            | Self::Vcpus { .. }
            | Self::MemoryTooSmall { .. }
            | Self::CommandLine { .. }
            | Self::TooManyDisks { .. }
            | Self::DiskPath { .. }
            | Self::DiskInUse { .. }
            | Self::Disk { .. }
            | Self::NetworkLimits(_)
            | Self::KeyMismatch => Retry::WithChange,
            Self::Image(error) => error.retry(),
            Self::MemoryTooLarge { .. } | Self::TooManyVms { .. } | Self::NoUid | Self::Ending | Self::Host { .. } => {
                Retry::Later
            }
            Self::Ledger(error) => error.retry(),
        }
    }
}

impl<W: World> Agent<W> {
    /// Admits and records a VM, and starts its launch.
    pub(crate) async fn launch_vm(&self, request: LaunchRequest) -> Result<Launched, LaunchError> {
        let asked_at = self.shared.world.clock().monotonic();
        // Held through the record: names, memory and uids are handed out one by one.
        let _admission = self.admission.lock().await;
        if let Some(key) = &request.key
            && let Some(earlier) = self.earlier(key).await?
        {
            return Ok(earlier);
        }
        let disk = self.shared.world.disk();
        let image = disk.image(&request.image).await.map_err(LaunchError::Image)?;
        let host = disk.host().await.map_err(|source| LaunchError::Host { what: "ask the host", source })?;
        let additions = disk.command_line_additions().await;
        let vms = self.records();
        let limits = &self.shared.config.limits;
        let facts = Facts { limits, host: &host, image: &image, additions: &additions, vms: &vms };
        let spec = admit(&request, &facts)?;
        for one in &spec.disks {
            let checked = disk.check_disk(one).await;
            checked.map_err(|source| LaunchError::Disk { path: one.path.clone(), source })?;
        }
        let record = self.reserve(&request, spec).await?;
        let next = step(&record.state, &Event::LaunchAsked).map_err(|_| LaunchError::Ending)?;
        self.begin_launch(record, next, request.key, asked_at).await.map(Launched::Vm)
    }

    async fn earlier(&self, key: &Key) -> Result<Option<Launched>, LaunchError> {
        let Some(row) = self.key_row(key).await.map_err(LaunchError::Ledger)? else { return Ok(None) };
        if row.body_hash != key.body_hash {
            return Err(LaunchError::KeyMismatch);
        }
        if let Some(answer) = row.answer {
            return Ok(Some(Launched::Answered(answer)));
        }
        // Recorded but not answered: the client hung up, or an agent ended between.
        Ok(self.find(&row.object).ok().map(|vm| Launched::Vm(vm.record.borrow().clone())))
    }

    pub(crate) async fn key_row(&self, key: &Key) -> Result<Option<KeyRow>, LedgerError> {
        let (word, route, now) = (key.key.clone(), key.route.clone(), self.shared.world.clock().wall());
        self.shared.world.records().with(move |store| store.key(&word, &route, now)).await
    }

    async fn reserve(&self, request: &LaunchRequest, spec: VmSpec) -> Result<VmRecord, LaunchError> {
        let world = &self.shared.world;
        let random = |source| LaunchError::Host { what: "read randomness", source };
        let now = world.clock().wall();
        let (first, count) = (self.shared.config.uids.first(), super::config::UIDS_PER_HOST);
        let uid = world.records().with(move |store| store.free_uid(first, count, now)).await;
        let uid = uid.map_err(LaunchError::Ledger)?.ok_or(LaunchError::NoUid)?;
        Ok(VmRecord {
            schema_version: SCHEMA_VERSION,
            id: VmId::from_random(random_array(world).map_err(random)?),
            name: request.name.clone(),
            state: VmState::Reserved,
            revision: 1,
            spec,
            generation: Generation(random_array(world).map_err(random)?).to_string(),
            uid,
            nonce: random_nonce(world).map_err(random)?,
            process: None,
            operation: None,
            created_at: now,
            timings: Timings::default(),
            remains: None,
        })
    }

    async fn begin_launch(
        &self,
        mut record: VmRecord,
        next: super::vm_state::Step,
        key: Option<Key>,
        asked_at: crate::clock::Monotonic,
    ) -> Result<Arc<VmRecord>, LaunchError> {
        let clock = self.shared.world.clock();
        let random = random_array(&self.shared.world);
        let random = random.map_err(|source| LaunchError::Host { what: "read randomness", source })?;
        let id = OperationId::from_random(random);
        let operation = operation_for(&record, id, Goal::Launch, false, &next, clock);
        record.state = next.state;
        record.operation = Some(operation.id.clone());
        let mut writes = vec![
            Write::Vm(Box::new(record.clone())),
            Write::Lease { uid: record.uid, vm: record.id.clone() },
            Write::Operation(Box::new(operation.clone())),
            self.shared.vm_event(&record),
            self.shared.operation_event(&operation),
        ];
        if let Some(Key { key, route, body_hash }) = key {
            let expires = UnixNanos(clock.wall().0.saturating_add(KEY_LIFETIME_NS));
            let object = record.id.to_string();
            writes.push(Write::Key(KeyRow { key, route, body_hash, object, expires, answer: None }));
        }
        match self.shared.commit(writes).await {
            Ok(()) => {}
            Err(LedgerError::Taken { what: Taken::Name }) => {
                return Err(LaunchError::NameTaken { name: record.name.unwrap_or_default() });
            }
            Err(error) => return Err(LaunchError::Ledger(error)),
        }
        tracing::info!(vm = %record.id, name = record.name, image = record.spec.image, "launching");
        let handle = start(&self.shared, record, Begin::Launch(operation, asked_at));
        let record = handle.record.borrow().clone();
        Ok(record)
    }
}
