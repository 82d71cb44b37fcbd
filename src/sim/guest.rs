//! Guests of a simulated host: what becomes of them, and the agent inside.

use std::time::Duration;

use hearth_guest_wire::frame::{Decoder, encode};
use hearth_guest_wire::{Exit, FromGuest, HooksRan, Stats, ToGuest, VERSION};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::SimHost;
use crate::ids::VmId;
use crate::wire::last_words::LastWords;

const SECOND_NS: u64 = 1_000_000_000;

/// How long a guest boots: as under an emulating KVM.
pub(super) const BOOT: Duration = Duration::from_secs(15);

/// What becomes of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It boots, obeys, and powers off when asked.
    Obeys,
    /// Its agent never answers.
    NeverAnswers,
    /// Its kernel panics while it boots.
    PanicsAtBoot,
    /// It powers off by itself, a while after it booted.
    PowersOff,
    /// It does not power off when asked.
    StaysUp,
}

impl Fate {
    pub(super) const fn odd(random: u64) -> Self {
        match random % 4 {
            0 => Self::NeverAnswers,
            1 => Self::PanicsAtBoot,
            2 => Self::PowersOff,
            _ => Self::StaysUp,
        }
    }

    /// The guest's vCPUs run from `now` on.
    pub(super) fn begin(
        self,
        now: u64,
        boot: Duration,
        answers: &mut Option<u64>,
        ends: &mut Option<(u64, LastWords)>,
    ) {
        let boot = u64::try_from(boot.as_nanos()).unwrap_or(u64::MAX);
        if answers.is_some() || ends.is_some() {
            return;
        }
        match self {
            Self::Obeys | Self::StaysUp => *answers = Some(now + boot),
            Self::NeverAnswers => {}
            Self::PanicsAtBoot => *ends = Some((now + boot / 5, LastWords::GuestPanic)),
            Self::PowersOff => {
                *answers = Some(now + boot);
                *ends = Some((now + boot * 3, LastWords::GuestPoweredOff));
            }
        }
    }
}

impl SimHost {
    /// What all guests say from now on that they hold.
    pub fn guests_hold(&self, secrets: &[&str]) {
        self.state().secrets = secrets.iter().map(|name| (*name).to_owned()).collect();
    }
}

/// The agent inside a guest, for one connection.
pub(super) async fn serve(host: SimHost, vm: VmId, stream: DuplexStream) {
    host.state().guest_streams += 1;
    talk(&host, &vm, stream).await;
    host.state().guest_streams -= 1;
}

/// Breaks off when the VMM is gone.
async fn talk(host: &SimHost, vm: &VmId, mut stream: DuplexStream) {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; 4096];
    loop {
        match decoder.next::<ToGuest>() {
            Ok(Some(message)) => {
                let alive = host.state().living(vm).is_some();
                if !alive || !answer(host, vm, message, &mut stream).await {
                    return;
                }
                continue;
            }
            Ok(None) => {}
            Err(_) => return,
        }
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => decoder.push(&buffer[..count]),
        }
    }
}

/// A program that ends by being hung up on.
async fn never(stream: &mut DuplexStream) -> bool {
    if let Ok(bytes) = encode(&FromGuest::Started { pid: 2 })
        && stream.write_all(&bytes).await.is_ok()
    {
        let mut ignored = [0; 64];
        while stream.read(&mut ignored).await.is_ok_and(|count| count > 0) {}
    }
    false
}

fn shell(argv: &[String]) -> Vec<FromGuest> {
    let (line, goes_on) = (argv.last().map_or("", String::as_str), argv.len() > 3);
    let said = line.strip_prefix("echo ").map(|words| FromGuest::Stdout(format!("{words}\n").into_bytes()));
    let code = if line == "false" { 1 } else { 0 };
    let exited = (!goes_on).then_some(FromGuest::Exited(Exit::Code(code)));
    std::iter::once(FromGuest::Started { pid: 2 }).chain(said).chain(exited).collect()
}

/// Answers one message; whether the connection goes on.
async fn answer(host: &SimHost, vm: &VmId, message: ToGuest, stream: &mut DuplexStream) -> bool {
    let answers = match message {
        ToGuest::Hello { .. } => vec![FromGuest::Hello { version: VERSION, running_ns: SECOND_NS }],
        ToGuest::Shutdown(_) => {
            let mut state = host.state();
            let now = state.now_ns();
            if let Some(guest) = state.living(vm).filter(|guest| guest.fate != Fate::StaysUp) {
                guest.ends_at_ns = Some((now + SECOND_NS, LastWords::GuestPoweredOff));
            }
            drop(state);
            host.changed.notify_waiters();
            vec![FromGuest::Done]
        }
        ToGuest::Identity(identity) => {
            host.identified(vm, &identity);
            vec![FromGuest::Done]
        }
        ToGuest::Root { disk, .. } => vec![host.enter_root(vm, &disk)],
        ToGuest::Registered { .. } if !host.registered(vm) => return false,
        ToGuest::Network(_)
        | ToGuest::Hardware(_)
        | ToGuest::SetClock { .. }
        | ToGuest::Registered { .. }
        | ToGuest::RegistrationRefused { .. }
        | ToGuest::Thaw => vec![FromGuest::Done],
        ToGuest::RunHooks { .. } => vec![FromGuest::HooksRan(HooksRan::default())],
        ToGuest::Join(join) => host.join(vm, join).into_iter().collect(),
        ToGuest::Quiesce { .. } => vec![FromGuest::Quiesced { complete: true, took_ms: 1 }],
        ToGuest::Secrets => vec![FromGuest::Secrets(host.state().secrets.clone())],
        ToGuest::Stats => vec![FromGuest::Stats(Stats::default())],
        ToGuest::Exec(exec) if exec.argv[0] == "true" => {
            vec![FromGuest::Started { pid: 2 }, FromGuest::Exited(Exit::Code(0))]
        }
        ToGuest::Exec(exec) if exec.argv[0] == "echo" => {
            let words = exec.argv[1..].join(" ") + "\n";
            let started = FromGuest::Started { pid: 2 };
            vec![started, FromGuest::Stdout(words.into_bytes()), FromGuest::Exited(Exit::Code(0))]
        }
        // A line for the shell: `true`, `false`, `echo ...`. With a word more it goes on when it has said what it says.
        ToGuest::Exec(exec) if exec.argv[0] == "sh" => shell(&exec.argv),
        ToGuest::Exec(exec) if exec.argv[0] == "exit" => {
            let code = exec.argv.get(1).and_then(|code| code.parse().ok()).unwrap_or(0);
            vec![FromGuest::Started { pid: 2 }, FromGuest::Exited(Exit::Code(code))]
        }
        ToGuest::Exec(exec) if exec.argv[0] == "never" => return never(stream).await,
        ToGuest::Exec(exec) if exec.argv[0] == "cat" => vec![FromGuest::Started { pid: 2 }],
        ToGuest::Exec(exec) => vec![FromGuest::Failed { errno: 2, what: format!("start program {}", exec.argv[0]) }],
        // What follows is for `cat`.
        ToGuest::Stdin(bytes) => vec![FromGuest::Stdout(bytes)],
        ToGuest::StdinClosed => vec![FromGuest::Exited(Exit::Code(0))],
        ToGuest::Signal { number } => vec![FromGuest::Exited(Exit::Signal(number))],
        ToGuest::Resize { .. } => Vec::new(),
    };
    tokio::time::sleep(Duration::from_millis(1)).await;
    for answer in answers {
        let Ok(bytes) = encode(&answer) else { return false };
        if stream.write_all(&bytes).await.is_err() || matches!(answer, FromGuest::Exited(_)) {
            return false;
        }
    }
    true
}
