//! VMs that go from host to host, with agents that die, and a link that is cut, at each point. The hosts share a witness:
//! it notices a guest that goes on from before it last ran, which is what a second copy does.

use std::sync::Arc;

use super::*;
use crate::agent::{
    ExecOutput, ExecSpec, FailureCause, MigrateError, MigrateOrder, Verb, VmError, VmRecord, VmState, VolumeOrigin,
    VolumeRequest, VolumeWish,
};
use crate::sim::SimHost;

const NAME: &str = "mover";

mod giving_up;
mod killed_machines;
mod many_faults;

/// Two hosts that machines can go between.
async fn two_with_a_road() -> (Wire, Host, Host) {
    let wire = Wire::default();
    let (sim_a, sim_b) = (SimHost::new(1), SimHost::new(2));
    let sim_b = sim_b.beside(&sim_a);
    let a = Host::start_on(sim_a, "a", config_a()).await;
    let b = Host::start_on(sim_b, "b", config_b()).await;
    wire.plug(&a, A, Some(KEY)).await;
    wire.plug(&b, B, Some(KEY)).await;
    (wire, a, b)
}

fn config_a() -> crate::agent::config::Config {
    config(1, "", &[("b", B, 2)])
}

fn config_b() -> crate::agent::config::Config {
    config(2, "", &[("a", A, 1)])
}

/// The next agent of a host.
async fn next(wire: &Wire, host: &Host) -> Host {
    let (address, config) = if host.name == "a" { (A, config_a()) } else { (B, config_b()) };
    let next = Host::start_on(host.sim.clone(), &host.name, config).await;
    wire.plug(&next, address, Some(KEY)).await;
    next
}

fn vm(host: &Host) -> Option<Arc<VmRecord>> {
    host.door.vm(NAME).ok()
}

fn state(host: &Host) -> Option<VmState> {
    vm(host).map(|vm| vm.state.clone())
}

async fn answers(host: &Host) {
    let spec = ExecSpec { argv: vec!["true".to_owned()], ..ExecSpec::default() };
    let mut session = host.door.exec(NAME, spec).await.expect("a program");
    assert!(matches!(session.output.next().await, Ok(ExecOutput::Exited(_))));
}

fn nothing_was_seen(hosts: [&Host; 2]) {
    for host in hosts {
        assert_eq!(host.sim.violations(), Vec::<String>::new(), "{}", host.name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_member_of_a_session_goes_there_and_back_with_its_addresses() {
    let (_wire, a, b) = two_with_a_road().await;
    a.session(517).await;
    let first = a.vm(NAME, Some(517)).await;
    let same = |vm: &VmRecord| (vm.id.clone(), vm.name.clone(), vm.addresses(), vm.generation.clone(), vm.created_at);
    for _ in 0..3 {
        let told = a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
        assert_eq!((&told.state, state(&b)), (&VmState::HandedOver, Some(VmState::Running)));
        let there = vm(&b).expect("it is there");
        assert_eq!(same(&there), same(&first));
        assert_eq!(there.network.as_ref().and_then(|network| network.home), Some(1));
        answers(&b).await;
        assert_eq!((a.sim.living(), b.sim.living()), (vec![], vec![first.id.clone()]));
        // What is left here is a way, and stays as long as the VM is away.
        let refused = a.door.ask(NAME, Verb::Remove { grace: Duration::ZERO }).await;
        assert!(matches!(refused, Err(VmError::Verb(_))), "{refused:?}");
        // It can be paused, and then not be moved.
        b.door.ask(NAME, Verb::Pause).await.expect("paused");
        let refused = b.door.migrate(NAME, MigrateOrder::to("a")).await;
        assert!(matches!(refused, Err(VmError::Verb(_))), "{refused:?}");
        b.door.ask(NAME, Verb::Resume).await.expect("resumed");
        b.door.migrate(NAME, MigrateOrder::to("a")).await.expect("it goes back");
        assert_eq!((state(&a), vm(&b)), (Some(VmState::Running), None));
        assert_eq!(same(&vm(&a).expect("it is back")), same(&first));
        answers(&a).await;
        assert_eq!((a.sim.living(), b.sim.living()), (vec![first.id.clone()], vec![]));
        assert_eq!((b.sim.directories(), b.sim.jailed()), (vec![], vec![]));
    }
    a.door.ask(NAME, Verb::Remove { grace: Duration::ZERO }).await.expect("removed");
    nothing_was_seen([&a, &b]);
}

#[tokio::test(start_paused = true)]
async fn one_that_is_removed_where_it_is_is_forgotten_where_it_is_from() {
    let (wire, a, b) = two_with_a_road().await;
    a.session(517).await;
    a.vm(NAME, Some(517)).await;
    a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(state(&a), Some(VmState::HandedOver), "it is there");
    b.door.ask(NAME, Verb::Remove { grace: Duration::ZERO }).await.expect("removed");
    wire.is_cut.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(state(&a), Some(VmState::HandedOver), "nobody can be asked");
    wire.is_cut.store(false, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!((vm(&a), a.sim.directories(), a.sim.jailed()), (None, vec![], vec![]));
    nothing_was_seen([&a, &b]);
}

#[tokio::test(start_paused = true)]
async fn one_without_addresses_leaves_nothing_behind() {
    let (_wire, a, b) = two_with_a_road().await;
    let first = a.vm(NAME, None).await;
    a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
    assert_eq!((vm(&a), state(&b)), (None, Some(VmState::Running)));
    assert_eq!((a.sim.living(), a.sim.directories(), a.sim.jailed()), (vec![], vec![], vec![]));
    assert_eq!(vm(&b).map(|vm| vm.id.clone()), Some(first.id.clone()));
    nothing_was_seen([&a, &b]);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_moved_is_refused_and_goes_on() {
    let (wire, a, b) = two_with_a_road().await;
    a.session(517).await;
    a.vm(NAME, Some(517)).await;
    for (to, wanted) in [("c", "there is no peer"), ("", "there is no peer")] {
        let refused = a.door.migrate(NAME, MigrateOrder::to(to)).await;
        let Err(VmError::Migrate(MigrateError::UnknownPeer { .. })) = refused else { panic!("{refused:?}") };
        assert!(refused.is_err_and(|error| error.to_string().contains(wanted)));
    }
    assert!(matches!(a.door.migrate("nobody", MigrateOrder::to("b")).await, Err(VmError::Find(_))));
    // A name that is taken there.
    b.vm(NAME, None).await;
    let refused = a.door.migrate(NAME, MigrateOrder::to("b")).await.expect_err("its name is taken there").to_string();
    assert!(refused.contains("name"), "{refused}");
    assert_eq!(state(&a), Some(VmState::Running));
    b.door.ask(NAME, Verb::Remove { grace: Duration::ZERO }).await.expect("removed");
    // Nobody answers there.
    wire.is_cut.store(true, Ordering::Relaxed);
    let refused = a.door.migrate(NAME, MigrateOrder::to("b")).await.expect_err("nobody answers").to_string();
    assert!(refused.contains("reach host b"), "{refused}");
    assert_eq!((state(&a), vm(&b)), (Some(VmState::Running), None));
    wire.is_cut.store(false, Ordering::Relaxed);
    a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
    nothing_was_seen([&a, &b]);
}

/// A VM of the session with so many volumes, which are of its first host.
async fn mover(host: &Host, volumes: usize) -> Arc<VmRecord> {
    let wish = |number| VolumeWish {
        volume: format!("data-{number}"),
        read_only: false,
        mount: None,
        limits: Default::default(),
    };
    let wishes: Vec<_> = (0..volumes).map(wish).collect();
    for VolumeWish { volume, .. } in &wishes {
        let origin = VolumeOrigin::Empty;
        let request = VolumeRequest { name: Some(volume.clone()), bytes: Some(1 << 20), origin };
        host.door.create_volume(request).await.expect("a volume");
    }
    host.vm_with(NAME, Some(517), wishes).await
}

/// Of each volume exactly one lease is active, that of the VM where it runs, and the daemon there serves it; nobody stands
/// by.
async fn leases_follow(a: &Host, b: &Host, when: &str) {
    let (place, number) = if state(b) == Some(VmState::Running) { (b, 2) } else { (a, 1) };
    let vm = vm(place).expect("it is there");
    let uses: Vec<_> = vm.spec.volume_uses().map(|(_, used)| used.clone()).collect();
    for used in &uses {
        let leases = a.sim.volume_leases(&used.volume).expect("the volume");
        let active = leases.active().unwrap_or_else(|| panic!("{when}: nobody has {}", used.volume));
        assert_eq!((&active.id, active.epoch, active.host), (&used.lease, used.epoch, Some(number)), "{when}");
        assert_eq!(leases.standby(), None, "{when}");
    }
    let served: Vec<_> = place.sim.attachments().into_iter().map(|attachment| attachment.lease).collect();
    let mut wanted: Vec<_> = uses.iter().map(|used| used.lease.clone()).collect();
    wanted.sort();
    let mut served = served;
    served.sort();
    assert_eq!(served, wanted, "{when}: what is served");
    let other = if number == 1 { b } else { a };
    assert_eq!(other.sim.attachments(), [], "{when}: the other host serves nobody");
}

/// The VM runs on exactly one of the two hosts, and can go on from there.
async fn is_in_one_place(wire: &Wire, a: &Host, b: &Host, when: &str) {
    let states = (state(a), state(b));
    let living = (a.sim.living().len(), b.sim.living().len());
    match &states {
        (Some(VmState::Running), None) => assert_eq!(living, (1, 0), "{when}: {states:?}"),
        (Some(VmState::HandedOver), Some(VmState::Running)) => assert_eq!(living, (0, 1), "{when}: {states:?}"),
        _ => panic!("{when}: {states:?}, {living:?}"),
    }
    leases_follow(a, b, when).await;
    nothing_was_seen([a, b]);
    let (from, to) = if states.1.is_none() { (a, "b") } else { (b, "a") };
    answers(from).await;
    from.door.migrate(NAME, MigrateOrder::to(to)).await.unwrap_or_else(|error| panic!("{when}: it goes on: {error}"));
    nothing_was_seen([a, b]);
    let _ = wire;
}

/// Virtual time in which everything comes to rest.
const REST: Duration = Duration::from_secs(40);

/// One of the agents dies so many points after a migration began; the next one comes a while later. Whether it died.
async fn with_a_death(of: &str, point: u64, back: bool, volumes: usize) -> bool {
    let (wire, mut a, mut b) = two_with_a_road().await;
    a.session(517).await;
    mover(&a, volumes).await;
    let (mut from, mut to) = (a.clone(), "b");
    if back {
        a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
        (from, to) = (b.clone(), "a");
    }
    let victim = if of == "a" { a.sim.clone() } else { b.sim.clone() };
    victim.crash_in(point);
    let asked = tokio::spawn(async move { from.door.migrate(NAME, MigrateOrder::to(to)).await.map(drop) });
    // With the other agent dead, the one that was asked may try for long.
    while !asked.is_finished() && !victim.has_crashed() {
        tokio::time::sleep(Duration::from_micros(100)).await;
    }
    let died = victim.has_crashed();
    victim.crash_never();
    // The other one sees that nobody answers, and the next agent comes a while later.
    tokio::time::sleep(Duration::from_secs(5)).await;
    asked.abort();
    if died {
        let next = next(&wire, if of == "a" { &a } else { &b }).await;
        if of == "a" { a = next } else { b = next }
    }
    tokio::time::sleep(REST).await;
    let when = format!("agent {of} died at point {point}, back: {back}, with {volumes} volumes");
    is_in_one_place(&wire, &a, &b, &when).await;
    died
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_dies_at_any_point_leaves_it_in_one_place() {
    for volumes in [0, 2] {
        for (back, of) in [(false, "a"), (false, "b"), (true, "a"), (true, "b")] {
            // The way back with volumes has as many points again: every third will do.
            let step = if back && volumes > 0 { 3 } else { 1 };
            let mut points = 0;
            while with_a_death(of, points + 1, back, volumes).await {
                points += step;
            }
            println!("{points} points of agent {of}, back: {back}, with {volumes} volumes");
            assert!(points > 15, "{points} points of agent {of}");
        }
    }
}

/// What an agent does fails, so many points after a migration began: a full disk, memory that is taken, a link that cannot
/// be made.
#[tokio::test(start_paused = true)]
async fn an_effect_that_fails_at_any_point_leaves_it_in_one_place() {
    for (fails_at_target, volumes) in [(false, 0), (true, 0), (false, 2), (true, 2)] {
        let (mut stayed, mut went) = (0, 0);
        for point in 1..(if volumes > 0 { 60 } else { 40 }) {
            let (wire, a, b) = two_with_a_road().await;
            a.session(517).await;
            mover(&a, volumes).await;
            if fails_at_target { &b } else { &a }.sim.fail_in(point);
            let told = a.door.migrate(NAME, MigrateOrder::to("b")).await;
            tokio::time::sleep(REST).await;
            // There may have been fewer points: what comes next is another story.
            for host in [&a, &b] {
                host.sim.fail_in(u64::MAX / 2);
            }
            let when =
                format!("point {point} failed, at the target: {fails_at_target}, with {volumes} volumes: {told:?}");
            if vm(&b).is_some() {
                went += 1
            } else {
                stayed += 1
            }
            assert!(told.is_err() || vm(&b).is_some(), "{when}");
            is_in_one_place(&wire, &a, &b, &when).await;
        }
        println!("at the target: {fails_at_target}: stayed {stayed} times, went {went}");
        assert!(stayed > 0 && went > 0, "stayed {stayed} times, went {went}");
    }
}

/// The link is cut a while after a migration began, and mended later.
#[tokio::test(start_paused = true)]
async fn a_link_that_is_cut_at_any_moment_leaves_it_in_one_place() {
    let mut moved = 0;
    for (moment, volumes) in (0..60).map(|moment| (moment, 0)).chain((0..80).map(|moment| (moment, 2))) {
        let (wire, a, b) = two_with_a_road().await;
        a.session(517).await;
        mover(&a, volumes).await;
        let from = a.clone();
        let asked = tokio::spawn(async move { from.door.migrate(NAME, MigrateOrder::to("b")).await.map(drop) });
        tokio::time::sleep(Duration::from_micros(150 * moment)).await;
        wire.is_cut.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(60)).await;
        // While nobody can be asked, it runs nowhere, or where it was.
        nothing_was_seen([&a, &b]);
        wire.is_cut.store(false, Ordering::Relaxed);
        tokio::time::sleep(REST).await;
        let _ = asked.await;
        moved += u32::from(vm(&b).is_some());
        is_in_one_place(&wire, &a, &b, &format!("cut after {} us", 150 * moment)).await;
    }
    println!("{moved} of 60 were on the other host");
    assert!((1..60).contains(&moved), "{moved}");
}

/// Handed over, with the word of it on its way, when its VMM there is killed: nobody has it any more, and it is told.
async fn one_that_is_lost_is_told_of(back: bool) {
    for moment in 0..200 {
        let (wire, a, b) = two_with_a_road().await;
        a.session(517).await;
        a.vm(NAME, Some(517)).await;
        if back {
            a.door.migrate(NAME, MigrateOrder::to("b")).await.expect("it goes there");
        }
        let (from, to, name) = if back { (b.clone(), &a, "a") } else { (a.clone(), &b, "b") };
        let asked = tokio::spawn({
            let from = from.clone();
            async move { from.door.migrate(NAME, MigrateOrder::to(name)).await.map(drop) }
        });
        tokio::time::sleep(Duration::from_micros(50 * moment)).await;
        wire.is_cut.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let undecided = Some(VmState::Arriving { returning: back });
        if state(&from) != Some(VmState::HandedOver) || state(to) != undecided {
            continue;
        }
        // It stands still there as long as nobody can be asked.
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(state(to), undecided);
        to.sim.end_vmms();
        tokio::time::sleep(Duration::from_secs(1)).await;
        wire.is_cut.store(false, Ordering::Relaxed);
        let told = asked.await.expect("no panic").expect_err("it is lost").to_string();
        assert!(told.contains(&format!("host {name}")), "{told}");
        let lost = |state: &VmState| matches!(state, VmState::Failed { cause: FailureCause::LostOnTheWay { .. } });
        assert!(state(&from).as_ref().is_some_and(lost), "{:?}", state(&from));
        assert_eq!(state(to), back.then_some(VmState::HandedOver));
        assert_eq!((a.sim.living(), b.sim.living()), (vec![], vec![]));
        // Once that was seen and removed, its addresses are free again.
        from.door.ask(NAME, Verb::Remove { grace: Duration::ZERO }).await.expect("removed");
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!((vm(&a), vm(&b)), (None, None));
        nothing_was_seen([&a, &b]);
        return;
    }
    panic!("it is never handed over without the other host's knowing");
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_where_it_was_handed_to_is_told_as_lost() {
    one_that_is_lost_is_told_of(false).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_where_it_comes_back_to_is_told_as_lost() {
    one_that_is_lost_is_told_of(true).await;
}
