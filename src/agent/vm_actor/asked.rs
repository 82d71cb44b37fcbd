//! What is asked of a VM: done at once, begun as an operation, left to wait, or refused.

use std::sync::Arc;
use std::time::Duration;

use super::{Reply, Request, Verb, VerbError, VmActor};
use crate::agent::ledger::LedgerError;
use crate::agent::vm_state::{Denied, Event, Goal, VmState, step};
use crate::agent::world::World;

impl<W: World> VmActor<W> {
    /// Only these states' work can wait for a guest for long.
    pub(super) fn may_be_hurried(&self) -> bool {
        matches!(
            self.record.state,
            VmState::Launching
                | VmState::Registering
                | VmState::Stopping
                | VmState::Saving { .. }
                | VmState::Sending
                | VmState::HandedOver
                | VmState::Arriving { .. }
        )
    }

    pub(super) async fn take(&mut self, request: Request) -> Result<(), LedgerError> {
        if self.work.is_none() {
            return self.answer(request).await;
        }
        let hurries = match (&request.verb, &self.record.state) {
            // A migration is given up for it, as long as the VM is not the other host's.
            (Verb::CancelMigration(_), VmState::Sending) => true,
            // A snapshot is given up for it as long as the guest's memory is being copied; what follows is soon over.
            (
                Verb::Stop { .. } | Verb::Remove { .. },
                VmState::Launching | VmState::Registering | VmState::Sending | VmState::Saving { .. },
            ) => true,
            // After that, as it will be as it was.
            (_, VmState::Saving { .. }) => false,
            (Verb::Stop { .. } | Verb::Remove { .. }, VmState::HandedOver | VmState::Arriving { .. }) => {
                let denied = Denied { state: self.record.state.clone() };
                self.reply(&request.verb, request.reply, Err(denied));
                return Ok(());
            }
            // What is here of it is still being taken away.
            (Verb::Arrive(_) | Verb::ForgetAway(_), VmState::HandedOver) => false,
            (Verb::Stop { grace } | Verb::Remove { grace }, _) => grace.is_zero(),
            (
                Verb::Pause
                | Verb::Resume
                | Verb::Snapshot(_)
                | Verb::HandOver
                | Verb::ChangeVolumes(_)
                | Verb::Migrate(_)
                | Verb::CancelMigration(_)
                | Verb::Arrive(_)
                | Verb::ForgetAway(_)
                | Verb::SwapOut(_)
                | Verb::Wake(_),
                _,
            ) => {
                // Refused now rather than after a launch of minutes.
                let denied = Denied { state: self.record.state.clone() };
                self.reply(&request.verb, request.reply, Err(denied));
                return Ok(());
            }
            // After what is going on.
            (Verb::SetSwapPolicy(_), _) => false,
        };
        if hurries {
            self.hurry.send_replace(true);
        }
        self.waiting.push_back(request);
        Ok(())
    }

    pub(super) async fn answer(&mut self, request: Request) -> Result<(), LedgerError> {
        let Request { verb, reply } = request;
        if let (Verb::SetSwapPolicy(_), VmState::HandedOver) = (&verb, &self.record.state) {
            // Where it is now, its policy is kept there.
            let denied = Denied { state: self.record.state.clone() };
            self.reply(&verb, reply, Err(denied));
            return Ok(());
        }
        if let Verb::SetSwapPolicy(policy) = verb {
            self.record.spec.swap = policy;
            self.turn(self.stay(), Vec::new(), None).await?;
            // Whoever asked may have gone.
            let _ = reply.send(Ok(Arc::new(self.record.clone())));
            return Ok(());
        }
        if let Verb::ForgetAway(id) = &verb
            && self.record.migration.as_ref().is_none_or(|way| way.id != *id)
        {
            // It has gone another way since.
            let _ = reply.send(Ok(Arc::new(self.record.clone())));
            return Ok(());
        }
        if let Verb::CancelMigration(_) = &verb {
            // Whatever it was, it is over.
            let is_elsewhere = self.record.state == VmState::HandedOver;
            let denied = if is_elsewhere { Err(Denied { state: self.record.state.clone() }) } else { Ok(()) };
            match denied {
                Ok(()) => drop(reply.send(Ok(Arc::new(self.record.clone())))),
                Err(_) => self.reply(&verb, reply, denied),
            }
            return Ok(());
        }
        if let Some(found) = &self.record.quarantine
            && !matches!(verb, Verb::Stop { .. } | Verb::Remove { .. })
        {
            let (vm, report) = (self.record.id.to_string(), found.report.clone());
            // Whoever asked may have gone.
            let _ = reply.send(Err(VerbError::Quarantined { verb: verb.name(), vm, report }));
            return Ok(());
        }
        if let Some(missing) = self.missing_memory(&verb).or_else(|| self.volumes_in_the_way(&verb)) {
            // Whoever asked may have gone.
            let _ = reply.send(Err(missing));
            return Ok(());
        }
        let (event, goal, grace, then_remove) = match &verb {
            Verb::Snapshot(order) => (Event::SnapshotAsked { live: order.live }, Goal::Snapshot, Duration::ZERO, false),
            Verb::Migrate(_) => (Event::MigrateAsked, Goal::Migrate, Duration::ZERO, false),
            Verb::Arrive(_) => (Event::ArriveAsked, Goal::Arrive, Duration::ZERO, false),
            Verb::ForgetAway(_) => (Event::ForgetLeft, Goal::Remove, Duration::ZERO, true),
            Verb::ChangeVolumes(_) => (Event::VolumesAsked, Goal::ChangeVolumes, Duration::ZERO, false),
            Verb::HandOver => (Event::HandOverAsked, Goal::HandOver, Duration::ZERO, false),
            Verb::SwapOut(order) => (Event::SwapOutAsked(order.mode), Goal::SwapOut, Duration::ZERO, false),
            // Handled above; the state stays.
            Verb::Wake(_) | Verb::SetSwapPolicy(_) | Verb::CancelMigration(_) => {
                (Event::WakeAsked, Goal::Wake, Duration::ZERO, false)
            }
            Verb::Pause => (Event::PauseAsked, Goal::Pause, Duration::ZERO, false),
            Verb::Resume => (Event::ResumeAsked, Goal::Resume, Duration::ZERO, false),
            Verb::Stop { grace } => (stop_event(*grace), Goal::Stop, *grace, false),
            Verb::Remove { grace } if self.record.state.holds_resources() => {
                (stop_event(*grace), Goal::Stop, *grace, true)
            }
            Verb::Remove { grace } => (Event::RemoveAsked, Goal::Remove, *grace, true),
        };
        // A guest that cannot be spoken to is not asked to power off.
        let event =
            if self.record.quarantine.is_some() && event == Event::StopAsked { Event::KillAsked } else { event };
        let next = match step(&self.record.state, &event) {
            Ok(next) => next,
            Err(denied) => {
                self.reply(&verb, reply, Err(denied));
                return Ok(());
            }
        };
        if next.effects.is_empty() {
            let _ = reply.send(Ok(Arc::new(self.record.clone())));
            return Ok(());
        }
        if let Verb::ChangeVolumes(change) = &verb
            && let Err(refused) = change.apply(&mut self.record.spec)
        {
            // Whoever asked may have gone.
            let _ = reply.send(Err(VerbError::Volume { vm: self.record.id.to_string(), refused }));
            return Ok(());
        }
        let mut operation = self.new_operation(goal, then_remove, &next);
        let mut writes = Vec::new();
        match &verb {
            Verb::Snapshot(order) => operation.makes = Some((**order).clone()),
            Verb::SwapOut(order) => self.record.swap = Some(self.swap_record(order)),
            Verb::Wake(cause) => writes.push(self.waking_event(*cause, &operation)),
            Verb::Migrate(way) => {
                self.record.migration = Some(way.clone());
                operation.migration = Some(way.clone());
            }
            Verb::Arrive(arrival) => {
                operation.migration = Some(arrival.way.clone());
                self.record.came_by = Some(arrival.way.id.clone());
                self.record.migration = Some(arrival.way.clone());
                self.record.spec = arrival.spec.clone();
                self.record.guest_protocol = arrival.guest_protocol;
            }
            Verb::HandOver
            | Verb::ChangeVolumes(_)
            | Verb::CancelMigration(_)
            | Verb::ForgetAway(_)
            | Verb::Pause
            | Verb::Resume
            | Verb::Stop { .. }
            | Verb::Remove { .. }
            | Verb::SetSwapPolicy(_) => {}
        }
        self.asker = Some((verb, reply));
        self.turn(next, writes, Some(&operation)).await?;
        self.perform(operation, grace, None);
        Ok(())
    }

    /// A bundle has no volumes: its clones could not all have them.
    fn volumes_in_the_way(&self, verb: &Verb) -> Option<VerbError> {
        let volumes = self.record.spec.volume_uses().count();
        let is_in_the_way = matches!(verb, Verb::Snapshot(_)) && volumes > 0;
        is_in_the_way.then(|| VerbError::HasVolumes { vm: self.record.id.to_string(), volumes })
    }

    /// What reads all of a machine's memory waits until all of it is here.
    fn missing_memory(&self, verb: &Verb) -> Option<VerbError> {
        if !matches!(verb, Verb::Snapshot(_) | Verb::HandOver | Verb::Migrate(_) | Verb::SwapOut(_)) {
            return None;
        }
        let (mapped, chunks) = self.shared.fillings.holds_back(&self.record)?;
        Some(VerbError::Filling { verb: verb.name(), vm: self.record.id.to_string(), mapped, chunks })
    }

    pub(super) fn reply(&self, verb: &Verb, reply: Reply, denied: Result<(), Denied>) {
        if let Err(source) = denied {
            let error = VerbError::Denied { verb: verb.name(), vm: self.record.id.to_string(), source };
            // Whoever asked may have gone.
            let _ = reply.send(Err(error));
        }
    }

    /// The VM is another host's: what was asked of it here is not done, and must not look as if it were.
    pub(super) fn deny_waiting(&mut self) {
        for Request { verb, reply } in std::mem::take(&mut self.waiting) {
            self.reply(&verb, reply, Err(Denied { state: self.record.state.clone() }));
        }
    }
}

const fn stop_event(grace: Duration) -> Event {
    if grace.is_zero() { Event::KillAsked } else { Event::StopAsked }
}
