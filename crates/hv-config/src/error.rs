//! What can be wrong with a configuration, said so that the user can find and mend it.

use std::io;
use std::path::PathBuf;

use crate::tree::{Origin, quoted};

/// Why the configuration could not be loaded. `Display` begins with the place: `path:line`, `environment NAME`
/// or `flag --name`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be opened or read.
    #[error("cannot read the configuration file {}", path.display())]
    ReadFile {
        /// The path as given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is larger than [`MAX_FILE_BYTES`](crate::MAX_FILE_BYTES).
    #[error("the configuration file {} is larger than {limit_bytes} bytes", path.display())]
    FileTooLarge {
        /// The path as given.
        path: PathBuf,
        /// The largest size that is read.
        limit_bytes: u64,
    },
    /// The text of the file is not YAML, or uses a part of YAML that settings have no use for.
    #[error("{path}:{line}:{column}: {problem}")]
    Syntax {
        /// The path as given.
        path: String,
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
        /// What is wrong.
        problem: String,
    },
    /// A key which the program does not have.
    #[error("{}: unknown key {}{}", origin.place(), quoted(key), remedy(nearest.as_deref(), "expected", known))]
    UnknownKey {
        /// Where it was written.
        origin: Origin,
        /// The dotted key.
        key: String,
        /// The known key that it resembles.
        nearest: Option<String>,
        /// The keys that may stand in its place, separated by commas.
        known: String,
    },
    /// An environment variable with the program's prefix which means nothing to the program.
    #[error("environment: unknown variable {}{}", quoted(variable), remedy(nearest.as_deref(), "known are", known))]
    UnknownVariable {
        /// Its name.
        variable: String,
        /// The known variable that it resembles.
        nearest: Option<String>,
        /// The known variables, separated by commas.
        known: String,
    },
    /// A value which its key does not accept.
    #[error("{}: {key}: {problem}", origin.place())]
    BadValue {
        /// Where it was written.
        origin: Origin,
        /// The dotted key.
        key: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// The settings type itself cannot be used: a mistake of the program, which any test that loads it finds.
    #[error("the settings type is unusable: {problem}")]
    UnusableSettings {
        /// What is wrong with it.
        problem: String,
    },
}

fn remedy(nearest: Option<&str>, introduction: &str, known: &str) -> String {
    match nearest {
        Some(nearest) => format!(", did you mean {nearest:?}?"),
        None if known.is_empty() => String::new(),
        None => format!(", {introduction} {known}"),
    }
}

/// The candidate that a misspelt name resembles, if one is near enough to be meant.
pub(crate) fn nearest<'a>(wrong: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    /// Longer names are noise, and comparing costs the product of the lengths.
    const MAX_COMPARED_BYTES: usize = 128;
    if wrong.len() > MAX_COMPARED_BYTES {
        return None;
    }
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let wrong_lower = wrong.to_lowercase();
    let scored = candidates.into_iter().map(|candidate| {
        // A right name in the wrong section is as near as a name can be.
        let moved = last(candidate) == last(&wrong_lower);
        let distance = strsim::damerau_levenshtein(&wrong_lower, &candidate.to_lowercase());
        (if moved { distance.min(1) } else { distance }, candidate)
    });
    let (distance, candidate) = scored.min_by_key(|(distance, _)| *distance)?;
    (distance <= (candidate.len() / 4).max(2)).then(|| candidate.to_owned())
}
