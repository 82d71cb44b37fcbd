//! Effects on the VM's process: it is started, asked, and ended.

use std::time::Duration;

use hearth_guest_wire::{Shutdown, ToGuest};
use tokio::time::{sleep, timeout};

use super::outcome::start_failed;
use super::{Outcome, Process, Work, ask_failed, host, micros, unreachable};
use crate::agent::guest::{self, ANSWER_LIMIT};
use crate::agent::record::ProcessRecord;
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{Ask, AskError, ProcessEnd, VmmHost, VmmProcess, World};
use crate::wire::control::{Answer, Status};
use crate::wire::frame;

/// Longest wait for a killed process to be gone. The kernel frees its memory first, which takes a second for many GiB.
pub(super) const END_LIMIT: Duration = Duration::from_secs(30);

impl<W: World> Work<W> {
    pub(super) async fn find(&mut self) -> Result<Option<Process<W>>, Outcome> {
        if self.process.is_none() {
            let found = self.shared.world.vmm().find(&self.record).await;
            self.process = found.map_err(|error| host(format!("look for the VMM: {error}")))?;
        }
        Ok(self.process.clone())
    }

    pub(super) async fn start_vmm(&mut self) -> Result<(), Outcome> {
        let process = match self.find().await? {
            Some(process) => process,
            None => {
                let started = self.shared.world.vmm().start(&self.record).await.map_err(start_failed)?;
                self.record.wire_version = frame::VERSION;
                started
            }
        };
        self.record.process = Some(process.record());
        if self.is_launch() {
            self.record.timings.spawn_us = self.asked_at.map(|asked| micros(self.now().since(asked)));
        }
        self.process = Some(process);
        Ok(())
    }

    pub(super) async fn ask(&self, ask: Ask) -> Result<Answer, Outcome> {
        let asking = self.shared.world.vmm().ask(&self.record, self.shared.epoch, ask);
        let Some(process) = &self.process else { return asking.await.map_err(ask_failed) };
        tokio::select! {
            biased;
            // First what was asked: an answer that came before the end counts.
            answer = asking => answer.map_err(ask_failed),
            end = process.ended() => Err(Outcome::VmmEnded(end)),
        }
    }

    pub(super) async fn status(&self) -> Result<Status, Outcome> {
        let Answer::Status(status) = self.ask(Ask::Status).await? else {
            return Err(ask_failed(AskError::Unexpected));
        };
        Ok(status)
    }

    pub(super) async fn shut_down_guest(&mut self) -> Result<(), Outcome> {
        let mut hurry = self.hurry.clone();
        let Some(process) = self.find().await? else { return Ok(()) };
        let asking = async {
            let mut link = guest::connect(self.shared.world.vmm(), &self.record.id).await?;
            link.done(&ToGuest::Shutdown(Shutdown::PowerOff), ANSWER_LIMIT).await
        };
        let leaving = async {
            // A guest may go down before its answer gets out: the end of its VMM counts, not the answer.
            let asked = asking.await;
            if let Err(error) = asked {
                return Err(unreachable(&error));
            }
            std::future::pending().await
        };
        tokio::select! {
            biased;
            _ = process.ended() => Ok(()),
            _ = hurry.wait_for(|hurry| *hurry) => Ok(()),
            () = sleep(self.grace) => {
                let detail = format!("the guest did not power off within {} ms", self.grace.as_millis());
                Err(Outcome::Failed(FailureCause::GuestUnreachable { detail }))
            }
            failed = leaving => failed,
        }
    }

    pub(super) async fn end_vmm(&mut self) -> Result<(), Outcome> {
        let Some(process) = self.find().await? else {
            // The agent before ended it, and did not get to say so.
            self.record.process = None::<ProcessRecord>;
            return Ok(());
        };
        process.kill().map_err(|error| host(format!("end the VMM: {error}")))?;
        match timeout(END_LIMIT, process.ended()).await {
            Ok(_) => {
                self.process = None;
                self.record.process = None::<ProcessRecord>;
                Ok(())
            }
            Err(_) => Err(host(format!("the VMM is not gone {} s after it was killed", END_LIMIT.as_secs()))),
        }
    }
}

/// The end of a process, or never when there is none.
pub(in crate::agent) async fn ended(process: Option<&impl VmmProcess>) -> ProcessEnd {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}
