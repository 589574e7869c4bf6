//! What of this machine is given to one instance at a time: who has what, and handing it over.
//!
//! # Invariants
//! - Nothing is given unless the operator says so in `agent.devices`.
//! - A thing is held by at most one instance: what is given is entered here under a lock, and in the instance's journal
//!   entry before its driver hears of it. It is free again only when nothing of the instance is left on this node.
//! - While a journal entry cannot be read, it is not known what its instance has: nothing is given.

mod sysfs;
mod vfio;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use hv_types::device::{Model, pci_address};
use hv_types::{DeviceGrant, DeviceInventory, InstanceId, InstanceSpec};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::config::Refused;

/// Most entries of `agent.devices.pci`.
const MAX_PATTERNS: usize = 256;
/// The setting of processors.
const CPUS: &str = "agent.devices.dedicated_cpus";
/// The setting of PCI devices.
const PCI: &str = "agent.devices.pci";

/// What of this machine is given to one instance at a time.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// PCI devices: by address (`0000:65:00.0`), kind (`10de:2204`) or maker (`10de:*`). Instances get all of the device.
    pub pci: Vec<String>,
    /// Processors, as `2-63` or `2,4-7`. Keep the host's own work off them: `isolcpus`, or a cpuset.
    pub dedicated_cpus: String,
    /// Whether the huge pages that the host has reserved are given to instances.
    pub huge_pages: bool,
    /// Where the kernel shows its devices.
    pub sysfs: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            pci: Vec::new(),
            dedicated_cpus: String::new(),
            huge_pages: false,
            sysfs: PathBuf::from("/sys"),
        }
    }
}

/// A PCI device that the operator gives away.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Vendor(u16),
    Model(Model),
    Address(String),
}

impl Pattern {
    fn parse(text: &str) -> Result<Self, Refused> {
        let vendor =
            |text: &str| Some(format!("{}:0000", text.strip_suffix(":*")?).parse::<Model>().ok()?.vendor);
        if let Some(vendor) = vendor(text) {
            return Ok(Self::Vendor(vendor));
        }
        if let Ok(model) = text.parse() {
            return Ok(Self::Model(model));
        }
        let address = text.to_ascii_lowercase();
        pci_address(PCI, &address).map(|()| Self::Address(address)).map_err(|_| {
            let expected = "must have addresses (0000:65:00.0), kinds (10de:2204) or makers (10de:*)";
            Refused { key: PCI, problem: format!("{expected}; got {text:?}") }
        })
    }

    fn matches(&self, address: &str, model: Model) -> bool {
        match self {
            Self::Vendor(vendor) => *vendor == model.vendor,
            Self::Model(wanted) => *wanted == model,
            Self::Address(wanted) => wanted == address,
        }
    }
}

/// Who has what.
pub(crate) struct Devices {
    source: sysfs::Source,
    held: Mutex<BTreeMap<InstanceId, DeviceGrant>>,
    /// A journal entry cannot be read.
    is_blind: bool,
}

impl Devices {
    /// With what the journal says that instances have; `is_blind`: some of the journal cannot be read.
    ///
    /// # Errors
    /// A setting is none.
    pub(crate) fn new(
        settings: &Settings,
        held: BTreeMap<InstanceId, DeviceGrant>,
        is_blind: bool,
    ) -> Result<Self, Refused> {
        if settings.pci.len() > MAX_PATTERNS {
            let problem = format!("must have at most {MAX_PATTERNS} entries; got {}", settings.pci.len());
            return Err(Refused { key: PCI, problem });
        }
        let patterns = settings.pci.iter().map(|text| Pattern::parse(text)).collect::<Result<_, _>>()?;
        let cpus = sysfs::cpu_list(&settings.dedicated_cpus).ok_or_else(|| Refused {
            key: CPUS,
            problem: format!("must be numbers and ranges, as 2,4-7; got {:?}", settings.dedicated_cpus),
        })?;
        let source =
            sysfs::Source { root: settings.sysfs.clone(), patterns, cpus, huge_pages: settings.huge_pages };
        Ok(Self { source, held: Mutex::new(held), is_blind })
    }

    /// What there is to give, whoever has it. Blocks.
    pub(crate) fn inventory(&self) -> DeviceInventory {
        self.source.read(sysfs::allowed_cpus().as_ref())
    }

    /// Gives an instance what it asks for; what it was given before, if it was. Blocks.
    ///
    /// # Errors
    /// It cannot have it now; says why.
    pub(crate) fn give(&self, id: &InstanceId, spec: &InstanceSpec) -> Result<DeviceGrant, String> {
        let inventory = self.inventory();
        let mut held = self.held.lock();
        if let Some(given) = held.get(id) {
            return Ok(given.clone());
        }
        if self.is_blind {
            return Err("the journal of an instance is damaged, and what that has is not known; see the condition Journal".into());
        }
        let grant = DeviceGrant::choose(&inventory, held.values(), &spec.devices, &spec.device_amounts())?;
        held.insert(id.clone(), grant.clone());
        Ok(grant)
    }

    /// What the instance had is free.
    pub(crate) fn release(&self, id: &InstanceId) {
        self.held.lock().remove(id);
    }

    /// Takes the PCI devices of a grant from the host's drivers. Blocks.
    pub(crate) fn bind(&self, grant: &DeviceGrant) -> Result<(), vfio::VfioError> {
        vfio::bind(&self.source.root, &grant.pci, &write)
    }

    /// Hands them back. Blocks.
    pub(crate) fn restore(&self, grant: &DeviceGrant) -> Result<(), vfio::VfioError> {
        vfio::restore(&self.source.root, &grant.pci, &write)
    }
}

/// Writes an attribute that is there.
fn write(path: &Path, text: &str) -> io::Result<()> {
    io::Write::write_all(&mut std::fs::File::options().write(true).open(path)?, text.as_bytes())
}

#[cfg(test)]
mod tests;
