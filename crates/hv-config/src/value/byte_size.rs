//! An amount of bytes as people write it: `512MiB`, `1GiB`, `4096`.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ValueError;

const EXPECTED: &str =
    "a size in bytes or with one of the units KiB, MiB, GiB, TiB, as 512MiB, 1GiB or 4096 (at most 8 EiB)";

/// Largest first, so that `Display` finds the unit that needs the fewest digits.
const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// A size in bytes, at most [`ByteSize::MAX`]. `M`, `MB` and the like are refused, because half of their users mean
/// 1000 and the other half 1024.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// The largest size: what an `int64` of the wire protocol holds.
    pub const MAX: Self = Self(i64::MAX as u64);

    /// A number of bytes, cut off at [`ByteSize::MAX`].
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(if bytes > Self::MAX.0 { Self::MAX.0 } else { bytes })
    }

    /// A number of MiB, cut off at [`ByteSize::MAX`].
    pub const fn from_mib(mib: u64) -> Self {
        Self::from_bytes(mib.saturating_mul(1 << 20))
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    fn checked(bytes: u64) -> Option<Self> {
        (bytes <= Self::MAX.0).then_some(Self(bytes))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, unit_bytes)| self.0 != 0 && self.0.is_multiple_of(*unit_bytes)) {
            Some((unit, unit_bytes)) => write!(f, "{}{unit}", self.0 / unit_bytes),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for ByteSize {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let trimmed = text.trim();
        let digits_end = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(digits_end);
        let unit_bytes = match unit.trim_start() {
            "" | "B" => Some(1),
            name => UNITS.iter().find(|(unit, _)| unit.eq_ignore_ascii_case(name)).map(|(_, bytes)| *bytes),
        };
        let number = digits.parse::<u64>().ok();
        let bytes = number.zip(unit_bytes).and_then(|(number, unit_bytes)| number.checked_mul(unit_bytes));
        bytes.and_then(Self::checked).ok_or_else(|| ValueError::new(text, EXPECTED))
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(EXPECTED)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                ByteSize::checked(bytes)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(bytes), &self))
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("512MiB", 512 << 20),
            ("1GiB", 1 << 30),
            ("2 TiB", 2 << 40),
            ("1kib", 1024),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(text.parse::<ByteSize>().map(ByteSize::bytes), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn ambiguous_negative_and_overflowing_sizes_are_refused_with_an_example() {
        for text in
            ["", "MiB", "-1", "1.5GiB", "512M", "512MB", "9223372036854775808", "99999999999TiB", "1 2"]
        {
            let message = text.parse::<ByteSize>().map_err(|error| error.to_string());
            let message = message.expect_err(text);
            assert!(message.contains("512MiB") && message.contains(&format!("{text:?}")), "{message}");
        }
    }

    #[test]
    fn a_size_shows_its_largest_even_unit() {
        for text in ["0", "1", "1023", "1KiB", "1025KiB", "1GiB", "3TiB"] {
            assert_eq!(text.parse::<ByteSize>().map(|size| size.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn json_numbers_and_texts_are_sizes() {
        assert_eq!(serde_json::from_str::<ByteSize>("4096").ok(), Some(ByteSize::from_bytes(4096)));
        assert_eq!(serde_json::from_str::<ByteSize>("\"4KiB\"").ok(), Some(ByteSize::from_bytes(4096)));
        assert!(serde_json::from_str::<ByteSize>("18446744073709551615").is_err());
        assert!(serde_json::from_str::<ByteSize>("-1").is_err());
    }

    proptest! {
        #[test]
        fn a_shown_size_reads_back(bytes in 0..=ByteSize::MAX.bytes()) {
            let size = ByteSize::from_bytes(bytes);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".*") {
            if let Ok(size) = text.parse::<ByteSize>() {
                prop_assert!(size <= ByteSize::MAX);
            }
        }
    }
}
