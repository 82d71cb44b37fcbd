//! Frames of each kind: marked, and forged as they say.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;
use crate::frames::ethertype;

fn scene() -> Scene {
    let party = |last| Party {
        v4: Some(Ipv4Addr::new(10, 3, 129, last)),
        v6: Ipv6Addr::new(0xfd3c, 0x91aa, 0x7e2, 3, 0, 0x205, 0, last.into()),
    };
    Scene {
        mac: [2, 0, 0, 0, 0, 1],
        gateway_mac: [2, 0, 0, 0, 0, 2],
        own: party(5),
        other: party(6),
        victim: party(7),
        marker: String::from("mark-0123456789"),
    }
}

fn contains(frame: &[u8], text: &str) -> bool {
    frame.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn every_frame_with_room_for_it_carries_marker_and_kind() {
    let scene = scene();
    for kind in Kind::FORGED {
        let text = format!("{}:{};", scene.marker, kind.name());
        let frames = frames(kind, &scene);
        assert!(frames.len() >= 2, "{kind:?}");
        for (number, frame) in frames.iter().enumerate() {
            // A whole header and a whole marker fit.
            let room = frame.len() >= 14 + 40 + text.len();
            assert!(contains(frame, &text) || (kind == Kind::Runt && !room), "{kind:?} {number}: {frame:02x?}");
            assert!(frame.len() <= 1514, "{kind:?} {number}: {} bytes", frame.len());
        }
    }
}

#[test]
fn only_frames_of_their_kind_have_another_source_than_the_interfaces() {
    let scene = scene();
    for kind in Kind::FORGED {
        for frame in frames(kind, &scene) {
            assert_eq!(frame[6..12] == scene.mac, kind != Kind::Mac, "{kind:?}");
        }
    }
}

#[test]
fn without_ipv4_no_frame_has_any() {
    let mut scene = scene();
    for party in [&mut scene.own, &mut scene.other, &mut scene.victim] {
        party.v4 = None;
    }
    for kind in Kind::FORGED {
        let of_v4 = |frame: &Vec<u8>| frame[12..14] == [8, 0] && frame.len() > 14 && frame[14] >> 4 == 4;
        assert_eq!(frames(kind, &scene).iter().filter(|frame| of_v4(frame)).count(), 0, "{kind:?}");
    }
}

#[test]
fn kinds_are_found_by_their_names() {
    for kind in Kind::FORGED {
        assert_eq!(Kind::named(kind.name()), Some(kind));
    }
    assert_eq!(Kind::named("honest"), Some(Kind::Honest));
    assert_eq!(Kind::named("nonsense"), None);
}

#[test]
fn later_fragments_have_no_first_and_first_ones_no_later() {
    let scene = scene();
    for (kind, first) in [(Kind::FragmentFirst, true), (Kind::FragmentRest, false)] {
        for frame in frames(kind, &scene) {
            let place = match u16::from_be_bytes([frame[12], frame[13]]) {
                ethertype::IPV4 => u16::from_be_bytes([frame[20], frame[21]]) & 0x1fff,
                _ => u16::from_be_bytes([frame[14 + 42], frame[14 + 43]]) >> 3,
            };
            assert_eq!(place == 0, first, "{kind:?}");
        }
    }
}
