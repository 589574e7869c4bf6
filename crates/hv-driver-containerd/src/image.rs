//! Images: which one an instance is made of, and what it says of the process.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use containerd_client::services::v1::snapshots::StatSnapshotRequest;
use containerd_client::services::v1::{
    DeleteImageRequest, GetImageRequest, ListContainersRequest, ListImagesRequest, ReadContentRequest,
};
use hv_driver::{ImageContent, InstanceConfig};
use hv_types::{ImageInfo, InstanceType};
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::client::{Client, call};
use crate::import;
use crate::problem::{Gone as _, Outcome, Problem};

/// Longest manifest, index or configuration, in bytes.
pub(crate) const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Most layers: what the overlay file system takes.
const MAX_LAYERS: usize = 127;
/// Marks images that the driver brought into containerd, with the layout that they came from; the node's image store
/// lists them.
pub(crate) const IMPORTED: &str = "hypervisor.local/imported";
/// How many names a refusal lists.
const MAX_NAMES: usize = 20;

/// What an image says of the process, and the snapshot that it begins with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageProcess {
    /// The committed snapshot of all layers; empty for an image without any.
    pub(crate) chain: String,
    /// containerd's image record.
    pub(crate) record: String,
    pub(crate) entrypoint: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) working_dir: String,
    pub(crate) user: String,
    pub(crate) stop_signal: String,
}

/// An image as its documents describe it.
pub(crate) struct Documents {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    /// Digests of the unpacked layers, in their order.
    pub(crate) diff_ids: Vec<String>,
    pub(crate) process: ImageProcess,
}

impl Documents {
    /// Reads an image's manifest and configuration.
    pub(crate) fn parse(manifest: &[u8], config: &[u8]) -> Outcome<Self> {
        let damaged = |what: &str, e: oci_spec::OciSpecError| Problem::Image(format!("its {what}: {e}"));
        let manifest = ImageManifest::from_reader(manifest).map_err(|e| damaged("manifest", e))?;
        let parsed = ImageConfiguration::from_reader(config).map_err(|e| damaged("configuration", e))?;
        let (layers, diff_ids) = (manifest.layers().clone(), parsed.rootfs().diff_ids().clone());
        if layers.len() > MAX_LAYERS {
            return Err(Problem::Invalid(format!(
                "its image has {} layers; at most {MAX_LAYERS} can be mounted",
                layers.len()
            )));
        }
        if layers.len() != diff_ids.len() {
            let (layers, ids) = (layers.len(), diff_ids.len());
            return Err(Problem::Image(format!("it has {layers} layers and {ids} digests of their content")));
        }
        if let Some(bad) = diff_ids.iter().find(|id| !is_digest(id)) {
            return Err(Problem::Image(format!("{bad:?} is no digest")));
        }
        let said = parsed.config().clone().unwrap_or_default();
        let process = ImageProcess {
            chain: chains(&diff_ids).pop().unwrap_or_default(),
            record: String::new(),
            entrypoint: said.entrypoint().clone().unwrap_or_default(),
            command: said.cmd().clone().unwrap_or_default(),
            env: said.env().clone().unwrap_or_default(),
            working_dir: said.working_dir().clone().unwrap_or_default(),
            user: said.user().clone().unwrap_or_default(),
            stop_signal: said.stop_signal().clone().unwrap_or_default(),
        };
        Ok(Self { config: manifest.config().clone(), layers, diff_ids, process })
    }
}

/// Whether it is `sha256:` and 64 hexadecimal digits, and so can be part of a path.
pub(crate) fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:").is_some_and(|hex| {
        hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    })
}

pub(crate) fn digest_of(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// The names of the snapshots after each layer (image-spec, "Layer ChainID").
pub(crate) fn chains(diff_ids: &[String]) -> Vec<String> {
    let mut chains: Vec<String> = Vec::with_capacity(diff_ids.len());
    for id in diff_ids {
        let chain = match chains.last() {
            None => id.clone(),
            Some(below) => digest_of(format!("{below} {id}").as_bytes()),
        };
        chains.push(chain);
    }
    chains
}

/// The images that instances are made of.
pub(crate) struct Images {
    client: Client,
    /// Those that are known to be unpacked, by manifest and, if it has one, containerd's own name. One is brought in by
    /// one task, others wait for it.
    known: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<ImageProcess>>>>>,
}

impl Images {
    pub(crate) fn new(client: Client) -> Self {
        Self { client, known: Mutex::default() }
    }

    /// The image of an instance, unpacked.
    pub(crate) async fn resolve(&self, config: &InstanceConfig) -> Outcome<ImageProcess> {
        match config.image.as_ref().map(|image| &image.content) {
            Some(ImageContent::Oci { layout, manifest }) => {
                self.unpacked(manifest.clone(), Box::pin(import::layout(&self.client, layout, manifest)))
                    .await
            }
            Some(_) => Err(Problem::Invalid(format!(
                "image `{}` is not an OCI image, and a container is made of nothing else",
                config.spec.image
            ))),
            None => {
                let (record, manifest) = self.find(&config.spec.image).await?;
                let origin = format!("{manifest} {record}");
                self.unpacked(origin, Box::pin(import::record(&self.client, &record, &manifest))).await
            }
        }
    }

    /// What was brought in may be gone again.
    pub(crate) fn forget(&self) {
        self.known.lock().clear();
    }

    async fn unpacked(
        &self,
        origin: String,
        bring: impl Future<Output = Outcome<ImageProcess>>,
    ) -> Outcome<ImageProcess> {
        let slot = self.known.lock().entry(origin).or_default().clone();
        let mut known = slot.lock().await;
        if let Some(process) = known.as_ref().filter(|process| !process.chain.is_empty()) {
            let (snapshotter, key) = (self.client.snapshotter.clone(), process.chain.clone());
            let mut snapshots = self.client.snapshots();
            let request = self.client.request(StatSnapshotRequest { snapshotter, key });
            if call("stat snapshot", snapshots.stat(request)).await.is_ok() {
                return Ok(process.clone());
            }
        }
        let process = bring.await?;
        Ok(known.insert(process).clone())
    }

    /// The image record of a name, and the digest of its manifest for this machine.
    async fn find(&self, name: &str) -> Outcome<(String, String)> {
        let mut images = self.client.images();
        let request = self.client.request(GetImageRequest { name: name.to_owned() });
        let image = match call("get image", images.get(request)).await {
            Ok(answer) => answer.image,
            // What cannot be a name is none.
            Err(problem) if problem.is_down() => return Err(problem),
            Err(_) => None,
        };
        let Some(target) = image.and_then(|image| image.target) else {
            return Err(Problem::Invalid(self.unknown(name).await?));
        };
        if !MediaType::from(target.media_type.as_str()).is_index() {
            return Ok((name.to_owned(), target.digest));
        }
        let index = read_blob(&self.client, &target.digest).await?;
        let index = ImageIndex::from_reader(index.as_slice())
            .map_err(|e| Problem::Image(format!("its index: {e}")))?;
        let here = Arch::default();
        let fits = |descriptor: &&Descriptor| {
            let platform = descriptor.platform().as_ref();
            platform.is_none_or(|p| *p.architecture() == here && *p.os() == Os::Linux)
        };
        let Some(found) = index.manifests().iter().find(fits) else {
            return Err(Problem::Invalid(format!(
                "image `{name}` is not for this node's architecture ({here})"
            )));
        };
        Ok((name.to_owned(), found.digest().to_string()))
    }

    async fn unknown(&self, name: &str) -> Outcome<String> {
        let mut names: Vec<_> = self.list().await?.into_iter().map(|image| image.name).collect();
        names.truncate(MAX_NAMES);
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let namespace = &self.client.namespace_name;
        Ok(format!(
            "there is no image `{name}` in containerd's namespace {namespace}; there is: {there}; pull it with \
             `hypervisor-ctl image pull`"
        ))
    }

    /// Gives up what was brought in from a layout that is there no more, and that no container is made of: containerd
    /// collects its content and its snapshots then.
    pub(crate) async fn prune(&self) -> Outcome<()> {
        let client = &self.client;
        let request = client.request(ListImagesRequest { filters: Vec::new() });
        for image in call("list images", client.images().list(request)).await?.images {
            let Some(layout) = image.labels.get(IMPORTED) else { continue };
            let manifest = image.target.unwrap_or_default().digest;
            let hex = manifest.strip_prefix("sha256:").unwrap_or_default();
            if Path::new(layout).join("blobs/sha256").join(hex).exists() {
                continue;
            }
            let filters = vec![format!("image=={}", quoted(&image.name))];
            let request = client.request(ListContainersRequest { filters });
            if !call("list containers", client.containers().list(request)).await?.containers.is_empty() {
                continue;
            }
            self.known.lock().remove(&manifest);
            let request = DeleteImageRequest { name: image.name, ..DeleteImageRequest::default() };
            call("delete image", client.images().delete(client.request(request))).await.or_gone()?;
        }
        Ok(())
    }

    /// The images that containerd has under names of their own.
    pub(crate) async fn list(&self) -> Outcome<Vec<ImageInfo>> {
        let mut images = self.client.images();
        let request = self.client.request(ListImagesRequest { filters: Vec::new() });
        let listed = call("list images", images.list(request)).await?.images;
        let own = listed.into_iter().filter(|image| !image.labels.contains_key(IMPORTED));
        let info = own.map(|image| {
            let created = image.created_at.and_then(|at| std::time::SystemTime::try_from(at).ok());
            let target = image.target.unwrap_or_default();
            let size = u64::try_from(target.size).unwrap_or(0);
            let created = created.unwrap_or(std::time::UNIX_EPOCH);
            let mut info = ImageInfo::file(&image.name, InstanceType::Container, size, created);
            (info.digest, info.form) = (target.digest, "oci".to_owned());
            info
        });
        let mut all: Vec<_> = info.collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }
}

/// A value in containerd's filters.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Whether a media type is an index, of either kind.
trait IsIndex {
    fn is_index(&self) -> bool;
}

impl IsIndex for MediaType {
    fn is_index(&self) -> bool {
        match self {
            Self::ImageIndex => true,
            other => other.to_string().contains("manifest.list"),
        }
    }
}

/// A document from containerd's content store, which has verified it.
pub(crate) async fn read_blob(client: &Client, digest: &str) -> Outcome<Vec<u8>> {
    let request = ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 };
    let mut content = client.content();
    let mut pieces = call("read content", content.read(client.request(request))).await?;
    let mut bytes = Vec::new();
    loop {
        let piece = pieces.message().await;
        let piece =
            piece.map_err(|status| Problem::Call { call: "read content", status: Box::new(status) })?;
        let Some(piece) = piece else { return Ok(bytes) };
        bytes.extend_from_slice(&piece.data);
        if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(Problem::Image(format!("{digest} is longer than {MAX_DOCUMENT_BYTES} bytes")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_digests_become_parts_of_paths() {
        assert!(is_digest(&digest_of(b"x")));
        for bad in ["", "sha256:", "sha256:../../etc/passwd", "md5:00", &digest_of(b"x").to_uppercase()] {
            assert!(!is_digest(bad), "{bad}");
        }
    }

    #[test]
    fn a_chain_names_all_layers_below() {
        let ids = [digest_of(b"a"), digest_of(b"b")];
        let chains = chains(&ids);
        assert_eq!(chains[0], ids[0]);
        assert_eq!(chains[1], digest_of(format!("{} {}", ids[0], ids[1]).as_bytes()));
    }

    #[test]
    fn an_image_whose_layers_do_not_match_is_refused() {
        let manifest = |layers: usize| {
            let one = format!(
                r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{}","size":1}}"#,
                digest_of(b"l")
            );
            format!(
                r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":1}},"layers":[{}]}}"#,
                digest_of(b"c"),
                vec![one; layers].join(",")
            )
        };
        let config = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
        assert!(Documents::parse(manifest(0).as_bytes(), config.as_bytes()).is_ok());
        assert!(Documents::parse(manifest(1).as_bytes(), config.as_bytes()).is_err());
        let many = Documents::parse(manifest(1000).as_bytes(), config.as_bytes());
        assert!(many.err().unwrap().to_string().contains("1000 layers"));
    }
}
