//! One living member has an executor id, one launch anew a member, and a cluster goes when nothing of it lives.

use super::*;
use crate::agent::calculation_record::{CalculationOutput, CalculationRecord, CalculationState};
use crate::agent::cluster_record::{ClusterState, Membership, Token};
use crate::agent::fixture;
use crate::agent::ledger::{CalculationChange, schema};
use crate::agent::record::VmRecord;
use crate::agent::vm_state::VmState;
use crate::clock::UnixNanos;
use crate::ids::CalculationId;

pub(super) fn cluster(number: u8, name: Option<&str>) -> ClusterRecord {
    ClusterRecord {
        schema_version: 1,
        id: ClusterId::from_random([number; 10]),
        name: name.map(str::to_owned),
        token: Token::new("a secret".to_owned()),
        endpoint: None,
        registration_deadline_s: 30,
        state: ClusterState::Active,
        epoch: 0,
        revision: 1,
        created_at: UnixNanos(1),
    }
}

fn member(number: u8, cluster: &ClusterRecord, executor_id: &str, state: VmState) -> VmRecord {
    let mut vm = fixture::vm(number, &format!("vm{number}"));
    vm.state = state;
    let (cluster, executor_id) = (cluster.id.clone(), executor_id.to_owned());
    vm.spec.cluster = Some(Membership { cluster, executor_id, attempt: 1, replaces: None });
    vm
}

fn with(clusters: &[&ClusterRecord]) -> Store {
    let mut store = Store::in_memory().unwrap();
    for cluster in clusters {
        store.commit(&[Write::NewCluster(Box::new((*cluster).clone()))]).unwrap();
    }
    store
}

#[test]
fn clusters_are_found_by_id_name_and_start() {
    let (one, two) = (cluster(1, Some("etl")), cluster(2, None));
    let mut store = with(&[&one, &two]);
    assert_eq!(store.cluster("etl").unwrap().as_ref(), Some(&one));
    assert_eq!(store.cluster(two.id.as_str()).unwrap().as_ref(), Some(&two));
    assert_eq!(store.clusters_by_prefix(&one.id.as_str()[..6]).unwrap(), std::slice::from_ref(&one));
    assert_eq!(store.clusters().unwrap(), [one.clone(), two]);
    let again = store.commit(&[Write::NewCluster(Box::new(cluster(3, Some("etl"))))]);
    assert!(matches!(again, Err(LedgerError::Cluster(ClusterRefusal::NameTaken))));
    let (epoch, _) = store
        .change_cluster(&one.id, |cluster| {
            cluster.epoch += 1;
            (cluster.epoch, Vec::new())
        })
        .unwrap();
    let kept = store.cluster("etl").unwrap().unwrap();
    assert_eq!((epoch, kept.epoch, kept.revision), (1, 1, 2));
    let gone = store.change_cluster(&ClusterId::from_random([9; 10]), |_| ((), Vec::new()));
    assert!(matches!(gone, Err(LedgerError::Cluster(ClusterRefusal::Unknown))));
}

#[test]
fn an_executor_id_is_free_again_when_its_member_has_ended() {
    let (one, two) = (cluster(1, None), cluster(2, None));
    let mut store = with(&[&one, &two]);
    let put = |store: &mut Store, vm: VmRecord| store.commit(&[Write::Vm(Box::new(vm))]);
    put(&mut store, member(1, &one, "e", VmState::Running)).unwrap();
    put(&mut store, member(2, &two, "e", VmState::Running)).unwrap();
    let taken = put(&mut store, member(3, &one, "e", VmState::Launching));
    assert!(matches!(taken, Err(LedgerError::Taken { what: Taken::Executor })), "{taken:?}");
    assert!(matches!(
        store.remove_cluster(&one.id, &[]),
        Err(LedgerError::Cluster(ClusterRefusal::InUse { members: 1 }))
    ));
    put(&mut store, member(1, &one, "e", VmState::Stopped)).unwrap();
    put(&mut store, member(3, &one, "e", VmState::Launching)).unwrap();
    put(&mut store, member(3, &one, "e", VmState::Gone)).unwrap();
    store.remove_cluster(&one.id, &[]).unwrap();
    let gone = store.remove_cluster(&one.id, &[]);
    assert!(matches!(gone, Err(LedgerError::Cluster(ClusterRefusal::Unknown))));
    assert_eq!(store.vms().unwrap().len(), 3, "what ended is kept");
}

#[test]
fn a_member_is_launched_anew_once() {
    let mut store = Store::in_memory().unwrap();
    let (one, two) = (VmId::from_random([1; 10]), VmId::from_random([2; 10]));
    let anew =
        |vm: &VmId, successor: Option<&VmId>| Write::Relaunched { vm: vm.clone(), successor: successor.cloned() };
    store.commit(&[anew(&one, Some(&two))]).unwrap();
    for again in [anew(&one, Some(&two)), anew(&one, None)] {
        assert!(matches!(store.commit(&[again]), Err(LedgerError::Taken { what: Taken::Relaunch })));
    }
    store.commit(&[anew(&two, None)]).unwrap();
    assert_eq!(store.relaunched().unwrap(), BTreeSet::from([one.clone(), two.clone()]));
    store.commit(&[Write::NoVm(one)]).unwrap();
    assert_eq!(store.relaunched().unwrap(), BTreeSet::from([two]));
}

fn calculation(number: u8, cluster: &ClusterRecord, state: CalculationState) -> CalculationRecord {
    CalculationRecord {
        schema_version: 1,
        id: CalculationId::from_random([number; 10]),
        cluster: cluster.id.clone(),
        wanted: None,
        member: None,
        executor_id: None,
        argv: vec!["true".to_owned()],
        env: Vec::new(),
        timeout_s: 1,
        state,
        stdout_truncated: false,
        stderr_truncated: false,
        created_at: UnixNanos(1),
        started_at: None,
        ended_at: None,
    }
}

#[test]
fn a_calculation_goes_from_state_to_state_once() {
    let one = cluster(1, None);
    let mut store = with(&[&one]);
    let queued = calculation(1, &one, CalculationState::Queued);
    store.queue_calculation(&queued, b"input", &[]).unwrap();
    assert_eq!(store.calculation_input(&queued.id).unwrap(), b"input");
    let to =
        |from, state, output| CalculationChange { from, record: calculation(1, &one, state), output, writes: vec![] };
    let begun = to("queued", CalculationState::Running, None);
    assert!(store.change_calculation(&begun).unwrap().is_some());
    assert!(store.change_calculation(&begun).unwrap().is_none(), "somebody was faster");
    assert_eq!(store.calculations_under_way().unwrap(), std::slice::from_ref(&begun.record));
    let output = CalculationOutput { stdout: vec![0xff, 0], stderr: b"err".to_vec() };
    let ended = to("running", CalculationState::Succeeded, Some(output.clone()));
    assert!(store.change_calculation(&ended).unwrap().is_some());
    assert_eq!(store.calculation_output(&queued.id).unwrap(), output);
    assert!(store.calculation_input(&queued.id).unwrap().is_empty(), "input of what is over is dropped");
    assert!(store.calculations_under_way().unwrap().is_empty());
    let start = &queued.id.as_str()[..8];
    assert_eq!(store.calculations_by_prefix(&one.id, start).unwrap(), [ended.record]);
    let unknown = calculation(2, &cluster(2, None), CalculationState::Queued);
    let refused = store.queue_calculation(&unknown, &[], &[]);
    assert!(matches!(refused, Err(LedgerError::Cluster(ClusterRefusal::Unknown))));
    store.remove_cluster(&one.id, &[]).unwrap();
    assert!(store.calculations(&one.id).unwrap().is_empty(), "they go with their cluster");
}

#[test]
fn calculations_are_bounded() {
    let one = cluster(1, None);
    let mut store = with(&[&one]);
    let id = |number: u16| {
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        CalculationId::from_random(bytes)
    };
    let record = |number| CalculationRecord { id: id(number), ..calculation(0, &one, CalculationState::Queued) };
    for number in 0..256 {
        store.queue_calculation(&record(number), &[], &[]).unwrap();
    }
    let refused = store.queue_calculation(&record(256), &[], &[]);
    assert!(matches!(refused, Err(LedgerError::Cluster(ClusterRefusal::TooManyCalculations { waiting: 256 }))));
    for number in 0..256 {
        let record = CalculationRecord { state: CalculationState::Succeeded, ..record(number) };
        let change = CalculationChange { from: "queued", record, output: None, writes: vec![] };
        assert!(store.change_calculation(&change).unwrap().is_some());
    }
    for number in 300..310 {
        store.queue_calculation(&record(number), &[], &[]).unwrap();
    }
    let kept = store.calculations(&one.id).unwrap();
    assert_eq!(kept.len(), 266);
    let last = CalculationRecord { state: CalculationState::Succeeded, ..record(309) };
    let change = CalculationChange { from: "queued", record: last, output: None, writes: vec![] };
    store.change_calculation(&change).unwrap();
    store.queue_calculation(&record(310), &[], &[]).unwrap();
    assert_eq!(store.calculations(&one.id).unwrap().len(), 266, "the oldest that is over is dropped");
}

#[test]
fn a_ledger_of_the_second_version_becomes_one_of_this() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let old = schema::make_version_2(&path);
    let kept = fixture::vm(4, "kept");
    // As version 2 wrote it: in no cluster, and not registered.
    let mut json = serde_json::to_value(&kept).unwrap();
    assert!(json.as_object_mut().unwrap().remove("registration").is_some());
    assert!(json["spec"].as_object_mut().unwrap().remove("cluster").is_some());
    let put = "INSERT INTO vms(id, name, state, revision, record, jail) VALUES (?1, 'kept', 'launching', 1, ?2, 4)";
    old.execute(put, params![kept.id.as_str(), json.to_string()]).unwrap();
    drop(old);
    let mut store = Store::open(&path).unwrap();
    assert_eq!(store.begin().unwrap().vms, [kept]);
    let one = cluster(1, Some("etl"));
    store.commit(&[Write::NewCluster(Box::new(one.clone()))]).unwrap();
    store.commit(&[Write::Vm(Box::new(member(5, &one, "e", VmState::Running)))]).unwrap();
    drop(store);
    let mut store = Store::open(&path).unwrap();
    assert_eq!((store.begin().unwrap().vms.len(), store.clusters().unwrap()), (2, vec![one]));
}
