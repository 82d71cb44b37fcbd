//! Jails of this host: `net::host` on blocking threads, jails made ahead, what was healed told as events, and the
//! metadata service's sockets.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::member::member;
use super::record::VmRecord;
use super::session_record::JAILS_MAX;
use super::world::{Drops, NetworkChange, NetworkError, VmNetworks};
use crate::net::address::{Fabric, HostNumber};
use crate::net::desired::{TAPS_MAX, tap};
use crate::net::host::{HostNetwork, NetworkSpec, OpenNetworkError, QUEUE_FULL, Settled};
use crate::net::member::{METADATA_PORT, METADATA_V4, METADATA_V6, Member};
use crate::net::watch::Watcher;
use crate::sys::{netns, sock};

/// Reports that wait to be written down; more are dropped and said in the log: somebody changes things in a loop.
const CHANGES_MAX: usize = 256;

/// How long after a jail was taken the next is made ahead: launches go first.
const FILL_DELAY: Duration = Duration::from_millis(300);

/// Jails of this host.
#[derive(Debug, Clone)]
pub struct HostNetworks(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    network: Arc<HostNetwork>,
    numbers: Mutex<Numbers>,
    changes: Mutex<Option<mpsc::Receiver<NetworkChange>>>,
    pool: usize,
    /// Held while a jail is made ahead.
    making: tokio::sync::Mutex<()>,
    /// Ends with this.
    _watcher: Watcher,
}

/// Which jails are whose.
#[derive(Debug, Default)]
struct Numbers {
    /// Made ahead, closed, nobody's.
    ready: VecDeque<u16>,
    /// Given to a launch; its record may not be there yet.
    taken: BTreeSet<u16>,
    /// Being made ahead.
    filling: BTreeSet<u16>,
    /// A task that fills is on its way.
    is_filling: bool,
    /// No more are made ahead.
    is_ending: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: &(dyn std::error::Error + 'static)) -> NetworkError {
    NetworkError { failures: vec![crate::report::chain(error)] }
}

fn result(settled: Settled) -> Result<(), NetworkError> {
    if settled.failures.is_empty() {
        return Ok(());
    }
    Err(NetworkError { failures: settled.failures.into_iter().map(|failure| failure.what).collect() })
}

impl HostNetworks {
    /// Opens this host's network and begins to watch it. `pool` jails are kept ready.
    pub fn open(spec: NetworkSpec, pool: usize) -> Result<Self, OpenNetworkError> {
        let network = Arc::new(HostNetwork::open(spec)?);
        let (tell, changes) = mpsc::channel(CHANGES_MAX);
        let report = move |jail: Option<u16>, settled: Settled| {
            let change = NetworkChange {
                jail,
                steps: settled.steps.iter().map(ToString::to_string).collect(),
                failures: settled.failures.into_iter().map(|failure| failure.what).collect(),
            };
            if let Err(error) = tell.try_send(change) {
                tracing::warn!(%error, "a change of the network is not recorded");
            }
        };
        let watcher = Watcher::start(Arc::clone(&network), Box::new(report))
            .map_err(|source| OpenNetworkError::Namespace { what: "start watching the network".to_owned(), source })?;
        let (numbers, changes) = (Mutex::default(), Mutex::new(Some(changes)));
        let making = tokio::sync::Mutex::default();
        Ok(Self(Arc::new(Shared { network, numbers, changes, pool, making, _watcher: watcher })))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&HostNetwork) -> T + Send + 'static,
    ) -> Result<T, NetworkError> {
        let network = Arc::clone(&self.0.network);
        let work = spawn_blocking(move || work(&network));
        work.await.map_err(|_| NetworkError { failures: vec!["the agent is ending".to_owned()] })
    }

    async fn settle(&self, number: u16, taps: u8, member: Option<Member>) -> Result<(), NetworkError> {
        let settled = self.blocking(move |network| network.settle_jail(number, taps, member)).await?;
        result(settled.map_err(|error| failed(&error))?)
    }

    /// Makes jails ahead, a moment after the last one was taken.
    fn fill(&self) {
        let mut numbers = lock(&self.0.numbers);
        if self.0.pool == 0 || std::mem::replace(&mut numbers.is_filling, true) {
            return;
        }
        drop(numbers);
        let networks = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(FILL_DELAY).await;
                let _making = networks.0.making.lock().await;
                let Some(number) = networks.begin_filling() else { return };
                let made = networks.settle(number, 1, None).await;
                if let Err(error) = &made {
                    tracing::warn!(error = %crate::report::chain(error), "cannot make a jail ahead");
                    if let Err(error) =
                        networks.blocking(move |network| network.remove_jail(number)).await.and_then(result)
                    {
                        tracing::warn!(error = %crate::report::chain(&error), "cannot remove the half of it");
                    }
                }
                let mut numbers = lock(&networks.0.numbers);
                numbers.filling.remove(&number);
                if made.is_err() {
                    numbers.is_filling = false;
                    return;
                }
                numbers.ready.push_back(number);
            }
        });
    }

    /// A number for a jail to make ahead; `None` when there are enough, or no more are wanted.
    fn begin_filling(&self) -> Option<u16> {
        let there = self.0.network.jails().unwrap_or_default();
        let mut numbers = lock(&self.0.numbers);
        let enough = numbers.is_ending || numbers.ready.len() >= self.0.pool;
        let free = (0..JAILS_MAX).rev().find(|number| !there.contains(number) && !numbers.taken.contains(number));
        match free.filter(|_| !enough) {
            Some(number) => {
                numbers.filling.insert(number);
                Some(number)
            }
            None => {
                numbers.is_filling = false;
                None
            }
        }
    }

    fn fabric(&self) -> Option<&Fabric> {
        self.0.network.spec().host.as_ref().map(|host| &host.fabric)
    }
}

impl VmNetworks for HostNetworks {
    async fn make(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        lock(&self.0.numbers).taken.insert(vm.jail);
        self.settle(vm.jail, vm.spec.interfaces.clamp(1, TAPS_MAX), None).await
    }

    async fn open(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        lock(&self.0.numbers).taken.insert(vm.jail);
        self.settle(vm.jail, vm.spec.interfaces.clamp(1, TAPS_MAX), Some(member(vm, self.fabric()))).await
    }

    async fn remove(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        let number = vm.jail;
        let settled = self.blocking(move |network| network.remove_jail(number)).await?;
        result(settled)?;
        lock(&self.0.numbers).taken.remove(&number);
        Ok(())
    }

    async fn lead_elsewhere(&self, vm: &VmRecord, host: u16) -> Result<(), NetworkError> {
        let (number, taps, addresses) = (vm.jail, vm.spec.interfaces.clamp(1, TAPS_MAX), vm.addresses());
        let at = HostNumber::try_from(host).map_err(|error| failed(&error))?;
        lock(&self.0.numbers).taken.insert(number);
        result(self.blocking(move |network| network.lead_elsewhere(number, taps, &addresses, at)).await?)
    }

    async fn leave(&self, vm: &VmRecord) -> Result<(), NetworkError> {
        let number = vm.jail;
        result(self.blocking(move |network| network.leave_jail(number)).await?)
    }

    async fn start(&self) -> Result<(), NetworkError> {
        result(self.blocking(HostNetwork::settle_host).await?)
    }

    async fn conflicts(&self) -> Result<Vec<String>, NetworkError> {
        let routes = self.blocking(HostNetwork::foreign_routes).await?.map_err(|error| failed(&error))?;
        Ok(routes.iter().map(ToString::to_string).collect())
    }

    async fn end(&self) -> Result<(), NetworkError> {
        lock(&self.0.numbers).is_ending = true;
        // One that is being made is finished first.
        let _making = self.0.making.lock().await;
        let ready: Vec<u16> = lock(&self.0.numbers).ready.drain(..).collect();
        let settled = self.blocking(move |network| {
            let mut settled = Settled::default();
            for number in ready {
                settled.failures.extend(network.remove_jail(number).failures);
            }
            settled.failures.extend(network.clear_host().failures);
            settled
        });
        result(settled.await?)
    }

    async fn sweep(&self, known: BTreeSet<u16>) -> Result<Vec<u16>, NetworkError> {
        let strays = {
            let there = self.0.network.jails().map_err(|error| failed(&error))?;
            let numbers = lock(&self.0.numbers);
            let ours = |number: &u16| {
                known.contains(number)
                    || numbers.ready.contains(number)
                    || numbers.filling.contains(number)
                    || numbers.taken.contains(number)
            };
            there.into_iter().filter(|number| !ours(number)).collect::<Vec<_>>()
        };
        let removed = strays.clone();
        let settled = self.blocking(move |network| {
            let failures = strays.into_iter().flat_map(|number| network.remove_jail(number).failures).collect();
            Settled { steps: Vec::new(), failures }
        });
        result(settled.await?)?;
        self.fill();
        Ok(removed)
    }

    async fn drops(&self, vm: &VmRecord) -> Result<Drops, NetworkError> {
        let number = vm.jail;
        let counters: io::Result<BTreeMap<String, u64>> = self.blocking(move |network| network.drops(number)).await?;
        let counters = counters.map_err(|error| failed(&error))?;
        let count = |reason: &str| counters.get(reason).copied().unwrap_or(0);
        let (spoof, foreign_session) = (count("spoof"), count("foreign_session"));
        let (not_allowed, queue_full) = (count("not_allowed"), count(QUEUE_FULL));
        Ok(Drops { spoof, foreign_session, not_allowed, queue_full })
    }

    fn take(&self, used: &BTreeSet<u16>) -> Option<u16> {
        // One that an earlier agent left may have a process in it, until it is swept.
        let there = self.0.network.jails().unwrap_or_default();
        let mut numbers = lock(&self.0.numbers);
        let ready = std::iter::from_fn(|| numbers.ready.pop_front()).find(|number| !used.contains(number));
        let held = |number: &u16| {
            let is_known = used.contains(number) || numbers.filling.contains(number) || numbers.taken.contains(number);
            is_known || there.contains(number)
        };
        let number =
            ready.or_else(|| (0..JAILS_MAX).find(|number| !held(number) && !numbers.ready.contains(number)))?;
        numbers.taken.insert(number);
        drop(numbers);
        self.fill();
        Some(number)
    }

    fn give_back(&self, number: u16) {
        // One that was made ahead is there, closed as it was made: the next launch may have it.
        let is_there = self.0.network.jails().is_ok_and(|there| there.contains(&number));
        let mut numbers = lock(&self.0.numbers);
        numbers.taken.remove(&number);
        if is_there && !numbers.ready.contains(&number) {
            numbers.ready.push_front(number);
        }
    }

    fn metadata_sockets(&self, vm: &VmRecord) -> io::Result<Vec<std::net::TcpListener>> {
        let namespace = self.0.network.namespace(vm.jail)?;
        netns::in_fd(&namespace, || {
            let link = nix::net::if_::if_nametoindex(tap(0).as_str())?;
            let v6 = SocketAddrV6::new(METADATA_V6, METADATA_PORT, 0, link);
            let v4 = SocketAddr::new(METADATA_V4.into(), METADATA_PORT);
            Ok(vec![sock::listen_tcp(v6.into(), Some(&tap(0)))?, sock::listen_tcp(v4, Some(&tap(0)))?])
        })?
    }

    fn changes(&self) -> Option<mpsc::Receiver<NetworkChange>> {
        lock(&self.0.changes).take()
    }
}
