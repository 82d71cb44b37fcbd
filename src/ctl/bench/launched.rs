//! What a bench launches, freezes and builds, and removes again: whatever happens, after a failure and after a signal.

use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;

use super::BenchError;
use super::pooled::Changed;
use super::summary::milliseconds_since;
use crate::api::types::{Bundle, BundleBuildRequest, Operation, OperationState, Vm, VmLaunchRequest, Wait};
use crate::cli::BenchSource;
use crate::clock::{Clock, SystemClock};
use crate::ctl::call::{Agent, PROMPT};
use crate::ctl::output::note;
use crate::ctl::progress::{Counted, follow};
use crate::ctl::signal::Signals;

/// How long one launch may take by itself, on hosts that emulate the guest's kernel.
const LAUNCH_LIMIT: Duration = Duration::from_secs(300);

/// How much longer for each that is launched beside it: two processors that emulate a guest's kernel bring some twelve
/// guests a minute from their first instruction to their identity, and have other work meanwhile.
const LAUNCH_LIMIT_EACH: Duration = Duration::from_secs(10);

/// How long removing may take for each of those that are removed at once, beside what one call may take.
const REMOVE_LIMIT_EACH: Duration = Duration::from_secs(1);

/// How long `count` launches at once may take.
pub(super) fn launch_limit(count: usize) -> Duration {
    LAUNCH_LIMIT.saturating_add(LAUNCH_LIMIT_EACH.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX)))
}

/// VMs and bundles of a bench, and how it makes them.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    pub(super) agent: &'a Agent,
    pub(super) clock: SystemClock,
    session: Option<String>,
    /// The agent of the host that VMs of this one may be at.
    elsewhere: Option<&'a Agent>,
    /// Words for the VMs that have to go.
    vms: Vec<String>,
    /// Words for the bundles that have to go, in the order they were made: a later one may build on an earlier one.
    bundles: Vec<String>,
    /// The pool it launches from, if it does.
    pub(super) pool: Option<Changed>,
    number: usize,
}

impl<'a> Bench<'a> {
    fn new(agent: &'a Agent, session: Option<String>) -> Self {
        let (vms, bundles) = (Vec::new(), Vec::new());
        Self { agent, clock: SystemClock::new(), session, elsewhere: None, vms, bundles, pool: None, number: 0 }
    }
}

impl Bench<'_> {
    /// A name that no other object of this bench has, and no other bench.
    pub(super) fn name(&mut self, what: &str) -> String {
        self.number += 1;
        format!("bench-{}-{what}{}", std::process::id(), self.number - 1)
    }

    /// Launches `count` VMs at once; they stay. Gives also how many milliseconds passed until the last of them ran.
    pub(super) async fn launch(
        &mut self,
        title: &str,
        count: usize,
        request: &VmLaunchRequest,
        limit: Duration,
    ) -> Result<(Vec<Vm>, f64), BenchError> {
        let begun = self.clock.monotonic();
        let mut calls = FuturesUnordered::new();
        for _ in 0..count {
            let name = self.name("");
            self.vms.push(name.clone());
            let (agent, session) = (self.agent, self.session.clone());
            let request = VmLaunchRequest { name: Some(name), session, wait: Wait::Running, ..request.clone() };
            calls.push(async move { agent.post::<Vm>("/v1/vms", &request, limit).await });
        }
        let mut shown = Counted::start(title, count);
        let mut vms = Vec::with_capacity(count);
        while let Some(vm) = calls.next().await {
            vms.push(vm?);
            shown.one_more();
        }
        Ok((vms, milliseconds_since(&self.clock, begun)))
    }

    /// From here on the bundle with this name goes in the end, whether it is there by now or not.
    pub(super) fn owes_bundle(&mut self, name: String) {
        self.bundles.push(name);
    }

    /// The bundle with this name is removed.
    pub(super) fn owes_no_bundle(&mut self, name: &str) {
        self.bundles.retain(|owed| owed != name);
    }

    /// Removes the VMs that were launched, all at once.
    pub(super) async fn clear(&mut self) {
        let (left, agent) = (std::mem::take(&mut self.vms), self.agent);
        let each = u32::try_from(left.len()).unwrap_or(u32::MAX);
        let limit = PROMPT.saturating_add(REMOVE_LIMIT_EACH.saturating_mul(each));
        let removals = left.iter().map(|name| async move {
            let removed = agent.delete(&format!("/v1/vms/{name}?timeout_ms=0"), limit).await;
            (name, removed)
        });
        for (name, removed) in join_all(removals).await {
            match removed {
                Ok(()) => {}
                // A launch that was cut short may have left no VM, and a build leaves none.
                Err(error) if error.code() == Some("not_found") => {}
                // Removed there, it is soon forgotten here.
                Err(error) => match self.elsewhere {
                    Some(other) if other.delete(&format!("/v1/vms/{name}?timeout_ms=0"), PROMPT).await.is_ok() => {}
                    Some(_) | None => note(&format!("{name} could not be removed: {error}")),
                },
            }
        }
    }

    /// Removes the bundles, the last one first. The VMs that ran from them or made them are gone by now.
    pub(super) async fn clear_bundles(&mut self) {
        while let Some(name) = self.bundles.pop() {
            match self.agent.delete(&format!("/v1/bundles/{name}"), PROMPT).await {
                Ok(()) => {}
                Err(error) if error.code() == Some("not_found") => {}
                Err(error) => note(&format!("the bundle {name} could not be removed: {error}")),
            }
        }
    }

    /// The bundle to launch from; one that has to be built is removed in the end.
    async fn source(&mut self, wanted: &BenchSource) -> Result<Bundle, BenchError> {
        if let Some(bundle) = &wanted.bundle {
            return Ok(self.agent.get(&format!("/v1/bundles/{}", bundle.as_str())).await?);
        }
        let name = self.name("source-");
        self.owes_bundle(name.clone());
        let request = BundleBuildRequest {
            image: wanted.image.clone(),
            name: Some(name),
            vcpus: Some(wanted.vcpus),
            memory_mib: Some(wanted.memory),
            ..BundleBuildRequest::default()
        };
        let operation: Operation = self.agent.post("/v1/bundles", &request, PROMPT).await?;
        // The VM that becomes the bundle: removing it gives the build up.
        self.vms.push(operation.object.clone());
        let operation = follow(self.agent, "build a bundle", &operation.id).await?;
        match operation.bundle_id.as_ref().filter(|_| operation.state == OperationState::Succeeded) {
            Some(id) => Ok(self.agent.get(&format!("/v1/bundles/{id}")).await?),
            None => {
                let message = operation.error.map_or_else(|| "it was given up".to_owned(), |error| error.message);
                Err(BenchError::Build { message })
            }
        }
    }
}

/// Has `work` done without one. Whatever happens, what was made for it is removed in the end, also if it is `elsewhere`.
pub(super) async fn without_bundle<T>(
    agent: &Agent,
    elsewhere: &Agent,
    session: Option<String>,
    work: impl AsyncFnOnce(&mut Bench<'_>) -> Result<T, BenchError>,
) -> Result<T, BenchError> {
    let mut signals = Signals::catch().map_err(BenchError::Signals)?;
    let mut bench = Bench { elsewhere: Some(elsewhere), ..Bench::new(agent, session) };
    let outcome = tokio::select! {
        outcome = work(&mut bench) => outcome,
        _ = signals.end() => Err(BenchError::Interrupted),
    };
    bench.clear().await;
    outcome
}

/// Has `work` done with a bundle. Whatever happens, what was made for it is removed in the end.
pub(super) async fn with_bundle<T>(
    agent: &Agent,
    wanted: &BenchSource,
    work: impl AsyncFnOnce(&mut Bench<'_>, &Bundle) -> Result<T, BenchError>,
) -> Result<(Bundle, T), BenchError> {
    let mut signals = Signals::catch().map_err(BenchError::Signals)?;
    let session = wanted.session.as_ref().map(|session| session.as_str().to_owned());
    let mut bench = Bench::new(agent, session);
    let working = async {
        let bundle = bench.source(wanted).await?;
        let worked = work(&mut bench, &bundle).await?;
        Ok((bundle, worked))
    };
    let outcome = tokio::select! {
        outcome = working => outcome,
        _ = signals.end() => Err(BenchError::Interrupted),
    };
    bench.clear().await;
    bench.leave_pool().await;
    bench.clear_bundles().await;
    outcome
}

/// A request for a VM of a bundle.
pub(super) fn from(bundle: &Bundle) -> VmLaunchRequest {
    VmLaunchRequest { bundle: Some(bundle.id.to_string()), ..VmLaunchRequest::default() }
}
