//! Migrations and moves as they are kept in records.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::MigrationId;
use crate::units::PAGE_BYTES;
use crate::wire::control::{Packing, SendPhases, StreamForm};
use crate::wire::stream::{self, CONNECTIONS_MAX, Kind};

/// The version of the control protocol from which on a VMM can be told the form of its stream: that of
/// [`crate::wire::control::Request::SendIn`].
const FORM_SINCE: u16 = 3;

/// Longest pause that can be aimed at, in milliseconds.
const PAUSE_MS_MAX: u32 = 60_000;

/// Most rounds.
const ROUNDS_MAX: u32 = 1000;

/// Longest time for the rounds, in seconds.
const DEADLINE_S_MAX: u32 = 24 * 3600;

/// Smallest rate, in bytes a second: slower than this, no guest ever arrives.
const RATE_BYTES_MIN: u64 = 64 << 10;

/// A machine's way to or from another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// Its id, on both hosts.
    pub id: MigrationId,
    /// The other host's name, as it is called here.
    pub peer: String,
    /// The other host's number in the fabric.
    pub host: u16,
    /// How it is moved; what the source says counts.
    #[serde(default)]
    pub policy: MovePolicy,
}

/// How a machine is moved to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MovePolicy {
    /// Number of connections, 1 to 8.
    pub connections: u8,
    /// Longest pause that is aimed at, in milliseconds.
    pub pause_ms_max: u32,
    /// Rounds after which no other begins.
    pub rounds_max: u32,
    /// Time after which no other round begins, in seconds.
    pub deadline_s: u32,
    /// Most bytes a second while the guest runs; `None` is no limit.
    pub rate_bytes_max: Option<u64>,
    /// Whether the guest may be slowed down when it writes faster than its pages are sent.
    pub throttle: bool,
    /// What is done when that does not help.
    pub unconverged: WhenUnconverged,
    /// Whether its pages are compressed, if both ends can.
    pub compress: Compress,
}

/// Whether a machine's pages are compressed on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compress {
    /// They are sent as they are.
    #[default]
    None,
    /// By lz4.
    Lz4,
}

impl From<Packing> for Compress {
    fn from(packing: Packing) -> Self {
        match packing {
            Packing::None => Self::None,
            Packing::Lz4 => Self::Lz4,
        }
    }
}

impl Compress {
    /// The form of a stream from a VMM that speaks this version of the control protocol to a host that understands this
    /// version of the stream; and why pages are not compressed, if that was asked for.
    pub(super) fn agreed(self, vmm_speaks: u16, stream_version: u16) -> (StreamForm, Option<Uncompressed>) {
        let is_asked = self != Self::None;
        if vmm_speaks < FORM_SINCE {
            return (StreamForm::PLAIN, is_asked.then_some(Uncompressed::OlderVmm));
        }
        let version = stream_version.clamp(stream::VERSION_MIN, stream::VERSION);
        let is_possible = version >= Kind::PackedPages.since_version();
        let packing = match self {
            Self::Lz4 if is_possible => Packing::Lz4,
            Self::Lz4 | Self::None => Packing::None,
        };
        (StreamForm { version, packing }, (is_asked && !is_possible).then_some(Uncompressed::OlderHost))
    }
}

/// Why a machine's pages were not compressed although that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Uncompressed {
    /// The other host's agent is of an earlier version.
    OlderHost,
    /// The VM's process is of an earlier version.
    OlderVmm,
}

impl Uncompressed {
    /// In words.
    pub const fn told(self) -> &'static str {
        match self {
            Self::OlderHost => "the other host's agent is of an earlier version, which cannot unpack",
            Self::OlderVmm => {
                "the VM's process is of an earlier version, which cannot pack: `hearth vm hand-over` renews it"
            }
        }
    }
}

/// What is done with a guest that writes faster than its pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenUnconverged {
    /// It is moved all the same, with a pause as long as it takes.
    #[default]
    Force,
    /// It stays where it is.
    Abort,
}

impl Default for MovePolicy {
    fn default() -> Self {
        Self {
            connections: 1,
            pause_ms_max: 5,
            rounds_max: 30,
            deadline_s: 600,
            rate_bytes_max: None,
            throttle: true,
            unconverged: WhenUnconverged::Force,
            compress: Compress::None,
        }
    }
}

/// A policy that no migration can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}: {min} to {max} are possible")]
pub struct PolicyError {
    /// The field.
    pub field: &'static str,
    /// Its value.
    pub value: u64,
    /// The smallest possible.
    pub min: u64,
    /// The greatest possible.
    pub max: u64,
}

impl MovePolicy {
    /// Whether each of its numbers is possible.
    pub fn check(&self) -> Result<(), PolicyError> {
        let within = |field, value: u64, min: u64, max: u64| {
            if (min..=max).contains(&value) { Ok(()) } else { Err(PolicyError { field, value, min, max }) }
        };
        within("connections", self.connections.into(), 1, CONNECTIONS_MAX.into())?;
        within("pause_ms_max", self.pause_ms_max.into(), 1, PAUSE_MS_MAX.into())?;
        within("rounds_max", self.rounds_max.into(), 1, ROUNDS_MAX.into())?;
        within("deadline_s", self.deadline_s.into(), 1, DEADLINE_S_MAX.into())?;
        within("rate_bytes_max", self.rate_bytes_max.unwrap_or(RATE_BYTES_MIN), RATE_BYTES_MIN, u64::MAX)
    }

    /// Time after which no other round begins.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline_s.into())
    }
}

/// What moving a machine from one process to another took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MoveRecord {
    /// How long no vCPU ran, in microseconds; `None` while none does, and for a machine that was paused.
    pub pause_us: Option<u64>,
    /// Of that: until the machine stood ready in the other process, in microseconds.
    pub held_us: u64,
    /// From the first connection to the pause, in microseconds.
    #[serde(default)]
    pub running_us: u64,
    /// Rounds while the guest ran.
    pub rounds: u32,
    /// Pages of guest memory that were sent with their bytes, compressed or not.
    pub pages: u64,
    /// Bytes that went over.
    pub bytes: u64,
    /// Whether pages were compressed.
    #[serde(default)]
    pub compress: Compress,
    /// Why they were not, if that was asked for.
    #[serde(default)]
    pub uncompressed: Option<Uncompressed>,
    /// Pages that became shorter.
    #[serde(default)]
    pub packed_pages: u64,
    /// Bytes they were sent as.
    #[serde(default)]
    pub packed_bytes: u64,
    /// Pages that were sent as zeroes.
    #[serde(default)]
    pub zero_pages: u64,
    /// Pages sent while it stood still.
    #[serde(default)]
    pub last_pages: u64,
    /// Packets that waited for it here and followed it.
    #[serde(default)]
    pub packets: u64,
    /// Longest that a packet for it can have waited, from the pause until all that waited had followed it and others were
    /// led there, in microseconds.
    #[serde(default)]
    pub network_us: Option<u64>,
    /// Where the pause went.
    #[serde(default)]
    pub steps: PauseSteps,
}

impl MoveRecord {
    /// What a send says of itself.
    pub(super) const fn of(phases: &SendPhases) -> Self {
        Self {
            pause_us: None,
            held_us: phases.held_ns / 1000,
            running_us: phases.running_ns / 1000,
            rounds: phases.rounds,
            pages: phases.pages,
            bytes: phases.wire_bytes,
            compress: Compress::None,
            uncompressed: None,
            packed_pages: 0,
            packed_bytes: 0,
            zero_pages: phases.zero_pages,
            last_pages: phases.last_pages,
            packets: 0,
            network_us: None,
            steps: PauseSteps {
                stop_us: phases.pause_ns / 1000,
                last_pages_us: phases.last_pages_ns / 1000,
                ready_us: phases.ready_ns / 1000,
                decide_us: 0,
                start_us: 0,
            },
        }
    }

    /// Bytes a second that were copied, before and during the pause: those that went over, with what was compressed counted
    /// as it is in memory. `None` when there were none.
    pub fn rate_bytes(&self) -> Option<u64> {
        let micros = u128::from(self.running_us) + u128::from(self.held_us);
        let unpacked = self.packed_pages.saturating_mul(PAGE_BYTES).saturating_sub(self.packed_bytes);
        let rate = (u128::from(self.bytes.saturating_add(unpacked)) * 1_000_000).checked_div(micros)?;
        u64::try_from(rate).ok().filter(|rate| *rate > 0)
    }
}

/// Where a pause went, in microseconds, in this order. The state is collected while the last pages are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PauseSteps {
    /// Taking the vCPUs out and the devices to rest.
    pub stop_us: u64,
    /// Until the last page was acknowledged.
    pub last_pages_us: u64,
    /// Until the other process had made a machine of the state.
    pub ready_us: u64,
    /// Until it was recorded whose the machine is.
    pub decide_us: u64,
    /// Until it was known that it runs there.
    pub start_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::control::{Request, SendSpec, SentPages, StreamToken};

    const SPEC: SendSpec = SendSpec {
        token: StreamToken([0; 32]),
        connections: 1,
        pages: SentPages::All,
        pause_ms_max: 5,
        rounds_max: 1,
        deadline_ms: 1,
        force: true,
        throttle: true,
        rate_bytes_max: None,
        tls: None,
    };

    #[test]
    fn a_policy_that_cannot_be_is_named() {
        assert_eq!(MovePolicy::default().check(), Ok(()));
        let wrong = [
            ("connections", MovePolicy { connections: 0, ..MovePolicy::default() }),
            ("connections", MovePolicy { connections: 9, ..MovePolicy::default() }),
            ("pause_ms_max", MovePolicy { pause_ms_max: 0, ..MovePolicy::default() }),
            ("rounds_max", MovePolicy { rounds_max: 1001, ..MovePolicy::default() }),
            ("deadline_s", MovePolicy { deadline_s: 0, ..MovePolicy::default() }),
            ("rate_bytes_max", MovePolicy { rate_bytes_max: Some(1), ..MovePolicy::default() }),
        ];
        for (field, policy) in wrong {
            assert_eq!(policy.check().map_err(|error| error.field), Err(field), "{policy:?}");
        }
    }

    #[test]
    fn pages_are_compressed_if_both_ends_can() {
        let form = |version, packing| StreamForm { version, packing };
        let (lz4, none) = (Packing::Lz4, Packing::None);
        for (asked, vmm, host, agreed) in [
            (Compress::Lz4, 3, 2, (form(2, lz4), None)),
            (Compress::Lz4, 4, 9, (form(2, lz4), None)),
            (Compress::Lz4, 3, 1, (form(1, none), Some(Uncompressed::OlderHost))),
            (Compress::Lz4, 3, 0, (form(1, none), Some(Uncompressed::OlderHost))),
            (Compress::Lz4, 2, 2, (StreamForm::PLAIN, Some(Uncompressed::OlderVmm))),
            (Compress::None, 3, 2, (form(2, none), None)),
            (Compress::None, 3, 1, (form(1, none), None)),
            (Compress::None, 2, 2, (StreamForm::PLAIN, None)),
        ] {
            assert_eq!(asked.agreed(vmm, host), agreed, "{asked:?}: VMM {vmm}, host {host}");
        }
        let (spec, form) = (SPEC, StreamForm::PLAIN);
        assert_eq!(Request::SendIn { spec, form }.since_version(), FORM_SINCE);
    }

    #[test]
    fn what_was_compressed_counts_as_it_is_in_memory() {
        let moved = MoveRecord { running_us: 1_000_000, bytes: 5000, ..MoveRecord::default() };
        assert_eq!(moved.rate_bytes(), Some(5000));
        let moved = MoveRecord { packed_pages: 10, packed_bytes: 4960, ..moved };
        assert_eq!(moved.rate_bytes(), Some(41_000));
    }

    #[test]
    fn records_of_before_have_the_defaults() {
        let way: MigrationRecord =
            serde_json::from_str(r#"{"id":"m-mzxw6ytbmzxw6ytb","peer":"b","host":2}"#).expect("a record");
        assert_eq!(way.policy, MovePolicy::default());
    }
}
