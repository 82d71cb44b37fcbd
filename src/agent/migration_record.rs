//! Migrations and moves as they are kept in records.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::MigrationId;
use crate::wire::control::SendPhases;
use crate::wire::stream::CONNECTIONS_MAX;

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
    /// Pages of guest memory that were sent with their bytes.
    pub pages: u64,
    /// Bytes that went over.
    pub bytes: u64,
    /// Pages that were sent as zeroes.
    #[serde(default)]
    pub zero_pages: u64,
    /// Pages sent while it stood still.
    #[serde(default)]
    pub last_pages: u64,
    /// Packets that waited for it here and followed it.
    #[serde(default)]
    pub packets: u64,
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
            zero_pages: phases.zero_pages,
            last_pages: phases.last_pages,
            packets: 0,
            steps: PauseSteps {
                stop_us: phases.pause_ns / 1000,
                last_pages_us: phases.last_pages_ns / 1000,
                ready_us: phases.ready_ns / 1000,
                decide_us: 0,
                start_us: 0,
            },
        }
    }

    /// Bytes a second that went over, before and during the pause; `None` when nothing did.
    pub fn rate_bytes(&self) -> Option<u64> {
        let micros = u128::from(self.running_us) + u128::from(self.held_us);
        let rate = (u128::from(self.bytes) * 1_000_000).checked_div(micros)?;
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
    fn records_of_before_have_the_defaults() {
        let way: MigrationRecord =
            serde_json::from_str(r#"{"id":"m-mzxw6ytbmzxw6ytb","peer":"b","host":2}"#).expect("a record");
        assert_eq!(way.policy, MovePolicy::default());
    }
}
