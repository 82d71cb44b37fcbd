//! A ledger nothing can be written to any more: its disk is full. The agent has to end, and no VM with it.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{Door, Launched, Verb, VmState};
use hearth::sim::{Faults, SimHost};

use crate::life::{life, request};
use crate::points::at_every_point;
use crate::rest::quiet_life;

/// An agent that can write nothing from this point on.
fn full(point: u64) -> Faults {
    Faults { ledger_full_at_point: Some(point), ..Faults::default() }
}

/// Virtual time an agent takes to end, at the most: what it began before goes on meanwhile.
const ENDS_WITHIN: Duration = Duration::from_secs(90);

/// VMs that run, one that is paused.
async fn some_vms(door: Arc<dyn Door>) {
    for name in ["one", "two", "three"] {
        let Ok(Launched::Vm(vm)) = door.launch(request(Some(name.to_owned()))).await else { panic!("a launch") };
        door.launched(vm).await.expect("it runs");
    }
    door.ask("three", Verb::Pause).await.expect("paused");
}

#[test]
fn an_agent_that_begins_and_cannot_write_ends_no_vm() {
    let (mut point, mut ended) = (0, 0);
    loop {
        point += 1;
        let host = SimHost::new(7);
        life(&host, Faults::default(), some_vms).expect("no crash before");
        let before = host.living();
        assert_eq!(before.len(), 3);
        let broken = life(&host, full(point), |door| async move {
            let mut broken = door.broken();
            let why = broken.wait_for(Option::is_some);
            let is_broken = tokio::time::timeout(ENDS_WITHIN, why).await.is_ok();
            tokio::time::sleep(ENDS_WITHIN).await;
            is_broken
        });
        assert_eq!(host.living(), before, "the ledger was full from point {point} on");
        assert_eq!((host.directories().len(), host.jailed().len()), (3, 3), "full from point {point} on");
        let passed = host.points();
        life(&host, Faults::default(), |door| {
            let host = host.clone();
            async move {
                let mut states: Vec<_> = Vec::new();
                for name in ["one", "two", "three"] {
                    states.push(door.vm(name).expect("it is known").state.clone());
                }
                assert_eq!(states, [VmState::Running, VmState::Running, VmState::Paused]);
                quiet_life(host, door).await;
            }
        })
        .expect("no crash in the quiet life");
        assert_eq!(host.violations(), Vec::<String>::new());
        ended += u64::from(broken != Some(false));
        if passed < point {
            break;
        }
    }
    assert!(ended > 10, "of {point} agents only {ended} could not write");
}

/// What a client does while the ledger fills up.
async fn story(door: Arc<dyn Door>) {
    let Ok(Launched::Vm(vm)) = door.launch(request(Some("story".to_owned()))).await else { return };
    if door.launched(vm).await.is_err() {
        return;
    }
    for verb in [Verb::Pause, Verb::Resume, Verb::Stop { grace: Duration::from_secs(10) }] {
        if door.ask("story", verb).await.is_err() {
            return;
        }
    }
    drop(door.ask("story", Verb::Remove { grace: Duration::from_secs(1) }).await);
}

#[test]
fn whatever_is_asked_while_the_ledger_is_full_comes_to_rest_in_the_next_life() {
    let points = at_every_point(
        full,
        |_, door| Box::pin(some_vms(door)),
        |_, door| {
            Box::pin(async move {
                // An agent whose ledger failed answers nobody.
                let _ = tokio::time::timeout(ENDS_WITHIN, story(door)).await;
                tokio::time::sleep(ENDS_WITHIN).await;
            })
        },
    );
    assert!(points > 40, "a launch, pause, resume, stop and removal have more points than {points}");
}
