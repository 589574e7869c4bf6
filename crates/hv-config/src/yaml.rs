//! YAML text to settings tree, keeping the line of every key and value.
//!
//! Settings need the plain part of YAML only: one document of mappings, lists and scalars. Anchors, aliases and
//! tags are refused, which also rules out documents that grow when they are read.

use std::collections::HashMap;
use std::sync::Arc;

use granit_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span, StrInput};

use crate::error::ConfigError;
use crate::tree::{Entries, Key, Node, Origin, Value, quoted};

/// How deep mappings and lists may nest.
const MAX_DEPTH: usize = 32;

/// Reads one document. An empty one is an empty mapping.
///
/// # Errors
/// [`ConfigError::Syntax`] with the line; [`ConfigError::BadValue`] where the document is not a mapping.
pub(crate) fn parse(path: &str, text: &str) -> Result<Node, ConfigError> {
    let options = granit_parser::options! { emit_comments: false };
    let mut composer =
        Composer { path: path.into(), parser: Parser::new_from_str_with_options(text, options), depth: 0 };
    composer.document()
}

struct Composer<'t> {
    path: Arc<str>,
    parser: Parser<'t, StrInput<'t>>,
    depth: usize,
}

impl<'t> Composer<'t> {
    fn document(&mut self) -> Result<Node, ConfigError> {
        let mut root = None;
        while let Some((event, span)) = self.next()? {
            match event {
                Event::StreamStart | Event::DocumentStart(..) | Event::DocumentEnd => {}
                Event::StreamEnd => break,
                _ if root.is_some() => {
                    return Err(self.syntax(span.start, "a second document begins here, expected one only"));
                }
                event => root = Some(self.node(event, span)?),
            }
        }
        let origin = self.origin_of_line(1);
        let root = root.unwrap_or(Node { value: Value::Null, origin });
        match root.value {
            Value::Map(_) => Ok(root),
            Value::Null => Ok(Node { value: Value::Map(Vec::new()), origin: root.origin }),
            _ => Err(ConfigError::BadValue {
                key: "the file".to_owned(),
                problem: format!("found {}, expected keys with values, as \"log_level: info\"", root.found()),
                origin: root.origin,
            }),
        }
    }

    fn node(&mut self, event: Event<'t>, span: Span) -> Result<Node, ConfigError> {
        let (anchor, tag) = match &event {
            Event::Scalar(_, _, anchor, tag)
            | Event::SequenceStart(_, anchor, tag)
            | Event::MappingStart(_, anchor, tag) => (*anchor, tag.is_some()),
            _ => (0, false),
        };
        if anchor != 0 {
            return Err(
                self.syntax(span.start, "anchors are not supported, write the value where it is used")
            );
        }
        if tag {
            return Err(self.syntax(span.start, "tags are not supported, write the value without one"));
        }
        let origin = self.origin_of_line(span.start.line());
        match event {
            Event::Scalar(text, style, ..) => Ok(scalar(&text, style, origin)),
            Event::SequenceStart(..) => self.nested(span.start, |composer| composer.list(origin)),
            Event::MappingStart(..) => self.nested(span.start, |composer| composer.map(origin)),
            Event::Alias(_) => {
                Err(self.syntax(span.start, "aliases are not supported, write the value here"))
            }
            _ => Err(self.syntax(span.start, "expected a value here")),
        }
    }

    fn nested(
        &mut self,
        start: Marker,
        read: impl FnOnce(&mut Self) -> Result<Node, ConfigError>,
    ) -> Result<Node, ConfigError> {
        if self.depth == MAX_DEPTH {
            return Err(self.syntax(start, &format!("values nest deeper than {MAX_DEPTH} levels")));
        }
        self.depth += 1;
        let node = read(self);
        self.depth -= 1;
        node
    }

    fn list(&mut self, origin: Origin) -> Result<Node, ConfigError> {
        let mut items = Vec::new();
        while let Some((event, span)) = self.next()? {
            if event == Event::SequenceEnd {
                break;
            }
            items.push(self.node(event, span)?);
        }
        Ok(Node { value: Value::List(items), origin })
    }

    fn map(&mut self, origin: Origin) -> Result<Node, ConfigError> {
        let mut entries = Entries::new();
        let mut lines: HashMap<String, usize> = HashMap::new();
        while let Some((event, span)) = self.next()? {
            if event == Event::MappingEnd {
                break;
            }
            let line = span.start.line();
            let key = self.node(event, span)?;
            let Value::Text { text: name, .. } = key.value else {
                return Err(
                    self.syntax(span.start, &format!("found {} as a key, expected a name", key.found()))
                );
            };
            if let Some(first) = lines.insert(name.clone(), line) {
                let problem = format!("the key {} stands here again, first on line {first}", quoted(&name));
                return Err(self.syntax(span.start, &problem));
            }
            let Some((event, span)) = self.next()? else { break };
            let value = self.node(event, span)?;
            // A value is reported on the line of its key: that is where a reader looks for it.
            let origin = key.origin.clone();
            entries.push((Key { name, origin }, Node { value: value.value, origin: key.origin }));
        }
        Ok(Node { value: Value::Map(entries), origin })
    }

    fn next(&mut self) -> Result<Option<(Event<'t>, Span)>, ConfigError> {
        self.parser.next().transpose().map_err(|error| self.scan_error(&error))
    }

    fn scan_error(&self, error: &ScanError) -> ConfigError {
        self.syntax(*error.marker(), &format!("not valid YAML: {}", error.info()))
    }

    fn syntax(&self, at: Marker, problem: &str) -> ConfigError {
        ConfigError::Syntax {
            path: self.path.to_string(),
            line: at.line().max(1),
            column: at.col() + 1,
            problem: problem.to_owned(),
        }
    }

    fn origin_of_line(&self, line: usize) -> Origin {
        Origin::File { path: self.path.clone(), line: line.max(1) }
    }
}

/// Plain `null`, `~` and emptiness are nothing (YAML 1.2.2, section 10.3.2).
fn scalar(text: &str, style: ScalarStyle, origin: Origin) -> Node {
    let plain = style == ScalarStyle::Plain;
    if plain && matches!(text, "" | "~" | "null" | "Null" | "NULL") {
        return Node { value: Value::Null, origin };
    }
    Node::text(text, plain, origin)
}
