//! Labels, annotations and selectors.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::validate::{self, Invalid};

/// Labels by key.
pub type Labels = BTreeMap<String, String>;

/// Most labels, and most annotations, on one object.
pub const MAX_ENTRIES: usize = 64;
/// Longest label key or value, in bytes.
pub const MAX_LABEL_BYTES: usize = 128;
/// Longest annotation value, in bytes.
pub const MAX_ANNOTATION_BYTES: usize = 16 << 10;

/// What users attach to an object: labels to select by, annotations to read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Metadata {
    /// For selecting.
    pub labels: Labels,
    /// For reading; never selected by.
    pub annotations: Labels,
}

impl Metadata {
    /// Checks counts, lengths and characters.
    ///
    /// # Errors
    /// Names the entry that is refused.
    pub fn validate(&self) -> Result<(), Invalid> {
        validate_labels("metadata.labels", &self.labels)?;
        if self.annotations.len() > MAX_ENTRIES {
            return Err(too_many("metadata.annotations", self.annotations.len()));
        }
        for (key, value) in &self.annotations {
            validate_key("metadata.annotations", key)?;
            validate::text(&entry("metadata.annotations", key), value, MAX_ANNOTATION_BYTES)?;
        }
        Ok(())
    }
}

/// Checks a set of labels.
///
/// # Errors
/// Names the label that is refused.
pub fn validate_labels(field: &str, labels: &Labels) -> Result<(), Invalid> {
    if labels.len() > MAX_ENTRIES {
        return Err(too_many(field, labels.len()));
    }
    for (key, value) in labels {
        validate_key(field, key)?;
        let ok = value.len() <= MAX_LABEL_BYTES && value.bytes().all(|b| b.is_ascii_graphic() && b != b',');
        if !ok {
            let expected = format!(
                "must have at most {MAX_LABEL_BYTES} printable ASCII characters without spaces or commas"
            );
            return Err(Invalid::new(entry(field, key), value, expected));
        }
    }
    Ok(())
}

fn too_many(field: &str, count: usize) -> Invalid {
    Invalid::new(field, count, format!("must have at most {MAX_ENTRIES} entries"))
}

fn entry(field: &str, key: &str) -> String {
    format!("{field}[{}]", validate::excerpt(key))
}

fn validate_key(field: &str, key: &str) -> Result<(), Invalid> {
    let ok = !key.is_empty()
        && key.len() <= MAX_LABEL_BYTES
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/'));
    if ok {
        return Ok(());
    }
    let expected = format!("keys must have 1 to {MAX_LABEL_BYTES} letters, digits, `-`, `_`, `.` or `/`");
    Err(Invalid::new(field, key, expected))
}

/// A conjunction of requirements on labels.
///
/// The wire carries selectors as a map: `key: value` demands equality, and the value `*` only that the key is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Selector(Labels);

impl Selector {
    /// The value that matches any value of a key.
    pub const ANY: &'static str = "*";

    /// A selector over a map as the wire carries it.
    ///
    /// # Errors
    /// A key or value is not one that a label could have.
    pub fn new(requirements: Labels) -> Result<Self, Invalid> {
        validate_labels("label_selector", &requirements)?;
        Ok(Self(requirements))
    }

    /// Whether it demands nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the labels meet every requirement.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|(key, want)| labels.get(key).is_some_and(|have| want == Self::ANY || have == want))
    }

    /// The requirements.
    #[must_use]
    pub fn requirements(&self) -> &Labels {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_selector_demands_every_pair() {
        let selector = Selector::new(labels(&[("tier", "web"), ("zone", "*")])).unwrap();
        assert!(selector.matches(&labels(&[("tier", "web"), ("zone", "a"), ("x", "y")])));
        assert!(!selector.matches(&labels(&[("tier", "web")])));
        assert!(!selector.matches(&labels(&[("tier", "db"), ("zone", "a")])));
    }

    #[test]
    fn control_characters_in_a_key_are_named() {
        let refusal = validate_labels("metadata.labels", &labels(&[("a\u{1}b", "c")])).unwrap_err();
        assert_eq!(refusal.value, "\"a\\u{1}b\"");
    }
}
