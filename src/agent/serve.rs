//! The agent's answers at its [`Door`].

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hearth_guest_wire::{FromGuest, ToGuest};
use tokio::io::AsyncReadExt;
use tokio::sync::{oneshot, watch};
use tracing::Instrument;

use super::admit::promised_bytes;
use super::backups::{self, BackUpError, BackedUp};
use super::balloon;
use super::connections::Connections;
use super::door::{Door, FindError, GuestStats, HostView, NotRunning, VmError, VmStats};
use super::drain::Draining;
use super::exec::{self, AnyStream, ExecSession, ExecSpec};
use super::guest::{self, ANSWER_LIMIT, GuestError, GuestLink};
use super::health::{self, FAILURES_SHOWN, LedgerView};
use super::images::{Image, ImageError};
use super::isolation::VmJail;
use super::launch::{Key, LaunchRequest, Launched};
use super::launch_error::LaunchError;
use super::ledger::{KeyRow, LedgerError, StoredAnswer, Write, backup};
use super::metrics::Gauges;
use super::record::{EventRecord, OperationRecord, VmRecord, WakeCause};
use super::session::{FabricView, SessionCreated, SessionRequest, SessionView};
use super::session_error::SessionError;
use super::shared::{Shared, VmHandle};
use super::swap::SwapDecision;
use super::traffic;
use super::usage::{self, Usages};
use super::vm_actor::{Request, Verb, VerbError};
use super::vm_state::{Denied, VmState};
use super::world::{
    Ask, HostFacts, ImageImport, OpenStreamError, Records, VmDisk, VmNetworks, VmmHost, VmmProcess, World, random_array,
};
use super::{Agent, Store};
use crate::clock::{Clock, UnixNanos};
use crate::units::MIB;
use crate::wire::console_ring::RING_BYTES;
use crate::wire::control::{Answer, BalloonStatus};

/// Longest wait for a console's history.
const CONSOLE_LIMIT: Duration = Duration::from_secs(5);

/// Decisions about idle VMs that are shown.
const DECISIONS_SHOWN: u32 = 200;

impl<W: World> Agent<W> {
    /// A connection to a guest agent of a VM that runs, its type forgotten.
    pub(super) async fn guest_link(&self, vm: &VmRecord) -> Result<GuestLink<AnyStream>, VmError> {
        if let Some(found) = &vm.quarantine {
            let (vm, report) = (vm.id.to_string(), found.report.clone());
            return Err(VerbError::Quarantined { verb: "reach", vm, report }.into());
        }
        if !matches!(vm.state, VmState::Running | VmState::Sending) {
            return Err(Denied { state: vm.state.clone() }.into());
        }
        let vmm = self.shared.world.vmm();
        let open = vmm.guest(&vm.id, hearth_guest_wire::PORT);
        let stream = match tokio::time::timeout(guest::OPEN_LIMIT, open).await {
            Ok(stream) => stream.map_err(GuestError::Open)?,
            Err(_) => return Err(GuestError::TimedOut { limit: guest::OPEN_LIMIT }.into()),
        };
        Ok(GuestLink::open(AnyStream::counted(stream, self.shared.streams.count(&vm.id))).await?)
    }

    /// The VM a word means; one whose memory is out is woken first, as somebody wants a stream into it.
    async fn awake(&self, word: &str) -> Result<Arc<VmRecord>, VmError> {
        let handle = self.find(word)?;
        let vm = handle.record.borrow().clone();
        let is_out =
            matches!(vm.state, VmState::SwappingOut { .. } | VmState::SwappedOut { .. } | VmState::Waking { .. });
        if !is_out || !vm.spec.swap.wake.contains(&WakeCause::Vsock) {
            return Ok(vm);
        }
        self.ask_actor(&handle, Verb::Wake(WakeCause::Vsock)).await
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
        let vm = self.awake(word).await?;
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
            Ok(Ok(_)) => Ok(AnyStream::counted(stream, self.shared.streams.count(&vm.id))),
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
            stats.balloon = balloon::status(&self.shared, &vm).await;
            stats.network = traffic::interfaces(&self.shared, &vm).await.unwrap_or_default();
        }
        stats.guest = self.guest_stats(&vm).await;
        Ok((vm, stats))
    }

    async fn metrics_text(&self) -> String {
        let vms = self.records();
        let traffic = traffic::last(&self.shared, &vms);
        let states = health::count(vms.iter().map(|vm| vm.state.name()));
        let facts = self.shared.world.disk().host().await.unwrap_or_default();
        let look = |store: &mut Store| Ok((store.history()?, store.try_to_write().is_ok()));
        let (history, is_ledger_writable) = self.shared.world.records().with(look).await.unwrap_or_default();
        let pressure = self.shared.world.disk().pressure().await;
        let peers = self.fabric_view().map(|fabric| fabric.peers).unwrap_or_default();
        let limits = self.shared.config.limits;
        let now = Gauges {
            pooled: self.shared.pools.totals(),
            states,
            last_event: *self.shared.last_event.borrow(),
            events_kept: history.0,
            promised_bytes: promised_bytes(&vms),
            connections: self.shared.connections.counts(),
            ledger_queue: self.shared.world.records().queued(),
            inboxes: self.shared.vms().values().map(|vm| vm.inbox.max_capacity() - vm.inbox.capacity()).sum(),
            turns_free: self.shared.turns.available_permits(),
            is_draining: self.shared.is_draining(),
            is_ledger_writable,
            starts: self.shared.epoch,
            peers: health::count(peers.iter().map(|peer| peer.state.name())),
            conflicts: self.shared.conflicts().len(),
            reserves: (limits.memory_reserve_mib * MIB, limits.disk_reserve_mib * MIB),
            pressure,
            facts,
        };
        self.shared.metrics.text(&now, &traffic)
    }

    async fn host_view(&self) -> io::Result<HostView> {
        let facts: HostFacts = self.shared.world.disk().host().await?;
        let Shared { config, epoch, connections, .. } = &*self.shared;
        let vms = self.records();
        let mut view = HostView {
            facts,
            started_at: self.shared.started_at(),
            state_dir: config.state_dir.display().to_string(),
            epoch: *epoch,
            vm_states: health::count(vms.iter().map(|vm| vm.state.name())),
            promised_bytes: promised_bytes(&vms),
            limits: config.limits,
            is_draining: self.shared.is_draining(),
            connections: connections.counts().0,
            pressure: self.shared.world.disk().pressure().await,
            conflicts: self.shared.conflicts(),
            ledger: self.shared.world.records().with(ledger_view).await.ok(),
            warnings: Vec::new(),
        };
        view.warnings = health::warnings(&view, config, self.shared.world.clock().wall());
        Ok(view)
    }
}

/// What is known of the ledger.
fn ledger_view(store: &mut Store) -> Result<LedgerView, LedgerError> {
    let (events, oldest_event) = store.history()?;
    let failures = store.failures(FAILURES_SHOWN)?;
    let file = store.file();
    let size = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |found| found.len());
    let bytes = file.as_ref().map_or(0, |file| size(file) + size(&file.with_extension("db-wal")));
    let backups = file.as_ref().map(|file| backup::backups(file)).unwrap_or_default();
    let last_backup = backups.first().map(|backup| backup.at);
    let unwritable = store.try_to_write().err().map(|error| crate::report::chain(&error));
    Ok(LedgerView { bytes, last_backup, backups: backups.len(), events, oldest_event, failures, unwritable })
}

impl<W: World> Door for Agent<W> {
    fn launch(&self, request: LaunchRequest) -> BoxFuture<'_, Result<Launched, LaunchError>> {
        // On a task of its own: a client that hangs up between the record and the launch would leave a VM nobody
        // works on.
        let agent = self.clone();
        async move {
            let launching = tokio::spawn(async move { agent.launch_vm(request).await }.in_current_span());
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
            let runs = matches!(
                now.state,
                VmState::Running
                    | VmState::Paused
                    | VmState::Saving { .. }
                    | VmState::HandingOver { .. }
                    | VmState::ChangingVolumes { .. }
                    | VmState::Sending
            );
            if runs { Ok(now) } else { Err(NotRunning { vm: now }) }
        }
        .boxed()
    }

    fn key(&self, key: Key) -> BoxFuture<'_, Result<Option<KeyRow>, LedgerError>> {
        async move { self.key_row(&key).await }.boxed()
    }

    fn remember(&self, key: Key, object: String, answer: StoredAnswer) -> BoxFuture<'_, Result<(), LedgerError>> {
        async move {
            let row = KeyRow { answer: Some(answer.clone()), ..key.row(object, self.shared.steady()) };
            let update = Write::Answer { key: row.key.clone(), route: row.route.clone(), answer };
            let insert = Write::Key(row);
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
            let vm = self.awake(word).await?;
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

    fn set_balloon<'a>(&'a self, word: &'a str, target_mib: u64) -> BoxFuture<'a, Result<BalloonStatus, VmError>> {
        async move {
            let vm = self.find(word)?.record.borrow().clone();
            balloon::set_target(&self.shared, &vm, target_mib).await
        }
        .boxed()
    }

    fn swap_decisions(&self) -> BoxFuture<'_, Result<Vec<SwapDecision>, LedgerError>> {
        self.shared.world.records().with(|store: &mut Store| store.swap_decisions(DECISIONS_SHOWN)).boxed()
    }

    fn jail<'a>(&'a self, vm: &'a VmRecord) -> BoxFuture<'a, Option<VmJail>> {
        async move {
            let process = vm.process.filter(|_| vm.state.holds_resources()).is_some();
            if !process {
                return None;
            }
            self.shared.world.vmm().find(vm).await.ok()??.jail()
        }
        .boxed()
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
        self.import(import).boxed()
    }

    fn remove_image<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<(), ImageError>> {
        self.remove_unused_image(name).boxed()
    }

    fn usage(&self) -> BoxFuture<'_, Usages> {
        async move { usage::of(&self.shared, self.records()).await }.boxed()
    }

    fn host(&self) -> BoxFuture<'_, io::Result<HostView>> {
        self.host_view().boxed()
    }

    fn back_up_ledger(&self, to: Option<PathBuf>) -> BoxFuture<'_, Result<BackedUp, BackUpError>> {
        async move { backups::back_up(&self.shared, to).await }.boxed()
    }

    fn metrics(&self) -> BoxFuture<'_, String> {
        self.metrics_text().boxed()
    }

    fn count_request(&self, route: &str, status: u16) {
        self.shared.metrics.request(route, status);
    }

    fn count_refusal(&self, code: &str) {
        self.shared.metrics.refused(code);
    }

    fn now(&self) -> UnixNanos {
        self.shared.world.clock().wall()
    }

    fn request_id(&self) -> String {
        let random: [u8; 8] = random_array(&self.shared.world).unwrap_or_default();
        format!("{:016x}", u64::from_be_bytes(random))
    }

    fn drain(&self, grace: Duration) -> watch::Receiver<Draining> {
        self.begin_draining(grace)
    }

    fn draining(&self) -> watch::Receiver<Draining> {
        Self::draining(self)
    }

    fn connections(&self) -> Arc<Connections> {
        Arc::clone(&self.shared.connections)
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        async move {
            self.close_pools().await;
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
