//! The effect by which a guest becomes a member of its cluster: it is asked to register, and the registrar's word is in
//! the ledger before the guest hears it. An agent that ends anywhere between is followed by one that asks again, and
//! gives the same answer.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use hearth_guest_wire::{Endpoint, FromGuest, Join, Registration, ToGuest};
use tokio::time::sleep;

use super::{Outcome, Work, ended, micros};
use crate::agent::cluster_record::{ClusterRecord, Membership, Registered};
use crate::agent::guest::{self, ANSWER_LIMIT, GuestError, GuestLink};
use crate::agent::ledger::{ClusterRefusal, LedgerError, Write};
use crate::agent::register::{Knock, Taken, registered_event, take_down};
use crate::agent::registrar::RegistrationWords;
use crate::agent::shared::Shared;
use crate::agent::vm_state::FailureCause;
use crate::agent::world::{Records, VmmHost, World};
use crate::clock::Clock;
use crate::ids::{Generation, VmId};
use crate::report::chain;

/// The first version of the guests' protocol that can be asked to join.
const SINCE_VERSION: u16 = 3;

/// Time until a guest whose agent did not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(500);

/// Longest time a guest takes for one try to reach a registrar elsewhere, and hear of it.
const ENDPOINT_LIMIT: Duration = Duration::from_secs(10);

type Stream<W> = <<W as World>::Vmm as VmmHost>::Stream;

/// What a guest's agent said last.
enum Said<S> {
    /// It wants to be registered, and waits for the answer.
    Asks(Box<GuestLink<S>>, Registration),
    /// The registrar elsewhere has taken it.
    Joined(u64),
    /// It has heard that it is registered.
    Heard,
}

/// What comes next while a VM registers.
enum Next<S> {
    Said(Result<Said<S>, GuestError>),
    Knock(Knock),
}

type Saying<S> = Pin<Box<dyn Future<Output = Result<Said<S>, GuestError>> + Send>>;

impl<W: World> Work<W> {
    /// Waits until the guest has registered with its cluster and heard of it.
    pub(super) async fn register(&mut self) -> Result<(), Outcome> {
        let Some(member) = self.record.spec.cluster.clone() else { return Ok(()) };
        let id = member.cluster.clone();
        let found = self.shared.world.records().with(move |store| store.cluster(id.as_str())).await;
        let cluster = found.map_err(Outcome::Broken)?.ok_or_else(|| not_registered("its cluster is gone"))?;
        let knows_join = self.record.guest_protocol.is_some_and(|version| version >= SINCE_VERSION);
        if !knows_join && cluster.endpoint.is_some() {
            return Err(not_registered("its agent is too old to register with a registrar elsewhere"));
        }
        if knows_join || self.record.registration.is_none() {
            self.until_registered(&cluster, &member, knows_join).await?;
        }
        let now = self.now();
        if let Some(asked) = self.asked_at {
            let took = Some(micros(now.since(asked)));
            (self.record.timings.registered_us, self.record.timings.total_us) = (took, took);
        }
        Ok(())
    }

    async fn until_registered(
        &mut self,
        cluster: &ClusterRecord,
        member: &Membership,
        knows_join: bool,
    ) -> Result<(), Outcome> {
        let limit = Duration::from_secs(cluster.registration_deadline_s.into());
        let mut deadline = pin!(sleep(limit));
        let (mut hurry, process) = (self.hurry.clone(), self.process.clone());
        let (shared, join) = (Arc::clone(&self.shared), join(cluster, member));
        let mut counter = shared.desk.open(&self.record.id);
        let vm = self.record.id.clone();
        let ask = |pause| -> Saying<Stream<W>> { Box::pin(ask(Arc::clone(&shared), vm.clone(), join.clone(), pause)) };
        let mut saying: Saying<Stream<W>> =
            if knows_join { ask(Duration::ZERO) } else { Box::pin(std::future::pending()) };
        let mut last = None;
        loop {
            let next = tokio::select! {
                biased;
                _ = hurry.wait_for(|hurry| *hurry) => return Err(Outcome::Hurried),
                end = ended(process.as_ref()) => return Err(Outcome::VmmEnded(end)),
                said = &mut saying => Next::Said(said),
                () = &mut deadline => {
                    let last = last.unwrap_or_else(|| silence(knows_join).to_owned());
                    return Err(not_registered(&format!("it did not register within {} s: {last}", limit.as_secs())));
                }
                // Last: a guest that asks without end gets no longer by it.
                knock = counter.next() => Next::Knock(knock),
            };
            match next {
                Next::Knock(Knock { words, reply }) => {
                    let taken = self.take(cluster, words).await?.map(|(admission, _)| admission.epoch());
                    let is_registered = taken.is_ok();
                    // A guest that has hung up asks again, and is answered the same.
                    if reply.send(taken).is_ok() && is_registered {
                        return Ok(());
                    }
                }
                Next::Said(Ok(Said::Heard)) => return Ok(()),
                Next::Said(Ok(Said::Joined(epoch))) => return self.note_joined(epoch).await,
                Next::Said(Ok(Said::Asks(link, registration))) => {
                    let answer = match self.take(cluster, words_of(registration)).await? {
                        Ok((admission, _)) => ToGuest::Registered { epoch: admission.epoch() },
                        Err(refusal) => {
                            let reason = refusal.to_string();
                            let detail = format!("it asked to be registered, and was refused: {reason}");
                            drop(saying);
                            let refused = ToGuest::RegistrationRefused { reason };
                            // It is about to end: whether it listens does not matter.
                            let _ = tokio::time::timeout(ASK_AGAIN, tell(*link, refused)).await;
                            return Err(not_registered(&detail));
                        }
                    };
                    saying = Box::pin(tell(*link, answer));
                }
                Next::Said(Err(error)) => {
                    last = Some(chain(&error));
                    saying = ask(ASK_AGAIN);
                }
            }
        }
    }

    /// Has the registrar's word on a registration in the ledger.
    async fn take(&mut self, cluster: &ClusterRecord, words: RegistrationWords) -> Result<Taken, Outcome> {
        let (id, vm, now) = (cluster.id.clone(), self.record.clone(), self.shared.world.clock().wall());
        let take = move |cluster: &mut ClusterRecord| take_down(cluster, vm, &words, now);
        let taken = self.shared.world.records().with(move |store| store.change_cluster(&id, take)).await;
        let is_unknown = |error: &LedgerError| matches!(error, LedgerError::Cluster(ClusterRefusal::Unknown));
        let (taken, last) = taken.map_err(|error| {
            if is_unknown(&error) { not_registered("its cluster is gone") } else { Outcome::Broken(error) }
        })?;
        self.shared.wake_readers(last);
        match &taken {
            Ok((_, vm)) => self.record = vm.clone(),
            Err(refusal) => self.shared.tell_refusal(&self.record, *refusal).await.map_err(Outcome::Broken)?,
        }
        Ok(taken)
    }

    /// A registrar elsewhere has taken the guest: that is in the ledger before anything follows from it.
    async fn note_joined(&mut self, epoch: u64) -> Result<(), Outcome> {
        if self.record.registration.is_some_and(|registered| registered.epoch == epoch) {
            return Ok(());
        }
        let now = self.shared.world.clock().wall();
        self.record.registration = Some(Registered { epoch, at: now });
        self.record.revision += 1;
        let writes = vec![Write::Vm(Box::new(self.record.clone())), registered_event(now, &self.record, epoch)];
        self.shared.commit(writes).await.map_err(Outcome::Broken)
    }
}

/// Asks a guest to join, after a pause.
async fn ask<W: World>(
    shared: Arc<Shared<W>>,
    vm: VmId,
    join: Join,
    pause: Duration,
) -> Result<Said<Stream<W>>, GuestError> {
    sleep(pause).await;
    let mut link = guest::connect(shared.world.vmm(), &vm).await?;
    let answer = link.request(&ToGuest::Join(join), ANSWER_LIMIT).await?;
    if let FromGuest::Joined { epoch } = answer {
        return Ok(Said::Joined(epoch));
    }
    let FromGuest::Register(registration) = answer else { return Err(GuestError::Unexpected) };
    Ok(Said::Asks(Box::new(link), registration))
}

/// Tells a guest what became of its registration.
async fn tell<S: crate::agent::world::ByteStream>(
    mut link: GuestLink<S>,
    answer: ToGuest,
) -> Result<Said<S>, GuestError> {
    link.done(&answer, ANSWER_LIMIT).await.map(|()| Said::Heard)
}

fn join(cluster: &ClusterRecord, member: &Membership) -> Join {
    let endpoint = cluster.endpoint.map(|endpoint| match endpoint {
        SocketAddr::V4(at) => Endpoint::V4(at.ip().octets(), at.port()),
        SocketAddr::V6(at) => Endpoint::V6(at.ip().octets(), at.port()),
    });
    Join {
        cluster_id: cluster.id.to_string(),
        executor_id: member.executor_id.clone(),
        token: cluster.token.secret().to_owned(),
        endpoint,
        timeout_ms: u32::try_from(ENDPOINT_LIMIT.as_millis()).unwrap_or(u32::MAX),
    }
}

fn words_of(registration: Registration) -> RegistrationWords {
    let Registration { executor_id, cluster_id, vm_id, generation, token } = registration;
    let generation = Generation(generation).to_string();
    RegistrationWords { executor_id, cluster_id, vm_id: Some(vm_id), generation, token }
}

/// What is known of a guest that said nothing.
const fn silence(knows_join: bool) -> &'static str {
    if knows_join {
        "it did not answer when it was asked to"
    } else {
        "its agent is too old to be asked to, and no program in it did by the metadata service"
    }
}

fn not_registered(detail: &str) -> Outcome {
    Outcome::Failed(FailureCause::NotRegistered { detail: detail.to_owned() })
}
