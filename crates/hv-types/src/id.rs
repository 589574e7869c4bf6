//! Identifiers, each a type of its own so that a node id can never stand where an instance id belongs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::validate::{self, Invalid};

/// Longest identifier accepted, in bytes. A generated one has 36.
pub const MAX_ID_BYTES: usize = 64;

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// A new identifier. Version 7 UUIDs sort by their time of creation, so a list in key order is
            /// also a list in order of age.
            #[must_use]
            pub fn generate() -> Self {
                Self(uuid::Uuid::now_v7().to_string().into())
            }

            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                validate::identifier($field, text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = Invalid;

            fn try_from(text: String) -> Result<Self, Invalid> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0.to_string()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

string_id!(
    /// An instance: a virtual machine, a container or a microVM.
    InstanceId,
    "instance_id"
);
string_id!(
    /// A node: one machine that runs an agent.
    NodeId,
    "node_id"
);
string_id!(
    /// A cluster: one store. A node never takes orders from a cluster it was not registered with.
    ClusterId,
    "cluster_id"
);

/// The caller's name for one mutation. The same key has one effect and one answer, however often it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestKey(String);

impl RequestKey {
    /// Longest key accepted, in bytes.
    pub const MAX_BYTES: usize = 128;

    /// A key that nobody else has.
    #[must_use]
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().to_string())
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RequestKey {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        validate::printable("request_key", text, Self::MAX_BYTES)?;
        if text.contains('/') {
            return Err(Invalid::new(
                "request_key",
                text,
                "must not contain `/`; use letters, digits, `-` and `_`",
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for RequestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How often an instance has been bound to a node. Only reports of the current epoch are believed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of the next binding.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A revision of the store: it grows by at least one with every transaction that changes something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_sort_by_age() {
        let ids: Vec<_> = (0..64).map(|_| InstanceId::generate()).collect();
        let mut sorted = ids.clone();
        sorted.sort();
        assert_eq!(ids, sorted);
    }

    #[test]
    fn an_id_with_a_path_separator_is_refused() {
        for bad in ["", "a/b", "..", "a b", "a\u{7}", &"x".repeat(MAX_ID_BYTES + 1)] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad:?} was accepted");
        }
    }
}
