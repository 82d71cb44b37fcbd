//! `hearth support-bundle`: one archive with what helps to find out what went wrong on a host, made with or without a
//! running agent. What goes in is listed, in every part: a value that is not known to be harmless stays out.

mod redact;

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tar::{Builder, Header};

use super::config::Config;
use super::ledger::backup;
use super::log::log_files;
use crate::net::desired::jail_name;
use crate::net::rules::host_tag;
use crate::report::chain;
use crate::wire::console_ring;

/// Bytes of the end of each log file that are taken.
const LOG_BYTES: u64 = 4 << 20;

/// Bytes of the end of a VMM's log that are taken.
const VMM_LOG_BYTES: u64 = 16 * 1024;

/// VMs whose consoles are taken at most, and namespaces that are looked at.
const OBJECTS_MAX: usize = 64;

/// How long a program that is asked may take, in seconds, and most of its answer that is taken.
const PROGRAM_LIMIT_S: &str = "10";
const PROGRAM_BYTES: u64 = 4 << 20;

/// Directory of named network namespaces: `ip netns` and this program use the same.
const NAMESPACES: &str = "/run/netns";

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
#[error("write the support bundle {}", path.display())]
pub struct SupportError {
    /// Where.
    pub path: PathBuf,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

/// What to put together.
#[derive(Debug)]
pub struct SupportRequest<'a> {
    /// Where to.
    pub output: &'a Path,
    /// The configuration file, if there is one.
    pub config_file: Option<&'a Path>,
    /// What it says.
    pub config: &'a Config,
    /// What the agent says of itself, by file name.
    pub said: Vec<(&'static str, Vec<u8>)>,
    /// Whether guests' consoles and VMMs' logs go in.
    pub consoles: bool,
    /// Seconds since the epoch, for the files' times.
    pub now_s: u64,
}

/// Puts the archive together; gives the names of its files.
pub fn support_bundle(request: SupportRequest<'_>) -> Result<Vec<String>, SupportError> {
    let failed = |source| SupportError { path: request.output.to_owned(), source };
    let mut options = std::fs::OpenOptions::new();
    // Whoever may read it is its owner's choice.
    std::os::unix::fs::OpenOptionsExt::mode(options.write(true).create_new(true), 0o600);
    let file = options.open(request.output).map_err(failed)?;
    let mut archive = Archive { builder: Builder::new(file), names: Vec::new(), now_s: request.now_s };
    fill(&mut archive, &request).map_err(failed)?;
    let Archive { builder, names, .. } = archive;
    builder.into_inner().and_then(|file| file.sync_all()).map_err(failed)?;
    Ok(names)
}

struct Archive {
    builder: Builder<std::fs::File>,
    names: Vec<String>,
    now_s: u64,
}

impl Archive {
    fn add(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.now_s);
        self.builder.append_data(&mut header, format!("hearth-support/{name}"), bytes)?;
        self.names.push(name.to_owned());
        Ok(())
    }
}

fn fill(archive: &mut Archive, request: &SupportRequest<'_>) -> io::Result<()> {
    let state_dir = &request.config.state_dir;
    archive.add("versions.txt", versions().as_bytes())?;
    for (name, text) in &request.said {
        archive.add(name, text)?;
    }
    let config = match request.config_file.map(std::fs::read_to_string) {
        Some(Ok(text)) => redact::config(&text),
        Some(Err(error)) => format!("# the configuration cannot be read: {error}\n"),
        None => "# no configuration file\n".to_owned(),
    };
    archive.add("hearth.toml", config.as_bytes())?;
    let ledger = match backup::dump(&state_dir.join("ledger.db")) {
        Ok(tables) => serde_json::to_vec_pretty(&tables).unwrap_or_default(),
        Err(error) => format!("the ledger cannot be read: {}\n", chain(&error)).into_bytes(),
    };
    archive.add("ledger.json", &ledger)?;
    for path in log_files(state_dir) {
        if let (Ok(text), Some(name)) = (end_of(&path, LOG_BYTES), path.file_name().and_then(|name| name.to_str())) {
            archive.add(name, &text)?;
        }
    }
    archive.add("network/host.txt", &asked(&[&["ip", "-d", "addr"], &["ip", "-6", "route"], &["ip", "route"]]))?;
    let ours = host_tag(request.config.network_number());
    let tables = [&["nft", "list", "table", "inet", &ours][..], &["nft", "list", "tables"]];
    archive.add("network/nft.txt", &asked(&tables))?;
    let first = jail_name(request.config.network_number(), 0);
    let tag = first.trim_end_matches('0');
    for name in names_in(Path::new(NAMESPACES)).into_iter().filter(|name| name.starts_with(tag)).take(OBJECTS_MAX) {
        let within = ["ip", "netns", "exec", &name];
        let ask = |words: &[&'static str]| [&within[..], words].concat();
        let questions = [ask(&["ip", "-d", "addr"]), ask(&["ip", "-6", "route"]), ask(&["nft", "list", "ruleset"])];
        let questions: Vec<&[&str]> = questions.iter().map(Vec::as_slice).collect();
        archive.add(&format!("network/{name}.txt"), &asked(&questions))?;
    }
    if request.consoles {
        consoles(archive, &state_dir.join("vms"))?;
    }
    let mut list = archive.names.join("\n");
    list.push('\n');
    archive.add("contents.txt", list.as_bytes())
}

/// The ends of guests' consoles and of VMMs' logs.
fn consoles(archive: &mut Archive, vms: &Path) -> io::Result<()> {
    for vm in names_in(vms).into_iter().take(OBJECTS_MAX) {
        let ring =
            end_of(&vms.join(&vm).join("console"), (console_ring::HEADER_BYTES + console_ring::RING_BYTES) as u64);
        if let Some(history) = ring.ok().and_then(|ring| console_ring::history(&ring)) {
            archive.add(&format!("vms/{vm}/console.txt"), &history)?;
        }
        for name in ["vmm.log", "last-words"] {
            if let Ok(text) = end_of(&vms.join(&vm).join(name), VMM_LOG_BYTES) {
                archive.add(&format!("vms/{vm}/{name}"), &text)?;
            }
        }
    }
    Ok(())
}

fn versions() -> String {
    let mut text = format!("hearth {}\n", env!("CARGO_PKG_VERSION"));
    if let Ok(system) = nix::sys::utsname::uname() {
        for part in [system.sysname(), system.release(), system.version(), system.machine()] {
            text.push_str(&part.to_string_lossy());
            text.push('\n');
        }
    }
    text.push_str(&std::fs::read_to_string("/etc/os-release").unwrap_or_default());
    text
}

/// The sorted names in a directory.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The end of a regular file.
fn end_of(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let Some(mut file) = crate::sys::file::open_regular(path)? else { return Err(io::ErrorKind::NotFound.into()) };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What programs of the host answer. Each has a time-out and a bound; one that is not there is told.
fn asked(questions: &[&[&str]]) -> Vec<u8> {
    let mut all = Vec::new();
    for words in questions {
        // Writing to a vector does not fail.
        let _ = writeln!(all, "$ {}", words.join(" "));
        match answer(words) {
            Ok(text) => all.extend(text),
            Err(error) => {
                let _ = writeln!(all, "({error})");
            }
        }
        all.push(b'\n');
    }
    all
}

fn answer(words: &[&str]) -> io::Result<Vec<u8>> {
    let mut command = Command::new("timeout");
    command.arg(PROGRAM_LIMIT_S).args(words).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let mut text = Vec::new();
    if let Some(output) = child.stdout.take() {
        output.take(PROGRAM_BYTES).read_to_end(&mut text)?;
    }
    let status = child.wait()?;
    if !status.success() {
        let _ = writeln!(text, "({status})");
    }
    Ok(text)
}
