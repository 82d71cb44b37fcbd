//! The operating system: the only floor of this program with unsafe code, one file per subject, no policy.
//!
//! There is no C library below it. Every wrapper takes and gives Rust types, and its safety rests on nothing but its
//! own arguments. What the kernel reports comes back as [`Errno`].

mod event;
mod file;
mod heap;
mod interface;
mod process;
mod raw;
mod socket;
mod start;
mod system;

pub(crate) use event::{Epoll, Event, Happened, Interest, Signals, Timer};
pub(crate) use file::{
    Console, Fd, console_input, console_output, enter_root, exists, hold_standard_streams, make_directory, make_link,
    may_execute, mount, mount_disk, move_mount, open_directory_in, open_read, open_terminal, pipe, remove_directory_in,
    remove_in, replace_file, resize_terminal, unmount_now, write_file, write_setting,
};
pub(crate) use interface::{InterfaceFacts, Interfaces, loopback_up};
pub(crate) use process::{
    Errand, Launch, LaunchError, MountDisk, Running, adopt_orphans, exit, go_first, is_first_process, kill_group,
    queue_group, reap, send_signal, send_signal_to_all, send_signal_to_group, spawn, start_errand, user_process,
};
pub(crate) use raw::Errno;
pub(crate) use socket::{Netlink, accept, connect_tcp, end_sending, listen_unix, listen_vsock, receive, send};
pub(crate) use start::Started;
pub(crate) use system::{
    Ending, add_entropy, end_guest, monotonic_ns, set_hostname, set_wall_ns, totals, uptime_ns, wall_ns,
};
