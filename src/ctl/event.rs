//! `hearth events`: the host's history, line by line as it comes.

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::Serialize;

use super::call::{Agent, CallError};
use super::output::{Output, OutputError};
use super::table::plain;
use crate::api::types::Event;
use crate::cli::EventsArgs;

/// What `events --json` prints without `--follow`.
#[derive(Serialize)]
struct EventList {
    events: Vec<Event>,
}

/// Longest line of the answer in bytes.
const LINE_BYTES_MAX: usize = 1 << 20;

/// Why events could not be shown.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The connection broke.
    #[error("read events")]
    Read(#[source] hyper::Error),
    /// A line is not an event.
    #[error("read events: a line is not an event")]
    Line(#[source] serde_json::Error),
    /// A line has no end in sight.
    #[error("read events: a line is longer than {LINE_BYTES_MAX} bytes")]
    Long,
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl EventsError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Read(_) => Some("the agent may have been restarted; events are kept: ask again".to_owned()),
            Self::Line(_) | Self::Long | Self::Output(_) => None,
        }
    }
}

pub(super) async fn run(agent: &Agent, out: Output, args: EventsArgs) -> Result<(), EventsError> {
    let path = format!("/v1/events?since={}&follow={}", args.since, args.follow);
    let mut lines = Lines { body: agent.get_stream(&path).await?, buffer: BytesMut::new() };
    let mut kept = EventList { events: Vec::new() };
    while let Some(line) = lines.next().await? {
        let event: Event = serde_json::from_slice(&line).map_err(EventsError::Line)?;
        if out.is_json() && !args.follow {
            kept.events.push(event);
        } else {
            out.value(&event, human)?;
        }
    }
    if out.is_json() && !args.follow {
        out.value(&kept, |_| String::new())?;
    }
    Ok(())
}

fn human(event: &Event) -> String {
    let detail = if event.detail.is_null() { String::new() } else { event.detail.to_string() };
    plain(&format!("{:>6}  {:.3}  {:<18} {:<20} {detail}", event.seq, event.at, event.kind, event.object))
}

/// A body as lines. The last one may lack its newline.
struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    async fn next(&mut self) -> Result<Option<Bytes>, EventsError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1).freeze().slice(..end);
                if line.is_empty() {
                    continue;
                }
                return Ok(Some(line));
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(EventsError::Long);
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend(frame.into_data()),
                Some(Err(error)) => return Err(EventsError::Read(error)),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Ok(Some(self.buffer.split().freeze())),
            }
        }
    }
}
