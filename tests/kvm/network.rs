//! Session networks with real guests on three hosts: who reaches whom, who does not, and what guests ask for themselves.

use serde_json::Value;

use super::fabric::Fabric;
use super::fixture::{Agent, text};
use super::probe::{self, Counting, Echo, reached};

/// A guest.
pub(crate) struct Guest {
    pub(crate) host: usize,
    pub(crate) name: String,
}

impl Guest {
    /// Launches one into a session.
    pub(crate) fn launch(fabric: &Fabric, host: usize, name: &str, more: &[&str]) -> Self {
        let agent = fabric.agent(host);
        agent.launch(name, more);
        probe::install(agent, name);
        Self { host, name: name.to_owned() }
    }

    pub(crate) fn agent<'a>(&self, fabric: &'a Fabric) -> &'a Agent {
        fabric.agent(self.host)
    }

    /// Its IPv6 and IPv4 address.
    pub(crate) fn addresses(&self, fabric: &Fabric) -> [String; 2] {
        let vm = self.agent(fabric).vm(&self.name);
        [0, 1].map(|index: usize| vm["addresses"][index].as_str().expect("an address").to_owned())
    }

    /// Answers in the guest until dropped.
    pub(crate) fn echo(&self, fabric: &Fabric) -> Echo {
        Echo::start(self.agent(fabric), &self.name)
    }

    /// How many of these questions, each asked of both addresses of the other, are answered.
    pub(crate) fn reached(&self, fabric: &Fabric, other: &Self, questions: &[&str], wait_ms: u32) -> usize {
        reached(self.agent(fabric), &self.name, &other.addresses(fabric), questions, wait_ms)
    }

    /// Sends a request to the metadata service as a program in the guest would; head and body of the answer.
    fn ask(&self, fabric: &Fabric, method: &str, path: &str, body: &str) -> (String, Value) {
        let length = body.len();
        let request = format!(
            r"{method} {path} HTTP/1.1\r\nhost: m\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        let script = format!("printf '{request}' | nc -w 60 169.254.169.254 80");
        let answer = self.agent(fabric).sh(&self.name, &script);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{script}: {answer:?}"));
        let body = serde_json::from_str(body.trim()).unwrap_or_else(|error| panic!("{answer}: {error}"));
        (head.to_owned(), body)
    }
}

/// All that members of a session can do with each other.
pub(crate) const ALL: [&str; 6] = [
    "ping ADDRESS",
    "ping ADDRESS --bytes 1400",
    "ping ADDRESS --bytes 4000",
    "ask udp ADDRESS 7777 --bytes 1400",
    "ask udp ADDRESS 7777 --bytes 4000",
    "ask tcp ADDRESS 7777 --bytes 4000",
];

/// A question by each protocol.
const EACH: [&str; 3] = ["ping ADDRESS", "ask udp ADDRESS 7777 --bytes 100", "ask tcp ADDRESS 7777 --bytes 100"];

/// How long a guest waits for an answer that has to come, and for one that must not.
const PATIENCE_MS: u32 = 20_000;
const DENIAL_MS: u32 = 700;

/// The network ids of the two sessions.
const X: u32 = 517;
const Y: u32 = 518;

/// Guests of both sessions on the first two hosts.
struct Four {
    xa: Guest,
    xb: Guest,
    ya: Guest,
    yb: Guest,
}

impl Four {
    fn launch(fabric: &Fabric) -> Self {
        std::thread::scope(|scope| {
            let launch = |host, name, more: &'static [&'static str]| {
                scope.spawn(move || Guest::launch(fabric, host, name, more))
            };
            // One with an address of its own translated.
            let all = [
                launch(0, "xa", &["--session", "x"]),
                launch(1, "xb", &["--session", "x", "--addressing", "invariant"]),
                launch(0, "ya", &["--session", "y"]),
                launch(1, "yb", &["--session", "y"]),
            ];
            let [xa, xb, ya, yb] = all.map(|guest| guest.join().expect("it is launched"));
            Self { xa, xb, ya, yb }
        })
    }
}

pub(crate) fn sessions_reach_across_hosts_and_nothing_else(_shared: &Agent) {
    let fabric = Fabric::start("routed");
    for host in 0..3 {
        fabric.agent(host).ok(&["session", "create", "--id", &X.to_string(), "--name", "x"]);
        fabric.agent(host).ok(&["session", "create", "--id", &Y.to_string(), "--name", "y"]);
    }
    let four = Four::launch(&fabric);
    addresses_are_the_formulas(&fabric, &four);
    let rules = || [0, 1].map(|host| fabric.rules_of_members(host));
    let before = rules();
    let xc = a_guest_launches_a_peer_on_another_host(&fabric, &four.xb);
    assert_eq!(before, rules(), "a member joined on a third host");
    guests_know_who_they_are(&fabric, &four);

    let Four { xa, xb, ya, yb } = &four;
    let _echoes = [xa, xb, ya, yb, &xc].map(|guest| guest.echo(&fabric));
    for (from, to) in [(xa, xb), (yb, ya), (xa, &xc), (&xc, xb)] {
        assert_eq!(from.reached(&fabric, to, &ALL, PATIENCE_MS), ALL.len() * 2, "{} to {}", from.name, to.name);
    }
    std::thread::scope(|scope| {
        for [from, to, other] in [[xa, ya, yb], [xb, ya, yb], [ya, xa, xb], [yb, xa, xb]] {
            let fabric = &fabric;
            scope.spawn(move || {
                for to in [to, other] {
                    assert_eq!(from.reached(fabric, to, &EACH, DENIAL_MS), 0, "{} to {}", from.name, to.name);
                }
            });
        }
    });
    forged_frames_reach_nobody(&fabric, &four);
    a_stolen_address_is_of_no_use(&fabric, &four);
    fabric.finish();
}

fn addresses_are_the_formulas(fabric: &Fabric, four: &Four) {
    for (guest, session) in [(&four.xa, X), (&four.xb, X), (&four.ya, Y), (&four.yb, Y)] {
        let host = [3_u32, 4][guest.host];
        let v6 = format!("fd3c:91aa:7e2:{host:x}:0:{session:x}:0:1");
        let v4 = std::net::Ipv4Addr::from_bits(10 << 24 | host << 16 | session << 6 | 1);
        assert_eq!(guest.addresses(fabric), [v6, v4.to_string()], "{}", guest.name);
    }
}

/// A guest has a member made on the third host, and is refused one of the other session.
fn a_guest_launches_a_peer_on_another_host(fabric: &Fabric, asking: &Guest) -> Guest {
    let foreign = format!(r#"{{"session_network_id":{Y}}}"#);
    let (head, error) = asking.ask(fabric, "POST", "/v1/self/launch", &foreign);
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    assert_eq!(error["error"]["code"], "foreign_session", "{error}");
    let events = asking.agent(fabric).ok(&["--json", "events"]);
    assert!(events.contains("launch_denied"), "{events}");

    let own = format!(r#"{{"session_network_id":{X},"host":"{}","role":"worker"}}"#, fabric.name(2));
    let (head, made) = asking.ask(fabric, "POST", "/v1/self/launch", &own);
    assert!(head.starts_with("HTTP/1.1 202"), "{head} {made}");
    let name = made["vms"][0]["id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned();
    let agent = fabric.agent(2);
    let vm = agent.wait_for_state(&name, "running");
    assert_eq!((&vm["role"], &vm["session_network_id"]), (&"worker".into(), &X.into()), "{vm:#}");
    probe::install(agent, &name);
    Guest { host: 2, name }
}

/// The metadata service tells each guest of itself and of its session.
fn guests_know_who_they_are(fabric: &Fabric, four: &Four) {
    for (guest, members) in [(&four.xa, 3), (&four.xb, 3), (&four.ya, 2)] {
        let (_, own) = guest.ask(fabric, "GET", "/v1/self", "");
        assert_eq!(own["name"], guest.name.as_str(), "{own:#}");
        let addresses = guest.addresses(fabric);
        assert_eq!(own["addresses"], serde_json::json!(addresses), "{own:#}");
        let (_, all) = guest.ask(fabric, "GET", "/v1/self/members", "");
        assert_eq!(all["members"].as_array().map(Vec::len), Some(members), "{all:#}");
    }
}

/// Root in a guest sends what it likes, in the name of the other session's: none of it arrives, and it is counted.
fn forged_frames_reach_nobody(fabric: &Fabric, four: &Four) {
    let Four { xa, xb: _, ya, yb } = four;
    let drops = || xa.agent(fabric).json(&["session", "show", "x"])["drops"].clone();
    let count = |drops: &Value, reason: &str| drops[reason].as_u64().expect("a count");
    let before = drops();
    let victim = Counting::start(yb.agent(fabric), &yb.name, "forgedhere", "attackisover");
    let ([own6, own4], [as6, as4], [to6, to4]) = (xa.addresses(fabric), ya.addresses(fabric), yb.addresses(fabric));
    let words = format!(
        "forge --interface eth0 --gateway-mac 02:68:74:68:00:01 --own6 {own6} --own4 {own4} --as6 {as6} --as4 {as4} \
         --to6 {to6} --to4 {to4} --marker forgedhere all"
    );
    let sent = probe::run(xa.agent(fabric), &xa.name, &words);
    assert!(sent.status.success(), "{}{}", text(&sent.stdout), text(&sent.stderr));
    // From a friend of the victim's: it ends the counting, and comes after all the rest.
    let last =
        probe::run(ya.agent(fabric), &ya.name, &format!("ask udp {to4} 7777 --text attackisover --wait-ms 20000"));
    assert!(last.status.success(), "{}{}", text(&last.stdout), text(&last.stderr));
    assert_eq!(victim.marked(), 0, "of what was forged");
    let after = drops();
    // Of every kind at least some: what the jail's rules make of each is in tests/net/hostile.rs.
    for (reason, least) in [("spoof", 50), ("foreign_session", 10)] {
        assert!(count(&after, reason) >= count(&before, reason) + least, "{reason}: {before} then {after}");
    }
}

/// Root in a guest takes an address of another session's: what it sends goes nowhere, and is counted.
fn a_stolen_address_is_of_no_use(fabric: &Fabric, four: &Four) {
    let Four { xa, xb: _, ya, yb } = four;
    let spoofed = || xa.agent(fabric).json(&["session", "show", "x"])["drops"]["spoof"].as_u64().expect("a count");
    let before = spoofed();
    let [[_, stolen], [_, victim]] = [ya, yb].map(|guest| guest.addresses(fabric));
    let script = format!(
        "ip addr add {stolen}/32 dev eth0; ping -c 2 -W 1 -I {stolen} {victim}; ip addr del {stolen}/32 dev eth0"
    );
    let output = xa.agent(fabric).run(&["vm", "exec", &xa.name, "--", "sh", "-c", &script]);
    assert!(text(&output.stdout).contains("2 packets transmitted, 0 packets received"), "{}", text(&output.stdout));
    assert!(spoofed() >= before + 2, "{before} then {}", spoofed());
}
