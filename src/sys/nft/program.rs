//! nft(8) as a process: text in, text out, in the calling thread's network namespace.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::process::Command;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Table;
use crate::sys::process;

/// Longest ruleset that is loaded or listed, in bytes.
pub const RULESET_BYTES_MAX: usize = 1 << 20;

/// How long nft may take. It takes some milliseconds, more while other rulesets are committed.
const LIMIT: Duration = Duration::from_secs(10);

/// How much of nft's complaints is passed on, in bytes.
const COMPLAINT_BYTES_MAX: u64 = 2048;

/// Why nft did not do what it was to.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// There is no nft.
    #[error("the program nft is not there: install nftables (Debian, Fedora: package nftables)")]
    Missing,
    /// It could not be run.
    #[error("run nft")]
    Run(#[source] io::Error),
    /// It was ended after 10 s; whether it had changed anything is not known.
    #[error("nft took more than 10 s")]
    TimedOut,
    /// It refused, and changed nothing.
    #[error("nft: {0}")]
    Refused(String),
    /// A ruleset of more than 1 MiB.
    #[error("a ruleset of more than {RULESET_BYTES_MAX} bytes")]
    TooLong,
}

/// Loads a ruleset: all of it in one transaction, or nothing. The calling thread's network namespace is meant; enter
/// another with `netns::in_fd`.
pub fn load(ruleset: &str) -> Result<(), NftError> {
    if ruleset.len() > RULESET_BYTES_MAX {
        return Err(NftError::TooLong);
    }
    run(&["-f", "-"], ruleset).map(drop)
}

/// What is in a table, as text that can be loaded, without what counters have counted. It refuses if there is none.
pub fn list(table: Table<'_>) -> Result<String, NftError> {
    let family = table.family.to_string();
    run(&["--stateless", "list", "table", &family, table.name], "")
}

/// Runs nft to its end. Its input and outputs are files in memory: neither side ever waits for the other.
fn run(words: &[&str], input: &str) -> Result<String, NftError> {
    let memory = |name| memfd_create(name, MFdFlags::MFD_CLOEXEC).map(File::from).map_err(io::Error::from);
    let prepare = || -> io::Result<[File; 3]> {
        let mut stdin = memory("nft-input")?;
        stdin.write_all(input.as_bytes())?;
        stdin.rewind()?;
        Ok([stdin, memory("nft-output")?, memory("nft-errors")?])
    };
    let [stdin, mut stdout, mut stderr] = prepare().map_err(NftError::Run)?;
    let mut command = Command::new("nft");
    command.args(words).env("LC_ALL", "C").stdin(stdin);
    command.stdout(stdout.try_clone().map_err(NftError::Run)?).stderr(stderr.try_clone().map_err(NftError::Run)?);
    let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let mut child =
        command.spawn().map_err(|error| if missing(&error) { NftError::Missing } else { NftError::Run(error) })?;
    let status = process::wait_at_most(&mut child, LIMIT).map_err(NftError::Run)?.ok_or(NftError::TimedOut)?;
    if !status.success() {
        let mut complaint = Vec::new();
        stderr.rewind().map_err(NftError::Run)?;
        stderr.take(COMPLAINT_BYTES_MAX).read_to_end(&mut complaint).map_err(NftError::Run)?;
        let complaint = String::from_utf8_lossy(&complaint).trim().to_owned();
        return Err(NftError::Refused(if complaint.is_empty() { status.to_string() } else { complaint }));
    }
    stdout.rewind().map_err(NftError::Run)?;
    let mut output = String::new();
    let limit = u64::try_from(RULESET_BYTES_MAX).unwrap_or(u64::MAX);
    stdout.take(limit + 1).read_to_string(&mut output).map_err(NftError::Run)?;
    if output.len() > RULESET_BYTES_MAX { Err(NftError::TooLong) } else { Ok(output) }
}
