//! What the agent says to its administrator: log lines on standard error, for people or as JSON, with a bounded copy in
//! the state directory; and readiness.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use file::ToFile;

pub use file::{keep_log, log_files};

mod file;

/// Environment variable with a filter in tracing's syntax, such as `hearth=debug`.
pub const FILTER_VARIABLE: &str = "HEARTH_LOG";

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

/// Starts logging. A second call in one process does nothing.
pub fn start(format: LogFormat) {
    let filter = EnvFilter::try_from_env(FILTER_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    // A line that cannot be written is lost: told of on a standard error that lies on the same full disk, it would be
    // the end of whoever wrote it.
    let started = match format {
        LogFormat::Human => tracing_subscriber::registry()
            .with(filter)
            .with(layer().with_target(false).with_ansi(colours).log_internal_errors(false).with_writer(std::io::stderr))
            .with(layer().with_target(false).with_ansi(false).log_internal_errors(false).with_writer(ToFile))
            .try_init(),
        LogFormat::Json => tracing_subscriber::registry()
            .with(filter)
            .with(layer().json().flatten_event(true).log_internal_errors(false).with_writer(std::io::stderr))
            .with(layer().json().flatten_event(true).with_ansi(false).log_internal_errors(false).with_writer(ToFile))
            .try_init(),
    };
    // Somebody logs already.
    let _ = started;
}

/// Tells the service manager, and whoever reads standard error, that the agent answers.
pub fn say_ready(format: LogFormat) {
    match format {
        LogFormat::Human => {
            // Nobody may be reading.
            let _ = writeln!(std::io::stderr().lock(), "ready");
        }
        LogFormat::Json => tracing::info!("ready"),
    }
    notify(&[sd_notify::NotifyState::Ready]);
}

/// Tells the service manager that the agent is ending.
pub fn say_stopping() {
    tracing::info!("stopping");
    notify(&[sd_notify::NotifyState::Stopping]);
}

/// Without a service manager this does nothing.
fn notify(states: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}
