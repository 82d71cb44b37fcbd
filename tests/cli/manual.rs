//! `hearth completions` and `hearth man`: bash takes the script and completes by it, pages are there for all commands and
//! are set without a warning.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::run::{hearth, output, text};

/// What bash offers for the last of these words.
fn offered(script: &Path, words: &[&str]) -> BTreeSet<String> {
    let at = words.len() - 1;
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let (current, previous) = (&quoted[at], &quoted[at - 1]);
    let drive = format!(
        "source '{}'; COMP_WORDS=({}); COMP_CWORD={at}; _hearth hearth {current} {previous}; \
         printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script.display(),
        quoted.join(" ")
    );
    let found = Command::new("bash").args(["--norc", "-c", &drive]).stdin(Stdio::null()).output().expect("run bash");
    assert_eq!((found.status.code(), text(&found.stderr)), (Some(0), String::new()), "{words:?}");
    text(&found.stdout).lines().map(str::to_owned).collect()
}

#[test]
fn bash_takes_the_script_and_completes_by_it() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let script = file.path();
    let made = hearth(&["completions", "bash"]).stdout(file.reopen().expect("the file")).output().expect("run hearth");
    assert!(made.status.success() && made.stderr.is_empty());
    let checked = Command::new("bash").arg("-n").arg(script).stdin(Stdio::null()).output().expect("run bash");
    assert_eq!((checked.status.code(), text(&checked.stderr)), (Some(0), String::new()));
    let of_vm = offered(script, &["hearth", "vm", ""]);
    for verb in ["launch", "ls", "exec", "migrate", "--json"] {
        assert!(of_vm.contains(verb), "{verb} in {of_vm:?}");
    }
    assert_eq!(offered(script, &["hearth", "vm", "laun"]), BTreeSet::from(["launch".to_owned()]));
    let waits = ["none", "registered", "running"].map(str::to_owned);
    assert_eq!(offered(script, &["hearth", "vm", "launch", "--wait", ""]), BTreeSet::from(waits));
    let all = offered(script, &["hearth", ""]);
    assert!(all.contains("vm") && all.contains("completions") && !all.contains("vmm"), "{all:?}");
}

#[test]
fn other_shells_have_scripts_as_well() {
    for (shell, wanted) in [("zsh", "#compdef hearth"), ("fish", "complete -c hearth")] {
        let made = output(hearth(&["completions", shell]));
        let script = text(&made.stdout);
        assert!(made.status.success() && script.contains(wanted) && script.contains("swap-policy"), "{shell}");
        assert!(!script.contains("vmm"), "{shell}");
        let value: Value =
            serde_json::from_slice(&output(hearth(&["--json", "completions", shell])).stdout).expect("JSON");
        assert_eq!((value["shell"].as_str(), value["script"].as_str()), (Some(shell), Some(script.as_str())));
    }
}

/// Every command that help shows, by its words, the whole included.
fn commands() -> Vec<Vec<String>> {
    let mut found = vec![Vec::new()];
    let mut next = 0;
    while let Some(words) = found.get(next).cloned() {
        let mut asked: Vec<&str> = words.iter().map(String::as_str).collect();
        asked.push("--help");
        let help = text(&output(hearth(&asked)).stdout);
        let listed = help.split("\nCommands:\n").nth(1).unwrap_or_default();
        let lines = listed.lines().take_while(|line| !line.is_empty());
        // Deeper lines go on with what the one before says.
        let names = lines.filter_map(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '));
        for name in names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help") {
            found.push([words.as_slice(), &[name.to_owned()]].concat());
        }
        next += 1;
    }
    found
}

/// What is wrong with a page: what groff says where it is, and its parts.
fn faults(page: &Path) -> String {
    let set = Command::new("groff").args(["-man", "-ww", "-z", "-Tascii"]).arg(page).stdin(Stdio::null()).output();
    let set = set.expect("run groff, of Debian's groff-base");
    let said = format!("{}{}", text(&set.stdout), text(&set.stderr));
    let source = std::fs::read_to_string(page).expect("a page");
    let lacking: Vec<&str> = [".TH ", ".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH OPTIONS"]
        .into_iter()
        .filter(|part| !source.lines().any(|line| line.starts_with(part)))
        .collect();
    let foreign = if source.is_ascii() { "" } else { "it is not ASCII" };
    let wrong = [said, lacking.join(", "), foreign.to_owned()];
    wrong.into_iter().filter(|wrong| !wrong.is_empty()).collect::<Vec<_>>().join("; ")
}

#[test]
fn every_command_has_a_page_that_is_set_without_a_warning() {
    let directory = tempfile::tempdir().expect("a directory");
    let dir = directory.path().to_str().expect("a path");
    let commands = commands();
    assert!(commands.len() > 60, "{commands:?}");
    let wanted: BTreeSet<String> =
        commands.iter().map(|words| [&["hearth".to_owned()], words.as_slice()].concat().join("-") + ".1").collect();
    for run in ["first", "again"] {
        let made = output(hearth(&["--json", "man", "--dir", dir]));
        assert_eq!((made.status.code(), text(&made.stderr)), (Some(0), String::new()), "{run}");
        let value: Value = serde_json::from_slice(&made.stdout).expect("JSON");
        let said = value["pages"].as_array().expect("pages").iter().filter_map(Value::as_str).map(str::to_owned);
        assert_eq!(said.collect::<BTreeSet<_>>(), wanted);
    }
    for file in &wanted {
        assert_eq!(faults(&directory.path().join(file)), "", "{file}");
    }
    let whole = text(&output(hearth(&["man"])).stdout);
    assert_eq!(std::fs::read_to_string(directory.path().join("hearth.1")).expect("a page"), whole);
    let exec = std::fs::read_to_string(directory.path().join("hearth-vm-exec.1")).expect("a page");
    assert!(exec.contains("\\fBhearth vm exec\\fR [OPTIONS] <VM> \\-\\- <CMD>...\n"), "{exec}");
}

#[test]
fn a_directory_that_cannot_be_written_to_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("missing");
    let held = tempfile::NamedTempFile::new().expect("a file");
    let file = held.path().to_owned();
    let taken = directory.path().join("taken");
    std::fs::create_dir_all(taken.join("hearth.1")).expect("a directory");
    for (dir, wanted) in [
        (&missing, format!("write manual pages into {}: No such file", missing.display())),
        (&file, format!("write manual pages into {}: not a directory", file.display())),
        (&taken, format!("write the manual page {}: Is a directory", taken.join("hearth.1").display())),
    ] {
        let output = output(hearth(&["man", "--dir", dir.to_str().expect("a path")]));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&wanted) && output.stdout.is_empty(), "no {wanted:?} in {said}");
    }
}

#[test]
fn a_page_nobody_reads_is_no_failure() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = hearth(&["man"]).stdout(Stdio::from(writer)).output().expect("run hearth");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}
