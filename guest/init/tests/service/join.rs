//! Registering with a cluster: with the host on its connection, and with a registrar elsewhere.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use hearth_guest_wire::registrar::ANSWER_BYTES_MAX;
use hearth_guest_wire::{
    Endpoint, FromGuest, Identity, JOIN_TEXT_BYTES_MAX, Join, NetworkInterface, Registration, ToGuest,
};

use super::agent::{Agent, Host, identity};

/// Longer than any test takes.
const LONG_MS: u32 = 60_000;

/// A guest that is somebody, on this host's network.
fn somebody() -> Option<(Agent, Host)> {
    let agent = Agent::start_guest_by(&["--uts", "--mount"], "")?;
    let mut host = agent.greeted();
    host.has_done(&ToGuest::Identity(identity("named", 0x1a)));
    Some((agent, host))
}

fn join(endpoint: Option<Endpoint>, timeout_ms: u32) -> Join {
    Join {
        cluster_id: String::from("cluster"),
        executor_id: String::from("executor \"7\"\n"),
        token: String::from("secret"),
        endpoint,
        timeout_ms,
    }
}

/// A registrar's listener and where it is.
fn registrar() -> (TcpListener, Endpoint) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port is free");
    let port = listener.local_addr().expect("it has an address").port();
    (listener, Endpoint::V4(Ipv4Addr::LOCALHOST.octets(), port))
}

/// Takes the guest's line, gives this answer and says what the line was.
fn answer(listener: &TcpListener, answer: &[u8]) -> (String, TcpStream) {
    let (mut stream, _) = listener.accept().expect("the guest calls");
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).expect("the guest speaks");
    // The guest may have heard enough before the end.
    let _ = stream.write_all(answer);
    (line, stream)
}

#[test]
fn the_host_registers_the_guest_on_its_connection() {
    let Some((_agent, mut host)) = somebody() else { return };
    let register = FromGuest::Register(Registration {
        executor_id: String::from("executor \"7\"\n"),
        cluster_id: String::from("cluster"),
        vm_id: String::from("vm-test"),
        generation: [0x1a; 16],
        token: String::from("secret"),
    });
    for settled in
        [ToGuest::RegistrationRefused { reason: String::from("full") }, ToGuest::Registered { epoch: u64::MAX }]
    {
        host.say(&ToGuest::Join(join(None, 0)));
        assert_eq!(host.hear(), register);
        host.has_done(&settled);
        host.has_done(&ToGuest::Thaw);
    }
    // It is the registrar's turn, and nothing else is understood.
    host.say(&ToGuest::Join(join(None, 0)));
    assert_eq!(host.hear(), register);
    host.say(&ToGuest::Thaw);
    assert_eq!(host.hear_failure().0, 71);
}

#[test]
fn an_answer_that_was_not_asked_for_is_out_of_place() {
    let Some((agent, _)) = somebody() else { return };
    for answer in [ToGuest::Registered { epoch: 1 }, ToGuest::RegistrationRefused { reason: String::new() }] {
        let mut host = agent.greeted();
        host.say(&answer);
        assert_eq!(host.hear_failure().0, 71);
    }
}

#[test]
fn nobody_joins_and_texts_are_bounded() {
    let agent = Agent::start();
    let mut host = agent.greeted();
    assert_eq!(host.has_failed(&ToGuest::Join(join(None, 0))).0, 61);
    let Some((_agent, mut host)) = somebody() else { return };
    let (_listener, endpoint) = registrar();
    let longest = Join { token: "x".repeat(JOIN_TEXT_BYTES_MAX), ..join(None, 0) };
    host.say(&ToGuest::Join(longest.clone()));
    assert!(matches!(host.hear(), FromGuest::Register(_)));
    host.has_done(&ToGuest::Registered { epoch: 1 });
    let too_long = Join { token: longest.token + "x", endpoint: Some(endpoint), ..join(None, 0) };
    assert_eq!(host.has_failed(&ToGuest::Join(too_long)).0, 22);
}

#[test]
fn a_registrar_elsewhere_is_asked_once_for_each_launch() {
    let Some((_agent, mut host)) = somebody() else { return };
    let (listener, endpoint) = registrar();
    let message = ToGuest::Join(join(Some(endpoint), LONG_MS));
    host.say(&message);
    let (line, mut stream) = answer(&listener, b"ACK {\"members\":2,");
    assert_eq!(
        line,
        format!(
            "REGISTER {{\"executor_id\":\"executor \\\"7\\\"\\u000a\",\"cluster_id\":\"cluster\",\"vm\":\"vm-test\",\
             \"generation\":\"{}\",\"token\":\"secret\"}}\n",
            "1a".repeat(16)
        )
    );
    stream.write_all(b"\"epoch\": 12345678901}\n").expect("the guest listens");
    assert_eq!(host.hear(), FromGuest::Joined { epoch: 12_345_678_901 });

    // Again, also under the same identity given again: from memory, there is nobody to ask.
    drop(listener);
    host.say(&message);
    assert_eq!(host.hear(), FromGuest::Joined { epoch: 12_345_678_901 });
    host.has_done(&ToGuest::Identity(identity("named", 0x1a)));
    host.say(&message);
    assert_eq!(host.hear(), FromGuest::Joined { epoch: 12_345_678_901 });
    // Other words, or another launch: it has to be asked.
    let other = Join { executor_id: String::from("other"), ..join(Some(endpoint), LONG_MS) };
    assert_eq!(host.has_failed(&ToGuest::Join(other)).0, 111);
    host.has_done(&ToGuest::Identity(identity("named", 0x2b)));
    assert_eq!(host.has_failed(&message).0, 111);
}

#[test]
fn a_registrar_is_reached_by_ipv6() {
    let Some((_agent, mut host)) = somebody() else { return };
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).expect("a port is free");
    let Ok(SocketAddr::V6(address)) = listener.local_addr() else { panic!("an IPv6 address") };
    let endpoint = Endpoint::V6(address.ip().octets(), address.port());
    host.say(&ToGuest::Join(join(Some(endpoint), LONG_MS)));
    let _call = answer(&listener, b"ACK {\"epoch\":1}\n");
    assert_eq!(host.hear(), FromGuest::Joined { epoch: 1 });
}

#[test]
fn what_a_registrar_answers_else_is_a_failure() {
    let Some((_agent, mut host)) = somebody() else { return };
    let (listener, endpoint) = registrar();
    let too_long = [b"ACK {\"epoch\":1,\"x\":\"".to_vec(), vec![b'x'; ANSWER_BYTES_MAX]].concat();
    let cases: [(&[u8], i32, &str); 6] = [
        (b"REFUSED {\"reason\":\"wrong token\"}\n", 13, "the registrar refuses: wrong token"),
        (b"HELLO\n", 71, "the registrar's answer is none"),
        (b"\n", 71, "the registrar's answer is none"),
        (b"", 71, "the registrar hung up before it answered"),
        (b"ACK {\"epoch\":1}", 71, "the registrar hung up before it answered"),
        (&too_long, 71, "the registrar's answer is too long"),
    ];
    for (said, errno, what) in cases {
        host.say(&ToGuest::Join(join(Some(endpoint), LONG_MS)));
        drop(answer(&listener, said));
        assert_eq!(host.hear(), FromGuest::Failed { errno, what: what.to_owned() });
    }
    // None of it is remembered, and a further registration is made.
    host.say(&ToGuest::Join(join(Some(endpoint), LONG_MS)));
    drop(answer(&listener, b"ACK {\"epoch\":2}\n"));
    assert_eq!(host.hear(), FromGuest::Joined { epoch: 2 });
}

#[test]
fn a_registrar_that_says_nothing_is_waited_for_no_longer_than_told() {
    let Some((agent, mut host)) = somebody() else { return };
    let (listener, endpoint) = registrar();
    host.say(&ToGuest::Join(join(Some(endpoint), LONG_MS)));
    let (_, stream) = answer(&listener, b"ACK {\"epoch\":");
    // Others are served meanwhile; a host that goes away ends the conversation.
    assert_eq!(agent.run("echo served").text(), "served\n");
    drop(host);
    let mut rest = String::new();
    BufReader::new(stream).read_line(&mut rest).expect("the end");
    assert_eq!(rest, "");

    let mut host = agent.greeted();
    let what = String::from("the registrar did not answer in time");
    assert_eq!(host.has_failed(&ToGuest::Join(join(Some(endpoint), 100))), (110, what.clone()));
    assert_eq!(host.has_failed(&ToGuest::Join(join(Some(endpoint), 0))), (110, what));
    host.has_done(&ToGuest::Thaw);
}

#[test]
fn an_endpoint_that_is_not_there_is_given_up() {
    let Some(agent) = Agent::start_guest() else { return };
    // A neighbour that takes everything and answers nothing.
    agent.must(
        "ip link add eth0 address 02:00:00:00:00:01 type veth peer name far && ip link set far up \
         && ip neigh add 10.9.8.1 lladdr 02:00:00:00:00:09 dev eth0",
    );
    let mut host = agent.greeted();
    let addresses = vec![hearth_guest_wire::Address::V4([10, 9, 8, 7], 24)];
    host.has_done(&ToGuest::Identity(Identity { unix_ns: 0, ..identity("named", 1) }));
    let interface = NetworkInterface { mac: [2, 0, 0, 0, 0, 1], mtu: 0, addresses, gateways: Vec::new() };
    host.has_done(&ToGuest::Network(vec![interface]));
    let silent = join(Some(Endpoint::V4([10, 9, 8, 1], 7)), 200);
    assert_eq!(host.has_failed(&ToGuest::Join(silent)).0, 110);
    let unreachable = join(Some(Endpoint::V4([192, 0, 2, 1], 7)), 200);
    let (errno, what) = host.has_failed(&ToGuest::Join(unreachable));
    assert_eq!((errno, what.as_str()), (101, "reach the registrar"));
}
