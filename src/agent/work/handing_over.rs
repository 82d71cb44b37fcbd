//! Effects of handing a machine over to another VMM process on this host, which is of the agent's own version: no memory
//! is copied that both can map, and the guest stands still for milliseconds.
//!
//! The record's process is the machine, at any time. It changes in the transaction that records [`Effect::MoveMachine`]
//! as done, while neither of the two runs; only the recorded one is ever told to run afterwards.
//!
//! [`Effect::MoveMachine`]: crate::agent::effect::Effect::MoveMachine

use std::time::Duration;

use super::outcome::start_failed;
use super::process::END_LIMIT;
use super::{Outcome, Work, ask_failed, host};
use crate::agent::migration_record::MoveRecord;
use crate::agent::world::{VmmHost, VmmProcess, World};
use crate::report::chain;
use crate::wire::frame;

impl<W: World> Work<W> {
    pub(super) async fn start_successor(&mut self) -> Result<(), Outcome> {
        let started = self.shared.world.vmm().start_successor(&self.record).await;
        self.successor = Some(started.map_err(start_failed)?);
        Ok(())
    }

    pub(super) async fn move_machine(&mut self) -> Result<(), Outcome> {
        // Both are this work's own: an agent that was killed between two steps begins none of this again.
        let (Some(process), Some(successor)) = (self.process.clone(), self.successor.take()) else {
            return Err(host("there are no two processes to move the machine between".to_owned()));
        };
        // Until it is known which of the two goes on, the new one is the one to end.
        self.others.push(successor.clone());
        let shared = std::sync::Arc::clone(&self.shared);
        let record = self.record.clone();
        let moving = shared.world.vmm().move_machine(&record, shared.epoch);
        let mut moving = std::pin::pin!(moving);
        let ended = tokio::select! {
            biased;
            // First what was asked: a move that came before an end counts.
            moved = moving.as_mut() => Ok(moved.map_err(ask_failed)?),
            end = process.ended() => Err(Outcome::VmmEnded(end)),
            end = successor.ended() => Err(host(format!("the process to take the VM over ended: {end}"))),
        };
        let phases = match ended {
            Ok(phases) => phases,
            Err(outcome) => {
                // What is under way binds names and asks both: it is over before anything is taken back.
                let _ = successor.kill();
                drop(moving.await);
                return Err(outcome);
            }
        };
        self.others = vec![process];
        let held = Duration::from_nanos(phases.held_ns);
        self.held_at = Some(self.now().before(held));
        self.operation.moved = Some(MoveRecord::of(&phases));
        self.record.process = Some(successor.record());
        self.record.wire_version = frame::VERSION;
        self.process = Some(successor);
        Ok(())
    }

    pub(super) async fn take_over(&self) -> Result<(), Outcome> {
        let taken = self.shared.world.vmm().take_over(&self.record, self.shared.epoch).await;
        taken.map_err(|error| host(format!("reach the process that took the VM over: {}", chain(&error))))
    }

    pub(super) async fn end_others(&mut self) -> Result<(), Outcome> {
        // Those that are held first: their ends are seen, also of those that have ended.
        for other in std::mem::take(&mut self.others) {
            other.kill().map_err(|error| host(format!("end the other process of the VM: {error}")))?;
            let ended = tokio::time::timeout(END_LIMIT, other.ended()).await;
            ended.map_err(|_| host("the other process of the VM is not gone after it was killed".to_owned()))?;
        }
        let ended = self.shared.world.vmm().end_others(&self.record).await;
        ended.map_err(|error| host(format!("end the other process of the VM: {error}")))
    }
}
