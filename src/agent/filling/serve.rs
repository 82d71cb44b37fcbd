//! Serves the memory of one VM while some of it is missing: tells its VMM what is there, and hears what its guest waits for.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use super::{Filling, VmFilling};
use crate::agent::record::VmRecord;
use crate::agent::shared::Shared;
use crate::agent::world::{ByteStream, World};
use crate::bundle::{Manifest, Run};
use crate::clock::Clock;
use crate::ids::VmId;
use crate::report::chain;
use crate::wire::filling::{FRAME_BYTES, ToAgent, ToVmm};

/// How long a VMM may take nothing of what it is told.
const TAKE_LIMIT: Duration = Duration::from_secs(30);

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

/// Why serving a VM's memory ended before all of it was mapped.
#[derive(Debug)]
enum End {
    /// Its VMM has ended, or is another agent's now.
    Gone,
    /// Its memory does not come.
    Lost(String),
}

impl<W: World> Shared<W> {
    /// Serves a VM's memory, in the background, until all of it is mapped.
    pub(in crate::agent) fn serve(self: &Arc<Self>, vm: &VmRecord, chunks: Chunks, near: impl ByteStream) {
        let Some(bundle) = vm.spec.bundle.clone() else { return };
        let (shared, id) = (Arc::clone(self), vm.id.clone());
        let begun = VmFilling { bundle, chunks: chunks.count(), mapped: 0, wanted: BTreeMap::new() };
        self.fillings.vms().insert(id.clone(), begun);
        tokio::spawn(async move {
            let end = shared.serve_chunks(&id, &chunks, near).await;
            if let Err(End::Lost(why)) = &end {
                shared.lose(&id, why.clone()).await;
            }
            shared.fillings.vms().remove(&id);
        });
    }

    async fn serve_chunks(&self, vm: &VmId, chunks: &Chunks, mut near: impl ByteStream) -> Result<(), End> {
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
            let patience = self.patience_left(vm);
            tokio::select! {
                read = near.read(&mut buffer[filled..]) => {
                    filled += match read {
                        Ok(0) | Err(_) => return Err(End::Gone),
                        Ok(count) => count,
                    };
                    if filled < FRAME_BYTES {
                        continue;
                    }
                    filled = 0;
                    if let Some(present) = self.hear(vm, chunks, &buffer)? {
                        tell(&mut near, &[present]).await?;
                    }
                    if self.fillings.vms().get(vm).is_none_or(|now| now.mapped >= now.chunks) {
                        return Ok(());
                    }
                }
                _ = changed.changed() => {
                    let Chunks::Coming(filling) = chunks else { continue };
                    let came = filling.came_after(told);
                    told += came.len();
                    if let Some(now) = self.fillings.vms().get_mut(vm) {
                        now.wanted.retain(|chunk, _| !came.contains(chunk));
                    }
                    let runs: Vec<Run> = came.into_iter().map(|chunk| Run { first: chunk.into(), count: 1 }).collect();
                    tell(&mut near, &runs).await?;
                }
                () = sleep(patience.unwrap_or_default()), if patience.is_some() => {
                    if self.patience_left(vm).is_some_and(|left| left.is_zero()) {
                        return Err(End::Lost(self.why_lost(chunks)));
                    }
                }
            }
        }
    }

    /// How much longer what its guest has waited for longest may take.
    fn patience_left(&self, vm: &VmId) -> Option<Duration> {
        let oldest = self.fillings.vms().get(vm).and_then(|now| now.wanted.values().min().copied())?;
        Some(self.fill_patience().saturating_sub(self.world.clock().monotonic().since(oldest)))
    }

    fn why_lost(&self, chunks: &Chunks) -> String {
        let waited = self.fill_patience().as_secs();
        let Chunks::Coming(filling) = chunks else { return format!("its memory was not mapped within {waited} s") };
        let (bundle, from) = (filling.partial.id(), filling.partial.from());
        let why = filling.trouble().unwrap_or_else(|| "it does not answer".to_owned());
        format!("memory of {bundle} did not come from {from} within {waited} s: {why}")
    }

    /// Takes in what a VMM says; what to tell it at once.
    fn hear(&self, vm: &VmId, chunks: &Chunks, frame: &[u8; FRAME_BYTES]) -> Result<Option<Run>, End> {
        let nonsense = |why: String| End::Lost(format!("its VMM says what it cannot mean: {why}"));
        let count = chunks.count();
        match ToAgent::from_bytes(*frame).map_err(|error| nonsense(chain(&error)))? {
            ToAgent::Wanted { chunk } if chunk < count => {
                let filling = match chunks {
                    Chunks::Coming(filling) if !filling.partial.is_present(chunk) => filling,
                    Chunks::Coming(_) | Chunks::Here(_) => return Ok(Some(Run { first: chunk.into(), count: 1 })),
                };
                let now = self.world.clock().monotonic();
                if let Some(vm) = self.fillings.vms().get_mut(vm) {
                    vm.wanted.entry(chunk).or_insert(now);
                }
                filling.want(chunk);
                Ok(None)
            }
            ToAgent::Mapped { chunks } if chunks <= count => {
                if let Some(now) = self.fillings.vms().get_mut(vm) {
                    now.mapped = chunks;
                }
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
        Err(_) => Err(End::Lost(format!("its VMM takes nothing for {} s", TAKE_LIMIT.as_secs()))),
    }
}
