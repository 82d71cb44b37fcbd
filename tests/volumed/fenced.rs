//! Leases: who may write does, whoever could before does not, and VMMs are served from their own sockets.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hearth::lease::{LeaseMode, LeaseRefusal};
use hearth::wire::nbd::ErrorNumber;
use hearth::wire::volumed::{Answer, Ask, AttachmentReport, Refusal};

use crate::client::{Client, ClientError};
use crate::daemon::{Daemon, acquire, attachment, eventually, export_of};

const MIB: u64 = 1 << 20;

fn attachments(daemon: &Daemon) -> Vec<AttachmentReport> {
    match daemon.ask(Ask::Attachments) {
        Answer::Attachments { attachments } => attachments,
        other => panic!("{other:?}"),
    }
}

fn attach(daemon: &Daemon, socket: &Path, volume: &hearth::ids::VolumeId, lease: &hearth::lease::Lease) {
    let attachment = attachment(socket, volume, lease);
    assert_eq!(daemon.ask(Ask::Attach { attachment }), Answer::Done);
}

/// The VMM's end of a connection that the daemon made. Those that an earlier daemon made are broken.
fn accept(listener: &UnixListener) -> Client {
    loop {
        let (socket, _) = listener.accept().expect("a connection");
        match Client::greet(socket, "") {
            Err(ClientError::Broken(_)) => {}
            client => return client.expect("a handshake"),
        }
    }
}

#[test]
fn a_standby_waits_and_a_stale_epoch_is_refused() {
    let mut daemon = Daemon::new();
    let (volume, first, export) = daemon.writable(4 * MIB);
    let second = daemon.lease(&volume, LeaseMode::Standby);
    assert_eq!(second.epoch, first.epoch + 1);
    let mut source = Client::connect(&daemon.nbd_socket(), &export).expect("the active lease");
    let mut target = Client::connect(&daemon.nbd_socket(), &export_of(&volume, &second)).expect("the standby lease");
    source.write(0, &[1; 4096]).expect("a write");
    for refused in [target.write(0, &[2; 4096]), target.read(0, 512).map(drop), target.flush()] {
        assert_eq!(refused.expect_err("it stands by").number(), ErrorNumber::Permission);
    }
    let converted = daemon.convert(&volume, &first, &second).expect("a conversion");
    assert_eq!((converted.mode, converted.epoch), (LeaseMode::Active, second.epoch));
    assert_eq!(daemon.convert(&volume, &first, &second), Ok(converted), "asked again, it is so already");
    for refused in [source.write(0, &[3; 4096]), source.read(0, 512).map(drop), source.flush(), source.trim(0, 512)] {
        assert_eq!(refused.expect_err("it is stale").number(), ErrorNumber::Permission);
    }
    target.write(8192, &[2; 512]).expect("it is active");
    assert_eq!(target.read(0, 4096).expect("a read"), [1; 4096]);
    // Nor is a new connection let in, also by a daemon that begins.
    daemon.kill();
    daemon.start_again();
    let refused = Client::connect(&daemon.nbd_socket(), &export);
    assert!(matches!(refused, Err(ClientError::Refused(_, text)) if text.contains("is active")));
    let mut target = Client::connect(&daemon.nbd_socket(), &export_of(&volume, &second)).expect("it is active still");
    assert_eq!(target.read(8192, 512).expect("a read"), [2; 512]);
    let third = daemon.ask(acquire(&volume, LeaseMode::Active));
    assert!(matches!(third, Answer::Refused { refusal: Refusal::Lease { lease: LeaseRefusal::Held { .. } } }));
    let mut readers = Client::connect(&daemon.nbd_socket(), volume.as_str()).expect("to look at");
    assert_eq!(readers.write(0, &[1; 512]).expect_err("it only reads").number(), ErrorNumber::Permission);
    let in_use = daemon.ask(Ask::Remove { id: volume.clone() });
    assert!(matches!(in_use, Answer::Refused { refusal: Refusal::InUse { .. } }), "{in_use:?}");
}

#[test]
fn no_request_is_done_after_the_conversion_was_answered() {
    let daemon = Daemon::new();
    let (volume, first, export) = daemon.writable(MIB);
    let mut leases = vec![first];
    // A writer for each lease, as fast as they can; each counts upwards.
    let is_over = Arc::new(AtomicBool::new(false));
    let write_on = |export: &str| {
        let mine = *export.as_bytes().last().expect("an epoch");
        // Connected before the next conversion.
        let mut client = Client::connect(&daemon.nbd_socket(), export).expect("a connection");
        let is_over = Arc::clone(&is_over);
        std::thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                if let Err(ClientError::Broken(error)) = client.write(0, &[mine; 4096]) {
                    panic!("{error}");
                }
            }
        })
    };
    let mut writers = vec![write_on(&export)];
    for round in 0..8 {
        let (from, to) = (&leases[round], daemon.lease(&volume, LeaseMode::Standby));
        let export = export_of(&volume, &to);
        writers.push(write_on(&export));
        daemon.convert(&volume, from, &to).expect("a conversion");
        let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
        let mine = *export.as_bytes().last().expect("an epoch");
        for _ in 0..50 {
            client.write(0, &[mine; 4096]).expect("it is active");
            assert_eq!(client.read(0, 4096).expect("a read"), [mine; 4096], "somebody else wrote");
        }
        leases.push(to);
    }
    is_over.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().expect("a writer"));
}

#[test]
fn leases_expire_and_are_broken_and_their_history_is_read() {
    let mut daemon = Daemon::new();
    let volume = daemon.volume(MIB);
    let short = |mode| match acquire(&volume, mode) {
        Ask::Acquire { volume, id, mode, holder, vm, secret, break_others, .. } => {
            Ask::Acquire { volume, id, mode, holder, vm, host: None, ttl_s: Some(1), secret, break_others }
        }
        other => other,
    };
    let Answer::Lease { lease: active } = daemon.ask(short(LeaseMode::Active)) else { panic!("no lease") };
    // Who is connected keeps it.
    let client = Client::connect(&daemon.nbd_socket(), &export_of(&volume, &active)).expect("a connection");
    let Answer::Lease { lease: standby } = daemon.ask(short(LeaseMode::Standby)) else { panic!("no lease") };
    eventually("the standby lease expires", || daemon.show(&volume).standby.is_none());
    assert_eq!(daemon.show(&volume).active.as_ref(), Some(&active));
    let gone = daemon.convert(&volume, &active, &standby);
    assert!(matches!(gone, Err(Refusal::Lease { lease: LeaseRefusal::Unknown { .. } })), "{gone:?}");
    drop(client);
    eventually("the active lease expires", || daemon.show(&volume).active.is_none());
    let second = daemon.lease(&volume, LeaseMode::Active);
    assert_eq!(second.epoch, active.epoch + 1);
    let Ask::Acquire { volume, id, mode, holder, vm, ttl_s, secret, .. } = acquire(&volume, LeaseMode::Active) else {
        panic!("no question")
    };
    let breaking =
        Ask::Acquire { volume: volume.clone(), id, mode, holder, vm, host: None, ttl_s, secret, break_others: true };
    let Answer::Lease { lease: third } = daemon.ask(breaking) else { panic!("no lease") };
    assert_eq!(third.epoch, second.epoch + 1);
    let validate = |id, epoch| daemon.ask(Ask::Validate { volume: volume.clone(), id, epoch });
    assert!(matches!(validate(second.id.clone(), second.epoch), Answer::Refused { .. }));
    assert!(matches!(validate(third.id.clone(), third.epoch), Answer::Lease { .. }));
    daemon.kill();
    daemon.start_again();
    let Answer::Leases { leases, epoch, history } = daemon.ask(Ask::Leases { volume: volume.clone() }) else {
        panic!("no leases")
    };
    assert_eq!((leases, epoch, history.len()), (vec![third.clone()], third.epoch, 7));
    assert_eq!(daemon.ask(Ask::Release { volume: volume.clone(), id: third.id, only: None }), Answer::Done);
    assert_eq!(daemon.ask(Ask::Remove { id: volume.clone() }), Answer::Done);
    assert_eq!(daemon.ask(Ask::Remove { id: volume }), Answer::Done, "it is so already");
}

#[test]
fn a_vmm_is_served_whoever_is_new() {
    let mut daemon = Daemon::new();
    let (volume, lease, _) = daemon.writable(MIB);
    let socket = daemon.path("volume-0.sock");
    attach(&daemon, &socket, &volume, &lease);
    eventually("the trouble is told", || {
        attachments(&daemon)[0].trouble.as_ref().is_some_and(|trouble| trouble.contains("connect to"))
    });
    let listener = UnixListener::bind(&socket).expect("a listener");
    let mut clients: Vec<_> = (0..2).map(|_| accept(&listener)).collect();
    assert_eq!(clients[0].size, MIB);
    clients[0].write(0, &[7; 8192]).expect("a write");
    assert_eq!(clients[1].read(4096, 4096).expect("a read"), [7; 4096]);
    eventually("both are counted", || attachments(&daemon)[0].connected == 2);
    // One ends, so the other does before any is made anew: what is asked again is not overtaken.
    drop(clients.pop());
    eventually("the other one ends", || matches!(clients[0].read(0, 512), Err(ClientError::Broken(_))));
    let mut clients: Vec<_> = (0..2).map(|_| accept(&listener)).collect();
    assert_eq!(clients[0].read(0, 512).expect("a read"), [7; 512]);
    eventually("both are there again", || attachments(&daemon)[0].connected == 2);
    // The daemon is new.
    daemon.kill();
    daemon.start_again();
    assert!(matches!(clients[0].read(0, 512), Err(ClientError::Broken(_))));
    let mut client = accept(&listener);
    assert_eq!(client.read(0, 8192).expect("a read"), [7; 8192]);
    // The VMM is new.
    drop((client, clients, listener));
    std::fs::remove_file(&socket).expect("the socket");
    let listener = UnixListener::bind(&socket).expect("a listener");
    let mut client = accept(&listener);
    client.write(0, &[8; 512]).expect("a write");
    // Detached, it hears of it, and nobody dials any more.
    assert_eq!(daemon.ask(Ask::Detach { socket: socket.clone() }), Answer::Done);
    assert!(matches!(client.read(0, 512), Err(ClientError::Broken(_))));
    assert!(attachments(&daemon).is_empty());
    daemon.kill();
    daemon.start_again();
    assert!(attachments(&daemon).is_empty());
}

#[test]
fn a_vmm_whose_lease_is_another_ones_is_refused_and_dialed_no_more() {
    let mut daemon = Daemon::new();
    let (volume, first, _) = daemon.writable(MIB);
    let second = daemon.lease(&volume, LeaseMode::Standby);
    let [source, target] = ["source.sock", "target.sock"].map(|name| daemon.path(name));
    let listeners = [&source, &target].map(|path| UnixListener::bind(path).expect("a listener"));
    attach(&daemon, &source, &volume, &first);
    attach(&daemon, &target, &volume, &second);
    let [mut old, mut new] = [0, 1].map(|at| accept(&listeners[at]));
    old.write(0, &[1; 512]).expect("it is active");
    assert_eq!(new.write(0, &[2; 512]).expect_err("it stands by").number(), ErrorNumber::Permission);
    daemon.convert(&volume, &first, &second).expect("a conversion");
    assert_eq!(old.write(0, &[1; 512]).expect_err("it is stale").number(), ErrorNumber::Permission);
    new.write(512, &[2; 512]).expect("it is active");
    daemon.kill();
    daemon.start_again();
    let trouble = || {
        let found = attachments(&daemon).into_iter().find(|report| report.attachment.socket == source);
        found.expect("the attachment stays").trouble
    };
    eventually("the stale one is told", || trouble().is_some_and(|trouble| trouble.contains("is active")));
    let mut new = accept(&listeners[1]);
    assert_eq!(new.read(0, 1024).expect("a read"), [[1; 512], [2; 512]].concat());
}

#[test]
fn a_damaged_log_of_leases_serves_nobody() {
    let mut daemon = Daemon::new();
    let (volume, lease, export) = daemon.writable(MIB);
    daemon.kill();
    let log = daemon.path("store").join(volume.as_str()).join("leases");
    let mut bytes = std::fs::read(&log).expect("the log");
    bytes[40] ^= 1;
    hearth::sys::file::replace(&log, &bytes).expect("a flipped bit");
    daemon.start_again();
    for export in [export.as_str(), volume.as_str()] {
        let refused = Client::connect(&daemon.nbd_socket(), export);
        assert!(matches!(refused, Err(ClientError::Refused(_, text)) if text.contains("damaged in line 1")));
    }
    assert!(daemon.show(&volume).damage.expect("damage").contains("damaged in line 1"));
    let refused = daemon.ask(Ask::Release { volume, id: lease.id, only: None });
    assert!(matches!(refused, Answer::Refused { refusal: Refusal::Damaged { .. } }), "{refused:?}");
}

#[test]
fn a_damaged_map_is_served_read_only() {
    let mut daemon = Daemon::new();
    let (volume, _, export) = daemon.writable(4 * MIB);
    let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    client.write(0, &[5; 65536]).expect("a write");
    client.flush().expect("a flush");
    assert!(daemon.terminate().success(), "{}", daemon.log());
    let map = daemon.path("store").join(volume.as_str()).join("map");
    let mut bytes = std::fs::read(&map).expect("the map");
    let at = bytes.len() / 3;
    bytes[at] ^= 1;
    hearth::sys::file::replace(&map, &bytes).expect("a flipped bit");
    daemon.start_again();
    let report = daemon.show(&volume);
    assert!(report.damage.is_some(), "{report:?}");
    let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    assert_eq!(client.write(0, &[6; 512]).expect_err("it is damaged").number(), ErrorNumber::Permission);
    assert!(daemon.log().contains("is damaged, so it is only read"));
}

#[test]
fn the_end_is_in_order_and_two_do_not_share_a_directory() {
    let mut daemon = Daemon::new();
    let (_, _, export) = daemon.writable(MIB);
    let mut client = Client::connect(&daemon.nbd_socket(), &export).expect("a connection");
    client.write(0, &[1; 512]).expect("a write");
    let start = crate::daemon::start_message(daemon.dir.path());
    let mut second = crate::daemon::spawn_with(&start, std::process::Stdio::piped());
    let mut text = String::new();
    second.stderr.take().expect("its log").read_to_string(&mut text).expect("text");
    assert!(!second.wait().expect("wait").success());
    assert!(text.contains("another volume daemon runs in"), "{text}");
    let other = hearth::wire::volumed::StartMessage { runtime: daemon.path("other"), ..start };
    let mut third = crate::daemon::spawn_with(&other, std::process::Stdio::piped());
    text.clear();
    third.stderr.take().expect("its log").read_to_string(&mut text).expect("text");
    assert!(!third.wait().expect("wait").success() && text.contains("in use"), "{text}");
    let idle = daemon.ask(Ask::EndIfIdle);
    assert!(matches!(idle, Answer::Refused { refusal: Refusal::InUse { .. } }), "{idle:?}");
    assert!(daemon.terminate().success());
    assert_eq!(client.socket.read(&mut [0; 1]).expect("an end"), 0);
    daemon.start_again();
    assert_eq!(daemon.ask(Ask::End), Answer::Done);
    eventually("it ends", || !daemon.is_running());
}
