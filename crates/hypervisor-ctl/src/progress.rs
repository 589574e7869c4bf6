//! What is going on, on standard error: one line that changes on a terminal, else one line per change.

use std::io::{self, IsTerminal, Write};

use crate::output::text::escape;

/// Longest line that is overwritten, in characters: a wrapped one could not be.
const MAX_LINE_CHARS: usize = 79;

/// Shows what is going on.
#[derive(Debug)]
pub(crate) struct Progress {
    enabled: bool,
    terminal: bool,
    shown: String,
}

impl Progress {
    /// Shows nothing if not `enabled`.
    pub(crate) fn new(enabled: bool) -> Self {
        Self { enabled, terminal: io::stderr().is_terminal(), shown: String::new() }
    }

    /// Shows this, unless it is what was shown last.
    pub(crate) fn update(&mut self, text: &str) {
        let text = escape(text);
        if !self.enabled || text == self.shown {
            return;
        }
        // A progress line that cannot be written is no reason to stop working.
        let _ = if self.terminal {
            let line: String = text.chars().take(MAX_LINE_CHARS).collect();
            // Back to the first column, and erase the line (ECMA-48, section 8.3.41).
            write!(io::stderr(), "\r\u{1b}[2K{line}")
        } else {
            writeln!(io::stderr(), "{text}")
        };
        self.shown = text;
    }

    /// Removes the line, so that other output can follow.
    pub(crate) fn clear(&mut self) {
        if self.enabled && self.terminal && !self.shown.is_empty() {
            let _ = write!(io::stderr(), "\r\u{1b}[2K");
        }
        self.shown.clear();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Progress {
    /// Says something that stays.
    pub(crate) fn note(&mut self, text: &str) {
        self.clear();
        if self.enabled {
            let _ = writeln!(io::stderr(), "{}", escape(text));
        }
    }
}
