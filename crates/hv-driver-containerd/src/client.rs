//! containerd's API, as far as the driver uses it, with a bound on how long each call may take.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{
    CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest, GetRequest, KillRequest, StartRequest,
    WaitRequest,
};
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_client::tonic::transport::{Channel, Endpoint};
use containerd_client::tonic::{Request, Response, Status};
use containerd_client::types::v1::Process;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tower::service_fn;

use crate::problem::{Outcome, Problem};

/// How long an ordinary call may take.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a call may take that unpacks a layer or reads one.
pub(crate) const BULK_TIMEOUT: Duration = Duration::from_secs(600);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest message that is taken, in bytes: containerd's own bound.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// A connection that makes itself when it is needed, and again when it broke.
#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    pub(crate) namespace_name: String,
    pub(crate) snapshotter: String,
    pub(crate) address: PathBuf,
}

macro_rules! service {
    ($name:ident, $client:ident) => {
        pub(crate) fn $name(&self) -> $client<Channel> {
            $client::new(self.channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES)
        }
    };
}

impl Client {
    /// Nothing is connected yet. The namespace has been checked.
    pub(crate) fn new(address: &Path, namespace: &str, snapshotter: &str) -> Self {
        let path = address.to_owned();
        let connector = service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The authority means nothing on a unix socket.
        let endpoint = Endpoint::from_static("http://localhost").connect_timeout(CONNECT_TIMEOUT);
        Self {
            channel: endpoint.connect_with_connector_lazy(connector),
            namespace: namespace.parse().unwrap_or_else(|_| MetadataValue::from_static("hypervisor")),
            namespace_name: namespace.to_owned(),
            snapshotter: snapshotter.to_owned(),
            address: address.to_owned(),
        }
    }

    service!(containers, ContainersClient);
    service!(content, ContentClient);
    service!(diff, DiffClient);
    service!(events, EventsClient);
    service!(images, ImagesClient);
    service!(leases, LeasesClient);
    service!(snapshots, SnapshotsClient);
    service!(tasks, TasksClient);
    service!(version, VersionClient);

    /// A request in the driver's namespace.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        request
    }

    /// A request whose results a lease keeps from the garbage collector.
    pub(crate) fn leased<T>(&self, message: T, lease: &str) -> Request<T> {
        let mut request = self.request(message);
        if let Ok(lease) = lease.parse() {
            request.metadata_mut().insert("containerd-lease", lease);
        }
        request
    }

    /// containerd's version.
    pub(crate) async fn version_text(&self, within: Duration) -> Outcome<String> {
        let mut version = self.version();
        let answer = bounded("version", within, version.version(self.request(()))).await?;
        Ok(answer.version)
    }

    /// The task of a container; `None` if it has none.
    pub(crate) async fn task(&self, id: &str) -> Outcome<Option<Process>> {
        let request = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
        let mut tasks = self.tasks();
        match call("get task", tasks.get(self.request(request))).await {
            Ok(answer) => Ok(answer.process),
            Err(problem) if problem.is_not_found() => Ok(None),
            Err(problem) => Err(problem),
        }
    }

    /// Makes the task, and returns its process, which waits to be started.
    pub(crate) async fn create_task(&self, request: CreateTaskRequest) -> Outcome<i32> {
        let mut tasks = self.tasks();
        let answer = call("create task", tasks.create(self.request(request))).await?;
        i32::try_from(answer.pid).map_err(|_| Problem::State(format!("containerd told pid {}", answer.pid)))
    }

    /// Lets the task's process, or a further one, begin.
    pub(crate) async fn start_process(&self, id: &str, exec_id: &str) -> Outcome<()> {
        let request = StartRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        let mut tasks = self.tasks();
        call("start task", tasks.start(self.request(request))).await.map(drop)
    }

    /// Waits for the end of a process, however long it takes, and returns its exit status.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Outcome<u32> {
        let request = WaitRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        let waited = self.tasks().wait(self.request(request)).await;
        let answer = waited.map_err(|status| Problem::Call { call: "wait", status: Box::new(status) })?;
        Ok(answer.into_inner().exit_status)
    }

    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Outcome<()> {
        let request = KillRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all: exec_id.is_empty(),
        };
        let mut tasks = self.tasks();
        call("kill", tasks.kill(self.request(request))).await.map(drop)
    }

    /// Removes a task that does not run.
    pub(crate) async fn delete_task(&self, id: &str) -> Outcome<()> {
        let request = DeleteTaskRequest { container_id: id.to_owned() };
        let mut tasks = self.tasks();
        call("delete task", tasks.delete(self.request(request))).await.map(drop)
    }

    /// Removes a further process that has ended; what it printed has been handed on then.
    pub(crate) async fn delete_process(&self, id: &str, exec_id: &str) -> Outcome<()> {
        let request = DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        let mut tasks = self.tasks();
        call("delete process", tasks.delete_process(self.request(request))).await.map(drop)
    }
}

/// A call within the ordinary bound.
pub(crate) async fn call<T>(
    name: &'static str,
    work: impl Future<Output = std::result::Result<Response<T>, Status>>,
) -> Outcome<T> {
    bounded(name, CALL_TIMEOUT, work).await
}

/// A call within a bound.
pub(crate) async fn bounded<T>(
    name: &'static str,
    within: Duration,
    work: impl Future<Output = std::result::Result<Response<T>, Status>>,
) -> Outcome<T> {
    match tokio::time::timeout(within, work).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Problem::Call { call: name, status: Box::new(status) }),
        Err(_) => {
            let timeout_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
            Err(Problem::Timeout { call: name, timeout_ms })
        }
    }
}
