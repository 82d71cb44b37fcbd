//! One network namespace and the sockets into it: looks at what is there, and carries out steps. Blocking; used by one
//! thread at a time, on any thread (the sockets stay in the namespace they were opened in).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use super::desired::JAIL_END;
use super::member::{HOST_END_MAC, JAIL_END_MAC};
use super::object::{LinkKind, Object, Place, Prefix};
use super::plan::Step;
use super::rules::{Element, Table};
use crate::report::chain;
use crate::sys::netlink::{
    Address, Batch, Forwarding, Link, LinkChange, LinkRef, Neighbour, Netlink, NewVeth, NewVxlan, Route, RouteKind,
    RunBatchError, VethPeer,
};
use crate::sys::nft::{self, Nft};
use crate::sys::{netns, tap};

/// Protocol number of our routes (linux/rtnetlink.h leaves 100 and up to daemons): `h`.
const ROUTE_PROTOCOL: u8 = 104;

/// What a ground is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Site {
    /// A jail, or the host's own namespace.
    pub(super) place: Place,
    /// What the names of our links begin with; in a jail all links are ours.
    pub(super) tag: String,
    /// The rules, whole.
    pub(super) rules: String,
    /// Names of the tables in them.
    pub(super) tables: Vec<(Table, String)>,
}

/// A namespace with the sockets into it.
#[derive(Debug)]
pub(super) struct Ground {
    site: Site,
    namespace: OwnedFd,
    netlink: Netlink,
    nft: Nft,
    /// The rules' generation when they were last as they should be.
    generation: Option<u32>,
    /// The rules as nft lists them without elements, when they were loaded: in the host's namespace others' changes
    /// raise the generation as well.
    listing: Option<String>,
    /// What was put into the sets since the rules were loaded.
    elements: BTreeSet<Element>,
    /// Indexes of links by name, as last seen.
    indexes: BTreeMap<String, u32>,
}

/// A step that could not be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What was tried, and why it failed, as a chain.
    pub what: String,
}

fn failure(what: impl std::fmt::Display, error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure { what: format!("{what}: {}", chain(error)) }
}

impl Ground {
    /// Opens the sockets. Call in the namespace.
    pub(super) fn open(site: Site, namespace: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            site,
            namespace,
            netlink: Netlink::open()?,
            nft: Nft::open()?,
            generation: None,
            listing: None,
            elements: BTreeSet::new(),
            indexes: BTreeMap::new(),
        })
    }

    pub(super) const fn namespace(&self) -> &OwnedFd {
        &self.namespace
    }

    fn is_ours(&self, link: &str) -> bool {
        match self.site.place {
            Place::Jail => link != "lo",
            Place::Host => link.strip_prefix(&self.site.tag).is_some_and(|rest| rest.starts_with('-')),
        }
    }

    /// Looks at all that is ours.
    pub(super) fn observe(&mut self) -> io::Result<BTreeSet<Object>> {
        let links = self.netlink.links()?;
        self.indexes = links.iter().map(|link| (link.name.clone(), link.index)).collect();
        let names: BTreeMap<u32, &str> =
            links.iter().filter(|link| self.is_ours(&link.name)).map(|link| (link.index, link.name.as_str())).collect();
        let place = self.site.place;
        let mut all: BTreeSet<Object> = links.iter().filter_map(|link| self.link_object(link)).collect();
        for Address { link, address, prefix_len } in self.netlink.addresses()? {
            if let Some(name) = names.get(&link) {
                let address = Prefix { first: address, bits: prefix_len };
                all.insert(Object::Address { place, link: (*name).to_owned(), address });
            }
        }
        for neighbour in self.netlink.neighbours()? {
            if let (true, Some(mac), Some(name)) = (neighbour.permanent, neighbour.mac, names.get(&neighbour.link)) {
                // Groups' addresses are the kernel's own.
                if !neighbour.address.is_multicast() {
                    let link = (*name).to_owned();
                    all.insert(Object::Neighbour { place, link, address: neighbour.address, mac });
                }
            }
        }
        if place == Place::Host {
            for forwarding in self.netlink.forwardings()?.into_iter().filter(|forwarding| forwarding.permanent) {
                if let Some(name) = names.get(&forwarding.link)
                    && !forwarding.to.is_unspecified()
                {
                    let Forwarding { mac, to, .. } = forwarding;
                    all.insert(Object::Forwarding { link: (*name).to_owned(), mac, to });
                }
            }
        }
        for route in self.netlink.routes(Some(ROUTE_PROTOCOL))? {
            let to = Prefix { first: route.destination, bits: route.prefix_len };
            let link = (route.kind == RouteKind::Unicast)
                // A route by a next hop of the underlay: the link is the kernel's choice.
                .then(|| {
                    route.link.and_then(|index| names.get(&index)).map_or_else(String::new, |name| (*name).to_owned())
                });
            all.insert(Object::Route { place, to, via: route.via, link });
        }
        if self.rules_hold()? {
            all.insert(Object::Rules { place });
            all.extend(self.elements.iter().map(|element| Object::Element { place, element: element.clone() }));
        }
        Ok(all)
    }

    fn link_object(&self, link: &Link) -> Option<Object> {
        if !link.up || !self.is_ours(&link.name) || link.no_own_address == Some(false) {
            return None;
        }
        let kind = match (link.kind.as_deref(), self.site.place, &link.vxlan) {
            (Some("tun"), Place::Jail, _) => LinkKind::Tap,
            (Some("veth"), Place::Jail, _) => LinkKind::VethJailEnd,
            (Some("veth"), Place::Host, _) => LinkKind::VethHostEnd,
            (Some("vxlan"), Place::Host, Some(vxlan)) => {
                LinkKind::Vxlan { id: vxlan.id, port: vxlan.port, local: vxlan.local? }
            }
            _ => return None,
        };
        let (place, name, mac) = (self.site.place, link.name.clone(), link.mac?);
        Some(Object::Link { place, name, kind, mac, mtu: link.mtu })
    }

    /// Whether nobody changed the rules since they were loaded.
    fn rules_hold(&mut self) -> io::Result<bool> {
        let generation = self.nft.generation()?;
        if self.generation.is_none() || self.generation == Some(generation) {
            return Ok(self.generation.is_some());
        }
        if self.site.place == Place::Jail {
            return Ok(false);
        }
        // Others have their own tables here. Elements that were taken from ours are put back in any case.
        if self.list() == self.listing {
            self.generation = Some(generation);
            self.elements.clear();
            return Ok(true);
        }
        Ok(false)
    }

    /// The rules as nft lists them, without what is in the sets.
    fn list(&self) -> Option<String> {
        let tables = &self.site.tables;
        let lists = netns::in_fd(&self.namespace, || {
            let lists = tables.iter().map(|(kind, _)| nft::list(table(tables, *kind)).ok());
            lists.collect::<Option<Vec<String>>>()
        });
        lists.ok().flatten().map(|lists| without_elements(&lists.concat()))
    }

    /// Routes of others to addresses of these networks; the default route is to everything and counts as to nothing.
    pub(super) fn foreign_routes(&mut self, ours: &[Prefix]) -> io::Result<Vec<Prefix>> {
        let routes = self.netlink.routes(None)?.into_iter();
        let others = routes.filter(|route| route.protocol != ROUTE_PROTOCOL && route.prefix_len > 0);
        let to = others.map(|route| Prefix { first: route.destination, bits: route.prefix_len });
        Ok(to.filter(|to| ours.iter().any(|net| net.meets(to))).collect())
    }

    /// What was counted and dropped, by the counter's name; those of all tables together.
    pub(super) fn counters(&mut self) -> io::Result<BTreeMap<String, u64>> {
        let mut sums = BTreeMap::new();
        for (kind, _) in &self.site.tables {
            for counter in self.nft.counters(table(&self.site.tables, *kind))? {
                *sums.entry(counter.name).or_insert(0) += counter.packets;
            }
        }
        Ok(sums)
    }

    /// Packets that a link dropped instead of sending them; 0 for one that is not there.
    pub(super) fn unsent(&mut self, link: &str) -> io::Result<u64> {
        match self.netlink.unsent(link) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(0),
            other => other,
        }
    }

    /// Carries out the steps that are for this place, one kind after the other in their order; those of links may need
    /// the host's ground. All are tried.
    pub(super) fn carry_out(&mut self, steps: &[Step], mut host: Option<&mut Self>) -> Vec<Failure> {
        let mut failures = Vec::new();
        let steps: Vec<&Step> = steps.iter().filter(|step| object(step).place() == self.site.place).collect();
        for run in steps.chunk_by(|one, next| kind_of(one) == kind_of(next)) {
            match kind_of(run[0]) {
                Kind::Elements => self.put_elements(run, &mut failures),
                Kind::Rules => self.load_rules(&mut failures),
                Kind::NewLinks => {
                    run.iter().for_each(|step| self.make_link(object(step), host.as_deref_mut(), &mut failures));
                }
                Kind::Rest => self.change(run, &mut failures),
            }
        }
        failures
    }

    fn put_elements(&mut self, steps: &[&Step], failures: &mut Vec<Failure>) {
        let mut batch = nft::ElementBatch::new();
        for step in steps {
            let Object::Element { element, .. } = object(step) else { continue };
            let table = table(&self.site.tables, element.table);
            match step {
                Step::Make(_) => batch.add(table, element.set, &element.content),
                Step::Remove(_) => batch.delete(table, element.set, &element.content),
            };
        }
        match self.nft.run(&batch) {
            Ok(()) => {
                for step in steps {
                    if let Object::Element { element, .. } = object(step) {
                        match step {
                            Step::Make(_) => self.elements.insert(element.clone()),
                            Step::Remove(_) => self.elements.remove(element),
                        };
                    }
                }
                self.generation = self.nft.generation().ok();
            }
            Err(error) => {
                // Nothing of it was done. Load the rules anew the next time.
                self.generation = None;
                failures.push(failure("change the sets of the rules", &error));
            }
        }
    }

    /// Loads the rules whole, with counters going on from where they are.
    fn load_rules(&mut self, failures: &mut Vec<Failure>) {
        let mut text = self.site.rules.clone();
        for (kind, _) in &self.site.tables {
            let table = table(&self.site.tables, *kind);
            for nft::Counter { name, packets, bytes } in self.nft.counters(table).unwrap_or_default() {
                let start = text.find(&format!("table {table} {{")).unwrap_or(0);
                let empty = format!("counter {name} {{ }}");
                if let Some(at) = text[start..].find(&empty) {
                    let full = format!("counter {name} {{ packets {packets} bytes {bytes} }}");
                    text.replace_range(start + at..start + at + empty.len(), &full);
                }
            }
        }
        self.elements.clear();
        self.generation = None;
        match netns::in_fd(&self.namespace, || nft::load(&text)) {
            Ok(Ok(())) => {
                self.generation = self.nft.generation().ok();
                self.listing = if self.site.place == Place::Host { self.list() } else { None };
            }
            Ok(Err(error)) => failures.push(failure("load the rules", &error)),
            Err(error) => failures.push(failure("enter the namespace for the rules", &error)),
        }
    }

    /// Takes the rules away.
    pub(super) fn remove_rules(&mut self) -> Vec<Failure> {
        let tables = self.site.tables.iter();
        // A table that is not there is made first, so that removing it is right in any case.
        let text: String = tables
            .map(|(kind, _)| {
                let table = table(&self.site.tables, *kind);
                format!("table {table}\ndelete table {table}\n")
            })
            .collect();
        self.elements.clear();
        self.generation = None;
        match netns::in_fd(&self.namespace, || nft::load(&text)) {
            Ok(Ok(())) => Vec::new(),
            Ok(Err(error)) => vec![failure("remove the rules", &error)],
            Err(error) => vec![failure("enter the namespace for the rules", &error)],
        }
    }

    /// Takes a link away that may be there half made, which [`Self::observe`] passes over. Fine if there is none.
    pub(super) fn remove_link(&mut self, name: &str) -> Option<Failure> {
        let mut batch = Batch::new();
        batch.delete_link(LinkRef::Name(name));
        self.indexes.remove(name);
        self.netlink.run(&batch).map_err(|error| failure(format!("remove link {name}"), &error)).err()
    }

    fn make_link(&mut self, wanted: &Object, host: Option<&mut Self>, failures: &mut Vec<Failure>) {
        let Object::Link { name, kind, mac, mtu, .. } = wanted else { return };
        let made = match kind {
            LinkKind::Tap => self.make_tap(name).map_err(|error| failure(format!("make tap {name}"), &error)),
            LinkKind::VethJailEnd => match host {
                Some(host) if !self.has_link(JAIL_END) => host.make_veth(&self.site.tag, *mtu, &self.namespace),
                Some(_) | None => Ok(()),
            },
            LinkKind::Vxlan { id, port, local } => self.make_vxlan(name, *mac, *mtu, (*id, *port, *local)),
            // Made with the other end.
            LinkKind::VethHostEnd => Ok(()),
        };
        let change = LinkChange { mac: Some(*mac), mtu: Some(*mtu), up: Some(true), no_own_address: true };
        let set = made.and_then(|()| {
            let mut batch = Batch::new();
            batch.set_link(LinkRef::Name(name), change);
            self.netlink.run(&batch).map_err(|error| failure(format!("set link {name}"), &error))
        });
        failures.extend(set.err());
        self.indexes.remove(name);
    }

    fn has_link(&mut self, name: &str) -> bool {
        matches!(self.netlink.link(name), Ok(Some(_)))
    }

    /// A tap that stays when nobody holds it. One that is held already is fine.
    fn make_tap(&mut self, name: &str) -> io::Result<()> {
        if self.has_link(name) {
            return Ok(());
        }
        let tap = netns::in_fd(&self.namespace, || tap::open(name))??;
        tap::set_persistent(&tap, true)
    }

    /// In the host's ground: a veth of this name, its peer in the jail. One that is left without its peer is replaced.
    fn make_veth(&mut self, name: &str, mtu: u32, jail: &OwnedFd) -> Result<(), Failure> {
        let mut batch = Batch::new();
        let peer = VethPeer { name: JAIL_END, index: None, mac: JAIL_END_MAC, namespace: Some(jail.as_fd()) };
        batch.delete_link(LinkRef::Name(name));
        batch.make_veth(&NewVeth { name, index: None, mac: HOST_END_MAC, mtu, peer });
        self.indexes.remove(name);
        self.netlink.run(&batch).map_err(|error| failure(format!("make veth {name}"), &error))
    }

    fn make_vxlan(
        &mut self,
        name: &str,
        mac: [u8; 6],
        mtu: u32,
        (id, port, local): (u32, u16, IpAddr),
    ) -> Result<(), Failure> {
        let mut batch = Batch::new();
        batch.delete_link(LinkRef::Name(name));
        batch.make_vxlan(&NewVxlan { name, index: None, mac, mtu, id, local, port });
        self.netlink.run(&batch).map_err(|error| failure(format!("make vxlan device {name}"), &error))
    }

    fn index(&mut self, name: &str) -> Option<u32> {
        if let Some(index) = self.indexes.get(name) {
            return Some(*index);
        }
        let index = self.netlink.link(name).ok().flatten()?.index;
        self.indexes.insert(name.to_owned(), index);
        Some(index)
    }

    /// Addresses, neighbours, routes, and links that go: in one batch.
    fn change(&mut self, steps: &[&Step], failures: &mut Vec<Failure>) {
        let mut batch = Batch::new();
        for step in steps {
            let wanted = object(step);
            let named = match wanted {
                Object::Address { link, .. } | Object::Neighbour { link, .. } | Object::Forwarding { link, .. } => link,
                Object::Route { link: Some(link), .. } => link,
                Object::Link { name, .. } => {
                    batch.delete_link(LinkRef::Name(name));
                    continue;
                }
                Object::Route { link: None, .. } | Object::Rules { .. } | Object::Element { .. } => "",
            };
            let index = if named.is_empty() { None } else { self.index(named) };
            if !named.is_empty() && index.is_none() {
                // What goes is gone already with its link.
                if matches!(step, Step::Make(_)) {
                    failures.push(Failure { what: format!("{step}: there is no link {named}") });
                }
                continue;
            }
            self.add_change(&mut batch, step, index);
        }
        match self.netlink.run(&batch) {
            Ok(()) => {}
            Err(RunBatchError::Refused(refused)) => {
                failures.extend(refused.into_iter().map(|refused| Failure { what: refused.to_string() }));
            }
            Err(error) => failures.push(failure("change the network", &error)),
        }
    }

    fn add_change(&self, batch: &mut Batch<'_>, step: &Step, index: Option<u32>) {
        let makes = matches!(step, Step::Make(_));
        let link = index.unwrap_or(0);
        match object(step) {
            Object::Address { address, .. } => {
                let address = Address { link, address: address.first, prefix_len: address.bits };
                if makes {
                    batch.add_address(address)
                } else {
                    batch.delete_address(address)
                };
            }
            Object::Neighbour { address, mac, .. } => {
                let neighbour = Neighbour { link, address: *address, mac: Some(*mac), permanent: true };
                if makes {
                    batch.put_neighbour(neighbour)
                } else {
                    batch.delete_neighbour(neighbour)
                };
            }
            Object::Forwarding { mac, to, .. } => {
                let forwarding = Forwarding { link, mac: *mac, to: *to, permanent: true };
                if makes {
                    batch.put_forwarding(forwarding)
                } else {
                    batch.delete_forwarding(forwarding)
                };
            }
            Object::Route { to, via, link: by, .. } => {
                let route = Route {
                    destination: to.first,
                    prefix_len: to.bits,
                    kind: if by.is_some() { RouteKind::Unicast } else { RouteKind::Unreachable },
                    via: *via,
                    link: index,
                    // A next hop that is a neighbour of ours is on the link, whatever its addresses say.
                    onlink: via.is_some() && index.is_some(),
                    protocol: ROUTE_PROTOCOL,
                    metric: 0,
                };
                if makes {
                    batch.put_route(route)
                } else {
                    batch.delete_route(route)
                };
            }
            Object::Link { .. } | Object::Rules { .. } | Object::Element { .. } => {}
        }
    }
}

fn table(tables: &[(Table, String)], wanted: Table) -> nft::Table<'_> {
    let family = match wanted {
        Table::Inet => nft::Family::Inet,
        Table::Arp => nft::Family::Arp,
    };
    let name = tables.iter().find(|(known, _)| *known == wanted).map_or("", |(_, name)| name.as_str());
    nft::Table { family, name }
}

/// A listing without the elements of sets: `elements = { ... }`, over lines or not.
fn without_elements(listing: &str) -> String {
    let mut rest = listing;
    let mut text = String::with_capacity(listing.len());
    while let Some((before, after)) = rest.split_once("elements = {") {
        text += before;
        rest = after.split_once('}').map_or("", |(_, after)| after);
    }
    text + rest
}

const fn object(step: &Step) -> &Object {
    match step {
        Step::Make(object) | Step::Remove(object) => object,
    }
}

/// Steps of a kind can be carried out together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Elements,
    Rules,
    NewLinks,
    Rest,
}

const fn kind_of(step: &Step) -> Kind {
    match (object(step), step) {
        (Object::Element { .. }, _) => Kind::Elements,
        (Object::Rules { .. }, _) => Kind::Rules,
        (Object::Link { .. }, Step::Make(_)) => Kind::NewLinks,
        (
            Object::Link { .. }
            | Object::Address { .. }
            | Object::Neighbour { .. }
            | Object::Forwarding { .. }
            | Object::Route { .. },
            _,
        ) => Kind::Rest,
    }
}

#[cfg(test)]
mod tests {
    use super::without_elements;

    #[test]
    fn elements_are_left_out_of_a_listing() {
        let listing = "set a {\n\telements = { 1,\n\t\t 2 }\n}\nmap b {\n\telements = { 1 : 2 }\n}\n";
        assert_eq!(without_elements(listing), "set a {\n\t\n}\nmap b {\n\t\n}\n");
        assert_eq!(without_elements("chain c { }"), "chain c { }");
    }
}
