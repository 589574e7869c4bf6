//! Settings value to tree: a serde serializer which tells structs (sections) from maps and lists (leaves).

use std::fmt;

use serde::ser::{self, Serialize};

use crate::tree::{Entries, Key, Node, Origin, Value};

/// The name under which [`Secret`](crate::Secret) announces itself to [`Shape`].
pub(crate) const SECRET_NEWTYPE: &str = "hv_config::Secret";

/// The tree of a value, with [`Origin::Default`] everywhere.
///
/// # Errors
/// What the value's own `Serialize` refuses.
pub(crate) fn of<T: Serialize + ?Sized>(value: &T) -> Result<Node, ShapeError> {
    value.serialize(Shape)
}

/// A settings value which cannot be turned into a tree.
#[derive(Debug)]
pub(crate) struct ShapeError(String);

impl fmt::Display for ShapeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ShapeError {}

impl ser::Error for ShapeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

fn node(value: Value) -> Node {
    Node { value, origin: Origin::Default }
}

fn key(name: impl Into<String>) -> Key {
    Key { name: name.into(), origin: Origin::Default }
}

struct Shape;

macro_rules! plain_text {
    ($($method:ident: $type:ty),* $(,)?) => {
        $(fn $method(self, value: $type) -> Result<Node, ShapeError> {
            Ok(Node::text(value.to_string(), true, Origin::Default))
        })*
    };
}

impl ser::Serializer for Shape {
    type Ok = Node;
    type Error = ShapeError;
    type SerializeSeq = List;
    type SerializeTuple = List;
    type SerializeTupleStruct = List;
    type SerializeTupleVariant = List;
    type SerializeMap = Map;
    type SerializeStruct = Struct;
    type SerializeStructVariant = Struct;

    plain_text! {
        serialize_bool: bool,
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64, serialize_i128: i128,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_u128: u128,
        serialize_f32: f32, serialize_f64: f64,
    }

    fn serialize_char(self, value: char) -> Result<Node, ShapeError> {
        Ok(Node::text(value, false, Origin::Default))
    }

    fn serialize_str(self, value: &str) -> Result<Node, ShapeError> {
        Ok(Node::text(value, false, Origin::Default))
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<Node, ShapeError> {
        ser::Serializer::collect_seq(self, value)
    }

    fn serialize_none(self) -> Result<Node, ShapeError> {
        Ok(node(Value::Null))
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Node, ShapeError> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<Node, ShapeError> {
        Ok(node(Value::Null))
    }

    fn serialize_unit_struct(self, _name: &'static str) -> Result<Node, ShapeError> {
        Ok(node(Value::Null))
    }

    fn serialize_unit_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
    ) -> Result<Node, ShapeError> {
        self.serialize_str(variant)
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<Node, ShapeError> {
        let inner = value.serialize(self)?;
        let is_empty = matches!(&inner.value, Value::Text { text, .. } if text.is_empty());
        Ok(if name == SECRET_NEWTYPE && !is_empty { node(Value::Masked) } else { inner })
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Node, ShapeError> {
        Ok(node(Value::Map(vec![(key(variant), value.serialize(self)?)])))
    }

    fn serialize_seq(self, _length: Option<usize>) -> Result<List, ShapeError> {
        Ok(List { variant: None, items: Vec::new() })
    }

    fn serialize_tuple(self, length: usize) -> Result<List, ShapeError> {
        self.serialize_seq(Some(length))
    }

    fn serialize_tuple_struct(self, _name: &'static str, length: usize) -> Result<List, ShapeError> {
        self.serialize_seq(Some(length))
    }

    fn serialize_tuple_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        _length: usize,
    ) -> Result<List, ShapeError> {
        Ok(List { variant: Some(variant), items: Vec::new() })
    }

    fn serialize_map(self, _length: Option<usize>) -> Result<Map, ShapeError> {
        Ok(Map { entries: Entries::new(), pending: None })
    }

    fn serialize_struct(self, _name: &'static str, _length: usize) -> Result<Struct, ShapeError> {
        Ok(Struct { variant: None, entries: Entries::new() })
    }

    fn serialize_struct_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        _length: usize,
    ) -> Result<Struct, ShapeError> {
        Ok(Struct { variant: Some(variant), entries: Entries::new() })
    }
}

/// Names the variant around a value, as serde's externally tagged enums do.
fn tagged(variant: Option<&'static str>, value: Value) -> Node {
    match variant {
        None => node(value),
        Some(variant) => node(Value::Map(vec![(key(variant), node(value))])),
    }
}

struct List {
    variant: Option<&'static str>,
    items: Vec<Node>,
}

macro_rules! push_items {
    ($($trait:ident::$method:ident),* $(,)?) => {
        $(impl ser::$trait for List {
            type Ok = Node;
            type Error = ShapeError;

            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), ShapeError> {
                self.items.push(of(value)?);
                Ok(())
            }

            fn end(self) -> Result<Node, ShapeError> {
                Ok(tagged(self.variant, Value::List(self.items)))
            }
        })*
    };
}

push_items! {
    SerializeSeq::serialize_element,
    SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field,
    SerializeTupleVariant::serialize_field,
}

struct Map {
    entries: Entries,
    pending: Option<Key>,
}

impl ser::SerializeMap for Map {
    type Ok = Node;
    type Error = ShapeError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, name: &T) -> Result<(), ShapeError> {
        match of(name)?.value {
            Value::Text { text, .. } => self.pending = Some(key(text)),
            _ => return Err(ShapeError("a map's key must be text or a number".to_owned())),
        }
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), ShapeError> {
        let key =
            self.pending.take().ok_or_else(|| ShapeError("a map's value came without a key".to_owned()))?;
        self.entries.push((key, of(value)?));
        Ok(())
    }

    fn end(self) -> Result<Node, ShapeError> {
        Ok(node(Value::Map(self.entries)))
    }
}

struct Struct {
    variant: Option<&'static str>,
    entries: Entries,
}

impl Struct {
    fn push<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), ShapeError> {
        self.entries.push((key(name), of(value)?));
        Ok(())
    }
}

impl ser::SerializeStruct for Struct {
    type Ok = Node;
    type Error = ShapeError;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), ShapeError> {
        self.push(name, value)
    }

    fn end(self) -> Result<Node, ShapeError> {
        Ok(node(Value::Section(self.entries)))
    }
}

impl ser::SerializeStructVariant for Struct {
    type Ok = Node;
    type Error = ShapeError;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), ShapeError> {
        self.push(name, value)
    }

    fn end(self) -> Result<Node, ShapeError> {
        Ok(tagged(self.variant, Value::Map(self.entries)))
    }
}
