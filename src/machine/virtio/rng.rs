//! The entropy device (virtio 1.2 section 5.4): fills the guest's buffers from the host's random pool.
//!
//! One queue, no state of its own but a counter. The guest decides how often it asks; a turn gives it at most
//! [`TURN_BYTES_MAX`], and one buffer at most [`REQUEST_BYTES_MAX`]: filling less than it holds is allowed (5.4.6.1).

use super::model::{Counters, Face, Io, Model, Turn};
use super::queue::{RingError, Waiting};
use super::spec::device_id;
use crate::saved::{SaveSectionError, Section};
use crate::sys::entropy;
use saved::RngV1;
use vmm_sys_util::epoll::EventSet;

/// Linux keeps one request of at most 64 bytes under way; a few more do no harm.
const QUEUE_SIZES: [u16; 1] = [8];

/// Most bytes for one buffer: Linux asks for 64 at a time, and what is given is made at once on the stack.
const REQUEST_BYTES_MAX: usize = 4096;

/// Most bytes in one turn of the loop: about 0.1 ms of the host's generator.
const TURN_BYTES_MAX: usize = 16 * REQUEST_BYTES_MAX;

/// The entropy device.
#[derive(Debug)]
pub(crate) struct Rng {
    face: Face,
    bytes_given: u64,
}

impl Rng {
    /// A device, fresh or as it was saved.
    pub(crate) fn new(saved: Option<&RngV1>) -> Self {
        let face = Face { device_id: device_id::RNG, features: 0, queue_sizes: &QUEUE_SIZES, config: Vec::new() };
        Self { face, bytes_given: saved.map_or(0, |saved| saved.bytes_given) }
    }
}

impl Model for Rng {
    fn face(&self) -> &Face {
        &self.face
    }

    fn event(&mut self, _token: u64, _ready: EventSet) {}

    fn serve(&mut self, io: &mut Io<'_>) -> Result<Turn, RingError> {
        if !io.live {
            return Ok(Turn::Idle);
        }
        let mut left = TURN_BYTES_MAX;
        while left > 0 {
            let Some(chain) = io.queues[0].pop()? else {
                match io.queues[0].wait_for_buffers()? {
                    Waiting::Told => return Ok(Turn::Idle),
                    Waiting::MoreThere => continue,
                }
            };
            let mut random = [0; REQUEST_BYTES_MAX];
            let random = &mut random[..chain.writable_bytes().min(REQUEST_BYTES_MAX)];
            let written = match entropy::fill(random) {
                Ok(()) => chain.write(io.ram, 0, random)?,
                Err(_) => 0,
            };
            Counters::count(if written > 0 { &io.counters.done } else { &io.counters.failed });
            io.queues[0].add_used(chain, written)?;
            self.bytes_given = self.bytes_given.saturating_add(written as u64);
            // An empty buffer costs a turn's time as well.
            left = left.saturating_sub(written.max(64));
        }
        Ok(Turn::More)
    }

    fn drain(&mut self, _io: &mut Io<'_>) -> Result<(), RingError> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self, instance: u16) -> Result<Section, SaveSectionError> {
        Section::new(instance, &RngV1 { bytes_given: self.bytes_given })
    }
}

mod saved {
    use crate::saved::{Saved, SectionKind};
    use serde::{Deserialize, Serialize};

    /// The entropy device.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    pub(crate) struct RngV1 {
        /// Bytes given to the guest since it was booted.
        pub(crate) bytes_given: u64,
    }

    impl Saved for RngV1 {
        const KIND: SectionKind = SectionKind::Rng;
        const VERSION: u16 = 1;
    }
}
