//! Devices: what nodes have and what instances ask for.

use hv_types::device::{Amounts, Cpu, DeviceInventory, DeviceNeeds, HugePages, Model, PciDevice};
use hv_types::{Invalid, NodeRecord};

use crate::v1;

/// What an instance asks for, as the wire carries it; nothing where nothing is asked for.
#[must_use]
pub fn needs_to(needs: &DeviceNeeds) -> Option<v1::DeviceNeeds> {
    let pci = |(model, count): (&Model, &u32)| v1::PciNeed { model: model.to_string(), count: *count };
    (!needs.is_empty()).then(|| v1::DeviceNeeds {
        dedicated_cpus: needs.dedicated_cpus,
        huge_page_bytes: needs.huge_page_bytes,
        pci: needs.pci.iter().map(pci).collect(),
    })
}

/// What an instance asks for, from the wire. One kind that is named twice is added up.
///
/// # Errors
/// A kind of device is none.
pub fn needs_from(needs: Option<v1::DeviceNeeds>) -> Result<DeviceNeeds, Invalid> {
    let Some(needs) = needs else { return Ok(DeviceNeeds::default()) };
    let (dedicated_cpus, huge_page_bytes) = (needs.dedicated_cpus, needs.huge_page_bytes);
    let mut read = DeviceNeeds { dedicated_cpus, huge_page_bytes, ..DeviceNeeds::default() };
    for need in needs.pci {
        let model = need.model.parse().map_err(|error: Invalid| error.within("spec.devices.pci"))?;
        let count: &mut u32 = read.pci.entry(model).or_default();
        *count = count.saturating_add(need.count.max(1));
    }
    Ok(read)
}

/// What a node has, as the wire carries it; nothing where it has nothing.
#[must_use]
pub fn inventory_to(inventory: &DeviceInventory) -> Option<v1::NodeDevices> {
    if *inventory == DeviceInventory::default() {
        return None;
    }
    let cpu = |cpu: &Cpu| v1::NodeCpu { id: cpu.id, numa_node: cpu.numa_node };
    let pages = |pages: &HugePages| v1::NodeHugePages {
        size_bytes: pages.size_bytes,
        numa_node: pages.numa_node,
        total: pages.total,
    };
    let pci = |device: &PciDevice| v1::NodePciDevice {
        address: device.address.clone(),
        model: device.model.to_string(),
        class: device.class,
        numa_node: device.numa_node,
        iommu_group: device.iommu_group,
        driver: device.driver.clone(),
        is_virtual: device.is_virtual,
        companions: device.companions.clone(),
        unusable: device.unusable.clone(),
    };
    Some(v1::NodeDevices {
        cpus: inventory.cpus.iter().map(cpu).collect(),
        huge_pages: inventory.huge_pages.iter().map(pages).collect(),
        pci: inventory.pci.iter().map(pci).collect(),
        amounts: Vec::new(),
    })
}

/// The same, with what there is of each kind and what is promised of it.
pub(super) fn with_promised(
    devices: Option<v1::NodeDevices>,
    record: &NodeRecord,
    promised: &Amounts,
) -> Option<v1::NodeDevices> {
    let mut kinds = record.devices.amounts();
    let total = kinds.clone();
    kinds.add(promised);
    if devices.is_none() && kinds.is_empty() {
        return None;
    }
    let amount = |kind: &hv_types::device::Kind| v1::DeviceAmount {
        kind: kind.to_string(),
        total: total.of(*kind),
        allocated: promised.of(*kind),
    };
    let amounts = kinds.0.keys().map(amount).collect();
    Some(v1::NodeDevices { amounts, ..devices.unwrap_or_default() })
}

/// What a node has, from the wire.
///
/// # Errors
/// A kind of device is none.
pub fn inventory_from(devices: Option<v1::NodeDevices>) -> Result<DeviceInventory, Invalid> {
    let devices = devices.unwrap_or_default();
    let cpu = |cpu: v1::NodeCpu| Cpu { id: cpu.id, numa_node: cpu.numa_node };
    let pages = |pages: v1::NodeHugePages| HugePages {
        size_bytes: pages.size_bytes,
        numa_node: pages.numa_node,
        total: pages.total,
    };
    let pci = |device: v1::NodePciDevice| {
        Ok(PciDevice {
            model: device.model.parse().map_err(|error: Invalid| error.within("devices.pci"))?,
            address: device.address,
            class: device.class,
            numa_node: device.numa_node,
            iommu_group: device.iommu_group,
            driver: device.driver,
            is_virtual: device.is_virtual,
            companions: device.companions,
            unusable: device.unusable,
        })
    };
    Ok(DeviceInventory {
        cpus: devices.cpus.into_iter().map(cpu).collect(),
        huge_pages: devices.huge_pages.into_iter().map(pages).collect(),
        pci: devices.pci.into_iter().map(pci).collect::<Result<_, Invalid>>()?,
    })
}
