//! What a leader knows in its term: the fleet with what is being written counted in, and who waits.
//!
//! # Invariants
//! - The fleet counts everything that the cache shows, and everything that this leader is writing, from the moment of the
//!   decision until the cache shows it or it is certain that it was not written.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use hv_scheduler::{Ask, Rejections, Strategy};
use hv_types::{InstanceId, InstanceRecord, NodeId, NodeRecord, Revision};
use rand::rngs::StdRng;
use tokio::time::Instant;

use super::feed::{FleetFeed, Snapshot};
use super::waiting::{Waiting, names_others, waits};
use crate::cache::{Batch, Delta, Subscription};
use crate::election::Leadership;

/// A binding that is being written.
struct Assumed {
    ask: Ask,
    node: NodeId,
    /// When it was committed, once that is known.
    landed: Option<Revision>,
    /// What the cache said of the instance meanwhile; it counts if the binding is not written.
    shadow: Option<Option<Arc<InstanceRecord>>>,
}

/// One term of leading.
pub(super) struct Term {
    pub(super) number: u64,
    pub(super) leadership: Leadership,
    pub(super) feed: FleetFeed,
    pub(super) waiting: Waiting,
    pub(super) changes: Subscription,
    /// Sets that have lost a member: project and name.
    pub(super) emptied: BTreeSet<(String, String)>,
    /// Who was promised room, by whom, and until when that is waited for.
    pub(super) promised: HashMap<InstanceId, (Instant, Vec<InstanceId>)>,
    /// Bindings whose outcome is not known, and when that is looked into.
    pub(super) unknown: BTreeMap<InstanceId, Instant>,
    applied: Revision,
    assumed: HashMap<InstanceId, Assumed>,
}

impl Term {
    pub(super) fn new(
        number: u64,
        leadership: Leadership,
        shields: bool,
        snapshot: &Snapshot,
        changes: Subscription,
    ) -> Self {
        let mut term = Self {
            number,
            leadership,
            feed: FleetFeed::new(snapshot, shields),
            waiting: Waiting::default(),
            changes,
            emptied: BTreeSet::new(),
            promised: HashMap::new(),
            unknown: BTreeMap::new(),
            applied: snapshot.revision,
            assumed: HashMap::new(),
        };
        term.take_waiting(snapshot);
        term
    }

    /// Begins anew from the cache, after changes were missed. What is being written stays counted.
    pub(super) fn rebuild(&mut self, shields: bool, snapshot: &Snapshot, changes: Subscription) {
        (self.changes, self.applied) = (changes, snapshot.revision);
        let mut feed = FleetFeed::new(snapshot, shields);
        let there: HashMap<_, _> = snapshot.instances.iter().map(|record| (&record.id, record)).collect();
        self.assumed.retain(|id, assumed| {
            let record = there.get(id).copied();
            let is_there = record.is_some_and(|record| record.node_id() == Some(&assumed.node));
            let is_over = assumed.landed.is_some_and(|landed| landed <= snapshot.revision);
            if is_there || is_over {
                return false;
            }
            assumed.shadow = Some(record.cloned());
            feed.fleet.bind(id, &assumed.ask, &assumed.node);
            true
        });
        feed.hold_on(&self.feed);
        self.feed = feed;
        self.waiting = Waiting::default();
        self.take_waiting(snapshot);
    }

    fn take_waiting(&mut self, snapshot: &Snapshot) {
        if snapshot.instances.iter().any(|record| names_others(record)) {
            self.waiting.note_names();
        }
        let mut sets: BTreeSet<_> = snapshot.sets.iter().cloned().collect();
        for record in &snapshot.instances {
            if !record.set.is_empty() {
                sets.remove(&(record.project.clone(), record.set.clone()));
            }
            if waits(record) && !self.assumed.contains_key(&record.id) {
                self.waiting.put(record);
            }
        }
        self.emptied.extend(sets);
    }

    /// Places one, and counts it.
    pub(super) fn seat(
        &mut self,
        record: &InstanceRecord,
        strategy: Strategy,
        rng: &mut StdRng,
    ) -> Result<Arc<NodeRecord>, Rejections> {
        let ask = self.feed.ask(record);
        let placed = self.feed.fleet.place(&ask, strategy, rng)?;
        let Some(node) = self.feed.node(&placed.node).cloned() else {
            return Err(Rejections::default());
        };
        self.feed.fleet.bind_at(&record.id, &ask, placed.index);
        let assumed = Assumed { ask, node: placed.node, landed: None, shadow: None };
        self.assumed.insert(record.id.clone(), assumed);
        Ok(node)
    }

    /// What was decided of an instance was not written.
    pub(super) fn unseat(&mut self, id: &InstanceId) {
        self.unknown.remove(id);
        let Some(assumed) = self.assumed.remove(id) else { return };
        if self.feed.fleet.unbind(id).is_some() {
            self.waiting.help();
        }
        if let Some(shadow) = assumed.shadow {
            self.settle(id, None, shadow.as_ref());
        }
    }

    /// What was decided of an instance was written.
    pub(super) fn landed(&mut self, id: &InstanceId, revision: Revision) {
        self.unknown.remove(id);
        let Some(assumed) = self.assumed.get_mut(id) else { return };
        assumed.landed = Some(revision);
        if self.applied >= revision {
            let shadow = self.assumed.remove(id).and_then(|assumed| assumed.shadow);
            if let Some(shadow) = shadow {
                self.settle(id, None, shadow.as_ref());
            }
        }
    }

    /// It is not known whether what was decided of an instance was written; it stays counted.
    pub(super) fn doubt(&mut self, id: &InstanceId, look_at: Instant) {
        if self.assumed.contains_key(id) {
            self.unknown.insert(id.clone(), look_at);
        }
    }

    /// The node that a binding in doubt is for.
    pub(super) fn assumed_node(&self, id: &InstanceId) -> Option<&NodeId> {
        self.assumed.get(id).map(|assumed| &assumed.node)
    }

    /// Takes over what changed.
    pub(super) fn apply(&mut self, batch: &Batch) {
        for delta in &batch.deltas {
            match delta {
                Delta::Instance { id, before, after } => {
                    self.apply_instance(batch.revision, id, before.as_ref(), after.as_ref());
                }
                Delta::Node { id, after, .. } => {
                    let matters = self.feed.set_node(id, after.as_ref());
                    if matters {
                        self.waiting.help();
                    }
                }
                Delta::Hold { id, held } if self.feed.set_hold(id, *held) => self.waiting.help(),
                _ => {}
            }
        }
        self.applied = self.applied.max(batch.revision);
    }

    fn apply_instance(
        &mut self,
        at: Revision,
        id: &InstanceId,
        before: Option<&Arc<InstanceRecord>>,
        after: Option<&Arc<InstanceRecord>>,
    ) {
        if let Some(assumed) = self.assumed.get_mut(id) {
            let is_it = after.is_some_and(|record| record.node_id() == Some(&assumed.node));
            let is_over = assumed.landed.is_some_and(|landed| at >= landed);
            if !is_it && !is_over {
                assumed.shadow = Some(after.cloned());
                if let Some(record) = before.filter(|_| !after.is_some_and(|record| waits(record))) {
                    self.forget(record);
                }
                return;
            }
            self.assumed.remove(id);
            self.unknown.remove(id);
        }
        if let (Some(record), None) = (before, after)
            && !record.set.is_empty()
        {
            self.emptied.insert((record.project.clone(), record.set.clone()));
        }
        self.settle(id, before, after);
    }

    /// Takes an instance over as the cache says.
    fn settle(
        &mut self,
        id: &InstanceId,
        before: Option<&Arc<InstanceRecord>>,
        after: Option<&Arc<InstanceRecord>>,
    ) {
        if self.feed.set_instance(id, before, after) {
            self.waiting.help();
        }
        match after {
            Some(record) if waits(record) => {
                if names_others(record) {
                    self.waiting.note_names();
                }
                self.waiting.put(record);
            }
            Some(record) => self.forget(record),
            None => {
                if let Some(record) = before {
                    self.forget(record);
                }
            }
        }
    }

    fn forget(&mut self, record: &InstanceRecord) {
        self.promised.remove(&record.id);
        self.waiting.remove(record);
    }
}
