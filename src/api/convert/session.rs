//! Sessions and the fabric.

use super::{state, timestamp};
use crate::agent::{self, EgressError};
use crate::api::types::{
    Addressing, Drops, Egress, EgressProtocol, EgressRule, Fabric, FabricIpv4, FabricPeer, PortProtocol, PublishedPort,
    Session, SessionMember, SessionState,
};

/// A session and who is in it.
pub(in crate::api) fn session(view: &agent::SessionView) -> Session {
    let agent::SessionView { record, expires_at, members } = view;
    let sum = |of: fn(&agent::Drops) -> u64| members.iter().map(|member| of(&member.drops)).sum();
    Session {
        id: record.id.clone(),
        name: record.name.clone(),
        session_network_id: record.session_network_id.into(),
        state: match record.state {
            agent::SessionState::Active => SessionState::Active,
            agent::SessionState::Draining => SessionState::Draining,
        },
        ipv4: record.ipv4,
        egress: egress_of(&record.egress),
        created_at: timestamp(record.created_at),
        expires_at: expires_at.map(timestamp),
        members: members.iter().map(member).collect(),
        drops: Drops {
            spoof: sum(|drops| drops.spoof),
            foreign_session: sum(|drops| drops.foreign_session),
            not_allowed: sum(|drops| drops.not_allowed),
            queue_full: sum(|drops| drops.queue_full),
        },
    }
}

fn member(member: &agent::Member) -> SessionMember {
    let agent::Drops { spoof, foreign_session, not_allowed, queue_full } = member.drops;
    SessionMember {
        id: member.vm.id.clone(),
        name: member.vm.name.clone(),
        state: state(&member.vm.state),
        addresses: addresses(&member.vm),
        drops: Drops { spoof, foreign_session, not_allowed, queue_full },
    }
}

/// A VM's addresses: IPv6 first. One that ended has none: they rest, and are somebody else's then.
pub(super) fn addresses(vm: &agent::VmRecord) -> Vec<String> {
    let Some(network) = vm.network.as_ref().filter(|_| vm.state.holds_resources()) else { return Vec::new() };
    let v4 = network.ipv4.map(|address| address.to_string());
    std::iter::once(network.ipv6.to_string()).chain(v4).collect()
}

fn egress_of(egress: &agent::Egress) -> Egress {
    let rule = |rule: &agent::EgressRule| EgressRule {
        cidr: rule.cidr.to_string(),
        protocol: match rule.protocol {
            agent::Protocol::Tcp => EgressProtocol::Tcp,
            agent::Protocol::Udp => EgressProtocol::Udp,
            agent::Protocol::Icmp => EgressProtocol::Icmp,
            agent::Protocol::Any => EgressProtocol::Any,
        },
        ports: rule.ports,
    };
    Egress { nat: egress.nat, allow: egress.allow.iter().map(rule).collect() }
}

/// What was asked for; networks become what they say.
pub(in crate::api) fn egress(asked: Egress) -> Result<agent::Egress, EgressError> {
    let rule = |(index, rule): (usize, EgressRule)| {
        let cidr = rule.cidr.parse().map_err(|source| EgressError::Cidr { index, source })?;
        let protocol = match rule.protocol {
            EgressProtocol::Tcp => agent::Protocol::Tcp,
            EgressProtocol::Udp => agent::Protocol::Udp,
            EgressProtocol::Icmp => agent::Protocol::Icmp,
            EgressProtocol::Any => agent::Protocol::Any,
        };
        Ok(agent::EgressRule { cidr, protocol, ports: rule.ports })
    };
    let allow = asked.allow.into_iter().enumerate().map(rule).collect::<Result<_, EgressError>>()?;
    Ok(agent::Egress { nat: asked.nat, allow })
}

/// What was asked for.
pub(in crate::api) const fn addressing(asked: Addressing) -> agent::Addressing {
    match asked {
        Addressing::Guest => agent::Addressing::Guest,
        Addressing::Invariant => agent::Addressing::Invariant,
    }
}

/// A port to publish.
pub(in crate::api) const fn published_port(asked: &PublishedPort) -> agent::PublishedPort {
    let PublishedPort { protocol, host_port, guest_port } = *asked;
    let protocol = match protocol {
        PortProtocol::Tcp => agent::Protocol::Tcp,
        PortProtocol::Udp => agent::Protocol::Udp,
    };
    agent::PublishedPort { protocol, host_port, guest_port }
}

/// A port that is published.
pub(super) const fn shown_port(port: &agent::PublishedPort) -> PublishedPort {
    let agent::PublishedPort { protocol, host_port, guest_port } = *port;
    let protocol = match protocol {
        agent::Protocol::Udp => PortProtocol::Udp,
        agent::Protocol::Tcp | agent::Protocol::Icmp | agent::Protocol::Any => PortProtocol::Tcp,
    };
    PublishedPort { protocol, host_port, guest_port }
}

/// The fabric as this agent sees it.
pub(in crate::api) fn fabric(view: &agent::FabricView) -> Fabric {
    let agent::FabricView { config, conflicts, peers } = view;
    let net = &config.fabric;
    let ipv4 = net.v4_widths().zip(net.v4_net()).zip(net.v4_subnet(config.host).ok().flatten());
    let (vxlan_id, vxlan_port) = match config.underlay {
        agent::config::Underlay::Routed => (None, None),
        agent::config::Underlay::Vxlan { id, port } => (Some(id), Some(port)),
    };
    let peer = |view: &agent::peers::PeerView| FabricPeer {
        name: view.peer.name.clone(),
        address: view.peer.to_string(),
        host_number: view.peer.host.into(),
        state: view.state.name().to_owned(),
        reason: view.state.why().map(str::to_owned),
        last_hello_ago_ms: view.heard_ago.map(|ago| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)),
    };
    Fabric {
        ipv6_prefix: net.v6_net().to_string(),
        host_number: config.host.into(),
        ipv6_subnet: net.v6_subnet(config.host).to_string(),
        ipv4: ipv4.map(|((widths, net), subnet)| FabricIpv4 {
            net: net.to_string(),
            subnet: subnet.to_string(),
            host_bits: widths.host_bits(),
            session_bits: widths.session_bits(),
            local_bits: widths.local_bits(),
        }),
        mtu: config.mtu,
        underlay: config.underlay.name().to_owned(),
        vxlan_id,
        vxlan_port,
        quarantine_s: config.quarantine_s,
        peer_transport: config.peer_transport().to_owned(),
        peers: peers.iter().map(peer).collect(),
        conflicts: conflicts.clone(),
    }
}
