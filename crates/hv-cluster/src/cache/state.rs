//! The state: a fold over the store's changes, with the indexes that decisions need.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use hv_proto::store::NodeLease;
use hv_store::keys::Key;
use hv_store::record::{Record, decode_message};
use hv_store::{KeyValue, LeaseId, Result};
use hv_types::node::Schedulability;
use hv_types::{
    Event, InstanceId, InstanceRecord, InstanceState, NodeId, NodeRecord, NodeStatus, Resources, Revision,
    Wanted,
};

use super::feed::Delta;

/// A node with what follows from other records.
#[derive(Clone, Debug, Default)]
pub struct NodeEntry {
    /// Its record; `None` while only its lease or its instances are known.
    pub record: Option<Arc<NodeRecord>>,
    /// The lease that keeps it alive.
    pub lease: Option<LeaseId>,
    /// The instances bound to it.
    pub instances: BTreeSet<InstanceId>,
    /// What they were promised together.
    pub allocated: Resources,
}

impl NodeEntry {
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

    fn seen(&self) -> Option<(Arc<NodeRecord>, bool)> {
        self.record.clone().map(|record| (record, self.is_live()))
    }

    fn is_empty(&self) -> bool {
        self.record.is_none() && self.lease.is_none() && self.instances.is_empty()
    }
}

/// Everything that the store holds, indexed.
#[derive(Default)]
pub struct State {
    pub(super) revision: Revision,
    nodes: BTreeMap<NodeId, NodeEntry>,
    instances: BTreeMap<InstanceId, Arc<InstanceRecord>>,
    names: HashMap<(String, String), InstanceId>,
    unbound: BTreeSet<InstanceId>,
    events: BTreeMap<String, Arc<Event>>,
    unreadable: BTreeSet<String>,
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
    ) -> impl Iterator<Item = &'a Arc<InstanceRecord>> {
        use std::ops::Bound;
        let start = after.cloned().map_or(Bound::Unbounded, Bound::Excluded);
        self.instances.range((start, Bound::Unbounded)).map(|(_, record)| record)
    }

    /// The instance of that name.
    #[must_use]
    pub fn instance_named(&self, project: &str, name: &str) -> Option<&InstanceId> {
        self.names.get(&(project.to_owned(), name.to_owned()))
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

    /// Events, newest first.
    pub fn events_before<'a>(&'a self, before: Option<&str>) -> impl Iterator<Item = &'a Arc<Event>> {
        use std::ops::Bound;
        let end = before.map_or(Bound::Unbounded, |id| Bound::Excluded(id.to_owned()));
        self.events.range((Bound::Unbounded, end)).rev().map(|(_, event)| event)
    }

    /// How many events are kept.
    #[must_use]
    pub fn event_count(&self) -> usize {
        self.events.len()
    }

    /// An instance as users see it: where its node does not answer, the state is not known.
    #[must_use]
    pub fn view(&self, record: &Arc<InstanceRecord>) -> Arc<InstanceRecord> {
        let lost = record.node_id().filter(|id| !self.nodes.get(*id).is_some_and(NodeEntry::is_live));
        let Some(node) = lost else { return record.clone() };
        let hostname =
            self.nodes.get(node).and_then(|entry| entry.record.as_ref()).map_or("", |r| &r.hostname);
        let mut shown = InstanceRecord::clone(record);
        shown.state_reason = format!(
            "node {hostname} ({node}) does not answer; last seen {}: {}",
            record.state, record.state_reason
        );
        shown.state =
            if record.wanted == Wanted::Deleted { InstanceState::Deleting } else { InstanceState::Unknown };
        Arc::new(shown)
    }

    /// Takes a written record over.
    pub(super) fn put(&mut self, key: &Key<'_>, kv: &KeyValue) -> Result<Vec<Delta>> {
        Ok(match key {
            Key::Instance(_) => vec![self.put_instance(InstanceRecord::decode(kv)?)],
            Key::Node(_) => vec![self.put_node(NodeRecord::decode(kv)?)],
            Key::NodeLease(id) => {
                let lease: NodeLease = decode_message(kv)?;
                self.set_lease(id, Some(LeaseId(lease.lease_id)))
            }
            Key::Event(_) => {
                let event = Arc::new(Event::decode(kv)?);
                self.events.insert(event.id.clone(), event.clone());
                vec![Delta::Event(event)]
            }
            Key::Other => Vec::new(),
        })
    }

    /// Remembers that the value of `key` cannot be read.
    pub(super) fn note_unreadable(&mut self, key: &Key<'_>) {
        if let Key::Instance(id) = key {
            self.unreadable.insert((*id).to_owned());
        }
    }

    /// Takes a deletion over.
    pub(super) fn delete(&mut self, key: &Key<'_>) -> Vec<Delta> {
        match key {
            Key::Instance(id) => {
                self.unreadable.remove(*id);
                self.delete_instance(id).into_iter().collect()
            }
            Key::Node(id) => self.delete_node(id).into_iter().collect(),
            Key::NodeLease(id) => self.set_lease(id, None),
            Key::Event(id) => {
                self.events.remove(*id);
                Vec::new()
            }
            Key::Other => Vec::new(),
        }
    }

    fn put_instance(&mut self, record: InstanceRecord) -> Delta {
        let record = Arc::new(record);
        let id = record.id.clone();
        self.unreadable.remove(id.as_str());
        let before = self.instances.insert(id.clone(), record.clone());
        if let Some(old) = &before {
            self.unlink(old);
        }
        self.names.insert((record.project.clone(), record.name.clone()), id.clone());
        match record.node_id() {
            Some(node) => {
                let entry = self.nodes.entry(node.clone()).or_default();
                entry.instances.insert(id.clone());
                entry.allocated = entry.allocated.plus(record.resources());
            }
            None => {
                self.unbound.insert(id.clone());
            }
        }
        Delta::Instance { id, before, after: Some(record) }
    }

    fn unlink(&mut self, record: &InstanceRecord) {
        self.unbound.remove(&record.id);
        let name = (record.project.clone(), record.name.clone());
        if self.names.get(&name) == Some(&record.id) {
            self.names.remove(&name);
        }
        if let Some(entry) = record.node_id().and_then(|node| self.nodes.get_mut(node)) {
            entry.instances.remove(&record.id);
            entry.allocated = entry.allocated.minus(record.resources());
        }
        self.drop_if_empty(record.node_id());
    }

    fn drop_if_empty(&mut self, node: Option<&NodeId>) {
        if let Some(node) = node
            && self.nodes.get(node).is_some_and(NodeEntry::is_empty)
        {
            self.nodes.remove(node);
        }
    }

    fn delete_instance(&mut self, id: &str) -> Option<Delta> {
        let before = self.instances.remove(id)?;
        self.unlink(&before);
        Some(Delta::Instance { id: before.id.clone(), before: Some(before), after: None })
    }

    fn put_node(&mut self, record: NodeRecord) -> Delta {
        let id = record.id.clone();
        let entry = self.nodes.entry(id.clone()).or_default();
        let before = entry.seen();
        entry.record = Some(Arc::new(record));
        Delta::Node { id, before, after: entry.seen() }
    }

    fn delete_node(&mut self, id: &str) -> Option<Delta> {
        let entry = self.nodes.get_mut(id)?;
        let before = entry.seen();
        let record = entry.record.take()?;
        let id = record.id.clone();
        self.drop_if_empty(Some(&id));
        Some(Delta::Node { id, before, after: None })
    }

    /// A node that comes or goes changes how its instances look, so these count as changed too.
    fn set_lease(&mut self, id: &str, lease: Option<LeaseId>) -> Vec<Delta> {
        let Ok(id) = id.parse::<NodeId>() else { return Vec::new() };
        let entry = self.nodes.entry(id.clone()).or_default();
        let (before, was_live) = (entry.seen(), entry.is_live());
        entry.lease = lease;
        let (after, is_live) = (entry.seen(), entry.is_live());
        if was_live == is_live {
            return Vec::new();
        }
        let mut deltas = vec![Delta::Node { id: id.clone(), before, after }];
        deltas.extend(self.instances_on(&id).map(looks_different));
        self.drop_if_empty(Some(&id));
        deltas
    }

    /// What turns `self` into `next`.
    pub(super) fn differences(&self, next: &Self) -> Vec<Delta> {
        let mut deltas = Vec::new();
        for (id, before) in &self.instances {
            let after = next.instances.get(id);
            if after.is_none_or(|after| after.revision != before.revision) {
                deltas.push(Delta::Instance {
                    id: id.clone(),
                    before: Some(before.clone()),
                    after: after.cloned(),
                });
            }
        }
        for (id, after) in &next.instances {
            if !self.instances.contains_key(id) {
                deltas.push(Delta::Instance { id: id.clone(), before: None, after: Some(after.clone()) });
            }
        }
        let new_events = next.events.iter().filter(|(id, _)| !self.events.contains_key(*id));
        deltas.extend(new_events.map(|(_, event)| Delta::Event(event.clone())));
        let ids: BTreeSet<_> = self.nodes.keys().chain(next.nodes.keys()).collect();
        for id in ids {
            let (before, after) =
                (self.nodes.get(id).and_then(NodeEntry::seen), next.nodes.get(id).and_then(NodeEntry::seen));
            let key =
                |seen: &Option<(Arc<NodeRecord>, bool)>| seen.as_ref().map(|(r, live)| (r.revision, *live));
            if key(&before) == key(&after) {
                continue;
            }
            let turned = before.as_ref().is_some_and(|b| b.1) != after.as_ref().is_some_and(|a| a.1);
            deltas.push(Delta::Node { id: id.clone(), before, after });
            if turned {
                deltas.extend(next.instances_on(id).map(looks_different));
            }
        }
        deltas
    }
}

/// The record is the same, but what users see of it is not.
fn looks_different(record: &Arc<InstanceRecord>) -> Delta {
    Delta::Instance { id: record.id.clone(), before: Some(record.clone()), after: Some(record.clone()) }
}
