//! nftables: rulesets loaded whole or not at all; elements of sets and maps as nft(8) sees them, changed all at once or
//! not at all; counters; the generation.

use std::io;
use std::net::UdpSocket;

use hearth::sys::netlink::{Batch, LinkChange, LinkRef, Netlink};
use hearth::sys::netns;
use hearth::sys::nft::{
    self, Element, ElementBatch, Family, Nft, NftError, RULESET_BYTES_MAX, RunElementsError, Table, VALUE_BYTES_MAX,
    Watch,
};

use nix::mount::{MsFlags, mount};

use crate::host::{on_own_host, run};

const HEARTH: Table<'_> = Table { family: Family::Inet, name: "hearth" };
const ARP: Table<'_> = Table { family: Family::Arp, name: "hearth" };

const RULES: &str = "
table inet hearth {
	counter spoof { }
	counter sent { }
	set own6 { type ipv6_addr; }
	set own4 { type ipv4_addr; }
	set egress4 { type ipv4_addr . inet_proto . inet_service; flags interval; }
	map inner4 { type ipv4_addr : ipv4_addr; }
	chain out {
		type filter hook output priority filter; policy accept;
		ip daddr @own4 counter name sent accept
		ip daddr . meta l4proto . th dport @egress4 counter name sent accept
		counter name spoof drop
	}
}
table arp hearth {
	set own4 { type ipv4_addr; }
}
";

fn plain(key: &[u8]) -> Element {
    Element { key: key.to_vec(), key_end: None, value: None }
}

/// UDP (17) to 10.0.0.0/8, ports from `first` to `last`, as a concatenation: its parts padded to four bytes.
fn egress(first: u16, last: u16) -> Element {
    let part = |address: [u8; 4], port: u16| {
        [address, [17, 0, 0, 0], [port.to_be_bytes(), [0; 2]].concat().try_into().unwrap()].concat()
    };
    Element { key: part([10, 0, 0, 0], first), key_end: Some(part([10, 255, 255, 255], last)), value: None }
}

fn refused(result: Result<(), RunElementsError>) -> Vec<(String, i32)> {
    match result {
        Ok(()) => Vec::new(),
        Err(RunElementsError::Refused(list)) => list.iter().map(|one| (one.to_string(), one.errno)).collect(),
        Err(RunElementsError::Netlink(error)) => panic!("{error}"),
    }
}

#[test]
fn a_ruleset_is_loaded_whole_or_not_at_all() {
    on_own_host(|| {
        nft::load(RULES).unwrap();
        let mut tables = Nft::open().unwrap().tables().unwrap();
        tables.sort();
        assert_eq!(tables, [(Family::Inet, "hearth".to_owned()), (Family::Arp, "hearth".to_owned())]);
        let before = run("nft list ruleset");
        let text = nft::list(HEARTH).unwrap();
        assert!(text.contains("set egress4") && !text.contains("arp"), "{text}");
        // The first half is right, the second is not.
        let Err(NftError::Refused(complaint)) =
            nft::load("delete table arp hearth\nadd rule inet hearth nosuch accept\n")
        else {
            panic!("refused")
        };
        assert!(complaint.contains("nosuch"), "{complaint}");
        assert_eq!(run("nft list ruleset"), before);
        // A table in the place of the one that is there, in one transaction.
        nft::load("table inet hearth\ndelete table inet hearth\ntable inet hearth {\n}\n").unwrap();
        assert!(!nft::list(HEARTH).unwrap().contains("egress4"));
        nft::load("delete table arp hearth\n").unwrap();
        let Err(NftError::Refused(complaint)) = nft::list(ARP) else { panic!("refused") };
        assert!(complaint.contains("No such file"), "{complaint}");
        // Another namespace has its own.
        let elsewhere =
            netns::in_new(|| (nft::load(RULES).is_ok(), Nft::open().unwrap().tables().unwrap().len())).unwrap();
        assert_eq!(elsewhere, (true, 2));
        assert_eq!(Nft::open().unwrap().tables().unwrap(), [(Family::Inet, "hearth".to_owned())]);
    });
}

#[test]
fn a_host_without_nft_is_told_what_to_install() {
    on_own_host(|| {
        nft::load(RULES).unwrap();
        // Nothing is found any more where programs are; seen by this test only.
        for directory in ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"] {
            if std::path::Path::new(directory).is_dir() {
                hide(directory);
            }
        }
        let error = nft::load(RULES).unwrap_err();
        assert!(matches!(error, NftError::Missing), "{error:?}");
        assert!(error.to_string().contains("install nftables"), "{error}");
        // What needs no program goes on.
        assert_eq!(Nft::open().unwrap().tables().unwrap().len(), 2);
    });
}

fn hide(directory: &str) {
    const NONE: Option<&str> = None;
    mount(Some("none"), directory, Some("tmpfs"), MsFlags::empty(), NONE).unwrap();
}

#[test]
fn a_ruleset_may_be_long_but_not_endless() {
    on_own_host(|| {
        let mut rules = String::from("table inet t {\n set s {\n type ipv4_addr;\n elements = {\n");
        (0..20_000_u32).for_each(|n| rules += &format!("{},\n", std::net::Ipv4Addr::from(0x0a00_0000 + n)));
        rules += "}\n}\n}\n";
        nft::load(&rules).unwrap();
        let table = Table { family: Family::Inet, name: "t" };
        assert!(nft::list(table).unwrap().contains("10.0.78.31"));
        assert_eq!(Nft::open().unwrap().elements(table, "s").unwrap().len(), 20_000);
        assert!(matches!(nft::load(&" ".repeat(RULESET_BYTES_MAX + 1)), Err(NftError::TooLong)));
    });
}

#[test]
fn elements_are_as_nft_sees_them() {
    on_own_host(|| {
        nft::load(RULES).unwrap();
        let mut kernel = Nft::open().unwrap();
        let own6 = plain(&"fd3c:91aa:7e2:3:0:205:0:5".parse::<std::net::Ipv6Addr>().unwrap().octets());
        let own4 = plain(&[10, 3, 129, 69]);
        let inner = Element { value: Some(vec![169, 254, 7, 2]), ..own4.clone() };
        let ranges = [egress(53, 53), egress(1000, 2000)];
        let mut batch = ElementBatch::new();
        batch.add(HEARTH, "own6", &own6).add(HEARTH, "own4", &own4).add(ARP, "own4", &own4);
        batch.add(HEARTH, "inner4", &inner).add(HEARTH, "egress4", &ranges[0]).add(HEARTH, "egress4", &ranges[1]);
        for _ in 0..2 {
            kernel.run(&batch).unwrap();
            for (table, set, expected) in
                [(HEARTH, "own6", &own6), (HEARTH, "own4", &own4), (ARP, "own4", &own4), (HEARTH, "inner4", &inner)]
            {
                assert_eq!(kernel.elements(table, set).unwrap(), std::slice::from_ref(expected), "{set}");
            }
            let mut found = kernel.elements(HEARTH, "egress4").unwrap();
            found.sort();
            assert_eq!(found, ranges);
        }
        let text = nft::list(HEARTH).unwrap();
        for shown in [
            "fd3c:91aa:7e2:3:0:205:0:5",
            "10.3.129.69 : 169.254.7.2",
            "10.0.0.0/8 . udp . 53",
            "10.0.0.0/8 . udp . 1000-2000",
        ] {
            assert!(text.contains(shown), "{shown} in {text}");
        }
        let mut batch = ElementBatch::new();
        batch.delete(HEARTH, "own6", &own6).delete(HEARTH, "egress4", &ranges[0]).delete(HEARTH, "inner4", &inner);
        kernel.run(&batch).unwrap();
        assert_eq!(kernel.elements(HEARTH, "own6").unwrap(), []);
        assert_eq!(kernel.elements(HEARTH, "inner4").unwrap(), []);
        assert_eq!(kernel.elements(HEARTH, "egress4").unwrap(), ranges[1..]);
        assert_eq!(kernel.elements(HEARTH, "own4").unwrap(), [own4]);
        let error = kernel.elements(HEARTH, "nosuch").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    });
}

#[test]
fn a_batch_with_one_refusal_changes_nothing_and_names_every_refusal() {
    on_own_host(|| {
        nft::load(RULES).unwrap();
        let mut kernel = Nft::open().unwrap();
        let (one, other) = (plain(&[10, 0, 0, 1]), plain(&[10, 0, 0, 2]));
        let generation = kernel.generation().unwrap();
        let mut batch = ElementBatch::new();
        batch.add(HEARTH, "own4", &one).add(HEARTH, "nosuch", &one).delete(HEARTH, "own4", &other);
        let nowhere = Table { family: Family::Inet, name: "nosuch" };
        batch.add(nowhere, "own4", &one).add(HEARTH, "own4", &other);
        assert_eq!(
            refused(kernel.run(&batch)),
            [
                ("add to set nosuch of table inet hearth: no such set or table".to_owned(), libc::ENOENT),
                ("delete from set own4 of table inet hearth: no such element, set or table".to_owned(), libc::ENOENT),
                ("add to set own4 of table inet nosuch: no such set or table".to_owned(), libc::ENOENT),
            ]
        );
        assert_eq!(kernel.elements(HEARTH, "own4").unwrap(), []);
        assert_eq!(kernel.generation().unwrap(), generation);

        let long = plain(&[1; VALUE_BYTES_MAX + 1]);
        let mut batch = ElementBatch::new();
        batch.add(HEARTH, "own4", &one).add(HEARTH, "own6", &long);
        let all = refused(kernel.run(&batch));
        assert_eq!(all.len(), 1);
        assert!(all[0].0.contains("own6") && all[0].1 == libc::EINVAL, "{all:?}");
        let short = plain(&[1]);
        let mut batch = ElementBatch::new();
        batch.add(HEARTH, "own4", &short);
        assert_eq!(refused(kernel.run(&batch)).len(), 1);

        // A map keeps the value it has.
        let value = |last| Element { value: Some(vec![169, 254, 7, last]), ..one.clone() };
        let (first, second) = (value(1), value(2));
        let add = |element| {
            let mut batch = ElementBatch::new();
            batch.add(HEARTH, "inner4", element);
            batch
        };
        kernel.run(&add(&first)).unwrap();
        assert_eq!(refused(kernel.run(&add(&second)))[0].1, libc::EEXIST);
        assert_eq!(kernel.elements(HEARTH, "inner4").unwrap(), [first]);
        // Cleared and filled again at once, it has the new one.
        let mut batch = ElementBatch::new();
        batch.clear(HEARTH, "inner4").add(HEARTH, "inner4", &second);
        kernel.run(&batch).unwrap();
        kernel.run(&batch).unwrap();
        assert_eq!(kernel.elements(HEARTH, "inner4").unwrap(), [second]);
        kernel.run(&ElementBatch::new()).unwrap();
    });
}

#[test]
fn thousands_of_elements_are_one_transaction() {
    on_own_host(|| {
        nft::load(RULES).unwrap();
        let mut kernel = Nft::open().unwrap();
        let all: Vec<Element> = (0..8192_u32).map(|n| plain(&(0x0a00_0000 + n).to_be_bytes())).collect();
        let before = kernel.generation().unwrap();
        let mut batch = ElementBatch::new();
        batch.clear(HEARTH, "own4");
        all.iter().for_each(|element| {
            batch.add(HEARTH, "own4", element);
        });
        kernel.run(&batch).unwrap();
        assert_eq!(kernel.generation().unwrap(), before + 1);
        // Read while the kernel is still making the table of the set larger.
        assert!(kernel.elements(HEARTH, "own4").unwrap() == all, "a listing of other elements than were added");
    });
}

#[test]
fn counters_count_packets() {
    on_own_host(|| {
        nft::load(RULES).unwrap();
        let (mut kernel, mut netlink) = (Nft::open().unwrap(), Netlink::open().unwrap());
        let mut up = Batch::new();
        up.set_link(LinkRef::Name("lo"), LinkChange { up: Some(true), ..LinkChange::default() });
        netlink.run(&up).unwrap();
        let own = plain(&[127, 0, 0, 1]);
        let mut batch = ElementBatch::new();
        batch.add(HEARTH, "own4", &own);
        kernel.run(&batch).unwrap();

        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(&[0; 72], "127.0.0.1:9").unwrap();
        let refused = socket.send_to(&[0; 12], "127.0.0.2:9").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        let counted = |kernel: &mut Nft, name: &str| {
            let counters = kernel.counters(HEARTH).unwrap();
            assert_eq!(counters.len(), 2);
            let counter = counters.into_iter().find(|counter| counter.name == name).unwrap();
            (counter.packets, counter.bytes)
        };
        // The second one was told by ICMP that nobody listens: one packet more.
        assert_eq!(counted(&mut kernel, "spoof"), (1, 40));
        assert_eq!(counted(&mut kernel, "sent"), (2, 100 + 128));
        assert_eq!(kernel.counters(ARP).unwrap(), []);
        assert_eq!(kernel.counters(Table { family: Family::Inet, name: "nosuch" }).unwrap(), []);
    });
}

#[test]
fn every_change_makes_a_generation_and_a_notice() {
    on_own_host(|| {
        let (mut kernel, watch) = (Nft::open().unwrap(), Watch::rules().unwrap());
        let mut last = kernel.generation().unwrap();
        let one = plain(&[10, 0, 0, 1]);
        let mut add = ElementBatch::new();
        add.add(HEARTH, "own4", &one);
        let changes: [&dyn Fn(&mut Nft); 3] =
            [&|_| nft::load(RULES).unwrap(), &|kernel| kernel.run(&add).unwrap(), &|_| {
                drop(run("nft flush chain inet hearth out"))
            }];
        assert!(!watch.drain().unwrap());
        for (number, change) in changes.iter().enumerate() {
            change(&mut kernel);
            let generation = kernel.generation().unwrap();
            assert_ne!(generation, last, "change {number}");
            assert!(watch.drain().unwrap(), "change {number}");
            assert!(!watch.drain().unwrap());
            last = generation;
        }
        assert_eq!(kernel.generation().unwrap(), last);
    });
}
