//! Containers: a file system that is not ours is imported, booted, frozen and launched from its bundle.

use std::path::Path;
use std::process::Command;

use super::fabric::run;
use super::fixture::{Agent, text};
use super::lab::Lab;

/// Names of the images that are made, in the directory that agents under test share.
const IMAGES: [&str; 2] = ["imported-rootfs", "imported-oci"];

/// What the file system says it is, in a guest and in its archive.
const RELEASE: &str = "cat /etc/os-release";

fn refused(agent: &Agent, words: &[&str], wanted: &str) {
    let output = agent.run(words);
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains(wanted), "{words:?}: {said}");
}

fn sha256(path: &Path) -> String {
    let said = run("sha256sum", &[path.to_str().expect("a path")]);
    said.split(' ').next().expect("a digest").to_owned()
}

/// A blob of a layout; its descriptor.
fn blob(layout: &Path, kind: &str, file: &Path) -> serde_json::Value {
    let digest = sha256(file);
    let bytes = std::fs::metadata(file).expect("a file").len();
    std::fs::rename(file, layout.join("blobs/sha256").join(&digest)).expect("a blob");
    serde_json::json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes})
}

fn write(path: &Path, value: &serde_json::Value) {
    std::fs::write(path, value.to_string()).expect("a document");
}

/// An OCI layout of two layers: the archive, and one that changes it.
fn make_layout(directory: &Path, rootfs: &Path) {
    std::fs::create_dir_all(directory.join("blobs/sha256")).expect("directories");
    write(&directory.join("oci-layout"), &serde_json::json!({"imageLayoutVersion": "1.0.0"}));
    let script = "gzip -c \"$1\" > below.tar.gz
        mkdir -p upper/etc upper/opt && touch upper/etc/.wh.issue.net && echo from above > upper/opt/note
        tar -C upper -cf above.tar .";
    let mut command = Command::new("sh");
    command.current_dir(directory).args(["-euc", script, "sh"]).arg(rootfs);
    assert!(command.status().expect("run sh").success());
    let layers = [("tar+gzip", "below.tar.gz"), ("tar", "above.tar")].map(|(kind, name)| {
        blob(directory, &format!("application/vnd.oci.image.layer.v1.{kind}"), &directory.join(name))
    });
    let document = directory.join("document");
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
        "config": {"Entrypoint": ["/bin/sh", "-c"], "Cmd": ["cat /opt/note"], "Env": ["WHO=above"]}
    });
    write(&document, &config);
    let config = blob(directory, "application/vnd.oci.image.config.v1+json", &document);
    write(&document, &serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers}));
    let mut manifest = blob(directory, "application/vnd.oci.image.manifest.v1+json", &document);
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "sample"});
    write(&directory.join("index.json"), &serde_json::json!({"schemaVersion": 2, "manifests": [manifest]}));
}

pub(crate) fn containers_boot_and_are_bundled(_shared: &Agent) {
    let lab = Lab::start("htest-import", 44);
    let agent = lab.agent();
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let rootfs = scratch.path().join("rootfs.tar");
    let rootfs = rootfs.to_str().expect("a path");
    run(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/sample-rootfs"), &[rootfs]);
    let release = run("tar", &["-xOf", rootfs, "./usr/lib/os-release"]);
    for image in IMAGES {
        // What a run that failed has left.
        let _ = agent.run(&["image", "rm", image]);
    }
    bad_ones_leave_nothing(agent, scratch.path(), rootfs);
    a_root_file_system(&lab, rootfs, &release);
    let layout = scratch.path().join("layout");
    make_layout(&layout, Path::new(rootfs));
    an_image_of_two_layers(agent, &layout, &release);
    for vm in agent.json(&["vm", "ls"])["vms"].as_array().expect("VMs") {
        agent.ok(&["vm", "rm", vm["id"].as_str().expect("an id"), "--timeout", "0"]);
    }
    for image in IMAGES {
        agent.ok(&["image", "rm", image]);
    }
    lab.ends();
}

fn bad_ones_leave_nothing(agent: &Agent, scratch: &Path, rootfs: &str) {
    let images = agent.json(&["image", "ls"]);
    let import = |rootfs: &str, more: &[&str], wanted: &str| {
        let words: Vec<&str> = ["image", "import", IMAGES[0], "--rootfs", rootfs].iter().chain(more).copied().collect();
        refused(agent, &words, wanted);
    };
    import(rootfs, &["--max-size", "1"], "are left of what all layers may have");
    import(rootfs, &["--like", "nobody"], "there is no image \"nobody\"");
    import("/dev/null", &[], "is not a regular file");
    let evil = scratch.join("evil.tar");
    let script = "echo x > x && tar -Pcf \"$1\" --transform 's,x,../../../../tmp/htest-evil,' x";
    let mut command = Command::new("sh");
    command.current_dir(scratch).args(["-euc", script, "sh"]).arg(&evil);
    assert!(command.status().expect("run sh").success());
    import(evil.to_str().expect("a path"), &[], "has a \"..\"");
    assert!(!Path::new("/tmp/htest-evil").exists());
    assert_eq!(agent.json(&["image", "ls"]), images);
}

/// From an archive of Debian packages to clones of a guest that runs them.
fn a_root_file_system(lab: &Lab, rootfs: &str, release: &str) {
    let agent = lab.agent();
    let image = agent.json(&["image", "import", IMAGES[0], "--rootfs", rootfs]);
    println!("    needs {} MiB of memory", image["memory_mib_min"]);
    assert_eq!(image["container"]["layers"], 1, "{image:#}");
    refused(agent, &["image", "import", IMAGES[0], "--rootfs", rootfs], "already");
    refused(agent, &["vm", "launch", "--image", IMAGES[0], "--memory", "64"], "MiB");
    agent.launch("first", &["--image", IMAGES[0], "--memory", "128", "--session", "clones"]);
    assert_eq!(agent.sh("first", RELEASE), release.trim_end());
    // Its own program, and the demo image's is not there.
    assert!(agent.sh("first", "busybox | head -n 1").contains("Debian"), "the busybox of the package");
    assert_eq!(agent.sh("first", "ls /etc/links /init 2>/dev/null; ls /.hearth"), "init");
    agent.ok(&["vm", "exec", "first", "--", "sh", "-c", "echo kept > /home/mark"]);
    agent.ok(&["vm", "snapshot", "first", "--bundle-name", "imported"]);
    for name in ["one", "two"] {
        lab.clone_of("imported", name);
        assert_eq!(agent.sh(name, "hostname; cat /home/mark"), format!("{name}\nkept"));
        assert_eq!(agent.sh(name, RELEASE), release.trim_end());
    }
}

/// The second layer hides a file of the first and adds one.
fn an_image_of_two_layers(agent: &Agent, layout: &Path, release: &str) {
    let directory = layout.to_str().expect("a path");
    refused(agent, &["image", "import", IMAGES[1], "--oci", &format!("{directory}:other")], "it has sample");
    let image = agent.json(&["image", "import", IMAGES[1], "--oci", &format!("{directory}:sample")]);
    let container = &image["container"];
    assert_eq!((&container["layers"], &container["like"]), (&2.into(), &"demo".into()), "{image:#}");
    assert_eq!(container["program"]["arguments"][2], "cat /opt/note", "{image:#}");
    agent.launch("layers", &["--image", IMAGES[1], "--memory", "128"]);
    assert_eq!(agent.sh("layers", RELEASE), release.trim_end());
    assert_eq!(
        agent.sh("layers", "cat /opt/note; ls /etc/issue /etc/issue.net 2>/dev/null; true"),
        "from above\n/etc/issue"
    );
    // A blob that was changed since.
    let digest = container["manifest"].as_str().expect("a digest").trim_start_matches("sha256:").to_owned();
    let manifest = layout.join("blobs/sha256").join(digest);
    let whole = std::fs::read_to_string(&manifest).expect("a manifest");
    std::fs::write(&manifest, whole.replace("\"schemaVersion\":2", "\"schemaVersion\":3")).expect("a manifest");
    refused(agent, &["image", "import", "imported-bad", "--oci", directory], "it is not what it was");
}
