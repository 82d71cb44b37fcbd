//! The traffic tool of the tests in a guest: it watches the guest's clock, writes its memory, fills it. It is copied
//! there by the standard input of a command, and runs cut off from the command that started it, which a migration cuts
//! off; a pipe that another program holds open tells it to go on.

use std::path::Path;

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::BenchError;
use super::seen::{Stalls, Written};
use crate::api::stream::Exit;
use crate::ctl::call::Agent;
use crate::ctl::exec;

/// Where it is in a guest.
const PATH: &str = "/tmp/probe";

/// Longer than any bench, in seconds.
const LONG: u32 = 1_000_000;

/// Most characters of what a guest said that an error shows.
const EXCERPT_CHARS_MAX: usize = 300;

/// Runs a script in a guest; gives its standard output.
async fn script(agent: &Agent, vm: &str, what: &'static str, script: &str, input: Bytes) -> Result<String, BenchError> {
    let ran = exec::collected(agent, vm, &["sh", "-c", script], input).await;
    let not_run = |source| BenchError::InGuest { what, vm: vm.to_owned(), source: Box::new(source) };
    let (exit, stdout, stderr) = ran.map_err(not_run)?;
    match exit {
        Exit::Code(0) => Ok(stdout),
        Exit::Code(_) | Exit::Signal(_) | Exit::TimedOut => {
            let said: String = format!("{stderr}{stdout}").trim().chars().take(EXCERPT_CHARS_MAX).collect();
            Err(BenchError::Probe { what, vm: vm.to_owned(), reason: format!("{exit:?}: {said}") })
        }
    }
}

/// Copies the tool into a guest.
pub(super) async fn install(agent: &Agent, vm: &str, file: &Path) -> Result<(), BenchError> {
    let tool = tokio::fs::read(file).await.map_err(|source| BenchError::File { path: file.to_owned(), source })?;
    let copy = format!("cat > {PATH} && chmod +x {PATH} && {PATH} kinds > /dev/null");
    script(agent, vm, "copy the traffic tool", &copy, tool.into()).await.map(drop)
}

/// The tool at work in a guest.
#[derive(Debug)]
pub(super) struct Running {
    /// Its files are named so.
    name: &'static str,
}

impl Running {
    /// Begins to look at the clock all the time, on the first processor.
    pub(super) async fn stall(agent: &Agent, vm: &str) -> Result<Self, BenchError> {
        Self::start(agent, vm, "stall", &format!("stall --cpus 0 --seconds {LONG}"), r#""watching":true"#).await
    }

    /// Begins to write so many MiB again and again on a processor, at so many million bytes a second or as fast as it
    /// can. They were written once when this returns.
    pub(super) async fn rewrite(
        agent: &Agent,
        vm: &str,
        (mib, cpu): (u64, u32),
        mb_per_s: Option<u32>,
    ) -> Result<Self, BenchError> {
        let pace = mb_per_s.map_or_else(|| "--every-ms 0".to_owned(), |rate| format!("--mb-per-s {rate}"));
        let words = format!("rewrite --mib {mib} --cpu {cpu} {pace} --seconds {LONG}");
        Self::start(agent, vm, "rewrite", &words, r#""passes":1,"#).await
    }

    /// Fills so many MiB with random data. They are filled when this returns, and stay.
    pub(super) async fn hold(agent: &Agent, vm: &str, mib: u64) -> Result<Self, BenchError> {
        Self::start(agent, vm, "hold", &format!("hold --mib {mib} --seconds {LONG}"), r#""filled":true"#).await
    }

    /// Starts it and waits until it has said `ready`.
    async fn start(agent: &Agent, vm: &str, name: &'static str, words: &str, ready: &str) -> Result<Self, BenchError> {
        // Whoever reads from a pipe that nobody writes to has read all of it: so somebody holds it open.
        let start = format!(
            "cd /tmp && rm -f {name}.on {name}.said && mknod {name}.on p || exit 1
setsid sh -c 'echo $$ > {name}.holder; exec sleep {LONG} > {name}.on' < /dev/null > /dev/null 2>&1 &
setsid {PATH} {words} --while stdin < {name}.on > {name}.said 2>&1 &
echo $! > {name}.pid
until case $(cat {name}.said 2> /dev/null) in *'{ready}'*) true ;; *) false ;; esac; do
  [ -d /proc/$! ] || {{ cat {name}.said; exit 1; }}
  sleep 0.3
done"
        );
        script(agent, vm, "start the traffic tool", &start, Bytes::new()).await?;
        Ok(Self { name })
    }

    /// Ends it; gives what it said, line by line.
    async fn end(self, agent: &Agent, vm: &str) -> Result<String, BenchError> {
        let name = self.name;
        let end = format!(
            "cd /tmp && kill $(cat {name}.holder) && read pid < {name}.pid || exit 1
while [ -d /proc/$pid ]; do sleep 0.1; done
cat {name}.said; rm -f {name}.*"
        );
        script(agent, vm, "end the traffic tool", &end, Bytes::new()).await
    }

    /// Ends one that looked at the clock.
    pub(super) async fn stalls(self, agent: &Agent, vm: &str) -> Result<Stalls, BenchError> {
        let said = self.end(agent, vm).await?;
        said.lines().last().map_or_else(|| not_said(vm, &said), |line| parsed(vm, line))
    }

    /// Ends one that wrote memory: how much it had written when.
    pub(super) async fn written(self, agent: &Agent, vm: &str) -> Result<Vec<Written>, BenchError> {
        let said = self.end(agent, vm).await?;
        let lines: Vec<Written> = said.lines().map(|line| parsed(vm, line)).collect::<Result<_, _>>()?;
        match lines.last() {
            Some(last) if last.wrong == 0 => Ok(lines),
            Some(_) | None => not_said(vm, said.lines().last().unwrap_or_default()),
        }
    }

    /// Ends one that held memory.
    pub(super) async fn let_go(self, agent: &Agent, vm: &str) -> Result<(), BenchError> {
        self.end(agent, vm).await.map(drop)
    }
}

fn parsed<T: DeserializeOwned>(vm: &str, line: &str) -> Result<T, BenchError> {
    serde_json::from_str(line).or_else(|_| not_said(vm, line))
}

/// It has not said what it has to say, but something else, as when memory is not what it wrote.
fn not_said<T>(vm: &str, said: &str) -> Result<T, BenchError> {
    let said: String = said.chars().take(EXCERPT_CHARS_MAX).collect();
    Err(BenchError::Probe { what: "end the traffic tool", vm: vm.to_owned(), reason: format!("it said {said:?}") })
}
