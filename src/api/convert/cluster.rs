//! Clusters and calculations.

use super::{session, state, timestamp};
use crate::agent::{self, CalculationCause, ClusterView};
use crate::api::types::{Calculation, CalculationState, Captured, Cluster, ClusterMember, ClusterState};

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A cluster, without its secret.
pub(in crate::api) fn cluster(view: &ClusterView) -> Cluster {
    let ClusterView { record, members, running } = view;
    let living = || members.iter().filter(|vm| vm.state.holds_resources());
    Cluster {
        id: record.id.clone(),
        name: record.name.clone(),
        state: match record.state {
            agent::ClusterState::Active => ClusterState::Active,
            agent::ClusterState::Draining => ClusterState::Draining,
        },
        token: None,
        endpoint: record.endpoint.map(|endpoint| endpoint.to_string()),
        registration_deadline_s: record.registration_deadline_s,
        members: count(living().count()),
        registered: count(living().filter(|vm| vm.registration.is_some()).count()),
        calculations_running: count(members.iter().filter_map(|vm| running.get(&vm.id)).sum()),
        created_at: timestamp(record.created_at),
    }
}

/// A VM as a member of its cluster.
pub(in crate::api) fn member(vm: &agent::VmRecord, view: &ClusterView) -> ClusterMember {
    let member = vm.spec.cluster.as_ref();
    ClusterMember {
        id: vm.id.clone(),
        name: vm.name.clone(),
        executor_id: member.map(|member| member.executor_id.clone()).unwrap_or_default(),
        state: state(&vm.state),
        attempt: member.map_or(1, |member| member.attempt),
        replaces: member.and_then(|member| member.replaces.clone()),
        registered_at: vm.registration.map(|registered| timestamp(registered.at)),
        epoch: vm.registration.map(|registered| registered.epoch),
        calculations_running: count(view.running.get(&vm.id).copied().unwrap_or(0)),
        addresses: session::addresses(vm),
    }
}

/// A calculation, with what it wrote when that is shown.
pub(in crate::api) fn calculation(
    record: &agent::CalculationRecord,
    output: Option<agent::CalculationOutput>,
) -> Calculation {
    let cause = match &record.state {
        agent::CalculationState::Failed { cause } => Some(cause),
        agent::CalculationState::Queued
        | agent::CalculationState::Running
        | agent::CalculationState::Succeeded
        | agent::CalculationState::Lost { .. } => None,
    };
    let detail = match (&record.state, cause) {
        (agent::CalculationState::Lost { detail }, _) | (_, Some(CalculationCause::NotStarted { detail })) => {
            Some(detail.clone())
        }
        (_, _) => None,
    };
    let exit_code = match (&record.state, cause) {
        (agent::CalculationState::Succeeded, _) => Some(0),
        (_, Some(CalculationCause::ExitCode { code })) => Some(*code),
        (_, _) => None,
    };
    let signal = match cause {
        Some(CalculationCause::Signal { number }) => Some(*number),
        Some(_) | None => None,
    };
    let output = output.filter(|_| record.state.is_over());
    let (stdout, stderr) = match output {
        Some(output) => (
            Some(Captured::new(output.stdout, record.stdout_truncated)),
            Some(Captured::new(output.stderr, record.stderr_truncated)),
        ),
        None => (None, None),
    };
    Calculation {
        id: record.id.clone(),
        cluster_id: record.cluster.clone(),
        state: match &record.state {
            agent::CalculationState::Queued => CalculationState::Queued,
            agent::CalculationState::Running => CalculationState::Running,
            agent::CalculationState::Succeeded => CalculationState::Succeeded,
            agent::CalculationState::Failed { .. } => CalculationState::Failed,
            agent::CalculationState::Lost { .. } => CalculationState::Lost,
        },
        cause: cause.map(|cause| cause.name().to_owned()),
        detail,
        member: record.member.clone(),
        executor_id: record.executor_id.clone(),
        argv: record.argv.clone(),
        env: record.env.clone(),
        timeout_s: record.timeout_s,
        exit_code,
        signal,
        stdout,
        stderr,
        created_at: timestamp(record.created_at),
        started_at: record.started_at.map(timestamp),
        ended_at: record.ended_at.map(timestamp),
    }
}
