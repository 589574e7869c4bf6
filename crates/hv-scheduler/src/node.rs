//! Nodes as the scheduler is told of them.

use std::collections::HashSet;

use hv_types::device::Amounts;
use hv_types::image::is_reference;
use hv_types::node::Schedulability;
use hv_types::placement::Taint;
use hv_types::{InstanceType, Labels, NodeId, NodeRecord, Resources};

/// What the scheduler must know of a node. What is bound to it is told separately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// Which node.
    pub id: NodeId,
    /// Its host name, for explanations.
    pub hostname: String,
    /// Whether its lease lives.
    pub live: bool,
    /// Whether the operator lets it take instances.
    pub open: bool,
    /// What it can run, with a healthy driver.
    pub types: Vec<InstanceType>,
    /// The images it has, for the types whose images must be there beforehand.
    pub images: Images,
    /// Region, may be empty.
    pub region: String,
    /// Zone, may be empty.
    pub zone: String,
    /// Labels that selectors are matched with.
    pub labels: Labels,
    /// What keeps instances off it.
    pub taints: Vec<Taint>,
    /// What may be promised of it in all: after the reserve, with overcommit.
    pub schedulable: Resources,
    /// What it can give to one instance at a time.
    pub devices: Amounts,
}

/// The images of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    /// Types that can start any image.
    pub any: Vec<InstanceType>,
    /// Types whose images it fetches by itself where a reference says where from.
    pub fetched: Vec<InstanceType>,
    /// Images by type and name.
    pub local: HashSet<(InstanceType, String)>,
}

impl Images {
    /// Whether an instance of this type can start from the image; it can always start from none.
    #[must_use]
    pub fn has(&self, instance_type: InstanceType, image: &str) -> bool {
        image.is_empty()
            || self.any.contains(&instance_type)
            || (is_reference(image) && self.fetched.contains(&instance_type))
            || self.local.contains(&(instance_type, image.to_owned()))
    }
}

impl NodeView {
    /// The node of a record, whose lease lives or not.
    #[must_use]
    pub fn of(record: &NodeRecord, live: bool) -> Self {
        let types: Vec<_> = InstanceType::ALL.into_iter().filter(|t| record.runs(*t)).collect();
        let any = |t: &InstanceType| {
            record.drivers.iter().any(|driver| driver.instance_type == *t && !driver.images_are_local)
        };
        let fetches = |t: &InstanceType| {
            record.drivers.iter().any(|driver| driver.instance_type == *t && driver.takes_fetched_images())
        };
        let local = record.images.iter().map(|image| (image.instance_type, image.name.clone())).collect();
        Self {
            id: record.id.clone(),
            hostname: record.hostname.clone(),
            live,
            open: record.schedulability == Schedulability::Open,
            images: Images {
                any: types.iter().copied().filter(any).collect(),
                fetched: types.iter().copied().filter(fetches).collect(),
                local,
            },
            types,
            region: record.region.clone(),
            zone: record.zone.clone(),
            labels: record.scheduling_labels(),
            taints: record.taints.clone(),
            schedulable: record.schedulable(),
            devices: record.devices.amounts(),
        }
    }
}
