//! `hearth bundle`, and `hearth vm snapshot`.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::Error;
use super::bundle_file;
use super::call::{Agent, CallError, PROMPT, advice_of};
use super::fetch;
use super::output::{Output, OutputError, note};
use super::progress::{follow, shown};
use super::table::{age, bytes, columns, milliseconds, or_dash, pairs, word};
use crate::api::types::{
    Bundle, BundleBuildRequest, BundleList, BundleTrust, BundleVerified, CompactRequest, ErrorDetail, Operation,
    OperationState, RetryHint, SnapshotRequest,
};
use crate::cli::{BundleBuildArgs, BundleCommand, BundleCompactArgs, SnapshotArgs};
use crate::signing::ParseKeyError;

/// How long a snapshot, a verification or a compaction may take: tens of GiB at a slow disk's speed.
pub(super) const DISK_LIMIT: Duration = Duration::from_secs(600);

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The build was accepted and then failed.
    #[error("build the bundle: {}", .error.message)]
    Failed {
        /// Why.
        error: Box<ErrorDetail>,
    },
    /// Ctrl-C while waiting.
    #[error("not waiting for the bundle any more: operation {operation} goes on")]
    Interrupted {
        /// The operation.
        operation: String,
    },
    /// A file cannot be read or written.
    #[error("{what} {}", path.display())]
    File {
        /// What was to be done with it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file holds no key.
    #[error("the key in {}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ParseKeyError,
    },
    /// What would be signed is something else.
    #[error("not signed: what the agent says of {bundle} is not the digest that its id is the start of")]
    OtherDigest {
        /// The bundle.
        bundle: String,
    },
    /// The agent stopped before the end.
    #[error("export {bundle}: it broke off before its end")]
    BrokeOff {
        /// The bundle.
        bundle: String,
        /// How.
        source: hyper::Error,
    },
    /// Somebody would see bytes, or would have to type them.
    #[error("a bundle is not for terminals: name a file, or use a pipe")]
    Terminal,
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl BundleError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Failed { error } => advice_of(error),
            Self::Interrupted { operation } => Some(format!("`hearth operation show {operation}` tells how far it is")),
            Self::BrokeOff { bundle, .. } => {
                Some(format!("`hearth bundle verify {bundle}` tells whether it is damaged; else see the agent's log"))
            }
            Self::File { .. } | Self::Key { .. } | Self::OtherDigest { .. } | Self::Terminal | Self::Output(_) => None,
        }
    }
}

/// A body without fields.
#[derive(Serialize)]
pub(super) struct Nothing {}

#[derive(Serialize)]
struct Removed<'a> {
    removed: Vec<&'a str>,
}

pub(super) async fn run(agent: &Agent, out: Output, command: BundleCommand) -> Result<(), Error> {
    match command {
        BundleCommand::Build(args) => build(agent, out, *args).await?,
        BundleCommand::Ls => list(agent, out).await?,
        BundleCommand::Show { bundle } => {
            let bundle: Bundle = agent.get(&format!("/v1/bundles/{}", bundle.as_str())).await?;
            out.value(&bundle, details)?;
        }
        BundleCommand::Verify { bundle } => {
            let path = format!("/v1/bundles/{}/verify", bundle.as_str());
            let call = agent.post(&path, &Nothing {}, DISK_LIMIT);
            let verified: BundleVerified = shown(&format!("verify {}", bundle.as_str()), call).await?;
            out.value(&verified, |it| {
                format!("{} is whole: {} chunks of memory, {} sections of state", it.id, it.chunks, it.sections)
            })?;
        }
        BundleCommand::Compact(args) => compact(agent, out, args).await?,
        BundleCommand::Export(args) => bundle_file::export(agent, out, args).await?,
        BundleCommand::Import(args) => bundle_file::import(agent, out, args).await?,
        BundleCommand::Fetch(args) => fetch::fetch(agent, out, args).await?,
        BundleCommand::Pin(args) => fetch::pin(agent, out, args.bundle.as_str(), true).await?,
        BundleCommand::Unpin(args) => fetch::pin(agent, out, args.bundle.as_str(), false).await?,
        BundleCommand::Key(args) => bundle_file::make_key(out, &args)?,
        BundleCommand::Sign(args) => bundle_file::sign(agent, out, args).await?,
        BundleCommand::Rm { bundles } => {
            for bundle in &bundles {
                agent.delete(&format!("/v1/bundles/{}", bundle.as_str()), PROMPT).await?;
            }
            let removed = bundles.iter().map(|bundle| bundle.as_str()).collect();
            out.value(&Removed { removed }, |done| format!("removed: {}", done.removed.join(", ")))?;
        }
    }
    Ok(())
}

async fn build(agent: &Agent, out: Output, args: BundleBuildArgs) -> Result<(), BundleError> {
    let request = BundleBuildRequest {
        image: args.image,
        name: args.name,
        vcpus: args.vcpus,
        memory_mib: args.memory,
        interfaces: args.interfaces,
        spare_disks: args.spare_disks,
        with_secrets: args.with_secrets,
        warmup: args.warmup,
        ready_marker: args.ready_marker,
        timeout_s: args.timeout.div_ceil(1000),
    };
    let key = args.idempotency_key.as_deref();
    let operation: Operation = agent.create("/v1/bundles", &request, key, PROMPT).await?;
    if args.no_wait {
        return Ok(out.value(&operation, |operation| operation.id.to_string())?);
    }
    let id = operation.id.to_string();
    let operation = tokio::select! {
        operation = follow(agent, "build the bundle", &operation.id) => operation?,
        _ = tokio::signal::ctrl_c() => return Err(BundleError::Interrupted { operation: id }),
    };
    tell(agent, out, operation).await
}

/// Takes a snapshot.
pub(super) async fn snapshot(agent: &Agent, out: Output, args: SnapshotArgs) -> Result<(), BundleError> {
    let request = SnapshotRequest {
        bundle_name: args.bundle_name,
        diff: args.diff,
        live: args.live,
        with_secrets: args.with_secrets,
    };
    let path = format!("/v1/vms/{}/snapshot", args.vm.as_str());
    let call = agent.post(&path, &request, DISK_LIMIT);
    let operation: Operation = shown(&format!("snapshot {}", args.vm.as_str()), call).await?;
    tell(agent, out, operation).await
}

/// Prints the bundle an operation made.
async fn tell(agent: &Agent, out: Output, operation: Operation) -> Result<(), BundleError> {
    let Some(id) = operation.bundle_id.as_ref().filter(|_| operation.state == OperationState::Succeeded) else {
        let given_up = || ErrorDetail {
            code: "cancelled".to_owned(),
            message: "it was given up".to_owned(),
            detail: None,
            retry: RetryHint::Later,
        };
        return Err(BundleError::Failed { error: Box::new(operation.error.unwrap_or_else(given_up)) });
    };
    let bundle: Bundle = agent.get(&format!("/v1/bundles/{id}")).await?;
    if !out.is_json() {
        let pause = operation.pause_ms.map(|ms| format!("; the VM stood still for {}", milliseconds(ms)));
        let rounds = operation.copy_rounds.map(|rounds| {
            let times = if rounds == 1 { "once".to_owned() } else { format!("in {rounds} rounds") };
            format!(" (most of its memory was copied {times} before)")
        });
        let unquiet = (operation.quiesced == Some(false)).then_some("; its file systems did not come to rest in time");
        note(&format!(
            "{} takes {}{}{}{}",
            called(&bundle),
            bytes(bundle.disk_bytes),
            pause.unwrap_or_default(),
            rounds.unwrap_or_default(),
            unquiet.unwrap_or_default()
        ));
    }
    Ok(out.value(&bundle, |bundle| bundle.id.to_string())?)
}

async fn compact(agent: &Agent, out: Output, args: BundleCompactArgs) -> Result<(), BundleError> {
    let path = format!("/v1/bundles/{}/compact", args.bundle.as_str());
    let request = CompactRequest { bundle_name: args.name };
    let call = agent.post(&path, &request, DISK_LIMIT);
    let bundle: Bundle = shown(&format!("compact {}", args.bundle.as_str()), call).await?;
    Ok(out.value(&bundle, |bundle| bundle.id.to_string())?)
}

async fn list(agent: &Agent, out: Output) -> Result<(), Error> {
    let list: BundleList = agent.get("/v1/bundles").await?;
    if !out.is_json() {
        for bundle in &list.unreadable {
            note(&format!("{} cannot be read: {}", bundle.id, bundle.reason));
        }
    }
    out.value(&list, |list| {
        let header = ["NAME", "ID", "IMAGE", "VCPUS", "MEMORY", "ON DISK", "BUILDS ON", "VMS", "AGE"];
        columns(&header, list.bundles.iter().map(row))
    })?;
    Ok(())
}

fn row(bundle: &Bundle) -> Vec<String> {
    vec![
        or_dash(bundle.name.as_deref()),
        bundle.id.to_string(),
        bundle.image.clone(),
        bundle.vcpus.to_string(),
        format!("{} MiB", bundle.memory_mib),
        bundle.fetch.as_ref().map_or_else(|| bytes(bundle.disk_bytes), fetch::progress),
        or_dash(bundle.parent.as_ref().map(|parent| parent.as_str())),
        bundle.vms.to_string(),
        age(bundle.created_at),
    ]
}

fn details(bundle: &Bundle) -> String {
    let host = &bundle.built_on;
    let mode = if host.kernel_mode_emulated { "emulated" } else { "native" };
    pairs([
        ("id", Some(bundle.id.to_string())),
        ("name", bundle.name.clone()),
        ("image", Some(bundle.image.clone())),
        ("vcpus", Some(bundle.vcpus.to_string())),
        ("memory", Some(format!("{} MiB", bundle.memory_mib))),
        ("interfaces", Some(bundle.interfaces.to_string())),
        ("spare disks", (bundle.spare_disks > 0).then(|| bundle.spare_disks.to_string())),
        ("disks", Some(bundle.disks.to_string())),
        ("on disk", Some(bytes(bundle.disk_bytes))),
        ("builds on", bundle.parent.as_ref().map(ToString::to_string)),
        ("vms", Some(bundle.vms.to_string())),
        ("made by", Some(word(&bundle.recipe))),
        ("warmed up by", bundle.warmup.clone()),
        ("ready marker", bundle.ready_marker.clone()),
        ("source VM", bundle.source_vm.as_ref().map(ToString::to_string)),
        ("host", Some(format!("{} ({}, kernel mode {mode}, TSC {} kHz)", host.name, host.provider, host.tsc_khz))),
        ("host kernel", Some(host.kernel_release.clone())),
        ("digest", Some(bundle.manifest_digest.clone())),
        ("signed by", signers(bundle)),
        ("trust", trust(bundle.trust)),
        ("is here", bundle.fetch.as_ref().map(fetch::progress)),
        ("comes from", bundle.fetch.as_ref().map(|fetch| fetch.from.clone())),
        (
            "came from",
            bundle.fetched.as_ref().filter(|_| bundle.fetch.is_none()).and_then(|fetched| fetched.from.clone()),
        ),
        ("last used", bundle.fetched.as_ref().map(|fetched| format!("{} ago", age(fetched.last_used_at)))),
        ("pinned", bundle.fetched.as_ref().map(|fetched| if fetched.pinned { "yes" } else { "no" }.to_owned())),
        ("trouble", bundle.fetch.as_ref().and_then(|fetch| fetch.trouble.clone())),
        ("created", Some(format!("{:.0} ({} ago)", bundle.created_at, age(bundle.created_at)))),
    ])
}

fn signers(bundle: &Bundle) -> Option<String> {
    let keys: Vec<String> = bundle.signed_by.iter().map(ToString::to_string).collect();
    (!keys.is_empty()).then(|| keys.join(" "))
}

fn trust(trust: BundleTrust) -> Option<String> {
    let text = match trust {
        BundleTrust::Unchecked => return None,
        BundleTrust::Signed => "signed by a key that this host trusts",
        BundleTrust::MadeHere => "made on this host",
        BundleTrust::Untrusted => "none: it is not launched here",
    };
    Some(text.to_owned())
}

/// Name and id, for sentences.
pub(super) fn called(bundle: &Bundle) -> String {
    match &bundle.name {
        Some(name) => format!("{name} ({})", bundle.id),
        None => bundle.id.to_string(),
    }
}
