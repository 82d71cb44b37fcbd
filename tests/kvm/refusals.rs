//! Bad input: a clear error, and nothing left behind.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::fixture::{Agent, text, vmms};

/// Refused, the message contains each word, and no VM, process or directory came of it.
fn refused(agent: &Agent, words: &[&str], said: &[&str]) {
    let before = (agent.json(&["vm", "ls"]), vmms(), directories(&agent.state()));
    let output = agent.run(words);
    assert_eq!(output.status.code(), Some(1), "hearth {words:?}: {}", text(&output.stderr));
    let message = text(&output.stderr);
    for word in said {
        assert!(message.contains(word), "hearth {words:?}: no {word:?} in {message:?}");
    }
    let names =
        |list: &Value| list["vms"].as_array().map(|vms| vms.iter().filter(|vm| vm["state"] != "failed").count());
    for vm in agent.json(&["vm", "ls"])["vms"].as_array().expect("a list") {
        if vm["state"] == "failed" {
            agent.ok(&["vm", "rm", vm["id"].as_str().expect("an id")]);
        }
    }
    assert_eq!(names(&before.0), names(&agent.json(&["vm", "ls"])));
    assert_eq!((before.1, before.2), (vmms(), directories(&agent.state())), "hearth {words:?} left something");
}

fn directories(state: &Path) -> usize {
    std::fs::read_dir(state.join("vms")).map(Iterator::count).unwrap_or(0)
}

pub(crate) fn bad_launches_are_refused_and_leave_nothing(agent: &Agent) {
    let shared = agent.shared();
    refused(agent, &["vm", "launch", "--image", "nowhere"], &["nowhere"]);
    refused(agent, &["vm", "launch", "--name", shared], &[shared]);
    refused(agent, &["vm", "launch", "--vcpus", "0"], &["vcpus", "0"]);
    refused(agent, &["vm", "launch", "--vcpus", "1000"], &["vcpus", "1000"]);
    refused(agent, &["vm", "launch", "--memory", "4"], &["memory", "4 MiB"]);
    refused(agent, &["vm", "launch", "--memory", "100000000"], &["memory"]);
    refused(agent, &["vm", "launch", "--disk", "/nowhere/disk"], &["/nowhere/disk"]);
    refused(agent, &["vm", "show", "vm-"], &["vm-"]);
    refused(agent, &["vm", "exec", "nobody", "--", "true"], &["nobody"]);
}

/// An image that cannot boot: its name, kernel, bytes of initrd, bytes of command line, and what the refusal says.
type Case<'a> = (&'a str, &'a [u8], usize, Option<usize>, &'a [&'a str]);

pub(crate) fn bad_images_are_refused_and_leave_nothing(agent: &Agent) {
    let images = std::path::PathBuf::from(std::env::var_os("HEARTH_IMAGES").expect("HEARTH_IMAGES"));
    let demo = images.join("demo");
    let kernel = std::fs::read(demo.join("vmlinux")).expect("the demo kernel");
    let good: Value =
        serde_json::from_slice(&std::fs::read(demo.join("image.json")).expect("image.json")).expect("JSON");
    let cases: [Case<'_>; 5] = [
        ("bad-garbage", b"this is not a kernel, not at all, whatever it is", 16, None, &["kernel"]),
        ("bad-empty", b"", 16, None, &["kernel"]),
        ("bad-truncated", &kernel[..kernel.len() / 2], 16, None, &["kernel"]),
        ("bad-initrd", &kernel, 256 << 20, None, &["initrd"]),
        ("bad-cmdline", &kernel, 16, Some(4000), &["command line"]),
    ];
    for (name, kernel, initrd_bytes, command_line, said) in cases {
        let directory = images.join(name);
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).expect("an image directory");
        std::fs::write(directory.join("vmlinux"), kernel).expect("a kernel");
        let initrd = std::fs::File::create(directory.join("initrd.cpio")).expect("an initrd");
        initrd.set_len(initrd_bytes as u64).expect("its size");
        let mut image = good.clone();
        image["name"] = json!(name);
        image["digests"] = json!({});
        if let Some(length) = command_line {
            image["command_line"] = json!("x".repeat(length));
        }
        std::fs::write(directory.join("image.json"), image.to_string()).expect("image.json");
        refused(agent, &["vm", "launch", "--image", name], said);
        std::fs::remove_dir_all(&directory).expect("remove the image");
    }
    let directory = images.join("bad-missing");
    std::fs::create_dir_all(&directory).expect("an image directory");
    std::fs::write(directory.join("image.json"), good.to_string().replace("\"demo\"", "\"bad-missing\""))
        .expect("image.json");
    refused(agent, &["vm", "launch", "--image", "bad-missing"], &["vmlinux"]);
    std::fs::remove_dir_all(&directory).expect("remove the image");
}

pub(crate) fn bad_requests_are_refused(agent: &Agent) {
    let post = ["--request", "POST"];
    let as_json = ["--header", "content-type: application/json"];
    let ask = |words: &[&str], path: &str, wanted: (u16, &str)| {
        let (status, body) = agent.curl(words, path);
        let code = serde_json::from_str::<Value>(&body).map(|body| body["error"]["code"].clone()).unwrap_or_default();
        assert_eq!((status, code.as_str().unwrap_or(&body)), wanted, "{words:?} {path}: {body}");
    };
    let with = |body: &'static str| [post.as_slice(), &as_json, &["--data", body]].concat();
    ask(&with(r#"{"colour":"red"}"#), "/v1/vms", (400, "unknown_field"));
    ask(&with("{"), "/v1/vms", (400, "bad_json"));
    ask(
        &[post.as_slice(), &["--header", "content-type: text/plain", "--data", "{}"]].concat(),
        "/v1/vms",
        (415, "unsupported_media_type"),
    );
    ask(&[], "/v1/vms/vm-aaaaaaaaaaaaaaaa", (404, "not_found"));
    ask(&[], "/v1/nowhere", (404, "not_found"));
    ask(&["--request", "PATCH"], "/v1/vms", (405, "method_not_allowed"));
    let large = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(large.path(), vec![b' '; 4 << 20]).expect("a large body");
    let data = format!("@{}", large.path().display());
    ask(&[post.as_slice(), &as_json, &["--data-binary", &data]].concat(), "/v1/vms", (413, "body_too_large"));

    let shared = agent.shared();
    let path = format!("/v1/vms/{shared}/resume");
    let (status, _) = agent.curl(&post, &path);
    assert!(status == 200 || status == 409, "resume of a running VM: {status}");

    let keyed = |body: &'static str| [with(body), vec!["--header", "idempotency-key: one-key"]].concat();
    let (_, first) = agent.curl(&keyed(r#"{"image":"nowhere"}"#), "/v1/vms");
    let (_, again) = agent.curl(&keyed(r#"{"image":"nowhere"}"#), "/v1/vms");
    assert_eq!(first, again);
}

pub(crate) fn second_agent_is_refused(agent: &Agent) {
    let other = tempfile::tempdir().expect("a temporary directory");
    let numbered = other.path().join("hearth.toml");
    std::fs::write(&numbered, "[uids]\nhost_number = 4001\n").expect("a configuration");
    let start = |config: &Path, state: &Path, socket: &Path| {
        let mut command = Command::new(std::env::var_os("HEARTH_BINARY").expect("HEARTH_BINARY"));
        command.args(["agent", "--config"]).arg(config).arg("--state-dir").arg(state).arg("--socket").arg(socket);
        command.stdin(Stdio::null()).output().expect("run hearth")
    };
    let same_state = start(&numbered, &agent.state(), &other.path().join("api.sock"));
    assert_eq!(same_state.status.code(), Some(1));
    assert!(text(&same_state.stderr).contains("another agent"), "{}", text(&same_state.stderr));
    // It would take the first one's jails for what is left of its own, and their VMs would share user ids.
    let same_number = start(Path::new("/dev/null"), &other.path().join("state"), &other.path().join("api.sock"));
    assert_eq!(same_number.status.code(), Some(1));
    assert!(text(&same_number.stderr).contains("has host number 0"), "{}", text(&same_number.stderr));
    let same_socket = start(&numbered, &other.path().join("state"), &agent.socket());
    assert_eq!(same_socket.status.code(), Some(1));
    assert!(text(&same_socket.stderr).contains("api.sock"), "{}", text(&same_socket.stderr));
    assert_eq!(agent.sh(agent.shared(), "echo served"), "served");
}
