//! Feeds the dirty sets of all consumers from KVM's log and the VMM's own bitmaps.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::{DirtySet, PageRun};
use crate::sys::kvm::{CallError, PAGES_PER_WORD, Vm};
use crate::units::{PAGE_BYTES, PageCount, PageIndex};

/// What a new consumer begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeginWith {
    /// Every page: the consumer has nothing yet (migration).
    AllPages,
    /// No page: the consumer has everything as it is now (diff). Only exact while the guest is paused.
    NoPages,
}

#[derive(Debug)]
struct Region {
    slot: usize,
    first: PageIndex,
    pages: PageCount,
}

#[derive(Debug)]
struct Consumers {
    vm: Arc<Vm>,
    regions: Vec<Region>,
    // By key; keys are never used twice.
    sets: Vec<(u64, DirtySet)>,
    next_key: u64,
    // Reused by every harvest.
    log: Vec<u64>,
}

/// Feeds the sets of all consumers. Cloning shares it; one lock inside, held for a harvest or one change of a set.
#[derive(Debug, Clone)]
pub struct Harvester {
    consumers: Arc<Mutex<Consumers>>,
}

impl Harvester {
    /// A harvester for `vm`, without consumers.
    pub(in crate::machine) fn new(vm: Arc<Vm>) -> Self {
        let regions = vm.ram().iter().enumerate().map(|(slot, region)| Region {
            slot,
            first: PageIndex(region.start_addr().raw_value() / PAGE_BYTES),
            pages: PageCount(region.len().div_ceil(PAGE_BYTES)),
        });
        let regions = regions.collect();
        let consumers = Consumers { vm, regions, sets: Vec::new(), next_key: 0, log: Vec::new() };
        Self { consumers: Arc::new(Mutex::new(consumers)) }
    }

    /// A new consumer. The first one switches KVM's log on.
    pub fn subscribe(&self, begin: BeginWith) -> Result<DirtyConsumer, CallError> {
        let mut consumers = lock(&self.consumers);
        if consumers.sets.is_empty() {
            consumers.vm.set_dirty_logging(true)?;
        }
        // What was written before belongs to the consumers of before.
        if let Err(error) = consumers.harvest(Protect::Now) {
            consumers.switch_off_if_unused();
            return Err(error);
        }
        let mut set = DirtySet::new();
        if begin == BeginWith::AllPages {
            for region in &consumers.regions {
                set.insert(PageRun { first: region.first, count: region.pages });
            }
        }
        Ok(self.consumer(&mut consumers, set))
    }

    /// A new consumer of a guest that runs: it begins with the pages that `touched` finds, which have to be all that the guest
    /// or the VMM may have written.
    ///
    /// KVM's log begins with every page in it (KVM API 7.18, `KVM_DIRTY_LOG_INITIALLY_SET`). The other pages are taken out of
    /// it here, which takes no right from any vCPU: none has them mapped to be written. These are re-protected as they are
    /// taken, so the guest does not wait until all of its memory is.
    pub fn subscribe_touched<E: From<CallError>>(
        &self,
        touched: impl Fn() -> Result<Vec<PageRun>, E>,
    ) -> Result<DirtyConsumer, E> {
        let mut consumers = lock(&self.consumers);
        if !(consumers.sets.is_empty() && consumers.vm.capabilities().manual_dirty_log) {
            drop(consumers);
            let consumer = self.subscribe(BeginWith::NoPages)?;
            // After the log is on: what is touched from here on is in it.
            consumer.put_back(&touched()?);
            return Ok(consumer);
        }
        consumers.vm.set_dirty_logging(true)?;
        match consumers.begin_with(touched) {
            Ok(set) => Ok(self.consumer(&mut consumers, set)),
            Err(error) => {
                consumers.switch_off_if_unused();
                Err(error)
            }
        }
    }

    fn consumer(&self, consumers: &mut Consumers, set: DirtySet) -> DirtyConsumer {
        let key = consumers.next_key;
        consumers.next_key += 1;
        consumers.sets.push((key, set));
        DirtyConsumer { consumers: Arc::clone(&self.consumers), key }
    }

    /// Number of consumers.
    pub fn consumers(&self) -> usize {
        lock(&self.consumers).sets.len()
    }
}

fn lock(consumers: &Mutex<Consumers>) -> MutexGuard<'_, Consumers> {
    consumers.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Consumers {
    /// Adds what both logs hold to every set. With manual re-protection KVM's log keeps its pages until somebody takes
    /// them, or until all are re-protected here.
    fn harvest(&mut self, protect: Protect) -> Result<(), CallError> {
        let Self { vm, regions, sets, log, .. } = self;
        let all = vm.capabilities().manual_dirty_log && protect == Protect::Now;
        for (region, mapped) in regions.iter().zip(vm.ram().iter()) {
            vm.dirty_log(region.slot, log)?;
            mask_tail(log, region.pages);
            // Into the sets first: whatever fails after this, no page is lost.
            sets.iter_mut().for_each(|(_, set)| set.insert_words(region.first, log));
            let own = mapped.get_mmap().bitmap().get_and_reset();
            sets.iter_mut().for_each(|(_, set)| set.insert_words(region.first, &own));
            if all {
                clear_used(vm, region.slot, log)?;
            }
        }
        Ok(())
    }

    /// The set of the first consumer, of a log that was just switched on.
    fn begin_with<E: From<CallError>>(&mut self, touched: impl Fn() -> Result<Vec<PageRun>, E>) -> Result<DirtySet, E> {
        let before = touched()?;
        // What the VMM itself has written until here is touched as well.
        self.vm.ram().iter().for_each(|mapped| drop(mapped.get_mmap().bitmap().get_and_reset()));
        self.protect_others(&before)?;
        // What was touched meanwhile is in the log no more.
        let mut set = DirtySet::new();
        before.into_iter().chain(touched()?).for_each(|run| set.insert(run));
        Ok(set)
    }

    /// Takes a batch out of a set and re-protects its pages: what is written to them from here on is in the next
    /// harvest, and what was written since the last one need not be, as they are yet to be read.
    fn take_batch(&mut self, key: u64, limit: PageCount) -> Result<Vec<PageRun>, CallError> {
        let batch = self.set(key).take_batch(limit);
        if !self.vm.capabilities().manual_dirty_log {
            return Ok(batch);
        }
        if self.sets.len() > 1 {
            // The log forgets a page for everyone: the others get theirs first.
            self.harvest(Protect::Now)?;
            let set = self.set(key);
            batch.iter().for_each(|run| set.remove(*run));
            return Ok(batch);
        }
        if let Err(error) = self.protect(&batch) {
            self.set(key).put_back(&batch);
            return Err(error);
        }
        Ok(batch)
    }

    fn protect(&mut self, batch: &[PageRun]) -> Result<(), CallError> {
        let Self { vm, regions, log, .. } = self;
        for region in regions {
            mark(region, batch, vm.log_words(region.slot).unwrap_or(0), log);
            clear_used(vm, region.slot, log)?;
        }
        Ok(())
    }

    /// Re-protects every page but these.
    fn protect_others(&mut self, pages: &[PageRun]) -> Result<(), CallError> {
        let Self { vm, regions, log, .. } = self;
        for region in regions {
            mark(region, pages, vm.log_words(region.slot).unwrap_or(0), log);
            log.iter_mut().for_each(|word| *word = !*word);
            mask_tail(log, region.pages);
            clear_used(vm, region.slot, log)?;
        }
        Ok(())
    }

    fn switch_off_if_unused(&mut self) {
        if self.sets.is_empty() {
            // Logging that stays on costs the guest faults, nothing else; the next consumer asks again.
            let _ = self.vm.set_dirty_logging(false);
        }
    }

    fn set(&mut self, key: u64) -> &mut DirtySet {
        let found = self.sets.iter_mut().find(|(other, _)| *other == key);
        &mut found.expect("a consumer's set lives as long as the consumer").1
    }
}

/// Sets the bits of the pages that lie in a region, in a log of so many words.
fn mark(region: &Region, pages: &[PageRun], words: usize, log: &mut Vec<u64>) {
    let end = region.first.0 + region.pages.0;
    log.clear();
    log.resize(words, 0);
    for run in pages.iter().filter(|run| (region.first.0..end).contains(&run.first.0)) {
        let last = (run.first.0 + run.count.0).min(end);
        for page in run.first.0 - region.first.0..last - region.first.0 {
            if let Some(word) = usize::try_from(page / PAGES_PER_WORD).ok().and_then(|at| log.get_mut(at)) {
                *word |= 1 << (page % PAGES_PER_WORD);
            }
        }
    }
}

/// Clears bits after the region's last page: KVM begins with whole words set.
fn mask_tail(log: &mut [u64], pages: PageCount) {
    let over = pages.0 % PAGES_PER_WORD;
    if let (Some(last), true) = (log.last_mut(), over != 0) {
        *last &= (1 << over) - 1;
    }
}

/// When pages of KVM's log are re-protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protect {
    /// At once: the sets are exact from here on.
    Now,
    /// Each as it is taken, so that what is written to it until then does not count as written after it.
    WhenTaken,
}

/// Re-protects the logged pages, from the first word that has one to the last.
fn clear_used(vm: &Vm, slot: usize, log: &[u64]) -> Result<(), CallError> {
    let Some(first) = log.iter().position(|word| *word != 0) else { return Ok(()) };
    let last = log.iter().rposition(|word| *word != 0).unwrap_or(first);
    vm.clear_dirty_log(slot, first, &log[first..=last])
}

/// One consumer's set. Dropping it forgets the set; the last one switches KVM's log off.
#[derive(Debug)]
pub struct DirtyConsumer {
    consumers: Arc<Mutex<Consumers>>,
    key: u64,
}

impl DirtyConsumer {
    /// Brings this and every other consumer's set up to date and returns how many pages this one holds.
    pub fn harvest(&self) -> Result<PageCount, CallError> {
        let mut consumers = lock(&self.consumers);
        consumers.harvest(Protect::WhenTaken)?;
        Ok(consumers.set(self.key).len())
    }

    /// Takes up to `limit` pages out of the set, to be read after this.
    pub fn take_batch(&self, limit: PageCount) -> Result<Vec<PageRun>, CallError> {
        lock(&self.consumers).take_batch(self.key, limit)
    }

    /// Puts pages of a batch back.
    pub fn put_back(&self, batch: &[PageRun]) {
        lock(&self.consumers).set(self.key).put_back(batch);
    }

    /// A copy of the set.
    pub fn snapshot(&self) -> DirtySet {
        lock(&self.consumers).set(self.key).clone()
    }
}

impl Drop for DirtyConsumer {
    fn drop(&mut self) {
        let mut consumers = lock(&self.consumers);
        consumers.sets.retain(|(key, _)| *key != self.key);
        consumers.switch_off_if_unused();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_other_regions_are_not_marked() {
        let region = Region { slot: 1, first: PageIndex(100), pages: PageCount(70) };
        let run = |first, count| PageRun { first: PageIndex(first), count: PageCount(count) };
        let mut log = vec![7; 9];
        mark(&region, &[run(0, 100), run(100, 2), run(165, 9), run(170, 4)], 2, &mut log);
        assert_eq!(log, [0b11, 0b11_1110]);
    }

    #[test]
    fn bits_after_the_last_page_are_not_pages() {
        let mut log = [u64::MAX; 2];
        mask_tail(&mut log, PageCount(65));
        assert_eq!(log, [u64::MAX, 1]);
        mask_tail(&mut log, PageCount(128));
        assert_eq!(log, [u64::MAX, 1]);
    }
}
