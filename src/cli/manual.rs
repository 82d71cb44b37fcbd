//! `hearth completions` and `hearth man`: what the command line says of itself, for shells and for man(1). Both are made
//! of the same definition that words are checked against, so they cannot say anything else.

use std::fmt::Write;
use std::path::PathBuf;

use clap::builder::Resettable;
use clap::{Args, Command, CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::Cli;

/// The program, as it is called.
const PROGRAM: &str = "hearth";

/// The section of the manual for programs.
const SECTION: &str = "1";

/// An empty word of a roff request. A date would change with every build.
const NO_DATE: &str = "\"\"";

pub(super) const COMPLETIONS_HELP: &str = "\
The script completes commands, options and their words; names of VMs are not asked for.

Examples:
  source <(hearth completions bash)                                         in this shell
  hearth completions bash > /usr/share/bash-completion/completions/hearth   for everybody
  hearth completions zsh > /usr/local/share/zsh/site-functions/_hearth
  hearth completions fish > /usr/share/fish/vendor_completions.d/hearth.fish";

pub(super) const MAN_HELP: &str = "\
Pages are called after the words of their command: hearth-vm-launch(1) is that of `hearth vm launch`. Pages that are there
already are replaced.

Examples:
  hearth man | man -l -                             read the page of the whole
  hearth man --dir /usr/local/share/man/man1        write all of them, for `man hearth-vm`";

/// `hearth completions`.
#[derive(Debug, Clone, Copy, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: ShellWord,
}

/// A shell that completes words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ShellWord {
    /// bash 4 or newer
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

impl ShellWord {
    /// As it is written on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bash => "bash",
            Self::Zsh => "zsh",
            Self::Fish => "fish",
        }
    }
}

/// `hearth man`.
#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// Write one page for every command into this directory, which has to be there
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// A page of the manual.
#[derive(Debug, Clone)]
pub struct Page {
    /// Name of its file: `hearth-vm-launch.1`.
    pub file: String,
    /// The page, in roff with the macros of man(7).
    pub text: String,
}

/// The script for a shell.
pub fn completions(shell: ShellWord) -> String {
    let shell = match shell {
        ShellWord::Bash => Shell::Bash,
        ShellWord::Zsh => Shell::Zsh,
        ShellWord::Fish => Shell::Fish,
    };
    // The generators offer hidden commands too: they get a definition without them.
    let whole = Cli::command();
    let shown = whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let mut offered = Command::new(PROGRAM).args(whole.get_arguments().cloned()).subcommands(shown);
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut offered, PROGRAM, &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The page of the whole: hearth(1).
pub fn first_page() -> Page {
    page(&built(), None)
}

/// The pages of all commands that are shown, the one of the whole first.
pub fn pages() -> Vec<Page> {
    let mut pages = Vec::new();
    collect(&built(), None, &mut pages);
    pages
}

fn built() -> Command {
    let mut whole = Cli::command().disable_help_subcommand(true);
    whole.build();
    whole
}

fn collect(command: &Command, parent: Option<&str>, pages: &mut Vec<Page>) {
    pages.push(page(command, parent));
    let name = title(command);
    for inner in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        collect(inner, Some(&name), pages);
    }
}

/// `hearth-vm-launch`.
fn title(command: &Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned()
}

fn page(command: &Command, parent: Option<&str>) -> Page {
    let notes = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let mut command = command.clone();
    let usage = command.render_usage().to_string();
    let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage).to_owned();
    let file = format!("{}.{SECTION}", title(&command));
    // The notes are set here; the version stands at the foot of the page.
    let described = command.override_usage(usage).after_help(Resettable::Reset).version(Resettable::Reset);
    let source = format!("{PROGRAM} {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(described).section(SECTION).date(NO_DATE).source(source).manual("Hearth");
    let mut text = Vec::new();
    // Writing to memory does not fail.
    let _ = man.render(&mut text);
    let _ = after(&notes, parent).to_writer(&mut text);
    Page { file, text: ascii(&String::from_utf8_lossy(&text)) }
}

/// Other characters by their numbers: not every formatter is told how its input is encoded.
fn ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            out.push(character);
        } else {
            // Writing to a string does not fail.
            let _ = write!(out, "\\[u{:04X}]", u32::from(character));
        }
    }
    out
}

/// What stands behind a command's help: prose is filled, indented lines stay as they are, examples get a heading.
fn after(notes: &str, parent: Option<&str>) -> Roff {
    let mut roff = Roff::new();
    let (mut is_headed, mut is_kept) = (false, false);
    for line in notes.lines() {
        let indented = line.starts_with(' ');
        if is_kept && !indented {
            roff.control("fi", []).control("RE", []);
            is_kept = false;
        }
        if matches!(line, "Example:" | "Examples:") {
            roff.control("SH", ["EXAMPLES"]);
            is_headed = true;
            continue;
        }
        if !is_headed {
            roff.control("SH", ["NOTES"]);
            is_headed = true;
        }
        if indented && !is_kept {
            roff.control("RS", ["2"]).control("nf", []);
            is_kept = true;
        }
        match line.trim() {
            "" => roff.control("PP", []),
            _ if is_kept => roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]),
            words => roff.text([roman(words)]),
        };
    }
    if is_kept {
        roff.control("fi", []).control("RE", []);
    }
    if let Some(parent) = parent {
        roff.control("SH", ["SEE ALSO"]).text([bold(parent), roman(format!("({SECTION})"))]);
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_is_filled_and_examples_stay_as_they_are() {
        let notes = "Some prose\nthat goes on.\n\nExamples:\n  hearth  a\n    b 'c'\n\nMore.";
        let roff = after(notes, Some("hearth-vm")).to_roff();
        let wanted = ".SH NOTES\nSome prose\nthat goes on.\n.PP\n.SH EXAMPLES\n.RS 2\n.nf\nhearth  a\n  b 'c'\n.fi\n.RE\n.PP\n\
                      More.\n.SH \"SEE ALSO\"\n\\fBhearth\\-vm\\fR(1)\n";
        assert_eq!(roff, wanted);
        assert_eq!(after("", None).to_roff(), "");
        assert_eq!(ascii("a → b"), "a \\[u2192] b");
    }

    #[test]
    fn every_command_that_is_shown_has_a_page_of_its_own() {
        let files: Vec<String> = pages().into_iter().map(|page| page.file).collect();
        assert_eq!(files[0], "hearth.1");
        for wanted in ["hearth-vm.1", "hearth-vm-launch.1", "hearth-man.1", "hearth-agent.1"] {
            assert!(files.iter().any(|file| file == wanted), "{wanted} in {files:?}");
        }
        for hidden in ["hearth-vmm.1", "hearth-help.1", "hearth-vm-help.1"] {
            assert!(files.iter().all(|file| file != hidden), "{hidden} in {files:?}");
        }
    }
}
