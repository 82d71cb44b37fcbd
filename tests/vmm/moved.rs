//! Moved from VMM to VMM by hand, without agents: the guest goes on where it was, and wherever it is cut off before the
//! machine stands ready at the other end, it goes on where it is.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hearth::sys::{fd, file, process};
use hearth::wire::control::{
    Answer, DeviceSpec, MachineState, PackedPhases, Packing, ReceiveSpec, ReceivedMemory, Request, SavedPages,
    SendPhase, SendPhases, SendSpec, SentPages, StreamForm, StreamKey, StreamTls, StreamToken,
};
use hearth::wire::refusal::Refusal;

use crate::guest::{Booted, Guest, MEMORY_BYTES};
use crate::{NONCE, Vmm, answer, ask, begin, console};

pub(super) const TOKEN: StreamToken = StreamToken([5; 32]);

pub(super) const SPEC: SendSpec = SendSpec {
    token: TOKEN,
    connections: 1,
    pages: SentPages::All,
    pause_ms_max: 50,
    rounds_max: 30,
    deadline_ms: 60_000,
    force: false,
    throttle: false,
    rate_bytes_max: None,
    tls: None,
};

/// Connected pairs over loopback.
pub(super) fn connections(count: u8) -> (Vec<TcpStream>, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = |_| {
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        one.set_nodelay(true).unwrap();
        other.set_nodelay(true).unwrap();
        (one, other)
    };
    (0..count).map(pair).unzip()
}

/// A VMM that waits for a machine with new memory.
fn arriving(ends: &[TcpStream], token: StreamToken, tls: Option<StreamTls>) -> Vmm {
    arriving_in(ends, token, tls, (ReceivedMemory::New, None))
}

/// A VMM that waits for a machine with this memory.
fn arriving_in(
    ends: &[TcpStream],
    token: StreamToken,
    tls: Option<StreamTls>,
    memory: (ReceivedMemory, Option<&File>),
) -> Vmm {
    arriving_sized(ends, token, tls, memory, MEMORY_BYTES)
}

/// The same, of that size.
pub(super) fn arriving_sized(
    ends: &[TcpStream],
    token: StreamToken,
    tls: Option<StreamTls>,
    (memory, file): (ReceivedMemory, Option<&File>),
    memory_bytes: u64,
) -> Vmm {
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let console = file::create(&vmm.directory.path().join("console")).unwrap();
    let console_listener = fd::bind_in_dir(&vmm.dir, "console.sock").unwrap();
    let vsock = fd::bind_in_dir(&vmm.dir, "vsock.sock").unwrap();
    let mut descriptors = vec![kvm.as_fd()];
    descriptors.extend(file.map(File::as_fd));
    descriptors.extend([console.as_fd(), console_listener.as_fd(), vsock.as_fd()]);
    descriptors.extend(ends.iter().map(AsFd::as_fd));
    let spec = ReceiveSpec {
        token,
        connections: u8::try_from(ends.len()).unwrap(),
        memory,
        memory_bytes,
        devices: vec![DeviceSpec::Vsock, DeviceSpec::Rng],
        tls,
    };
    begin(&vmm.control, &Request::Receive(spec), &descriptors);
    vmm
}

/// Certificates for the source and the target of one move.
pub(super) fn tls() -> (StreamTls, StreamTls) {
    let made = || {
        let made = rcgen::generate_simple_self_signed(vec!["hearth".to_owned()]).unwrap();
        (made.cert.der().to_vec(), made.signing_key.serialize_der())
    };
    let (source, target) = (made(), made());
    let end = |(certificate, key): (Vec<u8>, Vec<u8>), peer| StreamTls { certificate, key: StreamKey(key), peer };
    (end(source.clone(), target.0.clone()), end(target, source.0))
}

fn begin_send(vmm: &Vmm, ends: &[TcpStream], spec: SendSpec) {
    begin_as(vmm, ends, |connections| Request::Send(SendSpec { connections, ..spec }));
}

/// Begins a send by the request for so many connections.
fn begin_as(vmm: &Vmm, ends: &[TcpStream], request: impl FnOnce(u8) -> Request) {
    let pagemap = File::open(format!("/proc/{}/pagemap", vmm.spawned.pid)).unwrap();
    let mut descriptors = vec![pagemap.as_fd()];
    descriptors.extend(ends.iter().map(AsFd::as_fd));
    let connections = u8::try_from(ends.len()).unwrap();
    begin(&vmm.control, &request(connections), &descriptors);
}

/// Another conversation with the VMM, beside the one that waits.
pub(super) fn second(vmm: &Vmm) -> std::os::unix::net::UnixStream {
    let mut second = fd::connect_in_dir(&vmm.dir, "control.sock").unwrap();
    assert!(matches!(ask(&mut second, &Request::Hello { nonce: NONCE, epoch: 1 }, &[]), Answer::Welcome(_)));
    second
}

/// Moves a machine; it runs at the other end, and is gone here.
fn moved(from: Vmm, count: u8, spec: SendSpec, tls: Option<StreamTls>) -> (Vmm, SendPhases) {
    let (ours, theirs) = connections(count);
    let to = arriving(&theirs, TOKEN, tls);
    drop(theirs);
    moved_to(to, from, ours, spec)
}

pub(super) fn moved_to(to: Vmm, mut from: Vmm, ours: Vec<TcpStream>, spec: SendSpec) -> (Vmm, SendPhases) {
    begin_send(&from, &ours, spec);
    drop(ours);
    let sent = answer(&mut from.control);
    let Answer::Sent(phases) = sent else { panic!("{sent:?}\n{}\n{}", from.log(), to.log()) };
    (goes_on(to, from), phases)
}

/// Lets a machine that stands ready at both ends run at the other one.
fn goes_on(mut to: Vmm, mut from: Vmm) -> Vmm {
    let launched = answer(&mut to.control);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", to.log());
    assert_eq!(to.ask(&Request::Resume), Answer::Done);
    assert_eq!(from.ask(&Request::Stop), Answer::Done);
    from.wait_for_end();
    to
}

fn guest(vmm: &Vmm) -> Guest {
    Guest::connect(vmm).unwrap_or_else(|| panic!("the guest listens; its console:\n{}", console(vmm)))
}

pub(super) fn shell(vmm: &Vmm, words: &str) -> String {
    String::from_utf8(guest(vmm).output(&["sh", "-c", words])).unwrap()
}

/// A guest that counts, and rewrites a buffer that it checks. Nearly all of it is the shell's own: starting a program
/// takes long where the guest's kernel is emulated.
const LOAD: &str = "cd /tmp; echo $$ > nonce; ln -s /proc/sys/kernel/random/boot_id boot
(i=0; while :; do i=$((i+1)); echo $i > ticks; sleep 0.1; done) >/dev/null 2>&1 &
head -c 65536 /dev/urandom > seed
(while :; do pad=x$pad; (echo $pad; cat seed seed seed seed) > buffer; md5sum buffer > sum; md5sum -c sum || echo bad > bad
sleep 0.5; done) >/dev/null 2>&1 &
until [ -s ticks ] && [ -s sum ]; do sleep 0.1; done";

/// What it is and how it is, in words of the shell's own.
const LOOK: &str = "cd /tmp; read nonce < nonce; read boot < boot; until read ticks < ticks; do :; done
[ -e bad ] && nonce=bad; echo $nonce $boot $ticks";

pub(super) fn loaded() -> (Vmm, String) {
    let booted = Booted::boot();
    booted.guest().identify(1);
    shell(&booted.0, LOAD);
    let (told, _) = look(&booted.0);
    (booted.0, told)
}

/// What of it has to stay as it is, and how far it has counted.
pub(super) fn look(vmm: &Vmm) -> (String, u64) {
    let told = shell(vmm, LOOK);
    let (kept, ticks) = told.trim_end().rsplit_once(' ').unwrap();
    (kept.to_owned(), ticks.parse().unwrap())
}

/// It is the same guest, nothing in its memory is wrong, and it counts on.
pub(super) fn check(vmm: &Vmm, told: &str, ticks_before: u64) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let (kept, ticks) = look(vmm);
        assert_eq!(kept, told);
        if ticks > ticks_before {
            return ticks;
        }
        assert!(Instant::now() < deadline, "it does not count on from {ticks_before}; its console:\n{}", console(vmm));
    }
}

#[test]
fn a_guest_goes_there_and_back_and_notices_nothing() {
    let (mut vmm, told) = loaded();
    let (_, mut last) = look(&vmm);
    for round in 0..4_u8 {
        let (source, target) = tls();
        let (source, target) = if round % 2 == 0 { (None, None) } else { (Some(source), Some(target)) };
        let phases;
        (vmm, phases) = moved(vmm, 1 + round % 3, SendSpec { tls: source, ..SPEC }, target);
        last = check(&vmm, &told, last);
        println!("{phases:?}");
        assert!(phases.rounds >= 1 && phases.pages > 1000 && phases.state_bytes > 4096, "{phases:?}");
        assert!(phases.wire_bytes > phases.pages * 4096 && phases.held_ns > 0, "{phases:?}");
    }
}

/// Moves a machine in a stream of this form.
fn moved_in(form: StreamForm, from: Vmm, count: u8, tls: (Option<StreamTls>, Option<StreamTls>)) -> (Vmm, Answer) {
    let (ours, theirs) = connections(count);
    let to = arriving(&theirs, TOKEN, tls.1);
    drop(theirs);
    moved_to_in(form, to, from, ours, SendSpec { tls: tls.0, ..SPEC })
}

/// The same, to a VMM that waits for it.
pub(super) fn moved_to_in(
    form: StreamForm,
    to: Vmm,
    mut from: Vmm,
    ours: Vec<TcpStream>,
    spec: SendSpec,
) -> (Vmm, Answer) {
    begin_as(&from, &ours, |connections| Request::SendIn { spec: SendSpec { connections, ..spec }, form });
    drop(ours);
    let sent = answer(&mut from.control);
    assert!(matches!(sent, Answer::SentIn { .. }), "{sent:?}\n{}\n{}", from.log(), to.log());
    (goes_on(to, from), sent)
}

#[test]
fn pages_go_packed_where_that_is_asked_for() {
    let (mut vmm, told) = loaded();
    // Neither zero nor noise.
    shell(
        &vmm,
        "cd /tmp; l='one line is like the other. '; while [ ${#l} -lt 65536 ]; do l=$l$l; done; echo $l > text
        for i in 1 2 3 4; do cat text text > next; mv next text; done; md5sum text > text.sum",
    );
    let (_, mut last) = look(&vmm);
    let packed = StreamForm { version: 2, packing: Packing::Lz4 };
    for (form, count, encrypted) in [
        (packed, 1, false),
        (packed, 3, true),
        (StreamForm { packing: Packing::None, ..packed }, 2, false),
        (StreamForm::PLAIN, 1, true),
    ] {
        let (source, target) = tls();
        let tls = if encrypted { (Some(source), Some(target)) } else { (None, None) };
        let sent;
        (vmm, sent) = moved_in(form, vmm, count, tls);
        let Answer::SentIn { phases, packed } = sent else { unreachable!("looked at before") };
        println!("{form:?} {phases:?} {packed:?}");
        last = check(&vmm, &told, last);
        assert_eq!(shell(&vmm, "cd /tmp; md5sum -c text.sum"), "text: OK\n");
        if form.packing == Packing::Lz4 {
            assert!(packed.pages > 256 && packed.pages <= phases.pages, "{phases:?} {packed:?}");
            assert!(packed.bytes * 2 < packed.pages * 4096, "{packed:?}");
            assert!(phases.wire_bytes < phases.pages * 4096 && phases.wire_bytes > packed.bytes, "{phases:?}");
        } else {
            assert_eq!(packed, PackedPhases::default());
            assert!(phases.wire_bytes > phases.pages * 4096, "{phases:?}");
        }
    }
    // What no other end understands is not begun.
    for form in [StreamForm { version: 1, packing: Packing::Lz4 }, StreamForm { version: 3, packing: Packing::None }] {
        let (ours, _theirs) = connections(1);
        begin_as(&vmm, &ours, |connections| Request::SendIn { spec: SendSpec { connections, ..SPEC }, form });
        let refused = answer(&mut vmm.control);
        assert!(matches!(refused, Answer::Refused(Refusal::BadRequest { .. })), "{form:?}: {refused:?}");
    }
    check(&vmm, &told, last);
}

/// The file of a machine's memory, taken from the process that has it.
fn memory_of(vmm: &Vmm) -> File {
    let descriptors = format!("/proc/{}/fd", vmm.spawned.pid);
    let mut found = std::fs::read_dir(descriptors).unwrap().map(|entry| entry.unwrap().path());
    let is_memory = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|name| name.to_string_lossy().contains("hearth-guest-ram"))
    };
    File::options().read(true).write(true).open(found.find(is_memory).expect("a memory file")).unwrap()
}

#[test]
fn within_one_host_memory_is_handed_over_and_not_copied() {
    let (mut vmm, told) = loaded();
    let (_, mut last) = look(&vmm);
    for _ in 0..2 {
        let (ours, theirs) = connections(1);
        let memory = memory_of(&vmm);
        let to = arriving_in(&theirs, TOKEN, None, (ReceivedMemory::Shared, Some(&memory)));
        drop(theirs);
        let phases;
        (vmm, phases) = moved_to(to, vmm, ours, SendSpec { pages: SentPages::None, ..SPEC });
        last = check(&vmm, &told, last);
        println!("{phases:?}");
        assert_eq!((phases.pages, phases.zero_pages, phases.rounds), (0, 0, 0), "{phases:?}");
    }
}

#[test]
fn a_machine_of_an_image_is_sent_as_the_difference_to_it() {
    let mut booted = Booted::boot();
    let saved = booted.save();
    let vmm = saved.restore();
    shell(&vmm, "cd /tmp; dd if=/dev/urandom of=some bs=64k count=4 2>/dev/null; md5sum some > sum; echo kept > note");
    let (ours, theirs) = connections(2);
    let to = arriving_in(&theirs, TOKEN, None, (ReceivedMemory::Image, Some(&saved.memory)));
    drop(theirs);
    let (vmm, phases) = moved_to(to, vmm, ours, SendSpec { pages: SentPages::Changed, ..SPEC });
    println!("{phases:?}");
    // The whole guest has more than three thousand pages that are not zero.
    assert!((64..2500).contains(&phases.pages), "{phases:?}");
    assert_eq!(shell(&vmm, "cd /tmp; md5sum -c sum; cat note"), "some: OK\nkept\n");
}

#[test]
fn whatever_goes_wrong_before_it_stands_ready_it_goes_on_where_it_is() {
    let (mut vmm, told) = loaded();
    let (_, mut last) = look(&vmm);
    let slow = || SendSpec { rate_bytes_max: Some(2 << 20), ..SPEC };
    let copying = |vmm: &Vmm| {
        let mut second = second(vmm);
        loop {
            let progress = ask(&mut second, &Request::SendProgress, &[]);
            let Answer::Sending(progress) = progress else { panic!("{progress:?}") };
            assert_eq!(progress.phase, SendPhase::Copying);
            if progress.sent_bytes > 1 << 20 {
                return second;
            }
        }
    };
    // Another migration's token.
    let (ours, theirs) = connections(2);
    let mut to = arriving(&theirs, StreamToken([6; 32]), None);
    drop(theirs);
    begin_send(&vmm, &ours, SPEC);
    for end in [&mut vmm, &mut to] {
        let refused = answer(&mut end.control);
        assert!(matches!(&refused, Answer::Refused(Refusal::Stream { reason }) if !reason.is_empty()), "{refused:?}");
    }
    last = check(&vmm, &told, last);

    // A certificate that the other end was not told of; a source that does not encrypt.
    let ((source, _), (_, target)) = (tls(), tls());
    for (source, target) in [(Some(source), target.clone()), (None, target)] {
        let (ours, theirs) = connections(1);
        let mut to = arriving(&theirs, TOKEN, Some(target));
        drop(theirs);
        begin_send(&vmm, &ours, SendSpec { tls: source, ..SPEC });
        drop(ours);
        for end in [&mut vmm, &mut to] {
            let refused = answer(&mut end.control);
            assert!(matches!(refused, Answer::Refused(Refusal::Stream { .. })), "{refused:?}");
        }
        last = check(&vmm, &told, last);
    }

    // While it is being sent, nothing else is done with it; then it is called off.
    let (ours, theirs) = connections(1);
    let mut to = arriving(&theirs, TOKEN, None);
    begin_send(&vmm, &ours, slow());
    drop((ours, theirs));
    let mut other = copying(&vmm);
    for request in [Request::Pause, Request::Resume, Request::Save { pages: SavedPages::All }, Request::Send(SPEC)] {
        assert_eq!(ask(&mut other, &request, &[]), Answer::Refused(Refusal::Sending), "{request:?}");
    }
    assert_eq!(ask(&mut other, &Request::CancelSend, &[]), Answer::Done);
    assert_eq!(answer(&mut vmm.control), Answer::Refused(Refusal::Cancelled));
    let refused = answer(&mut to.control);
    assert!(
        matches!(&refused, Answer::Refused(Refusal::Stream { reason }) if reason.contains("cancelled")),
        "{refused:?}"
    );
    last = check(&vmm, &told, last);

    // Its agent hangs up.
    let (ours, theirs) = connections(1);
    let mut to = arriving(&theirs, TOKEN, None);
    begin_send(&vmm, &ours, slow());
    drop((ours, theirs));
    vmm.control = copying(&vmm);
    let refused = answer(&mut to.control);
    assert!(matches!(refused, Answer::Refused(Refusal::Stream { .. })), "{refused:?}");
    last = check(&vmm, &told, last);

    // The other VMM is killed.
    let (ours, theirs) = connections(2);
    let to = arriving(&theirs, TOKEN, None);
    begin_send(&vmm, &ours, slow());
    drop((ours, theirs));
    let other = copying(&vmm);
    process::kill(&to.spawned.pidfd).unwrap();
    let refused = answer(&mut vmm.control);
    assert!(matches!(&refused, Answer::Refused(Refusal::Stream { .. })), "{refused:?}");
    drop(other);
    last = check(&vmm, &told, last);

    // It stands ready, and the agent decides otherwise.
    let (ours, theirs) = connections(1);
    let mut to = arriving(&theirs, TOKEN, None);
    begin_send(&vmm, &ours, SPEC);
    drop((ours, theirs));
    let sent = answer(&mut vmm.control);
    assert!(matches!(sent, Answer::Sent(_)), "{sent:?}");
    assert!(matches!(answer(&mut to.control), Answer::Launched(_)));
    let Answer::Status(status) = vmm.ask(&Request::Status) else { panic!("no status") };
    assert_eq!(status.state, MachineState::Paused);
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    drop(to);
    last = check(&vmm, &told, last);

    // After all that it can still be moved.
    let (vmm, _) = moved(vmm, 1, SPEC, None);
    check(&vmm, &told, last);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    let empty = vmm.ask(&Request::Send(SPEC));
    assert_eq!(empty, Answer::Refused(Refusal::State { state: MachineState::Empty }));
    assert_eq!(vmm.ask(&Request::CancelSend), Answer::Done);
    for connections in [0, 9, 1] {
        let spec = ReceiveSpec {
            token: TOKEN,
            connections,
            memory: ReceivedMemory::New,
            memory_bytes: MEMORY_BYTES,
            devices: vec![],
            tls: None,
        };
        let refused = vmm.ask(&Request::Receive(spec));
        assert!(matches!(refused, Answer::Refused(Refusal::BadRequest { .. })), "{refused:?}");
    }
}
