//! A new instance: recorded with its name and request key in one transaction.

use bytes::Bytes;
use hv_proto::{convert, v1};
use hv_store::record::Record;
use hv_store::{Compare, Op};
use hv_telemetry::crash::{self, Point};
use hv_types::resources::MIB;
use hv_types::{ErrorCode, InstanceRecord, Invalid, ServiceError};

use crate::Cluster;
use crate::cache::State;
use crate::error::Result;
use crate::events::About;
use crate::requests::{Done, Mutation, Plan};

impl Cluster {
    /// Records an instance that was asked for; it waits for a node.
    ///
    /// # Errors
    /// The name is taken, or no node could ever take it: an unknown image, more than any node has.
    pub async fn create_instance(
        &self,
        mutation: &Mutation,
        record: InstanceRecord,
    ) -> Result<Done<v1::Instance>> {
        let name_key = self.keys.instance_name(&record.project, &record.name);
        let key = self.keys.instance(&record.id);
        super::check_size_in_store(&record)?;
        crash::reach(Point::ServerCreateBeforeTxn);
        let done = self
            .mutate(mutation, &format!("instance {}", record.name), || {
                self.cache.read(|state| check(state, &record))?;
                Ok(Plan {
                    compares: vec![Compare::Absent(name_key.clone()), Compare::Absent(key.clone())],
                    then: vec![
                        Op::put(key.clone(), record.encode()),
                        Op::put(name_key.clone(), Bytes::from(record.id.to_string())),
                    ],
                    reply: convert::instance_to(&record),
                })
            })
            .await?;
        crash::reach(Point::ServerCreateAfterTxn);
        if done.fresh {
            self.events.record(About::Instance(&record), "Created", "asked for; waits for a node", "user");
        }
        Ok(done)
    }
}

/// What no change of the cluster short of new nodes could make possible is refused at once.
fn check(state: &State, record: &InstanceRecord) -> Result<()> {
    if let Some(holder) = state.instance_named(&record.project, &record.name) {
        let message = format!(
            "name {} is taken by instance {holder} in project {}; choose another name or delete that instance",
            record.name, record.project
        );
        return Err(ServiceError::new(ErrorCode::AlreadyExists, message).into());
    }
    if let Some(node) = &record.placement.preferred_node
        && state.node(node).is_none()
    {
        let expected = "must be the id of a node; see `hypervisor-ctl node list`";
        return Err(Invalid::new("preferred_node_id", node, expected).into());
    }
    let able: Vec<_> = state.nodes().filter(|(node, _)| node.runs(record.instance_type)).collect();
    if able.is_empty() {
        return Ok(());
    }
    check_image(&able, record)?;
    check_size(&able, record)
}

type Able<'a> = [(&'a std::sync::Arc<hv_types::NodeRecord>, &'a crate::cache::NodeEntry)];

fn check_image(able: &Able<'_>, record: &InstanceRecord) -> Result<()> {
    /// How many images a refusal names.
    const NAMED: usize = 10;
    let image = &record.spec.image;
    if able.iter().any(|(node, _)| node.has_image(record.instance_type, image)) {
        return Ok(());
    }
    let known: std::collections::BTreeSet<_> = able
        .iter()
        .flat_map(|(node, _)| &node.images)
        .filter(|known| known.instance_type == record.instance_type)
        .map(|known| known.name.as_str())
        .collect();
    let listed: Vec<_> = known.into_iter().take(NAMED).collect();
    let expected = if listed.is_empty() {
        "must be an image that a node has, and none has any: put one into a node's image directory".to_owned()
    } else {
        format!("must be an image that a node has ({}); see `hypervisor-ctl image list`", listed.join(", "))
    };
    Err(Invalid::new("spec.image", image, expected).into())
}

fn check_size(able: &Able<'_>, record: &InstanceRecord) -> Result<()> {
    let need = record.resources();
    if able.iter().any(|(node, _)| need.fits_in(node.allocatable)) {
        return Ok(());
    }
    let most = |part: fn(&hv_types::Resources) -> u64| {
        able.iter().map(|(n, _)| part(&n.allocatable)).max().unwrap_or(0)
    };
    let cores = most(|r| u64::from(r.cpu_cores));
    if u64::from(need.cpu_cores) > cores {
        let expected = format!("must be at most {cores}, the most that any node has");
        return Err(Invalid::new("spec.cpu_cores", need.cpu_cores, expected).into());
    }
    let memory = most(|r| r.memory_bytes);
    if need.memory_bytes > memory {
        let expected = format!("must be at most {memory} ({} MiB), the most that any node has", memory / MIB);
        return Err(Invalid::new("spec.memory_bytes", need.memory_bytes, expected).into());
    }
    let disk = most(|r| r.disk_bytes);
    if need.disk_bytes > disk {
        let expected = format!(
            "must together have at most {disk} bytes ({} MiB), the most that any node has",
            disk / MIB
        );
        return Err(Invalid::new("spec.disks", need.disk_bytes, expected).into());
    }
    let expected = "and its memory and disks must fit on one node; no node has that much of all together";
    Err(Invalid::new("spec.cpu_cores", need.cpu_cores, expected).into())
}
