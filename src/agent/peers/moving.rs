//! What agents tell each other of machines that go from one host to another, as JSON, and how they ask.

use std::time::Duration;

use hearth_guest_wire::version_to_go_on;
use serde::{Deserialize, Serialize};

use super::ahead::LineAhead;
use super::calls::PeerError;
use super::{ARRIVAL_CHECK_PATH, ARRIVALS_PATH, LAUNCH_PATH, MIGRATIONS_PATH, PeerCall};
use crate::agent::arrivals::Decision;
use crate::agent::config::{FabricConfig, Peer};
use crate::agent::egress::Egress;
use crate::agent::migration_record::MigrationRecord;
use crate::agent::record::{VmRecord, VmSpec, VolumeSlot};
use crate::agent::session_record::{NetworkRecord, SessionRecord};
use crate::agent::shared::Shared;
use crate::agent::volumes::VolumeUse;
use crate::agent::world::{DiskIdentity, World};
use crate::bundle::admit::GuestNeeds;
use crate::clock::{Steady, UnixNanos};
use crate::ids::{BundleId, MigrationId, VmId};
use crate::wire::stream;

/// Longest wait for a host to have a place for a machine.
const ARRANGE_LIMIT: Duration = Duration::from_secs(25);

/// Longest wait for a host to let a machine run that stands ready there.
const CONFIRM_LIMIT: Duration = Duration::from_secs(25);

/// Longest wait for a word.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// `POST /peer/v1/arrivals`: a machine that is to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalOrder {
    /// The migration.
    pub migration: MigrationId,
    /// The sender's number.
    pub host: u16,
    /// The VM.
    pub vm: VmId,
    /// Its name, if it has one.
    pub name: Option<String>,
    /// What it is.
    pub spec: VmSpec,
    /// Its generation id.
    pub generation: String,
    /// The version of the guest's protocol that the other host has to know (`version_to_go_on`).
    pub guest_protocol: Option<u16>,
    /// When it was first launched.
    pub created_at: UnixNanos,
    /// Its place in its session, if it is in one.
    pub network: Option<NetworkRecord>,
    /// Its session.
    pub session: Option<ArrivingSession>,
    /// The certificate of the sending end of the stream, DER in hexadecimal digits.
    pub certificate: String,
    /// What the stream begins with, in hexadecimal digits. It keeps nobody out who has not the certificate's key.
    pub token: String,
    /// Number of connections of the stream.
    #[serde(default = "one")]
    pub connections: u8,
    /// The bundle it was launched from. If the other host has it, only what differs is sent.
    #[serde(default)]
    pub base: Option<BundleId>,
    /// What names the file of each of its disks.
    #[serde(default)]
    pub disks: Vec<DiskIdentity>,
    /// What its guest needs of a host; absent from agents of the version before.
    #[serde(default)]
    pub needs: Option<GuestNeeds>,
}

const fn one() -> u8 {
    1
}

/// What an agent understands that says nothing of it.
const fn first_stream() -> u16 {
    1
}

/// The session of a machine that is to come; made when it is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivingSession {
    /// Whether its members have IPv4 addresses.
    pub ipv4: bool,
    /// What its members may reach outside the fabric.
    pub egress: Egress,
    /// Seconds until it ends by itself, if it does.
    #[serde(default)]
    pub ttl_s: Option<u32>,
    /// What its members read from the metadata service.
    #[serde(default)]
    pub user_data: Option<String>,
}

impl ArrivingSession {
    /// What another host has to know of a session to make it, at this time.
    pub(in crate::agent) fn of(session: &SessionRecord, user_data: Option<String>, now: Steady) -> Self {
        let (ipv4, egress) = (session.ipv4, session.egress.clone());
        Self { ipv4, egress, ttl_s: session.left_s(now), user_data }
    }
}

/// Answer to [`ArrivalOrder`]: where the stream goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalReady {
    /// TCP port, at the answering host's address.
    pub port: u16,
    certificate: String,
    /// Number of connections that are waited for.
    #[serde(default = "one")]
    pub connections: u8,
    /// Whether the bundle that the machine was launched from is there, and its memory begins as that.
    #[serde(default)]
    pub has_base: bool,
    /// The newest version of the stream that is understood there.
    #[serde(default = "first_stream")]
    pub stream_version: u16,
}

/// `POST /peer/v1/arrivals/check`: whether a machine could come, if it came now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalVerdict {
    /// Whether the bundle that it was launched from is there.
    pub has_base: bool,
    /// Memory the host could give to guests, in bytes.
    pub memory_available_bytes: u64,
    /// The newest version of the stream that is understood there.
    #[serde(default = "first_stream")]
    pub stream_version: u16,
}

/// Answer to the word of a decision, and to the question for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecisionBody {
    /// What was decided; absent: nothing yet.
    pub decision: Option<Decision>,
    /// For how long the machine had run on this host when this was said, in microseconds: 0 if it does not, or that is not
    /// known.
    #[serde(default)]
    pub ran_us: u64,
}

impl DecisionBody {
    /// A decision of which no more is known.
    pub(in crate::agent) const fn of(decision: Option<Decision>) -> Self {
        Self { decision, ran_us: 0 }
    }
}

/// What a peer is told of a machine that it waits for.
fn told(id: &MigrationId, what: &str) -> PeerCall {
    PeerCall { method: "POST", path: format!("{ARRIVALS_PATH}/{id}/{what}"), body: Vec::new(), head: None }
}

/// Answer to `GET /peer/v1/vms/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PresenceBody {
    /// What the VM does there; absent: there is none.
    pub state: Option<String>,
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? * 16 + digit(pair[1])?)).collect()
}

impl ArrivalOrder {
    /// What another host has to know of a VM to take it.
    pub(in crate::agent) fn of(
        vm: &VmRecord,
        way: &MigrationRecord,
        session: Option<ArrivingSession>,
        (host, needs, disks): (u16, GuestNeeds, Vec<DiskIdentity>),
        (certificate, token): (&[u8], [u8; 32]),
    ) -> Self {
        let home = |network: &NetworkRecord| NetworkRecord { home: network.home.or(Some(host)), ..network.clone() };
        Self {
            migration: way.id.clone(),
            host,
            vm: vm.id.clone(),
            name: vm.name.clone(),
            spec: VmSpec { volumes: standing_by(vm, host), ..vm.spec.clone() },
            generation: vm.generation.clone(),
            guest_protocol: vm.guest_protocol.map(version_to_go_on),
            created_at: vm.created_at,
            network: vm.network.as_ref().map(home),
            session,
            certificate: hexadecimal(certificate),
            token: hexadecimal(&token),
            connections: way.policy.connections,
            base: vm.spec.bundle.clone(),
            disks,
            needs: Some(needs),
        }
    }

    /// The sender's certificate and the stream's token, if they are such.
    pub(in crate::agent) fn keys(&self) -> Option<(Vec<u8>, [u8; 32])> {
        Some((bytes(&self.certificate)?, bytes(&self.token)?.try_into().ok()?))
    }
}

/// The volumes as the other host is to have them: with leases of its own, which stand by.
fn standing_by(vm: &VmRecord, own: u16) -> Vec<VolumeSlot> {
    let theirs = |used: &VolumeUse| {
        let (lease, secret) = used.standby.clone().unwrap_or_else(|| (used.lease.clone(), used.secret.clone()));
        VolumeUse { lease, secret, home: used.home.or(Some(own)), standby: None, ..used.clone() }
    };
    let slots = vm.spec.volumes.iter();
    slots.map(|slot| VolumeSlot { used: slot.used.as_ref().map(theirs), ..slot.clone() }).collect()
}

impl ArrivalReady {
    /// A place to send a machine to.
    pub(in crate::agent) fn new(port: u16, certificate: &[u8], connections: u8, has_base: bool) -> Self {
        let stream_version = stream::VERSION;
        Self { port, certificate: hexadecimal(certificate), connections, has_base, stream_version }
    }

    /// The certificate of the receiving end, if it is one.
    pub(in crate::agent) fn certificate(&self) -> Option<Vec<u8>> {
        bytes(&self.certificate)
    }
}

impl<W: World> Shared<W> {
    /// Has a peer wait for a machine.
    pub(in crate::agent) async fn arrange_at_peer(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        order: &ArrivalOrder,
    ) -> Result<ArrivalReady, PeerError> {
        let body = serde_json::to_vec(order);
        let body = body.map_err(|source| PeerError::Malformed { peer: peer.name.clone(), source })?;
        let call = PeerCall { method: "POST", path: ARRIVALS_PATH.to_owned(), body, head: None };
        self.ask_peer_signed(fabric, peer, call, ARRANGE_LIMIT).await
    }

    /// Asks a peer whether it would take a machine.
    pub(in crate::agent) async fn check_at_peer(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        order: &ArrivalOrder,
    ) -> Result<ArrivalVerdict, PeerError> {
        let body = serde_json::to_vec(order);
        let body = body.map_err(|source| PeerError::Malformed { peer: peer.name.clone(), source })?;
        let call = PeerCall { method: "POST", path: ARRIVAL_CHECK_PATH.to_owned(), body, head: None };
        self.ask_peer_signed(fabric, peer, call, ARRANGE_LIMIT).await
    }

    /// Tells a peer that the machine is its, on a line that is held ready if there is one, and waits until it runs there.
    /// Gives for how long it had run there when that was answered, as far as the peer says.
    pub(in crate::agent) async fn confirm_at_peer(
        &self,
        line: Option<LineAhead>,
        fabric: &FabricConfig,
        peer: &Peer,
        id: &MigrationId,
    ) -> Result<Duration, PeerError> {
        let ran = |body: DecisionBody| Duration::from_micros(body.ran_us);
        if let Some(line) = line
            && let Some(answer) = self.ask_peer_ahead(line, fabric, peer, told(id, "commit"), CONFIRM_LIMIT).await
        {
            return answer.map(ran);
        }
        self.ask_peer_signed(fabric, peer, told(id, "commit"), CONFIRM_LIMIT).await.map(ran)
    }

    /// Tells a peer that the machine stays here.
    pub(in crate::agent) async fn cancel_at_peer(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        id: &MigrationId,
    ) -> Result<(), PeerError> {
        let _: DecisionBody = self.ask_peer_signed(fabric, peer, told(id, "cancel"), ASK_LIMIT).await?;
        Ok(())
    }

    /// Whether a peer has this VM.
    pub(in crate::agent) async fn is_at_peer(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        vm: &VmId,
    ) -> Result<bool, PeerError> {
        let call = PeerCall { method: "GET", path: format!("{LAUNCH_PATH}/{vm}"), body: Vec::new(), head: None };
        let PresenceBody { state } = self.ask_peer_signed(fabric, peer, call, ASK_LIMIT).await?;
        Ok(state.is_some())
    }

    /// Asks the host a machine came from whose it is.
    pub(in crate::agent) async fn ask_decision(
        &self,
        fabric: &FabricConfig,
        peer: &Peer,
        id: &MigrationId,
    ) -> Result<Option<Decision>, PeerError> {
        let path = format!("{MIGRATIONS_PATH}{id}");
        let call = PeerCall { method: "GET", path, body: Vec::new(), head: None };
        let DecisionBody { decision, .. } = self.ask_peer_signed(fabric, peer, call, ASK_LIMIT).await?;
        Ok(decision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_of_before_understand_the_first_stream() {
        let ready: ArrivalReady = serde_json::from_str(r#"{"port":1,"certificate":"00"}"#).unwrap();
        assert_eq!((ready.stream_version, ready.connections, ready.has_base), (1, 1, false));
        let verdict: ArrivalVerdict =
            serde_json::from_str(r#"{"has_base":true,"memory_available_bytes":5,"later":null}"#).unwrap();
        assert_eq!(verdict.stream_version, 1);
    }

    #[test]
    fn bytes_are_digits_and_back() {
        assert_eq!(bytes(&hexadecimal(&[0, 0xff, 7])), Some(vec![0, 0xff, 7]));
        for wrong in ["0", "0g", "é0"] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }
}
