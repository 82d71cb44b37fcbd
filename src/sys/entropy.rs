//! The host's random pool (getrandom(2)). Needs no file, so it works in an empty root; blocks only before the pool is
//! ready, early in the host's boot.

use std::io;

/// Fills `bytes` with random bytes.
pub fn fill(bytes: &mut [u8]) -> io::Result<()> {
    getrandom::fill(bytes).map_err(|error| match error.raw_os_error() {
        Some(code) => io::Error::from_raw_os_error(code),
        None => io::Error::other("the random pool gives nothing"),
    })
}
