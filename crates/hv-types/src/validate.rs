//! Checks on what users type. Each refusal names the field, shows the value (shortened) and says what is accepted.

use std::fmt;

/// A value that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The field, as a path into the request: `spec.cpu_cores`, `metadata.labels[\"a\"]`.
    pub field: String,
    /// The value as sent, shortened and escaped so that it can be printed.
    pub value: String,
    /// What is accepted instead.
    pub expected: String,
}

impl Invalid {
    /// Longest excerpt of a refused value that a message repeats, in characters.
    const EXCERPT_CHARS: usize = 48;

    /// A refusal of `value` in `field`; `expected` completes the sentence "`field` …".
    pub fn new(field: impl Into<String>, value: impl fmt::Display, expected: impl Into<String>) -> Self {
        Self { field: field.into(), value: excerpt(&value.to_string()), expected: expected.into() }
    }

    /// The same refusal with `prefix.` before the field.
    #[must_use]
    pub fn within(mut self, prefix: &str) -> Self {
        self.field = format!("{prefix}.{}", self.field);
        self
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}; got {}", self.field, self.expected, self.value)
    }
}

impl std::error::Error for Invalid {}

/// `text` quoted, escaped and cut so that a message stays one readable line.
#[must_use]
pub fn excerpt(text: &str) -> String {
    let mut shown: String = text.chars().take(Invalid::EXCERPT_CHARS).flat_map(char::escape_debug).collect();
    if text.chars().nth(Invalid::EXCERPT_CHARS).is_some() {
        shown.push_str(&format!("… ({} bytes)", text.len()));
    }
    format!("\"{shown}\"")
}

/// An identifier: letters, digits, `-`, `_` and `.`, not starting with a dot.
///
/// # Errors
/// The text is empty, too long or has another character.
pub fn identifier(field: &str, text: &str) -> Result<(), Invalid> {
    let ok = !text.is_empty()
        && text.len() <= crate::id::MAX_ID_BYTES
        && !text.starts_with('.')
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if ok {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        text,
        "must have 1 to 64 letters, digits, `-`, `_` or `.` and not start with `.`",
    ))
}

/// Longest instance name, in bytes: a DNS label, so that a name can become a host name.
pub const MAX_NAME_BYTES: usize = 63;

/// A name as in RFC 1123: lower-case letters, digits and `-`, starting and ending with a letter or digit.
///
/// # Errors
/// The text is no such name.
pub fn name(field: &str, text: &str) -> Result<(), Invalid> {
    let bytes = text.as_bytes();
    let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let ok = bytes.len() <= MAX_NAME_BYTES
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-');
    if ok {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        text,
        "must have 1 to 63 lower-case letters, digits or `-`, and start and end with a letter or digit",
    ))
}

/// Printable ASCII without spaces at the ends, at most `max_bytes` long, not empty.
///
/// # Errors
/// The text is empty, too long or has another character.
pub fn printable(field: &str, text: &str, max_bytes: usize) -> Result<(), Invalid> {
    if !text.is_empty() && text.len() <= max_bytes && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        text,
        format!("must have 1 to {max_bytes} printable ASCII characters without spaces"),
    ))
}

/// Free text of at most `max_bytes` without control characters other than line feed and tab. May be empty.
///
/// # Errors
/// The text is too long or has a control character.
pub fn text(field: &str, value: &str, max_bytes: usize) -> Result<(), Invalid> {
    if value.len() > max_bytes {
        return Err(Invalid::new(field, value, format!("must have at most {max_bytes} bytes")));
    }
    if value.chars().any(|c| c.is_control() && c != '\n' && c != '\t') {
        return Err(Invalid::new(field, value, "must not contain control characters"));
    }
    Ok(())
}

/// The name of a file inside a store directory: one path component that cannot climb out.
///
/// # Errors
/// The text is empty, too long, hidden, or has a separator or control character.
pub fn file_name(field: &str, value: &str) -> Result<(), Invalid> {
    let ok = !value.is_empty()
        && value.len() <= 255
        && !value.starts_with('.')
        && !value.contains(['/', '\\'])
        && !value.chars().any(char::is_control);
    if ok {
        return Ok(());
    }
    Err(Invalid::new(
        field,
        value,
        "must be the plain name of a file in the node's image directory, without `/`",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_megabytes_of_name_are_refused_in_one_short_line() {
        let refusal = name("name", &"a".repeat(10 << 20)).unwrap_err().to_string();
        assert!(refusal.len() < 300, "{refusal}");
        assert!(refusal.starts_with("name must have 1 to 63"));
    }

    #[test]
    fn names_follow_rfc_1123() {
        for good in ["a", "web-1", "0", &"x".repeat(63)] {
            assert!(name("name", good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", &"x".repeat(64)] {
            assert!(name("name", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_name_cannot_leave_its_directory() {
        for bad in ["", ".", "..", "../x", "a/b", "a\\b", "\0", ".hidden"] {
            assert!(file_name("spec.kernel", bad).is_err(), "{bad:?}");
        }
    }
}
