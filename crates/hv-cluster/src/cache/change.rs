//! How the state follows the store: one record after the other, all indexes and counts with it.

use std::sync::Arc;

use hv_proto::store::{ClusterRecord, NodeLease};
use hv_store::keys::{Key, Keys};
use hv_store::record::{Record, decode_events, decode_message};
use hv_store::{KeyValue, LeaseId, Result};
use hv_types::{Event, InstanceRecord, InstanceState, NodeId, NodeRecord, OperationRecord, Revision};

use super::feed::Delta;
use super::state::{NodeEntry, State};

/// A record as read, not yet taken over. To read it needs no state, so nobody waits meanwhile.
pub(super) enum Decoded {
    Instance(Box<InstanceRecord>),
    Node(Box<NodeRecord>),
    Lease(String, LeaseId),
    /// A node to which nothing is bound for a moment.
    Hold(String),
    /// The events of the record with this id.
    Events(String, Vec<Arc<Event>>),
    Operation(Box<OperationRecord>),
    InstanceSet(String, String),
    Cluster(Box<ClusterRecord>, Revision),
    /// An instance whose record cannot be read.
    Unreadable(String),
    Nothing,
}

impl Decoded {
    /// Reads what a key holds.
    pub(super) fn read(keys: &Keys, kv: &KeyValue) -> Result<Self> {
        Ok(match keys.parse(&kv.key) {
            Key::Instance(_) => Self::Instance(Box::new(InstanceRecord::decode(kv)?)),
            Key::Node(_) => Self::Node(Box::new(NodeRecord::decode(kv)?)),
            Key::NodeLease(id) => {
                let lease: NodeLease = decode_message(kv)?;
                Self::Lease(id.to_owned(), LeaseId(lease.lease_id))
            }
            Key::NodeHold(id) => Self::Hold(id.to_owned()),
            Key::Event(id) => {
                Self::Events(id.to_owned(), decode_events(kv)?.into_iter().map(Arc::new).collect())
            }
            Key::Operation(_) => Self::Operation(Box::new(OperationRecord::decode(kv)?)),
            Key::InstanceSet { project, name } => Self::InstanceSet(project.to_owned(), name.to_owned()),
            Key::Cluster => Self::Cluster(Box::new(decode_message(kv)?), kv.mod_revision),
            Key::Other => Self::Nothing,
        })
    }

    /// What is left of a record that cannot be read: what was known of it stays as it was, for one bad value must not
    /// stop the whole cluster.
    pub(super) fn unreadable(keys: &Keys, kv: &KeyValue) -> Self {
        match keys.parse(&kv.key) {
            Key::Instance(id) => Self::Unreadable(id.to_owned()),
            _ => Self::Nothing,
        }
    }
}

impl State {
    /// Takes a written record over.
    pub(super) fn put(&mut self, decoded: Decoded) -> Vec<Delta> {
        match decoded {
            Decoded::Instance(record) => vec![self.put_instance(*record)],
            Decoded::Node(record) => vec![self.put_node(*record)],
            Decoded::Lease(id, lease) => self.set_lease(&id, Some(lease)),
            Decoded::Hold(id) => self.set_hold(&id, true),
            Decoded::Events(id, events) => {
                let ids = events.iter().map(|event| event.id.clone()).collect();
                self.event_records.insert(id, ids);
                self.events.extend(events.iter().map(|event| (event.id.clone(), event.clone())));
                events.into_iter().map(Delta::Event).collect()
            }
            Decoded::Operation(record) => {
                let after = Arc::new(*record);
                let before = self.operations.insert(after.id.clone(), after.clone());
                vec![Delta::Operation { id: after.id.clone(), before, after: Some(after) }]
            }
            Decoded::InstanceSet(project, name) => {
                self.sets.insert((project, name));
                Vec::new()
            }
            Decoded::Cluster(record, revision) => {
                self.cluster_id = record.id.parse().ok();
                self.cluster = Some((*record, revision));
                Vec::new()
            }
            Decoded::Unreadable(id) => {
                self.unreadable.insert(id);
                Vec::new()
            }
            Decoded::Nothing => Vec::new(),
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
            Key::NodeHold(id) => self.set_hold(id, false),
            Key::Event(id) => {
                for event in self.event_records.remove(*id).unwrap_or_default() {
                    self.events.remove(&event);
                }
                Vec::new()
            }
            Key::Operation(id) => match self.operations.remove(*id) {
                Some(before) => {
                    vec![Delta::Operation { id: before.id.clone(), before: Some(before), after: None }]
                }
                None => Vec::new(),
            },
            Key::InstanceSet { project, name } => {
                self.sets.remove(&((*project).to_owned(), (*name).to_owned()));
                Vec::new()
            }
            Key::Cluster | Key::Other => Vec::new(),
        }
    }

    fn put_instance(&mut self, mut record: InstanceRecord) -> Delta {
        record.spec = self.specs.share(record.spec);
        record.metadata = self.metadata.share(record.metadata);
        record.placement = self.placements.share(record.placement);
        if let Some(binding) = &mut record.binding
            && let Some((known, _)) = self.nodes.get_key_value(&binding.node_id)
        {
            binding.node_id = known.clone();
        }
        if let Some((known, _)) = self.instances.get_key_value(&record.id) {
            record.id = known.clone();
        }
        let record = Arc::new(record);
        let id = record.id.clone();
        self.unreadable.remove(id.as_str());
        let before = self.instances.insert(id.clone(), record.clone());
        let shown = self.shown_state(&record);
        match &before {
            Some(old) => {
                let was = self.shown_state(old);
                self.tally.remove_instance(&old.project, old.instance_type, was);
                if self.index.replace(old, &record) {
                    self.index.move_state(&id, was, shown);
                } else {
                    self.index.remove(old, was);
                    self.index.insert(&record, shown);
                }
                self.unbind(old);
            }
            None => self.index.insert(&record, shown),
        }
        self.tally.add_instance(&record.project, record.instance_type, shown);
        match record.node_id() {
            Some(node) => self.change_node(node, |entry| {
                entry.instances.insert(id.clone());
                entry.allocated = entry.allocated.plus(record.resources());
                entry.promise(&record);
            }),
            None => {
                self.unbound.insert(id.clone());
            }
        }
        if let Some(target) = record.moves_to() {
            self.change_node(target, |entry| {
                entry.incoming.insert(id.clone());
                entry.allocated = entry.allocated.plus(record.resources());
                entry.promise(&record);
            });
        }
        if let Some(old) = &before {
            self.drop_if_empty(old.node_id());
            self.drop_if_empty(old.moves_to());
        }
        Delta::Instance { id, before, after: Some(record) }
    }

    /// Takes an instance from where it is bound.
    fn unbind(&mut self, record: &InstanceRecord) {
        match record.node_id() {
            Some(node) => self.change_node(node, |entry| {
                entry.instances.remove(&record.id);
                entry.allocated = entry.allocated.minus(record.resources());
                entry.take_back(record);
            }),
            None => {
                self.unbound.remove(&record.id);
            }
        }
        if let Some(target) = record.moves_to() {
            self.change_node(target, |entry| {
                entry.incoming.remove(&record.id);
                entry.allocated = entry.allocated.minus(record.resources());
                entry.take_back(record);
            });
        }
    }

    /// Changes an entry and keeps the counts right.
    fn change_node<T>(&mut self, id: &NodeId, change: impl FnOnce(&mut NodeEntry) -> T) -> T {
        if !self.nodes.contains_key(id) {
            self.nodes.insert(id.clone(), NodeEntry::default());
        }
        let Some(entry) = self.nodes.get_mut(id) else { unreachable!("it was just put there") };
        self.tally.remove_node(entry);
        let outcome = change(entry);
        self.tally.add_node(entry);
        outcome
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
        let was = self.shown_state(&before);
        self.tally.remove_instance(&before.project, before.instance_type, was);
        self.index.remove(&before, was);
        self.unbind(&before);
        self.drop_if_empty(before.node_id());
        self.drop_if_empty(before.moves_to());
        Some(Delta::Instance { id: before.id.clone(), before: Some(before), after: None })
    }

    fn put_node(&mut self, record: NodeRecord) -> Delta {
        let id = record.id.clone();
        self.change_node(&id.clone(), |entry| {
            let before = entry.seen();
            entry.record = Some(Arc::new(record));
            Delta::Node { id, before, after: entry.seen() }
        })
    }

    fn delete_node(&mut self, id: &str) -> Option<Delta> {
        let id = self.nodes.get_key_value(id).map(|(id, _)| id.clone())?;
        let (before, record) = self.change_node(&id, |entry| (entry.seen(), entry.record.take()));
        self.drop_if_empty(Some(&id));
        record?;
        Some(Delta::Node { id, before, after: None })
    }

    fn set_hold(&mut self, id: &str, held: bool) -> Vec<Delta> {
        let Ok(id) = id.parse::<NodeId>() else { return Vec::new() };
        let changed = if held { self.holds.insert(id.clone()) } else { self.holds.remove(&id) };
        if changed { vec![Delta::Hold { id, held }] } else { Vec::new() }
    }

    /// A node that comes or goes changes how its instances look, so these count as changed too.
    fn set_lease(&mut self, id: &str, lease: Option<LeaseId>) -> Vec<Delta> {
        let Ok(id) = id.parse::<NodeId>() else { return Vec::new() };
        let was_live = self.nodes.get(&id).is_some_and(NodeEntry::is_live);
        let is_live = lease.is_some();
        let shown_before: Vec<InstanceState> = if was_live == is_live {
            Vec::new()
        } else {
            self.instances_on(&id).map(|record| self.shown_state(record)).collect()
        };
        let (before, after) = self.change_node(&id, |entry| {
            let before = entry.seen();
            entry.lease = lease;
            (before, entry.seen())
        });
        if was_live == is_live {
            self.drop_if_empty(Some(&id));
            return Vec::new();
        }
        let mut deltas = vec![Delta::Node { id: id.clone(), before, after }];
        deltas.extend(self.instances_on(&id).map(looks_different));
        for (delta, was) in deltas[1..].iter().zip(shown_before) {
            let Delta::Instance { id, after: Some(record), .. } = delta else { continue };
            let is = self.shown_state(record);
            self.index.move_state(id, was, is);
            self.tally.remove_instance(&record.project, record.instance_type, was);
            self.tally.add_instance(&record.project, record.instance_type, is);
        }
        self.drop_if_empty(Some(&id));
        deltas
    }
}

/// The record is the same, but what users see of it is not.
pub(super) fn looks_different(record: &Arc<InstanceRecord>) -> Delta {
    Delta::Instance { id: record.id.clone(), before: Some(record.clone()), after: Some(record.clone()) }
}
