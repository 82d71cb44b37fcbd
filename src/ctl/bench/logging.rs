//! What it costs a guest that KVM logs the pages it writes: how fast a program writes memory, as fast as it can, while its
//! VM is copied at some rate, and while it is not. The VM never moves: its copying is given up.
//!
//! A page costs the guest a fault when it is written first after it was protected, and as many pages are protected a
//! second as are copied. So the cost is one of the rate, not of the guest's size.

use std::time::Duration;

use serde::Serialize;

use super::BenchError;
use super::in_guest::Running;
use super::launched::Bench;
use super::seen::{Window, Written, rate_in};
use crate::api::types::{MigrateRequest, Migration, MigrationState, OnNonconverge, Vm};
use crate::clock::Clock;
use crate::ctl::call::PROMPT;

/// How long it is looked at without logging, and how long with it, at least.
const LOOK: Duration = Duration::from_secs(6);

/// Most attempts at being copied that long: a migration that gets nowhere ends by itself.
const ATTEMPTS_MAX: u32 = 12;

/// Between two looks at a migration.
const INTERVAL: Duration = Duration::from_millis(20);

/// What it costs.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Overhead {
    /// Most bytes a second that were copied.
    rate_bytes_max: u64,
    /// The memory that it wrote all the time.
    pub(super) buffer_mib: u64,
    /// Millions of bytes a second that it wrote before it was copied, and after that.
    pub(super) unlogged_mb_per_s: f64,
    /// While it was copied.
    pub(super) logged_mb_per_s: f64,
    /// The second over the first.
    pub(super) ratio: f64,
    /// How long it was copied, all in all.
    copied_ms: f64,
    /// Pages a second that were copied, and protected before.
    pub(super) pages_per_s: f64,
}

/// An empty JSON object.
#[derive(Serialize)]
struct Nothing {}

/// Copied for a while.
struct Copied {
    window: Window,
    bytes: u64,
}

impl Copied {
    #[expect(clippy::cast_precision_loss, reason = "some seconds")]
    fn took_ms(&self) -> f64 {
        (self.window.to_us - self.window.from_us) as f64 / 1000.0
    }
}

impl Bench<'_> {
    /// The wall clock, in microseconds.
    pub(super) fn wall_us(&self) -> u64 {
        self.clock.wall().0 / 1000
    }

    /// Measures it, with a program that writes so many MiB on a processor, and copying at this rate.
    pub(super) async fn overhead(
        &self,
        vm: &str,
        to: &str,
        (buffer_mib, cpu): (u64, u32),
        rate_bytes_max: u64,
    ) -> Result<Overhead, BenchError> {
        let writing = Running::rewrite(self.agent, vm, (buffer_mib, cpu), None).await?;
        let before = self.wait_unlogged().await;
        let (mut copied, mut took) = (Vec::new(), 0.0);
        while took < LOOK.as_secs_f64() * 1000.0 && copied.len() < ATTEMPTS_MAX as usize {
            let one = self.copied(vm, to, rate_bytes_max).await?;
            took += one.took_ms();
            copied.push(one);
        }
        let after = self.wait_unlogged().await;
        let lines = writing.written(self.agent, vm).await?;
        let too_short = || BenchError::NotCopied { vm: vm.to_owned(), reason: format!("{took:.0} ms in all") };
        let unlogged = [mean(&lines, &[before]), mean(&lines, &[after])];
        let [Some(before), Some(after)] = unlogged else { return Err(too_short()) };
        let windows: Vec<Window> = copied.iter().map(|one| one.window).collect();
        let logged_mb_per_s = mean(&lines, &windows).ok_or_else(too_short)?;
        let unlogged_mb_per_s = f64::midpoint(before, after);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let pages = copied.iter().map(|one| one.bytes).sum::<u64>() as f64 / 4096.0;
        Ok(Overhead {
            rate_bytes_max,
            buffer_mib,
            unlogged_mb_per_s,
            logged_mb_per_s,
            ratio: logged_mb_per_s / unlogged_mb_per_s,
            copied_ms: took,
            pages_per_s: pages / (took / 1000.0),
        })
    }

    async fn wait_unlogged(&self) -> Window {
        let from_us = self.wall_us();
        tokio::time::sleep(LOOK).await;
        Window { from_us, to_us: self.wall_us() }
    }

    /// Has it copied for a while, and the migration given up.
    async fn copied(&self, vm: &str, to: &str, rate_bytes_max: u64) -> Result<Copied, BenchError> {
        let request = MigrateRequest {
            to: to.to_owned(),
            wait: Some(false),
            pause_ms_max: Some(1),
            rate_bytes_max: Some(rate_bytes_max),
            throttle: Some(false),
            on_nonconverge: Some(OnNonconverge::Abort),
            ..MigrateRequest::default()
        };
        let begun: Vm = self.agent.post(&format!("/v1/vms/{vm}/migrate"), &request, PROMPT).await?;
        let id = begun.migration_id.map(|id| id.to_string()).unwrap_or_default();
        let path = format!("/v1/migrations/{id}");
        let mut copied: Option<Copied> = None;
        let ended = loop {
            let now: Migration = self.agent.get(&path).await?;
            let wall_us = self.wall_us();
            if now.state != MigrationState::Preparing && now.state != MigrationState::Copying {
                break now;
            }
            if let Some(progress) = now.progress.filter(|progress| progress.sent_bytes > 0) {
                let window =
                    copied.as_ref().map_or(Window { from_us: wall_us, to_us: wall_us }, |copied| copied.window);
                let window = Window { to_us: wall_us, ..window };
                copied = Some(Copied { window, bytes: progress.sent_bytes });
                if wall_us.saturating_sub(window.from_us) > u64::try_from(LOOK.as_micros()).unwrap_or(u64::MAX) {
                    let _: Migration = self.agent.post(&format!("{path}/cancel"), &Nothing {}, PROMPT).await?;
                    break self.agent.get(&path).await?;
                }
            }
            tokio::time::sleep(INTERVAL).await;
        };
        let ended = self.at_rest(&path, ended).await?;
        let reason = ended.error.map_or_else(|| format!("it is {:?}", ended.state), |error| error.message);
        match (ended.state, copied) {
            (MigrationState::Cancelled | MigrationState::Failed, Some(copied)) => Ok(copied),
            (_, _) => Err(BenchError::NotCopied { vm: vm.to_owned(), reason }),
        }
    }

    /// The migration when nothing more happens.
    async fn at_rest(&self, path: &str, mut migration: Migration) -> Result<Migration, BenchError> {
        while !migration.state.is_final() {
            tokio::time::sleep(INTERVAL).await;
            migration = self.agent.get(path).await?;
        }
        Ok(migration)
    }
}

/// The rate over several times, each weighted by how long it was.
fn mean(lines: &[Written], windows: &[Window]) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "some seconds")]
    let weighted = |window: &Window| {
        let weight = (window.to_us - window.from_us) as f64;
        rate_in(lines, *window).map(|rate| (rate * weight, weight))
    };
    let (sum, weights) =
        windows.iter().filter_map(weighted).fold((0.0, 0.0), |all, one| (all.0 + one.0, all.1 + one.1));
    (weights > 0.0).then(|| sum / weights)
}

/// In words.
pub(super) fn told(overhead: &Overhead) -> String {
    format!(
        "a guest that writes {} MiB as fast as it can: {:.0} MB/s, and {:.0} MB/s while {:.0} pages a second are logged \
         and copied: {:.1} % of it",
        overhead.buffer_mib,
        overhead.unlogged_mb_per_s,
        overhead.logged_mb_per_s,
        overhead.pages_per_s,
        overhead.ratio * 100.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longer_times_weigh_more() {
        let line = |unix_us, bytes| Written { unix_us, bytes, wrong: 0 };
        let lines = [line(0, 0), line(100, 1000), line(200, 2000), line(300, 2000), line(700, 2000)];
        let (fast, slow) = (Window { from_us: 0, to_us: 200 }, Window { from_us: 200, to_us: 800 });
        assert_eq!(mean(&lines, &[fast, slow]), Some(2.5));
        assert_eq!(mean(&lines, &[Window { from_us: 800, to_us: 900 }]), None);
    }
}
