//! How the text behind a command's help is laid out on a terminal: in the source its lines are as long as lines of source
//! are, and a terminal would break each of them once more.

use clap::Command;

/// Widest line that is left as it is: what help is wrapped to where nobody says how wide the terminal is.
const WIDTH: usize = 100;

/// Where a remark goes that does not fit behind its example.
const REMARK: &str = "        ";

/// A command whose texts, and those of the commands below it, are laid out.
pub(super) fn laid_out(mut command: Command) -> Command {
    if let Some(text) = command.get_after_help().map(|text| of_lines(&text.to_string())) {
        command = command.after_help(text);
    }
    let below: Vec<String> = command.get_subcommands().map(|below| below.get_name().to_owned()).collect();
    below.into_iter().fold(command, |command, name| command.mut_subcommand(name, laid_out))
}

/// Lines of prose become one for each paragraph, which is wrapped as a whole; indented lines stay, but for remarks that do
/// not fit behind them.
fn of_lines(text: &str) -> String {
    let mut laid = String::new();
    let mut was_prose = false;
    for line in text.lines() {
        let is_prose = !matches!(line, "" | "Example:" | "Examples:") && !line.starts_with(' ');
        if !laid.is_empty() {
            laid.push(if is_prose && was_prose { ' ' } else { '\n' });
        }
        match remark(line) {
            Some((example, remark)) => {
                laid.push_str(example);
                laid.push('\n');
                laid.push_str(REMARK);
                laid.push_str(remark);
            }
            None => laid.push_str(line),
        }
        was_prose = is_prose;
    }
    laid
}

/// A line that is too long, as what it shows and what it says of that: spaces are between the two.
fn remark(line: &str) -> Option<(&str, &str)> {
    let is_example = line.starts_with("  ") && !line.starts_with(REMARK) && line.chars().count() > WIDTH;
    let (example, remark) = line.trim_start().split_once("   ").filter(|_| is_example)?;
    let indent = line.len() - line.trim_start().len();
    Some((line.get(..indent + example.len())?, remark.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_flows_and_examples_stay() {
        let long = format!("  hearth one    {}", "what it is for ".repeat(8));
        let text = format!("Prose that\ngoes on.\n\nMore.\nExamples:\n  hearth two      what that is for\n{long}");
        let wanted = format!(
            "Prose that goes on.\n\nMore.\nExamples:\n  hearth two      what that is for\n  hearth one\n{REMARK}{}",
            "what it is for ".repeat(8)
        );
        assert_eq!(of_lines(&text), wanted);
        assert_eq!(of_lines(""), "");
        assert_eq!(of_lines("one"), "one");
    }
}
