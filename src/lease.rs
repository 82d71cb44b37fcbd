//! Leases of a volume: who may write it, who stands by to do so, and since when.
//!
//! A state machine without I/O. Each question is answered by a [`Step`]: an event that its caller writes down and then
//! applies, or none if what is asked for is so already. The state is what all events make of an empty one, so whoever
//! reads the log has it. An epoch counts the leases of a volume that were active; a server that compares it with each
//! request refuses whoever was active before, however long that one slept.
//!
//! ```text
//!            acquire                    convert: one event for both                 release, expire, break
//!  (none) ───────────▶ standby, e + 1 ───────────────────────────────▶ active, e + 1 ─────▶ inactive
//!  (none) ───────────▶ active, e ─────────────────────────────────────────────────────────▶ inactive
//! ```
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::{LeaseId, VmId};

/// Most leases of a volume that only read it.
pub const SHARED_MAX: usize = 256;

/// Events of a volume that are kept to be read.
pub const HISTORY_MAX: usize = 100;

/// Longest name of a holder in bytes.
pub const HOLDER_BYTES_MAX: usize = 64;

/// How long a standby lease lives without being validated, unless it says otherwise: longer than a migration's last
/// rounds, shorter than a person's patience.
pub const STANDBY_TTL_S: u32 = 60;

/// The shortest and the longest time to live of a lease in seconds.
pub const TTL_S: std::ops::RangeInclusive<u32> = 1..=86_400;

/// Counts the leases of a volume that were active: the first is 1.
pub type Epoch = u64;

/// What a lease allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseMode {
    /// To read and write, alone.
    Active,
    /// Nothing yet: it becomes active by a conversion.
    Standby,
    /// To read, beside others that only read.
    Shared,
}

impl fmt::Display for LeaseMode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Active => "active",
            Self::Standby => "standby",
            Self::Shared => "shared",
        })
    }
}

/// What only the holder of a lease knows, in hexadecimal digits: asked for where others than this host could connect.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseSecret(String);

impl LeaseSecret {
    /// The secret made of these bytes.
    pub fn from_random(bytes: [u8; 16]) -> Self {
        Self(format!("{:032x}", u128::from_be_bytes(bytes)))
    }

    /// Whether this is the secret, in a time that does not depend on where it differs.
    pub fn is(&self, text: &str) -> bool {
        let differing = self.0.bytes().zip(text.bytes()).fold(0, |all, (own, other)| all | (own ^ other));
        self.0.len() == text.len() && differing == 0
    }

    /// The secret, for whoever connects with it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for LeaseSecret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("LeaseSecret(..)")
    }
}

/// A lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its name, chosen by who asks for it: asking again is the same question.
    pub id: LeaseId,
    /// What it allows.
    pub mode: LeaseMode,
    /// The epoch it is active in, or would be; of a shared lease, that of the last active one.
    pub epoch: Epoch,
    /// Who has it, for people.
    pub holder: String,
    /// The VM it is for, if it is for one.
    pub vm: Option<VmId>,
    /// Seconds after which it ends unless it is validated, or somebody is connected with it; `None` never.
    pub ttl_s: Option<u32>,
    /// What its holder knows.
    pub secret: LeaseSecret,
}

/// Something that happened to a volume's leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case", deny_unknown_fields)]
pub enum LeaseEvent {
    /// Somebody got a lease.
    Acquired {
        /// It.
        lease: Lease,
    },
    /// The standby lease became the active one, and the active one ended, both at once.
    Converted {
        /// The lease that was active.
        from: LeaseId,
        /// The lease that is active now.
        to: LeaseId,
        /// The epoch that ended; the new one is the next.
        epoch: Epoch,
    },
    /// A lease ended. With an active one its standby ends as well.
    Ended {
        /// Which.
        id: LeaseId,
        /// Why.
        why: LeaseEnd,
    },
}

/// Why a lease ended, other than by a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseEnd {
    /// Its holder gave it back.
    Released,
    /// Nobody validated it for its time to live.
    Expired,
    /// Somebody broke it to have the volume, as the holder does not answer.
    Broken,
}

/// An event and when it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseEntry {
    /// Wall clock, milliseconds since 1970.
    pub at_ms: u64,
    /// What happened.
    pub event: LeaseEvent,
}

/// Why something is not done with a volume's leases. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum LeaseRefusal {
    /// Somebody may write.
    #[error("{holder} has the active lease {id} of epoch {epoch}")]
    Held {
        /// The active lease.
        id: LeaseId,
        /// Who has it.
        holder: String,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Somebody stands by.
    #[error("{holder} has the standby lease {id}")]
    StandbyHeld {
        /// The standby lease.
        id: LeaseId,
        /// Who has it.
        holder: String,
    },
    /// There are readers, who must not see it change.
    #[error("{readers} shared leases: who only reads must not see the volume change")]
    Read {
        /// Their number.
        readers: usize,
    },
    /// Too many readers.
    #[error("{SHARED_MAX} shared leases, which is the most")]
    SharedFull,
    /// Nobody is active, so nobody can stand by.
    #[error("there is no active lease to stand by for")]
    NothingActive,
    /// No such lease, or one that ended.
    #[error("there is no lease {id} (any more)")]
    Unknown {
        /// The one asked for.
        id: LeaseId,
    },
    /// The lease is there, in another epoch.
    #[error("lease {id} is of epoch {epoch}, not of {asked}")]
    OtherEpoch {
        /// The lease.
        id: LeaseId,
        /// Its epoch.
        epoch: Epoch,
        /// The one asked for.
        asked: Epoch,
    },
    /// The lease is there, but allows something else.
    #[error("lease {id} is {mode}, not {wanted}")]
    OtherMode {
        /// The lease.
        id: LeaseId,
        /// What it is.
        mode: LeaseMode,
        /// What it would have to be.
        wanted: LeaseMode,
    },
    /// The id was another lease's before.
    #[error("lease {id} was there before and ended: ids are used once")]
    Used {
        /// The id.
        id: LeaseId,
    },
    /// Words nobody can use.
    #[error("a holder is 1 to {HOLDER_BYTES_MAX} printable characters, and a lease lives 1 to 86400 seconds")]
    Words,
}

/// What is asked for by [`Leases::acquire`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acquire {
    /// The new lease's id.
    pub id: LeaseId,
    /// What it shall allow.
    pub mode: LeaseMode,
    /// Who wants it.
    pub holder: String,
    /// For which VM.
    pub vm: Option<VmId>,
    /// Its time to live in seconds; of a standby lease without one, [`STANDBY_TTL_S`].
    pub ttl_s: Option<u32>,
    /// What the holder will know.
    pub secret: LeaseSecret,
    /// With [`LeaseMode::Active`]: end whatever lease is in the way.
    pub break_others: bool,
}

/// The answer to a question: what is to be written down and applied, in this order. None if it is so already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The events.
    pub events: Vec<LeaseEvent>,
    /// The lease as it is then.
    pub lease: Lease,
}

/// The leases of one volume. What is written of it is all but when leases were seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leases {
    /// The last epoch somebody was active in; 0 before the first.
    epoch: Epoch,
    active: Option<Lease>,
    standby: Option<Lease>,
    shared: BTreeMap<LeaseId, Lease>,
    /// Leases that ended lately.
    ended: BTreeSet<LeaseId>,
    /// Conversions of late, by the epoch they ended.
    conversions: BTreeMap<Epoch, (LeaseId, Lease)>,
    history: VecDeque<LeaseEntry>,
    /// When a lease was validated last, by the caller's clock in milliseconds.
    #[serde(skip)]
    seen_ms: BTreeMap<LeaseId, u64>,
}

impl Leases {
    /// The leases that these events make, as of `now_ms`: whoever reads a log counts all that is in it as seen now, as
    /// nobody could validate anything meanwhile.
    pub fn from_log(entries: impl IntoIterator<Item = LeaseEntry>, now_ms: u64) -> Self {
        let mut leases = Self::default();
        for entry in entries {
            leases.apply(entry, now_ms);
        }
        leases
    }

    /// Who may write.
    pub fn active(&self) -> Option<&Lease> {
        self.active.as_ref()
    }

    /// Who stands by.
    pub fn standby(&self) -> Option<&Lease> {
        self.standby.as_ref()
    }

    /// All that are in force.
    pub fn all(&self) -> impl Iterator<Item = &Lease> {
        self.active.iter().chain(&self.standby).chain(self.shared.values())
    }

    /// The lease of this name, if it is in force.
    pub fn find(&self, id: &LeaseId) -> Option<&Lease> {
        self.all().find(|lease| lease.id == *id)
    }

    /// The last epoch somebody was active in; 0 before the first.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What happened of late, the oldest first.
    pub fn history(&self) -> impl Iterator<Item = &LeaseEntry> {
        self.history.iter()
    }

    /// Whether who is bound to this lease and epoch may write now.
    pub fn may_write(&self, id: &LeaseId, epoch: Epoch) -> bool {
        self.active.as_ref().is_some_and(|active| active.id == *id && active.epoch == epoch)
    }

    /// Whether who is bound to this lease and epoch may read now.
    pub fn may_read(&self, id: &LeaseId, epoch: Epoch) -> bool {
        self.may_write(id, epoch) || self.shared.get(id).is_some_and(|lease| lease.epoch == epoch)
    }

    /// A new lease. Asked again with the same id and mode, it is the one that is there.
    pub fn acquire(&self, wanted: &Acquire) -> Result<Step, LeaseRefusal> {
        if !is_holder(&wanted.holder) || wanted.ttl_s.is_some_and(|ttl| !TTL_S.contains(&ttl)) {
            return Err(LeaseRefusal::Words);
        }
        if let Some(lease) = self.find(&wanted.id) {
            return same_mode(lease, wanted.mode).map(|lease| Step { events: Vec::new(), lease: lease.clone() });
        }
        if self.ended.contains(&wanted.id) {
            return Err(LeaseRefusal::Used { id: wanted.id.clone() });
        }
        let (mut events, epoch) = match wanted.mode {
            LeaseMode::Active => (self.ends_in_the_way(wanted.break_others)?, self.epoch + 1),
            LeaseMode::Standby => (Vec::new(), self.epoch_to_stand_by_for()? + 1),
            LeaseMode::Shared => (self.room_to_share().map(|()| Vec::new())?, self.epoch),
        };
        let ttl_s = wanted.ttl_s.or((wanted.mode == LeaseMode::Standby).then_some(STANDBY_TTL_S));
        let lease = Lease {
            id: wanted.id.clone(),
            mode: wanted.mode,
            epoch,
            holder: wanted.holder.clone(),
            vm: wanted.vm.clone(),
            ttl_s,
            secret: wanted.secret.clone(),
        };
        events.push(LeaseEvent::Acquired { lease: lease.clone() });
        Ok(Step { events, lease })
    }

    fn ends_in_the_way(&self, break_others: bool) -> Result<Vec<LeaseEvent>, LeaseRefusal> {
        if break_others {
            let ended = self.active.iter().chain(self.shared.values());
            return Ok(ended.map(|lease| ended_event(lease, LeaseEnd::Broken)).collect());
        }
        match &self.active {
            Some(active) => Err(held(active)),
            None if self.shared.is_empty() => Ok(Vec::new()),
            None => Err(LeaseRefusal::Read { readers: self.shared.len() }),
        }
    }

    fn epoch_to_stand_by_for(&self) -> Result<Epoch, LeaseRefusal> {
        match (&self.active, &self.standby) {
            (None, _) => Err(LeaseRefusal::NothingActive),
            (Some(_), Some(Lease { id, holder, .. })) => {
                Err(LeaseRefusal::StandbyHeld { id: id.clone(), holder: holder.clone() })
            }
            (Some(active), None) => Ok(active.epoch),
        }
    }

    fn room_to_share(&self) -> Result<(), LeaseRefusal> {
        match &self.active {
            Some(active) => Err(held(active)),
            None if self.shared.len() >= SHARED_MAX => Err(LeaseRefusal::SharedFull),
            None => Ok(()),
        }
    }

    /// The lease, if it is in force in this epoch. The caller tells so to [`Leases::saw`], which renews it.
    pub fn validate(&self, id: &LeaseId, epoch: Epoch) -> Result<&Lease, LeaseRefusal> {
        let lease = self.find(id).ok_or_else(|| LeaseRefusal::Unknown { id: id.clone() })?;
        same_epoch(lease, epoch)
    }

    /// The active lease `from` of `epoch` ends, and the standby lease `to` becomes active. Asked again about the same epoch
    /// and leases, it is so already, also when either ended since; whether `to` is still in force, [`Leases::find`] tells.
    pub fn convert(&self, from: &LeaseId, to: &LeaseId, epoch: Epoch) -> Result<Step, LeaseRefusal> {
        if let Some((was, is)) = self.conversions.get(&epoch)
            && (was, &is.id) == (from, to)
        {
            return Ok(Step { events: Vec::new(), lease: is.clone() });
        }
        let find = |id: &LeaseId| self.find(id).ok_or_else(|| LeaseRefusal::Unknown { id: id.clone() });
        let active = same_epoch(same_mode(find(from)?, LeaseMode::Active)?, epoch)?;
        let standby = same_epoch(same_mode(find(to)?, LeaseMode::Standby)?, active.epoch + 1)?;
        let event = LeaseEvent::Converted { from: from.clone(), to: to.clone(), epoch };
        Ok(Step { events: vec![event], lease: activated(standby.clone()) })
    }

    /// The lease ends, if it allows `only` this. One that ended already, or of which nothing is known, has nothing to end.
    pub fn release(&self, id: &LeaseId, only: Option<LeaseMode>) -> Result<Vec<LeaseEvent>, LeaseRefusal> {
        let Some(lease) = self.find(id) else { return Ok(Vec::new()) };
        let lease = only.map_or(Ok(lease), |only| same_mode(lease, only))?;
        Ok(vec![ended_event(lease, LeaseEnd::Released)])
    }

    /// Leases that nobody validated for their time to live, and that nobody is connected with.
    pub fn expired(&self, now_ms: u64, is_connected: impl Fn(&LeaseId) -> bool) -> Vec<LeaseEvent> {
        let is_over = |lease: &&Lease| {
            let seen = self.seen_ms.get(&lease.id).copied().unwrap_or(now_ms);
            lease.ttl_s.is_some_and(|ttl| now_ms.saturating_sub(seen) >= u64::from(ttl) * 1000)
        };
        let over =
            self.all().filter(is_over).filter(|lease| lease.mode == LeaseMode::Standby || !is_connected(&lease.id));
        over.map(|lease| ended_event(lease, LeaseEnd::Expired)).collect()
    }

    /// Somebody validated the lease, or is connected with it.
    pub fn saw(&mut self, id: &LeaseId, now_ms: u64) {
        if self.find(id).is_some() {
            self.seen_ms.insert(id.clone(), now_ms);
        }
    }

    /// All that are in force count as validated now: of who read them from a disk, as nobody could validate any meanwhile.
    pub fn saw_all(&mut self, now_ms: u64) {
        self.seen_ms = self.all().map(|lease| (lease.id.clone(), now_ms)).collect();
    }

    /// Takes an event in. One that does not fit the state (a log of somebody else) changes as much of it as it can.
    pub fn apply(&mut self, entry: LeaseEntry, now_ms: u64) {
        match &entry.event {
            LeaseEvent::Acquired { lease } => {
                self.seen_ms.insert(lease.id.clone(), now_ms);
                match lease.mode {
                    LeaseMode::Active => {
                        self.epoch = lease.epoch;
                        self.active = Some(lease.clone());
                    }
                    LeaseMode::Standby => self.standby = Some(lease.clone()),
                    LeaseMode::Shared => drop(self.shared.insert(lease.id.clone(), lease.clone())),
                }
            }
            LeaseEvent::Converted { from, to, epoch } => {
                if let Some(standby) = self.standby.take_if(|standby| standby.id == *to) {
                    let lease = activated(standby);
                    self.end(from);
                    self.epoch = lease.epoch;
                    self.seen_ms.insert(lease.id.clone(), now_ms);
                    self.conversions.insert(*epoch, (from.clone(), lease.clone()));
                    self.active = Some(lease);
                }
            }
            LeaseEvent::Ended { id, .. } => {
                let was_active = self.active.as_ref().is_some_and(|active| active.id == *id);
                self.end(id);
                if let Some(standby) = self.standby.take_if(|_| was_active) {
                    self.note_end(&standby.id);
                }
            }
        }
        self.history.push_back(entry);
        while self.history.len() > HISTORY_MAX {
            drop(self.history.pop_front());
        }
        while self.conversions.len() > HISTORY_MAX {
            drop(self.conversions.pop_first());
        }
        // The oldest are not known: ids are random, so it hardly matters which of so many is forgotten.
        while self.ended.len() > 16 * HISTORY_MAX {
            drop(self.ended.pop_first());
        }
    }

    fn end(&mut self, id: &LeaseId) {
        drop(self.active.take_if(|active| active.id == *id));
        drop(self.standby.take_if(|standby| standby.id == *id));
        drop(self.shared.remove(id));
        self.note_end(id);
    }

    fn note_end(&mut self, id: &LeaseId) {
        self.seen_ms.remove(id);
        self.ended.insert(id.clone());
    }
}

fn activated(standby: Lease) -> Lease {
    // Its time to live was for standing by; who is active stays so until it says otherwise.
    Lease { mode: LeaseMode::Active, ttl_s: None, ..standby }
}

fn ended_event(lease: &Lease, why: LeaseEnd) -> LeaseEvent {
    LeaseEvent::Ended { id: lease.id.clone(), why }
}

fn held(active: &Lease) -> LeaseRefusal {
    LeaseRefusal::Held { id: active.id.clone(), holder: active.holder.clone(), epoch: active.epoch }
}

fn same_mode(lease: &Lease, wanted: LeaseMode) -> Result<&Lease, LeaseRefusal> {
    if lease.mode == wanted {
        Ok(lease)
    } else {
        Err(LeaseRefusal::OtherMode { id: lease.id.clone(), mode: lease.mode, wanted })
    }
}

fn same_epoch(lease: &Lease, asked: Epoch) -> Result<&Lease, LeaseRefusal> {
    if lease.epoch == asked {
        Ok(lease)
    } else {
        Err(LeaseRefusal::OtherEpoch { id: lease.id.clone(), epoch: lease.epoch, asked })
    }
}

fn is_holder(text: &str) -> bool {
    (1..=HOLDER_BYTES_MAX).contains(&text.len()) && text.chars().all(|char| !char.is_control())
}

#[cfg(test)]
mod tests;
