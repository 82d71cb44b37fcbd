//! The formulas, their inverse, and what is reserved.

use proptest::prelude::*;

use super::*;

fn fabric() -> Fabric {
    Fabric::new("fd3c:91aa:7e2::".parse().unwrap(), Some(V4Widths::USUAL)).unwrap()
}

fn parts(host: u16, session: u32, local: u32) -> Parts {
    Parts { host: host.try_into().unwrap(), session: session.try_into().unwrap(), local: local.try_into().unwrap() }
}

#[test]
fn the_examples_of_the_module_are_right() {
    let one = parts(3, 517, 5);
    assert_eq!(fabric().v6(one).to_string(), "fd3c:91aa:7e2:3:0:205:0:5");
    assert_eq!(fabric().v4(one).unwrap().unwrap().to_string(), "10.3.129.69");
    assert_eq!(fabric().v6_session(one.session).to_string(), "fd3c:91aa:7e2::205:0:0");
    assert_eq!(fabric().v6_session_mask().to_string(), "ffff:ffff:ffff:0:ffff:ffff::");
    assert_eq!(fabric().v4_session(one.session).unwrap().to_string(), "10.0.129.64");
    assert_eq!(fabric().v4_session_mask().unwrap().to_string(), "255.0.255.192");
    assert_eq!(fabric().v6_subnet(one.host).to_string(), "fd3c:91aa:7e2:3::/64");
    assert_eq!(fabric().v4_subnet(one.host).unwrap().unwrap().to_string(), "10.3.0.0/16");
    assert_eq!(fabric().v6_net().to_string(), "fd3c:91aa:7e2::/48");
    assert_eq!(fabric().v4_net().unwrap().to_string(), "10.0.0.0/8");
}

#[test]
fn what_is_reserved_is_refused_and_its_neighbours_are_not() {
    for (id, fits) in [
        (0, false),
        (1, true),
        (0x0200_5efe, true),
        (0x0200_5eff, false),
        (0x0200_5f00, true),
        (0xfdff_fffe, true),
        (0xfdff_ffff, false),
        (0xfe00_0000, true),
        (0xffff_fffe, true),
        (0xffff_ffff, false),
    ] {
        assert_eq!(SessionNetworkId::try_from(id).is_ok(), fits, "{id:#x}");
    }
    for (id, fits) in [(0, false), (1, true), (u32::MAX - 1, true), (u32::MAX, false)] {
        assert_eq!(LocalId::try_from(id).is_ok(), fits, "{id:#x}");
    }
    assert_eq!(HostNumber::try_from(0), Err(AddressError::HostZero));
}

#[test]
fn ipv4_ends_where_its_bits_end() {
    let widths = V4Widths::USUAL;
    assert_eq!((widths.host_max(), widths.session_max(), widths.local_max()), (255, 1022, 62));
    assert!(fabric().v4(parts(255, 1022, 62)).is_ok());
    assert!(matches!(fabric().v4(parts(256, 1, 1)), Err(AddressError::HostTooWide { .. })));
    assert!(matches!(fabric().v4(parts(1, 1023, 1)), Err(AddressError::SessionTooWide { .. })));
    assert!(matches!(fabric().v4(parts(1, 1, 63)), Err(AddressError::LocalTooWide { .. })));
    // All ones in a field is nobody's address.
    assert_eq!(fabric().v4_parts(Ipv4Addr::new(10, 1, 0xff, 0xc1)), None, "session 1023");
    assert_eq!(fabric().v4_parts(Ipv4Addr::new(10, 1, 0, 0x7f)), None, "local 63");
    assert_eq!(fabric().v4_parts(Ipv4Addr::new(10, 0, 0, 0x41)), None, "host 0");
    assert_eq!(fabric().v4_parts(Ipv4Addr::new(11, 1, 0, 0x41)), None, "not ours");
}

#[test]
fn prefixes_and_widths_that_cannot_be_are_refused() {
    for prefix in ["::", "fd00:1:2:3::", "fe80::", "ff02::", "fd3c:91aa:7e2::1"] {
        assert!(Fabric::new(prefix.parse().unwrap(), None).is_err(), "{prefix}");
    }
    for (host, session, local) in [(8, 10, 7), (1, 17, 6), (17, 4, 3), (8, 1, 15), (8, 15, 1), (0, 0, 24)] {
        assert!(V4Widths::new(host, session, local).is_err(), "{host}+{session}+{local}");
    }
}

fn any_widths() -> impl Strategy<Value = V4Widths> {
    (2_u8..=16).prop_flat_map(|host| {
        let rest = V4_BITS - host;
        (2..=rest - 2).prop_map(move |session| V4Widths::new(host, session, rest - session).unwrap())
    })
}

fn any_fabric() -> impl Strategy<Value = Fabric> {
    (any::<[u8; 5]>(), any_widths()).prop_map(|(random, widths)| {
        let [a, b, c, d, e] = random;
        let prefix = [0xfd, a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        Fabric::new(prefix.into(), Some(widths)).unwrap()
    })
}

fn any_parts() -> impl Strategy<Value = Parts> {
    let session = any::<u32>().prop_filter_map("reserved", |id| SessionNetworkId::try_from(id).ok());
    let small = (1_u32..2000).prop_map(|id| SessionNetworkId::try_from(id).unwrap());
    let local = prop_oneof![1_u32..200, 1..u32::MAX].prop_map(|id| LocalId::try_from(id).unwrap());
    (1_u16.., prop_oneof![session, small], local).prop_map(|(host, session, local)| Parts {
        host: host.try_into().unwrap(),
        session,
        local,
    })
}

proptest! {
    #[test]
    fn an_address_gives_its_parts_back(fabric in any_fabric(), parts in any_parts()) {
        prop_assert_eq!(fabric.v6_parts(fabric.v6(parts)), Some(parts));
        if let Ok(Some(address)) = fabric.v4(parts) {
            prop_assert_eq!(fabric.v4_parts(address), Some(parts));
        }
    }

    #[test]
    fn parts_that_are_read_make_the_address_again(fabric in any_fabric(), low: u128, v4: u32) {
        let address = Ipv6Addr::from_bits(fabric.v6_net().first.to_bits() | low >> 48);
        if let Some(parts) = fabric.v6_parts(address) {
            prop_assert_eq!(fabric.v6(parts), address);
        }
        let address = Ipv4Addr::from_bits(V4_NET | v4 >> 8);
        if let Some(parts) = fabric.v4_parts(address) {
            prop_assert_eq!(fabric.v4(parts), Ok(Some(address)));
        }
    }

    #[test]
    fn the_match_is_true_for_members_and_for_nobody_else(fabric in any_fabric(), a in any_parts(), b in any_parts()) {
        let same = a.session == b.session;
        let masked = Ipv6Addr::from_bits(fabric.v6(b).to_bits() & fabric.v6_session_mask().to_bits());
        prop_assert_eq!(masked == fabric.v6_session(a.session), same);
        let member = Parts { session: a.session, ..b };
        let masked = Ipv6Addr::from_bits(fabric.v6(member).to_bits() & fabric.v6_session_mask().to_bits());
        prop_assert_eq!(masked, fabric.v6_session(a.session));
        if let (Ok(Some(address)), Some(wanted)) = (fabric.v4(b), fabric.v4_session(a.session)) {
            let mask = fabric.v4_session_mask().unwrap();
            prop_assert_eq!(Ipv4Addr::from_bits(address.to_bits() & mask.to_bits()) == wanted, same);
        }
    }

    #[test]
    fn addresses_outside_the_fabric_match_no_session(fabric in any_fabric(), parts in any_parts(), other: u128) {
        let address = Ipv6Addr::from_bits(other);
        prop_assume!((other ^ fabric.v6_net().first.to_bits()) >> 80 != 0);
        let masked = Ipv6Addr::from_bits(other & fabric.v6_session_mask().to_bits());
        prop_assert_ne!(masked, fabric.v6_session(parts.session));
        prop_assert_eq!(fabric.v6_parts(address), None);
    }

    #[test]
    fn addresses_are_inside_their_hosts_subnets(fabric in any_fabric(), parts in any_parts()) {
        let subnet = fabric.v6_subnet(parts.host);
        prop_assert_eq!(fabric.v6(parts).to_bits() >> 64, subnet.first.to_bits() >> 64);
        if let (Ok(Some(address)), Ok(Some(subnet))) = (fabric.v4(parts), fabric.v4_subnet(parts.host)) {
            let below = 32 - subnet.bits;
            prop_assert_eq!(address.to_bits() >> below, subnet.first.to_bits() >> below);
        }
    }
}
