//! The socket device: host programs on one side, a guest's vsock on the other.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use hearth::clock::{Clock, Monotonic, SystemClock};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::tempdir;

use crate::driver::{Driver, EVENT_IDX, VERSION_1, ram, run};
use crate::vsock_guest::*;

/// Bytes that differ from place to place.
fn pattern(bytes: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..bytes).map(|_| next()).collect()
}

fn now() -> (SystemClock, Monotonic) {
    let clock = SystemClock::new();
    (clock, clock.monotonic())
}

#[test]
fn connect_exchange_close() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let mut cid = [0; 8];
    guest.driver.config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
    let (mut host, port) = guest.pair(directory.path(), 1024);
    assert!(port >= 1 << 30);
    host.write_all(b"from the host").unwrap();
    assert_eq!(guest.hear().data, b"from the host");
    guest.say(port, 1024, RW, 0, b"from the guest");
    let mut heard = [0; 14];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"from the guest");
    drop(host);
    let last = guest.hear();
    assert_eq!((last.operation, last.flags), (SHUTDOWN, 3));
    guest.say(port, 1024, RST, 0, &[]);
    // The next stream has another port.
    let (_host, next) = guest.pair(directory.path(), 1024);
    assert_ne!(next, port);
}

#[test]
fn bytes_sent_right_behind_the_request_arrive() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let mut host = UnixStream::connect(directory.path().join("vsock")).unwrap();
    host.write_all(b"CONNECT 7\nhello").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let port = guest.accept(7);
    assert_eq!(guest.hear().data, b"hello");
    let end = guest.hear();
    assert_eq!((end.operation, end.flags), (SHUTDOWN, 2));
    guest.say(port, 7, RW, 0, b"bye");
    guest.say(port, 7, SHUTDOWN, 3, &[]);
    let mut all = String::new();
    host.read_to_string(&mut all).unwrap();
    assert_eq!(all, format!("OK {port}\nbye"));
    assert_eq!(guest.hear().operation, RST);
}

#[test]
fn refusals_say_why() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let mut host = connect(directory.path(), 5);
    let request = guest.hear();
    guest.say(request.host, 5, RST, 0, &[]);
    let mut all = String::new();
    host.read_to_string(&mut all).unwrap();
    assert_eq!(all, "ERR refused\n");
    let mut host = UnixStream::connect(directory.path().join("vsock")).unwrap();
    host.write_all(b"GET / HTTP/1.1\n").unwrap();
    let mut all = String::new();
    // Closing with bytes unread resets the socket after the answer.
    let _ = host.read_to_string(&mut all);
    assert_eq!(all, "ERR expected CONNECT and a port\n");
}

#[test]
fn a_program_that_leaves_early_leaves_nothing() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let host = connect(directory.path(), 9);
    let request = guest.hear();
    drop(host);
    assert_eq!(guest.hear().operation, RST);
    guest.say(request.host, 9, RESPONSE, 0, &[]);
    assert_eq!(guest.hear().operation, RST, "nobody is there any more");
    guest.pair(directory.path(), 9);
}

#[test]
fn requests_wait_for_the_driver_and_for_buffers() {
    let directory = tempdir().unwrap();
    let ram = ram(16);
    let slot = device(&ram, directory.path());
    let _devices = run(&[&slot]);
    let mut early = connect(directory.path(), 1024);
    thread::sleep(std::time::Duration::from_millis(20));
    let mut guest = Guest::new(Driver::up(&ram, slot, VERSION_1 | EVENT_IDX));
    assert_eq!(guest.hear_within(20), None);
    guest.fill();
    let port = guest.accept(1024);
    assert_eq!(read_line(&mut early), format!("OK {port}"));
}

#[test]
fn eight_mebibytes_cross_both_ways_at_once() {
    const BYTES: usize = 8 << 20;
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (host, port) = guest.pair(directory.path(), 1024);
    let sent = pattern(BYTES, 1);
    let (clock, started) = now();
    let (mut reader, mut writer) = (host.try_clone().unwrap(), host);
    let expected = sent.clone();
    let sender = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
        writer
    });
    let receiver = thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        all
    });
    // An echo in the guest.
    loop {
        let packet = match guest.inbox.pop_front() {
            Some(packet) => packet,
            None => guest.hear(),
        };
        match packet.operation {
            RW => guest.write(port, 1024, &packet.data),
            SHUTDOWN => break,
            CREDIT_UPDATE => {}
            CREDIT_REQUEST => guest.say(port, 1024, CREDIT_UPDATE, 0, &[]),
            other => panic!("operation {other}"),
        }
    }
    guest.say(port, 1024, SHUTDOWN, 2, &[]);
    let writer = sender.join().unwrap();
    assert!(receiver.join().unwrap() == expected);
    println!("8 MiB out and back in {:?}", clock.monotonic().since(started));
    drop(writer);
}

#[test]
fn eight_mebibytes_each_way_alone() {
    const BYTES: usize = 8 << 20;
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (mut host, port) = guest.pair(directory.path(), 1024);
    let data = pattern(BYTES, 3);
    let expected = data.clone();
    let (clock, started) = now();
    let sender = thread::spawn(move || {
        host.write_all(&data).unwrap();
        host
    });
    let mut all = Vec::with_capacity(BYTES);
    while all.len() < BYTES {
        let packet = guest.hear();
        match packet.operation {
            RW => {
                all.extend(packet.data);
                if guest.credits[&(port, 1024)].received % (64 << 10) < RX_BYTES {
                    guest.say(port, 1024, CREDIT_UPDATE, 0, &[]);
                }
            }
            CREDIT_REQUEST => guest.say(port, 1024, CREDIT_UPDATE, 0, &[]),
            other => panic!("operation {other}"),
        }
    }
    println!("8 MiB host to guest in {:?}", clock.monotonic().since(started));
    assert!(all == expected);
    let mut host = sender.join().unwrap();
    let (clock, started) = now();
    let receiver = thread::spawn(move || {
        let mut all = vec![0; BYTES];
        host.read_exact(&mut all).unwrap();
        all
    });
    guest.write(port, 1024, &expected);
    assert!(receiver.join().unwrap() == expected);
    println!("8 MiB guest to host in {:?}", clock.monotonic().since(started));
}

/// Pauses and resumes in the middle of a transfer in both directions lose no byte and no notification.
#[test]
fn a_transfer_survives_pauses() {
    const BYTES: usize = 2 << 20;
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (host, port) = guest.pair(directory.path(), 1024);
    let sent = pattern(BYTES, 5);
    let (mut reader, mut writer) = (host.try_clone().unwrap(), host);
    let expected = sent.clone();
    let sender = thread::spawn(move || writer.write_all(&sent).map(|()| writer).unwrap());
    let receiver = thread::spawn(move || {
        let mut all = vec![0; BYTES];
        reader.read_exact(&mut all).unwrap();
        all
    });
    let devices = guest.devices.take().unwrap();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let pauser = thread::spawn(move || {
        let mut pauses = 0;
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            devices.pause();
            thread::yield_now();
            devices.save().unwrap();
            devices.resume();
            pauses += 1;
            thread::sleep(std::time::Duration::from_micros(300));
        }
        (devices, pauses)
    });
    let mut heard = 0;
    while heard < BYTES {
        let packet = match guest.inbox.pop_front() {
            Some(packet) => packet,
            None => guest.hear(),
        };
        match packet.operation {
            RW => {
                heard += packet.data.len();
                guest.write(port, 1024, &packet.data);
            }
            CREDIT_UPDATE => {}
            CREDIT_REQUEST => guest.say(port, 1024, CREDIT_UPDATE, 0, &[]),
            other => panic!("operation {other}"),
        }
    }
    assert!(receiver.join().unwrap() == expected);
    drop((sender.join().unwrap(), stop));
    let (_devices, pauses) = pauser.join().unwrap();
    assert!(pauses > 3, "{pauses} pauses");
}

#[test]
fn each_direction_closes_alone() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (mut host, port) = guest.pair(directory.path(), 20);
    // The guest stops sending; the host program sees the end and goes on sending.
    guest.say(port, 20, RW, 0, b"last");
    guest.say(port, 20, SHUTDOWN, 2, &[]);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    host.write_all(b"still here").unwrap();
    assert_eq!(guest.hear().data, b"still here");
    // The guest stops receiving; the host program cannot send.
    guest.say(port, 20, SHUTDOWN, 1, &[]);
    assert_eq!(guest.hear().operation, RST);
    let refused = loop {
        if let Err(error) = host.write_all(b"x") {
            break error;
        }
    };
    assert_eq!(refused.kind(), ErrorKind::BrokenPipe);

    let (mut host, port) = guest.pair(directory.path(), 21);
    host.shutdown(Shutdown::Write).unwrap();
    let end = guest.hear();
    assert_eq!((end.operation, end.flags), (SHUTDOWN, 2));
    guest.say(port, 21, RW, 0, b"answer");
    let mut answer = [0; 6];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    drop(host);
    let end = guest.hear();
    assert_eq!((end.operation, end.flags), (SHUTDOWN, 3));
    guest.say(port, 21, RST, 0, &[]);
}

#[test]
fn a_reset_of_the_guest_closes_the_host() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (mut host, port) = guest.pair(directory.path(), 30);
    guest.say(port, 30, RST, 0, &[]);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    // Packets for streams that do not exist are answered with RST, RST itself with nothing.
    guest.say(port, 30, RW, 0, b"x");
    assert_eq!(guest.hear().operation, RST);
    guest.say(port, 30, RST, 0, &[]);
    guest.say(77, 78, REQUEST, 0, &[]);
    let answer = guest.hear();
    assert_eq!((answer.operation, answer.host, answer.guest), (RST, 77, 78));
}

#[test]
fn a_sleeping_guest_reader_stops_the_host_and_nobody_else() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    guest.takes = false;
    let (mut slow, slow_port) = guest.pair(directory.path(), 40);
    let (mut quick, quick_port) = guest.pair(directory.path(), 41);
    slow.set_nonblocking(true).unwrap();
    let mut received = 0;
    let chunk = vec![7; 64 << 10];
    // More than the guest's buffer and the socket's together.
    for _ in 0..64 {
        match slow.write(&chunk) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        while let Some(packet) = guest.hear_within(1) {
            if packet.operation == RW {
                received += packet.data.len();
            } else {
                assert_eq!(packet.operation, CREDIT_REQUEST);
            }
        }
    }
    assert_eq!(received, GUEST_BUFFER as usize);
    assert_eq!(slow.write(&chunk).unwrap_err().kind(), ErrorKind::WouldBlock);
    quick.write_all(b"quick").unwrap();
    assert_eq!(guest.hear().data, b"quick");
    guest.say(quick_port, 41, RW, 0, b"quick");
    let mut answer = [0; 5];
    quick.read_exact(&mut answer).unwrap();
    // The reader wakes up.
    guest.takes = true;
    let credit = guest.credits.get_mut(&(slow_port, 40)).unwrap();
    credit.forwarded = credit.received;
    guest.say(slow_port, 40, CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.hear().operation, RW);
}

#[test]
fn a_sleeping_host_reader_stops_the_guest_and_nobody_else() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (mut slow, slow_port) = guest.pair(directory.path(), 50);
    let (mut quick, quick_port) = guest.pair(directory.path(), 51);
    let data = pattern(4 << 20, 9);
    let mut sent = 0;
    loop {
        let credit = guest.credits[&(slow_port, 50)];
        let room = credit.host_buffer.saturating_sub(credit.sent.wrapping_sub(credit.host_forwarded)) as usize;
        if room == 0 {
            match guest.hear_within(100) {
                Some(packet) => assert_eq!(packet.operation, CREDIT_UPDATE),
                None => break,
            }
            continue;
        }
        let now = room.min(65536);
        guest.say(slow_port, 50, RW, 0, &data[sent..sent + now]);
        sent += now;
    }
    assert!(sent < 2 << 20, "the device held {sent} bytes");
    guest.say(quick_port, 51, RW, 0, b"quick");
    let mut answer = [0; 5];
    quick.read_exact(&mut answer).unwrap();
    // The guest asks and learns that there is no room; then the reader wakes up.
    guest.say(slow_port, 50, CREDIT_REQUEST, 0, &[]);
    assert_eq!(guest.hear().operation, CREDIT_UPDATE);
    // Closing does not lose what is held.
    guest.say(slow_port, 50, SHUTDOWN, 3, &[]);
    let mut all = Vec::new();
    slow.read_to_end(&mut all).unwrap();
    assert!(all == data[..sent]);
    loop {
        let packet = guest.hear();
        if packet.operation != CREDIT_UPDATE {
            assert_eq!(packet.operation, RST);
            break;
        }
    }
}

#[test]
fn a_guest_that_ignores_credit_is_cut_off() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (_host, port) = guest.pair(directory.path(), 60);
    for _ in 0..64 {
        guest.say(port, 60, RW, 0, &[1; 65536]);
    }
    while guest.hear().operation != RST {}
}

#[test]
fn a_hundred_streams_take_turns() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let mut streams = Vec::new();
    for index in 0..100 {
        let (host, port) = guest.pair(directory.path(), 100 + index);
        streams.push((host, port));
    }
    let data: Vec<Vec<u8>> = (0..100).map(|index| pattern(40_000, index)).collect();
    // While paused, so that all have something to say when the first gets its turn.
    guest.devices.as_ref().unwrap().pause();
    for ((host, _), data) in streams.iter_mut().zip(&data) {
        host.write_all(data).unwrap();
    }
    guest.devices.as_ref().unwrap().resume();
    let mut heard = vec![Vec::new(); 100];
    let mut finished = Vec::new();
    while finished.len() < 100 {
        let packet = guest.hear();
        assert_eq!(packet.operation, RW);
        let index = (packet.guest - 100) as usize;
        heard[index].extend(packet.data);
        if heard[index].len() == 40_000 {
            if finished.is_empty() {
                let least = heard.iter().map(Vec::len).min().unwrap();
                assert!(least >= 20_000, "the last stream had {least} bytes when the first was done");
            }
            finished.push(index);
        }
    }
    assert!(heard == data);
}

#[test]
fn the_table_is_bounded() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most.min(4096), most).unwrap();
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    // Greetings count as well: 1024 programs that say nothing.
    let idle: Vec<_> = (0..1024).map(|_| UnixStream::connect(directory.path().join("vsock")).unwrap()).collect();
    let mut host = UnixStream::connect(directory.path().join("vsock")).unwrap();
    let mut answer = String::new();
    host.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "ERR too many streams\n");
    drop(idle);
    // The device needs a few turns to see that they are gone.
    let mut host = connect(directory.path(), 3);
    let request = loop {
        if let Some(request) = guest.hear_within(20) {
            break request;
        }
        host.set_nonblocking(true).unwrap();
        if host.read(&mut [0; 64]).is_ok() {
            // Refused, as the one before.
            host = connect(directory.path(), 3);
        }
    };
    host.set_nonblocking(false).unwrap();
    guest.say(request.host, 3, RESPONSE, 0, &[]);
    assert_eq!(read_line(&mut host), format!("OK {}", request.host));
}

#[test]
fn a_driver_reset_closes_its_streams_and_keeps_waiting_programs() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let (mut open, _) = guest.pair(directory.path(), 70);
    let mut asking = connect(directory.path(), 71);
    assert_eq!(guest.hear().operation, REQUEST);
    let ram = guest.driver.ram.clone();
    guest.driver.write(0x070, 0);
    assert_eq!(open.read(&mut [0]).unwrap(), 0);
    assert_eq!(read_line(&mut asking), "ERR guest was reset");
    let mut waiting = connect(directory.path(), 72);
    let mut again = Guest::new(Driver::up(&ram, guest.driver.slot.clone(), VERSION_1 | EVENT_IDX));
    again.fill();
    let port = again.accept(72);
    assert_eq!(read_line(&mut waiting), format!("OK {port}"));
}

#[test]
fn malformed_packets_are_dropped_or_reset() {
    let directory = tempdir().unwrap();
    let mut guest = Guest::up(directory.path());
    let good = Packet { host: 1, guest: 2, operation: RW, flags: 0, buffer: 0, forwarded: 0, data: vec![0; 8] };
    let mut long = encode(&good);
    long[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut elsewhere = encode(&good);
    elsewhere[8] = 9;
    let mut from_elsewhere = encode(&good);
    from_elsewhere[0] = 9;
    for bytes in [vec![0; 43], long, elsewhere, from_elsewhere] {
        guest.send_raw(&bytes, None);
    }
    assert_eq!(guest.hear_within(50), None);
    let (mut kind, mut operation) = (encode(&good), encode(&good));
    kind[28] = 2;
    operation[30] = 99;
    for bytes in [kind, operation] {
        guest.send_raw(&bytes, Some(10));
        assert_eq!(guest.hear().operation, RST);
    }
    assert_eq!(guest.driver.slot.counts().dropped, 6);
    guest.pair(directory.path(), 80);
}
