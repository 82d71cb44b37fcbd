//! Who a guest is: names, randomness, files, interfaces; and being somebody else later, as a clone of a bundle is.

use hearth_guest_wire::{Address, FromGuest, Identity, Interface, ToGuest};

use super::agent::{Agent, Host, identity};

fn with_interfaces(hostname: &str, interfaces: Vec<Interface>) -> ToGuest {
    ToGuest::Identity(Identity { interfaces, ..identity(hostname, 1) })
}

fn become_somebody(host: &mut Host, hostname: &str, generation: u8) {
    host.has_done(&ToGuest::Identity(identity(hostname, generation)));
}

#[test]
fn an_identity_is_applied_and_another_replaces_it() {
    let Some(agent) = Agent::start_guest() else { return };
    agent.must(
        "ip link add eth0 address 02:00:00:00:00:01 type veth peer name far && ip link set far up \
         && ip link add eth1 address 02:00:00:00:00:02 type veth peer name away",
    );
    let mut host = agent.greeted();
    let first = vec![
        Interface {
            mac: [2, 0, 0, 0, 0, 1],
            addresses: vec![
                Address::V4([10, 9, 8, 7], 24),
                Address::V6([0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5], 64),
            ],
            mtu: 1400,
        },
        Interface { mac: [2, 0, 0, 0, 0, 2], addresses: vec![Address::V4([10, 1, 1, 1], 32)], mtu: 0 },
    ];
    // Twice: the second time nothing is left to change.
    for _ in 0..2 {
        host.has_done(&with_interfaces("first-name", first.clone()));
        let seen = agent.must("hostname; ip -o addr show eth0; ip -o addr show eth1; ip -o link show eth0");
        assert!(seen.starts_with("first-name\n"), "{seen}");
        for part in ["10.9.8.7/24 brd 10.9.8.255", "fd00:1::5/64 scope global nodad", "10.1.1.1/32", "mtu 1400", ",UP"]
        {
            assert!(seen.contains(part), "{part} in {seen}");
        }
    }

    let second =
        vec![Interface { mac: [2, 0, 0, 0, 0, 1], addresses: vec![Address::V4([10, 9, 8, 9], 24)], mtu: 1400 }];
    host.has_done(&with_interfaces("second-name", second));
    let seen = agent.must("hostname; ip -o addr show eth0");
    assert!(seen.starts_with("second-name\n") && seen.contains("10.9.8.9/24"), "{seen}");
    assert!(!seen.contains("10.9.8.7") && !seen.contains("fd00:1::5") && seen.contains("fe80:"), "{seen}");

    let unknown = vec![Interface { mac: [2, 0, 0, 0, 0, 9], addresses: Vec::new(), mtu: 0 }];
    let (errno, what) = host.has_failed(&with_interfaces("third-name", unknown));
    assert_eq!((errno, what.as_str()), (19, "no interface is 02:00:00:00:00:09"));
    host.has_done(&ToGuest::Thaw);
}

#[test]
fn programs_read_who_the_guest_is() {
    let Some(agent) = Agent::start_guest() else { return };
    let mut host = agent.greeted();
    let look = "cat /etc/machine-id /run/hearth/identity.json; ls -A /run/hearth; stat -c %a /etc/machine-id";
    for (hostname, generation) in [("one", 0x1a), ("one", 0x1a), ("two \"quoted\"", 0x2b)] {
        become_somebody(&mut host, hostname, generation);
        let id = format!("{generation:02x}").repeat(16);
        let quoted = hostname.replace('"', "\\\"");
        let record = format!("{{\"vm_id\":\"vm-test\",\"hostname\":\"{quoted}\",\"generation\":\"{id}\"}}");
        assert_eq!(agent.must(look), format!("{id}\n{record}\nidentity.json\n644\n"));
    }
    // No generation is no reason to take a machine its id.
    become_somebody(&mut host, "three", 0);
    assert_eq!(agent.must("cat /etc/machine-id"), format!("{}\n", "2b".repeat(16)));
}

#[test]
fn a_reader_of_the_record_sees_a_whole_one() {
    let Some(agent) = Agent::start_guest() else { return };
    let mut host = agent.greeted();
    become_somebody(&mut host, "one", 1);
    // The file that was open keeps its content: another took its place.
    let script = "exec 3</run/hearth/identity.json; echo open; read line; cat <&3";
    let (mut reader, _) = agent.exec(super::agent::shell(script));
    assert_eq!(reader.hear(), FromGuest::Stdout(b"open\n".to_vec()));
    become_somebody(&mut host, "two", 2);
    reader.say(&ToGuest::Stdin(b"\n".to_vec()));
    assert!(reader.outcome().text().contains("\"one\""));
    assert!(agent.must("cat /run/hearth/identity.json").contains("\"two\""));
}

#[test]
fn an_image_that_cannot_be_written_to_has_a_machine_id_of_its_launch() {
    let read_only = "echo uninitialized > /etc/machine-id && mount -o remount,ro /etc &&";
    let Some(agent) = Agent::start_guest_by(&["--uts", "--mount"], read_only) else { return };
    let mut host = agent.greeted();
    for generation in [0x1a, 0x2b] {
        become_somebody(&mut host, "name", generation);
        assert_eq!(agent.must("cat /etc/machine-id"), format!("{}\n", format!("{generation:02x}").repeat(16)));
    }
    assert_eq!(agent.must("grep -c ' /etc/machine-id ' /proc/self/mounts"), "1\n", "mounted once");

    // One that has none keeps to that.
    let Some(agent) = Agent::start_guest_by(&["--uts", "--mount"], "mount -o remount,ro /etc &&") else { return };
    become_somebody(&mut agent.greeted(), "name", 0x1a);
    assert_eq!(agent.must("ls /etc"), "");
}
