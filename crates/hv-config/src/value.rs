//! Values which settings and flags share, each with one way of being written.

mod byte_size;
mod human_duration;
mod listen_address;
mod secret;

pub use byte_size::ByteSize;
pub use human_duration::HumanDuration;
pub use listen_address::{ListenAddress, ListenHost, ResolveError};
pub use secret::Secret;

use crate::tree::quoted;

/// A text that is not such a value: what was found, what was expected, and an example.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("found {found}, expected {expected}")]
pub struct ValueError {
    found: String,
    expected: &'static str,
}

impl ValueError {
    fn new(text: &str, expected: &'static str) -> Self {
        Self { found: quoted(text), expected }
    }
}

/// serde as text, by way of `Display` and `FromStr`.
macro_rules! text_serde {
    ($type:ty, $expected:expr) => {
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;

                impl serde::de::Visitor<'_> for Text {
                    type Value = $type;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($expected)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$type, E> {
                        text.parse().map_err(E::custom)
                    }
                }

                deserializer.deserialize_str(Text)
            }
        }
    };
}
pub(crate) use text_serde;
