//! Between an upgraded connection and a guest: frames of hearth-stream/1 on one side, a program or console on the
//! other. Each direction holds one frame at most, so whoever stops reading stops the other end. A client that hangs up
//! ends the session, and with it the program.

use std::time::Duration;

use bytes::BytesMut;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest, ReadHalf, WriteHalf, split};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::error::ApiError;
use super::stall::Reading;
use super::stream::{Exit, Frame};
use crate::agent::{AnyStream, ExecExit, ExecInput, ExecOutput, ExecReceiver, ExecSender, ExecSession};

/// Bytes of console output put in one frame.
const CONSOLE_CHUNK_BYTES: usize = 16 * 1024;

/// Bytes asked from the client at once.
const READ_BYTES: usize = 64 * 1024;

/// A client that hangs up while its input cannot be taken is noticed this late at most.
const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// A client's connection, taken over from HTTP, and what HTTP had read of it beyond the request.
fn take_over(stream: Upgraded) -> Option<(OwnedReadHalf, OwnedWriteHalf, BytesMut)> {
    match stream.downcast::<TokioIo<Reading<UnixStream>>>() {
        Ok(parts) => {
            let (read, write) = parts.io.into_inner().into_inner().into_split();
            Some((read, write, BytesMut::from(parts.read_buf.as_ref())))
        }
        Err(_) => {
            tracing::error!("an upgraded connection is not a unix stream");
            None
        }
    }
}

/// Serves a program until it ends or the client hangs up.
pub(super) async fn exec(stream: Upgraded, session: ExecSession) {
    let ExecSession { output, input } = session;
    let Some((read, write, buffer)) = take_over(stream) else { return };
    tokio::select! {
        () = from_program(output, write) => {}
        () = to_program(read, buffer, input) => tracing::debug!("the client of a program hung up"),
    }
}

async fn from_program(mut output: ExecReceiver, mut to: OwnedWriteHalf) {
    loop {
        let (frame, last) = match output.next().await {
            Ok(ExecOutput::Stdout(bytes)) => (Frame::Stdout(bytes.into()), false),
            Ok(ExecOutput::Stderr(bytes)) => (Frame::Stderr(bytes.into()), false),
            Ok(ExecOutput::Exited(ExecExit::Code(code))) => (Frame::Exit(Exit::Code(code)), true),
            Ok(ExecOutput::Exited(ExecExit::Signal(number))) => (Frame::Exit(Exit::Signal(number)), true),
            Ok(ExecOutput::Exited(ExecExit::TimedOut)) => (Frame::Exit(Exit::TimedOut), true),
            Err(error) => (Frame::Error(Box::new(ApiError::from(error).body())), true),
        };
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes);
        // A client that is gone is noticed by the other direction as well; either ends the session.
        if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
            return;
        }
        if last {
            let _ = to.shutdown().await;
            return;
        }
    }
}

/// Returns when the client hangs up or speaks nonsense.
async fn to_program(mut from: OwnedReadHalf, mut buffer: BytesMut, mut input: ExecSender) {
    // Once the program takes no more, its end decides; the client's frames are read and dropped until then.
    let mut taken = true;
    loop {
        let frame = match next_frame(&mut from, &mut buffer).await {
            Some(frame) => frame,
            None => return,
        };
        let message = match frame {
            Frame::Stdin(bytes) => ExecInput::Stdin(bytes.into()),
            Frame::StdinClosed => ExecInput::StdinClosed,
            Frame::Signal(number) => ExecInput::Signal(number),
            Frame::Resize(size) => ExecInput::Resize { rows: size.rows, columns: size.columns },
            // A client does not say these.
            Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit(_) | Frame::Error(_) => return,
        };
        if taken {
            tokio::select! {
                sent = input.send(message) => taken = sent.is_ok(),
                () = hung_up(&from) => return,
            }
        }
    }
}

/// Waits for the client to hang up while its input is not read. Unread input hides the end from readiness, so it is
/// looked at from time to time instead.
async fn hung_up(from: &OwnedReadHalf) {
    loop {
        tokio::time::sleep(HANG_UP_CHECK).await;
        match from.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// The next frame; `None` at the end of the connection or of its sense.
async fn next_frame(from: &mut OwnedReadHalf, buffer: &mut BytesMut) -> Option<Frame> {
    loop {
        match Frame::decode(buffer) {
            Ok(Some(frame)) => return Some(frame),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(%error, "a client's frames make no sense");
                return None;
            }
        }
        buffer.reserve(READ_BYTES);
        match from.read_buf(buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}

/// Serves a console until the VM ends or the client hangs up.
pub(super) async fn console(stream: Upgraded, console: AnyStream) {
    let Some((read, write, buffer)) = take_over(stream) else { return };
    let (output, input) = split(console);
    tokio::select! {
        () = from_console(output, write) => {}
        () = to_console(read, buffer, input) => {}
    }
}

async fn from_console(mut console: ReadHalf<AnyStream>, mut to: OwnedWriteHalf) {
    let mut chunk = vec![0; CONSOLE_CHUNK_BYTES];
    loop {
        match console.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                let mut bytes = BytesMut::new();
                Frame::Stdout(chunk[..count].to_vec().into()).encode(&mut bytes);
                if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
                    return;
                }
            }
        }
    }
    let _ = to.shutdown().await;
}

async fn to_console(mut from: OwnedReadHalf, mut buffer: BytesMut, mut console: WriteHalf<AnyStream>) {
    while let Some(frame) = next_frame(&mut from, &mut buffer).await {
        match frame {
            Frame::Stdin(bytes) => {
                if console.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            // A console has no size, no signals and no end of input.
            Frame::Resize(_) | Frame::Signal(_) | Frame::StdinClosed => {}
            Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit(_) | Frame::Error(_) => return,
        }
    }
}
