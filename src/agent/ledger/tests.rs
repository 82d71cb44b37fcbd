//! The ledger keeps what it was given, all or nothing, and refuses files it cannot know.

use super::*;
use crate::agent::config::Uids;
use crate::agent::effect::Effect;
use crate::agent::record::StepState;
use crate::agent::vm_state::{Goal, VmState};
use crate::sys::file;

pub(super) fn vm(number: u8, name: &str) -> VmRecord {
    VmRecord { uid: 1000, ..crate::agent::fixture::vm(number, name) }
}

fn operation(number: u8, state: OperationState) -> OperationRecord {
    let step = |effect| StepRecord { effect, state: StepState::Pending, took_us: None, note: None };
    OperationRecord {
        id: OperationId::from_random([number; 10]),
        vm: VmId::from_random([1; 10]),
        goal: Goal::Launch,
        then_remove: false,
        state,
        steps: vec![step(Effect::MakeDirectory), step(Effect::StartVmm)],
        makes: None,
        moved: None,
        migration: None,
        error: None,
        created_at: UnixNanos(1),
        ended_at: None,
    }
}

fn event(number: u64) -> Write {
    let body = serde_json::json!({ "number": number });
    let subject = Subject::Vm(VmId::from_random([1; 10]));
    Write::Event(NewEvent { at: UnixNanos(number), kind: "vm_state", subject, operation: None, body })
}

#[test]
fn nobody_else_reads_a_ledger() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    // As a program before this one made it.
    drop(Store::open(&path).unwrap());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut store = Store::open(&path).unwrap();
    store.commit(&[event(1)]).unwrap();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.file_name());
    }
}

#[test]
fn what_was_written_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let mut store = Store::open(&path).unwrap();
    assert_eq!(store.begin().unwrap().epoch, 1);
    let failed = VmRecord {
        state: VmState::Failed { cause: crate::agent::vm_state::FailureCause::VmmKilled { signal: 9 } },
        ..vm(2, "two")
    };
    let running = operation(1, OperationState::Running);
    let writes = [
        Write::Vm(Box::new(vm(1, "one"))),
        Write::Vm(Box::new(failed.clone())),
        Write::Operation(Box::new(running.clone())),
        Write::Operation(Box::new(operation(2, OperationState::Succeeded))),
        event(1),
    ];
    assert_eq!(store.commit(&writes).unwrap(), 1);
    drop(store);
    let mut store = Store::open(&path).unwrap();
    let loaded = store.begin().unwrap();
    assert_eq!((loaded.epoch, loaded.last_event), (2, 1));
    assert_eq!(loaded.vms, [vm(1, "one"), failed]);
    assert_eq!(loaded.operations, [running]);
    assert_eq!(store.operations().unwrap().len(), 2);
    let id = OperationId::from_random([2; 10]);
    assert_eq!(store.operation(&id.as_str()[..6]).unwrap().unwrap().id, id);
    assert!(store.operation("op-").unwrap().is_none(), "several start like this");
    assert!(store.operation("op-%").unwrap().is_none());
}

#[test]
fn a_commit_is_all_or_nothing() {
    let mut store = Store::in_memory().unwrap();
    store.commit(&[Write::Vm(Box::new(vm(1, "one"))), event(1)]).unwrap();
    let taken = store.commit(&[event(2), Write::Vm(Box::new(vm(2, "one")))]);
    assert!(matches!(taken, Err(LedgerError::Taken { what: Taken::Name })));
    assert_eq!(store.events(0).unwrap().len(), 1);
    assert_eq!(store.commit(&[event(3)]).unwrap(), 2, "numbers have no gaps");
}

#[test]
fn a_uid_has_one_owner_and_rests_before_the_next() {
    let mut store = Store::in_memory().unwrap();
    let base = Uids::default().base;
    let (one, two) = (VmId::from_random([1; 10]), VmId::from_random([2; 10]));
    assert_eq!(store.free_uid(base, 2, Steady(0)).unwrap(), Some(base));
    let lease = |vm: &VmId| Write::Lease { uid: base, vm: vm.clone() };
    store.commit(&[lease(&one)]).unwrap();
    store.commit(&[lease(&one)]).unwrap();
    assert!(matches!(store.commit(&[lease(&two)]), Err(LedgerError::Taken { what: Taken::Uid })));
    assert_eq!(store.free_uid(base, 2, Steady(0)).unwrap(), Some(base + 1));
    assert_eq!(store.free_uid(base, 1, Steady(0)).unwrap(), None);
    store.commit(&[Write::Release { vm: one, quarantine_until: Steady(10) }]).unwrap();
    assert_eq!(store.free_uid(base, 1, Steady(9)).unwrap(), None);
    assert_eq!(store.leases().unwrap().len(), 1);
    assert_eq!(store.free_uid(base, 1, Steady(10)).unwrap(), Some(base));
    assert!(store.leases().unwrap().is_empty());
}

#[test]
fn a_key_is_known_until_it_expires() {
    let mut store = Store::in_memory().unwrap();
    let row = |body, expires| KeyRow {
        key: "k".to_owned(),
        route: "POST /v1/vms".to_owned(),
        body_hash: [body; 32],
        object: "vm-x".to_owned(),
        expires: Steady(expires),
        answer: None,
    };
    let life = crate::agent::KEY_LIFETIME_NS;
    store.commit(&[Write::Key(row(1, life))]).unwrap();
    assert!(matches!(store.commit(&[Write::Key(row(2, life + 5))]), Err(LedgerError::Taken { what: Taken::Key })));
    let answer = StoredAnswer { status: 201, body: "{}".to_owned() };
    let (key, route) = ("k".to_owned(), "POST /v1/vms".to_owned());
    store.commit(&[Write::Answer { key, route, answer: answer.clone() }]).unwrap();
    let found = store.key("k", "POST /v1/vms", Steady(life - 1)).unwrap().unwrap();
    assert_eq!(found.answer, Some(answer));
    assert!(store.key("k", "POST /v1/images", Steady(0)).unwrap().is_none());
    assert!(store.key("k", "POST /v1/vms", Steady(life)).unwrap().is_none());
    // Used again after it expired.
    store.commit(&[Write::Key(row(2, 2 * life))]).unwrap();
}

#[test]
fn old_events_and_operations_are_dropped() {
    let mut store = Store::in_memory().unwrap();
    let many: Vec<Write> = (0..EVENTS_KEPT + 640).map(event).collect();
    assert_eq!(store.commit(&many).unwrap(), EVENTS_KEPT + 640);
    let first = store.events(0).unwrap();
    assert_eq!(first.len(), EVENTS_PAGE as usize);
    assert!((600..=641).contains(&first[0].seq), "{}", first[0].seq);
}

#[test]
fn files_of_others_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    file::replace(&path, b"this is not a database, it only lies where one should be").unwrap();
    assert!(matches!(Store::open(&path), Err(LedgerError::Foreign { .. })));

    let other = dir.path().join("other.db");
    Connection::open(&other).unwrap().execute_batch("CREATE TABLE t(a)").unwrap();
    assert!(matches!(Store::open(&other), Err(LedgerError::Foreign { .. })));

    let newer = dir.path().join("newer.db");
    drop(Store::open(&newer).unwrap());
    Connection::open(&newer).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(Store::open(&newer), Err(LedgerError::Newer { found: 99, .. })));
}

#[test]
fn a_damaged_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let mut store = Store::open(&path).unwrap();
    let many: Vec<Write> = (0..2000).map(event).collect();
    store.commit(&many).unwrap();
    drop(store);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 8192].fill(0xa5);
    file::replace(&path, &bytes).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, LedgerError::Damaged { .. } | LedgerError::Foreign { .. }), "{error:?}");
}

#[test]
fn a_ledger_of_the_first_version_becomes_one_of_this() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.db");
    let old = schema::make_version_1(&path);
    let mut expected = Vec::new();
    for (number, jail) in [(5, 0), (3, 1)] {
        let kept = VmRecord { jail, ..vm(number, &format!("vm{number}")) };
        // As version 1 wrote it: without jail and network.
        let mut json = serde_json::to_value(&kept).unwrap();
        let fields = json.as_object_mut().unwrap();
        assert!(fields.remove("jail").is_some() && fields.remove("network").is_some());
        let put = "INSERT INTO vms(id, name, state, revision, record) VALUES (?1, ?2, 'launching', 1, ?3)";
        old.execute(put, params![kept.id.as_str(), kept.name, json.to_string()]).unwrap();
        expected.push(kept);
    }
    let put = "INSERT INTO events(at, kind, vm, body) VALUES (1, 'vm_state', ?1, '{}')";
    old.execute(put, [expected[0].id.as_str()]).unwrap();
    drop(old);
    let mut store = Store::open(&path).unwrap();
    let loaded = store.begin().unwrap();
    assert_eq!((loaded.vms, loaded.last_event), (expected.clone(), 1));
    assert_eq!(store.events(0).unwrap()[0].subject, Subject::Vm(expected[0].id.clone()));
    let claim = Claim { vm: VmId::from_random([9; 10]), session: None, jail: None, now: Steady(0) };
    let (jail, _) = store.admit_vm(&claim, |grant| (grant.jail, Vec::new())).unwrap();
    assert_eq!(jail, 2);
    assert!(store.sessions().unwrap().is_empty());
    drop(store);
    assert_eq!(Store::open(&path).unwrap().begin().unwrap().vms, expected, "a second time it is left as it is");
}

#[test]
fn events_are_kept_by_number_and_by_age() {
    let mut store = Store::in_memory().unwrap();
    let hour = Duration::from_secs(3600);
    store.keep_events(100, hour).unwrap();
    let event = |at_s: u64| {
        let at = UnixNanos(at_s * 1_000_000_000);
        let (subject, body) = (Subject::Host, serde_json::json!({}));
        Write::Event(NewEvent { at, kind: "k", subject, operation: None, body })
    };
    for _ in 0..64 * 4 {
        store.commit(&[event(10_000)]).unwrap();
    }
    // Counted every 64 events.
    assert_eq!(store.history().unwrap(), (100, 157));
    store.commit(&[event(13_601)]).unwrap();
    store.sweep(Steady(0), UnixNanos(13_600 * 1_000_000_000)).unwrap();
    assert_eq!(store.history().unwrap(), (100, 158), "an hour is not over");
    store.sweep(Steady(0), UnixNanos(13_601 * 1_000_000_000)).unwrap();
    assert_eq!(store.history().unwrap(), (1, 257), "what is older than an hour is gone");
    assert_eq!(store.events(0).unwrap()[0].seq, 257, "numbers go on");
}

/// The time of what rests goes on whoever sets the wall clock, and begins anew with a boot.
#[test]
fn what_rests_is_not_moved_by_the_wall_clock() {
    const DAY: u64 = 24 * 3600;
    let seconds = |seconds: u64| seconds * 1_000_000_000;
    let up = |boot, of: u64| Uptime { boot, since_boot: Duration::from_secs(of) };
    let (wall, rest) = (1_780_000_000, Duration::from_secs(120));
    let mut store = Store::in_memory().unwrap();
    let mut steady = |up, wall| store.steady(up, UnixNanos(seconds(wall)), rest).unwrap();
    assert_eq!(steady(up(7, 50), wall), Steady(seconds(wall)));
    assert_eq!(steady(up(7, 60), wall + 10), Steady(seconds(wall + 10)));
    for moved in [wall + DAY, wall - DAY, 0] {
        assert_eq!(steady(up(7, 70), moved), Steady(seconds(wall + 20)));
    }
    // Back by a day over a boot: what rests is not to rest for a day.
    let (vm, uid) = (VmId::from_random([3; 10]), 70_000);
    store.commit(&[Write::Lease { uid, vm: vm.clone() }]).unwrap();
    let until = Steady(seconds(wall + 100));
    store.commit(&[Write::Release { vm, quarantine_until: until }]).unwrap();
    let now = store.steady(up(8, 5), UnixNanos(seconds(wall - DAY)), rest).unwrap();
    assert_eq!(now, Steady(seconds(wall - DAY)));
    assert_eq!(store.free_uid(uid, 1, now.after(rest - Duration::from_secs(1))).unwrap(), None);
    assert_eq!(store.free_uid(uid, 1, now.after(rest)).unwrap(), Some(uid));
}
