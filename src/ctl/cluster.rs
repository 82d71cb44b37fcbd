//! `hearth cluster`: clusters and their members. What runs in them is in [`super::calculation`].

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::call::{Agent, CallError, PROMPT, advice_of};
use super::output::{Output, OutputError, note};
use super::progress::shown;
use super::table::{age, columns, or_dash, pairs, word};
use super::{EXIT_DONE, calculation};
use crate::api::types::{Cluster, ClusterCreateRequest, ClusterList, ClusterMember, ClusterMemberList, ErrorDetail};
use crate::cli::{ClusterCommand, ClusterCreateArgs, ClusterRemoveArgs, ReferenceWord};

/// Longest token file in bytes: what the agent takes, and a line feed.
const TOKEN_FILE_BYTES_MAX: u64 = 257;

/// What the agent allows a guest for powering itself off when nothing else is asked for.
const STOP_TIMEOUT_DEFAULT_MS: u32 = 10_000;

/// Rounds of removals a drain may take, eight VMs in each.
const DRAIN_ROUNDS: u32 = 8;

/// Why something was not done with a cluster.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The token or standard input cannot be read.
    #[error("read {what}")]
    Read {
        /// What.
        what: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is longer than the agent takes.
    #[error("{what} is longer than {max} bytes")]
    Long {
        /// What.
        what: PathBuf,
        /// The most there may be.
        max: u64,
    },
    /// The token is not text.
    #[error("the token in {path} is not 8 to 256 visible ASCII characters")]
    Token {
        /// The file.
        path: PathBuf,
    },
    /// The calculation did not run to its end.
    #[error("{calculation}: {}", .error.message)]
    Calculation {
        /// The calculation.
        calculation: String,
        /// Why.
        error: Box<ErrorDetail>,
    },
    /// Ctrl-C while waiting.
    #[error("not waiting for {calculation} any more: it goes on")]
    Interrupted {
        /// The cluster.
        cluster: String,
        /// The calculation.
        calculation: String,
    },
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl ClusterError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Calculation { error, .. } => advice_of(error),
            Self::Interrupted { cluster, calculation } => {
                Some(format!("`hearth cluster calculations {cluster} {calculation}` tells how far it is"))
            }
            Self::Read { .. } | Self::Long { .. } | Self::Token { .. } | Self::Output(_) => None,
        }
    }
}

/// What `cluster rm` did.
#[derive(Serialize)]
struct Removed {
    removed: Vec<String>,
}

/// Carries a command out and says the exit code.
pub(super) async fn run(agent: &Agent, out: Output, command: ClusterCommand) -> Result<u8, ClusterError> {
    match command {
        ClusterCommand::Create(args) => create(agent, out, args).await?,
        ClusterCommand::Ls => {
            let list: ClusterList = agent.get("/v1/clusters").await?;
            out.value(&list, |list| {
                let header = ["NAME", "ID", "STATE", "REGISTRAR", "VMS", "REGISTERED", "RUNNING", "AGE"];
                columns(&header, list.clusters.iter().map(row))
            })?;
        }
        ClusterCommand::Show { cluster } => {
            let cluster: Cluster = agent.get(&path(&cluster)).await?;
            out.value(&cluster, details)?;
        }
        ClusterCommand::Rm(args) => remove(agent, out, &args).await?,
        ClusterCommand::Members { cluster } => {
            let list: ClusterMemberList = agent.get(&format!("{}/members", path(&cluster))).await?;
            out.value(&list, |list| {
                let header = ["EXECUTOR", "VM", "ID", "STATE", "REGISTERED", "EPOCH", "ATTEMPT", "RUNNING"];
                columns(&header, list.members.iter().map(member))
            })?;
        }
        ClusterCommand::Run(args) => return calculation::run(agent, out, args).await,
        ClusterCommand::Calculations { cluster, calculation } => match calculation {
            Some(id) => calculation::show(agent, out, &cluster, &id).await?,
            None => calculation::list(agent, out, &cluster).await?,
        },
    }
    Ok(EXIT_DONE)
}

/// The path of a cluster.
pub(super) fn path(cluster: &ReferenceWord) -> String {
    format!("/v1/clusters/{}", cluster.as_str())
}

fn row(cluster: &Cluster) -> Vec<String> {
    vec![
        or_dash(cluster.name.as_deref()),
        cluster.id.to_string(),
        word(&cluster.state),
        cluster.endpoint.clone().unwrap_or_else(|| "agent".to_owned()),
        cluster.members.to_string(),
        cluster.registered.to_string(),
        cluster.calculations_running.to_string(),
        age(cluster.created_at),
    ]
}

fn details(cluster: &Cluster) -> String {
    pairs([
        ("name", cluster.name.clone()),
        ("id", Some(cluster.id.to_string())),
        ("state", Some(word(&cluster.state))),
        ("registrar", Some(cluster.endpoint.clone().unwrap_or_else(|| "this host's agent".to_owned()))),
        ("deadline", Some(format!("{} s", cluster.registration_deadline_s))),
        ("vms", Some(cluster.members.to_string())),
        ("registered", Some(cluster.registered.to_string())),
        ("running", Some(cluster.calculations_running.to_string())),
        ("created", Some(format!("{:.0} ({} ago)", cluster.created_at, age(cluster.created_at)))),
    ])
}

fn member(member: &ClusterMember) -> Vec<String> {
    vec![
        member.executor_id.clone(),
        or_dash(member.name.as_deref()),
        member.id.to_string(),
        word(&member.state),
        or_dash(member.registered_at.map(|at| format!("{at:.0}")).as_deref()),
        or_dash(member.epoch.map(|epoch| epoch.to_string()).as_deref()),
        member.attempt.to_string(),
        member.calculations_running.to_string(),
    ]
}

async fn create(agent: &Agent, out: Output, args: ClusterCreateArgs) -> Result<(), ClusterError> {
    let request = ClusterCreateRequest {
        name: args.name,
        token: args.token_file.as_deref().map(token).transpose()?,
        endpoint: args.endpoint.map(|endpoint| endpoint.to_string()),
        registration_deadline_s: args.deadline,
    };
    let cluster: Cluster = agent.create("/v1/clusters", &request, args.idempotency_key.as_deref(), PROMPT).await?;
    if !out.is_json() {
        note("guests are given its token by the agent; --json prints it, this once");
    }
    Ok(out.value(&cluster, |cluster| cluster.id.to_string())?)
}

fn token(path: &Path) -> Result<String, ClusterError> {
    let bytes = bounded(path, TOKEN_FILE_BYTES_MAX, || File::open(path))?;
    let text = String::from_utf8(bytes).map_err(|_| ClusterError::Token { path: path.to_owned() })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// All bytes of something, if they are not too many.
pub(super) fn bounded<R: Read>(
    what: &Path,
    max: u64,
    open: impl FnOnce() -> io::Result<R>,
) -> Result<Vec<u8>, ClusterError> {
    let failed = |source| ClusterError::Read { what: what.to_owned(), source };
    let mut bytes = Vec::new();
    open().map_err(failed)?.take(max + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > max {
        return Err(ClusterError::Long { what: what.to_owned(), max });
    }
    Ok(bytes)
}

async fn remove(agent: &Agent, out: Output, args: &ClusterRemoveArgs) -> Result<(), ClusterError> {
    let mut removed = Vec::new();
    for cluster in &args.clusters {
        let mut call = path(cluster);
        if args.drain {
            call.push_str("?drain=true");
        }
        if let Some(ms) = args.timeout {
            call.push_str(&format!("&timeout_ms={ms}"));
        }
        let title = format!("remove cluster {}", cluster.as_str());
        shown(&title, agent.delete(&call, patience(args))).await?;
        removed.push(cluster.as_str().to_owned());
    }
    Ok(out.value(&Removed { removed }, |done| {
        let lines: Vec<_> = done.removed.iter().map(|cluster| format!("cluster {cluster} is removed")).collect();
        lines.join("\n")
    })?)
}

/// How long to wait for the end of a cluster.
fn patience(args: &ClusterRemoveArgs) -> Duration {
    if !args.drain {
        return PROMPT;
    }
    let guest = Duration::from_millis(args.timeout.unwrap_or(STOP_TIMEOUT_DEFAULT_MS).into());
    (PROMPT + guest) * DRAIN_ROUNDS
}
