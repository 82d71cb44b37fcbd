//! Leases from agent to agent: a host whose VM has a volume of another one asks that one's agent, which asks its daemon.
//! The volume's bytes go from daemon to daemon, with the lease's secret.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::{PeerCall, VOLUMES_PATH};
use crate::agent::Agent;
use crate::agent::shared::Shared;
use crate::agent::volumes::{AskVolumesError, VolumeHost, VolumeUse};
use crate::agent::world::World;
use crate::wire::volumed::{Answer, Ask, Refusal, Upstream};

/// Longest wait for another host's daemon: longer than its agent waits for that.
const LIMIT: Duration = Duration::from_secs(8);

/// `POST /peer/v1/volumes`: asks a host's volume daemon about leases, or where it serves other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeOrder {
    /// The question: about leases, or [`Ask::Listen`], of which the address is passed over.
    pub ask: Ask,
}

/// Answer to [`VolumeOrder`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeBody {
    /// What the daemon says.
    pub answer: Answer,
}

/// Whether other hosts may ask this.
const fn is_for_peers(ask: &Ask) -> bool {
    matches!(
        ask,
        Ask::Acquire { break_others: false, .. }
            | Ask::Validate { .. }
            | Ask::Convert { .. }
            | Ask::Release { .. }
            | Ask::Leases { .. }
    )
}

impl<W: World> Agent<W> {
    pub(super) fn answer_for_volumes(&self, order: VolumeOrder) -> BoxFuture<'_, Result<VolumeBody, AskVolumesError>> {
        async move {
            let volumes = self.shared.world.volumes();
            let answer = if let Ask::Listen { .. } = order.ask {
                volumes.listen().await.map(|listening| match listening {
                    Some(listening) => Answer::Listening { listening },
                    None => {
                        Answer::Refused { refusal: Refusal::Failed { text: "it serves no other hosts".to_owned() } }
                    }
                })
            } else if is_for_peers(&order.ask) {
                volumes.ask(order.ask, None).await
            } else {
                Err(AskVolumesError::Refused(Refusal::Invalid { text: "that is not asked by other hosts".to_owned() }))
            };
            match answer {
                Ok(answer) => Ok(VolumeBody { answer }),
                // The daemon's own word, which says that nothing was done.
                Err(AskVolumesError::Refused(refusal)) => Ok(VolumeBody { answer: Answer::Refused { refusal } }),
                Err(error) => Err(error),
            }
        }
        .boxed()
    }
}

impl<W: World> Shared<W> {
    /// Asks the daemon of the host that has a volume.
    pub(in crate::agent) async fn ask_home(&self, home: Option<u16>, ask: Ask) -> Result<Answer, AskVolumesError> {
        match home.filter(|home| !self.is_own_number(*home)) {
            None => self.ask_volumes(ask).await,
            Some(home) => self.ask_peer_for_volumes(home, ask).await,
        }
    }

    fn is_own_number(&self, number: u16) -> bool {
        self.config.fabric.as_ref().is_none_or(|fabric| u16::from(fabric.host) == number)
    }

    async fn ask_peer_for_volumes(&self, home: u16, ask: Ask) -> Result<Answer, AskVolumesError> {
        let away = |text: String| AskVolumesError::Home { home, text };
        let fabric = self.config.fabric.as_ref().ok_or_else(|| away("this host is in no fabric".to_owned()))?;
        let peer = fabric.peers.iter().find(|peer| u16::from(peer.host) == home);
        let peer = peer.ok_or_else(|| away("it is no peer in the configuration".to_owned()))?;
        let body = serde_json::to_vec(&VolumeOrder { ask }).map_err(|error| away(error.to_string()))?;
        let call = PeerCall { method: "POST", path: VOLUMES_PATH.to_owned(), body, head: None };
        let asked = self.ask_peer_signed::<VolumeBody>(fabric, peer, call, LIMIT).await;
        let VolumeBody { answer } = asked.map_err(|error| away(crate::report::chain(&error)))?;
        if let Answer::Refused { refusal } = answer { Err(AskVolumesError::Refused(refusal)) } else { Ok(answer) }
    }

    /// Where this host's daemon reaches a volume of another host; `None`: it is here.
    pub(in crate::agent) async fn upstream(&self, used: &VolumeUse) -> Result<Option<Upstream>, AskVolumesError> {
        let Some(home) = used.home.filter(|home| !self.is_own_number(*home)) else { return Ok(None) };
        let unspecified = std::net::Ipv4Addr::UNSPECIFIED.into();
        let answer = self.ask_peer_for_volumes(home, Ask::Listen { address: unspecified, port: 0 }).await?;
        let Answer::Listening { listening } = answer else { return Err(AskVolumesError::Unexpected) };
        let (certificate_sha256, secret) = (listening.certificate_sha256, used.secret.clone());
        Ok(Some(Upstream { address: listening.address, certificate_sha256, secret }))
    }

    /// Has a lease given back.
    pub(in crate::agent) async fn release(&self, used: &VolumeUse) -> Result<(), AskVolumesError> {
        let ask = Ask::Release { volume: used.volume.clone(), id: used.lease.clone(), only: None };
        match self.ask_home(used.home, ask).await {
            // A volume that is gone has no leases.
            Ok(_) | Err(AskVolumesError::Refused(Refusal::NotFound { .. })) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
