//! The gate of a volume: requests go through it side by side, and whoever changes what they may do goes through it alone.
//!
//! It is a lock for readers and writers, but for two things: the value is looked at when a request begins, not while it
//! is carried out, and who wants to be alone waits no longer than a bound, since a disk may hang under a request.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A value that says what requests may do.
#[derive(Debug)]
pub(super) struct Gate<T> {
    inner: Mutex<Passage<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Passage<T> {
    /// Requests that are being carried out.
    inside: usize,
    /// Somebody is alone, or waits to be.
    closed: bool,
    value: T,
}

/// A request is being carried out for as long as this is there.
#[derive(Debug)]
pub(super) struct Pass<'a, T>(&'a Gate<T>);

/// No request is being carried out for as long as this is there, and none begins.
#[derive(Debug)]
pub(super) struct Alone<'a, T> {
    gate: &'a Gate<T>,
    inner: Option<MutexGuard<'a, Passage<T>>>,
}

/// Requests were still being carried out when the time was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{inside} requests are still being carried out after {} s", waited.as_secs())]
pub(super) struct Busy {
    /// How many.
    pub(super) inside: usize,
    /// How long they were waited for.
    pub(super) waited: Duration,
}

impl<T> Gate<T> {
    pub(super) const fn new(value: T) -> Self {
        Self { inner: Mutex::new(Passage { inside: 0, closed: false, value }), changed: Condvar::new() }
    }

    fn inner(&self) -> MutexGuard<'_, Passage<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Passage<T>>) -> MutexGuard<'a, Passage<T>> {
        self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a request begin, if the value has nothing against it. Waits while somebody is alone.
    pub(super) fn enter<E>(&self, check: impl FnOnce(&T) -> Result<(), E>) -> Result<Pass<'_, T>, E> {
        let mut inner = self.inner();
        while inner.closed {
            inner = self.wait(inner);
        }
        check(&inner.value)?;
        inner.inside += 1;
        Ok(Pass(self))
    }

    /// Looks at the value as it is; requests go on.
    pub(super) fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.inner().value)
    }

    /// Changes what no request asks about; requests go on.
    pub(super) fn note<R>(&self, note: impl FnOnce(&mut T) -> R) -> R {
        note(&mut self.inner().value)
    }

    /// Waits until no request is being carried out, for `limit` at most; none begins meanwhile.
    pub(super) fn alone(&self, limit: Duration) -> Result<Alone<'_, T>, Busy> {
        let mut inner = self.inner();
        while inner.closed {
            inner = self.wait(inner);
        }
        inner.closed = true;
        let waited = self.changed.wait_timeout_while(inner, limit, |inner| inner.inside > 0);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if inner.inside > 0 {
            let inside = inner.inside;
            inner.closed = false;
            self.changed.notify_all();
            return Err(Busy { inside, waited: limit });
        }
        Ok(Alone { gate: self, inner: Some(inner) })
    }
}

impl<T> Drop for Pass<'_, T> {
    fn drop(&mut self) {
        let mut inner = self.0.inner();
        inner.inside -= 1;
        if inner.inside == 0 && inner.closed {
            self.0.changed.notify_all();
        }
    }
}

impl<T> Alone<'_, T> {
    /// Looks at the value and changes it.
    pub(super) fn with<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> R {
        match &mut self.inner {
            Some(inner) => change(&mut inner.value),
            // It is there until the drop.
            None => change(&mut self.gate.inner().value),
        }
    }
}

impl<T> Drop for Alone<'_, T> {
    fn drop(&mut self) {
        if let Some(mut inner) = self.inner.take() {
            inner.closed = false;
        }
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn who_is_alone_waits_for_requests_and_keeps_others_out() {
        let gate = Arc::new(Gate::new(1));
        let pass = gate.enter(|_| Ok::<_, ()>(())).unwrap();
        let second = gate.enter(|_| Ok::<_, ()>(())).unwrap();
        drop(second);
        let (told, is_told) = channel();
        let other = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                let mut alone = gate.alone(LONG).unwrap();
                told.send("alone").unwrap();
                alone.with(|value| *value = 2);
            }
        });
        // It cannot be alone yet, however long one waits.
        while !gate.inner().closed {
            std::thread::yield_now();
        }
        assert!(is_told.try_recv().is_err());
        drop(pass);
        // A request that comes now sees the new value.
        let seen = gate.enter(|value| if *value == 2 { Ok(()) } else { Err(*value) });
        assert!(seen.is_ok());
        other.join().unwrap();
        assert_eq!(is_told.recv().unwrap(), "alone");
    }

    #[test]
    fn a_request_that_does_not_end_is_waited_for_within_a_bound() {
        let gate = Gate::new(());
        let pass = gate.enter(|()| Ok::<_, ()>(())).unwrap();
        let waited = Duration::from_millis(10);
        assert_eq!(gate.alone(waited).unwrap_err(), Busy { inside: 1, waited });
        // Requests go on afterwards.
        drop(gate.enter(|()| Ok::<_, ()>(())).unwrap());
        drop(pass);
        assert!(gate.alone(waited).is_ok());
        assert_eq!(gate.enter(|()| Err::<(), _>("no")).unwrap_err(), "no");
        assert!(gate.alone(waited).is_ok(), "who was refused is not inside");
    }
}
