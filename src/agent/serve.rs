//! The agent's answers at its [`Door`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, join_all};
use hearth_guest_wire::{FromGuest, ToGuest};
use tokio::io::AsyncReadExt;
use tokio::sync::{oneshot, watch};

use super::admit::promised_bytes;
use super::door::{Door, FindError, GuestStats, HostView, NotRunning, VmError, VmStats};
use super::exec::{self, AnyStream, ExecSession, ExecSpec};
use super::guest::{self, ANSWER_LIMIT, GuestError, GuestLink};
use super::images::{Image, ImageError};
use super::launch::{KEY_LIFETIME_NS, Key, LaunchRequest, Launched};
use super::launch_error::LaunchError;
use super::ledger::{KeyRow, LedgerError, StoredAnswer, Write};
use super::record::{EventRecord, OperationRecord, VmRecord};
use super::session::{FabricView, SessionCreated, SessionRequest, SessionView};
use super::session_error::SessionError;
use super::shared::{Shared, VmHandle};
use super::traffic;
use super::vm_actor::{Request, Verb, VerbError};
use super::vm_state::{Denied, VmState};
use super::world::{
    Ask, HostFacts, ImageImport, OpenStreamError, Records, VmDisk, VmNetworks, VmmHost, VmmProcess, World, random_array,
};
use super::{Agent, Store};
use crate::clock::{Clock, UnixNanos};
use crate::wire::console_ring::RING_BYTES;
use crate::wire::control::Answer;

/// Longest wait for a console's history.
const CONSOLE_LIMIT: Duration = Duration::from_secs(5);

/// How long a guest may take to power off when the agent drains its host.
const DRAIN_GRACE: Duration = Duration::from_secs(10);

impl<W: World> Agent<W> {
    /// A connection to a guest agent of a VM that runs, its type forgotten.
    pub(super) async fn guest_link(&self, vm: &VmRecord) -> Result<GuestLink<AnyStream>, VmError> {
        if vm.state != VmState::Running {
            return Err(Denied { state: vm.state.clone() }.into());
        }
        let vmm = self.shared.world.vmm();
        let open = vmm.guest(&vm.id, hearth_guest_wire::PORT);
        let stream = match tokio::time::timeout(guest::OPEN_LIMIT, open).await {
            Ok(stream) => stream.map_err(GuestError::Open)?,
            Err(_) => return Err(GuestError::TimedOut { limit: guest::OPEN_LIMIT }.into()),
        };
        Ok(GuestLink::open(AnyStream::new(stream)).await?)
    }

    pub(super) async fn ask_actor(&self, vm: &VmHandle, verb: Verb) -> Result<Arc<VmRecord>, VmError> {
        let gone = || VmError::Verb(VerbError::Gone { vm: vm.id.to_string() });
        let (reply, answer) = oneshot::channel();
        let sent = vm.inbox.try_send(Request { verb, reply });
        sent.map_err(|error| match error {
            tokio::sync::mpsc::error::TrySendError::Full(_) => VmError::Verb(VerbError::Busy { vm: vm.id.to_string() }),
            tokio::sync::mpsc::error::TrySendError::Closed(_) => gone(),
        })?;
        Ok(answer.await.map_err(|_| gone())??)
    }

    async fn attach_console(&self, word: &str, history_bytes: usize) -> Result<AnyStream, VmError> {
        let vm = self.find(word)?.record.borrow().clone();
        if !vm.state.holds_resources() {
            return Err(Denied { state: vm.state.clone() }.into());
        }
        let failed = |source| VmError::Console { vm: vm.id.to_string(), source };
        let vmm = self.shared.world.vmm();
        // The VMM sends all it kept first. How much that is was asked before, so what is written between the two is
        // shown rather than lost.
        let written = match vmm.ask(&vm, self.shared.epoch, Ask::Status).await {
            Ok(Answer::Status(status)) => usize::try_from(status.console_bytes).unwrap_or(usize::MAX),
            Ok(_) | Err(_) => 0,
        };
        let mut stream = vmm.console(&vm.id).await.map_err(failed)?;
        let skip = written.min(RING_BYTES).saturating_sub(history_bytes);
        let skipped = async {
            let mut history = (&mut stream).take(skip as u64);
            tokio::io::copy(&mut history, &mut tokio::io::sink()).await
        };
        match tokio::time::timeout(CONSOLE_LIMIT, skipped).await {
            Ok(Ok(_)) => Ok(AnyStream::new(stream)),
            Ok(Err(error)) => Err(failed(OpenStreamError::Socket(error))),
            Err(_) => Err(failed(OpenStreamError::TimedOut { limit: CONSOLE_LIMIT })),
        }
    }

    async fn guest_stats(&self, vm: &VmRecord) -> Option<GuestStats> {
        let mut link = self.guest_link(vm).await.ok()?;
        let answer = link.request(&ToGuest::Stats, ANSWER_LIMIT).await.ok()?;
        let FromGuest::Stats(stats) = answer else { return None };
        Some(GuestStats {
            uptime_ns: stats.uptime_ns,
            wall_ns: stats.unix_ns,
            memory_total_bytes: stats.memory_total_bytes,
            memory_available_bytes: stats.memory_available_bytes,
            processes: stats.processes,
            load1_hundredths: stats.load1_hundredths,
            execs_running: stats.execs_running,
        })
    }

    async fn vm_stats(&self, word: &str) -> Result<(Arc<VmRecord>, VmStats), VmError> {
        let vm = self.find(word)?.record.borrow().clone();
        let mut stats = VmStats::default();
        if !vm.state.holds_resources() {
            return Ok((vm, stats));
        }
        let vmm = self.shared.world.vmm();
        if let Ok(Some(process)) = vmm.find(&vm).await {
            stats.process = Some((process.record().pid, process.usage()));
            if let Ok(Answer::Status(status)) = vmm.ask(&vm, self.shared.epoch, Ask::Status).await {
                stats.vmm = Some(status);
            }
            stats.network = traffic::interfaces(&self.shared, &vm).await.unwrap_or_default();
        }
        stats.guest = self.guest_stats(&vm).await;
        Ok((vm, stats))
    }

    async fn host_view(&self) -> io::Result<HostView> {
        let facts: HostFacts = self.shared.world.disk().host().await?;
        let Shared { config, epoch, started_at, .. } = &*self.shared;
        let state_dir = config.state_dir.display().to_string();
        Ok(HostView { facts, started_at: *started_at, state_dir, epoch: *epoch })
    }
}

impl<W: World> Door for Agent<W> {
    fn launch(&self, request: LaunchRequest) -> BoxFuture<'_, Result<Launched, LaunchError>> {
        // On a task of its own: a client that hangs up between the record and the launch would leave a VM nobody
        // works on.
        let agent = self.clone();
        async move {
            let launching = tokio::spawn(async move { agent.launch_vm(request).await });
            launching.await.unwrap_or(Err(LaunchError::Ending))
        }
        .boxed()
    }

    fn launched(&self, vm: Arc<VmRecord>) -> BoxFuture<'_, Result<Arc<VmRecord>, NotRunning>> {
        let handle = self.shared.vms().get(&vm.id).cloned();
        async move {
            let Some(mut handle) = handle else { return Err(NotRunning { vm }) };
            let over =
                |vm: &Arc<VmRecord>| !matches!(vm.state, VmState::Reserved | VmState::Launching | VmState::Registering);
            let now = match handle.record.wait_for(over).await {
                Ok(record) => record.clone(),
                // Its actor has ended: forgotten, or the agent is ending.
                Err(_) => return Err(NotRunning { vm }),
            };
            let runs = matches!(now.state, VmState::Running | VmState::Paused | VmState::Saving { .. });
            if runs { Ok(now) } else { Err(NotRunning { vm: now }) }
        }
        .boxed()
    }

    fn key(&self, key: Key) -> BoxFuture<'_, Result<Option<KeyRow>, LedgerError>> {
        async move { self.key_row(&key).await }.boxed()
    }

    fn remember(&self, key: Key, object: String, answer: StoredAnswer) -> BoxFuture<'_, Result<(), LedgerError>> {
        async move {
            let Key { key, route, body_hash } = key;
            let expires = UnixNanos(self.shared.world.clock().wall().0.saturating_add(KEY_LIFETIME_NS));
            let update = Write::Answer { key: key.clone(), route: route.clone(), answer: answer.clone() };
            let insert = Write::Key(KeyRow { key, route, body_hash, object, expires, answer: Some(answer) });
            match self.shared.commit(vec![insert]).await {
                Err(LedgerError::Taken { .. }) => self.shared.commit(vec![update]).await,
                other => other,
            }
        }
        .boxed()
    }

    fn fabric(&self) -> Option<FabricView> {
        self.fabric_view()
    }

    fn create_session(&self, request: SessionRequest) -> BoxFuture<'_, Result<SessionCreated, SessionError>> {
        self.make_session(request).boxed()
    }

    fn sessions(&self) -> BoxFuture<'_, Result<Vec<SessionView>, LedgerError>> {
        self.list_sessions().boxed()
    }

    fn session<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<SessionView, SessionError>> {
        async move { Ok(self.view(self.find_session(word).await?).await) }.boxed()
    }

    fn remove_session<'a>(
        &'a self,
        word: &'a str,
        drain: bool,
        grace: Duration,
    ) -> BoxFuture<'a, Result<(), SessionError>> {
        // On a task of its own: a client that hangs up does not leave a session half drained.
        let (agent, word) = (self.clone(), word.to_owned());
        async move {
            let ending = tokio::spawn(async move { agent.end_session(&word, drain, grace).await });
            ending.await.unwrap_or(Err(SessionError::Ending))
        }
        .boxed()
    }

    fn vms(&self) -> Vec<Arc<VmRecord>> {
        self.records()
    }

    fn vm(&self, word: &str) -> Result<Arc<VmRecord>, FindError> {
        self.find(word).map(|vm| vm.record.borrow().clone())
    }

    fn ask<'a>(&'a self, word: &'a str, verb: Verb) -> BoxFuture<'a, Result<Arc<VmRecord>, VmError>> {
        async move {
            let vm = self.find(word)?;
            self.ask_actor(&vm, verb).await
        }
        .boxed()
    }

    fn exec<'a>(&'a self, word: &'a str, spec: ExecSpec) -> BoxFuture<'a, Result<ExecSession, VmError>> {
        async move {
            let vm = self.find(word)?.record.borrow().clone();
            exec::check(&spec)?;
            let link = self.guest_link(&vm).await?;
            Ok(exec::start(link, spec).await?)
        }
        .boxed()
    }

    fn console<'a>(&'a self, word: &'a str, history_bytes: usize) -> BoxFuture<'a, Result<AnyStream, VmError>> {
        self.attach_console(word, history_bytes).boxed()
    }

    fn console_history<'a>(&'a self, word: &'a str, bytes_max: usize) -> BoxFuture<'a, Result<Vec<u8>, VmError>> {
        async move {
            let vm = self.find(word)?.record.borrow().clone();
            if let Some(remains) = vm.remains.as_ref().filter(|_| !vm.state.holds_resources()) {
                let mut text = remains.console.join("\n").into_bytes();
                text.push(b'\n');
                return Ok(text.split_off(text.len().saturating_sub(bytes_max)));
            }
            match self.shared.world.disk().console_history(&vm.id, bytes_max).await {
                Ok(history) => Ok(history),
                // Not launched far enough to have one.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                Err(source) => Err(VmError::History { vm: vm.id.to_string(), source }),
            }
        }
        .boxed()
    }

    fn stats<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<(Arc<VmRecord>, VmStats), VmError>> {
        self.vm_stats(word).boxed()
    }

    fn operation<'a>(&'a self, word: &'a str) -> BoxFuture<'a, Result<Option<OperationRecord>, LedgerError>> {
        let word = word.to_owned();
        self.shared.world.records().with(move |store| store.operation(&word)).boxed()
    }

    fn operations(&self) -> BoxFuture<'_, Result<Vec<OperationRecord>, LedgerError>> {
        self.shared.world.records().with(|store: &mut Store| store.operations()).boxed()
    }

    fn events(&self, since: u64) -> BoxFuture<'_, Result<Vec<EventRecord>, LedgerError>> {
        self.shared.world.records().with(move |store| store.events(since)).boxed()
    }

    fn last_event(&self) -> watch::Receiver<u64> {
        self.shared.last_event.subscribe()
    }

    fn images(&self) -> BoxFuture<'_, Result<Vec<Image>, ImageError>> {
        self.shared.world.disk().images().boxed()
    }

    fn image<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Image, ImageError>> {
        self.shared.world.disk().image(name).boxed()
    }

    fn import_image(&self, import: ImageImport) -> BoxFuture<'_, Result<Image, ImageError>> {
        self.shared.world.disk().import_image(import).boxed()
    }

    fn remove_image<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ImageError>> {
        self.remove_unused_image(name).boxed()
    }

    fn host(&self) -> BoxFuture<'_, io::Result<HostView>> {
        self.host_view().boxed()
    }

    fn metrics(&self) -> String {
        let vms = self.records();
        let mut states = std::collections::BTreeMap::new();
        for vm in &vms {
            *states.entry(vm.state.name()).or_insert(0) += 1;
        }
        let states: Vec<_> = states.into_iter().collect();
        let traffic = traffic::last(&self.shared, &vms);
        self.shared.metrics.text(&states, *self.shared.last_event.borrow(), promised_bytes(&vms), &traffic)
    }

    fn count_request(&self, route: &str, status: u16) {
        self.shared.metrics.request(route, status);
    }

    fn now(&self) -> UnixNanos {
        self.shared.world.clock().wall()
    }

    fn request_id(&self) -> String {
        let random: [u8; 8] = random_array(&self.shared.world).unwrap_or_default();
        format!("{:016x}", u64::from_be_bytes(random))
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        async move {
            let vms: Vec<VmHandle> = self.shared.vms().values().cloned().collect();
            let living = vms.iter().filter(|vm| vm.record.borrow().state.holds_resources());
            join_all(living.map(|vm| async move {
                if let Err(error) = self.ask_actor(vm, Verb::Stop { grace: DRAIN_GRACE }).await {
                    tracing::warn!(vm = %vm.id, error = %crate::report::chain(&error), "cannot stop it");
                }
            }))
            .await;
        }
        .boxed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            if let Err(error) = self.shared.world.networks().end().await {
                tracing::warn!(error = %crate::report::chain(&error), "something of the network is left");
            }
        }
        .boxed()
    }

    fn broken(&self) -> watch::Receiver<Option<String>> {
        self.shared.broken.subscribe()
    }
}
