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

async fn killed_at(back: bool, at_target: bool) -> Ends {
    let mut ends = Ends::default();
    for moment in 0..MOMENTS {
        let (wire, a, b) = two_with_a_road().await;
        a.session(517).await;
        a.vm(NAME, Some(517)).await;
        if back {
            a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
        }
        let (from, to) = if back { (&b, &a) } else { (&a, &b) };
        let asked = tokio::spawn({
            let from = from.clone();
            let name = to.name.clone();
            async move { from.door.migrate(NAME, MigrateOrder::to(&name)).await.map(drop) }
        });
        tokio::time::sleep(Duration::from_micros(STEP_US * moment * moment)).await;
        if at_target {
            to.sim.end_vmms()
        } else {
            from.sim.end_vmms()
        }
        let told = asked.await.expect("no panic");
        tokio::time::sleep(REST).await;
        let when = format!("killed after {} us: {told:?}, {:?}, {:?}", STEP_US * moment * moment, state(&a), state(&b));
        let living = (a.sim.living().len(), b.sim.living().len());
        match (state(&a), state(&b)) {
            (Some(VmState::Running), None) if living == (1, 0) => {
                *if back { &mut ends.went } else { &mut ends.stayed } += 1
            }
            (Some(VmState::HandedOver), Some(VmState::Running)) if living == (0, 1) => {
                *if back { &mut ends.stayed } else { &mut ends.went } += 1;
            }
            // Where it failed there is a record of it, and at its home one that knows where that is.
            (Some(VmState::Failed { cause }), None) | (Some(VmState::HandedOver), Some(VmState::Failed { cause })) => {
                assert_eq!(living, (0, 0), "{when}");
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
async fn a_target_killed_on_the_way_there_is_told_of_by_one_host() {
    let ends = killed_at(false, true).await;
    assert!(ends.stayed > 0 && ends.failed > 0 && ends.lost > 0, "{ends:?}");
}

#[tokio::test(start_paused = true)]
async fn a_target_killed_on_the_way_back_is_told_of_by_one_host() {
    let ends = killed_at(true, true).await;
    assert!(ends.stayed > 0 && ends.failed > 0 && ends.lost > 0, "{ends:?}");
}

#[tokio::test(start_paused = true)]
async fn a_source_killed_on_the_way_is_told_of_by_one_host() {
    for back in [false, true] {
        let ends = killed_at(back, false).await;
        assert!(ends.went > 0 && ends.failed > 0, "{ends:?}");
    }
}
