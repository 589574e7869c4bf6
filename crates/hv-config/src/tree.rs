//! The untyped settings tree which every source is turned into: a value, and where it came from.

use std::fmt;
use std::sync::Arc;

/// The longest part of a user's own text that an error repeats, in characters.
const SHOWN_CHARACTERS: usize = 80;

/// Where the effective value of a key came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The program's own default.
    Default,
    /// A configuration file.
    File {
        /// The path, as the user gave it.
        path: Arc<str>,
        /// The line, counted from 1.
        line: usize,
    },
    /// An environment variable.
    Environment {
        /// Its full name.
        variable: Arc<str>,
    },
    /// A command line flag.
    Flag {
        /// The flag with its dashes, as `--grpc-address`.
        flag: Arc<str>,
    },
}

impl Origin {
    /// The beginning of an error message: `path:line` for a file, so that editors can jump to it.
    pub(crate) fn place(&self) -> String {
        match self {
            Self::File { path, line } => format!("{path}:{line}"),
            Self::Default | Self::Environment { .. } | Self::Flag { .. } => self.to_string(),
        }
    }

    /// Whether lists and maps from here are written in one line of text (`a,b` and `k=v,k2=v2`).
    pub(crate) fn is_one_line(&self) -> bool {
        matches!(self, Self::Environment { .. } | Self::Flag { .. })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "file {path}:{line}"),
            Self::Environment { variable } => write!(f, "environment {variable}"),
            Self::Flag { flag } => write!(f, "flag {flag}"),
        }
    }
}

/// One value of the tree. It has no `Debug`: it may hold a secret.
#[derive(Clone)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) origin: Origin,
}

/// The name of an entry, and where it was written.
#[derive(Clone)]
pub(crate) struct Key {
    pub(crate) name: String,
    pub(crate) origin: Origin,
}

pub(crate) type Entries = Vec<(Key, Node)>;

/// What a node holds. Numbers and booleans stay text until a type asks for them, so that `007` can be a name.
#[derive(Clone)]
pub(crate) enum Value {
    /// Nothing was given.
    Null,
    /// One value; `plain` if it was written without quotes.
    Text { text: String, plain: bool },
    /// Values in order.
    List(Vec<Node>),
    /// Entries whose names the user chooses.
    Map(Entries),
    /// Entries whose names the settings type chooses; only the defaults' tree has them.
    Section(Entries),
    /// A secret whose text is withheld.
    Masked,
}

impl Node {
    pub(crate) fn text(text: impl Into<String>, plain: bool, origin: Origin) -> Self {
        Self { value: Value::Text { text: text.into(), plain }, origin }
    }

    /// Calls `visit` for each leaf with its dotted key, in the order of declaration.
    pub(crate) fn for_each_leaf<'a>(&'a self, visit: &mut dyn FnMut(&str, &'a Node)) {
        fn walk<'a>(node: &'a Node, path: &mut Vec<&'a str>, visit: &mut dyn FnMut(&str, &'a Node)) {
            let Value::Section(entries) = &node.value else {
                visit(&path.join("."), node);
                return;
            };
            for (key, child) in entries {
                path.push(&key.name);
                walk(child, path, visit);
                path.pop();
            }
        }
        walk(self, &mut Vec::new(), visit);
    }

    /// The node at a dotted key.
    pub(crate) fn find(&self, key: &str) -> Option<&Self> {
        key.split('.').try_fold(self, |node, name| match &node.value {
            Value::Section(entries) | Value::Map(entries) => {
                entries.iter().find(|(key, _)| key.name == name).map(|(_, child)| child)
            }
            Value::Null | Value::Text { .. } | Value::List(_) | Value::Masked => None,
        })
    }

    /// The value on one line, in YAML's flow notation.
    pub(crate) fn render(&self) -> String {
        match &self.value {
            Value::Null => "null".to_owned(),
            Value::Text { text, .. } => render_text(text),
            Value::List(items) => format!("[{}]", join(items.iter().map(Self::render))),
            Value::Map(entries) | Value::Section(entries) => {
                let entry =
                    |(key, node): &(Key, Self)| format!("{}: {}", render_text(&key.name), node.render());
                format!("{{{}}}", join(entries.iter().map(entry)))
            }
            Value::Masked => "***".to_owned(),
        }
    }

    /// How an error names what it found here.
    pub(crate) fn found(&self) -> String {
        match &self.value {
            Value::Null => "nothing".to_owned(),
            Value::Text { text, .. } => quoted(text),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) | Value::Section(_) => "a section".to_owned(),
            Value::Masked => "a secret".to_owned(),
        }
    }
}

fn join(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(", ")
}

fn render_text(text: &str) -> String {
    let ambiguous = text.is_empty()
        || text == "null"
        || text == "~"
        || text.trim() != text
        || text.contains(|c: char| c.is_control() || matches!(c, '"' | ',' | '{' | '}' | '#'));
    if ambiguous { format!("{text:?}") } else { text.to_owned() }
}

/// A user's text for an error: quoted, escaped, and cut to a bounded length.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARACTERS) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}... ({} bytes)", &text[..end], text.len()),
    }
}
