//! Questions to an echo, over UDP or TCP.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use crate::report::{Answers, Report};
use crate::stdin::Stdin;
use crate::words::{Words, socket_address};
use crate::{ProbeError, failed};

pub(crate) fn run(mut words: Words) -> Result<bool, ProbeError> {
    let by = words.need("tcp, stream or udp")?;
    let address = words.need("an address")?;
    let port = words.need("a port")?;
    let port = port.parse().map_err(|error| ProbeError::Words(format!("{port}: {error}")))?;
    let to = socket_address(&address, port)?;
    let question = Question {
        bytes: words.option("bytes")?.unwrap_or(64),
        text: words.option("text")?.unwrap_or_default(),
        wait: Duration::from_millis(words.option("wait-ms")?.unwrap_or(5000)),
    };
    let count: u16 = words.option("count")?.unwrap_or(1);
    let from: Option<IpAddr> = words.option("from")?;
    let every = Duration::from_millis(words.option("every-ms")?.unwrap_or(0));
    let mut ending = Stdin::of(&mut words)?;
    words.end()?;
    let mut answers = Answers::default();
    match by.as_str() {
        "udp" => {
            let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((from.unwrap_or(any), 0)).map_err(failed("take the address to ask from"))?;
            for number in 0..count {
                answers.take(question.by_udp(&socket, to, number));
            }
        }
        "tcp" if from.is_none() => {
            for number in 0..count {
                answers.take(question.by_tcp(to, number));
            }
        }
        "stream" if from.is_none() => {
            let stream = TcpStream::connect_timeout(&to, question.wait).map_err(failed("connect"))?;
            for number in 0..count {
                let answer = question.on_stream(&stream, number);
                let is_over = answer.is_err();
                answers.take(answer);
                if number == 0 && ending.is_asked() {
                    Report::new("ask").number("talking", !is_over).print();
                }
                if is_over || ending.has_ended()? {
                    break;
                }
                std::thread::sleep(every);
            }
        }
        _ => return Err(ProbeError::Words(format!("by {by}, and from an address?"))),
    }
    Ok(answers.print(Report::new("ask").text("by", by).text("to", to).number("bytes", question.bytes)))
}

struct Question {
    bytes: usize,
    text: String,
    wait: Duration,
}

impl Question {
    /// The text, the question's number, and then bytes that differ from question to question.
    fn content(&self, number: u16) -> Vec<u8> {
        let mut content = format!("{}#{number}#", self.text).into_bytes();
        let mut state = u32::from(number) | (1 << 16);
        while content.len() < self.bytes {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            content.push(state.to_be_bytes()[0]);
        }
        content.truncate(self.bytes.max(1));
        content
    }

    /// The time to the right answer, or `None` for a wrong one. Answers to earlier questions that come late are
    /// passed over.
    fn by_udp(&self, socket: &UdpSocket, to: SocketAddr, number: u16) -> io::Result<Option<Duration>> {
        let content = self.content(number);
        let mut buffer = vec![0; 65_536];
        let started = Instant::now();
        socket.send_to(&content, to)?;
        loop {
            let left = self.wait.checked_sub(started.elapsed()).filter(|left| !left.is_zero());
            socket.set_read_timeout(Some(left.ok_or(ErrorKind::TimedOut)?))?;
            let (count, peer) = socket.recv_from(&mut buffer)?;
            if buffer[..count] == content {
                return Ok((peer.ip() == to.ip()).then(|| started.elapsed()));
            }
            if !(0..number).any(|earlier| buffer[..count] == self.content(earlier)) {
                return Ok(None);
            }
        }
    }

    /// On a connection that is there and goes on.
    fn on_stream(&self, mut stream: &TcpStream, number: u16) -> io::Result<Option<Duration>> {
        let content = self.content(number);
        let started = Instant::now();
        stream.set_read_timeout(Some(self.wait))?;
        stream.set_write_timeout(Some(self.wait))?;
        stream.set_nodelay(true)?;
        stream.write_all(&content)?;
        let mut answer = vec![0; content.len()];
        stream.read_exact(&mut answer)?;
        Ok((answer == content).then(|| started.elapsed()))
    }

    fn by_tcp(&self, to: SocketAddr, number: u16) -> io::Result<Option<Duration>> {
        let content = self.content(number);
        let started = Instant::now();
        let mut stream = TcpStream::connect_timeout(&to, self.wait)?;
        stream.set_read_timeout(Some(self.wait))?;
        stream.set_write_timeout(Some(self.wait))?;
        stream.set_nodelay(true)?;
        let mut answer = vec![0; content.len().min(16_384)];
        // In pieces: neither side has to hold all of it while nobody reads.
        for piece in content.chunks(answer.len()) {
            stream.write_all(piece)?;
            let answer = &mut answer[..piece.len()];
            stream.read_exact(answer)?;
            if answer != piece {
                return Ok(None);
            }
            if started.elapsed() > self.wait {
                return Err(ErrorKind::TimedOut.into());
            }
        }
        Ok(Some(started.elapsed()))
    }
}
