//! Changes of what an instance is made of: cores, memory, disks, name.
//!
//! # Theory of operation
//! The record carries the new specification from the moment the change is acknowledged; its node makes it so and says in
//! its reports what has to wait for the next start. A change that takes more of the node's room is made under a hold of
//! the node ([`crate::nodes`]): what is counted there is exact, and the transaction compares the hold. One that takes no
//! more needs none.
//!
//! # Invariants
//! What is bound to a node never exceeds what may be promised of it, however many updates and creates run at once.

use std::sync::Arc;

use bytes::Bytes;
use hv_proto::{convert, v1};
use hv_store::{Compare, Op};
use hv_telemetry::crash::{self, Point};
use hv_types::instance::{DiskSpec, InstanceSpec, RestartPolicy};
use hv_types::resources::MIB;
use hv_types::{
    ErrorCode, InstanceId, InstanceRecord, InstanceState, Invalid, NodeId, Resources, Revision, ServiceError,
    Wanted, validate,
};

use crate::Cluster;
use crate::cache::State;
use crate::error::{Error, Result};
use crate::events::About;
use crate::nodes::Hold;
use crate::operations::migrate;
use crate::placer::{name_in_set, name_taken, set_of};
use crate::requests::{Done, Mutation, Plan};

/// How often an update is planned anew because it turned out to need a hold, or one of another node.
const ATTEMPTS: usize = 8;
/// The capability of drivers that start an instance from another image than its own.
const RESCUE: &str = "rescue";

/// What is to be different. What is not set stays.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// Its new name.
    pub name: Option<String>,
    /// Its new cores.
    pub cpu_cores: Option<u32>,
    /// Its new memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// Disks that are added or, where one of the name is there, grown.
    pub set_disks: Vec<DiskSpec>,
    /// Names of disks that are removed with what is on them.
    pub remove_disks: Vec<String>,
    /// The image to start it from, its own disks behind it; empty: out of rescue.
    pub rescue: Option<String>,
    /// Only if the record is still at this revision.
    pub if_revision: Option<Revision>,
}

impl Update {
    /// The specification with what is to be different, checked.
    fn apply(&self, record: &InstanceRecord) -> Result<InstanceSpec> {
        let mut spec = InstanceSpec::clone(&record.spec);
        if let Some(rescue) = &self.rescue {
            spec.rescue.clone_from(rescue);
        }
        spec.cpu_cores = self.cpu_cores.unwrap_or(spec.cpu_cores);
        spec.memory_bytes = self.memory_bytes.unwrap_or(spec.memory_bytes);
        for name in &self.remove_disks {
            let Some(at) = spec.disks.iter().position(|disk| disk.name == *name) else {
                let names: Vec<_> = record.spec.disks.iter().map(|disk| disk.name.as_str()).collect();
                let expected = format!("must be a disk of the instance ({})", names.join(", "));
                return Err(Invalid::new("remove_disks", name, expected).into());
            };
            if spec.disks[at].boot {
                let expected = "must not be the boot disk, without which it cannot start";
                return Err(Invalid::new("remove_disks", name, expected).into());
            }
            spec.disks.remove(at);
        }
        for wanted in &self.set_disks {
            if self.remove_disks.contains(&wanted.name) {
                let expected = "must not be set and removed by the same request";
                return Err(Invalid::new("set_disks", &wanted.name, expected).into());
            }
            match spec.disks.iter_mut().find(|disk| disk.name == wanted.name) {
                Some(disk) => grow(disk, wanted)?,
                None if wanted.boot => {
                    let expected = "must not be a boot disk: that is made when the instance is created";
                    return Err(Invalid::new("set_disks", &wanted.name, expected).into());
                }
                None => spec.disks.push(wanted.clone()),
            }
        }
        if spec.device_amounts() != record.spec.device_amounts() {
            let text = "cores with dedicated processors and memory in huge pages cannot be changed: its node gave them once; \
                        delete it and create it anew";
            return Err(ServiceError::precondition(text).into());
        }
        spec.validate(record.instance_type)?;
        Ok(spec)
    }

    /// An instance goes into rescue, and out of it, by itself; meanwhile nothing of it changes but its name.
    fn refuse_in_rescue(&self, record: &InstanceRecord, spec: &InstanceSpec) -> Result<()> {
        let Self { rescue, cpu_cores, memory_bytes, set_disks, remove_disks, .. } = self;
        let changes_shape = cpu_cores.is_some()
            || memory_bytes.is_some()
            || !set_disks.is_empty()
            || !remove_disks.is_empty();
        if changes_shape && rescue.is_some() {
            return Err(Invalid::new("rescue", &spec.rescue, "must be given alone, or with a name").into());
        }
        if changes_shape {
            refuse_in_rescue(record, "change")?;
        }
        if record.spec.is_in_rescue() && spec.is_in_rescue() && record.spec.rescue != spec.rescue {
            return Err(Error::precondition(format!(
                "instance {} is in rescue already, from {}; unrescue it first",
                record.name, record.spec.rescue
            )));
        }
        Ok(())
    }
}

/// Grows a disk that is there.
fn grow(disk: &mut DiskSpec, wanted: &DiskSpec) -> Result<()> {
    if wanted.size_bytes < disk.size_bytes {
        let expected = format!("must be at least {}: a disk cannot shrink", disk.size_bytes);
        return Err(Invalid::new("set_disks.size_bytes", wanted.size_bytes, expected).into());
    }
    if !wanted.disk_type.is_empty() && wanted.disk_type != disk.disk_type {
        let expected = "must stay as it is: add another disk instead";
        return Err(Invalid::new("set_disks.type", &wanted.disk_type, expected).into());
    }
    disk.size_bytes = wanted.size_bytes;
    Ok(())
}

/// What the planning of an update comes to.
enum Planned {
    Write(Box<Plan<v1::Instance>>),
    /// It takes more of this node: hold it first.
    Needs(NodeId),
}

impl Cluster {
    /// Changes what an instance is made of.
    ///
    /// # Errors
    /// There is no such instance, its state does not allow it, the change is not valid, the name is taken, or its node
    /// has no room for more.
    pub async fn update_instance(
        &self,
        mutation: &Mutation,
        id: &InstanceId,
        update: &Update,
    ) -> Result<Done<v1::Instance>> {
        if let Some(name) = &update.name {
            validate::name("name", name)?;
        }
        let mut hold: Option<Hold> = None;
        for _ in 0..ATTEMPTS {
            let mut needs = None;
            let mut changed = None;
            crash::reach(Point::ServerChangeBeforeTxn);
            let outcome = self
                .mutate(mutation, &format!("instance {id}"), || {
                    self.cache.read(|state| {
                        let planned = self.plan_update(state, id, update, hold.as_ref())?;
                        changed = state.instance(id).cloned();
                        match planned {
                            Planned::Write(plan) => Ok(*plan),
                            Planned::Needs(node) => {
                                needs = Some(node);
                                Err(Error::conflict(format!("instance {id}")))
                            }
                        }
                    })
                })
                .await;
            crash::reach(Point::ServerChangeAfterTxn);
            if let Some(hold) = hold.take() {
                self.end_hold(hold).await;
            }
            match (outcome, needs) {
                (Err(_), Some(node)) => hold = Some(self.hold_node(&node).await?),
                (Ok(done), _) => {
                    if done.fresh
                        && let Some(record) = changed
                    {
                        self.events.record(
                            About::Instance(&record),
                            "UpdateRequested",
                            "update asked for",
                            "user",
                        );
                    }
                    return Ok(done);
                }
                (Err(error), None) => return Err(error),
            }
        }
        if let Some(hold) = hold.take() {
            self.end_hold(hold).await;
        }
        Err(Error::conflict(format!("instance {id}")))
    }

    fn plan_update(
        &self,
        state: &State,
        id: &InstanceId,
        update: &Update,
        hold: Option<&Hold>,
    ) -> Result<Planned> {
        let record = state.instance(id).ok_or_else(|| Error::no_instance(id))?;
        if let Some(wanted) = update.if_revision.filter(|wanted| *wanted != record.revision) {
            let (name, is) = (&record.name, record.revision);
            let message = format!(
                "instance {name} is at revision {is}, not at {wanted}; read it again and decide anew"
            );
            return Err(ServiceError::new(ErrorCode::Conflict, message).into());
        }
        check_state(record)?;
        let spec = update.apply(record)?;
        update.refuse_in_rescue(record, &spec)?;
        if spec.rescue != record.spec.rescue {
            check_rescue(state, record)?;
        }
        let renamed = update.name.as_ref().filter(|name| **name != record.name);
        if spec == *record.spec && renamed.is_none() {
            return Ok(Planned::Write(Box::new(Plan::unchanged(convert::instance_to(&state.view(record))))));
        }
        let after = updated(record, spec, renamed);
        super::check_size_in_store(&after)?;
        let (compare, put) = self.replace_instance(record, &after);
        let (mut compares, mut then) = (vec![compare], vec![put]);
        if let Some(name) = renamed {
            let (more, ops) = self.move_name(state, record, name)?;
            compares.extend(more);
            then.extend(ops);
        }
        let grows = !after.resources().fits_in(record.resources());
        match record.node_id().filter(|_| grows) {
            Some(node) => {
                let Some(hold) = hold.filter(|hold| hold.node == *node) else {
                    return Ok(Planned::Needs(node.clone()));
                };
                check_room(state, record, &after, node)?;
                let (compare, delete) = self.with_hold(hold);
                compares.push(compare);
                then.push(delete);
            }
            None if grows => super::admission::check(state, &after)?,
            None => {}
        }
        let after = Arc::new(InstanceRecord { revision: Revision::default(), ..after });
        let reply = convert::instance_to(&state.view(&after));
        Ok(Planned::Write(Box::new(Plan { compares, then, reply })))
    }

    /// What gives an instance another name, in the same transaction.
    fn move_name(
        &self,
        state: &State,
        record: &InstanceRecord,
        name: &str,
    ) -> Result<(Vec<Compare>, Vec<Op>)> {
        if !record.set.is_empty() {
            return Err(Error::precondition(format!(
                "instance {} belongs to the set {}, whose instances are named after it; it cannot be renamed",
                record.name, record.set
            )));
        }
        let wanted = InstanceRecord { name: name.to_owned(), ..record.clone() };
        if let Some(holder) = state.instance_named(&record.project, name) {
            return Err(name_taken(&wanted, holder.as_str()));
        }
        let (old, new) = (
            self.keys.instance_name(&record.project, &record.name),
            self.keys.instance_name(&record.project, name),
        );
        let id = Bytes::from(record.id.to_string());
        let mut compares = vec![Compare::Value(old.clone(), id.clone()), Compare::Absent(new.clone())];
        if let Some(set) = set_of(name) {
            if state.has_set(&record.project, set) {
                return Err(name_in_set(&wanted, set));
            }
            compares.push(Compare::Absent(self.keys.instance_set(&record.project, set)));
        }
        Ok((compares, vec![Op::delete(old), Op::put(new, id)]))
    }
}

/// Refuses what an instance in rescue cannot be asked.
pub(crate) fn refuse_in_rescue(record: &InstanceRecord, what: &str) -> Result<()> {
    if !record.spec.is_in_rescue() {
        return Ok(());
    }
    Err(Error::precondition(format!(
        "instance {0} cannot be asked to {what}: it is in rescue, from {1}; first `hypervisor-ctl instance unrescue {0}`",
        record.name, record.spec.rescue
    )))
}

/// Whether its node can start it from another image. What no node has goes where one can, or fails there.
fn check_rescue(state: &State, record: &InstanceRecord) -> Result<()> {
    if record.wanted == Wanted::Paused {
        return Err(Error::precondition(format!(
            "instance {} is paused; resume or stop it first",
            record.name
        )));
    }
    let entry = record.node_id().and_then(|node| state.node(node));
    let Some(node) = entry.and_then(|entry| entry.record.as_ref()) else { return Ok(()) };
    let mut drivers = node.drivers.iter().filter(|driver| driver.instance_type == record.instance_type);
    if record.spec.is_in_rescue() || drivers.any(|driver| driver.capabilities.iter().any(|c| c == RESCUE)) {
        return Ok(());
    }
    let message = format!(
        "instance {} cannot be rescued: no driver for {} on node {} can do `{RESCUE}`",
        record.name, record.instance_type, node.hostname
    );
    Err(ServiceError::new(ErrorCode::Unsupported, message).into())
}

fn check_state(record: &InstanceRecord) -> Result<()> {
    migrate::refuse_while_migrating(record, "change")?;
    let why = if record.wanted == Wanted::Deleted {
        "it is being deleted"
    } else if record.binding.as_ref().is_some_and(|binding| binding.release) {
        "it is moving off its node; wait until it has another"
    } else {
        return Ok(());
    };
    Err(Error::precondition(format!("instance {} cannot be changed: {why}", record.name)))
}

/// The record after an update was granted.
fn updated(before: &InstanceRecord, spec: InstanceSpec, name: Option<&String>) -> InstanceRecord {
    let mut after = before.clone();
    let turns = spec.rescue != before.spec.rescue;
    after.spec = Arc::new(spec);
    if let Some(name) = name {
        after.name.clone_from(name);
    }
    after.generation += 1;
    // Its node gives the room back when it has taken it away from the guest, which may be at the next start.
    after.hold(before.node_id().map_or(Resources::default(), |_| before.resources()));
    // To change what ended by itself is no request to run it again.
    let rests = before.state == InstanceState::Stopped && before.restart_policy == RestartPolicy::Never;
    if before.binding.is_some() && before.wanted == Wanted::Running && rests && before.is_settled() {
        after.wanted = Wanted::Stopped;
    }
    if turns {
        // Into rescue and out of it by a start.
        after.wanted = Wanted::Running;
        after.restart_generation = after.generation;
        after.state_reason =
            if after.spec.is_in_rescue() { "rescue asked for" } else { "end of rescue asked for" }.to_owned();
        if before.binding.is_none() {
            after.state = InstanceState::Pending;
        }
        return after;
    }
    if before.binding.is_none() && before.wanted == Wanted::Stopped {
        // No node has it, so nobody else could finish.
        after.observed_generation = after.generation;
    }
    after
}

/// Refuses what the node has no room for. Exact while the node is held.
fn check_room(state: &State, before: &InstanceRecord, after: &InstanceRecord, node: &NodeId) -> Result<()> {
    let Some((entry, record)) = state.node(node).and_then(|entry| Some((entry, entry.record.as_ref()?)))
    else {
        return Err(Error::no_node(node));
    };
    let others = entry.allocated.minus(before.resources());
    let room = record.schedulable().minus(others);
    let need = after.resources();
    if need.fits_in(room) || !grows_beyond(before.resources(), need, room) {
        return Ok(());
    }
    let part = |what: &str, need: u64, room: u64| {
        (need > room).then(|| format!("{need} {what} where {room} are left"))
    };
    let missing: Vec<String> = [
        part("cores", need.cpu_cores.into(), room.cpu_cores.into()),
        part("MiB of memory", need.memory_bytes.div_ceil(MIB), room.memory_bytes / MIB),
        part("MiB of disk", need.disk_bytes.div_ceil(MIB), room.disk_bytes / MIB),
    ]
    .into_iter()
    .flatten()
    .collect();
    let message = format!(
        "node {} has no room for that: instance {} would need {}; move others away, or create it anew where there is room",
        record.hostname,
        after.name,
        missing.join(" and ")
    );
    Err(ServiceError::new(ErrorCode::ResourceExhausted, message).into())
}

/// Whether something that grows is more than there is room for. A node that was made smaller may be too full already; what
/// does not grow is not to blame for that.
fn grows_beyond(before: Resources, need: Resources, room: Resources) -> bool {
    let beyond = |before: u64, need: u64, room: u64| need > before && need > room;
    beyond(before.cpu_cores.into(), need.cpu_cores.into(), room.cpu_cores.into())
        || beyond(before.memory_bytes, need.memory_bytes, room.memory_bytes)
        || beyond(before.disk_bytes, need.disk_bytes, room.disk_bytes)
        || beyond(before.gpu_count.into(), need.gpu_count.into(), room.gpu_count.into())
}
