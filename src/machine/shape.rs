//! What a machine is, apart from its state: what must be equal on both sides of a restore.

use serde::{Deserialize, Serialize};

use super::layout::{LAYOUT_VERSION, Slot};
use crate::saved::{Saved, SectionKind, SectionName, TakeSectionError};
use crate::units::Bytes;

/// Shape of a machine, version 1: what must be equal on both sides of a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ShapeV1 {
    layout: u16,
    vcpus: u8,
    memory_bytes: u64,
    /// Numbers of the announced slots, ascending.
    slots: Vec<u8>,
}

impl Saved for ShapeV1 {
    const KIND: SectionKind = SectionKind::Shape;
    const VERSION: u16 = 1;
}

/// What a machine is, apart from its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory.
    pub memory: Bytes,
    /// Announced slots, ascending.
    pub slots: Vec<Slot>,
}

impl Shape {
    /// What is saved of it.
    pub(super) fn saved(&self) -> ShapeV1 {
        ShapeV1 {
            layout: LAYOUT_VERSION,
            vcpus: self.vcpus,
            memory_bytes: self.memory.0,
            slots: self.slots.iter().map(|slot| slot.number()).collect(),
        }
    }

    /// The shape that was saved, if it is one of this build and has just these slots, ascending.
    pub(super) fn from_saved(saved: ShapeV1, slots: Vec<Slot>) -> Result<Self, TakeSectionError> {
        let ShapeV1 { layout, vcpus, memory_bytes, slots: numbers } = saved;
        let invalid =
            |reason| TakeSectionError::Invalid { name: SectionName { kind: SectionKind::Shape, instance: 0 }, reason };
        if layout != LAYOUT_VERSION {
            return Err(invalid(format!("memory layout {layout}, this build has {LAYOUT_VERSION}")));
        }
        let given: Vec<u8> = slots.iter().map(|slot| slot.number()).collect();
        if given != numbers {
            return Err(invalid(format!("it has devices in slots {numbers:?}, given are {given:?}")));
        }
        Ok(Self { vcpus, memory: Bytes(memory_bytes), slots })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saved::Section;
    use crate::units::MIB;

    fn shape() -> Shape {
        Shape { vcpus: 2, memory: Bytes(128 * MIB), slots: vec![Slot::VSOCK, Slot::RNG] }
    }

    #[test]
    fn only_the_same_slots_are_taken() {
        let back = Shape::from_saved(shape().saved(), vec![Slot::VSOCK, Slot::RNG]).unwrap();
        assert_eq!(back, shape());
        for slots in [vec![], vec![Slot::VSOCK], vec![Slot::VSOCK, Slot::RNG, Slot::BALLOON]] {
            assert!(matches!(Shape::from_saved(shape().saved(), slots), Err(TakeSectionError::Invalid { .. })));
        }
        let other = ShapeV1 { layout: LAYOUT_VERSION + 1, ..shape().saved() };
        assert!(Shape::from_saved(other, shape().slots).is_err());
    }

    fn example() -> ShapeV1 {
        shape().saved()
    }

    /// The golden keeps the encoding: changing it needs a new version.
    #[test]
    fn the_encoding_is_what_it_was() {
        let bytes = Section::new(0, &example()).unwrap().bytes;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("../../tests/golden/saved_shape_v1.hex").trim_end());
    }
}
