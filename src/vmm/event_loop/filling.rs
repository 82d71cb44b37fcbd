//! A machine whose memory is filled while it runs: what the first thread does of it. See [`crate::vmm::fill`] for the
//! thread that does the rest.

use super::{EventLoop, Guest, bad_request, host};
use crate::machine::filling::MakeFillingError;
use crate::machine::{FillingRam, GuestRam};
use crate::units::Bytes;
use crate::vmm::fill::FillThread;
use crate::vmm::launch::FillingFiles;
use crate::wire::refusal::Refusal;

/// Memory of which every chunk is missing, and the thread that fills it.
pub(super) fn begin(files: FillingFiles, memory: Bytes) -> Result<(FillThread, GuestRam), Refusal> {
    let FillingFiles { image, chunk_bytes, userfaultfd, listener } = files;
    let filling = FillingRam::make(image, memory, Bytes(chunk_bytes.into()), &userfaultfd).map_err(|error| {
        if matches!(error, MakeFillingError::Chunks(_)) { bad_request(&error) } else { host(&error) }
    })?;
    let ram = filling.ram().clone();
    let thread = FillThread::start(filling, listener).map_err(|error| host(&error))?;
    Ok((thread, ram))
}

impl Guest {
    fn is_filled(&self) -> bool {
        self.fill.as_ref().is_none_or(|fill| fill.presence().missing() == 0)
    }

    /// Ends its threads.
    pub(super) fn end(self) {
        if self.is_filled() {
            self.machine.stop();
        } else {
            // They may wait for memory that does not come any more, and none is to see zeroes in its place: they end
            // with the process, which is next.
            std::mem::forget(self);
        }
    }
}

impl EventLoop {
    /// Refuses what would look at all of memory, and so wait, while some of it is not here.
    pub(super) fn all_there(&self) -> Result<(), Refusal> {
        if self.guest.as_ref().is_none_or(Guest::is_filled) { Ok(()) } else { Err(Refusal::Filling) }
    }
}
