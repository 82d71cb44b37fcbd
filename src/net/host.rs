//! A host's network as it is kept: its own ground, the jails on it, and what each should be. Every change goes through
//! `settle`: what should be there is written down first, then steps are planned from what is there and carried out; all
//! failures are collected. The same code sets up, tears down, takes over what an earlier agent left, and heals.
//!
//! Locks: a jail's before the host's. Blocking: called on the agent's blocking threads and on the watching one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::address::{AddressError, Fabric, HostNumber};
use super::desired::{Host, Jail, TAPS_MAX, jail_name, tap, vxlan_name};
use super::ground::{Failure, Ground, Site};
use super::member::Member;
use super::object::{Object, Place, Prefix};
use super::plan::{Step, plan};
use super::rules::{self, JAIL_TABLE, Table, host_tag};
use crate::sys::netlink::Watch;
use crate::sys::{netconf, netns};

/// Why a jail dropped what its rules let through: nobody took it from the VM's tap.
pub const QUEUE_FULL: &str = "queue_full";

/// What a jail's namespace is set to before anything is in it: it forwards, believes nobody, and configures itself from
/// nothing it hears (`Documentation/networking/ip-sysctl.rst`).
const JAIL_SETTINGS: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/default/accept_source_route", "0"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/conf/all/accept_redirects", "0"),
    ("ipv6/conf/default/accept_redirects", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/addr_gen_mode", "1"),
];

/// What a host of a fabric is set to: it forwards.
const HOST_SETTINGS: &[(&str, &str)] = &[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];

/// A host's network: what it is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSpec {
    /// The number that names begin with; its number in the fabric, if it is in one.
    pub number: u16,
    /// Its fabric; without one, VMs are alone in their jails.
    pub host: Option<Host>,
    /// Bytes per packet of VMs.
    pub mtu: u32,
}

impl NetworkSpec {
    fn fabric(&self) -> Option<&Fabric> {
        self.host.as_ref().map(|host| &host.fabric)
    }
}

/// What came of bringing something to what it should be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settled {
    /// What was done.
    pub steps: Vec<Step>,
    /// What could not be done. All the rest was.
    pub failures: Vec<Failure>,
}

/// Why a host's network cannot be had at all.
#[derive(Debug, thiserror::Error)]
pub enum OpenNetworkError {
    /// A namespace or the sockets into it.
    #[error("{what}")]
    Namespace {
        /// What was tried.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Addresses that cannot be.
    #[error("the addresses of this host")]
    Address(#[from] AddressError),
}

/// Whose objects in the host's namespace they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Host,
    Jail(u16),
}

/// The host's own namespace.
#[derive(Debug)]
struct HostSide {
    ground: Ground,
    desired: BTreeMap<Owner, BTreeSet<Object>>,
    /// What is there of each owner's; absent: not known, look.
    known: BTreeMap<Owner, BTreeSet<Object>>,
    watches: [Watch; 2],
}

/// A jail.
#[derive(Debug)]
struct JailSide {
    spec: Jail,
    member: Option<Member>,
    ground: Ground,
    /// What is there; `None`: not known, look.
    known: Option<BTreeSet<Object>>,
    watches: [Watch; 2],
    /// It is being removed: nothing is made any more.
    ended: bool,
}

/// A host's network.
#[derive(Debug)]
pub struct HostNetwork {
    spec: NetworkSpec,
    host: Mutex<HostSide>,
    jails: Mutex<BTreeMap<u16, Arc<Mutex<JailSide>>>>,
    /// Ways to VMs that are on other hosts, by the jails they had.
    away: Mutex<BTreeMap<u16, BTreeSet<Object>>>,
    /// Waits on all watches; a watch leaves it by being closed.
    epoll: Epoll,
    waker: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn opening(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> OpenNetworkError {
    let what = what.to_string();
    move |source| OpenNetworkError::Namespace { what, source }
}

fn watches() -> io::Result<[Watch; 2]> {
    Ok([Watch::links_and_routes()?, Watch::rules()?])
}

impl HostNetwork {
    /// Opens the calling thread's namespace as the host's. Nothing is changed yet.
    pub fn open(spec: NetworkSpec) -> Result<Self, OpenNetworkError> {
        let site = Site {
            place: Place::Host,
            tag: host_tag(spec.number),
            rules: rules::host(spec.number, spec.fabric()),
            tables: vec![(Table::Inet, host_tag(spec.number))],
        };
        let namespace = netns::own().map_err(opening("open this host's network namespace"))?;
        let ground = Ground::open(site, namespace).map_err(opening("open netlink sockets"))?;
        let watches = watches().map_err(opening("watch this host's network"))?;
        let mut desired = BTreeMap::new();
        if let Some(host) = &spec.host {
            desired.insert(Owner::Host, host.objects()?);
        }
        let epolling = || -> nix::Result<(Epoll, EventFd)> {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            let waker = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
            epoll.add(&waker, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
            Ok((epoll, waker))
        };
        let (epoll, waker) = epolling().map_err(|error| opening("make an epoll")(error.into()))?;
        let host = HostSide { ground, desired, known: BTreeMap::new(), watches };
        let network = Self {
            spec,
            host: Mutex::new(host),
            jails: Mutex::new(BTreeMap::new()),
            away: Mutex::default(),
            epoll,
            waker,
        };
        network.watch(None, &lock(&network.host).watches).map_err(opening("watch this host's network"))?;
        Ok(network)
    }

    /// What it is made of.
    pub const fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// Has the host's own part as it should be: forwarding, rules, routes to peers.
    pub fn settle_host(&self) -> Settled {
        let mut host = lock(&self.host);
        let mut failures = Vec::new();
        if self.spec.host.is_some() {
            let settings = netns::in_fd(host.ground.namespace(), host_settings);
            failures.extend(settings.unwrap_or_else(|error| vec![Failure { what: error.to_string() }]));
        }
        let mut settled = host.settle_all();
        settled.failures.extend(failures);
        settled
    }

    /// Routes of others to addresses of this fabric's hosts.
    pub fn foreign_routes(&self) -> Result<Vec<Prefix>, OpenNetworkError> {
        let Some(host) = &self.spec.host else { return Ok(Vec::new()) };
        let subnets = host.all_subnets()?;
        lock(&self.host).ground.foreign_routes(&subnets).map_err(opening("list this host's routes"))
    }

    /// Takes the host's own part away, if no jail is left.
    pub fn clear_host(&self) -> Settled {
        let mut host = lock(&self.host);
        if host.desired.keys().any(|owner| *owner != Owner::Host) {
            return Settled::default();
        }
        let known = host.ground.observe().unwrap_or_default();
        host.desired.clear();
        host.known.clear();
        let mut steps = plan(&known, &BTreeSet::new());
        steps.retain(|step| !matches!(step, Step::Remove(Object::Rules { .. } | Object::Element { .. })));
        let mut failures = host.ground.carry_out(&steps, None);
        failures.extend(host.ground.remove_link(&vxlan_name(self.spec.number)));
        failures.extend(host.ground.remove_rules());
        Settled { steps, failures }
    }

    /// Has a jail, closed or with its member. Makes the namespace if need be.
    pub fn settle_jail(&self, number: u16, taps: u8, member: Option<Member>) -> Result<Settled, OpenNetworkError> {
        let spec = Jail { name: jail_name(self.spec.number, number), taps, mtu: self.spec.mtu };
        loop {
            let jail = self.jail(number, &spec)?;
            let mut side = lock(&jail);
            if side.ended {
                // Removed since it was looked up: make it anew.
                continue;
            }
            side.spec = spec;
            side.member = member;
            return Ok(self.settle_side(number, &mut side));
        }
    }

    fn jail(&self, number: u16, spec: &Jail) -> Result<Arc<Mutex<JailSide>>, OpenNetworkError> {
        if let Some(jail) = lock(&self.jails).get(&number) {
            return Ok(Arc::clone(jail));
        }
        let side = self.open_jail(spec)?;
        let mut jails = lock(&self.jails);
        if let Some(other) = jails.get(&number) {
            return Ok(Arc::clone(other));
        }
        self.watch(Some(number), &side.watches).map_err(opening(format!("watch the jail {}", spec.name)))?;
        let side = Arc::new(Mutex::new(side));
        jails.insert(number, Arc::clone(&side));
        Ok(side)
    }

    fn open_jail(&self, spec: &Jail) -> Result<JailSide, OpenNetworkError> {
        let name = &spec.name;
        let namespace = match netns::open_named(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => netns::create_named(name),
            other => other,
        };
        let namespace = namespace.map_err(opening(format!("make the network namespace {name}")))?;
        let site = Site {
            place: Place::Jail,
            tag: name.clone(),
            rules: rules::jail(self.spec.fabric()),
            tables: vec![(Table::Inet, JAIL_TABLE.to_owned()), (Table::Arp, JAIL_TABLE.to_owned())],
        };
        let kept = namespace.try_clone().map_err(opening("duplicate a descriptor"))?;
        let inside = netns::in_fd(&namespace, move || {
            if let Some(error) = netconf::write_all(JAIL_SETTINGS).into_iter().next() {
                return Err(io::Error::new(error.source.kind(), error));
            }
            Ok((Ground::open(site, kept)?, watches()?))
        });
        let inside =
            inside.and_then(|inside| inside).map_err(opening(format!("set up the network namespace {name}")))?;
        let (ground, watches) = inside;
        Ok(JailSide { spec: spec.clone(), member: None, ground, known: None, watches, ended: false })
    }

    fn settle_side(&self, number: u16, side: &mut JailSide) -> Settled {
        let desired = match &side.member {
            Some(member) => side.spec.with(member),
            None => side.spec.closed(),
        };
        let (jail, mut outside): (BTreeSet<_>, BTreeSet<_>) =
            desired.into_iter().partition(|object| object.place() == Place::Jail);
        outside.extend(side.member.iter().flat_map(Host::for_member));
        match &side.member {
            // It is here.
            Some(_) => drop(lock(&self.away).remove(&number)),
            None => outside.extend(lock(&self.away).get(&number).into_iter().flatten().cloned()),
        }
        let observed = match side.known.take() {
            Some(known) => known,
            None => match side.ground.observe() {
                Ok(observed) => observed,
                Err(error) => {
                    let what = format!("look at the jail {}: {error}", side.spec.name);
                    return Settled { steps: Vec::new(), failures: vec![Failure { what }] };
                }
            },
        };
        let mut steps = plan(&observed, &jail);
        let mut host = lock(&self.host);
        host.desired.insert(Owner::Jail(number), outside);
        let has_new_pair =
            steps.iter().any(|step| matches!(step, Step::Make(Object::Link { kind, .. }) if kind.is_veth()));
        // What leads here is opened last and taken away first: nothing is sent to a jail that lets nothing in.
        let mut first = Settled::default();
        if side.member.is_none() && !has_new_pair {
            first = host.settle_jail(number, &side.spec.name);
        }
        let mut failures = side.ground.carry_out(&steps, Some(&mut host.ground));
        if has_new_pair {
            // Whatever was on the old pair went with it.
            host.known.insert(Owner::Jail(number), BTreeSet::new());
        }
        side.known = failures.is_empty().then_some(jail);
        let settled = host.settle_jail(number, &side.spec.name);
        steps.extend(first.steps);
        steps.extend(settled.steps);
        failures.extend(first.failures);
        failures.extend(settled.failures);
        Settled { steps, failures }
    }

    /// Has what is sent to these addresses, which are those of the VM of this jail, led to another host, where it is now:
    /// until the VM is in the jail again, or that is removed. The jail, if it is there, is closed; what waits in its taps
    /// stays.
    pub fn lead_elsewhere(&self, number: u16, taps: u8, addresses: &[IpAddr], at: HostNumber) -> Settled {
        let routes = self.spec.host.as_ref().and_then(|host| host.elsewhere(addresses, at));
        let Some(routes) = routes else {
            let at = u16::from(at);
            let what = format!("lead the addresses of the jail {number} to host {at}: it is no peer of this one");
            return Settled { steps: Vec::new(), failures: vec![Failure { what }] };
        };
        lock(&self.away).insert(number, routes.clone());
        if lock(&self.jails).contains_key(&number) {
            return self.settle_jail(number, taps, None).unwrap_or_else(|error| {
                let what = crate::report::chain(&error);
                Settled { steps: Vec::new(), failures: vec![Failure { what }] }
            });
        }
        self.settle_way(number, routes)
    }

    fn settle_way(&self, number: u16, routes: BTreeSet<Object>) -> Settled {
        let mut host = lock(&self.host);
        host.desired.insert(Owner::Jail(number), routes);
        host.known.entry(Owner::Jail(number)).or_default();
        host.settle_one(Owner::Jail(number))
    }

    /// Has no jail of this number; what leads its VM's addresses to another host stays.
    pub fn leave_jail(&self, number: u16) -> Settled {
        let away = lock(&self.away).get(&number).cloned().unwrap_or_default();
        self.remove_all_but(number, away)
    }

    /// Has no jail of this number, and nothing on the host that leads to it. Fine if there is none.
    pub fn remove_jail(&self, number: u16) -> Settled {
        lock(&self.away).remove(&number);
        self.remove_all_but(number, BTreeSet::new())
    }

    /// What stays leads to where the VM is: packets are on it all the time.
    fn remove_all_but(&self, number: u16, stays: BTreeSet<Object>) -> Settled {
        let name = jail_name(self.spec.number, number);
        let jail = lock(&self.jails).remove(&number);
        if let Some(jail) = &jail {
            lock(jail).ended = true;
        }
        let mut settled = {
            let mut host = lock(&self.host);
            if !host.known.contains_key(&Owner::Jail(number)) {
                host.learn(number, &name);
            }
            let is_all = stays.is_empty();
            host.desired.insert(Owner::Jail(number), stays);
            let mut settled = host.settle_one(Owner::Jail(number));
            settled.failures.extend(host.ground.remove_link(&name));
            if is_all {
                host.desired.remove(&Owner::Jail(number));
                host.known.remove(&Owner::Jail(number));
            }
            settled
        };
        if let Err(error) = netns::delete_named(&name) {
            settled.failures.push(Failure { what: format!("remove the network namespace {name}: {error}") });
        }
        settled
    }

    /// The numbers of the jails there are by name, half-made ones included.
    pub fn jails(&self) -> io::Result<BTreeSet<u16>> {
        let prefix = format!("{}-", host_tag(self.spec.number));
        let names = netns::list_named(&prefix)?;
        Ok(names.iter().filter_map(|name| name.strip_prefix(&prefix)?.parse().ok()).collect())
    }

    /// A jail's namespace.
    pub fn namespace(&self, number: u16) -> io::Result<OwnedFd> {
        netns::open_named(&jail_name(self.spec.number, number))
    }

    /// What a jail dropped, by reason: those of its rules ([`rules::DROP_REASONS`]), and [`QUEUE_FULL`].
    pub fn drops(&self, number: u16) -> io::Result<BTreeMap<String, u64>> {
        let jail = lock(&self.jails).get(&number).map(Arc::clone);
        let jail = jail.ok_or(io::ErrorKind::NotFound)?;
        let mut jail = lock(&jail);
        let mut drops = jail.ground.counters()?;
        let taps = (0..TAPS_MAX).map(|slot| jail.ground.unsent(&tap(slot)));
        drops.insert(QUEUE_FULL.to_owned(), taps.sum::<io::Result<u64>>()?);
        Ok(drops)
    }

    /// Waits until something changes in the host's namespace or a jail, at most `limit`; whose it was.
    pub(super) fn wait(&self, limit: EpollTimeout) -> nix::Result<BTreeSet<Option<u16>>> {
        let mut events = [EpollEvent::empty(); 64];
        let count = self.epoll.wait(&mut events, limit)?;
        // 0 is the host, the rest are jails' numbers and one.
        let whose =
            |event: &EpollEvent| event.data().checked_sub(1).map(|number| u16::try_from(number).unwrap_or(u16::MAX));
        Ok(events[..count].iter().map(whose).collect())
    }

    fn watch(&self, whose: Option<u16>, watches: &[Watch; 2]) -> io::Result<()> {
        let token = whose.map_or(0, |number| u64::from(number) + 1);
        for watch in watches {
            self.epoll.add(watch, EpollEvent::new(EpollFlags::EPOLLIN, token))?;
        }
        Ok(())
    }

    /// Has [`Self::wait`] return, with the host for an answer.
    pub(super) fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.waker.write(1);
    }

    /// Something changed in the host's namespace: looks, and has it as it should be.
    pub(super) fn heal_host(&self) -> Settled {
        let mut host = lock(&self.host);
        // A watch that fails counts as a change.
        let changed = host.watches.iter().any(|watch| watch.drain().unwrap_or(true));
        if !changed { Settled::default() } else { host.settle_all() }
    }

    /// Something changed in a jail: looks, and has it as it should be.
    pub(super) fn heal_jail(&self, number: u16) -> Settled {
        let Some(jail) = lock(&self.jails).get(&number).map(Arc::clone) else { return Settled::default() };
        let mut side = lock(&jail);
        let changed: Vec<bool> = side.watches.iter().map(|watch| watch.drain().unwrap_or(true)).collect();
        if side.ended || !changed.contains(&true) {
            return Settled::default();
        }
        side.known = None;
        self.settle_side(number, &mut side)
    }
}

impl HostSide {
    /// Brings one owner's part to what it should be, trusting what is known.
    /// Brings what leads to a jail to what it should be. Only this jail's part: what fails elsewhere on the host is not its
    /// VM's fault.
    fn settle_jail(&mut self, number: u16, name: &str) -> Settled {
        if !self.known.contains_key(&Owner::Jail(number)) {
            self.learn(number, name);
        }
        self.settle_one(Owner::Jail(number))
    }

    fn settle_one(&mut self, owner: Owner) -> Settled {
        let Some(known) = self.known.get(&owner) else { return self.settle_all() };
        let empty = BTreeSet::new();
        let desired = self.desired.get(&owner).unwrap_or(&empty).clone();
        let steps = plan(known, &desired);
        let failures = self.ground.carry_out(&steps, None);
        if failures.is_empty() {
            self.known.insert(owner, desired);
        } else {
            self.known.remove(&owner);
        }
        Settled { steps, failures }
    }

    /// Looks at everything and brings it to what it should be.
    fn settle_all(&mut self) -> Settled {
        let observed = match self.ground.observe() {
            Ok(observed) => observed,
            Err(error) => {
                let what = format!("look at this host's network: {error}");
                return Settled { steps: Vec::new(), failures: vec![Failure { what }] };
            }
        };
        // A jail whose veth is gone makes a new one itself: its own watch tells it.
        let is_there = |objects: &&BTreeSet<Object>| {
            let names = objects.iter().filter_map(|object| match object {
                Object::Link { name, kind, .. } => kind.is_veth().then_some(name),
                Object::Address { .. }
                | Object::Neighbour { .. }
                | Object::Forwarding { .. }
                | Object::Route { .. }
                | Object::Rules { .. }
                | Object::Element { .. } => None,
            });
            let there = |name: &&String| {
                observed.iter().any(|other| matches!(other, Object::Link { name: there, .. } if there == *name))
            };
            names.filter(|name| !there(name)).count() == 0
        };
        let wanted: BTreeSet<Object> = self.desired.values().filter(is_there).flatten().cloned().collect();
        // What belongs to nobody here may be another agent's jail being made, or one whose turn comes: left alone.
        let ours: BTreeSet<Object> = observed.into_iter().filter(|object| self.is_owned(object, &wanted)).collect();
        let steps = plan(&ours, &wanted);
        let failures = self.ground.carry_out(&steps, None);
        if failures.is_empty() {
            self.known =
                self.desired.iter().filter(|(_, objects)| is_owned_whole(objects, &wanted)).map(clone).collect();
        } else {
            self.known.clear();
        }
        Settled { steps, failures }
    }

    /// Whether an object that was seen is of a link, or leads by one, that somebody here has.
    fn is_owned(&self, object: &Object, wanted: &BTreeSet<Object>) -> bool {
        // Without a fabric no route here is ours: other agents may have theirs.
        let in_fabric = self.desired.contains_key(&Owner::Host);
        let Some(link) = object.link().filter(|link| !link.is_empty()) else { return in_fabric };
        wanted.iter().any(|other| matches!(other, Object::Link { name, .. } if name == link))
    }

    /// Finds out what is there of a jail that an earlier agent left.
    fn learn(&mut self, number: u16, name: &str) {
        let observed = self.ground.observe().unwrap_or_default();
        let of_jail = observed.into_iter().filter(|object| object.link() == Some(name)).collect();
        self.known.insert(Owner::Jail(number), of_jail);
    }
}

fn is_owned_whole(objects: &BTreeSet<Object>, wanted: &BTreeSet<Object>) -> bool {
    objects.is_subset(wanted)
}

fn clone((owner, objects): (&Owner, &BTreeSet<Object>)) -> (Owner, BTreeSet<Object>) {
    (*owner, objects.clone())
}

/// Has the host forward. One that configures an interface from router advertisements goes on doing so: forwarding
/// switches that off for the value 1.
fn host_settings() -> Vec<Failure> {
    let mut failures = Vec::new();
    let advertised = |interface: &str| format!("ipv6/conf/{interface}/accept_ra");
    for interface in netconf::interfaces().unwrap_or_default() {
        let setting = advertised(&interface);
        if netconf::read(&setting).is_ok_and(|value| value.trim() == "1") {
            failures.extend(netconf::write(&setting, "2").err());
        }
    }
    failures.extend(netconf::write_all(HOST_SETTINGS));
    failures.iter().map(|error| Failure { what: crate::report::chain(error) }).collect()
}
