//! Changes of what an instance is made of.

use hv_cluster::instances::Update;
use hv_proto::v1;
use hv_types::instance::DiskSpec;
use hv_types::{InstanceId, Invalid, Revision};
use tonic::{Request, Response, Status};

use super::Shared;
use super::request::{failed, id, mutation, refuse};

pub(super) async fn update(
    shared: &Shared,
    request: Request<v1::UpdateInstanceRequest>,
) -> Result<Response<v1::Instance>, Status> {
    let mut request = request.into_inner();
    let key = std::mem::take(&mut request.request_key);
    let mutation = mutation("ComputeService/UpdateInstance", &key, &request)?;
    let instance: InstanceId = id(&request.instance_id)?;
    let update = update_from(request).map_err(refuse)?;
    let done = shared.cluster.update_instance(&mutation, &instance, &update).await.map_err(failed)?;
    let mut reply = done.reply;
    if reply.revision == 0 {
        reply.revision = done.revision.0;
    }
    Ok(Response::new(reply))
}

fn update_from(request: v1::UpdateInstanceRequest) -> Result<Update, Invalid> {
    let cpu_cores = request.cpu_cores.map(|cores| {
        u32::try_from(cores).map_err(|_| Invalid::new("cpu_cores", cores, "must not be negative"))
    });
    let memory_bytes = request.memory_bytes.map(|bytes| {
        u64::try_from(bytes).map_err(|_| Invalid::new("memory_bytes", bytes, "must not be negative"))
    });
    Ok(Update {
        name: request.name,
        cpu_cores: cpu_cores.transpose()?,
        memory_bytes: memory_bytes.transpose()?,
        set_disks: request.set_disks.into_iter().map(disk_from).collect::<Result<_, _>>()?,
        remove_disks: request.remove_disks,
        rescue: request.rescue,
        if_revision: (request.if_revision != 0).then_some(Revision(request.if_revision)),
    })
}

fn disk_from(disk: v1::DiskSpec) -> Result<DiskSpec, Invalid> {
    let size_bytes = u64::try_from(disk.size_bytes)
        .map_err(|_| Invalid::new("set_disks.size_bytes", disk.size_bytes, "must not be negative"))?;
    Ok(DiskSpec { name: disk.name, size_bytes, disk_type: disk.r#type, boot: disk.boot })
}
