//! What the daemon says beside its work, to the log it was started with.

use std::fmt::Arguments;
use std::io::Write;

/// Writes a line. Nothing depends on it: the disk it lies on may be full, which is no reason to serve nobody. (The
/// standard library's own macros panic then.)
pub(super) fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
