//! Descriptors and the sockets that carry them: passing over a unix socket (SCM_RIGHTS, unix(7)), peer credentials,
//! and unix sockets named relative to a directory, since a socket's path has room for 107 bytes only.
#![expect(
    unsafe_code,
    reason = "descriptors received by SCM_RIGHTS or inherited at start are bare numbers until owned"
)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Most descriptors received beside one read.
pub const RECEIVE_DESCRIPTORS_MAX: usize = 32;

/// Writes all of `bytes`, the descriptors beside the first of them. Blocks as the socket does.
pub fn send_with_fds(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let mut control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let mut rest = bytes;
    while !rest.is_empty() {
        let slices = [IoSlice::new(rest)];
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => {
                rest = &rest[sent..];
                control = &[];
            }
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads once into `bytes` and appends the descriptors that came with them; all are close-on-exec. 0 bytes is the
/// end. Descriptors over [`RECEIVE_DESCRIPTORS_MAX`] are dropped by the kernel and reported as an error.
pub fn receive_with_fds(socket: &UnixStream, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = nix::cmsg_space!([RawFd; RECEIVE_DESCRIPTORS_MAX]);
    let mut slices = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(nix::Error::EINTR) => {}
            other => break other?,
        }
    };
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel made these descriptors for this process in this very recvmsg, so each is open and
            // owned by nobody else.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors were sent than are taken"));
    }
    Ok(message.bytes)
}

/// User, group and process of a connected unix socket's other end (SO_PEERCRED).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id, as seen from here.
    pub pid: i32,
}

/// Who is at the other end.
pub fn peer(socket: &UnixStream) -> io::Result<Peer> {
    let found = nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials)?;
    Ok(Peer { uid: found.uid(), gid: found.gid(), pid: found.pid() })
}

fn in_dir(dir: &File, name: &str) -> String {
    format!("/proc/self/fd/{}/{name}", dir.as_raw_fd())
}

/// Binds and listens on the socket `name` in `dir`, replacing a socket file that is there.
pub fn bind_in_dir(dir: &File, name: &str) -> io::Result<UnixListener> {
    let path = in_dir(dir, name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    UnixListener::bind(path)
}

/// Connects to the socket `name` in `dir`.
pub fn connect_in_dir(dir: &File, name: &str) -> io::Result<UnixStream> {
    UnixStream::connect(in_dir(dir, name))
}

/// Takes ownership of a descriptor this process was started with. `None` if the number is not open. Each number may
/// be taken once; the standard streams (0 to 2) are refused.
pub fn take_inherited(number: RawFd) -> Option<OwnedFd> {
    use std::collections::BTreeSet;
    use std::sync::Mutex;
    static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());
    let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if number <= 2 || !taken.insert(number) {
        return None;
    }
    // SAFETY: fcntl(F_GETFD) takes any number and touches no memory.
    let open = unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0;
    // SAFETY: the number is open (checked above) and handed out once (TAKEN), before anything else opens descriptors
    // of its own: callers take inherited descriptors first thing in main.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sets or clears close-on-exec.
pub fn set_cloexec(descriptor: &OwnedFd, on: bool) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    let flags = if on { FdFlag::FD_CLOEXEC } else { FdFlag::empty() };
    fcntl(descriptor, FcntlArg::F_SETFD(flags))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn a_file_passes_over_a_socket() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"passed").unwrap();
        send_with_fds(&here, b"frame", &[file.as_fd()]).unwrap();
        let (mut bytes, mut got) = ([0; 16], Vec::new());
        assert_eq!(receive_with_fds(&there, &mut bytes, &mut got).unwrap(), 5);
        let mut passed = File::from(got.pop().unwrap());
        passed.rewind().unwrap();
        let mut text = String::new();
        passed.read_to_string(&mut text).unwrap();
        assert_eq!(text, "passed");
        assert_eq!(peer(&there).unwrap().uid, nix::unistd::getuid().as_raw());
    }

    #[test]
    fn sockets_are_reached_below_a_long_directory() {
        let top = tempfile::tempdir().unwrap();
        let long = top.path().join("d".repeat(200));
        std::fs::create_dir(&long).unwrap();
        let dir = File::open(&long).unwrap();
        let listener = bind_in_dir(&dir, "control.sock").unwrap();
        drop(listener);
        let listener = bind_in_dir(&dir, "control.sock").unwrap();
        let mut client = connect_in_dir(&dir, "control.sock").unwrap();
        client.write_all(b"x").unwrap();
        let mut byte = [0];
        listener.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
