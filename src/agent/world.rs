//! What the agent is made against: the clock, VMM processes, files, networks, records and randomness behind narrow
//! traits. The real ones are in `host_world`, the simulated ones in `crate::sim`.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::bundles::{BundleError, BundleListed, BundleView, CommitOrder};
use super::fetched::FetchedBundles;
pub use super::filling::FillingPort;
use super::health::Pressure;
use super::images::{Image, ImageError};
use super::isolation::{HostIsolation, VmJail};
use super::ledger::{LedgerError, Store};
use super::record::{DiskSpec, ProcessRecord, Remains, VmRecord};
use super::transfer::{Imported, Piece};
use super::volumes::VolumeHost;
use crate::bundle::admit::GuestNeeds;
use crate::bundle::working_set::{WorkingSet, WorkingSetError};
use crate::bundle::{
    BundlePart, BundleSignature, Manifest, OpenBundleError, PartialError, ReadDirectoryError, Verified,
};
use crate::clock::{Clock, UnixNanos, Uptime};
use crate::container::Source;
use crate::ids::{BundleId, VmId};
use crate::wire::control::{Answer, Nonce, SendPhases};
use crate::wire::frame::FrameError;
use crate::wire::last_words::LastWords;
use crate::wire::refusal::Refusal;

mod ask;

pub use ask::{
    Ask, FillingPlan, LaunchPlan, ReceiveOrder, RestorePlan, SendOrder, SentMachine, StreamIdentity, StreamTerms,
    UnsealPlan,
};

/// Everything outside the agent.
pub trait World: Send + Sync + 'static {
    /// Time. Waiting is tokio's, which a simulation turns as well.
    type Clock: Clock;
    /// VMM processes and the sockets to them.
    type Vmm: VmmHost;
    /// The VMs' directories, images and facts of the host.
    type Disk: VmDisk;
    /// The VMs' jails, and what leads to them.
    type Networks: VmNetworks;
    /// The bundles, and what is to become one.
    type Bundles: VmBundles + FetchedBundles;
    /// The volume daemon.
    type Volumes: VolumeHost;
    /// Durable records.
    type Records: Records;

    /// Time.
    fn clock(&self) -> &Self::Clock;
    /// VMM processes.
    fn vmm(&self) -> &Self::Vmm;
    /// Files.
    fn disk(&self) -> &Self::Disk;
    /// Networks.
    fn networks(&self) -> &Self::Networks;
    /// Bundles.
    fn bundles(&self) -> &Self::Bundles;
    /// The volume daemon.
    fn volumes(&self) -> &Self::Volumes;
    /// Durable records.
    fn records(&self) -> &Self::Records;
    /// Fills `bytes` with randomness fit for keys.
    fn random(&self, bytes: &mut [u8]) -> io::Result<()>;
    /// How long the host has been up.
    fn uptime(&self) -> Uptime;
}

/// A stream to a guest's port or console.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> ByteStream for S {}

/// VMM processes and the sockets to them.
pub trait VmmHost: Send + Sync + 'static {
    /// A held process.
    type Process: VmmProcess;
    /// A stream through a VMM.
    type Stream: ByteStream;
    /// A place where another host can send a machine to.
    type Listener: Send + 'static;

    /// Starts a VMM for this record, in the VM's directory.
    fn start(&self, vm: &VmRecord) -> impl Future<Output = Result<Self::Process, StartVmmError>> + Send;

    /// The VMM of this record, if it lives: by its recorded process or, when the agent ended between the start and
    /// the record, by the VM's id among its arguments. While a VM is handed over only by the recorded process: there
    /// may be another one.
    fn find(&self, vm: &VmRecord) -> impl Future<Output = io::Result<Option<Self::Process>>> + Send;

    /// The VMM of a VM that no record knows, if it lives.
    fn find_stray(&self, vm: &VmId) -> impl Future<Output = io::Result<Option<Self::Process>>> + Send;

    /// Connects as this epoch's owner, asks, and returns the answer. Refusals are errors.
    fn ask(&self, vm: &VmRecord, epoch: u64, ask: Ask) -> impl Future<Output = Result<Answer, AskError>> + Send;

    /// A port that the record's VMM is to take connections at by which its memory is filled, and one that waits there.
    fn bind_to_fill(&self, vm: &VmRecord) -> impl Future<Output = io::Result<(FillingPort, Self::Stream)>> + Send;

    /// Another one, to a VMM that has the port; `None`: it has none, or has all of its memory.
    fn connect_to_fill(&self, vm: &VmRecord) -> impl Future<Output = io::Result<Option<Self::Stream>>> + Send;

    /// A stream to a port of the guest.
    fn guest(&self, vm: &VmId, port: u32) -> impl Future<Output = Result<Self::Stream, OpenStreamError>> + Send;

    /// What its guest has reached of its memory until now.
    fn touched(&self, vm: &VmRecord, epoch: u64) -> impl Future<Output = Result<WorkingSet, AskError>> + Send;

    /// A stream to the guest's console, which begins with the history.
    fn console(&self, vm: &VmId) -> impl Future<Output = Result<Self::Stream, OpenStreamError>> + Send;

    /// Holds the VM's taps beside its VMM, or without one: packets wait in them, and a VMM that is started later gets
    /// them with what waits. Up to the bound of the tap's queue; what comes beyond it the kernel drops and counts.
    fn hold_taps(&self, vm: &VmRecord) -> impl Future<Output = io::Result<()>> + Send;

    /// Resolves when a packet waits in a tap that is held. Never, when none is. May be dropped and called again.
    fn packet_waits(&self, vm: &VmId) -> impl Future<Output = ()> + Send;

    /// Holds the VM's taps no longer.
    fn release_taps(&self, vm: &VmId);

    /// A certificate for one end of one migration's stream, and its key.
    fn certificate(&self) -> io::Result<StreamIdentity>;

    /// A place where another host can send a machine to, and its TCP port.
    fn listen(&self) -> impl Future<Output = io::Result<(Self::Listener, u16)>> + Send;

    /// Has the machine that comes to this place in the record's VMM, paused.
    fn receive_machine(
        &self,
        vm: &VmRecord,
        epoch: u64,
        listener: Self::Listener,
        order: ReceiveOrder,
    ) -> impl Future<Output = Result<Answer, AskError>> + Send;

    /// Has the machine of the record's process stand ready at the other end, and paused here.
    fn send_machine(
        &self,
        vm: &VmRecord,
        epoch: u64,
        order: SendOrder,
    ) -> impl Future<Output = Result<SentMachine, AskError>> + Send;

    /// Has the packets that wait for a machine that was sent follow it; their number.
    fn forward_packets(&self, vm: &VmRecord, epoch: u64) -> impl Future<Output = Result<u64, AskError>> + Send;

    /// Starts another VMM for this record beside the one it has, in the VM's directory, reachable by other names.
    fn start_successor(&self, vm: &VmRecord) -> impl Future<Output = Result<Self::Process, StartVmmError>> + Send;

    /// Has the machine of the record's process in that other one. Then both stand still, and the one that is recorded
    /// may be told to run; an error says nothing of the other one, and the record's process is as it was or stands
    /// still.
    fn move_machine(&self, vm: &VmRecord, epoch: u64) -> impl Future<Output = Result<SendPhases, AskError>> + Send;

    /// Has the record's process, which took the machine over, reached by the names of the one before, and the packets
    /// that one has taken from the taps. Again after it was done, it does nothing.
    fn take_over(&self, vm: &VmRecord, epoch: u64) -> impl Future<Output = io::Result<()>> + Send;

    /// Has no VMM process of this VM but the record's, and no names for another.
    fn end_others(&self, vm: &VmRecord) -> impl Future<Output = io::Result<()>> + Send;
}

/// A held process: its pid cannot come to mean another one.
pub trait VmmProcess: Clone + Send + Sync + 'static {
    /// What names it in records.
    fn record(&self) -> ProcessRecord;
    /// Ends it at once. Not an error if it has ended.
    fn kill(&self) -> io::Result<()>;
    /// Waits for its end. May be dropped and called again.
    fn ended(&self) -> impl Future<Output = ProcessEnd> + Send;
    /// Memory and processor time it uses, if the host says.
    fn usage(&self) -> ProcessUsage;
    /// Moves its memory to the host's swap. Fails when the host has too little of that.
    fn page_out(&self) -> impl Future<Output = io::Result<()>> + Send;
    /// Begins to bring its memory back, ahead of its use.
    fn page_in(&self);
    /// What of its jail is in force, looked at from outside; `None` when it has ended.
    fn jail(&self) -> Option<VmJail>;
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessEnd {
    /// It exited with this code.
    Exited(i32),
    /// This signal ended it.
    Signalled(i32),
    /// It ended; how is known to its parent only, an agent before this one.
    Unknown,
}

impl std::fmt::Display for ProcessEnd {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(out, "exit code {code}"),
            Self::Signalled(signal) => write!(out, "signal {signal}"),
            Self::Unknown => out.write_str("unknown: it was started by an earlier agent"),
        }
    }
}

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessUsage {
    /// Resident memory, guest memory included.
    pub resident_bytes: Option<u64>,
    /// Memory of its own in the host's swap.
    pub swapped_bytes: Option<u64>,
    /// Processor time so far, user and system.
    pub cpu: Option<Duration>,
    /// Page faults so far; and those of them that waited for a disk.
    pub faults: Option<(u64, u64)>,
}

/// Why a VMM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartVmmError {
    /// One of its files or sockets could not be made or opened.
    #[error("open {what}")]
    File {
        /// Which.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The process could not be started.
    #[error("start the VMM process: {step}")]
    Spawn {
        /// What was tried.
        step: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Why a VMM did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// A file for it could not be opened.
    #[error("open {what}")]
    Open {
        /// Which.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The image is not usable.
    #[error("read the image")]
    Image(#[source] ImageError),
    /// What was sealed of the VM cannot be opened.
    #[error("open what was sealed of the VM")]
    Sealed(#[source] io::Error),
    /// The bundle is not usable.
    #[error("open the bundle")]
    Bundle(#[source] OpenBundleError),
    /// What is here of the bundle is not.
    #[error("open what is here of the bundle")]
    Partial(#[source] PartialError),
    /// The VMM was started by an earlier agent and does not know this.
    #[error(
        "the VM's VMM is of an earlier version (protocol {speaks}, this needs {needs}): stop and launch it anew for that"
    )]
    OlderVmm {
        /// The version it speaks.
        speaks: u16,
        /// The first version that has this.
        needs: u16,
    },
    /// There is no place to save to.
    #[error("stage a bundle")]
    Stage(#[source] crate::bundle::StageError),
    /// There is nothing that memory was copied to.
    #[error("nothing was copied of the VM's memory before")]
    NothingCopied,
    /// The socket failed: usually the VMM is gone.
    #[error("talk to the VMM")]
    Socket(#[source] io::Error),
    /// It said something else than an answer.
    #[error("understand the VMM")]
    Frame(#[source] FrameError),
    /// It said no.
    #[error("the VMM refused")]
    Refused(#[source] Refusal),
    /// It answered something that is not an answer to this.
    #[error("the VMM answered something else than was asked")]
    Unexpected,
    /// It did not answer in time.
    #[error("the VMM did not answer within {} s", limit.as_secs())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
    },
}

/// Why there is no stream into a VM.
#[derive(Debug, thiserror::Error)]
pub enum OpenStreamError {
    /// The socket failed: usually the VMM is gone.
    #[error("connect to the VMM")]
    Socket(#[source] io::Error),
    /// The VMM or the guest said no: nothing listens there (yet).
    #[error("the guest does not take the connection: {reason}")]
    Refused {
        /// The VMM's word for it.
        reason: String,
    },
    /// The VMM's answer is not one.
    #[error("the VMM's answer is malformed")]
    Malformed,
    /// No answer in time.
    #[error("no answer within {} s", limit.as_secs())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
    },
}

/// The VMs' directories, images and facts of the host.
pub trait VmDisk: Send + Sync + 'static {
    /// Has a directory for this VM.
    fn make(&self, vm: &VmId) -> impl Future<Output = io::Result<()>> + Send;
    /// Has no directory for this VM.
    fn remove(&self, vm: &VmId) -> impl Future<Output = io::Result<()>> + Send;
    /// The VMs that have a directory.
    fn list(&self) -> impl Future<Output = io::Result<Vec<VmId>>> + Send;
    /// What a VMM left in its directory, bounded; what is not there is empty.
    fn remains(&self, vm: &VmId) -> impl Future<Output = (Remains, Option<LastWords>)> + Send;
    /// The guest's console history, at most the last `bytes_max`.
    fn console_history(&self, vm: &VmId, bytes_max: usize) -> impl Future<Output = io::Result<Vec<u8>>> + Send;
    /// Has what was sealed of this VM durable and under its name.
    fn keep_sealed(&self, vm: &VmId) -> impl Future<Output = io::Result<()>> + Send;
    /// Has nothing sealed of this VM.
    fn discard_sealed(&self, vm: &VmId) -> impl Future<Output = io::Result<()>> + Send;
    /// The usable images, by name.
    fn images(&self) -> impl Future<Output = Result<Vec<Image>, ImageError>> + Send;
    /// One image.
    fn image(&self, name: &str) -> impl Future<Output = Result<Image, ImageError>> + Send;
    /// Makes an image of files of this host.
    fn import_image(&self, import: ImageImport) -> impl Future<Output = Result<Image, ImageError>> + Send;
    /// Removes an image.
    fn remove_image(&self, name: &str) -> impl Future<Output = Result<(), ImageError>> + Send;
    /// Whether a disk can be attached; the error says why not.
    fn check_disk(&self, disk: &DiskSpec) -> impl Future<Output = io::Result<()>> + Send;
    /// What names a disk's file on every host that sees it.
    fn identify_disk(&self, disk: &DiskSpec) -> impl Future<Output = io::Result<DiskIdentity>> + Send;
    /// Has what was written to a disk where every host that sees it reads it.
    fn sync_disk(&self, disk: &DiskSpec) -> impl Future<Output = io::Result<()>> + Send;
    /// Words that guests on this host need on their kernel's command line; waits for the probe, up to a bound.
    fn command_line_additions(&self) -> impl Future<Output = String> + Send;
    /// What the host has and has free.
    fn host(&self) -> impl Future<Output = io::Result<HostFacts>> + Send;
    /// How pressed the host is.
    fn pressure(&self) -> impl Future<Output = Pressure> + Send;
}

/// An image to make of files of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageImport {
    /// Its name.
    pub name: String,
    /// What it is made of.
    pub content: ImageContent,
    /// Words for the kernel's command line; `None`: as the image it is like has them, or none.
    pub command_line: Option<String>,
}

/// What an image is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageContent {
    /// Files as they are.
    Files {
        /// Absolute path of the kernel.
        kernel_path: String,
        /// Absolute path of the initrd.
        initrd_path: Option<String>,
    },
    /// A container's file system, with kernel and guest agent of another image.
    Container {
        /// Where it is from.
        source: Source,
        /// Which image; `None`: the demo image, or the first there is.
        like: Option<String>,
        /// Most bytes of all its layers, once unpacked.
        unpacked_bytes_max: u64,
    },
}

/// What the host has and has free.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostFacts {
    /// Its name.
    pub name: String,
    /// Processors online.
    pub cpus: u32,
    /// All its memory.
    pub memory_bytes: u64,
    /// Memory available without swapping.
    pub memory_available_bytes: u64,
    /// Space on the file system of the state directory.
    pub disk_total_bytes: u64,
    /// What of it is free.
    pub disk_free_bytes: u64,
    /// Descriptors the agent has open.
    pub descriptors_open: u64,
    /// Descriptors it may have open.
    pub descriptors_max: u64,
    /// What the probe found; `None` until it answered.
    pub probe: Option<serde_json::Value>,
    /// What its kernel offers to keep VMs apart; `None` where no kernel was asked.
    pub isolation: Option<HostIsolation>,
}

/// What is the same of a file on every host that sees it. Device numbers are not: each host gives its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// Its inode number; of a block device 0.
    pub inode: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// The bundles of the host, and what is to become one: what is saved of a VM is named by the VM's id until then.
pub trait VmBundles: Send + Sync + 'static {
    /// All of them.
    fn list(&self) -> impl Future<Output = Result<Vec<BundleListed>, BundleError>> + Send;
    /// The one a word means: its id, the start of it, or its name.
    fn find(&self, word: &str) -> impl Future<Output = Result<BundleView, BundleError>> + Send;
    /// Whether it is whole and runs here. Takes long the first time an agent sees the bundle: all of it is read.
    fn check(&self, bundle: &BundleId) -> impl Future<Output = Result<Arc<Manifest>, BundleError>> + Send;
    /// What a guest that was booted on this host needs of another one.
    fn needs(&self) -> impl Future<Output = Result<GuestNeeds, BundleError>> + Send;
    /// Whether a guest that runs elsewhere, and speaks this protocol, can go on here.
    fn admit_guest(
        &self,
        needs: &GuestNeeds,
        agent_protocol: Option<u16>,
    ) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// What earlier guests from it reached first, up to so many bytes; begins to read that into memory. `None`: that is
    /// not known yet.
    fn working_set(
        &self,
        bundle: &BundleId,
        bytes_max: u64,
    ) -> impl Future<Output = Result<Option<WorkingSet>, WorkingSetError>> + Send;
    /// Has this known, from now on.
    fn keep_working_set(
        &self,
        bundle: &BundleId,
        set: WorkingSet,
    ) -> impl Future<Output = Result<(), WorkingSetError>> + Send;
    /// Has nothing known of it.
    fn forget_working_set(&self, bundle: &BundleId) -> impl Future<Output = Result<(), WorkingSetError>> + Send;
    /// Has a bundle of what was saved; the same one when it is asked for again.
    fn commit(&self, order: CommitOrder) -> impl Future<Output = Result<BundleView, BundleError>> + Send;
    /// Has nothing that was saved of this VM and did not become a bundle.
    fn discard(&self, vm: &VmId) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Removes what earlier agents began and nobody finishes; what is saved of `kept` stays.
    fn sweep(&self, kept: Vec<VmId>) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Reads all of it and compares it with its digests.
    fn verify(&self, bundle: &BundleId) -> impl Future<Output = Result<Verified, BundleError>> + Send;
    /// Has no such bundle. One that others build on stays.
    fn remove(&self, bundle: &BundleId) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Has a bundle with the same content that builds on no other.
    fn compact(
        &self,
        bundle: &BundleId,
        name: Option<String>,
        token: String,
        built_at: UnixNanos,
    ) -> impl Future<Output = Result<BundleView, BundleError>> + Send;
    /// Keeps a signature of it.
    fn sign(
        &self,
        bundle: &BundleId,
        signature: BundleSignature,
    ) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Begins to write it, with what it builds on, and goes on behind the answer. The last piece is an error if it breaks
    /// off.
    fn export(
        &self,
        bundle: &BundleId,
        to: mpsc::Sender<Piece>,
    ) -> impl Future<Output = Result<(), BundleError>> + Send;
    /// Reads a part of a bundle that is here, all of it or in part. What is read was verified.
    fn read_part(
        &self,
        bundle: &BundleId,
        part: BundlePart,
    ) -> impl Future<Output = Result<Vec<u8>, BundleError>> + Send;
    /// Reads a part of a bundle from a directory that is laid out as a store. Nothing of it was verified.
    fn read_directory(
        &self,
        directory: &Path,
        bundle: &BundleId,
        part: BundlePart,
    ) -> impl Future<Output = Result<Vec<u8>, ReadDirectoryError>> + Send;
    /// Has the bundles that these bytes are, or nothing of them, staged under this token until then.
    fn import(
        &self,
        from: mpsc::Receiver<Piece>,
        token: String,
    ) -> impl Future<Output = Result<Vec<Imported>, BundleError>> + Send;
}

/// The VMs' jails: network namespaces with a tap for each interface, rules, and what leads to them on the host.
pub trait VmNetworks: Send + Sync + 'static {
    /// Has a closed jail for this VM: nothing passes.
    fn make(&self, vm: &VmRecord) -> impl Future<Output = Result<(), NetworkError>> + Send;
    /// Has an open jail for this VM: its own traffic passes. Makes what is missing.
    fn open(&self, vm: &VmRecord) -> impl Future<Output = Result<(), NetworkError>> + Send;
    /// Has no jail of this VM, and nothing on the host that led to it.
    fn remove(&self, vm: &VmRecord) -> impl Future<Output = Result<(), NetworkError>> + Send;
    /// Has what is sent to this VM's addresses led to another host, where it is now; its jail is closed.
    fn lead_elsewhere(&self, vm: &VmRecord, host: u16) -> impl Future<Output = Result<(), NetworkError>> + Send;
    /// Has no jail of this VM; what leads to another host stays.
    fn leave(&self, vm: &VmRecord) -> impl Future<Output = Result<(), NetworkError>> + Send;
    /// Has the host's own part: routes to peers and such. Before the first VM.
    fn start(&self) -> impl Future<Output = Result<(), NetworkError>> + Send;
    /// What others have that speaks against this host's addresses: routes there.
    fn conflicts(&self) -> impl Future<Output = Result<Vec<String>, NetworkError>> + Send;
    /// Takes away what no VM needs: the agent ends.
    fn end(&self) -> impl Future<Output = Result<(), NetworkError>> + Send;
    /// Removes the jails that an earlier agent left, and those of launches that never were; `known` are the VMs'. Gives
    /// the numbers of the removed.
    fn sweep(&self, known: BTreeSet<u16>) -> impl Future<Output = Result<Vec<u16>, NetworkError>> + Send;
    /// What a VM's jail dropped so far.
    fn drops(&self, vm: &VmRecord) -> impl Future<Output = Result<Drops, NetworkError>> + Send;
    /// A number for a new VM's jail, of one made ahead if there is any; none of `used`. `None`: there are no more.
    fn take(&self, used: &BTreeSet<u16>) -> Option<u16>;
    /// The launch that took this number did not come to be.
    fn give_back(&self, number: u16);
    /// Sockets in the VM's jail that its guest reaches at the metadata addresses.
    fn metadata_sockets(&self, vm: &VmRecord) -> io::Result<Vec<std::net::TcpListener>>;
    /// What others changed and was put right, once; `None` when it was asked for before, or nothing is watched.
    fn changes(&self) -> Option<mpsc::Receiver<NetworkChange>>;
}

/// Something in the network was not as it should be, by no doing of the agent's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkChange {
    /// Whose jail; `None`: the host's own part.
    pub jail: Option<u16>,
    /// What was done about it.
    pub steps: Vec<String>,
    /// What could not be done.
    pub failures: Vec<String>,
}

/// Packets a jail dropped, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drops {
    /// From the VM with another's address, or made to look like it.
    pub spoof: u64,
    /// To or from another session.
    pub foreign_session: u64,
    /// To or from somewhere else that is not allowed.
    pub not_allowed: u64,
    /// To the VM, while its tap was full: it was out, paused, or did not take them fast enough.
    pub queue_full: u64,
}

/// Why a network is not as it should be. All that failed, each with what it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", failures.join("; "))]
pub struct NetworkError {
    /// What failed, each a chain.
    pub failures: Vec<String>,
}

/// Durable records: one store, written by one writer.
pub trait Records: Send + Sync + 'static {
    /// Runs `job` on the store. What it wrote is durable when this returns.
    fn with<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Store) -> Result<T, LedgerError> + Send + 'static,
    ) -> impl Future<Output = Result<T, LedgerError>> + Send;

    /// Jobs that wait for the store.
    fn queued(&self) -> usize;
}

/// Reads a nonce's worth of randomness and such.
pub fn random_array<const N: usize>(world: &impl World) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    world.random(&mut bytes)?;
    Ok(bytes)
}

/// A fresh nonce.
pub fn random_nonce(world: &impl World) -> io::Result<Nonce> {
    random_array(world).map(Nonce)
}
