//! The agent inside a guest: PID 1 of a Hearth microVM, or a service of a larger system.
//!
//! It mounts what programs expect, reaps what ends, and serves `hearth_guest_wire` on a vsock port: run programs, take
//! an identity, bring disks to rest, say how the guest fares, end it. One thread, one epoll loop; nothing in it sleeps
//! or waits for a disk.
//!
//! Costs that shaped it, on a host whose KVM emulates the guest's kernel: a system call 300 us, a page fault 1.6 ms,
//! a copied page table tens of ms. So: no C library, few pages, few calls, programs started on borrowed memory
//! (`sys::process`), readiness remembered instead of asked for again (`link`, edge-triggered).
//!
//! Absent: threads, floating point, any file of its own but what says who the guest is, any decision about who may connect (vsock is
//! reachable from the host only).
#![no_std]
#![no_main]

extern crate alloc;

mod console;
mod directory;
mod disk;
mod ending;
mod hooks;
mod identity;
mod link;
mod links;
mod mounts;
mod net;
mod outgoing;
mod program;
mod registrar;
mod role;
mod root;
mod secrets;
mod server;
mod stats;
mod sys;

use core::fmt::Write as _;

use role::Role;
use server::Server;
use sys::{Console, Started};

/// Every step of this program's life. PID 1 never comes back from the last.
fn run(started: &Started) -> ! {
    let started_ns = sys::monotonic_ns();
    if !sys::is_first_process()
        && let Some(code) = disk::run(&started.arguments)
    {
        sys::exit(code);
    }
    let (role, address) = match role::choose(&started.arguments) {
        Ok(chosen) => chosen,
        Err(why) => {
            let _ = writeln!(Console, "hearth-init: {why}");
            sys::exit(2);
        }
    };
    if role == Role::FirstProcess {
        mounts::before_listening();
    } else {
        role::become_service();
    }
    if role.owns_guest() {
        // With many programs running the host still gets its answers in time. Without the right to it nothing breaks.
        let _ = sys::go_first();
    }
    // The listener comes before the mounts: the host's connection is taken by the kernel from here on.
    let served = Server::new(role, &address, &started.environment, started_ns).and_then(|mut server| {
        if role == Role::FirstProcess {
            mounts::before_programs();
        }
        let took_us = sys::monotonic_ns().saturating_sub(started_ns) / 1000;
        let _ = writeln!(Console, "hearth-init: ready in {took_us} us");
        server.serve()
    });
    match served {
        Ok(()) => sys::exit(0),
        Err(error) => {
            let _ = writeln!(Console, "hearth-init: serve on {address}: errno {}", error.number());
            // PID 1 that ends is a kernel panic, which the host sees; a silent guest it would wait for.
            sys::exit(1)
        }
    }
}
