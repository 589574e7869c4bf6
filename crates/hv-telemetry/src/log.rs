//! Structured logs on standard error, as text for people or JSON for machines.

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tracing::Subscriber;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt;

/// Libraries whose debug and info records drown everything else; they are shown from `warn` on.
const NOISY_TARGETS: [&str; 7] = ["h2", "hyper", "hyper_util", "rustls", "tonic", "tower", "etcd_client"];

/// The filter matches targets by their beginning and prefers the longer match: without these, `hyper` would silence
/// `hypervisor_server`.
const OWN_TARGETS: [&str; 2] = ["hypervisor", "hv_"];

/// The least important records that are shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What a developer follows.
    Debug,
    /// What an operator follows.
    #[default]
    Info,
    /// What works, but not as it should.
    Warn,
    /// What failed.
    Error,
}

/// How a record is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object per line: `timestamp` (RFC 3339, UTC), `level`, `target`, `message`, the record's fields, and
    /// `span` with the fields of the span around it.
    Json,
}

/// What to log, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogOptions {
    /// The least important records that are shown.
    pub level: LogLevel,
    /// How a record is written.
    pub format: LogFormat,
}

/// A text that is no level or format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("found {found:?}, expected {expected}")]
pub struct ParseLogOptionError {
    found: String,
    expected: String,
}

/// Logging was set up before in this process.
#[derive(Debug, thiserror::Error)]
#[error("cannot set up logging a second time")]
pub struct InitError {
    source: tracing_subscriber::util::TryInitError,
}

/// `ALL`, `Display` and `FromStr` of an enum whose values have one name each.
macro_rules! names {
    ($type:ident { $($variant:ident => $name:literal),* $(,)? }) => {
        impl $type {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name by which it is written.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),*
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $type {
            type Err = ParseLogOptionError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::ALL.iter().copied().find(|value| value.name().eq_ignore_ascii_case(text)).ok_or_else(|| {
                    ParseLogOptionError {
                        found: text.chars().take(40).collect(),
                        expected: [$($name),*].join(", "),
                    }
                })
            }
        }
    };
}

names!(LogLevel { Debug => "debug", Info => "info", Warn => "warn", Error => "error" });
names!(LogFormat { Text => "text", Json => "json" });

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Info => Self::INFO,
            LogLevel::Warn => Self::WARN,
            LogLevel::Error => Self::ERROR,
        }
    }
}

/// Sends the records of the whole process to standard error.
///
/// # Errors
/// [`InitError`] if it, or another global subscriber, was set up before.
pub fn init(options: LogOptions) -> Result<(), InitError> {
    let colours = std::io::stderr().is_terminal();
    subscriber(options, colours, std::io::stderr).try_init().map_err(|source| InitError { source })
}

/// The subscriber that [`init`] installs, writing elsewhere: for tests, and for programs that add to it.
pub fn subscriber<W>(options: LogOptions, colours: bool, writer: W) -> impl Subscriber + Send + Sync + 'static
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let layer: Box<dyn Layer<Registry> + Send + Sync> = match options.format {
        LogFormat::Text => layer.boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_span_list(false).boxed(),
    };
    Registry::default().with(layer.with_filter(filter(options.level)))
}

fn filter(level: LogLevel) -> Targets {
    let level = LevelFilter::from(level);
    let quiet = level.min(LevelFilter::WARN);
    Targets::new()
        .with_default(level)
        .with_targets(NOISY_TARGETS.map(|target| (target, quiet)))
        .with_targets(OWN_TARGETS.map(|target| (target, level)))
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn names_read_back_and_unknown_ones_are_refused_with_the_known() {
        for level in LogLevel::ALL {
            assert_eq!(level.to_string().parse(), Ok(*level));
            assert_eq!(serde_json::to_value(level).unwrap(), serde_json::json!(level.name()));
        }
        for format in LogFormat::ALL {
            assert_eq!(format.to_string().to_uppercase().parse(), Ok(*format));
        }
        let error = "loud".parse::<LogLevel>().unwrap_err();
        assert_eq!(error.to_string(), "found \"loud\", expected debug, info, warn, error");
    }

    #[test]
    fn noise_is_capped_at_warn_and_the_programs_own_records_are_not() {
        let debug = filter(LogLevel::Debug);
        for own in ["hypervisor_server::grpc", "hypervisor_agent", "hv_store", "other_crate"] {
            assert!(debug.would_enable(own, &Level::DEBUG), "{own}");
        }
        for noisy in
            ["h2::codec", "hyper::client", "hyper_util::rt", "tonic::transport", "tower::buffer", "rustls"]
        {
            assert!(!debug.would_enable(noisy, &Level::INFO), "{noisy}");
            assert!(debug.would_enable(noisy, &Level::WARN), "{noisy}");
        }
    }

    #[test]
    fn a_stricter_level_holds_for_noisy_libraries_too() {
        let error = filter(LogLevel::Error);
        for target in ["h2", "hypervisor_server", "hv_store", "other_crate"] {
            assert!(!error.would_enable(target, &Level::WARN), "{target}");
            assert!(error.would_enable(target, &Level::ERROR), "{target}");
        }
    }
}
