//! The nodes as columns: what is asked for together is kept together, and a node is its number in all of them.
//!
//! # Invariants
//! - A node that is in the fleet has a group, and its spot is in that group's lattice, in the cell that its free resources
//!   name. A node that is not, but that something is bound to, has a number and no group.
//! - `free` is what the group says may be promised, less `used`; nothing for a node that is not in the fleet.

use std::collections::HashMap;
use std::sync::Arc;

use hv_types::device::Amounts;
use hv_types::{InstanceId, NodeId, Resources};

use crate::counts::Place;
use crate::groups::{Class, Groups, NO_GROUP};
use crate::hash::Keyed;
use crate::lattice::{Cells, Spot};
use crate::slab::Slab;

/// A sum of resources that cannot overflow, so that what was added can be taken away again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    cpu_cores: u64,
    memory_bytes: u128,
    disk_bytes: u128,
    gpu_count: u64,
}

impl Sum {
    pub(crate) fn add(&mut self, amount: Resources) {
        self.cpu_cores += u64::from(amount.cpu_cores);
        self.memory_bytes += u128::from(amount.memory_bytes);
        self.disk_bytes += u128::from(amount.disk_bytes);
        self.gpu_count += u64::from(amount.gpu_count);
    }

    pub(crate) fn take(&mut self, amount: Resources) {
        self.cpu_cores -= u64::from(amount.cpu_cores);
        self.memory_bytes -= u128::from(amount.memory_bytes);
        self.disk_bytes -= u128::from(amount.disk_bytes);
        self.gpu_count -= u64::from(amount.gpu_count);
    }

    /// The sum, or the most that can be said.
    pub(crate) fn resources(self) -> Resources {
        Resources {
            cpu_cores: u32::try_from(self.cpu_cores).unwrap_or(u32::MAX),
            memory_bytes: u64::try_from(self.memory_bytes).unwrap_or(u64::MAX),
            disk_bytes: u64::try_from(self.disk_bytes).unwrap_or(u64::MAX),
            gpu_count: u32::try_from(self.gpu_count).unwrap_or(u32::MAX),
        }
    }
}

/// Something bound.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    pub(crate) id: InstanceId,
    pub(crate) name: std::sync::Arc<str>,
    pub(crate) resources: Resources,
    pub(crate) devices: Option<Arc<Amounts>>,
    pub(crate) priority: i32,
    pub(crate) node: u32,
    /// Its position among those of its node.
    pub(crate) at_node: u32,
    pub(crate) kind: u32,
    /// Its position among those of its kind.
    pub(crate) at_kind: u32,
    pub(crate) keepers: Box<[u32]>,
}

/// What a node can give to one instance at a time, and what of it is given.
#[derive(Clone, Debug, Default)]
pub(crate) struct Devices {
    has: Amounts,
    used: Amounts,
}

/// The columns.
#[derive(Clone, Debug, Default)]
pub(crate) struct Columns {
    pub(crate) ids: Vec<NodeId>,
    pub(crate) hostnames: Vec<String>,
    /// The host name label, for selectors.
    pub(crate) labels: Vec<Option<String>>,
    pub(crate) group: Vec<u32>,
    pub(crate) free: Vec<Resources>,
    pub(crate) used: Vec<Sum>,
    pub(crate) spot: Vec<Spot>,
    /// What is bound there, by number.
    pub(crate) bound: Vec<Vec<u32>>,
    /// At most the priority of everything bound there; exact where nothing was unbound.
    pub(crate) lowest: Vec<i32>,
    by_id: HashMap<NodeId, u32, Keyed>,
    by_label: HashMap<String, Vec<u32>>,
    spare: Vec<u32>,
    /// How many nodes are in the fleet.
    pub(crate) present: usize,
    pub(crate) groups: Groups,
    pub(crate) cells: Cells,
    pub(crate) instances: Slab<Bound>,
    /// Only of nodes that have some, or of which some are given.
    devices: HashMap<u32, Devices, Keyed>,
}

impl Columns {
    /// The number of a node, in the fleet or not.
    pub(crate) fn find(&self, id: &NodeId) -> Option<u32> {
        self.by_id.get(id).copied()
    }

    /// The number of a node in the fleet.
    pub(crate) fn find_present(&self, id: &NodeId) -> Option<u32> {
        self.find(id).filter(|node| self.is_present(*node))
    }

    pub(crate) fn is_present(&self, node: u32) -> bool {
        self.group.get(node as usize).is_some_and(|group| *group != NO_GROUP)
    }

    /// The nodes with this host name label.
    pub(crate) fn with_label(&self, hostname: &str) -> &[u32] {
        self.by_label.get(hostname).map_or(&[], Vec::as_slice)
    }

    /// The number of a node, a new one if it has none.
    pub(crate) fn number(&mut self, id: &NodeId) -> u32 {
        if let Some(node) = self.find(id) {
            return node;
        }
        let node = self.spare.pop().unwrap_or_else(|| {
            self.ids.push(id.clone());
            self.hostnames.push(String::new());
            self.labels.push(None);
            self.group.push(NO_GROUP);
            self.free.push(Resources::default());
            self.used.push(Sum::default());
            self.spot.push(Spot::default());
            self.bound.push(Vec::new());
            self.lowest.push(i32::MAX);
            self.ids.len() as u32 - 1
        });
        self.ids[node as usize] = id.clone();
        self.by_id.insert(id.clone(), node);
        node
    }

    /// Gives the number up if nothing needs it.
    pub(crate) fn give_up(&mut self, node: u32) {
        let at = node as usize;
        if self.group[at] == NO_GROUP && self.bound[at].is_empty() {
            self.by_id.remove(&self.ids[at]);
            self.lowest[at] = i32::MAX;
            self.spare.push(node);
        }
    }

    /// Takes over what a node can give.
    pub(crate) fn set_devices(&mut self, node: u32, has: Amounts) {
        if !has.is_empty() || self.devices.contains_key(&node) {
            self.change_devices(node, |devices| devices.has = has);
        }
    }

    /// Counts what an instance is given.
    pub(crate) fn give_devices(&mut self, node: u32, some: &Amounts) {
        self.change_devices(node, |devices| devices.used.add(some));
    }

    /// Counts it no longer.
    pub(crate) fn take_devices(&mut self, node: u32, some: &Amounts) {
        self.change_devices(node, |devices| devices.used.take(some));
    }

    fn change_devices(&mut self, node: u32, change: impl FnOnce(&mut Devices)) {
        let devices = self.devices.entry(node).or_default();
        change(devices);
        if devices.has.is_empty() && devices.used.is_empty() {
            self.devices.remove(&node);
        }
    }

    /// Whether a node has so much that nobody has.
    pub(crate) fn has_devices(&self, node: u32, need: &Amounts) -> bool {
        self.devices.get(&node).is_some_and(|devices| devices.has.has_room(&devices.used, need))
    }

    /// Where a node is; `None` if it is not in the fleet.
    pub(crate) fn place(&self, node: u32) -> Option<Place> {
        let group = self.groups.slots.get(self.group[node as usize] as usize)?;
        Some(Place { node, zone: group.zone, region: group.region })
    }

    /// Moves a node into the group of a class.
    pub(crate) fn enter(&mut self, node: u32, class: Class) {
        // The new group first: a zone that is in both keeps its number.
        let group = self.groups.enter(class);
        self.leave(node);
        let at = node as usize;
        self.group[at] = group;
        self.present += 1;
        let group = &mut self.groups.slots[group as usize];
        self.free[at] = group.schedulable().minus(self.used[at].resources());
        self.spot[at] = group.lattice.insert(&mut self.cells, node, self.free[at]);
    }

    /// Takes a node out of its group, if it is in one.
    pub(crate) fn leave(&mut self, node: u32) {
        let at = node as usize;
        let number = std::mem::replace(&mut self.group[at], NO_GROUP);
        if number == NO_GROUP {
            return;
        }
        self.present -= 1;
        self.free[at] = Resources::default();
        self.vacate(number, node);
        self.groups.leave(number);
    }

    fn vacate(&mut self, group: u32, node: u32) {
        let spot = self.spot[node as usize];
        let lattice = &mut self.groups.slots[group as usize].lattice;
        if let Some(moved) = lattice.remove(&mut self.cells, spot) {
            self.spot[moved as usize].position = spot.position;
        }
    }

    /// Brings free resources and cell up to date with what is used.
    pub(crate) fn refresh(&mut self, node: u32) {
        let at = node as usize;
        let number = self.group[at];
        let Some(group) = self.groups.slots.get(number as usize) else { return };
        let free = group.schedulable().minus(self.used[at].resources());
        self.free[at] = free;
        let cell = &mut self.cells.slab[self.spot[at].cell as usize];
        if group.lattice.belongs(cell, free) {
            cell.raise(free);
            return;
        }
        self.vacate(number, node);
        self.spot[at] = self.groups.slots[number as usize].lattice.insert(&mut self.cells, node, free);
    }

    /// Takes over a node's own names.
    pub(crate) fn rename(&mut self, node: u32, hostname: String, label: Option<String>) {
        let at = node as usize;
        self.hostnames[at] = hostname;
        if self.labels[at] == label {
            return;
        }
        if let Some(old) = self.labels[at].take()
            && let Some(nodes) = self.by_label.get_mut(&old)
        {
            nodes.retain(|other| *other != node);
            if nodes.is_empty() {
                self.by_label.remove(&old);
            }
        }
        if let Some(new) = &label {
            self.by_label.entry(new.clone()).or_default().push(node);
        }
        self.labels[at] = label;
    }

    /// The numbers of the nodes in the fleet.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = u32> {
        (0..self.group.len() as u32).filter(|node| self.is_present(*node))
    }

    /// The numbers of the nodes of a group.
    pub(crate) fn members(&self, group: u32) -> impl Iterator<Item = u32> {
        let cells = self.groups.slots[group as usize].lattice.cells();
        cells.iter().flat_map(|cell| self.cells.slab[*cell as usize].nodes.iter().copied())
    }
}
