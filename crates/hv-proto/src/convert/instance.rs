//! Instances: requests, records, assignments.

use std::sync::Arc;

use hv_types::instance::{
    Binding, CloneOrigin, DEFAULT_PROJECT, FailoverPolicy, HealthCheck, Migration, StopOptions,
};
use hv_types::{
    DiskSpec, Epoch, InstanceId, InstanceRecord, InstanceSpec, InstanceState, InstanceType, Invalid,
    Metadata, NetworkSpec, PlacementRules, ResourceLimits, Resources, Revision, VolumeMount, Wanted,
    validate,
};

use super::common::{
    clamp_i32, clamp_i64, from_timestamp, labels_from, resources_from, resources_to, selector_from,
    to_timestamp, unsigned, unsigned_32,
};
use super::placement::{
    failover_policy_from, failover_policy_to, placement_from, placement_to, restart_policy_from,
    restart_policy_to,
};
use super::{RECORD_SCHEMA, RecordError, check_schema};
use crate::{store, v1};

/// A type as the wire carries it.
#[must_use]
pub fn instance_type_to(instance_type: InstanceType) -> v1::InstanceType {
    match instance_type {
        InstanceType::Vm => v1::InstanceType::Vm,
        InstanceType::Container => v1::InstanceType::Container,
        InstanceType::Microvm => v1::InstanceType::Microvm,
    }
}

/// A type from the wire; `None` where it is not said.
///
/// # Errors
/// The number stands for no type.
pub fn instance_type_from(value: i32) -> Result<Option<InstanceType>, Invalid> {
    match v1::InstanceType::try_from(value) {
        Ok(v1::InstanceType::Unspecified) => Ok(None),
        Ok(v1::InstanceType::Vm) => Ok(Some(InstanceType::Vm)),
        Ok(v1::InstanceType::Container) => Ok(Some(InstanceType::Container)),
        Ok(v1::InstanceType::Microvm) => Ok(Some(InstanceType::Microvm)),
        Err(_) => Err(Invalid::new("type", value, "must be 1 (vm), 2 (container) or 3 (microvm)")),
    }
}

/// A state as the wire carries it.
#[must_use]
pub fn state_to(state: InstanceState) -> v1::InstanceState {
    match state {
        InstanceState::Pending => v1::InstanceState::Pending,
        InstanceState::Creating => v1::InstanceState::Creating,
        InstanceState::Starting => v1::InstanceState::Starting,
        InstanceState::Running => v1::InstanceState::Running,
        InstanceState::Paused => v1::InstanceState::Paused,
        InstanceState::Stopping => v1::InstanceState::Stopping,
        InstanceState::Stopped => v1::InstanceState::Stopped,
        InstanceState::Failed => v1::InstanceState::Failed,
        InstanceState::Deleting => v1::InstanceState::Deleting,
        InstanceState::Unknown => v1::InstanceState::Unknown,
    }
}

/// A state from the wire; `None` where it is not said.
///
/// # Errors
/// The number stands for no state.
pub fn state_from(value: i32) -> Result<Option<InstanceState>, Invalid> {
    if value == 0 {
        return Ok(None);
    }
    InstanceState::ALL
        .into_iter()
        .find(|state| state_to(*state) as i32 == value)
        .map(Some)
        .ok_or_else(|| Invalid::new("state", value, "must be the number of an InstanceState"))
}

/// What is wanted, as the wire carries it.
#[must_use]
pub fn wanted_to(wanted: Wanted) -> v1::InstanceWanted {
    match wanted {
        Wanted::Running => v1::InstanceWanted::Running,
        Wanted::Stopped => v1::InstanceWanted::Stopped,
        Wanted::Paused => v1::InstanceWanted::Paused,
        Wanted::Deleted => v1::InstanceWanted::Deleted,
    }
}

/// What is wanted, from the wire.
///
/// # Errors
/// The number stands for nothing.
pub fn wanted_from(value: i32) -> Result<Wanted, Invalid> {
    match v1::InstanceWanted::try_from(value) {
        Ok(v1::InstanceWanted::Running) => Ok(Wanted::Running),
        Ok(v1::InstanceWanted::Stopped) => Ok(Wanted::Stopped),
        Ok(v1::InstanceWanted::Paused) => Ok(Wanted::Paused),
        Ok(v1::InstanceWanted::Deleted) => Ok(Wanted::Deleted),
        Ok(v1::InstanceWanted::Unspecified) | Err(_) => {
            Err(Invalid::new("wanted", value, "must be 1 (running), 2 (stopped), 3 (paused) or 4 (deleted)"))
        }
    }
}

/// Metadata as the wire carries it.
#[must_use]
pub fn metadata_to(metadata: &Metadata) -> v1::Metadata {
    v1::Metadata {
        labels: metadata.labels.clone().into_iter().collect(),
        annotations: metadata.annotations.clone().into_iter().collect(),
    }
}

/// Metadata from the wire, not yet validated.
#[must_use]
pub fn metadata_from(metadata: Option<v1::Metadata>) -> Metadata {
    let metadata = metadata.unwrap_or_default();
    Metadata { labels: labels_from(metadata.labels), annotations: labels_from(metadata.annotations) }
}

/// A specification as the wire carries it.
#[must_use]
pub fn spec_to(spec: &InstanceSpec) -> v1::InstanceSpec {
    v1::InstanceSpec {
        image: spec.image.clone(),
        cpu_cores: clamp_i32(spec.cpu_cores),
        memory_bytes: clamp_i64(spec.memory_bytes),
        disks: spec.disks.iter().map(disk_to).collect(),
        network: spec.network.as_ref().map(|network| v1::NetworkSpec {
            network_id: network.network_id.clone(),
            subnet_id: network.subnet_id.clone(),
            security_groups: network.security_groups.clone(),
            assign_public_ip: network.assign_public_ip,
        }),
        kernel: spec.kernel.clone(),
        initrd: spec.initrd.clone(),
        kernel_args: spec.kernel_args.clone(),
        command: spec.command.clone(),
        args: spec.args.clone(),
        env: spec.env.clone().into_iter().collect(),
        volume_mounts: spec
            .volume_mounts
            .iter()
            .map(|mount| v1::VolumeMount {
                name: mount.name.clone(),
                mount_path: mount.mount_path.clone(),
                read_only: mount.read_only,
            })
            .collect(),
        limits: spec.limits.map(|limits| v1::ResourceLimits {
            cpu_quota: limits.cpu_quota,
            cpu_period: limits.cpu_period,
            memory_limit: limits.memory_limit,
            memory_swap: limits.memory_swap,
            io_read_bps: limits.io_read_bps,
            io_write_bps: limits.io_write_bps,
            pids: limits.pids,
        }),
        user_data: spec.user_data.clone(),
        firmware: spec.firmware.map(|firmware| firmware.name().to_owned()).unwrap_or_default(),
        tpm: spec.tpm,
        read_only_root: spec.read_only_root,
        user: spec.user.clone(),
        working_dir: spec.working_dir.clone(),
        health_check: spec.health_check.as_ref().map(|check| v1::HealthCheck {
            command: check.command.clone(),
            interval_seconds: check.interval_seconds,
            timeout_seconds: check.timeout_seconds,
            retries: check.retries,
            start_seconds: check.start_seconds,
        }),
        clone_of: spec.clone_of.as_ref().map(|origin| v1::CloneOrigin {
            instance_id: origin.instance.to_string(),
            snapshot: origin.snapshot.clone(),
        }),
        rescue: spec.rescue.clone(),
        devices: super::device::needs_to(&spec.devices),
    }
}

fn disk_to(disk: &DiskSpec) -> v1::DiskSpec {
    v1::DiskSpec {
        name: disk.name.clone(),
        size_bytes: clamp_i64(disk.size_bytes),
        r#type: disk.disk_type.clone(),
        boot: disk.boot,
    }
}

/// A specification from the wire; its rules are checked by [`InstanceSpec::validate`].
///
/// # Errors
/// An amount is negative.
pub fn spec_from(spec: v1::InstanceSpec) -> Result<InstanceSpec, Invalid> {
    let disk = |(index, disk): (usize, v1::DiskSpec)| {
        Ok(DiskSpec {
            name: disk.name,
            size_bytes: unsigned(&format!("spec.disks[{index}].size_bytes"), disk.size_bytes)?,
            disk_type: disk.r#type,
            boot: disk.boot,
        })
    };
    Ok(InstanceSpec {
        image: spec.image,
        cpu_cores: unsigned_32("spec.cpu_cores", spec.cpu_cores)?,
        memory_bytes: unsigned("spec.memory_bytes", spec.memory_bytes)?,
        disks: spec.disks.into_iter().enumerate().map(disk).collect::<Result<_, Invalid>>()?,
        network: spec.network.map(|network| NetworkSpec {
            network_id: network.network_id,
            subnet_id: network.subnet_id,
            security_groups: network.security_groups,
            assign_public_ip: network.assign_public_ip,
        }),
        kernel: spec.kernel,
        initrd: spec.initrd,
        kernel_args: spec.kernel_args,
        command: spec.command,
        args: spec.args,
        env: spec.env.into_iter().collect(),
        volume_mounts: spec
            .volume_mounts
            .into_iter()
            .map(|mount| VolumeMount {
                name: mount.name,
                mount_path: mount.mount_path,
                read_only: mount.read_only,
            })
            .collect(),
        limits: spec.limits.map(|limits| ResourceLimits {
            cpu_quota: limits.cpu_quota,
            cpu_period: limits.cpu_period,
            memory_limit: limits.memory_limit,
            memory_swap: limits.memory_swap,
            io_read_bps: limits.io_read_bps,
            io_write_bps: limits.io_write_bps,
            pids: limits.pids,
        }),
        user_data: spec.user_data,
        firmware: (!spec.firmware.is_empty()).then(|| spec.firmware.parse()).transpose()?,
        tpm: spec.tpm,
        read_only_root: spec.read_only_root,
        user: spec.user,
        working_dir: spec.working_dir,
        health_check: spec.health_check.map(health_check_from),
        clone_of: spec.clone_of.map(clone_of_from).transpose()?,
        rescue: spec.rescue,
        devices: super::device::needs_from(spec.devices)?,
    })
}

fn clone_of_from(origin: v1::CloneOrigin) -> Result<Box<CloneOrigin>, Invalid> {
    validate::name("spec.clone_of.snapshot", &origin.snapshot)?;
    Ok(Box::new(CloneOrigin { instance: origin.instance_id.parse()?, snapshot: origin.snapshot }))
}

/// A health check, with the defaults where nothing is said.
fn health_check_from(check: v1::HealthCheck) -> HealthCheck {
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    HealthCheck {
        command: check.command,
        interval_seconds: or(check.interval_seconds, HealthCheck::INTERVAL_SECONDS),
        timeout_seconds: or(check.timeout_seconds, HealthCheck::TIMEOUT_SECONDS),
        retries: or(check.retries, HealthCheck::RETRIES),
        start_seconds: check.start_seconds,
    }
}

/// The project that a request names, or the default one.
///
/// # Errors
/// It is no project name.
pub fn project_from(project: String) -> Result<String, Invalid> {
    if project.is_empty() {
        return Ok(DEFAULT_PROJECT.to_owned());
    }
    validate::name("project", &project)?;
    Ok(project)
}

/// The record that a create request asks for, checked, with a new id.
///
/// # Errors
/// Names the field that is refused.
pub fn create_request_from(request: v1::CreateInstanceRequest) -> Result<InstanceRecord, Invalid> {
    // First what is cheap to refuse: a name of 10 MB must not be copied around.
    validate::name("name", &request.name)?;
    let instance_type = instance_type_from(request.r#type)?
        .ok_or_else(|| Invalid::new("type", "", "must be `vm`, `container` or `microvm`"))?;
    let spec = request.spec.ok_or_else(|| Invalid::new("spec", "", "must be given"))?;
    if let Some(origin) = &spec.clone_of {
        let expected = "is set for instances that are made from a snapshot; ask for a clone of that";
        return Err(Invalid::new("spec.clone_of", &origin.instance_id, expected));
    }
    let preferred = request.preferred_node_id;
    let record = InstanceRecord {
        project: project_from(request.project)?,
        metadata: Arc::new(metadata_from(request.metadata)),
        placement: Arc::new(PlacementRules {
            preferred_node: (!preferred.is_empty()).then(|| preferred.parse()).transpose()?,
            region: request.region,
            zone: request.zone,
            node_selector: selector_from(request.node_selector)
                .map_err(|e| Invalid { field: "node_selector".into(), ..e })?,
            ..placement_from(request.placement)?
        }),
        restart_policy: restart_policy_from(request.restart_policy)?,
        failover_policy: failover_policy_from(request.failover_policy)?,
        ..InstanceRecord::pending(
            InstanceId::generate(),
            &request.name,
            instance_type,
            Arc::new(spec_from(spec)?),
        )
    };
    if record.spec.is_in_rescue() {
        let expected = "must be empty: create it first, then `hypervisor-ctl instance rescue`";
        return Err(Invalid::new("spec.rescue", &record.spec.rescue, expected));
    }
    record.validate()?;
    Ok(record)
}

/// An instance as the API shows it.
#[must_use]
pub fn instance_to(record: &InstanceRecord) -> v1::Instance {
    let placement = &record.placement;
    v1::Instance {
        id: record.id.to_string(),
        name: record.name.clone(),
        r#type: instance_type_to(record.instance_type).into(),
        state: state_to(record.state).into(),
        spec: Some(spec_to(&record.spec)),
        node_id: record.node_id().map(ToString::to_string).unwrap_or_default(),
        ip_address: record.ip_address.clone(),
        metadata: Some(metadata_to(&record.metadata)),
        state_reason: record.state_reason.clone(),
        created_at: Some(to_timestamp(record.created_at)),
        started_at: record.started_at.map(to_timestamp),
        revision: record.revision.0,
        generation: record.generation,
        observed_generation: record.observed_generation,
        epoch: record.epoch.0,
        wanted: wanted_to(record.wanted).into(),
        project: record.project.clone(),
        restart_policy: restart_policy_to(record.restart_policy).into(),
        failover_policy: failover_policy_to(record.failover_policy).into(),
        restart_count: record.restart_count,
        recovery_note: record.recovery_note.clone(),
        set: record.set.clone(),
        placement: rules_to(placement),
        preferred_node_id: placement.preferred_node.as_ref().map(ToString::to_string).unwrap_or_default(),
        region: placement.region.clone(),
        zone: placement.zone.clone(),
        node_selector: placement.node_selector.requirements().clone().into_iter().collect(),
        migration_target: record.migration.as_ref().map(|m| m.target.to_string()).unwrap_or_default(),
        update_note: record.update_note.clone(),
    }
}

/// The rules, left out where they are the default: nearly always.
fn rules_to(rules: &PlacementRules) -> Option<v1::PlacementRules> {
    let rules = placement_to(rules);
    (rules != v1::PlacementRules::default()).then_some(rules)
}

/// An instance as its node is told of it. A node that is to give it up is told to delete it.
#[must_use]
pub fn assignment_to(record: &InstanceRecord) -> v1::Assignment {
    let release = record.binding.as_ref().is_some_and(|binding| binding.release);
    let wanted = if release { Wanted::Deleted } else { record.wanted };
    let arrives = record.arrives_by().map(|migration| migration.operation.clone());
    v1::Assignment {
        instance_id: record.id.to_string(),
        name: record.name.clone(),
        r#type: instance_type_to(record.instance_type).into(),
        spec: Some(spec_to(&record.spec)),
        metadata: Some(metadata_to(&record.metadata)),
        epoch: record.epoch.0,
        generation: record.generation,
        wanted: wanted_to(wanted).into(),
        restart_generation: record.restart_generation,
        stop_force: record.stop.force,
        stop_timeout_seconds: record.stop.timeout_seconds,
        fence: record.failover_policy == FailoverPolicy::Restart,
        restart_policy: restart_policy_to(record.restart_policy).into(),
        migration_id: arrives.unwrap_or_default(),
    }
}

/// The record as stored.
#[must_use]
pub fn instance_to_record(record: &InstanceRecord) -> store::InstanceRecord {
    let placement = &record.placement;
    store::InstanceRecord {
        schema: RECORD_SCHEMA,
        id: record.id.to_string(),
        name: record.name.clone(),
        project: record.project.clone(),
        r#type: instance_type_to(record.instance_type).into(),
        spec: Some(spec_to(&record.spec)),
        metadata: Some(metadata_to(&record.metadata)),
        preferred_node_id: placement.preferred_node.as_ref().map(ToString::to_string).unwrap_or_default(),
        region: placement.region.clone(),
        zone: placement.zone.clone(),
        node_selector: placement.node_selector.requirements().clone().into_iter().collect(),
        placement: rules_to(placement),
        restart_policy: restart_policy_to(record.restart_policy).into(),
        failover_policy: failover_policy_to(record.failover_policy).into(),
        set: record.set.clone(),
        wanted: wanted_to(record.wanted).into(),
        generation: record.generation,
        restart_generation: record.restart_generation,
        stop_force: record.stop.force,
        stop_timeout_seconds: record.stop.timeout_seconds,
        node_id: record.node_id().map(ToString::to_string).unwrap_or_default(),
        release: record.binding.as_ref().is_some_and(|binding| binding.release),
        epoch: record.epoch.0,
        state: state_to(record.state).into(),
        state_reason: record.state_reason.clone(),
        observed_generation: record.observed_generation,
        ip_address: record.ip_address.clone(),
        created_at: Some(to_timestamp(record.created_at)),
        started_at: record.started_at.map(to_timestamp),
        restart_count: record.restart_count,
        recovery_note: record.recovery_note.clone(),
        update_note: record.update_note.clone(),
        migration_target: record.migration.as_ref().map(|m| m.target.to_string()).unwrap_or_default(),
        migration_id: record.migration.as_ref().map(|m| m.operation.clone()).unwrap_or_default(),
        holds: (record.holds != Resources::default()).then(|| resources_to(record.holds)),
    }
}

/// The record as read at `revision`.
///
/// # Errors
/// It was written by a newer release, or contradicts itself.
pub fn instance_from_record(
    value: store::InstanceRecord,
    revision: Revision,
) -> Result<InstanceRecord, RecordError> {
    check_schema(value.schema)?;
    let binding = if value.node_id.is_empty() {
        None
    } else {
        Some(Binding { node_id: value.node_id.parse()?, release: value.release })
    };
    let preferred = value.preferred_node_id;
    let migration = match (value.migration_target, value.migration_id) {
        (target, _) if target.is_empty() => None,
        (target, operation) => Some(Box::new(Migration { target: target.parse()?, operation })),
    };
    Ok(InstanceRecord {
        id: value.id.parse()?,
        name: value.name,
        project: value.project,
        instance_type: instance_type_from(value.r#type)?
            .ok_or_else(|| Invalid::new("type", value.r#type, "must be set"))?,
        spec: Arc::new(spec_from(value.spec.unwrap_or_default())?),
        metadata: Arc::new(metadata_from(value.metadata)),
        placement: Arc::new(PlacementRules {
            preferred_node: (!preferred.is_empty()).then(|| preferred.parse()).transpose()?,
            region: value.region,
            zone: value.zone,
            node_selector: selector_from(value.node_selector)?,
            ..placement_from(value.placement)?
        }),
        restart_policy: restart_policy_from(value.restart_policy)?,
        failover_policy: failover_policy_from(value.failover_policy)?,
        set: value.set,
        wanted: wanted_from(value.wanted)?,
        generation: value.generation,
        restart_generation: value.restart_generation,
        stop: StopOptions { force: value.stop_force, timeout_seconds: value.stop_timeout_seconds },
        binding,
        epoch: Epoch(value.epoch),
        state: state_from(value.state)?.ok_or_else(|| Invalid::new("state", value.state, "must be set"))?,
        state_reason: value.state_reason,
        observed_generation: value.observed_generation,
        ip_address: value.ip_address,
        created_at: value.created_at.as_ref().map_or(std::time::UNIX_EPOCH, from_timestamp),
        started_at: value.started_at.as_ref().map(from_timestamp),
        restart_count: value.restart_count,
        recovery_note: value.recovery_note,
        update_note: value.update_note,
        holds: value.holds.map(|holds| resources_from("holds", Some(holds))).transpose()?.unwrap_or_default(),
        migration,
        revision,
    })
}
