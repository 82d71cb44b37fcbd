//! The effects by which a guest becomes a bundle: warm up, bring to rest, save, commit.

use std::sync::Arc;
use std::time::Duration;

use hearth_guest_wire::{Exec, Exit, FromGuest, ToGuest, VERSION, version_to_go_on};
use tokio::io::AsyncReadExt;
use tokio::time::{sleep, timeout};

use super::sending::wanted;
use super::{Outcome, Work, ask_failed, ended, host, micros, unreachable};
use crate::agent::bundles::{BundleView, CommitOrder};
use crate::agent::effect::Effect;
use crate::agent::guest::{self, ANSWER_LIMIT, GuestError, printable};
use crate::agent::record::{BuildSpec, BundleOrder};
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{Ask, AskError, VmBundles, VmmHost, World};
use crate::clock::Monotonic;
use crate::report::chain;
use crate::wire::control::{Answer, MachineState, Request, SavedPages};

/// Longest wait for a guest's file systems to come to rest. A guest that writes without end is saved all the same: its
/// disks are as after a power cut then, and the operation says so.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

/// The first version of a VMM's protocol that copies memory while the guest runs.
const COPY_SINCE: u16 = Request::SaveRest.since_version();

/// Time between two tries to have a copy given up.
const CANCEL_AGAIN: Duration = Duration::from_millis(50);

/// Bytes of a warm-up program's output that are kept, to look for its marker and to tell why it failed.
const OUTPUT_BYTES: usize = 16 * 1024;

/// Runs a program in a session of its own, so that it goes on when nobody listens any more, and shows what it writes.
/// Its end shows as well: a program that ends without its marker never gets ready.
const DETACHED: &str = r#"log=/run/hearth-warm-up.log
setsid sh -c 'sh -c "$0"; echo "[warm-up program ended: $?]"' "$0" < /dev/null > "$log" 2>&1 &
exec tail -n +1 -f "$log""#;

/// What [`DETACHED`] writes when its program has ended.
const ENDED: &str = "[warm-up program ended: ";

/// How a warm-up failed.
enum WarmUpError {
    Guest(GuestError),
    Program(String),
}

impl<W: World> Work<W> {
    /// Runs the program that warms the guest up, to its end or, with a marker, until it prints that.
    pub(super) async fn warm_up(&mut self) -> Result<(), Outcome> {
        let Some(build) = self.record.spec.build.clone() else { return Ok(()) };
        let limit = Duration::from_secs(build.timeout_s.into());
        let mut hurry = self.hurry.clone();
        let process = self.process.clone();
        let warming = async {
            match (&build.warmup, &build.ready_marker) {
                (None, None) => Ok(()),
                (None, Some(marker)) => self.wait_for_console(marker).await,
                (Some(line), None) => self.run_warm_up(&["sh", "-c", line], None).await,
                (Some(line), Some(marker)) => self.run_warm_up(&["sh", "-c", DETACHED, line], Some(marker)).await,
            }
        };
        tokio::select! {
            biased;
            _ = hurry.wait_for(|hurry| *hurry) => Err(Outcome::Hurried),
            end = ended(process.as_ref()) => Err(Outcome::VmmEnded(end)),
            warmed = warming => warmed.map_err(|error| match error {
                WarmUpError::Guest(error) => unreachable(&error),
                WarmUpError::Program(detail) => cold(detail),
            }),
            () = sleep(limit) => Err(cold(late(&build))),
        }
    }

    async fn run_warm_up(&self, argv: &[&str], marker: Option<&str>) -> Result<(), WarmUpError> {
        let mut link = guest::connect(self.shared.world.vmm(), &self.record.id).await.map_err(WarmUpError::Guest)?;
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        let exec = ToGuest::Exec(Exec { argv, ..Exec::default() });
        link.writer.send(&exec).await.map_err(WarmUpError::Guest)?;
        if marker.is_none() {
            link.writer.send(&ToGuest::StdinClosed).await.map_err(WarmUpError::Guest)?;
        }
        let mut output = Output::default();
        loop {
            let message = link.reader.next().await.and_then(|message| message.ok_or(GuestError::HungUp));
            match message.map_err(WarmUpError::Guest)? {
                FromGuest::Stdout(bytes) | FromGuest::Stderr(bytes) => {
                    output.add(&bytes);
                    let Some(marker) = marker else { continue };
                    if output.holds(marker) {
                        return Ok(());
                    }
                    if output.holds(ENDED) {
                        let end = output.end();
                        return Err(WarmUpError::Program(format!("it ended without saying {marker:?}: {end}")));
                    }
                }
                FromGuest::Exited(Exit::Code(0)) if marker.is_none() => return Ok(()),
                FromGuest::Exited(exit) => {
                    let end = output.end();
                    return Err(WarmUpError::Program(format!("it ended with {exit:?}: {end}")));
                }
                FromGuest::Failed { errno, what } => {
                    return Err(WarmUpError::Guest(GuestError::Failed { errno, what: printable(&what) }));
                }
                FromGuest::Started { .. } => {}
                FromGuest::Hello { .. }
                | FromGuest::Done
                | FromGuest::Quiesced { .. }
                | FromGuest::Stats(_)
                | FromGuest::HooksRan(_)
                | FromGuest::Secrets(_)
                | FromGuest::Register(_)
                | FromGuest::Joined { .. } => return Err(WarmUpError::Guest(GuestError::Unexpected)),
            }
        }
    }

    /// Waits for the guest's console to say that it is warm; what it said before counts.
    async fn wait_for_console(&self, marker: &str) -> Result<(), WarmUpError> {
        let failed = |error| WarmUpError::Guest(GuestError::Open(error));
        let mut console = self.shared.world.vmm().console(&self.record.id).await.map_err(failed)?;
        let (mut output, mut bytes) = (Output::default(), vec![0; 4096]);
        while !output.holds(marker) {
            match console.read(&mut bytes).await {
                Ok(0) => return Err(WarmUpError::Guest(GuestError::HungUp)),
                Ok(count) => output.add(&bytes[..count]),
                Err(error) => return Err(WarmUpError::Guest(GuestError::Stream(error))),
            }
        }
        Ok(())
    }

    /// Has the guest's file systems at rest, if it manages to within the limit.
    pub(super) async fn quiesce_guest(&mut self) -> Result<(), Outcome> {
        let timeout_ms = u32::try_from(QUIESCE_LIMIT.as_millis()).unwrap_or(u32::MAX);
        let quiescing = async {
            let mut link = guest::connect(self.shared.world.vmm(), &self.record.id).await?;
            let answer = link.request(&ToGuest::Quiesce { timeout_ms }, ANSWER_LIMIT).await?;
            let FromGuest::Quiesced { complete, .. } = answer else { return Err(GuestError::Unexpected) };
            Ok((complete, link))
        };
        let (complete, mut link) = quiescing.await.map_err(|error| unreachable(&error))?;
        self.order()?.quiesced = Some(complete);
        // The last word before it is held.
        self.check_secrets(&mut link).await
    }

    /// Lets the guest's file systems go on, and sets its clock, which stood still meanwhile.
    pub(super) async fn thaw_guest(&self) -> Result<(), Outcome> {
        let thawing = async {
            let mut link = guest::connect(self.shared.world.vmm(), &self.record.id).await?;
            link.done(&ToGuest::Thaw, ANSWER_LIMIT).await?;
            self.set_clock(&mut link).await
        };
        thawing.await.map_err(|error| unreachable(&error))
    }

    /// Has memory copied while the guest runs. Whoever asks the VM to end ends this.
    pub(super) async fn copy_memory(&mut self) -> Result<(), Outcome> {
        if self.record.wire_version < COPY_SINCE {
            tracing::info!(vm = %self.record.id, "its VMM is of an earlier version: it is held for the whole of its memory");
            return Ok(());
        }
        let pages = self.saved_pages()?;
        let mut hurry = self.hurry.clone();
        let (shared, record) = (Arc::clone(&self.shared), self.record.clone());
        let copying = shared.world.vmm().ask(&record, shared.epoch, Ask::CopyMemory { pages });
        let mut copying = std::pin::pin!(copying);
        let process = self.process.clone();
        let answer = tokio::select! {
            biased;
            answer = copying.as_mut() => answer.map_err(ask_failed)?,
            end = ended(process.as_ref()) => return Err(Outcome::VmmEnded(end)),
            () = wanted(&mut hurry) => {
                // It may not have begun in the VMM yet.
                loop {
                    let _ = self.ask(Ask::CancelSend).await;
                    if timeout(CANCEL_AGAIN, copying.as_mut()).await.is_ok() {
                        return Err(Outcome::Hurried);
                    }
                }
            }
        };
        let Answer::Copied(phases) = answer else { return Err(ask_failed(AskError::Unexpected)) };
        let order = self.order()?;
        (order.rounds, order.memory_bytes) = (Some(phases.rounds), Some(phases.memory_bytes));
        Ok(())
    }

    fn saved_pages(&mut self) -> Result<SavedPages, Outcome> {
        Ok(if self.order()?.parent.is_some() { SavedPages::Changed } else { SavedPages::All })
    }

    pub(super) async fn save_machine(&mut self) -> Result<(), Outcome> {
        // A machine that runs would be saved at two moments.
        if self.status().await?.state != MachineState::Paused {
            return Err(host("the machine to save is not held".to_owned()));
        }
        let was_held = !self.operation.steps.iter().any(|step| step.effect == Effect::QuiesceGuest);
        if was_held {
            self.check_noted_secrets()?;
        }
        let pages = self.saved_pages()?;
        // What was copied before, by this work: an agent that finds a copy that it did not order begins anew.
        let copied = self.order()?.rounds.and(self.order()?.memory_bytes);
        let ask = if copied.is_some() { Ask::SaveRest { pages } } else { Ask::Save { pages } };
        let Answer::Saved(phases) = self.ask(ask).await? else {
            return Err(ask_failed(AskError::Unexpected));
        };
        self.order()?.memory_bytes = Some(copied.unwrap_or(0).saturating_add(phases.memory_bytes));
        Ok(())
    }

    pub(super) async fn discard_saved(&self) -> Result<(), Outcome> {
        let discarded = self.shared.world.bundles().discard(&self.record.id).await;
        discarded.map_err(|error| bad_bundle(chain(&error)))
    }

    pub(super) async fn commit_bundle(&mut self) -> Result<(), Outcome> {
        let order = CommitOrder {
            vm: self.record.clone(),
            operation: self.operation.clone(),
            order: self.order()?.clone(),
            agent_protocol: version_to_go_on(self.record.guest_protocol.unwrap_or(VERSION)),
        };
        // Another bundle of this name may have come since this one was begun.
        let ours = |view: &BundleView| order.made(&view.manifest);
        let held = self.shared.hold_bundle_name(order.order.name.as_deref(), ours).await;
        let _held = held.map_err(|error| bad_bundle(chain(&error)))?;
        let made = self.shared.world.bundles().commit(order).await.map_err(|error| bad_bundle(chain(&error)))?;
        tracing::info!(vm = %self.record.id, bundle = %made.id, "a bundle is made");
        self.order()?.bundle = Some(made.id);
        Ok(())
    }

    /// The bundle this work makes.
    pub(super) fn order(&mut self) -> Result<&mut BundleOrder, Outcome> {
        self.operation.makes.as_mut().ok_or_else(|| host("this operation makes no bundle".to_owned()))
    }

    /// The guest stands still from now on.
    pub(super) fn note_hold(&mut self) {
        self.held_at = Some(self.now());
    }

    /// The guest runs again.
    pub(super) fn note_run(&mut self) {
        self.note_run_at(self.now());
    }

    /// The guest runs since then.
    pub(super) fn note_run_at(&mut self, now: Monotonic) {
        let pause_us = self.held_at.take().map(|held| micros(now.since(held)));
        if let Some(order) = self.operation.makes.as_mut() {
            order.pause_us = pause_us.or(order.pause_us);
        }
        if let Some(moved) = self.operation.moved.as_mut() {
            moved.pause_us = pause_us.or(moved.pause_us);
        }
    }
}

/// The end of what a program wrote.
#[derive(Default)]
struct Output(Vec<u8>);

impl Output {
    fn add(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        // Twice as much as is kept, so that it is moved rarely and a marker between two reads is whole.
        if self.0.len() > 2 * OUTPUT_BYTES {
            self.0.drain(..self.0.len() - OUTPUT_BYTES);
        }
    }

    fn holds(&self, marker: &str) -> bool {
        self.0.windows(marker.len().max(1)).any(|window| window == marker.as_bytes())
    }

    /// Its last lines, for people.
    fn end(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let lines: Vec<&str> = text.lines().collect();
        printable(&lines[lines.len().saturating_sub(5)..].join(" | "))
    }
}

fn late(build: &BuildSpec) -> String {
    match &build.ready_marker {
        Some(marker) => format!("it did not say {marker:?} within {} s", build.timeout_s),
        None => format!("it did not end within {} s", build.timeout_s),
    }
}

fn cold(detail: String) -> Outcome {
    Outcome::Failed(FailureCause::WarmUp { detail })
}

fn bad_bundle(detail: String) -> Outcome {
    Outcome::Failed(FailureCause::Bundle { detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_found_across_reads_and_in_long_output() {
        let mut output = Output::default();
        output.add(b"warming up\nREA");
        assert!(!output.holds("READY"));
        output.add(b"DY\n");
        assert!(output.holds("READY"));
        for _ in 0..100 {
            output.add(&[b'x'; 1000]);
        }
        output.add(b"again READY");
        assert!(output.0.len() <= 2 * OUTPUT_BYTES && output.holds("READY") && !output.holds("warming"));
        assert_eq!(Output(b"1\n2\n3\n4\n5\n6\n7".to_vec()).end(), "3 | 4 | 5 | 6 | 7");
    }
}
