//! A VM on one host, its volume on another: two daemons, TLS between them.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use hearth::lease::{LeaseMode, LeaseSecret};
use hearth::wire::nbd::option::{
    InfoRequest, OPTION_REPLY_HEADER_BYTES, OptionReplyHeader, number, option, reply_kind,
};
use hearth::wire::nbd::request::Command;
use hearth::wire::nbd::{ErrorNumber, client_flags, export_flag};
use hearth::wire::volumed::{Answer, Ask, Attachment, Listening, Upstream};

use crate::client::{Client, ClientError};
use crate::daemon::{Daemon, attachment, eventually};

const MIB: u64 = 1 << 20;

fn listen(daemon: &Daemon) -> Listening {
    let loopback = std::net::Ipv4Addr::LOCALHOST.into();
    match daemon.ask(Ask::Listen { address: loopback, port: 0 }) {
        Answer::Listening { listening } => listening,
        other => panic!("{other:?}"),
    }
}

/// What an option is answered without TLS.
fn in_the_clear(address: SocketAddr, asked: u32, data: &[u8]) -> u32 {
    let mut socket = TcpStream::connect(address).expect("a connection");
    socket.read_exact(&mut [0; 18]).expect("a greeting");
    socket.write_all(&client_flags(3)).expect("flags");
    socket.write_all(&option(asked, data)).expect("an option");
    let mut head = [0; OPTION_REPLY_HEADER_BYTES];
    socket.read_exact(&mut head).expect("a reply");
    OptionReplyHeader::read(head).expect("a reply").kind
}

#[test]
fn a_volume_of_another_host_is_used_through_the_own_daemon() {
    let (far, near) = (Daemon::new(), Daemon::new());
    let (volume, first, export) = far.writable(4 * MIB);
    let second = far.lease(&volume, LeaseMode::Standby);
    let listening = listen(&far);
    assert_eq!(listen(&far), listening, "asked again, it is so already");
    let go = InfoRequest { name: &export, wanted: Vec::new() }.to_bytes();
    assert_eq!(in_the_clear(listening.address, number::GO, &go), reply_kind::ERR_TLS_REQD);
    assert_eq!(in_the_clear(listening.address, number::LIST, &[]), reply_kind::ERR_TLS_REQD);

    let socket = near.path("volume-0.sock");
    let listener = UnixListener::bind(&socket).expect("a listener");
    let upstream = Upstream {
        address: listening.address,
        certificate_sha256: listening.certificate_sha256.clone(),
        secret: second.secret.clone(),
    };
    let remote = Attachment { upstream: Some(upstream.clone()), ..attachment(&socket, &volume, &second) };
    assert_eq!(near.ask(Ask::Attach { attachment: remote.clone() }), Answer::Done);
    let mut client = Client::greet(listener.accept().expect("a connection").0, "").expect("a handshake");
    assert_eq!(client.size, 4 * MIB);
    assert_eq!(client.write(0, &[1; 512]).expect_err("it stands by").number(), ErrorNumber::Permission);
    far.convert(&volume, &first, &second).expect("a conversion");
    let bytes: Vec<u8> = (0..3_000_320_u32).map(|at| at.to_le_bytes()[1]).collect();
    client.write(4096, &bytes).expect("a write");
    client.flush().expect("a flush");
    assert!(client.read(4096, 3_000_320).expect("a read") == bytes);
    let extents = client.status(0, 65536).expect("extents");
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u32>(), 65536);
    // Many at once, and answers that are not read meanwhile.
    for at in 0..64_u64 {
        client.send(Command::Write, 0, at * 512, 512, &[9; 512]).expect("a request");
    }
    drop(client);

    // The wrong secret and the wrong certificate open nothing; the one for good, the other is tried again.
    let told = |wrong: Upstream, text: &str| {
        let attachment = Attachment { upstream: Some(wrong), ..remote.clone() };
        assert_eq!(near.ask(Ask::Attach { attachment }), Answer::Done);
        eventually(text, || {
            let Answer::Attachments { attachments } = near.ask(Ask::Attachments) else { panic!("no attachments") };
            attachments[0].trouble.as_ref().is_some_and(|trouble| trouble.contains(text))
        });
    };
    told(Upstream { secret: LeaseSecret::from_random([0; 16]), ..upstream.clone() }, "no such volume, lease");
    told(Upstream { certificate_sha256: "00".repeat(32), ..upstream }, "ertificate");
    assert_eq!(near.ask(Ask::Detach { socket }), Answer::Done);
    assert!(!far.log().contains(second.secret.reveal()) && !near.log().contains(second.secret.reveal()));
    drop(near);
    let refused = Client::connect(&far.nbd_socket(), &export);
    assert!(matches!(refused, Err(ClientError::Refused(..))));
}

/// A volume of `far`, used by way of `near`; where the daemon is expected as by a VMM.
fn relayed(far: &Daemon, near: &Daemon, read_only: bool) -> (Listening, UnixListener) {
    let listening = listen(far);
    let (volume, lease, _) = far.writable(4 * MIB);
    let socket = near.path("volume-0.sock");
    let listener = UnixListener::bind(&socket).expect("a listener");
    let upstream = Upstream {
        address: listening.address,
        certificate_sha256: listening.certificate_sha256.clone(),
        secret: lease.secret.clone(),
    };
    let attachment = Attachment { upstream: Some(upstream), read_only, ..attachment(&socket, &volume, &lease) };
    assert_eq!(near.ask(Ask::Attach { attachment }), Answer::Done);
    (listening, listener)
}

/// The next connection that shakes hands. One whose other end went is none.
fn next_client(listener: &UnixListener) -> Client {
    for socket in listener.incoming() {
        if let Ok(client) = Client::greet(socket.expect("a connection"), "") {
            return client;
        }
    }
    panic!("no connection")
}

/// Waits until a daemon has said something: it may answer a moment before that.
fn says(daemon: &Daemon, words: &str) {
    let begun = Instant::now();
    while !daemon.log().contains(words) {
        assert!(begun.elapsed() < Duration::from_secs(20), "not {words:?}: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_daemon_that_was_killed_serves_other_hosts_again_without_being_asked() {
    let (mut far, mut near) = (Daemon::new(), Daemon::new());
    let (listening, listener) = relayed(&far, &near, false);
    let mut client = next_client(&listener);
    for round in 1..=3_u8 {
        client.write(0, &[round; 4096]).expect("a write");
        // Where the VM is, the daemon is another one as well: numbers of sets go on.
        if round == 2 {
            near.kill();
            near.start_again();
        }
        far.kill();
        far.start_again();
        client.read(0, 512).expect_err("its connection ended");
        client = next_client(&listener);
        assert_eq!(client.read(0, 4096).expect("a read"), [round; 4096]);
    }
    assert_eq!(listen(&far), listening, "the same address and certificate");

    // Somebody else is there now.
    far.kill();
    let other = TcpListener::bind(listening.address).expect("the port");
    far.start_again();
    says(&far, &format!("not served at {}", listening.address));
    drop(other);
    // A process that another test was just starting may hold it for a moment longer, until it is another program.
    let begun = Instant::now();
    while TcpStream::connect(listening.address).is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(20), "somebody listens there still");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(listen(&far), listening, "asked for any port, it takes the one that is known");
    drop(client);
    next_client(&listener).write(0, &[9; 512]).expect("a write");

    far.kill();
    std::fs::write(far.path("run/identity.json"), "{}").expect("damage");
    far.start_again();
    says(&far, "it is not a certificate and its key");
    let now = listen(&far);
    assert!(now.address == listening.address && now.certificate_sha256 != listening.certificate_sha256);
}

#[test]
fn what_is_attached_to_be_read_is_not_written_from_another_host() {
    let (far, near) = (Daemon::new(), Daemon::new());
    let (_, listener) = relayed(&far, &near, true);
    let mut client = next_client(&listener);
    assert!(client.flags & export_flag::READ_ONLY != 0);
    assert_eq!(client.write(0, &[1; 512]).expect_err("it only reads").number(), ErrorNumber::Permission);
    assert_eq!(client.read(0, 512).expect("a read"), [0; 512]);
}
