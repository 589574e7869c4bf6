//! Which instances a list or a watch is about.

use std::sync::Arc;

use hv_types::{InstanceRecord, InstanceState, InstanceType, NodeId, Selector};

use crate::cache::{Batch, Delta};

/// All must hold; `None` and empty accept any.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this type.
    pub instance_type: Option<InstanceType>,
    /// Only in this state.
    pub state: Option<InstanceState>,
    /// Only on this node.
    pub node: Option<NodeId>,
    /// Only with these labels.
    pub selector: Selector,
    /// Only this project.
    pub project: String,
    /// Only whose id or name is this, or whose id starts with it.
    pub reference: String,
}

/// What a change means to somebody who watches with a filter.
#[derive(Clone, Debug)]
pub enum Seen {
    /// It is new to the watcher.
    Added(Arc<InstanceRecord>),
    /// It changed.
    Modified(Arc<InstanceRecord>),
    /// It is gone, or does not match any more.
    Deleted(Arc<InstanceRecord>),
}

impl Filter {
    /// Whether an instance, as users see it, is meant.
    #[must_use]
    pub fn matches(&self, record: &InstanceRecord) -> bool {
        self.matches_as(record, record.state)
    }

    /// Whether an instance is meant that users see in state `shown`.
    #[must_use]
    pub fn matches_as(&self, record: &InstanceRecord, shown: InstanceState) -> bool {
        self.instance_type.is_none_or(|wanted| wanted == record.instance_type)
            && self.state.is_none_or(|wanted| wanted == shown)
            && self.node.as_ref().is_none_or(|wanted| record.node_id() == Some(wanted))
            && (self.project.is_empty() || self.project == record.project)
            && (self.reference.is_empty()
                || record.name == self.reference
                || record.id.as_str().starts_with(&self.reference))
            && self.selector.matches(&record.metadata.labels)
    }

    /// What the change at `at` means with this filter; `None` if nothing. The state of what was before is not looked at as
    /// users saw it, so a watch does not filter by state.
    #[must_use]
    pub fn see(&self, batch: &Batch, at: usize) -> Option<Seen> {
        let Delta::Instance { before, .. } = batch.deltas.get(at)? else { return None };
        let knew = before.as_ref().filter(|record| self.matches(record));
        match (knew, batch.shown(at).filter(|record| self.matches(record))) {
            (None, Some(record)) => Some(Seen::Added(record.clone())),
            (Some(_), Some(record)) => Some(Seen::Modified(record.clone())),
            (Some(record), None) => Some(Seen::Deleted(record.clone())),
            (None, None) => None,
        }
    }
}
