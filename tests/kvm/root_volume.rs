//! Guests that have their root on a volume: a few files of the demo image's busybox, in every run; a Debian, where
//! `HEARTH_DEBIAN` names an image of one and this is asked for by name.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::Value;

use super::fixture::{Agent, need, text};
use super::lab::Lab;

/// Names of busybox that the small root has.
const NAMES: [&str; 9] = ["sh", "cat", "ls", "touch", "mkdir", "sync", "hostname", "df", "umount"];

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap_or_else(|error| panic!("run {program}: {error}"));
    assert!(output.status.success(), "{program} {words:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn shown(path: &Path) -> &str {
    path.to_str().expect("a path")
}

/// An ext4 image with these files.
fn image(directory: &Path, name: &str, files: &Path) -> PathBuf {
    let image = directory.join(name);
    run("mke2fs", &["-q", "-t", "ext4", "-d", shown(files), shown(&image), "16M"]);
    image
}

/// A root file system of busybox and little else: the directories that things are mounted at are not there.
fn small_root(directory: &Path) -> PathBuf {
    let files = directory.join("root");
    std::fs::create_dir_all(files.join("etc")).expect("a directory");
    let unpack = r#"mkdir -p "$1" && cd "$1" && cpio --quiet -id bin/busybox < "$2""#;
    let initrd = need("HEARTH_IMAGES").join("demo/initrd.cpio");
    run("sh", &["-c", unpack, "sh", shown(&files), shown(&initrd)]);
    for name in NAMES {
        symlink("busybox", files.join("bin").join(name)).expect("a link");
    }
    std::fs::write(files.join("etc/os-release"), "ID=small\n").expect("a file");
    image(directory, "root.img", &files)
}

/// The file system of a volume that nobody has, as it is on the disk: whole, and left as by an orderly end.
fn is_clean(agent: &Agent, directory: &Path, volume: &str) {
    let id = agent.json(&["volume", "show", volume])["id"].as_str().expect("an id").to_owned();
    let socket = agent.state().join("volumed/nbd.sock");
    let copy = directory.join("copy.img");
    let export = format!("nbd+unix:///{id}?socket={}", socket.display());
    run("qemu-img", &["convert", "-O", "raw", &export, shown(&copy)]);
    let facts = run("dumpe2fs", &["-h", shown(&copy)]);
    assert!(facts.contains("Filesystem state:         clean") && !facts.contains("needs_recovery"), "{facts}");
    run("e2fsck", &["-f", "-n", shown(&copy)]);
}

fn refused(agent: &Agent, words: &[&str], with: &str) {
    let output = agent.run(words);
    assert!(!output.status.success(), "{words:?} was done");
    let said = text(&output.stderr);
    assert!(said.contains(with), "{words:?}: {said}");
}

pub(crate) fn is_written_kept_and_clean(_shared: &Agent) {
    let lab = Lab::start_with("hthv2", 152, "[volumes]\nquota_mib = 4096\n");
    let agent = lab.agent();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let root = small_root(directory.path());
    let data = directory.path().join("data");
    std::fs::create_dir(&data).expect("a directory");
    std::fs::write(data.join("file"), "of the other volume").expect("a file");
    let data = image(directory.path(), "data.img", &data);
    agent.ok(&["volume", "create", "--name", "root", "--from-file", shown(&root)]);
    agent.ok(&["volume", "create", "--name", "data", "--from-file", shown(&data)]);
    agent.ok(&["volume", "create", "--name", "empty", "--size", "16"]);

    std::thread::scope(|scope| {
        // One that has no root, beside one that has.
        let without = scope.spawn(|| agent.run(&["vm", "launch", "--name", "none", "--volume", "empty:/"]));
        agent.launch("one", &["--volume", "root:/", "--volume", "data:/srv", "--spare-disks", "1"]);
        let without = without.join().expect("a launch");
        let said = text(&without.stderr);
        assert_eq!(without.status.code(), Some(1), "{said}");
        for part in ["/dev/vda has no file system", "hearth volume create --from-file"] {
            assert!(said.contains(part), "no {part:?}: {said}");
        }
    });
    agent.ok(&["vm", "rm", "none"]);
    assert_eq!(agent.json(&["volume", "show", "empty"])["active"], Value::Null, "its lease was given back");

    assert_eq!(agent.sh("one", "cat /etc/os-release"), "ID=small");
    assert_eq!(agent.sh("one", "cat /srv/file; hostname"), "of the other volumeone");
    assert_eq!(
        agent.sh("one", "cat /etc/machine-id 2>/dev/null"),
        agent.vm("one")["generation"].as_str().unwrap_or("")
    );
    let mounts = agent.sh("one", "cat /proc/mounts");
    for part in ["/dev/vda / ext4 rw", "/proc proc", "/sys sysfs", "/run tmpfs", "/dev devtmpfs", "/dev/pts devpts"] {
        assert!(mounts.contains(part), "no {part:?}:\n{mounts}");
    }
    assert!(!mounts.contains("/tmp "), "temporary files are the volume's:\n{mounts}");
    agent.sh("one", "echo kept > /kept; echo no > /tmp/too");
    refused(agent, &["volume", "detach", "root", "one"], "is the root of its guest");
    refused(agent, &["volume", "attach", "empty", "one", "--mount", "/"], "has its root already");
    refused(agent, &["vm", "launch", "--volume", "empty:/", "--volume", "data:/"], "both to be the root");
    refused(agent, &["vm", "snapshot", "one"], "volumes");
    agent.ok(&["vm", "rm", "one"]);
    is_clean(agent, directory.path(), "root");

    agent.launch("two", &["--volume", "root:ro:/"]);
    let script =
        "cat /kept; touch /more 2>/dev/null || echo refused; echo fine > /tmp/x && cat /tmp/x; cat /etc/machine-id";
    let id = agent.vm("two")["generation"].as_str().expect("a generation").to_owned();
    assert_eq!(agent.sh("two", script), format!("kept\nrefused\nfine\n{id}"));
    agent.ok(&["vm", "rm", "two"]);
    lab.ends();
}

/// Makes a package, and installs it.
const INSTALL: &str = "set -e; mkdir -p /root/p/DEBIAN /root/p/opt; echo of a package > /root/p/opt/file
printf 'Package: of-a-test\\nVersion: 1\\nArchitecture: all\\nMaintainer: nobody <nobody@localhost>\\nDescription: a file\\n' > /root/p/DEBIAN/control
dpkg-deb --build /root/p /root/p.deb >/dev/null; dpkg -i /root/p.deb >/dev/null; apt-get check -qq";

pub(crate) fn debian_boots_and_keeps_what_is_installed(_shared: &Agent) {
    let lab = Lab::start_with("hthv3", 153, "[volumes]\nquota_mib = 8192\n");
    let agent = lab.agent();
    let image = need("HEARTH_DEBIAN");
    let directory = tempfile::tempdir().expect("a temporary directory");
    agent.ok(&["volume", "create", "--name", "root", "--from-file", shown(&image), "--size", "2048"]);
    let timed = |what: &str, begun: Instant| println!("    {what}: {:.1} s", begun.elapsed().as_secs_f64());

    let begun = Instant::now();
    agent.launch("one", &["--volume", "root:/", "--memory", "256"]);
    timed("launched", begun);
    let begun = Instant::now();
    let release = agent.ok(&["vm", "exec", "one", "--", "cat", "/etc/os-release"]);
    assert!(release.contains("ID=debian"), "{release}");
    timed("its name", begun);
    let begun = Instant::now();
    agent.sh("one", INSTALL);
    timed("a package made and installed", begun);
    let begun = Instant::now();
    agent.ok(&["vm", "stop", "one"]);
    timed("stopped", begun);
    agent.ok(&["vm", "rm", "one"]);
    is_clean(agent, directory.path(), "root");

    agent.launch("two", &["--volume", "root:/", "--memory", "256"]);
    assert_eq!(agent.sh("two", "cat /opt/file; dpkg-query -W of-a-test"), "of a package\nof-a-test\t1");
    agent.ok(&["vm", "rm", "two"]);
    lab.ends();
}
