//! VMM processes that are killed at each moment of a migration: what is told of the VM afterwards is told by one host.

use super::*;

/// Moments after a migration began, ever further apart: a whole one takes less than all of them.
const MOMENTS: u64 = 50;
const STEP_US: u64 = 50;

/// How many ended in which way.
#[derive(Debug, Default)]
struct Ends {
    stayed: u32,
    went: u32,
    failed: u32,
    lost: u32,
}

/// What is killed, and when there is an agent again.
#[derive(Debug, Clone, Copy)]
struct Kill {
    back: bool,
    at_target: bool,
    volumes: usize,
    /// Its agent as well; the next one comes after this time.
    agent_too: Option<Duration>,
}

async fn killed_at(kill: Kill) -> Ends {
    let Kill { back, at_target, volumes, agent_too } = kill;
    let mut ends = Ends::default();
    // Where an agent is awaited each time, half of them will do.
    for moment in (0..MOMENTS).step_by(if agent_too.is_some() { 2 } else { 1 }) {
        let (wire, mut a, mut b) = two_with_a_road().await;
        a.session(517).await;
        mover(&a, volumes).await;
        if back {
            a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
        }
        let (from, to) = if back { (b.clone(), a.clone()) } else { (a.clone(), b.clone()) };
        let asked = tokio::spawn({
            let from = from.clone();
            let name = to.name.clone();
            async move { from.door.migrate(NAME, MigrateOrder::to(&name)).await.map(drop) }
        });
        tokio::time::sleep(Duration::from_micros(STEP_US * moment * moment)).await;
        let victim = if at_target { to } else { from };
        victim.sim.end_vmms();
        if let Some(pause) = agent_too {
            victim.sim.crash_in(1);
            // It dies by whatever it does next, which may be long after.
            let _ = timeout(Duration::from_secs(2), victim.sim.crashed()).await;
            let died = victim.sim.has_crashed();
            victim.sim.crash_never();
            tokio::time::sleep(pause).await;
            asked.abort();
            if died {
                let again = next(&wire, &victim).await;
                if victim.name == "a" { a = again } else { b = again }
            }
        } else {
            let _ = asked.await.expect("no panic");
        }
        tokio::time::sleep(REST).await;
        let when = format!("{kill:?} after {} us: {:?}, {:?}", STEP_US * moment * moment, state(&a), state(&b));
        let living = (a.sim.living().len(), b.sim.living().len());
        match (state(&a), state(&b)) {
            (Some(VmState::Running), None) if living == (1, 0) => {
                leases_follow(&a, &b, &when).await;
                *if back { &mut ends.went } else { &mut ends.stayed } += 1
            }
            (Some(VmState::HandedOver), Some(VmState::Running)) if living == (0, 1) => {
                leases_follow(&a, &b, &when).await;
                *if back { &mut ends.stayed } else { &mut ends.went } += 1;
            }
            // Where it failed there is a record of it, and at its home one that knows where that is.
            (Some(VmState::Failed { cause }), None) | (Some(VmState::HandedOver), Some(VmState::Failed { cause })) => {
                assert_eq!(living, (0, 0), "{when}");
                for volume in a.door.volumes().await.expect("volumes") {
                    assert_eq!((&volume.active, &volume.standby), (&None, &None), "{when}: leases");
                }
                assert_eq!((a.sim.attachments(), b.sim.attachments()), (vec![], vec![]), "{when}");
                let is_lost = matches!(cause, FailureCause::LostOnTheWay { .. });
                *if is_lost { &mut ends.lost } else { &mut ends.failed } += 1;
            }
            _ => panic!("{when}, {living:?} live"),
        }
        nothing_was_seen([&a, &b]);
        drop(wire);
    }
    println!("{ends:?}");
    ends
}

#[tokio::test(start_paused = true)]
async fn a_target_killed_on_the_way_is_told_of_by_one_host() {
    for (back, volumes) in [(false, 0), (true, 0), (false, 2), (true, 2)] {
        let ends = killed_at(Kill { back, at_target: true, volumes, agent_too: None }).await;
        assert!(ends.stayed > 0 && ends.failed > 0 && ends.lost > 0, "{ends:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_killed_on_the_way_is_told_of_by_one_host() {
    for (back, volumes) in [(false, 0), (true, 0), (false, 2), (true, 2)] {
        let ends = killed_at(Kill { back, at_target: false, volumes, agent_too: None }).await;
        assert!(ends.went > 0 && ends.failed > 0, "{ends:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_killed_with_its_agent_is_told_of_by_one_host() {
    // Before the other host asks whose the VM is, and after.
    for (volumes, seconds) in [(0, 1), (2, 1), (2, 20)] {
        for back in [false, true] {
            let agent_too = Some(Duration::from_secs(seconds));
            let ends = killed_at(Kill { back, at_target: false, volumes, agent_too }).await;
            assert!(ends.went > 0 && ends.failed > 0, "{ends:?}");
        }
    }
}
