//! Nodes: registrations, records, and how the API shows them.

use std::time::SystemTime;

use hv_types::device::Amounts;
use hv_types::node::{DEFAULT_DRAIN_PARALLEL, Fencing, Schedulability};
use hv_types::placement::Overcommit;
use hv_types::{
    DriverInfo, ImageInfo, InstanceType, Invalid, NodeCondition, NodeId, NodeRecord, NodeRole, NodeStatus,
    Resources, Revision, validate,
};

use super::common::{clamp_i64, from_timestamp, resources_from, resources_to, to_timestamp, unsigned};
use super::device::{inventory_from, inventory_to, with_promised};
use super::instance::{instance_type_from, instance_type_to, metadata_from, metadata_to};
use super::placement::{overcommit_from, overcommit_to, taint_from, taint_to};
use super::{RECORD_SCHEMA, RecordError, check_schema};
use crate::{store, v1};

/// What the API shows of a node beyond its record.
#[derive(Clone, Debug)]
pub struct NodeView {
    /// Derived from its lease and what the operator wants.
    pub status: NodeStatus,
    /// What its instances were promised.
    pub allocated: Resources,
    /// What of its devices they were promised.
    pub devices: Amounts,
    /// How many there are.
    pub instance_count: usize,
    /// Its last heartbeat, if this server saw one.
    pub last_seen: Option<SystemTime>,
    /// What is in use, if known.
    pub usage: Option<v1::NodeUsage>,
    /// Since when its lease is gone, if it is and this server saw it go.
    pub lost_since: Option<SystemTime>,
}

/// A role as the wire carries it.
#[must_use]
pub fn role_to(role: NodeRole) -> v1::NodeRole {
    match role {
        NodeRole::Master => v1::NodeRole::Master,
        NodeRole::Worker => v1::NodeRole::Worker,
    }
}

/// A role from the wire; `None` where it is not said.
///
/// # Errors
/// The number stands for no role.
pub fn role_from(value: i32) -> Result<Option<NodeRole>, Invalid> {
    match v1::NodeRole::try_from(value) {
        Ok(v1::NodeRole::Unspecified) => Ok(None),
        Ok(v1::NodeRole::Master) => Ok(Some(NodeRole::Master)),
        Ok(v1::NodeRole::Worker) => Ok(Some(NodeRole::Worker)),
        Err(_) => Err(Invalid::new("role", value, "must be 1 (master) or 2 (worker)")),
    }
}

/// A status as the wire carries it.
#[must_use]
pub fn status_to(status: NodeStatus) -> v1::NodeStatus {
    match status {
        NodeStatus::Ready => v1::NodeStatus::Ready,
        NodeStatus::NotReady => v1::NodeStatus::NotReady,
        NodeStatus::Maintenance => v1::NodeStatus::Maintenance,
        NodeStatus::Draining => v1::NodeStatus::Draining,
    }
}

/// A status from the wire; `None` where it is not said.
///
/// # Errors
/// The number stands for no status.
pub fn status_from(value: i32) -> Result<Option<NodeStatus>, Invalid> {
    match v1::NodeStatus::try_from(value) {
        Ok(v1::NodeStatus::Unspecified) => Ok(None),
        Ok(v1::NodeStatus::Ready) => Ok(Some(NodeStatus::Ready)),
        Ok(v1::NodeStatus::NotReady) => Ok(Some(NodeStatus::NotReady)),
        Ok(v1::NodeStatus::Maintenance) => Ok(Some(NodeStatus::Maintenance)),
        Ok(v1::NodeStatus::Draining) => Ok(Some(NodeStatus::Draining)),
        Err(_) => Err(Invalid::new("status", value, "must be the number of a NodeStatus")),
    }
}

/// A condition as the wire carries it.
#[must_use]
pub fn condition_to(condition: &NodeCondition) -> v1::NodeCondition {
    v1::NodeCondition {
        r#type: condition.kind.clone(),
        status: condition.status.clone(),
        reason: condition.reason.clone(),
        message: condition.message.clone(),
        last_transition_time: Some(to_timestamp(condition.last_transition)),
    }
}

/// A condition from the wire.
///
/// # Errors
/// Its type or status is empty, too long or not printable.
pub fn condition_from(condition: v1::NodeCondition) -> Result<NodeCondition, Invalid> {
    validate::printable("conditions.type", &condition.r#type, 64)?;
    validate::printable("conditions.status", &condition.status, 16)?;
    validate::text("conditions.reason", &condition.reason, 64)?;
    validate::text("conditions.message", &condition.message, 4 << 10)?;
    Ok(NodeCondition {
        last_transition: condition.last_transition_time.as_ref().map_or_else(SystemTime::now, from_timestamp),
        kind: condition.r#type,
        status: condition.status,
        reason: condition.reason,
        message: condition.message,
    })
}

/// A driver as the wire carries it.
#[must_use]
pub fn driver_to(driver: &DriverInfo) -> v1::DriverInfo {
    v1::DriverInfo {
        name: driver.name.clone(),
        r#type: instance_type_to(driver.instance_type).into(),
        healthy: driver.healthy,
        version: driver.version.clone(),
        message: driver.message.clone(),
        capabilities: driver.capabilities.clone(),
        images_are_local: driver.images_are_local,
    }
}

/// A driver from the wire.
///
/// # Errors
/// Its name is no identifier or its type not said.
pub fn driver_from(driver: v1::DriverInfo) -> Result<DriverInfo, Invalid> {
    validate::identifier("drivers.name", &driver.name)?;
    validate::text("drivers.message", &driver.message, 4 << 10)?;
    validate::text("drivers.version", &driver.version, 256)?;
    let instance_type = instance_type_from(driver.r#type)?
        .ok_or_else(|| Invalid::new("drivers.type", "", "must be `vm`, `container` or `microvm`"))?;
    Ok(DriverInfo {
        name: driver.name,
        instance_type,
        healthy: driver.healthy,
        version: driver.version,
        message: driver.message,
        capabilities: driver.capabilities,
        images_are_local: driver.images_are_local,
    })
}

/// An image of a node as the wire carries it.
#[must_use]
pub fn image_to(image: &ImageInfo) -> v1::Image {
    v1::Image {
        id: image.name.clone(),
        name: image.name.clone(),
        tags: Vec::new(),
        size_bytes: clamp_i64(image.size_bytes),
        r#type: instance_type_to(image.instance_type).into(),
        created_at: Some(to_timestamp(image.created_at)),
        node_ids: Vec::new(),
        digest: image.digest.clone(),
        source: image.source.clone(),
        architecture: image.architecture.clone(),
        form: image.form.clone(),
        instances: 0,
    }
}

/// An image of a node from the wire.
///
/// # Errors
/// Its name is not printable, its type not said or its size negative.
pub fn image_from(image: v1::Image) -> Result<ImageInfo, Invalid> {
    validate::printable("images.name", &image.name, 512)?;
    validate::text("images.source", &image.source, 2048)?;
    for (field, value) in [
        ("images.digest", &image.digest),
        ("images.architecture", &image.architecture),
        ("images.form", &image.form),
    ] {
        validate::text(field, value, 128)?;
    }
    let instance_type = instance_type_from(image.r#type)?
        .ok_or_else(|| Invalid::new("images.type", "", "must be `vm`, `container` or `microvm`"))?;
    Ok(ImageInfo {
        name: image.name,
        instance_type,
        size_bytes: unsigned("images.size_bytes", image.size_bytes)?,
        created_at: image.created_at.as_ref().map_or(SystemTime::UNIX_EPOCH, from_timestamp),
        digest: image.digest,
        source: image.source,
        architecture: image.architecture,
        form: image.form,
    })
}

/// What a node says of its fencing; silence is "not armed".
///
/// # Errors
/// The text is too long.
pub fn fencing_from(fencing: Option<v1::FencingStatus>) -> Result<Fencing, Invalid> {
    let Some(fencing) = fencing else {
        return Ok(Fencing { armed: false, message: "its agent does not say that it fences".into() });
    };
    validate::text("fencing.message", &fencing.message, 4 << 10)?;
    Ok(Fencing { armed: fencing.armed, message: fencing.message })
}

/// A node as its agent describes it, checked; a node without an id gets one.
///
/// # Errors
/// Names the field that is refused.
pub fn node_from_registration(request: v1::RegisterNodeRequest) -> Result<NodeRecord, Invalid> {
    let id = if request.node_id.is_empty() { NodeId::generate() } else { request.node_id.parse()? };
    let capacity = resources_from("capacity", request.capacity)?;
    let allocatable = match request.allocatable {
        Some(amount) => resources_from("allocatable", Some(amount))?,
        None => capacity,
    };
    let drivers = if request.drivers.is_empty() {
        request
            .supported_instance_types
            .iter()
            .map(|name| undescribed_driver(name))
            .collect::<Result<_, _>>()?
    } else {
        request.drivers.into_iter().map(driver_from).collect::<Result<_, _>>()?
    };
    let now = SystemTime::now();
    let port = u16::try_from(request.port)
        .map_err(|_| Invalid::new("port", request.port, "must be between 0 and 65535"))?;
    let node = NodeRecord {
        id,
        hostname: request.hostname,
        ip: request.ip,
        port,
        role: role_from(request.role)?.unwrap_or_default(),
        region: request.region,
        zone: request.zone,
        capacity,
        allocatable,
        schedulability: Schedulability::Open,
        drain_discards_disks: false,
        drain_max_parallel: DEFAULT_DRAIN_PARALLEL,
        drain_operation_id: String::new(),
        taints: Vec::new(),
        overcommit: Overcommit::default(),
        reserved: Resources::default(),
        failover_held: false,
        fencing: fencing_from(request.fencing)?,
        confirmed_down: false,
        conditions: request.conditions.into_iter().map(condition_from).collect::<Result<_, _>>()?,
        metadata: metadata_from(request.metadata),
        drivers,
        images: request.images.into_iter().map(image_from).collect::<Result<_, _>>()?,
        devices: inventory_from(request.devices)?,
        agent_version: request.agent_version,
        created_at: now,
        registered_at: now,
        revision: Revision::default(),
    };
    node.validate()?;
    Ok(node)
}

/// A driver of an agent that only says which types it runs.
fn undescribed_driver(name: &str) -> Result<DriverInfo, Invalid> {
    let instance_type: InstanceType =
        name.parse().map_err(|e: Invalid| Invalid { field: "supported_instance_types".into(), ..e })?;
    Ok(DriverInfo {
        name: name.to_owned(),
        instance_type,
        healthy: true,
        version: String::new(),
        message: String::new(),
        capabilities: Vec::new(),
        images_are_local: false,
    })
}

/// A node as the API shows it; images only where `with_images`.
#[must_use]
pub fn node_to(record: &NodeRecord, view: &NodeView, with_images: bool) -> v1::Node {
    let types = InstanceType::ALL.into_iter().filter(|t| record.runs(*t));
    v1::Node {
        status: status_to(view.status).into(),
        allocated: Some(resources_to(view.allocated)),
        instance_count: i32::try_from(view.instance_count).unwrap_or(i32::MAX),
        last_seen: view.last_seen.map(to_timestamp),
        usage: view.usage,
        lost_since: view.lost_since.map(to_timestamp),
        supported_instance_types: types.map(|t| t.name().to_owned()).collect(),
        images: if with_images { images_of(record) } else { Vec::new() },
        devices: with_promised(inventory_to(&record.devices), record, &view.devices),
        ..node_base(record)
    }
}

fn images_of(record: &NodeRecord) -> Vec<v1::Image> {
    let node_ids = vec![record.id.to_string()];
    record.images.iter().map(|image| v1::Image { node_ids: node_ids.clone(), ..image_to(image) }).collect()
}

fn node_base(record: &NodeRecord) -> v1::Node {
    v1::Node {
        id: record.id.to_string(),
        hostname: record.hostname.clone(),
        ip: record.ip.clone(),
        port: i32::from(record.port),
        role: role_to(record.role).into(),
        region: record.region.clone(),
        zone: record.zone.clone(),
        capacity: Some(resources_to(record.capacity)),
        allocatable: Some(resources_to(record.allocatable)),
        conditions: record.conditions.iter().map(condition_to).collect(),
        metadata: Some(metadata_to(&record.metadata)),
        created_at: Some(to_timestamp(record.created_at)),
        revision: record.revision.0,
        drivers: record.drivers.iter().map(driver_to).collect(),
        devices: inventory_to(&record.devices),
        agent_version: record.agent_version.clone(),
        taints: record.taints.iter().map(taint_to).collect(),
        overcommit: Some(overcommit_to(record.overcommit)),
        reserved: Some(resources_to(record.reserved)),
        schedulable: Some(resources_to(record.schedulable())),
        failover_held: record.failover_held,
        fencing: Some(v1::FencingStatus {
            armed: record.fencing.armed,
            message: record.fencing.message.clone(),
        }),
        confirmed_down: record.confirmed_down,
        drain_operation_id: record.drain_operation_id.clone(),
        ..v1::Node::default()
    }
}

/// The record as stored.
#[must_use]
pub fn node_to_record(record: &NodeRecord) -> store::NodeRecord {
    let images = record.images.iter().map(image_to).collect();
    let schedulability = match record.schedulability {
        Schedulability::Open => store::Schedulability::Open,
        Schedulability::Cordoned => store::Schedulability::Cordoned,
        Schedulability::Draining => store::Schedulability::Draining,
    };
    store::NodeRecord {
        schema: RECORD_SCHEMA,
        node: Some(v1::Node { images, revision: 0, schedulable: None, ..node_base(record) }),
        schedulability: schedulability.into(),
        drain_discards_disks: record.drain_discards_disks,
        drain_max_parallel: record.drain_max_parallel,
        registered_at: Some(to_timestamp(record.registered_at)),
    }
}

/// The record as read at `revision`.
///
/// # Errors
/// It was written by a newer release, or contradicts itself.
pub fn node_from_record(value: store::NodeRecord, revision: Revision) -> Result<NodeRecord, RecordError> {
    check_schema(value.schema)?;
    let schedulability = match value.schedulability() {
        store::Schedulability::Open => Schedulability::Open,
        store::Schedulability::Cordoned => Schedulability::Cordoned,
        store::Schedulability::Draining => Schedulability::Draining,
    };
    let node = value.node.unwrap_or_default();
    Ok(NodeRecord {
        id: node.id.parse()?,
        hostname: node.hostname,
        ip: node.ip,
        port: u16::try_from(node.port).unwrap_or_default(),
        role: role_from(node.role)?.unwrap_or_default(),
        region: node.region,
        zone: node.zone,
        capacity: resources_from("capacity", node.capacity)?,
        allocatable: resources_from("allocatable", node.allocatable)?,
        schedulability,
        drain_discards_disks: value.drain_discards_disks,
        drain_max_parallel: match value.drain_max_parallel {
            0 => DEFAULT_DRAIN_PARALLEL,
            parallel => parallel,
        },
        drain_operation_id: node.drain_operation_id,
        taints: node.taints.into_iter().map(taint_from).collect::<Result<_, _>>()?,
        overcommit: overcommit_from(node.overcommit),
        reserved: resources_from("reserved", node.reserved)?,
        failover_held: node.failover_held,
        fencing: fencing_from(node.fencing)?,
        confirmed_down: node.confirmed_down,
        conditions: node.conditions.into_iter().map(condition_from).collect::<Result<_, _>>()?,
        metadata: metadata_from(node.metadata),
        drivers: node.drivers.into_iter().map(driver_from).collect::<Result<_, _>>()?,
        images: node.images.into_iter().map(image_from).collect::<Result<_, _>>()?,
        devices: inventory_from(node.devices)?,
        agent_version: node.agent_version,
        created_at: node.created_at.as_ref().map_or(SystemTime::UNIX_EPOCH, from_timestamp),
        registered_at: value.registered_at.as_ref().map_or(SystemTime::UNIX_EPOCH, from_timestamp),
        revision,
    })
}
