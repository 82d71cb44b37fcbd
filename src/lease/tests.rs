//! What leases allow, and what a log makes of them.

use proptest::prelude::*;

use super::*;

fn id(number: u8) -> LeaseId {
    LeaseId::from_random([number; 10])
}

fn wanted(number: u8, mode: LeaseMode) -> Acquire {
    Acquire {
        id: id(number),
        mode,
        holder: format!("holder-{number}"),
        vm: None,
        host: None,
        ttl_s: None,
        secret: LeaseSecret::from_random([number; 16]),
        break_others: false,
    }
}

#[derive(Default)]
struct Log {
    leases: Leases,
    entries: Vec<LeaseEntry>,
}

impl Log {
    fn write(&mut self, events: Vec<LeaseEvent>, now_ms: u64) {
        for event in events {
            let entry = LeaseEntry { at_ms: now_ms, event };
            self.entries.push(entry.clone());
            self.leases.apply(entry, now_ms);
        }
    }

    fn acquire(&mut self, acquire: &Acquire) -> Result<Lease, LeaseRefusal> {
        let step = self.leases.acquire(acquire)?;
        self.write(step.events, 0);
        Ok(step.lease)
    }

    fn convert(&mut self, from: u8, to: u8, epoch: Epoch) -> Result<Lease, LeaseRefusal> {
        let step = self.leases.convert(&id(from), &id(to), epoch)?;
        self.write(step.events, 0);
        Ok(step.lease)
    }
}

#[test]
fn a_conversion_changes_both_at_once_and_answers_the_same_when_asked_again() {
    let mut log = Log::default();
    let source = log.acquire(&wanted(1, LeaseMode::Active)).expect("active");
    assert_eq!(source.epoch, 1);
    let target = log.acquire(&wanted(2, LeaseMode::Standby)).expect("standby");
    assert_eq!((target.epoch, target.ttl_s), (2, Some(STANDBY_TTL_S)));
    assert!(log.leases.may_write(&id(1), 1) && !log.leases.may_write(&id(2), 2));

    let converted = log.convert(1, 2, 1).expect("convert");
    assert_eq!((converted.mode, converted.epoch, converted.ttl_s), (LeaseMode::Active, 2, None));
    assert!(!log.leases.may_write(&id(1), 1) && log.leases.may_write(&id(2), 2));
    let before = log.entries.len();
    assert_eq!(log.convert(1, 2, 1), Ok(converted.clone()));
    log.write(log.leases.release(&id(2), None).expect("release"), 0);
    assert_eq!(log.convert(1, 2, 1), Ok(converted), "what was decided stays decided");
    assert_eq!(log.entries.len(), before + 1, "an answer that is known is not written again");
    assert_eq!(log.leases.find(&id(2)), None);
}

#[test]
fn a_conversion_wants_the_very_leases_and_the_epoch() {
    let mut log = Log::default();
    log.acquire(&wanted(1, LeaseMode::Active)).expect("active");
    assert_eq!(log.convert(1, 2, 1), Err(LeaseRefusal::Unknown { id: id(2) }));
    log.acquire(&wanted(2, LeaseMode::Standby)).expect("standby");
    assert_eq!(log.convert(1, 2, 2), Err(LeaseRefusal::OtherEpoch { id: id(1), epoch: 1, asked: 2 }));
    let refused = LeaseRefusal::OtherMode { id: id(2), mode: LeaseMode::Standby, wanted: LeaseMode::Active };
    assert_eq!(log.convert(2, 1, 1), Err(refused));
    log.write(log.leases.release(&id(2), None).expect("release"), 0);
    assert_eq!(log.convert(1, 2, 1), Err(LeaseRefusal::Unknown { id: id(2) }));
    assert!(log.leases.may_write(&id(1), 1), "the source goes on");
}

#[test]
fn one_writes_or_many_read() {
    let mut log = Log::default();
    log.acquire(&wanted(1, LeaseMode::Shared)).expect("a reader");
    log.acquire(&wanted(2, LeaseMode::Shared)).expect("another");
    assert!(log.leases.may_read(&id(1), 0) && !log.leases.may_write(&id(1), 0));
    assert_eq!(log.acquire(&wanted(3, LeaseMode::Active)), Err(LeaseRefusal::Read { readers: 2 }));
    assert_eq!(log.acquire(&wanted(3, LeaseMode::Standby)), Err(LeaseRefusal::NothingActive));
    log.acquire(&Acquire { break_others: true, ..wanted(3, LeaseMode::Active) }).expect("by force");
    assert!(!log.leases.may_read(&id(1), 0) && log.leases.may_write(&id(3), 1));
    assert!(matches!(log.acquire(&wanted(4, LeaseMode::Shared)), Err(LeaseRefusal::Held { .. })));
    assert!(matches!(log.acquire(&wanted(5, LeaseMode::Active)), Err(LeaseRefusal::Held { epoch: 1, .. })));
    assert_eq!(log.acquire(&wanted(1, LeaseMode::Shared)), Err(LeaseRefusal::Used { id: id(1) }));
}

#[test]
fn a_standby_expires_whoever_is_connected_and_an_active_lease_only_with_nobody() {
    let mut log = Log::default();
    log.acquire(&Acquire { ttl_s: Some(5), ..wanted(1, LeaseMode::Active) }).expect("active");
    log.acquire(&wanted(2, LeaseMode::Standby)).expect("standby");
    assert_eq!(log.leases.expired(4_999, |_| false), []);
    assert_eq!(log.leases.expired(5_000, |lease| *lease == id(1)), []);
    log.leases.saw(&id(1), 5_000);
    assert_eq!(log.leases.expired(9_999, |_| false), []);
    let standby = LeaseEvent::Ended { id: id(2), why: LeaseEnd::Expired };
    assert_eq!(log.leases.expired(60_000, |_| true), std::slice::from_ref(&standby));
    let active = LeaseEvent::Ended { id: id(1), why: LeaseEnd::Expired };
    assert_eq!(log.leases.expired(60_000, |_| false), [active, standby]);
}

#[test]
fn a_lease_that_became_active_is_not_given_back_as_a_standby() {
    let mut log = Log::default();
    log.acquire(&wanted(1, LeaseMode::Active)).expect("active");
    log.acquire(&wanted(2, LeaseMode::Standby)).expect("standby");
    log.convert(1, 2, 1).expect("convert");
    let refused = LeaseRefusal::OtherMode { id: id(2), mode: LeaseMode::Active, wanted: LeaseMode::Standby };
    assert_eq!(log.leases.release(&id(2), Some(LeaseMode::Standby)), Err(refused));
    assert_eq!(log.leases.release(&id(1), Some(LeaseMode::Standby)), Ok(Vec::new()), "it ended");
}

#[test]
fn words_nobody_can_use_are_refused() {
    let log = Log::default();
    for holder in ["", "a\nb", &"x".repeat(HOLDER_BYTES_MAX + 1)] {
        let acquire = Acquire { holder: holder.to_owned(), ..wanted(1, LeaseMode::Active) };
        assert_eq!(log.leases.acquire(&acquire), Err(LeaseRefusal::Words));
    }
    for ttl_s in [0, 86_401] {
        let acquire = Acquire { ttl_s: Some(ttl_s), ..wanted(1, LeaseMode::Active) };
        assert_eq!(log.leases.acquire(&acquire), Err(LeaseRefusal::Words));
    }
    let longest = Acquire { holder: "x".repeat(HOLDER_BYTES_MAX), ttl_s: Some(86_400), ..wanted(1, LeaseMode::Active) };
    assert!(log.leases.acquire(&longest).is_ok());
}

#[derive(Debug, Clone)]
enum Ask {
    Acquire { id: u8, mode: LeaseMode, break_others: bool },
    Convert { from: u8, to: u8, epoch: Epoch },
    Release { id: u8 },
    Expire { after_ms: u64 },
}

fn ask() -> impl Strategy<Value = Ask> {
    let mode = prop_oneof![Just(LeaseMode::Active), Just(LeaseMode::Standby), Just(LeaseMode::Shared)];
    prop_oneof![
        4 => (0..8_u8, mode, prop::bool::weighted(0.1)).prop_map(|(id, mode, break_others)| Ask::Acquire { id, mode, break_others }),
        3 => (0..8_u8, 0..8_u8, 0..6_u64).prop_map(|(from, to, epoch)| Ask::Convert { from, to, epoch }),
        1 => (0..8_u8).prop_map(|id| Ask::Release { id }),
        1 => (0..100_000_u64).prop_map(|after_ms| Ask::Expire { after_ms }),
    ]
}

proptest! {
    /// Whatever is asked: at most one writes, nobody reads beside, no epoch has two writers, and who reads the log later
    /// has the same leases.
    #[test]
    fn one_writer_an_epoch(asks in prop::collection::vec(ask(), 0..60)) {
        let mut log = Log::default();
        let mut writers: BTreeMap<Epoch, LeaseId> = BTreeMap::new();
        let mut now_ms = 0;
        for ask in asks {
            let events = match ask {
                Ask::Acquire { id, mode, break_others } => {
                    log.leases.acquire(&Acquire { break_others, ..wanted(id, mode) }).map(|step| step.events)
                }
                Ask::Convert { from, to, epoch } => log.leases.convert(&id(from), &id(to), epoch).map(|step| step.events),
                Ask::Release { id: number } => log.leases.release(&id(number), None),
                Ask::Expire { after_ms } => {
                    now_ms += after_ms;
                    Ok(log.leases.expired(now_ms, |_| false))
                }
            };
            let epoch = log.leases.epoch();
            log.write(events.unwrap_or_default(), now_ms);
            prop_assert!(log.leases.epoch() >= epoch);
            if let Some(active) = log.leases.active() {
                prop_assert_eq!(active.epoch, log.leases.epoch());
                prop_assert!(log.leases.shared.is_empty());
                prop_assert_eq!(writers.entry(active.epoch).or_insert_with(|| active.id.clone()), &active.id);
            }
            if let Some(standby) = log.leases.standby() {
                prop_assert_eq!(Some(standby.epoch), log.leases.active().map(|active| active.epoch + 1));
            }
        }
        let again = Leases::from_log(log.entries.clone(), now_ms);
        prop_assert_eq!(Leases { seen_ms: BTreeMap::new(), ..again }, Leases { seen_ms: BTreeMap::new(), ..log.leases });
    }
}
