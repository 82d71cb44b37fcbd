//! Two hosts of a fabric, a wire between them and somebody outside, for one test: the hosts' namespaces are this
//! crate's to fill, the test's own is the outside, with the bridge that is the wire.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hearth::net::address::{Fabric, HostNumber, LocalId, Parts, SessionNetworkId, V4Widths};
use hearth::net::desired::{Host, Peer, Underlay};
use hearth::net::host::{HostNetwork, NetworkSpec, Settled};
use hearth::net::member::{Addressing, Member, SessionAddresses};
use hearth::sys::netns;
use hearth_guest_probe::forge::Party;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::host::run;
use crate::sniff::Sniffer;
use crate::tap_end::TapEnd;

/// The numbers of the hosts in the fabric.
pub(crate) const NUMBERS: [u16; 2] = [3, 4];

/// The fabric's prefix.
pub(crate) const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd3c, 0x91aa, 0x7e2, 0, 0, 0, 0, 0);

/// Bytes per packet.
pub(crate) const MTU: u32 = 1500;

/// Whoever is outside of the fabric.
pub(crate) const OUTSIDE_V4: &str = "198.51.100.1";

/// Whoever is outside of the fabric.
pub(crate) const OUTSIDE_V6: &str = "2001:db8:51::1";

/// A host of the fabric.
pub(crate) struct FabricHost {
    pub(crate) number: u16,
    pub(crate) network: Arc<HostNetwork>,
    pub(crate) namespace: OwnedFd,
    /// How many jails were made.
    jails: u16,
}

/// The fabric.
pub(crate) struct World {
    pub(crate) hosts: Vec<FabricHost>,
}

/// A VM that is there as far as its network goes.
#[derive(Debug, Clone)]
pub(crate) struct Vm {
    /// Which of the hosts it is on.
    pub(crate) host: usize,
    /// Its jail's number.
    pub(crate) jail: u16,
    pub(crate) member: Member,
}

impl Vm {
    /// As others see it.
    pub(crate) fn outer(&self) -> Party {
        let session = self.member.session.as_ref().expect("a member of a session");
        Party { v4: session.v4, v6: session.v6 }
    }

    /// As it sees itself.
    pub(crate) fn inner(&self) -> Party {
        let session = self.member.session.as_ref().expect("a member of a session");
        Party { v4: session.inner_v4(), v6: session.inner_v6() }
    }
}

/// Nothing went wrong.
pub(crate) fn assert_done(settled: &Settled) {
    assert_eq!(settled.failures, []);
}

fn fabric() -> Fabric {
    Fabric::new(PREFIX, Some(V4Widths::USUAL)).unwrap()
}

/// A member of a session on a host.
pub(crate) fn member(host: u16, session: u32, local: u32, addressing: Addressing) -> Member {
    let session_id: SessionNetworkId = session.try_into().unwrap();
    let local_id: LocalId = local.try_into().unwrap();
    let parts = Parts { host: host.try_into().unwrap(), session: session_id, local: local_id };
    let [.., a, b] = session.to_be_bytes();
    let mac = [2, host.to_be_bytes()[1], a, b, 0, local.to_be_bytes()[3]];
    let session = SessionAddresses {
        v6: fabric().v6(parts),
        v4: fabric().v4(parts).unwrap(),
        match_v6: fabric().v6_session(session_id),
        match_v4: fabric().v4_session(session_id),
        addressing,
        egress: Vec::new(),
        nat: false,
        published: Vec::new(),
    };
    Member { mac, session: Some(session) }
}

/// What a host is made of; the others are its peers.
pub(crate) fn spec(number: u16, vxlan: bool) -> NetworkSpec {
    let address = |number: u16| Ipv6Addr::new(0xfd00, 0xf, 0, 0, 0, 0, 0, number).into();
    let others = NUMBERS.into_iter().filter(|other| *other != number);
    let host_number: HostNumber = number.try_into().unwrap();
    let host = Host {
        fabric: fabric(),
        number: host_number,
        peers: others.map(|other| Peer { number: other.try_into().unwrap(), address: address(other) }).collect(),
        underlay: if vxlan {
            Underlay::Vxlan { id: 104, port: 4789, local: address(number) }
        } else {
            Underlay::Routed
        },
        mtu: MTU,
    };
    NetworkSpec { number, host: Some(host), mtu: MTU }
}

impl World {
    /// Two hosts whose packets go over the wire as they are. The calling thread stays on one processor from here on, so
    /// that what it sends is dealt with in order.
    pub(crate) fn new() -> Self {
        Self::over(false)
    }

    /// Two hosts whose packets go over the wire as they are, or in vxlan.
    pub(crate) fn over(vxlan: bool) -> Self {
        let mut first = CpuSet::new();
        first.set(0).unwrap();
        sched_setaffinity(Pid::from_raw(0), &first).unwrap();
        run("ip link set lo up");
        run("ip link add wire type bridge");
        run("ip link set wire mtu 1600 up");
        run(&format!("ip address add {OUTSIDE_V4}/24 dev wire"));
        run(&format!("ip address add {OUTSIDE_V6}/64 dev wire nodad"));
        let hosts = NUMBERS.map(|number| {
            let name = format!("host{number}");
            run(&format!("ip netns add {name}"));
            run(&format!("ip link add port{number} mtu 1600 type veth peer name wire mtu 1600 netns {name}"));
            run(&format!("ip link set port{number} master wire up"));
            run(&format!("ip -n {name} link set lo up"));
            run(&format!("ip -n {name} link set wire up"));
            for address in [
                format!("198.51.100.{number}/24"),
                format!("2001:db8:51::{number}/64 nodad"),
                format!("fd00:f::{number}/64 nodad"),
            ] {
                run(&format!("ip -n {name} address add dev wire {address}"));
            }
            let namespace = netns::open_named(&name).unwrap();
            let network = netns::in_fd(&namespace, || HostNetwork::open(spec(number, vxlan))).unwrap().unwrap();
            assert_done(&network.settle_host());
            FabricHost { number, network: Arc::new(network), namespace, jails: 0 }
        });
        Self { hosts: hosts.into() }
    }

    /// A VM on a host, 0 or 1; its addresses are of the jail's number plus one.
    pub(crate) fn vm(&mut self, host: usize, session: u32, addressing: Addressing) -> Vm {
        self.vm_with(host, session, addressing, |_| ())
    }

    /// A VM on a host whose permissions `allow` says.
    pub(crate) fn vm_with(
        &mut self,
        host: usize,
        session: u32,
        addressing: Addressing,
        allow: impl FnOnce(&mut SessionAddresses),
    ) -> Vm {
        let on = &self.hosts[host];
        let mut member = member(on.number, session, u32::from(on.jails) + 1, addressing);
        if let Some(session) = &mut member.session {
            allow(session);
        }
        self.vm_of(host, member)
    }

    /// A VM on a host.
    pub(crate) fn vm_of(&mut self, host: usize, member: Member) -> Vm {
        let on = &mut self.hosts[host];
        let jail = on.jails;
        on.jails += 1;
        assert_done(&on.network.settle_jail(jail, 1, Some(member.clone())).unwrap());
        Vm { host, jail, member }
    }

    /// Has a VM on another host from now on, with the addresses it has.
    pub(crate) fn move_to(&mut self, host: usize, vm: &Vm) -> Vm {
        let member = vm.member.clone();
        let session = member.session.as_ref().expect("a member of a session");
        let addresses: Vec<IpAddr> = std::iter::once(session.v6.into()).chain(session.v4.map(IpAddr::V4)).collect();
        let moved = self.vm_of(host, member.clone());
        let at = self.hosts[host].number.try_into().unwrap();
        let network = &self.hosts[vm.host].network;
        assert_done(&network.lead_elsewhere(vm.jail, 1, &addresses, at));
        assert_done(&network.leave_jail(vm.jail));
        moved
    }

    /// Has a VM back where its addresses are from.
    pub(crate) fn back_to(&mut self, vm: &Vm, moved: &Vm) {
        assert_done(&self.hosts[moved.host].network.remove_jail(moved.jail));
        let network = &self.hosts[vm.host].network;
        assert_done(&network.settle_jail(vm.jail, 1, Some(vm.member.clone())).unwrap());
    }

    /// The VM's end of its tap.
    pub(crate) fn tap(&self, vm: &Vm) -> TapEnd {
        let jail = self.jail(vm);
        let tap = TapEnd::attach(&jail, "tap0");
        tap.wait_for_gateway(&vm.member);
        tap
    }

    /// A VM's jail.
    pub(crate) fn jail(&self, vm: &Vm) -> OwnedFd {
        self.hosts[vm.host].network.namespace(vm.jail).unwrap()
    }

    /// What a VM's jail dropped: for a forged source, for another session, for anything else.
    pub(crate) fn drops(&self, vm: &Vm) -> [u64; 3] {
        let drops = self.hosts[vm.host].network.drops(vm.jail).unwrap();
        ["spoof", "foreign_session", "not_allowed"].map(|reason| drops[reason])
    }

    /// Hears all there is in the hosts' namespaces and outside.
    pub(crate) fn sniffers(&self) -> Vec<(String, Sniffer)> {
        let hosts = self.hosts.iter().map(|host| (format!("host {}", host.number), Sniffer::in_fd(&host.namespace)));
        hosts.chain([("outside".to_owned(), Sniffer::here())]).collect()
    }
}
