//! The nodes and what is bound to them, kept up to date change by change; and the questions that are asked of it.
//!
//! # Theory of operation
//! Every change costs what it changes: a binding moves one node to another cell of its group's lattice, and counts one
//! instance more for the rules that ask about its kind. A decision resolves the ask's shape to the open groups
//! ([`shapes`](crate::shapes)), compiles the rules about other instances to counts by place ([`rules`](crate::rules)), and
//! draws a node from the lattices ([`choose`](crate::choose)). Only a decision that fails looks at every node, to count
//! what rejects it.
//!
//! # Invariants
//! - A fleet depends on which nodes and bindings it was told of, not on the order or on what was undone since; chance aside,
//!   so does every answer.
//! - What [`Fleet::place`] returns meets every required rule and has room.

use std::collections::HashMap;

use hv_types::device::Amounts;
use hv_types::{InstanceId, NodeId, Resources};
use rand::Rng;

use crate::Strategy;
use crate::ask::Ask;
use crate::choose::{self, Scratch, Search};
use crate::columns::{Bound, Columns};
use crate::counts::{Counts, Place};
use crate::explanation::{self, Explanation};
use crate::groups::{Class, Fixed};
use crate::hash::Keyed;
use crate::node::NodeView;
use crate::others::{Member, Others};
use crate::preemption::Preemption;
use crate::rejection::Rejections;
use crate::rules::{Even, Near, Rules};
use crate::shapes::Shapes;
use crate::view::{Own, View, fewest};

/// A node's place in the fleet's columns. It is the node's as long as the node is in the fleet, and may be another's after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeIndex(pub(crate) u32);

/// Where an ask goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The node, as the fleet counts.
    pub index: NodeIndex,
    /// The node.
    pub node: NodeId,
}

/// The nodes and what is bound to them.
#[derive(Clone, Debug, Default)]
pub struct Fleet {
    pub(crate) columns: Columns,
    by_instance: HashMap<InstanceId, u32, Keyed>,
    others: Others,
    shapes: Shapes,
    scratch: Scratch,
    /// The queries of the ask that is being decided.
    queries: Vec<u32>,
}

impl Fleet {
    /// Without nodes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a node, or takes over what is new about it. What is bound to it stays.
    pub fn upsert_node(&mut self, node: NodeView) -> NodeIndex {
        let index = self.columns.number(&node.id);
        let hostname = node.hostname.clone();
        self.columns.set_devices(index, node.devices.clone());
        let (class, label) = Class::of(node);
        self.columns.rename(index, hostname, label);
        self.regroup(index, Some(class));
        NodeIndex(index)
    }

    /// Takes a node out; false if it is not there. What is bound to it is remembered, and counts again when it comes back.
    pub fn remove_node(&mut self, node: &NodeId) -> bool {
        let Some(index) = self.columns.find_present(node) else { return false };
        self.columns.rename(index, String::new(), None);
        self.columns.set_devices(index, Amounts::default());
        self.regroup(index, None);
        self.columns.give_up(index);
        true
    }

    /// Says whether the node's lease lives; false if there is no such node.
    pub fn set_live(&mut self, node: &NodeId, live: bool) -> bool {
        let Some(index) = self.columns.find_present(node) else { return false };
        let group = self.columns.group[index as usize];
        let class = &self.columns.groups.slots[group as usize].class;
        if class.live != live {
            let class = Class::clone(class).with_live(live);
            self.regroup(index, Some(class));
        }
        true
    }

    /// Moves a node to another group, or out of the fleet; what is bound to it goes along.
    fn regroup(&mut self, node: u32, class: Option<Class>) {
        let group = self.columns.groups.slots.get(self.columns.group[node as usize] as usize);
        if let (Some(group), Some(class)) = (group, &class)
            && *group.class == *class
        {
            return;
        }
        // Zones that are left may give their numbers up: what is bound departs before, and arrives after.
        self.each_bound(node, Others::depart);
        match class {
            Some(class) => self.columns.enter(node, class),
            None => self.columns.leave(node),
        }
        self.each_bound(node, Others::arrive);
    }

    fn each_bound(&mut self, node: u32, tell: impl Fn(&mut Others, Member<'_>)) {
        let Some(place) = self.columns.place(node) else { return };
        for number in &self.columns.bound[node as usize] {
            tell(&mut self.others, member(self.columns.instances.get(*number), place));
        }
    }

    /// Counts an instance on a node, and on no other any more. The node may be one that is not there yet.
    pub fn bind(&mut self, instance: &InstanceId, ask: &Ask, node: &NodeId) {
        let index = self.columns.number(node);
        self.bind_at(instance, ask, NodeIndex(index));
    }

    /// As [`Self::bind`], for a node that [`Self::place`] named just now.
    pub fn bind_at(&mut self, instance: &InstanceId, ask: &Ask, node: NodeIndex) {
        let node = node.0;
        let keepers =
            if ask.placement().affinity.is_empty() { Box::default() } else { self.others.hold_keepers(ask) };
        let bound = Bound {
            id: instance.clone(),
            name: ask.name().clone(),
            resources: ask.resources(),
            devices: ask.devices().cloned(),
            priority: ask.priority(),
            node,
            at_node: self.columns.bound[node as usize].len() as u32,
            kind: 0,
            at_kind: 0,
            keepers,
        };
        let number = self.columns.instances.insert(bound);
        let (kind, at_kind) = self.others.join_kind(ask, number);
        let bound = self.columns.instances.get_mut(number);
        (bound.kind, bound.at_kind) = (kind, at_kind);
        let at = node as usize;
        self.columns.bound[at].push(number);
        self.columns.used[at].add(ask.resources());
        if let Some(devices) = ask.devices() {
            self.columns.give_devices(node, devices);
        }
        self.columns.lowest[at] = self.columns.lowest[at].min(ask.priority());
        if let Some(place) = self.columns.place(node) {
            self.others.arrive(member(self.columns.instances.get(number), place));
        }
        if let Some(before) = self.by_instance.insert(instance.clone(), number) {
            self.forget(before);
        }
        self.columns.refresh(node);
    }

    /// Counts an instance no longer. Returns the node that it was on.
    pub fn unbind(&mut self, instance: &InstanceId) -> Option<NodeId> {
        let number = self.by_instance.remove(instance)?;
        let node = self.columns.instances.get(number).node;
        let id = self.columns.ids[node as usize].clone();
        self.forget(number);
        Some(id)
    }

    fn forget(&mut self, number: u32) {
        let Some(bound) = self.columns.instances.remove(number) else { return };
        let at = bound.node as usize;
        if let Some(place) = self.columns.place(bound.node) {
            self.others.depart(member(&bound, place));
        }
        self.others.let_keepers_go(&bound.keepers);
        if let Some(moved) = self.others.leave_kind(bound.kind, bound.at_kind) {
            self.columns.instances.get_mut(moved).at_kind = bound.at_kind;
        }
        let here = &mut self.columns.bound[at];
        here.swap_remove(bound.at_node as usize);
        if let Some(&moved) = here.get(bound.at_node as usize) {
            self.columns.instances.get_mut(moved).at_node = bound.at_node;
        }
        if here.is_empty() {
            self.columns.lowest[at] = i32::MAX;
        }
        self.columns.used[at].take(bound.resources);
        if let Some(devices) = &bound.devices {
            self.columns.take_devices(bound.node, devices);
        }
        self.columns.refresh(bound.node);
        self.columns.give_up(bound.node);
    }

    /// The node that an instance is counted on.
    #[must_use]
    pub fn node_of(&self, instance: &InstanceId) -> Option<&NodeId> {
        let number = self.by_instance.get(instance)?;
        Some(&self.columns.ids[self.columns.instances.get(*number).node as usize])
    }

    /// How many nodes there are.
    #[must_use]
    pub fn nodes(&self) -> usize {
        self.columns.present
    }

    /// How many instances are counted, also on nodes that are not there.
    #[must_use]
    pub fn instances(&self) -> usize {
        self.by_instance.len()
    }

    /// How many shapes of asks are remembered, at most 512.
    #[must_use]
    pub fn shapes(&self) -> usize {
        self.shapes.len()
    }

    /// The index of a node.
    #[must_use]
    pub fn index_of(&self, node: &NodeId) -> Option<NodeIndex> {
        self.columns.find_present(node).map(NodeIndex)
    }

    /// The host name of a node; empty if there is none.
    #[must_use]
    pub fn hostname(&self, node: NodeIndex) -> &str {
        self.columns.hostnames.get(node.0 as usize).map_or("", String::as_str)
    }

    /// What is promised of a node.
    #[must_use]
    pub fn allocated(&self, node: &NodeId) -> Resources {
        let node = self.columns.find(node);
        node.map_or(Resources::default(), |node| self.columns.used[node as usize].resources())
    }

    /// What is left of a node; `None` if there is no such node.
    #[must_use]
    pub fn free(&self, node: &NodeId) -> Option<Resources> {
        self.columns.find_present(node).map(|node| self.columns.free[node as usize])
    }

    /// The node for an ask. Nothing is counted yet: see [`Self::bind_at`].
    ///
    /// # Errors
    /// No node can take it; says how many each rule rejected.
    pub fn place(&mut self, ask: &Ask, strategy: Strategy, rng: &mut impl Rng) -> Result<Placed, Rejections> {
        let Self { columns, others, shapes, scratch, queries, .. } = self;
        queries.clear();
        let rules = ask.placement();
        if !rules.affinity.is_empty() || !rules.spread.is_empty() {
            let affinity = rules.affinity.iter().map(|rule| &rule.peers);
            for peers in affinity.chain(rules.spread.iter().map(|rule| &rule.peers)) {
                queries.push(others.ask_for(ask, peers, |number| whereabouts(columns, number)));
            }
        }
        let entry = shapes.resolve(ask, &columns.groups);
        let own = Own::of(columns, ask);
        let counts = queries.iter().map(|query| others.counts(*query));
        let rules = compile(columns, others, &entry.fixed, own, ask, counts);
        let view = View { columns, ask, fixed: &entry.fixed, own, rules };
        let few = own.is_some() || view.rules.only_with().is_some();
        let mut found = None;
        if !few {
            scratch.groups.clear();
            let open = entry.open.iter().filter(|group| columns.groups.slots[**group as usize].nodes > 0);
            let scored = open.filter_map(|group| Some((*group, view.group_score(*group)?.value(strategy))));
            scratch.groups.extend(scored);
            found = search(&view, strategy, scratch, rng);
        }
        if found.is_none() && (few || view.rules.prefers_nodes()) {
            scan(&view, &entry.open, strategy, scratch);
            found = choose::draw(&mut scratch.nodes, rng);
        }
        let placed = match found {
            Some(node) => Ok(Placed { index: NodeIndex(node), node: columns.ids[node as usize].clone() }),
            None => Err(view.rejections()),
        };
        for cell in scratch.searched.drain(..) {
            columns.cells.settle(cell, &columns.free);
        }
        placed
    }

    /// The ask before the fleet, without anything that is remembered.
    fn with_view<T>(&self, ask: &Ask, then: impl FnOnce(&View<'_>) -> T) -> T {
        let columns = &self.columns;
        let fixed: Vec<Fixed> = columns.groups.slots.iter().map(|group| group.class.judge(ask)).collect();
        let own = Own::of(columns, ask);
        let rules = ask.placement();
        let peers = rules.affinity.iter().map(|rule| &rule.peers);
        let peers = peers.chain(rules.spread.iter().map(|rule| &rule.peers));
        let counts: Vec<Counts> = peers
            .map(|peers| self.others.count(ask.project(), peers, |number| whereabouts(columns, number)))
            .collect();
        let rules = compile(columns, &self.others, &fixed, own, ask, counts.iter());
        then(&View { columns, ask, fixed: &fixed, own, rules })
    }

    /// Why an ask goes where it goes, or why it can go nowhere.
    #[must_use]
    pub fn explain(&self, ask: &Ask, strategy: Strategy) -> Explanation {
        self.with_view(ask, |view| explanation::explain(ask, strategy, view.judged()))
    }

    /// The nodes that can take the ask, in the order of their ids.
    #[must_use]
    pub fn fitting(&self, ask: &Ask) -> Vec<NodeId> {
        let mut fitting: Vec<_> = self.with_view(ask, |view| {
            view.judged().filter(|node| node.verdict.fits()).map(|node| node.id.clone()).collect()
        });
        fitting.sort_unstable();
        fitting
    }

    /// Who would have to go so that the ask fits somewhere. `None` if nobody of lower priority could make room. For one that
    /// is to have devices nobody goes: what has them is seldom what can be stopped.
    #[must_use]
    pub fn preempt(&self, ask: &Ask) -> Option<Preemption> {
        if ask.devices().is_some() {
            return None;
        }
        self.with_view(ask, |view| self.make_room(view))
    }

    /// Whether an instance may have to go for an ask: it has lower priority, and the ask does not need it to be near.
    pub(crate) fn may_go(&self, ask: &Ask, bound: &Bound) -> bool {
        let needed = || {
            let near = ask.placement().affinity.iter().filter(|rule| rule.required && !rule.anti);
            let mut peers = near.map(|rule| &rule.peers);
            peers.any(|peers| self.others.is_peer(ask, peers, bound.kind, &bound.name))
        };
        bound.priority < ask.priority() && !needed()
    }
}

fn member(bound: &Bound, place: Place) -> Member<'_> {
    Member { kind: bound.kind, name: &bound.name, keepers: &bound.keepers, place }
}

/// An instance's name and place, if its node is in the fleet.
fn whereabouts(columns: &Columns, number: u32) -> Option<(&str, Place)> {
    let bound = columns.instances.get(number);
    Some((&bound.name, columns.place(bound.node)?))
}

/// The rules about other instances, with the counts of their peers: first of the affinity rules, then of the spread rules.
fn compile<'a>(
    columns: &Columns,
    others: &'a Others,
    fixed: &[Fixed],
    own: Own<'_>,
    ask: &'a Ask,
    mut counts: impl Iterator<Item = &'a Counts>,
) -> Rules<'a> {
    let rules: &'a _ = ask.placement();
    let near =
        rules.affinity.iter().zip(&mut counts).map(|(rule, peers)| Near::new(ask, rule, peers)).collect();
    let even = rules.spread.iter().zip(&mut counts).map(|(rule, peers)| {
        let fewest = fewest(columns, fixed, own, peers, rule.topology);
        Even::new(ask, rule, peers, fewest)
    });
    let even = even.collect();
    let apart = if others.has_keepers() { others.kept_away(ask).collect() } else { Vec::new() };
    Rules { near, even, apart }
}

/// Looks in the lattices of `scratch.groups`. Where preferences tell nodes of a group apart, only among nodes that meet
/// them all, and only if nothing else but fullness tells groups apart: then one of these is the best, if there is any.
fn search(view: &View<'_>, strategy: Strategy, scratch: &mut Scratch, rng: &mut impl Rng) -> Option<u32> {
    let columns = view.columns;
    let prefers = view.rules.prefers_nodes();
    let alike = || scratch.groups.windows(2).all(|pair| pair[0].1 == pair[1].1);
    if prefers && !alike() {
        return None;
    }
    let allows = |node| view.allows(node) && (!prefers || view.likes(node));
    let search = Search {
        groups: &columns.groups.slots,
        free: &columns.free,
        need: view.ask.resources(),
        strategy,
        allows: (prefers || view.rules.tells_nodes_apart() || view.ask.devices().is_some()).then_some(allows),
    };
    search.run(&columns.cells, scratch, rng)
}

/// Scores the nodes that come into question one by one.
fn scan(view: &View<'_>, open: &[u32], strategy: Strategy, scratch: &mut Scratch) {
    let nodes = &mut scratch.nodes;
    nodes.clear();
    let mut look = |node: u32| {
        if view.columns.is_present(node) && view.verdict(node).fits() {
            nodes.push((node, view.score(node).value(strategy)));
        }
    };
    if let Some(named) = view.own.nodes(view.columns) {
        named.iter().copied().for_each(look);
    } else if let Some(peers) = view.rules.only_with() {
        peers.by(hv_types::placement::Topology::Node).keys().copied().for_each(look);
    } else {
        for group in open.iter().filter(|group| view.columns.groups.slots[**group as usize].nodes > 0) {
            view.columns.members(*group).for_each(&mut look);
        }
    }
}
