//! `hearth session`.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::Error;
use super::call::{Agent, CallError, PROMPT};
use super::output::{Output, OutputError};
use super::progress::shown;
use super::table::{age, columns, or_dash, pairs, word};
use crate::api::types::{
    Drops, Egress, EgressProtocol, EgressRule, Session, SessionCreateRequest, SessionList, SessionMember,
};
use crate::cli::{ReferenceWord, SessionCommand, SessionCreateArgs, SessionRemoveArgs};

/// What the agent takes.
const USER_DATA_BYTES_MAX: u64 = 16 * 1024;

/// What the agent allows a guest for powering itself off when nothing else is asked for.
const STOP_TIMEOUT_DEFAULT_MS: u32 = 10_000;

/// Rounds of removals a drain may take: a session has 62 VMs with IPv4, of which eight go at once.
const DRAIN_ROUNDS: u32 = 8;

/// Why a session could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The user data cannot be read.
    #[error("read the user data {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The user data is too long.
    #[error("the user data {path} is longer than {USER_DATA_BYTES_MAX} bytes")]
    Long {
        /// The file.
        path: PathBuf,
    },
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl SessionError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Long { .. } => Some("put it where VMs can fetch it, and its address here".to_owned()),
            Self::File { .. } | Self::Output(_) => None,
        }
    }
}

/// What `session rm` did.
#[derive(Serialize)]
struct Removed {
    removed: Vec<String>,
}

pub(super) async fn run(agent: &Agent, out: Output, command: SessionCommand) -> Result<(), Error> {
    match command {
        SessionCommand::Create(args) => create(agent, out, args).await?,
        SessionCommand::Ls => {
            let list: SessionList = agent.get("/v1/sessions").await?;
            out.value(&list, |list| {
                let header = ["NAME", "ID", "NETWORK ID", "STATE", "IPV4", "VMS", "DROPPED", "ENDS", "AGE"];
                columns(&header, list.sessions.iter().map(row))
            })?;
        }
        SessionCommand::Show { session } => {
            let session: Session = agent.get(&path(&session)).await?;
            out.value(&session, details)?;
        }
        SessionCommand::Rm(args) => remove(agent, out, &args).await?,
    }
    Ok(())
}

fn path(session: &ReferenceWord) -> String {
    format!("/v1/sessions/{}", session.as_str())
}

const fn total(drops: &Drops) -> u64 {
    let Drops { spoof, foreign_session, not_allowed, queue_full } = *drops;
    spoof.saturating_add(foreign_session).saturating_add(not_allowed).saturating_add(queue_full)
}

fn row(session: &Session) -> Vec<String> {
    vec![
        or_dash(session.name.as_deref()),
        session.id.to_string(),
        session.session_network_id.to_string(),
        word(&session.state),
        if session.ipv4 { "yes" } else { "no" }.to_owned(),
        session.members.len().to_string(),
        total(&session.drops).to_string(),
        or_dash(session.expires_at.map(|at| format!("{at:.0}")).as_deref()),
        age(session.created_at),
    ]
}

fn details(session: &Session) -> String {
    let mut text = pairs([
        ("name", session.name.clone()),
        ("id", Some(session.id.to_string())),
        ("network id", Some(format!("{} ({:#x})", session.session_network_id, session.session_network_id))),
        ("state", Some(word(&session.state))),
        ("ipv4", Some(if session.ipv4 { "yes" } else { "no" }.to_owned())),
        ("egress", Some(egress(&session.egress))),
        ("created", Some(format!("{:.0} ({} ago)", session.created_at, age(session.created_at)))),
        ("ends", session.expires_at.map(|at| format!("{at:.0}"))),
        ("dropped", Some(dropped(&session.drops))),
    ]);
    if session.members.is_empty() {
        text.push_str("\n\nno VMs");
    } else {
        let header = ["VM", "ID", "STATE", "ADDRESSES", "SPOOF", "FOREIGN", "NOT ALLOWED", "QUEUE FULL"];
        text.push_str("\n\n");
        text.push_str(&columns(&header, session.members.iter().map(member)));
    }
    text
}

fn member(member: &SessionMember) -> Vec<String> {
    vec![
        or_dash(member.name.as_deref()),
        member.id.to_string(),
        word(&member.state),
        if member.addresses.is_empty() { "-".to_owned() } else { member.addresses.join(",") },
        member.drops.spoof.to_string(),
        member.drops.foreign_session.to_string(),
        member.drops.not_allowed.to_string(),
        member.drops.queue_full.to_string(),
    ]
}

fn dropped(drops: &Drops) -> String {
    let Drops { spoof, foreign_session, not_allowed, queue_full } = drops;
    format!(
        "{spoof} spoofed, {foreign_session} of foreign sessions, {not_allowed} not allowed, {queue_full} to full queues"
    )
}

fn egress(egress: &Egress) -> String {
    if egress.allow.is_empty() {
        return "nothing".to_owned();
    }
    let rules: Vec<_> = egress.allow.iter().map(rule).collect();
    format!("{}{}", rules.join(", "), if egress.nat { " (by NAT)" } else { "" })
}

/// As on the command line.
fn rule(rule: &EgressRule) -> String {
    let ports = match rule.ports {
        Some((from, to)) if from == to => format!(":{from}"),
        Some((from, to)) => format!(":{from}-{to}"),
        None => String::new(),
    };
    let protocol = match rule.protocol {
        EgressProtocol::Any => String::new(),
        EgressProtocol::Tcp | EgressProtocol::Udp | EgressProtocol::Icmp => format!("/{}", word(&rule.protocol)),
    };
    format!("{}{ports}{protocol}", rule.cidr)
}

async fn create(agent: &Agent, out: Output, args: SessionCreateArgs) -> Result<(), SessionError> {
    let allow: Vec<EgressRule> = args.egress.iter().map(|word| word.rule()).collect();
    let request = SessionCreateRequest {
        session_network_id: args.id,
        ipv4: args.wants_ipv4(),
        egress: (!allow.is_empty()).then_some(Egress { nat: args.nat, allow }),
        ttl_s: args.ttl,
        user_data: args.user_data.as_deref().map(user_data).transpose()?,
        name: args.name,
    };
    let session: Session = agent.create("/v1/sessions", &request, args.idempotency_key.as_deref(), PROMPT).await?;
    out.value(&session, |session| session.id.to_string())?;
    Ok(())
}

fn user_data(path: &Path) -> Result<String, SessionError> {
    let failed = |source| SessionError::File { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(USER_DATA_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > USER_DATA_BYTES_MAX {
        return Err(SessionError::Long { path: path.to_owned() });
    }
    Ok(text)
}

async fn remove(agent: &Agent, out: Output, args: &SessionRemoveArgs) -> Result<(), SessionError> {
    let mut removed = Vec::new();
    for session in &args.sessions {
        let mut query = String::new();
        if args.drain {
            query.push_str("?drain=true");
        }
        if let Some(ms) = args.timeout {
            query.push_str(&format!("&timeout_ms={ms}"));
        }
        let call = format!("{}{query}", path(session));
        let title = format!("remove session {}", session.as_str());
        shown(&title, agent.delete(&call, patience(args))).await?;
        removed.push(session.as_str().to_owned());
    }
    out.value(&Removed { removed }, |done| {
        let lines: Vec<_> = done.removed.iter().map(|session| format!("session {session} is removed")).collect();
        lines.join("\n")
    })?;
    Ok(())
}

/// How long to wait for the end of a session.
fn patience(args: &SessionRemoveArgs) -> Duration {
    if !args.drain {
        return PROMPT;
    }
    let guest = Duration::from_millis(args.timeout.unwrap_or(STOP_TIMEOUT_DEFAULT_MS).into());
    (PROMPT + guest) * DRAIN_ROUNDS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::EgressWord;

    #[test]
    fn rules_are_shown_as_they_are_given() {
        for text in ["0.0.0.0/0", "2001:db8::/32:53/udp", "192.0.2.0/24:8000-8100/tcp", "::/0/icmp"] {
            let parsed: EgressWord = text.parse().unwrap();
            assert_eq!(rule(&parsed.rule()), text);
        }
    }
}
