//! The last life of a host: no faults any more. Everything comes to rest, then everything is removed, and nothing is left.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{BundleListed, Door, ExecOutput, ExecSpec, OperationState, SessionState, SwapMode, Verb, VmState};
use hearth::sim::SimHost;

/// Virtual time after which everything has to be at rest: boots of 15 s, a deadline of 120 s, stops of 10 s.
pub(crate) const REST: Duration = Duration::from_secs(400);

/// The last agent: no faults any more. Everything comes to rest, then everything is removed.
pub(crate) async fn quiet_life(host: SimHost, door: Arc<dyn Door>) {
    tokio::time::sleep(REST).await;
    let at_rest = |state: &VmState| {
        matches!(
            state,
            VmState::Running | VmState::Paused | VmState::SwappedOut { .. } | VmState::Stopped | VmState::Failed { .. }
        )
    };
    // What is kept ready is whole, whatever was in its way, and goes without a trace.
    for pool in door.pools().await.expect("pools") {
        assert_eq!((pool.ready, &pool.trouble), (pool.size, &None), "{pool:?}");
        door.remove_pool(pool.bundle.as_str()).await.expect("removed");
    }
    for vm in door.vms() {
        assert!(at_rest(&vm.state), "{} is still {}", vm.id, vm.state.name());
        let (lives, holds) = (host.living().contains(&vm.id), vm.state.holds_resources());
        // Of a hibernated VM there is a file instead of a process, and of no other.
        let hibernated = vm.state == VmState::SwappedOut { mode: SwapMode::Hibernate };
        assert_eq!(host.sealed().contains(&vm.id), hibernated, "{} is {}", vm.id, vm.state.name());
        assert_eq!(lives, holds && !hibernated, "{} is {}, its VMM lives: {lives}", vm.id, vm.state.name());
        assert_eq!(host.directories().contains(&vm.id), holds, "{} is {}", vm.id, vm.state.name());
        assert_eq!(host.jailed().contains(&vm.id), holds, "the jail of {}, which is {}", vm.id, vm.state.name());
        if vm.state == VmState::Running {
            let spec = ExecSpec { argv: vec!["true".to_owned()], ..ExecSpec::default() };
            let mut session = door.exec(vm.id.as_str(), spec).await.expect("a running VM runs programs");
            assert!(matches!(session.output.next().await, Ok(ExecOutput::Exited(_))));
        }
    }
    for operation in door.operations().await.expect("operations") {
        assert_ne!(operation.state, OperationState::Running, "{:?} of {} never ended", operation.goal, operation.vm);
    }
    nothing_unknown(&host, &door);
    bundles_are_whole(&host, &door).await;
    for session in door.sessions().await.expect("sessions") {
        assert_eq!(session.record.state, SessionState::Active, "{} was never drained", session.record.id);
        assert!(session.expires_at.is_none_or(|at| at > door.now()), "{} lives past its time", session.record.id);
    }
    for vm in door.vms() {
        let grace = Duration::from_secs(1);
        let removed = door.ask(vm.id.as_str(), Verb::Remove { grace }).await;
        removed.unwrap_or_else(|error| panic!("remove {}: {error}", vm.id));
    }
    assert!(door.vms().is_empty());
    nothing_unknown(&host, &door);
    assert_eq!((host.living(), host.directories(), host.jailed()), (vec![], vec![], vec![]));
    assert_eq!(host.attachments(), [], "volumes are served that nobody has");
    for volume in door.volumes().await.expect("volumes") {
        assert_eq!((volume.active, volume.standby, volume.shared), (None, None, 0), "leases of {}", volume.id);
    }
    remove_bundles(&host, &door).await;
    for session in door.sessions().await.expect("sessions") {
        let word = session.record.session_network_id.to_string();
        door.remove_session(&word, false, Duration::ZERO).await.expect("a session without VMs is removed");
    }
    // Uids rest 10 s, local ids 120 s; what has run out is swept each minute.
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(host.with_store(|store| store.leases().expect("leases")).is_empty(), "uids are left");
    assert!(host.with_store(|store| store.locals().expect("local ids")).is_empty(), "local ids are left");
    assert!(door.sessions().await.expect("sessions").is_empty());
    let mut next = 1;
    let events = door.events(0).await.expect("events");
    for event in &events {
        assert_eq!(event.seq, next, "events have gaps");
        next += 1;
    }
}

/// Nothing that was promised is lost, nothing is half made, and no name is two bundles'.
async fn bundles_are_whole(host: &SimHost, door: &Arc<dyn Door>) {
    let gone = host.removed_bundles();
    for operation in door.operations().await.expect("operations") {
        let Some(order) = operation.makes else { continue };
        let done = operation.state == OperationState::Succeeded;
        assert_eq!(done, order.bundle.is_some(), "{:?} of {}", operation.goal, operation.vm);
        let lost = order.bundle.filter(|bundle| !host.bundles().contains(bundle) && !gone.contains(bundle));
        assert_eq!(lost, None, "made by {:?} of {}", operation.goal, operation.vm);
    }
    assert_eq!(host.staged(), [], "saved, and nobody makes a bundle of it");
    let built: Vec<_> = door.vms().into_iter().filter(|vm| vm.spec.build.is_some()).map(|vm| vm.id.clone()).collect();
    assert_eq!(built, [], "they were there to become a bundle");
    host.look_at_bundles();
    let mut names = BTreeSet::new();
    for listed in door.bundles().await.expect("bundles") {
        let BundleListed::Readable(view) = listed else { panic!("{listed:?}") };
        let name = view.manifest.name.clone();
        assert!(name.as_ref().is_none_or(|name| names.insert(name.clone())), "two bundles are named {name:?}");
    }
}

/// Diffs go before what they build on; what others build on is refused.
async fn remove_bundles(host: &SimHost, door: &Arc<dyn Door>) {
    while !host.bundles().is_empty() {
        let before = host.bundles().len();
        for bundle in host.bundles() {
            drop(door.remove_bundle(bundle.as_str()).await);
        }
        assert!(host.bundles().len() < before, "none of {before} bundles can be removed");
    }
}

/// Every VMM and directory has a record.
fn nothing_unknown(host: &SimHost, door: &Arc<dyn Door>) {
    let known: Vec<_> = door.vms().iter().map(|vm| vm.id.clone()).collect();
    for id in host.living().iter().chain(&host.directories()).chain(&host.jailed()) {
        assert!(known.contains(id), "{id} has no record");
    }
}
