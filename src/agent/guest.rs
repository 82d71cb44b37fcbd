//! The agent's side of the protocol to the agent inside a guest. Everything the guest says is untrusted: frames are
//! bounded, unexpected answers are errors, and each exchange has a time limit.

use std::time::Duration;

use hearth_guest_wire::frame::{self, Decoder, FrameError};
use hearth_guest_wire::{FromGuest, HooksRan, PORT, ToGuest, VERSION, VERSION_MIN};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;

use super::world::{ByteStream, OpenStreamError, VmmHost};
use crate::ids::{VmId, VolumeId};
use crate::report::Retry;

/// Longest wait for the VMM to connect a stream to the guest agent and for the guest agent's Hello. A guest that runs
/// answers in milliseconds, under load and emulation in tenths of seconds.
pub(super) const OPEN_LIMIT: Duration = Duration::from_secs(60);

/// Longest wait for an answer to a control request.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Bytes read at once: one chunk of a stream and its frame.
const READ_BYTES: usize = 36 * 1024;

/// Why talking to a guest agent failed. The connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// There is no connection.
    #[error("reach the guest agent")]
    Open(#[source] OpenStreamError),
    /// The stream broke.
    #[error("talk to the guest agent")]
    Stream(#[source] std::io::Error),
    /// The stream ended where an answer was due.
    #[error("the guest agent hung up")]
    HungUp,
    /// The guest said something that is no message.
    #[error("understand the guest agent")]
    Frame(#[source] FrameError),
    /// The guest speaks another version.
    #[error("the guest agent speaks version {found}, this host {VERSION_MIN} to {VERSION}")]
    Version {
        /// The guest's version.
        found: u16,
    },
    /// The guest could not do it.
    #[error("the guest agent could not: {what}")]
    Failed {
        /// Linux errno in the guest, 0 when there is none.
        errno: i32,
        /// The guest's words.
        what: String,
    },
    /// Programs in the guest that take note of its identity failed.
    #[error("programs of /etc/hearth/identity.d failed in the guest: {failed}")]
    Hooks {
        /// Which, and how.
        failed: String,
    },
    /// It cannot have its root on its volume.
    #[error("volume {volume} cannot be the root of the guest: {reason}")]
    NoRoot {
        /// The volume.
        volume: VolumeId,
        /// What the guest says, and what helps.
        reason: String,
        /// Whether it may be another time, with the volume as it is.
        retry: Retry,
    },
    /// The guest answered something else than was asked.
    #[error("the guest agent answered something else than was asked")]
    Unexpected,
    /// No answer in time.
    #[error("no answer within {} s", limit.as_secs())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
    },
}

impl GuestError {
    /// The error of these hooks.
    pub(super) fn hooks(hooks: &HooksRan) -> Self {
        let failed: Vec<_> = hooks.failed.iter().map(|hook| format!("{}: {}", hook.name, hook.reason)).collect();
        Self::Hooks { failed: printable(&failed.join(", ")) }
    }
}

/// A connection to a guest agent, after Hello.
#[derive(Debug)]
pub(super) struct GuestLink<S> {
    /// What the guest says.
    pub reader: GuestReader<S>,
    /// What is said to the guest.
    pub writer: GuestWriter<S>,
    /// The version both sides speak on it.
    pub version: u16,
    /// Nanoseconds the guest agent had been running when it said Hello, as it says.
    pub running_ns: u64,
}

/// The half that reads.
#[derive(Debug)]
pub(super) struct GuestReader<S> {
    half: ReadHalf<S>,
    decoder: Decoder,
    buffer: Box<[u8]>,
}

/// The half that writes.
#[derive(Debug)]
pub(super) struct GuestWriter<S> {
    half: WriteHalf<S>,
}

impl<S: ByteStream> GuestReader<S> {
    /// The next message; `None` at the end of the stream between messages. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Result<Option<FromGuest>, GuestError> {
        loop {
            if let Some(message) = self.decoder.next().map_err(GuestError::Frame)? {
                return Ok(Some(message));
            }
            match self.half.read(&mut self.buffer).await.map_err(GuestError::Stream)? {
                0 if self.decoder.is_mid_frame() => return Err(GuestError::HungUp),
                0 => return Ok(None),
                count => self.decoder.push(&self.buffer[..count]),
            }
        }
    }
}

impl<S: ByteStream> GuestWriter<S> {
    /// Sends one message. Waits while the guest does not read.
    pub(super) async fn send(&mut self, message: &ToGuest) -> Result<(), GuestError> {
        let bytes = frame::encode(message).map_err(GuestError::Frame)?;
        self.half.write_all(&bytes).await.map_err(GuestError::Stream)
    }

    /// Sends messages in one write.
    async fn send_all(&mut self, messages: &[ToGuest]) -> Result<(), GuestError> {
        let mut bytes = Vec::new();
        for message in messages {
            frame::encode_to(message, &mut bytes).map_err(GuestError::Frame)?;
        }
        self.half.write_all(&bytes).await.map_err(GuestError::Stream)
    }
}

impl<S: ByteStream> GuestLink<S> {
    /// Says Hello over a fresh stream.
    pub(super) async fn open(stream: S) -> Result<Self, GuestError> {
        let (reader, writer) = tokio::io::split(stream);
        let buffer = vec![0; READ_BYTES].into_boxed_slice();
        let reader = GuestReader { half: reader, decoder: Decoder::new(), buffer };
        let mut link = Self { reader, writer: GuestWriter { half: writer }, version: VERSION, running_ns: 0 };
        let answer = link.request(&ToGuest::Hello { version: VERSION }, OPEN_LIMIT).await?;
        let FromGuest::Hello { version, running_ns } = answer else { return Err(GuestError::Unexpected) };
        if version < VERSION_MIN {
            return Err(GuestError::Version { found: version });
        }
        link.version = version.min(VERSION);
        link.running_ns = running_ns;
        Ok(link)
    }

    /// Asks and waits for the answer, within `limit`. A refusal is an error.
    pub(super) async fn request(&mut self, message: &ToGuest, limit: Duration) -> Result<FromGuest, GuestError> {
        let exchange = async {
            self.writer.send(message).await?;
            self.reader.next().await?.ok_or(GuestError::HungUp)
        };
        match timeout(limit, exchange).await {
            Ok(Ok(FromGuest::Failed { errno, what })) => Err(GuestError::Failed { errno, what: printable(&what) }),
            Ok(answer) => answer,
            Err(_) => Err(GuestError::TimedOut { limit }),
        }
    }

    /// Asks for several things at once and gives the answers, all within `limit`: one way there and back instead of one
    /// for each, which on an emulating host is tens of milliseconds. The first refusal is the error; `on_first` is called
    /// when the first answer is there.
    pub(super) async fn answers(
        &mut self,
        messages: &[ToGuest],
        limit: Duration,
        on_first: impl FnOnce() + Send,
    ) -> Result<Vec<FromGuest>, GuestError> {
        let mut on_first = Some(on_first);
        let exchange = async {
            self.writer.send_all(messages).await?;
            let mut answers = Vec::with_capacity(messages.len());
            for _ in messages {
                let answer = self.reader.next().await?.ok_or(GuestError::HungUp)?;
                if let Some(on_first) = on_first.take() {
                    on_first();
                }
                if let FromGuest::Failed { errno, what } = &answer {
                    return Err(GuestError::Failed { errno: *errno, what: printable(what) });
                }
                answers.push(answer);
            }
            Ok(answers)
        };
        timeout(limit, exchange).await.unwrap_or(Err(GuestError::TimedOut { limit }))
    }

    /// Asks for something that is answered by Done.
    pub(super) async fn done(&mut self, message: &ToGuest, limit: Duration) -> Result<(), GuestError> {
        let answer = self.request(message, limit).await?;
        if answer == FromGuest::Done { Ok(()) } else { Err(GuestError::Unexpected) }
    }
}

/// Connects to a VM's guest agent and says Hello.
pub(super) async fn connect<V: VmmHost>(vmm: &V, vm: &VmId) -> Result<GuestLink<V::Stream>, GuestError> {
    let stream = timeout(OPEN_LIMIT, vmm.guest(vm, PORT)).await;
    match stream {
        Ok(stream) => GuestLink::open(stream.map_err(GuestError::Open)?).await,
        Err(_) => Err(GuestError::Open(OpenStreamError::TimedOut { limit: OPEN_LIMIT })),
    }
}

/// A guest's words, bounded and without control characters: they end up in terminals and logs.
pub(super) fn printable(text: &str) -> String {
    const CHARS_MAX: usize = 512;
    text.chars().take(CHARS_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
