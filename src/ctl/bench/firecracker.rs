//! The anchor: Firecracker restoring a snapshot of the same kernel, initrd and memory size, on the same host and in the
//! same run. What is timed is what a launcher does: spawn the process, wait for its API socket, load the snapshot, have
//! it resumed. No jail, no network, no identity: those are not in its figures, and they are in ours.
//!
//! Its API is HTTP over a unix socket (`docs/snapshotting/snapshot-support.md` there).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::BenchError;
use super::summary::{Summary, milliseconds_since};
use crate::api::types::{Bundle, Host};
use crate::clock::{Clock, SystemClock};
use crate::ctl::call::Agent;

/// How long a guest may take to boot, and how long anything else may.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// Between two looks whether the socket is there: a launcher that wants it at once does the same.
const SOCKET_POLL: Duration = Duration::from_micros(200);

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

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> BenchError {
    move |source| BenchError::Firecracker { what, reason: source.to_string() }
}

/// A Firecracker process; killed when dropped.
struct Process {
    child: Child,
    api: Agent,
}

impl Process {
    /// Starts it and waits until its socket takes connections; gives also how long that took.
    async fn start(binary: &Path, socket: &Path, clock: &SystemClock) -> Result<(Self, f64), BenchError> {
        let _ = std::fs::remove_file(socket);
        let begun = clock.monotonic();
        let child = Command::new(binary)
            .arg("--api-sock")
            .arg(socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed("start it"))?;
        let waiting = async {
            while tokio::net::UnixStream::connect(socket).await.is_err() {
                tokio::time::sleep(SOCKET_POLL).await;
            }
        };
        tokio::time::timeout(CALL_LIMIT, waiting).await.map_err(|_| BenchError::Firecracker {
            what: "wait for its socket",
            reason: "it did not come".to_owned(),
        })?;
        Ok((Self { child, api: Agent::at(socket.to_owned()) }, milliseconds_since(clock, begun)))
    }

    async fn put(&self, path: &str, body: &Value) -> Result<(), BenchError> {
        Ok(self.api.put(path, body, CALL_LIMIT).await?)
    }

    /// Waits until the guest's console says something: its init runs then, as the kernel is quiet.
    async fn booted(&mut self) -> Result<(), BenchError> {
        let Some(console) = self.child.stdout.take() else { return Ok(()) };
        let mut lines = BufReader::new(console).lines();
        let waiting = async {
            while let Ok(Some(line)) = lines.next_line().await {
                if line.contains("hearth-init") {
                    break;
                }
            }
            // Whatever it still prints has a reader.
            tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        };
        tokio::time::timeout(BOOT_LIMIT, waiting)
            .await
            .map_err(|_| BenchError::Firecracker { what: "boot a guest", reason: "its agent did not start".to_owned() })
    }
}

/// Boots a guest, takes a snapshot, and restores it `count` times.
pub(super) async fn measure(binary: &Path, guest: &Guest, count: u32) -> Result<Anchor, BenchError> {
    let directory = Scratch::make()?;
    let clock = SystemClock::new();
    let version = Command::new(binary).arg("--version").output().await.map_err(failed("ask its version"))?;
    let version = String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_owned();
    let (state, memory) = (directory.0.join("state"), directory.0.join("memory"));
    take_snapshot(binary, guest, &directory.0.join("build.sock"), (&state, &memory), &clock).await?;
    let (mut spawns, mut loads) = (Vec::new(), Vec::new());
    for index in 0..count {
        let socket = directory.0.join(format!("{index}.sock"));
        let (process, spawn_ms) = Process::start(binary, &socket, &clock).await?;
        let begun = clock.monotonic();
        let load = json!({
            "snapshot_path": state,
            "mem_backend": { "backend_type": "File", "backend_path": memory },
            "resume_vm": true,
        });
        process.put("/snapshot/load", &load).await?;
        loads.push(milliseconds_since(&clock, begun));
        spawns.push(spawn_ms);
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

async fn take_snapshot(
    binary: &Path,
    guest: &Guest,
    socket: &Path,
    (state, memory): (&Path, &Path),
    clock: &SystemClock,
) -> Result<(), BenchError> {
    let (mut process, _) = Process::start(binary, socket, clock).await?;
    let mut boot = json!({ "kernel_image_path": guest.kernel, "boot_args": guest.command_line });
    if let Some(initrd) = &guest.initrd {
        boot["initrd_path"] = json!(initrd);
    }
    process.put("/boot-source", &boot).await?;
    process.put("/machine-config", &json!({ "vcpu_count": guest.vcpus, "mem_size_mib": guest.memory_mib })).await?;
    process.put("/actions", &json!({ "action_type": "InstanceStart" })).await?;
    process.booted().await?;
    process.api.patch("/vm", &json!({ "state": "Paused" }), CALL_LIMIT).await?;
    let snapshot = json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory });
    process.put("/snapshot/create", &snapshot).await
}

/// A directory that is removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> Result<Self, BenchError> {
        let path = std::env::temp_dir().join(format!("hearth-bench-{}", std::process::id()));
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
