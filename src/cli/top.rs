//! `hearth top`.

use clap::{Args, ValueEnum};

use super::value::duration_ms;

pub(super) const TOP_HELP: &str = "\
On a terminal the table is drawn again in place: q or Ctrl-C ends it, and c, m, n, f, r sort by processor, memory, name,
faults and network. Elsewhere each table follows the one before. Guests are not asked, so looking does not disturb them.

CPU is in percent of one processor. MEMORY is what of the guest's memory is resident, with the VMM's own. A rate is `-` where
two looks cannot be compared: at the first look at a VM, and after it went on in another process. --once looks twice, so
that it has rates.

Examples:
  hearth top                                        every two seconds, until q
  hearth top --once --sort memory                   one table, for scripts
  hearth --json top --interval 10                   one JSON value every ten seconds, each on a line";

/// `hearth top`.
#[derive(Debug, Clone, Copy, Args)]
pub struct TopArgs {
    /// Print one table and end
    #[arg(long)]
    pub once: bool,
    /// Time between two looks: seconds, or with ms, s, m or h behind the number [default: 2s]
    #[arg(long, short, value_name = "TIME", value_parser = interval_ms)]
    pub interval: Option<u32>,
    /// What comes first
    #[arg(long, short, value_enum, default_value_t = SortWord::Cpu)]
    pub sort: SortWord,
}

/// What a table is sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SortWord {
    /// Who uses most of the processors
    Cpu,
    /// Who has most memory
    Memory,
    /// By name
    Name,
    /// Who faults most often
    Faults,
    /// Whose network carries most
    Network,
}

/// Shortest time between two looks: with less, looking is most of what is seen.
const INTERVAL_MIN_MS: u32 = 100;

/// Longest one: a day.
const INTERVAL_MAX_MS: u32 = 86_400_000;

fn interval_ms(text: &str) -> Result<u32, String> {
    match duration_ms(text) {
        Ok(ms) if (INTERVAL_MIN_MS..=INTERVAL_MAX_MS).contains(&ms) => Ok(ms),
        Ok(_) => Err("the time between two looks is 100ms to 24h".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_neither_too_short_nor_too_long() {
        assert_eq!((interval_ms("2"), interval_ms("100ms"), interval_ms("24h")), (Ok(2000), Ok(100), Ok(86_400_000)));
        for bad in ["0", "99ms", "25h", "soon", "-1"] {
            assert!(interval_ms(bad).is_err(), "{bad}");
        }
    }
}
