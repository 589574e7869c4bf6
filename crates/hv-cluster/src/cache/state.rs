//! The state: a fold over the store's changes, with the indexes that decisions need.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use hv_proto::store::ClusterRecord;
use hv_store::LeaseId;
use hv_types::device::Amounts;
use hv_types::node::Schedulability;
use hv_types::{
    ClusterId, Event, InstanceId, InstanceRecord, InstanceSpec, InstanceState, Metadata, NodeId, NodeRecord,
    NodeStatus, OperationRecord, PlacementRules, Resources, Revision, Wanted,
};

use super::index::Index;
use super::intern::Interner;
use super::tally::{Counts, Tally};

/// A node with what follows from other records.
#[derive(Clone, Debug, Default)]
pub struct NodeEntry {
    /// Its record; `None` while only its lease or its instances are known.
    pub record: Option<Arc<NodeRecord>>,
    /// The lease that keeps it alive.
    pub lease: Option<LeaseId>,
    /// How long that lives from each renewal, in milliseconds; 0 where it is not known.
    pub lease_ttl_ms: u64,
    /// The instances bound to it.
    pub instances: BTreeSet<InstanceId>,
    /// The instances that are being moved to it while they run, and take room here already.
    pub incoming: BTreeSet<InstanceId>,
    /// What all of these were promised together.
    pub allocated: Resources,
    /// What of its devices they were promised.
    pub devices: Amounts,
}

impl NodeEntry {
    pub(super) fn promise(&mut self, record: &InstanceRecord) {
        if !record.spec.devices.is_empty() {
            self.devices.add(&record.spec.device_amounts());
        }
    }

    pub(super) fn take_back(&mut self, record: &InstanceRecord) {
        if !record.spec.devices.is_empty() {
            self.devices.take(&record.spec.device_amounts());
        }
    }

    /// Whether its lease lives.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.lease.is_some()
    }

    /// Whether it takes instances.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        if !self.is_live() {
            return NodeStatus::NotReady;
        }
        match self.record.as_ref().map(|record| record.schedulability) {
            Some(Schedulability::Open) => NodeStatus::Ready,
            Some(Schedulability::Cordoned) => NodeStatus::Maintenance,
            Some(Schedulability::Draining) => NodeStatus::Draining,
            None => NodeStatus::NotReady,
        }
    }

    pub(super) fn seen(&self) -> Option<(Arc<NodeRecord>, bool)> {
        self.record.clone().map(|record| (record, self.is_live()))
    }

    pub(super) fn is_empty(&self) -> bool {
        let empty = self.instances.is_empty() && self.incoming.is_empty();
        self.record.is_none() && self.lease.is_none() && empty
    }
}

/// Everything that the store holds, indexed.
#[derive(Default)]
pub struct State {
    pub(super) revision: Revision,
    pub(super) nodes: BTreeMap<NodeId, NodeEntry>,
    pub(super) instances: BTreeMap<InstanceId, Arc<InstanceRecord>>,
    pub(super) index: Index,
    pub(super) tally: Tally,
    pub(super) specs: Interner<InstanceSpec>,
    pub(super) metadata: Interner<Metadata>,
    pub(super) placements: Interner<PlacementRules>,
    pub(super) unbound: BTreeSet<InstanceId>,
    pub(super) events: BTreeMap<String, Arc<Event>>,
    /// The events of each record, by their ids.
    pub(super) event_records: BTreeMap<String, Vec<String>>,
    pub(super) operations: BTreeMap<String, Arc<OperationRecord>>,
    pub(super) sets: HashSet<(String, String)>,
    /// Nodes to which nothing is bound for a moment, while somebody looks what room there is.
    pub(super) holds: BTreeSet<NodeId>,
    pub(super) cluster: Option<(ClusterRecord, Revision)>,
    pub(super) cluster_id: Option<ClusterId>,
    pub(super) unreadable: BTreeSet<String>,
}

impl State {
    /// The revision that this is.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// One instance.
    #[must_use]
    pub fn instance(&self, id: &InstanceId) -> Option<&Arc<InstanceRecord>> {
        self.instances.get(id)
    }

    /// Whether the store holds a record of the instance that cannot be read: what is known of it may be old, or nothing.
    #[must_use]
    pub fn is_unreadable(&self, id: &InstanceId) -> bool {
        self.unreadable.contains(id.as_str())
    }

    /// Instances in the order of their ids, those after `after` only.
    pub fn instances_after<'a>(
        &'a self,
        after: Option<&InstanceId>,
    ) -> impl Iterator<Item = &'a Arc<InstanceRecord>> + use<'a> {
        use std::ops::Bound;
        let start = after.cloned().map_or(Bound::Unbounded, Bound::Excluded);
        self.instances.range((start, Bound::Unbounded)).map(|(_, record)| record)
    }

    /// The instance of that name.
    #[must_use]
    pub fn instance_named(&self, project: &str, name: &str) -> Option<&InstanceId> {
        self.index.names.get(project, name)
    }

    /// Instances that wait for a node.
    pub fn unbound(&self) -> impl Iterator<Item = &Arc<InstanceRecord>> {
        self.unbound.iter().filter_map(|id| self.instances.get(id))
    }

    /// One node that has a record.
    #[must_use]
    pub fn node(&self, id: &NodeId) -> Option<&NodeEntry> {
        self.nodes.get(id).filter(|entry| entry.record.is_some())
    }

    /// Nodes that have a record, in the order of their ids.
    pub fn nodes(&self) -> impl Iterator<Item = (&Arc<NodeRecord>, &NodeEntry)> {
        self.nodes.values().filter_map(|entry| entry.record.as_ref().map(|record| (record, entry)))
    }

    /// Instances bound to a node.
    pub fn instances_on<'a>(&'a self, node: &NodeId) -> impl Iterator<Item = &'a Arc<InstanceRecord>> {
        let ids = self.nodes.get(node).map(|entry| &entry.instances);
        ids.into_iter().flatten().filter_map(|id| self.instances.get(id))
    }

    /// Whether nothing is bound to a node for a moment, while somebody looks what room there is.
    #[must_use]
    pub fn is_held(&self, node: &NodeId) -> bool {
        self.holds.contains(node)
    }

    /// All nodes for which that is so.
    pub fn holds(&self) -> impl Iterator<Item = &NodeId> {
        self.holds.iter()
    }

    /// Events, newest first.
    pub fn events_before<'a>(&'a self, before: Option<&str>) -> impl Iterator<Item = &'a Arc<Event>> {
        use std::ops::Bound;
        let end = before.map_or(Bound::Unbounded, |id| Bound::Excluded(id.to_owned()));
        self.events.range((Bound::Unbounded, end)).rev().map(|(_, event)| event)
    }

    /// Operations, newest first.
    pub fn operations_before<'a>(
        &'a self,
        before: Option<&str>,
    ) -> impl Iterator<Item = &'a Arc<OperationRecord>> {
        use std::ops::Bound;
        let end = before.map_or(Bound::Unbounded, |id| Bound::Excluded(id.to_owned()));
        self.operations.range((Bound::Unbounded, end)).rev().map(|(_, operation)| operation)
    }

    /// One operation.
    #[must_use]
    pub fn operation(&self, id: &str) -> Option<&Arc<OperationRecord>> {
        self.operations.get(id)
    }

    /// Whether the names `{name}-1`, … belong to a set.
    #[must_use]
    pub fn has_set(&self, project: &str, name: &str) -> bool {
        self.sets.contains(&(project.to_owned(), name.to_owned()))
    }

    /// What the fleet comes to; it costs nothing to ask.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.tally.counts(self.unbound.len())
    }

    /// All sets: project and name.
    pub fn sets(&self) -> impl Iterator<Item = &(String, String)> {
        self.sets.iter()
    }

    /// The cluster's identity; it changes where its records are restored from a backup.
    #[must_use]
    pub fn cluster_id(&self) -> Option<&ClusterId> {
        self.cluster_id.as_ref()
    }

    /// The cluster's own record, and when it was last written.
    #[must_use]
    pub fn cluster(&self) -> Option<&(ClusterRecord, Revision)> {
        self.cluster.as_ref()
    }

    /// The oldest event that is kept.
    #[must_use]
    pub fn oldest_event(&self) -> Option<&Arc<Event>> {
        self.events.first_key_value().map(|(_, event)| event)
    }

    /// The key of the record that holds an event, or of the last record before it.
    #[must_use]
    pub fn event_record_of(&self, event: &str) -> Option<&str> {
        use std::ops::Bound;
        let until = (Bound::Unbounded, Bound::Included(event));
        self.event_records.range::<str, _>(until).next_back().map(|(id, _)| id.as_str())
    }

    /// How many events are kept.
    #[must_use]
    pub fn event_count(&self) -> usize {
        self.events.len()
    }

    /// An instance as users see it: where its node does not answer, the state is not known.
    #[must_use]
    pub fn view(&self, record: &Arc<InstanceRecord>) -> Arc<InstanceRecord> {
        Candidate { record: record.clone(), lost: self.lost_node(record) }.shown()
    }

    /// The state that users see.
    #[must_use]
    pub fn shown_state(&self, record: &InstanceRecord) -> InstanceState {
        let live = |id| self.nodes.get(id).is_some_and(NodeEntry::is_live);
        if record.node_id().is_none_or(live) { record.state } else { state_when_lost(record) }
    }

    /// The node of an instance, if it does not answer.
    pub(super) fn lost_node(&self, record: &InstanceRecord) -> Option<LostNode> {
        let entry = self.nodes.get(record.node_id()?);
        match entry {
            Some(entry) if entry.is_live() => None,
            Some(entry) => Some(LostNode(entry.record.clone())),
            None => Some(LostNode(None)),
        }
    }
}

/// A node that does not answer, with its record if it has one.
#[derive(Clone, Debug)]
pub(super) struct LostNode(Option<Arc<NodeRecord>>);

/// An instance with what else decides how users see it. To take one costs little; to look at it is for later, when the
/// state is not held any more.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub(crate) record: Arc<InstanceRecord>,
    pub(super) lost: Option<LostNode>,
}

impl Candidate {
    /// The instance as users see it.
    #[must_use]
    pub fn shown(self) -> Arc<InstanceRecord> {
        let Self { record, lost: Some(LostNode(node)) } = self else { return self.record };
        let hostname = node.as_ref().map_or("", |node| &node.hostname);
        let id = record.node_id().map_or("", NodeId::as_str);
        let mut shown = InstanceRecord::clone(&record);
        shown.state_reason = format!(
            "node {hostname} ({id}) does not answer; last seen {}: {}",
            record.state, record.state_reason
        );
        shown.state = state_when_lost(&record);
        Arc::new(shown)
    }
}

fn state_when_lost(record: &InstanceRecord) -> InstanceState {
    if record.wanted == Wanted::Deleted { InstanceState::Deleting } else { InstanceState::Unknown }
}
