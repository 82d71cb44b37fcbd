//! Tier 1, clusters: the real agent on a simulated host, with guests that lie, stay silent or hang up when they are to
//! register, effects that fail, and agents that die between any two effects. The host looks at the ledger after each
//! job: no member runs unregistered, executor ids are unique among the living, nobody is launched anew twice, and
//! nobody calculates before it has heard of its registration.
//!
//! `HEARTH_SIM_SEED=N` runs one seed, `HEARTH_SIM_RUNS=N` that many from it on.
#![expect(clippy::expect_used, clippy::panic, reason = "tests")]

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use hearth::agent::config::{Config, Overrides, load};
use hearth::agent::{
    Agent, CalculationRequest, CalculationTaken, ClusterRequest, Door, LaunchRequest, Launched, Verb, VmState,
};
use hearth::sim::{Faults, Manners, SimHost};

/// Lives of agents before the last, quiet one.
const LIVES: u64 = 3;

/// Requests of clients in each life.
const REQUESTS: u64 = 10;

/// Virtual time after which everything has to be at rest: two boots of 15 s, their deadlines, stops of 10 s, and the
/// time of a calculation.
const REST: Duration = Duration::from_secs(600);

fn config() -> Config {
    load(Overrides { config: Some("/dev/null".into()), ..Overrides::default() }).expect("a configuration")
}

/// Runs an agent's life in a runtime of its own, until `work` is done or a fault kills the agent.
fn life<F, T>(host: &SimHost, faults: Faults, work: impl FnOnce(Arc<dyn Door>) -> F) -> Option<T>
where
    F: Future<Output = T>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let done = runtime.block_on(async {
        let world = host.begin_life(faults);
        let living = async {
            let agent = Agent::start(world, config()).await.expect("the ledger is readable");
            work(Arc::new(agent)).await
        };
        let done = tokio::select! {
            biased;
            () = host.crashed() => None,
            done = living => Some(done),
        };
        host.end_life();
        done
    });
    drop(runtime);
    done
}

fn cluster(name: &str) -> ClusterRequest {
    ClusterRequest { name: Some(name.to_owned()), registration_deadline_s: Some(10), ..ClusterRequest::default() }
}

fn member(cluster: &str, executor_id: &str) -> LaunchRequest {
    let (cluster, executor_id) = (Some(cluster.to_owned()), Some(executor_id.to_owned()));
    LaunchRequest { image: "demo".to_owned(), cluster, executor_id, ..LaunchRequest::default() }
}

fn program(argv: &[&str]) -> CalculationRequest {
    let argv = argv.iter().map(|&word| word.to_owned()).collect();
    CalculationRequest { argv, timeout_s: Some(120), ..CalculationRequest::default() }
}

/// One client's request, at random. What it is answered does not matter here, only that it is.
async fn one_request(host: SimHost, door: Arc<dyn Door>) {
    let word = |words: [&'static str; 2]| words[usize::try_from(host.pick(2)).unwrap_or(0)];
    let (cluster_name, executor) = (word(["red", "blue"]), word(["e-1", "e-2"]));
    match host.pick(12) {
        0..=1 => drop(door.create_cluster(cluster(cluster_name)).await),
        2..=5 => {
            if let Ok(Launched::Vm(vm)) = door.launch(member(cluster_name, executor)).await
                && host.pick(2) == 0
            {
                let _ = door.launched(vm).await;
            }
        }
        6..=8 => {
            let argv: &[&str] = if host.pick(3) == 0 { &["never"] } else { &["echo", "x"] };
            if let Ok(CalculationTaken::Calculation(taken)) = door.take_calculation(cluster_name, program(argv)).await {
                drop(door.calculation(cluster_name, taken.id.as_str(), Duration::from_secs(30)).await);
            }
        }
        9 => {
            let grace = Duration::from_secs(host.pick(2) * 5);
            if let Some(vm) = door.vms().first() {
                drop(door.ask(vm.id.as_str(), Verb::Remove { grace }).await);
            }
        }
        10 => drop(door.remove_cluster(cluster_name, host.pick(2) == 0, Duration::ZERO).await),
        _ => host.kill_some_vmm(),
    }
}

async fn busy_life(host: SimHost, door: Arc<dyn Door>) {
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..REQUESTS {
        clients.spawn(one_request(host.clone(), Arc::clone(&door)));
        tokio::time::sleep(Duration::from_millis(host.pick(20_000))).await;
    }
    let rest = tokio::time::timeout(REST, async { while clients.join_next().await.is_some() {} }).await;
    assert!(rest.is_ok(), "a client was never answered");
}

/// The last agent: no faults any more. Everything comes to rest, then everything is removed.
async fn quiet_life(host: SimHost, door: Arc<dyn Door>) {
    tokio::time::sleep(REST).await;
    for vm in door.vms() {
        let at_rest = matches!(vm.state, VmState::Running | VmState::Paused) || vm.state.has_ended();
        assert!(at_rest, "{} is still {}", vm.id, vm.state.name());
        assert_eq!(host.living().contains(&vm.id), vm.state.holds_resources(), "{} is {}", vm.id, vm.state.name());
    }
    for view in door.clusters().await.expect("clusters") {
        let name = view.record.name.clone().expect("they have names");
        for calculation in door.calculations(&name).await.expect("calculations") {
            assert!(calculation.state.is_over(), "{} is still {}", calculation.id, calculation.state.name());
        }
        door.remove_cluster(&name, true, Duration::ZERO).await.expect("a cluster is drained");
    }
    assert!(door.clusters().await.expect("clusters").is_empty());
    for vm in door.vms() {
        let removed = door.ask(vm.id.as_str(), Verb::Remove { grace: Duration::ZERO }).await;
        removed.unwrap_or_else(|error| panic!("remove {}: {error}", vm.id));
    }
    assert_eq!((host.living(), host.directories(), host.jailed()), (vec![], vec![], vec![]));
    assert!(host.with_store(|store| store.relaunched().expect("relaunches")).is_empty());
}

fn run_seed(seed: u64) {
    let host = SimHost::new(seed);
    let faults = Faults { fail_permille: 20, crash_permille: 6, odd_guest_permille: 300, ..Faults::default() };
    for _ in 0..LIVES {
        life(&host, faults, |door| busy_life(host.clone(), door));
    }
    let done = life(&host, Faults::default(), |door| quiet_life(host.clone(), door));
    assert!(done.is_some(), "the quiet life has no crashes");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn random_histories_of_clusters_come_to_rest() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("HEARTH_SIM_SEED").unwrap_or(1);
    let runs = number("HEARTH_SIM_RUNS").unwrap_or(if std::env::var_os("HEARTH_SIM_SEED").is_some() { 1 } else { 100 });
    println!("seeds {first} to {}", first + runs - 1);
    for seed in first..first + runs {
        if let Err(panic) = std::panic::catch_unwind(|| run_seed(seed)) {
            eprintln!("seed {seed}: run it alone with HEARTH_SIM_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// A member that stays silent, the one launched instead of it, and a calculation in that.
async fn whole_story(door: Arc<dyn Door>) {
    door.create_cluster(cluster("tale")).await.expect("a cluster");
    let Ok(Launched::Vm(vm)) = door.launch(member("tale", "e-1")).await else { panic!("a launch") };
    door.launched(vm).await.expect_err("the first stays silent");
    let taken = door.take_calculation("tale", program(&["echo", "x"])).await;
    let Ok(CalculationTaken::Calculation(taken)) = taken else { panic!("a calculation") };
    let ended = door.calculation("tale", taken.id.as_str(), Duration::from_secs(100)).await;
    let (ended, output) = ended.expect("a calculation");
    assert_eq!((ended.state.name(), output.stdout.as_slice()), ("succeeded", b"x\n".as_slice()));
    door.remove_cluster("tale", true, Duration::from_secs(5)).await.expect("drained");
    assert!(door.vms().is_empty());
}

#[test]
fn a_crash_at_every_point_leaves_one_successor_at_most() {
    let mut point = 1;
    loop {
        let host = SimHost::new(11);
        host.set_manners(&[Manners::Silent]);
        let faults = Faults { crash_at_point: Some(point), ..Faults::default() };
        let whole = life(&host, faults, whole_story);
        let recovered = std::panic::AssertUnwindSafe(|| {
            life(&host, Faults::default(), |door| quiet_life(host.clone(), door)).expect("no crash in the quiet life");
            assert_eq!(host.violations(), Vec::<String>::new());
        });
        if let Err(panic) = std::panic::catch_unwind(recovered) {
            eprintln!("crashed at point {point}");
            std::panic::resume_unwind(panic);
        }
        if whole.is_some() {
            break;
        }
        point += 1;
    }
    println!("{} points", point - 1);
    assert!(point > 40, "two launches, a calculation and a removal have more points than {point}");
}

#[test]
fn a_calculation_that_ran_when_its_agent_ended_is_lost_and_not_run_again() {
    let host = SimHost::new(12);
    life(&host, Faults::default(), |door| async move {
        door.create_cluster(cluster("c")).await.expect("a cluster");
        let Ok(Launched::Vm(vm)) = door.launch(member("c", "e-1")).await else { panic!("a launch") };
        door.launched(vm).await.expect("it runs");
        door.take_calculation("c", program(&["never"])).await.expect("a calculation");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(door.calculations("c").await.expect("calculations")[0].state.name(), "running");
    })
    .expect("no crash");
    life(&host, Faults::default(), |door| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(door.calculations("c").await.expect("calculations")[0].state.name(), "lost");
        let view = door.cluster("c").await.expect("a cluster");
        assert!(view.members[0].registration.is_some() && view.running.is_empty());
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}
