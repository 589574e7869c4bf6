//! What no change of the cluster short of new nodes could make possible is refused at once.
//!
//! # Theory of operation
//! Nearly every create is fine, so that is told from a summary of the nodes that may be a second old: a create that is let
//! through by mistake waits with its reason. What the summary does not let through is looked at exactly, over every node,
//! before it is refused.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use hv_types::resources::MIB;
use hv_types::{InstanceRecord, InstanceType, Invalid, NodeRecord, Resources};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::Cluster;
use crate::cache::State;
use crate::error::Result;

/// How old the summary may be.
const MAX_AGE: Duration = Duration::from_secs(1);

/// What the nodes have, by what they run.
#[derive(Default)]
pub(crate) struct Admission {
    summary: Mutex<Option<(Instant, Arc<Summary>)>>,
}

#[derive(Default)]
struct Summary {
    types: [TypeSummary; InstanceType::ALL.len()],
}

#[derive(Default)]
struct TypeSummary {
    runs: bool,
    any_image: bool,
    images: HashSet<String>,
    /// What nodes can promise in all; none of these fits into another.
    largest: Vec<Resources>,
}

impl Summary {
    fn of(state: &State) -> Self {
        let mut summary = Self::default();
        for (node, _) in state.nodes() {
            for (instance_type, part) in InstanceType::ALL.into_iter().zip(&mut summary.types) {
                if node.runs(instance_type) {
                    part.add(node, instance_type);
                }
            }
        }
        summary
    }

    fn admits(&self, record: &InstanceRecord) -> bool {
        let part = InstanceType::ALL.iter().position(|t| *t == record.instance_type);
        let Some(part) = part.and_then(|index| self.types.get(index)) else { return false };
        let image = record.spec.needed_image();
        let need = record.resources();
        !part.runs
            || ((image.is_empty() || part.any_image || part.images.contains(image))
                && part.largest.iter().any(|room| need.fits_in(*room)))
    }
}

impl TypeSummary {
    fn add(&mut self, node: &NodeRecord, instance_type: InstanceType) {
        self.runs = true;
        self.any_image |= node
            .drivers
            .iter()
            .any(|driver| driver.instance_type == instance_type && !driver.images_are_local);
        for image in node.images.iter().filter(|image| image.instance_type == instance_type) {
            if !self.images.contains(&image.name) {
                self.images.insert(image.name.clone());
            }
        }
        let room = node.schedulable();
        if !self.largest.iter().any(|known| room.fits_in(*known)) {
            self.largest.retain(|known| !known.fits_in(room));
            self.largest.push(room);
        }
    }
}

impl Cluster {
    /// Refuses what no node could ever take.
    ///
    /// # Errors
    /// Names the field; or the store does not answer.
    pub(super) async fn check_placeable(&self, record: &InstanceRecord) -> Result<()> {
        let summary = self.summary();
        let node_is_known = |state: &State| {
            record.placement.preferred_node.as_ref().is_none_or(|node| state.node(node).is_some())
        };
        if summary.admits(record) && self.cache.read(node_is_known) {
            return Ok(());
        }
        // A node that came just now may not be in the cache yet.
        self.sync().await?;
        self.cache.read(|state| check(state, record))
    }

    fn summary(&self) -> Arc<Summary> {
        let mut summary = self.admission.summary.lock();
        if let Some((made, known)) = &*summary
            && made.elapsed() < MAX_AGE
        {
            return known.clone();
        }
        let fresh = Arc::new(self.cache.read(Summary::of));
        *summary = Some((Instant::now(), fresh.clone()));
        fresh
    }
}

/// Checks against every node.
pub(super) fn check(state: &State, record: &InstanceRecord) -> Result<()> {
    if let Some(node) = &record.placement.preferred_node
        && state.node(node).is_none()
    {
        let expected = "must be the id of a node; see `hypervisor-ctl node list`";
        return Err(Invalid::new("preferred_node_id", node, expected).into());
    }
    let able: Vec<_> =
        state.nodes().map(|(node, _)| node).filter(|node| node.runs(record.instance_type)).collect();
    if able.is_empty() {
        return Ok(());
    }
    check_image(&able, record)?;
    check_size(&able, record)
}

type Able<'a> = [&'a Arc<NodeRecord>];

fn check_image(able: &Able<'_>, record: &InstanceRecord) -> Result<()> {
    /// How many images a refusal names.
    const NAMED: usize = 10;
    let image = record.spec.needed_image();
    if able.iter().any(|node| node.has_image(record.instance_type, image)) {
        return Ok(());
    }
    let known: BTreeSet<_> = able
        .iter()
        .flat_map(|node| &node.images)
        .filter(|known| known.instance_type == record.instance_type)
        .map(|known| known.name.as_str())
        .collect();
    let listed: Vec<_> = known.into_iter().take(NAMED).collect();
    let expected = if listed.is_empty() {
        "must be an image that a node has, and none has any: make nodes fetch one with `hypervisor-ctl image pull`"
            .to_owned()
    } else {
        format!("must be an image that a node has ({}); see `hypervisor-ctl image list`", listed.join(", "))
    };
    Err(Invalid::new("spec.image", image, expected).into())
}

fn check_size(able: &Able<'_>, record: &InstanceRecord) -> Result<()> {
    let need = record.resources();
    if able.iter().any(|node| need.fits_in(node.schedulable())) {
        return Ok(());
    }
    let most = |part: fn(&hv_types::Resources) -> u64| {
        able.iter().map(|node| part(&node.schedulable())).max().unwrap_or(0)
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
