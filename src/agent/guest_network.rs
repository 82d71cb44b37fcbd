//! What a guest is told of its network: pure, from what its jail and host know of it.

use hearth_guest_wire::{Address, Gateway, GatewayAddress, NetworkInterface};

use crate::net::member::{GATEWAY_V4, GATEWAY_V6, Member, TAP_MAC};

/// The version of the guest's protocol that knows networks.
pub(super) const SINCE_VERSION: u16 = 2;

/// The version that knows other hardware addresses and programs that take note of an identity: what a guest has to
/// speak to be launched from a bundle.
pub(super) const HOOKS_SINCE_VERSION: u16 = 3;

/// The guest's interfaces: one, with the addresses the guest has inside and its jail as gateway. A VM without a session
/// has no address but its link-local one, by which it reaches the metadata service. An `mtu` of 0 leaves that alone.
pub(super) fn guest_network(member: &Member, mtu: u16) -> Vec<NetworkInterface> {
    let (mut addresses, mut gateways) = (Vec::new(), Vec::new());
    if let Some(session) = &member.session {
        addresses.push(Address::V6(session.inner_v6().octets(), 128));
        gateways.push(Gateway { address: GatewayAddress::V6(GATEWAY_V6.octets()), mac: TAP_MAC });
        if let Some(v4) = session.inner_v4() {
            addresses.push(Address::V4(v4.octets(), 32));
            gateways.push(Gateway { address: GatewayAddress::V4(GATEWAY_V4.octets()), mac: TAP_MAC });
        }
    }
    vec![NetworkInterface { mac: member.mac, mtu, addresses, gateways }]
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::net::member::{Addressing, INNER_V4, INNER_V6, SessionAddresses};

    fn member(v4: Option<Ipv4Addr>, addressing: Addressing) -> Member {
        let v6 = Ipv6Addr::new(0xfd3c, 0x91aa, 0x07e2, 3, 0, 0x205, 0, 5);
        let session = SessionAddresses {
            v6,
            v4,
            match_v6: v6,
            match_v4: v4,
            addressing,
            egress: Vec::new(),
            nat: false,
            published: Vec::new(),
        };
        Member { mac: [2, 1, 2, 3, 4, 5], session: Some(session) }
    }

    #[test]
    fn a_member_has_its_addresses_and_its_jail_as_gateway() {
        let [interface] = &guest_network(&member(Some(Ipv4Addr::new(10, 3, 129, 69)), Addressing::Guest), 1430)[..]
        else {
            panic!("one interface")
        };
        assert_eq!((interface.mac, interface.mtu), ([2, 1, 2, 3, 4, 5], 1430));
        let v6 = [0xfd, 0x3c, 0x91, 0xaa, 0x07, 0xe2, 0, 3, 0, 0, 2, 5, 0, 0, 0, 5];
        assert_eq!(interface.addresses, [Address::V6(v6, 128), Address::V4([10, 3, 129, 69], 32)]);
        let of = |address| Gateway { address, mac: [2, 0x68, 0x74, 0x68, 0, 1] };
        let v6 = GatewayAddress::V6([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(interface.gateways, [of(v6), of(GatewayAddress::V4([169, 254, 1, 1]))]);
    }

    #[test]
    fn without_ipv4_there_is_no_gateway_for_it() {
        let interfaces = guest_network(&member(None, Addressing::Guest), 0);
        assert_eq!((interfaces[0].addresses.len(), interfaces[0].gateways.len()), (1, 1));
    }

    #[test]
    fn invariant_members_are_all_the_same_inside() {
        let interfaces = guest_network(&member(Some(Ipv4Addr::new(10, 3, 129, 69)), Addressing::Invariant), 0);
        let expected = [Address::V6(INNER_V6.octets(), 128), Address::V4(INNER_V4.octets(), 32)];
        assert_eq!(interfaces[0].addresses, expected);
    }

    #[test]
    fn without_a_session_the_interface_is_up_and_no_more() {
        let interfaces = guest_network(&Member { mac: [2; 6], session: None }, 0);
        let expected = NetworkInterface { mac: [2; 6], mtu: 0, addresses: Vec::new(), gateways: Vec::new() };
        assert_eq!(interfaces, [expected]);
    }
}
