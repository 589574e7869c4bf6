//! Tree to settings value: a serde deserializer which lets the wanted type decide what a text means, and which
//! reports the key and the origin of what it could not read.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, Visitor};

use crate::error::{ConfigError, nearest};
use crate::tree::{Entries, Key, Node, Origin, Value, quoted};

/// Reads a whole settings value.
///
/// # Errors
/// [`ConfigError::UnknownKey`] or [`ConfigError::BadValue`], with the place.
pub(crate) fn read<T: de::DeserializeOwned>(root: &Node) -> Result<T, ConfigError> {
    T::deserialize(root).map_err(|error| error.inside(None, &root.origin).into_config_error())
}

/// What went wrong, gathering the key's segments (innermost first) on its way out.
#[derive(Debug)]
pub(crate) struct ReadError {
    kind: Kind,
    path: Vec<String>,
    origin: Option<Origin>,
}

#[derive(Debug)]
enum Kind {
    UnknownField { known: &'static [&'static str] },
    Problem(String),
}

impl ReadError {
    fn problem(problem: String) -> Self {
        Self { kind: Kind::Problem(problem), path: Vec::new(), origin: None }
    }

    fn inside(mut self, segment: Option<String>, origin: &Origin) -> Self {
        self.path.extend(segment);
        self.origin.get_or_insert_with(|| origin.clone());
        self
    }

    fn into_config_error(self) -> ConfigError {
        let mut key = String::new();
        for segment in self.path.iter().rev() {
            if !key.is_empty() && !segment.starts_with('[') {
                key.push('.');
            }
            key.push_str(segment);
        }
        let origin = self.origin.unwrap_or(Origin::Default);
        match self.kind {
            Kind::Problem(problem) => ConfigError::BadValue { origin, key, problem },
            Kind::UnknownField { known } => ConfigError::UnknownKey {
                nearest: self.path.first().and_then(|name| nearest(name, known.iter().copied())),
                known: known.join(", "),
                origin,
                key,
            },
        }
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::UnknownField { .. } => f.write_str("unknown key"),
            Kind::Problem(problem) => f.write_str(problem),
        }
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::problem(message.to_string())
    }

    fn invalid_type(unexpected: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::problem(format!("found {unexpected}, expected {expected}"))
    }

    fn invalid_value(unexpected: de::Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::invalid_type(unexpected, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let expected = expected.join(", ");
        Self::problem(format!("found {}, expected one of {expected}", quoted(variant)))
    }

    fn unknown_field(_field: &str, known: &'static [&'static str]) -> Self {
        Self { kind: Kind::UnknownField { known }, path: Vec::new(), origin: None }
    }

    fn missing_field(field: &'static str) -> Self {
        Self::problem(format!("the key {field:?} is missing"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::problem(format!("the key {field:?} is given twice"))
    }
}

impl Node {
    fn expected(&self, expected: &dyn fmt::Display) -> ReadError {
        ReadError::problem(format!("found {}, expected {expected}", self.found()))
    }

    /// The items of a list; one line of text is `a,b` or `[a, b]`.
    fn items(&self, expected: &dyn fmt::Display) -> Result<Vec<Node>, ReadError> {
        match &self.value {
            Value::List(items) => Ok(items.clone()),
            Value::Null => Ok(Vec::new()),
            Value::Text { text, .. } if self.origin.is_one_line() => {
                let inner = text.trim();
                let inner = inner.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(inner);
                if inner.trim().is_empty() {
                    return Ok(Vec::new());
                }
                let parts = inner.split(',').map(str::trim);
                if parts.clone().any(str::is_empty) {
                    let problem = format!("found {}, which has an empty item, expected a,b", quoted(text));
                    return Err(ReadError::problem(problem));
                }
                Ok(parts.map(|part| Node::text(part, true, self.origin.clone())).collect())
            }
            _ => Err(self.expected(&format_args!("{expected}, as [a, b]"))),
        }
    }

    /// The entries of a map or section; one line of text is `k=v,k2=v2`.
    fn entries(&self, expected: &dyn fmt::Display) -> Result<Entries, ReadError> {
        match &self.value {
            Value::Map(entries) | Value::Section(entries) => Ok(entries.clone()),
            Value::Null => Ok(Entries::new()),
            Value::Text { .. } | Value::List(_) if self.origin.is_one_line() => {
                let mut entries = Entries::new();
                for item in self.items(expected)? {
                    let Value::Text { text, .. } = &item.value else { return Err(item.expected(expected)) };
                    let (name, value) = text
                        .split_once('=')
                        .ok_or_else(|| item.expected(&"name=value pairs, as rack=r7,disk=ssd"))?;
                    let (name, origin) = (name.trim().to_owned(), self.origin.clone());
                    if entries.iter().any(|(key, _)| key.name == name) {
                        return Err(ReadError::problem(format!("{} is given twice", quoted(&name))));
                    }
                    entries
                        .push((Key { name, origin: origin.clone() }, Node::text(value.trim(), true, origin)));
                }
                Ok(entries)
            }
            _ => Err(self.expected(expected)),
        }
    }
}

/// What a visitor says that it expects, as `Display`.
struct Expecting<'a, V>(&'a V);

impl<'de, V: Visitor<'de>> fmt::Display for Expecting<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }
}

macro_rules! whole_numbers {
    ($($method:ident $visit:ident $type:ty),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
            let expected = format_args!("a whole number from {} to {}", <$type>::MIN, <$type>::MAX);
            match &self.value {
                Value::Text { text, .. } => match text.trim().parse::<$type>() {
                    Ok(number) => visitor.$visit(number),
                    Err(_) => Err(self.expected(&expected)),
                },
                _ => Err(self.expected(&expected)),
            }
        })*
    };
}

impl<'de> Deserializer<'de> for &Node {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(_) | Value::Section(_) => self.deserialize_map(visitor),
            Value::Masked => Err(self.expected(&Expecting(&visitor))),
            Value::Text { text, plain } => match text.as_str() {
                _ if !plain => visitor.visit_str(text),
                "true" => visitor.visit_bool(true),
                "false" => visitor.visit_bool(false),
                _ => match (text.parse::<u64>(), text.parse::<i64>(), text.parse::<f64>()) {
                    (Ok(number), ..) => visitor.visit_u64(number),
                    (_, Ok(number), _) => visitor.visit_i64(number),
                    (.., Ok(number)) if number.is_finite() => visitor.visit_f64(number),
                    _ => visitor.visit_str(text),
                },
            },
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Text { text, .. } if text.trim().eq_ignore_ascii_case("true") => visitor.visit_bool(true),
            Value::Text { text, .. } if text.trim().eq_ignore_ascii_case("false") => {
                visitor.visit_bool(false)
            }
            _ => Err(self.expected(&"true or false")),
        }
    }

    whole_numbers! {
        deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16, deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64, deserialize_i128 visit_i128 i128,
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_u128 visit_u128 u128,
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let number = match &self.value {
            Value::Text { text, .. } => text.trim().parse::<f64>().ok().filter(|number| number.is_finite()),
            _ => None,
        };
        visitor.visit_f64(number.ok_or_else(|| self.expected(&"a number, as 1.5"))?)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Text { text, .. } => visitor.visit_str(text),
            _ => Err(self.expected(&Expecting(&visitor))),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Null => visitor.visit_none(),
            // `HYPERVISOR_NODE_ID=` takes back what the file says.
            Value::Text { text, plain: true } if text.is_empty() => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            _ => Err(self.expected(&"nothing")),
        }
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let items = self.items(&"a list")?;
        visitor.visit_seq(Items { items: items.iter().enumerate() })
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _length: usize, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _length: usize,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let entries = self.entries(&"names with values, as {rack: r7, disk: ssd}")?;
        visitor.visit_map(Fields::new(&entries))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        let expected = format_args!("a section with the keys {}", fields.join(", "));
        let entries = self.entries(&expected)?;
        visitor.visit_map(Fields::new(&entries))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Text { text, .. } => visitor.visit_enum(StrDeserializer::new(text)),
            Value::Map(entries) if entries.len() == 1 => {
                visitor.visit_enum(MapAccessDeserializer::new(Fields::new(entries)))
            }
            _ => Err(self.expected(&format_args!("one of {}", variants.join(", ")))),
        }
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_unit()
    }
}

impl<'de> IntoDeserializer<'de, ReadError> for &Node {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

struct Items<'a> {
    items: std::iter::Enumerate<std::slice::Iter<'a, Node>>,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = ReadError;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ReadError> {
        let Some((index, item)) = self.items.next() else { return Ok(None) };
        let value = seed.deserialize(item);
        value.map(Some).map_err(|error| error.inside(Some(format!("[{index}]")), &item.origin))
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.items.len())
    }
}

struct Fields<'a> {
    entries: std::slice::Iter<'a, (Key, Node)>,
    pending: Option<&'a (Key, Node)>,
}

impl<'a> Fields<'a> {
    fn new(entries: &'a Entries) -> Self {
        Self { entries: entries.iter(), pending: None }
    }
}

impl<'de> de::MapAccess<'de> for Fields<'_> {
    type Error = ReadError;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ReadError> {
        // A default secret was never written down, so the type's own default stands in for it.
        self.pending = self.entries.find(|(_, node)| !matches!(node.value, Value::Masked));
        let Some((key, _)) = self.pending else { return Ok(None) };
        // As a node, so that a map whose keys are numbers reads its names like any other value.
        let name = Node::text(key.name.as_str(), true, key.origin.clone());
        let value = seed.deserialize(&name);
        value.map(Some).map_err(|error| error.inside(Some(key.name.clone()), &key.origin))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ReadError> {
        let (key, node) =
            self.pending.take().ok_or_else(|| ReadError::problem("a value came without a key".to_owned()))?;
        seed.deserialize(node).map_err(|error| error.inside(Some(key.name.clone()), &node.origin))
    }
}
