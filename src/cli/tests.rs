//! Words become values or are refused.

use super::value::{duration_ms, name, seconds, session_number, variable};
use super::*;
use crate::api::types::EgressProtocol;
use proptest::prelude::*;

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn durations_have_units() {
    for (text, ms) in
        [("30", 30_000), ("1.5s", 1500), ("200ms", 200), ("5m", 300_000), ("1h", 3_600_000), ("0", 0), ("0.25", 250)]
    {
        assert_eq!(duration_ms(text), Ok(ms), "{text}");
    }
    for text in ["", "s", "-1", "1.2345", "1d", "1.", ".5", "99999999h", "1 s", "4294968"] {
        assert!(duration_ms(text).is_err(), "{text}");
    }
    assert_eq!(duration_ms("4294967295ms"), Ok(u32::MAX));
    assert!(duration_ms("4294967296ms").is_err());
}

#[test]
fn names_are_dns_labels() {
    for good in ["a", "web-1", &"a".repeat(63)] {
        assert!(name(good).is_ok(), "{good}");
    }
    for bad in ["", "1a", "-a", "a-", "A", "a_b", "a.b", "ä", &"a".repeat(64)] {
        assert!(name(bad).is_err(), "{bad}");
    }
}

#[test]
fn references_cannot_leave_their_path() {
    for bad in ["", ".", "..", "a/b", "a?b", "a%2f", "a b", "a\0"] {
        assert!(bad.parse::<ReferenceWord>().is_err(), "{bad:?}");
    }
    assert_eq!("vm-abc".parse::<ReferenceWord>().unwrap().as_str(), "vm-abc");
}

#[test]
fn disks_and_variables() {
    assert_eq!("a.img:ro".parse(), Ok(DiskWord { path: "a.img".into(), read_only: true, shared: false }));
    assert_eq!("a:b.img".parse(), Ok(DiskWord { path: "a:b.img".into(), read_only: false, shared: false }));
    let both = DiskWord { path: "a.img".into(), read_only: true, shared: true };
    assert_eq!(("a.img:ro:shared".parse(), "a.img:shared:ro".parse()), (Ok(both.clone()), Ok(both)));
    assert_eq!("a:ro:ro".parse(), Ok(DiskWord { path: "a:ro".into(), read_only: true, shared: false }));
    assert!(":ro".parse::<DiskWord>().is_err() && "".parse::<DiskWord>().is_err());
    assert!(variable("A=").is_ok() && variable("A=b=c").is_ok());
    assert!(variable("A").is_err() && variable("=b").is_err());
}

#[test]
fn layouts_are_a_directory_and_perhaps_a_name() {
    let word = |directory: &str, name: Option<&str>| {
        Ok(LayoutWord { directory: directory.into(), name: name.map(str::to_owned) })
    };
    assert_eq!("dir".parse(), word("dir", None));
    assert_eq!("/a/dir:web:1.2".parse(), word("/a/dir", Some("web:1.2")));
    assert_eq!("dir:sha256:00".parse(), word("dir", Some("sha256:00")));
    for text in ["", ":", "dir:", ":web"] {
        assert!(text.parse::<LayoutWord>().is_err(), "{text}");
    }
}

#[test]
fn limits_are_a_rate_and_perhaps_a_burst() {
    for (text, per_s, burst) in [
        ("1500", 1_500, None),
        ("10M", 10_000_000, None),
        ("10M/64k", 10_000_000, Some(64_000)),
        ("0/0", 0, Some(0)),
        ("18G", 18_000_000_000, None),
    ] {
        assert_eq!(text.parse(), Ok(RateWord { per_s, burst }), "{text}");
    }
    for text in
        ["", "/", "1/", "/1", "1.5M", "-1", "1m", "1kk", "k", "1/2/3", "18446744073709551616", "18446744073709552k"]
    {
        assert!(text.parse::<RateWord>().is_err(), "{text}");
    }
}

#[test]
fn egress_words_are_networks_with_ports_and_protocols() {
    use EgressProtocol::{Any, Icmp, Tcp, Udp};
    for (text, cidr, protocol, ports) in [
        ("0.0.0.0/0", "0.0.0.0/0", Any, None),
        ("::/0", "::/0", Any, None),
        ("192.0.2.0/24:443", "192.0.2.0/24", Tcp, Some((443, 443))),
        ("2001:db8::/32:8000-8100/udp", "2001:db8::/32", Udp, Some((8000, 8100))),
        ("2001:db8::/32/icmp", "2001:db8::/32", Icmp, None),
        ("192.0.2.0/24/tcp", "192.0.2.0/24", Tcp, None),
    ] {
        let rule = text.parse::<EgressWord>().unwrap().rule();
        assert_eq!((rule.cidr.as_str(), rule.protocol, rule.ports), (cidr, protocol, ports), "{text}");
    }
    for bad in [
        "",
        "/",
        "1.2.3.4",
        "1.2.3.4/",
        "/8",
        "1.2.3.4/8:",
        "1.2.3.4/8:0",
        "1.2.3.4/8:9-5",
        "1.2.3.4/8:5-",
        "1.2.3.4/8/",
        "1.2.3.4/8/sctp",
        "1.2.3.4/8:5/icmp",
        "1.2.3.4/8:65536",
        "1.2.3.4/8/tcp/udp",
        "1.2.3.4/8:+5",
        "1.2.3.4/x:5",
    ] {
        assert!(bad.parse::<EgressWord>().is_err(), "{bad}");
    }
}

#[test]
fn session_words() {
    assert_eq!((session_number("517"), session_number("0x205")), (Ok(517), Ok(517)));
    for bad in ["", "0", "-1", "+1", "0x", "0x+1", "4294967295", "x", "1.5"] {
        assert!(session_number(bad).is_err(), "{bad}");
    }
    assert_eq!((seconds("1h"), seconds("1"), seconds("1500ms")), (Ok(3600), Ok(1), Ok(2)));
    assert!(seconds("0").is_err() && seconds("0ms").is_err() && seconds("x").is_err());
}

#[test]
fn words_after_the_dashes_are_the_commands() {
    let cli = Cli::try_parse_from(["hearth", "vm", "exec", "web", "--", "sh", "-c", "exit 3", "--json"]).unwrap();
    let Command::Client(ClientCommand::Vm(VmCommand::Exec(args))) = cli.command else { panic!("an exec") };
    assert_eq!(args.command, ["sh", "-c", "exit 3", "--json"]);
    assert!(!cli.global.json);
    assert!(Cli::try_parse_from(["hearth", "vm", "exec", "web", "uname"]).is_err());
}

#[test]
fn a_bundle_goes_to_a_file_and_comes_from_one() {
    let parse = |words: &[&str]| {
        let words = ["hearth", "bundle"].into_iter().chain(words.iter().copied());
        Cli::try_parse_from(words).map(|cli| {
            let Command::Client(ClientCommand::Bundle(command)) = cli.command else { panic!("a command of bundles") };
            command
        })
    };
    let Ok(BundleCommand::Export(args)) = parse(&["export", "web", "--output", "web.hearth"]) else { panic!() };
    assert_eq!((args.bundle.as_str(), args.output), ("web", "web.hearth".into()));
    let Ok(BundleCommand::Export(args)) = parse(&["export", "web", "-o", "-"]) else { panic!() };
    assert_eq!(args.output, std::path::Path::new("-"));
    let Ok(BundleCommand::Import(args)) = parse(&["import"]) else { panic!() };
    assert_eq!(args.file, std::path::Path::new("-"));
    let Ok(BundleCommand::Import(args)) = parse(&["import", "web.hearth"]) else { panic!() };
    assert_eq!(args.file, std::path::Path::new("web.hearth"));
    let Ok(BundleCommand::Sign(args)) = parse(&["sign", "web", "--key", "k"]) else { panic!() };
    assert_eq!((args.bundle.as_str(), args.key), ("web", "k".into()));
    assert!(matches!(parse(&["key", "--output", "k"]), Ok(BundleCommand::Key(_))));
    for wrong in [&["export"][..], &["export", "a/b"], &["import", "a", "b"], &["key"], &["sign", "web"]] {
        assert!(parse(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn global_words_go_anywhere() {
    for words in [["hearth", "--json", "vm", "ls"], ["hearth", "vm", "--json", "ls"], ["hearth", "vm", "ls", "--json"]]
    {
        assert!(Cli::try_parse_from(words).unwrap().global.json);
    }
}

#[test]
fn six_disks_and_no_more() {
    let launch = |count: usize| {
        let words = ["hearth", "vm", "launch"].into_iter().chain(std::iter::repeat_n("--disk=d", count));
        Cli::parse_checked(words)
    };
    assert!(launch(6).is_ok());
    assert!(launch(7).is_err());
}

proptest! {
    #[test]
    fn any_word_is_taken_or_refused(text in ".{0,80}") {
        let _ = duration_ms(&text);
        let _ = name(&text);
        let _ = variable(&text);
        let _ = text.parse::<ReferenceWord>();
        let _ = text.parse::<DiskWord>();
        let _ = text.parse::<EgressWord>();
        let _ = session_number(&text);
        let _ = seconds(&text);
    }
}
