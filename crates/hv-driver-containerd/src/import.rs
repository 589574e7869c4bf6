//! Bringing an image into containerd: its blobs into the content store, its layers into snapshots.
//!
//! # Theory of operation
//! Everything is made under a lease, so that containerd's garbage collector leaves it alone until the image record
//! leads to it: from the record to the manifest, from there by labels to configuration and layers, from the
//! configuration to the snapshot of all layers. A lease ends by itself if the agent dies. Snapshots are named after
//! their content (chain ids) and shared by every image and instance that begins with the same layers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{
    ApplyRequest, CreateImageRequest, CreateRequest, DeleteRequest, Image, Info, InfoRequest, UpdateRequest,
    WriteAction, WriteContentRequest,
};
use containerd_client::types::Descriptor as WireDescriptor;
use futures::stream;
use oci_spec::image::Descriptor;
use prost_types::{FieldMask, Timestamp};
use tokio::io::AsyncReadExt as _;
use uuid::Uuid;

use crate::client::{BULK_TIMEOUT, Client, bounded, call};
use crate::image::{
    Documents, IMPORTED, ImageProcess, MAX_DOCUMENT_BYTES, chains, digest_of, is_digest, read_blob,
};
use crate::problem::{Gone as _, Outcome, Problem};

/// How long an import may take before what it made may be collected.
const LEASE: Duration = Duration::from_secs(3600);
/// How much of a blob goes into one message, in bytes.
const PIECE_BYTES: usize = 1 << 20;

/// Something that the garbage collector leaves alone for a while.
struct Lease<'a> {
    client: &'a Client,
    id: String,
}

impl<'a> Lease<'a> {
    async fn take(client: &'a Client) -> Outcome<Self> {
        let id = format!("hypervisor-{}", Uuid::new_v4());
        let expires = Timestamp::from(SystemTime::now() + LEASE).to_string();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expires)]);
        let request = CreateRequest { id: id.clone(), labels };
        call("create lease", client.leases().create(client.request(request))).await?;
        Ok(Self { client, id })
    }

    async fn end(self) {
        let request = DeleteRequest { id: self.id.clone(), sync: false };
        // It ends by itself otherwise.
        let _ = call("delete lease", self.client.leases().delete(self.client.request(request))).await;
    }
}

/// Brings an image in that lies in an OCI layout.
pub(crate) async fn layout(client: &Client, layout: &Path, manifest: &str) -> Outcome<ImageProcess> {
    let manifest_bytes = document(layout, manifest).await?;
    let config = config_digest(&manifest_bytes)?;
    let config_bytes = document(layout, &config).await?;
    let mut documents = Documents::parse(&manifest_bytes, &config_bytes)?;
    documents.process.record = format!("hypervisor.local/image@{manifest}");
    let lease = Lease::take(client).await?;
    let outcome = async {
        for layer in &documents.layers {
            ingest(&lease, layout, layer.digest().as_ref(), HashMap::new()).await?;
        }
        ingest(&lease, layout, &config, HashMap::new()).await?;
        ingest(&lease, layout, manifest, content_labels(&config, &documents)).await?;
        unpack(&lease, &documents).await?;
        let target = WireDescriptor {
            media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
            digest: manifest.to_owned(),
            size: i64::try_from(manifest_bytes.len()).unwrap_or(i64::MAX),
            ..WireDescriptor::default()
        };
        create_record(client, &documents.process.record, target, layout).await
    }
    .await;
    lease.end().await;
    outcome.map(|()| documents.process)
}

/// Unpacks an image that containerd has.
pub(crate) async fn record(client: &Client, name: &str, manifest: &str) -> Outcome<ImageProcess> {
    let manifest_bytes = read_blob(client, manifest).await?;
    let config = config_digest(&manifest_bytes)?;
    let config_bytes = read_blob(client, &config).await?;
    let mut documents = Documents::parse(&manifest_bytes, &config_bytes)?;
    name.clone_into(&mut documents.process.record);
    let lease = Lease::take(client).await?;
    let outcome = unpack(&lease, &documents).await;
    lease.end().await;
    outcome.map(|()| documents.process)
}

fn config_digest(manifest: &[u8]) -> Outcome<String> {
    let manifest = oci_spec::image::ImageManifest::from_reader(manifest)
        .map_err(|e| Problem::Image(format!("its manifest: {e}")))?;
    Ok(manifest.config().digest().to_string())
}

fn blob(layout: &Path, digest: &str) -> Outcome<PathBuf> {
    match digest.split_once(':') {
        Some((_, hex)) if is_digest(digest) => Ok(layout.join("blobs/sha256").join(hex)),
        _ => Err(Problem::Image(format!("{digest:?} is no digest that is known here"))),
    }
}

async fn open(path: &Path) -> Outcome<tokio::fs::File> {
    tokio::fs::File::open(path).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Problem::Image(format!("{} is not there; pull it again", path.display()))
        }
        _ => Problem::file("open", path)(e),
    })
}

/// A manifest or a configuration, verified.
async fn document(layout: &Path, digest: &str) -> Outcome<Vec<u8>> {
    let path = blob(layout, digest)?;
    let file = open(&path).await?;
    let mut bytes = Vec::new();
    file.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes).await.map_err(Problem::file("read", &path))?;
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(Problem::Image(format!("{digest} is longer than {MAX_DOCUMENT_BYTES} bytes")));
    }
    match digest_of(&bytes) == digest {
        true => Ok(bytes),
        false => Err(Problem::Image(format!("what is stored as {digest} is something else"))),
    }
}

/// The way of the garbage collector from a manifest on.
fn content_labels(config: &str, documents: &Documents) -> HashMap<String, String> {
    let label = |name: String| format!("containerd.io/gc.ref.content.{name}");
    let layers = documents.layers.iter().enumerate();
    let layers = layers.map(|(number, layer)| (label(format!("l.{number}")), layer.digest().to_string()));
    layers.chain([(label("config".to_owned()), config.to_owned())]).collect()
}

/// Copies a blob into the content store, which verifies it.
async fn ingest(
    lease: &Lease<'_>,
    layout: &Path,
    digest: &str,
    labels: HashMap<String, String>,
) -> Outcome<()> {
    let client = lease.client;
    let known = client.content().info(client.request(InfoRequest { digest: digest.to_owned() })).await;
    if known.is_ok() {
        return label(client, digest, labels).await;
    }
    let path = blob(layout, digest)?;
    let file = open(&path).await?;
    let total = file.metadata().await.map_err(Problem::file("look at", &path))?.len();
    let total = i64::try_from(total).map_err(|_| Problem::Image(format!("{digest} is too long")))?;
    let template = WriteContentRequest {
        r#ref: format!("hypervisor-{}", Uuid::new_v4()),
        total,
        expected: digest.to_owned(),
        ..WriteContentRequest::default()
    };
    let messages = messages(file, template, labels.clone());
    let write = async {
        let mut answers = client.content().write(client.leased(messages, &lease.id)).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(containerd_client::tonic::Response::new(()))
    };
    match bounded("write content", BULK_TIMEOUT, write).await {
        Err(problem) if problem.is_there() => label(client, digest, labels).await,
        other => other,
    }
}

/// The messages that write a blob; the last one commits it. A file that cannot be read ends them early, and the blob is
/// not committed.
fn messages(
    file: tokio::fs::File,
    template: WriteContentRequest,
    labels: HashMap<String, String>,
) -> impl futures::Stream<Item = WriteContentRequest> + Send + 'static {
    stream::unfold(Some((file, 0i64)), move |state| {
        let (template, labels) = (template.clone(), labels.clone());
        async move {
            let (mut file, offset) = state?;
            let mut data = Vec::with_capacity(PIECE_BYTES);
            (&mut file).take(PIECE_BYTES as u64).read_to_end(&mut data).await.ok()?;
            let next = offset + i64::try_from(data.len()).ok()?;
            let is_last = next >= template.total;
            if data.is_empty() && !is_last {
                return None;
            }
            let action = if is_last { WriteAction::Commit } else { WriteAction::Write };
            let labels = if is_last { labels } else { HashMap::new() };
            let message = WriteContentRequest { action: action.into(), offset, data, labels, ..template };
            Some((message, (!is_last).then_some((file, next))))
        }
    })
}

/// Adds labels to what is in the content store.
async fn label(client: &Client, digest: &str, labels: HashMap<String, String>) -> Outcome<()> {
    if labels.is_empty() {
        return Ok(());
    }
    let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
    let info = Info { digest: digest.to_owned(), labels, ..Info::default() };
    let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
    call("label content", client.content().update(client.request(request))).await.map(drop)
}

async fn create_record(client: &Client, name: &str, target: WireDescriptor, layout: &Path) -> Outcome<()> {
    let labels = HashMap::from([(IMPORTED.to_owned(), layout.display().to_string())]);
    let image = Image { name: name.to_owned(), labels, target: Some(target), ..Image::default() };
    let request = CreateImageRequest { image: Some(image), ..CreateImageRequest::default() };
    match call("create image", client.images().create(client.request(request))).await {
        Err(problem) if !problem.is_there() => Err(problem),
        _ => Ok(()),
    }
}

/// Makes the snapshots of all layers that are not there, and leads the garbage collector to them.
async fn unpack(lease: &Lease<'_>, documents: &Documents) -> Outcome<()> {
    let client = lease.client;
    let chains = chains(&documents.diff_ids);
    let Some(top) = chains.last() else { return Ok(()) };
    let has_snapshot = |key: String| async move {
        let request = StatSnapshotRequest { snapshotter: client.snapshotter.clone(), key };
        call("stat snapshot", client.snapshots().stat(client.request(request))).await.is_ok()
    };
    // From the top: what a snapshot stands on is there too.
    let mut first = chains.len();
    while first > 0 && !has_snapshot(chains[first - 1].clone()).await {
        first -= 1;
    }
    for number in first..chains.len() {
        let parent = number.checked_sub(1).map(|below| chains[below].as_str()).unwrap_or_default();
        let (layer, diff_id) = (&documents.layers[number], &documents.diff_ids[number]);
        unpack_layer(lease, layer, diff_id, parent, &chains[number]).await?;
    }
    let reference = format!("containerd.io/gc.ref.snapshot.{}", client.snapshotter);
    label(client, documents.config.digest().as_ref(), HashMap::from([(reference, top.clone())])).await
}

async fn unpack_layer(
    lease: &Lease<'_>,
    layer: &Descriptor,
    diff_id: &str,
    parent: &str,
    chain: &str,
) -> Outcome<()> {
    let client = lease.client;
    let snapshotter = client.snapshotter.clone();
    let key = format!("extract-{} {chain}", Uuid::new_v4());
    let request = PrepareSnapshotRequest {
        snapshotter: snapshotter.clone(),
        key: key.clone(),
        parent: parent.to_owned(),
        ..PrepareSnapshotRequest::default()
    };
    let request = client.leased(request, &lease.id);
    let mounts = match call("prepare snapshot", client.snapshots().prepare(request)).await {
        Ok(answer) => answer.mounts,
        Err(problem) if problem.is_there() => return Ok(()),
        Err(problem) => return Err(problem),
    };
    let diff = WireDescriptor {
        media_type: layer.media_type().to_string(),
        digest: layer.digest().to_string(),
        size: i64::try_from(layer.size()).unwrap_or(i64::MAX),
        ..WireDescriptor::default()
    };
    let request =
        client.leased(ApplyRequest { diff: Some(diff), mounts, ..ApplyRequest::default() }, &lease.id);
    let applied = bounded("unpack layer", BULK_TIMEOUT, client.diff().apply(request)).await;
    let outcome = match applied.map(|answer| answer.applied.unwrap_or_default().digest) {
        Ok(unpacked) if unpacked == diff_id => {
            let request = CommitSnapshotRequest {
                snapshotter: snapshotter.clone(),
                name: chain.to_owned(),
                key: key.clone(),
                ..CommitSnapshotRequest::default()
            };
            let request = client.leased(request, &lease.id);
            match call("commit snapshot", client.snapshots().commit(request)).await {
                Ok(_) => return Ok(()),
                // Another agent of this machine was quicker.
                Err(problem) if problem.is_there() => Ok(()),
                Err(problem) => Err(problem),
            }
        }
        Ok(unpacked) => Err(Problem::Image(format!("a layer unpacks to {unpacked}, not to {diff_id}"))),
        Err(problem) => Err(problem),
    };
    let request = client.request(RemoveSnapshotRequest { snapshotter, key });
    call("remove snapshot", client.snapshots().remove(request)).await.or_gone()?;
    outcome
}
