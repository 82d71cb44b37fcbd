//! Tier 1: the real agent on a simulated host, from a seed: clients that ask at random, guests that fail, effects that
//! fail, and agents that die between any two effects. Whatever happened, the last agent has to come to rest with
//! nothing running twice and nothing left behind.
//!
//! `HEARTH_SIM_SEED=N` runs one seed, `HEARTH_SIM_RUNS=N` that many from it on.
#![expect(clippy::expect_used, clippy::panic, reason = "tests")]

use std::future::Future;
use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hearth::agent::config::{Config, Overrides, load};
use hearth::agent::{
    Agent, Door, ExecOutput, ExecSpec, Goal, LaunchRequest, Launched, OperationState, SessionCreated, SessionError,
    SessionRequest, SessionState, Verb, VmState,
};
use hearth::sim::{Faults, SimHost};

/// Lives of agents before the last, quiet one.
const LIVES: u64 = 4;

/// Requests of clients in each life.
const REQUESTS: u64 = 12;

/// Virtual time after which everything has to be at rest: boots of 15 s, a deadline of 120 s, stops of 10 s.
const REST: Duration = Duration::from_secs(400);

fn config() -> Config {
    static CONFIG: OnceLock<Config> = OnceLock::new();
    let read = || {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(b"[fabric]\nhost_number = 3\nipv6_prefix = 'fd3c:91aa:7e2::/48'\n").expect("it is written");
        load(Overrides { config: Some(file.path().into()), ..Overrides::default() }).expect("a configuration")
    };
    CONFIG.get_or_init(read).clone()
}

/// Runs an agent's life in a runtime of its own, until `work` is done or a fault kills the agent: then all its tasks
/// stop where they are, as in a process that is killed.
fn life<F, T>(host: &SimHost, faults: Faults, work: impl FnOnce(Arc<dyn Door>) -> F) -> Option<T>
where
    F: Future<Output = T>,
{
    life_with(host, faults, config(), work)
}

/// [`life`] with a configuration of its own.
fn life_with<F, T>(host: &SimHost, faults: Faults, config: Config, work: impl FnOnce(Arc<dyn Door>) -> F) -> Option<T>
where
    F: Future<Output = T>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let done = runtime.block_on(async {
        let world = host.begin_life(faults);
        let living = async {
            let agent = Agent::start(world, config).await.expect("the ledger is readable");
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

fn request(name: Option<String>) -> LaunchRequest {
    LaunchRequest { name, image: "demo".to_owned(), ..LaunchRequest::default() }
}

fn in_session(name: Option<String>, session: &str) -> LaunchRequest {
    LaunchRequest { session: Some(session.to_owned()), ..request(name) }
}

/// A session of this name, with a short life or none.
fn session(name: &str, ttl_s: Option<u32>) -> SessionRequest {
    SessionRequest { name: Some(name.to_owned()), ttl_s, ..SessionRequest::default() }
}

/// One client's request, at random. What it is answered does not matter here, only that it is.
async fn one_request(host: SimHost, door: Arc<dyn Door>) {
    let names = ["one", "two", "three", "four"];
    let index = usize::try_from(host.pick(4)).expect("a small number");
    let name = names[index];
    let grace = Duration::from_secs(host.pick(3) * 5);
    let sessions = ["red", "green"];
    let session_name = sessions[usize::try_from(host.pick(2)).expect("a small number")];
    match host.pick(15) {
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
        _ => host.kill_some_vmm(),
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

/// The last agent: no faults any more. Everything comes to rest, then everything is removed.
async fn quiet_life(host: SimHost, door: Arc<dyn Door>) {
    tokio::time::sleep(REST).await;
    let at_rest = |state: &VmState| {
        matches!(state, VmState::Running | VmState::Paused | VmState::Stopped | VmState::Failed { .. })
    };
    for vm in door.vms() {
        assert!(at_rest(&vm.state), "{} is still {}", vm.id, vm.state.name());
        let lives = host.living().contains(&vm.id);
        assert_eq!(lives, vm.state.holds_resources(), "{} is {}, its VMM lives: {lives}", vm.id, vm.state.name());
        assert_eq!(host.directories().contains(&vm.id), lives, "{} is {}", vm.id, vm.state.name());
        assert_eq!(host.jailed().contains(&vm.id), lives, "the jail of {}, which is {}", vm.id, vm.state.name());
        if vm.state == VmState::Running {
            let spec = ExecSpec { argv: vec!["true".to_owned()], ..ExecSpec::default() };
            let mut session = door.exec(vm.id.as_str(), spec).await.expect("a running VM runs programs");
            assert!(matches!(session.output.next().await, Ok(ExecOutput::Exited(_))));
        }
    }
    for operation in door.operations().await.expect("operations") {
        assert_ne!(operation.state, OperationState::Running, "{:?} of {} never ended", operation.goal, operation.vm);
    }
    nothing_unknown(&host, &door);
    for session in door.sessions().await.expect("sessions") {
        assert_eq!(session.record.state, SessionState::Active, "{} was never drained", session.record.id);
        assert!(!session.record.is_expired(door.now()), "{} lives past its time", session.record.id);
    }
    for vm in door.vms() {
        let grace = Duration::from_secs(1);
        let removed = door.ask(vm.id.as_str(), Verb::Remove { grace }).await;
        removed.unwrap_or_else(|error| panic!("remove {}: {error}", vm.id));
    }
    assert!(door.vms().is_empty());
    nothing_unknown(&host, &door);
    assert_eq!((host.living(), host.directories(), host.jailed()), (vec![], vec![], vec![]));
    for session in door.sessions().await.expect("sessions") {
        let word = session.record.session_network_id.to_string();
        door.remove_session(&word, false, Duration::ZERO).await.expect("a session without VMs is removed");
    }
    // Uids rest 10 s, local ids 120 s; what has run out is swept each minute.
    tokio::time::sleep(Duration::from_secs(200)).await;
    assert!(host.with_store(|store| store.leases().expect("leases")).is_empty(), "uids are left");
    assert!(host.with_store(|store| store.locals().expect("local ids")).is_empty(), "local ids are left");
    assert!(door.sessions().await.expect("sessions").is_empty());
    let mut next = 1;
    let events = door.events(0).await.expect("events");
    for event in &events {
        assert_eq!(event.seq, next, "events have gaps");
        next += 1;
    }
}

/// Every VMM and directory has a record.
fn nothing_unknown(host: &SimHost, door: &Arc<dyn Door>) {
    let known: Vec<_> = door.vms().iter().map(|vm| vm.id.clone()).collect();
    for id in host.living().iter().chain(&host.directories()).chain(&host.jailed()) {
        assert!(known.contains(id), "{id} has no record");
    }
}

fn run_seed(seed: u64) {
    let host = SimHost::new(seed);
    let faults = Faults { fail_permille: 20, crash_permille: 6, odd_guest_permille: 250, crash_at_point: None };
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

/// What a client does in [`a_crash_at_every_point_is_recovered_from`].
async fn whole_story(door: Arc<dyn Door>) {
    let made = door.create_session(session("tale", None)).await;
    assert!(matches!(made, Ok(SessionCreated::Session(_))));
    let launch = door.launch(in_session(Some("story".to_owned()), "tale")).await;
    let Ok(Launched::Vm(vm)) = launch else { panic!("a launch") };
    door.launched(vm).await.expect("it runs");
    door.ask("story", Verb::Pause).await.expect("paused");
    door.ask("story", Verb::Resume).await.expect("resumed");
    let grace = Duration::from_secs(10);
    let refused = door.remove_session("tale", false, grace).await;
    assert!(matches!(refused, Err(SessionError::InUse { members: 1, .. })), "{refused:?}");
    door.remove_session("tale", true, grace).await.expect("drained");
    assert!(door.vms().is_empty());
}

#[test]
fn a_crash_at_every_point_is_recovered_from() {
    let mut point = 1;
    loop {
        let host = SimHost::new(7);
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
    assert!(point > 40, "a session, a launch, pause, resume, stop and removal have more points than {point}");
}

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

#[test]
fn a_session_ends_when_its_time_has_run_out() {
    let host = SimHost::new(5);
    life(&host, Faults::default(), |door| {
        let host = host.clone();
        async move {
            let made = door.create_session(session("brief", Some(60))).await;
            let Ok(SessionCreated::Session(made)) = made else { panic!("a session: {made:?}") };
            let number = made.record.session_network_id;
            let Ok(Launched::Vm(vm)) = door.launch(in_session(None, "brief")).await else { panic!("a launch") };
            door.launched(vm).await.expect("it runs");
            tokio::time::sleep(Duration::from_secs(100)).await;
            assert!(door.vms().is_empty() && host.living().is_empty(), "its VMs are gone");
            assert!(door.sessions().await.expect("sessions").is_empty());
            // Its number rests, and whoever asks for it is told until when.
            let again = SessionRequest { session_network_id: Some(number.into()), ..SessionRequest::default() };
            let refused = door.create_session(again.clone()).await;
            assert!(matches!(refused, Err(SessionError::Resting { .. })), "{refused:?}");
            let refused = door.launch(in_session(None, &number.to_string())).await;
            assert!(refused.is_err_and(|error| error.to_string().contains("rests until")));
            tokio::time::sleep(Duration::from_secs(120)).await;
            assert!(door.create_session(again).await.is_ok());
            let events = door.events(0).await.expect("events");
            let of_session = events.iter().filter(|event| event.subject.to_string() == made.record.id.to_string());
            let kinds: Vec<&str> = of_session.map(|event| event.kind.as_str()).collect();
            assert_eq!(kinds, ["session_created", "session_draining", "session_removed"]);
        }
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn an_expiry_while_no_agent_ran_is_made_up_for() {
    let host = SimHost::new(6);
    let faults = Faults { crash_at_point: Some(70), ..Faults::default() };
    let life_of_maker = life(&host, faults, |door| async move {
        door.create_session(session("brief", Some(3600))).await.expect("a session");
        let Ok(Launched::Vm(vm)) = door.launch(in_session(None, "brief")).await else { panic!("a launch") };
        door.launched(vm).await.expect("it runs");
        // Until the crash: looks and sweeps pass points.
        tokio::time::sleep(Duration::from_secs(4000)).await;
    });
    assert!(life_of_maker.is_none(), "the agent was to die");
    life(&host, Faults::default(), |door| async move {
        tokio::time::sleep(Duration::from_secs(4000)).await;
        assert!(door.vms().is_empty());
        assert!(door.sessions().await.expect("sessions").is_empty());
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}

#[test]
fn a_host_that_changed_its_number_says_so_and_takes_no_members() {
    let host = SimHost::new(8);
    life(&host, Faults::default(), |door| async move {
        door.create_session(session("old", None)).await.expect("a session");
        let Ok(Launched::Vm(vm)) = door.launch(in_session(None, "old")).await else { panic!("a launch") };
        assert_eq!(
            vm.network.as_ref().map(|network| network.ipv6.to_string()).as_deref(),
            Some("fd3c:91aa:7e2:3:0:1:0:1")
        );
        door.launched(vm).await.expect("it runs");
    })
    .expect("no crash");
    let mut changed = config();
    if let Some(fabric) = &mut changed.fabric {
        fabric.host = 4.try_into().expect("a host number");
    }
    life_with(&host, Faults::default(), changed, |door| async move {
        let conflicts = door.fabric().expect("a fabric").conflicts;
        assert!(conflicts.len() == 1 && conflicts[0].contains("host_number"), "{conflicts:?}");
        let refused = door.launch(in_session(None, "old")).await;
        assert!(refused.is_err_and(|error| error.to_string().contains("host_number")));
        let refused = door.create_session(session("new", None)).await;
        assert!(matches!(refused, Err(SessionError::FabricConflict { .. })), "{refused:?}");
        // What has no addresses is none of the fabric's business, and what is there can be removed.
        assert!(door.launch(request(None)).await.is_ok());
        door.remove_session("old", true, Duration::from_secs(1)).await.expect("drained");
    })
    .expect("no crash");
    life(&host, Faults::default(), |door| async move {
        assert!(door.fabric().expect("a fabric").conflicts.is_empty());
    })
    .expect("no crash");
    assert_eq!(host.violations(), Vec::<String>::new());
}
