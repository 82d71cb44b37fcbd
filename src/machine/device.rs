//! What a device with volatile state promises. Restoring is a constructor (`from_saved`), so no half-restored device
//! exists.
//!
//! The machine calls, in this order: vCPUs leave guest mode; `pause` on every device; `save` on every device;
//! then either `resume` on every device before the vCPUs run again, or nothing.

use crate::saved::{SaveSectionError, Section};

/// A device whose volatile state is saved.
pub trait Device {
    /// Stop producing work and writing guest memory before returning; accept and hold what comes from outside.
    fn pause(&mut self);
    /// Go on after [`Device::pause`]; also called once after a restore: work through what the guest queued and raise
    /// the interrupt once, since either may have been lost on the way.
    fn resume(&mut self);
    /// The volatile state. Only called while paused; saving twice without a resume between gives equal sections.
    fn save(&self) -> Result<Vec<Section>, SaveSectionError>;
}
