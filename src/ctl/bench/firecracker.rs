//! The anchor: Firecracker restoring a snapshot of the same kernel, initrd and memory size, on the same host and in the
//! same run. What is timed is what a launcher does: spawn the process, wait for its API socket, load the snapshot, have
//! it resumed. No jail, no network, no identity: those are not in its figures, and they are in ours.
//!
//! Its API is HTTP over a unix socket (`docs/snapshotting/snapshot-support.md` there).

use std::path::{Path, PathBuf};
use std::process::Stdio;

use hyper::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::process::Command;

use super::BenchError;
use super::summary::{Summary, milliseconds_since};
use crate::api::types::{Bundle, Host};
use crate::clock::{Clock, SystemClock};
use crate::ctl::table::plain;
use process::{CALL_LIMIT, Process};

mod process;

/// What it took.
#[derive(Debug, Serialize)]
pub(super) struct Anchor {
    version: String,
    /// Start of the process → its API socket takes a connection.
    spawn_ms: Summary,
    /// Call to load the snapshot and resume → its answer.
    load_ms: Summary,
    /// Both together.
    resumed_ms: Summary,
}

impl Anchor {
    /// For a table.
    pub(super) fn rows(&self) -> [(&'static str, &Summary); 3] {
        [("spawn", &self.spawn_ms), ("load and resume", &self.load_ms), ("resumed", &self.resumed_ms)]
    }
}

/// The guest to snapshot.
#[derive(Debug)]
pub(super) struct Guest {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    command_line: String,
    vcpus: u32,
    memory_mib: u64,
}

/// What of an image's description matters here.
#[derive(Deserialize)]
struct Description {
    kernel: String,
    initrd: Option<String>,
    #[serde(default)]
    command_line: String,
}

impl Guest {
    /// The guest a bundle was made of; its image lies in the agent's state directory, or in `images`.
    pub(super) fn of(host: &Host, bundle: &Bundle, images: Option<&Path>) -> Result<Self, BenchError> {
        let directory = images.map_or_else(|| Path::new(&host.state_dir).join("images"), Path::to_owned);
        let directory = directory.join(&bundle.image);
        let path = directory.join("image.json");
        let text = std::fs::read(&path).map_err(|source| BenchError::File { path: path.clone(), source })?;
        let image: Description =
            serde_json::from_slice(&text).map_err(|error| BenchError::File { path, source: error.into() })?;
        let additions = host.probe.as_ref().and_then(|probe| probe.get("command_line_additions")?.as_str());
        Ok(Self {
            kernel: directory.join(image.kernel),
            initrd: image.initrd.map(|initrd| directory.join(initrd)),
            command_line: format!("console=ttyS0 {} {}", additions.unwrap_or_default(), image.command_line),
            vcpus: bundle.vcpus,
            memory_mib: bundle.memory_mib,
        })
    }
}

fn not_run(what: &'static str, binary: &Path) -> impl Fn(std::io::Error) -> BenchError {
    move |source| BenchError::Firecracker { what, reason: format!("run {}: {source}", binary.display()) }
}

/// Boots a guest, takes a snapshot, and restores it `count` times.
pub(super) async fn measure(binary: &Path, guest: &Guest, count: u32) -> Result<Anchor, BenchError> {
    let scratch = Scratch::make()?;
    let clock = SystemClock::new();
    let version = version(binary).await?;
    let (state, memory) = (scratch.0.join("state"), scratch.0.join("memory"));
    take_snapshot(binary, guest, &scratch.0, (&state, &memory), &clock).await?;
    let (mut spawns, mut loads) = (Vec::new(), Vec::new());
    for index in 0..count {
        let (mut process, spawn_ms) =
            Process::start(binary, &scratch.0, &format!("restore-{index}"), Stdio::null(), &clock).await?;
        let begun = clock.monotonic();
        let load = json!({
            "snapshot_path": state,
            "mem_backend": { "backend_type": "File", "backend_path": memory },
            "resume_vm": true,
        });
        process.call(Method::PUT, "/snapshot/load", &load).await?;
        loads.push(milliseconds_since(&clock, begun));
        spawns.push(spawn_ms);
        // Its memory is given back before the next one is timed.
        process.end().await;
    }
    let totals: Vec<f64> = spawns.iter().zip(&loads).map(|(spawn, load)| spawn + load).collect();
    let none = || BenchError::Firecracker { what: "restore", reason: "nothing was measured".to_owned() };
    Ok(Anchor {
        version,
        spawn_ms: Summary::of(spawns).ok_or_else(none)?,
        load_ms: Summary::of(loads).ok_or_else(none)?,
        resumed_ms: Summary::of(totals).ok_or_else(none)?,
    })
}

async fn version(binary: &Path) -> Result<String, BenchError> {
    const WHAT: &str = "ask its version";
    let mut command = Command::new(binary);
    command.arg("--version").stdin(Stdio::null()).kill_on_drop(true);
    let asked = match tokio::time::timeout(CALL_LIMIT, command.output()).await {
        Ok(asked) => asked.map_err(not_run(WHAT, binary))?,
        Err(_) => {
            let reason = format!("it did not answer within {} s", CALL_LIMIT.as_secs());
            return Err(BenchError::Firecracker { what: WHAT, reason });
        }
    };
    if !asked.status.success() {
        let said = plain(String::from_utf8_lossy(&asked.stderr).trim());
        return Err(BenchError::Firecracker { what: WHAT, reason: format!("{}: {said}", asked.status) });
    }
    Ok(plain(String::from_utf8_lossy(&asked.stdout).lines().next().unwrap_or_default()))
}

async fn take_snapshot(
    binary: &Path,
    guest: &Guest,
    scratch: &Path,
    (state, memory): (&Path, &Path),
    clock: &SystemClock,
) -> Result<(), BenchError> {
    let (mut process, _) = Process::start(binary, scratch, "build", Stdio::piped(), clock).await?;
    let mut boot = json!({ "kernel_image_path": guest.kernel, "boot_args": guest.command_line });
    if let Some(initrd) = &guest.initrd {
        boot["initrd_path"] = json!(initrd);
    }
    process.call(Method::PUT, "/boot-source", &boot).await?;
    let machine = json!({ "vcpu_count": guest.vcpus, "mem_size_mib": guest.memory_mib });
    process.call(Method::PUT, "/machine-config", &machine).await?;
    process.call(Method::PUT, "/actions", &json!({ "action_type": "InstanceStart" })).await?;
    process.booted().await?;
    process.call(Method::PATCH, "/vm", &json!({ "state": "Paused" })).await?;
    let snapshot = json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory });
    process.call(Method::PUT, "/snapshot/create", &snapshot).await?;
    process.end().await;
    Ok(())
}

/// A directory that is removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> Result<Self, BenchError> {
        let path = std::env::temp_dir().join(format!("hearth-bench-{}", std::process::id()));
        // What lies there was left by a process that was killed and had this number.
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).map_err(|source| BenchError::File { path: path.clone(), source })?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays lies in the directory for temporary files.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
