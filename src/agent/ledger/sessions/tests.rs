//! Numbers are given to one at a time, rest before the next, and never wrap around into use.

use super::*;
use crate::agent::egress::Egress;
use crate::agent::record::{SCHEMA_VERSION, VmRecord};
use crate::agent::session_record::{Addressing, NetworkRecord};
use crate::clock::UnixNanos;

fn record(number: u8, network_id: SessionNetworkId) -> SessionRecord {
    SessionRecord {
        schema_version: SCHEMA_VERSION,
        id: SessionId::from_random([number; 10]),
        name: None,
        session_network_id: network_id,
        ipv4: true,
        egress: Egress::default(),
        created_at: UnixNanos(1),
        expires_at: None,
        state: SessionState::Active,
    }
}

fn create(store: &mut Store, number: u8, choice: NumberChoice, now: u64) -> Result<u32, LedgerError> {
    let (made, _) = store.create_session(choice, Steady(now), |id| NewSession {
        record: record(number, id),
        user_data: Some(format!("of {number}")),
        writes: Vec::new(),
    })?;
    Ok(made.session_network_id.into())
}

fn refusal<T: std::fmt::Debug>(result: Result<T, LedgerError>) -> SessionRefusal {
    match result {
        Err(LedgerError::Session(refusal)) => refusal,
        other => panic!("a refusal is expected: {other:?}"),
    }
}

fn id(number: u8) -> SessionId {
    SessionId::from_random([number; 10])
}

const THREE: NumberChoice = NumberChoice::Next { first: 1, last: 3 };

#[test]
fn network_ids_go_round_and_skip_what_rests() {
    let mut store = Store::in_memory().unwrap();
    assert_eq!(create(&mut store, 1, THREE, 0).unwrap(), 1);
    assert_eq!(create(&mut store, 2, THREE, 0).unwrap(), 2);
    store.remove_session(&id(1), Steady(10), &[]).unwrap();
    // Not the lowest, but the one that was not used for longest.
    assert_eq!(create(&mut store, 3, THREE, 0).unwrap(), 3);
    assert_eq!(refusal(create(&mut store, 4, THREE, 9)), SessionRefusal::NoNumber);
    let one = NumberChoice::Exactly(1.try_into().unwrap());
    assert_eq!(refusal(create(&mut store, 4, one, 9)), SessionRefusal::Resting { until: Steady(10) });
    assert_eq!(store.resting_until(1.try_into().unwrap(), Steady(9)).unwrap(), Some(Steady(10)));
    assert_eq!(create(&mut store, 4, THREE, 10).unwrap(), 1);
    assert_eq!(refusal(create(&mut store, 5, one, 10)), SessionRefusal::NumberTaken);
    assert_eq!(store.user_data(&id(4)).unwrap().as_deref(), Some("of 4"));
    assert_eq!(refusal(store.remove_session(&id(1), Steady(0), &[])), SessionRefusal::Unknown);
}

#[test]
fn reserved_network_ids_are_not_chosen() {
    let mut store = Store::in_memory().unwrap();
    let around = NumberChoice::Next { first: 0x0200_5efe, last: 0x0200_5f00 };
    assert_eq!(create(&mut store, 1, around, 0).unwrap(), 0x0200_5efe);
    assert_eq!(create(&mut store, 2, around, 0).unwrap(), 0x0200_5f00);
    assert_eq!(refusal(create(&mut store, 3, around, 0)), SessionRefusal::NoNumber);
}

#[test]
fn a_session_is_found_by_id_name_and_number() {
    let mut store = Store::in_memory().unwrap();
    let named = |number, name: &str, network_id: u32| {
        let name = Some(name.to_owned());
        let record = SessionRecord { name, ..record(number, network_id.try_into().unwrap()) };
        NewSession { record, user_data: None, writes: Vec::new() }
    };
    let exactly = |number: u32| NumberChoice::Exactly(number.try_into().unwrap());
    store.create_session(exactly(517), Steady(0), |_| named(1, "etl", 517)).unwrap();
    let twice = store.create_session(exactly(518), Steady(0), |_| named(2, "etl", 518));
    assert_eq!(refusal(twice.map(drop)), SessionRefusal::NameTaken);
    for word in [id(1).as_str(), "etl", "517"] {
        assert_eq!(store.session(word).unwrap().unwrap().id, id(1), "{word}");
    }
    for word in ["", "et", "5", "-517", "518"] {
        assert!(store.session(word).unwrap().is_none(), "{word}");
    }
    assert_eq!(store.sessions_by_prefix(&id(1).as_str()[..4]).unwrap().len(), 1);
}

fn join(store: &mut Store, vm: u8, session: u8, max: u32, now: u64) -> Result<(u16, u32), LedgerError> {
    let vm_id = VmId::from_random([vm; 10]);
    let session = Some((id(session), max));
    let claim = Claim { vm: vm_id, session, jail: None, now: Steady(now) };
    let (got, _) = store.admit_vm(&claim, |grant| {
        let (session, local_id) = grant.member.unwrap();
        let network = NetworkRecord {
            home: None,
            session: session.id,
            session_network_id: session.session_network_id,
            local_id,
            ipv6: std::net::Ipv6Addr::LOCALHOST,
            ipv4: None,
            addressing: Addressing::Guest,
            egress: Default::default(),
            published: Vec::new(),
        };
        let record = crate::agent::ledger::tests::vm(vm, &format!("vm{vm}"));
        let record = VmRecord { jail: grant.jail, network: Some(network), ..record };
        ((grant.jail, local_id.into()), vec![Write::Vm(Box::new(record))])
    })?;
    Ok(got)
}

#[test]
fn local_ids_are_the_lowest_free_and_never_wrap() {
    let mut store = Store::in_memory().unwrap();
    create(&mut store, 1, THREE, 0).unwrap();
    assert_eq!(join(&mut store, 1, 1, 2, 0).unwrap(), (0, 1));
    assert_eq!(join(&mut store, 2, 1, 2, 0).unwrap(), (1, 2));
    assert_eq!(refusal(join(&mut store, 3, 1, 2, 0)), SessionRefusal::NoLocal);
    assert_eq!(store.locals().unwrap().len(), 2, "a refusal takes nothing");
    let vm = VmId::from_random([1; 10]);
    let release = Write::ReleaseLocal { vm: vm.clone(), quarantine_until: Steady(10) };
    store.commit(&[release]).unwrap();
    // Releasing again, as after a crash, does not make it rest longer.
    store.commit(&[Write::ReleaseLocal { vm: vm.clone(), quarantine_until: Steady(99) }]).unwrap();
    assert_eq!(refusal(join(&mut store, 3, 1, 2, 9)), SessionRefusal::NoLocal);
    store.commit(&[Write::NoVm(vm)]).unwrap();
    assert_eq!(join(&mut store, 3, 1, 2, 10).unwrap(), (0, 1), "the jail of a record that is gone is free as well");
}

#[test]
fn a_session_with_vms_stays_and_one_that_ends_takes_none() {
    let mut store = Store::in_memory().unwrap();
    create(&mut store, 1, THREE, 0).unwrap();
    join(&mut store, 1, 1, 62, 0).unwrap();
    assert_eq!(refusal(store.remove_session(&id(1), Steady(5), &[])), SessionRefusal::InUse { members: 1 });
    let mut session = store.session("1").unwrap().unwrap();
    session.state = SessionState::Draining;
    store.commit(&[Write::Session(Box::new(session.clone()))]).unwrap();
    assert_eq!(refusal(join(&mut store, 2, 1, 62, 0)), SessionRefusal::Draining);
    session = SessionRecord { state: SessionState::Active, expires_at: Some(Steady(7)), ..session };
    store.commit(&[Write::Session(Box::new(session))]).unwrap();
    assert_eq!(refusal(join(&mut store, 2, 1, 62, 7)), SessionRefusal::Expired);
    assert!(join(&mut store, 2, 1, 62, 6).is_ok());
    for vm in [1, 2] {
        store.commit(&[Write::NoVm(VmId::from_random([vm; 10]))]).unwrap();
    }
    store.remove_session(&id(1), Steady(5), &[]).unwrap();
    assert_eq!(refusal(join(&mut store, 3, 1, 62, 0)), SessionRefusal::Unknown);
    assert!(store.sessions().unwrap().is_empty());
}

#[test]
fn there_is_an_end_to_jails() {
    let mut store = Store::in_memory().unwrap();
    for jail in 0..JAILS_MAX {
        let [high, low] = jail.to_be_bytes();
        let vm = VmId::from_random([high, low, 0, 0, 0, 0, 0, 0, 0, 0]);
        let claim = Claim { vm: vm.clone(), session: None, jail: None, now: Steady(0) };
        let made = |grant: Grant| {
            let record = crate::agent::ledger::tests::vm(1, "x");
            let record = VmRecord { id: vm, name: None, jail: grant.jail, ..record };
            (grant.jail, vec![Write::Vm(Box::new(record))])
        };
        assert_eq!(store.admit_vm(&claim, made).unwrap().0, jail);
    }
    let claim = Claim { vm: VmId::from_random([255; 10]), session: None, jail: None, now: Steady(0) };
    assert_eq!(refusal(store.admit_vm(&claim, |grant| (grant, Vec::new()))), SessionRefusal::NoJail);
}
