//! What the agent says to its administrator: log lines on standard error, for people or as JSON, and readiness.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;

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
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = match format {
        LogFormat::Human => {
            let colours = std::io::stderr().is_terminal();
            builder.with_target(false).with_ansi(colours).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
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
