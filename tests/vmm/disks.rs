//! A disk on a file of a real guest, with every filter in force: its ring was made before the jail was closed, and serves
//! without a thread.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use hearth::sys::uring::Ring;
use hearth::wire::control::{Answer, DeviceSpec, Request};

use crate::guest::MEMORY_BYTES;
use crate::volumes::sh;
use crate::{NONCE, Vmm, command_line, demo};

const BYTES: u64 = 1 << 20;

/// Writes all of the disk, with flushes between, while others read it past the guest's page cache.
const USE: &str = "seq 1000000 1149999 | head -c 1048576 > /tmp/p; \
     dd if=/dev/vda of=/dev/null bs=32k iflag=direct 2>/dev/null & dd if=/dev/vda of=/dev/null bs=1M iflag=direct 2>/dev/null & \
     for i in 0 1 2 3; do dd if=/tmp/p of=/dev/vda bs=64k skip=$((i * 4)) seek=$((i * 4)) count=4 conv=notrunc,fsync \
     2>/dev/null || exit 1; done; wait; echo 3 > /proc/sys/vm/drop_caches; cmp /dev/vda /tmp/p && md5sum < /dev/vda";

fn launch(disk: &File) -> Vmm {
    let mut vmm = Vmm::start();
    vmm.ask(&Request::Hello { nonce: NONCE, epoch: 1 });
    let kernel = File::open(demo().join("vmlinux")).unwrap();
    let disk = [(DeviceSpec::Block { index: 0, read_only: false }, disk.as_fd())];
    let launched = vmm.launch_shaped((1, MEMORY_BYTES), &command_line(), &kernel, &disk);
    assert!(matches!(launched, Answer::Launched(_)), "{launched:?}\n{}", vmm.log());
    vmm
}

/// Names of a VMM's threads, and how many filters each has.
fn threads(vmm: &Vmm) -> Vec<(String, String)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", vmm.spawned.pid)).unwrap();
    // The kernel's threads come and go.
    let statuses = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok());
    let word = |status: &str, field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        line.trim().to_owned()
    };
    statuses.map(|status| (word(&status, "Name:"), word(&status, "Seccomp_filters:"))).collect()
}

#[test]
fn a_guest_uses_a_disk_without_a_thread_for_it() {
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(BYTES).unwrap();
    let mut vmm = launch(&disk);
    assert_eq!(vmm.ask(&Request::Resume), Answer::Done);
    let sum = sh(&vmm, USE);
    let mut written = vec![0; usize::try_from(BYTES).unwrap()];
    disk.read_exact_at(&mut written, 0).unwrap();
    let mut copy = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut copy, &written).unwrap();
    let md5 = std::process::Command::new("md5sum").arg(copy.path()).output().unwrap();
    let md5 = String::from_utf8(md5.stdout).unwrap();
    assert_eq!(sum.split_whitespace().next(), md5.split_whitespace().next(), "{sum}\n{}", vmm.log());

    let threads = threads(&vmm);
    let has_thread = threads.iter().any(|(name, _)| name.starts_with("disk-"));
    let has_io_uring = Ring::make(1).is_ok();
    assert_ne!(has_thread, has_io_uring, "{threads:?}");
    assert_ne!(vmm.log().contains("io_uring"), has_io_uring, "{}", vmm.log());
    // The kernel's threads for a ring are under the filters of whoever asked for them.
    assert!(threads.iter().all(|(_, filters)| filters == "3"), "{threads:?}");
    assert_eq!(vmm.ask(&Request::Pause), Answer::Done);
    assert_eq!(vmm.ask(&Request::Stop), Answer::Done);
    vmm.wait_for_end();
}
