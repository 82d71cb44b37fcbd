//! Writes the machine's memory to a file while its guest runs, in rounds as of a send, and what is left while it stands
//! still. By the thread that sends, for the same reason, and never while it does.
//!
//! ```text
//!  first thread                          this thread
//!  Checkpoint ─────────────────────────▶ rounds, until little is left (machine/pre_copy)
//!  answer the agent ◀─────────── Copied ─ waits; what the guest writes is logged
//!  Rest ───────────────────────────────▶ the last pages, and the list of all
//!  (state is collected meanwhile)
//!  answer the agent ◀──────────── Rested ─ waits: the guest is to go on first
//!  Cancel or Forget, at any point ─────▶ nothing is logged any more
//! ```

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::sync::mpsc::TryRecvError;

use super::{Job, News, PAUSE_FIXED, PROTECTED_AT_ONCE, Sender, bytes, nanos, pieces};
use crate::clock::Clock;
use crate::machine::image::{self, WriteImageError, Zeroes};
use crate::machine::pre_copy::{Decision, Policy, PreCopy, Round};
use crate::machine::{DirtyConsumer, DirtySet, GuestRam, Harvester};
use crate::sys::kvm::CallError;
use crate::units::Bytes;
use crate::wire::control::CopyPhases;

/// A machine whose memory is to be copied.
#[derive(Debug)]
pub(in crate::vmm) struct Checkpoint {
    /// Which pages.
    pub(in crate::vmm) pages: image::Pages,
    /// When to be content.
    pub(in crate::vmm) policy: Policy,
    /// This process's page map.
    pub(in crate::vmm) pagemap: File,
    /// The image: as long as guest memory, without data.
    pub(in crate::vmm) memory: File,
    /// Guest memory.
    pub(in crate::vmm) ram: GuestRam,
    /// Which of its pages are written.
    pub(in crate::vmm) dirty: Harvester,
}

/// Why memory was not copied.
#[derive(Debug, thiserror::Error)]
pub(in crate::vmm) enum CheckpointError {
    /// KVM did not tell what was written.
    #[error("follow what the guest writes")]
    Log(#[from] CallError),
    /// Guest memory could not be read, or the image not be written.
    #[error(transparent)]
    Image(#[from] WriteImageError),
    /// The list of pages could not be written.
    #[error("write the list of pages")]
    List(#[source] io::Error),
    /// By request, or because nobody waits for it any more.
    #[error("the copy was cancelled")]
    Cancelled,
}

/// Does all of it, and tells the first thread.
pub(super) fn serve(sender: &Sender, checkpoint: Checkpoint) {
    let mut copy = match Copy::begin(checkpoint) {
        Ok(copy) => copy,
        Err(error) => return sender.tell(News::Copied(Err(error))),
    };
    match copy.rounds(sender) {
        Ok(phases) => sender.tell(News::Copied(Ok(phases))),
        Err(error) => return sender.tell(News::Copied(Err(error))),
    }
    // Whatever else comes, what was copied is of no use any more.
    if let Ok(Job::Rest { list }) = sender.jobs.recv() {
        sender.tell(News::Rested(copy.rest(list)));
        // It is to be forgotten, or the machine ends.
        let _ = sender.jobs.recv();
    }
}

/// A copy under way. Dropping it ends the log.
struct Copy {
    checkpoint: Checkpoint,
    consumer: DirtyConsumer,
    /// All pages that were written, in any round.
    written: DirtySet,
}

impl Copy {
    fn begin(checkpoint: Checkpoint) -> Result<Self, CheckpointError> {
        let touched = || Ok(image::touched(&checkpoint.ram, checkpoint.pages, &checkpoint.pagemap)?);
        let consumer = checkpoint.dirty.subscribe_touched::<CheckpointError>(touched)?;
        Ok(Self { checkpoint, consumer, written: DirtySet::new() })
    }

    /// Rounds, until what is left can be written while the guest stands still.
    fn rounds(&mut self, sender: &Sender) -> Result<CopyPhases, CheckpointError> {
        let mut pre_copy = PreCopy::new(self.checkpoint.policy, PAUSE_FIXED);
        let (started, mut phases, mut zeroes) = (sender.clock.monotonic(), CopyPhases::default(), Zeroes::LeftOut);
        loop {
            let begun = sender.clock.monotonic();
            let (copied, written) = self.round(zeroes, || match sender.jobs.try_recv() {
                Err(TryRecvError::Empty) => Ok(()),
                Ok(_) | Err(TryRecvError::Disconnected) => Err(CheckpointError::Cancelled),
            })?;
            let dirty = bytes(self.consumer.harvest().map_err(CheckpointError::Log)?);
            let took = sender.clock.monotonic().since(begun);
            zeroes = Zeroes::Written;
            phases.rounds += 1;
            phases.memory_bytes += written.0;
            phases.left_bytes = dirty.0;
            match pre_copy.after(Round { sent: copied, took, dirty }) {
                Decision::Round | Decision::Throttle(_) => {}
                // A guest that writes without end is held for longer: a checkpoint is taken all the same.
                Decision::Critical | Decision::Abort(_) => break,
            }
        }
        phases.running_ns = nanos(sender.clock.monotonic().since(started));
        Ok(phases)
    }

    /// Writes every page in the set; gives how many bytes those were, and how many of them had to be written.
    fn round(
        &mut self,
        zeroes: Zeroes,
        mut go_on: impl FnMut() -> Result<(), CheckpointError>,
    ) -> Result<(Bytes, Bytes), CheckpointError> {
        let (mut copied, mut written) = (Bytes(0), Bytes(0));
        loop {
            let batch = self.consumer.take_batch(PROTECTED_AT_ONCE).map_err(CheckpointError::Log)?;
            if batch.is_empty() {
                return Ok((copied, written));
            }
            for run in batch {
                self.written.insert(run);
                for piece in pieces(run) {
                    written.0 += image::write_pages(&self.checkpoint.ram, piece, &self.checkpoint.memory, zeroes)?.0;
                    copied.0 += bytes(piece.count).0;
                    go_on()?;
                }
            }
        }
    }

    /// The guest stands still: the pages that are left, and the list of all if it is asked for. Gives how many bytes were
    /// written.
    fn rest(&mut self, list: Option<File>) -> Result<Bytes, CheckpointError> {
        self.consumer.harvest().map_err(CheckpointError::Log)?;
        let (_, written) = self.round(Zeroes::Written, || Ok(()))?;
        if let Some(list) = list {
            self.list_pages(list).map_err(CheckpointError::List)?;
        }
        Ok(written)
    }

    fn list_pages(&self, list: File) -> io::Result<()> {
        let mut list = BufWriter::new(list);
        for run in self.written.runs() {
            for (_, place) in image::places(&self.checkpoint.ram, run) {
                list.write_all(&place.first.0.to_le_bytes())?;
                list.write_all(&place.count.0.to_le_bytes())?;
            }
        }
        list.flush()
    }
}
