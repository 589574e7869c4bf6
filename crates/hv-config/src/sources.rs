//! The sources of settings, laid over each other: flag over environment over file over default.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{ConfigError, nearest};
use crate::tree::{Key, Node, Origin, Value};
use crate::{read, shape, yaml};

/// The prefix of every environment variable that belongs to the platform.
pub const ENVIRONMENT_PREFIX: &str = "HYPERVISOR_";

/// The largest configuration file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Variables with the prefix that are no settings: the name of the file itself, and what tools and tests use.
const OTHER_VARIABLES: [&str; 4] =
    ["HYPERVISOR_CONFIG", "HYPERVISOR_CACHE", "HYPERVISOR_SKIP_LOG", "HYPERVISOR_CRASH_AT"];

/// Collects where settings may come from, then [`load`](Self::load)s them.
#[derive(Default)]
pub struct Sources {
    document: Option<Document>,
    fallback: Option<PathBuf>,
    environment: Vec<(OsString, OsString)>,
    allowed: Vec<String>,
    flags: Vec<(String, Node)>,
}

enum Document {
    Path(PathBuf),
    Text { name: String, text: String },
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither the environment nor the flags: they may hold secrets.
        f.debug_struct("Sources").field("fallback", &self.fallback).finish_non_exhaustive()
    }
}

impl Sources {
    /// Nothing but the defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The file which the user named, if any; it must exist.
    #[must_use]
    pub fn file(mut self, path: Option<impl Into<PathBuf>>) -> Self {
        if let Some(path) = path {
            self.document = Some(Document::Path(path.into()));
        }
        self
    }

    /// The file to use where the user named none; it need not exist.
    #[must_use]
    pub fn fallback_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.fallback = Some(path.into());
        self
    }

    /// A file's text which is already at hand; `name` stands for its path in messages.
    #[must_use]
    pub fn text(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.document = Some(Document::Text { name: name.into(), text: text.into() });
        self
    }

    /// The environment, as [`std::env::vars_os`] gives it. Variables without [`ENVIRONMENT_PREFIX`] are ignored;
    /// each of the others must name a key (`HYPERVISOR_SERVER_GRPC_ADDRESS` sets `server.grpc_address`).
    #[must_use]
    pub fn environment<N, V>(mut self, variables: impl IntoIterator<Item = (N, V)>) -> Self
    where
        N: Into<OsString>,
        V: Into<OsString>,
    {
        self.environment.extend(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// Variables with the prefix which the program reads itself, by full name; `*` at the end stands for any rest.
    #[must_use]
    pub fn allow_variables<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.allowed.extend(names.into_iter().map(Into::into));
        self
    }

    /// A flag's value for a dotted key; `None` where the flag was not given. Lists and maps are written as in the
    /// environment. `flag` is shown as is, as `--grpc-address`.
    #[must_use]
    pub fn flag(mut self, key: &str, flag: &str, value: Option<impl ToString>) -> Self {
        if let Some(value) = value {
            let origin = Origin::Flag { flag: flag.into() };
            self.flags.push((key.to_owned(), Node::text(value.to_string(), true, origin)));
        }
        self
    }

    /// The values of a flag that may be repeated, for a list or (as `name=value`) a map; no values: not given.
    #[must_use]
    pub fn repeated_flag<S: ToString>(
        mut self,
        key: &str,
        flag: &str,
        values: impl IntoIterator<Item = S>,
    ) -> Self {
        let origin = Origin::Flag { flag: flag.into() };
        let items: Vec<Node> =
            values.into_iter().map(|value| Node::text(value.to_string(), true, origin.clone())).collect();
        if !items.is_empty() {
            self.flags.push((key.to_owned(), Node { value: Value::List(items), origin }));
        }
        self
    }

    /// Lays the sources over `T::default()` and reads the result. A list or a map of a higher source replaces the
    /// lower one's as a whole.
    ///
    /// Every key must appear in the serialized default: no `skip_serializing_if` and no `flatten` in `T`.
    ///
    /// # Errors
    /// The first mistake found, with its place: see [`ConfigError`].
    pub fn load<T: Serialize + DeserializeOwned + Default>(self) -> Result<Loaded<T>, ConfigError> {
        let mut tree = shape::of(&T::default())
            .map_err(|error| ConfigError::UnusableSettings { problem: error.to_string() })?;
        let variables = variables_of(&tree)?;

        if let Some(document) = self.read_document()? {
            overlay(&mut tree, document, "", &leaf_keys(&variables))?;
        }
        for (name, value) in &self.environment {
            if let Some((key, node)) = self.variable(&variables, name, value)? {
                place(&mut tree, key, node)?;
            }
        }
        for (key, node) in self.flags {
            if !variables.iter().any(|(known, _)| *known == key) {
                let problem = format!("the {} sets the key {key:?}, which does not exist", node.origin);
                return Err(ConfigError::UnusableSettings { problem });
            }
            place(&mut tree, &key, node)?;
        }

        let value: T = read::read(&tree)?;
        let rows = rows_of(&value, &tree)?;
        Ok(Loaded { value, rows })
    }

    fn read_document(&self) -> Result<Option<Node>, ConfigError> {
        match (&self.document, &self.fallback) {
            (Some(Document::Text { name, text }), _) => yaml::parse(name, text).map(Some),
            (Some(Document::Path(path)), _) => read_file(path).map(Some),
            (None, Some(path)) => match read_file(path) {
                Err(ConfigError::ReadFile { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    Ok(None)
                }
                document => document.map(Some),
            },
            (None, None) => Ok(None),
        }
    }

    fn variable<'k>(
        &self,
        variables: &'k [(String, String)],
        name: &OsStr,
        value: &OsStr,
    ) -> Result<Option<(&'k str, Node)>, ConfigError> {
        let name = name.to_string_lossy();
        if !name.starts_with(ENVIRONMENT_PREFIX) {
            return Ok(None);
        }
        let Some((key, variable)) = variables.iter().find(|(_, variable)| *variable == name) else {
            if self.is_allowed(&name) {
                return Ok(None);
            }
            let known = || variables.iter().map(|(_, variable)| variable.as_str());
            return Err(ConfigError::UnknownVariable {
                nearest: nearest(&name, known()),
                known: known().collect::<Vec<_>>().join(", "),
                variable: name.into_owned(),
            });
        };
        let origin = Origin::Environment { variable: variable.as_str().into() };
        match value.to_str() {
            Some(value) => Ok(Some((key, Node::text(value, true, origin)))),
            None => {
                let problem = "found bytes that are not UTF-8, expected text".to_owned();
                Err(ConfigError::BadValue { origin, key: key.clone(), problem })
            }
        }
    }

    fn is_allowed(&self, name: &str) -> bool {
        OTHER_VARIABLES.contains(&name)
            || self.allowed.iter().any(|allowed| match allowed.strip_suffix('*') {
                Some(start) => name.starts_with(start),
                None => name == allowed,
            })
    }
}

fn read_file(path: &Path) -> Result<Node, ConfigError> {
    let failed = |source| ConfigError::ReadFile { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(ConfigError::FileTooLarge { path: path.to_owned(), limit_bytes: MAX_FILE_BYTES });
    }
    let name = path.display().to_string();
    match std::str::from_utf8(&bytes) {
        Ok(text) => yaml::parse(&name, text),
        Err(error) => {
            let before = &bytes[..error.valid_up_to()];
            let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
            Err(ConfigError::Syntax {
                path: name,
                line: before.iter().filter(|byte| **byte == b'\n').count() + 1,
                column: before.len() - line_start + 1,
                problem: "found bytes that are not UTF-8, expected YAML text".to_owned(),
            })
        }
    }
}

/// Each leaf's dotted key with its environment variable.
fn variables_of(defaults: &Node) -> Result<Vec<(String, String)>, ConfigError> {
    if !matches!(defaults.value, Value::Section(_)) {
        return Err(ConfigError::UnusableSettings { problem: "it is not a struct".to_owned() });
    }
    let mut variables: Vec<(String, String)> = Vec::new();
    let mut clash = None;
    defaults.for_each_leaf(&mut |key, _| {
        let variable = format!("{ENVIRONMENT_PREFIX}{}", key.replace('.', "_").to_uppercase());
        if let Some((other, _)) = variables.iter().find(|(_, taken)| *taken == variable) {
            clash.get_or_insert_with(|| {
                format!("the keys {other:?} and {key:?} share the variable {variable}")
            });
        }
        variables.push((key.to_owned(), variable));
    });
    match clash {
        Some(problem) => Err(ConfigError::UnusableSettings { problem }),
        None => Ok(variables),
    }
}

fn leaf_keys(variables: &[(String, String)]) -> Vec<&str> {
    variables.iter().map(|(key, _)| key.as_str()).collect()
}

/// Lays `over` onto `base`. Sections merge key by key; anything else is replaced.
pub(crate) fn overlay(base: &mut Node, over: Node, path: &str, keys: &[&str]) -> Result<(), ConfigError> {
    let Value::Section(known) = &mut base.value else {
        *base = over;
        return Ok(());
    };
    let names = || known.iter().map(|(key, _)| key.name.as_str()).collect::<Vec<_>>().join(", ");
    let entries = match over.value {
        Value::Map(entries) => entries,
        // A section whose keys are all commented out.
        Value::Null => return Ok(()),
        _ => {
            let problem = format!("found {}, expected a section with the keys {}", over.found(), names());
            return Err(ConfigError::BadValue { origin: over.origin, key: path.to_owned(), problem });
        }
    };
    for (key, node) in entries {
        let dotted = if path.is_empty() { key.name.clone() } else { format!("{path}.{}", key.name) };
        match known.iter_mut().find(|(known, _)| known.name == key.name) {
            Some((_, child)) => overlay(child, node, &dotted, keys)?,
            None => {
                let siblings = known.iter().map(|(key, _)| match path {
                    "" => key.name.clone(),
                    _ => format!("{path}.{}", key.name),
                });
                let siblings: Vec<String> = siblings.collect();
                let candidates = siblings.iter().map(String::as_str).chain(keys.iter().copied());
                return Err(ConfigError::UnknownKey {
                    nearest: nearest(&dotted, candidates),
                    known: siblings.join(", "),
                    origin: key.origin,
                    key: dotted,
                });
            }
        }
    }
    Ok(())
}

/// Replaces the leaf at a key that is known to exist.
fn place(tree: &mut Node, key: &str, node: Node) -> Result<(), ConfigError> {
    let nested = key.rsplit('.').fold(node, |node, name| {
        let origin = node.origin.clone();
        let key = Key { name: name.to_owned(), origin: origin.clone() };
        Node { value: Value::Map(vec![(key, node)]), origin }
    });
    overlay(tree, nested, "", &[])
}

fn rows_of<T: Serialize>(value: &T, tree: &Node) -> Result<Vec<Row>, ConfigError> {
    let effective =
        shape::of(value).map_err(|error| ConfigError::UnusableSettings { problem: error.to_string() })?;
    let mut rows = Vec::new();
    effective.for_each_leaf(&mut |key, node| {
        let origin = origin_of(tree, key);
        rows.push(Row { key: key.to_owned(), value: node.render(), origin });
    });
    Ok(rows)
}

/// The origin of a key, or of the nearest part of it that was written as a whole.
fn origin_of(tree: &Node, key: &str) -> Origin {
    let mut part = key;
    loop {
        if let Some(node) = tree.find(part) {
            return node.origin.clone();
        }
        match part.rsplit_once('.') {
            Some((parent, _)) => part = parent,
            None => return Origin::Default,
        }
    }
}

/// One key as it is in effect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The dotted key, as `server.grpc_address`.
    pub key: String,
    /// The value on one line; secrets read `***`.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
}

/// Settings in effect, and where each came from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The settings.
    pub value: T,
    rows: Vec<Row>,
}

impl<T> Loaded<T> {
    /// Every key with its value and origin, in the order of declaration.
    pub fn show(&self) -> &[Row] {
        &self.rows
    }

    /// Where a dotted key's value came from; [`Origin::Default`] for a key that does not exist.
    pub fn origin(&self, key: &str) -> Origin {
        self.rows.iter().find(|row| row.key == key).map_or(Origin::Default, |row| row.origin.clone())
    }

    /// The error for a value that is well formed but cannot be used, as two keys which contradict each other.
    /// `problem` says what was found and what was expected.
    pub fn refuse(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        ConfigError::BadValue { origin: self.origin(key), key: key.to_owned(), problem: problem.into() }
    }

    /// The rows as aligned text with a heading, for `config show`.
    pub fn to_table(&self) -> String {
        let width = |cell: fn(&Row) -> &str, heading: &str| {
            self.rows.iter().map(|row| cell(row).chars().count()).max().unwrap_or(0).max(heading.len())
        };
        let keys = width(|row| &row.key, "KEY");
        // One very long value must not push every origin out of sight.
        let values = width(|row| &row.value, "VALUE").min(48);
        let line = |key: &str, value: &str, origin: &str| format!("{key:keys$}  {value:values$}  {origin}\n");
        let body = self.rows.iter().map(|row| line(&row.key, &row.value, &row.origin.to_string()));
        std::iter::once(line("KEY", "VALUE", "ORIGIN")).chain(body).collect()
    }
}
