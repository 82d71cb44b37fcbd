//! A program run for the host: its process group, its streams, its end.
//!
//! ```text
//!   running ──reaped──▶ ended: streams at their end ────────────────▶ finished
//!      │                  └ a stream is held by someone else: what it held at the
//!      │ time-out           program's end is read, and what comes within GRACE ──▶ finished
//!      └─▶ group killed ──reaped──▶ ended (as timed out)
//! ```

use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;

use hearth_guest_wire::{EXEC_WORDS_MAX, Exec, Exit, FromGuest, STREAM_CHUNK_BYTES};

use crate::outgoing::Outgoing;
use crate::sys::{self, Epoll, Errno, Fd, Happened, Interest, Launch, LaunchError};

/// How long after a program's end its streams are listened to when something else (a grandchild in the background)
/// holds them open. What they held at its end is delivered however long the host takes to read it.
pub(crate) const GRACE_NS: u64 = 200_000_000;

/// Most bytes read from a stream at once: a pipe's capacity.
pub(crate) const READ_BYTES: usize = 2 * STREAM_CHUNK_BYTES;

/// Where a program is searched when neither the host nor the kernel's command line says so.
const DEFAULT_PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// End of file as a terminal's reader types it (^D).
const TERMINAL_END: u8 = 4;

/// A stream of the program's output.
#[derive(Debug)]
struct Source {
    fd: Option<Fd>,
    /// A read may find something.
    readable: bool,
    /// No writer is left: reads find the rest and then the end.
    ending: bool,
    /// Bytes that were there when the program ended and are not read yet.
    owed: usize,
}

impl Source {
    fn new(fd: Option<Fd>) -> Self {
        Self { fd, readable: false, ending: false, owed: 0 }
    }
}

/// The program's standard input.
#[derive(Debug)]
enum Input {
    /// The writing end of a pipe, and whether the loop waits for it.
    Pipe { fd: Fd, watched: bool },
    /// The terminal, which is the first source too.
    Terminal,
    /// Closed by the host or by the program: what comes is dropped.
    Closed,
}

/// Which of a program's descriptors an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Standard input.
    Input,
    /// Standard output, or the terminal both ways.
    Output,
    /// Standard error.
    Errors,
}

/// A program run for the host.
#[derive(Debug)]
pub(crate) struct Program {
    pid: i32,
    terminal: bool,
    input: Input,
    input_blocked: bool,
    input_bytes: Vec<u8>,
    input_written: usize,
    input_ends: bool,
    outputs: [Source; 2],
    timed_out: bool,
    exit: Option<Exit>,
    grace_over: bool,
}

/// Why a program was not started.
#[derive(Debug)]
pub(crate) struct StartError {
    /// What the kernel said.
    pub(crate) errno: Errno,
    /// What failed.
    pub(crate) what: String,
}

fn refused(errno: Errno, what: &str) -> StartError {
    StartError { errno, what: String::from(what) }
}

/// A word of the host as the kernel wants it.
fn word(text: String) -> Result<CString, StartError> {
    CString::new(text).map_err(|_| refused(Errno::INVAL, "a word contains a null byte"))
}

fn words(texts: Vec<String>) -> Result<Vec<CString>, StartError> {
    texts.into_iter().map(word).collect()
}

/// The name of a `NAME=value` word with its `=`.
fn name_of(word: &CStr) -> Option<&[u8]> {
    let bytes = word.to_bytes();
    let end = bytes.iter().position(|byte| *byte == b'=')?;
    bytes.get(..=end)
}

/// The agent's environment with the host's words over it.
pub(crate) fn environment<'a>(own: &[&'a CStr], given: &'a [CString]) -> Result<Vec<&'a CStr>, StartError> {
    let mut all: Vec<&CStr> = Vec::with_capacity(own.len() + given.len() + 1);
    all.push(DEFAULT_PATH);
    for word in own.iter().copied().chain(given.iter().map(CString::as_c_str)) {
        let name = name_of(word).ok_or_else(|| refused(Errno::INVAL, "an environment word has no ="))?;
        match all.iter_mut().find(|known| name_of(known) == Some(name)) {
            Some(known) => *known = word,
            None => all.push(word),
        }
    }
    Ok(all)
}

/// The paths at which `program` may be.
fn candidates(program: &CStr, environment: &[&CStr]) -> Result<Vec<CString>, StartError> {
    let name = program.to_bytes();
    if name.is_empty() {
        return Err(refused(Errno::NOENT, "the program has no name"));
    }
    if name.contains(&b'/') {
        return Ok(Vec::from([CString::from(program)]));
    }
    let path = environment.iter().find_map(|word| word.to_bytes().strip_prefix(b"PATH=")).unwrap_or_default();
    let directories = path.split(|byte| *byte == b':').filter(|directory| !directory.is_empty());
    directories
        .map(|directory| {
            CString::new([directory, b"/", name].concat()).map_err(|_| refused(Errno::INVAL, "PATH holds a null byte"))
        })
        .collect()
}

/// The descriptors of a program about to start: its own three, and our ends.
struct Streams {
    theirs: [Fd; 3],
    input: Input,
    outputs: [Source; 2],
}

impl Streams {
    fn pipes() -> Result<Self, Errno> {
        let (input, to_input) = sys::pipe()?;
        let (from_output, output) = sys::pipe()?;
        let (from_errors, errors) = sys::pipe()?;
        // Ours only: the program's ends are open files of their own and stay blocking.
        for ours in [&to_input, &from_output, &from_errors] {
            ours.set_nonblocking()?;
        }
        Ok(Self {
            theirs: [input, output, errors],
            input: Input::Pipe { fd: to_input, watched: false },
            outputs: [Source::new(Some(from_output)), Source::new(Some(from_errors))],
        })
    }
}

/// Why the streams of a program could not be made, with the words for it.
fn no_streams(errno: Errno) -> StartError {
    refused(errno, "make the program's streams")
}

impl Program {
    /// Starts the program. `watch` adds one of its descriptors to the loop.
    pub(crate) fn start(
        exec: Exec,
        own_environment: &[&CStr],
        epoll: &Epoll,
        token: impl Fn(Stream) -> u64,
    ) -> Result<Self, StartError> {
        let Exec { argv, env, cwd, timeout_ms: _, terminal } = exec;
        if argv.len() + env.len() > EXEC_WORDS_MAX {
            return Err(refused(Errno::TOO_BIG, "too many arguments and environment words"));
        }
        let arguments = words(argv)?;
        let given = words(env)?;
        let directory = if cwd.is_empty() { CString::from(c"/") } else { word(cwd)? };
        let environment = environment(own_environment, &given)?;
        let program = arguments.first().ok_or_else(|| refused(Errno::INVAL, "no program is named"))?;
        let paths = candidates(program, &environment)?;

        let launch = |theirs: [&Fd; 3]| {
            let launch = Launch {
                paths: &paths,
                arguments: &arguments,
                environment: &environment,
                directory: &directory,
                streams: theirs,
                terminal: terminal.is_some(),
            };
            sys::spawn(&launch).map_err(|error| not_launched(error, program, &directory))
        };
        let (pid, input, outputs) = match terminal {
            None => {
                let Streams { theirs: [stdin, stdout, stderr], input, outputs } =
                    Streams::pipes().map_err(no_streams)?;
                (launch([&stdin, &stdout, &stderr])?, input, outputs)
            }
            Some(size) => {
                let (ours, theirs) = sys::open_terminal(size.rows, size.columns)
                    .map_err(|errno| refused(errno, "open a terminal for the program"))?;
                (launch([&theirs; 3])?, Input::Terminal, [Source::new(Some(ours)), Source::new(None)])
            }
        };
        for (source, stream) in outputs.iter().zip([Stream::Output, Stream::Errors]) {
            if let Some(fd) = &source.fd
                && let Err(errno) = epoll.add(fd, token(stream), Interest::Edges)
            {
                sys::kill_group(pid);
                return Err(refused(errno, "listen to the program"));
            }
        }
        Ok(Self {
            pid,
            terminal: terminal.is_some(),
            input,
            input_blocked: false,
            input_bytes: Vec::new(),
            input_written: 0,
            input_ends: false,
            outputs,
            timed_out: false,
            exit: None,
            grace_over: false,
        })
    }

    /// Its process id, which numbers its group too.
    pub(crate) const fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has not been reaped.
    pub(crate) const fn runs(&self) -> bool {
        self.exit.is_none()
    }

    /// Remembers what the loop heard of a descriptor.
    pub(crate) fn note(&mut self, stream: Stream, happened: Happened) {
        let [output, errors] = &mut self.outputs;
        let source = match stream {
            Stream::Input => {
                self.input_blocked = false;
                return;
            }
            Stream::Output => {
                if self.terminal && happened.writable {
                    self.input_blocked = false;
                }
                output
            }
            Stream::Errors => errors,
        };
        source.readable |= happened.readable;
        source.ending |= happened.peer_gone;
    }

    /// Moves output to the host's connection; says whether anything moved.
    pub(crate) fn pump_output(&mut self, scratch: &mut [u8], outgoing: &mut Outgoing) -> bool {
        let mut moved = false;
        for (index, source) in self.outputs.iter_mut().enumerate() {
            if !source.readable || !outgoing.has_room() {
                continue;
            }
            let Some(fd) = &source.fd else { continue };
            let room = scratch.len();
            match fd.read(scratch) {
                Ok(count @ 1..) => {
                    // A pipe gave all it had; a terminal gives what its line discipline had ready.
                    source.readable = count == room || source.ending || self.terminal;
                    source.owed = source.owed.saturating_sub(count);
                    for chunk in scratch.get(..count).unwrap_or_default().chunks(STREAM_CHUNK_BYTES) {
                        let bytes = chunk.to_vec();
                        let message = if index == 0 { FromGuest::Stdout(bytes) } else { FromGuest::Stderr(bytes) };
                        outgoing.push(&message);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    source.readable = false;
                    source.owed = 0;
                    continue;
                }
                // The end; a terminal ends with EIO.
                Ok(0) | Err(_) => *source = Source::new(None),
            }
            moved = true;
        }
        moved
    }

    /// Whether more of the host's input can be taken.
    pub(crate) fn takes_input(&self) -> bool {
        self.input_bytes.is_empty()
    }

    /// Takes bytes for standard input.
    pub(crate) fn give_input(&mut self, bytes: Vec<u8>) {
        if !matches!(self.input, Input::Closed) && !self.input_ends {
            self.input_bytes = bytes;
            self.input_written = 0;
        }
    }

    /// Ends standard input once what was given is written.
    pub(crate) fn end_input(&mut self) {
        if self.terminal && !self.input_ends {
            // A terminal stays open both ways: its reader is told as a person would.
            self.input_bytes.push(TERMINAL_END);
        }
        self.input_ends = true;
    }

    /// Moves input to the program; says whether anything moved.
    pub(crate) fn pump_input(&mut self, epoll: &Epoll, token: impl Fn(Stream) -> u64) -> bool {
        if self.input_bytes.is_empty() {
            if self.input_ends && matches!(self.input, Input::Pipe { .. }) {
                self.input = Input::Closed;
            }
            return false;
        }
        if self.input_blocked {
            return false;
        }
        let rest = self.input_bytes.get(self.input_written..).unwrap_or_default();
        let [terminal, _] = &self.outputs;
        let written = match (&self.input, &terminal.fd) {
            (Input::Pipe { fd, .. }, _) | (Input::Terminal, Some(fd)) => fd.write(rest),
            (Input::Terminal, None) | (Input::Closed, _) => Err(Errno::PIPE),
        };
        match written {
            Ok(count) => {
                self.input_written += count;
                self.input_blocked = count < rest.len();
            }
            Err(Errno::AGAIN) => self.input_blocked = true,
            Err(Errno::INTR) => {}
            Err(_) => {
                // The program does not read any more: what comes is dropped.
                self.input = Input::Closed;
                self.input_written = self.input_bytes.len();
            }
        }
        if self.input_written == self.input_bytes.len() {
            self.input_bytes = Vec::new();
            self.input_written = 0;
            self.input_blocked = false;
        }
        if self.input_blocked
            && let Input::Pipe { fd, watched } = &mut self.input
            && !*watched
        {
            // Only a program that is slower than its host costs this call.
            *watched = epoll.add(fd, token(Stream::Input), Interest::Edges).is_ok();
        }
        true
    }

    /// Sends a signal to its group.
    pub(crate) fn signal(&self, number: u8) {
        if self.runs() {
            // The group may be gone before it is reaped, and an unknown number is refused by the kernel.
            let _ = sys::send_signal_to_group(self.pid, number);
        }
    }

    /// Gives its terminal a new size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let [output, _] = &self.outputs;
        if self.terminal
            && let Some(fd) = &output.fd
        {
            let _ = sys::resize_terminal(fd, rows, columns);
        }
    }

    /// It was reaped. Says whether a stream is held open by something else, so that a time-limit for it is needed.
    pub(crate) fn ended(&mut self, exit: Exit) -> bool {
        self.exit = Some(if self.timed_out { Exit::TimedOut } else { exit });
        let mut held = false;
        for source in &mut self.outputs {
            if let Some(fd) = &source.fd
                && !source.ending
            {
                source.owed = fd.bytes_readable().unwrap_or(0);
                source.readable = true;
                held = true;
            }
        }
        held
    }

    /// Its time is over: kills it, or stops listening to who holds its streams.
    pub(crate) fn expire(&mut self) {
        if self.runs() {
            self.timed_out = true;
            sys::kill_group(self.pid);
        } else {
            self.grace_over = true;
        }
    }

    /// How it ended, once nothing more of it is to be delivered.
    pub(crate) fn finished(&self) -> Option<Exit> {
        let done = |source: &Source| source.fd.is_none() || (self.grace_over && source.owed == 0 && !source.ending);
        self.exit.filter(|_| self.outputs.iter().all(done))
    }
}

/// Ends the group of a program that the host no longer wants. It is reaped as any child.
impl Drop for Program {
    fn drop(&mut self) {
        if self.runs() {
            sys::kill_group(self.pid);
        }
    }
}

/// The words for a failed launch.
fn not_launched(error: LaunchError, program: &CStr, directory: &CStr) -> StartError {
    /// Bytes of a name that are repeated to the host.
    const NAME_BYTES_MAX: usize = 200;
    let name = |text: &CStr| {
        let bytes = text.to_bytes();
        format!("{}", bytes.get(..NAME_BYTES_MAX.min(bytes.len())).unwrap_or_default().escape_ascii())
    };
    let what = match error {
        LaunchError::Process(_) => String::from("make a process"),
        LaunchError::Streams(_) => String::from("give the program its streams"),
        LaunchError::Directory(_) => format!("enter directory {}", name(directory)),
        LaunchError::Program(_) => format!("start program {}", name(program)),
    };
    StartError { errno: error.errno(), what }
}
