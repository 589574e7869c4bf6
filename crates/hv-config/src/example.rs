//! For tests: holds a commented example file against the defaults of the code.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::ConfigError;
use crate::sources::overlay;
use crate::tree::{Node, Value};
use crate::{Origin, shape, yaml};

/// The name that stands for the file in this module's messages.
const NAME: &str = "example";

/// Each dotted key of a YAML text that has no keys below it, with its value on one line as
/// [`Row::value`](crate::Row::value) shows it, in the order of the text.
///
/// # Errors
/// [`ConfigError`] where the text is not YAML.
pub fn keys_of_yaml(text: &str) -> Result<Vec<(String, String)>, ConfigError> {
    fn walk(node: &Node, path: &str, found: &mut Vec<(String, String)>) {
        match &node.value {
            Value::Map(entries) if !entries.is_empty() || path.is_empty() => {
                for (key, child) in entries {
                    let dotted =
                        if path.is_empty() { key.name.clone() } else { format!("{path}.{}", key.name) };
                    walk(child, &dotted, found);
                }
            }
            _ => found.push((path.to_owned(), node.render())),
        }
    }
    let mut found = Vec::new();
    walk(&yaml::parse(NAME, text)?, "", &mut found);
    Ok(found)
}

/// What is wrong with an example file for `T`: keys that are missing, unknown, different from the default, or that
/// have no comment above them. Empty if all is well.
pub fn example_differences<T: Serialize + DeserializeOwned + Default>(text: &str) -> Vec<String> {
    let read = || {
        let defaults = shape::of(&T::default())
            .map_err(|error| ConfigError::UnusableSettings { problem: error.to_string() })?;
        let document = yaml::parse(NAME, text)?;
        let mut merged = defaults.clone();
        overlay(&mut merged, document, "", &[])?;
        crate::Sources::new().text(NAME, text).load::<T>()?;
        Ok((defaults, merged))
    };
    let (defaults, merged) = match read() {
        Ok(trees) => trees,
        Err(error) => return vec![ConfigError::to_string(&error)],
    };

    let lines: Vec<&str> = text.lines().collect();
    let mut differences = Vec::new();
    defaults.for_each_leaf(&mut |key, default| {
        let Some(node) = merged.find(key) else { return };
        let Origin::File { line, .. } = node.origin else {
            differences.push(format!("{key}: missing, its default is {}", default.render()));
            return;
        };
        if node.render() != default.render() {
            differences.push(format!("{key}: shows {}, the default is {}", node.render(), default.render()));
        }
        let above = line.checked_sub(2).and_then(|index| lines.get(index)).copied().unwrap_or_default();
        if !above.trim_start().starts_with('#') {
            differences.push(format!("{key}: has no comment on the line above it (line {line})"));
        }
    });
    differences
}
