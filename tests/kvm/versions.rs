//! Migrations whose pages are compressed, and hosts of two versions, which cannot compress for each other: a fabric is
//! upgraded host by host, and VMs go from one to the other meanwhile.

use serde_json::Value;

use super::fabric::Fabric;
use super::fixture::{Agent, need};

/// Something only its memory holds, and pages that are neither zero nor noise.
const FILL: &str = "cd /tmp; head -c 16 /dev/urandom | md5sum > nonce
l='one line is like the other, and no page is empty. '; while [ ${#l} -lt 65536 ]; do l=$l$l; done; echo $l > buffer
for i in 1 2 3 4 5 6; do cat buffer buffer > next; mv next buffer; done; md5sum buffer > sum";

/// What of it has to stay as it is; its buffer is looked through.
fn held(agent: &Agent) -> String {
    agent.sh("mover", "cd /tmp; cat nonce /proc/sys/kernel/random/boot_id; md5sum -c sum")
}

/// Moves it; what is said, and the migration as its source has it.
fn migrate(fabric: &Fabric, from: usize, to: usize, more: &[&str]) -> (String, Value) {
    let agent = fabric.agent(from);
    let said = agent.ok(&[&["vm", "migrate", "mover", "--to", fabric.name(to)], more].concat());
    assert_eq!(fabric.agent(to).vm("mover")["state"], "running");
    let migration = agent.json(&["migration", "ls"])["migrations"][0].clone();
    println!("    {}", said.trim());
    assert_eq!((&migration["state"], &migration["direction"]), (&"completed".into(), &"out".into()), "{migration:#}");
    (said, migration)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

pub(crate) fn compressed_sends_less_and_loses_nothing(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    let (a, b) = (fabric.agent(0), fabric.agent(1));
    a.launch("mover", &["--memory", "128"]);
    a.sh("mover", FILL);
    let before = held(a);
    let (said, plain) = migrate(&fabric, 0, 1, &[]);
    assert!(!said.contains("compressed"), "{said}");
    let moved = &plain["moved"];
    assert_eq!(
        (&plain["compress"], &moved["compress"], &moved["packed_pages"]),
        (&"none".into(), &"none".into(), &0.into())
    );
    assert_eq!(held(b), before);
    let estimate = b.json(&["vm", "migrate", "mover", "--to", fabric.name(0), "--compress", "lz4", "--estimate"]);
    assert_eq!((&estimate["compress"], &estimate["uncompressed"]), (&"lz4".into(), &Value::Null), "{estimate:#}");
    for (from, to, more) in [(1, 0, &["--compress", "lz4"][..]), (0, 1, &["--compress", "lz4", "--connections", "3"])] {
        let (said, packed) = migrate(&fabric, from, to, more);
        assert!(said.contains("compressed: "), "{said}");
        let now = &packed["moved"];
        assert_eq!(
            (&packed["compress"], &now["compress"], &now["uncompressed"]),
            (&"lz4".into(), &"lz4".into(), &Value::Null)
        );
        let (packed_pages, packed_bytes) = (number(&now["packed_pages"]), number(&now["packed_bytes"]));
        // The buffer has more than 1024 pages.
        assert!(packed_pages > 1024 && packed_pages <= number(&now["pages"]), "{now:#}");
        assert!(packed_bytes < packed_pages * 4096 && packed_bytes < number(&now["bytes"]), "{now:#}");
        assert!(number(&now["bytes"]) * 2 < number(&moved["bytes"]), "{now:#}\nwithout: {moved:#}");
        assert_eq!(held(fabric.agent(to)), before);
    }
    let shown =
        a.ok(&["migration", "show", a.json(&["migration", "ls"])["migrations"][0]["id"].as_str().expect("an id")]);
    assert!(shown.contains("compressed"), "{shown}");
    fabric.finish();
}

pub(crate) fn two_versions_work_both_ways(_shared: &Agent) {
    let fabric = Fabric::start_by("routed", [None, Some(need("HEARTH_PREVIOUS")), None]);
    let (new, old) = (fabric.agent(0), fabric.agent(1));
    new.launch("mover", &["--memory", "128"]);
    new.sh("mover", FILL);
    let before = held(new);
    let lz4 = ["--compress", "lz4"];
    let to_old = ["vm", "migrate", "mover", "--to", fabric.name(1), "--compress", "lz4", "--estimate"];
    let estimate = new.json(&to_old);
    assert_eq!(
        (&estimate["compress"], &estimate["uncompressed"]),
        (&"none".into(), &"older_host".into()),
        "{estimate:#}"
    );
    assert!(new.ok(&to_old).contains("earlier version"));
    for round in 0..2 {
        let (said, there) = migrate(&fabric, 0, 1, &lz4);
        assert!(said.contains("earlier version"), "it says that it was not compressed: {said}");
        let moved = &there["moved"];
        assert_eq!((&there["compress"], &moved["compress"]), (&"lz4".into(), &"none".into()), "{moved:#}");
        assert_eq!((&moved["uncompressed"], &moved["packed_pages"]), (&"older_host".into(), &0.into()), "{moved:#}");
        assert_eq!(held(old), before, "round {round}");
        if round == 0 {
            // An agent of before does not know the word, and says so.
            assert!(
                !old.run(&["vm", "migrate", "mover", "--to", fabric.name(0), "--compress", "lz4"]).status.success()
            );
            migrate(&fabric, 1, 0, &[]);
            assert_eq!(held(new), before, "round {round}");
        }
    }
    // Its host is upgraded: the agent could, its process cannot before it is renewed.
    old.upgrade();
    let (said, there) = migrate(&fabric, 1, 2, &lz4);
    assert!(said.contains("hand-over"), "{said}");
    assert_eq!(there["moved"]["uncompressed"], "older_vmm", "{there:#}");
    assert_eq!(held(fabric.agent(2)), before);
    let (_, back) = migrate(&fabric, 2, 1, &lz4);
    assert_eq!((&back["moved"]["compress"], &back["moved"]["uncompressed"]), (&"lz4".into(), &Value::Null), "{back:#}");
    assert_eq!(held(old), before);
    fabric.finish();
}
