//! What an operator decides about a node: taints, overcommit, reserve, failover, and that it is switched off.

use hv_proto::v1;
use hv_store::Compare;
use hv_types::node::Fencing;
use hv_types::placement::{Overcommit, Taint, validate_taints};
use hv_types::{Invalid, NodeCondition, NodeId, NodeRecord, Resources};

use super::registration::HELD;
use crate::Cluster;
use crate::error::{Error, Result};
use crate::events::About;
use crate::requests::{Done, Mutation};

/// What is to be changed; `None` stays.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Replaces all taints.
    pub taints: Option<Vec<Taint>>,
    /// How much more may be promised than there is.
    pub overcommit: Option<Overcommit>,
    /// What is kept back.
    pub reserved: Option<Resources>,
}

/// Most conditions of a node.
const MAX_CONDITIONS: usize = 64;

impl Cluster {
    /// Changes what the operator decides about a node. What is bound stays, also where it now exceeds what may be promised;
    /// an event says so.
    ///
    /// # Errors
    /// There is no such node, or a value is refused.
    pub async fn update_node_settings(
        &self,
        mutation: &Mutation,
        id: &NodeId,
        settings: &Settings,
    ) -> Result<Done<v1::Node>> {
        if let Some(taints) = &settings.taints {
            validate_taints(taints)?;
        }
        if let Some(overcommit) = settings.overcommit {
            overcommit.validate()?;
        }
        let mut allocated = Resources::default();
        let (done, made) = self
            .change_node(mutation, id, |_, entry, node, _| {
                if let Some(taints) = &settings.taints {
                    node.taints.clone_from(taints);
                }
                node.overcommit = settings.overcommit.unwrap_or(node.overcommit);
                node.reserved = settings.reserved.unwrap_or(node.reserved);
                allocated = entry.allocated;
                Ok(())
            })
            .await?;
        if let Some(change) = made {
            let about = About::Node(&change.after);
            self.events.record(about, "NodeUpdated", "taints, overcommit or reserve changed", "user");
            if !allocated.fits_in(change.after.schedulable()) {
                let message = "more is bound to it than it may now promise; what runs there stays, nothing more comes \
                               until enough of it has gone (drain the node to move some)";
                self.events.warn(about, "NodeOvercommitted", message, "user");
            }
        }
        Ok(done)
    }

    /// Holds failover of a node's instances, or lets it work again.
    ///
    /// Holding it withdraws what the node said of its fencing, as it may cease to fence from now on; only the node's own
    /// word, given after the hold has ended, brings it back.
    ///
    /// # Errors
    /// There is no such node.
    pub async fn set_node_failover(
        &self,
        mutation: &Mutation,
        id: &NodeId,
        held: bool,
    ) -> Result<Done<v1::Node>> {
        let (done, made) = self
            .change_node(mutation, id, |_, _, node, _| {
                node.failover_held = held;
                if held && node.fencing.armed {
                    node.fencing = Fencing { armed: false, message: HELD.into() };
                }
                Ok(())
            })
            .await?;
        if let Some(change) = made {
            let (reason, message) = if held {
                ("FailoverHeld", "its instances stay with it, also if it is lost")
            } else {
                ("FailoverReleased", "its instances may be started elsewhere if it is lost and fences")
            };
            self.events.record(About::Node(&change.after), reason, message, "user");
        }
        Ok(done)
    }

    /// Takes an operator's word that a node that does not answer is switched off.
    ///
    /// # Errors
    /// There is no such node, or it answers.
    pub async fn confirm_node_down(&self, mutation: &Mutation, id: &NodeId) -> Result<Done<v1::Node>> {
        let (done, made) = self
            .change_node(mutation, id, |_, entry, node, beside| {
                if entry.is_live() {
                    let name = &node.hostname;
                    return Err(Error::precondition(format!(
                        "node {name} answers; switch it off and wait until it is NOT_READY, or drain it instead"
                    )));
                }
                beside.compares.push(Compare::Absent(self.keys.node_lease(id)));
                node.confirmed_down = true;
                Ok(())
            })
            .await?;
        if let Some(change) = made {
            let message =
                "an operator vouches that it is switched off; what may run elsewhere is started there";
            self.events.warn(About::Node(&change.after), "NodeConfirmedDown", message, "user");
        }
        Ok(done)
    }
}

/// Adds an operator's conditions to a node.
pub(super) fn add_conditions(node: &mut NodeRecord, conditions: &[NodeCondition]) -> Result<()> {
    for condition in conditions {
        node.conditions.retain(|known| known.kind != condition.kind);
        node.conditions.push(condition.clone());
    }
    if node.conditions.len() > MAX_CONDITIONS {
        let expected = format!("and those that the node has must together be at most {MAX_CONDITIONS}");
        return Err(Invalid::new("conditions", node.conditions.len(), expected).into());
    }
    Ok(())
}
