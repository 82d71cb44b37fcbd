//! Frames: what one side writes the other reads, whole or in pieces, and nothing else is taken for a frame.

use hearth_guest_wire::frame::{Decoder, FrameError, HEADER_BYTES, body_length, decode, encode, encode_to};
use hearth_guest_wire::{
    Address, Endpoint, Exec, Exit, FRAME_BYTES_MAX, FromGuest, Gateway, GatewayAddress, HardwareAddress, HookFailure,
    HooksRan, Identity, Interface, Join, NetworkInterface, Registration, STREAM_CHUNK_BYTES, Shutdown, Stats,
    TerminalSize, ToGuest, VERSION,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn address() -> impl Strategy<Value = Address> {
    prop_oneof![
        (any::<[u8; 4]>(), 0..=32_u8).prop_map(|(octets, prefix)| Address::V4(octets, prefix)),
        (any::<[u8; 16]>(), 0..=128_u8).prop_map(|(octets, prefix)| Address::V6(octets, prefix)),
    ]
}

fn interface() -> impl Strategy<Value = Interface> {
    (any::<[u8; 6]>(), vec(address(), 0..4), any::<u16>()).prop_map(|(mac, addresses, mtu)| Interface {
        mac,
        addresses,
        mtu,
    })
}

fn gateway() -> impl Strategy<Value = Gateway> {
    let address =
        prop_oneof![any::<[u8; 4]>().prop_map(GatewayAddress::V4), any::<[u8; 16]>().prop_map(GatewayAddress::V6),];
    (address, any::<[u8; 6]>()).prop_map(|(address, mac)| Gateway { address, mac })
}

fn network_interface() -> impl Strategy<Value = NetworkInterface> {
    (any::<[u8; 6]>(), any::<u16>(), vec(address(), 0..4), vec(gateway(), 0..3))
        .prop_map(|(mac, mtu, addresses, gateways)| NetworkInterface { mac, mtu, addresses, gateways })
}

fn identity() -> impl Strategy<Value = Identity> {
    (any::<String>(), any::<String>(), any::<[u8; 16]>(), any::<[[u8; 32]; 2]>(), any::<u64>(), vec(interface(), 0..4))
        .prop_map(|(vm_id, hostname, generation, entropy, unix_ns, interfaces)| Identity {
            vm_id,
            hostname,
            generation,
            entropy,
            unix_ns,
            interfaces,
        })
}

fn exec() -> impl Strategy<Value = Exec> {
    let terminal = (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| TerminalSize { rows, columns });
    (
        vec(any::<String>(), 0..6),
        vec(any::<String>(), 0..6),
        any::<String>(),
        any::<u32>(),
        proptest::option::of(terminal),
    )
        .prop_map(|(argv, env, cwd, timeout_ms, terminal)| Exec { argv, env, cwd, timeout_ms, terminal })
}

fn join() -> impl Strategy<Value = Join> {
    let endpoint = prop_oneof![
        (any::<[u8; 4]>(), any::<u16>()).prop_map(|(octets, port)| Endpoint::V4(octets, port)),
        (any::<[u8; 16]>(), any::<u16>()).prop_map(|(octets, port)| Endpoint::V6(octets, port)),
    ];
    (any::<[String; 3]>(), proptest::option::of(endpoint), any::<u32>()).prop_map(
        |([cluster_id, executor_id, token], endpoint, timeout_ms)| Join {
            cluster_id,
            executor_id,
            token,
            endpoint,
            timeout_ms,
        },
    )
}

fn registration() -> impl Strategy<Value = Registration> {
    (any::<[String; 4]>(), any::<[u8; 16]>()).prop_map(|([executor_id, cluster_id, vm_id, token], generation)| {
        Registration { executor_id, cluster_id, vm_id, generation, token }
    })
}

fn hooks_ran() -> impl Strategy<Value = HooksRan> {
    let failure = (any::<String>(), any::<String>()).prop_map(|(name, reason)| HookFailure { name, reason });
    (any::<u16>(), vec(failure, 0..4)).prop_map(|(ran, failed)| HooksRan { ran, failed })
}

fn to_guest() -> impl Strategy<Value = ToGuest> {
    prop_oneof![
        any::<u16>().prop_map(|version| ToGuest::Hello { version }),
        identity().prop_map(ToGuest::Identity),
        any::<u32>().prop_map(|timeout_ms| ToGuest::Quiesce { timeout_ms }),
        Just(ToGuest::Thaw),
        Just(ToGuest::Stats),
        any::<u64>().prop_map(|unix_ns| ToGuest::SetClock { unix_ns }),
        prop_oneof![Just(Shutdown::PowerOff), Just(Shutdown::Reboot)].prop_map(ToGuest::Shutdown),
        exec().prop_map(ToGuest::Exec),
        vec(any::<u8>(), 0..300).prop_map(ToGuest::Stdin),
        Just(ToGuest::StdinClosed),
        any::<u8>().prop_map(|number| ToGuest::Signal { number }),
        (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| ToGuest::Resize { rows, columns }),
        vec(network_interface(), 0..4).prop_map(ToGuest::Network),
        vec(any::<[[u8; 6]; 2]>().prop_map(|[from, to]| HardwareAddress { from, to }), 0..4)
            .prop_map(ToGuest::Hardware),
        any::<u32>().prop_map(|timeout_ms| ToGuest::RunHooks { timeout_ms }),
        join().prop_map(ToGuest::Join),
        any::<u64>().prop_map(|epoch| ToGuest::Registered { epoch }),
        any::<String>().prop_map(|reason| ToGuest::RegistrationRefused { reason }),
        (any::<String>(), any::<bool>()).prop_map(|(disk, read_only)| ToGuest::Root { disk, read_only }),
        Just(ToGuest::Secrets),
    ]
}

fn stats() -> impl Strategy<Value = Stats> {
    (any::<[u64; 4]>(), any::<[u32; 3]>()).prop_map(|(wide, narrow)| Stats {
        uptime_ns: wide[0],
        unix_ns: wide[1],
        memory_total_bytes: wide[2],
        memory_available_bytes: wide[3],
        processes: narrow[0],
        load1_hundredths: narrow[1],
        execs_running: narrow[2],
    })
}

fn from_guest() -> impl Strategy<Value = FromGuest> {
    let exit = prop_oneof![any::<u8>().prop_map(Exit::Code), any::<u8>().prop_map(Exit::Signal), Just(Exit::TimedOut)];
    prop_oneof![
        (any::<u16>(), any::<u64>()).prop_map(|(version, running_ns)| FromGuest::Hello { version, running_ns }),
        Just(FromGuest::Done),
        (any::<i32>(), any::<String>()).prop_map(|(errno, what)| FromGuest::Failed { errno, what }),
        (any::<bool>(), any::<u32>()).prop_map(|(complete, took_ms)| FromGuest::Quiesced { complete, took_ms }),
        stats().prop_map(FromGuest::Stats),
        any::<u32>().prop_map(|pid| FromGuest::Started { pid }),
        vec(any::<u8>(), 0..300).prop_map(FromGuest::Stdout),
        vec(any::<u8>(), 0..300).prop_map(FromGuest::Stderr),
        exit.prop_map(FromGuest::Exited),
        hooks_ran().prop_map(FromGuest::HooksRan),
        registration().prop_map(FromGuest::Register),
        any::<u64>().prop_map(|epoch| FromGuest::Joined { epoch }),
        vec(any::<String>(), 0..4).prop_map(FromGuest::Secrets),
    ]
}

proptest! {
    #[test]
    fn every_message_comes_back(to in to_guest(), from in from_guest()) {
        let bytes = encode(&to).unwrap();
        prop_assert_eq!(decode::<ToGuest>(&bytes[HEADER_BYTES..]).unwrap(), to);
        let bytes = encode(&from).unwrap();
        prop_assert_eq!(decode::<FromGuest>(&bytes[HEADER_BYTES..]).unwrap(), from);
    }

    #[test]
    fn a_stream_cut_anywhere_gives_the_same_messages(
        messages in vec(to_guest(), 1..8),
        cuts in vec(1..50_usize, 1..20),
    ) {
        let mut stream = Vec::new();
        for message in &messages {
            encode_to(message, &mut stream).unwrap();
        }
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        let mut rest = stream.as_slice();
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            decoder.push(piece);
            rest = after;
            while let Some(message) = decoder.next::<ToGuest>().unwrap() {
                seen.push(message);
            }
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(seen, messages);
        prop_assert!(!decoder.is_mid_frame());
    }

    #[test]
    fn garbage_is_refused_and_never_panics(bytes in vec(any::<u8>(), 0..400)) {
        let _ = decode::<ToGuest>(&bytes);
        let _ = decode::<FromGuest>(&bytes);
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        while let Ok(Some(_)) = decoder.next::<ToGuest>() {}
    }

    #[test]
    fn a_changed_frame_is_a_message_or_an_error(message in to_guest(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = encode(&message).unwrap();
        let at = at.index(bytes.len());
        bytes[at] = to;
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        let _ = decoder.next::<ToGuest>();
    }

    #[test]
    fn a_shortened_body_is_malformed(message in to_guest(), at in any::<prop::sample::Index>()) {
        let bytes = encode(&message).unwrap();
        let body = &bytes[HEADER_BYTES..];
        let short = &body[..at.index(body.len())];
        prop_assert_eq!(decode::<ToGuest>(short), Err(FrameError::Malformed));
    }

    #[test]
    fn a_lengthened_body_has_trailing_bytes(message in to_guest(), more in 1..20_usize) {
        let mut bytes = encode(&message).unwrap();
        bytes.resize(bytes.len() + more, 0);
        prop_assert_eq!(decode::<ToGuest>(&bytes[HEADER_BYTES..]), Err(FrameError::TrailingBytes));
    }
}

#[test]
fn bytes_one_at_a_time_are_one_message() {
    let message = ToGuest::Stdin(vec![9; STREAM_CHUNK_BYTES]);
    let bytes = encode(&message).unwrap();
    let mut decoder = Decoder::new();
    for (index, byte) in bytes.iter().enumerate() {
        assert_eq!(decoder.next::<ToGuest>(), Ok(None), "after {index} bytes");
        decoder.push(&[*byte]);
        assert!(decoder.is_mid_frame());
    }
    assert_eq!(decoder.next::<ToGuest>(), Ok(Some(message)));
    assert_eq!(decoder.next::<ToGuest>(), Ok(None));
    assert!(!decoder.is_mid_frame());
}

/// A message whose body has this many bytes: one of variant, three of length, the rest content.
fn stdin_with_body(bytes: u32) -> ToGuest {
    ToGuest::Stdin(vec![1; bytes as usize - 4])
}

#[test]
fn a_frame_at_its_limit_passes_and_one_byte_more_does_not() {
    let longest = stdin_with_body(FRAME_BYTES_MAX);
    let bytes = encode(&longest).unwrap();
    assert_eq!(bytes.len(), HEADER_BYTES + FRAME_BYTES_MAX as usize);
    let mut decoder = Decoder::new();
    decoder.push(&bytes);
    assert_eq!(decoder.next::<ToGuest>(), Ok(Some(longest)));

    let refused = Err(FrameError::TooLong { length: u64::from(FRAME_BYTES_MAX) + 1 });
    assert_eq!(encode(&stdin_with_body(FRAME_BYTES_MAX + 1)), refused);
    let mut decoder = Decoder::new();
    // The header alone is enough: the body is not waited for, nor kept.
    decoder.push(&(FRAME_BYTES_MAX + 1).to_le_bytes());
    assert_eq!(decoder.next::<ToGuest>(), Err(FrameError::TooLong { length: u64::from(FRAME_BYTES_MAX) + 1 }));
}

#[test]
fn lengths_are_bounded_both_ways() {
    assert_eq!(body_length([0; 4]), Err(FrameError::Empty));
    assert_eq!(body_length(1_u32.to_le_bytes()), Ok(1));
    assert_eq!(body_length(FRAME_BYTES_MAX.to_le_bytes()), Ok(FRAME_BYTES_MAX as usize));
    assert_eq!(body_length([0xff; 4]), Err(FrameError::TooLong { length: u64::from(u32::MAX) }));
}

#[test]
fn a_claimed_length_costs_nothing() {
    // A vector of 2^60 words, claimed in a body of a few bytes.
    let mut body = vec![7];
    body.extend([0xff; 8]);
    body.push(0x0f);
    assert_eq!(decode::<ToGuest>(&body), Err(FrameError::Malformed));
}

#[test]
fn what_is_refused_leaves_earlier_frames_whole() {
    let mut bytes = Vec::new();
    encode_to(&ToGuest::Hello { version: VERSION }, &mut bytes).unwrap();
    let before = bytes.clone();
    assert!(encode_to(&stdin_with_body(FRAME_BYTES_MAX + 1), &mut bytes).is_err());
    assert_eq!(bytes, before);
}

#[test]
fn the_bytes_of_the_protocol_do_not_change() {
    // Both sides of a running guest were built at different times: these are what versions 1 to 3 look like.
    let network = ToGuest::Network(vec![NetworkInterface {
        mac: [1, 2, 3, 4, 5, 6],
        mtu: 300,
        addresses: vec![Address::V4([10, 0, 0, 1], 32)],
        gateways: vec![Gateway { address: GatewayAddress::V4([169, 254, 1, 1]), mac: [6, 5, 4, 3, 2, 1] }],
    }]);
    let network_bytes: &[u8] =
        &[29, 0, 0, 0, 12, 1, 1, 2, 3, 4, 5, 6, 0xac, 2, 1, 0, 10, 0, 0, 1, 32, 1, 0, 169, 254, 1, 1, 6, 5, 4, 3, 2, 1];
    let hardware = ToGuest::Hardware(vec![HardwareAddress { from: [1, 2, 3, 4, 5, 6], to: [6, 5, 4, 3, 2, 1] }]);
    let join = Join {
        cluster_id: String::from("c"),
        executor_id: String::from("ex"),
        token: String::from("tok"),
        endpoint: Some(Endpoint::V4([10, 0, 0, 1], 300)),
        timeout_ms: 300,
    };
    let outside: &[u8] =
        &[20, 0, 0, 0, 15, 1, b'c', 2, b'e', b'x', 3, b't', b'o', b'k', 1, 0, 10, 0, 0, 1, 0xac, 2, 0xac, 2];
    let inside: &[u8] = &[13, 0, 0, 0, 15, 1, b'c', 2, b'e', b'x', 3, b't', b'o', b'k', 0, 0xac, 2];
    let register = FromGuest::Register(Registration {
        executor_id: String::from("ex"),
        cluster_id: String::from("c"),
        vm_id: String::from("vm"),
        generation: [9; 16],
        token: String::from("tok"),
    });
    let register_bytes: &[u8] = &[
        29, 0, 0, 0, 10, 2, b'e', b'x', 1, b'c', 2, b'v', b'm', 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 3,
        b't', b'o', b'k',
    ];
    let failure = HookFailure { name: String::from("a"), reason: String::from("b") };
    let root = ToGuest::Root { disk: String::from("d"), read_only: true };
    let cases: [(Vec<u8>, &[u8]); 23] = [
        (encode(&root).unwrap(), &[4, 0, 0, 0, 18, 1, b'd', 1]),
        (encode(&ToGuest::Secrets).unwrap(), &[1, 0, 0, 0, 19]),
        (encode(&FromGuest::Secrets(vec![String::from("k")])).unwrap(), &[4, 0, 0, 0, 12, 1, 1, b'k']),
        (encode(&hardware).unwrap(), &[14, 0, 0, 0, 13, 1, 1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1]),
        (encode(&ToGuest::RunHooks { timeout_ms: 300 }).unwrap(), &[3, 0, 0, 0, 14, 0xac, 2]),
        (encode(&ToGuest::Join(join.clone())).unwrap(), outside),
        (encode(&ToGuest::Join(Join { endpoint: None, ..join })).unwrap(), inside),
        (encode(&ToGuest::Registered { epoch: 300 }).unwrap(), &[3, 0, 0, 0, 16, 0xac, 2]),
        (encode(&ToGuest::RegistrationRefused { reason: String::from("x") }).unwrap(), &[3, 0, 0, 0, 17, 1, b'x']),
        (
            encode(&FromGuest::HooksRan(HooksRan { ran: 2, failed: vec![failure] })).unwrap(),
            &[7, 0, 0, 0, 9, 2, 1, 1, b'a', 1, b'b'],
        ),
        (encode(&register).unwrap(), register_bytes),
        (encode(&FromGuest::Joined { epoch: 7 }).unwrap(), &[2, 0, 0, 0, 11, 7]),
        (encode(&network).unwrap(), network_bytes),
        (encode(&ToGuest::Hello { version: 1 }).unwrap(), &[2, 0, 0, 0, 0, 1]),
        (encode(&ToGuest::Quiesce { timeout_ms: 300 }).unwrap(), &[3, 0, 0, 0, 2, 0xac, 2]),
        (encode(&ToGuest::Thaw).unwrap(), &[1, 0, 0, 0, 3]),
        (encode(&ToGuest::Stats).unwrap(), &[1, 0, 0, 0, 4]),
        (encode(&ToGuest::Shutdown(Shutdown::Reboot)).unwrap(), &[2, 0, 0, 0, 6, 1]),
        (encode(&ToGuest::Stdin(b"hi".to_vec())).unwrap(), &[4, 0, 0, 0, 8, 2, b'h', b'i']),
        (encode(&ToGuest::StdinClosed).unwrap(), &[1, 0, 0, 0, 9]),
        (encode(&ToGuest::Signal { number: 15 }).unwrap(), &[2, 0, 0, 0, 10, 15]),
        (encode(&FromGuest::Stdout(b"ok".to_vec())).unwrap(), &[4, 0, 0, 0, 6, 2, b'o', b'k']),
        (encode(&FromGuest::Exited(Exit::Code(3))).unwrap(), &[3, 0, 0, 0, 8, 0, 3]),
    ];
    for (bytes, expected) in cases {
        assert_eq!(bytes, expected);
    }
}
