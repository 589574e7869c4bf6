//! What the kernel shows of processors, huge pages and PCI devices. Everything that is read has a bound.
//!
//! Linux: Documentation/ABI/testing/sysfs-bus-pci, sysfs-devices-system-cpu, sysfs-kernel-mm-hugepages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use hv_types::DeviceInventory;
use hv_types::device::{
    Cpu, HUGE_PAGE_BYTES, HugePages, MAX_CPUS, MAX_HUGE_PAGES, MAX_PCI_DEVICES, Model, PciDevice, pci_address,
};

use super::Pattern;

/// The longest attribute that is read, in bytes.
const MAX_ATTRIBUTE_BYTES: u64 = 16 << 10;
/// Most entries of a directory that are looked at.
const MAX_ENTRIES: usize = 16 << 10;
/// The base class of bridges (PCI Code and ID Assignment, 1.7).
const BRIDGE: u32 = 0x06;

/// Where to look, and what of it is given away.
pub(super) struct Source {
    pub(super) root: PathBuf,
    pub(super) patterns: Vec<Pattern>,
    pub(super) cpus: BTreeSet<u32>,
    pub(super) huge_pages: bool,
}

/// Numbers and ranges, as the kernel writes lists of processors; `None` if the text is none.
pub(super) fn cpu_list(text: &str) -> Option<BTreeSet<u32>> {
    let mut numbers = BTreeSet::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last as usize >= MAX_CPUS {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// The processors that this process, and so what it starts, may run on; `None` where that is not known.
#[cfg(target_os = "linux")]
pub(super) fn allowed_cpus() -> Option<BTreeSet<u32>> {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let set = sched_getaffinity(None).ok()?;
    Some(
        (0..CpuSet::MAX_CPU)
            .filter(|cpu| set.is_set(*cpu))
            .filter_map(|cpu| u32::try_from(cpu).ok())
            .collect(),
    )
}

/// The processors that this process, and so what it starts, may run on; `None` where that is not known.
#[cfg(not(target_os = "linux"))]
pub(super) fn allowed_cpus() -> Option<BTreeSet<u32>> {
    None
}

/// The text of an attribute, without the line's end.
fn attribute(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_ATTRIBUTE_BYTES).read_to_string(&mut text).ok()?;
    Some(text.trim_end().to_owned())
}

fn hexadecimal(path: &Path) -> Option<u32> {
    u32::from_str_radix(attribute(path)?.strip_prefix("0x")?, 16).ok()
}

/// The last part of what a link points to.
pub(super) fn link(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().take(MAX_ENTRIES);
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// A PCI device of the machine, given away or not.
struct Seen {
    device: PciDevice,
    is_allowed: bool,
    has_virtual: bool,
}

impl Seen {
    fn is_bridge(&self) -> bool {
        self.device.class >> 16 == BRIDGE
    }

    /// The address without the function.
    fn slot(&self) -> &str {
        self.device.address.rsplit_once('.').map_or("", |(slot, _)| slot)
    }
}

impl Source {
    /// What there is, whoever has it; of processors only what is in `allowed`, if that is known.
    pub(super) fn read(&self, allowed: Option<&BTreeSet<u32>>) -> DeviceInventory {
        let nodes = self.numa_nodes();
        DeviceInventory {
            cpus: self.cpus(&nodes, allowed),
            huge_pages: if self.huge_pages { self.huge_pages(&nodes) } else { Vec::new() },
            pci: if self.patterns.is_empty() { Vec::new() } else { self.pci() },
        }
    }

    fn numa_nodes(&self) -> BTreeMap<u32, PathBuf> {
        let dir = self.root.join("devices/system/node");
        let number = |name: &String| name.strip_prefix("node")?.parse().ok();
        names(&dir).iter().filter_map(|name| Some((number(name)?, dir.join(name)))).collect()
    }

    fn cpus(&self, nodes: &BTreeMap<u32, PathBuf>, allowed: Option<&BTreeSet<u32>>) -> Vec<Cpu> {
        if self.cpus.is_empty() {
            return Vec::new();
        }
        let list = |path: PathBuf| attribute(&path).and_then(|text| cpu_list(&text));
        let online = list(self.root.join("devices/system/cpu/online")).unwrap_or_default();
        let of_node: Vec<_> =
            nodes.iter().filter_map(|(node, dir)| Some((*node, list(dir.join("cpulist"))?))).collect();
        let node_of =
            |cpu: u32| of_node.iter().find(|(_, cpus)| cpus.contains(&cpu)).map_or(0, |(node, _)| *node);
        let usable = |cpu: &&u32| online.contains(cpu) && allowed.is_none_or(|allowed| allowed.contains(cpu));
        let cpus: Vec<_> =
            self.cpus.iter().filter(usable).map(|id| Cpu { id: *id, numa_node: node_of(*id) }).collect();
        if cpus.len() < self.cpus.len() {
            tracing::debug!(
                asked = self.cpus.len(),
                usable = cpus.len(),
                "some of agent.devices.dedicated_cpus are not online, or this agent may not run on them"
            );
        }
        cpus
    }

    fn huge_pages(&self, nodes: &BTreeMap<u32, PathBuf>) -> Vec<HugePages> {
        let mut dirs: Vec<_> = nodes.iter().map(|(node, dir)| (*node, dir.join("hugepages"))).collect();
        if dirs.is_empty() {
            dirs.push((0, self.root.join("kernel/mm/hugepages")));
        }
        let mut found = Vec::new();
        for (numa_node, dir) in dirs {
            for name in names(&dir) {
                let kib = name.strip_prefix("hugepages-").and_then(|name| name.strip_suffix("kB"));
                let size = kib.and_then(|kib| kib.parse::<u64>().ok()?.checked_mul(1024));
                let total =
                    attribute(&dir.join(&name).join("nr_hugepages")).and_then(|text| text.parse().ok());
                if let (Some(size_bytes), Some(total)) = (size, total)
                    && HUGE_PAGE_BYTES.contains(&size_bytes)
                    && total > 0
                    && found.len() < MAX_HUGE_PAGES
                {
                    found.push(HugePages { size_bytes, numa_node, total });
                }
            }
        }
        found
    }

    fn pci(&self) -> Vec<PciDevice> {
        let dir = self.root.join("bus/pci/devices");
        let seen: Vec<_> = names(&dir).iter().filter_map(|address| self.look(&dir, address)).collect();
        let mut given: Vec<_> = seen
            .iter()
            .filter(|one| one.is_allowed)
            .map(|one| {
                let (companions, unusable) = match judge(one, &seen) {
                    Ok(companions) => (companions, String::new()),
                    Err(why) => (Vec::new(), why),
                };
                PciDevice { companions, unusable, ..one.device.clone() }
            })
            .collect();
        if given.len() > MAX_PCI_DEVICES {
            tracing::warn!(
                devices = given.len(),
                "only the first {MAX_PCI_DEVICES} PCI devices are given away"
            );
            given.truncate(MAX_PCI_DEVICES);
        }
        given
    }

    fn look(&self, dir: &Path, address: &str) -> Option<Seen> {
        pci_address("address", address).ok()?;
        let dir = dir.join(address);
        let number = |name: &str| u16::try_from(hexadecimal(&dir.join(name))?).ok();
        let model = Model { vendor: number("vendor")?, device: number("device")? };
        let virtuals = attribute(&dir.join("sriov_numvfs")).and_then(|text| text.parse::<u32>().ok());
        let device = PciDevice {
            address: address.to_owned(),
            model,
            class: hexadecimal(&dir.join("class"))?,
            // -1 where the firmware does not say.
            numa_node: attribute(&dir.join("numa_node")).and_then(|text| text.parse().ok()),
            iommu_group: link(&dir.join("iommu_group")).and_then(|name| name.parse().ok()),
            driver: link(&dir.join("driver")).unwrap_or_default(),
            is_virtual: fs::symlink_metadata(dir.join("physfn")).is_ok(),
            companions: Vec::new(),
            unusable: String::new(),
        };
        let is_allowed = self.patterns.iter().any(|pattern| pattern.matches(address, model));
        Some(Seen { device, is_allowed, has_virtual: virtuals.is_some_and(|count| count > 0) })
    }
}

/// The other functions that go along with a device, or why it cannot be given away. An IOMMU group is what the hardware
/// keeps apart from the rest, so that all of a group belongs to one owner (Linux: Documentation/driver-api/vfio.rst).
fn judge(one: &Seen, seen: &[Seen]) -> Result<Vec<String>, String> {
    if one.is_bridge() {
        return Err("a bridge is never given away".into());
    }
    if one.has_virtual {
        return Err("its virtual functions are on; give these away instead, or switch them off".into());
    }
    let Some(group) = one.device.iommu_group else {
        return Err(
            "the host has no IOMMU for it; switch it on in the firmware and on the kernel's command line"
                .into(),
        );
    };
    let others: Vec<_> = seen
        .iter()
        .filter(|other| other.device.iommu_group == Some(group) && !other.is_bridge())
        .filter(|other| other.device.address != one.device.address)
        .collect();
    if let Some(other) = others.iter().find(|other| !other.is_allowed) {
        let address = &other.device.address;
        return Err(format!(
            "its IOMMU group {group} also holds {address}, which agent.devices.pci does not give away"
        ));
    }
    if let Some(other) = others.iter().find(|other| other.slot() != one.slot()) {
        let address = &other.device.address;
        return Err(format!("its IOMMU group {group} also holds {address}, which is a device of its own"));
    }
    if let Some(first) = others.iter().map(|other| &other.device.address).min()
        && *first < one.device.address
    {
        return Err(format!("goes along with {first}"));
    }
    Ok(others.iter().map(|other| other.device.address.clone()).collect())
}
