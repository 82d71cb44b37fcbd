//! What is no frame, no message, or in pieces.

use hearth_guest_wire::frame;
use hearth_guest_wire::{Exit, FRAME_BYTES_MAX, FromGuest, ToGuest, VERSION};

use super::agent::{Agent, program, shell, wait_for_end};

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let agent = Agent::start();
    let body = [0xff; 64];
    let mut garbage = 64_u32.to_le_bytes().to_vec();
    garbage.extend(body);
    let mut trailing = frame::encode(&ToGuest::Stats).expect("a frame");
    trailing.extend_from_slice(&[0]);
    trailing[0] += 1;
    let empty = 0_u32.to_le_bytes().to_vec();
    let too_long = (FRAME_BYTES_MAX + 1).to_le_bytes().to_vec();
    let before = frame::encode(&ToGuest::Stats).expect("a frame");
    for bytes in [&garbage, &trailing, &empty, &too_long] {
        let mut host = agent.greeted();
        host.say_bytes(bytes);
        assert_eq!(host.hear_failure().0, 71);
        let mut host = agent.connect();
        host.say_bytes(bytes);
        assert_eq!(host.hear_failure().0, 71);
        let (mut host, pid) = agent.exec(program(&["sleep", "1000"]));
        host.say_bytes(bytes);
        assert_eq!(host.hear_failure().0, 71);
        wait_for_end(pid);
    }
    let mut host = agent.connect();
    host.say_bytes(&before);
    let (errno, what) = host.hear_failure();
    assert_eq!((errno, what.as_str()), (71, "message out of place"));
    assert_eq!(agent.run("echo fine").text(), "fine\n");
}

#[test]
fn a_frame_at_its_limit_is_taken() {
    let agent = Agent::start();
    let mut exec = shell("echo ${#BIG}");
    // The kernel takes words of less than 128 KiB, so several fill the frame.
    for number in 0..8 {
        exec.env.push(format!("B{number}={}", "x".repeat(120_000)));
    }
    exec.env.push(format!("BIG={}", "y".repeat(20_000)));
    let short = FRAME_BYTES_MAX as usize + 4 - frame::encode(&ToGuest::Exec(exec.clone())).expect("a frame").len();
    exec.env[8] = format!("BIG={}", "y".repeat(20_000 + short));
    assert_eq!(frame::encode(&ToGuest::Exec(exec.clone())).expect("a frame").len(), FRAME_BYTES_MAX as usize + 4);
    let (mut host, _) = agent.exec(exec);
    assert_eq!(host.outcome().text(), format!("{}\n", 20_000 + short));
}

#[test]
fn frames_split_anywhere_are_understood() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let mut bytes = frame::encode(&ToGuest::Hello { version: VERSION }).expect("a frame");
    bytes.extend(frame::encode(&ToGuest::Exec(program(&["cat"]))).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Stdin(b"split".to_vec())).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::StdinClosed).expect("a frame"));
    for byte in bytes {
        host.say_bytes(&[byte]);
        agent.wait_for_rest(&[]);
    }
    assert!(matches!(host.hear(), FromGuest::Hello { .. }));
    assert!(matches!(host.hear(), FromGuest::Started { .. }));
    assert_eq!(host.outcome().text(), "split");
}

#[test]
fn a_whole_conversation_may_come_at_once() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let mut bytes = frame::encode(&ToGuest::Hello { version: VERSION }).expect("a frame");
    bytes.extend(frame::encode(&ToGuest::Stats).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Quiesce { timeout_ms: 20_000 }).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Thaw).expect("a frame"));
    bytes.extend(frame::encode(&ToGuest::Exec(shell("exit 9"))).expect("a frame"));
    host.say_bytes(&bytes);
    assert!(matches!(host.hear(), FromGuest::Hello { .. }));
    assert!(matches!(host.hear(), FromGuest::Stats(_)));
    assert!(matches!(host.hear(), FromGuest::Quiesced { complete: true, .. }));
    assert_eq!(host.hear(), FromGuest::Done);
    assert!(matches!(host.hear(), FromGuest::Started { .. }));
    assert_eq!(host.outcome().exit, Exit::Code(9));
}

#[test]
fn a_version_too_old_is_refused_and_a_newer_one_is_not() {
    let agent = Agent::start();
    let mut host = agent.connect();
    host.say(&ToGuest::Hello { version: 0 });
    assert_eq!(host.hear_failure().0, 71);
    let mut host = agent.connect();
    host.say(&ToGuest::Hello { version: VERSION + 1 });
    assert!(matches!(host.hear(), FromGuest::Hello { version: VERSION, .. }));
}
