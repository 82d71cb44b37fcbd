//! How VMs end.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{Goal, Launched, OperationState, Verb, VmState};
use hearth::sim::{Faults, SimHost};

use crate::life::{life, request};

#[test]
fn a_guest_that_panics_is_failed_and_one_that_is_killed_says_so() {
    let host = SimHost::new(3);
    life(&host, Faults::default(), |door| {
        let host = host.clone();
        async move {
            let Ok(Launched::Vm(vm)) = door.launch(request(None)).await else { panic!("a launch") };
            door.launched(Arc::clone(&vm)).await.expect("it runs");
            host.kill_some_vmm();
            tokio::time::sleep(Duration::from_secs(1)).await;
            let vm = door.vm(vm.id.as_str()).expect("it is kept");
            let VmState::Failed { cause } = &vm.state else { panic!("it is {}", vm.state.name()) };
            assert_eq!(cause.name(), "vmm_killed");
            assert!(vm.remains.as_ref().is_some_and(|left| !left.console.is_empty()));
            assert_eq!((host.directories(), host.living(), host.jailed()), (vec![], vec![], vec![]));
        }
    })
    .expect("no crash");
}

#[test]
fn a_stop_cuts_a_launch_short() {
    let host = SimHost::new(4);
    life(&host, Faults::default(), |door| async move {
        let Ok(Launched::Vm(vm)) = door.launch(request(None)).await else { panic!("a launch") };
        tokio::time::sleep(Duration::from_secs(2)).await;
        let begun = tokio::time::Instant::now();
        let stopped = door.ask(vm.id.as_str(), Verb::Stop { grace: Duration::from_secs(10) }).await.expect("stopped");
        assert_eq!(stopped.state, VmState::Stopped);
        assert!(begun.elapsed() < Duration::from_secs(1), "it took {:?}", begun.elapsed());
        let launch = door.operations().await.expect("operations");
        let launch = launch.iter().find(|operation| operation.goal == Goal::Launch).expect("the launch");
        assert_eq!(launch.state, OperationState::Cancelled);
    })
    .expect("no crash");
}
