//! XDR (RFC 4506) as libvirt's protocol uses it: everything in units of four bytes, numbers in network order.
//!
//! # Caveats
//! What is read comes from libvirtd, which may be of any version: every length is checked against what is there.

/// The longest text or list that is read.
const MAX_ITEMS: usize = 4 << 20;

/// Something that does not read as what was expected.
#[derive(Debug, thiserror::Error)]
#[error("libvirtd's answer cannot be read: {0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Writes values one after the other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn i32(mut self, value: i32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// Bytes of a known number, which is a multiple of four.
    pub(crate) fn fixed(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn opaque(self, bytes: &[u8]) -> Self {
        // A message has at most 32 MiB, and is refused when it has more.
        let mut writer = self.u32(u32::try_from(bytes.len()).unwrap_or(u32::MAX)).fixed(bytes);
        writer.0.resize(writer.0.len().next_multiple_of(4), 0);
        writer
    }

    pub(crate) fn text(self, text: &str) -> Self {
        self.opaque(text.as_bytes())
    }

    pub(crate) fn optional_text(self, text: Option<&str>) -> Self {
        match text {
            Some(text) => self.u32(1).text(text),
            None => self.u32(0),
        }
    }

    pub(crate) fn domain(self, domain: &Domain) -> Self {
        self.text(&domain.name).fixed(domain.uuid.as_bytes()).i32(domain.id)
    }

    pub(crate) fn params(self, params: &[(&str, Value)]) -> Self {
        let writer = self.u32(u32::try_from(params.len()).unwrap_or(u32::MAX));
        params.iter().fold(writer, |writer, (name, value)| {
            let writer = writer.text(name).u32(value.kind());
            match value {
                Value::Int(number) => writer.i32(*number),
                Value::Uint(number) => writer.u32(*number),
                Value::Long(number) => writer.u64(number.cast_unsigned()),
                Value::Ulong(number) => writer.u64(*number),
                Value::Double(number) => writer.u64(number.to_bits()),
                Value::Bool(yes) => writer.u32(u32::from(*yes)),
                Value::Text(text) => writer.text(text),
            }
        })
    }
}

/// Reads values one after the other.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

type Read<T> = Result<T, Malformed>;

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn fixed(&mut self, length: usize) -> Read<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length).ok_or(Malformed("it is too short"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.fixed(N)?);
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self) -> Read<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn i32(&mut self) -> Read<i32> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Read<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn length(&mut self) -> Read<usize> {
        let length = self.u32()? as usize;
        if length > MAX_ITEMS { Err(Malformed("it has too many items")) } else { Ok(length) }
    }

    pub(crate) fn opaque(&mut self) -> Read<&'a [u8]> {
        let length = self.length()?;
        let bytes = self.fixed(length.next_multiple_of(4))?;
        Ok(&bytes[..length])
    }

    pub(crate) fn text(&mut self) -> Read<String> {
        Ok(String::from_utf8_lossy(self.opaque()?).into_owned())
    }

    pub(crate) fn optional_text(&mut self) -> Read<Option<String>> {
        Ok(if self.u32()? == 0 { None } else { Some(self.text()?) })
    }

    pub(crate) fn domain(&mut self) -> Read<Domain> {
        let name = self.text()?;
        let uuid = uuid::Uuid::from_bytes(self.array()?);
        Ok(Domain { name, uuid, id: self.i32()? })
    }

    pub(crate) fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Read<T>) -> Read<Vec<T>> {
        let length = self.length()?;
        // An item has at least four bytes, so a wrong number does not make us reserve memory.
        let mut items = Vec::with_capacity(length.min(self.0.len() / 4));
        for _ in 0..length {
            items.push(item(self)?);
        }
        Ok(items)
    }

    pub(crate) fn params(&mut self) -> Read<Params> {
        let entries = self.list(|reader| {
            let name = reader.text()?;
            let value = match reader.u32()? {
                1 => Value::Int(reader.i32()?),
                2 => Value::Uint(reader.u32()?),
                3 => Value::Long(reader.u64()?.cast_signed()),
                4 => Value::Ulong(reader.u64()?),
                5 => Value::Double(f64::from_bits(reader.u64()?)),
                6 => Value::Bool(reader.u32()? != 0),
                7 => Value::Text(reader.text()?),
                _ => return Err(Malformed("a parameter has an unknown type")),
            };
            Ok((name, value))
        })?;
        Ok(Params(entries.into_iter().collect()))
    }
}

/// A domain as the protocol names it: libvirtd goes by the uuid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Domain {
    pub(crate) name: String,
    pub(crate) uuid: uuid::Uuid,
    /// The number of its present run; -1 if it does not run.
    pub(crate) id: i32,
}

/// The value of a typed parameter (`virTypedParameterType`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Int(i32),
    Uint(u32),
    Long(i64),
    Ulong(u64),
    Double(f64),
    Bool(bool),
    Text(String),
}

impl Value {
    fn kind(&self) -> u32 {
        match self {
            Self::Int(_) => 1,
            Self::Uint(_) => 2,
            Self::Long(_) => 3,
            Self::Ulong(_) => 4,
            Self::Double(_) => 5,
            Self::Bool(_) => 6,
            Self::Text(_) => 7,
        }
    }
}

/// Typed parameters by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Params(std::collections::HashMap<String, Value>);

impl Params {
    /// A count; `None` if it is missing or negative.
    pub(crate) fn count(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            Value::Int(number) => u64::try_from(*number).ok(),
            Value::Uint(number) => Some(u64::from(*number)),
            Value::Long(number) => u64::try_from(*number).ok(),
            Value::Ulong(number) => Some(*number),
            Value::Double(_) | Value::Bool(_) | Value::Text(_) => None,
        }
    }

    /// The sum of `PREFIX.N.SUFFIX` over all N.
    pub(crate) fn sum(&self, prefix: &str, suffix: &str) -> u64 {
        let count = self.count(&format!("{prefix}.count")).unwrap_or(0).min(256);
        (0..count).filter_map(|index| self.count(&format!("{prefix}.{index}.{suffix}"))).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let domain = Domain { name: "a ü".to_owned(), uuid: uuid::Uuid::from_u128(7), id: -1 };
        let params = [
            ("a", Value::Int(-1)),
            ("b", Value::Ulong(u64::MAX)),
            ("c", Value::Text("x<y".to_owned())),
            ("d", Value::Bool(true)),
            ("e", Value::Double(0.5)),
            ("f", Value::Long(-9)),
            ("g", Value::Uint(3)),
        ];
        let bytes = Writer::new()
            .domain(&domain)
            .optional_text(None)
            .optional_text(Some("abcde"))
            .params(&params)
            .opaque(&[1, 2, 3])
            .finish();
        assert_eq!(bytes.len() % 4, 0);
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.domain().unwrap(), domain);
        assert_eq!(reader.optional_text().unwrap(), None);
        assert_eq!(reader.optional_text().unwrap().as_deref(), Some("abcde"));
        let read = reader.params().unwrap();
        for (name, value) in params {
            assert_eq!(read.0[name], value);
        }
        assert_eq!(reader.opaque().unwrap(), [1, 2, 3]);
        assert!(reader.u32().is_err(), "nothing is left");
    }

    #[test]
    fn wrong_lengths_are_refused_without_reserving_memory() {
        for bytes in [&[0xff; 64][..], &[0, 0, 0, 9, 1, 2], &[0x00, 0x3f, 0xff, 0xff], &[]] {
            assert!(Reader::new(bytes).opaque().is_err());
            assert!(Reader::new(bytes).params().is_err());
        }
    }
}
