//! Taking registrations down: what the [`registrar`](super::registrar) says becomes ledger writes in one transaction,
//! before a guest hears of it. Registrations come two ways, and one place takes both: the VM's work, which asks the
//! guest's agent over vsock, and has a [`Desk`] for those that come by the metadata service meanwhile.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot};

use super::Agent;
use super::cluster_record::{ClusterRecord, Registered};
use super::ledger::{LedgerError, NewEvent, Write};
use super::record::{Subject, VmRecord};
use super::registrar::{Admission, RegistrationRefusal, RegistrationWords, admit};
use super::self_door::OwnError;
use super::shared::Shared;
use super::world::{Records, World};
use crate::clock::{Clock, UnixNanos};
use crate::ids::VmId;

/// Registrations of one VM that may wait.
const WAITING_MAX: usize = 4;

/// A registration that came by the metadata service.
#[derive(Debug)]
pub(super) struct Knock {
    /// What the guest says.
    pub words: RegistrationWords,
    /// Where the answer goes: the number of the registration.
    pub reply: oneshot::Sender<Result<u64, RegistrationRefusal>>,
}

/// Where registrations that come by the metadata service reach the work that waits for them.
#[derive(Debug, Default)]
pub(super) struct Desk(Mutex<BTreeMap<VmId, mpsc::Sender<Knock>>>);

/// One VM's place at the desk: registrations of it are taken while it is there.
#[derive(Debug)]
pub(super) struct Counter<'a> {
    desk: &'a Desk,
    vm: VmId,
    knocks: mpsc::Receiver<Knock>,
}

impl Desk {
    fn counters(&self) -> MutexGuard<'_, BTreeMap<VmId, mpsc::Sender<Knock>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes registrations of a VM from now on.
    pub(super) fn open(&self, vm: &VmId) -> Counter<'_> {
        let (sender, knocks) = mpsc::channel(WAITING_MAX);
        self.counters().insert(vm.clone(), sender);
        Counter { desk: self, vm: vm.clone(), knocks }
    }

    /// Hands a registration over; gives it back when nobody waits for it.
    fn knock(&self, vm: &VmId, knock: Knock) -> Result<(), Box<Knock>> {
        let counter = self.counters().get(vm).cloned();
        match counter {
            Some(counter) => counter.try_send(knock).map_err(|error| Box::new(error.into_inner())),
            None => Err(Box::new(knock)),
        }
    }
}

impl Counter<'_> {
    /// The next registration. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Knock {
        match self.knocks.recv().await {
            Some(knock) => knock,
            // Another counter of the same VM has taken its place: nothing comes here any more.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Counter<'_> {
    fn drop(&mut self) {
        self.desk.counters().remove(&self.vm);
    }
}

/// What the registrar said, and the VM's record with it.
pub(super) type Taken = Result<(Admission, VmRecord), RegistrationRefusal>;

/// Decides on a registration: what becomes of the cluster and the VM, and what is written.
pub(super) fn take_down(
    cluster: &mut ClusterRecord,
    mut vm: VmRecord,
    words: &RegistrationWords,
    now: UnixNanos,
) -> (Taken, Vec<Write>) {
    match admit(cluster, &vm, words) {
        Ok(admission @ Admission::Again { .. }) => (Ok((admission, vm)), Vec::new()),
        Ok(admission @ Admission::New { epoch }) => {
            cluster.epoch = epoch;
            vm.registration = Some(Registered { epoch, at: now });
            vm.revision += 1;
            let writes = vec![Write::Vm(Box::new(vm.clone())), registered_event(now, &vm, epoch)];
            (Ok((admission, vm)), writes)
        }
        Err(refusal) => (Err(refusal), Vec::new()),
    }
}

/// The event of a registration that was taken.
pub(super) fn registered_event(at: UnixNanos, vm: &VmRecord, epoch: u64) -> Write {
    member_event(at, "member_registered", vm, serde_json::json!({ "epoch": epoch }))
}

/// An event about a member, with who it is in its cluster.
pub(super) fn member_event(at: UnixNanos, kind: &'static str, vm: &VmRecord, mut body: serde_json::Value) -> Write {
    if let Some(member) = &vm.spec.cluster {
        body["cluster"] = member.cluster.to_string().into();
        body["executor_id"] = member.executor_id.clone().into();
        body["attempt"] = member.attempt.into();
    }
    let (subject, operation) = (Subject::Vm(vm.id.clone()), vm.operation.clone());
    Write::Event(NewEvent { at, kind, subject, operation, body })
}

impl<W: World> Shared<W> {
    /// Tells of a registration that was refused, if the VM has not had many of them.
    pub(super) async fn tell_refusal(&self, vm: &VmRecord, refusal: RegistrationRefusal) -> Result<(), LedgerError> {
        if !self.may_tell_denial(&vm.id) {
            return Ok(());
        }
        tracing::warn!(vm = %vm.id, %refusal, "a registration is refused");
        let body = serde_json::json!({ "code": refusal.name(), "reason": refusal.to_string() });
        let now = self.world.clock().wall();
        self.commit(vec![member_event(now, "registration_refused", vm, body)]).await
    }
}

impl<W: World> Agent<W> {
    /// A registration that a program in a guest asks for by the metadata service: the number of it.
    pub(super) async fn register_by_metadata(&self, vm: &VmId, words: RegistrationWords) -> Result<u64, OwnError> {
        let (reply, answer) = oneshot::channel();
        let words = match self.shared.desk.knock(vm, Knock { words, reply }) {
            Ok(()) => {
                let answer = answer.await.unwrap_or(Err(RegistrationRefusal::NotNow));
                return answer.map_err(OwnError::Registration);
            }
            Err(knock) => knock.words,
        };
        // Nobody waits for it, so it is refused: which refusal it is depends on its words.
        let handle = self.shared.vms().get(vm).cloned().ok_or(OwnError::Gone)?;
        let record = handle.record.borrow().clone();
        let Some(member) = record.spec.cluster.clone() else {
            return Err(OwnError::Registration(RegistrationRefusal::NotInCluster));
        };
        let found = self.shared.world.records().with(move |store| store.cluster(member.cluster.as_str())).await?;
        let refusal = match found.as_ref().map(|cluster| admit(cluster, &record, &words)) {
            Some(Err(refusal)) => refusal,
            Some(Ok(_)) => RegistrationRefusal::NotNow,
            None => RegistrationRefusal::NotInCluster,
        };
        self.shared.tell_refusal(&record, refusal).await?;
        Err(OwnError::Registration(refusal))
    }
}
