//! Which instances a list or a watch is about.

use std::sync::Arc;

use hv_types::{InstanceRecord, InstanceState, InstanceType, NodeId, Selector};

use crate::cache::{Delta, State};

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
        self.instance_type.is_none_or(|wanted| wanted == record.instance_type)
            && self.state.is_none_or(|wanted| wanted == record.state)
            && self.node.as_ref().is_none_or(|wanted| record.node_id() == Some(wanted))
            && (self.project.is_empty() || self.project == record.project)
            && (self.reference.is_empty()
                || record.name == self.reference
                || record.id.as_str().starts_with(&self.reference))
            && self.selector.matches(&record.metadata.labels)
    }

    /// What a change means with this filter; `None` if nothing.
    #[must_use]
    pub fn see(&self, state: &State, delta: &Delta) -> Option<Seen> {
        let Delta::Instance { before, after, .. } = delta else { return None };
        let knew = before.as_ref().filter(|record| self.matches(record));
        let after = after.as_ref().map(|record| state.view(record));
        match (knew, after.filter(|record| self.matches(record))) {
            (None, Some(record)) => Some(Seen::Added(record)),
            (Some(_), Some(record)) => Some(Seen::Modified(record)),
            (Some(record), None) => Some(Seen::Deleted(record.clone())),
            (None, None) => None,
        }
    }
}
