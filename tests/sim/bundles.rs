//! Bundles: built, taken, launched from and removed, with an agent that dies or an effect that fails at each point.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{
    BuildRequest, BuildSpec, BundleError, BundleWork, Door, LaunchError, LaunchRequest, Launched, OperationRecord,
    OperationState, SnapshotRequest, Verb, VerbError, VmError, VmState,
};
use hearth::ids::BundleId;
use hearth::sim::{Faults, SimHost};

use crate::life::{life, request};
use crate::points::{Story, at_every_point, at_every_point_and, crash, fail, nothing};

/// A bundle of the image, warmed up by this line until it says the marker.
pub(crate) fn build(name: Option<String>, warmup: Option<&str>, marker: Option<&str>) -> BuildRequest {
    let (warmup, ready_marker) = (warmup.map(str::to_owned), marker.map(str::to_owned));
    let build = BuildSpec { warmup, ready_marker, timeout_s: 60 };
    let image = "demo".to_owned();
    BuildRequest {
        name,
        image,
        vcpus: None,
        memory_mib: None,
        interfaces: None,
        spare_disks: 0,
        with_secrets: false,
        build,
        key: None,
    }
}

/// A VM launched from a bundle.
pub(crate) fn from_bundle(name: Option<String>, bundle: &str) -> LaunchRequest {
    LaunchRequest { name, bundle: Some(bundle.to_owned()), ..LaunchRequest::default() }
}

/// The operation, once it has ended.
async fn ended(door: &Arc<dyn Door>, operation: &OperationRecord) -> OperationRecord {
    let mut events = door.last_event();
    loop {
        events.borrow_and_update();
        let found = door.operation(operation.id.as_str()).await.expect("operations").expect("it is kept");
        if found.state != OperationState::Running {
            return found;
        }
        events.changed().await.expect("the agent is there");
    }
}

/// Builds a bundle and waits for it; the operation.
pub(crate) async fn built(door: &Arc<dyn Door>, request: BuildRequest) -> OperationRecord {
    let work = door.build_bundle(request).await;
    let Ok(BundleWork::Operation(operation)) = work else { panic!("a build: {work:?}") };
    ended(door, &operation).await
}

fn bundle_of(operation: &OperationRecord) -> BundleId {
    let bundle = operation.makes.as_ref().and_then(|order| order.bundle.clone());
    bundle.unwrap_or_else(|| panic!("no bundle: {:?}", operation.error))
}

async fn runs(door: &Arc<dyn Door>, wanted: LaunchRequest) {
    let launch = door.launch(wanted).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch: {launch:?}") };
    door.launched(vm).await.expect("it runs");
}

fn named(name: &str) -> Option<String> {
    Some(name.to_owned())
}

const NOW: Verb = Verb::Remove { grace: Duration::ZERO };

/// A bundle `warm`, built.
pub(crate) async fn warm(door: Arc<dyn Door>) {
    let operation = built(&door, build(named("warm"), Some("true"), None)).await;
    assert_eq!(operation.state, OperationState::Succeeded, "{:?}", operation.error);
}

/// A build, a VM from it, snapshots of it as it runs and as it is paused, and the end of all.
async fn whole_story(host: SimHost, door: Arc<dyn Door>) {
    let operation = built(&door, build(named("warm"), Some("echo READY"), Some("READY"))).await;
    let warm = bundle_of(&operation);
    runs(&door, from_bundle(named("clone"), "warm")).await;
    let full = door
        .snapshot("clone", SnapshotRequest { name: named("full"), diff: false, live: false, with_secrets: false })
        .await
        .expect("a snapshot");
    door.ask("clone", Verb::Pause).await.expect("paused");
    let diff = door
        .snapshot("clone", SnapshotRequest { name: named("diff"), diff: true, live: false, with_secrets: false })
        .await
        .expect("a diff");
    assert_eq!(door.vm("clone").expect("it is there").state, VmState::Paused);
    door.ask("clone", Verb::Resume).await.expect("resumed");
    let live = SnapshotRequest { name: named("live"), diff: true, live: true, with_secrets: false };
    let live = door.snapshot("clone", live).await.expect("a live diff");
    assert_eq!(door.vm("clone").expect("it is there").state, VmState::Running);
    let removed = door.remove_bundle("warm").await;
    assert!(matches!(removed, Err(BundleError::InUse { vms: 1, .. })), "{removed:?}");
    door.ask("clone", NOW).await.expect("removed");
    let removed = door.remove_bundle("warm").await;
    assert!(matches!(removed, Err(BundleError::Remove(_))), "the diff builds on it: {removed:?}");
    for bundle in [bundle_of(&live), bundle_of(&diff), bundle_of(&full), warm] {
        door.remove_bundle(bundle.as_str()).await.expect("removed");
    }
    assert_eq!((host.bundles(), host.staged(), host.directories()), (vec![], vec![], vec![]));
}

#[test]
fn a_crash_at_every_point_of_bundles_is_recovered_from() {
    let points = at_every_point(crash, nothing, |host, door| Box::pin(whole_story(host, door)));
    println!("{points} points");
    assert!(points > 120, "a build, a launch, two snapshots and removals have more points than {points}");
}

/// A build of which one effect may fail.
/// The VMM of a build that was as good as over is not needed for its end.
#[test]
fn a_build_whose_agent_and_vmm_are_killed_at_any_point_made_its_bundle_or_failed() {
    let story: Story = |_, door| Box::pin(async move { drop(built(&door, build(None, Some("true"), None)).await) });
    let points = at_every_point_and(SimHost::kill_some_vmm, crash, nothing, story);
    assert!(points > 20, "a build has more points than {points}");
}

async fn build_with_a_fault(host: SimHost, door: Arc<dyn Door>) {
    let Ok(BundleWork::Operation(operation)) = door.build_bundle(build(named("warm"), None, None)).await else {
        return;
    };
    let operation = ended(&door, &operation).await;
    let there = usize::from(operation.state == OperationState::Succeeded);
    assert_eq!(host.bundles().len(), there, "{:?}", operation.error);
    assert_eq!(operation.error.is_none(), there == 1);
}

#[test]
fn a_build_that_fails_at_any_point_leaves_nothing() {
    let points = at_every_point(fail, nothing, |host, door| Box::pin(build_with_a_fault(host, door)));
    assert!(points > 40, "a build has more points than {points}");
}

#[test]
fn no_bundle_is_made_of_secrets_unasked() {
    let host = SimHost::new(51);
    let told = host.clone();
    let done = life(&host, Faults::default(), |door| async move {
        warm(Arc::clone(&door)).await;
        runs(&door, from_bundle(named("clone"), "warm")).await;
        let refused = |error: VmError| {
            let VmError::Verb(VerbError::Failed { code, message, .. }) = error else { panic!("{error}") };
            assert_eq!(code, "secrets");
            message
        };
        told.guests_hold(&["token", "key"]);
        for live in [false, true] {
            let wanted = SnapshotRequest { live, ..SnapshotRequest::default() };
            let message = refused(door.snapshot("clone", wanted).await.expect_err("it holds secrets"));
            assert!(message.contains("(token, key)") && message.contains("--with-secrets"), "{message}");
            assert_eq!(door.vm("clone").expect("it is there").state, VmState::Running);
        }
        let operation = built(&door, build(named("other"), None, None)).await;
        let error = operation.error.expect("no bundle is made of it");
        assert_eq!(error.code, "secrets");
        assert_eq!((told.bundles().len(), told.staged()), (1, vec![]));

        // One that stands still cannot be asked: what it said before counts.
        door.ask("clone", Verb::Pause).await.expect("paused");
        told.guests_hold(&[]);
        refused(door.snapshot("clone", SnapshotRequest::default()).await.expect_err("it held secrets"));
        assert_eq!(door.vm("clone").expect("it is there").state, VmState::Paused);
        let asked_for = || SnapshotRequest { with_secrets: true, ..SnapshotRequest::default() };
        door.snapshot("clone", asked_for()).await.expect("it was asked for");
        door.ask("clone", Verb::Resume).await.expect("resumed");
        door.ask("clone", Verb::Pause).await.expect("paused");
        door.snapshot("clone", SnapshotRequest::default()).await.expect("it holds none any more");
        door.ask("clone", Verb::Resume).await.expect("resumed");
        told.guests_hold(&["token"]);
        door.snapshot("clone", asked_for()).await.expect("it was asked for");
        assert_eq!(told.bundles().len(), 4);
    });
    done.expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

/// A snapshot of which one effect may fail: the VM is as before, or tells of its end.
async fn snapshot_with_a_fault(host: SimHost, door: Arc<dyn Door>, live: bool) {
    let Ok(before) = door.vm("web") else { panic!("it is there") };
    let taken =
        door.snapshot("web", SnapshotRequest { name: named("still"), diff: true, live, with_secrets: false }).await;
    let after = door.vm("web").expect("it is there");
    assert_eq!(host.staged(), [], "{taken:?}");
    assert_eq!(host.bundles().len(), 1 + usize::from(taken.is_ok()), "{taken:?}");
    match (&taken, &after.state) {
        (_, state) if *state == before.state => assert!(host.living().contains(&after.id)),
        (Err(_), VmState::Failed { .. } | VmState::Stopped) => assert!(host.living().is_empty()),
        (_, state) => panic!("it was {}, and is {}: {taken:?}", before.state.name(), state.name()),
    }
}

async fn a_clone(door: Arc<dyn Door>) {
    warm(door.clone()).await;
    runs(&door, from_bundle(named("web"), "warm")).await;
}

async fn a_paused_clone(door: Arc<dyn Door>) {
    a_clone(door.clone()).await;
    door.ask("web", Verb::Pause).await.expect("paused");
}

#[test]
fn a_snapshot_that_fails_at_any_point_leaves_the_vm_as_it_was() {
    let held: Story = |host, door| Box::pin(snapshot_with_a_fault(host, door, false));
    let live: Story = |host, door| Box::pin(snapshot_with_a_fault(host, door, true));
    let running = at_every_point(fail, |_, door| Box::pin(a_clone(door)), held);
    let paused = at_every_point(fail, |_, door| Box::pin(a_paused_clone(door)), held);
    let copied = at_every_point(fail, |_, door| Box::pin(a_clone(door)), live);
    let points = [running, paused, copied];
    assert!(running > 20 && paused > 10 && copied > running, "snapshots have more points than {points:?}");
}

/// A launch from a bundle of which one effect may fail.
async fn launch_with_a_fault(host: SimHost, door: Arc<dyn Door>) {
    let Ok(Launched::Vm(vm)) = door.launch(from_bundle(named("web"), "warm")).await else { return };
    let ran = door.launched(vm).await;
    if let Ok(vm) = &ran {
        assert_eq!(vm.state, VmState::Running);
        assert!(host.living().contains(&vm.id));
    }
    drop(door.ask("web", NOW).await);
}

#[test]
fn a_launch_from_a_bundle_fails_at_any_point_and_leaves_nothing() {
    let points =
        at_every_point(fail, |_, door| Box::pin(warm(door)), |host, door| Box::pin(launch_with_a_fault(host, door)));
    assert!(points > 30, "a launch has more points than {points}");
}

#[test]
fn a_guest_from_a_bundle_answers_at_once() {
    let host = SimHost::new(1);
    life(&host, Faults::default(), |door| async move {
        warm(door.clone()).await;
        let begun = tokio::time::Instant::now();
        runs(&door, from_bundle(None, "warm")).await;
        assert!(begun.elapsed() < Duration::from_secs(1), "it took {:?}", begun.elapsed());
    })
    .expect("no crash");
}

#[test]
fn what_is_asked_during_a_snapshot_waits_for_its_end() {
    let host = SimHost::new(2);
    life(&host, Faults::default(), |door| async move {
        for grace in [Duration::ZERO, Duration::from_secs(10)] {
            runs(&door, request(named("web"))).await;
            let wanted = SnapshotRequest::default();
            let (taken, removed) = tokio::join!(door.snapshot("web", wanted), door.ask("web", Verb::Remove { grace }));
            assert!(taken.is_ok_and(|operation| operation.state == OperationState::Succeeded));
            removed.expect("removed afterwards");
            assert!(door.vms().is_empty());
        }
        runs(&door, request(named("web"))).await;
        let stop = Verb::Stop { grace: Duration::from_secs(10) };
        let wanted = SnapshotRequest::default();
        let (taken, stopped) = tokio::join!(door.snapshot("web", wanted), door.ask("web", stop));
        assert!(taken.is_ok());
        assert_eq!(stopped.expect("stopped afterwards").state, VmState::Stopped);
    })
    .expect("no crash");
}

#[test]
fn a_live_snapshot_counts_both_parts_and_gives_way_to_an_end() {
    let host = SimHost::new(12);
    let ran = life(&host, Faults::default(), |door| {
        let host = host.clone();
        async move {
            let live = || SnapshotRequest { live: true, ..SnapshotRequest::default() };
            runs(&door, request(named("web"))).await;
            let taken = door.snapshot("web", live()).await.expect("a snapshot");
            let order = taken.makes.expect("it makes a bundle");
            assert_eq!((order.rounds, order.memory_bytes), (Some(2), Some((1 << 20) + (1 << 12))));
            let grace = Duration::from_secs(10);
            for verb in [Verb::Stop { grace }, Verb::Remove { grace }] {
                let name = named(verb.name());
                runs(&door, request(name.clone())).await;
                let web = name.unwrap_or_default();
                let (taken, ended) = tokio::join!(door.snapshot(&web, live()), door.ask(&web, verb));
                let error = taken.expect_err("it is given up");
                assert!(matches!(&error, VmError::Verb(_)) && error.to_string().contains("cancelled"), "{error:?}");
                ended.expect("it ends");
                assert_eq!((host.bundles().len(), host.staged()), (1, vec![]));
            }
        }
    });
    ran.expect("no crash");
}

#[test]
fn a_build_that_is_removed_ends_and_leaves_nothing() {
    let host = SimHost::new(3);
    life(&host, Faults::default(), |door| {
        let host = host.clone();
        async move {
            for verb in [NOW, Verb::Stop { grace: Duration::from_secs(10) }] {
                let work = door.build_bundle(build(None, Some("never"), Some("READY"))).await;
                let Ok(BundleWork::Operation(operation)) = work else { panic!("a build: {work:?}") };
                tokio::time::sleep(Duration::from_secs(2)).await;
                door.ask(operation.vm.as_str(), verb).await.expect("ended");
                assert_eq!(ended(&door, &operation).await.state, OperationState::Cancelled);
                tokio::time::sleep(Duration::from_secs(1)).await;
                assert!(door.vms().is_empty());
                assert_eq!((host.bundles(), host.staged(), host.jailed()), (vec![], vec![], vec![]));
            }
        }
    })
    .expect("no crash");
}

#[test]
fn a_warm_up_that_fails_says_why() {
    let host = SimHost::new(4);
    life(&host, Faults::default(), |door| async move {
        for (line, marker, wanted) in [("false", None, "ended with"), ("echo cold", Some("hot"), "did not say")] {
            let operation = built(&door, build(None, Some(line), marker)).await;
            let error = operation.error.expect("an error");
            assert_eq!((error.code.as_str(), operation.state), ("warm_up", OperationState::Failed));
            assert!(error.message.contains(wanted), "{}", error.message);
        }
        let operation = built(&door, build(named("told"), None, Some("simulated"))).await;
        assert_eq!(operation.state, OperationState::Succeeded, "the console said it");
    })
    .expect("no crash");
}

#[test]
fn a_name_is_one_bundles() {
    let host = SimHost::new(5);
    life(&host, Faults::default(), |door| async move {
        let wanted = || build(named("warm"), Some("true"), None);
        let (one, two) = tokio::join!(door.build_bundle(wanted()), door.build_bundle(wanted()));
        let refused = [one.err(), two.err()].into_iter().flatten().collect::<Vec<_>>();
        let [LaunchError::BundleToBuild(BundleError::NameTaken { .. })] = refused.as_slice() else {
            panic!("one of two: {refused:?}")
        };
        for vm in ["one", "two"] {
            runs(&door, request(named(vm))).await;
        }
        let wanted = || SnapshotRequest { name: named("still"), diff: false, live: false, with_secrets: false };
        let (one, two) = tokio::join!(door.snapshot("one", wanted()), door.snapshot("two", wanted()));
        assert!(one.is_ok() != two.is_ok(), "{one:?} {two:?}");
        let refused = door.snapshot("one", wanted()).await;
        assert!(matches!(refused, Err(VmError::Bundle(BundleError::NameTaken { .. }))), "{refused:?}");
        for vm in ["one", "two"] {
            assert_eq!(door.vm(vm).expect("it is there").state, VmState::Running);
        }
    })
    .expect("no crash");
}
