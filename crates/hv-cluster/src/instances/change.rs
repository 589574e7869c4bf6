//! Changes of what is wanted: start, stop, restart, pause, resume, delete, metadata.

use std::sync::Arc;

use hv_proto::{convert, v1};
use hv_telemetry::crash::{self, Point};
use hv_types::instance::{Request, StopOptions, Verdict, decide};
use hv_types::{
    ErrorCode, InstanceId, InstanceRecord, InstanceState, Metadata, Revision, ServiceError, Wanted,
};

use crate::Cluster;
use crate::cache::State;
use crate::error::{Error, Result};
use crate::events::About;
use crate::operations::migrate;
use crate::requests::{Done, Mutation, Plan};

impl Cluster {
    /// Changes what is wanted of an instance. A deletion of one that no node has removes it at once.
    ///
    /// # Errors
    /// There is no such instance, or its state does not allow the request.
    pub async fn change_instance(
        &self,
        mutation: &Mutation,
        id: &InstanceId,
        request: Request,
        stop: StopOptions,
    ) -> Result<Done<v1::Instance>> {
        crash::reach(Point::ServerChangeBeforeTxn);
        let mut changed = None;
        let done = self
            .mutate(mutation, &format!("instance {id}"), || {
                self.cache.read(|state| {
                    let plan = self.plan_change(state, id, request, stop)?;
                    changed = state.instance(id).cloned();
                    Ok(plan)
                })
            })
            .await?;
        crash::reach(Point::ServerChangeAfterTxn);
        if done.fresh
            && let Some(record) = changed
        {
            let message = format!("{} asked for", request.name());
            self.events.record(About::Instance(&record), event_reason(request), message, "user");
        }
        Ok(done)
    }

    fn plan_change(
        &self,
        state: &State,
        id: &InstanceId,
        request: Request,
        stop: StopOptions,
    ) -> Result<Plan<v1::Instance>> {
        let record = state.instance(id).ok_or_else(|| Error::no_instance(id))?;
        let node_answers = record.node_id().is_none_or(|node| state.node(node).is_some_and(|n| n.is_live()));
        let abandon =
            request == Request::Delete && (record.binding.is_none() || (stop.force && !node_answers));
        if abandon {
            let (compares, then) = self.remove_instance(record);
            return Ok(Plan { compares, then, reply: convert::instance_to(record) });
        }
        if request != Request::Delete {
            migrate::refuse_while_migrating(record, request.name())?;
        }
        match decide(request, record.wanted, record.state) {
            Verdict::Already => Ok(Plan::unchanged(convert::instance_to(&state.view(record)))),
            Verdict::Refused(why) => Err(Error::precondition(format!(
                "instance {} cannot be asked to {}: {why} (it is {})",
                record.name,
                request.name(),
                state.view(record).state
            ))),
            Verdict::Change(wanted) => {
                let after = changed(record, request, wanted, stop);
                let (compare, put) = self.replace_instance(record, &after);
                let after = InstanceRecord { revision: Revision::default(), ..after };
                let reply = convert::instance_to(&state.view(&Arc::new(after)));
                Ok(Plan { compares: vec![compare], then: vec![put], reply })
            }
        }
    }

    /// Replaces labels and annotations.
    ///
    /// # Errors
    /// There is no such instance, it is at another revision than `if_revision`, or the metadata is not valid.
    pub async fn update_metadata(
        &self,
        mutation: &Mutation,
        id: &InstanceId,
        metadata: Metadata,
        if_revision: Option<Revision>,
    ) -> Result<Done<v1::Instance>> {
        metadata.validate()?;
        self.mutate(mutation, &format!("instance {id}"), || {
            let record =
                self.cache.read(|state| state.instance(id).cloned()).ok_or_else(|| Error::no_instance(id))?;
            if let Some(wanted) = if_revision.filter(|wanted| *wanted != record.revision) {
                let (name, is) = (&record.name, record.revision);
                let message = format!(
                    "instance {name} is at revision {is}, not at {wanted}; read it again and decide anew"
                );
                return Err(ServiceError::new(ErrorCode::Conflict, message).into());
            }
            if *record.metadata == metadata {
                let shown = self.cache.read(|state| state.view(&record));
                return Ok(Plan::unchanged(convert::instance_to(&shown)));
            }
            let after =
                InstanceRecord { metadata: Arc::new(metadata.clone()), ..InstanceRecord::clone(&record) };
            super::check_size_in_store(&after)?;
            let (compare, put) = self.replace_instance(&record, &after);
            let after = Arc::new(InstanceRecord { revision: Revision::default(), ..after });
            let reply = self.cache.read(|state| convert::instance_to(&state.view(&after)));
            Ok(Plan { compares: vec![compare], then: vec![put], reply })
        })
        .await
    }
}

fn event_reason(request: Request) -> &'static str {
    match request {
        Request::Start => "StartRequested",
        Request::Stop => "StopRequested",
        Request::Restart => "RestartRequested",
        Request::Pause => "PauseRequested",
        Request::Resume => "ResumeRequested",
        Request::Delete => "DeleteRequested",
    }
}

/// The record after a request was granted. What no node has is changed at once; else the node follows and reports.
fn changed(before: &InstanceRecord, request: Request, wanted: Wanted, stop: StopOptions) -> InstanceRecord {
    let mut after = before.clone();
    after.wanted = wanted;
    after.generation += 1;
    if request == Request::Restart {
        after.restart_generation = after.generation;
    }
    if matches!(request, Request::Stop | Request::Restart | Request::Delete) {
        after.stop = stop;
    }
    after.state_reason = format!("{} asked for", request.name());
    if before.binding.is_none() {
        (after.state, after.state_reason) = match wanted {
            Wanted::Stopped => (InstanceState::Stopped, "stopped before it was placed on a node".into()),
            Wanted::Running | Wanted::Paused | Wanted::Deleted => {
                (InstanceState::Pending, "waits for a node".into())
            }
        };
        if wanted == Wanted::Stopped {
            after.observed_generation = after.generation;
        }
        return after;
    }
    after.state = match (wanted, before.state) {
        (Wanted::Deleted, _) => InstanceState::Deleting,
        (Wanted::Stopped, InstanceState::Running | InstanceState::Paused) => InstanceState::Stopping,
        (Wanted::Running, InstanceState::Stopped | InstanceState::Failed) => InstanceState::Starting,
        (Wanted::Running | Wanted::Stopped | Wanted::Paused, state) => state,
    };
    after
}
