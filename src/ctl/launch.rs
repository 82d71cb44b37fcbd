//! `hearth vm launch`: asks for a VM, shows the steps on its way up, and tells what it became.

use std::path::{Path, PathBuf};

use super::call::{Agent, CallError, PROMPT, advice_of};
use super::output::{Output, OutputError, note};
use super::progress;
use super::table::{milliseconds, plain};
use crate::api::types::{
    Disk, ErrorDetail, FlowLimits, LaunchMode, NetworkLimits, Operation, OperationState, RetryHint, SwapPolicy, Vm,
    VmLaunchRequest, VmState, VolumeWish, Wait,
};
use crate::cli::{LaunchArgs, PortWord, RateWord, VolumeWord, WaitWord};
use crate::ids::VmId;

/// Why a VM does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// It was accepted and then failed.
    #[error("launch {vm}: {}", .error.message)]
    Failed {
        /// The VM.
        vm: VmId,
        /// Why.
        error: Box<ErrorDetail>,
        /// The last lines of its console.
        console: Vec<String>,
    },
    /// Ctrl-C while waiting.
    #[error("not waiting for {vm} any more: it goes on launching")]
    Interrupted {
        /// The VM.
        vm: VmId,
    },
    /// A path that JSON cannot carry.
    #[error("the path {path:?} of a disk is not UTF-8")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// A relative path without a directory it is relative to.
    #[error("find the disk {path:?}")]
    Directory {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl LaunchError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Failed { error, console, .. } => {
                let console = (!console.is_empty()).then(|| {
                    let lines: Vec<_> = console.iter().map(|line| format!("  | {}", plain(line))).collect();
                    format!("the last lines of its console:\n{}", lines.join("\n"))
                });
                let parts: Vec<_> = advice_of(error).into_iter().chain(console).collect();
                (!parts.is_empty()).then(|| parts.join("\n"))
            }
            Self::Interrupted { vm } => {
                Some(format!("`hearth vm show {vm}` tells how far it is, `hearth vm rm {vm}` ends it"))
            }
            Self::Path { .. } | Self::Directory { .. } | Self::Output(_) => None,
        }
    }
}

pub(super) async fn run(agent: &Agent, out: Output, args: LaunchArgs) -> Result<(), LaunchError> {
    let wait = args.wait;
    let key = args.idempotency_key.clone();
    let request = request(args)?;
    let vm: Vm = agent.create("/v1/vms", &request, key.as_deref(), PROMPT).await?;
    let vm = if wait == WaitWord::None { vm } else { wait_for(agent, vm).await? };
    if vm.state == VmState::Running && !out.is_json() {
        let took = vm.timings.total_ms.map(milliseconds).unwrap_or_default();
        note(&format!("{} runs after {took}; try: hearth vm exec {} -- uname -a", called(&vm), handle(&vm)));
    }
    out.value(&vm, |vm| vm.id.to_string())?;
    Ok(())
}

fn wish(word: VolumeWord) -> VolumeWish {
    let VolumeWord { volume, read_only, mount } = word;
    VolumeWish { volume: volume.as_str().to_owned(), read_only, mount, iops: None, bytes_per_s: None }
}

fn request(args: LaunchArgs) -> Result<VmLaunchRequest, LaunchError> {
    let disks = args
        .disks
        .iter()
        .map(|disk| Ok(Disk { path: absolute(&disk.path)?, read_only: disk.read_only, shared: disk.shared }));
    let flow = |bytes: Option<RateWord>, packets: Option<RateWord>| FlowLimits {
        bytes_per_s: bytes.map(|word| word.per_s),
        burst_bytes: bytes.and_then(|word| word.burst),
        packets_per_s: packets.map(|word| word.per_s),
        burst_packets: packets.and_then(|word| word.burst),
    };
    let limits = NetworkLimits { rx: flow(args.rx_limit, args.rx_packets), tx: flow(args.tx_limit, args.tx_packets) };
    Ok(VmLaunchRequest {
        image: args.image,
        bundle: args.bundle.map(|bundle| bundle.as_str().to_owned()),
        mode: args.lazy.then_some(LaunchMode::Lazy),
        name: args.name,
        vcpus: args.vcpus,
        memory_mib: args.memory,
        disks: disks.collect::<Result<_, LaunchError>>()?,
        volumes: args.volumes.iter().map(|word| wish(word.clone())).collect(),
        spare_disks: args.spare_disks,
        network_limits: (limits != NetworkLimits::default()).then_some(limits),
        session: args.session.map(|session| session.as_str().to_owned()),
        addressing: args.addressing.map(Into::into),
        role: args.role,
        publish: args.publish.iter().map(PortWord::port).collect(),
        cluster: args.cluster.map(|cluster| cluster.as_str().to_owned()),
        executor_id: args.executor_id.map(|executor| executor.as_str().to_owned()),
        interfaces: args.interfaces,
        swap: args.swap.map(|mode| SwapPolicy { mode: mode.into(), ..SwapPolicy::default() }),
        // Waiting is done here, by looking at the operation, so that its steps can be shown.
        wait: Wait::None,
    })
}

/// The agent's working directory is another one.
fn absolute(path: &Path) -> Result<String, LaunchError> {
    let absolute =
        std::path::absolute(path).map_err(|source| LaunchError::Directory { path: path.to_owned(), source })?;
    absolute.into_os_string().into_string().map_err(|path| LaunchError::Path { path: path.into() })
}

async fn wait_for(agent: &Agent, vm: Vm) -> Result<Vm, LaunchError> {
    let path = format!("/v1/vms/{}", vm.id);
    let title = format!("launch {}", called(&vm));
    let mut now = vm.clone();
    let operation = loop {
        let Some(operation) = now.operation_id else { return Ok(now) };
        let operation = tokio::select! {
            operation = progress::follow(agent, &title, &operation) => operation?,
            _ = tokio::signal::ctrl_c() => return Err(LaunchError::Interrupted { vm: vm.id }),
        };
        if operation.state != OperationState::Succeeded {
            break operation;
        }
        now = agent.get(&path).await?;
        match (now.state, &now.cause) {
            // A VM of a cluster has another operation before it: it registers.
            (VmState::Registering, _) => {}
            (VmState::Failed, Some(cause)) => {
                let error = ErrorDetail {
                    code: cause.code.clone(),
                    message: cause.detail.clone(),
                    detail: None,
                    retry: RetryHint::Later,
                };
                return Err(LaunchError::Failed { vm: vm.id, error: Box::new(error), console: now.last_console_lines });
            }
            (_, _) => return Ok(now),
        }
    };
    // A launch that was undone may have left no VM to ask.
    let console = agent.get::<Vm>(&path).await.map(|vm| vm.last_console_lines).unwrap_or_default();
    Err(LaunchError::Failed { vm: vm.id, error: Box::new(reason(operation)), console })
}

fn reason(operation: Operation) -> ErrorDetail {
    operation.error.unwrap_or_else(|| ErrorDetail {
        code: "cancelled".to_owned(),
        message: "it was given up".to_owned(),
        detail: None,
        retry: RetryHint::Later,
    })
}

/// Name and id, for sentences.
pub(super) fn called(vm: &Vm) -> String {
    match &vm.name {
        Some(name) => format!("{name} ({})", vm.id),
        None => vm.id.to_string(),
    }
}

/// What to type for this VM.
fn handle(vm: &Vm) -> &str {
    vm.name.as_deref().unwrap_or_else(|| vm.id.as_str())
}
