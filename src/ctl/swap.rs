//! `hearth vm swap-out`, `wake`, `swap-policy`; `hearth host swap-decisions`.

use serde::Serialize;

use super::Error;
use super::call::{Agent, PROMPT};
use super::output::Output;
use super::progress::shown;
use super::table::{age, columns, word};
use super::vm::{done, path};
use crate::api::types::{SwapDecision, SwapDecisionList, SwapOutRequest, SwapPolicy, Vm};
use crate::cli::{ReferenceWord, SwapOutArgs, SwapPolicyArgs, whole_seconds};

#[derive(Serialize)]
struct Nothing {}

pub(super) async fn out(agent: &Agent, out: Output, args: SwapOutArgs) -> Result<(), Error> {
    let SwapOutArgs { vm, mode, wake_after } = args;
    let request = SwapOutRequest { mode: mode.into(), wake_after_s: wake_after.map(whole_seconds) };
    let to = format!("{}/swap-out", path(&vm));
    let vm: Vm = shown(&format!("swap out {}", vm.as_str()), agent.post(&to, &request, PROMPT)).await?;
    Ok(done(out, &vm)?)
}

pub(super) async fn wake(agent: &Agent, out: Output, vm: &ReferenceWord) -> Result<(), Error> {
    let to = format!("{}/wake", path(vm));
    let vm: Vm = shown(&format!("wake {}", vm.as_str()), agent.post(&to, &Nothing {}, PROMPT)).await?;
    Ok(done(out, &vm)?)
}

pub(super) async fn set_policy(agent: &Agent, out: Output, args: SwapPolicyArgs) -> Result<(), Error> {
    let SwapPolicyArgs { vm, policy } = args;
    let policy = SwapPolicy::from(policy);
    let vm: Vm = agent.put(&format!("{}/swap-policy", path(&vm)), &policy, PROMPT).await?;
    out.value(&vm, |vm| format!("swap policy of {}: {}", super::launch::called(vm), word(&vm.swap_policy.mode)))?;
    Ok(())
}

pub(super) async fn decisions(agent: &Agent, out: Output) -> Result<(), Error> {
    let list: SwapDecisionList = agent.get("/v1/swap-decisions").await?;
    out.value(&list, |list| {
        if list.decisions.is_empty() {
            return "nothing was decided about idle VMs yet".to_owned();
        }
        let header = ["AGE", "NEED", "AVAILABLE", "LOW", "PSI", "VM", "IDLE", "RESIDENT", "PRIORITY", "VERDICT"];
        columns(&header, list.decisions.iter().flat_map(rows))
    })?;
    Ok(())
}

fn rows(decision: &SwapDecision) -> Vec<Vec<String>> {
    let of_host = [
        age(decision.at),
        word(&decision.need),
        format!("{} MiB", decision.available_mib),
        format!("{} MiB", decision.low_free_mib),
        decision.psi_some_avg10.map_or_else(|| "-".to_owned(), |psi| format!("{psi:.1} %")),
    ];
    let row = |weighed: &crate::api::types::SwapWeighed| {
        let of_vm = [
            weighed.vm.to_string(),
            format!("{} s", weighed.idle_s),
            format!("{} MiB", weighed.resident_mib),
            weighed.priority.to_string(),
            word(&weighed.verdict),
        ];
        of_host.iter().cloned().chain(of_vm).collect()
    };
    decision.vms.iter().map(row).collect()
}
