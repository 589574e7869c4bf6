//! Manifests, indexes and configurations of OCI images (image-spec 1.1; docker's schema 2 is the same in
//! other words).

use std::collections::HashSet;

use serde::Deserialize;

use crate::reference::Digest;
use crate::{ImageError, Result, StoreOptions};

/// What a registry may answer with.
pub(crate) const MEDIA_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";
/// Deepest index within an index.
pub(crate) const MAX_INDEX_DEPTH: usize = 3;
/// Largest configuration, in bytes.
pub(crate) const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// The media types of configurations of images that are file systems.
const IMAGE_CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// A blob, as a manifest names it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    digest: String,
    pub(crate) size: u64,
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

/// What a registry answers with.
pub(crate) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// One image for one platform.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
}

/// The configuration of an image that is a file system.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Config {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Process,
    #[serde(default)]
    rootfs: RootFs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Process {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

impl Descriptor {
    pub(crate) fn digest(&self, image: &str) -> Result<Digest> {
        self.digest
            .parse()
            .map_err(|e: hv_types::Invalid| ImageError::refused(image, format!("one of its blobs: {e}")))
    }
}

impl Document {
    /// # Errors
    /// [`ImageError::Refused`] for what is neither, or both: two readers must never see two images in it.
    pub(crate) fn parse(image: &str, bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Either {
            schema_version: u32,
            manifests: Option<Vec<Descriptor>>,
            config: Option<Descriptor>,
            layers: Option<Vec<Descriptor>>,
        }
        let refused = |reason: String| ImageError::refused(image, reason);
        let either: Either = serde_json::from_slice(bytes)
            .map_err(|e| refused(format!("its manifest cannot be read: {e}")))?;
        match either {
            Either { schema_version, .. } if schema_version != 2 => Err(refused(format!(
                "its manifest has the schema version {schema_version}; build it as an OCI image"
            ))),
            Either { manifests: Some(manifests), config: None, layers: None, .. } => {
                Ok(Self::Index(manifests))
            }
            Either { manifests: None, config: Some(config), layers: Some(layers), .. } => {
                Ok(Self::Manifest(Manifest { config, layers }))
            }
            _ => Err(refused("its manifest is neither one of an image nor an index".to_owned())),
        }
    }
}

impl Manifest {
    /// Whether it is a file system; else it is an artifact, a file that lies in a registry.
    pub(crate) fn is_image(&self) -> bool {
        IMAGE_CONFIGS.contains(&self.config.media_type.as_str())
    }

    /// Holds it against the bounds, and gives the bytes of all blobs.
    pub(crate) fn check(&self, image: &str, options: &StoreOptions) -> Result<u64> {
        let too_large = |what: &str, limit: String, option| ImageError::TooLarge {
            image: image.to_owned(),
            what: what.to_owned(),
            limit,
            option,
        };
        if self.layers.len() > options.max_layers {
            let what = format!("the number of its layers, {},", self.layers.len());
            return Err(too_large(&what, options.max_layers.to_string(), "max_layers"));
        }
        if self.config.size > MAX_CONFIG_BYTES {
            return Err(ImageError::refused(
                image,
                format!("its configuration has more than {MAX_CONFIG_BYTES} bytes"),
            ));
        }
        for layer in &self.layers {
            layer.digest(image)?;
            if layer.media_type.contains("foreign") || layer.media_type.contains("nondistributable") {
                let reason = "one of its layers must be fetched from elsewhere, which is not done";
                return Err(ImageError::refused(image, reason));
            }
        }
        let sizes = self.layers.iter().map(|layer| layer.size);
        let total = sizes.fold(self.config.size, u64::saturating_add);
        match total > options.max_image_bytes {
            true => {
                Err(too_large("its size", format!("{} bytes", options.max_image_bytes), "max_image_bytes"))
            }
            false => Ok(total),
        }
    }
}

/// The manifest of an index to go on with: Linux, the node's architecture, the first of several.
pub(crate) fn choose<'a>(
    image: &str,
    manifests: &'a [Descriptor],
    architecture: &str,
) -> Result<&'a Descriptor> {
    let fits = |descriptor: &&Descriptor| {
        descriptor.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == architecture)
    };
    // An index within an index has no platform, nor has the only entry of a layout that was made by hand.
    let bare = |descriptor: &&Descriptor| descriptor.platform.is_none();
    manifests.iter().find(fits).or_else(|| manifests.iter().find(bare)).ok_or_else(|| {
        let there: HashSet<_> = manifests
            .iter()
            .filter_map(|d| d.platform.as_ref())
            .map(|p| format!("{}/{}", p.os, p.architecture))
            .collect();
        let mut there: Vec<_> = there.into_iter().take(8).collect();
        there.sort();
        ImageError::Unsupported {
            image: image.to_owned(),
            reason: format!(
                "it is not there for linux/{architecture}, which this node is; it is there for {}",
                hv_types::validate::excerpt(&there.join(", "))
            ),
        }
    })
}

impl Config {
    pub(crate) fn parse(image: &str, bytes: &[u8], architecture: &str, layers: usize) -> Result<Self> {
        let refused = |reason: String| ImageError::refused(image, reason);
        let config: Self = serde_json::from_slice(bytes)
            .map_err(|e| refused(format!("its configuration cannot be read: {e}")))?;
        let other = |here: &str, wanted: &str| !here.is_empty() && here != wanted;
        if other(&config.os, "linux") || other(&config.architecture, architecture) {
            return Err(ImageError::Unsupported {
                image: image.to_owned(),
                reason: format!(
                    "it is for {}, this node is linux/{architecture}",
                    hv_types::validate::excerpt(&format!("{}/{}", config.os, config.architecture))
                ),
            });
        }
        match config.rootfs.diff_ids.len() == layers {
            true => Ok(config),
            false => {
                Err(refused("its manifest and its configuration differ in the number of layers".to_owned()))
            }
        }
    }

    /// The digests of the uncompressed layers.
    pub(crate) fn diff_ids(&self, image: &str) -> Result<Vec<Digest>> {
        let parse = |id: &String| {
            id.parse()
                .map_err(|e: hv_types::Invalid| ImageError::refused(image, format!("one of its layers: {e}")))
        };
        self.rootfs.diff_ids.iter().map(parse).collect()
    }

    /// Entry point and arguments.
    pub(crate) fn command(&self) -> Vec<String> {
        let part = |part: &Option<Vec<String>>| part.clone().unwrap_or_default();
        [part(&self.config.entrypoint), part(&self.config.cmd)].concat()
    }

    pub(crate) fn env(&self) -> Vec<String> {
        self.config.env.clone().unwrap_or_default()
    }

    pub(crate) fn working_dir(&self) -> String {
        self.config.working_dir.clone().unwrap_or_default()
    }
}
