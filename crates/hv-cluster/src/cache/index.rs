//! Where instances are found by what a list may ask for.
//!
//! # Theory of operation
//! An index yields candidates, in the order of their ids; whoever asks compares each with the whole filter. So the
//! index of labels may be keyed by a hash, and need not hold the labels' text once more.

use std::borrow::Borrow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::ops::Bound;
use std::sync::Arc;

use hv_types::{InstanceId, InstanceRecord, InstanceState};

/// Ids of instances; nearly always one, or very many.
#[derive(Debug)]
pub(super) enum Ids {
    One(InstanceId),
    Many(BTreeSet<InstanceId>),
}

impl Ids {
    fn insert(&mut self, id: InstanceId) {
        match self {
            Self::One(there) if *there == id => {}
            Self::One(there) => *self = Self::Many([there.clone(), id].into()),
            Self::Many(ids) => {
                ids.insert(id);
            }
        }
    }

    /// Whether nothing is left.
    fn remove(&mut self, id: &InstanceId) -> bool {
        match self {
            Self::One(there) => there == id,
            Self::Many(ids) => {
                ids.remove(id);
                ids.is_empty()
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Many(ids) => ids.len(),
        }
    }

    /// Those after `after`, in order.
    pub(super) fn after<'a>(
        &'a self,
        after: Option<&InstanceId>,
    ) -> Box<dyn Iterator<Item = &'a InstanceId> + 'a> {
        match self {
            Self::One(id) => Box::new(Some(id).filter(|id| after.is_none_or(|a| *id > a)).into_iter()),
            Self::Many(ids) => Box::new(after_in(ids, after)),
        }
    }
}

/// The ids of a set after `after`, in order.
pub(super) fn after_in<'a>(
    ids: &'a BTreeSet<InstanceId>,
    after: Option<&InstanceId>,
) -> impl Iterator<Item = &'a InstanceId> + use<'a> {
    let start = after.cloned().map_or(Bound::Unbounded, Bound::Excluded);
    ids.range((start, Bound::Unbounded))
}

/// Names, found in the records themselves.
#[derive(Default)]
pub(super) struct Names(HashSet<ByName>);

struct ByName(Arc<InstanceRecord>);

trait Named {
    fn name(&self) -> (&str, &str);
}

impl Named for ByName {
    fn name(&self) -> (&str, &str) {
        (&self.0.project, &self.0.name)
    }
}

impl Named for (&str, &str) {
    fn name(&self) -> (&str, &str) {
        *self
    }
}

impl<'a> Borrow<dyn Named + 'a> for ByName {
    fn borrow(&self) -> &(dyn Named + 'a) {
        self
    }
}

impl PartialEq for dyn Named + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for dyn Named + '_ {}

impl Hash for dyn Named + '_ {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

impl Eq for ByName {}

impl Hash for ByName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

impl Names {
    /// Takes a record in; one of the same name gives way.
    pub(super) fn insert(&mut self, record: &Arc<InstanceRecord>) {
        self.0.replace(ByName(record.clone()));
    }

    pub(super) fn remove(&mut self, record: &InstanceRecord) {
        let name = (record.project.as_str(), record.name.as_str());
        if self.get(name.0, name.1) == Some(&record.id) {
            self.0.remove(&name as &dyn Named);
        }
    }

    pub(super) fn get(&self, project: &str, name: &str) -> Option<&InstanceId> {
        self.0.get(&(project, name) as &dyn Named).map(|found| &found.0.id)
    }
}

/// Where instances are found.
#[derive(Default)]
pub(super) struct Index {
    pub(super) names: Names,
    pub(super) projects: HashMap<String, BTreeSet<InstanceId>>,
    pub(super) states: [BTreeSet<InstanceId>; InstanceState::ALL.len()],
    labels: HashMap<u64, Ids>,
    hasher: RandomState,
}

impl Index {
    fn label(&self, key: &str, value: &str) -> u64 {
        self.hasher.hash_one((key, value))
    }

    /// Candidates with a label.
    pub(super) fn with_label(&self, key: &str, value: &str) -> Option<&Ids> {
        self.labels.get(&self.label(key, value))
    }

    pub(super) fn insert(&mut self, record: &Arc<InstanceRecord>, shown: InstanceState) {
        let id = &record.id;
        self.names.insert(record);
        if let Some(ids) = self.projects.get_mut(&record.project) {
            ids.insert(id.clone());
        } else {
            self.projects.insert(record.project.clone(), [id.clone()].into());
        }
        self.states[shown as usize].insert(id.clone());
        for (key, value) in &record.metadata.labels {
            let label = self.label(key, value);
            self.labels
                .entry(label)
                .and_modify(|ids| ids.insert(id.clone()))
                .or_insert_with(|| Ids::One(id.clone()));
        }
    }

    pub(super) fn remove(&mut self, record: &InstanceRecord, shown: InstanceState) {
        let id = &record.id;
        self.names.remove(record);
        if let Some(ids) = self.projects.get_mut(&record.project) {
            ids.remove(id);
            if ids.is_empty() {
                self.projects.remove(&record.project);
            }
        }
        self.states[shown as usize].remove(id);
        for (key, value) in &record.metadata.labels {
            let label = self.label(key, value);
            if self.labels.get_mut(&label).is_some_and(|ids| ids.remove(id)) {
                self.labels.remove(&label);
            }
        }
    }

    /// A record takes the place of one that is found by the same things.
    pub(super) fn replace(&mut self, before: &InstanceRecord, after: &Arc<InstanceRecord>) -> bool {
        let alike = before.name == after.name
            && before.project == after.project
            && before.set == after.set
            && before.metadata.labels == after.metadata.labels;
        if alike {
            self.names.insert(after);
        }
        alike
    }

    pub(super) fn move_state(&mut self, id: &InstanceId, from: InstanceState, to: InstanceState) {
        if from != to {
            self.states[from as usize].remove(id);
            self.states[to as usize].insert(id.clone());
        }
    }
}
