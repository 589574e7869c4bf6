//! The rules in the plainest form: every node is looked at, row by row, and nothing is remembered. What the fleet says is
//! compared with this.

use std::collections::{BTreeMap, BTreeSet};

use hv_types::placement::{Peers, Topology};
use hv_types::{InstanceId, NodeId, Resources};

use hv_scheduler::{Ask, NodeView, Rule, Score, fullness};

/// A place: a node, a zone or a region, by name.
type Place = (Topology, String);

/// Nodes, and what is bound to them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reference {
    pub(crate) nodes: BTreeMap<NodeId, NodeView>,
    pub(crate) bound: BTreeMap<InstanceId, (Ask, NodeId)>,
}

/// What the rules about other instances come to for one ask.
#[derive(Debug, Default)]
pub(crate) struct Others {
    /// For each affinity rule: how many peers are where; and whether there is any.
    near: Vec<(BTreeMap<String, u32>, u32)>,
    /// For each spread rule: how many peers are where; and the fewest that are in one admissible place.
    spread: Vec<(BTreeMap<String, u32>, u32)>,
    /// Where somebody keeps it away.
    kept_apart: BTreeSet<Place>,
}

fn place_of(node: &NodeView, topology: Topology) -> String {
    match topology {
        Topology::Node => node.id.to_string(),
        Topology::Zone => node.zone.clone(),
        Topology::Region => node.region.clone(),
    }
}

impl Reference {
    pub(crate) fn used(&self, node: &NodeId) -> Resources {
        let here = self.bound.values().filter(|(_, on)| on == node);
        here.map(|(ask, _)| ask.resources()).sum()
    }

    pub(crate) fn free(&self, node: &NodeView) -> Resources {
        node.schedulable.minus(self.used(&node.id))
    }

    fn count(&self, project: &str, peers: &Peers, topology: Topology) -> (BTreeMap<String, u32>, u32) {
        let mut counts = BTreeMap::new();
        let mut total = 0;
        for (ask, node) in self.bound.values() {
            let Some(node) = self.nodes.get(node) else { continue };
            if **ask.project() == *project && peers.matches(ask.name(), ask.labels()) {
                *counts.entry(place_of(node, topology)).or_default() += 1;
                total += 1;
            }
        }
        (counts, total)
    }

    /// What the rules about other instances come to.
    pub(crate) fn others(&self, ask: &Ask) -> Others {
        let rules = ask.placement();
        let mut others = Others::default();
        for rule in &rules.affinity {
            others.near.push(self.count(ask.project(), &rule.peers, rule.topology));
        }
        for rule in &rules.spread {
            let (counts, _) = self.count(ask.project(), &rule.peers, rule.topology);
            let admissible = self.nodes.values().filter(|node| fixed(node, ask).is_empty());
            let fewest = admissible
                .map(|node| counts.get(&place_of(node, rule.topology)).copied().unwrap_or(0))
                .min()
                .unwrap_or(0);
            others.spread.push((counts, fewest));
        }
        for (other, node) in self.bound.values() {
            let Some(node) = self.nodes.get(node) else { continue };
            if other.project() != ask.project() {
                continue;
            }
            for rule in other.keeps_away().filter(|rule| rule.peers.matches(ask.name(), ask.labels())) {
                others.kept_apart.insert((rule.topology, place_of(node, rule.topology)));
            }
        }
        others
    }

    /// Every rule that keeps the ask off the node, the first first.
    pub(crate) fn rejecting(&self, node: &NodeView, ask: &Ask, others: &Others) -> Vec<Rule> {
        let rules = ask.placement();
        let mut rejecting = fixed(node, ask);
        for (rule, (counts, total)) in rules.affinity.iter().zip(&others.near).filter(|(r, _)| r.required) {
            let here = counts.contains_key(&place_of(node, rule.topology));
            let first = *total == 0 && rule.peers.matches(ask.name(), ask.labels());
            if rule.anti && here {
                rejecting.push(Rule::AntiAffinity);
            } else if !rule.anti && !here && !first {
                rejecting.push(Rule::Affinity);
            }
        }
        for topology in [Topology::Node, Topology::Zone, Topology::Region] {
            if others.kept_apart.contains(&(topology, place_of(node, topology))) {
                rejecting.push(Rule::AntiAffinity);
            }
        }
        for (rule, (counts, fewest)) in rules.spread.iter().zip(&others.spread).filter(|(r, _)| r.required) {
            let here = counts.get(&place_of(node, rule.topology)).copied().unwrap_or(0);
            let itself = u32::from(rule.peers.matches(ask.name(), ask.labels()));
            if (here + itself).saturating_sub(*fewest) > rule.max_skew {
                rejecting.push(Rule::Spread);
            }
        }
        let (need, free) = (ask.resources(), self.free(node));
        let room = [
            (Rule::Cpu, need.cpu_cores > free.cpu_cores),
            (Rule::Memory, need.memory_bytes > free.memory_bytes),
            (Rule::Disk, need.disk_bytes > free.disk_bytes),
            (Rule::Gpu, need.gpu_count > free.gpu_count),
        ];
        rejecting.extend(room.into_iter().filter_map(|(rule, rejects)| rejects.then_some(rule)));
        rejecting.sort_unstable();
        rejecting
    }

    /// What speaks for the node.
    pub(crate) fn score(&self, node: &NodeView, ask: &Ask, others: &Others) -> Score {
        let rules = ask.placement();
        let mut score = Score {
            fullness: fullness(node.schedulable, self.free(node), ask.resources()),
            ..Score::default()
        };
        for (rule, (counts, _)) in rules.affinity.iter().zip(&others.near).filter(|(r, _)| !r.required) {
            score.preferences += 1;
            let here = counts.contains_key(&place_of(node, rule.topology));
            score.preferences_met += u32::from(here != rule.anti);
        }
        for (rule, (counts, fewest)) in rules.spread.iter().zip(&others.spread).filter(|(r, _)| !r.required) {
            score.preferences += 1;
            let here = counts.get(&place_of(node, rule.topology)).copied().unwrap_or(0);
            let itself = u32::from(rule.peers.matches(ask.name(), ask.labels()));
            score.preferences_met += u32::from((here + itself).saturating_sub(*fewest) <= rule.max_skew);
        }
        let soft = node.taints.iter().filter(|taint| !taint.hard && !ask.tolerates(taint)).count();
        score.soft_taints = u32::try_from(soft).unwrap_or(u32::MAX);
        let (of, image) = (ask.instance_type(), ask.image());
        let is_there = node.images.any.contains(&of) || node.images.local.contains(&(of, image.to_owned()));
        score.must_fetch = !is_there && !image.is_empty();
        score
    }
}

/// The rules that depend on the node and the ask alone.
fn fixed(node: &NodeView, ask: &Ask) -> Vec<Rule> {
    let rules = ask.placement();
    let fixed = [
        (Rule::PreferredNode, rules.preferred_node.as_ref().is_some_and(|id| *id != node.id)),
        (Rule::NotReady, !node.live),
        (Rule::Cordoned, !node.open),
        (Rule::InstanceType, !node.types.contains(&ask.instance_type())),
        (Rule::Region, !rules.region.is_empty() && rules.region != node.region),
        (Rule::Zone, !rules.zone.is_empty() && rules.zone != node.zone),
        (Rule::Labels, !rules.node_selector.matches(&node.labels)),
        (Rule::Taint, node.taints.iter().any(|taint| taint.hard && !ask.tolerates(taint))),
        (Rule::Image, !node.images.has(ask.instance_type(), ask.image())),
    ];
    fixed.into_iter().filter_map(|(rule, rejects)| rejects.then_some(rule)).collect()
}
