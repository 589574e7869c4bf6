//! Cordon, uncordon, drain.

use hv_types::node::Schedulability;
use hv_types::{InstanceId, InstanceRecord, InstanceType, NodeCondition, NodeId};

use super::Shown;
use crate::Cluster;
use crate::cache::NodeEntry;
use crate::error::{Error, Result};
use crate::events::About;

/// An instance that stays on a node being drained.
#[derive(Clone, Debug)]
pub struct Blocker {
    /// Which one.
    pub id: InstanceId,
    /// Its name.
    pub name: String,
    /// Why it stays, and what to do.
    pub reason: String,
}

impl Cluster {
    /// Sets what the operator wants of a node, and conditions that they add.
    ///
    /// # Errors
    /// There is no such node.
    pub async fn set_schedulability(
        &self,
        id: &NodeId,
        wanted: Option<Schedulability>,
        discard_disks: bool,
        conditions: &[NodeCondition],
    ) -> Result<Shown> {
        self.sync().await?;
        let before = self.cache.read(|state| state.node(id).and_then(|entry| entry.record.clone()));
        let after = self
            .update_node(id, |node| {
                if let Some(wanted) = wanted {
                    node.schedulability = wanted;
                    node.drain_discards_disks = wanted == Schedulability::Draining && discard_disks;
                }
                for condition in conditions {
                    node.conditions.retain(|known| known.kind != condition.kind);
                    node.conditions.push(condition.clone());
                }
            })
            .await?;
        if let Some(wanted) = wanted
            && before.is_some_and(|before| before.schedulability != wanted)
        {
            let (reason, message) = match wanted {
                Schedulability::Open => ("NodeUncordoned", "takes instances again"),
                Schedulability::Cordoned => ("NodeCordoned", "takes no new instances"),
                Schedulability::Draining => ("NodeDraining", "gives up its instances"),
            };
            self.events.record(About::Node(&after), reason, message, "user");
        }
        self.cache.read(|state| self.show(state, id)).ok_or_else(|| Error::no_node(id))
    }

    /// Which instances of a draining node are moved, and which stay and why.
    #[must_use]
    pub fn drain_outlook(&self, id: &NodeId) -> (Vec<InstanceId>, Vec<Blocker>) {
        self.cache.read(|state| {
            let entry = state.node(id);
            let discard = entry.and_then(|e| e.record.as_ref()).is_some_and(|r| r.drain_discards_disks);
            let silent = (!entry.is_some_and(NodeEntry::is_live)).then(|| {
                "its node does not answer, so nothing can tell that it has stopped; it moves once the node is back".to_owned()
            });
            let mut moving = Vec::new();
            let mut blockers = Vec::new();
            for record in state.instances_on(id) {
                match stays(record, discard).or_else(|| silent.clone()) {
                    None => moving.push(record.id.clone()),
                    Some(reason) => {
                        blockers.push(Blocker { id: record.id.clone(), name: record.name.clone(), reason });
                    }
                }
            }
            (moving, blockers)
        })
    }
}

/// Why an instance cannot be moved off its node.
pub(crate) fn stays(record: &InstanceRecord, discard_disks: bool) -> Option<String> {
    if record.placement.preferred_node.is_some() {
        return Some("it may only run on this node; delete it, or create it anew without --node".into());
    }
    let has_disks = !record.spec.disks.is_empty()
        || (record.instance_type != InstanceType::Container && !record.spec.image.is_empty());
    if has_disks && !discard_disks {
        return Some(
            "its disks lie on this node; drain with --discard-local-disks to start it afresh elsewhere, or delete it"
                .into(),
        );
    }
    None
}
