//! The driver's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The driver's configuration; in an agent's configuration file the section of its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerdOptions {
    /// Where each instance has a directory of its own, named after its id. Made when needed.
    pub state_dir: PathBuf,
    /// containerd's socket.
    pub address: PathBuf,
    /// The namespace in containerd that is the driver's own.
    pub namespace: String,
    /// Which of containerd's snapshotters holds the root file systems.
    pub snapshotter: String,
    /// The runtime's shim.
    pub runtime: String,
    /// Under which control group every container gets one of its own.
    pub cgroup_parent: String,
    /// Where the standard CNI plugins are; `None` looks in the usual places.
    pub cni_bin_dir: Option<PathBuf>,
    /// The bridge that containers are connected to; at most 15 characters.
    pub bridge: String,
    /// The bridge's network, in CIDR notation (IPv4).
    pub subnet: String,
    /// Whether what containers send to other networks goes out under the node's address.
    pub masquerade: bool,
    /// Where the volumes are, each a directory of its name; `None`: there are none.
    pub volumes_dir: Option<PathBuf>,
    /// The program that keeps a container's log; `None` is this program itself, which must then call
    /// [`keeper::run_if_asked`](crate::keeper::run_if_asked) first of all.
    pub keeper: Option<PathBuf>,
    /// How long a container's log may grow before it is cut, in bytes; twice as much is kept.
    pub log_file_bytes: u64,
}

impl Default for ContainerdOptions {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::new(),
            address: "/run/containerd/containerd.sock".into(),
            namespace: "hypervisor".to_owned(),
            snapshotter: "overlayfs".to_owned(),
            runtime: "io.containerd.runc.v2".to_owned(),
            cgroup_parent: "/hypervisor".to_owned(),
            cni_bin_dir: None,
            bridge: "hv-containers".to_owned(),
            subnet: "10.88.0.0/16".to_owned(),
            masquerade: true,
            volumes_dir: None,
            keeper: None,
            log_file_bytes: 4 << 20,
        }
    }
}
