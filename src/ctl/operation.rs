//! `hearth operation`.

use super::Error;
use super::call::Agent;
use super::output::Output;
use super::progress::words;
use super::table::{age, columns, milliseconds, or_dash, pairs, word};
use crate::api::types::{Operation, OperationList, StepState};
use crate::cli::OperationCommand;

pub(super) async fn run(agent: &Agent, out: Output, command: OperationCommand) -> Result<(), Error> {
    match command {
        OperationCommand::Ls => {
            let list: OperationList = agent.get("/v1/operations").await?;
            out.value(&list, |list| {
                columns(&["ID", "KIND", "OBJECT", "STATE", "STEP", "AGE"], list.operations.iter().map(row))
            })?;
        }
        OperationCommand::Show { operation } => {
            let operation: Operation = agent.get(&format!("/v1/operations/{}", operation.as_str())).await?;
            out.value(&operation, details)?;
        }
    }
    Ok(())
}

/// The step being taken, or the one that failed.
fn current(operation: &Operation) -> Option<&str> {
    let telling = |step: &&crate::api::types::Step| matches!(step.state, StepState::Running | StepState::Failed);
    operation.steps.iter().find(telling).map(|step| step.name.as_str())
}

fn row(operation: &Operation) -> Vec<String> {
    vec![
        operation.id.to_string(),
        operation.kind.clone(),
        operation.object.clone(),
        word(&operation.state),
        or_dash(current(operation)),
        age(operation.created_at),
    ]
}

fn details(operation: &Operation) -> String {
    let error = operation.error.as_ref();
    let mut text = pairs([
        ("id", Some(operation.id.to_string())),
        ("kind", Some(operation.kind.clone())),
        ("object", Some(operation.object.clone())),
        ("state", Some(word(&operation.state))),
        ("error", error.map(|error| error.message.clone())),
        ("error code", error.map(|error| error.code.clone())),
        ("what to do", error.and_then(|error| error.detail.clone())),
        ("created", Some(format!("{:.3}", operation.created_at))),
        ("finished", operation.finished_at.map(|at| format!("{at:.3}"))),
    ]);
    let steps = operation
        .steps
        .iter()
        .map(|step| vec![words(&step.name), word(&step.state), or_dash(step.took_ms.map(milliseconds).as_deref())]);
    text.push_str("\n\n");
    text.push_str(&columns(&["STEP", "STATE", "TOOK"], steps));
    text
}
