//! Machines that are kept ready: made, taken over by launches, ended, with an agent that dies or an effect that fails at
//! each point.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{
    BuildRequest, BundleError, Door, Launched, OperationState, PoolError, PoolView, Verb, VmRecord, VmState,
};
use hearth::sim::SimHost;

use crate::bundles::{build, built, from_bundle, warm};
use crate::life::life;
use crate::points::{Story, at_every_point, at_every_point_and, crash, fail};
use crate::rest::quiet_life;

const NOW: Verb = Verb::Remove { grace: Duration::ZERO };

/// Waits until a pool is as it is to be.
async fn until(door: &Arc<dyn Door>, is_so: impl Fn(&PoolView) -> bool) -> PoolView {
    for _ in 0..10_000 {
        // What fails once may be this look.
        if let Some(pool) = door.pool("warm").await.ok().filter(&is_so) {
            return pool;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{:?}", door.pool("warm").await)
}

async fn launched(door: &Arc<dyn Door>, name: &str) -> Arc<VmRecord> {
    let launch = door.launch(from_bundle(Some(name.to_owned()), "warm")).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch: {launch:?}") };
    door.launched(vm).await.expect("it runs")
}

/// Two are kept ready; three launches in a row take both and make one; then there are two again, others than before.
async fn whole_story(host: SimHost, door: Arc<dyn Door>) {
    let pool = door.set_pool("warm", 2).await.expect("a pool");
    assert_eq!((pool.size, pool.claimed, pool.missed), (2, 0, 0));
    until(&door, |pool| pool.ready == 2).await;
    let ready = host.living();
    let mut vms = Vec::new();
    for name in ["one", "two", "three"] {
        vms.push(launched(&door, name).await);
    }
    let taken = vms.iter().filter(|vm| ready.contains(&vm.id)).count();
    assert_eq!((taken, vms.len()), (2, 3), "two were ready");
    let pool = until(&door, |pool| pool.ready == 2).await;
    // The third may have found one that was made behind the first.
    assert!(pool.claimed >= 2 && pool.claimed + pool.missed == 3, "{pool:?}");
    let names = ["one", "two", "three"].map(|name| door.vm(name).expect("it is there").name.clone());
    assert_eq!(names.map(|name| name.expect("a name")), ["one", "two", "three"].map(str::to_owned));
    let removed = door.remove_bundle("warm").await;
    assert!(matches!(removed, Err(BundleError::InUse { .. })), "{removed:?}");
    for name in ["one", "two", "three"] {
        door.ask(name, NOW).await.expect("removed");
    }
    let removed = door.remove_bundle("warm").await;
    assert!(matches!(removed, Err(BundleError::Pooled { size: 2, .. })), "{removed:?}");
    let pool = door.set_pool("warm", 1).await.expect("smaller");
    assert_eq!(pool.size, 1);
    until(&door, |pool| pool.ready == 1).await;
    door.remove_pool("warm").await.expect("removed");
    assert!(matches!(door.pool("warm").await, Err(PoolError::Unknown { .. })));
    assert_eq!((host.living(), host.directories(), host.jailed()), (vec![], vec![], vec![]));
}

fn warm_first(_: SimHost, door: Arc<dyn Door>) -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
    Box::pin(warm(door))
}

#[test]
fn a_crash_at_every_point_of_a_pool_is_recovered_from() {
    let points = at_every_point(crash, warm_first, |host, door| Box::pin(whole_story(host, door)));
    println!("{points} points");
    assert!(points > 60, "a pool, three launches and removals have more points than {points}");
}

/// The next agent finds neither agent nor machines, in whatever state they were.
#[test]
fn a_crash_with_a_killed_machine_is_recovered_from() {
    let points =
        at_every_point_and(SimHost::kill_some_vmm, crash, warm_first, |host, door| Box::pin(whole_story(host, door)));
    assert!(points > 60, "{points}");
}

/// A pool and one launch, of which one effect may fail.
async fn with_a_fault(host: SimHost, door: Arc<dyn Door>) {
    if door.set_pool("warm", 2).await.is_err() {
        return;
    }
    let pool = until(&door, |pool| pool.ready == 2).await;
    assert_eq!(pool.trouble, None, "what failed once is done by now");
    if let Ok(Launched::Vm(vm)) = door.launch(from_bundle(Some("one".to_owned()), "warm")).await {
        let ended = door.launched(vm.clone()).await;
        assert_eq!(host.living().contains(&vm.id), ended.is_ok());
    }
}

#[test]
fn an_effect_that_fails_is_made_good() {
    let story: Story = |host, door| Box::pin(with_a_fault(host, door));
    let points = at_every_point(fail, warm_first, story);
    assert!(points > 20, "{points}");
}

#[test]
fn one_that_dies_is_replaced_and_no_launch_gets_it() {
    let host = SimHost::new(11);
    let done = life(&host, hearth::sim::Faults::default(), |door| {
        let host = host.clone();
        async move {
            warm(Arc::clone(&door)).await;
            door.set_pool("warm", 3).await.expect("a pool");
            for round in 0..20 {
                until(&door, |pool| pool.ready == 3).await;
                host.kill_some_vmm();
                // At once, and a moment later.
                if round % 2 == 1 {
                    tokio::time::sleep(Duration::from_millis(round)).await;
                }
                let vm = launched(&door, "one").await;
                assert_eq!(vm.state, VmState::Running);
                door.ask("one", NOW).await.expect("removed");
            }
            quiet_life(host, door).await;
        }
    });
    assert!(done.is_some());
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn what_cannot_be_kept_ready_is_refused() {
    let host = SimHost::new(12);
    let done = life(&host, hearth::sim::Faults::default(), |door| async move {
        warm(Arc::clone(&door)).await;
        assert!(matches!(door.set_pool("nobody", 1).await, Err(PoolError::Bundle(BundleError::Find(_)))));
        assert!(matches!(door.set_pool("warm", 0).await, Err(PoolError::Size { found: 0 })));
        assert!(matches!(door.set_pool("warm", 257).await, Err(PoolError::Size { found: 257 })));
        // 256 of 256 MiB are as much as the host has.
        let larger = BuildRequest { memory_mib: Some(256), ..build(Some("larger".to_owned()), None, None) };
        assert_eq!(built(&door, larger).await.state, OperationState::Succeeded);
        let refused = door.set_pool("larger", 256).await;
        assert!(matches!(refused, Err(PoolError::Memory { size: 256, .. })), "{refused:?}");
        assert!(matches!(door.remove_pool("warm").await, Err(PoolError::Unknown { .. })));
        assert!(door.pools().await.expect("pools").is_empty());
    });
    assert!(done.is_some());
}
