//! How many instances of a sort are in which place.

use std::collections::HashMap;

use hv_types::placement::Topology;

use crate::hash::Fixed;

type ByNumber = HashMap<u32, u32, Fixed>;

/// Where something is: a node, its zone and its region, as the fleet numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) node: u32,
    pub(crate) zone: u32,
    pub(crate) region: u32,
}

impl Place {
    fn of(self, topology: Topology) -> u32 {
        match topology {
            Topology::Node => self.node,
            Topology::Zone => self.zone,
            Topology::Region => self.region,
        }
    }
}

/// How many there are in each place; empty places are not kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    nodes: ByNumber,
    zones: ByNumber,
    regions: ByNumber,
    pub(crate) total: u32,
}

impl Counts {
    /// By place, for one way to tell places apart.
    pub(crate) fn by(&self, topology: Topology) -> &ByNumber {
        match topology {
            Topology::Node => &self.nodes,
            Topology::Zone => &self.zones,
            Topology::Region => &self.regions,
        }
    }

    /// How many there are at the place.
    pub(crate) fn at(&self, topology: Topology, place: Place) -> u32 {
        if self.total == 0 {
            return 0;
        }
        self.by(topology).get(&place.of(topology)).copied().unwrap_or(0)
    }

    pub(crate) fn add(&mut self, place: Place) {
        *self.nodes.entry(place.node).or_default() += 1;
        *self.zones.entry(place.zone).or_default() += 1;
        *self.regions.entry(place.region).or_default() += 1;
        self.total += 1;
    }

    pub(crate) fn remove(&mut self, place: Place) {
        let parts =
            [(&mut self.nodes, place.node), (&mut self.zones, place.zone), (&mut self.regions, place.region)];
        for (counts, number) in parts {
            if let Some(count) = counts.get_mut(&number) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(&number);
                }
            }
        }
        self.total -= 1;
    }
}
