//! Running a calculation in its member: by the guest's agent, as an exec. What goes wrong before the program may have
//! begun is a failure; after that, nobody knows how far it came, and it is lost.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::Agent;
use super::calculation_record::{
    CalculationCause, CalculationOutput, CalculationRecord, CalculationState, OUTPUT_BYTES_MAX,
};
use super::exec::{self, ExecError, ExecExit, ExecInput, ExecOutput, ExecSession, ExecSpec};
use super::guest::printable;
use super::record::VmRecord;
use super::world::{Records, World};
use crate::clock::Clock;
use crate::report::chain;

/// How long after a calculation's time a guest may take to say that it has killed it.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// The end of a stream that is kept up to a bound.
#[derive(Debug, Default)]
struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Kept {
    fn add(&mut self, bytes: &[u8]) {
        let room = OUTPUT_BYTES_MAX.saturating_sub(self.bytes.len()).min(bytes.len());
        self.bytes.extend_from_slice(&bytes[..room]);
        self.truncated |= room < bytes.len();
    }
}

/// What a program wrote so far.
#[derive(Debug, Default)]
struct Written {
    stdout: Kept,
    stderr: Kept,
}

impl<W: World> Agent<W> {
    /// Runs a calculation that was given to `member`, and writes how it ended.
    pub(super) async fn calculate(self, mut record: CalculationRecord, member: Arc<VmRecord>) {
        let mut written = Written::default();
        let state = self.run_in_member(&record, &member, &mut written).await;
        let Written { stdout, stderr } = written;
        (record.stdout_truncated, record.stderr_truncated) = (stdout.truncated, stderr.truncated);
        let output = CalculationOutput { stdout: stdout.bytes, stderr: stderr.bytes };
        let id = record.id.clone();
        if let Err(error) = self.end_calculation(record, state, Some(output)).await {
            self.shared.declare_broken(&error);
        }
        self.shared.calculations.ended(&id);
    }

    async fn run_in_member(
        &self,
        record: &CalculationRecord,
        member: &VmRecord,
        written: &mut Written,
    ) -> CalculationState {
        let id = record.id.clone();
        let stdin = match self.shared.world.records().with(move |store| store.calculation_input(&id)).await {
            Ok(stdin) => stdin,
            Err(error) => return not_started(&error),
        };
        let left_ns = record.deadline().0.saturating_sub(self.shared.world.clock().wall().0);
        let left = Duration::from_nanos(left_ns).max(Duration::from_millis(1));
        let spec = ExecSpec {
            argv: record.argv.clone(),
            env: record.env.clone(),
            timeout_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX),
            ..ExecSpec::default()
        };
        let link = match self.guest_link(member).await {
            Ok(link) => link,
            Err(error) => return not_started(&error),
        };
        let session = match exec::start(link, spec).await {
            Ok(session) => session,
            Err(error @ (ExecError::Invalid { .. } | ExecError::NotStarted { .. })) => return not_started(&error),
            Err(error @ ExecError::Guest { .. }) => return lost(&chain(&error)),
        };
        tokio::select! {
            biased;
            ended = attend(session, stdin, written) => match ended {
                Ok(ExecExit::Code(0)) => CalculationState::Succeeded,
                Ok(ExecExit::Code(code)) => failed(CalculationCause::ExitCode { code }),
                Ok(ExecExit::Signal(number)) => failed(CalculationCause::Signal { number }),
                Ok(ExecExit::TimedOut) => failed(CalculationCause::TimedOut),
                Err(error) => lost(&format!("its member ended or stopped to answer: {}", chain(&error))),
            },
            () = sleep(left + KILL_LIMIT) => lost("its member does not answer any more"),
        }
    }
}

/// Feeds a program and reads what it writes, side by side, until it ends.
async fn attend(session: ExecSession, stdin: Vec<u8>, written: &mut Written) -> Result<ExecExit, ExecError> {
    let ExecSession { mut output, mut input } = session;
    let feeding = async {
        // A program that does not read all of it may end well all the same.
        if stdin.is_empty() || input.send(ExecInput::Stdin(stdin)).await.is_ok() {
            let _ = input.send(ExecInput::StdinClosed).await;
        }
        std::future::pending::<()>().await;
    };
    let reading = async {
        loop {
            match output.next().await? {
                ExecOutput::Stdout(bytes) => written.stdout.add(&bytes),
                ExecOutput::Stderr(bytes) => written.stderr.add(&bytes),
                ExecOutput::Exited(exit) => return Ok(exit),
            }
        }
    };
    tokio::select! {
        ended = reading => ended,
        () = feeding => Ok(ExecExit::TimedOut),
    }
}

const fn failed(cause: CalculationCause) -> CalculationState {
    CalculationState::Failed { cause }
}

fn not_started(error: &(dyn std::error::Error + 'static)) -> CalculationState {
    failed(CalculationCause::NotStarted { detail: printable(&chain(error)) })
}

fn lost(detail: &str) -> CalculationState {
    CalculationState::Lost { detail: printable(detail) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_output_is_kept() {
        let mut kept = Kept::default();
        kept.add(&vec![1; OUTPUT_BYTES_MAX - 1]);
        kept.add(&[2]);
        assert!(!kept.truncated);
        kept.add(&[]);
        assert!(!kept.truncated);
        kept.add(&[3]);
        assert!(kept.truncated && kept.bytes.len() == OUTPUT_BYTES_MAX && kept.bytes.last() == Some(&2));
    }
}
