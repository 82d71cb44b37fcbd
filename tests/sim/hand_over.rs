//! A VM that another process takes over: with an agent that dies, an effect that fails, or a process that ends, at each
//! point. The host notices a guest that runs twice, one that goes on from before it last ran, and a process too many.

use std::sync::Arc;

use hearth::agent::{Door, ExecOutput, ExecSpec, Goal, Launched, ProcessRecord, Verb, VmState};
use hearth::sim::{Faults, SimHost};

use crate::bundles::{build, from_bundle};
use crate::life::{life, request};
use crate::points::{Story, at_every_point, at_every_point_and, crash, fail};

const NAME: &str = "moved";

fn process(door: &Arc<dyn Door>) -> Option<ProcessRecord> {
    door.vm(NAME).expect("it is there").process
}

fn state(door: &Arc<dyn Door>) -> VmState {
    door.vm(NAME).expect("it is there").state.clone()
}

async fn runs(door: Arc<dyn Door>) {
    let launch = door.launch(request(Some(NAME.to_owned()))).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch: {launch:?}") };
    door.launched(vm).await.expect("it runs");
}

async fn answers(door: &Arc<dyn Door>) {
    let spec = ExecSpec { argv: vec!["true".to_owned()], ..ExecSpec::default() };
    let mut session = door.exec(NAME, spec).await.expect("a program");
    assert!(matches!(session.output.next().await, Ok(ExecOutput::Exited(_))));
}

/// Handed over twice while it runs, once while it is paused; a clone as well.
async fn whole_story(host: SimHost, door: Arc<dyn Door>) {
    let id = door.vm(NAME).expect("it is there").id.clone();
    for _ in 0..2 {
        let before = process(&door);
        door.ask(NAME, Verb::HandOver).await.expect("handed over");
        assert_ne!(process(&door), before);
        assert_eq!((state(&door), host.living()), (VmState::Running, vec![id.clone()]));
        answers(&door).await;
    }
    let operations = door.operations().await.expect("operations");
    let moved = operations.iter().find(|operation| operation.goal == Goal::HandOver).expect("one of them");
    assert!(moved.moved.is_some_and(|moved| moved.pause_us.is_some_and(|pause_us| pause_us >= moved.held_us)));
    door.ask(NAME, Verb::Pause).await.expect("paused");
    let before = process(&door);
    door.ask(NAME, Verb::HandOver).await.expect("handed over");
    assert_ne!(process(&door), before);
    assert_eq!((state(&door), host.living()), (VmState::Paused, vec![id.clone()]));
    door.ask(NAME, Verb::Resume).await.expect("resumed");
    answers(&door).await;
    door.build_bundle(build(Some("gold".to_owned()), None, None)).await.expect("a build");
}

#[test]
fn a_vm_goes_on_in_another_process() {
    let host = SimHost::new(11);
    let told = host.clone();
    let done = life(&host, Faults::default(), |door| async move {
        runs(door.clone()).await;
        whole_story(told, Arc::clone(&door)).await;
        let refused = door.launch(from_bundle(Some(NAME.to_owned()), "gold")).await;
        assert!(refused.is_err(), "the name is taken");
    });
    done.expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

async fn short_story(host: SimHost, door: Arc<dyn Door>) {
    let id = door.vm(NAME).expect("it is there").id.clone();
    door.ask(NAME, Verb::HandOver).await.expect("handed over");
    assert_eq!((state(&door), host.living()), (VmState::Running, vec![id]));
    answers(&door).await;
}

async fn paused_story(host: SimHost, door: Arc<dyn Door>) {
    let id = door.vm(NAME).expect("it is there").id.clone();
    door.ask(NAME, Verb::Pause).await.expect("paused");
    door.ask(NAME, Verb::HandOver).await.expect("handed over");
    assert_eq!((state(&door), host.living()), (VmState::Paused, vec![id]));
}

#[test]
fn a_crash_at_every_point_of_handing_over_is_recovered_from() {
    for between in [(|_| ()) as fn(&SimHost), SimHost::kill_some_vmm] {
        for story in [(|host, door| Box::pin(short_story(host, door)) as _) as Story, |host, door| {
            Box::pin(paused_story(host, door))
        }] {
            let points = at_every_point_and(between, crash, |_, door| Box::pin(runs(door)), story);
            println!("{points} points");
            assert!(points > 20, "a hand-over has more points than {points}");
        }
    }
}

/// A hand-over of which one effect may fail: it is in another process, or goes on in the one it has.
async fn with_a_fault(host: SimHost, door: Arc<dyn Door>) {
    let vm = door.vm(NAME).expect("it is there");
    let (id, before, was) = (vm.id.clone(), vm.process, vm.state.clone());
    let asked = door.ask(NAME, Verb::HandOver).await;
    match (&asked, state(&door)) {
        (Ok(_), state) if state == was => {
            assert_ne!(process(&door), before);
            assert_eq!(host.living(), [id]);
        }
        (Err(_), state) if state == was => {
            assert_eq!(process(&door), before);
            assert_eq!(host.living(), [id]);
            door.ask(NAME, Verb::HandOver).await.expect("the next try does it");
        }
        // Behind the point from which it does not go back, or the way back failed.
        (Err(_), VmState::Failed { .. }) => {}
        (_, state) => panic!("it is {}: {asked:?}", state.name()),
    }
}

#[test]
fn a_hand_over_that_fails_leaves_the_vm_where_it_is() {
    let paused: Story = |_, door| {
        Box::pin(async move {
            runs(Arc::clone(&door)).await;
            door.ask(NAME, Verb::Pause).await.expect("paused");
        })
    };
    for before in [(|_, door| Box::pin(runs(door)) as _) as Story, paused] {
        let points = at_every_point(fail, before, |host, door| Box::pin(with_a_fault(host, door)));
        assert!(points > 5, "{points} points");
    }
}
