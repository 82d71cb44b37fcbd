//! Migrations, as the API has them.

use std::time::Duration;

use super::{error_detail, ms, steps, timestamp};
use crate::agent;
use crate::api::types::{
    Compress, MigrateRequest, Migration, MigrationDirection, MigrationEstimate, MigrationProgress, MigrationState,
    Moved, OnNonconverge, PauseSteps, Uncompressed,
};

fn millis(micros: u64) -> f64 {
    Duration::from_micros(micros).as_secs_f64() * 1000.0
}

/// What moving a machine took.
pub(in crate::api) fn moved(moved: &agent::MoveRecord) -> Moved {
    let steps = moved.steps;
    Moved {
        held_ms: millis(moved.held_us),
        running_ms: millis(moved.running_us),
        rounds: moved.rounds,
        pages: moved.pages,
        zero_pages: moved.zero_pages,
        last_pages: moved.last_pages,
        bytes: moved.bytes,
        packets: moved.packets,
        network_ms: ms(moved.network_us),
        compress: compress(moved.compress),
        uncompressed: moved.uncompressed.map(uncompressed),
        packed_pages: moved.packed_pages,
        packed_bytes: moved.packed_bytes,
        steps: PauseSteps {
            stop_ms: millis(steps.stop_us),
            last_pages_ms: millis(steps.last_pages_us),
            ready_ms: millis(steps.ready_us),
            decide_ms: millis(steps.decide_us),
            start_ms: millis(steps.start_us),
        },
    }
}

const fn compress(compress: agent::Compress) -> Compress {
    match compress {
        agent::Compress::None => Compress::None,
        agent::Compress::Lz4 => Compress::Lz4,
    }
}

const fn uncompressed(why: agent::Uncompressed) -> Uncompressed {
    match why {
        agent::Uncompressed::OlderHost => Uncompressed::OlderHost,
        agent::Uncompressed::OlderVmm => Uncompressed::OlderVmm,
    }
}

/// What is asked for, with what the agent has for the rest.
pub(in crate::api) fn migrate_order(request: MigrateRequest) -> agent::MigrateOrder {
    let had = agent::MovePolicy::default();
    let policy = agent::MovePolicy {
        connections: request.connections.unwrap_or(had.connections),
        pause_ms_max: request.pause_ms_max.unwrap_or(had.pause_ms_max),
        rounds_max: request.rounds_max.unwrap_or(had.rounds_max),
        deadline_s: request.deadline_s.unwrap_or(had.deadline_s),
        rate_bytes_max: request.rate_bytes_max,
        throttle: request.throttle.unwrap_or(had.throttle),
        unconverged: match request.on_nonconverge {
            None => had.unconverged,
            Some(OnNonconverge::Force) => agent::WhenUnconverged::Force,
            Some(OnNonconverge::Abort) => agent::WhenUnconverged::Abort,
        },
        compress: match request.compress {
            None => had.compress,
            Some(Compress::None) => agent::Compress::None,
            Some(Compress::Lz4) => agent::Compress::Lz4,
        },
    };
    agent::MigrateOrder { to: request.to, policy, wait: request.wait.unwrap_or(true) }
}

fn progress(progress: &agent::MigrationProgress) -> MigrationProgress {
    MigrationProgress {
        rounds: progress.rounds,
        round_bytes: progress.round_bytes,
        round_sent_bytes: progress.round_sent_bytes,
        sent_bytes: progress.sent_bytes,
        rate_bytes: progress.rate_bytes,
        dirty_rate_bytes: progress.dirty_rate_bytes,
        expected_pause_ms: Duration::from_nanos(progress.pause_expected_ns).as_secs_f64() * 1000.0,
        vcpu_share: progress.vcpu_share,
    }
}

/// A migration.
pub(in crate::api) fn migration(view: &agent::MigrationView) -> Migration {
    let state = match view.state {
        agent::MigrationState::Preparing => MigrationState::Preparing,
        agent::MigrationState::Copying => MigrationState::Copying,
        agent::MigrationState::Critical => MigrationState::Critical,
        agent::MigrationState::HandedOver => MigrationState::HandedOver,
        agent::MigrationState::RollingBack => MigrationState::RollingBack,
        agent::MigrationState::Receiving => MigrationState::Receiving,
        agent::MigrationState::Ready => MigrationState::Ready,
        agent::MigrationState::Starting => MigrationState::Starting,
        agent::MigrationState::Completed => MigrationState::Completed,
        agent::MigrationState::Cancelled => MigrationState::Cancelled,
        agent::MigrationState::Failed => MigrationState::Failed,
    };
    let direction = match view.direction {
        agent::Direction::Out => MigrationDirection::Out,
        agent::Direction::In => MigrationDirection::In,
    };
    Migration {
        id: view.way.id.clone(),
        vm_id: view.vm.clone(),
        vm_name: view.vm_name.clone(),
        direction,
        peer: view.way.peer.clone(),
        state,
        compress: compress(view.way.policy.compress),
        progress: view.progress.as_ref().map(progress),
        pause_ms: ms(view.moved.and_then(|moved| moved.pause_us)),
        moved: view.moved.as_ref().map(moved),
        steps: steps(&view.steps, !view.state.is_final()),
        error: view.error.as_ref().map(error_detail),
        created_at: timestamp(view.created_at),
        finished_at: view.ended_at.map(timestamp),
    }
}

/// What a migration is likely to be like.
pub(in crate::api) fn estimate(estimate: agent::MigrationEstimate) -> MigrationEstimate {
    let micros = |rate: u64| (u128::from(estimate.copy_bytes) * 1_000_000).checked_div(u128::from(rate));
    let copy_us = estimate.rate_bytes.and_then(micros).and_then(|micros| u64::try_from(micros).ok());
    MigrationEstimate {
        to: estimate.to,
        has_base: estimate.has_base,
        memory_available_bytes: estimate.memory_available_bytes,
        copy_bytes: estimate.copy_bytes,
        compress: compress(estimate.compress),
        uncompressed: estimate.uncompressed.map(uncompressed),
        rate_bytes: estimate.rate_bytes,
        copy_ms: ms(copy_us),
        pause_ms: ms(estimate.pause_us),
        based_on: estimate.based_on,
    }
}
