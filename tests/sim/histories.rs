//! Clients that ask at random.

use std::sync::Arc;
use std::time::Duration;

use hearth::agent::{Door, ExecOutput, ExecSpec, Launched, SnapshotRequest, SwapMode, SwapOrder, Verb, WakeCause};
use hearth::sim::{Faults, SimHost};

use crate::bundles::{build, from_bundle};
use crate::life::{in_session, life, request, session};
use crate::rest::{REST, quiet_life};

/// Lives of agents before the last, quiet one.
const LIVES: u64 = 4;

/// Requests of clients in each life.
const REQUESTS: u64 = 16;

/// One client's request, at random. What it is answered does not matter here, only that it is.
async fn one_request(host: SimHost, door: Arc<dyn Door>) {
    let names = ["one", "two", "three", "four"];
    let index = usize::try_from(host.pick(4)).expect("a small number");
    let name = names[index];
    let grace = Duration::from_secs(host.pick(3) * 5);
    let sessions = ["red", "green"];
    let session_name = sessions[usize::try_from(host.pick(2)).expect("a small number")];
    match host.pick(27) {
        0..=3 => {
            let wanted = Some(name.to_owned());
            let wanted = if host.pick(4) == 0 { request(wanted) } else { in_session(wanted, session_name) };
            if let Ok(Launched::Vm(vm)) = door.launch(wanted).await
                && host.pick(2) == 0
            {
                let _ = door.launched(vm).await;
            }
        }
        4 => drop(door.ask(name, Verb::Pause).await),
        5 => drop(door.ask(name, Verb::Resume).await),
        6 => drop(door.ask(name, Verb::Stop { grace }).await),
        7 => drop(door.ask(name, Verb::Remove { grace }).await),
        8 => {
            let spec = ExecSpec { argv: vec!["true".to_owned()], ..ExecSpec::default() };
            if let Ok(mut session) = door.exec(name, spec).await {
                while let Ok(ExecOutput::Stdout(_) | ExecOutput::Stderr(_)) = session.output.next().await {}
            }
        }
        9..=11 => {
            let ttl_s = u32::try_from(host.pick(120)).ok().filter(|ttl_s| *ttl_s > 60);
            drop(door.create_session(session(session_name, ttl_s)).await);
        }
        12 => drop(door.remove_session(session_name, true, grace).await),
        13 => drop(door.remove_session(session_name, false, grace).await),
        14..=20 => of_bundles(&host, &door, name).await,
        21..=24 => of_swapping(&host, &door, name).await,
        26 => drop(door.ask(name, Verb::HandOver).await),
        25 if host.pick(2) == 0 => host.move_wall_clock([-86_400, 86_400][usize::from(host.pick(2) == 0)]),
        _ => host.kill_some_vmm(),
    }
}

/// A request, or a packet, that has to do with swapping.
async fn of_swapping(host: &SimHost, door: &Arc<dyn Door>, vm: &str) {
    let mode = if host.pick(2) == 0 { SwapMode::Page } else { SwapMode::Hibernate };
    match host.pick(4) {
        0 | 1 => {
            let wake_after = (host.pick(2) == 0).then(|| Duration::from_secs(host.pick(60)));
            let order = SwapOrder { mode, wake_after, because: "chance".to_owned() };
            drop(door.ask(vm, Verb::SwapOut(order)).await);
        }
        2 => drop(door.ask(vm, Verb::Wake(WakeCause::Api)).await),
        _ => {
            if let Ok(vm) = door.vm(vm) {
                host.send_packet(&vm.id);
            }
        }
    }
}

/// A request that has to do with bundles.
async fn of_bundles(host: &SimHost, door: &Arc<dyn Door>, vm: &str) {
    let bundles = host.bundles();
    let some = usize::try_from(host.pick(bundles.len() as u64)).expect("a small number");
    let some = bundles.get(some).map_or_else(|| "gold".to_owned(), ToString::to_string);
    let name = ["gold", "silver"].get(usize::try_from(host.pick(3)).expect("a small number"));
    let name = name.map(|name| (*name).to_owned());
    match host.pick(6) {
        0 => {
            let warmup = ["true", "false", "echo READY"][usize::try_from(host.pick(3)).expect("a small number")];
            drop(door.build_bundle(build(name, Some(warmup), None)).await);
        }
        1 => drop(
            door.snapshot(
                vm,
                SnapshotRequest { name, diff: host.pick(2) == 0, live: host.pick(2) == 0, with_secrets: false },
            )
            .await,
        ),
        2 | 3 => {
            let wanted = from_bundle(Some(vm.to_owned()), name.as_deref().unwrap_or(&some));
            if let Ok(Launched::Vm(vm)) = door.launch(wanted).await
                && host.pick(2) == 0
            {
                let _ = door.launched(vm).await;
            }
        }
        4 => drop(door.compact_bundle(&some, name).await),
        _ => drop(door.remove_bundle(&some).await),
    }
}

async fn busy_life(host: SimHost, door: Arc<dyn Door>) {
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..REQUESTS {
        clients.spawn(one_request(host.clone(), Arc::clone(&door)));
        tokio::time::sleep(Duration::from_millis(host.pick(20_000))).await;
    }
    let rest = tokio::time::timeout(REST * 3, async { while clients.join_next().await.is_some() {} }).await;
    assert!(rest.is_ok(), "a client was never answered");
}

fn run_seed(seed: u64) {
    let host = SimHost::new(seed);
    let faults = Faults { fail_permille: 20, crash_permille: 6, odd_guest_permille: 250, ..Faults::default() };
    for _ in 0..LIVES {
        life(&host, faults, |door| busy_life(host.clone(), door));
    }
    let done = life(&host, Faults::default(), |door| quiet_life(host.clone(), door));
    assert!(done.is_some(), "the quiet life has no crashes");
    assert_eq!(host.violations(), Vec::<String>::new());
}

/// Says which seed it was, then fails as the test does.
fn with_seed(seed: u64, run: impl FnOnce(u64) + std::panic::UnwindSafe) {
    if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
        eprintln!("seed {seed}: run it alone with HEARTH_SIM_SEED={seed}");
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn random_histories_come_to_rest() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("HEARTH_SIM_SEED").unwrap_or(1);
    let runs = number("HEARTH_SIM_RUNS").unwrap_or(if std::env::var_os("HEARTH_SIM_SEED").is_some() { 1 } else { 150 });
    println!("seeds {first} to {}", first + runs - 1);
    for seed in first..first + runs {
        with_seed(seed, run_seed);
    }
}
