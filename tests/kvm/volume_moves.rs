//! A guest that writes to its volume goes from host to host and back, with harm at the worst moments: exactly one goes on,
//! and what it wrote is whole.

use std::time::Duration;

use serde_json::Value;

use super::fabric::Fabric;
use super::fixture::Agent;
use super::volumes::{LOG, daemon, goes_on, mounted, signal, stop_log, until, volume};

/// How often it goes.
const MIGRATIONS: usize = 20;

/// Milliseconds after the begin of a migration at which its source's VMM is stopped: while pages are sent, at the decision
/// and after it, wherever these fall.
const STOPPED_AFTER_MS: [u64; 6] = [0, 40, 80, 120, 200, 350];

pub(crate) fn lose_nothing_whatever_becomes_of_lease_and_source(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    let a = fabric.agent(0);
    a.ok(&["volume", "create", "--name", "data", "--size", "64"]);
    a.ok(&["session", "create", "--id", "517"]);
    a.ok(&["vm", "launch", "--name", "one", "--session", "517", "--volume", "data"]);
    a.sh("one", "mke2fs -q /dev/vda 2>/dev/null || mke2fs /dev/vda >/dev/null");
    mounted(a, "one", "vda", "");
    a.sh("one", LOG);
    let mut moved = Moved { fabric: &fabric, at: 0, gone: 0, lines: 0 };
    let mut moments = STOPPED_AFTER_MS.into_iter();
    for number in 0..MIGRATIONS {
        match number {
            3 => {
                moved.goes();
                moved.daemons_are_killed();
            }
            7 | 12 => moved.goes_while_the_lease_service_is_frozen(),
            9 | 14 => moved.stays_without_its_standby_lease(),
            5 | 6 | 10 | 11 | 16 | 17 => moved.goes_while_its_source_is_stopped(moments.next().expect("a moment")),
            _ => moved.goes(),
        }
        moved.one_goes_on();
    }
    while moved.gone < MIGRATIONS || moved.at != 0 {
        moved.goes();
        moved.one_goes_on();
    }
    let leases = a.json(&["volume", "leases", "data"]);
    let epoch = leases["epoch"].as_u64().expect("an epoch");
    // Each that went took an epoch, after the launch's.
    assert!(epoch > moved.gone as u64, "{epoch} epochs, {} migrations", moved.gone);
    let lines = stop_log(a, "one");
    println!("    {} migrations, {epoch} epochs; {lines} lines of it, all whole", moved.gone);
    a.ok(&["vm", "rm", "one"]);
    assert_eq!(volume(a, "data")["active"], Value::Null, "its lease was given back");
    fabric.finish();
}

/// The guest on its way.
struct Moved<'a> {
    fabric: &'a Fabric,
    /// The host that it is on: 0, where the volume is, or 1.
    at: usize,
    /// How often it went to another.
    gone: usize,
    /// The last line of its file when that was looked at.
    lines: u64,
}

impl Moved<'_> {
    fn here(&self) -> &Agent {
        self.fabric.agent(self.at)
    }

    fn there(&self) -> &Agent {
        self.fabric.agent(1 - self.at)
    }

    /// Goes to the other host.
    fn goes(&mut self) {
        self.here().ok(&["vm", "migrate", "one", "--to", self.fabric.name(1 - self.at)]);
        self.at = 1 - self.at;
        self.gone += 1;
    }

    /// Begins to go; gives the id of the migration.
    fn begins(&self, more: &[&str]) -> String {
        let words = ["vm", "migrate", "one", "--to", self.fabric.name(1 - self.at), "--no-wait"];
        let begun = self.here().json(&[words.as_slice(), more].concat());
        begun["migration_id"].as_str().expect("an id").to_owned()
    }

    /// Waits until the migration is over, and it runs in one place.
    fn comes_to_rest(&mut self, migration: &str) {
        let source = self.here();
        until("at rest", || {
            is_over(&source.json(&["migration", "show", migration])) && runs(self.here()) != runs(self.there())
        });
        if runs(self.there()) {
            self.at = 1 - self.at;
            self.gone += 1;
        }
    }

    /// It runs here, only here, by the one lease that allows to write; it writes, and lost no line.
    fn one_goes_on(&mut self) {
        let lines = goes_on(self.here(), "one");
        assert!(!runs(self.there()), "it runs in two places");
        let leases = self.fabric.agent(0).json(&["volume", "leases", "data"]);
        let (host, mode) = (&leases["leases"][0]["host"], &leases["leases"][0]["mode"]);
        assert_eq!((host, mode), (&Value::from(3 + self.at), &Value::from("active")), "{leases:#}");
        assert!(lines > self.lines, "{lines} lines after {}", self.lines);
        self.lines = lines;
    }

    /// The daemon that has the volume, and the one between it and the guest.
    fn daemons_are_killed(&self) {
        for host in [0, 1] {
            signal(daemon(self.fabric.agent(host)), "-KILL");
            goes_on(self.here(), "one");
        }
    }

    /// The lease service answers nothing at the moment of decision: the guest stands still until it does, and then runs
    /// once.
    fn goes_while_the_lease_service_is_frozen(&mut self) {
        let frozen = daemon(self.fabric.agent(0));
        // Slowly, or the decision may be made before anybody sees that the target stands by. After that there is nothing
        // else to ask before the decision.
        let migration = self.begins(&["--rate", "4M"]);
        until("standing by", || volume(self.fabric.agent(0), "data")["standby"] != Value::Null);
        signal(frozen, "-STOP");
        // Longer than sending takes, and anybody waits for an answer then.
        std::thread::sleep(Duration::from_secs(12));
        let run = (runs(self.here()), runs(self.there()));
        signal(frozen, "-CONT");
        assert!(run != (true, true), "it runs in two places");
        self.comes_to_rest(&migration);
    }

    /// Whoever takes the standby lease away has the VM stay.
    fn stays_without_its_standby_lease(&mut self) {
        let migration = self.begins(&["--rate", "4M"]);
        let home = self.fabric.agent(0);
        until("standing by", || volume(home, "data")["standby"] != Value::Null);
        let standby = volume(home, "data")["standby"]["id"].as_str().expect("a lease").to_owned();
        home.ok(&["volume", "release", "data", &standby]);
        let gone = self.gone;
        self.comes_to_rest(&migration);
        assert_eq!((self.gone, &volume(home, "data")["standby"]), (gone, &Value::Null));
    }

    /// The VMM that it leaves stands still at some moment, and goes on two seconds later if somebody still needs it then.
    fn goes_while_its_source_is_stopped(&mut self, after_ms: u64) {
        let source = self.here().vmm_pid("one");
        let migration = self.begins(&[]);
        std::thread::sleep(Duration::from_millis(after_ms));
        let send = |signal| {
            let pid = nix::unistd::Pid::from_raw(source.cast_signed());
            nix::sys::signal::kill(pid, signal).is_ok()
        };
        let was_there = send(nix::sys::signal::Signal::SIGSTOP);
        std::thread::sleep(Duration::from_secs(2));
        let is_there = send(nix::sys::signal::Signal::SIGCONT);
        self.comes_to_rest(&migration);
        println!(
            "    stopped after {after_ms} ms ({}), {}; it runs on host {}",
            if was_there { "it was there" } else { "it was gone" },
            if is_there { "continued" } else { "ended meanwhile" },
            self.at
        );
    }
}

fn runs(agent: &Agent) -> bool {
    let shown = agent.run(&["--json", "vm", "show", "one"]);
    serde_json::from_slice::<Value>(&shown.stdout).is_ok_and(|vm| vm["state"] == "running")
}

fn is_over(migration: &Value) -> bool {
    ["completed", "failed", "cancelled"].iter().any(|state| migration["state"] == *state)
}
