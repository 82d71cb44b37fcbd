//! `probe`: makes and counts traffic, inside guests and network namespaces, for tests.
//!
//! Each verb ends by itself within a time that is given or bounded, prints JSON lines (the last one is the result) and
//! exits 0 when what was asked for happened, 1 when not, 2 when the words make no sense.
#![expect(clippy::disallowed_methods, reason = "a tool of its own that measures by the clock of where it runs")]

mod ask;
mod cpu;
mod hold;
mod packet;
mod ping;
mod report;
mod rewrite;
mod send;
mod serve;
mod stall;
mod stdin;
mod stream;
mod tsc;
mod words;

use std::process::ExitCode;

use words::Words;

const USAGE: &str = "\
probe serve --seconds N [--port P]
      echoes TCP and UDP over IPv4 and IPv6; says when it listens, and at the end what it served
probe ask tcp|udp ADDRESS PORT [--bytes N] [--count K] [--wait-ms W] [--from ADDRESS] [--text WORD]
      sends N bytes K times, each after the answer to the one before or W milliseconds; fails unless all come back
probe ask stream ADDRESS PORT [--bytes N] [--count K] [--every-ms E] [--wait-ms W] [--while stdin]
      the same on one TCP connection; fails when it is cut; told by its standard input when to end, it says when it was
      answered first
probe ping ADDRESS [--bytes N] [--count K] [--wait-ms W]
      the same by ICMP or ICMPv6 echo
probe forge --interface I --gateway-mac M --to6 A [--to4 A] --as6 A [--as4 A] --own6 A [--own4 A]
            --marker WORD [--repeat N] KIND...|all
      sends raw frames of these kinds, that are to reach --to6/--to4, pretending to be --as6/--as4
probe count --interface I --marker WORD --seconds N [--until WORD]
      counts frames that carry the marker and come in, by kind; says when it listens; a frame with the other word ends it
probe send udp ADDRESS PORT --rate R --seconds N [--bytes B] [--stream S] [--from ADDRESS] [--while stdin]
      sends R numbered datagrams in a second; the last ones say how many there were
probe count udp PORT --seconds N [--stream S] [--first K] [--read late] [--while stdin]
      counts them until all are there, and says which were lost, came twice or out of order, or were changed on the way;
      late: begins to read what came when the standard input is closed
probe watch --interface I --seconds N [--stream S] [--while stdin]
      counts those in frames that leave by an interface, and all frames that do
probe stall --seconds N [--cpus C,C...] [--gap-us G] [--while stdin]
      looks at the time stamp counter all the time, on each of these processors, and tells when it did not get to look
probe rewrite --mib M --seconds N [--every-ms E | --mb-per-s R] [--cpu C] [--while stdin]
      writes a buffer again and again, 256 KiB at once, and looks each time whether it is as it was written; says a few
      times a second how much it has written; rests E milliseconds after each part (10), or as long as it takes to
      write R million bytes a second after the first time
probe hold --mib M --seconds N [--while stdin]
      fills so much memory with random words, says when it is full, and keeps it
probe kinds
      the kinds of frames
ADDRESS may name an interface: fe80::1%eth0. PORT is 7777 where it may be left out.
With --while stdin a verb ends earlier: when its standard input is closed.";

fn main() -> ExitCode {
    let mut words = Words::new(std::env::args().skip(1));
    let done = match words.next().as_deref() {
        Some("serve") => serve::run(words),
        Some("ask") => ask::run(words),
        Some("ping") => ping::run(words),
        Some("forge") => packet::forge(words),
        Some("count") => match words.next().as_deref() {
            Some("udp") => stream::count(words),
            None => packet::count(words),
            Some(other) => Err(ProbeError::Words(format!("count {other}?"))),
        },
        Some("send") => send::run(words),
        Some("watch") => stream::watch(words),
        Some("stall") => stall::run(words),
        Some("rewrite") => rewrite::run(words),
        Some("hold") => hold::run(words),
        Some("kinds") => packet::kinds(),
        Some(_) | None => Err(ProbeError::Words(String::from("which verb?"))),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(ProbeError::Words(why)) => {
            eprintln!("probe: {why}\n{USAGE}");
            ExitCode::from(2)
        }
        Err(ProbeError::System(what, error)) => {
            eprintln!("probe: {what}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Why a verb could not do its work.
#[derive(Debug)]
enum ProbeError {
    /// The command line makes no sense.
    Words(String),
    /// What failed, and what the system said.
    System(&'static str, std::io::Error),
}

/// Puts words to a system's error.
fn failed<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> ProbeError {
    move |error| ProbeError::System(what, error.into())
}
