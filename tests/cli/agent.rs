//! The real agent as a process, with a state directory of its own and no VM: bounds, a full disk, draining, a ledger that
//! is backed up, damaged and put back, and the support bundle.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use crate::run::{at, code, hearth, output, piped, signal, text, wait_until};

/// A state directory, a configuration, and an agent that may run on them.
struct Host {
    directory: tempfile::TempDir,
    agent: Option<Child>,
}

impl Host {
    /// `number` tells agents of one machine apart: each test has its own.
    fn new(number: u16, more: &str) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let host = Self { directory, agent: None };
        host.write("hearth.toml", &format!("{more}\n[uids]\nhost_number = {number}\n"));
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).open(self.path(name)).expect("a file");
        file.write_all(text.as_bytes()).expect("write");
    }

    fn words(&self) -> Vec<String> {
        let word = |name: &str| self.path(name).to_str().expect("a path").to_owned();
        let words = ["agent", "--config", &word("hearth.toml"), "--state-dir", &word("state"), "--socket", &word("s")];
        words.map(str::to_owned).to_vec()
    }

    /// Starts an agent and waits until it is ready.
    fn start(&mut self) {
        let words = self.words();
        self.start_by(hearth(&words.iter().map(String::as_str).collect::<Vec<_>>()));
    }

    fn start_by(&mut self, mut command: Command) {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("run hearth");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr"));
        let mut said = String::new();
        while !said.ends_with("ready\n") {
            assert!(lines.read_line(&mut said).expect("a line") > 0, "it ended: {said}");
        }
        // What it says later has a reader.
        std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
        self.agent = Some(child);
    }

    /// What an agent says that does not start.
    fn refusal(&self) -> String {
        let words = self.words();
        let mut child = piped(hearth(&words.iter().map(String::as_str).collect::<Vec<_>>()));
        assert_eq!(code(&mut child), 1);
        let mut said = String::new();
        child.stderr.take().expect("stderr").read_to_string(&mut said).expect("text");
        said
    }

    fn stop(&mut self) {
        let mut agent = self.agent.take().expect("an agent");
        signal(&agent, "TERM");
        assert_eq!(code(&mut agent), 0);
    }

    fn ask(&self, words: &[&str]) -> Output {
        output(at(&self.path("s"), words))
    }

    fn json(&self, words: &[&str]) -> Value {
        let output = self.ask(&[&["--json"], words].concat());
        assert_eq!(output.status.code(), Some(0), "{words:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn restore(&self, backup: &Path) -> Output {
        let state = self.path("state");
        let words = ["ledger", "restore", backup.to_str().expect("a path"), "--state-dir"];
        let mut command = hearth(&words);
        command.arg(state).arg("--config").arg(self.path("hearth.toml"));
        output(command)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(agent) = &mut self.agent {
            // It may have ended by itself.
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let mut file = OpenOptions::new().write(true).open(path).expect("a file");
    file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(bytes)).expect("write");
}

#[test]
fn a_thousand_connections_of_one_client_do_not_keep_others_out() {
    let mut host = Host::new(40, "");
    host.start();
    let held: Vec<_> = (0..1000).map(|_| UnixStream::connect(host.path("s")).expect("connect")).collect();
    let shown = host.json(&["host", "show"]);
    assert_eq!(shown["room"]["connections_max"], 512);
    let open = shown["room"]["connections_open"].as_u64().expect("a number");
    assert!((1..=257).contains(&open), "half for one process, and this one: {open}");
    assert!(shown["room"]["descriptors_max"].as_u64() >= Some(1024), "{shown}");
    drop(held);
    host.stop();
}

#[test]
fn a_full_disk_refuses_new_work() {
    let mut host = Host::new(41, "[limits]\ndisk_reserve_mib = 48");
    std::fs::create_dir(host.path("state")).expect("a directory");
    let mut words = vec!["-m".to_owned(), "sh".to_owned(), "-ec".to_owned()];
    words.push(r#"mount -t tmpfs -o size=64m none "$1"; shift; exec "$@""#.to_owned());
    words.extend(["sh".to_owned(), host.path("state").display().to_string()]);
    words.push(env!("CARGO_BIN_EXE_hearth").to_owned());
    words.extend(host.words());
    let mut command = Command::new("unshare");
    command.args(words).env_remove("HEARTH_SOCKET").stdin(Stdio::null());
    host.start_by(command);
    // Enough is free: there is no image of that name, which is asked after the disk.
    let refused = text(&host.ask(&["image", "import", "mine", "--kernel", "/proc/self/exe"]).stderr);
    assert!(!refused.contains("are kept for the VMs that run"), "{refused}");
    let pid = host.agent.as_ref().expect("an agent").id();
    let within = PathBuf::from(format!("/proc/{pid}/root{}/fill", host.path("state").display()));
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(&within).expect("a file");
    (&file).write_all(&vec![1; 20 << 20]).expect("fill the disk");
    for words in
        [&["vm", "launch"][..], &["bundle", "build"], &["image", "import", "mine", "--kernel", "/proc/self/exe"]]
    {
        let refused = host.ask(words);
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{words:?}");
        assert!(said.contains("48 MiB are kept for the VMs that run") && said.contains("hearth bundle rm"), "{said}");
    }
    let shown = text(&host.ask(&["host", "show"]).stdout);
    assert!(shown.starts_with("! disk: ") && shown.contains("below the reserve of 48 MiB"), "{shown}");
    host.stop();
}

#[test]
fn draining_is_asked_of_the_agent_that_runs() {
    let mut host = Host::new(42, "");
    host.start();
    let words: Vec<_> = host.words().into_iter().chain(["--drain".to_owned()]).collect();
    let drained = output(hearth(&words.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(drained.status.code(), Some(0), "{}", text(&drained.stderr));
    assert!(text(&drained.stderr).contains("drained: 0 VMs have stopped"), "{}", text(&drained.stderr));
    assert_eq!(code(&mut host.agent.take().expect("an agent")), 0);
    // None runs now: one is started, which ends by a signal.
    host.start_by(hearth(&words.iter().map(String::as_str).collect::<Vec<_>>()));
    assert_eq!(host.json(&["host", "show"])["room"]["draining"], false);
    host.stop();
}

#[test]
fn a_host_is_shown_at_a_glance() {
    let mut host = Host::new(43, "");
    host.start();
    wait_until("the first backup", || host.json(&["host", "show"])["ledger"]["backups"] == 1);
    let shown = text(&host.ask(&["host", "show"]).stdout);
    for wanted in
        ["agent", "vms", "memory", "disk", "512.0 MiB kept", "descriptors", "kvm", "last backup", "fabric  none"]
    {
        assert!(shown.contains(wanted), "no {wanted:?} in\n{shown}");
    }
    let json = host.json(&["host", "show"]);
    // Whatever is wrong with this machine comes first, else that nothing is.
    let calm = json["warnings"].as_array().is_some_and(Vec::is_empty);
    assert_eq!(shown.starts_with("nothing to worry about"), calm, "{shown}");
    host.stop();
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let mut host = Host::new(44, "");
    host.start();
    host.ask(&["vm", "show", "nobody"]);
    let mut stream = UnixStream::connect(host.path("s")).expect("connect");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").expect("ask");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    let samples = crate::prometheus::parse(body);
    let value = |name: &str| *samples.get(name).unwrap_or_else(|| panic!("no {name} in\n{body}"));
    assert!(value("hearth_api_refusals_total{code=\"not_found\"}") >= 1.0);
    assert!(value("hearth_connections") >= 1.0 && value("hearth_descriptors") > 5.0);
    assert_eq!(value("hearth_draining"), 0.0);
    assert_eq!((value("hearth_ledger_writable"), value("hearth_agent_starts")), (1.0, 1.0));
    assert_eq!(value("hearth_fabric_conflicts"), 0.0);
    assert!(value("hearth_memory_reserve_bytes") > 0.0 && value("hearth_disk_reserve_bytes") > 0.0);
    for name in ["ledger_queue", "vm_inboxes", "launch_turns_free", "events_kept", "disk_free_bytes"] {
        value(&format!("hearth_{name}"));
    }
    host.stop();
}

#[test]
fn a_ledger_is_backed_up_damaged_and_put_back() {
    let mut host = Host::new(45, "");
    host.start();
    let copy = host.path("copy.db");
    let made = host.json(&["ledger", "backup", "--output", copy.to_str().expect("a path")]);
    assert!(made["bytes"].as_u64() > Some(4096), "{made}");
    let again = host.ask(&["ledger", "backup", "--output", copy.to_str().expect("a path")]);
    assert!(text(&again.stderr).contains("is there already"), "{}", text(&again.stderr));
    wait_until("the first backup", || host.json(&["host", "show"])["ledger"]["backups"] == 1);
    let refused = host.restore(&copy);
    assert!(text(&refused.stderr).contains("an agent uses the state directory"), "{}", text(&refused.stderr));
    host.stop();

    let ledger = host.path("state/ledger.db");
    // What lies in its log is not lost with the file.
    let settle = || {
        let connection = rusqlite::Connection::open(&ledger).expect("the ledger");
        let settled = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
        assert_eq!(settled.expect("a checkpoint"), 0);
    };
    settle();
    let whole = std::fs::read(&ledger).expect("the ledger");
    let damages: [(&str, &dyn Fn()); 4] = [
        ("bytes in the middle", &|| overwrite(&ledger, 4096, &[0xa5; 8192])),
        ("a file cut short", &|| OpenOptions::new().write(true).open(&ledger).expect("it").set_len(9000).expect("cut")),
        ("garbage for a head", &|| overwrite(&ledger, 0, &[0x5a; 100])),
        // `user_version` lies at 60, big-endian (the database file format of SQLite, 1.3).
        ("a version that cannot be", &|| overwrite(&ledger, 60, &[0xff, 0xff, 0xff, 0xfe])),
    ];
    for (what, damage) in damages {
        damage();
        let said = host.refusal();
        let newest = format!(
            "hearth ledger restore --state-dir {} {}",
            host.path("state").display(),
            host.path("state/backups").display()
        );
        assert!(said.contains(&newest), "{what}: {said}");
        // What the message says, word by word.
        let (_, command) = said.split_once("`hearth ").expect("a command");
        let (command, _) = command.split_once('`').expect("its end");
        let restored = output(hearth(&command.split(' ').collect::<Vec<_>>()));
        assert_eq!(restored.status.code(), Some(0), "{what}: {}", text(&restored.stderr));
        assert!(text(&restored.stdout).contains("ledger-before-restore-"), "{what}: {}", text(&restored.stdout));
        host.start();
        assert!(host.json(&["vm", "ls"])["vms"].as_array().is_some_and(Vec::is_empty));
        host.stop();
        settle();
    }
    overwrite(&ledger, 60, &[0, 0, 0, 99]);
    assert!(host.refusal().contains("has version 99, this program knows up to"), "a newer program's is left alone");
    overwrite(&ledger, 0, &whole[..100.min(whole.len())]);

    // A file that is no backup is not put anywhere.
    let before = std::fs::read(&ledger).expect("the ledger");
    host.write("empty.db", "");
    host.write("text.db", &"not a ledger ".repeat(1000));
    let mut damaged = std::fs::read(&copy).expect("the copy");
    damaged[5000..9000].fill(0xa5);
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).open(host.path("damaged.db")).expect("a file");
    file.write_all(&damaged).expect("write");
    for name in ["empty.db", "text.db", "damaged.db", "nowhere.db"] {
        let refused = host.restore(&host.path(name));
        assert_eq!(refused.status.code(), Some(1), "{name}");
        assert!(text(&refused.stderr).contains(name), "{name}: {}", text(&refused.stderr));
        assert!(std::fs::read(&ledger).expect("the ledger") == before, "{name}");
    }
}

/// What must not be in a support bundle.
const SECRET: &str = "planted-secret-5f2a";

#[test]
fn a_support_bundle_has_no_secrets_with_and_without_an_agent() {
    let mut host = Host::new(46, "");
    host.start();
    wait_until("the first backup", || host.json(&["host", "show"])["ledger"]["backups"] == 1);
    let bundle = host.path("with.tar");
    let output = bundled(&host, &bundle, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let with = std::fs::read(&bundle).expect("the bundle");
    for wanted in
        ["hearth-support/host.json", "\"warnings\"", "hearth_connections", "agent.log", "ledger.json", "quick_check"]
    {
        assert!(text(&with).contains(wanted), "no {wanted:?}");
    }
    host.stop();

    // The agent is down, and its state is full of secrets: where they are today, and where they may be tomorrow.
    let ledger = rusqlite::Connection::open(host.path("state/ledger.db")).expect("the ledger");
    let plant = format!(
        "ALTER TABLE vms ADD COLUMN swap_key TEXT;
         CREATE TABLE later_keys(vm TEXT, key TEXT);
         INSERT INTO later_keys VALUES ('vm-a', '{SECRET}');
         INSERT INTO swap_keys VALUES ('vm-a', CAST('{SECRET}' AS BLOB));
         INSERT INTO vms(id, name, state, revision, jail, record, swap_key) VALUES
            ('vm-aaaaaaaaaaaaaaaa', 'seen', 'stopped', 1, 7, '{{\"uid\": 5, \"nonce\": \"{SECRET}\", \"token\": \"{SECRET}\"}}', '{SECRET}');
         INSERT INTO idempotency VALUES ('{SECRET}', 'POST /v1/vms', x'00', 'vm-a', 201, '{SECRET}', 1);
         INSERT INTO sessions VALUES ('s-a', 'etl', 5, 'active', '{{\"token\": \"{SECRET}\"}}', '{SECRET}');
         INSERT INTO events(at, kind, vm, body) VALUES (1, 'k', 'vm-a', '{SECRET}');
         INSERT INTO clusters VALUES ('c-a', 'c', 'active', '{{\"token\": \"{SECRET}\"}}');
         INSERT INTO calculations VALUES ('q-a', 'c-a', 'done', '{SECRET}', CAST('{SECRET}' AS BLOB), CAST('{SECRET}' AS BLOB), NULL);"
    );
    ledger.execute_batch(&plant).expect("plant");
    drop(ledger);
    host.write("hearth.toml", &format!("host_name = 'known'\n[uids]\nhost_number = 46\n[fabric]\nhost_number = 46\nipv6_prefix = 'fd3c:91aa:7e9::/48'\nkey_file = '/{SECRET}'\n"));
    let vm = host.path("state/vms/vm-aaaaaaaaaaaaaaaa");
    std::fs::create_dir(&vm).expect("a directory");
    let mut log = OpenOptions::new().write(true).create(true).truncate(true).open(vm.join("vmm.log")).expect("a file");
    log.write_all(SECRET.as_bytes()).expect("write");
    let bundle = host.path("without.tar");
    let output = bundled(&host, &bundle, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let without = text(&std::fs::read(&bundle).expect("the bundle"));
    for wanted in ["no agent answers at", "\"seen\"", "host_name = \"known\"", "(left out)", "\"uid\": 5", "etl"] {
        assert!(without.contains(wanted), "no {wanted:?} in {without}");
    }
    assert!(!without.contains(SECRET), "{without}");
    // Guests' words only where they are asked for.
    let consoles = host.path("consoles.tar");
    assert_eq!(bundled(&host, &consoles, &["--consoles"]).status.code(), Some(0));
    assert!(text(&std::fs::read(&consoles).expect("the bundle")).contains(SECRET));
    let again = bundled(&host, &consoles, &[]);
    assert_eq!(again.status.code(), Some(1), "nothing is written over");
}

fn bundled(host: &Host, to: &Path, more: &[&str]) -> Output {
    let mut command = at(&host.path("s"), &["support-bundle", "--output"]);
    command.arg(to).arg("--config").arg(host.path("hearth.toml")).arg("--state-dir").arg(host.path("state")).args(more);
    output(command)
}
