//! Snapshots of the instances of this node.

use hv_driver::{SnapshotInfo, SnapshotRequest};
use hv_proto::{convert, v1};
use hv_types::{Epoch, InstanceId};
use pbjson_types::Empty;
use tonic::{Request, Response, Status};

use super::{Answer, Service, clamp, driver_error, id_from, refuse};
use crate::worker::{Refusal, SnapshotWish, Snapshots};

fn refused(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::Agent(error) => refuse(error),
        Refusal::Driver(error) => driver_error(error),
    }
}

fn shown(snapshot: SnapshotInfo) -> v1::InstanceSnapshot {
    v1::InstanceSnapshot {
        name: snapshot.name,
        created_at: Some(convert::to_timestamp(snapshot.created_at)),
        memory: snapshot.memory,
        size_bytes: clamp(snapshot.size_bytes),
    }
}

impl Service {
    async fn snapshots(&self, id: &InstanceId, epoch: u64, wish: SnapshotWish) -> Result<Snapshots, Status> {
        let epoch = (epoch != 0).then_some(Epoch(epoch));
        self.instances.snapshots(id, epoch, wish).await.map_err(|refusal| refused(&refusal))
    }

    pub(super) async fn create_snapshot(
        &self,
        request: Request<v1::AgentSnapshotRequest>,
    ) -> Answer<v1::InstanceSnapshot> {
        let request = request.into_inner();
        let id = id_from(&request.instance_id)?;
        let asked = SnapshotRequest { name: request.name, memory: request.memory };
        let made = self.snapshots(&id, request.epoch, SnapshotWish::Create(asked)).await?;
        let made = made.into_iter().next().map(shown);
        Ok(Response::new(made.unwrap_or_default()))
    }

    pub(super) async fn revert_snapshot(
        &self,
        request: Request<v1::AgentSnapshotRequest>,
    ) -> Answer<v1::Instance> {
        let request = request.into_inner();
        let id = id_from(&request.instance_id)?;
        self.snapshots(&id, request.epoch, SnapshotWish::Revert(request.name)).await?;
        let view = self.instances.follow(&id).map_err(|e| refuse(&e))?;
        let view = view.borrow().clone();
        Ok(Response::new(convert::instance_to(&view.record)))
    }

    pub(super) async fn delete_snapshot(&self, request: Request<v1::AgentSnapshotRequest>) -> Answer<Empty> {
        let request = request.into_inner();
        let id = id_from(&request.instance_id)?;
        self.snapshots(&id, request.epoch, SnapshotWish::Delete(request.name)).await?;
        Ok(Response::new(Empty {}))
    }

    pub(super) async fn list_snapshot(
        &self,
        request: Request<v1::AgentInstanceRequest>,
    ) -> Answer<v1::ListInstanceSnapshotsResponse> {
        let id = id_from(&request.into_inner().instance_id)?;
        let snapshots = self.snapshots(&id, 0, SnapshotWish::List).await?;
        let snapshots = snapshots.into_iter().map(shown).collect();
        Ok(Response::new(v1::ListInstanceSnapshotsResponse { snapshots }))
    }
}
