//! Finds instances in bounded pieces: so many are looked at under the lock, whatever the fleet's size.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

use hv_types::{InstanceId, InstanceRecord, Revision, Selector};

use super::index::after_in;
use super::state::{Candidate, State};
use crate::instances::Filter;

/// What was found in one piece.
#[derive(Debug)]
pub struct Chunk {
    /// Those that match, in the order of their ids.
    pub found: Vec<Candidate>,
    /// Where to go on; `None` if that was all.
    pub next: Option<InstanceId>,
    /// The revision that this is.
    pub revision: Revision,
}

impl State {
    /// Looks at up to `look_at` instances after `after` that an index gives for `filter`, and returns those that match, up
    /// to `wanted`.
    #[must_use]
    pub fn instances_matching(
        &self,
        filter: &Filter,
        after: Option<&InstanceId>,
        look_at: usize,
        wanted: usize,
    ) -> Chunk {
        let mut chunk = Chunk { found: Vec::new(), next: None, revision: self.revision() };
        let mut last = None;
        for (looked, record) in self.candidates(filter, after).enumerate() {
            if looked == look_at || chunk.found.len() == wanted {
                chunk.next = last;
                return chunk;
            }
            if filter.matches_as(record, self.shown_state(record)) {
                chunk.found.push(Candidate { record: record.clone(), lost: self.lost_node(record) });
            }
            last = Some(record.id.clone());
        }
        chunk
    }

    /// How many of up to `look_at` candidates after `after` match, and where to go on.
    pub(crate) fn count_matching(
        &self,
        filter: &Filter,
        after: Option<&InstanceId>,
        look_at: usize,
    ) -> (usize, Option<InstanceId>) {
        let (mut count, mut last) = (0, None);
        for (looked, record) in self.candidates(filter, after).enumerate() {
            if looked == look_at {
                return (count, last);
            }
            count += usize::from(filter.matches_as(record, self.shown_state(record)));
            last = Some(record.id.clone());
        }
        (count, None)
    }

    /// How many match, where counts that are kept anyway tell.
    pub(crate) fn known_count(&self, filter: &Filter) -> Option<usize> {
        if !filter.reference.is_empty() || !filter.selector.is_empty() {
            return None;
        }
        match &filter.node {
            Some(node)
                if filter.state.is_none() && filter.instance_type.is_none() && filter.project.is_empty() =>
            {
                Some(self.nodes.get(node).map_or(0, |entry| entry.instances.len()))
            }
            Some(_) => None,
            None if filter.project.is_empty() => {
                Some(self.tally.all.count(filter.instance_type, filter.state))
            }
            None => {
                let census = self.tally.projects.get(&filter.project);
                Some(census.map_or(0, |census| census.count(filter.instance_type, filter.state)))
            }
        }
    }

    /// All that may match, in the order of their ids, by the index that gives the fewest.
    fn candidates<'a>(
        &'a self,
        filter: &Filter,
        after: Option<&InstanceId>,
    ) -> Box<dyn Iterator<Item = &'a Arc<InstanceRecord>> + 'a> {
        if !filter.reference.is_empty() {
            return self.referenced(&filter.reference, after);
        }
        let mut best = Narrowed::All;
        let mut fewest = self.instances.len();
        let mut consider = |found: Narrowed<'a>| {
            if found.len() < fewest {
                fewest = found.len();
                best = found;
            }
        };
        if let Some(node) = &filter.node {
            consider(self.nodes.get(node).map_or(Narrowed::Nothing, |entry| Narrowed::Set(&entry.instances)));
        }
        if !filter.project.is_empty() {
            consider(self.index.projects.get(&filter.project).map_or(Narrowed::Nothing, Narrowed::Set));
        }
        if let Some(state) = filter.state {
            consider(Narrowed::Set(&self.index.states[state as usize]));
        }
        for (key, value) in filter.selector.requirements().iter().filter(|(_, value)| *value != Selector::ANY)
        {
            consider(self.index.with_label(key, value).map_or(Narrowed::Nothing, Narrowed::Labelled));
        }
        let record = |id: &'a InstanceId| self.instances.get(id);
        match best {
            Narrowed::All => Box::new(self.instances_after(after)),
            Narrowed::Nothing => Box::new(std::iter::empty()),
            Narrowed::Set(ids) => Box::new(after_in(ids, after).filter_map(record)),
            Narrowed::Labelled(ids) => Box::new(ids.after(after).filter_map(record)),
        }
    }

    /// Those whose id starts with the text, and those of that name, in the order of their ids.
    fn referenced<'a>(
        &'a self,
        reference: &str,
        after: Option<&InstanceId>,
    ) -> Box<dyn Iterator<Item = &'a Arc<InstanceRecord>> + 'a> {
        let named: BTreeSet<&InstanceId> = self
            .index
            .projects
            .keys()
            .filter_map(|project| self.index.names.get(project, reference))
            .filter(|id| !id.as_str().starts_with(reference))
            .collect();
        let wanted = |id: &InstanceId| after.is_none_or(|after| id > after);
        let (before, behind): (Vec<_>, Vec<_>) =
            named.into_iter().filter(|id| wanted(id)).partition(|id| id.as_str() < reference);
        let prefix = reference.to_owned();
        let start = match after {
            Some(after) if after.as_str() >= reference => Bound::Excluded(after.as_str()),
            _ => Bound::Included(reference),
        };
        let inside = self
            .instances
            .range::<str, _>((start, Bound::Unbounded))
            .map(|(_, record)| record)
            .take_while(move |record| record.id.as_str().starts_with(&prefix));
        let record = |id: &InstanceId| self.instances.get(id);
        let before: Vec<_> = before.into_iter().filter_map(record).collect();
        let behind: Vec<_> = behind.into_iter().filter_map(record).collect();
        Box::new(before.into_iter().chain(inside).chain(behind))
    }
}

/// What an index gives.
enum Narrowed<'a> {
    All,
    Nothing,
    Set(&'a BTreeSet<InstanceId>),
    Labelled(&'a super::index::Ids),
}

impl Narrowed<'_> {
    fn len(&self) -> usize {
        match self {
            Self::All => usize::MAX,
            Self::Nothing => 0,
            Self::Set(ids) => ids.len(),
            Self::Labelled(ids) => ids.len(),
        }
    }
}
