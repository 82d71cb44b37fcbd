//! A VM here, its volume on another host: this daemon connects to both, has the VMM's options answered by the other host's
//! daemon under the name that opens the volume there, and then copies bytes both ways. The VMM does not learn the name,
//! which has the lease's secret in it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::client::ClientConnection;

use super::Daemon;
use super::attachments::Kept;
use super::dial::{DialError, in_a_set};
use super::exports::name_between_hosts;
use super::handshake::HANDSHAKE_PATIENCE;
use super::line::{Line, Socket};
use super::serve::ServeError;
use super::tls;
use crate::sys::sock;
use crate::wire::nbd::option::{
    InfoRequest, MetaContextRequest, OPTION_HEADER_BYTES, OPTION_REPLY_HEADER_BYTES, OptionHeader, OptionReplyHeader,
    error_text, number, option, put_error, put_reply, reply_kind,
};
use crate::wire::nbd::{
    CLIENT_FLAGS_BYTES, GREETING_BYTES, NbdError, OPTIONS_MAX, client_flags, greeting, read_client_flags, read_greeting,
};
use crate::wire::volumed::Upstream;

/// How long the other host may take to accept.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Bytes on their way to the VMM that are held here.
const HELD_BYTES: usize = 256 * 1024;

/// Connects to both, and copies until either end hangs up.
pub(super) fn relay(daemon: &Arc<Daemon>, kept: &Kept, upstream: &Upstream) -> Result<(), DialError> {
    let prepare = |set| {
        let mut far = reach(daemon, upstream)?;
        let name = name_between_hosts(&kept.attachment, upstream, set);
        // Asked before the VMM is bothered: a lease that ended does not come back.
        ask_for(&mut far, &name, upstream)?;
        Ok((far, name))
    };
    in_a_set(daemon, kept, prepare, |socket, _, (mut far, name), had_requests| {
        let mut near = Line::new(socket, daemon.registry.clock).map_err(ServeError::Socket)?;
        if !hand_over(&mut near, &mut far, &name)? {
            return Ok(());
        }
        *had_requests = true;
        kept.connected();
        let ended = copy(near, far);
        kept.disconnected();
        Ok(ended.map_err(ServeError::Socket)?)
    })
}

/// A connection in TLS to the other host's daemon.
fn reach(daemon: &Arc<Daemon>, upstream: &Upstream) -> Result<Line, DialError> {
    let failed = |source| DialError::Connect { to: upstream.address.to_string(), source };
    let socket = TcpStream::connect_timeout(&upstream.address, CONNECT_PATIENCE).map_err(failed)?;
    sock::notice_silence(&socket).map_err(failed)?;
    let mut far = Line::new(Socket::Tcp(socket), daemon.registry.clock).map_err(failed)?;
    let deadline = far.within(HANDSHAKE_PATIENCE);
    let mut bytes = [0; GREETING_BYTES];
    far.read_all(&mut bytes, deadline).map_err(failed)?;
    let flags = read_greeting(bytes).map_err(ServeError::Nbd)?;
    far.write(&client_flags(flags)).map_err(failed)?;
    far.write(&option(number::STARTTLS, &[])).map_err(failed)?;
    let (reply, _) = read_reply(&mut far).map_err(DialError::Later)?;
    if reply.kind != reply_kind::ACK {
        return Err(failed(io::Error::other("it does not speak TLS")));
    }
    let connection = tls::connect_to(&upstream.certificate_sha256).map_err(io::Error::other).map_err(failed)?;
    far.start_tls_as_client(connection).map_err(failed)?;
    Ok(far)
}

/// Whether the volume is there, for this lease.
fn ask_for(far: &mut Line, name: &str, upstream: &Upstream) -> Result<(), DialError> {
    let failed = |source| DialError::Connect { to: upstream.address.to_string(), source };
    let info = InfoRequest { name, wanted: Vec::new() }.to_bytes();
    far.write(&option(number::INFO, &info)).map_err(failed)?;
    for _ in 0..OPTIONS_MAX {
        let (reply, data) = read_reply(far)?;
        match reply.kind {
            reply_kind::ERR_POLICY | reply_kind::ERR_UNKNOWN => {
                return Err(DialError::ForGood(format!("{} says: {}", upstream.address, error_text(&data))));
            }
            _ if reply.is_error() => return Err(failed(io::Error::other(error_text(&data)))),
            _ if reply.is_last() => return Ok(()),
            _ => {}
        }
    }
    Err(ServeError::Nbd(NbdError::Options).into())
}

fn read_reply(far: &mut Line) -> Result<(OptionReplyHeader, Vec<u8>), ServeError> {
    let deadline = far.within(HANDSHAKE_PATIENCE);
    let mut head = [0; OPTION_REPLY_HEADER_BYTES];
    far.read_all(&mut head, deadline)?;
    let head = OptionReplyHeader::read(head)?;
    let mut data = vec![0; head.length as usize];
    far.read_all(&mut data, deadline)?;
    Ok((head, data))
}

/// The handshake with the VMM, its options answered by the other host. `false`: it ended without an export.
fn hand_over(near: &mut Line, far: &mut Line, name: &str) -> Result<bool, ServeError> {
    near.write(&greeting())?;
    let mut flags = [0; CLIENT_FLAGS_BYTES];
    if !near.read_message(&mut flags, None)? {
        return Ok(false);
    }
    read_client_flags(flags)?;
    let deadline = near.within(HANDSHAKE_PATIENCE);
    let mut head = [0; OPTION_HEADER_BYTES];
    for _ in 0..OPTIONS_MAX {
        if !near.read_message(&mut head, Some(deadline))? {
            return Ok(false);
        }
        let OptionHeader { option: asked, length } = OptionHeader::read(head)?;
        let mut data = vec![0; length as usize];
        near.read_all(&mut data, deadline)?;
        let Some(data) = under_its_name(asked, &data, name) else {
            if matches!(asked, number::ABORT | number::EXPORT_NAME) {
                return Ok(false);
            }
            let mut out = Vec::new();
            put_error(&mut out, asked, reply_kind::ERR_UNSUP, "this connection is for one volume");
            near.write(&out)?;
            continue;
        };
        far.write(&option(asked, &data))?;
        let done = pass_replies(near, far)?;
        if asked == number::GO && done {
            return Ok(true);
        }
    }
    Err(NbdError::Options.into())
}

/// The data of an option as the other host is to read it; `None`: it is not asked.
fn under_its_name(asked: u32, data: &[u8], name: &str) -> Option<Vec<u8>> {
    match asked {
        number::INFO | number::GO => {
            let request = InfoRequest::read(data).ok().filter(|request| request.name.is_empty())?;
            Some(InfoRequest { name, ..request }.to_bytes())
        }
        number::SET_META_CONTEXT | number::LIST_META_CONTEXT => {
            let request = MetaContextRequest::read(data).ok().filter(|request| request.name.is_empty())?;
            Some(MetaContextRequest { name, ..request }.to_bytes())
        }
        number::STRUCTURED_REPLY => Some(data.to_vec()),
        _ => None,
    }
}

/// Passes the replies to one option on; whether it was done.
fn pass_replies(near: &mut Line, far: &mut Line) -> Result<bool, ServeError> {
    for _ in 0..OPTIONS_MAX {
        let (reply, data) = read_reply(far)?;
        let mut out = Vec::new();
        put_reply(&mut out, reply.option, reply.kind, &data);
        near.write(&out)?;
        if reply.is_last() {
            return Ok(!reply.is_error());
        }
    }
    Err(NbdError::Options.into())
}

/// Copies both ways until either end hangs up.
fn copy(near: Line, far: Line) -> io::Result<()> {
    let (from_near, near, _) = near.into_parts();
    let (from_far, _, far) = far.into_parts();
    let (Some(Socket::Unix(mut near)), Some((mut tls, Socket::Tcp(mut far)))) = (near, far) else {
        return Err(ErrorKind::InvalidInput.into());
    };
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let mut to_near = from_far;
    tls.set_buffer_limit(None);
    tls.writer().write_all(&from_near)?;
    let mut piece = vec![0; HELD_BYTES].into_boxed_slice();
    loop {
        // What has arrived goes as far as it can.
        to_near_side(&mut near, &mut to_near, &mut tls)?;
        while tls.wants_write() {
            if may_come_later(tls.write_tls(&mut far))?.is_none() {
                break;
            }
        }
        let (is_full, must_send) = (!to_near.is_empty(), tls.wants_write());
        let (near_has, far_has) = wait(&near, &far, is_full, must_send)?;
        if near_has && !must_send {
            match may_come_later(near.read(&mut piece))? {
                Some(0) => return Ok(()),
                Some(count) => tls.writer().write_all(&piece[..count])?,
                None => {}
            }
        }
        if far_has && !is_full {
            match may_come_later(tls.read_tls(&mut far))? {
                Some(0) => return Ok(()),
                Some(_) => {
                    tls.process_new_packets().map_err(io::Error::other)?;
                }
                None => {}
            }
        }
    }
}

/// Has decrypted bytes go to the VMM for as long as it takes them.
fn to_near_side(near: &mut impl Write, to_near: &mut Vec<u8>, tls: &mut ClientConnection) -> io::Result<()> {
    loop {
        if to_near.is_empty() {
            to_near.resize(HELD_BYTES, 0);
            let read = may_come_later(tls.reader().read(to_near));
            to_near.truncate(*read.as_ref().ok().and_then(Option::as_ref).unwrap_or(&0));
            if read?.is_none() || to_near.is_empty() {
                return Ok(());
            }
        }
        match may_come_later(near.write(to_near))? {
            Some(count) => drop(to_near.drain(..count)),
            None => return Ok(()),
        }
    }
}

/// Waits until something can be done; what there is to read from either side.
fn wait(near: &impl AsFd, far: &impl AsFd, is_full: bool, must_send: bool) -> io::Result<(bool, bool)> {
    let of = |reads: bool, writes: bool| {
        let read = if reads { PollFlags::POLLIN } else { PollFlags::empty() };
        read | if writes { PollFlags::POLLOUT } else { PollFlags::empty() }
    };
    let mut fds =
        [PollFd::new(near.as_fd(), of(!must_send, is_full)), PollFd::new(far.as_fd(), of(!is_full, must_send))];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ended = PollFlags::POLLHUP | PollFlags::POLLERR;
    let happened = |at: usize| fds[at].revents().unwrap_or(PollFlags::empty());
    // With its peer gone, a side says so until it is read: it must not be waited for in a circle.
    if (must_send && happened(0).intersects(ended)) || (is_full && happened(1).intersects(ended)) {
        return Err(ErrorKind::BrokenPipe.into());
    }
    Ok((!happened(0).is_empty(), !happened(1).is_empty()))
}

/// The same, with "not now" as no error.
fn may_come_later<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
