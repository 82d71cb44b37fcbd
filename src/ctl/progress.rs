//! Waiting, visibly: anything that may take more than a second shows on standard error what is being waited for.
//! Nothing is drawn when standard error is not a terminal.

use std::future::Future;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::call::{Agent, CallError};
use super::table::{bytes, milliseconds, word};
use crate::api::types::{Migration, Operation, StepState};
use crate::ids::OperationId;

/// Waits shorter than this are not shown.
const SHOWN_AFTER: Duration = Duration::from_secs(1);

/// Between two redraws of a spinner.
const TICK: Duration = Duration::from_millis(100);

/// Between two looks at an operation, at first; a boot from a warm bundle takes about as long.
const POLL_FIRST: Duration = Duration::from_millis(5);

/// Between two looks at an operation that takes long.
const POLL_LONGEST: Duration = Duration::from_millis(250);

fn spinner(title: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.set_message(title.to_owned());
    bar.enable_steady_tick(TICK);
    bar
}

/// Waits for `work`, and says so once it takes long.
pub(super) async fn shown<T>(title: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    tokio::select! {
        value = &mut work => return value,
        () = tokio::time::sleep(SHOWN_AFTER) => {}
    }
    let bar = spinner(title);
    let value = work.await;
    bar.finish_and_clear();
    value
}

/// Many waits at once, and how many of them are over. It is gone when dropped.
#[derive(Debug)]
pub(super) struct Counted {
    bar: ProgressBar,
    title: String,
    done: usize,
    count: usize,
}

impl Counted {
    pub(super) fn start(title: &str, count: usize) -> Self {
        let counted = Self { bar: spinner(title), title: title.to_owned(), done: 0, count };
        counted.tell();
        counted
    }

    /// One more is over.
    pub(super) fn one_more(&mut self) {
        self.done += 1;
        self.tell();
    }

    /// So many of so many are over.
    pub(super) fn set(&mut self, done: usize, count: usize) {
        (self.done, self.count) = (done, count);
        self.tell();
    }

    fn tell(&self) {
        if self.count > 1 {
            self.bar.set_message(format!("{}: {} of {}", self.title, self.done, self.count));
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A VM whose memory is being copied to another host. It is gone when dropped.
#[derive(Debug)]
pub(super) struct Copying {
    bar: ProgressBar,
    title: String,
}

impl Copying {
    pub(super) fn start(title: &str) -> Self {
        Self { bar: spinner(title), title: title.to_owned() }
    }

    /// How far it is: `migrate web to b: round 3, 12 MiB of 40 MiB, 310 MiB/s; it writes 2 MiB/s, pause 7 ms`.
    pub(super) fn tell(&self, migration: &Migration) {
        let Some(now) = &migration.progress else {
            return self.bar.set_message(format!("{}: {}", self.title, words(&word(&migration.state))));
        };
        let mut text = format!(
            "{}: round {}, {} of {}",
            self.title,
            now.rounds + 1,
            bytes(now.round_sent_bytes),
            bytes(now.round_bytes)
        );
        if now.rate_bytes > 0 {
            let (rate, writes) = (bytes(now.rate_bytes), bytes(now.dirty_rate_bytes));
            let pause = milliseconds(now.expected_pause_ms);
            text.push_str(&format!(", {rate}/s; it writes {writes}/s, pause {pause} if now"));
        }
        if now.vcpu_share < 100 {
            text.push_str(&format!("; slowed down to {} %", now.vcpu_share));
        }
        self.bar.set_message(text);
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Waits until an operation has ended, showing its steps.
pub(super) async fn follow(agent: &Agent, title: &str, id: &OperationId) -> Result<Operation, CallError> {
    let bar = spinner(title);
    let path = format!("/v1/operations/{id}");
    let mut pause = POLL_FIRST;
    let mut told = 0;
    let outcome = loop {
        let operation: Operation = match agent.get(&path).await {
            Ok(operation) => operation,
            Err(error) => break Err(error),
        };
        told = tell(&bar, title, &operation, told);
        if operation.state.is_final() {
            break Ok(operation);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(POLL_LONGEST);
    };
    bar.finish_and_clear();
    outcome
}

/// Shows the steps that ended since `told` above the spinner, and the one being taken beside it.
fn tell(bar: &ProgressBar, title: &str, operation: &Operation, told: usize) -> usize {
    let ended = operation.steps.iter().take_while(|step| step.took_ms.is_some()).count();
    for step in operation.steps.iter().take(ended).skip(told) {
        let took = step.took_ms.map(milliseconds).unwrap_or_default();
        bar.println(format!("  {:<20} {took}", words(&step.name)));
    }
    if let Some(step) = operation.steps.iter().find(|step| step.state == StepState::Running) {
        bar.set_message(format!("{title}: {}", words(&step.name)));
    }
    told.max(ended)
}

/// A step's name, for people.
pub(super) fn words(name: &str) -> String {
    name.replace('_', " ")
}
