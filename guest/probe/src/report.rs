//! One JSON object in one line.

use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::time::Duration;

/// A line in the making.
pub(crate) struct Report(String);

impl Report {
    /// Begins with the verb.
    pub(crate) fn new(verb: &str) -> Self {
        Self(String::from("{")).text("verb", verb)
    }

    /// A member with text.
    pub(crate) fn text(self, name: &str, value: impl Display) -> Self {
        let quoted = quoted(&value.to_string());
        self.raw(name, &quoted)
    }

    /// A member with a number or a truth value.
    pub(crate) fn number(self, name: &str, value: impl Display) -> Self {
        let value = value.to_string();
        self.raw(name, &value)
    }

    /// A member with numbers by name.
    pub(crate) fn numbers<'a>(self, name: &str, values: impl IntoIterator<Item = (&'a str, u64)>) -> Self {
        let values: Vec<String> = values.into_iter().map(|(name, value)| format!("{}:{value}", quoted(name))).collect();
        self.raw(name, &format!("{{{}}}", values.join(",")))
    }

    fn raw(mut self, name: &str, value: &str) -> Self {
        let comma = if self.0.len() > 1 { "," } else { "" };
        let _ = write!(self.0, "{comma}{}:{value}", quoted(name));
        self
    }

    /// Prints the line. That nobody takes it is no failure of what was done.
    pub(crate) fn print(self) {
        let mut stdout = std::io::stdout().lock();
        let _ = writeln!(stdout, "{}}}", self.0);
        let _ = stdout.flush();
    }
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(control));
            }
            plain => quoted.push(plain),
        }
    }
    quoted.push('"');
    quoted
}

/// What became of questions.
#[derive(Default)]
pub(crate) struct Answers {
    asked: u64,
    wrong: u64,
    times: Vec<Duration>,
    error: Option<std::io::Error>,
}

impl Answers {
    /// One question's end: its time, `None` for a wrong answer, or why there was none.
    pub(crate) fn take(&mut self, answer: std::io::Result<Option<Duration>>) {
        self.asked += 1;
        match answer {
            Ok(Some(time)) => self.times.push(time),
            Ok(None) => self.wrong += 1,
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }

    /// Prints the result; says whether every answer was right.
    pub(crate) fn print(self, report: Report) -> bool {
        let micros = |time: Option<&Duration>| time.map_or(0, Duration::as_micros);
        let mut times = self.times;
        times.sort_unstable();
        let answered = times.len() as u64;
        let mut report = report
            .number("asked", self.asked)
            .number("answered", answered)
            .number("wrong", self.wrong)
            .number("min_us", micros(times.first()))
            .number("median_us", micros(times.get(times.len() / 2)))
            .number("max_us", micros(times.last()));
        if let Some(error) = self.error {
            report = report.text("error", error);
        }
        report.print();
        self.asked == answered
    }
}
