//! A guest without a VM: a namespace whose `eth0` has a VM's addresses, and a thread that moves frames between it and
//! the VM's tap. What speaks there is this host's kernel, as a guest's would.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;

use hearth::net::member::{GATEWAY_V4, GATEWAY_V6};
use hearth::sys::{netns, tap};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::host::run;
use crate::tap_end::TapEnd;
use crate::world::{MTU, Vm, World};

/// A guest; gone when dropped.
pub(crate) struct Guest {
    pub(crate) vm: Vm,
    pub(crate) namespace: OwnedFd,
    over: std::sync::Arc<EventFd>,
    mover: Option<JoinHandle<()>>,
}

impl Guest {
    /// Starts one on a VM's tap, with the addresses the VM would set.
    pub(crate) fn start(world: &World, vm: Vm) -> Self {
        let outside = world.tap(&vm);
        let name = format!("guest{}-{}", vm.host, vm.jail);
        let namespace = netns::create_named(&name).unwrap();
        let inside = TapEnd(netns::in_fd(&namespace, || tap::open("eth0")).unwrap().unwrap());
        let mac = vm.member.mac.map(|byte| format!("{byte:02x}")).join(":");
        let ip = |words: &str| run(&format!("ip -n {name} {words}"));
        ip("link set lo up");
        ip(&format!("link set eth0 address {mac} mtu {MTU} up"));
        if vm.member.session.is_some() {
            let own = vm.inner();
            ip(&format!("address add {}/128 dev eth0 nodad", own.v6));
            ip(&format!("-6 route add default via {GATEWAY_V6} dev eth0 src {}", own.v6));
            if let Some(v4) = own.v4 {
                ip(&format!("address add {v4}/32 dev eth0"));
                ip(&format!("route add default via {GATEWAY_V4} dev eth0 onlink"));
            }
        }
        let over = std::sync::Arc::new(EventFd::new().unwrap());
        let until = std::sync::Arc::clone(&over);
        let mover = std::thread::spawn(move || move_frames(&outside.0, &inside.0, &until));
        let guest = Self { vm, namespace, over, mover: Some(mover) };
        let gateway = format!("ping -6 -c 1 -W 1 {GATEWAY_V6}%eth0");
        let answered = || guest.within(|| succeeds(&gateway));
        assert!((0..50).any(|_| answered()), "the jail does not answer");
        guest
    }

    /// Runs something as the guest.
    pub(crate) fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::in_fd(&self.namespace, work).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.over.write(1).unwrap();
        let mover = self.mover.take().map(JoinHandle::join);
        let _ = netns::delete_named(&format!("guest{}-{}", self.vm.host, self.vm.jail));
        assert!(mover.is_none_or(|ended| ended.is_ok()) || std::thread::panicking());
    }
}

/// Whether a program says that all is well.
pub(crate) fn succeeds(words: &str) -> bool {
    let mut words = words.split(' ');
    let mut program = std::process::Command::new(words.next().unwrap());
    program.args(words).output().unwrap().status.success()
}

fn move_frames(one: &File, other: &File, until: &EventFd) {
    let mut buffer = vec![0; 65_536 + 64];
    let mut moved = |mut from: &File, mut to: &File| {
        loop {
            match from.read(&mut buffer) {
                // Down, or its queue not started: as if it was lost.
                Ok(length) => drop(to.write(&buffer[..length])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    };
    loop {
        let wait = |file| PollFd::new(file, PollFlags::POLLIN);
        let mut fds = [wait(one.as_fd()), wait(other.as_fd()), wait(until.as_fd())];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        if fds[2].any() == Some(true) {
            return;
        }
        moved(one, other);
        moved(other, one);
    }
}
