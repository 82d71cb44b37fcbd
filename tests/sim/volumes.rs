//! VMs with volumes: with an agent that dies, or an effect that fails, at each point. Whatever happened, a volume has one
//! who writes, and none is left with a lease or a connection that nobody needs.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{
    Door, LaunchRequest, Launched, LeaseRequest, Verb, VmState, VolumeOrigin, VolumeRequest, VolumeWish,
};
use hearth::lease::LeaseMode;
use hearth::sim::{Faults, SimHost};

use crate::life::{life, request};
use crate::points::{at_every_point, crash, fail};

const NAME: &str = "user";

async fn create(door: &Arc<dyn Door>, name: &str) {
    let origin = VolumeOrigin::Empty;
    let request = VolumeRequest { name: Some(name.to_owned()), bytes: Some(1 << 20), origin };
    door.create_volume(request).await.expect("a volume");
}

fn wish(volume: &str) -> VolumeWish {
    VolumeWish { volume: volume.to_owned(), read_only: false, mount: None, limits: Default::default() }
}

fn with_volume() -> LaunchRequest {
    LaunchRequest { volumes: vec![wish("first")], spare_disks: 1, ..request(Some(NAME.to_owned())) }
}

async fn launched(door: &Arc<dyn Door>) {
    let launch = door.launch(with_volume()).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch: {launch:?}") };
    door.launched(vm).await.expect("it runs");
}

async fn two_volumes(_: SimHost, door: Arc<dyn Door>) {
    create(&door, "first").await;
    create(&door, "second").await;
}

/// Attached, taken, handed over, paused and hibernated.
async fn whole_story(host: SimHost, door: Arc<dyn Door>) {
    launched(&door).await;
    door.attach_volume(NAME, wish("second")).await.expect("attached");
    assert_eq!(host.attachments().len(), 2);
    door.detach_volume(NAME, "first", false).await.expect("taken");
    assert_eq!(host.attachments().len(), 1);
    door.ask(NAME, Verb::HandOver).await.expect("handed over");
    assert_eq!(door.vm(NAME).expect("it is there").state, VmState::Running);
    door.ask(NAME, Verb::Stop { grace: Duration::from_secs(10) }).await.expect("stopped");
    assert_eq!(host.attachments(), []);
}

#[test]
fn a_vm_gets_and_gives_up_volumes() {
    let host = SimHost::new(31);
    let told = host.clone();
    let done = life(&host, Faults::default(), |door| async move {
        two_volumes(told.clone(), Arc::clone(&door)).await;
        whole_story(told, Arc::clone(&door)).await;
        for volume in door.volumes().await.expect("volumes") {
            assert_eq!(volume.active, None, "{}", volume.id);
            door.remove_volume(volume.id.as_str()).await.expect("nobody needs it");
        }
    });
    done.expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let host = SimHost::new(32);
    let told = host.clone();
    let done = life(&host, Faults::default(), |door| async move {
        two_volumes(told.clone(), Arc::clone(&door)).await;
        launched(&door).await;
        let before = door.vm(NAME).expect("it is there").spec.clone();
        for (volume, wanted) in [("first", "active lease"), ("third", "there is no volume")] {
            let error = door.attach_volume(NAME, wish(volume)).await.expect_err("refused").to_string();
            assert!(error.contains(wanted), "{volume}: {error}");
        }
        assert!(door.detach_volume(NAME, "second", false).await.is_err(), "it does not have it");
        let error = door.launch(LaunchRequest { volumes: vec![wish("first")], ..request(None) }).await;
        assert!(error.is_err_and(|error| error.to_string().contains("active lease")));
        assert!(door.remove_volume("first").await.is_err(), "somebody has it");
        let shrunk = door.resize_volume("first", 4096).await;
        assert!(shrunk.is_err_and(|error| error.to_string().contains("shrink")));
        // Another one may not have what somebody reads.
        let shared = LeaseRequest { mode: LeaseMode::Shared, holder: "x".to_owned(), ttl_s: None, break_others: false };
        let lease = door.acquire_lease("second", shared).await.expect("a reader");
        let error = door.attach_volume(NAME, wish("second")).await.expect_err("somebody reads it");
        assert!(error.to_string().contains("shared leases"), "{error}");
        assert_eq!(door.vm(NAME).expect("it is there").spec, before);
        door.release_lease("second", &lease.id).await.expect("released");
        door.attach_volume(NAME, wish("second")).await.expect("now it may");
        let error = door.attach_volume(NAME, wish("first")).await.expect_err("it has it").to_string();
        assert!(error.contains("lease"), "{error}");
        assert!(told.attachments().len() == 2);
    });
    done.expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn an_agent_that_dies_at_any_point_leaves_no_lease_behind() {
    let points = at_every_point(
        crash,
        |host, door| Box::pin(two_volumes(host, door)),
        |host, door| Box::pin(whole_story(host, door)),
    );
    println!("{points} points");
    assert!(points > 60, "{points} points");
}

/// As far as it gets.
async fn tried(door: Arc<dyn Door>) {
    if let Ok(Launched::Vm(vm)) = door.launch(with_volume()).await {
        drop(door.launched(vm).await);
    }
    drop(door.attach_volume(NAME, wish("second")).await);
    drop(door.detach_volume(NAME, "first", false).await);
    drop(door.ask(NAME, Verb::HandOver).await);
}

#[test]
fn an_effect_that_fails_at_any_point_leaves_no_lease_behind() {
    let points = at_every_point(fail, |host, door| Box::pin(two_volumes(host, door)), |_, door| Box::pin(tried(door)));
    println!("{points} points");
    assert!(points > 60, "{points} points");
}
