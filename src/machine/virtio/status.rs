//! The device status field as a state machine (virtio 1.2 section 2.1 and 3.1.1): a pure function from what the guest
//! wrote to what happens. No I/O, no lock; `mmio` owns the value.
//!
//! ```text
//!  Reset ─▶ Acknowledged ─▶ DriverFound ─▶ FeaturesOk ─▶ DriverOk       write of 0: back to Reset, from anywhere
//!    └────────────┴──────────────┴─────────────┴────────────┴──▶ + FAILED (guest), + NEEDS_RESET (device): both stop it
//! ```

use super::spec::status as bit;

/// How far the driver has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was written since the reset.
    Reset,
    /// The guest has noticed the device.
    Acknowledged,
    /// The guest has a driver; features are being negotiated.
    DriverFound,
    /// Features are settled; queues are being set up.
    FeaturesOk,
    /// The driver works.
    DriverOk,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Reset, Self::Acknowledged, Self::DriverFound, Self::FeaturesOk, Self::DriverOk];

    const fn bits(self) -> u32 {
        match self {
            Self::Reset => 0,
            Self::Acknowledged => bit::ACKNOWLEDGE,
            Self::DriverFound => bit::ACKNOWLEDGE | bit::DRIVER,
            Self::FeaturesOk => bit::ACKNOWLEDGE | bit::DRIVER | bit::FEATURES_OK,
            Self::DriverOk => bit::ACKNOWLEDGE | bit::DRIVER | bit::FEATURES_OK | bit::DRIVER_OK,
        }
    }

    const fn is_past_features(self) -> bool {
        matches!(self, Self::FeaturesOk | Self::DriverOk)
    }
}

/// The status field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    phase: Phase,
    failed: bool,
    needs_reset: bool,
}

/// What a write to the status register does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusWrite {
    /// The device is to be reset.
    Reset,
    /// The field has this value now.
    Moved(Status),
    /// The driver skipped a step or took one back; nothing changes.
    Refused,
}

impl Status {
    /// After a reset.
    pub const RESET: Self = Self { phase: Phase::Reset, failed: false, needs_reset: false };

    /// The status with these bits, if they are a state a device can be in.
    pub fn from_bits(bits: u32) -> Option<Self> {
        let phase = bits & !(bit::FAILED | bit::DEVICE_NEEDS_RESET);
        let phase = Phase::ALL.into_iter().find(|known| known.bits() == phase)?;
        Some(Self { phase, failed: bits & bit::FAILED != 0, needs_reset: bits & bit::DEVICE_NEEDS_RESET != 0 })
    }

    /// As the guest reads it.
    pub const fn bits(self) -> u32 {
        self.phase.bits()
            | if self.failed { bit::FAILED } else { 0 }
            | if self.needs_reset { bit::DEVICE_NEEDS_RESET } else { 0 }
    }

    /// How far the driver has come.
    pub const fn phase(self) -> Phase {
        self.phase
    }

    /// Whether the device may touch its queues.
    pub const fn is_live(self) -> bool {
        matches!(self.phase, Phase::DriverOk) && !self.failed && !self.needs_reset
    }

    /// The same, after the device gave up.
    pub const fn broken(self) -> Self {
        Self { needs_reset: true, ..self }
    }

    /// What the guest's write of `written` does. `acceptable`: whether the features it chose can be worked with.
    pub fn write(self, written: u32, acceptable: bool) -> StatusWrite {
        if written == 0 {
            return StatusWrite::Reset;
        }
        // The device owns NEEDS_RESET: what the guest writes there does not matter.
        let wanted = (written & !bit::DEVICE_NEEDS_RESET) | (self.bits() & bit::DEVICE_NEEDS_RESET);
        let Some(wanted) = Self::from_bits(wanted) else { return StatusWrite::Refused };
        if wanted.bits() & self.bits() != self.bits() {
            return StatusWrite::Refused;
        }
        if wanted.phase.is_past_features() && !self.phase.is_past_features() && !acceptable {
            // 3.1.1 step 5: FEATURES_OK stays clear, so the driver sees that its choice was not accepted.
            return StatusWrite::Moved(Self { phase: Phase::DriverFound, ..wanted });
        }
        StatusWrite::Moved(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn moved(from: u32, written: u32) -> Option<u32> {
        match Status::from_bits(from).unwrap().write(written, true) {
            StatusWrite::Reset => Some(0),
            StatusWrite::Moved(to) => Some(to.bits()),
            StatusWrite::Refused => None,
        }
    }

    /// The whole matrix of states and writes that name a state.
    #[test]
    fn the_driver_goes_forward_step_by_step() {
        let states = [0, 1, 3, 11, 15];
        for (at, from) in states.into_iter().enumerate() {
            for (to, written) in states.into_iter().enumerate() {
                let wanted = if written == 0 || to >= at { Some(written) } else { None };
                assert_eq!(moved(from, written), wanted, "{from:#x} -> {written:#x}");
            }
        }
        // Skipped steps and unknown bits.
        for written in [2, 4, 5, 7, 8, 9, 16, 0x1f, 0x100, u32::MAX] {
            assert_eq!(moved(1, written), None, "{written:#x}");
        }
        assert_eq!(moved(3, 3 | 128), Some(131));
        assert_eq!(moved(15 | 64, 15 | 128), Some(15 | 64 | 128));
        assert_eq!(moved(15 | 64, 0), Some(0));
    }

    #[test]
    fn refused_features_keep_features_ok_clear() {
        let found = Status::from_bits(3).unwrap();
        assert_eq!(found.write(11, false), StatusWrite::Moved(found));
        assert_eq!(found.write(15, false), StatusWrite::Moved(found));
        let settled = Status::from_bits(11).unwrap();
        assert_eq!(settled.write(15, false), StatusWrite::Moved(Status::from_bits(15).unwrap()));
    }

    proptest! {
        #[test]
        fn any_history_of_writes_gives_states(writes in proptest::collection::vec((any::<u32>(), any::<bool>()), 0..32)) {
            let mut status = Status::RESET;
            for (written, acceptable) in writes {
                // Half of the random writes are cut down to bits that exist.
                let written = if acceptable { written & 0xcf } else { written };
                match status.write(written, acceptable) {
                    StatusWrite::Reset => status = Status::RESET,
                    StatusWrite::Moved(next) => {
                        prop_assert_eq!(next.bits() & status.bits() & !bit::FEATURES_OK, status.bits() & !bit::FEATURES_OK);
                        status = next;
                    }
                    StatusWrite::Refused => {}
                }
                prop_assert_eq!(Status::from_bits(status.bits()), Some(status));
            }
        }
    }
}
