//! The agent's settings: every key, its default, and what contradicts what.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use hv_client::{ClientOptions, ClientTls, Peer};
use hv_config::{ByteSize, HumanDuration, ListenAddress};
use hv_driver_qemu::Accel;
use hv_telemetry::{LogFormat, LogLevel};
use hv_types::{InstanceType, NodeId, NodeRole, Resources};
use serde::{Deserialize, Serialize};

use crate::{devices, images};

/// Where the agent keeps its journal and its instances, unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/hypervisor/agent";
/// The least `agent.fencing.margin`.
const LEAST_MARGIN: Duration = Duration::from_millis(500);

/// Everything that can be set.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node and its place.
    pub agent: Agent,
    /// Signs of life.
    pub heartbeat: Heartbeat,
    /// The runtimes.
    pub drivers: Drivers,
    /// What instances are started from.
    pub images: images::Settings,
    /// libvirt, by the keys of the guide.
    pub libvirt: Libvirt,
    /// containerd, by the keys of the guide.
    pub containerd: Containerd,
    /// Firecracker, by the keys of the guide.
    pub firecracker: Firecracker,
    /// Certificates.
    pub tls: Tls,
    /// The least important records that are logged.
    pub log_level: LogLevel,
    /// How records are written.
    pub log_format: LogFormat,
}

/// The node and its place.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Agent {
    /// The node's id; unset: made at the first start and kept in the state directory.
    pub node_id: Option<String>,
    /// Unset: the system's.
    pub hostname: Option<String>,
    /// Where the server and other nodes reach this agent; unset: the address from which this node reaches the server.
    pub ip: Option<String>,
    /// Short for `grpc_address: ":PORT"`.
    pub port: Option<u16>,
    /// Where gRPC listens.
    pub grpc_address: ListenAddress,
    /// Where health and metrics listen.
    pub http_address: ListenAddress,
    /// What the node is for.
    pub role: NodeRole,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// The server; several of one cluster, separated by commas, are tried in turn.
    pub server_addr: String,
    /// Labels of the node.
    pub labels: BTreeMap<String, String>,
    /// Only these types; empty: all that the drivers run.
    pub supported_instance_types: Vec<InstanceType>,
    /// Where journal and instances are kept.
    pub state_dir: PathBuf,
    /// What the node claims to have; unset: what the machine has. More cores than there are overcommit them.
    pub capacity: Capacity,
    /// What instances may not use.
    pub reserved: Reserved,
    /// Stopping what may be started elsewhere when the control plane is out of reach.
    pub fencing: Fencing,
    /// What of this machine is given to one instance at a time.
    pub devices: devices::Settings,
}

/// Stopping what may be started elsewhere when the control plane is out of reach.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fencing {
    /// Whether it is done. Off: nothing of this node is started elsewhere when it is lost.
    pub enabled: bool,
    /// How long before the node's lease can end; unset: a tenth of the lease's time, at least a second.
    pub margin: Option<HumanDuration>,
}

impl Default for Fencing {
    fn default() -> Self {
        Self { enabled: true, margin: None }
    }
}

/// What a node claims to have.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capacity {
    /// Cores.
    pub cpu_cores: Option<u32>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// Disk.
    pub disk: Option<ByteSize>,
}

impl Capacity {
    /// What is claimed, and where nothing is claimed what the machine has.
    pub(crate) fn over(&self, machine: Resources) -> Resources {
        let bytes = |claimed: Option<ByteSize>, has| claimed.map_or(has, |size| size.bytes());
        Resources {
            cpu_cores: self.cpu_cores.unwrap_or(machine.cpu_cores),
            memory_bytes: bytes(self.memory, machine.memory_bytes),
            disk_bytes: bytes(self.disk, machine.disk_bytes),
            gpu_count: machine.gpu_count,
        }
    }
}

/// What is kept back for the node itself.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reserved {
    /// Cores.
    pub cpu_cores: u32,
    /// Memory.
    pub memory: ByteSize,
}

/// Signs of life.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Heartbeat {
    /// How often, where the server does not say.
    pub interval: HumanDuration,
    /// How long a call to the server may take.
    pub timeout: HumanDuration,
    /// First pause after a failed call; it doubles up to five times this.
    pub retry_interval: HumanDuration,
}

/// The runtimes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Drivers {
    /// QEMU without libvirt.
    pub qemu: Qemu,
    /// Runs nothing; for tests.
    pub fake: Fake,
}

/// QEMU without libvirt.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Qemu {
    /// Whether it is used.
    pub enabled: bool,
    /// The emulator; unset: from PATH.
    pub binary: Option<PathBuf>,
    /// qemu-img; unset: from PATH.
    pub qemu_img: Option<PathBuf>,
    /// Where images are; unset: `images` in the state directory.
    pub image_dir: Option<PathBuf>,
    /// Where disks of instances lie that other nodes reach at the same path; unset: in the state directory, on this node alone.
    pub disk_dir: Option<PathBuf>,
    /// How guests are accelerated.
    pub accel: Accel,
    /// The machine type.
    pub machine: String,
}

/// A driver that runs nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fake {
    /// Whether it is used.
    pub enabled: bool,
    /// What it claims to run.
    pub instance_type: InstanceType,
    /// The images it claims to have.
    pub images: Vec<String>,
    /// What goes slowly or wrong, as its annotations spell it: `delay-start: 500ms`.
    pub script: BTreeMap<String, String>,
}

/// libvirt.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Libvirt {
    /// Whether it is used.
    pub enabled: bool,
    /// Connection.
    pub uri: String,
    /// Network of instances that name none; `user` needs none.
    pub default_network: String,
    /// Storage pool of their disks; empty: in the state directory.
    pub default_storage_pool: String,
    /// Where images are.
    pub image_path: PathBuf,
}

/// containerd.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Containerd {
    /// Whether it is used; it is also where `agent.supported_instance_types` names `container`.
    pub enabled: bool,
    /// Socket.
    pub address: PathBuf,
    /// Namespace.
    pub namespace: String,
    /// Snapshotter.
    pub snapshotter: String,
    /// The runtime's shim.
    pub runtime: String,
    /// Under which control group every container gets one of its own.
    pub cgroup_parent: String,
    /// Where the standard CNI plugins are; unset: in the usual places.
    pub cni_bin_dir: Option<PathBuf>,
    /// The bridge that containers are connected to.
    pub bridge: String,
    /// The bridge's network.
    pub subnet: String,
    /// Whether what containers send elsewhere goes out under the node's address.
    pub masquerade: bool,
    /// Where the volumes are, each a directory of its name; unset: there are none.
    pub volumes_dir: Option<PathBuf>,
}

/// Firecracker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Firecracker {
    /// Whether it is used; it is also where `agent.supported_instance_types` names `microvm`.
    pub enabled: bool,
    /// Program; empty: from PATH.
    pub binary_path: PathBuf,
    /// The jailer; unset: beside the program, else from PATH.
    pub jailer_path: Option<PathBuf>,
    /// Whether each microVM is jailed: a user, a root directory and a control group of its own. Needs root.
    pub use_jailer: bool,
    /// The first user id of jailed microVMs.
    pub uid_base: u32,
    /// Kernel of guests that name none, if the file is there.
    pub kernel_path: PathBuf,
    /// Root drive of guests that name a kernel and no image, if the file is there.
    pub root_drive_path: PathBuf,
    /// Where images are; unset: `images` in the state directory.
    pub image_dir: Option<PathBuf>,
    /// The bridge of guests with a network; unset: such guests are refused.
    pub bridge: Option<String>,
    /// A key of the guide: sockets lie in the state directory, where nobody else can reach them.
    pub socket_path: PathBuf,
    /// A key of the guide: logs lie in the state directory.
    pub log_path: PathBuf,
}

/// Certificates.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Whether the agent serves, and dials the server, with TLS.
    pub enabled: bool,
    /// The agent's certificate.
    pub cert_file: Option<PathBuf>,
    /// Its key.
    pub key_file: Option<PathBuf>,
    /// The authority.
    pub ca_file: Option<PathBuf>,
    /// Whether callers must have a certificate of that authority.
    pub client_auth: bool,
}

impl Default for Agent {
    fn default() -> Self {
        Self {
            node_id: None,
            hostname: None,
            ip: None,
            port: None,
            grpc_address: ListenAddress::all(50052),
            http_address: ListenAddress::all(8081),
            role: NodeRole::Worker,
            region: String::new(),
            zone: String::new(),
            server_addr: "127.0.0.1:50051".into(),
            labels: BTreeMap::new(),
            supported_instance_types: Vec::new(),
            state_dir: DEFAULT_STATE_DIR.into(),
            capacity: Capacity::default(),
            reserved: Reserved::default(),
            fencing: Fencing::default(),
            devices: devices::Settings::default(),
        }
    }
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self {
            interval: HumanDuration::from_secs(10),
            timeout: HumanDuration::from_secs(30),
            retry_interval: HumanDuration::from_secs(2),
        }
    }
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            enabled: true,
            binary: None,
            qemu_img: None,
            image_dir: None,
            disk_dir: None,
            accel: Accel::Auto,
            machine: "q35".into(),
        }
    }
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            enabled: false,
            instance_type: InstanceType::Vm,
            images: vec!["tiny".into()],
            script: BTreeMap::new(),
        }
    }
}

impl Default for Libvirt {
    fn default() -> Self {
        Self {
            enabled: false,
            uri: "qemu:///system".into(),
            default_network: "default".into(),
            default_storage_pool: String::new(),
            image_path: "/var/lib/libvirt/images".into(),
        }
    }
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            enabled: false,
            address: "/run/containerd/containerd.sock".into(),
            namespace: "hypervisor".into(),
            snapshotter: "overlayfs".into(),
            runtime: "io.containerd.runc.v2".into(),
            cgroup_parent: "/hypervisor".into(),
            cni_bin_dir: None,
            bridge: "hv-containers".into(),
            subnet: "10.88.0.0/16".into(),
            masquerade: true,
            volumes_dir: None,
        }
    }
}

impl Default for Firecracker {
    fn default() -> Self {
        Self {
            enabled: false,
            binary_path: PathBuf::new(),
            jailer_path: None,
            use_jailer: true,
            uid_base: 200_000,
            image_dir: None,
            bridge: None,
            kernel_path: "/var/lib/hypervisor/firecracker/vmlinux".into(),
            root_drive_path: "/var/lib/hypervisor/firecracker/rootfs.ext4".into(),
            socket_path: "/run/hypervisor/firecracker".into(),
            log_path: "/var/log/hypervisor/firecracker".into(),
        }
    }
}

/// A key whose value cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct Refused {
    /// The dotted key.
    pub key: &'static str,
    /// What was found and what was expected.
    pub problem: String,
}

impl Config {
    /// Checks what the types alone do not.
    ///
    /// # Errors
    /// The first key that cannot be used.
    pub fn check(&self) -> Result<(), Refused> {
        let refuse = |key, problem: String| Err(Refused { key, problem });
        let agent = &self.agent;
        if let Some(Err(invalid)) = agent.node_id.as_ref().map(|id| id.parse::<NodeId>()) {
            return refuse("agent.node_id", format!("found {}, it {}", invalid.value, invalid.expected));
        }
        let written = agent.grpc_address != Agent::default().grpc_address;
        if let Some(port) = agent.port
            && written
            && port != agent.grpc_address.port()
        {
            let problem =
                format!("found {port}, but agent.grpc_address says {}; set one of them", agent.grpc_address);
            return refuse("agent.port", problem);
        }
        for options in self.client_options() {
            if let Err(error) = options.url() {
                return refuse("agent.server_addr", error.to_string());
            }
        }
        if agent.fencing.margin.is_some_and(|margin| margin.get() < LEAST_MARGIN) {
            let problem =
                format!("found less than {LEAST_MARGIN:?}, in which nothing can be stopped for certain");
            return refuse("agent.fencing.margin", problem);
        }
        if let Err(invalid) = hv_types::label::validate_labels("agent.labels", &agent.labels) {
            return refuse("agent.labels", invalid.to_string());
        }
        if agent.state_dir.as_os_str().is_empty() {
            return refuse(
                "agent.state_dir",
                format!("found nothing, expected a directory, as {DEFAULT_STATE_DIR}"),
            );
        }
        for (key, value) in [
            ("heartbeat.interval", self.heartbeat.interval),
            ("heartbeat.timeout", self.heartbeat.timeout),
            ("heartbeat.retry_interval", self.heartbeat.retry_interval),
        ] {
            if value.get().is_zero() {
                return refuse(key, "found 0s, expected more than nothing".into());
            }
        }
        if self.tls.enabled {
            for (key, file) in [
                ("tls.cert_file", &self.tls.cert_file),
                ("tls.key_file", &self.tls.key_file),
                ("tls.ca_file", &self.tls.ca_file),
            ] {
                if file.is_none() {
                    return refuse(
                        key,
                        "found nothing, expected a PEM file because tls.enabled is true".into(),
                    );
                }
            }
        }
        Ok(())
    }

    /// How each server is reached; at least one.
    #[must_use]
    pub fn client_options(&self) -> Vec<ClientOptions> {
        let tls = self.tls.enabled.then(|| ClientTls {
            ca: self.tls.ca_file.clone().unwrap_or_default(),
            cert: self.tls.cert_file.clone(),
            key: self.tls.key_file.clone(),
            domain: None,
        });
        let options = |address: &str| ClientOptions {
            tls: tls.clone(),
            peer: Peer::ServerOfNode,
            ..ClientOptions::new(address.trim())
        };
        self.agent.server_addr.split(',').map(options).collect()
    }

    /// Where gRPC listens.
    #[must_use]
    pub fn grpc_address(&self) -> ListenAddress {
        self.agent.port.map_or_else(
            || self.agent.grpc_address.clone(),
            |port| {
                if self.agent.grpc_address == Agent::default().grpc_address {
                    ListenAddress::all(port)
                } else {
                    self.agent.grpc_address.clone()
                }
            },
        )
    }
}
