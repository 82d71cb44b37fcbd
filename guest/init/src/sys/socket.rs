//! Sockets: the listener, its connections, the kernel's network interface.
#![expect(unsafe_code, reason = "system calls with pointers")]

use hearth_guest_wire::Endpoint;

use super::file::{Fd, O_CLOEXEC, O_NONBLOCK};
use super::raw::{Errno, count, syscall};

const SOCKET: u64 = 41;
const CONNECT: u64 = 42;
const SENDTO: u64 = 44;
const RECVFROM: u64 = 45;
const SHUTDOWN: u64 = 48;
const BIND: u64 = 49;
const LISTEN: u64 = 50;
const ACCEPT4: u64 = 288;

const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const AF_NETLINK: u16 = 16;
const AF_VSOCK: u16 = 40;
const SOCK_STREAM: u32 = 1;
const SOCK_DATAGRAM: u32 = 2;
const SOCK_RAW: u32 = 3;

const MSG_DONTWAIT: u32 = 0x40;
const MSG_NOSIGNAL: u32 = 0x4000;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 64;

fn socket(family: u16, kind: u32, protocol: u32) -> Result<Fd, Errno> {
    // SAFETY: takes numbers.
    unsafe { syscall!(SOCKET, u32::from(family), kind | O_CLOEXEC, protocol) }.map(Fd::from_result)
}

fn listen(socket: Fd, address: &[u8]) -> Result<Fd, Errno> {
    // SAFETY: the kernel reads `address.len()` bytes of `address`.
    unsafe { syscall!(BIND, socket.number(), address.as_ptr(), address.len()) }?;
    // SAFETY: takes numbers.
    unsafe { syscall!(LISTEN, socket.number(), BACKLOG) }?;
    Ok(socket)
}

/// Listens on a vsock port, from whatever side.
pub(crate) fn listen_vsock(port: u32) -> Result<Fd, Errno> {
    const ANY: [u8; 4] = [0xff; 4];
    // struct sockaddr_vm: family, reserved, port, context id, flags, zeros.
    let mut address = [0_u8; 16];
    address[..2].copy_from_slice(&AF_VSOCK.to_le_bytes());
    address[4..8].copy_from_slice(&port.to_le_bytes());
    address[8..12].copy_from_slice(&ANY);
    listen(socket(AF_VSOCK, SOCK_STREAM | O_NONBLOCK, 0)?, &address)
}

/// Listens on a unix socket at `path`, which must not exist.
pub(crate) fn listen_unix(path: &[u8]) -> Result<Fd, Errno> {
    // struct sockaddr_un: family, 108 bytes of path.
    let mut address = [0_u8; 2 + 108];
    address[..2].copy_from_slice(&AF_UNIX.to_le_bytes());
    // The last byte stays null.
    let space = address.get_mut(2..2 + path.len()).filter(|_| path.len() < 108).ok_or(Errno::INVAL)?;
    space.copy_from_slice(path);
    listen(socket(AF_UNIX, SOCK_STREAM | O_NONBLOCK, 0)?, &address)
}

/// Begins a TCP connection, non-blocking: it stands, or has failed, when it can be written to.
pub(crate) fn connect_tcp(endpoint: Endpoint) -> Result<Fd, Errno> {
    // struct sockaddr_in6: family, port, flow, address, scope. Of struct sockaddr_in the address is where the flow is.
    let mut address = [0_u8; 28];
    let (family, port, length) = match endpoint {
        Endpoint::V4(octets, port) => {
            address[4..8].copy_from_slice(&octets);
            (AF_INET, port, 16)
        }
        Endpoint::V6(octets, port) => {
            address[8..24].copy_from_slice(&octets);
            (AF_INET6, port, 28)
        }
    };
    address[..2].copy_from_slice(&family.to_le_bytes());
    address[2..4].copy_from_slice(&port.to_be_bytes());
    let socket = socket(family, SOCK_STREAM | O_NONBLOCK, 0)?;
    // SAFETY: the kernel reads `length` bytes of `address`, which has 28.
    match unsafe { syscall!(CONNECT, socket.number(), address.as_ptr(), length) } {
        Ok(_) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(errno) => Err(errno),
    }
}

/// The next waiting connection, non-blocking.
pub(crate) fn accept(listener: &Fd) -> Result<Fd, Errno> {
    let none = core::ptr::null_mut::<u8>();
    // SAFETY: no address is asked for.
    unsafe { syscall!(ACCEPT4, listener.number(), none, none, O_CLOEXEC | O_NONBLOCK) }.map(Fd::from_result)
}

/// Sends what the socket takes now.
pub(crate) fn send(socket: &Fd, bytes: &[u8]) -> Result<usize, Errno> {
    let flags = MSG_DONTWAIT | MSG_NOSIGNAL;
    // SAFETY: the kernel reads `bytes.len()` bytes of `bytes`; there is no address.
    unsafe { syscall!(SENDTO, socket.number(), bytes.as_ptr(), bytes.len(), flags, 0_u64, 0_u64) }.map(count)
}

/// Receives what is there now; 0 is the end.
pub(crate) fn receive(socket: &Fd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let length = buffer.len();
    // SAFETY: the kernel writes at most `length` bytes to `buffer`; no address is asked for.
    unsafe { syscall!(RECVFROM, socket.number(), buffer.as_mut_ptr(), length, MSG_DONTWAIT, 0_u64, 0_u64) }.map(count)
}

/// Says that nothing more is sent. What was sent still arrives, and the other side may go on sending.
pub(crate) fn end_sending(socket: &Fd) -> Result<(), Errno> {
    const SENDING: u32 = 1;
    // SAFETY: takes numbers.
    unsafe { syscall!(SHUTDOWN, socket.number(), SENDING) }.map(drop)
}

/// A channel to the kernel's network configuration. Answers are there when a request returns.
pub(crate) struct Netlink(Fd);

impl Netlink {
    /// Opens one.
    pub(crate) fn new() -> Result<Self, Errno> {
        const NETLINK_ROUTE: u32 = 0;
        socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE).map(Self)
    }

    /// Sends one request to the kernel.
    pub(crate) fn send(&self, request: &[u8]) -> Result<(), Errno> {
        send(&self.0, request).map(drop)
    }

    /// Receives one datagram of answers.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        receive(&self.0, buffer)
    }
}

/// A socket that asks about interfaces.
pub(super) fn datagram_socket() -> Result<Fd, Errno> {
    socket(AF_INET, SOCK_DATAGRAM, 0)
}
