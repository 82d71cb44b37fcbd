//! Network namespaces. A namespace belongs to a thread, so work inside one is done on a thread that ends afterwards:
//! no worker thread ever changes its own.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

/// Runs `work` on a new thread in a new, empty network namespace. The namespace lasts as long as something in it does:
/// a process started by `work`, a socket or a tap opened there.
pub fn in_new<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("netns".to_owned());
        let thread = builder.spawn_scoped(scope, || -> io::Result<T> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Runs `work` on a new thread in the network namespace of a process, which has to live.
pub fn in_that_of<T: Send>(process: &OwnedFd, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let builder = thread::Builder::new().name("netns".to_owned());
        let thread = builder.spawn_scoped(scope, || -> io::Result<T> {
            setns(process, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_sees_an_empty_network_and_the_caller_keeps_its_own() {
        let own = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let before = own();
        let (inside, links) = in_new(|| {
            let links = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            (own(), links.lines().skip(2).count())
        })
        .expect("a new network namespace needs root");
        assert_ne!(before, inside);
        assert_eq!(before, own());
        assert_eq!(links, 1, "only lo");
    }
}
