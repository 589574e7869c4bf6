//! What an instance asks of the scheduler, as a value of its own; and the order in which asks are served.

use std::hash::{BuildHasher, Hash};
use std::sync::Arc;
use std::time::SystemTime;

use hv_types::device::Amounts;
use hv_types::label::{Labels, Metadata};
use hv_types::placement::{AffinityRule, PlacementRules, Taint};
use hv_types::{InstanceId, InstanceRecord, InstanceType, Resources};

use crate::hash::Keyed;

/// What one instance asks for, and what is remembered of it once it is bound. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ask {
    id: InstanceId,
    created_at: SystemTime,
    project: Arc<str>,
    name: Arc<str>,
    image: Arc<str>,
    instance_type: InstanceType,
    resources: Resources,
    /// What it is to have for itself; `None`: nothing.
    devices: Option<Arc<Amounts>>,
    metadata: Arc<Metadata>,
    placement: Arc<PlacementRules>,
    shape_hash: u64,
    kind_hash: u64,
}

impl Ask {
    /// What the instance asks for.
    #[must_use]
    pub fn of(record: &InstanceRecord) -> Self {
        let rules = &record.placement;
        let shape = (
            record.instance_type,
            record.spec.needed_image(),
            (&rules.preferred_node, &rules.region, &rules.zone),
            (rules.node_selector.requirements(), &rules.tolerations),
        );
        let kind = (record.project.as_str(), &record.metadata.labels);
        Self {
            id: record.id.clone(),
            created_at: record.created_at,
            project: record.project.as_str().into(),
            name: record.name.as_str().into(),
            image: record.spec.needed_image().into(),
            instance_type: record.instance_type,
            resources: record.resources(),
            devices: devices_of(record),
            metadata: record.metadata.clone(),
            placement: rules.clone(),
            shape_hash: hash(shape),
            kind_hash: hash(kind),
        }
    }

    /// The same, asking for other amounts.
    #[must_use]
    pub fn with_resources(&self, resources: Resources) -> Self {
        Self { resources, ..self.clone() }
    }

    /// Which instance.
    #[must_use]
    pub fn id(&self) -> &InstanceId {
        &self.id
    }

    /// Whose it is.
    #[must_use]
    pub fn project(&self) -> &Arc<str> {
        &self.project
    }

    /// Its name, unique in its project.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// What it starts from; may be empty.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }

    /// The same, shared.
    pub(crate) fn image_name(&self) -> &Arc<str> {
        &self.image
    }

    /// What kind of workload it is.
    #[must_use]
    pub fn instance_type(&self) -> InstanceType {
        self.instance_type
    }

    /// How much it takes.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.resources
    }

    /// What it is to have for itself; `None`: nothing.
    pub(crate) fn devices(&self) -> Option<&Arc<Amounts>> {
        self.devices.as_ref()
    }

    /// Its labels.
    #[must_use]
    pub fn labels(&self) -> &Labels {
        &self.metadata.labels
    }

    /// Where it may go.
    #[must_use]
    pub fn placement(&self) -> &Arc<PlacementRules> {
        &self.placement
    }

    /// Higher is placed first.
    #[must_use]
    pub fn priority(&self) -> i32 {
        self.placement.priority
    }

    /// Its required anti-affinity rules: they bind others too.
    pub fn keeps_away(&self) -> impl Iterator<Item = &AffinityRule> {
        self.placement.affinity.iter().filter(|rule| rule.anti && rule.required)
    }

    /// Whether it tolerates the taint.
    #[must_use]
    pub fn tolerates(&self, taint: &Taint) -> bool {
        self.placement.tolerations.iter().any(|toleration| toleration.covers(taint))
    }
}

impl Ask {
    /// Equal for asks of one shape: those that the static rules treat alike.
    pub(crate) fn shape_hash(&self) -> u64 {
        self.shape_hash
    }

    /// Equal for asks of one kind: those of one project with the same labels.
    pub(crate) fn kind_hash(&self) -> u64 {
        self.kind_hash
    }
}

/// Most ask for none: they pay for a comparison.
fn devices_of(record: &InstanceRecord) -> Option<Arc<Amounts>> {
    let spec = &record.spec;
    (!spec.devices.is_empty()).then(|| spec.device_amounts().into())
}

/// Puts asks into the order in which they are placed: by priority, the higher first, then by age, the older first.
pub fn order(asks: &mut [Ask]) {
    asks.sort_by(|a, b| {
        (b.priority().cmp(&a.priority())).then(a.created_at.cmp(&b.created_at)).then_with(|| a.id.cmp(&b.id))
    });
}

pub(crate) fn hash(value: impl Hash) -> u64 {
    Keyed.hash_one(value)
}
