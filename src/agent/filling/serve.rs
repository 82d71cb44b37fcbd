//! Serves the memory of one VM while some of it is missing: tells its VMM what is there, and hears what its guest waits for.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use super::{Filling, VmFilling};
use crate::agent::record::VmRecord;
use crate::agent::shared::Shared;
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{ByteStream, VmmHost, World};
use crate::bundle::{Manifest, Run};
use crate::clock::Clock;
use crate::report::chain;
use crate::wire::filling::{FRAME_BYTES, ToAgent, ToVmm};

/// How long a VMM may take nothing of what it is told.
const TAKE_LIMIT: Duration = Duration::from_secs(30);

/// Time until a VMM that hung up is connected to again.
const CONNECT_AGAIN: Duration = Duration::from_secs(1);

/// Where a VMM takes the connections that its memory is served by.
#[derive(Debug, Clone)]
pub struct FillingPort(pub(in crate::agent) Arc<OwnedFd>);

/// The same descriptor is the same port.
impl PartialEq for FillingPort {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for FillingPort {}

/// What memory is served from.
#[derive(Debug, Clone)]
pub(in crate::agent) enum Chunks {
    /// From a bundle that is coming.
    Coming(Arc<Filling>),
    /// From one that has come as a whole.
    Here(Arc<Manifest>),
}

impl Chunks {
    fn manifest(&self) -> &Manifest {
        match self {
            Self::Coming(filling) => filling.partial.manifest(),
            Self::Here(manifest) => manifest,
        }
    }

    /// Chunks of all of memory, the last of which may be shorter.
    fn count(&self) -> u32 {
        let manifest = self.manifest();
        let chunks = manifest.machine.memory_bytes.div_ceil(u64::from(manifest.memory.chunk_bytes).max(1));
        u32::try_from(chunks).unwrap_or(u32::MAX)
    }

    fn present(&self) -> (Vec<Run>, usize) {
        match self {
            Self::Coming(filling) => filling.present(),
            Self::Here(_) => (vec![Run { first: 0, count: self.count().into() }], 0),
        }
    }
}

/// Why serving a VM's memory by a connection ended before all of it was mapped.
#[derive(Debug)]
enum End {
    /// The connection is of no further use: its VMM has ended, or hung up.
    Gone,
    /// It cannot be served.
    Lost(FailureCause),
    /// Another task serves it.
    Superseded,
}

/// A VM that is served, and the number of the task that does.
struct Served<'a> {
    vm: &'a VmRecord,
    serial: u64,
}

impl<W: World> Shared<W> {
    /// Serves a VM's memory, in the background, until all of it is mapped.
    pub(in crate::agent) fn serve(self: &Arc<Self>, vm: &VmRecord, chunks: Chunks, near: <W::Vmm as VmmHost>::Stream) {
        let Some(bundle) = vm.spec.bundle.clone() else { return };
        let serial = self.fillings.serial.fetch_add(1, Ordering::Relaxed);
        let begun = VmFilling { bundle, chunks: chunks.count(), mapped: 0, wanted: BTreeMap::new() };
        self.fillings.vms().insert(vm.id.clone(), (serial, begun));
        let (shared, vm) = (Arc::clone(self), vm.clone());
        tokio::spawn(async move {
            let served = Served { vm: &vm, serial };
            let mut near = Some(near);
            while let Some(connection) = near.take() {
                match shared.serve_chunks(&served, &chunks, connection).await {
                    Ok(()) | Err(End::Superseded) => {}
                    Err(End::Lost(cause)) => shared.lose(&vm.id, cause).await,
                    Err(End::Gone) => near = shared.connect_again(&served).await,
                }
            }
            shared.fillings.vms().retain(|id, (other, _)| *id != vm.id || *other != serial);
        });
    }

    /// Another connection to a VMM that hung up; `None`: it has ended, or takes none and is ended for it.
    async fn connect_again(&self, served: &Served<'_>) -> Option<<W::Vmm as VmmHost>::Stream> {
        let vm = served.vm;
        let begun = self.world.clock().monotonic();
        loop {
            sleep(CONNECT_AGAIN).await;
            if self.with_filling(served, |_| ()).is_none() || !self.vms().contains_key(&vm.id) {
                return None;
            }
            if let Ok(Some(near)) = self.world.vmm().connect_to_fill(vm).await {
                return Some(near);
            }
            match self.world.vmm().find(vm).await {
                Ok(None) => return None,
                Ok(Some(_)) | Err(_) if self.world.clock().monotonic().since(begun) < self.fill_patience() => {}
                Ok(Some(_)) | Err(_) => {
                    let detail = "its VMM takes no memory any more".to_owned();
                    self.lose(&vm.id, FailureCause::VmmError { detail }).await;
                    return None;
                }
            }
        }
    }

    /// What is known of a VM that this task serves; `None`: another one does.
    fn with_filling<T>(&self, served: &Served<'_>, look: impl FnOnce(&mut VmFilling) -> T) -> Option<T> {
        let mut vms = self.fillings.vms();
        vms.get_mut(&served.vm.id).filter(|(serial, _)| *serial == served.serial).map(|(_, filling)| look(filling))
    }

    async fn serve_chunks(&self, served: &Served<'_>, chunks: &Chunks, mut near: impl ByteStream) -> Result<(), End> {
        // One that is here as a whole does not change.
        let still = tokio::sync::watch::Sender::new(0);
        // Before it is looked at: what comes from here on is a change.
        let mut changed = match chunks {
            Chunks::Coming(filling) => filling.changed.subscribe(),
            Chunks::Here(_) => still.subscribe(),
        };
        let (runs, mut told) = chunks.present();
        tell(&mut near, &runs).await?;
        let (mut buffer, mut filled) = ([0_u8; FRAME_BYTES], 0);
        loop {
            let patience = self.patience_left(served)?;
            tokio::select! {
                biased;
                // First: what has come is not waited for any more.
                _ = changed.changed() => {
                    let Chunks::Coming(filling) = chunks else { continue };
                    let came = filling.came_after(told);
                    told += came.len();
                    self.with_filling(served, |now| now.wanted.retain(|chunk, _| !filling.partial.is_present(*chunk)));
                    let runs: Vec<Run> = came.into_iter().map(|chunk| Run { first: chunk.into(), count: 1 }).collect();
                    tell(&mut near, &runs).await?;
                }
                read = near.read(&mut buffer[filled..]) => {
                    filled += match read {
                        Ok(0) | Err(_) => return Err(End::Gone),
                        Ok(count) => count,
                    };
                    if filled < FRAME_BYTES {
                        continue;
                    }
                    filled = 0;
                    if let Some(present) = self.hear(served, chunks, &buffer)? {
                        tell(&mut near, &[present]).await?;
                    }
                    if self.with_filling(served, |now| now.mapped >= now.chunks).ok_or(End::Superseded)? {
                        return Ok(());
                    }
                }
                () = sleep(patience.unwrap_or_default()), if patience.is_some() => {
                    if self.patience_left(served)?.is_some_and(|left| left.is_zero()) {
                        return Err(End::Lost(self.why_lost(chunks)));
                    }
                }
            }
        }
    }

    /// How much longer what its guest has waited for longest may take.
    fn patience_left(&self, served: &Served<'_>) -> Result<Option<Duration>, End> {
        let oldest = self.with_filling(served, |now| now.wanted.values().min().copied()).ok_or(End::Superseded)?;
        let now = self.world.clock().monotonic();
        Ok(oldest.map(|oldest| self.fill_patience().saturating_sub(now.since(oldest))))
    }

    fn why_lost(&self, chunks: &Chunks) -> FailureCause {
        let waited = self.fill_patience().as_secs();
        let detail = match chunks {
            Chunks::Here(_) => format!("its memory was not mapped within {waited} s"),
            Chunks::Coming(filling) => {
                let why = filling.trouble().unwrap_or_else(|| "it does not answer".to_owned());
                let (bundle, from) = (filling.partial.id(), filling.from());
                format!("memory of {bundle} did not come from {from} within {waited} s: {why}")
            }
        };
        FailureCause::BundleUnavailable { detail }
    }

    /// Takes in what a VMM says; what to tell it at once.
    fn hear(&self, served: &Served<'_>, chunks: &Chunks, frame: &[u8; FRAME_BYTES]) -> Result<Option<Run>, End> {
        let nonsense = |why: String| {
            let detail = format!("its VMM says what it cannot mean: {why}");
            End::Lost(FailureCause::VmmError { detail })
        };
        let count = chunks.count();
        match ToAgent::from_bytes(*frame).map_err(|error| nonsense(chain(&error)))? {
            ToAgent::Wanted { chunk } if chunk < count => {
                let filling = match chunks {
                    Chunks::Coming(filling) if !filling.partial.is_present(chunk) => filling,
                    Chunks::Coming(_) | Chunks::Here(_) => return Ok(Some(Run { first: chunk.into(), count: 1 })),
                };
                let now = self.world.clock().monotonic();
                self.with_filling(served, |vm| *vm.wanted.entry(chunk).or_insert(now));
                filling.want(chunk);
                Ok(None)
            }
            ToAgent::Mapped { chunks } if chunks <= count => {
                self.with_filling(served, |now| now.mapped = chunks);
                Ok(None)
            }
            other @ (ToAgent::Wanted { .. } | ToAgent::Mapped { .. }) => {
                Err(nonsense(format!("{other:?} of {count} chunks")))
            }
        }
    }
}

/// Tells a VMM what is there.
async fn tell(near: &mut impl ByteStream, runs: &[Run]) -> Result<(), End> {
    let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let frames = runs.iter().map(|run| ToVmm::Present { first: number(run.first), count: number(run.count) });
    let bytes: Vec<u8> = frames.flat_map(ToVmm::to_bytes).collect();
    match timeout(TAKE_LIMIT, near.write_all(&bytes)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(End::Gone),
        Err(_) => {
            let detail = format!("its VMM takes nothing for {} s", TAKE_LIMIT.as_secs());
            Err(End::Lost(FailureCause::VmmError { detail }))
        }
    }
}
