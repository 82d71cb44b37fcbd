//! Proofs by number: a VM that goes from host to host many times, and what stays whole of it. How often is read from the
//! environment: `scripts/prove-migration` asks for many, `scripts/test` for a few.
//!
//! The VM sends its counter to the third host all the time. Whoever counts there sees every copy of the VM that runs: two
//! would send the same numbers, and one that was taken back to before something it did would send numbers again.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::fabric::Fabric;
use super::fixture::{Agent, need, text};
use super::migrate::migrate;
use super::probe::{self, Tool, number, parsed};

/// The session of the VM.
const SESSION: u16 = 517;

/// Where the third host counts.
const COUNTED: u16 = 7100;

/// Longest wait for everything to have come to rest: an end that hears nothing keeps still for half a
/// minute, and asks the other host every few seconds from then on.
pub(super) const REST_LIMIT: Duration = Duration::from_secs(120);

/// Where the VM counts.
const RECEIVED: u16 = 7000;

/// Datagrams in a second, the most first, until a guest that stays where it is has counted all of them in time.
const RATES: [u32; 3] = [250, 120, 60];

/// How many seconds of them, and how much longer it may take to count them.
const MEASURED_SECONDS: u32 = 6;
const BEHIND_MAX: Duration = Duration::from_secs(1);

/// The disk that both hosts see is written with a number, and read back; `drop_caches`: what is read comes from the disk.
/// The number of the last pass is renamed into its place: whoever looks sees one at any moment.
const DISK_LOAD: &str = "cd /tmp; (i=0; while [ ! -e bad ]; do i=$((i+1)); printf %065536d $i > block
dd if=block of=/dev/vda bs=64k conv=fsync; echo 1 > /proc/sys/vm/drop_caches
cmp block /dev/vda || echo bad disk in pass $i > bad
echo $i > blocks.new; mv blocks.new blocks; sleep 0.3; done) > /dev/null 2>&1 & until [ -s blocks ]; do sleep 0.1; done";

/// Bytes of that disk.
const DISK_BYTES: u64 = 65_536;

/// A size of these tests.
pub(super) fn size(name: &str, otherwise: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")),
        Err(_) => otherwise,
    }
}

/// Hosts and the VM that goes between them.
pub(super) struct Proof {
    pub(super) fabric: Fabric,
    disk: tempfile::NamedTempFile,
    buffer_mib: u64,
    /// The friend's address on the third host, and the VM's.
    friend: String,
    to: String,
    pub(super) id: String,
    /// Where the VM is.
    pub(super) here: usize,
    before: Held,
    /// The last number of its counter that came.
    counted: Option<u64>,
}

/// What the VM holds, as it was seen last.
#[derive(Debug, Default)]
struct Held {
    boot: String,
    /// Of the secret that only its memory holds, an image.
    secret: Value,
    /// How often it wrote its buffer, and its blocks.
    passes: u64,
    blocks: u64,
    uptime: f64,
}

impl Proof {
    pub(super) fn start() -> Self {
        let fabric = Fabric::start("routed");
        for host in 0..2 {
            fabric.agent(host).ok(&["session", "create", "--id", &SESSION.to_string()]);
        }
        let friend = fabric.join(2, SESSION);
        let disk = tempfile::NamedTempFile::new().expect("a file for the disk");
        disk.as_file().set_len(DISK_BYTES).expect("its size");
        let buffer_mib = size("HEARTH_PROVE_BUFFER_MIB", 2);
        let nothing = String::new();
        let (to, id) = (nothing.clone(), nothing);
        let before = Held::default();
        let mut proof = Self { fabric, disk, buffer_mib, friend, to, id, here: 0, before, counted: None };
        proof.launch();
        proof
    }

    pub(super) fn agent(&self) -> &Agent {
        self.fabric.agent(self.here)
    }

    /// Boots the VM on the first host, and starts what it does.
    pub(super) fn launch(&mut self) {
        self.here = 0;
        let agent = self.agent();
        let disk = format!("{}:shared", self.disk.path().display());
        agent.launch("mover", &["--session", &SESSION.to_string(), "--memory", "128", "--disk", &disk]);
        probe::install(agent, "mover");
        let vm = agent.vm("mover");
        let word = |value: &Value| value.as_str().expect("a word").to_owned();
        let (to, id) = (word(&vm["addresses"][0]), word(&vm["id"]));
        self.begin("serve --seconds 36000", "served");
        self.begin(&format!("rewrite --mib {} --every-ms 20 --seconds 36000", self.buffer_mib), "rewritten");
        self.begin(&format!("send udp {} {COUNTED} --rate 20 --seconds 36000", self.friend), "counter");
        self.agent().sh("mover", DISK_LOAD);
        (self.to, self.id) = (to, id);
        (self.before, self.counted) = (Held::default(), None);
        self.is_whole("after its boot");
    }

    /// Starts the tool in the VM, cut off from whoever asked for it: that one is on one host only.
    fn begin(&self, words: &str, file: &str) {
        let script = format!(
            "rm -f /tmp/{file}; setsid /tmp/probe {words} > /tmp/{file} 2>&1 < /dev/null & \
             until [ -s /tmp/{file} ]; do sleep 0.1; done"
        );
        self.agent().sh("mover", &script);
    }

    /// It answers, what it holds is as it left it, and it went on since the last time.
    pub(super) fn is_whole(&mut self, when: &str) {
        let begun = Instant::now();
        let before = &self.before;
        let now = loop {
            let now = self.held(when);
            for (was, is) in [(&before.boot.as_str().into(), &now.boot.as_str().into()), (&before.secret, &now.secret)]
            {
                assert!(before.boot.is_empty() || was == is, "{when}: {was}, then {is}");
            }
            assert!(now.uptime > before.uptime, "{when}: {before:?}, then {now:?}");
            if now.passes > before.passes && now.blocks > before.blocks {
                break now;
            }
            assert!(begun.elapsed() < REST_LIMIT, "{when}: it stands still: {before:?}, then {now:?}");
        };
        self.before = now;
        let words = format!("ask udp {} 7777 --count 20 --wait-ms 3000", self.to);
        let asked = self.on_third_host(&words).stdin(Stdio::null()).output().expect("run the tool");
        let asked = parsed(&text(&asked.stdout));
        assert!(number(&asked, "answered") > 0, "{when}: the third host asks: {asked}");
    }

    fn held(&self, when: &str) -> Held {
        let said = self.agent().sh(
            "mover",
            "cat /proc/sys/kernel/random/boot_id; cut -d' ' -f1 /proc/uptime; cat /tmp/blocks
             tail -n 1 /tmp/rewritten; cat /tmp/bad 2> /dev/null; true",
        );
        let lines: Vec<&str> = said.lines().collect();
        let [boot, uptime, blocks, rewritten] = lines[..] else { panic!("{when}: {said}") };
        let rewritten = parsed(rewritten);
        assert_eq!(rewritten["wrong"], 0, "{when}: {rewritten}");
        Held {
            boot: boot.to_owned(),
            secret: rewritten["secret"].clone(),
            passes: number(&rewritten, "passes"),
            blocks: blocks.parse().expect("a number"),
            uptime: uptime.parse().expect("seconds"),
        }
    }

    fn on_third_host(&self, words: &str) -> Command {
        let mut command = self.fabric.on(2, &need("HEARTH_PROBE"));
        command.args(words.split_whitespace());
        command
    }

    /// Counts its counter on the third host.
    pub(super) fn count(&self) -> Tool {
        Tool::start(&mut self.on_third_host(&format!("count udp {COUNTED} --seconds 36000 --while stdin")))
    }

    /// What was counted: nothing came twice, or after what is later; also not of what was counted before.
    pub(super) fn one_copy_counted(&mut self, count: Tool, when: &str) -> Value {
        let counted = count.result(true);
        for wrong in ["duplicates", "out_of_order", "untold", "corrupt", "foreign"] {
            assert_eq!(number(&counted, wrong), 0, "{when}: {wrong}: {counted}");
        }
        if number(&counted, "received") > 0 {
            let (first, last) = (number(&counted, "first"), number(&counted, "last"));
            assert!(self.counted.is_none_or(|before| before < first), "{when}: {:?}, then {counted}", self.counted);
            self.counted = Some(last);
        }
        counted
    }

    /// Sends numbered datagrams from the third host to the VM.
    fn send(&self, rate: u32, seconds: u32) -> Tool {
        let words = format!("send udp {} {RECEIVED} --rate {rate} --seconds {seconds} --while stdin", self.to);
        Tool::start(&mut self.on_third_host(&words))
    }

    /// What the VM counted of them, once it has: the last ones say how many there were. None if that takes longer.
    fn received(&self, limit: Duration) -> Option<Value> {
        let begun = Instant::now();
        loop {
            let said = parsed(&self.agent().sh("mover", "tail -n 1 /tmp/received"));
            if said.get("received").is_some() {
                return Some(said);
            }
            if begun.elapsed() > limit {
                return None;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The most datagrams in a second that it counts while it stays where it is, beside everything else it does.
    fn rate_without_loss(&self) -> u32 {
        for rate in RATES {
            self.begin(&format!("count udp {RECEIVED} --seconds 3600"), "received");
            let sent = self.send(rate, MEASURED_SECONDS).result(false);
            let received = self.received(BEHIND_MAX);
            let is_all = received.as_ref().is_some_and(|received| received["received"] == sent["sent"]);
            println!("    {rate} in a second, where it is: {}", if is_all { "all counted" } else { "too many" });
            if is_all {
                return rate;
            }
            self.agent().sh(
                "mover",
                "for pid in $(pidof probe); do grep -q count /proc/$pid/cmdline && kill -9 $pid; done; true",
            );
        }
        panic!("it does not keep up with any of {RATES:?} where it is");
    }

    /// Every frame of a stream of a thousand in a second enters its ring once and in order, on many ways: its kernel
    /// takes them as they come, it is the program that reads them that needs longer.
    fn thousand_in_a_second(&mut self, ways: u64) {
        self.begin(&format!("count udp {RECEIVED} --seconds 3600"), "received");
        let sending = self.send(1000, 3600);
        for _ in 0..ways {
            let to = 1 - self.here;
            migrate(&self.fabric, self.here, to);
            self.here = to;
        }
        let sent = sending.result(true);
        let received = self.received(REST_LIMIT).expect("it counts to the end");
        println!("    a thousand in a second on {ways} ways: sent {sent}\n    received {received}");
        assert_eq!((&received["received"], number(&sent, "unsent")), (&sent["sent"], 0), "{received}");
        for wrong in ["lost", "duplicates", "out_of_order", "corrupt", "foreign"] {
            assert_eq!(number(&received, wrong), 0, "{wrong}: {received}");
        }
    }

    /// Waits until its home has seen that it is gone where it was handed to.
    pub(super) fn is_forgotten(&self, when: &str) {
        let begun = Instant::now();
        while [0, 1].iter().any(|host| !self.vm_of(*host).is_null()) {
            assert!(begun.elapsed() < REST_LIMIT, "{when}: it is known still");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The VM as a host has it, if it does.
    pub(super) fn vm_of(&self, host: usize) -> Value {
        let list = self.fabric.agent(host).json(&["vm", "ls"]);
        let all = list["vms"].as_array().expect("a list");
        all.iter().find(|vm| vm["id"] == self.id.as_str()).cloned().unwrap_or(Value::Null)
    }

    pub(super) fn finish(self) {
        self.agent().ok(&["vm", "rm", "mover", "--timeout", "0"]);
        self.is_forgotten("at the end");
        self.fabric.finish();
    }
}

pub(crate) fn many_migrations_lose_nothing(_shared: &Agent) {
    let count = size("HEARTH_PROVE_MIGRATIONS", 4);
    let mut proof = Proof::start();
    let counter = proof.count();
    // From the third host, on one connection, all the time.
    let talk = format!("ask stream {} 7777 --count 60000 --every-ms 50 --wait-ms 25000 --while stdin", proof.to);
    let talk = Tool::start(&mut proof.on_third_host(&talk));
    let rate = proof.rate_without_loss() / 2;
    proof.begin(&format!("count udp {RECEIVED} --seconds 36000"), "received");
    let sending = proof.send(rate, 36000);
    let (mut pauses, mut held, mut took) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..count {
        let (from, to) = if number % 2 == 0 { (0, 1) } else { (1, 0) };
        let moved = migrate(&proof.fabric, from, to);
        proof.here = to;
        pauses.push(moved.pause_ms);
        held.push(moved.held_ms);
        took.push(moved.took.as_secs_f64() * 1000.0);
        if number % 10 == 9 || number + 1 == count {
            proof.is_whole(&format!("after {} ways", number + 1));
        }
    }
    let (sent, talked) = (sending.result(true), talk.result(true));
    let received = proof.received(REST_LIMIT).expect("it counts to the end");
    let counted = proof.one_copy_counted(counter, "at the end");
    println!("    {count} migrations; sent to it {sent}\n    received by it {received}\n    its counter {counted}");
    assert_eq!((&talked["wrong"], &talked["asked"]), (&0.into(), &talked["answered"]), "{talked}");
    assert!(number(&counted, "received") > 0 && number(&counted, "lost") == 0, "{counted}");
    assert_eq!((&received["received"], number(&sent, "unsent")), (&sent["sent"], 0), "{received}");
    for wrong in ["lost", "duplicates", "out_of_order", "corrupt", "foreign"] {
        assert_eq!(number(&received, wrong), 0, "{wrong}: {received}");
    }
    proof.thousand_in_a_second(count.min(12));
    println!(
        "    {} MiB written {} times, its disk {} times; {} questions answered on one connection, the slowest within {} ms",
        proof.buffer_mib,
        proof.before.passes,
        proof.before.blocks,
        talked["answered"],
        number(&talked, "max_us") / 1000
    );
    println!(
        "    it stood still for {}, until it stood ready {}; all of it took {}",
        quantiles(pauses),
        quantiles(held),
        quantiles(took)
    );
    proof.finish();
}

/// Median, the 99th percentile and the most, of times in milliseconds.
fn quantiles(mut times: Vec<f64>) -> String {
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
    format!("{:.1} ms (p50), {:.1} (p99), {:.1} (most)", at(50), at(99), at(100))
}
