//! Which network id a session gets, and whether it has IPv4.

use super::*;
use crate::agent::config::{Peer, Underlay};
use crate::net::address::{Fabric, V4Widths};

fn fabric(host: u16, ipv4: bool, with_peer: bool) -> FabricConfig {
    let peer =
        Peer { name: "b".to_owned(), address: "2001:db8::2".parse().unwrap(), port: None, host: 7.try_into().unwrap() };
    FabricConfig {
        fabric: Fabric::new("fd3c:91aa:7e2::".parse().unwrap(), ipv4.then_some(V4Widths::USUAL)).unwrap(),
        host: host.try_into().unwrap(),
        underlay: Underlay::Routed,
        mtu: 1500,
        quarantine_s: 120,
        pool: 0,
        listen: None,
        key_file: None,
        plain_peers: false,
        peers: with_peer.then_some(peer).into_iter().collect(),
    }
}

const BELOW_IPV4: NumberChoice = NumberChoice::Next { first: 1, last: 1022 };
const BELOW_HOST_3: NumberChoice = NumberChoice::Next { first: 0x3_0001, last: 0x3_ffff };

#[test]
fn a_host_alone_chooses_numbers_with_ipv4_and_one_with_peers_its_own() {
    for (ipv4_of_fabric, with_peer, asked, choice, ipv4) in [
        (true, false, None, BELOW_IPV4, true),
        (true, false, Some(true), BELOW_IPV4, true),
        (true, false, Some(false), BELOW_HOST_3, false),
        (true, true, None, BELOW_HOST_3, false),
        (false, false, None, BELOW_HOST_3, false),
    ] {
        let found = choose(&fabric(3, ipv4_of_fabric, with_peer), None, asked).unwrap();
        assert_eq!(found, (choice, ipv4), "{ipv4_of_fabric} {with_peer} {asked:?}");
    }
    let chosen = choose(&fabric(3, true, true), None, Some(true));
    assert!(matches!(chosen, Err(SessionError::ChosenTooWide { first: 0x3_0001 })));
}

#[test]
fn a_number_that_is_given_has_ipv4_if_it_fits() {
    let with = fabric(3, true, true);
    let exactly = |number: u32| NumberChoice::Exactly(number.try_into().unwrap());
    assert_eq!(choose(&with, Some(517), None).unwrap(), (exactly(517), true));
    assert_eq!(choose(&with, Some(517), Some(false)).unwrap(), (exactly(517), false));
    assert_eq!(choose(&with, Some(1022), Some(true)).unwrap(), (exactly(1022), true));
    assert_eq!(choose(&with, Some(1023), None).unwrap(), (exactly(1023), false));
    assert!(matches!(choose(&with, Some(1023), Some(true)), Err(SessionError::TooWide(_))));
    assert!(matches!(choose(&fabric(3, false, false), Some(517), Some(true)), Err(SessionError::NoIpv4)));
    for reserved in [0, u32::MAX, 0x0200_5eff, 0xfdff_ffff] {
        assert!(matches!(choose(&with, Some(reserved), None), Err(SessionError::Reserved(_))), "{reserved}");
    }
}

#[test]
fn only_ipv4_limits_local_ids() {
    let alone = fabric(3, true, false);
    let session = |ipv4| SessionRecord {
        schema_version: SCHEMA_VERSION,
        id: SessionId::from_random([1; 10]),
        name: None,
        session_network_id: 5.try_into().unwrap(),
        ipv4,
        egress: Egress::default(),
        created_at: UnixNanos(0),
        expires_at: None,
        state: SessionState::Active,
    };
    assert_eq!((local_max(&alone, &session(true)), local_max(&alone, &session(false))), (62, u32::MAX - 1));
    assert_eq!(local_max(&fabric(3, false, false), &session(true)), u32::MAX - 1, "IPv4 was switched off since");
}
