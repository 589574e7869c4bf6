//! What the rules about other instances come to for one ask: counts by place, looked up for each node or group.

use hv_types::placement::{AffinityRule, SpreadRule, Topology};

use crate::ask::Ask;
use crate::counts::{Counts, Place};
use crate::explanation::Verdict;
use crate::rejection::Rule;

/// An affinity rule with the peers it asks about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Near<'a> {
    pub(crate) rule: &'a AffinityRule,
    pub(crate) peers: &'a Counts,
    /// It is its own peer, and the first: it may go anywhere.
    pub(crate) first: bool,
}

/// A spread rule with the peers it asks about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Even<'a> {
    pub(crate) rule: &'a SpreadRule,
    pub(crate) peers: &'a Counts,
    /// The fewest that are in one admissible place.
    pub(crate) fewest: u32,
    /// Whether the ask counts itself.
    pub(crate) itself: bool,
}

/// All of them. Nothing is allocated where there are none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules<'a> {
    pub(crate) near: Vec<Near<'a>>,
    pub(crate) even: Vec<Even<'a>>,
    /// Where others keep it away.
    pub(crate) apart: Vec<(Topology, &'a Counts)>,
}

/// Which rules: those that are the same for all nodes of a group, those that are not, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    Group,
    Node,
    Both,
}

impl Scope {
    fn has(self, topology: Topology) -> bool {
        match (self, topology) {
            (Self::Both, _) | (Self::Node, Topology::Node) => true,
            (Self::Group, Topology::Zone | Topology::Region) => true,
            (Self::Group, Topology::Node) | (Self::Node, Topology::Zone | Topology::Region) => false,
        }
    }
}

impl<'a> Near<'a> {
    pub(crate) fn new(ask: &Ask, rule: &'a AffinityRule, peers: &'a Counts) -> Self {
        let first = peers.total == 0 && rule.peers.matches(ask.name(), ask.labels());
        Self { rule, peers, first }
    }

    fn met(&self, place: Place) -> bool {
        (self.peers.at(self.rule.topology, place) > 0) != self.rule.anti
    }
}

impl<'a> Even<'a> {
    pub(crate) fn new(ask: &Ask, rule: &'a SpreadRule, peers: &'a Counts, fewest: u32) -> Self {
        Self { rule, peers, fewest, itself: rule.peers.matches(ask.name(), ask.labels()) }
    }

    fn met(&self, place: Place) -> bool {
        let here = self.peers.at(self.rule.topology, place) + u32::from(self.itself);
        here.saturating_sub(self.fewest) <= self.rule.max_skew
    }
}

impl Rules<'_> {
    /// What the required rules of the scope say of a place.
    pub(crate) fn verdict(&self, scope: Scope, place: Place) -> Verdict {
        let mut verdict = Verdict::default();
        for near in self.near.iter().filter(|near| near.rule.required && scope.has(near.rule.topology)) {
            let excused = near.first && !near.rule.anti;
            let rejects = !excused && !near.met(place);
            let rule = if near.rule.anti { Rule::AntiAffinity } else { Rule::Affinity };
            verdict = verdict.with(rule, rejects);
        }
        for (topology, peers) in self.apart.iter().filter(|(topology, _)| scope.has(*topology)) {
            verdict = verdict.with(Rule::AntiAffinity, peers.at(*topology, place) > 0);
        }
        for even in self.even.iter().filter(|even| even.rule.required && scope.has(even.rule.topology)) {
            verdict = verdict.with(Rule::Spread, !even.met(place));
        }
        verdict
    }

    /// How many preferences of the scope a place meets.
    pub(crate) fn preferences_met(&self, scope: Scope, place: Place) -> u32 {
        let near = self.near.iter().filter(|near| !near.rule.required && scope.has(near.rule.topology));
        let even = self.even.iter().filter(|even| !even.rule.required && scope.has(even.rule.topology));
        let met = near.filter(|near| near.met(place)).count() + even.filter(|even| even.met(place)).count();
        met as u32
    }

    /// How many preferences there are.
    pub(crate) fn preferences(&self) -> u32 {
        let near = self.near.iter().filter(|near| !near.rule.required).count();
        (near + self.even.iter().filter(|even| !even.rule.required).count()) as u32
    }

    /// Whether there is nothing to be looked at.
    pub(crate) fn is_empty(&self) -> bool {
        self.near.is_empty() && self.even.is_empty() && self.apart.is_empty()
    }

    /// Whether nodes of a group differ in what required rules say.
    pub(crate) fn tells_nodes_apart(&self) -> bool {
        let node = Topology::Node;
        self.near.iter().any(|near| near.rule.required && near.rule.topology == node)
            || self.even.iter().any(|even| even.rule.required && even.rule.topology == node)
            || self.apart.iter().any(|(topology, _)| *topology == node)
    }

    /// How many preferences tell nodes of one group apart.
    pub(crate) fn node_preferences(&self) -> u32 {
        let node = Topology::Node;
        let near = self.near.iter().filter(|near| !near.rule.required && near.rule.topology == node);
        let even = self.even.iter().filter(|even| !even.rule.required && even.rule.topology == node);
        (near.count() + even.count()) as u32
    }

    /// Whether nodes of a group differ in what preferences they meet.
    pub(crate) fn prefers_nodes(&self) -> bool {
        self.node_preferences() > 0
    }

    /// The peers on whose nodes it must be, if there is such a rule: no other node need be looked at.
    pub(crate) fn only_with(&self) -> Option<&Counts> {
        let must = |near: &&Near<'_>| near.rule.required && !near.rule.anti && !near.first;
        let node = self.near.iter().filter(must).filter(|near| near.rule.topology == Topology::Node);
        node.map(|near| near.peers).min_by_key(|peers| peers.by(Topology::Node).len())
    }
}
