//! What goes to standard output, and in which form.

pub(crate) mod table;
pub(crate) mod text;

use std::fmt;
use std::io::{self, IsTerminal, Write};

use serde::{Deserialize, Serialize};

use crate::error::CtlError;

/// How results are printed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OutputFormat {
    /// Columns for people.
    #[default]
    Table,
    /// More columns.
    Wide,
    /// The API's messages as canonical protobuf JSON.
    Json,
    /// The same as YAML.
    Yaml,
    /// `kind/name`, one a line.
    Name,
}

impl OutputFormat {
    /// Whether it is meant to be read by people.
    pub(crate) fn is_for_people(self) -> bool {
        match self {
            Self::Table | Self::Wide => true,
            Self::Json | Self::Yaml | Self::Name => false,
        }
    }
}

impl fmt::Display for OutputFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Table => "table",
            Self::Wide => "wide",
            Self::Json => "json",
            Self::Yaml => "yaml",
            Self::Name => "name",
        })
    }
}

/// Standard output, as the user wants it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    /// How results are printed.
    pub(crate) format: OutputFormat,
    /// Whether confirmations are left out.
    pub(crate) quiet: bool,
    /// Whether states are coloured.
    pub(crate) colours: bool,
}

impl Output {
    /// Colours where standard output is a terminal, unless `NO_COLOR` is set to something (no-color.org).
    pub(crate) fn new(format: OutputFormat, quiet: bool) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { format, quiet, colours: !plain && io::stdout().is_terminal() }
    }

    /// Prints text that ends with a line feed.
    pub(crate) fn print(self, text: &str) -> Result<(), CtlError> {
        write_stdout(text.as_bytes())
    }

    /// Prints one line.
    pub(crate) fn line(self, text: impl fmt::Display) -> Result<(), CtlError> {
        write_stdout(format!("{text}\n").as_bytes())
    }

    /// Confirms what was done, where people read it.
    pub(crate) fn confirm(self, text: impl fmt::Display) -> Result<(), CtlError> {
        if self.quiet || !self.format.is_for_people() { Ok(()) } else { self.line(text) }
    }

    /// Prints a message as JSON or YAML; anything else as JSON.
    pub(crate) fn message<T: Serialize>(self, what: &'static str, message: &T) -> Result<(), CtlError> {
        match self.format {
            OutputFormat::Yaml => self.print(&yaml(what, message)?),
            _ => self.line(json(what, message)?),
        }
    }

    /// Prints one message of a stream: a line of JSON, or a YAML document.
    pub(crate) fn event<T: Serialize>(self, what: &'static str, message: &T) -> Result<(), CtlError> {
        match self.format {
            OutputFormat::Yaml => self.print(&format!("---\n{}", yaml(what, message)?)),
            _ => {
                self.line(serde_json::to_string(message).map_err(|error| unrenderable(what, "json", error))?)
            }
        }
    }
}

/// Writes and flushes: a reader at the other end of a pipe waits for it.
pub(crate) fn write_stdout(bytes: &[u8]) -> Result<(), CtlError> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    written.map_err(|source| CtlError::Stream { action: "write to standard output", source })
}

fn json<T: Serialize>(what: &'static str, message: &T) -> Result<String, CtlError> {
    serde_json::to_string_pretty(message).map_err(|error| unrenderable(what, "json", error))
}

fn yaml<T: Serialize>(what: &'static str, message: &T) -> Result<String, CtlError> {
    let mut text = serde_saphyr::to_string(message).map_err(|error| unrenderable(what, "yaml", error))?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

fn unrenderable(
    what: &'static str,
    format: &'static str,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> CtlError {
    CtlError::Render { what, format, source: source.into() }
}
