//! Swap-out and wake: with an agent that dies, or an effect that fails, at each point. The host notices a guest that is
//! taken back to before it last ran, and one that runs twice.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{
    Door, ExecOutput, ExecSpec, FailureCause, Launched, SwapMode, SwapOrder, Verb, VmState, WakeCause,
};
use hearth::sim::{Faults, SimHost};

use crate::life::{life, request};
use crate::points::{Story, at_every_point, at_every_point_and, crash, fail};

const NAME: &str = "idle";
const MODES: [SwapMode; 2] = [SwapMode::Page, SwapMode::Hibernate];

fn out(mode: SwapMode) -> Verb {
    Verb::SwapOut(SwapOrder { mode, wake_after: None, because: "a test".to_owned() })
}

fn state(door: &Arc<dyn Door>) -> VmState {
    door.vm(NAME).expect("it is there").state.clone()
}

async fn runs(door: Arc<dyn Door>) {
    let launch = door.launch(request(Some(NAME.to_owned()))).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch: {launch:?}") };
    door.launched(vm).await.expect("it runs");
}

async fn until_running(door: &Arc<dyn Door>) {
    let mut events = door.last_event();
    while state(door) != VmState::Running {
        events.changed().await.expect("the agent is there");
    }
}

async fn answers(door: &Arc<dyn Door>) {
    let spec = ExecSpec { argv: vec!["true".to_owned()], ..ExecSpec::default() };
    let mut session = door.exec(NAME, spec).await.expect("a program");
    assert!(matches!(session.output.next().await, Ok(ExecOutput::Exited(_))));
}

/// Out and back in both ways, by each of what wakes it.
async fn whole_story(host: SimHost, door: Arc<dyn Door>) {
    let id = door.vm(NAME).expect("it is there").id.clone();
    for mode in MODES {
        door.ask(NAME, out(mode)).await.expect("out");
        assert_eq!(state(&door), VmState::SwappedOut { mode });
        assert_eq!(host.living().contains(&id), mode == SwapMode::Page);
        assert_eq!(host.sealed().contains(&id), mode == SwapMode::Hibernate);
        door.ask(NAME, Verb::Wake(WakeCause::Api)).await.expect("awake");
        assert_eq!((state(&door), host.sealed()), (VmState::Running, vec![]));
        answers(&door).await;
        // A program to run wakes it.
        door.ask(NAME, out(mode)).await.expect("out");
        answers(&door).await;
        // So does a packet, which it gets.
        door.ask(NAME, out(mode)).await.expect("out");
        let before = host.delivered(&id);
        assert!(host.send_packet(&id) && host.send_packet(&id), "the tap is held");
        until_running(&door).await;
        assert_eq!(host.delivered(&id), before + 2);
        // And the time.
        let order = SwapOrder { mode, wake_after: Some(Duration::from_secs(3600)), because: "the night".to_owned() };
        door.ask(NAME, Verb::SwapOut(order)).await.expect("out");
        let at = door.now();
        until_running(&door).await;
        assert_eq!(Duration::from_nanos(door.now().0 - at.0).as_secs(), 3600);
    }
    door.ask(NAME, out(SwapMode::Page)).await.expect("out");
    door.ask(NAME, out(SwapMode::Hibernate)).await.expect("from swap to a file");
    assert_eq!((host.living(), host.sealed()), (vec![], vec![id]));
    door.ask(NAME, Verb::Remove { grace: Duration::ZERO }).await.expect("removed");
    assert_eq!((host.sealed(), host.directories(), host.jailed()), (vec![], vec![], vec![]));
}

#[test]
fn whatever_is_to_wake_a_vm_wakes_it() {
    let host = SimHost::new(11);
    let told = host.clone();
    let done = life(&host, Faults::default(), |door| async move {
        runs(door.clone()).await;
        whole_story(told, door).await;
    });
    done.expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

/// Out, and back by a packet.
async fn short_story(host: SimHost, door: Arc<dyn Door>, mode: SwapMode) {
    let id = door.vm(NAME).expect("it is there").id.clone();
    door.ask(NAME, out(mode)).await.expect("out");
    assert!(host.send_packet(&id));
    until_running(&door).await;
    assert_eq!((host.delivered(&id), host.sealed()), (1, vec![]));
}

#[test]
fn a_crash_at_every_point_of_swapping_is_recovered_from() {
    for (story, least) in [
        ((|host, door| Box::pin(short_story(host, door, SwapMode::Page)) as _) as Story, 15),
        (|host, door| Box::pin(short_story(host, door, SwapMode::Hibernate)), 25),
    ] {
        let points = at_every_point(crash, |_, door| Box::pin(runs(door)), story);
        println!("{points} points");
        assert!(points > least, "a swap-out and a wake have more points than {points}");
    }
}

/// A hibernated VM is woken to be shut down; what of that is over is not begun again.
#[test]
fn a_hibernated_vm_whose_agent_dies_while_it_is_stopped_is_stopped() {
    async fn hibernated(door: Arc<dyn Door>) {
        runs(Arc::clone(&door)).await;
        door.ask(NAME, out(SwapMode::Hibernate)).await.expect("out");
    }
    let story: Story =
        |_, door| Box::pin(async move { drop(door.ask(NAME, Verb::Stop { grace: Duration::from_secs(10) }).await) });
    for between in [(|_| ()) as fn(&SimHost), SimHost::kill_some_vmm] {
        let points = at_every_point_and(between, crash, |_, door| Box::pin(hibernated(door)), story);
        assert!(points > 15, "a wake and a stop have more points than {points}");
    }
}

/// A swap-out of which one effect may fail: it is out, or it runs on.
async fn out_with_a_fault(host: SimHost, door: Arc<dyn Door>, mode: SwapMode) {
    let id = door.vm(NAME).expect("it is there").id.clone();
    let asked = door.ask(NAME, out(mode)).await;
    match (&asked, state(&door)) {
        (Ok(_), VmState::SwappedOut { mode: is }) => assert_eq!(is, mode),
        (Err(_), VmState::Running) => assert_eq!((host.living(), host.sealed()), (vec![id], vec![])),
        // Its process could not be ended, or the file not be taken back.
        (Err(_), VmState::Failed { .. }) => {}
        (_, state) => panic!("it is {}: {asked:?}", state.name()),
    }
}

#[test]
fn a_swap_out_that_fails_leaves_the_vm_running() {
    for story in [(|host, door| Box::pin(out_with_a_fault(host, door, SwapMode::Page)) as _) as Story, |host, door| {
        Box::pin(out_with_a_fault(host, door, SwapMode::Hibernate))
    }] {
        let points = at_every_point(fail, |_, door| Box::pin(runs(door)), story);
        assert!(points > 5, "{points} points");
    }
}

/// A wake of which one effect may fail: it is awake, or still out and woken by the next try.
async fn wake_with_a_fault(host: SimHost, door: Arc<dyn Door>) {
    let Ok(vm) = door.vm(NAME) else { panic!("it is there") };
    let VmState::SwappedOut { mode } = vm.state else { panic!("it is out") };
    let asked = door.ask(NAME, Verb::Wake(WakeCause::Api)).await;
    match (&asked, state(&door)) {
        (Ok(_), VmState::Running) => {}
        (Err(_), VmState::SwappedOut { mode: is }) => {
            assert_eq!(is, mode);
            door.ask(NAME, Verb::Wake(WakeCause::Api)).await.expect("the next try wakes it");
        }
        // Behind the point from which it does not go back.
        (Err(_), VmState::Failed { .. }) => assert!(host.living().is_empty()),
        (_, state) => panic!("it is {}: {asked:?}", state.name()),
    }
}

async fn is_out(door: Arc<dyn Door>, mode: SwapMode) {
    runs(door.clone()).await;
    door.ask(NAME, out(mode)).await.expect("out");
}

#[test]
fn a_wake_that_fails_can_be_tried_again() {
    for before in [(|_, door| Box::pin(is_out(door, SwapMode::Page)) as _) as Story, |_, door| {
        Box::pin(is_out(door, SwapMode::Hibernate))
    }] {
        let points = at_every_point(fail, before, |host, door| Box::pin(wake_with_a_fault(host, door)));
        assert!(points > 3, "{points} points");
    }
}

#[test]
fn a_damaged_file_is_never_a_fresh_boot() {
    let host = SimHost::new(3);
    life(&host, Faults::default(), |door| {
        let host = host.clone();
        async move {
            is_out(door.clone(), SwapMode::Hibernate).await;
            host.damage_sealed(&door.vm(NAME).expect("it is there").id);
            let asked = door.ask(NAME, Verb::Wake(WakeCause::Api)).await;
            assert!(asked.is_err());
            let state = state(&door);
            assert!(
                matches!(&state, VmState::Failed { cause: FailureCause::SwapStateCorrupt { .. } }),
                "it is {state:?}"
            );
            assert_eq!((host.living(), host.sealed(), host.directories()), (vec![], vec![], vec![]));
        }
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn what_waits_for_a_vm_that_is_out_waits_for_the_next_agent_too() {
    for mode in MODES {
        let host = SimHost::new(5);
        life(&host, Faults::default(), |door| is_out(door, mode)).expect("no crash");
        let (told, later) = (host.clone(), host.clone());
        life(&host, Faults::default(), |door| {
            let host = told.clone();
            async move {
                // The agent takes over what is out, and holds its tap, in the background.
                tokio::time::sleep(Duration::from_secs(1)).await;
                assert_eq!(state(&door), VmState::SwappedOut { mode });
                let id = door.vm(NAME).expect("it is there").id.clone();
                assert!(host.send_packet(&id));
                until_running(&door).await;
                assert_eq!(host.delivered(&id), 1);
            }
        })
        .expect("no crash");
        assert_eq!(later.violations(), Vec::<String>::new());
    }
}
