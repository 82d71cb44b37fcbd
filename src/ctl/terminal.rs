//! The terminal this process was started from: its size, and raw mode that ends with the value that stands for it.

use std::io::{self, IsTerminal, Stdin, stdin, stdout};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::api::types::TerminalSize;

/// What a terminal is taken for when nobody knows: the size of a VT100.
const SIZE_DEFAULT: TerminalSize = TerminalSize { rows: 24, columns: 80 };

/// Raw mode of standard input. Dropping it restores what was before.
#[derive(Debug)]
pub(super) struct Raw {
    stdin: Stdin,
    before: Termios,
}

impl Raw {
    /// Every key goes through as it is; `None` when standard input is not a terminal.
    pub(super) fn enter() -> io::Result<Option<Self>> {
        let stdin = stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self { stdin, before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing is left to do when the terminal itself is gone.
        let _ = tcsetattr(&self.stdin, OptionalActions::Flush, &self.before);
    }
}

/// Size of the terminal at standard output, or else at standard input.
pub(super) fn size() -> TerminalSize {
    let found = tcgetwinsize(stdout()).or_else(|_| tcgetwinsize(stdin()));
    match found {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize { rows: size.ws_row, columns: size.ws_col },
        Ok(_) | Err(_) => SIZE_DEFAULT,
    }
}
