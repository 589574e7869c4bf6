//! Images: what instances are started from.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::instance::InstanceType;

/// An image that a node has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// The name that `spec.image` takes.
    pub name: String,
    /// What can be started from it.
    pub instance_type: InstanceType,
    /// Size on disk, in bytes.
    pub size_bytes: u64,
    /// When it came.
    pub created_at: SystemTime,
    /// `sha256:` and 64 hexadecimal digits; empty for a file that somebody put into the node's image directory.
    #[serde(default)]
    pub digest: String,
    /// Where it was fetched from; empty if it was not.
    #[serde(default)]
    pub source: String,
    /// `amd64`, `arm64`, …; empty if not known.
    #[serde(default)]
    pub architecture: String,
    /// `disk`, `oci`, `rootfs` or `kernel`.
    #[serde(default)]
    pub form: String,
}

/// Whether a node can fetch the image by itself: `oci://…`, `https://…`, `file://…`. Anything else is the name of an image
/// that must be there.
#[must_use]
pub fn is_reference(image: &str) -> bool {
    image.contains("://")
}

impl ImageInfo {
    /// A file that somebody put into the node's image directory: nothing more is known of it.
    #[must_use]
    pub fn file(name: &str, instance_type: InstanceType, size_bytes: u64, created_at: SystemTime) -> Self {
        Self {
            name: name.to_owned(),
            instance_type,
            size_bytes,
            created_at,
            digest: String::new(),
            source: String::new(),
            architecture: String::new(),
            form: String::new(),
        }
    }
}
