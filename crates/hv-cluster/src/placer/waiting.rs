//! Instances that wait for a node, in the order in which they are served.
//!
//! # Theory of operation
//! Those that ask alike are one group: where one of them does not fit, none does, so that a round over all that wait costs
//! as many questions as there are groups. A round begins when something changed that could help. Each instance is tried
//! once when it comes; after that only the first of its group is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::SystemTime;

use hv_types::{
    DeviceNeeds, InstanceId, InstanceRecord, InstanceType, Labels, PlacementRules, Resources, Wanted,
};

/// Higher priority first, then the older.
pub(crate) type Order = (Reverse<i32>, SystemTime, InstanceId);

/// What those that ask alike have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Kind {
    instance_type: InstanceType,
    resources: Resources,
    devices: DeviceNeeds,
    image: String,
    project: String,
    labels: Labels,
    placement: Arc<PlacementRules>,
    /// Given only where rules may depend on it.
    name: Option<String>,
}

struct Entry {
    record: Arc<InstanceRecord>,
    /// A change of it is being written.
    in_flight: bool,
    /// Whether it was told in this term why it waits.
    told: bool,
}

#[derive(Default)]
struct Group {
    entries: BTreeMap<Order, Entry>,
    /// Why none of them fits, and when that was found.
    failed: Option<(u64, String)>,
}

/// What is to be done about one that waits.
pub(crate) enum Next {
    /// It is to be tried.
    Try(Arc<InstanceRecord>),
    /// One like it did not fit just now, for this reason.
    Known(Arc<InstanceRecord>, String),
}

/// Instances that wait for a node.
#[derive(Default)]
pub(crate) struct Waiting {
    order: BTreeMap<Order, Arc<Kind>>,
    groups: HashMap<Arc<Kind>, Group>,
    /// Not tried yet.
    fresh: BTreeSet<Order>,
    /// The first of each group that is still to be tried in this round.
    round: BTreeMap<Order, Arc<Kind>>,
    /// Counts what could have helped.
    generation: u64,
    /// Whether something could have helped since the last round began.
    helped: bool,
    /// Whether some instance keeps away from others by their names.
    names_matter: bool,
    /// Where the next look for outdated reasons begins.
    retold: Option<Order>,
}

/// Whether an instance is to be placed. One that is to stand still is started on its node first.
pub(crate) fn waits(record: &InstanceRecord) -> bool {
    record.binding.is_none() && matches!(record.wanted, Wanted::Running | Wanted::Paused)
}

/// Whether rules of the instance name others.
pub(crate) fn names_others(record: &InstanceRecord) -> bool {
    record.placement.affinity.iter().any(|rule| rule.anti && !rule.peers.instance_name.is_empty())
}

fn order(record: &InstanceRecord) -> Order {
    (Reverse(record.placement.priority), record.created_at, record.id.clone())
}

impl Waiting {
    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is something to try now.
    pub(crate) fn has_work(&self) -> bool {
        !self.fresh.is_empty() || !self.round.is_empty()
    }

    /// Whether a round should begin.
    pub(crate) fn wants_round(&self) -> bool {
        self.helped && self.round.is_empty() && !self.order.is_empty()
    }

    /// Something changed that could help.
    pub(crate) fn help(&mut self) {
        self.helped = true;
        self.generation += 1;
    }

    /// From now on names make a difference.
    pub(crate) fn note_names(&mut self) {
        self.names_matter = true;
    }

    /// Begins a round over all groups.
    pub(crate) fn begin_round(&mut self) {
        self.helped = false;
        for (kind, group) in &self.groups {
            let head = group.entries.iter().find(|(_, entry)| !entry.in_flight);
            self.round.extend(head.map(|(order, _)| (order.clone(), kind.clone())));
        }
    }

    fn kind(&self, record: &InstanceRecord) -> Kind {
        let rules = &record.placement;
        let by_name = self.names_matter || !rules.affinity.is_empty() || !rules.spread.is_empty();
        Kind {
            instance_type: record.instance_type,
            resources: record.resources(),
            devices: record.spec.devices.clone(),
            image: record.spec.needed_image().to_owned(),
            project: record.project.clone(),
            labels: record.metadata.labels.clone(),
            placement: rules.clone(),
            name: by_name.then(|| record.name.clone()),
        }
    }

    /// Takes over one that waits, or what is new about it.
    pub(crate) fn put(&mut self, record: &Arc<InstanceRecord>) {
        let order = order(record);
        let kind = self.kind(record);
        if let Some(known) = self.order.get(&order).cloned()
            && *known == kind
            && let Some(entry) = self.entry(&order)
        {
            // Asked for again (a start), it is looked at again; a reason of ours that comes back is nothing new.
            let again = entry.record.generation != record.generation;
            (entry.record, entry.in_flight) = (record.clone(), false);
            if again {
                entry.told = false;
                self.fresh.insert(order);
            }
            return;
        }
        self.remove(record);
        let kind = Arc::new(kind);
        let kind = self.groups.get_key_value(&kind).map_or(kind, |(known, _)| known.clone());
        let entry = Entry { record: record.clone(), in_flight: false, told: false };
        self.groups.entry(kind.clone()).or_default().entries.insert(order.clone(), entry);
        self.order.insert(order.clone(), kind);
        self.fresh.insert(order);
    }

    /// Forgets one.
    pub(crate) fn remove(&mut self, record: &InstanceRecord) {
        let order = order(record);
        let Some(kind) = self.order.remove(&order) else { return };
        self.fresh.remove(&order);
        self.round.remove(&order);
        if let Some(group) = self.groups.get_mut(&kind) {
            group.entries.remove(&order);
            if group.entries.is_empty() {
                self.groups.remove(&kind);
            }
        }
    }

    fn entry(&mut self, order: &Order) -> Option<&mut Entry> {
        let kind = self.order.get(order)?;
        self.groups.get_mut(kind)?.entries.get_mut(order)
    }

    /// The next to do something about, the most urgent first.
    pub(crate) fn next(&mut self) -> Option<Next> {
        loop {
            let fresh = self.fresh.first();
            let head = self.round.first_key_value().map(|(order, _)| order);
            let order = match (fresh, head) {
                (Some(fresh), Some(head)) => fresh.min(head).clone(),
                (Some(order), None) | (None, Some(order)) => order.clone(),
                (None, None) => return None,
            };
            self.fresh.remove(&order);
            let in_round = self.round.remove(&order).is_some();
            let generation = self.generation;
            let Some(group) = self.order.get(&order).and_then(|kind| self.groups.get(kind)) else { continue };
            let Some(entry) = group.entries.get(&order).filter(|entry| !entry.in_flight) else { continue };
            let known = group.failed.as_ref().filter(|(when, _)| *when == generation && !in_round);
            return Some(match known {
                Some((_, why)) => Next::Known(entry.record.clone(), why.clone()),
                None => Next::Try(entry.record.clone()),
            });
        }
    }

    /// One was placed; its binding is being written. The next of its group is to be tried as well.
    pub(crate) fn placed(&mut self, record: &InstanceRecord) {
        let order = order(record);
        let Some(kind) = self.order.get(&order).cloned() else { return };
        let Some(group) = self.groups.get_mut(&kind) else { return };
        if let Some(entry) = group.entries.get_mut(&order) {
            entry.in_flight = true;
        }
        let next = group.entries.range((Bound::Excluded(order), Bound::Unbounded));
        let next = next.filter(|(_, entry)| !entry.in_flight).map(|(order, _)| order.clone()).next();
        self.round.extend(next.map(|order| (order, kind)));
    }

    /// One does not fit. Whether it is to be told why: it was not in this term, and its record says something else.
    pub(crate) fn failed(&mut self, record: &InstanceRecord, why: &str) -> bool {
        let order = order(record);
        let generation = self.generation;
        let Some(group) = self.order.get(&order).and_then(|kind| self.groups.get_mut(kind)) else {
            return false;
        };
        match &mut group.failed {
            Some((when, known)) if known == why => *when = generation,
            failed => *failed = Some((generation, why.to_owned())),
        }
        let Some(entry) = group.entries.get_mut(&order) else { return false };
        let tell = !entry.told && entry.record.state_reason != why;
        entry.told = true;
        entry.in_flight |= tell;
        tell
    }

    /// What was being written was not: it is tried again.
    pub(crate) fn refused(&mut self, record: &InstanceRecord) {
        let order = order(record);
        if let Some(entry) = self.entry(&order) {
            entry.in_flight = false;
            entry.told = false;
            self.fresh.insert(order);
        }
    }

    /// Up to `limit` whose reason is not what was found last, of those that follow the ones named the last time.
    pub(crate) fn outdated(&mut self, limit: usize, scan: usize) -> Vec<(Arc<InstanceRecord>, String)> {
        let from = self.retold.take().map_or(Bound::Unbounded, Bound::Excluded);
        let mut found = Vec::new();
        let mut last = None;
        for (seen, (order, kind)) in self.order.range((from, Bound::Unbounded)).enumerate() {
            if found.len() == limit || seen == scan {
                self.retold = last;
                break;
            }
            last = Some(order.clone());
            let Some(group) = self.groups.get_mut(kind) else { continue };
            let Some((_, why)) = &group.failed else { continue };
            let Some(entry) = group.entries.get_mut(order) else { continue };
            if !entry.in_flight && entry.record.state_reason != *why {
                entry.in_flight = true;
                found.push((entry.record.clone(), why.clone()));
            }
        }
        found
    }
}
