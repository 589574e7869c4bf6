//! Things of a node that only one instance can have at a time: processors of its own, huge pages, PCI devices.
//!
//! # Invariants
//! What is asked for is counted by kind, and things of one kind are interchangeable. So the control plane, which counts,
//! and the node, which chooses which, can never disagree about whether there is room.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::instance::InstanceType;
use crate::validate::{self, Invalid};

/// Most kinds of PCI devices that one instance may ask for.
pub const MAX_MODELS: usize = 16;
/// Most devices of one kind that one instance may ask for.
pub const MAX_COUNT: u32 = 32;
/// Most PCI devices that a node may report.
pub const MAX_PCI_DEVICES: usize = 1024;
/// Most processors that a node may report.
pub const MAX_CPUS: usize = 8192;
/// Most pairs of a NUMA node and a size of huge pages that a node may report.
pub const MAX_HUGE_PAGES: usize = 256;
/// The sizes that huge pages come in on x86 and 64-bit ARM, in bytes.
pub const HUGE_PAGE_BYTES: [u64; 5] = [64 << 10, 2 << 20, 32 << 20, 512 << 20, 1 << 30];

/// What kind of PCI device: vendor and device number, as `10de:2204`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Model {
    /// Who made it.
    pub vendor: u16,
    /// Which of theirs.
    pub device: u16,
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x}", self.vendor, self.device)
    }
}

impl std::str::FromStr for Model {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let number = |text: &str| {
            let digits = text.len() == 4 && text.bytes().all(|b| b.is_ascii_hexdigit());
            digits.then(|| u16::from_str_radix(text, 16).ok()).flatten()
        };
        let parts = text.split_once(':').and_then(|(v, d)| Some((number(v)?, number(d)?)));
        let expected = "must be vendor and device, four hexadecimal digits each, as 10de:2204";
        let (vendor, device) = parts.ok_or_else(|| Invalid::new("model", text, expected))?;
        Ok(Self { vendor, device })
    }
}

impl TryFrom<String> for Model {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Model> for String {
    fn from(model: Model) -> Self {
        model.to_string()
    }
}

/// Checks the address of a PCI device: `0000:65:00.0`.
///
/// # Errors
/// The text is no such address.
pub fn pci_address(field: &str, text: &str) -> Result<(), Invalid> {
    let hex = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let parts: Vec<_> = text.split([':', '.']).collect();
    let ok = matches!(parts.as_slice(), [domain, bus, slot, function]
        if hex(domain, 4) && hex(bus, 2) && hex(slot, 2) && matches!(function.as_bytes(), [b'0'..=b'7']))
        && text.as_bytes()[4] == b':'
        && text.as_bytes()[7] == b':';
    if ok {
        return Ok(());
    }
    Err(Invalid::new(field, text, "must be a PCI address in small letters, as 0000:65:00.0"))
}

/// What an instance asks to have for itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceNeeds {
    /// A processor of the node for each of its cores, that no other instance gets as its own.
    pub dedicated_cpus: bool,
    /// Its memory lies in huge pages of this size, in bytes; 0: in ordinary pages.
    pub huge_page_bytes: u64,
    /// PCI devices by kind, with how many.
    pub pci: BTreeMap<Model, u32>,
}

impl DeviceNeeds {
    /// Whether nothing is asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks what a user wrote; `memory_bytes` is the instance's.
    ///
    /// # Errors
    /// Names the field that is refused.
    pub fn validate(&self, instance_type: InstanceType, memory_bytes: u64) -> Result<(), Invalid> {
        if self.is_empty() {
            return Ok(());
        }
        if instance_type != InstanceType::Vm {
            let expected = "is for virtual machines only: no driver of other types gives devices away";
            return Err(Invalid::new("spec.devices", instance_type, expected));
        }
        let size = self.huge_page_bytes;
        if size != 0 && (!HUGE_PAGE_BYTES.contains(&size) || !memory_bytes.is_multiple_of(size)) {
            let expected = "must be 64 KiB, 2, 32 or 512 MiB or 1 GiB, and divide the instance's memory";
            return Err(Invalid::new("spec.devices.huge_page_bytes", size, expected));
        }
        if self.pci.len() > MAX_MODELS {
            let expected = format!("must have at most {MAX_MODELS} entries");
            return Err(Invalid::new("spec.devices.pci", self.pci.len(), expected));
        }
        match self.pci.values().find(|count| **count == 0 || **count > MAX_COUNT) {
            Some(count) => Err(Invalid::new(
                "spec.devices.pci.count",
                count,
                format!("must be between 1 and {MAX_COUNT}"),
            )),
            None => Ok(()),
        }
    }

    /// What is to be counted; `cores` and `memory_bytes` are the instance's.
    #[must_use]
    pub fn amounts(&self, cores: u32, memory_bytes: u64) -> Amounts {
        let mut amounts = BTreeMap::new();
        if self.dedicated_cpus {
            amounts.insert(Kind::Cpu, u64::from(cores));
        }
        if let Some(pages) = memory_bytes.checked_div(self.huge_page_bytes) {
            amounts.insert(Kind::HugePages(self.huge_page_bytes), pages);
        }
        amounts.extend(self.pci.iter().map(|(model, count)| (Kind::Pci(*model), u64::from(*count))));
        Amounts(amounts)
    }
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Processors that are given away whole.
    Cpu,
    /// Huge pages of this size, in bytes.
    HugePages(u64),
    /// PCI devices of this kind.
    Pci(Model),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, 2)
    }
}

impl Kind {
    /// In the singular for one.
    fn write(self, f: &mut fmt::Formatter<'_>, count: u64) -> fmt::Result {
        let s = if count == 1 { "" } else { "s" };
        match self {
            Self::Cpu => write!(f, "dedicated processor{s}"),
            Self::HugePages(size) if size >= 1 << 30 => write!(f, "huge page{s} of {} GiB", size >> 30),
            Self::HugePages(size) if size >= 1 << 20 => write!(f, "huge page{s} of {} MiB", size >> 20),
            Self::HugePages(size) => write!(f, "huge page{s} of {} KiB", size >> 10),
            Self::Pci(model) => write!(f, "PCI device{s} {model}"),
        }
    }
}

/// So many of a kind, for people.
#[derive(Clone, Copy, Debug)]
pub struct Counted(pub u64, pub Kind);

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.0)?;
        self.1.write(f, self.0)
    }
}

/// How many of each kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Amounts(pub BTreeMap<Kind, u64>);

impl Amounts {
    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many of a kind.
    #[must_use]
    pub fn of(&self, kind: Kind) -> u64 {
        self.0.get(&kind).copied().unwrap_or(0)
    }

    /// Adds the other.
    pub fn add(&mut self, other: &Self) {
        for (kind, count) in &other.0 {
            let sum = self.0.entry(*kind).or_default();
            *sum = sum.saturating_add(*count);
        }
    }

    /// Takes the other away, never below nothing.
    pub fn take(&mut self, other: &Self) {
        for (kind, count) in &other.0 {
            if let Some(sum) = self.0.get_mut(kind) {
                *sum = sum.saturating_sub(*count);
                if *sum == 0 {
                    self.0.remove(kind);
                }
            }
        }
    }

    /// Whether `need` fits in what of this is not `used`.
    #[must_use]
    pub fn has_room(&self, used: &Self, need: &Self) -> bool {
        need.0.iter().all(|(kind, count)| *count <= self.of(*kind).saturating_sub(used.of(*kind)))
    }
}

impl fmt::Display for Amounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|(kind, count)| Counted(*count, *kind).to_string()).collect();
        f.write_str(&parts.join(", "))
    }
}

/// What a node has to give away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceInventory {
    /// Processors that are given away whole.
    pub cpus: Vec<Cpu>,
    /// Huge pages.
    pub huge_pages: Vec<HugePages>,
    /// PCI devices that the operator gives away, also those that cannot be used.
    pub pci: Vec<PciDevice>,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpu {
    /// Its number, as the system counts.
    pub id: u32,
    /// Its NUMA node; 0 where there are none.
    pub numa_node: u32,
}

/// Huge pages of one size on one NUMA node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Their size, in bytes.
    pub size_bytes: u64,
    /// Where they are.
    pub numa_node: u32,
    /// How many are reserved in all.
    pub total: u64,
}

/// A PCI device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    /// Where it is: `0000:65:00.0`.
    pub address: String,
    /// What kind.
    pub model: Model,
    /// Its class, 24 bits: a screen or an accelerator begins with 0x03.
    pub class: u32,
    /// Its NUMA node, where it has one.
    pub numa_node: Option<u32>,
    /// Its IOMMU group, where it has one.
    pub iommu_group: Option<u32>,
    /// The driver of the host that it had when it was looked at; may be empty.
    pub driver: String,
    /// Whether it is a virtual function.
    pub is_virtual: bool,
    /// Other functions of the same device, that go along with it.
    pub companions: Vec<String>,
    /// Why it cannot be given away; empty: it can.
    pub unusable: String,
}

impl DeviceInventory {
    /// How many of each kind can be given away.
    #[must_use]
    pub fn amounts(&self) -> Amounts {
        let mut amounts = Amounts::default();
        let mut add = |kind, count| {
            if count > 0 {
                amounts.add(&Amounts(BTreeMap::from([(kind, count)])));
            }
        };
        add(Kind::Cpu, self.cpus.len() as u64);
        self.huge_pages.iter().for_each(|pages| add(Kind::HugePages(pages.size_bytes), pages.total));
        for device in self.pci.iter().filter(|device| device.unusable.is_empty()) {
            add(Kind::Pci(device.model), 1);
        }
        amounts
    }

    /// Checks what an agent sends.
    ///
    /// # Errors
    /// Names the field that is refused.
    pub fn validate(&self) -> Result<(), Invalid> {
        let bounds = [
            ("devices.cpus", self.cpus.len(), MAX_CPUS),
            ("devices.huge_pages", self.huge_pages.len(), MAX_HUGE_PAGES),
            ("devices.pci", self.pci.len(), MAX_PCI_DEVICES),
        ];
        for (field, count, most) in bounds {
            if count > most {
                return Err(Invalid::new(field, count, format!("must have at most {most} entries")));
            }
        }
        let cpus: BTreeSet<_> = self.cpus.iter().map(|cpu| cpu.id).collect();
        if cpus.len() != self.cpus.len() {
            return Err(Invalid::new("devices.cpus", self.cpus.len(), "must not name a processor twice"));
        }
        let mut seen = BTreeSet::new();
        for device in &self.pci {
            pci_address("devices.pci.address", &device.address)?;
            if !seen.insert(&device.address) {
                return Err(Invalid::new("devices.pci.address", &device.address, "must be there once"));
            }
            validate::text("devices.pci.driver", &device.driver, 64)?;
            validate::text("devices.pci.unusable", &device.unusable, 512)?;
            if device.companions.len() > 7 {
                let expected = "must have at most 7 entries";
                return Err(Invalid::new("devices.pci.companions", device.companions.len(), expected));
            }
            device.companions.iter().try_for_each(|one| pci_address("devices.pci.companions", one))?;
        }
        Ok(())
    }
}

/// What a node has given to an instance. Kept in the node's journal until the instance is gone from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceGrant {
    /// Processors: the first is for its first core, and so on.
    pub cpus: Vec<u32>,
    /// The size of its pages, in bytes; 0: ordinary ones.
    pub huge_page_bytes: u64,
    /// The NUMA node that all of it is on; `None`: it is spread over several, or does not matter.
    pub numa_node: Option<u32>,
    /// How many huge pages.
    pub huge_pages: u64,
    /// Addresses of PCI devices, companions too.
    pub pci: Vec<String>,
}

impl DeviceGrant {
    /// Chooses what an instance gets of what others do not hold: on one NUMA node if one can give all of it.
    ///
    /// # Errors
    /// There is not enough; says of what.
    pub fn choose<'a>(
        inventory: &DeviceInventory,
        held: impl IntoIterator<Item = &'a Self>,
        needs: &DeviceNeeds,
        need: &Amounts,
    ) -> Result<Self, String> {
        let free = Free::of(inventory, held);
        let nodes: BTreeSet<u32> = inventory.cpus.iter().map(|cpu| cpu.numa_node).collect();
        let nodes = nodes.into_iter().chain(inventory.huge_pages.iter().map(|pages| pages.numa_node));
        let nodes: BTreeSet<u32> = nodes.chain(free.pci.iter().filter_map(|one| one.numa_node)).collect();
        if nodes.len() < 2 {
            return free.take(None, needs, need);
        }
        let on_one = nodes.into_iter().find_map(|node| free.take(Some(node), needs, need).ok());
        on_one.map_or_else(|| free.take(None, needs, need), Ok)
    }
}

/// What nobody holds.
struct Free<'a> {
    cpus: Vec<Cpu>,
    pages: Vec<HugePages>,
    pci: Vec<&'a PciDevice>,
}

impl<'a> Free<'a> {
    fn of<'b>(inventory: &'a DeviceInventory, held: impl IntoIterator<Item = &'b DeviceGrant>) -> Self {
        let (mut cpus, mut pci) = (inventory.cpus.clone(), Vec::from_iter(&inventory.pci));
        let mut pages = inventory.huge_pages.clone();
        cpus.sort_unstable();
        pci.sort_unstable_by(|a, b| a.address.cmp(&b.address));
        pci.retain(|device| device.unusable.is_empty());
        // Those that are spread take what the others, whose place is known, leave.
        let mut held: Vec<_> = held.into_iter().collect();
        held.sort_by_key(|grant| grant.numa_node.is_none());
        for grant in held {
            cpus.retain(|cpu| !grant.cpus.contains(&cpu.id));
            pci.retain(|device| !grant.pci.contains(&device.address));
            let mut left = grant.huge_pages;
            let here = |pages: &HugePages| {
                pages.size_bytes == grant.huge_page_bytes
                    && grant.numa_node.is_none_or(|node| node == pages.numa_node)
            };
            for pages in pages.iter_mut().filter(|pages| here(pages)) {
                let taken = left.min(pages.total);
                pages.total -= taken;
                left -= taken;
            }
        }
        Self { cpus, pages, pci }
    }

    fn take(&self, node: Option<u32>, needs: &DeviceNeeds, need: &Amounts) -> Result<DeviceGrant, String> {
        let lacks =
            |kind: Kind, has: u64| format!("it needs {}, and {has} are free", Counted(need.of(kind), kind));
        let here = |of: u32| node.is_none_or(|node| node == of);
        let cores = need.of(Kind::Cpu);
        let cpus: Vec<_> = self.cpus.iter().filter(|cpu| here(cpu.numa_node)).map(|cpu| cpu.id).collect();
        let cpus = match usize::try_from(cores) {
            Ok(cores) if cores <= cpus.len() => cpus[..cores].to_vec(),
            _ => return Err(lacks(Kind::Cpu, cpus.len() as u64)),
        };
        let kind = Kind::HugePages(needs.huge_page_bytes);
        let pages = self.pages.iter().filter(|p| p.size_bytes == needs.huge_page_bytes && here(p.numa_node));
        let pages = pages.fold(0_u64, |sum, pages| sum.saturating_add(pages.total));
        if needs.huge_page_bytes != 0 && pages < need.of(kind) {
            return Err(lacks(kind, pages));
        }
        let mut pci = Vec::new();
        for (model, count) in &needs.pci {
            let fits =
                |one: &&&PciDevice| one.model == *model && (node.is_none() || one.numa_node.is_none_or(here));
            let some: Vec<_> = self.pci.iter().filter(fits).take(*count as usize).collect();
            if some.len() < *count as usize {
                return Err(lacks(Kind::Pci(*model), some.len() as u64));
            }
            for device in some {
                pci.push(device.address.clone());
                pci.extend(device.companions.iter().cloned());
            }
        }
        let huge_pages = if needs.huge_page_bytes == 0 { 0 } else { need.of(kind) };
        Ok(DeviceGrant { cpus, huge_page_bytes: needs.huge_page_bytes, numa_node: node, huge_pages, pci })
    }
}

#[cfg(test)]
mod tests;
