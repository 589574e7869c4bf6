//! What turns one state into another: what the watchers of a cache that was filled afresh are told.

use std::collections::BTreeSet;
use std::sync::Arc;

use hv_types::{NodeRecord, OperationRecord};

use super::change::looks_different;
use super::feed::Delta;
use super::state::{NodeEntry, State};

impl State {
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
        let ids: BTreeSet<_> = self.operations.keys().chain(next.operations.keys()).collect();
        for id in ids {
            let (before, after) = (self.operations.get(id).cloned(), next.operations.get(id).cloned());
            let revision = |seen: &Option<Arc<OperationRecord>>| seen.as_ref().map(|record| record.revision);
            if revision(&before) != revision(&after) {
                deltas.push(Delta::Operation { id: id.clone(), before, after });
            }
        }
        let held = |id: &hv_types::NodeId, held| Delta::Hold { id: id.clone(), held };
        deltas.extend(self.holds.difference(&next.holds).map(|id| held(id, false)));
        deltas.extend(next.holds.difference(&self.holds).map(|id| held(id, true)));
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
