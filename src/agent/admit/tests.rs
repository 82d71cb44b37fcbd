//! Admission at its edges.

use super::*;
use crate::agent::record::BundleOrder;
use crate::bundle::manifest::DeviceSlot;
use crate::clock::UnixNanos;
use crate::units::{FlowLimits, NetLimits, Rate};

fn image() -> Image {
    Image {
        name: "demo".to_owned(),
        digest: String::new(),
        kernel_bytes: 1,
        initrd_bytes: None,
        command_line: String::new(),
        memory_mib_min: 64,
        container: None,
        created_at: UnixNanos(0),
    }
}

fn request() -> LaunchRequest {
    LaunchRequest { image: "demo".to_owned(), ..LaunchRequest::default() }
}

fn decide(request: &LaunchRequest, image: &Image) -> Result<VmSpec, LaunchError> {
    decide_on(request, image, None)
}

fn decide_on(
    request: &LaunchRequest,
    image: &Image,
    bundle: Option<(&BundleId, &Manifest)>,
) -> Result<VmSpec, LaunchError> {
    let host = HostFacts { memory_bytes: 1 << 30, memory_available_bytes: 1 << 30, ..HostFacts::default() };
    let limits = Limits::default();
    admit(request, &Facts { limits: &limits, host: &host, image, bundle, additions: "", vms: &[] })
}

#[test]
fn limits_hold_at_their_edges() {
    for (vcpus, fits) in [(0, false), (1, true), (32, true), (33, false), (1000, false)] {
        assert_eq!(decide(&LaunchRequest { vcpus: Some(vcpus), ..request() }, &image()).is_ok(), fits, "{vcpus}");
    }
    for (memory_mib, fits) in [(0, false), (63, false), (64, true), (768, true), (769, false), (u64::MAX, false)] {
        assert_eq!(
            decide(&LaunchRequest { memory_mib: Some(memory_mib), ..request() }, &image()).is_ok(),
            fits,
            "{memory_mib}"
        );
    }
    let room = COMMAND_LINE_BYTES_MAX - DEVICE_WORDS_BYTES_MAX - "console=ttyS0 ".len();
    for (length, fits) in [(room, true), (room + 1, false)] {
        let image = Image { command_line: "x".repeat(length), ..image() };
        assert_eq!(decide(&request(), &image).is_ok(), fits, "{length}");
    }
}

#[test]
fn limits_nobody_can_mean_are_refused() {
    for (per_s, fits) in [(0, false), (1_000_000, true), (u64::MAX, false)] {
        let rx = FlowLimits { bytes: Some(Rate::bytes(per_s, None)), frames: None };
        let network_limits = NetLimits { rx, ..NetLimits::default() };
        let decided = decide(&LaunchRequest { network_limits, ..request() }, &image());
        assert_eq!(decided.as_ref().ok().map(|spec| spec.network_limits), fits.then_some(network_limits));
    }
}

#[test]
fn a_disk_is_written_by_one_vm_only() {
    let disk = |path: &str, read_only| DiskSpec { path: path.to_owned(), read_only, shared: false };
    for (disks, fits) in [
        (vec![disk("/a", false)], true),
        (vec![disk("a", false)], false),
        (vec![disk("/a", true), disk("/a", true)], true),
        (vec![disk("/a", true), disk("/a", false)], false),
        (vec![disk("/a", true); DISKS_MAX], true),
        (vec![disk("/a", true); DISKS_MAX + 1], false),
    ] {
        assert_eq!(decide(&LaunchRequest { disks, ..request() }, &image()).is_ok(), fits);
    }
}

#[test]
fn a_bundle_is_launched_as_it_was_frozen() {
    // One vCPU, 1 MiB, one disk, one interface.
    let bytes = include_bytes!("../../../tests/golden/bundle_v1/manifest.json");
    let manifest = crate::bundle::manifest::read(bytes).unwrap();
    let id = crate::bundle::manifest::id_of(bytes);
    let image = Image { memory_mib_min: 0, ..image() };
    let decide = |request: &LaunchRequest| decide_on(request, &image, Some((&id, &manifest)));
    let disk = DiskSpec { path: "/a".to_owned(), read_only: true, shared: false };
    let same = LaunchRequest { disks: vec![disk.clone()], ..request() };
    let spec = decide(&same).unwrap();
    assert_eq!((spec.vcpus, spec.memory_mib, spec.interfaces, spec.disks.len()), (1, 1, 1, 1));
    assert_eq!(spec.bundle.as_ref(), Some(&id));
    // It was made before there were balloons; one with a balloon keeps it, and so does what boots an image.
    assert!(!spec.balloon);
    let mut with_balloon = manifest.clone();
    let device = with_balloon.machine.devices[0].clone();
    with_balloon.machine.devices.push(DeviceSlot { slot: 2, kind: DeviceKind::Balloon, ..device });
    assert!(decide_on(&same, &image, Some((&id, &with_balloon))).unwrap().balloon);
    assert!(decide_on(&request(), &image, None).unwrap().balloon);
    let said = LaunchRequest { vcpus: Some(1), memory_mib: Some(1), interfaces: Some(1), ..same.clone() };
    assert_eq!(decide(&said).unwrap(), spec, "what it has may be said");
    for (other, wanted) in [
        (LaunchRequest { vcpus: Some(2), ..same.clone() }, ("vcpus", 2, 1)),
        (LaunchRequest { memory_mib: Some(128), ..same.clone() }, ("memory_mib", 128, 1)),
        (LaunchRequest { interfaces: Some(2), ..same.clone() }, ("interfaces", 2, 1)),
        (LaunchRequest { disks: Vec::new(), ..same.clone() }, ("disks", 0, 1)),
        (LaunchRequest { disks: vec![disk; 2], ..same }, ("disks", 2, 1)),
    ] {
        let Err(LaunchError::BundleShape { what, found, frozen, .. }) = decide(&other) else { panic!("{wanted:?}") };
        assert_eq!((what, found, frozen), wanted);
    }
}

#[test]
fn a_warm_up_has_bounds() {
    let build = |build: BuildSpec| {
        let order = BundleOrder::default();
        decide(&LaunchRequest { build: Some((build, order)), ..request() }, &image())
    };
    let plain = BuildSpec { warmup: None, ready_marker: None, timeout_s: 300 };
    for (spec, fits) in [
        (plain.clone(), true),
        (BuildSpec { timeout_s: 0, ..plain.clone() }, false),
        (BuildSpec { timeout_s: WARMUP_S_MAX + 1, ..plain.clone() }, false),
        (BuildSpec { warmup: Some(String::new()), ..plain.clone() }, false),
        (BuildSpec { warmup: Some("x".repeat(WARMUP_BYTES_MAX + 1)), ..plain.clone() }, false),
        (BuildSpec { ready_marker: Some(String::new()), ..plain.clone() }, false),
        (BuildSpec { ready_marker: Some("x".repeat(MARKER_BYTES_MAX)), ..plain }, true),
    ] {
        assert_eq!(build(spec.clone()).is_ok(), fits, "{:?} s", spec.timeout_s);
    }
}

fn mounted(volume: &str, mount: &str) -> VolumeWish {
    let (volume, mount) = (volume.to_owned(), Some(mount.to_owned()));
    VolumeWish { volume, read_only: false, mount, limits: Default::default() }
}

#[test]
fn a_guest_that_boots_has_one_root() {
    let with = |volumes: Vec<VolumeWish>| LaunchRequest { volumes, ..request() };
    assert!(decide(&with(vec![mounted("a", "/"), mounted("b", "/srv")]), &image()).is_ok());
    let two = decide(&with(vec![mounted("a", "/"), mounted("b", "/")]), &image());
    assert!(
        matches!(two, Err(LaunchError::TwoRoots { first, second }) if (first.as_str(), second.as_str()) == ("a", "b"))
    );
    let bytes = include_bytes!("../../../tests/golden/bundle_v1/manifest.json");
    let manifest = crate::bundle::manifest::read(bytes).unwrap();
    let id = crate::bundle::manifest::id_of(bytes);
    let disks = vec![DiskSpec { path: "/a".to_owned(), read_only: true, shared: false }];
    let image = Image { memory_mib_min: 0, ..image() };
    let frozen = LaunchRequest { disks, ..with(vec![mounted("a", "/")]) };
    let refused = decide_on(&frozen, &image, Some((&id, &manifest)));
    assert!(matches!(refused, Err(LaunchError::RootInBundle { volume }) if volume == "a"));
}

#[test]
fn a_mount_is_a_plain_path_and_not_another_name_of_the_root() {
    for mount in ["/srv", "/srv/", "/a/b c", "/...", "/.hidden"] {
        assert!(is_mount(mount), "{mount}");
    }
    let long = format!("/{}", "x".repeat(MOUNT_BYTES_MAX));
    for mount in ["", "/", "//", "/.", "/..", "/srv/..", "/a//b", "srv", "/a\nb", &long] {
        assert!(!is_mount(mount), "{mount:?}");
    }
}
