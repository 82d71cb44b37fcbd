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

fn root_at(volume: &str, mount: &str) -> VolumeWish {
    VolumeWish { mount: Some(mount.to_owned()), ..wish(volume) }
}

async fn create_from_file(door: &Arc<dyn Door>, name: &str) {
    let origin = VolumeOrigin::File("/images/root.img".to_owned());
    let request = VolumeRequest { name: Some(name.to_owned()), bytes: Some(1 << 20), origin };
    door.create_volume(request).await.expect("a volume");
}

#[test]
fn a_root_is_had_from_the_launch_to_the_end() {
    let host = SimHost::new(33);
    let told = host.clone();
    let done = life(&host, Faults::default(), |door| async move {
        create_from_file(&door, "root").await;
        create(&door, "second").await;
        let two = LaunchRequest { volumes: vec![root_at("root", "/"), root_at("second", "/")], ..request(None) };
        let error = door.launch(two).await.expect_err("two roots").to_string();
        assert!(error.contains("both to be the root"), "{error}");
        let volumes = vec![root_at("root", "/")];
        let launch = LaunchRequest { volumes, spare_disks: 1, ..request(Some(NAME.to_owned())) };
        let Ok(Launched::Vm(vm)) = door.launch(launch).await else { panic!("a launch") };
        door.launched(vm).await.expect("it runs");
        let before = door.vm(NAME).expect("it is there").spec.clone();
        let error = door.attach_volume(NAME, root_at("second", "/")).await.expect_err("it has a root").to_string();
        assert!(error.contains("has its root already"), "{error}");
        for force in [false, true] {
            let error = door.detach_volume(NAME, "root", force).await.expect_err("it is the root").to_string();
            assert!(error.contains("is the root of its guest"), "{error}");
        }
        assert_eq!(door.vm(NAME).expect("it is there").spec, before);
        door.ask(NAME, Verb::HandOver).await.expect("handed over");
        door.ask(NAME, Verb::Stop { grace: Duration::from_secs(10) }).await.expect("stopped");
        assert_eq!(told.attachments(), []);
    });
    done.expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn a_volume_without_a_root_is_told_of_and_given_back() {
    let host = SimHost::new(34);
    let told = host.clone();
    let done = life(&host, Faults::default(), |door| async move {
        create(&door, "empty").await;
        let volumes = vec![root_at("empty", "/")];
        let launch = LaunchRequest { volumes, ..request(Some(NAME.to_owned())) };
        let Ok(Launched::Vm(vm)) = door.launch(launch).await else { panic!("a launch") };
        let volume = door.volume("empty").await.expect("it is there").id;
        assert!(door.launched(vm).await.is_err());
        let vm = door.vm(NAME).expect("it is kept for who asks why");
        let VmState::Failed { cause } = &vm.state else { panic!("{:?}", vm.state) };
        let detail = cause.detail().expect("words");
        assert_eq!(cause.name(), "bad_root");
        for part in [volume.as_str(), "/dev/vda has no file system", "hearth volume create --from-file"] {
            assert!(detail.contains(part), "no {part:?}: {detail}");
        }
        door.ask(NAME, Verb::Remove { grace: Duration::ZERO }).await.expect("removed");
        assert_eq!(told.attachments(), []);
        door.remove_volume("empty").await.expect("nobody has it");
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
