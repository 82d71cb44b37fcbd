//! Effects of a migration at its target. The machine stands ready here, paused, until it is known to be this host's: the
//! source says so, or is asked. As long as nobody knows, it stays as it is.

use std::time::Duration;

use tokio::time::timeout;

use super::{Outcome, Work, ask_failed, host};
use crate::agent::arrivals::{Decision, Waiting};
use crate::agent::peers::ArrivalReady;
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{ReceiveOrder, StreamTerms, VmmHost, VmmProcess, World};
use crate::report::chain;
use crate::wire::control::{MachineState, StreamTls};

/// Time after which the source is asked what it decided, and asked again.
const ASK_AFTER: Duration = Duration::from_secs(3);

impl<W: World> Work<W> {
    pub(super) async fn receive_machine(&mut self) -> Result<(), Outcome> {
        let id = self.record.migration.as_ref().map(|way| way.id.clone());
        let waiting = id.and_then(|id| self.shared.arrivals.take(&id));
        let is_here = self.status().await?.state != MachineState::Empty;
        let Waiting { from, token, peer, connections, on_base, ready } = match waiting {
            Some(waiting) if !is_here => waiting,
            Some(_) => return Err(host("its VMM has a machine already".to_owned())),
            // The agent before saw the beginning: it has come since, or will not, as nobody waits for it.
            None if is_here => return Ok(()),
            None => return Err(host("nobody sends the machine any more".to_owned())),
        };
        let own =
            self.shared.world.vmm().certificate().map_err(|error| host(format!("make a certificate: {error}")))?;
        let listening = self.shared.world.vmm().listen().await;
        let (listener, port) = listening.map_err(|error| host(format!("listen for the machine: {error}")))?;
        // The source gave up, if it does not wait for this any more: nobody connects then.
        let _ = ready.send(ArrivalReady::new(port, &own.certificate, connections, on_base));
        let tls = StreamTls { certificate: own.certificate, key: own.key, peer };
        let order = ReceiveOrder { from, terms: StreamTerms { token, tls }, connections, on_base };
        let receiving = self.shared.world.vmm().receive_machine(&self.record, self.shared.epoch, listener, order);
        let Some(process) = self.process.clone() else { return Err(host("the VM has no VMM".to_owned())) };
        tokio::select! {
            biased;
            received = receiving => match received {
                Ok(_) => {
                    self.has_received = true;
                    Ok(())
                }
                // The source may have been told that it stands ready, and then it may have decided: nothing less than the
                // machine's absence is a failure.
                Err(error) => match self.status().await {
                    Ok(status) if status.state != MachineState::Empty => Ok(()),
                    Ok(_) | Err(_) => Err(ask_failed(error)),
                },
            },
            end = process.ended() => Err(Outcome::VmmEnded(end)),
        }
    }

    pub(super) async fn await_decision(&mut self) -> Result<(), Outcome> {
        let Some(way) = self.record.migration.clone() else { return Err(host("it came from nowhere".to_owned())) };
        let Some(process) = self.find().await? else { return Err(host("the VM has no VMM".to_owned())) };
        let mut decision = self.shared.arrivals.decision(&way.id);
        let fabric = self.shared.config.fabric.as_ref();
        let peer = fabric.and_then(|fabric| fabric.peers.iter().find(|peer| u16::from(peer.host) == way.host));
        loop {
            let told = tokio::select! {
                biased;
                told = timeout(ASK_AFTER, decision.wait_for(Option::is_some)) => told.ok().and_then(|told| told.ok().and_then(|told| *told)),
                end = process.ended() => return Err(Outcome::VmmEnded(end)),
            };
            let decided = match (told, fabric.zip(peer)) {
                (Some(told), _) => Some(told),
                (None, Some((fabric, peer))) => match self.shared.ask_decision(fabric, peer, &way.id).await {
                    Ok(decided) => decided,
                    Err(error) => {
                        let error = chain(&error);
                        tracing::warn!(vm = %self.record.id, error, "whose this VM is cannot be told: it stands still");
                        None
                    }
                },
                (None, None) => {
                    tracing::warn!(vm = %self.record.id, host = way.peer, "whose this VM is cannot be told: its host is no peer any more");
                    None
                }
            };
            let decided = match decided {
                Some(decided) => Some(decided),
                None => self.decision_by_lease().await,
            };
            match decided {
                Some(Decision::HandedOver) => return Ok(()),
                Some(Decision::Kept) => {
                    let detail = format!("host {} keeps it", way.peer);
                    return Err(Outcome::Failed(FailureCause::Host { detail }));
                }
                None => {}
            }
        }
    }
}
