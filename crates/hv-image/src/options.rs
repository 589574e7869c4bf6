//! What an operator says about a store: where it lies, whom it trusts, and how much it takes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// How a [`Store`](crate::Store) behaves. [`StoreOptions::new`] gives the defaults, which trust nobody but
/// `https`.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The store's directory, absolute; made if it is not there. It should have a file system with hard
    /// links.
    pub dir: PathBuf,
    /// `host` or `host:port` that are spoken to in plain HTTP: registries, their token servers and web
    /// servers.
    pub allowed_plain_http: Vec<String>,
    /// For a registry (`host[:port]`) the registries that are asked before it, in this order.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Names and passwords for registries, in the format of docker's `config.json` (`auths`). Read at every
    /// pull.
    pub credentials: Option<PathBuf>,
    /// Most bytes that are fetched for one image.
    pub max_image_bytes: u64,
    /// Most layers of an OCI image.
    pub max_layers: usize,
    /// Most bytes of an image's unpacked layers, or of a disk as its guest sees it.
    pub max_unpacked_bytes: u64,
    /// What must stay free on the store's file system.
    pub min_free_bytes: u64,
    /// The program `qemu-img`; without it only raw and qcow2 disks are taken, and only for VMs.
    pub qemu_img: Option<PathBuf>,
    /// The program `mke2fs`; without it no OCI image becomes a root file system.
    pub mke2fs: Option<PathBuf>,
    /// `file://` reaches only what lies in these directories.
    pub allowed_file_dirs: Vec<PathBuf>,
    /// Certificates (PEM) that are trusted beside those of the system.
    pub ca_file: Option<PathBuf>,
    /// The architecture to choose from an image for several, as OCI spells it: `amd64`, `arm64`.
    pub architecture: String,
    /// User and group of the programs that read image files, where the store is root's. They need own
    /// nothing.
    pub confined_ids: (u32, u32),
    /// How long a program may work on one image.
    pub convert_timeout: Duration,
    /// A partial download that nobody went on with for so long is swept away by
    /// [`Store::collect`](crate::Store::collect).
    pub partial_age: Duration,
}

impl StoreOptions {
    /// A store in `dir` with the default bounds.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        const GIB: u64 = 1 << 30;
        Self {
            dir: dir.into(),
            allowed_plain_http: Vec::new(),
            mirrors: BTreeMap::new(),
            credentials: None,
            max_image_bytes: 64 * GIB,
            max_layers: 128,
            max_unpacked_bytes: 256 * GIB,
            min_free_bytes: GIB,
            qemu_img: program("qemu-img"),
            mke2fs: program("mke2fs"),
            allowed_file_dirs: Vec::new(),
            ca_file: None,
            architecture: host_architecture().to_owned(),
            confined_ids: (65534, 65534),
            convert_timeout: Duration::from_secs(30 * 60),
            partial_age: Duration::from_secs(24 * 3600),
        }
    }
}

/// This machine's architecture in OCI's spelling, which is Go's.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

/// Where a program lies: the `PATH`, then where Debian keeps what only root should run.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(sbin)
        .map(|dir| dir.join(name))
        .find(|file| file.is_absolute() && file.is_file())
}
