//! Effects of a migration at its source. Whose the machine is, is this ledger's word: the record's state, which becomes
//! `handed_over` in the transaction that ends the operation of the first two.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::{Outcome, Work, ask_failed, host, micros, no_network};
use crate::agent::config::{FabricConfig, Peer};
use crate::agent::migration_record::{Compress, MigrationRecord, MovePolicy, MoveRecord};
use crate::agent::peers::{ArrivalOrder, ArrivalReady, PeerError, Place};
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{
    Ask, SendOrder, SentMachine, StreamTerms, VmDisk, VmNetworks, VmmHost, VmmProcess, World, random_array,
};
use crate::report::chain;
use crate::wire::control::{StreamTls, StreamToken};

/// First and longest time between two tries to tell the other host that the machine is its.
const CONFIRM_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Time between two tries to have a send given up.
const CANCEL_AGAIN: Duration = Duration::from_millis(50);

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
        self.name_standbys()?;
        let world = &self.shared.world;
        let own = world.vmm().certificate().map_err(|error| host(format!("make a certificate: {error}")))?;
        let token = random_array(world).map_err(|error| host(format!("read randomness: {error}")))?;
        let session = match &self.record.network {
            Some(network) => self.shared.session_of(network.session.clone()).await.map_err(Outcome::Broken)?,
            None => None,
        };
        let (way, fabric, peer) = self.migration()?;
        let session = match session {
            Some(session) => Some(self.shared.arriving_session(&session).await.map_err(Outcome::Broken)?),
            None => None,
        };
        let needs = self.shared.needs_of(&self.record).await.map_err(|error| host(chain(&error)))?;
        let disks = self.shared.identify_disks(&self.record).await;
        let disks = disks.map_err(|error| host(format!("look at the VM's disks: {error}")))?;
        let keys = (own.certificate.as_slice(), token);
        let order = ArrivalOrder::of(&self.record, &way, session, (fabric.host.into(), needs, disks), keys);
        let arranging = self.shared.arrange_at_peer(fabric, peer, &order);
        let mut hurry = self.hurry.clone();
        let ready: ArrivalReady = tokio::select! {
            biased;
            ready = arranging => ready.map_err(|error| refused(&error))?,
            () = wanted(&mut hurry) => return Err(Outcome::Hurried),
        };
        let to = SocketAddr::new(peer.address, ready.port);
        let peers = ready.certificate().ok_or_else(|| host("the other host's certificate is not one".to_owned()))?;
        let tls = StreamTls { certificate: own.certificate, key: own.key, peer: peers };
        // A host of the version before waits for one connection.
        let policy = MovePolicy { connections: ready.connections.min(way.policy.connections), ..way.policy };
        let terms = StreamTerms { token: StreamToken(token), tls };
        let (form, uncompressed) = policy.compress.agreed(self.record.wire_version, ready.stream_version);
        if let Some(why) = uncompressed {
            tracing::info!(vm = %self.record.id, why = why.told(), "it is sent as it is");
        }
        let order = SendOrder { to, terms, policy, form, is_base_there: ready.has_base };
        self.way = Some((order, uncompressed));
        Ok(())
    }

    pub(super) async fn send_machine(&mut self) -> Result<(), Outcome> {
        // This work's own: an agent that was killed between the two begins none of this again.
        let (Some((order, uncompressed)), Some(process)) = (self.way.take(), self.process.clone()) else {
            return Err(host("nothing waits for the machine on the other host".to_owned()));
        };
        let compress = Compress::from(order.form.packing);
        let mut hurry = self.hurry.clone();
        let shared = Arc::clone(&self.shared);
        let (_, _, peer) = self.migration()?;
        let (peer, ahead) = (peer.clone(), Place::default());
        let sending = shared.world.vmm().send_machine(&self.record, shared.epoch, order);
        let mut sending = std::pin::pin!(sending);
        let SentMachine { phases, packed } = tokio::select! {
            biased;
            sent = sending.as_mut() => sent.map_err(ask_failed)?,
            end = process.ended() => return Err(Outcome::VmmEnded(end)),
            // It stands still while the other host is told: on a line that is open then.
            never = shared.hold_line(&peer, &ahead) => match never {},
            () = wanted(&mut hurry) => {
                // It may not have begun in the VMM yet. Whether it still comes to an end by itself or not: it stays here.
                loop {
                    let _ = self.ask(Ask::CancelSend).await;
                    if timeout(CANCEL_AGAIN, sending.as_mut()).await.is_ok() {
                        return Err(Outcome::Hurried);
                    }
                }
            }
        };
        self.held_at = Some(self.now().before(Duration::from_nanos(phases.held_ns)));
        self.line = ahead.take();
        for disk in self.record.spec.disks.iter().filter(|disk| !disk.read_only) {
            let synced = self.shared.world.disk().sync_disk(disk).await;
            synced.map_err(|error| host(format!("flush {}: {error}", disk.path)))?;
        }
        let (packed_pages, packed_bytes) = (packed.pages, packed.bytes);
        self.operation.moved =
            Some(MoveRecord { compress, uncompressed, packed_pages, packed_bytes, ..MoveRecord::of(&phases) });
        Ok(())
    }

    pub(super) async fn cancel_arrival(&self) -> Result<(), Outcome> {
        let (way, fabric, peer) = self.migration()?;
        self.shared.cancel_at_peer(fabric, peer, &way.id).await.map_err(|error| refused(&error))
    }

    /// Tries until the other host answers: it may be cut off, or its agent be replaced.
    pub(super) async fn confirm_arrival(&mut self) -> Result<(), Outcome> {
        let (mut wait, longest) = CONFIRM_AGAIN;
        let mut line = self.line.take();
        let begun = self.now();
        if let (Some(held), Some(moved)) = (self.held_at, self.operation.moved.as_mut()) {
            moved.steps.decide_us = micros(begun.since(held)).saturating_sub(moved.held_us);
        }
        loop {
            let Ok((way, fabric, peer)) = self.migration() else {
                tracing::warn!(vm = %self.record.id, "the VM is the host's that is no peer in the configuration any more");
                sleep(longest).await;
                continue;
            };
            match self.shared.confirm_at_peer(line.take(), fabric, peer, &way.id).await {
                Ok(ran) => {
                    // The way of the answer is still in it: it is never less than what the guest stood still for.
                    let now = self.now().before(ran).max(begun);
                    self.note_run_at(now);
                    self.ran_there_at = Some(now);
                    if let Some(moved) = self.operation.moved.as_mut() {
                        moved.steps.start_us = micros(now.since(begun));
                    }
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
        let silent = self.ran_there_at.map(|ran| micros(self.now().since(ran)));
        if let Some(moved) = self.operation.moved.as_mut() {
            moved.packets = packets;
            moved.network_us = moved.pause_us.zip(silent).map(|(pause, silent)| pause.saturating_add(silent));
        }
        Ok(())
    }

    pub(super) async fn leave_network(&mut self) -> Result<(), Outcome> {
        self.shared.end_metadata(&self.record.id);
        self.release_taps();
        self.shared.world.networks().leave(&self.record).await.map_err(no_network)?;
        self.lead_elsewhere().await
    }
}

/// Resolves when somebody wants this over.
pub(super) async fn wanted(hurry: &mut watch::Receiver<bool>) {
    // What is behind it must not be held over what follows.
    drop(hurry.wait_for(|hurry| *hurry).await);
}

fn refused(error: &PeerError) -> Outcome {
    host(chain(error))
}
