//! The one envelope of saved state: typed values in sections that carry kind, version, instance and length outside
//! their bytes.
//!
//! A [`Sections`] is what a paused machine becomes. Restoring takes every section exactly once and ends with
//! [`Sections::finish`], which refuses leftovers: a device without its section and a section without its device are
//! both errors. Saved types are plain structs named `...V1`, apart from the types that run.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

pub mod codec;

/// What a section holds. The numbers are part of the format: never reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum SectionKind {
    /// One vCPU; the instance is its index.
    Vcpu = 1,
    /// Interrupt controllers, PIT and kvmclock of the VM.
    Vm = 2,
    /// 16550 serial port; the instance is the port's number.
    Serial = 3,
    /// The i8042 stub.
    I8042 = 4,
    /// Shape of guest memory and the machine (vCPU count, memory size, announced slots).
    Shape = 5,
    /// virtio-mmio transport of a slot: status, features, queues; the instance is the slot.
    VirtioTransport = 16,
    /// virtio-vsock device; the instance is the slot.
    Vsock = 17,
    /// virtio-rng device; the instance is the slot.
    Rng = 18,
    /// virtio-balloon device; the instance is the slot.
    Balloon = 19,
    /// virtio-blk device; the instance is the slot.
    Block = 20,
    /// virtio-net device; the instance is the slot.
    Net = 21,
}

impl SectionKind {
    const ALL: [Self; 11] = [
        Self::Vcpu,
        Self::Vm,
        Self::Serial,
        Self::I8042,
        Self::Shape,
        Self::VirtioTransport,
        Self::Vsock,
        Self::Rng,
        Self::Balloon,
        Self::Block,
        Self::Net,
    ];

    /// The kind with this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }
}

/// A section's name: kind and instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionName {
    /// What it holds.
    pub kind: SectionKind,
    /// Which one of its kind (vCPU index, slot number), 0 where there is one only.
    pub instance: u16,
}

impl fmt::Display for SectionName {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?}/{}", self.kind, self.instance)
    }
}

/// A type that is a section's content. Changing a shipped type's shape needs a new type with the next version.
pub trait Saved: Serialize + DeserializeOwned {
    /// The section it goes to.
    const KIND: SectionKind;
    /// Version of this shape, from 1.
    const VERSION: u16;
}

/// One section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Kind and instance.
    pub name: SectionName,
    /// Version of the shape in `bytes`.
    pub version: u16,
    /// The encoded value.
    pub bytes: Vec<u8>,
}

/// Why state could not be turned into a section.
#[derive(Debug, thiserror::Error)]
pub enum SaveSectionError {
    /// The value does not encode.
    #[error("encode section {name}")]
    Encode {
        /// The section.
        name: SectionName,
        /// The codec's reason.
        #[source]
        source: codec::CodecError,
    },
}

/// Why sections could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeSectionError {
    /// There is no such section.
    #[error("section {name} is missing")]
    Missing {
        /// The section.
        name: SectionName,
    },
    /// Its version is not one this build reads.
    #[error("section {name} has version {found}, this build reads {wanted}")]
    Version {
        /// The section.
        name: SectionName,
        /// The version it has.
        found: u16,
        /// The version this build reads.
        wanted: u16,
    },
    /// Its bytes are not a value of its type.
    #[error("decode section {name}")]
    Decode {
        /// The section.
        name: SectionName,
        /// The codec's reason.
        #[source]
        source: codec::CodecError,
    },
    /// The bytes decode, but the values contradict each other or this machine.
    #[error("section {name}: {reason}")]
    Invalid {
        /// The section.
        name: SectionName,
        /// What is wrong with it.
        reason: String,
    },
    /// A section nobody took.
    #[error("section {name} belongs to nothing in this machine")]
    Leftover {
        /// The section.
        name: SectionName,
    },
}

impl Section {
    /// The section that holds `value`.
    pub fn new<T: Saved>(instance: u16, value: &T) -> Result<Self, SaveSectionError> {
        let name = SectionName { kind: T::KIND, instance };
        let bytes = codec::encode(value).map_err(|source| SaveSectionError::Encode { name, source })?;
        Ok(Self { name, version: T::VERSION, bytes })
    }
}

/// The state of a machine: sections in the order they were saved, each name once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sections {
    sections: Vec<Section>,
}

/// Two sections have one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("section {name} is there twice")]
pub struct DuplicateSection {
    /// The name.
    pub name: SectionName,
}

impl Sections {
    /// No sections.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a section.
    pub fn push(&mut self, section: Section) -> Result<(), DuplicateSection> {
        if self.sections.iter().any(|held| held.name == section.name) {
            return Err(DuplicateSection { name: section.name });
        }
        self.sections.push(section);
        Ok(())
    }

    /// Takes the section of `T` with this instance out and decodes it.
    pub fn take<T: Saved>(&mut self, instance: u16) -> Result<T, TakeSectionError> {
        let name = SectionName { kind: T::KIND, instance };
        let Some(at) = self.sections.iter().position(|section| section.name == name) else {
            return Err(TakeSectionError::Missing { name });
        };
        let section = self.sections.remove(at);
        if section.version != T::VERSION {
            return Err(TakeSectionError::Version { name, found: section.version, wanted: T::VERSION });
        }
        codec::decode(&section.bytes).map_err(|source| TakeSectionError::Decode { name, source })
    }

    /// The version of a section that is there, for a kind that has several.
    pub fn version(&self, kind: SectionKind, instance: u16) -> Option<u16> {
        let name = SectionName { kind, instance };
        self.sections.iter().find(|section| section.name == name).map(|section| section.version)
    }

    /// Ends a restore: every section must have been taken.
    pub fn finish(self) -> Result<(), TakeSectionError> {
        match self.sections.first() {
            None => Ok(()),
            Some(section) => Err(TakeSectionError::Leftover { name: section.name }),
        }
    }

    /// The sections, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Section> {
        self.sections.iter()
    }

    /// Number of sections.
    pub fn len(&self) -> usize {
        self.sections.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct RngV1 {
        requests: u64,
    }
    impl Saved for RngV1 {
        const KIND: SectionKind = SectionKind::Rng;
        const VERSION: u16 = 1;
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct RngV2 {
        requests: u64,
    }
    impl Saved for RngV2 {
        const KIND: SectionKind = SectionKind::Rng;
        const VERSION: u16 = 2;
    }

    fn one() -> Sections {
        let mut sections = Sections::new();
        sections.push(Section::new(1, &RngV1 { requests: 7 }).unwrap()).unwrap();
        sections
    }

    #[test]
    fn a_section_is_taken_once() {
        let mut sections = one();
        assert_eq!(sections.take::<RngV1>(1).unwrap(), RngV1 { requests: 7 });
        assert!(matches!(sections.take::<RngV1>(1), Err(TakeSectionError::Missing { .. })));
        sections.finish().unwrap();
    }

    #[test]
    fn leftovers_duplicates_and_other_versions_are_refused() {
        assert!(matches!(one().finish(), Err(TakeSectionError::Leftover { .. })));
        assert!(matches!(one().take::<RngV2>(1), Err(TakeSectionError::Version { found: 1, wanted: 2, .. })));
        let again = Section::new(1, &RngV1 { requests: 8 }).unwrap();
        assert!(one().push(again).is_err());
    }

    #[test]
    fn kinds_have_distinct_numbers() {
        for kind in SectionKind::ALL {
            assert_eq!(SectionKind::from_number(kind as u16), Some(kind));
        }
        assert_eq!(SectionKind::from_number(0), None);
    }
}
