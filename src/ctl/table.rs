//! Tables and quantities for people. Texts that come from guests lose their control characters here: a guest must not
//! write escape sequences to an operator's terminal.

use comfy_table::{Table, presets};
use jiff::{SignedDuration, Timestamp};

use crate::clock::{Clock, SystemClock};

/// Columns with a header, aligned by spaces, as scripts with `awk` and people like them.
pub(super) fn columns(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| plain(cell)));
    }
    aligned(table)
}

/// Names on the left, values on the right. Rows without a value are left out.
pub(super) fn pairs<'a>(rows: impl IntoIterator<Item = (&'a str, Option<String>)>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        if let Some(value) = value {
            table.add_row([name.to_owned(), plain(&value)]);
        }
    }
    aligned(table)
}

fn aligned(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// The text without control characters; they are shown as `\u{1b}` and the like.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => out.push(character),
            '\t' => out.push_str("    "),
            character if character.is_control() => out.extend(character.escape_unicode()),
            character => out.push(character),
        }
    }
    out
}

/// A value, or a dash.
pub(super) fn or_dash(value: Option<&str>) -> String {
    value.unwrap_or("-").to_owned()
}

/// `0.42 ms`, `12.3 ms`, `12.34 s`.
pub(super) fn milliseconds(ms: f64) -> String {
    if ms < 10.0 {
        format!("{ms:.2} ms")
    } else if ms < 1000.0 {
        format!("{ms:.1} ms")
    } else {
        format!("{:.2} s", ms / 1000.0)
    }
}

/// `12.3 MiB` and the like.
#[expect(clippy::cast_precision_loss, reason = "one decimal is printed")]
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// How long ago: `12s`, `5m`, `3h`, `2d`.
pub(super) fn age(since: Timestamp) -> String {
    let now = i64::try_from(SystemClock::new().wall().0).unwrap_or(i64::MAX);
    let now = Timestamp::UNIX_EPOCH + SignedDuration::from_nanos(now);
    match now.duration_since(since).as_secs().max(0) {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// A serialisable word such as a state, as it stands in JSON.
pub(super) fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(_) => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_cannot_write_escapes() {
        assert_eq!(plain("a\x1b[2Jb\r\u{9b}"), "a\\u{1b}[2Jb\\u{d}\\u{9b}");
        assert!(!columns(&["A"], [vec!["\x1b]0;x\x07".to_owned()]]).contains('\x1b'));
    }

    #[test]
    fn quantities_read_well() {
        assert_eq!(milliseconds(0.4249), "0.42 ms");
        assert_eq!(milliseconds(12_345.0), "12.35 s");
        assert_eq!(bytes(0), "0 bytes");
        assert_eq!(bytes(5 << 20), "5.0 MiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
    }

    #[test]
    fn columns_line_up() {
        let text = columns(&["NAME", "STATE"], [vec!["a".to_owned(), "running".to_owned()]]);
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        assert_eq!(lines, ["NAME  STATE", "a     running"]);
    }
}
