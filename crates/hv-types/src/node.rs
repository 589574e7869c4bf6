//! Nodes: what they are, what they have and how they are doing.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::device::DeviceInventory;
use crate::id::{NodeId, Revision};
use crate::image::{ImageInfo, is_reference};
use crate::instance::InstanceType;
use crate::label::{Labels, Metadata};
use crate::placement::{Overcommit, Taint};
use crate::resources::Resources;
use crate::validate::{self, Invalid};

/// What a node is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeRole {
    /// Runs control plane parts; instances only where the scheduler is told so.
    Master,
    /// Runs instances.
    #[default]
    Worker,
}

/// Whether a node takes instances. Derived from liveness and what the operator asked for; never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeStatus {
    /// Alive and taking instances.
    Ready,
    /// Its lease is gone.
    NotReady,
    /// Cordoned by the operator: what runs there stays, nothing new comes.
    Maintenance,
    /// Being emptied.
    Draining,
}

impl NodeStatus {
    /// As people and scripts see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::NotReady => "NOT_READY",
            Self::Maintenance => "MAINTENANCE",
            Self::Draining => "DRAINING",
        }
    }
}

/// What the operator wants of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedulability {
    /// Takes instances.
    #[default]
    Open,
    /// Takes no new ones.
    Cordoned,
    /// Gives up those it has.
    Draining,
}

/// One aspect of a node's health.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCondition {
    /// The aspect, in CamelCase: `DriverQemu`.
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word for machines.
    pub reason: String,
    /// A sentence for people, with the remedy.
    pub message: String,
    /// When `status` last changed.
    pub last_transition: SystemTime,
}

/// A driver as its node reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriverInfo {
    /// `qemu`, `fake`, …
    pub name: String,
    /// What it runs.
    pub instance_type: InstanceType,
    /// Whether it can run something now.
    pub healthy: bool,
    /// The runtime's version, as far as known.
    pub version: String,
    /// Why it is not healthy, with the remedy; or what a user should know, as "no KVM, emulating".
    pub message: String,
    /// What it can do: `pause`, `exec`, `console`, …
    pub capabilities: Vec<String>,
    /// Whether only the listed images can be used there.
    pub images_are_local: bool,
}

impl DriverInfo {
    /// Among the capabilities: instances start from images that the node's image store fetches.
    pub const FETCHED_IMAGES: &str = "fetched_images";

    /// Whether its instances start from images that the node fetches by itself.
    #[must_use]
    pub fn takes_fetched_images(&self) -> bool {
        self.capabilities.iter().any(|capability| capability == Self::FETCHED_IMAGES)
    }
}

/// Whether a node would stop its instances by itself if it were cut off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fencing {
    /// Whether it would.
    pub armed: bool,
    /// Why not, with the remedy; or what fences.
    pub message: String,
}

/// A node as stored.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeRecord {
    /// Which node.
    pub id: NodeId,
    /// Its host name.
    pub hostname: String,
    /// Where its agent is reached.
    pub ip: String,
    /// The agent's gRPC port.
    pub port: u16,
    /// What it is for.
    pub role: NodeRole,
    /// Region, may be empty.
    pub region: String,
    /// Zone, may be empty.
    pub zone: String,
    /// What it has.
    pub capacity: Resources,
    /// What instances may use of it.
    pub allocatable: Resources,
    /// What the operator wants of it.
    pub schedulability: Schedulability,
    /// Whether a drain also moves instances whose disks lie here; they start afresh elsewhere.
    pub drain_discards_disks: bool,
    /// How many instances a drain moves at once.
    pub drain_max_parallel: u32,
    /// The operation that tells of the drain, now or last.
    pub drain_operation_id: String,
    /// What keeps instances off it.
    pub taints: Vec<Taint>,
    /// How much more may be promised than there is.
    pub overcommit: Overcommit,
    /// What of `allocatable` is kept back.
    pub reserved: Resources,
    /// Whether the operator holds failover of its instances.
    pub failover_held: bool,
    /// Whether it would stop its instances by itself if it were cut off, as it said last.
    pub fencing: Fencing,
    /// Whether an operator confirmed that it is switched off. Ends with its next registration.
    pub confirmed_down: bool,
    /// How it is doing.
    pub conditions: Vec<NodeCondition>,
    /// Labels and annotations.
    pub metadata: Metadata,
    /// What it can run.
    pub drivers: Vec<DriverInfo>,
    /// The images it has.
    pub images: Vec<ImageInfo>,
    /// What it has to give to one instance at a time.
    pub devices: DeviceInventory,
    /// The agent's version.
    pub agent_version: String,
    /// First registration.
    pub created_at: SystemTime,
    /// Last registration.
    pub registered_at: SystemTime,
    /// The revision this was read at; not part of the value.
    pub revision: Revision,
}

/// Longest region or zone, in bytes.
pub const MAX_LOCATION_BYTES: usize = 63;
/// Most images that a node may report.
pub const MAX_IMAGES: usize = 4096;

/// How many instances a drain moves at once where nobody says.
pub const DEFAULT_DRAIN_PARALLEL: u32 = 4;
/// The most that a drain moves at once.
pub const MAX_DRAIN_PARALLEL: u32 = 100;

impl NodeRecord {
    /// What may be promised of it in all: allocatable less the reserve, with overcommit.
    #[must_use]
    pub fn schedulable(&self) -> Resources {
        self.overcommit.of(self.allocatable.minus(self.reserved))
    }

    /// Whether it runs this type, with a driver that is healthy.
    #[must_use]
    pub fn runs(&self, instance_type: InstanceType) -> bool {
        self.drivers.iter().any(|driver| driver.instance_type == instance_type && driver.healthy)
    }

    /// Whether an instance of this type can use the image here, be it after the node fetched it.
    #[must_use]
    pub fn has_image(&self, instance_type: InstanceType, image: &str) -> bool {
        let fetches = |d: &DriverInfo| d.instance_type == instance_type && d.takes_fetched_images();
        image.is_empty()
            || (is_reference(image) && self.drivers.iter().any(fetches))
            || self.drivers.iter().any(|d| d.instance_type == instance_type && !d.images_are_local)
            || self.images.iter().any(|i| i.instance_type == instance_type && i.name == image)
    }

    /// Labels that selectors of instances are matched with: the node's own and its place.
    #[must_use]
    pub fn scheduling_labels(&self) -> Labels {
        let mut labels = self.metadata.labels.clone();
        labels.insert("hypervisor/hostname".into(), self.hostname.clone());
        labels.insert("hypervisor/region".into(), self.region.clone());
        labels.insert("hypervisor/zone".into(), self.zone.clone());
        labels
    }

    /// Checks what an agent sends of itself.
    ///
    /// # Errors
    /// Names the field that is refused.
    pub fn validate(&self) -> Result<(), Invalid> {
        validate::printable("hostname", &self.hostname, 253)?;
        validate::printable("ip", &self.ip, 253)?;
        for (field, value) in [("region", &self.region), ("zone", &self.zone)] {
            if !value.is_empty() {
                validate::printable(field, value, MAX_LOCATION_BYTES)?;
            }
        }
        if self.images.len() > MAX_IMAGES {
            return Err(Invalid::new(
                "images",
                self.images.len(),
                format!("must have at most {MAX_IMAGES} entries"),
            ));
        }
        self.devices.validate()?;
        self.metadata.validate()
    }
}
