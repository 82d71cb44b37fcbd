//! `hearth agent --drain`, where an agent runs: it stops its VMs and ends, and this shows how far it is.

use std::collections::VecDeque;

use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::call::{Agent, CallError};
use super::output::{Output, OutputError, note};
use super::progress::Counted;
use super::signal::Signals;
use crate::api::types::{Drain, DrainRequest};

/// Longest line of the answer: names of thousands of VMs fit.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Why a host is not drained.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The answer broke off.
    #[error("the agent hung up before it said that it was done")]
    Broken,
    /// Some VMs did not stop.
    #[error("the agent ends, and these VMs did not stop: {}", .left.join(", "))]
    Left {
        /// Names or ids.
        left: Vec<String>,
    },
    /// Ctrl-C.
    #[error("not waiting any more: the agent goes on draining, and ends then")]
    Interrupted,
    /// Signals could not be caught.
    #[error("catch signals")]
    Signals(#[source] std::io::Error),
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl DrainError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Broken => Some("look at the agent's log: VMs it did not stop run on".to_owned()),
            Self::Left { .. } => Some("start the agent again: it finds them; `hearth vm rm` tries anew".to_owned()),
            Self::Interrupted | Self::Signals(_) | Self::Output(_) => None,
        }
    }
}

pub(super) async fn run(agent: &Agent, out: Output) -> Result<(), DrainError> {
    let mut signals = Signals::catch().map_err(DrainError::Signals)?;
    let drained = tokio::select! {
        drained = follow(agent) => drained?,
        _ = signals.end() => return Err(DrainError::Interrupted),
    };
    if out.is_json() {
        out.value(&drained, |_| String::new())?;
    } else if drained.left.is_empty() {
        note(&format!("drained: {} VMs have stopped, and the agent ends", drained.stopped));
    }
    if drained.left.is_empty() { Ok(()) } else { Err(DrainError::Left { left: drained.left }) }
}

/// The last line of the answer.
async fn follow(agent: &Agent) -> Result<Drain, DrainError> {
    let mut lines = Lines::of(agent.post_stream("/v1/drain", &DrainRequest::default()).await?);
    let mut shown: Option<Counted> = None;
    while let Some(drain) = lines.next().await {
        if drain.done {
            return Ok(drain);
        }
        let count = usize::try_from(drain.vms).unwrap_or(usize::MAX);
        let done = usize::try_from(drain.stopped).unwrap_or(usize::MAX);
        match &mut shown {
            Some(shown) => shown.set(done, count),
            None => shown = Some(Counted::start("stopping VMs", count)),
        }
    }
    Err(DrainError::Broken)
}

/// Lines of a body.
struct Lines {
    body: Incoming,
    bytes: VecDeque<u8>,
}

impl Lines {
    fn of(body: Incoming) -> Self {
        Self { body, bytes: VecDeque::new() }
    }

    async fn next(&mut self) -> Option<Drain> {
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                return serde_json::from_slice(&line).ok();
            }
            let data = self.body.frame().await?.ok()?.into_data().ok()?;
            self.bytes.extend(&data);
            if self.bytes.len() > LINE_BYTES_MAX {
                return None;
            }
        }
    }
}
