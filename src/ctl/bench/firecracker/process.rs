//! One Firecracker process: started, asked over its socket, ended. A process that dies is noticed at once, with what it
//! said on standard error.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use super::{BenchError, not_run};
use crate::clock::{Clock, SystemClock};
use crate::ctl::bench::summary::milliseconds_since;
use crate::ctl::call::{Agent, CallError};
use crate::ctl::table::plain;

/// How long a guest may take to boot, and how long anything else may.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(30);

/// Between two looks whether the socket is there: a launcher that wants it at once does the same.
const SOCKET_POLL: Duration = Duration::from_micros(200);

/// Longest line of a console that is looked at.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// What is shown of a process's last words, and of an answer that cannot be read.
const WORDS_BYTES_MAX: u64 = 1024;

/// What a guest prints once its init runs.
const BOOTED: &str = "hearth-init";

/// A Firecracker process; killed when dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    api: Agent,
    /// What it writes to standard error.
    errors: PathBuf,
}

impl Process {
    /// Starts it and waits until its socket takes connections; gives also how long that took.
    pub(super) async fn start(
        binary: &Path,
        scratch: &Path,
        id: &str,
        console: Stdio,
        clock: &SystemClock,
    ) -> Result<(Self, f64), BenchError> {
        const WHAT: &str = "wait for its socket";
        let socket = scratch.join(format!("{id}.sock"));
        let errors = scratch.join(format!("{id}.err"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&errors);
        let file = file.map_err(|source| BenchError::File { path: errors.clone(), source })?;
        let begun = clock.monotonic();
        let child = Command::new(binary)
            .arg("--api-sock")
            .arg(&socket)
            .args(["--id", id])
            .stdin(Stdio::null())
            .stdout(console)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .map_err(not_run("start it", binary))?;
        let mut process = Self { child, api: Agent::at(socket.clone()), errors };
        let waiting = async {
            while tokio::net::UnixStream::connect(&socket).await.is_err() {
                tokio::time::sleep(SOCKET_POLL).await;
            }
        };
        let came = tokio::select! {
            biased;
            came = tokio::time::timeout(CALL_LIMIT, waiting) => came,
            status = process.child.wait() => return Err(process.died(WHAT, status)),
        };
        if came.is_err() {
            let reason = format!("it did not come within {} s", CALL_LIMIT.as_secs());
            return Err(BenchError::Firecracker { what: WHAT, reason });
        }
        Ok((process, milliseconds_since(clock, begun)))
    }

    /// A call that has to succeed.
    pub(super) async fn call(&mut self, method: Method, path: &'static str, body: &Value) -> Result<(), BenchError> {
        let answered = self.api.foreign(method, path, body, CALL_LIMIT).await;
        let reason = match answered {
            Ok((status, _)) if status.is_success() => return Ok(()),
            Ok((status, body)) => refusal(status, &body),
            // It may have died of the call: its end says more than the connection's.
            Err(CallError::HungUp { .. } | CallError::NoAgent { .. }) => {
                match tokio::time::timeout(CALL_LIMIT, self.child.wait()).await {
                    Ok(status) => return Err(self.died(path, status)),
                    Err(_) => "it hung up".to_owned(),
                }
            }
            Err(CallError::Silent { seconds, .. }) => format!("it did not answer within {seconds} s"),
            Err(
                error @ (CallError::Forbidden { .. }
                | CallError::Refused { .. }
                | CallError::Unexpected { .. }
                | CallError::Malformed { .. }
                | CallError::TooLong { .. }),
            ) => error.to_string(),
        };
        Err(BenchError::Firecracker { what: path, reason })
    }

    /// Waits until the guest's console says that its init runs: the kernel is quiet.
    pub(super) async fn booted(&mut self) -> Result<(), BenchError> {
        const WHAT: &str = "boot a guest";
        let Some(console) = self.child.stdout.take() else { return Ok(()) };
        let mut console = BufReader::new(console);
        let waiting = async {
            let mut line = Vec::new();
            loop {
                line.clear();
                let read = (&mut console).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await;
                if read.unwrap_or(0) == 0 {
                    break false;
                }
                if String::from_utf8_lossy(&line).contains(BOOTED) {
                    break true;
                }
            }
        };
        match tokio::time::timeout(BOOT_LIMIT, waiting).await {
            Ok(true) => {
                // Whatever it still prints has a reader.
                tokio::spawn(async move { tokio::io::copy(&mut console, &mut tokio::io::sink()).await });
                Ok(())
            }
            Ok(false) => match tokio::time::timeout(CALL_LIMIT, self.child.wait()).await {
                Ok(status) => Err(self.died(WHAT, status)),
                Err(_) => {
                    let reason = format!("its console ended without {BOOTED:?}");
                    Err(BenchError::Firecracker { what: WHAT, reason })
                }
            },
            Err(_) => {
                let reason = format!("its console did not say {BOOTED:?} within {} s", BOOT_LIMIT.as_secs());
                Err(BenchError::Firecracker { what: WHAT, reason })
            }
        }
    }

    /// Kills it and waits until it is gone.
    pub(super) async fn end(mut self) {
        // Gone already is as good.
        let _ = self.child.kill().await;
    }

    /// How it ended, with its last words.
    fn died(&self, what: &'static str, status: std::io::Result<ExitStatus>) -> BenchError {
        let how = match status {
            Ok(status) => format!("it ended ({status})"),
            Err(error) => format!("it is gone ({error})"),
        };
        let words = last_words(&self.errors);
        let reason = if words.is_empty() { how } else { format!("{how}: {words}") };
        BenchError::Firecracker { what, reason }
    }
}

/// Why it refused: its answer is `{"fault_message": "..."}`.
fn refusal(status: StatusCode, body: &[u8]) -> String {
    let fault = serde_json::from_slice::<Value>(body).ok();
    let fault = fault.as_ref().and_then(|answer| answer.get("fault_message")?.as_str());
    match fault {
        Some(fault) => format!("{} ({})", plain(fault), status.as_u16()),
        None => {
            let said: String = String::from_utf8_lossy(body).chars().take(200).collect();
            format!("status {}: {:?}", status.as_u16(), said)
        }
    }
}

/// The end of what was written to standard error.
fn last_words(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(length.saturating_sub(WORDS_BYTES_MAX)))?;
        let mut words = Vec::new();
        file.take(WORDS_BYTES_MAX).read_to_end(&mut words)?;
        Ok::<_, std::io::Error>(words)
    };
    let words = read().unwrap_or_default();
    let lines: Vec<String> = String::from_utf8_lossy(&words).lines().map(plain).collect();
    lines[lines.len().saturating_sub(3)..].join(" | ")
}
