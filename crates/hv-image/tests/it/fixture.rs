//! A store in a private directory, images made in code, and what is asked of both.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use hv_image::{ImageError, Progress, PullRequest, Reference, Result, Store, StoreOptions, StoredImage};
use hv_types::InstanceType;
use serde_json::{Value, json};
use sha2::Digest as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A store, and a directory beside it that nothing may touch.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) store: Store,
    before: BTreeMap<PathBuf, Vec<u8>>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut StoreOptions)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "do not touch").unwrap();
        let mut options = options(dir.path());
        change(&mut options);
        let before = tree(&outside);
        Self { store: Store::open(options).unwrap(), before, dir }
    }

    pub(crate) fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    pub(crate) async fn pull(&self, reference: &str, instance_type: InstanceType) -> Result<StoredImage> {
        pull(&self.store, reference, instance_type, &CancellationToken::new()).await
    }

    /// Pulls what must be refused: nothing outside was touched, and the store has all of its space back.
    pub(crate) async fn refusal(&self, reference: &str, instance_type: InstanceType) -> String {
        let error = self.pull(reference, instance_type).await.expect_err("it was accepted");
        self.assert_untouched();
        self.assert_empty();
        assert!(!error.is_transient(), "{error}");
        said(&error)
    }

    pub(crate) fn assert_untouched(&self) {
        assert_eq!(tree(&self.outside()), self.before, "something outside of the store was touched");
        let mut names: Vec<_> =
            fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names.retain(|name| name != "files");
        assert_eq!(names, ["outside", "store"]);
    }

    pub(crate) fn assert_empty(&self) {
        let left = tree(self.store.dir());
        let left: Vec<_> = left.keys().filter(|path| !path.ends_with("lock")).collect();
        assert!(left.is_empty(), "the store still has {left:?}");
    }
}

/// A store in `dir/store` that speaks plain HTTP to this machine.
pub(crate) fn options(dir: &Path) -> StoreOptions {
    let mut options = StoreOptions::new(dir.join("store"));
    options.allowed_plain_http = vec!["127.0.0.1".to_owned()];
    options.min_free_bytes = 0;
    options.architecture = "amd64".to_owned();
    options
}

pub(crate) async fn pull(
    store: &Store,
    reference: &str,
    instance_type: InstanceType,
    cancel: &CancellationToken,
) -> Result<StoredImage> {
    let request = PullRequest {
        reference: Reference::parse(reference).unwrap(),
        name: "image".to_owned(),
        instance_type,
        digest: None,
    };
    store.pull(&request, &watch::Sender::new(Progress::default()), cancel).await
}

/// An error with its causes, as people see it.
pub(crate) fn said(error: &ImageError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    assert!(text.len() < 1000 && !text.contains('\n'), "{text}");
    text
}

/// Every file below a directory with its content.
pub(crate) fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            files.extend(tree(&path));
        } else if metadata.is_file() {
            files.insert(path.clone(), fs::read(&path).unwrap());
        } else {
            files.insert(path, format!("{:o}", metadata.mode()).into_bytes());
        }
    }
    files
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hash = sha2::Sha256::digest(bytes);
    hash.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress and differ by seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A tar file, made by another program's rules than those that read it; paths are taken as they are.
pub(crate) struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    pub(crate) fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub(crate) fn entry(
        mut self,
        kind: tar::EntryType,
        path: &str,
        mode: u32,
        link: &str,
        data: &[u8],
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        let raw = header.as_old_mut();
        raw.name[..path.len()].copy_from_slice(path.as_bytes());
        raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
        if matches!(kind, tar::EntryType::Char | tar::EntryType::Block) {
            header.set_device_major(8).unwrap();
            header.set_device_minor(0).unwrap();
        }
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub(crate) fn file(self, path: &str, data: &[u8]) -> Self {
        self.entry(tar::EntryType::Regular, path, 0o644, "", data)
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        self.entry(tar::EntryType::Directory, path, 0o755, "", b"")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Symlink, path, 0o777, target, b"")
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(tar::EntryType::Link, path, 0o644, target, b"")
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// An OCI image: its blobs, and its manifest, which is one of them.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) blobs: Vec<Vec<u8>>,
    pub(crate) manifest: Vec<u8>,
}

impl Image {
    /// From uncompressed layers.
    pub(crate) fn new(layers: &[Vec<u8>]) -> Self {
        let compressed: Vec<_> = layers.iter().map(|layer| gzip(layer)).collect();
        Self::build(layers.iter().map(|layer| digest(layer)).collect(), compressed)
    }

    pub(crate) fn build(diff_ids: Vec<String>, compressed: Vec<Vec<u8>>) -> Self {
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Entrypoint": ["/bin/init"],
                "Cmd": ["--verbose"],
                "Env": ["PATH=/bin", "A=b"],
                "WorkingDir": "/srv",
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = config.to_string().into_bytes();
        let layers: Vec<Value> = compressed
            .iter()
            .map(|layer| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", layer))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers,
        });
        let mut blobs = compressed;
        blobs.push(config);
        Self { blobs, manifest: manifest.to_string().into_bytes() }
    }

    /// A small image with what images have.
    pub(crate) fn small() -> Self {
        let base = Archive::new()
            .dir("./")
            .dir("bin/")
            .entry(tar::EntryType::Regular, "bin/init", 0o4755, "", b"#!init")
            .symlink("bin/sh", "init")
            .file("etc/old", b"old")
            .file("etc/kept", b"kept");
        let top = Archive::new()
            .file("etc/.wh.old", b"")
            .file("srv/data", &noise(7, 100_000))
            .hard_link("srv/same", "srv/data");
        Self::new(&[base.bytes(), top.bytes()])
    }
}

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() })
}

/// Runs a program that the tests need and gives what it prints.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|e| panic!("{program} is needed (hack/setup.sh installs it): {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
