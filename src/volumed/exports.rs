//! Names of exports, and what a client is bound to by them.
//!
//! ```text
//! vol-…                            the volume, to look at                 nbd.sock
//! vol-…:<lease>:<epoch>            the volume, as its lease allows        nbd.sock
//! vol-…:<lease>:<epoch>:<secret>   the same                               between hosts, where nothing else opens anything;
//!    … :<set>                         and takes the place of earlier sets of connections with this lease;
//!    … :<set>:ro                      and is read, whatever the lease allows
//! vs-…                             a snapshot, to look at                 nbd.sock
//! (none)                           what the attachment says               a VMM that was dialed
//! ```

use std::sync::Arc;

use super::registry::{Bound, LeaseGate, Registry, stale};
use crate::ids::{LeaseId, VolumeId, VolumeSnapshotId};
use crate::lease::{Epoch, LeaseMode};
use crate::volume::{CHUNK_BYTES, Volume};
use crate::wire::nbd::export_flag;
use crate::wire::nbd::negotiate::{Export, Exports, Refused};
use crate::wire::volumed::{Attachment, Upstream};

/// Requests are multiples of a sector, as guests' are.
const BLOCK_BYTES: u32 = 512;

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) enum Asker<'a> {
    /// Somebody on this host who may open `nbd.sock`.
    Local,
    /// Somebody on another host.
    Remote,
    /// A VMM.
    Vmm(&'a Attachment),
}

/// The exports that somebody may open.
#[derive(Debug)]
pub(super) struct Names<'a> {
    pub(super) registry: &'a Registry,
    pub(super) asker: Asker<'a>,
}

/// The parts of a name.
#[derive(Debug, PartialEq, Eq)]
enum Name<'a> {
    Volume(VolumeId),
    Leased {
        volume: VolumeId,
        lease: LeaseId,
        epoch: Epoch,
        secret: Option<&'a str>,
        set: Option<u64>,
        read_only: bool,
    },
    Snapshot(VolumeSnapshotId),
}

/// The end of a name by which nothing is written.
const READ_ONLY: &str = ":ro";

/// The name by which another host's daemon is asked for a volume.
pub(super) fn name_between_hosts(attachment: &Attachment, upstream: &Upstream, set: u64) -> String {
    let Attachment { volume, lease, epoch, .. } = attachment;
    let end = if attachment.read_only { READ_ONLY } else { "" };
    format!("{volume}:{lease}:{epoch}:{}:{set}{end}", upstream.secret.reveal())
}

/// Said of whatever does not exist or is not for the asker, between hosts: who guesses learns nothing.
fn nothing() -> Refused {
    Refused::Policy("no such volume, lease, epoch and secret".to_owned())
}

impl<'a> Name<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.splitn(4, ':');
        let first = parts.next()?;
        let Some(lease) = parts.next() else {
            return first.parse().map(Self::Volume).or_else(|_| first.parse().map(Self::Snapshot)).ok();
        };
        let epoch = parts.next()?;
        let is_plain = epoch.bytes().all(|digit| digit.is_ascii_digit());
        let epoch = epoch.parse().ok().filter(|_| is_plain)?;
        let (volume, lease) = (first.parse().ok()?, lease.parse().ok()?);
        let (secret, set) = match parts.next().map(|secret| secret.split_once(':').ok_or(secret)) {
            None => (None, None),
            Some(Err(secret)) => (Some(secret), None),
            Some(Ok((secret, set))) => (Some(secret), Some(set)),
        };
        let read_only = set.is_some_and(|set| set.ends_with(READ_ONLY));
        let set = set.map(|set| set.strip_suffix(READ_ONLY).unwrap_or(set).parse()).transpose().ok()?;
        Some(Self::Leased { volume, lease, epoch, secret, set, read_only })
    }
}

impl Exports for Names<'_> {
    type Bound = Bound;

    fn open(&mut self, name: &str) -> Result<(Export, Bound), Refused> {
        if let Asker::Vmm(attachment) = self.asker {
            if !name.is_empty() {
                return Err(Refused::Unknown("this connection is for one volume, which has no name here".to_owned()));
            }
            let Attachment { volume, lease, epoch, read_only, .. } = attachment;
            return self.leased(volume, lease, *epoch, None, *read_only);
        }
        let local = matches!(self.asker, Asker::Local);
        match Name::parse(name) {
            Some(Name::Leased { volume, lease, epoch, secret, set, read_only }) => {
                if !local && secret.is_none() {
                    return Err(nothing());
                }
                let (export, mut bound) = self.leased(&volume, &lease, epoch, secret, read_only)?;
                if let (Bound::Leased { gate, set: of_it, .. }, Some(set)) = (&mut bound, set) {
                    if !Registry::begin_set(gate, &lease, set) {
                        return Err(Refused::Shutdown);
                    }
                    *of_it = Some(set);
                }
                Ok((export, bound))
            }
            Some(Name::Volume(id)) if local => self.looked(&id),
            Some(Name::Snapshot(id)) if local => self.snapshot(&id),
            _ if !local => Err(nothing()),
            _ => Err(Refused::Unknown(format!("{name:?} is no vol-… , vol-…:<lease>:<epoch> or vs-…"))),
        }
    }

    fn names(&self) -> Vec<String> {
        let Asker::Local = self.asker else { return Vec::new() };
        let volumes = self.registry.all_gates().into_iter().map(|(id, _)| id.to_string());
        let snapshots = self.registry.store.list_snapshots().into_iter().map(|info| info.id.to_string());
        volumes.chain(snapshots).collect()
    }
}

impl Names<'_> {
    fn volume(&self, id: &VolumeId) -> Result<(Arc<Volume>, Arc<LeaseGate>), Refused> {
        self.registry.volume(id).ok_or_else(|| match self.asker {
            Asker::Remote => nothing(),
            Asker::Local | Asker::Vmm(_) => Refused::Unknown(format!("there is no volume {id}")),
        })
    }

    fn leased(
        &self,
        id: &VolumeId,
        lease: &LeaseId,
        epoch: Epoch,
        secret: Option<&str>,
        read_only: bool,
    ) -> Result<(Export, Bound), Refused> {
        let (volume, gate) = self.volume(id)?;
        let mode = gate.look(|book| {
            let leases = book.known().map_err(|damage| Refused::Policy(damage.to_owned()))?;
            let found = leases.find(lease).filter(|found| found.epoch == epoch);
            let found = found.filter(|found| secret.is_none_or(|secret| found.secret.is(secret)));
            match (found, self.asker) {
                (Some(found), _) => Ok(found.mode),
                (None, Asker::Remote) => Err(nothing()),
                (None, Asker::Local | Asker::Vmm(_)) => Err(Refused::Policy(stale(leases, lease, epoch).to_string())),
            }
        })?;
        let read_only = read_only || mode == LeaseMode::Shared;
        let export = export(&volume, read_only);
        Ok((export, Bound::Leased { volume, gate, lease: lease.clone(), epoch, read_only, set: None }))
    }

    fn looked(&self, id: &VolumeId) -> Result<(Export, Bound), Refused> {
        let (volume, gate) = self.volume(id)?;
        gate.look(|book| book.known().map(drop).map_err(|damage| Refused::Policy(damage.to_owned())))?;
        Ok((export(&volume, true), Bound::Looked { volume, gate }))
    }

    fn snapshot(&self, id: &VolumeSnapshotId) -> Result<(Export, Bound), Refused> {
        let snapshot = self.registry.snapshot(id);
        let snapshot = snapshot.ok_or_else(|| Refused::Unknown(format!("there is no snapshot {id}")))?;
        let export = Export {
            name: id.to_string(),
            description: snapshot.info().name,
            size: snapshot.size_bytes(),
            flags: READ_FLAGS | export_flag::READ_ONLY,
            block_bytes: BLOCK_BYTES,
            preferred_bytes: preferred_bytes(),
        };
        Ok((export, Bound::Snapshot(snapshot)))
    }
}

/// What every export can do.
const READ_FLAGS: u16 =
    export_flag::SEND_FLUSH | export_flag::SEND_FUA | export_flag::CAN_MULTI_CONN | export_flag::SEND_CACHE;

/// What one that is written to can do beside it.
const WRITE_FLAGS: u16 = export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES | export_flag::SEND_FAST_ZERO;

fn export(volume: &Volume, read_only: bool) -> Export {
    // A damaged volume is only read.
    let read_only = read_only || !volume.damage().is_empty();
    Export {
        name: volume.id().to_string(),
        description: volume.name(),
        size: volume.size_bytes(),
        flags: READ_FLAGS | if read_only { export_flag::READ_ONLY } else { WRITE_FLAGS },
        block_bytes: BLOCK_BYTES,
        preferred_bytes: preferred_bytes(),
    }
}

fn preferred_bytes() -> u32 {
    u32::try_from(CHUNK_BYTES).unwrap_or(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read() {
        let (volume, lease) = (VolumeId::from_random([1; 10]), LeaseId::from_random([2; 10]));
        let snapshot = VolumeSnapshotId::from_random([3; 10]);
        let named = |secret, set, read_only| {
            let (volume, lease) = (volume.clone(), lease.clone());
            Name::Leased { volume, lease, epoch: 7, secret, set, read_only }
        };
        let leased = |secret, set| named(secret, set, false);
        assert_eq!(Name::parse(volume.as_str()), Some(Name::Volume(volume.clone())));
        assert_eq!(Name::parse(snapshot.as_str()), Some(Name::Snapshot(snapshot.clone())));
        assert_eq!(Name::parse(&format!("{volume}:{lease}:7")), Some(leased(None, None)));
        assert_eq!(Name::parse(&format!("{volume}:{lease}:7:a")), Some(leased(Some("a"), None)));
        assert_eq!(Name::parse(&format!("{volume}:{lease}:7:a:12")), Some(leased(Some("a"), Some(12))));
        assert_eq!(Name::parse(&format!("{volume}:{lease}:7:a:12:ro")), Some(named(Some("a"), Some(12), true)));
        for wrong in ["b", ":ro", "12:rw", "12:ro:ro", "1:2"] {
            assert_eq!(Name::parse(&format!("{volume}:{lease}:7:a:{wrong}")), None, "{wrong}");
        }
        for wrong in
            ["", "vol-", &format!("{volume}:{lease}"), &format!("{volume}:{lease}:+7"), &format!("{lease}:{volume}:7")]
        {
            assert_eq!(Name::parse(wrong), None, "{wrong}");
        }
    }
}
