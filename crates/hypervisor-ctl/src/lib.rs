//! `hypervisor-ctl`: the command line of the platform.
//!
//! # Theory of operation
//! [`cli`] declares every command, flag and help text; the manual pages, the completions and `docs/reference/cli.md` are
//! made from the same tree. [`main`] reads the arguments, then the settings, and starts a runtime only for a command
//! that talks to the server. Each command is one file in `command`; what several share (finding an object by name or
//! id prefix, waiting, printing) has a file of its own.
//!
//! # Invariants
//! - Standard output carries what was asked for, standard error everything else, so that scripts can read the former.
//! - Text that others chose (names, reasons, messages) is escaped before it reaches a terminal, except what a guest
//!   prints on its console: there a terminal is what the user asked for.
//! - A mutation is sent with a request key, so that sending it again after a lost answer has no second effect.

mod apply;
pub mod cli;
mod command;
mod docs;
mod error;
mod output;
mod progress;
mod reference;
mod run;
mod server;
mod settings;
mod show;
mod terminal;
mod wait;

pub use docs::markdown;
pub use error::{CtlError, exit_code};
pub use run::main;
pub use settings::Settings;
