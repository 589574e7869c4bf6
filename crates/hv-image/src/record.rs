//! What the store writes down: images, the forms made of them, and who uses them. JSON, each with a version.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hv_driver::ImageContent;
use hv_types::{InstanceId, InstanceType};
use serde::{Deserialize, Serialize};

use crate::reference::Digest;

/// A name for a form: `images/<hash of name and type>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) version: u32,
    pub(crate) name: String,
    pub(crate) instance_type: InstanceType,
    /// Of the file or the manifest.
    pub(crate) digest: String,
    /// Of what the reference names: of an index where the manifest came out of one.
    pub(crate) source_digest: String,
    pub(crate) source: String,
    /// What the web server calls it, to ask whether it is still that; empty: not known.
    #[serde(default)]
    pub(crate) validator: String,
    pub(crate) form: String,
    pub(crate) created_at: SystemTime,
    pub(crate) last_used: SystemTime,
}

impl ImageRecord {
    pub(crate) fn file_name(&self) -> String {
        image_file_name(&self.name, self.instance_type)
    }
}

pub(crate) fn image_file_name(name: &str, instance_type: InstanceType) -> String {
    let id = Digest::of(format!("{instance_type}\n{name}").as_bytes());
    format!("{}.json", id.hex())
}

/// What a driver opens: `forms/<key>/form.json` beside the files. Paths are relative to that directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FormRecord {
    pub(crate) version: u32,
    pub(crate) digest: String,
    pub(crate) content: ImageContent,
    pub(crate) architecture: String,
    /// Every file with its SHA-256.
    pub(crate) files: BTreeMap<PathBuf, String>,
    /// What it takes up, in bytes.
    pub(crate) size_bytes: u64,
}

impl FormRecord {
    pub(crate) const FILE: &'static str = "form.json";

    /// The content with absolute paths.
    pub(crate) fn content_in(&self, dir: &Path) -> ImageContent {
        let mut content = self.content.clone();
        match &mut content {
            ImageContent::Disk { path, .. }
            | ImageContent::Oci { layout: path, .. }
            | ImageContent::RootFs { path, .. }
            | ImageContent::Kernel { path } => *path = dir.join(&*path),
        }
        content
    }

    pub(crate) fn form_name(&self) -> &'static str {
        match self.content {
            ImageContent::Disk { .. } => "disk",
            ImageContent::Oci { .. } => "oci",
            ImageContent::RootFs { .. } => "rootfs",
            ImageContent::Kernel { .. } => "kernel",
        }
    }

    /// The digests of the blobs that its files may be hard links of.
    pub(crate) fn digests(&self) -> impl Iterator<Item = Digest> {
        self.files.values().chain([&self.digest]).filter_map(|digest| digest.parse().ok())
    }
}

/// What an instance uses: `users/<instance id>.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct UserRecord {
    pub(crate) version: u32,
    pub(crate) user: InstanceId,
    pub(crate) uses: Vec<Use>,
}

/// One form that an instance uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Use {
    pub(crate) name: String,
    pub(crate) instance_type: InstanceType,
    pub(crate) form: String,
}
