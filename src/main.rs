//! The `hearth` binary: hands the words on the command line to the agent, a VMM or the client, and tells in one place
//! what went wrong and with which exit code.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use hearth::agent::config::Overrides;
use hearth::agent::log::LogFormat;
use hearth::api;
use hearth::cli::{self, AgentArgs, Cli, Command};
use hearth::ctl;
use hearth::report::chain;
use hearth::vmm::{self, VmmOptions};

/// Exit code of words that cannot be understood.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = match Cli::parse_checked(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are "errors" that go to standard output and succeed.
            let code = if error.use_stderr() { EXIT_USAGE } else { ctl::EXIT_DONE };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    match cli.command {
        Command::Client(command) => match ctl::run(&cli.global, command) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                tell(&chain(&error), error.advice().as_deref());
                ExitCode::from(error.exit_code())
            }
        },
        Command::Vmm(args) => {
            let options = if args.probe { VmmOptions::Probe } else { VmmOptions::Serve };
            match vmm::run(options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    tell(&chain(&error), None);
                    ExitCode::FAILURE
                }
            }
        }
        Command::Agent(args) => match api::run(agent_options(args, cli.global.socket)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tell(&chain(&error), None);
                ExitCode::FAILURE
            }
        },
    }
}

fn agent_options(args: AgentArgs, socket: Option<PathBuf>) -> api::RunOptions {
    api::RunOptions {
        overrides: Overrides {
            config: args.config,
            state_dir: args.state_dir,
            socket,
            images_dir: std::env::var_os("HEARTH_IMAGES").map(PathBuf::from),
        },
        drain: args.drain,
        log_format: match args.log_format {
            cli::LogFormat::Human => LogFormat::Human,
            cli::LogFormat::Json => LogFormat::Json,
        },
    }
}

/// What was not done and why; what to do.
fn tell(error: &str, advice: Option<&str>) {
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(stderr, "error: {error}");
    if let Some(advice) = advice {
        let _ = writeln!(stderr, "help: {advice}");
    }
}
