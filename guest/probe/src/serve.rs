//! Echoes.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::report::Report;
use crate::words::{PORT, Words};
use crate::{ProbeError, failed};

/// Connections served at once; more wait to be accepted.
const CONNECTIONS_MAX: u64 = 64;

/// How long a connection may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What was served.
#[derive(Default)]
struct Served {
    datagrams: AtomicU64,
    connections: AtomicU64,
    open: AtomicU64,
    bytes: AtomicU64,
}

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let seconds = words.option_needed("seconds")?;
    let port = words.option("port")?.unwrap_or(PORT);
    words.end()?;
    // One socket for both families; without IPv6 in the kernel, one for IPv4.
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let only_v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let udp = UdpSocket::bind(both).or_else(|_| UdpSocket::bind(only_v4)).map_err(failed("listen for UDP"))?;
    let tcp = TcpListener::bind(both).or_else(|_| TcpListener::bind(only_v4)).map_err(failed("listen for TCP"))?;
    let served = Arc::new(Served::default());
    let (datagrams, connections) = (Arc::clone(&served), Arc::clone(&served));
    thread::spawn(move || echo_datagrams(&udp, &datagrams));
    thread::spawn(move || accept(&tcp, &connections));
    Report::new("serve").number("listening", true).number("port", port).print();
    // The threads end with the program.
    thread::sleep(Duration::from_secs(seconds));
    Report::new("serve")
        .number("datagrams", served.datagrams.load(Ordering::Relaxed))
        .number("connections", served.connections.load(Ordering::Relaxed))
        .number("bytes", served.bytes.load(Ordering::Relaxed))
        .print();
    Ok(true)
}

fn echo_datagrams(socket: &UdpSocket, served: &Served) {
    let mut buffer = vec![0; 65_536];
    loop {
        // An error is one peer's: a port that is closed, a destination that cannot be reached.
        let Ok((count, peer)) = socket.recv_from(&mut buffer) else { continue };
        if socket.send_to(&buffer[..count], peer).is_ok() {
            served.datagrams.fetch_add(1, Ordering::Relaxed);
            served.bytes.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}

fn accept(listener: &TcpListener, served: &Arc<Served>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        if served.open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            continue;
        }
        served.connections.fetch_add(1, Ordering::Relaxed);
        served.open.fetch_add(1, Ordering::Relaxed);
        let served = Arc::clone(served);
        thread::spawn(move || {
            let _ = echo_stream(stream, &served);
            served.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn echo_stream(mut stream: TcpStream, served: &Served) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; 16_384];
    loop {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..count])?;
        served.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }
}
