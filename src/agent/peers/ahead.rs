//! Ways to other agents that are open before they are needed: while a machine stands still, nobody waits for a handshake.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::link::{Callee, LINE_LIFE, PeerLine};
use crate::agent::config::Peer;
use crate::agent::shared::Shared;
use crate::agent::world::World;
use crate::clock::{Clock, Monotonic};

/// Most lines that are held ready: a host takes few connections of another one.
const LINES_MAX: usize = 3;

/// How long one is held until another takes its place.
const RENEWED_AFTER: Duration = Duration::from_secs(2);

/// Longest wait for one to open.
const OPEN_LIMIT: Duration = Duration::from_secs(3);

/// A line to a peer that nothing was said on yet.
pub(in crate::agent) struct LineAhead {
    line: Box<dyn PeerLine>,
    opened: Monotonic,
}

impl fmt::Debug for LineAhead {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("LineAhead").field("opened", &self.opened).finish_non_exhaustive()
    }
}

impl LineAhead {
    /// The line, if it is certainly still open.
    pub(super) fn if_open(self, now: Monotonic) -> Option<Box<dyn PeerLine>> {
        (now.since(self.opened) < LINE_LIFE).then_some(self.line)
    }
}

/// Where the line is that is held ready.
#[derive(Debug, Default)]
pub(in crate::agent) struct Place(Mutex<Option<LineAhead>>);

impl Place {
    fn held(&self) -> MutexGuard<'_, Option<LineAhead>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is held, if something is.
    pub(in crate::agent) fn take(&self) -> Option<LineAhead> {
        self.held().take()
    }
}

impl<W: World> Shared<W> {
    /// Holds a line to a peer ready for as long as this is polled. There is none while the peer is not reached, or others
    /// are held for enough: then a call takes longer.
    pub(in crate::agent) async fn hold_line(&self, peer: &Peer, place: &Place) -> Infallible {
        let mut counted = None;
        loop {
            // As many owners as lines, and this host.
            counted = counted
                .or_else(|| (Arc::strong_count(&self.peers.lines) <= LINES_MAX).then(|| Arc::clone(&self.peers.lines)));
            if let (Some(_), Some(started)) = (&counted, self.peers.started.get()) {
                let (name, number) = (peer.name.clone(), Some(peer.host.into()));
                let callee = Callee { name, at: peer.socket(), number, limit: OPEN_LIMIT };
                let link = Arc::clone(&started.setup.link);
                if let Ok(Ok(line)) = timeout(OPEN_LIMIT, link.open(callee)).await {
                    let opened = self.world.clock().monotonic();
                    *place.held() = Some(LineAhead { line, opened });
                }
            }
            sleep(RENEWED_AFTER).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::BoxFuture;

    use super::*;
    use crate::agent::peers::{LinkError, PeerAnswer, PeerCall};

    struct Nowhere;

    impl PeerLine for Nowhere {
        fn call(self: Box<Self>, _: PeerCall) -> BoxFuture<'static, Result<PeerAnswer, LinkError>> {
            Box::pin(std::future::pending())
        }
    }

    #[test]
    fn a_line_is_taken_once_and_not_when_it_may_be_closed() {
        let opened = Monotonic(7);
        let line = || LineAhead { line: Box::new(Nowhere), opened };
        let place = Place(Mutex::new(Some(line())));
        assert!(place.take().is_some() && place.take().is_none());
        assert!(line().if_open(opened.after(LINE_LIFE - Duration::from_millis(1))).is_some());
        assert!(line().if_open(opened.after(LINE_LIFE)).is_none());
    }
}
