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
}
