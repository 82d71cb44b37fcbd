//! Effects of a migration at its source. Whose the machine is, is this ledger's word: the record's state, which becomes
//! `handed_over` in the transaction that ends the operation of the first two.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::sleep;

use super::{Outcome, Work, ask_failed, host, no_network};
use crate::agent::config::{FabricConfig, Peer};
use crate::agent::peers::{ArrivalOrder, ArrivalReady, PeerError};
use crate::agent::record::{MigrationRecord, MoveRecord};
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{SendOrder, StreamTerms, VmNetworks, VmmHost, VmmProcess, World, random_array};
use crate::report::chain;
use crate::wire::control::{StreamTls, StreamToken};

/// First and longest time between two tries to tell the other host that the machine is its.
const CONFIRM_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

impl<W: World> Work<W> {
    /// The migration, the fabric, and the other host.
    fn migration(&self) -> Result<(MigrationRecord, &FabricConfig, &Peer), Outcome> {
        let way = self.record.migration.clone().ok_or_else(|| host("the VM is on its way nowhere".to_owned()))?;
        let fabric = self.shared.config.fabric.as_ref();
        let peer = fabric.and_then(|fabric| fabric.peers.iter().find(|peer| u16::from(peer.host) == way.host));
        match (fabric, peer) {
            (Some(fabric), Some(peer)) => Ok((way, fabric, peer)),
            (_, _) => Err(host(format!("host {} ({}) is no peer in the configuration any more", way.peer, way.host))),
        }
    }

    pub(super) async fn arrange_arrival(&mut self) -> Result<(), Outcome> {
        let world = &self.shared.world;
        let own = world.vmm().certificate().map_err(|error| host(format!("make a certificate: {error}")))?;
        let token = random_array(world).map_err(|error| host(format!("read randomness: {error}")))?;
        let session = match &self.record.network {
            Some(network) => self.shared.session_of(network.session.clone()).await.map_err(Outcome::Broken)?,
            None => None,
        };
        let (way, fabric, peer) = self.migration()?;
        let order = ArrivalOrder::of(&self.record, &way, session.as_ref(), fabric.host.into(), &own.certificate, token);
        let ready: ArrivalReady =
            self.shared.arrange_at_peer(fabric, peer, &order).await.map_err(|error| refused(&error))?;
        let to = SocketAddr::new(peer.address, ready.port);
        let peers = ready.certificate().ok_or_else(|| host("the other host's certificate is not one".to_owned()))?;
        let tls = StreamTls { certificate: own.certificate, key: own.key, peer: peers };
        self.way = Some(SendOrder { to, terms: StreamTerms { token: StreamToken(token), tls } });
        Ok(())
    }

    pub(super) async fn send_machine(&mut self) -> Result<(), Outcome> {
        // This work's own: an agent that was killed between the two begins none of this again.
        let (Some(order), Some(process)) = (self.way.take(), self.process.clone()) else {
            return Err(host("nothing waits for the machine on the other host".to_owned()));
        };
        let sending = self.shared.world.vmm().send_machine(&self.record, self.shared.epoch, order);
        let phases = tokio::select! {
            biased;
            sent = sending => sent.map_err(ask_failed)?,
            end = process.ended() => return Err(Outcome::VmmEnded(end)),
        };
        self.held_at = Some(self.now().before(Duration::from_nanos(phases.held_ns)));
        self.operation.moved = Some(MoveRecord {
            pause_us: None,
            held_us: phases.held_ns / 1000,
            rounds: phases.rounds,
            pages: phases.pages,
            bytes: phases.wire_bytes,
        });
        Ok(())
    }

    pub(super) async fn cancel_arrival(&self) -> Result<(), Outcome> {
        let (way, fabric, peer) = self.migration()?;
        self.shared.cancel_at_peer(fabric, peer, &way.id).await.map_err(|error| refused(&error))
    }

    /// Tries until the other host answers: it may be cut off, or its agent be replaced.
    pub(super) async fn confirm_arrival(&mut self) -> Result<(), Outcome> {
        let (mut wait, longest) = CONFIRM_AGAIN;
        loop {
            let Ok((way, fabric, peer)) = self.migration() else {
                tracing::warn!(vm = %self.record.id, "the VM is the host's that is no peer in the configuration any more");
                sleep(longest).await;
                continue;
            };
            match self.shared.confirm_at_peer(fabric, peer, &way.id).await {
                Ok(()) => {
                    self.note_run();
                    return Ok(());
                }
                // It knows of no such machine, or could not let it run.
                Err(PeerError::Refused { status: 404 | 410, message, .. }) => {
                    let detail = format!("host {}: {message}", way.peer);
                    return Err(Outcome::Failed(FailureCause::LostOnTheWay { detail }));
                }
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(vm = %self.record.id, error, "the VM is another host's, which does not answer yet");
                }
            }
            sleep(wait).await;
            wait = longest.min(wait.saturating_mul(2));
        }
    }

    pub(super) async fn lead_elsewhere(&self) -> Result<(), Outcome> {
        let Some(way) = self.record.migration.as_ref().filter(|_| self.record.is_at_home()) else { return Ok(()) };
        self.shared.world.networks().lead_elsewhere(&self.record, way.host).await.map_err(no_network)
    }

    pub(super) async fn forward_packets(&mut self) -> Result<(), Outcome> {
        if self.find().await?.is_none() {
            return Ok(());
        }
        let forwarded = self.shared.world.vmm().forward_packets(&self.record, self.shared.epoch).await;
        let packets = forwarded.map_err(ask_failed)?;
        tracing::debug!(vm = %self.record.id, packets, "what waited here has followed");
        Ok(())
    }

    pub(super) async fn leave_network(&mut self) -> Result<(), Outcome> {
        self.shared.end_metadata(&self.record.id);
        self.release_taps();
        self.shared.world.networks().leave(&self.record).await.map_err(no_network)?;
        self.lead_elsewhere().await
    }
}

fn refused(error: &PeerError) -> Outcome {
    host(chain(error))
}
