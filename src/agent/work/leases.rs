//! Who goes on, of a VM with volumes: the conversion of its first volume's lease decides, and whoever does not know asks
//! the lease service.

use std::time::Duration;

use tokio::time::sleep;

use super::volumes::no_volume;
use super::{Outcome, Work, host};
use crate::agent::arrivals::Decision;
use crate::agent::ledger::{NewEvent, Write};
use crate::agent::record::Subject;
use crate::agent::volumes::{AskVolumesError, VolumeUse};
use crate::agent::world::{World, random_array};
use crate::clock::Clock;
use crate::ids::{LeaseId, VolumeId};
use crate::lease::{Lease, LeaseMode, LeaseSecret};
use crate::report::chain;
use crate::wire::volumed::{Answer, Ask};

/// First and longest time between two tries to hear from the lease service.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

impl<W: World> Work<W> {
    /// The volumes that it writes: the first one's lease is who decides.
    fn written(&self) -> impl Iterator<Item = &VolumeUse> {
        self.record.spec.volume_uses().map(|(_, used)| used).filter(|used| !used.read_only)
    }

    /// Names the leases that the other host is to take: known here before they are there.
    pub(super) fn name_standbys(&mut self) -> Result<(), Outcome> {
        let world = &self.shared.world;
        for used in self.record.spec.volumes.iter_mut().filter_map(|slot| slot.used.as_mut()) {
            let failed = |error| host(format!("read randomness: {error}"));
            let id = LeaseId::from_random(random_array(world).map_err(failed)?);
            let secret = LeaseSecret::from_random(random_array(world).map_err(failed)?);
            used.standby = Some((id, secret));
        }
        Ok(())
    }

    pub(super) async fn convert_lease(&mut self) -> Result<(), Outcome> {
        for used in self.written().skip(1) {
            let (id, _) = standby(used)?;
            let ask = Ask::Validate { volume: used.volume.clone(), id, epoch: used.epoch.saturating_add(1) };
            self.shared.ask_home(used.home, ask).await.map_err(|error| no_volume(used, &error))?;
        }
        match self.written().next() {
            Some(first) => self.convert(first).await,
            None => Ok(()),
        }
    }

    async fn convert(&self, used: &VolumeUse) -> Result<(), Outcome> {
        let (to, _) = standby(used)?;
        let ask = Ask::Convert { volume: used.volume.clone(), from: used.lease.clone(), to, epoch: used.epoch };
        // An answer that did not come says nothing of what was done: the way back asks for that first.
        self.shared.ask_home(used.home, ask).await.map(drop).map_err(|error| no_volume(used, &error))
    }

    /// Tries until all are: who goes on is decided, and needs them.
    pub(super) async fn convert_others(&mut self) -> Result<(), Outcome> {
        for used in self.written().skip(1) {
            let (mut wait, longest) = ASK_AGAIN;
            let (to, _) = standby(used)?;
            let ask = Ask::Convert { volume: used.volume.clone(), from: used.lease.clone(), to, epoch: used.epoch };
            loop {
                match self.shared.ask_home(used.home, ask.clone()).await {
                    Ok(_) => break,
                    // The lease service has said no: asking again changes nothing.
                    Err(error @ AskVolumesError::Refused(_)) => return Err(no_volume(used, &error)),
                    Err(error) => {
                        let error = chain(&error);
                        tracing::warn!(vm = %self.record.id, volume = %used.volume, error, "its lease is not converted yet");
                    }
                }
                sleep(wait).await;
                wait = longest.min(wait.saturating_mul(2));
            }
        }
        Ok(())
    }

    /// Has the standby lease of the first volume gone, unless it was converted. As long as the lease service does not
    /// answer, nobody knows whose the VM is: it stands still, and nobody can hurry that.
    pub(super) async fn settle_lease(&mut self) -> Result<(), Outcome> {
        let Some(first) = self.written().next().cloned() else { return Ok(()) };
        // The send had not begun, or it was settled before.
        let Some((id, _)) = first.standby.clone() else { return Ok(()) };
        let (mut wait, longest) = ASK_AGAIN;
        let mut has_told = false;
        loop {
            let volume = first.volume.clone();
            // A conversion that was asked for, and is still on its way, finds nothing to convert behind this.
            let release = Ask::Release { volume, id: id.clone(), only: Some(LeaseMode::Standby) };
            let released = self.shared.ask_home(first.home, release).await;
            let active = match released {
                Ok(_) | Err(AskVolumesError::Refused(_)) => self.shared.active_lease(&first).await,
                Err(error) => Err(error),
            };
            match active {
                Ok(Some(active)) if active.id == id => return Err(Outcome::Decided),
                Ok(_) => {
                    self.nobody_stands_by();
                    return Ok(());
                }
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(vm = %self.record.id, error, "whose this VM is cannot be told: it stands still");
                    if !std::mem::replace(&mut has_told, true) {
                        self.tell_undecided(&first.volume, error).await;
                    }
                }
            }
            sleep(wait).await;
            wait = longest.min(wait.saturating_mul(2));
        }
    }

    /// It is known whose the VM is: this host's (see [`VmRecord::is_undecided`]).
    fn nobody_stands_by(&mut self) {
        for used in self.record.spec.volumes.iter_mut().filter_map(|slot| slot.used.as_mut()) {
            used.standby = None;
        }
    }

    /// Says that a VM stands still because nobody can say whose it is.
    async fn tell_undecided(&self, volume: &VolumeId, reason: String) {
        let event = NewEvent {
            at: self.shared.world.clock().wall(),
            kind: "migration_undecided",
            subject: Subject::Vm(self.record.id.clone()),
            operation: Some(self.operation.id.clone()),
            body: serde_json::json!({ "volume": volume, "reason": reason }),
        };
        if let Err(error) = self.shared.commit(vec![Write::Event(event)]).await {
            tracing::warn!(error = %chain(&error), "an event is lost");
        }
    }

    /// What the lease service says of a machine that stands ready here, when its source does not answer.
    pub(super) async fn decision_by_lease(&self) -> Option<Decision> {
        let first = self.written().next()?;
        match self.shared.active_lease(first).await {
            Ok(Some(active)) if active.id == first.lease => Some(Decision::HandedOver),
            Ok(_) => None,
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(vm = %self.record.id, error, "the lease service does not say whose this VM is either");
                None
            }
        }
    }
}

fn standby(used: &VolumeUse) -> Result<(LeaseId, LeaseSecret), Outcome> {
    used.standby.clone().ok_or_else(|| host(format!("nobody stands by for volume {}", used.volume)))
}

impl<W: World> crate::agent::shared::Shared<W> {
    /// The lease that may write a volume now.
    async fn active_lease(&self, used: &VolumeUse) -> Result<Option<Lease>, AskVolumesError> {
        if let Answer::Leases { leases, .. } =
            self.ask_home(used.home, Ask::Leases { volume: used.volume.clone() }).await?
        {
            Ok(leases.into_iter().find(|lease| lease.mode == LeaseMode::Active))
        } else {
            Err(AskVolumesError::Unexpected)
        }
    }
}
