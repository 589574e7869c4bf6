//! The scheduler's fleet, kept as the cache's changes say.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use hv_scheduler::{Ask, Fleet, NodeView};
use hv_types::placement::{MAX_PRIORITY, PlacementRules};
use hv_types::{InstanceId, InstanceRecord, NodeId, NodeRecord, Revision};

use crate::cache::State;
use crate::nodes;

/// A node's record and whether it is alive.
type Seen = (Arc<NodeRecord>, bool);

/// Everything that a fleet is made of, taken from the cache in one instant.
pub(crate) struct Snapshot {
    pub(crate) revision: Revision,
    pub(crate) nodes: Vec<Seen>,
    pub(crate) instances: Vec<Arc<InstanceRecord>>,
    pub(crate) sets: Vec<(String, String)>,
    pub(crate) holds: Vec<NodeId>,
}

impl Snapshot {
    pub(crate) fn of(state: &State) -> Self {
        Self {
            revision: state.revision(),
            nodes: state.nodes().map(|(record, entry)| (record.clone(), entry.is_live())).collect(),
            instances: state.instances_after(None).cloned().collect(),
            sets: state.sets().cloned().collect(),
            holds: state.holds().cloned().collect(),
        }
    }
}

/// The fleet, with the records of its nodes.
pub(crate) struct FleetFeed {
    pub(crate) fleet: Fleet,
    nodes: HashMap<NodeId, Seen>,
    /// Room for instances that are to move while they run, which is being written: what is asked for, and where.
    held: HashMap<InstanceId, (Ask, NodeId)>,
    /// Nodes to which nothing is bound for a moment.
    closed: HashSet<NodeId>,
    /// Whether instances that lie on their node for good are kept from having to give way.
    shields: bool,
}

impl FleetFeed {
    pub(crate) fn new(snapshot: &Snapshot, shields: bool) -> Self {
        let mut feed = Self {
            fleet: Fleet::new(),
            nodes: HashMap::new(),
            held: HashMap::new(),
            closed: snapshot.holds.iter().cloned().collect(),
            shields,
        };
        for seen in &snapshot.nodes {
            feed.set_node(&seen.0.id, Some(seen));
        }
        for record in snapshot.instances.iter().filter(|record| record.binding.is_some()) {
            feed.set_instance(&record.id, None, Some(record));
        }
        feed
    }

    /// What a record asks for. Where instances may have to give way for others, one that cannot be moved has a priority
    /// above all that can be asked for.
    pub(crate) fn ask(&self, record: &InstanceRecord) -> Ask {
        if self.shields && record.binding.is_some() && nodes::stays(record, false).is_some() {
            let rules =
                PlacementRules { priority: MAX_PRIORITY + 1, ..PlacementRules::clone(&record.placement) };
            return Ask::of(&InstanceRecord { placement: Arc::new(rules), ..record.clone() });
        }
        Ask::of(record)
    }

    /// A node's record.
    pub(crate) fn node(&self, id: &NodeId) -> Option<&Arc<NodeRecord>> {
        self.nodes.get(id).map(|(record, _)| record)
    }

    /// Takes a node over as it is; whether the change matters to placement.
    pub(crate) fn set_node(&mut self, id: &NodeId, after: Option<&Seen>) -> bool {
        let Some((record, live)) = after else {
            self.nodes.remove(id);
            return self.fleet.remove_node(id);
        };
        let open = !self.closed.contains(id);
        let view = NodeView::of(record, *live && open);
        let before = self.nodes.insert(id.clone(), (record.clone(), *live));
        if before.is_some_and(|(before, was_live)| NodeView::of(&before, was_live && open) == view) {
            return false;
        }
        self.fleet.upsert_node(view);
        true
    }

    /// Somebody looks what room a node has, or is done with that; whether it takes instances again.
    pub(crate) fn set_hold(&mut self, id: &NodeId, held: bool) -> bool {
        let changed = if held { self.closed.insert(id.clone()) } else { self.closed.remove(id) };
        if let Some((record, live)) = self.nodes.get(id).filter(|_| changed) {
            self.fleet.upsert_node(NodeView::of(record, *live && !held));
        }
        changed && !held
    }

    /// Takes an instance over as it is; whether that made room.
    pub(crate) fn set_instance(
        &mut self,
        id: &InstanceId,
        before: Option<&Arc<InstanceRecord>>,
        after: Option<&Arc<InstanceRecord>>,
    ) -> bool {
        let made_room = self.set_incoming(id, before, after);
        let Some((record, node)) = after.and_then(|record| record.node_id().map(|node| (record, node)))
        else {
            return self.fleet.unbind(id).is_some() || made_room;
        };
        let there = self.fleet.node_of(id);
        let moved = there.is_some_and(|there| there != node);
        let same = there.is_some() && !moved && before.is_none_or(|before| asks_alike(before, record));
        if !same {
            let ask = self.ask(record);
            self.fleet.bind(id, &ask, node);
        }
        let shrank = before.is_some_and(|before| !before.resources().fits_in(record.resources()));
        moved || made_room || shrank
    }

    /// Counts an instance that is being moved where it goes, too; whether that made room.
    fn set_incoming(
        &mut self,
        id: &InstanceId,
        before: Option<&Arc<InstanceRecord>>,
        after: Option<&Arc<InstanceRecord>>,
    ) -> bool {
        let goes = after.and_then(|record| record.moves_to().map(|target| (record, target)));
        let Some((record, target)) = goes else {
            // Most instances are not moved, ever, and cost nothing here.
            let counted = before.is_some_and(|before| before.moves_to().is_some());
            return counted && !self.held.contains_key(id) && self.drop_incoming(id);
        };
        let Some(double) = double_of(id) else { return false };
        self.held.remove(id);
        if self.fleet.node_of(&double) != Some(target) {
            let ask = self.ask(&InstanceRecord { id: double.clone(), ..InstanceRecord::clone(record) });
            self.fleet.bind(&double, &ask, target);
        }
        false
    }

    fn drop_incoming(&mut self, id: &InstanceId) -> bool {
        double_of(id).is_some_and(|double| self.fleet.unbind(&double).is_some())
    }

    /// Holds room where an instance is to move, until the cache shows that it does or it is certain that it does not.
    pub(crate) fn hold(&mut self, record: &InstanceRecord, target: &NodeId) {
        let Some(double) = double_of(&record.id) else { return };
        let ask = self.ask(&InstanceRecord { id: double.clone(), ..record.clone() });
        self.fleet.bind(&double, &ask, target);
        self.held.insert(record.id.clone(), (ask, target.clone()));
    }

    /// The room that was held is not taken; whether that made room.
    pub(crate) fn let_go(&mut self, id: &InstanceId) -> bool {
        self.held.remove(id).is_some() && self.drop_incoming(id)
    }

    /// Lets go of what is held for nobody who waits any more, and was so the last time too: whether it was written is known
    /// by now, and if it was, the cache shows it.
    pub(crate) fn let_go_of_old(
        &mut self,
        last: &HashSet<InstanceId>,
        waits: impl Fn(&InstanceId) -> bool,
    ) -> HashSet<InstanceId> {
        let idle: HashSet<_> = self.held.keys().filter(|id| !waits(id)).cloned().collect();
        for id in idle.intersection(last) {
            self.let_go(id);
        }
        idle.difference(last).cloned().collect()
    }

    /// Takes over what another feed holds, where the cache does not show it yet.
    pub(crate) fn hold_on(&mut self, other: &Self) {
        for (id, (ask, target)) in &other.held {
            let Some(double) = double_of(id).filter(|double| self.fleet.node_of(double).is_none()) else {
                continue;
            };
            self.fleet.bind(&double, ask, target);
            self.held.insert(id.clone(), (ask.clone(), target.clone()));
        }
    }
}

/// The name under which the fleet counts an instance where it is about to move.
fn double_of(id: &InstanceId) -> Option<InstanceId> {
    format!("{id}-moving").parse().ok()
}

fn asks_alike(a: &InstanceRecord, b: &InstanceRecord) -> bool {
    fn same<T: PartialEq>(a: &Arc<T>, b: &Arc<T>) -> bool {
        Arc::ptr_eq(a, b) || a == b
    }
    a.holds == b.holds
        && same(&a.metadata, &b.metadata)
        && same(&a.placement, &b.placement)
        && same(&a.spec, &b.spec)
}
