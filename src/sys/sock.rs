//! Listening TCP sockets with options that std's do not have: on an address that comes later, on a link-local address
//! of one interface, in another network namespace (`netns::in_fd`).

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen, setsockopt, socket, sockopt,
};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// Listens on `address` in the calling thread's network namespace, for good: the socket stays in that namespace and
/// may be used on any thread. The address need not be there yet (IP_FREEBIND). A link-local IPv6 address has to carry
/// its scope id, which is the interface's index. With `interface`, only what comes in there is taken
/// (SO_BINDTODEVICE). The socket is non-blocking and, on IPv6, IPv6 only.
pub fn listen_tcp(address: SocketAddr, interface: Option<&str>) -> io::Result<TcpListener> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    setsockopt(&fd, sockopt::IpFreebind, &true)?;
    if let Some(interface) = interface {
        setsockopt(&fd, sockopt::BindToDevice, &OsString::from(interface))?;
    }
    let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
    match address {
        SocketAddr::V4(address) => bind(number, &SockaddrIn::from(address))?,
        SocketAddr::V6(address) => {
            setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
            bind(number, &SockaddrIn6::from(address))?;
        }
    }
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(fd))
}

/// Seconds of silence after which the other end is asked whether it is there.
const SILENCE_S: u32 = 10;

/// Milliseconds after which an end that answers nothing counts as gone.
const GONE_MS: u32 = 20_000;

/// Has a connection end by itself when the other host is gone without a word, whether there is something to send or not.
pub fn notice_silence(socket: &TcpStream) -> io::Result<()> {
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &SILENCE_S)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &(SILENCE_S / 2))?;
    setsockopt(socket, sockopt::TcpUserTimeout, &GONE_MS)?;
    Ok(())
}

/// Has a listening socket accept nothing more: whoever waits in accept(2) is told EINVAL.
pub fn stop_listening(socket: &TcpListener) -> io::Result<()> {
    nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(socket), nix::sys::socket::Shutdown::Both)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netns;

    #[test]
    fn a_socket_stays_in_the_namespace_it_was_opened_in_and_needs_no_address_yet() {
        let bind =
            |address: &str| listen_tcp(address.parse().unwrap(), None).map(|socket| socket.local_addr().unwrap());
        netns::in_new(|| {
            // Nothing has an address here, not even lo; addresses of both families can be listened on.
            assert_eq!(bind("169.254.169.254:80").unwrap().to_string(), "169.254.169.254:80");
            assert_eq!(bind("[fe80::a9fe:a9fe%1]:80").unwrap().to_string(), "[fe80::a9fe:a9fe%1]:80");
            assert!(bind("[fe80::a9fe:a9fe]:80").is_err(), "a link-local address without its interface");
            let on_lo = listen_tcp("169.254.169.254:80".parse().unwrap(), Some("lo")).unwrap();
            assert_eq!(
                listen_tcp("169.254.169.254:80".parse().unwrap(), Some("lo")).unwrap_err().kind(),
                io::ErrorKind::AddrInUse
            );
            drop(on_lo);
            assert!(listen_tcp("169.254.169.254:80".parse().unwrap(), Some("nosuch0")).is_err());
        })
        .expect("a new network namespace needs root");
        let socket = netns::in_new(|| listen_tcp("169.254.169.254:80".parse().unwrap(), None)).unwrap().unwrap();
        assert_eq!(socket.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
