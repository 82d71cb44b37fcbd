//! `hearth cluster run` and `hearth cluster calculations`: programs that some member of a cluster runs.

use std::io::{self, Write};
use std::path::Path;

use super::call::{Agent, CallError, PROMPT};
use super::cluster::{ClusterError, bounded, path};
use super::output::{Output, OutputError};
use super::progress::shown;
use super::table::{age, columns, or_dash, pairs, word};
use super::{EXIT_DONE, EXIT_SIGNAL_BASE, EXIT_TIMED_OUT};
use crate::api::types::{
    Calculation, CalculationCreateRequest, CalculationList, CalculationState, Captured, ErrorDetail, RetryHint,
    decode_base64, encode_base64,
};
use crate::cli::{ClusterRunArgs, ReferenceWord};

/// Most bytes of standard input.
const INPUT_BYTES_MAX: u64 = 64 * 1024;

/// How long one question for the end of a calculation waits: less than the agent has to answer in.
const WAIT_MS: u32 = 20_000;

/// Runs a command in a member and says the exit code.
pub(super) async fn run(agent: &Agent, out: Output, args: ClusterRunArgs) -> Result<u8, ClusterError> {
    let stdin = args.stdin.then(|| bounded(Path::new("standard input"), INPUT_BYTES_MAX, || Ok(io::stdin().lock())));
    let request = CalculationCreateRequest {
        argv: args.command,
        env: args.env,
        stdin_base64: stdin.transpose()?.map(|bytes| encode_base64(&bytes)),
        timeout_s: args.timeout,
        executor_id: args.executor.map(|executor| executor.as_str().to_owned()),
        member: None,
    };
    let all = format!("{}/calculations", path(&args.cluster));
    let begun: Calculation = agent.create(&all, &request, args.idempotency_key.as_deref(), PROMPT).await?;
    if args.no_wait {
        out.value(&begun, |calculation| calculation.id.to_string())?;
        return Ok(EXIT_DONE);
    }
    let one = format!("{all}/{}?wait_ms={WAIT_MS}", begun.id);
    let title = format!("run in {}", args.cluster.as_str());
    let waiting = shown(&title, until_over(agent, &one));
    let ended = tokio::select! {
        ended = waiting => ended?,
        _ = tokio::signal::ctrl_c() => {
            let (cluster, calculation) = (args.cluster.as_str().to_owned(), begun.id.to_string());
            return Err(ClusterError::Interrupted { cluster, calculation });
        }
    };
    let code = exit_code(&ended);
    if out.is_json() {
        out.value(&ended, |_| String::new())?;
    } else {
        give(&mut io::stdout().lock(), ended.stdout.as_ref())?;
        give(&mut io::stderr().lock(), ended.stderr.as_ref())?;
    }
    code.ok_or_else(|| did_not_run(&ended))
}

async fn until_over(agent: &Agent, call: &str) -> Result<Calculation, CallError> {
    loop {
        let calculation: Calculation = agent.get(call).await?;
        if calculation.state.is_final() {
            return Ok(calculation);
        }
    }
}

/// The exit code that stands for how a calculation ended; nothing for one that did not run to an end of its own.
fn exit_code(ended: &Calculation) -> Option<u8> {
    match (ended.exit_code, ended.signal, ended.cause.as_deref()) {
        (Some(code), _, _) => Some(code),
        (None, Some(number), _) => Some(EXIT_SIGNAL_BASE.saturating_add(number)),
        (None, None, Some("timed_out")) => Some(EXIT_TIMED_OUT),
        (None, None, _) => None,
    }
}

fn did_not_run(ended: &Calculation) -> ClusterError {
    let (code, said, advice, retry) = match (ended.state, ended.cause.as_deref()) {
        (CalculationState::Lost, _) => ("lost", "it is lost", "run it again, if it may run twice", RetryHint::Later),
        (_, Some("nobody_took_it")) => (
            "nobody_took_it",
            "no member could take it in time",
            "`hearth cluster members` shows who has registered",
            RetryHint::Later,
        ),
        (_, Some("member_gone")) => (
            "member_gone",
            "its member ended before it began",
            "`hearth cluster members` shows who is left",
            RetryHint::WithChange,
        ),
        (_, _) => ("not_started", "it could not be started", "is the program in the guest?", RetryHint::WithChange),
    };
    let message = match &ended.detail {
        Some(detail) => format!("{said}: {detail}"),
        None => said.to_owned(),
    };
    let error = ErrorDetail { code: code.to_owned(), message, detail: Some(advice.to_owned()), retry };
    ClusterError::Calculation { calculation: ended.id.to_string(), error: Box::new(error) }
}

/// Writes a stream's exact bytes.
fn give(to: &mut impl Write, captured: Option<&Captured>) -> Result<(), OutputError> {
    let Some(captured) = captured else { return Ok(()) };
    let exact = captured.base64.as_deref().and_then(decode_base64);
    let bytes = exact.as_deref().unwrap_or(captured.text.as_bytes());
    to.write_all(bytes).and_then(|()| to.flush()).map_err(OutputError::Write)
}

/// Lists a cluster's calculations.
pub(super) async fn list(agent: &Agent, out: Output, cluster: &ReferenceWord) -> Result<(), ClusterError> {
    let list: CalculationList = agent.get(&format!("{}/calculations", path(cluster))).await?;
    Ok(out.value(&list, |list| {
        let header = ["ID", "STATE", "CAUSE", "EXIT", "EXECUTOR", "COMMAND", "AGE"];
        columns(&header, list.calculations.iter().map(row))
    })?)
}

/// Shows one calculation.
pub(super) async fn show(
    agent: &Agent,
    out: Output,
    cluster: &ReferenceWord,
    id: &ReferenceWord,
) -> Result<(), ClusterError> {
    let calculation: Calculation = agent.get(&format!("{}/calculations/{}", path(cluster), id.as_str())).await?;
    Ok(out.value(&calculation, details)?)
}

fn row(calculation: &Calculation) -> Vec<String> {
    vec![
        calculation.id.to_string(),
        word(&calculation.state),
        or_dash(calculation.cause.as_deref()),
        or_dash(calculation.exit_code.map(|code| code.to_string()).as_deref()),
        or_dash(calculation.executor_id.as_deref()),
        command(calculation),
        age(calculation.created_at),
    ]
}

/// Longest command in a table in characters.
const COMMAND_CHARS_MAX: usize = 60;

fn command(calculation: &Calculation) -> String {
    let whole = calculation.argv.join(" ");
    if whole.chars().count() <= COMMAND_CHARS_MAX {
        return whole;
    }
    whole.chars().take(COMMAND_CHARS_MAX).chain(['…']).collect()
}

fn details(calculation: &Calculation) -> String {
    let mut text = pairs([
        ("id", Some(calculation.id.to_string())),
        ("state", Some(word(&calculation.state))),
        ("cause", calculation.cause.clone()),
        ("detail", calculation.detail.clone()),
        ("exit code", calculation.exit_code.map(|code| code.to_string())),
        ("signal", calculation.signal.map(|number| number.to_string())),
        ("executor", calculation.executor_id.clone()),
        ("vm", calculation.member.as_ref().map(ToString::to_string)),
        ("command", Some(calculation.argv.join(" "))),
        ("created", Some(format!("{:.0} ({} ago)", calculation.created_at, age(calculation.created_at)))),
        ("started", calculation.started_at.map(|at| format!("{at:.3}"))),
        ("ended", calculation.ended_at.map(|at| format!("{at:.3}"))),
    ]);
    for (name, stream) in [("standard output", &calculation.stdout), ("standard error", &calculation.stderr)] {
        let Some(stream) = stream.as_ref().filter(|stream| !stream.text.is_empty()) else { continue };
        let cut = if stream.truncated { " (its beginning)" } else { "" };
        text.push_str(&format!("\n\n{name}{cut}:\n{}", super::table::plain(stream.text.trim_end())));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{CalculationId, ClusterId};

    #[test]
    fn the_exit_code_is_the_calculations_own() {
        let ended = |exit_code, signal, cause: Option<&str>, state| Calculation {
            id: CalculationId::from_random([1; 10]),
            cluster_id: ClusterId::from_random([2; 10]),
            state,
            cause: cause.map(str::to_owned),
            detail: None,
            member: None,
            executor_id: None,
            argv: vec!["true".to_owned()],
            env: Vec::new(),
            timeout_s: 1,
            exit_code,
            signal,
            stdout: None,
            stderr: None,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            started_at: None,
            ended_at: None,
        };
        use CalculationState::{Failed, Lost, Succeeded};
        assert_eq!(exit_code(&ended(Some(0), None, None, Succeeded)), Some(0));
        assert_eq!(exit_code(&ended(Some(3), None, Some("exit_code"), Failed)), Some(3));
        assert_eq!(exit_code(&ended(None, Some(9), Some("signal"), Failed)), Some(137));
        assert_eq!(exit_code(&ended(None, None, Some("timed_out"), Failed)), Some(124));
        for (cause, state) in [(None, Lost), (Some("member_gone"), Failed), (Some("not_started"), Failed)] {
            let ended = ended(None, None, cause, state);
            assert_eq!(exit_code(&ended), None);
            assert!(did_not_run(&ended).advice().is_some());
        }
    }
}
