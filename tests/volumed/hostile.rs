//! Clients that do what no client does: each costs itself.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use hearth::wire::nbd::option::{number, option};
use hearth::wire::nbd::request::{Command, REQUEST_BYTES, RequestHeader};
use hearth::wire::nbd::{ErrorNumber, PAYLOAD_BYTES_MAX, client_flags, command_flag};
use hearth::wire::volumed::{Answer, Ask, Origin, Refusal};

use crate::client::{Client, ClientError};
use crate::daemon::{Daemon, eventually, random};

const MIB: u64 = 1 << 20;

/// A connection with the greeting read and answered.
fn greeted(daemon: &Daemon) -> UnixStream {
    let mut socket = UnixStream::connect(daemon.nbd_socket()).expect("nbd.sock");
    socket.read_exact(&mut [0; 18]).expect("a greeting");
    socket.write_all(&client_flags(3)).expect("flags");
    socket
}

/// Whether the server hung up on it, whatever it said before.
fn is_hung_up_on(mut socket: UnixStream) -> bool {
    socket.set_read_timeout(Some(crate::daemon::SOON)).expect("a patience");
    let mut rest = Vec::new();
    // That it never reads what is left is told as a reset.
    matches!(
        socket.read_to_end(&mut rest).map_err(|error| error.kind()),
        Ok(_) | Err(std::io::ErrorKind::ConnectionReset)
    )
}

#[test]
fn nonsense_ends_the_connection_it_came_on() {
    let daemon = Daemon::new();
    let (_, _, export) = daemon.writable(MIB);
    let mut honest = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    // Options without end.
    let mut socket = greeted(&daemon);
    let flood = option(number::LIST, &[]).repeat(200);
    let _ = socket.write_all(&flood);
    assert!(is_hung_up_on(socket));
    // Lengths beyond all bounds.
    let mut socket = greeted(&daemon);
    socket.write_all(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff").expect("an option");
    assert!(is_hung_up_on(socket));
    // No protocol at all.
    let mut socket = greeted(&daemon);
    socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").expect("something");
    assert!(is_hung_up_on(socket));
    // Flags that there are not.
    let mut socket = UnixStream::connect(daemon.nbd_socket()).expect("nbd.sock");
    socket.write_all(&[0xff; 4]).expect("flags");
    assert!(is_hung_up_on(socket));
    // A payload beyond the bound, and a request that is none.
    for request in [
        RequestHeader { flags: 0, command: 1, cookie: 1, offset: 0, length: PAYLOAD_BYTES_MAX + 512 }.to_bytes(),
        [0; REQUEST_BYTES],
    ] {
        let client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
        (&client.socket).write_all(&request).expect("a request");
        assert!(is_hung_up_on(client.socket));
    }
    honest.write(0, &[1; 512]).expect("the others go on");
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_next_one_is_not() {
    let daemon = Daemon::new();
    let (_, _, export) = daemon.writable(MIB);
    let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    let mut refused = |command: Command, flags, offset, length: u32| {
        let payload = if command == Command::Write { vec![1; length as usize] } else { Vec::new() };
        client.send(command, flags, offset, length, &payload).expect("a request");
        client.wait(0, &mut []).expect_err("a refusal").number()
    };
    use ErrorNumber::{Invalid, NoSpace, NotSupported, Overflow};
    assert_eq!(refused(Command::Read, 0, 1, 512), Invalid);
    assert_eq!(refused(Command::Write, 0, 512, 100), Invalid);
    assert_eq!(refused(Command::Write, 0, MIB - 512, 1024), NoSpace);
    assert_eq!(refused(Command::Write, 0, u64::MAX - 511, 512), NoSpace);
    assert_eq!(refused(Command::Read, 0, MIB, 512), Invalid);
    assert_eq!(refused(Command::Read, 0, 0, u32::MAX - 511), Overflow);
    assert_eq!(refused(Command::Trim, 0, 0, u32::MAX - 511), Invalid);
    assert_eq!(refused(Command::Read, 0x8000, 0, 512), Invalid);
    let slow_and_fast = command_flag::FAST_ZERO | command_flag::NO_HOLE;
    assert_eq!(refused(Command::WriteZeroes, slow_and_fast, 0, 512), NotSupported);
    let fast = command_flag::FAST_ZERO | command_flag::FUA;
    client.zero(fast, 0, 65536).expect("zeroes");
    client.write(0, &[1; 512]).expect("a write");
    assert_eq!(client.read(0, 1024).expect("a read"), [[1; 512], [0; 512]].concat());
    let extents = client.status(0, u32::try_from(MIB).expect("a length")).expect("extents");
    assert!(extents.iter().map(|extent| u64::from(extent.length)).sum::<u64>() == MIB && extents[1].zero);
}

#[test]
fn half_a_request_and_a_client_that_vanishes_leave_nothing_half_done() {
    let daemon = Daemon::new();
    let (_, _, export) = daemon.writable(MIB);
    let mut honest = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    honest.write(0, &[1; 65536]).expect("a write");
    for cut in [1, REQUEST_BYTES, REQUEST_BYTES + 1, REQUEST_BYTES + 40_000] {
        let client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
        let header = RequestHeader { flags: 0, command: 1, cookie: 1, offset: 0, length: 65536 };
        let request = [&header.to_bytes()[..], &[2; 65536]].concat();
        (&client.socket).write_all(&request[..cut]).expect("half a write");
        drop(client);
    }
    // One that stays in the middle of a write: it keeps nobody waiting.
    let stays = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    let header = RequestHeader { flags: 0, command: 1, cookie: 1, offset: 0, length: PAYLOAD_BYTES_MAX };
    (&stays.socket).write_all(&header.to_bytes()).expect("a request");
    assert_eq!(honest.read(0, 65536).expect("a read"), [1; 65536]);
    honest.flush().expect("a flush");
    assert!(daemon.log().contains("the connection broke"), "{}", daemon.log());
}

#[test]
fn idle_clients_cost_nobody_anything_and_there_is_a_bound() {
    let daemon = Daemon::new();
    let (_, _, export) = daemon.writable(MIB);
    // In the middle of a handshake, and after it.
    let in_handshake: Vec<_> = (0..50).map(|_| greeted(&daemon)).collect();
    let idle: Vec<_> = (0..50).map(|_| Client::connect(&daemon.nbd_socket(), &export).expect("a connection")).collect();
    let mut honest = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    honest.write(0, &[1; 512]).expect("a write");
    // One that asks and never reads the answers.
    let mut deaf = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    deaf.socket.set_nonblocking(true).expect("no waiting");
    while deaf.send(Command::Read, 0, 0, u32::try_from(MIB).expect("a length"), &[]).is_ok() {}
    honest.write(0, &[2; 512]).expect("a write");
    let mut more = Vec::new();
    let refused = (0..512).find_map(|_| {
        let mut socket = UnixStream::connect(daemon.nbd_socket()).expect("nbd.sock");
        let greeted = socket.read_exact(&mut [0; 18]);
        more.push(socket);
        greeted.err()
    });
    assert!(refused.is_some(), "there is a bound");
    honest.write(0, &[3; 512]).expect("who is connected is");
    drop((in_handshake, idle, more, deaf));
    eventually("there is room again", || Client::connect(&daemon.nbd_socket(), &export).is_ok());
}

#[test]
fn a_full_store_says_so_and_goes_on() {
    let daemon = Daemon::with_quota(Some(8 * MIB));
    let (volume, _, export) = daemon.writable(64 * MIB);
    let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    let mut written = 0;
    let refused = loop {
        match client.write(written, &[7; 1 << 20]) {
            Ok(()) => written += MIB,
            Err(error) => break error,
        }
    };
    assert_eq!(refused.number(), ErrorNumber::NoSpace);
    assert!((4 * MIB..=8 * MIB).contains(&written), "{written}");
    assert!(matches!(&refused, ClientError::Refused(_, text) if text.contains("no space")), "{refused:?}");
    client.flush().expect("what is there is there");
    assert_eq!(client.read(0, 4096).expect("a read"), [7; 4096]);
    client.trim(0, u32::try_from(4 * MIB).expect("a length")).expect("room is given back");
    client.write(32 * MIB, &[8; 1 << 20]).expect("there is room again");
    assert!(daemon.show(&volume).allocated_bytes <= 9 * MIB);
    assert!(daemon.show(&volume).damage.is_none());
}

#[test]
fn work_that_nobody_waits_for_ends() {
    let daemon = Daemon::new();
    let image = daemon.path("image");
    let file = hearth::sys::file::create(&image).expect("an image");
    file.set_len(4 << 40).expect("a length");
    // Data in it, so that it takes a while.
    let piece = vec![3; 8 << 20];
    for at in 0..24_u64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &piece, at << 30).expect("data");
    }
    let id = hearth::ids::VolumeId::from_random(random());
    let mut control = daemon.control();
    control.send(&Ask::Create {
        id: id.clone(),
        name: None,
        bytes: None,
        origin: Origin::File { path: image },
        now_ms: 1,
    });
    // The agent hangs up; others are answered meanwhile.
    drop(control);
    assert!(matches!(daemon.ask(Ask::List), Answer::Volumes { .. }));
    for wrong in [Some(0), Some(4095), Some(u64::MAX)] {
        let ask = Ask::Create {
            id: hearth::ids::VolumeId::from_random(random()),
            name: None,
            bytes: wrong,
            origin: Origin::Empty,
            now_ms: 1,
        };
        let refused = daemon.ask(ask);
        assert!(matches!(refused, Answer::Refused { refusal: Refusal::Invalid { .. } }), "{refused:?}");
    }
    let mut control = daemon.control();
    control.send(&serde_json::json!({ "ask": "sing" }));
    let answer: Answer = control.receive().expect("an answer");
    assert_eq!(answer, Answer::Refused { refusal: Refusal::Unknown });
    let missing = Origin::File { path: "/nowhere/image".into() };
    let ask = Ask::Create { id, name: None, bytes: None, origin: missing, now_ms: 1 };
    // Whether the first was made by then or not, it says so in words.
    assert!(matches!(control.ask(ask).expect("an answer"), Answer::Refused { .. } | Answer::Volume { .. }));
}
