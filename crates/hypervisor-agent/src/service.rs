//! AgentService: what is interactive, and operation of the node while the control plane is away. Translates only.

mod deadline;
mod images;
mod migration;
mod snapshots;
mod streams;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::Stream;
use hv_driver::{Driver, DriverError, InstanceConfig, Stats};
use hv_proto::v1::agent_service_server::AgentService;
use hv_proto::{convert, status, v1};
use hv_types::instance::{Request as Wish, StopOptions};
use hv_types::{ErrorCode, InstanceId, ServiceError};
use parking_lot::Mutex;
use pbjson_types::Empty;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use self::deadline::{ask, budget};
use crate::instances::Instances;
use crate::view::View;

/// How long a call waits for what it asked for before it answers with what is shown then.
const MOST_WAIT: Duration = Duration::from_secs(30);
/// Time between two readings where there was none before.
const READING_GAP: Duration = Duration::from_millis(250);
/// Readings older than this say little about the present.
const READING_AGE: Duration = Duration::from_mins(1);

/// The service over the node's instances.
#[derive(Clone)]
pub(crate) struct Service {
    instances: Arc<Instances>,
    readings: Arc<Mutex<HashMap<InstanceId, Reading>>>,
}

#[derive(Clone, Copy)]
struct Reading {
    at: Instant,
    cpu_time_ns: u64,
}

type Answer<T> = Result<Response<T>, Status>;
type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn refuse(error: &ServiceError) -> Status {
    status::to_status(error)
}

fn id_from(text: &str) -> Result<InstanceId, Status> {
    text.parse().map_err(|invalid: hv_types::Invalid| refuse(&invalid.into()))
}

/// What a driver's error is to the caller.
fn driver_error(error: &DriverError) -> Status {
    let code = match error {
        DriverError::InvalidConfig { .. } => ErrorCode::InvalidArgument,
        DriverError::NotFound(_) => ErrorCode::NotFound,
        DriverError::WrongState { .. } => ErrorCode::FailedPrecondition,
        DriverError::Unsupported { .. } => ErrorCode::Unsupported,
        DriverError::Unavailable { .. } => ErrorCode::Unavailable,
        DriverError::Failed { .. } => ErrorCode::Internal,
        DriverError::Timeout { .. } => ErrorCode::DeadlineExceeded,
    };
    refuse(&ServiceError::new(code, hv_telemetry::error_chain(error)))
}

fn stop_options(force: bool, timeout_seconds: i32) -> Result<StopOptions, Status> {
    let most = StopOptions::MAX_TIMEOUT_SECONDS;
    match u32::try_from(timeout_seconds) {
        Ok(0) => Ok(StopOptions { force, ..StopOptions::default() }),
        Ok(seconds) if seconds <= most => Ok(StopOptions { force, timeout_seconds: seconds }),
        _ => Err(refuse(&ServiceError::invalid(format!(
            "timeout_seconds must be between 0 (30 s) and {most}; got \"{timeout_seconds}\""
        )))),
    }
}

impl Service {
    /// The service over these instances.
    pub(crate) fn new(instances: Arc<Instances>) -> Self {
        Self { instances, readings: Arc::default() }
    }

    /// Asks for something and waits, within bounds, until it is so or cannot be.
    async fn want(&self, id: &str, wish: Wish, stop: StopOptions, wait: Duration) -> Answer<v1::Instance> {
        let id = id_from(id)?;
        let view = self.instances.follow(&id).map_err(|e| refuse(&e))?;
        let serial = self.instances.want(&id, wish, stop).await.map_err(|e| refuse(&e))?;
        Ok(shown(view, serial, wait).await)
    }

    /// The driver that has an instance.
    fn driver_of(&self, id: &InstanceId) -> Result<Arc<dyn Driver>, Status> {
        let view = self.instances.follow(id).map_err(|e| refuse(&e))?;
        let name = view.borrow().driver.clone();
        let driver = name.and_then(|name| self.instances.context().drivers.named(&name));
        driver.ok_or_else(|| {
            let text = format!("instance {id} has no driver on this node yet; wait until it runs");
            refuse(&ServiceError::precondition(text))
        })
    }

    /// How long a driver may take to answer this call.
    fn patience<T>(&self, request: &Request<T>) -> Duration {
        budget(request, self.instances.context().tuning.look_deadline)
    }

    async fn read(
        &self,
        driver: &Arc<dyn Driver>,
        id: &InstanceId,
        patience: Duration,
    ) -> Result<(Stats, Reading), Status> {
        let stats = ask(patience, driver.stats(id)).await?;
        Ok((stats, Reading { at: Instant::now(), cpu_time_ns: stats.cpu_time_ns }))
    }

    /// Keeps a reading, and forgets those that say nothing any more.
    fn keep(&self, id: InstanceId, reading: Reading) {
        let mut readings = self.readings.lock();
        readings.retain(|_, old| reading.at.duration_since(old.at) < READING_AGE);
        readings.insert(id, reading);
    }
}

/// What is shown once the wish of this serial number is settled, or when time is up.
async fn shown(mut view: watch::Receiver<Arc<View>>, serial: u64, wait: Duration) -> Response<v1::Instance> {
    let is_settled = |view: &Arc<View>| view.is_over || (view.serial >= serial && view.is_settled);
    // Whatever ended the wait: what is shown now is the answer.
    let _ = tokio::time::timeout(wait, view.wait_for(is_settled)).await;
    let view = view.borrow().clone();
    Response::new(convert::instance_to(&view.record))
}

/// Use of processors between two readings, in percent of one core.
fn percent(before: Reading, now: Reading) -> f64 {
    let elapsed = now.at.duration_since(before.at).as_nanos() as f64;
    let used = now.cpu_time_ns.saturating_sub(before.cpu_time_ns) as f64;
    if elapsed > 0.0 { used / elapsed * 100.0 } else { 0.0 }
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl AgentService for Service {
    async fn create_instance(
        &self,
        request: Request<v1::AgentCreateInstanceRequest>,
    ) -> Answer<v1::Instance> {
        let wait = budget(&request, MOST_WAIT);
        let request = request.into_inner();
        let asked = v1::CreateInstanceRequest {
            name: request.name,
            r#type: request.r#type,
            spec: request.spec,
            metadata: Some(v1::Metadata { labels: request.labels, annotations: request.annotations }),
            ..v1::CreateInstanceRequest::default()
        };
        let record = convert::create_request_from(asked).map_err(|invalid| refuse(&invalid.into()))?;
        let id = if request.instance_id.is_empty() { record.id } else { id_from(&request.instance_id)? };
        let instance_type = record.instance_type;
        if self.instances.context().drivers.for_type(instance_type).is_none() {
            let text =
                format!("this node has no driver for the type {instance_type}; enable one under drivers");
            return Err(refuse(&ServiceError::precondition(text)));
        }
        let config = InstanceConfig {
            id,
            name: record.name,
            spec: Arc::unwrap_or_clone(record.spec),
            metadata: Arc::unwrap_or_clone(record.metadata),
            image: None,
            rescue_image: None,
            devices: None,
        };
        let view = self.instances.create_local(config, instance_type).map_err(|e| refuse(&e))?;
        Ok(shown(view, 1, wait).await)
    }

    async fn delete_instance(&self, request: Request<v1::AgentDeleteInstanceRequest>) -> Answer<Empty> {
        let wait = budget(&request, MOST_WAIT);
        let request = request.into_inner();
        let stop = StopOptions { force: request.force, ..StopOptions::default() };
        let id = id_from(&request.instance_id)?;
        let mut view = self.instances.follow(&id).map_err(|e| refuse(&e))?;
        self.instances.want(&id, Wish::Delete, stop).await.map_err(|e| refuse(&e))?;
        let is_gone = tokio::time::timeout(wait, view.wait_for(|view| view.is_over)).await.is_ok();
        if !is_gone {
            let why = view.borrow().record.state_reason.clone();
            let text = format!("instance {id} is still being removed; it goes on: {why}");
            return Err(refuse(&ServiceError::new(ErrorCode::DeadlineExceeded, text)));
        }
        Ok(Response::new(Empty {}))
    }

    async fn start_instance(&self, request: Request<v1::AgentInstanceRequest>) -> Answer<v1::Instance> {
        let wait = budget(&request, MOST_WAIT);
        self.want(&request.into_inner().instance_id, Wish::Start, StopOptions::default(), wait).await
    }

    async fn stop_instance(&self, request: Request<v1::AgentStopInstanceRequest>) -> Answer<v1::Instance> {
        let asked = request.get_ref();
        let stop = stop_options(asked.force, asked.timeout_seconds)?;
        let guest_time = Duration::from_secs(stop.timeout_seconds.into());
        let wait = budget(&request, MOST_WAIT + guest_time);
        self.want(&asked.instance_id, Wish::Stop, stop, wait).await
    }

    async fn restart_instance(
        &self,
        request: Request<v1::AgentRestartInstanceRequest>,
    ) -> Answer<v1::Instance> {
        let asked = request.get_ref();
        let stop = StopOptions { force: asked.force, ..StopOptions::default() };
        let guest_time = Duration::from_secs(stop.timeout_seconds.into());
        let wait = budget(&request, MOST_WAIT + guest_time);
        self.want(&asked.instance_id, Wish::Restart, stop, wait).await
    }

    async fn pause_instance(&self, request: Request<v1::AgentInstanceRequest>) -> Answer<v1::Instance> {
        let wait = budget(&request, MOST_WAIT);
        self.want(&request.into_inner().instance_id, Wish::Pause, StopOptions::default(), wait).await
    }

    async fn resume_instance(&self, request: Request<v1::AgentInstanceRequest>) -> Answer<v1::Instance> {
        let wait = budget(&request, MOST_WAIT);
        self.want(&request.into_inner().instance_id, Wish::Resume, StopOptions::default(), wait).await
    }

    async fn get_instance(&self, request: Request<v1::AgentInstanceRequest>) -> Answer<v1::Instance> {
        let id = id_from(&request.into_inner().instance_id)?;
        let view = self.instances.follow(&id).map_err(|e| refuse(&e))?;
        let view = view.borrow().clone();
        Ok(Response::new(convert::instance_to(&view.record)))
    }

    async fn list_instances(&self, _request: Request<Empty>) -> Answer<v1::AgentListInstancesResponse> {
        let instances =
            self.instances.views().iter().map(|view| convert::instance_to(&view.record)).collect();
        Ok(Response::new(v1::AgentListInstancesResponse { instances }))
    }

    async fn get_instance_stats(
        &self,
        request: Request<v1::AgentInstanceRequest>,
    ) -> Answer<v1::InstanceStats> {
        let patience = self.patience(&request);
        let id = id_from(&request.into_inner().instance_id)?;
        let driver = self.driver_of(&id)?;
        let kept = self.readings.lock().get(&id).copied();
        let (mut stats, mut now) = self.read(&driver, &id, patience).await?;
        let usable = |old: &Reading| {
            let age = now.at.duration_since(old.at);
            (READING_GAP..READING_AGE).contains(&age) && old.cpu_time_ns <= now.cpu_time_ns
        };
        let before = match kept.filter(usable) {
            Some(before) => before,
            None => {
                let first = now;
                tokio::time::sleep(READING_GAP).await;
                (stats, now) = self.read(&driver, &id, patience).await?;
                first
            }
        };
        self.keep(id.clone(), now);
        Ok(Response::new(v1::InstanceStats {
            instance_id: id.to_string(),
            cpu_usage_percent: percent(before, now),
            cpu_time_ns: clamp(stats.cpu_time_ns),
            memory_used_bytes: clamp(stats.memory_used_bytes),
            memory_cache_bytes: clamp(stats.memory_cache_bytes),
            disk_read_bytes: clamp(stats.disk_read_bytes),
            disk_write_bytes: clamp(stats.disk_write_bytes),
            network_rx_bytes: clamp(stats.network_rx_bytes),
            network_tx_bytes: clamp(stats.network_tx_bytes),
            collected_at: Some(convert::to_timestamp(SystemTime::now())),
        }))
    }

    type AttachConsoleStream = Outgoing<v1::AgentConsoleOutput>;

    async fn attach_console(
        &self,
        request: Request<Streaming<v1::AgentConsoleInput>>,
    ) -> Answer<Self::AttachConsoleStream> {
        self.console(request).await
    }

    type ExecStream = Outgoing<v1::ExecOutput>;

    async fn exec(&self, request: Request<Streaming<v1::ExecInput>>) -> Answer<Self::ExecStream> {
        self.run_command(request).await
    }

    type GetInstanceLogsStream = Outgoing<v1::LogChunk>;

    async fn get_instance_logs(
        &self,
        request: Request<v1::GetInstanceLogsRequest>,
    ) -> Answer<Self::GetInstanceLogsStream> {
        let patience = self.patience(&request);
        self.logs(request.into_inner(), patience).await
    }

    async fn create_snapshot(
        &self,
        request: Request<v1::AgentSnapshotRequest>,
    ) -> Answer<v1::InstanceSnapshot> {
        self.create_snapshot(request).await
    }

    async fn revert_instance(&self, request: Request<v1::AgentSnapshotRequest>) -> Answer<v1::Instance> {
        self.revert_snapshot(request).await
    }

    async fn delete_snapshot(&self, request: Request<v1::AgentSnapshotRequest>) -> Answer<Empty> {
        self.delete_snapshot(request).await
    }

    async fn list_snapshots(
        &self,
        request: Request<v1::AgentInstanceRequest>,
    ) -> Answer<v1::ListInstanceSnapshotsResponse> {
        self.list_snapshot(request).await
    }

    async fn prepare_incoming(
        &self,
        request: Request<v1::AgentPrepareIncomingRequest>,
    ) -> Answer<v1::AgentPrepareIncomingResponse> {
        self.prepare_migration(request).await
    }

    async fn begin_migration(
        &self,
        request: Request<v1::AgentBeginMigrationRequest>,
    ) -> Answer<v1::AgentMigrationStatus> {
        self.begin_migration(request).await
    }

    async fn get_migration(
        &self,
        request: Request<v1::AgentMigrationRequest>,
    ) -> Answer<v1::AgentMigrationStatus> {
        self.status_migration(request).await
    }

    async fn abort_migration(&self, request: Request<v1::AgentMigrationRequest>) -> Answer<Empty> {
        self.abort_migration(request).await
    }

    type PullImageStream = Outgoing<v1::PullImageProgress>;

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<Self::PullImageStream> {
        self.pull_image(request).await
    }

    async fn delete_image(&self, request: Request<v1::DeleteImageRequest>) -> Answer<Empty> {
        self.delete_image(request).await
    }

    async fn upload_image(&self, request: Request<Streaming<v1::UploadImageRequest>>) -> Answer<v1::Image> {
        self.upload_image(request).await
    }

    async fn collect_images(
        &self,
        request: Request<v1::CollectImagesRequest>,
    ) -> Answer<v1::CollectImagesResponse> {
        self.collect_image(request).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_of_processors_is_counted_between_two_readings() {
        let at = Instant::now();
        let before = Reading { at, cpu_time_ns: 1_000_000_000 };
        let now = Reading { at: at + Duration::from_secs(2), cpu_time_ns: 4_000_000_000 };
        assert!((percent(before, now) - 150.0).abs() < 1e-9);
        assert!(percent(before, before).abs() < 1e-9);
    }

    #[test]
    fn a_stop_that_takes_too_long_is_refused() {
        assert_eq!(stop_options(true, 0).unwrap(), StopOptions { force: true, ..StopOptions::default() });
        for bad in [-1, 3601] {
            assert!(stop_options(false, bad).unwrap_err().message().contains("timeout_seconds"));
        }
    }
}
