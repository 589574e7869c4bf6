//! Placement as a pure function: nodes and a request in, a node or the counted rejections out.
//!
//! # Theory of operation
//! Every node passes through the rules in the order of [`Rule`]; the first that rejects it is the one that is
//! counted, so that the counts add up to the number of nodes. Of the nodes that are left, a [`Strategy`] ranks, and
//! chance decides among the near-best: it keeps two schedulers from choosing alike, and a bad node from getting everything.
//!
//! # Invariants
//! - The node chosen has room for the request.
//! - The rejections of a failed placement sum to the number of nodes.

mod rank;
mod rejection;

use hv_types::{InstanceRecord, InstanceType, Labels, NodeId, Resources};
use rand::Rng;

pub use rank::Strategy;
pub use rejection::{Rejections, Rule};

/// A node as the scheduler sees it.
#[derive(Clone, Debug)]
pub struct Candidate {
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
    /// What instances may use of it.
    pub allocatable: Resources,
    /// What is promised already.
    pub allocated: Resources,
}

/// The images of a node.
#[derive(Clone, Debug, Default)]
pub struct Images {
    /// Types that can start any image.
    pub any: Vec<InstanceType>,
    /// Images by type and name.
    pub local: std::collections::HashSet<(InstanceType, String)>,
}

impl Images {
    fn has(&self, instance_type: InstanceType, image: &str) -> bool {
        image.is_empty()
            || self.any.contains(&instance_type)
            || self.local.contains(&(instance_type, image.to_owned()))
    }
}

impl Candidate {
    /// What is left of it.
    #[must_use]
    pub fn free(&self) -> Resources {
        self.allocatable.minus(self.allocated)
    }
}

/// The first rule that keeps `instance` off `node`, if any does.
#[must_use]
pub fn reject(node: &Candidate, instance: &InstanceRecord) -> Option<Rule> {
    let placement = &instance.placement;
    let need = instance.resources();
    let free = node.free();
    let rules = [
        (Rule::PreferredNode, placement.preferred_node.as_ref().is_some_and(|id| *id != node.id)),
        (Rule::NotReady, !node.live),
        (Rule::Cordoned, !node.open),
        (Rule::InstanceType, !node.types.contains(&instance.instance_type)),
        (Rule::Region, !placement.region.is_empty() && placement.region != node.region),
        (Rule::Zone, !placement.zone.is_empty() && placement.zone != node.zone),
        (Rule::Labels, !placement.node_selector.matches(&node.labels)),
        (Rule::Image, !node.images.has(instance.instance_type, &instance.spec.image)),
        (Rule::Cpu, need.cpu_cores > free.cpu_cores),
        (Rule::Memory, need.memory_bytes > free.memory_bytes),
        (Rule::Disk, need.disk_bytes > free.disk_bytes),
        (Rule::Gpu, need.gpu_count > free.gpu_count),
    ];
    rules.into_iter().find_map(|(rule, rejects)| rejects.then_some(rule))
}

/// The index of the node for `instance`.
///
/// # Errors
/// No node can take it; says how many each rule rejected.
pub fn place(
    nodes: &[Candidate],
    instance: &InstanceRecord,
    strategy: Strategy,
    rng: &mut impl Rng,
) -> Result<usize, Rejections> {
    let mut rejections = Rejections::new(nodes.len());
    let mut fitting = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        match reject(node, instance) {
            Some(rule) => rejections.count(rule),
            None => fitting.push(index),
        }
    }
    if fitting.is_empty() {
        return Err(rejections);
    }
    Ok(rank::choose(nodes, &fitting, instance.resources(), strategy, rng))
}

#[cfg(test)]
mod tests;
