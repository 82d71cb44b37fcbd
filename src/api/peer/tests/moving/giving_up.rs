//! Migrations that are given up, at each moment: by request, and for a stop; those that are refused before anything moves;
//! and what is told of each.

use super::*;
use crate::agent::{Compress, Direction, MigrationState, MigrationView, MovePolicy};

/// Moments after a migration began, ever further apart: a whole one takes less than all of them.
const MOMENTS: u64 = 80;
const STEP_US: u64 = 20;

async fn only_migration(host: &Host) -> MigrationView {
    let all = host.door.migrations().await.expect("a list");
    assert_eq!(all.len(), 1, "{all:?}");
    all.into_iter().next().expect("one")
}

/// Begun, and some moments old.
async fn under_way(moment: u64) -> (Wire, Host, Host, tokio::task::JoinHandle<Result<(), VmError>>) {
    let (wire, a, b) = two_with_a_road().await;
    a.session(517).await;
    a.vm(NAME, Some(517)).await;
    let from = a.clone();
    let asked = tokio::spawn(async move { from.door.migrate(NAME, MigrateOrder::to("b")).await.map(drop) });
    tokio::time::sleep(Duration::from_micros(STEP_US * moment * moment)).await;
    (wire, a, b, asked)
}

#[tokio::test(start_paused = true)]
async fn one_that_is_cancelled_at_any_moment_stays_or_has_gone() {
    let (mut stayed, mut went) = (0, 0);
    for moment in 0..MOMENTS {
        let (wire, a, b, asked) = under_way(moment).await;
        let begun = a.door.migrations().await.expect("a list");
        let Some(begun) = begun.first() else { continue };
        let cancelled = a.door.cancel_migration(begun.way.id.as_str()).await;
        let told = asked.await.expect("no panic");
        tokio::time::sleep(REST).await;
        let when = format!("cancelled after {} us", STEP_US * moment * moment);
        match cancelled {
            Ok(view) => {
                assert_eq!(view.state, MigrationState::Cancelled, "{when}");
                assert!(view.error.is_some_and(|error| error.code == "cancelled"), "{when}");
                assert!(told.is_err_and(|error| error.to_string().contains("cancelled")), "{when}");
                assert_eq!((state(&a), vm(&b)), (Some(VmState::Running), None), "{when}");
                stayed += 1;
            }
            Err(VmError::Migrate(MigrateError::NotCancellable { .. })) => {
                assert!(told.is_ok(), "{when}: {told:?}");
                assert_eq!((state(&a), state(&b)), (Some(VmState::HandedOver), Some(VmState::Running)), "{when}");
                went += 1;
            }
            Err(error) => panic!("{when}: {error}"),
        }
        is_in_one_place(&wire, &a, &b, &when).await;
    }
    println!("{stayed} stayed, {went} went");
    assert!(stayed > 0 && went > 0, "{stayed} stayed, {went} went");
}

#[tokio::test(start_paused = true)]
async fn a_stop_wins_as_long_as_it_is_not_the_other_hosts() {
    let (mut stopped, mut went) = (0, 0);
    for moment in 0..MOMENTS {
        let (_wire, a, b, asked) = under_way(moment).await;
        let stop = a.door.ask(NAME, Verb::Stop { grace: Duration::ZERO }).await;
        let told = asked.await.expect("no panic");
        tokio::time::sleep(REST).await;
        let when = format!("stopped after {} us", STEP_US * moment * moment);
        match stop {
            Ok(vm) => {
                assert_eq!(vm.state, VmState::Stopped, "{when}");
                assert!(told.is_err(), "{when}");
                assert_eq!((a.sim.living(), b.sim.living()), (vec![], vec![]), "{when}");
                assert_eq!((b.sim.directories(), b.sim.jailed()), (vec![], vec![]), "{when}");
                stopped += 1;
            }
            Err(VmError::Verb(error)) => {
                assert!(error.to_string().contains("stop"), "{when}: {error}");
                assert_eq!((state(&a), state(&b)), (Some(VmState::HandedOver), Some(VmState::Running)), "{when}");
                went += 1;
            }
            Err(error) => panic!("{when}: {error}"),
        }
        nothing_was_seen([&a, &b]);
    }
    println!("{stopped} were stopped, {went} went");
    assert!(stopped > 0 && went > 0, "{stopped} were stopped, {went} went");
}

/// What may be asked of a VM on its way, and what is said to that: ARCHITECTURE.md has the table.
#[tokio::test(start_paused = true)]
async fn what_is_asked_meanwhile_is_refused_waits_or_wins() {
    let mut seen = 0;
    for moment in 0..MOMENTS {
        let (_wire, a, b, asked) = under_way(moment).await;
        if state(&a) != Some(VmState::Sending) {
            let _ = asked.await;
            continue;
        }
        seen += 1;
        for verb in [Verb::Pause, Verb::Resume, Verb::HandOver] {
            let refused = a.door.ask(NAME, verb).await;
            assert!(matches!(refused, Err(VmError::Verb(_))), "{refused:?}");
        }
        let second = a.door.migrate(NAME, MigrateOrder::to("b")).await;
        assert!(matches!(second, Err(VmError::Verb(_))), "{second:?}");
        let policy = crate::agent::SwapPolicy::default();
        // It is done when it stays, and refused when it has gone.
        let (waits, told) = tokio::join!(a.door.ask(NAME, Verb::SetSwapPolicy(policy)), asked);
        assert!(told.expect("no panic").is_ok(), "it was not disturbed");
        assert!(matches!(waits, Err(VmError::Verb(_))), "{waits:?}");
        assert_eq!(state(&b), Some(VmState::Running));
        nothing_was_seen([&a, &b]);
    }
    assert!(seen > 0);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_another_refuses_and_auto_takes_what_takes() {
    let (_wire, a, b) = two_with_a_road().await;
    a.vm(NAME, None).await;
    b.sim.become_another_processor();
    for to in ["b", "auto"] {
        let refused = a.door.migrate(NAME, MigrateOrder::to(to)).await.expect_err("it is another processor");
        let told = crate::report::chain(&refused);
        assert!(told.contains("cpu_vendor: simulated is needed, the host has another"), "{told}");
        assert_eq!((state(&a), vm(&b)), (Some(VmState::Running), None));
        let estimate = a.door.estimate_migration(NAME, MigrateOrder::to(to)).await.expect_err("it is another one");
        assert!(crate::report::chain(&estimate).contains("cpu_vendor"), "{estimate}");
    }
    nothing_was_seen([&a, &b]);
}

#[tokio::test(start_paused = true)]
async fn both_hosts_tell_of_what_was() {
    let (_wire, a, b) = two_with_a_road().await;
    a.session(517).await;
    a.vm(NAME, Some(517)).await;
    let before = a.door.estimate_migration(NAME, MigrateOrder::to("auto")).await.expect("an estimate");
    assert_eq!((before.to.as_str(), before.based_on, before.pause_us), ("b", 0, None));
    a.door.migrate(NAME, MigrateOrder::to("auto")).await.expect("it goes there");
    let (out, into) = (only_migration(&a).await, only_migration(&b).await);
    assert_eq!(out.way.id, into.way.id);
    assert_eq!((out.direction, into.direction), (Direction::Out, Direction::In));
    assert_eq!((out.state, into.state), (MigrationState::Completed, MigrationState::Completed));
    assert_eq!((out.way.peer.as_str(), into.way.peer.as_str()), ("b", "a"));
    let moved = out.moved.expect("what it took");
    assert!(moved.pause_us.is_some_and(|pause| pause >= moved.held_us), "{moved:?}");
    assert!(out.ended_at.is_some() && into.ended_at.is_some());
    let over = a.door.cancel_migration(out.way.id.as_str()).await;
    assert!(matches!(over, Err(VmError::Migrate(MigrateError::NotCancellable { .. }))), "{over:?}");
    let unknown = a.door.migration("m-nothing").await;
    assert!(matches!(unknown, Err(VmError::Migrate(MigrateError::UnknownMigration { .. }))), "{unknown:?}");
    // From there it can only go home, which auto knows.
    b.door.migrate(NAME, MigrateOrder::to("auto")).await.expect("it goes back");
    let after = a.door.estimate_migration(NAME, MigrateOrder::to("b")).await.expect("an estimate");
    assert_eq!((after.based_on, after.pause_us), (1, moved.pause_us));
    nothing_was_seen([&a, &b]);
}

/// What was asked for, what came of it, and what an estimate said before.
#[tokio::test(start_paused = true)]
async fn pages_are_compressed_if_both_ends_can() {
    let (_wire, a, b) = two_with_a_road().await;
    a.session(517).await;
    a.vm(NAME, Some(517)).await;
    let policy = MovePolicy { compress: Compress::Lz4, ..MovePolicy::default() };
    let order = |to| MigrateOrder { policy, ..MigrateOrder::to(to) };
    let plain = a.door.estimate_migration(NAME, MigrateOrder::to("b")).await.expect("an estimate");
    assert_eq!((plain.compress, plain.uncompressed), (Compress::None, None));
    let estimate = a.door.estimate_migration(NAME, order("b")).await.expect("an estimate");
    assert_eq!((estimate.compress, estimate.uncompressed), (Compress::Lz4, None));
    a.door.migrate(NAME, order("b")).await.expect("it goes there");
    let out = a.door.migrations().await.expect("a list").remove(0);
    let moved = out.moved.expect("what it took");
    assert_eq!((out.way.policy.compress, moved.compress, moved.uncompressed), (Compress::Lz4, Compress::Lz4, None));
    assert_eq!((moved.packed_pages, moved.packed_bytes), (8, 9_000));
    let back = b.door.migrations().await.expect("a list").remove(0);
    assert_eq!((back.way.policy.compress, back.moved), (Compress::None, None));
    b.door.migrate(NAME, MigrateOrder::to("a")).await.expect("it goes back");
    let moved = b.door.migrations().await.expect("a list").remove(0).moved.expect("what it took");
    assert_eq!((moved.compress, moved.uncompressed, moved.packed_pages), (Compress::None, None, 0));
    nothing_was_seen([&a, &b]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_not_waited_for_goes_on_by_itself() {
    let (_wire, a, b) = two_with_a_road().await;
    a.vm(NAME, None).await;
    let impossible = MovePolicy { connections: 0, ..MovePolicy::default() };
    let refused = a.door.migrate(NAME, MigrateOrder { policy: impossible, ..MigrateOrder::to("b") }).await;
    assert!(matches!(refused, Err(VmError::Migrate(MigrateError::Policy(_)))), "{refused:?}");
    let refused = a.door.migrate(NAME, MigrateOrder { wait: false, ..MigrateOrder::to("nowhere") }).await;
    assert!(matches!(refused, Err(VmError::Migrate(MigrateError::UnknownPeer { .. }))), "{refused:?}");
    let begun = a.door.migrate(NAME, MigrateOrder { wait: false, ..MigrateOrder::to("b") }).await.expect("it begins");
    assert_eq!(begun.state, VmState::Sending);
    tokio::time::sleep(REST).await;
    assert_eq!((vm(&a), state(&b)), (None, Some(VmState::Running)));
    nothing_was_seen([&a, &b]);
}

/// The lease service, which decides, does not answer the source: whoever gives up waits as well, and is answered by what
/// became of it.
#[tokio::test(start_paused = true)]
async fn one_that_nobody_can_decide_on_is_not_given_up_before_somebody_can() {
    let (mut stayed, mut went, mut waited) = (0, 0, 0);
    for moment in 0..MOMENTS {
        for verb in [None, Some(Verb::Stop { grace: Duration::from_secs(1) })] {
            let (wire, a, b) = two_with_a_road().await;
            a.session(517).await;
            mover(&a, 2).await;
            a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
            let door = Arc::clone(&b.door);
            let asked = tokio::spawn(async move { door.migrate(NAME, MigrateOrder::to("a")).await.map(drop) });
            tokio::time::sleep(Duration::from_micros(STEP_US * moment * moment)).await;
            wire.is_cut.store(true, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(5)).await;
            let begun = b.door.migrations().await.expect("a list");
            let Some(id) = begun.iter().find(|one| one.direction == Direction::Out).map(|one| one.way.id.clone())
            else {
                continue;
            };
            let (door, verb_asked) = (Arc::clone(&b.door), verb.clone());
            let giving_up = tokio::spawn(async move {
                match verb_asked {
                    Some(verb) => door.ask(NAME, verb).await.is_ok(),
                    None => door.cancel_migration(id.as_str()).await.is_ok(),
                }
            });
            tokio::time::sleep(Duration::from_secs(5)).await;
            waited += usize::from(!giving_up.is_finished());
            wire.is_cut.store(false, Ordering::Relaxed);
            tokio::time::sleep(REST).await;
            let given_up = giving_up.await.expect("no panic");
            drop(asked.await.expect("no panic"));
            let when = format!(
                "{verb:?}, cut after {} us: {given_up}, {:?}, {:?}",
                STEP_US * moment * moment,
                state(&a),
                state(&b)
            );
            match (state(&a), state(&b)) {
                (Some(VmState::Running), None) => went += 1,
                (Some(VmState::HandedOver), Some(VmState::Running)) if verb.is_none() => stayed += 1,
                (Some(VmState::HandedOver), Some(VmState::Stopped)) if verb.is_some() => {
                    stayed += 1;
                    nothing_was_seen([&a, &b]);
                    continue;
                }
                _ => panic!("{when}"),
            }
            is_in_one_place(&wire, &a, &b, &when).await;
        }
    }
    println!("{stayed} stayed, {went} went, {waited} had to wait");
    assert!(stayed > 0 && went > 0 && waited > 0, "{stayed} stayed, {went} went, {waited} had to wait");
}
