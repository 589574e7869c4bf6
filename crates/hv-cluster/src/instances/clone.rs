//! New instances made from the snapshot of another.
//!
//! # Theory of operation
//! A clone is an instance like any other, whose specification says what it is made from instead of its image. So it is
//! recorded, bound and counted by the same transaction as every create, made by its node's worker, and made again from
//! the same snapshot wherever a created instance would be made again from its image. It may only be on the node that has
//! the snapshot.
//!
//! What its node's driver cannot do, and a snapshot that is not there, are refused before anything is recorded.

use std::sync::Arc;

use hv_proto::v1;
use hv_types::instance::{CloneOrigin, FailoverPolicy};
use hv_types::{
    DriverInfo, ErrorCode, InstanceId, InstanceRecord, InstanceSpec, NodeId, PlacementRules, ServiceError,
    validate,
};

use crate::Cluster;
use crate::error::{Error, Result};
use crate::operations::snapshots::{LOOK_LIMIT, on_node};
use crate::placer::Reply;
use crate::requests::{Done, Mutation};

/// Among a driver's capabilities: instances from snapshots.
const CAPABILITY: &str = "clone";

/// Which instances are to be made from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloneRequest {
    /// The snapshot's name.
    pub snapshot: String,
    /// The new instance's name, or that of the set.
    pub name: String,
    /// How many are in the set; `None`: one instance, in no set.
    pub count: Option<usize>,
}

impl Cluster {
    /// Records instances that are made from a snapshot of `source`, bound to its node where this server leads and there is
    /// room: all of them or none.
    ///
    /// # Errors
    /// There is no such instance or snapshot, the source is on no node or is being moved or deleted, its node does not
    /// answer or cannot clone, or a name is taken.
    pub async fn clone_instance(
        self: &Arc<Self>,
        mutation: &Mutation,
        source: &InstanceId,
        asked: &CloneRequest,
    ) -> Result<Done<v1::CloneInstanceResponse>> {
        validate::name("name", &asked.name)?;
        validate::name("snapshot", &asked.snapshot)?;
        // The source may be gone since.
        if let Some(done) = self.create_recorded(mutation, asked.count.is_some()).await? {
            return Ok(answer(done));
        }
        let record = self.instance(source).await?;
        let node = on_node(&record, "be cloned")?;
        self.refuse_unable(&record, node)?;
        self.refuse_missing(&record, node, &asked.snapshot).await?;
        let template = template(&record, node, asked);
        let done = match asked.count {
            None => {
                let done = self.create_instance(mutation, template).await?;
                let reply = Reply::One(Box::new(done.reply));
                Done { reply, revision: done.revision, fresh: done.fresh }
            }
            Some(count) => {
                let done = self.create_instances(mutation, template, count).await?;
                Done { reply: Reply::Set(done.reply), revision: done.revision, fresh: done.fresh }
            }
        };
        Ok(answer(done))
    }

    fn refuse_unable(&self, record: &InstanceRecord, node: &NodeId) -> Result<()> {
        let known = self.cache.read(|state| state.node(node).and_then(|entry| entry.record.clone()));
        let known = known
            .ok_or_else(|| Error::precondition(format!("the node of instance {} is gone", record.name)))?;
        let its_type = |driver: &&DriverInfo| driver.instance_type == record.instance_type;
        let can = |driver: &DriverInfo| driver.capabilities.iter().any(|known| known == CAPABILITY);
        if known.drivers.iter().filter(its_type).any(can) {
            return Ok(());
        }
        let names: Vec<_> =
            known.drivers.iter().filter(its_type).map(|driver| driver.name.as_str()).collect();
        let message = format!(
            "instance {} cannot be cloned: {} on node {} cannot do `{CAPABILITY}`; see `hypervisor-ctl node describe`",
            record.name,
            if names.is_empty() { "its driver".to_owned() } else { names.join(", ") },
            known.hostname,
        );
        Err(ServiceError::new(ErrorCode::Unsupported, message).into())
    }

    async fn refuse_missing(&self, record: &InstanceRecord, node: &NodeId, name: &str) -> Result<()> {
        let agents =
            self.agents.get().ok_or_else(|| ServiceError::unavailable("this server reaches no nodes"))?;
        let asked = tokio::time::timeout(LOOK_LIMIT, agents.snapshots(node, &record.id)).await;
        let silent = || ServiceError::unavailable(format!("no answer within {} s", LOOK_LIMIT.as_secs()));
        let snapshots = asked.unwrap_or_else(|_| Err(silent())).map_err(|error| {
            let message = format!(
                "nothing was recorded, as the node of instance {} did not say which snapshots there are: {}",
                record.name,
                error.message()
            );
            ServiceError::new(error.code(), message).caused_by(error)
        })?;
        if snapshots.iter().any(|snapshot| snapshot.name == name) {
            return Ok(());
        }
        let message = format!(
            "instance {} has no snapshot {name}; see `hypervisor-ctl instance snapshot list {}`",
            record.name, record.name
        );
        Err(ServiceError::not_found(message).into())
    }
}

/// What a clone is like: as its source, less what only one of the two can have. Addresses are the node's to give.
fn template(source: &InstanceRecord, node: &NodeId, asked: &CloneRequest) -> InstanceRecord {
    let origin = CloneOrigin { instance: source.id.clone(), snapshot: asked.snapshot.clone() };
    let spec = InstanceSpec { clone_of: Some(Box::new(origin)), ..InstanceSpec::clone(&source.spec) };
    // The snapshot says where. Rules about other instances would keep clones off the only node that has it.
    let placement = PlacementRules {
        preferred_node: Some(node.clone()),
        tolerations: source.placement.tolerations.clone(),
        priority: source.placement.priority,
        ..PlacementRules::default()
    };
    InstanceRecord {
        project: source.project.clone(),
        metadata: source.metadata.clone(),
        placement: Arc::new(placement),
        restart_policy: source.restart_policy,
        // No other node has the snapshot.
        failover_policy: FailoverPolicy::Never,
        ..InstanceRecord::pending(InstanceId::generate(), &asked.name, source.instance_type, Arc::new(spec))
    }
}

fn answer(done: Done<Reply>) -> Done<v1::CloneInstanceResponse> {
    let instances = match done.reply {
        Reply::One(instance) => {
            let v1::Instance { id, name, node_id, .. } = *instance;
            vec![v1::CreatedInstance { id, name, node_id }]
        }
        Reply::Set(set) => set.instances,
    };
    let reply = v1::CloneInstanceResponse { instances, revision: done.revision.0 };
    Done { reply, revision: done.revision, fresh: done.fresh }
}
