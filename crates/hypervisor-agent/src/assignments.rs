//! Follows what the control plane binds to this node.

use std::sync::Arc;
use std::time::Duration;

use hv_client::Clients;
use hv_driver::InstanceConfig;
use hv_proto::convert;
use hv_proto::v1::{Assignment, AssignmentsUpdate, WatchAssignmentsRequest};
use hv_types::instance::StopOptions;
use hv_types::{Epoch, InstanceId, Invalid};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::backoff::Backoff;
use crate::entry::Order;
use crate::instances::Instances;
use crate::registration::Registered;
use crate::servers::Servers;

/// Follows the stream of assignments, for ever.
pub(crate) struct Assignments {
    pub(crate) instances: Arc<Instances>,
    pub(crate) servers: Arc<Servers>,
    /// Whether this node is registered. A new registration begins a new stream: what an older one said is no proof that
    /// it is so still.
    pub(crate) registered: watch::Receiver<Option<Registered>>,
    /// Set to the cluster while the whole set is known.
    pub(crate) synced: watch::Sender<Option<String>>,
    /// How long the server may take to open the stream.
    pub(crate) timeout: Duration,
    pub(crate) backoff: Backoff,
}

impl Assignments {
    /// Follows until the agent stops.
    pub(crate) async fn run(mut self, stopping: CancellationToken) {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&mut self) {
        let mut registered = self.registered.clone();
        loop {
            let Ok(now) = registered.wait_for(Option::is_some).await.map(|now| now.clone()) else { return };
            let Some(now) = now else { continue };
            registered.mark_unchanged();
            let ended = tokio::select! {
                ended = self.stream(&now) => Some(ended),
                Ok(()) = registered.changed() => None,
            };
            self.synced.send_replace(None);
            let Some(ended) = ended else {
                tracing::info!("the node was registered anew, opening the assignment stream again");
                continue;
            };
            let pause = self.backoff.pause();
            match ended {
                Ok(()) => tracing::info!(?pause, "the assignment stream ended, opening it again"),
                Err(status) => {
                    let (code, error) = (status.code(), status.message());
                    tracing::warn!(?code, error, ?pause, "the assignment stream broke, opening it again");
                }
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn stream(&mut self, registered: &Registered) -> Result<(), Status> {
        let servers = Arc::clone(&self.servers);
        let server = servers.current();
        let ended = self.read(&server.clients, registered).await;
        if let Err(status) = &ended {
            servers.failed(server, hv_client::explain(&server.options, status).code());
        }
        ended
    }

    async fn read(&mut self, clients: &Clients, registered: &Registered) -> Result<(), Status> {
        let node_id = self.instances.context().node_id.to_string();
        let cluster = &registered.cluster;
        let request = WatchAssignmentsRequest { node_id, cluster_id: cluster.clone() };
        let mut client = clients.assignment();
        let opening = tokio::time::timeout(self.timeout, client.watch_assignments(request));
        let mut stream = match opening.await {
            Ok(stream) => stream?.into_inner(),
            Err(_) => return Err(Status::deadline_exceeded("the server does not answer")),
        };
        let mut is_complete = false;
        while let Some(update) = stream.message().await? {
            let completes = update.complete && !is_complete;
            self.take(update, registered.session).await;
            if completes {
                is_complete = true;
                self.backoff.reset();
                tracing::info!("the whole set of assignments is known");
                self.instances.report_all().await;
                self.synced.send_replace(Some(cluster.clone()));
                // What the control plane did not name is shown to it; it decides. Apart, because a driver may hang.
                let instances = Arc::clone(&self.instances);
                let stopping = instances.shutdown().token();
                self.instances.shutdown().spawn("search for instances without a record", async move {
                    let search = async {
                        instances.find().await;
                        instances.report_found().await;
                    };
                    stopping.run_until_cancelled(search).await;
                });
            }
        }
        Ok(())
    }

    async fn take(&self, update: AssignmentsUpdate, session: u64) {
        for assignment in update.assignments {
            let id = assignment.instance_id.clone();
            match order_of(assignment) {
                Ok(order) => {
                    tracing::debug!(instance = id, epoch = %order.epoch, generation = order.generation,
                        wanted = ?order.wanted, "assigned");
                    self.instances.order(order, session).await;
                }
                Err(invalid) => {
                    tracing::error!(instance = id, %invalid, "an assignment that is none; is the server newer than this agent?");
                }
            }
        }
        for id in update.released_instance_ids {
            match id.parse::<InstanceId>() {
                Ok(id) => self.instances.release(&id, None).await,
                Err(invalid) => tracing::error!(%invalid, "a release that is none"),
            }
        }
    }
}

/// An assignment as an order, checked.
pub(crate) fn order_of(assignment: Assignment) -> Result<Order, Invalid> {
    let instance_type = convert::instance_type_from(assignment.r#type)?
        .ok_or_else(|| Invalid::new("type", assignment.r#type, "must be set"))?;
    Ok(Order {
        config: InstanceConfig {
            id: assignment.instance_id.parse()?,
            name: assignment.name,
            spec: convert::spec_from(assignment.spec.unwrap_or_default())?,
            metadata: convert::metadata_from(assignment.metadata),
            image: None,
            rescue_image: None,
            devices: None,
        },
        instance_type,
        epoch: Epoch(assignment.epoch),
        generation: assignment.generation,
        wanted: convert::wanted_from(assignment.wanted)?,
        restart_generation: assignment.restart_generation,
        stop: StopOptions {
            force: assignment.stop_force,
            timeout_seconds: assignment.stop_timeout_seconds.min(StopOptions::MAX_TIMEOUT_SECONDS),
        },
        fence: assignment.fence,
        restart_policy: convert::restart_policy_from(assignment.restart_policy)?,
        migration: Some(assignment.migration_id).filter(|migration| !migration.is_empty()),
    })
}
