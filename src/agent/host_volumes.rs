//! The real volume daemon: `hearth volumed`, started by the first who needs it, spoken to by its control socket.
//!
//! It is in a session of its own and outlives this agent; who finds its control socket answered, has it. Two cannot be
//! there: the daemon locks its directories.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::host_disk::VmDirs;
use super::volumes::{AskVolumesError, VolumeHost, VolumeProgress};
use crate::ids::VmId;
use crate::sys::file;
use crate::wire::volumed::{Answer, Ask, Hello, Listening, StartMessage, VERSION, Welcome, body_bytes, decode, encode};

/// How long a daemon may take until it answers: it reads the maps of all volumes first.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Time between two tries to connect to a daemon that begins.
const CONNECT_AGAIN: Duration = Duration::from_millis(10);

/// How long an answer may take that nothing has to be read for.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How long something that takes long may go without a sign of life.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// Size from which the daemon's log begins anew when the daemon does.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// The daemon of this host.
#[derive(Debug)]
pub struct HostVolumes {
    start: StartMessage,
    dirs: VmDirs,
    /// Where other hosts reach it.
    listens_at: Option<(IpAddr, u16)>,
    /// Held while one is started.
    starting: Mutex<()>,
}

impl HostVolumes {
    /// That of this store; its sockets and state are in `runtime`.
    pub(super) fn new(start: StartMessage, dirs: VmDirs, listens_at: Option<(IpAddr, u16)>) -> Self {
        Self { start, dirs, listens_at, starting: Mutex::default() }
    }

    fn control(&self) -> PathBuf {
        self.start.runtime.join("control.sock")
    }

    /// A connection to the daemon that is there, or to a new one.
    async fn connect(&self) -> Result<UnixStream, AskVolumesError> {
        if let Ok(line) = UnixStream::connect(self.control()).await {
            return greet(line).await;
        }
        let _starting = self.starting.lock().await;
        // Another one may have started it meanwhile.
        if let Ok(line) = UnixStream::connect(self.control()).await {
            return greet(line).await;
        }
        let mut child = self.spawn().await.map_err(AskVolumesError::Start)?;
        let line = self.reach(&mut child).await.map_err(AskVolumesError::Start)?;
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) if status.success() => tracing::info!("the volume daemon ended"),
                Ok(status) => tracing::warn!(%status, "the volume daemon ended"),
                Err(error) => tracing::warn!(%error, "wait for the volume daemon"),
            }
        });
        greet(line).await
    }

    async fn spawn(&self) -> io::Result<Child> {
        file::make_directories(&self.start.runtime)?;
        let log = self.start.runtime.join("volumed.log");
        if std::fs::metadata(&log).is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
            std::fs::rename(&log, log.with_extension("log.1"))?;
        }
        let mut command = Command::new("/proc/self/exe");
        command.arg0("hearth").arg("volumed").current_dir("/").process_group(0).kill_on_drop(false);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(file::append(&log)?);
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(&serde_json::to_vec(&self.start)?).await?;
        }
        Ok(child)
    }

    /// Waits until it answers, or has ended.
    async fn reach(&self, child: &mut Child) -> io::Result<UnixStream> {
        let began = Instant::now();
        loop {
            match UnixStream::connect(self.control()).await {
                Ok(line) => return Ok(line),
                Err(error) if began.elapsed() >= START_LIMIT => return Err(error),
                Err(_) => {}
            }
            tokio::select! {
                status = child.wait() => return Err(io::Error::other(format!("{}; {}", status?, self.last_words()))),
                () = sleep(CONNECT_AGAIN) => {}
            }
        }
    }

    /// What it said last, for whoever wonders why it ended.
    fn last_words(&self) -> String {
        let log = self.start.runtime.join("volumed.log");
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        format!("{last} (all of it is in {})", log.display())
    }
}

/// Says hello, and hears which version the other end speaks.
async fn greet(mut line: UnixStream) -> Result<UnixStream, AskVolumesError> {
    let greeting = async {
        send(&mut line, &Hello { version: VERSION }).await?;
        receive::<Welcome>(&mut line).await
    };
    let welcome =
        timeout(ANSWER_LIMIT, greeting).await.map_err(|_| AskVolumesError::TimedOut { limit: ANSWER_LIMIT })??;
    if welcome.version == VERSION { Ok(line) } else { Err(AskVolumesError::OtherVersion { speaks: welcome.version }) }
}

async fn send<M: Serialize>(line: &mut UnixStream, message: &M) -> Result<(), AskVolumesError> {
    let frame = encode(message).map_err(AskVolumesError::Frame)?;
    line.write_all(&frame).await.map_err(AskVolumesError::Socket)
}

async fn receive<M: DeserializeOwned>(line: &mut UnixStream) -> Result<M, AskVolumesError> {
    let mut head = [0; 4];
    line.read_exact(&mut head).await.map_err(AskVolumesError::Socket)?;
    let mut body = vec![0; body_bytes(head).map_err(AskVolumesError::Frame)?];
    line.read_exact(&mut body).await.map_err(AskVolumesError::Socket)?;
    decode(&body).map_err(AskVolumesError::Frame)
}

/// How long the daemon may be silent about this.
fn limit(ask: &Ask) -> Duration {
    match ask {
        Ask::Create { .. } | Ask::Digest { .. } | Ask::Changes { .. } | Ask::Snapshot { .. } | Ask::Remove { .. } => {
            SILENCE_LIMIT
        }
        Ask::List
        | Ask::Show { .. }
        | Ask::Resize { .. }
        | Ask::Snapshots
        | Ask::RemoveSnapshot { .. }
        | Ask::Acquire { .. }
        | Ask::Validate { .. }
        | Ask::Convert { .. }
        | Ask::Release { .. }
        | Ask::Leases { .. }
        | Ask::Attach { .. }
        | Ask::Detach { .. }
        | Ask::Attachments
        | Ask::Listen { .. }
        | Ask::End
        | Ask::EndIfIdle => ANSWER_LIMIT,
    }
}

impl VolumeHost for HostVolumes {
    async fn ask(&self, ask: Ask, progress: Option<VolumeProgress>) -> Result<Answer, AskVolumesError> {
        let mut line = self.connect().await?;
        let limit = limit(&ask);
        send(&mut line, &ask).await?;
        loop {
            let answer =
                timeout(limit, receive(&mut line)).await.map_err(|_| AskVolumesError::TimedOut { limit })??;
            if let Answer::Refused { refusal } = answer {
                return Err(AskVolumesError::Refused(refusal));
            }
            let Answer::Progress { done, total } = answer else { return Ok(answer) };
            if let Some(progress) = &progress {
                progress.send_replace((done, total));
            }
        }
    }

    fn is_used(&self) -> bool {
        self.start.store.is_dir()
    }

    async fn watch(&self) -> Result<(), AskVolumesError> {
        let mut line = self.connect().await?;
        let mut byte = [0];
        // It says nothing unasked: what comes is its end.
        match line.read(&mut byte).await {
            Ok(0) | Err(_) => Ok(()),
            Ok(_) => Err(AskVolumesError::Unexpected),
        }
    }

    fn socket(&self, vm: &VmId, slot: u8) -> PathBuf {
        self.dirs.path(vm).join(volume_socket(slot))
    }

    async fn listen(&self) -> Result<Option<Listening>, AskVolumesError> {
        let Some((address, port)) = self.listens_at else { return Ok(None) };
        if let Answer::Listening { listening } = self.ask(Ask::Listen { address, port }, None).await? {
            Ok(Some(listening))
        } else {
            Err(AskVolumesError::Unexpected)
        }
    }
}

/// The name of a slot's socket in the VM's directory.
pub(super) fn volume_socket(slot: u8) -> String {
    format!("volume-{slot}.sock")
}
