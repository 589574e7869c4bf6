//! The scheduler's fleet, kept as the cache's changes say.

use std::collections::HashMap;
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
}

impl Snapshot {
    pub(crate) fn of(state: &State) -> Self {
        Self {
            revision: state.revision(),
            nodes: state.nodes().map(|(record, entry)| (record.clone(), entry.is_live())).collect(),
            instances: state.instances_after(None).cloned().collect(),
            sets: state.sets().cloned().collect(),
        }
    }
}

/// The fleet, with the records of its nodes.
pub(crate) struct FleetFeed {
    pub(crate) fleet: Fleet,
    nodes: HashMap<NodeId, Seen>,
    /// Whether instances that lie on their node for good are kept from having to give way.
    shields: bool,
}

impl FleetFeed {
    pub(crate) fn new(snapshot: &Snapshot, shields: bool) -> Self {
        let mut feed = Self { fleet: Fleet::new(), nodes: HashMap::new(), shields };
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
        let view = NodeView::of(record, *live);
        let before = self.nodes.insert(id.clone(), (record.clone(), *live));
        if before.is_some_and(|(before, was_live)| NodeView::of(&before, was_live) == view) {
            return false;
        }
        self.fleet.upsert_node(view);
        true
    }

    /// Takes an instance over as it is; whether that made room.
    pub(crate) fn set_instance(
        &mut self,
        id: &InstanceId,
        before: Option<&Arc<InstanceRecord>>,
        after: Option<&Arc<InstanceRecord>>,
    ) -> bool {
        let Some((record, node)) = after.and_then(|record| record.node_id().map(|node| (record, node)))
        else {
            return self.fleet.unbind(id).is_some();
        };
        let there = self.fleet.node_of(id);
        let moved = there.is_some_and(|there| there != node);
        let same = there.is_some() && !moved && before.is_none_or(|before| asks_alike(before, record));
        if !same {
            let ask = self.ask(record);
            self.fleet.bind(id, &ask, node);
        }
        moved
    }
}

fn asks_alike(a: &InstanceRecord, b: &InstanceRecord) -> bool {
    fn same<T: PartialEq>(a: &Arc<T>, b: &Arc<T>) -> bool {
        Arc::ptr_eq(a, b) || a == b
    }
    same(&a.metadata, &b.metadata) && same(&a.placement, &b.placement) && same(&a.spec, &b.spec)
}
