//! What is shown of an instance: to users of this node, and to the control plane.

use std::sync::Arc;
use std::time::SystemTime;

use hv_driver::{Observed, Running};
use hv_proto::convert;
use hv_proto::v1;
use hv_types::instance::{Binding, FailoverPolicy};
use hv_types::{InstanceRecord, InstanceState, NodeId, Resources, Revision};

use crate::entry::{Entry, Origin};

/// Longest reason that is reported, in characters.
const MAX_REASON_CHARACTERS: usize = 2048;

/// What the worker makes of an instance at the moment.
pub(crate) struct Shown<'a> {
    pub(crate) state: InstanceState,
    pub(crate) reason: &'a str,
    pub(crate) seen: Option<&'a Observed>,
    pub(crate) is_over: bool,
}

/// What is shown of an instance.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    pub(crate) record: InstanceRecord,
    /// How it came to this node.
    pub(crate) origin: Origin,
    /// The driver that has it.
    pub(crate) driver: Option<String>,
    /// Which wish the state belongs to.
    pub(crate) serial: u64,
    /// What was wanted is reached, or cannot be.
    pub(crate) is_settled: bool,
    /// It is forgotten.
    pub(crate) is_over: bool,
    /// The image that this node's store gave it.
    pub(crate) image_digest: Option<String>,
    /// The migration that it waits for here.
    pub(crate) incoming: Option<String>,
    /// The migration that hands it over to another node.
    pub(crate) outgoing: Option<String>,
}

impl View {
    /// What is shown of an entry.
    pub(crate) fn of(entry: &Entry, shown: &Shown<'_>, node_id: &NodeId) -> Self {
        let running = match shown.seen {
            Some(Observed::Running(running) | Observed::Paused(running)) => running.clone(),
            Some(Observed::Absent | Observed::Stopped(_) | Observed::HandedOver) | None => Running::default(),
        };
        let reason: String = shown.reason.chars().take(MAX_REASON_CHARACTERS).collect();
        let bound = entry.origin == Origin::Assigned;
        let record = InstanceRecord {
            id: entry.id().clone(),
            name: entry.config.name.clone(),
            project: String::new(),
            instance_type: entry.instance_type,
            spec: Arc::new(entry.config.spec.clone()),
            metadata: Arc::new(entry.config.metadata.clone()),
            placement: Arc::default(),
            restart_policy: entry.restart_policy,
            failover_policy: if entry.fence { FailoverPolicy::Restart } else { FailoverPolicy::Never },
            set: String::new(),
            wanted: entry.wanted,
            generation: entry.generation,
            restart_generation: entry.restart_generation,
            stop: entry.stop,
            binding: Some(Binding { node_id: node_id.clone(), release: entry.released && bound }),
            epoch: entry.epoch,
            state: shown.state,
            state_reason: reason,
            observed_generation: entry.observed_generation,
            ip_address: running.ip.map(|ip| ip.to_string()).unwrap_or_default(),
            created_at: entry.created_at,
            started_at: running.since.or(entry.started_at),
            restart_count: entry.restarts.count,
            recovery_note: String::new(),
            update_note: entry.update_note.chars().take(MAX_REASON_CHARACTERS).collect(),
            holds: Resources::default(),
            migration: None,
            revision: Revision::default(),
        };
        Self {
            record,
            origin: entry.origin,
            driver: entry.driver.clone(),
            serial: entry.serial,
            is_settled: !entry.pending && !entry.discard,
            is_over: shown.is_over,
            image_digest: entry.config.image.as_ref().map(|image| image.digest.clone()),
            incoming: entry.incoming.clone(),
            outgoing: entry.outgoing.as_ref().map(|outgoing| outgoing.migration.clone()),
        }
    }

    /// What the control plane is told.
    pub(crate) fn report(&self, entry: &Entry) -> v1::InstanceReport {
        let record = &self.record;
        let started_at: Option<SystemTime> = record.started_at;
        v1::InstanceReport {
            instance_id: record.id.to_string(),
            epoch: record.epoch.0,
            observed_generation: record.observed_generation,
            state: convert::state_to(record.state).into(),
            state_reason: record.state_reason.clone(),
            ip_address: record.ip_address.clone(),
            started_at: started_at.map(convert::to_timestamp),
            gone: entry.gone,
            restart_count: record.restart_count,
            update_note: record.update_note.clone(),
            migration_id: entry.incoming.clone().unwrap_or_default(),
        }
    }
}
