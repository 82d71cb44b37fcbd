//! The `hearth` binary: hands the words on the command line to the agent, a VMM or the client, and tells in one place
//! what went wrong and with which exit code.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use hearth::agent::config::{self, Overrides, load};
use hearth::agent::log::LogFormat;
use hearth::cli::{self, AgentArgs, Cli, Command, Global, LedgerCommand, LedgerRestoreArgs, SupportBundleArgs};
use hearth::clock::{Clock, SystemClock};
use hearth::ctl;
use hearth::report::chain;
use hearth::{agent, api};
use serde_json::json;

use hearth::vmm::{self, VmmOptions};
use hearth::volumed;

/// A panic ends the process, in a build with the tests' profile too: that one unwinds, as a test harness has to, so that
/// programs and tests are made of one build of everything.
fn abort_at_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::abort();
    }));
}

/// Exit code of words that cannot be understood.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    if cfg!(panic = "unwind") {
        abort_at_panics();
    }
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
        Command::Volumed => match volumed::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        },
        Command::Ledger(LedgerCommand::Backup(args)) => ended(ctl::back_up_ledger(&cli.global, args.output.as_deref())),
        Command::Ledger(LedgerCommand::Restore(args)) => restore_ledger(args, &cli.global),
        Command::SupportBundle(args) => make_support_bundle(args, &cli.global),
        Command::Completions(args) => ended(ctl::print_completions(&cli.global, args.shell)),
        Command::Man(args) => ended(ctl::write_manual(&cli.global, args.dir.as_deref())),
        Command::Agent(args) => {
            if args.drain
                && let Some(code) = drain_running(&args, &cli.global)
            {
                return code;
            }
            run_agent(args, cli.global.socket)
        }
    }
}

/// The end of a command of the client.
fn ended(outcome: Result<(), ctl::Error>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&chain(&error), error.advice().as_deref());
            ExitCode::from(error.exit_code())
        }
    }
}

fn failed(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    tell(&chain(error), None);
    ExitCode::FAILURE
}

/// Puts a backup in the place of the ledger.
fn restore_ledger(args: LedgerRestoreArgs, global: &Global) -> ExitCode {
    let overrides = Overrides { config: args.config, state_dir: args.state_dir, ..Overrides::default() };
    let config = match load(overrides) {
        Ok(config) => config,
        Err(error) => return failed(&error),
    };
    match agent::restore_ledger(&config.state_dir, &args.backup, SystemClock::new().wall()) {
        Ok(old) => {
            let old = old.map(|path| path.display().to_string());
            let restored = json!({ "restored": args.backup.display().to_string(), "old": old });
            ended(ctl::print(global, &restored, |_| match &old {
                Some(old) => format!("restored; the ledger that was there is now {old}"),
                None => "restored; there was no ledger before".to_owned(),
            }))
        }
        Err(error) => failed(&error),
    }
}

/// Collects what helps to find out what went wrong.
fn make_support_bundle(args: SupportBundleArgs, global: &Global) -> ExitCode {
    let written = args.config.clone();
    let overrides = Overrides { config: args.config, state_dir: args.state_dir, ..Overrides::default() };
    let (config_file, config) = match load(overrides.clone()) {
        Ok(config) => {
            (written.or_else(|| Some(config::PATH_DEFAULT.into()).filter(|path: &PathBuf| path.exists())), config)
        }
        Err(error) => {
            tell(&chain(&error), Some("it goes on with the defaults"));
            match load(Overrides { config: Some("/dev/null".into()), ..overrides }) {
                Ok(config) => (written, config),
                Err(error) => return failed(&error),
            }
        }
    };
    let socket = global.socket.clone().unwrap_or_else(|| config.socket.clone());
    let now_s = SystemClock::new().wall().0 / 1_000_000_000;
    let output = args.output.unwrap_or_else(|| format!("hearth-support-{now_s}.tar").into());
    let request = agent::SupportRequest {
        output: &output,
        config_file: config_file.as_deref(),
        config: &config,
        said: ctl::collect(&socket),
        consoles: args.consoles,
        now_s,
    };
    match agent::support_bundle(request) {
        Ok(files) => {
            let made = json!({ "path": output.display().to_string(), "files": files });
            ended(ctl::print(global, &made, |_| {
                format!("{}: {} files; look through it before you hand it on", output.display(), files.len())
            }))
        }
        Err(error) => failed(&error),
    }
}

/// Has an agent that runs at the socket stop its VMs and end; `None` when there is none.
fn drain_running(args: &AgentArgs, global: &Global) -> Option<ExitCode> {
    let options = agent_options(args.clone(), global.socket.clone());
    // What is wrong with the configuration is said by the agent that is started instead.
    let config = load(options.overrides).ok()?;
    match ctl::drain(&config.socket, global.json)? {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            tell(&chain(&error), error.advice().as_deref());
            Some(ExitCode::from(error.exit_code()))
        }
    }
}

fn run_agent(args: AgentArgs, socket: Option<PathBuf>) -> ExitCode {
    match api::run(agent_options(args, socket)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&chain(&error), None);
            ExitCode::FAILURE
        }
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
