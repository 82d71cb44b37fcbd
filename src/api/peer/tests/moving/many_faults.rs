//! Runs of many migrations, each with faults of a seed: agents that die, VMMs that are killed, what an agent
//! does that fails, clocks that are set, links that are cut, two of them at once. How many runs is read from
//! `HEARTH_PROVE_RUNS`; `scripts/prove-migration` asks for a thousand. The hosts' witness sees two copies that both run, and one that goes on from before it last ran.

use super::*;

/// Runs without being asked for more.
const RUNS: u64 = 100;

/// Migrations in one run.
const WAYS: u32 = 4;

/// Longest time from a request to a fault: a whole migration takes less.
const MOMENT_US_MAX: u64 = 12_000;

/// What goes wrong.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Nothing,
    /// The agent of a host dies so many points later; the next one comes up to ten seconds after that.
    AgentDies(bool, u64),
    /// The VMMs of a host are killed.
    VmmsKilled(bool),
    /// What a host's agent does so many points later fails.
    EffectFails(bool, u64),
    /// A host's wall clock is set by so many seconds, forward or back, until somebody notices.
    ClockSet(bool, i64),
    /// Nobody hears anybody for so many milliseconds.
    LinkCut(u64),
}

fn fault(random: &SimHost) -> Fault {
    match random.pick(11) {
        0 => Fault::Nothing,
        1..=3 => Fault::AgentDies(random.pick(2) == 0, 1 + random.pick(30)),
        4 => Fault::VmmsKilled(random.pick(2) == 0),
        5 => Fault::ClockSet(
            random.pick(2) == 0,
            [-86_400, -30, 30, 86_400][usize::try_from(random.pick(4)).expect("small")],
        ),
        6 | 7 => Fault::EffectFails(random.pick(2) == 0, 1 + random.pick(30)),
        _ => Fault::LinkCut(1 + random.pick(60_000)),
    }
}

/// Two hosts, of which agents come and go.
struct Pair {
    wire: Wire,
    hosts: [Host; 2],
}

impl Pair {
    async fn begin(&mut self, fault: Fault) {
        match fault {
            Fault::Nothing => {}
            Fault::AgentDies(first, points) => self.hosts[usize::from(first)].sim.crash_in(points),
            Fault::VmmsKilled(first) => self.hosts[usize::from(first)].sim.end_vmms(),
            Fault::EffectFails(first, points) => self.hosts[usize::from(first)].sim.fail_in(points),
            Fault::ClockSet(first, seconds) => self.hosts[usize::from(first)].sim.move_wall_clock(seconds),
            Fault::LinkCut(_) => self.wire.is_cut.store(true, Ordering::Relaxed),
        }
    }

    async fn end(&mut self, fault: Fault, random: &SimHost) {
        match fault {
            Fault::Nothing | Fault::VmmsKilled(_) | Fault::EffectFails(..) => {}
            Fault::ClockSet(first, seconds) => {
                tokio::time::sleep(Duration::from_secs(random.pick(30))).await;
                self.hosts[usize::from(first)].sim.move_wall_clock(-seconds);
            }
            Fault::AgentDies(first, _) => {
                let host = &mut self.hosts[usize::from(first)];
                if host.sim.has_crashed() {
                    tokio::time::sleep(Duration::from_millis(random.pick(10_000))).await;
                    host.sim.crash_never();
                    let next = next(&self.wire, host).await;
                    *host = next;
                } else {
                    host.sim.crash_never();
                }
            }
            Fault::LinkCut(ms) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                self.wire.is_cut.store(false, Ordering::Relaxed);
            }
        }
    }

    /// Where it runs; `None` if it has failed, which only the end of its process is a reason for.
    fn place(&self, may_have_failed: bool, when: &str) -> Option<usize> {
        let [a, b] = &self.hosts;
        nothing_was_seen([a, b]);
        let living = (a.sim.living().len(), b.sim.living().len());
        match (state(a), state(b)) {
            (Some(VmState::Running), None) if living == (1, 0) => Some(0),
            (Some(VmState::HandedOver), Some(VmState::Running)) if living == (0, 1) => Some(1),
            (Some(VmState::Failed { .. }), None) | (Some(VmState::HandedOver), Some(VmState::Failed { .. }))
                if living == (0, 0) && may_have_failed =>
            {
                None
            }
            states => panic!("{when}: {states:?}, {living:?} live"),
        }
    }
}

/// One run; how many of its ways it stayed, went and failed.
async fn run(seed: u64) -> [u32; 3] {
    // A host of no other use than its numbers.
    let random = SimHost::new(seed << 16);
    let (wire, a, b) = two_with_a_road().await;
    let mut pair = Pair { wire, hosts: [a, b] };
    pair.hosts[0].session(517).await;
    pair.hosts[0].vm(NAME, Some(517)).await;
    let (mut here, mut ends) = (0, [0; 3]);
    for way in 0..WAYS {
        let faults = [fault(&random), if random.pick(3) == 0 { fault(&random) } else { Fault::Nothing }];
        let when = format!("seed {seed}, way {way} from {here}: {faults:?}");
        let (from, to) = (pair.hosts[here].clone(), ["b", "a"][here]);
        let asked = tokio::spawn(async move { from.door.migrate(NAME, MigrateOrder::to(to)).await.map(drop) });
        for fault in faults {
            tokio::time::sleep(Duration::from_micros(random.pick(MOMENT_US_MAX))).await;
            pair.begin(fault).await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        nothing_was_seen([&pair.hosts[0], &pair.hosts[1]]);
        for fault in faults {
            pair.end(fault, &random).await;
        }
        // The one that was asked may be dead by now.
        tokio::time::sleep(REST).await;
        tokio::time::sleep(REST).await;
        asked.abort();
        let was_killed = faults.iter().any(|fault| matches!(fault, Fault::VmmsKilled(_)));
        match pair.place(was_killed, &when) {
            Some(place) => {
                ends[usize::from(place != here)] += 1;
                here = place;
            }
            None => {
                ends[2] += 1;
                break;
            }
        }
    }
    ends
}

#[test]
fn of_many_faults_none_leaves_two_or_none() {
    let runs = std::env::var("HEARTH_PROVE_RUNS").map_or(RUNS, |text| text.parse().expect("a number of runs"));
    let first = std::env::var("HEARTH_PROVE_SEED").map_or(1, |text| text.parse().expect("a seed"));
    let mut sum = [0; 3];
    for seed in first..first + runs {
        // One for each: the agents of a run that is over would go on asking each other in all that follow.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let ends = runtime.expect("a runtime").block_on(run(seed));
        for (sum, end) in sum.iter_mut().zip(ends) {
            *sum += end;
        }
    }
    let [stayed, went, failed] = sum;
    println!("{runs} runs from seed {first}: stayed {stayed} times, went {went}, failed {failed}");
    assert!(stayed > 0 && went > 0 && failed > 0, "{sum:?}");
}
