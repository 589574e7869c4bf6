//! Handing running instances over, and taking them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use hv_driver::{Driver, IncomingRequest, MigrateRequest, MigrationPhase, Observed, Storage};
use hv_proto::v1;
use hv_types::{Epoch, ErrorCode, InstanceId, ServiceError};
use pbjson_types::Empty;
use serde::{Deserialize, Serialize};
use tonic::{Request, Response, Status};

use super::deadline::{ask, budget};
use super::{Answer, Service, id_from, refuse};
use crate::assignments::order_of;
use crate::entry::Entry;
use crate::images::told;
use crate::worker::{Answered, Wish};

/// How long a driver may take to make an instance wait, or to begin to hand it over.
const MOST_WAIT: Duration = Duration::from_secs(60);
/// Longest description of a target, in bytes; the driver's own is at most 4 KiB.
const MAX_TARGET_BYTES: usize = 8 << 10;

/// What the target's agent tells the source's.
#[derive(Serialize, Deserialize)]
struct Target {
    driver: String,
    target: serde_json::Value,
}

fn storage(copied: bool) -> Storage {
    if copied { Storage::Copied } else { Storage::Shared }
}

fn precondition(text: String) -> Status {
    refuse(&ServiceError::precondition(text))
}

fn check_migration(id: &str) -> Result<(), Status> {
    let fits = (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let text = "migration_id must be 1 to 64 letters, digits or -".to_owned();
    if fits { Ok(()) } else { Err(refuse(&ServiceError::invalid(text))) }
}

impl Service {
    pub(super) async fn prepare_migration(
        &self,
        request: Request<v1::AgentPrepareIncomingRequest>,
    ) -> Answer<v1::AgentPrepareIncomingResponse> {
        let wait = budget(&request, MOST_WAIT);
        // At this address the caller has reached this node; so does the source.
        let listen = request.local_addr().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip());
        let request = request.into_inner();
        check_migration(&request.migration_id)?;
        let order = order_of(request.assignment.unwrap_or_default()).map_err(|e| refuse(&e.into()))?;
        let drivers = &self.instances.context().drivers;
        let named =
            drivers.named(&request.driver).filter(|driver| driver.instance_type() == order.instance_type);
        let Some(driver) = named else {
            let text =
                format!("this node has no driver `{}` for the type {}", request.driver, order.instance_type);
            return Err(precondition(text));
        };
        let id = order.config.id.clone();
        self.instances.expect(Entry::incoming(order, request.migration_id.clone(), driver.name()));
        let incoming = IncomingRequest {
            migration: request.migration_id,
            storage: storage(request.copy_storage),
            listen,
        };
        let image = Some(request.image_digest).filter(|digest| !digest.is_empty());
        let target = match self.migrate(&id, Wish::Prepare(incoming, image), wait).await? {
            Answered::Waits(target) => target,
            Answered::Done => serde_json::Value::Null,
            Answered::Fetches(progress) => {
                return Ok(Response::new(v1::AgentPrepareIncomingResponse {
                    progress: told(progress),
                    done_bytes: progress.done_bytes,
                    total_bytes: progress.total_bytes,
                    ..v1::AgentPrepareIncomingResponse::default()
                }));
            }
        };
        let target = Target { driver: driver.name().to_owned(), target };
        let target = serde_json::to_vec(&target)
            .map_err(|e| refuse(&ServiceError::internal("the target cannot be written").caused_by(e)))?;
        Ok(Response::new(v1::AgentPrepareIncomingResponse {
            target: target.into(),
            ..v1::AgentPrepareIncomingResponse::default()
        }))
    }

    pub(super) async fn begin_migration(
        &self,
        request: Request<v1::AgentBeginMigrationRequest>,
    ) -> Answer<v1::AgentMigrationStatus> {
        let wait = budget(&request, MOST_WAIT);
        let request = request.into_inner();
        check_migration(&request.migration_id)?;
        let id = id_from(&request.instance_id)?;
        let driver = self.driver_of(&id)?;
        let bad =
            || refuse(&ServiceError::invalid("target must be what the target's node answered".to_owned()));
        let fits = request.target.len() <= MAX_TARGET_BYTES;
        let target: Target = serde_json::from_slice(&request.target).ok().filter(|_| fits).ok_or_else(bad)?;
        if target.driver != driver.name() {
            let text = format!("{} has it here, and {} waits for it there", driver.name(), target.driver);
            return Err(precondition(text));
        }
        let wish = MigrateRequest {
            migration: request.migration_id.clone(),
            storage: storage(request.copy_storage),
            target: target.target,
            downtime_limit: Duration::from_millis(request.downtime_limit_ms.into()),
            bandwidth_limit: request.bandwidth_limit,
            auto_converge: true,
        };
        self.migrate(&id, Wish::Begin(Epoch(request.epoch), wish), wait).await?;
        let patience = self.instances.context().tuning.look_deadline;
        self.status(&id, &request.migration_id, patience).await.map(Response::new)
    }

    pub(super) async fn status_migration(
        &self,
        request: Request<v1::AgentMigrationRequest>,
    ) -> Answer<v1::AgentMigrationStatus> {
        let patience = self.patience(&request);
        let request = request.into_inner();
        let id = id_from(&request.instance_id)?;
        self.status(&id, &request.migration_id, patience).await.map(Response::new)
    }

    pub(super) async fn abort_migration(&self, request: Request<v1::AgentMigrationRequest>) -> Answer<Empty> {
        let wait = budget(&request, MOST_WAIT);
        let request = request.into_inner();
        check_migration(&request.migration_id)?;
        let id = id_from(&request.instance_id)?;
        let mut view = self.instances.follow(&id).map_err(|e| refuse(&e))?;
        self.migrate(&id, Wish::Abort(request.migration_id.clone()), wait).await?;
        let its = |migration: &Option<String>| migration.as_deref() == Some(&*request.migration_id);
        let done = view.wait_for(|view| view.is_over || !(its(&view.outgoing) || its(&view.incoming)));
        // An instance that is gone with its worker waits for nothing any more.
        if tokio::time::timeout(wait, done).await.is_err() {
            let why = view.borrow().record.state_reason.clone();
            let text = format!("the migration of instance {id} is still being undone; it goes on: {why}");
            return Err(refuse(&ServiceError::new(ErrorCode::DeadlineExceeded, text)));
        }
        Ok(Response::new(Empty {}))
    }

    /// Has an instance's worker do something about a migration.
    async fn migrate(&self, id: &InstanceId, wish: Wish, wait: Duration) -> Result<Answered, Status> {
        let answer = self.instances.migrate(id, wish);
        match tokio::time::timeout(wait, answer).await {
            Ok(answer) => answer.map_err(|e| refuse(&e)),
            Err(_) => {
                let text = format!("instance {id} did not get to it within {wait:?}; ask again");
                Err(refuse(&ServiceError::new(ErrorCode::DeadlineExceeded, text)))
            }
        }
    }

    /// Whether not everything has come yet of an instance that waits here, as far as its driver tells.
    async fn is_arriving(
        &self,
        driver: &Arc<dyn Driver>,
        id: &InstanceId,
        patience: Duration,
    ) -> Result<bool, Status> {
        let told = ask(patience, driver.migration(id)).await?;
        Ok(told.is_some_and(|told| matches!(told.phase, MigrationPhase::Disks | MigrationPhase::Memory)))
    }

    /// How far a migration is here: as the source of it, or as what waits for it.
    async fn status(
        &self,
        id: &InstanceId,
        migration: &str,
        patience: Duration,
    ) -> Result<v1::AgentMigrationStatus, Status> {
        let view = self.instances.follow(id).map_err(|e| refuse(&e))?.borrow().clone();
        let driver = self.driver_of(id)?;
        let mut status = v1::AgentMigrationStatus {
            driver: driver.name().to_owned(),
            image_digest: view.image_digest.clone().unwrap_or_default(),
            ..v1::AgentMigrationStatus::default()
        };
        if view.incoming.as_deref() == Some(migration) {
            let seen = ask(patience, driver.observe(id)).await?;
            let (phase, message) = match seen {
                Observed::Paused(_) if self.is_arriving(&driver, id, patience).await? => {
                    (v1::MigrationPhase::Memory, String::new())
                }
                Observed::Paused(_) => (v1::MigrationPhase::HandedOver, String::new()),
                seen => (
                    v1::MigrationPhase::Failed,
                    format!("what waited for it there does not any more: {seen:?}"),
                ),
            };
            status.set_phase(phase);
            status.message = message;
            return Ok(status);
        }
        // What was not begun, or is being undone, is not asked for.
        let Some(found) =
            ask(patience, driver.migration(id)).await?.filter(|found| found.migration == migration)
        else {
            return Ok(status);
        };
        let (phase, message) = match found.phase {
            MigrationPhase::Disks => (v1::MigrationPhase::Disks, String::new()),
            MigrationPhase::Memory => (v1::MigrationPhase::Memory, String::new()),
            MigrationPhase::HandedOver => (v1::MigrationPhase::HandedOver, String::new()),
            MigrationPhase::Failed { reason } => (v1::MigrationPhase::Failed, reason),
        };
        status.set_phase(phase);
        status.message = message;
        status.done_bytes = found.done_bytes;
        status.total_bytes = found.total_bytes;
        let downtime = found.downtime.map_or(0, |downtime| downtime.as_micros().max(1));
        status.downtime_us = u64::try_from(downtime).unwrap_or(u64::MAX);
        Ok(status)
    }
}
