//! `hearth top`: what the VMs use, again and again. On a terminal the table is drawn in place, and the terminal is as it was
//! when this ends, however it ends.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::time::MissedTickBehavior;

use super::call::{Agent, CallError};
use super::output::{Output, OutputError};
use super::signal::{Asked, Signals};
use super::table::{columns, word};
use super::terminal::{self, Raw};
use crate::api::types::{UsageList, VmState};
use crate::cli::{SortWord, TopArgs};
use rates::{Look, Row, called, look, sort};

mod rates;

/// Time between two looks when nothing else is asked for.
const INTERVAL_DEFAULT_MS: u32 = 2000;

/// Another screen, without a cursor; what was on the first one comes back at the end (xterm's control sequences, which
/// every terminal of today knows).
const SCREEN_BEGIN: &str = "\x1b[?1049h\x1b[?25l";

/// The screen from before, with its cursor.
const SCREEN_END: &str = "\x1b[?25h\x1b[?1049l";

/// To the upper left corner.
const HOME: &str = "\x1b[H";

/// Nothing more in this line; on to the next. In raw mode a newline alone does not go back to the left.
const LINE_END: &str = "\x1b[K\r\n";

/// Nothing below.
const SCREEN_REST: &str = "\x1b[J";

/// What Ctrl-C is in raw mode.
const CTRL_C: u8 = 3;

/// Why VMs are not looked at any more.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// The agent refused, or does not answer.
    #[error(transparent)]
    Call(#[from] CallError),
    /// It answered before.
    #[error("the agent went away")]
    Away(#[source] CallError),
    /// This process's terminal or signals.
    #[error("set up the terminal")]
    Terminal(#[source] io::Error),
    /// Nobody takes the output.
    #[error(transparent)]
    Output(#[from] OutputError),
}

impl TopError {
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Call(error) => error.advice(),
            Self::Away(_) => Some("its VMs run on; the next agent finds them".to_owned()),
            Self::Terminal(_) | Self::Output(_) => None,
        }
    }
}

/// Looks, and remembers the look before.
struct Looker<'a> {
    agent: &'a Agent,
    before: Option<UsageList>,
}

impl Looker<'_> {
    async fn next(&mut self) -> Result<Look, TopError> {
        let now: UsageList = self.agent.get("/v1/usage").await.map_err(|error| {
            let is_gone = matches!(error, CallError::NoAgent { .. } | CallError::HungUp { .. });
            if is_gone && self.before.is_some() { TopError::Away(error) } else { TopError::Call(error) }
        })?;
        let found = look(self.before.as_ref(), &now);
        self.before = Some(now);
        Ok(found)
    }
}

pub(super) async fn run(agent: &Agent, out: Output, args: TopArgs) -> Result<(), TopError> {
    let interval = Duration::from_millis(args.interval.unwrap_or(INTERVAL_DEFAULT_MS).into());
    let mut looker = Looker { agent, before: None };
    if !args.once && !out.is_json() && io::stdout().is_terminal() {
        return draw(&mut looker, interval, args.sort).await;
    }
    looker.next().await?;
    let mut ticks = ticks(interval);
    loop {
        ticks.tick().await;
        let mut found = looker.next().await?;
        sort(&mut found.vms, args.sort);
        out.value(&found, |found| if args.once { table(&found.vms) } else { table(&found.vms) + "\n\n" })?;
        if args.once {
            return Ok(());
        }
    }
}

/// Ticks from one interval on.
fn ticks(interval: Duration) -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(interval);
    ticks.reset();
    // An agent that was slow once is not asked twice for that.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn draw(looker: &mut Looker<'_>, interval: Duration, mut by: SortWord) -> Result<(), TopError> {
    let mut signals = Signals::catch().map_err(TopError::Terminal)?;
    // What is wrong from the start is said on the screen that stays.
    let mut found = looker.next().await?;
    let screen = Screen::enter()?;
    let mut keys = Keys::of(&screen);
    let mut ticks = ticks(interval);
    loop {
        sort(&mut found.vms, by);
        screen.show(&found, interval, by)?;
        tokio::select! {
            _ = ticks.tick() => found = looker.next().await?,
            key = keys.next() => match key {
                b'q' | CTRL_C => return Ok(()),
                key => by = sorted_by(key).unwrap_or(by),
            },
            asked = signals.next() => match asked {
                Asked::Resize => {}
                Asked::Interrupt | Asked::Terminate | Asked::HangUp => return Ok(()),
            },
        }
    }
}

/// What a key sorts by.
fn sorted_by(key: u8) -> Option<SortWord> {
    match key {
        b'c' => Some(SortWord::Cpu),
        b'm' => Some(SortWord::Memory),
        b'n' => Some(SortWord::Name),
        b'f' => Some(SortWord::Faults),
        b'r' => Some(SortWord::Network),
        _ => None,
    }
}

/// Keys of the terminal, if they come from one.
struct Keys(Option<tokio::io::Stdin>);

impl Keys {
    fn of(screen: &Screen) -> Self {
        Self(screen.raw.as_ref().map(|_| tokio::io::stdin()))
    }

    /// The next key. Dropping the future loses none.
    async fn next(&mut self) -> u8 {
        match &mut self.0 {
            // A terminal that cannot be read any more has no keys.
            Some(stdin) => match stdin.read_u8().await {
                Ok(key) => key,
                Err(_) => {
                    self.0 = None;
                    std::future::pending().await
                }
            },
            None => std::future::pending().await,
        }
    }
}

/// A screen of its own, in raw mode. Dropping it brings back what was there before.
struct Screen {
    raw: Option<Raw>,
}

impl Screen {
    fn enter() -> Result<Self, TopError> {
        let raw = Raw::enter().map_err(TopError::Terminal)?;
        let screen = Self { raw };
        write(SCREEN_BEGIN)?;
        Ok(screen)
    }

    fn show(&self, found: &Look, interval: Duration, by: SortWord) -> Result<(), OutputError> {
        let size = terminal::size();
        write(&page(found, interval, by, (size.rows.into(), size.columns.into())))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nothing is left to do when the terminal itself is gone.
        let _ = write(SCREEN_END);
    }
}

fn write(text: &str) -> Result<(), OutputError> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(OutputError::Write)
}

/// A screen full: a line of what there is, and as much of the table as there is room for.
fn page(found: &Look, interval: Duration, by: SortWord, (rows, width): (usize, usize)) -> String {
    let count = found.vms.len();
    let running = found.vms.iter().filter(|row| row.state == VmState::Running).count();
    let title = format!(
        "{count} VMs, {running} running; every {} s, by {}; q ends, c m n f r sort",
        interval.as_secs_f64(),
        sort_word(by)
    );
    let table = table(&found.vms);
    let mut page = HOME.to_owned();
    for line in [title.as_str(), ""].into_iter().chain(table.lines()).take(rows.saturating_sub(1)) {
        page.extend(line.chars().take(width));
        page.push_str(LINE_END);
    }
    page.push_str(SCREEN_REST);
    page
}

/// As on the command line.
const fn sort_word(by: SortWord) -> &'static str {
    match by {
        SortWord::Cpu => "cpu",
        SortWord::Memory => "memory",
        SortWord::Name => "name",
        SortWord::Faults => "faults",
        SortWord::Network => "network",
    }
}

fn table(rows: &[Row]) -> String {
    let header = ["NAME", "STATE", "CPU", "MEMORY", "FAULTS/S", "RX/S", "TX/S"];
    columns(&header, rows.iter().map(cells))
}

fn cells(row: &Row) -> Vec<String> {
    let of = super::table::bytes(row.memory_bytes);
    let resident = row.resident_bytes.map_or_else(|| "-".to_owned(), super::table::bytes);
    vec![
        called(row).to_owned(),
        word(&row.state),
        shown(row.cpu_percent, |percent| format!("{percent:.1} %")),
        format!("{resident} of {of}"),
        shown(row.faults_per_s, |faults| format!("{faults:.0}")),
        shown(row.rx_bytes_per_s, bytes),
        shown(row.tx_bytes_per_s, bytes),
    ]
}

/// What is known, or a dash.
fn shown(value: Option<f64>, show: impl FnOnce(f64) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

/// `12.3 MiB` and the like, of a rate.
fn bytes(mut value: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{value:.0} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::VmId;

    fn row(name: &str) -> Row {
        Row {
            id: VmId::from_random([1; 10]),
            name: Some(name.to_owned()),
            state: VmState::Running,
            vcpus: 1,
            memory_bytes: 128 << 20,
            resident_bytes: Some(64 << 20),
            swapped_bytes: None,
            cpu_percent: Some(12.34),
            faults_per_s: None,
            major_faults_per_s: None,
            rx_bytes_per_s: Some(1536.0),
            tx_bytes_per_s: Some(0.4),
            rx_packets_per_s: None,
            tx_packets_per_s: None,
        }
    }

    #[test]
    fn a_row_reads_well() {
        let text = table(&[row("web")]);
        let words: Vec<_> = text.lines().nth(1).unwrap_or_default().split_whitespace().collect();
        assert_eq!(words.join(" "), "web running 12.3 % 64.0 MiB of 128.0 MiB - 1.5 KiB 0 B");
    }

    #[test]
    fn a_page_fits_its_screen() {
        let found = Look { interval_ms: None, vms: (0..100).map(|number| row(&format!("vm{number}"))).collect() };
        for (rows, width) in [(24, 80), (3, 10), (1, 1), (0, 0), (500, 500)] {
            let page = page(&found, Duration::from_millis(2500), SortWord::Cpu, (rows, width));
            let inner = page.strip_prefix(HOME).and_then(|page| page.strip_suffix(SCREEN_REST)).unwrap();
            let lines: Vec<_> = inner.split_terminator(LINE_END).collect();
            assert!(lines.len() < rows.max(1) && lines.len() <= 103, "{rows}: {}", lines.len());
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{width}");
        }
        assert!(
            page(&found, Duration::from_millis(2500), SortWord::Cpu, (24, 80))
                .contains("100 VMs, 100 running; every 2.5 s")
        );
    }
}
