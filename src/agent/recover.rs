//! What an agent does with what an earlier one left: a pure plan per VM. Performing it is the VM's actor's; looking for
//! what no record knows is [`super::Agent`]'s, in the background.

use std::sync::Arc;
use std::time::Duration;

use super::config::Config;
use super::effect::Effect;
use super::ledger::{LedgerError, Write};
use super::record::{OperationRecord, OperationState, StepState, VmRecord};
use super::session_record::NetworkRecord;
use super::shared::Shared;
use super::vm_state::{Goal, SwapMode, VmState};
use super::world::{Records, VmBundles, VmDisk, VmmHost, VmmProcess, World};
use crate::clock::Clock;
use crate::ids::VmId;
use crate::net::address::Parts;

/// What was found of a VM that cannot be, by what is known: it is left alone, and somebody has to look. Nothing that
/// runs is ended for it, and nothing that is kept is thrown away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Doubt {
    /// The process of the record does not know the record's secret.
    #[error(
        "process {pid} is the one that was recorded for it, but was started with another secret: the ledger and the \
         VMM are not of one time (was an older ledger put back?)"
    )]
    OtherSecret {
        /// Its process.
        pid: i32,
    },
    /// Its VMM serves an agent that came after this one.
    #[error(
        "its VMM serves an agent of epoch {current}, this one has {own}: another agent has it, or an older ledger was \
         put back"
    )]
    NewerAgent {
        /// The epoch its VMM serves.
        current: u64,
        /// This agent's.
        own: u64,
    },
    /// Its VMM speaks a version of the protocol that this agent does not.
    #[error("its VMM speaks version {version} of the control protocol, this agent up to {known}: start a newer agent")]
    NewerProtocol {
        /// The version.
        version: u16,
        /// The newest this agent knows.
        known: u16,
    },
    /// Its VMM speaks a version of the protocol that this agent does not any more.
    #[error(
        "its VMM speaks version {version} of the control protocol, this agent {known} and later: start the agent of the \
         version before, renew its process with `hearth vm hand-over` or stop it, then start this one"
    )]
    OlderProtocol {
        /// The version.
        version: u16,
        /// The oldest this agent knows.
        known: u16,
    },
    /// It is hibernated and runs.
    #[error("it is hibernated, and process {pid} is there as well: which of the two is newer cannot be told")]
    ProcessBesideFile {
        /// The process.
        pid: i32,
    },
}

/// What to do with a VM at the start of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Nothing: it runs and is watched, or it has ended and is clean.
    Rest,
    /// Perform the operation's steps, again from the first: each looks before it acts.
    Continue(OperationRecord),
    /// Its VMM ended while no agent looked; the operation, if any, ends with that.
    Ended(Option<OperationRecord>),
    /// The operation is not begun again: it fails, and what it did is taken back.
    Undo(OperationRecord),
    /// What was being done ended, and was not taken back: that is done now.
    TakeBack,
    /// Nothing: what was found contradicts itself, and somebody has to look.
    Quarantine(Doubt),
    /// Nothing should be left of it, but an operation that saw to that is not recorded: clean up.
    Clean,
}

/// Decides by the record, its unfinished operation and whether its VMM lives.
pub(crate) fn plan(vm: &VmRecord, unfinished: Option<OperationRecord>, lives: bool, doubt: Option<Doubt>) -> Plan {
    match (&vm.state, unfinished) {
        // Whatever was being done with it: only its end can be.
        (_, operation) if doubt.is_some() && operation.as_ref().is_none_or(|operation| !ends(operation.goal)) => {
            doubt.map_or(Plan::Rest, Plan::Quarantine)
        }
        (VmState::SwappedOut { mode: SwapMode::Hibernate }, None) if lives => {
            Plan::Quarantine(Doubt::ProcessBesideFile { pid: vm.process.map_or(0, |process| process.pid) })
        }
        // A pause or resume of a VM that is gone cannot go on.
        (
            VmState::Running
            | VmState::Paused
            | VmState::Saving { .. }
            | VmState::HandingOver { .. }
            | VmState::ChangingVolumes { .. }
            | VmState::Registering,
            operation,
        ) if !lives => Plan::Ended(operation),
        // It was not handed over, so it is not: only the ledger's word hands it over.
        (VmState::Sending, operation) if !lives => Plan::Ended(operation),
        (VmState::Sending, Some(operation)) => {
            if operation.goal == Goal::Undo {
                Plan::Continue(begun_again(operation))
            } else {
                Plan::Undo(operation)
            }
        }
        (VmState::Sending, None) => Plan::TakeBack,
        // It was: forward only.
        (VmState::HandedOver, Some(operation)) => Plan::Continue(begun_again_but(operation, Effect::ConfirmArrival)),
        (VmState::HandedOver, None) => Plan::Rest,
        // A machine that is whole may be this host's by now: the other one knows. Whether it is whole, its VMM knows.
        // The jail is opened again: this agent has not seen it yet.
        (VmState::Arriving { .. }, Some(mut operation)) if lives => {
            let mut steps = operation.steps.iter_mut();
            if let Some(step) = steps.find(|step| step.effect == Effect::OpenNetwork) {
                step.state = StepState::Pending;
            }
            Plan::Continue(operation)
        }
        (VmState::Arriving { .. }, Some(operation)) if was_done(&operation, Effect::AwaitDecision) => {
            Plan::Ended(Some(operation))
        }
        (VmState::Arriving { .. }, Some(operation)) => Plan::Undo(operation),
        // The recorded process is the machine, and nobody has let the other one run: it is ended.
        (VmState::HandingOver { .. }, Some(operation)) if !was_done(&operation, Effect::MoveMachine) => {
            if operation.goal == Goal::Undo { Plan::Continue(begun_again(operation)) } else { Plan::Undo(operation) }
        }
        // The machine is in the recorded process for good: forward only.
        (VmState::HandingOver { .. }, Some(operation)) => Plan::Continue(operation),
        (
            VmState::SwappingOut { mode: SwapMode::Page }
            | VmState::SwappedOut { mode: SwapMode::Page }
            | VmState::Waking { mode: SwapMode::Page },
            operation,
        ) if !lives => Plan::Ended(operation),
        // Its file is the machine once it is kept: what is left is to end the process. Before that, the process is.
        (VmState::SwappingOut { mode: SwapMode::Hibernate }, Some(operation))
            if !was_done(&operation, Effect::KeepSealed) =>
        {
            if !lives {
                Plan::Ended(Some(operation))
            } else if operation.goal == Goal::Undo {
                Plan::Continue(begun_again(operation))
            } else {
                Plan::Undo(operation)
            }
        }
        (VmState::SwappingOut { mode: SwapMode::Hibernate }, Some(operation)) => Plan::Continue(operation),
        // The guest may have run since its file was discarded: it is not taken back to it.
        (VmState::Waking { mode: SwapMode::Hibernate }, Some(operation))
            if !lives && was_done(&operation, Effect::DiscardSealed) =>
        {
            Plan::Ended(Some(operation))
        }
        (VmState::SwappedOut { .. }, None) if lives == vm.is_paged() => Plan::Rest,
        // A launch whose VMM was there and is not any more: its end says why. Without one, start over.
        (VmState::Launching, Some(operation)) if !lives && was_started(&operation) => Plan::Ended(Some(operation)),
        // A saved machine becomes a bundle, whoever saved it; what is not saved is not waited for.
        (_, Some(operation)) if makes_a_bundle(operation.goal) && lives => {
            if was_done(&operation, Effect::SaveMachine) { Plan::Continue(operation) } else { Plan::Undo(operation) }
        }
        (_, Some(operation)) => {
            // Nothing of the guest is left: it is not begun again, and its directory may be gone.
            let over = was_done(&operation, Effect::EndVmm) || !lives && was_done(&operation, Effect::DiscardSealed);
            let mut operation = begun_again(operation);
            if ends(operation.goal) {
                // The guest was asked to power off by the agent before, which took at least as long as a restart.
                let asked = |effect| effect == Effect::ShutDownGuest && !lives;
                operation.steps.retain(|step| step.effect.is_cleaning() || !over && !asked(step.effect));
            }
            Plan::Continue(operation)
        }
        (VmState::Running | VmState::Paused, None) => Plan::Rest,
        // What was there to become a bundle is forgotten, whatever became of it.
        (state, None) if state.has_ended() && vm.spec.build.is_none() => Plan::Rest,
        (_, None) => Plan::Clean,
    }
}

const fn ends(goal: Goal) -> bool {
    matches!(goal, Goal::Stop | Goal::Remove)
}

/// Begun again, but for one that is done once and for all.
fn begun_again_but(operation: OperationRecord, once: Effect) -> OperationRecord {
    let was_done = was_done(&operation, once);
    let mut operation = begun_again(operation);
    for step in operation.steps.iter_mut().filter(|step| step.effect == once && was_done) {
        step.state = StepState::Done;
    }
    operation
}

fn begun_again(mut operation: OperationRecord) -> OperationRecord {
    for step in &mut operation.steps {
        step.state = StepState::Pending;
    }
    operation
}

/// Whether its VMM was there: also one that was kept ready, which the launch did not have to start.
fn was_started(operation: &OperationRecord) -> bool {
    let step = operation.steps.iter().find(|step| step.effect == Effect::StartVmm);
    step.is_none_or(|step| step.state == StepState::Done)
}

pub(super) fn was_done(operation: &OperationRecord, effect: Effect) -> bool {
    let step = operation.steps.iter().find(|step| step.effect == effect);
    step.is_some_and(|step| step.state == StepState::Done)
}

const fn makes_a_bundle(goal: Goal) -> bool {
    matches!(goal, Goal::Build | Goal::Snapshot)
}

/// Removes what earlier agents saved and no operation is going to make a bundle of. Before any VM saves anything.
pub(super) async fn sweep_saved<W: World>(shared: &Shared<W>, unfinished: &[OperationRecord]) {
    if let Err(error) = shared.world.bundles().sweep(still_to_commit(unfinished)).await {
        tracing::warn!(error = %crate::report::chain(&error), "cannot sweep what was saved by an earlier agent");
    }
}

/// The VMs whose machine is saved, with a bundle still to be made of it: [`plan`] continues these.
fn still_to_commit(unfinished: &[OperationRecord]) -> Vec<VmId> {
    let is_saved =
        |operation: &&OperationRecord| makes_a_bundle(operation.goal) && was_done(operation, Effect::SaveMachine);
    unfinished.iter().filter(is_saved).map(|operation| operation.vm.clone()).collect()
}

/// Ends operations whose VM's record is gone: the removal had done all but record its own end.
pub(super) async fn end_orphans<W: World>(
    shared: &Arc<Shared<W>>,
    operations: Vec<OperationRecord>,
) -> Result<(), LedgerError> {
    for mut operation in operations {
        operation.state =
            if operation.goal == Goal::Remove { OperationState::Succeeded } else { OperationState::Cancelled };
        operation.ended_at = Some(shared.world.clock().wall());
        let writes = vec![shared.operation_event(&operation), Write::Operation(Box::new(operation))];
        shared.commit(writes).await?;
    }
    Ok(())
}

/// Whether a VM that lives has other addresses than this fabric gives it: host number or prefix were changed under it.
pub(super) fn moved_fabric(config: &Config, vms: &[VmRecord]) -> Option<String> {
    let living = vms.iter().filter(|vm| vm.state.holds_resources());
    // Addresses of one that came from another host are that host's.
    let own = living.filter_map(|vm| Some((vm, vm.network.as_ref().filter(|network| network.home.is_none())?)));
    for (vm, network) in own {
        let (id, has) = (&vm.id, network.ipv6);
        let Some(fabric) = &config.fabric else {
            return Some(format!("{id} has the address {has}, but the configuration has no [fabric] any more"));
        };
        let NetworkRecord { session_network_id: session, local_id: local, ipv4, .. } = network;
        let parts = Parts { host: fabric.host, session: *session, local: *local };
        let wanted = (fabric.fabric.v6(parts), fabric.fabric.v4(parts).ok().flatten());
        if has != wanted.0 || ipv4.is_some() && *ipv4 != wanted.1 {
            return Some(format!(
                "{id} has the address {has}, this configuration gives it {}: restore host_number, ipv6_prefix and \
                 ipv4 of [fabric], or remove the VMs in sessions and restart the agent",
                wanted.0
            ));
        }
    }
    None
}

/// Time between two sweeps of what has run out.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// In the background: removes directories that no living VM's record knows, then drops what has run out, for good.
pub(super) async fn sweep<W: World>(shared: Arc<Shared<W>>) {
    match shared.world.disk().list().await {
        Ok(found) => {
            for id in found {
                if is_known(&shared, &id) {
                    continue;
                }
                tracing::warn!(vm = %id, "removing a directory that belongs to no living VM");
                if let Err(error) = remove_unknown(&shared, &id).await {
                    tracing::warn!(vm = %id, %error, "cannot remove it");
                }
            }
        }
        Err(error) => tracing::warn!(%error, "cannot list the VMs' directories"),
    }
    loop {
        super::network::sweep(&shared).await;
        let (now, wall) = (shared.steady(), shared.world.clock().wall());
        if let Err(error) = shared.world.records().with(move |store| store.sweep(now, wall)).await {
            tracing::warn!(error = %crate::report::chain(&error), "cannot sweep the ledger");
        }
        tokio::time::sleep(SWEEP_INTERVAL).await;
    }
}

/// Whether it is a VM that lives, or a machine that is kept ready to become one.
fn is_known<W: World>(shared: &Shared<W>, id: &VmId) -> bool {
    // In this order: one becomes the other.
    shared.pools.has(id) || shared.vms().get(id).is_some_and(|vm| vm.record.borrow().state.holds_resources())
}

async fn remove_unknown<W: World>(shared: &Arc<Shared<W>>, id: &VmId) -> std::io::Result<()> {
    if let Some(process) = shared.world.vmm().find_stray(id).await? {
        process.kill()?;
        process.ended().await;
    }
    // Looked at again: a launch may have been recorded meanwhile.
    if is_known(shared, id) {
        return Ok(());
    }
    shared.world.disk().remove(id).await
}

#[cfg(test)]
mod tests;
