//! Lines to and from a registrar: what is written is JSON to others, and what others write is understood or refused.

use hearth_guest_wire::Registration;
use hearth_guest_wire::registrar::{Answer, NoAnswer, read_answer, register_line};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Strings with what has to be escaped in most of them.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![any::<String>(), "[\\x00-\\x1f\"\\\\a é€😀\\x7f]{0,12}"]
}

proptest! {
    #[test]
    fn a_registration_is_one_line_of_json(texts in [text(), text(), text(), text()], generation in any::<[u8; 16]>()) {
        let [executor_id, cluster_id, vm_id, token] = texts;
        let registration = Registration { executor_id, cluster_id, vm_id, generation, token };
        let line = register_line(&registration);
        let object = line.strip_prefix(b"REGISTER ").unwrap().strip_suffix(b"\n").unwrap();
        prop_assert!(!object.contains(&b'\n'));
        let read: Value = serde_json::from_slice(object).unwrap();
        prop_assert_eq!(read, json!({
            "executor_id": registration.executor_id,
            "cluster_id": registration.cluster_id,
            "vm": registration.vm_id,
            "generation": format!("{:032x}", u128::from_be_bytes(generation)),
            "token": registration.token,
        }));
    }

    #[test]
    fn what_others_write_is_understood(epoch in any::<u64>(), reason in text(), other in text(), name in text()) {
        prop_assume!(name != "epoch" && name != "reason");
        let object = json!({ name.as_str(): other, "reason": reason, "epoch": epoch, "more": null, "part": -1.5e-7 });
        for object in [serde_json::to_string(&object).unwrap(), serde_json::to_string_pretty(&object).unwrap()] {
            let ack = read_answer(format!("ACK {object}").as_bytes());
            prop_assert_eq!(ack, Ok(Answer::Registered { epoch }));
            let refused = read_answer(format!("REFUSED {object}").as_bytes());
            prop_assert_eq!(refused, Ok(Answer::Refused { reason: reason.clone() }));
        }
    }

    #[test]
    fn garbage_is_refused_and_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in any::<prop::sample::Index>()) {
        let _ = read_answer(&bytes);
        let whole = br#"REFUSED {"a":"\u00e9\n","b":12,"reason":"no"}"#;
        prop_assert_eq!(read_answer(&whole[..cut.index(whole.len())]), Err(NoAnswer));
        let _ = read_answer(&[b"ACK ", bytes.as_slice()].concat());
        let _ = read_answer(&[br#"ACK {"epoch":"#, bytes.as_slice(), b"}"].concat());
    }
}

#[test]
fn lines_that_are_no_answers() {
    for line in [
        "",
        "ACK",
        "ACK ",
        "ACK {}",
        "ACK 7",
        "ack {\"epoch\":7}",
        "ACK {\"epoch\":\"7\"}",
        "ACK {\"epoch\":-7}",
        "ACK {\"epoch\":7.5}",
        "ACK {\"epoch\":true}",
        "ACK {\"epoch\":18446744073709551616}",
        "ACK {\"epoch\":7",
        "ACK {\"epoch\":7,}",
        "ACK {\"epoch\":7}}",
        "ACK {\"epoch\" 7}",
        "ACK {\"epoch\":7 \"x\":8}",
        "ACK {\"epoch\":7,\"x\":nothing}",
        "ACK {\"epoch\":7,\"x\":[1]}",
        "ACK {\"reason\":\"x\"}",
        "REFUSED {\"epoch\":7}",
        "REFUSED {\"reason\":7}",
        "REFUSED {\"reason\":\"\\x\"}",
        "REFUSED {\"reason\":\"\\u12\"}",
        "REFUSED {\"reason\":\"a\tb\"}",
        "HELLO {\"epoch\":7}",
    ] {
        assert_eq!(read_answer(line.as_bytes()), Err(NoAnswer), "{line}");
    }
    assert_eq!(read_answer(b"ACK {\"epoch\":1,\"epoch\":2}"), Ok(Answer::Registered { epoch: 1 }));
    let pair = Answer::Refused { reason: String::from("\u{fffd}\u{fffd}") };
    assert_eq!(read_answer(br#"REFUSED {"reason":"\ud83d\ude00"}"#), Ok(pair), "halves of a pair are not joined");
}
