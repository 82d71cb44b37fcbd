//! From what is there to what should be: the steps, in an order in which nothing is let through that should not be.
//! Pure; the property tests carry plans out on sets.
//!
//! Attach: links, addresses, neighbours and routes first, then rules, then the elements that admit. Detach is the
//! mirror: elements go first. A route that changes goes the other way round, as packets are on it all the time: to a next
//! hop before anything else, to a link when all that admits what goes there is in force. Rules that somebody changed are
//! loaded again whole, which empties their sets; so all their elements follow in the same plan.

use std::collections::BTreeSet;

use super::object::{Object, Place};

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Have this.
    Make(Object),
    /// Have this no more.
    Remove(Object),
}

impl std::fmt::Display for Step {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Make(object) => write!(out, "make {object}"),
            Self::Remove(object) => write!(out, "remove {object}"),
        }
    }
}

/// The steps from `observed` to `desired`. Carrying them out in order, and then looking, finds `desired`.
pub fn plan(observed: &BTreeSet<Object>, desired: &BTreeSet<Object>) -> Vec<Step> {
    let reloaded = |place| {
        let rules = Object::Rules { place };
        desired.contains(&rules) && !observed.contains(&rules)
    };
    let forgotten = |object: &Object| {
        matches!(object, Object::Element { .. }) && reloaded(object.place())
            || is_on_missing_link(object, observed, desired)
    };
    let present: BTreeSet<&Object> = observed.iter().filter(|object| !forgotten(object)).collect();
    // What admits goes first, and links last: removing one takes what is on it along.
    let removed = present.iter().rev().filter(|object| !desired.contains(**object) && !is_replaced(object, desired));
    let made = || desired.iter().filter(|object| !present.contains(object));
    let changes = |object: &&Object| {
        let alone = BTreeSet::from([(*object).clone()]);
        matches!(object, Object::Route { .. }) && present.iter().any(|other| is_replaced(other, &alone))
    };
    let leads_away = |object: &&Object| {
        let Object::Route { via: Some(_), link, place, .. } = object else { return false };
        let is_made = |other: &Object| matches!(other, Object::Link { place: at, name, .. } if at == place && Some(name) == link.as_ref());
        changes(object) && !made().any(is_made)
    };
    let leads_here = |object: &&Object| changes(object) && matches!(object, Object::Route { via: None, .. });
    let make = |object: &Object| Step::Make(object.clone());
    let first = made().filter(leads_away).map(make);
    let removed = removed.map(|object| Step::Remove((*object).clone()));
    let rest = made().filter(|object| !leads_away(object) && !leads_here(object)).map(make);
    first.chain(removed).chain(rest).chain(made().filter(leads_here).map(make)).collect()
}

/// Whether a link, neighbour or route is only made different: the kernel replaces it in place.
fn is_replaced(object: &Object, desired: &BTreeSet<Object>) -> bool {
    desired.iter().any(|wanted| match (object, wanted) {
        (Object::Link { place, name, .. }, Object::Link { place: other, name: wanted, .. }) => {
            place == other && name == wanted
        }
        (
            Object::Neighbour { place, link, address, .. },
            Object::Neighbour { place: other, link: wanted_link, address: wanted, .. },
        ) => place == other && link == wanted_link && address == wanted,
        (Object::Route { place, to, .. }, Object::Route { place: other, to: wanted, .. }) => {
            place == other && to == wanted
        }
        _ => false,
    })
}

/// Whether an object was seen on a link that will be made anew, with which it went away.
fn is_on_missing_link(object: &Object, observed: &BTreeSet<Object>, desired: &BTreeSet<Object>) -> bool {
    let (place, link) = match object {
        Object::Address { place, link, .. } | Object::Neighbour { place, link, .. } => (*place, link),
        Object::Route { place, link: Some(link), .. } => (*place, link),
        Object::Forwarding { link, .. } => (Place::Host, link),
        Object::Link { .. } | Object::Route { link: None, .. } | Object::Rules { .. } | Object::Element { .. } => {
            return false;
        }
    };
    let has = |objects: &BTreeSet<Object>| {
        objects
            .iter()
            .any(|other| matches!(other, Object::Link { place: at, name, .. } if *at == place && name == link))
    };
    has(desired) && !has(observed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::address::{Fabric, Parts, V4Widths};
    use crate::net::desired::{Host, Jail, Peer, Underlay};
    use crate::net::member::{Addressing, Member, SessionAddresses};
    use proptest::prelude::*;

    /// What the kernel does with a step.
    fn carry_out(step: &Step, state: &mut BTreeSet<Object>) {
        match step {
            Step::Make(object) => {
                let alike: Vec<Object> = state
                    .iter()
                    .filter(|other| is_replaced(other, &BTreeSet::from([object.clone()])))
                    .cloned()
                    .collect();
                alike.iter().for_each(|other| {
                    state.remove(other);
                });
                if let Object::Rules { place } = object {
                    state.retain(|other| !matches!(other, Object::Element { .. }) || other.place() != *place);
                }
                assert!(has_its_ground(object, state), "{object} before what it needs");
                state.insert(object.clone());
            }
            Step::Remove(object) => {
                assert!(state.remove(object), "{object} is not there");
                if let Object::Link { place, name, .. } = object {
                    let name = name.clone();
                    let place = *place;
                    state.retain(|other| on_link(other) != Some((place, name.clone())));
                }
            }
        }
    }

    fn on_link(object: &Object) -> Option<(Place, String)> {
        match object {
            Object::Address { place, link, .. } | Object::Neighbour { place, link, .. } => Some((*place, link.clone())),
            Object::Route { place, link: Some(link), .. } => Some((*place, link.clone())),
            Object::Forwarding { link, .. } => Some((Place::Host, link.clone())),
            Object::Link { .. } | Object::Route { link: None, .. } | Object::Rules { .. } | Object::Element { .. } => {
                None
            }
        }
    }

    fn has_its_ground(object: &Object, state: &BTreeSet<Object>) -> bool {
        if matches!(object, Object::Element { .. }) {
            return state.contains(&Object::Rules { place: object.place() });
        }
        let Some((place, link)) = on_link(object) else { return true };
        // A route without a name goes by whatever link the kernel finds.
        link.is_empty()
            || state
                .iter()
                .any(|other| matches!(other, Object::Link { place: at, name, .. } if *at == place && *name == link))
    }

    fn member(seed: u8, invariant: bool, fabric: &Fabric) -> Member {
        let number = u32::from(seed) + 1;
        let parts = Parts {
            host: 3.try_into().unwrap(),
            session: number.try_into().unwrap(),
            local: number.min(60).try_into().unwrap(),
        };
        let addressing = if invariant { Addressing::Invariant } else { Addressing::Guest };
        let session = SessionAddresses {
            v6: fabric.v6(parts),
            v4: fabric.v4(parts).unwrap(),
            match_v6: fabric.v6_session(parts.session),
            match_v4: fabric.v4_session(parts.session),
            addressing,
            egress: Vec::new(),
            nat: false,
            published: Vec::new(),
        };
        Member { mac: [2, 0, 0, 0, 0, seed], session: (!seed.is_multiple_of(5)).then_some(session) }
    }

    fn state(seed: u8, invariant: bool, open: bool, mtu: u32) -> BTreeSet<Object> {
        let fabric = Fabric::new("fd3c:91aa:7e2::".parse().unwrap(), Some(V4Widths::USUAL)).unwrap();
        let jail = Jail { name: "hth3-7".to_owned(), taps: 1 + seed % 3, mtu };
        let peers = (4..5 + seed % 3).map(|number| Peer {
            number: u16::from(number).try_into().unwrap(),
            address: format!("fd00:f::{number}").parse().unwrap(),
        });
        let underlay = if seed.is_multiple_of(2) {
            Underlay::Routed
        } else {
            Underlay::Vxlan { id: 7, port: 4789, local: "fd00:f::3".parse().unwrap() }
        };
        let host = Host { fabric, number: 3.try_into().unwrap(), peers: peers.collect(), underlay, mtu };
        let mut all = host.objects().unwrap();
        let member = member(seed, invariant, &fabric);
        all.extend(if open { jail.with(&member) } else { jail.closed() });
        if open {
            all.extend(Host::for_member(&member));
        }
        all
    }

    proptest! {
        #[test]
        fn a_plan_leads_from_any_state_to_any_other(
            (from, to) in (any::<(u8, bool, bool)>(), any::<(u8, bool, bool)>()),
            mtus in (prop_oneof![Just(1500_u32), Just(1430)], prop_oneof![Just(1500_u32), Just(1430)]),
            missing in any::<u64>(),
        ) {
            let desired = state(to.0, to.1, to.2, mtus.1);
            let mut present = state(from.0, from.1, from.2, mtus.0);
            // Somebody took things away.
            let mut turn = missing | 1;
            present.retain(|_| {
                turn = turn.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                turn % 11 != 0
            });
            // What was on a link that is gone went with it, and elements with their rules.
            let whole = present.clone();
            present.retain(|object| has_its_ground(object, &whole));
            for step in plan(&present.clone(), &desired) {
                carry_out(&step, &mut present);
            }
            prop_assert_eq!(&present, &desired);
            prop_assert!(plan(&present, &desired).is_empty());
        }

        #[test]
        fn who_leaves_is_shut_out_before_anything_else(from in any::<(u8, bool)>()) {
            let (open, closed) = (state(from.0, from.1, true, 1500), state(from.0, from.1, false, 1500));
            let steps = plan(&open, &closed);
            let element = |step: &Step| matches!(step, Step::Remove(Object::Element { .. }));
            let first_other = steps.iter().position(|step| !element(step)).unwrap_or(steps.len());
            prop_assert!(steps[first_other..].iter().all(|step| !element(step)));
        }
    }
}
