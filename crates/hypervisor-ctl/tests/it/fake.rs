//! A server of a few lines: enough of the API's promises (generations, request keys, watches) for a command line.

mod cluster;
mod compute;
mod images;
mod operation;
mod store;

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use hv_proto::v1::cluster_service_server::ClusterServiceServer;
use hv_proto::v1::compute_service_server::ComputeServiceServer;
use hv_proto::v1::operation_service_server::OperationServiceServer;
use hv_proto::v1::store_service_server::StoreServiceServer;
use hv_proto::v1::{self, EventType, InstanceState, InstanceWanted};
use hv_types::{ErrorCode, ServiceError};
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Status};

pub(crate) use store::BACKUP;

/// What the fake answers.
pub(crate) type Answer<T> = Result<tonic::Response<T>, Status>;
/// A stream that the fake answers with.
pub(crate) type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fake does instead of what was asked for.
#[derive(Debug, Default, Clone)]
pub(crate) struct Script {
    /// Instances stay PENDING with this reason.
    pub(crate) pending: Option<String>,
    /// Instances end FAILED with this reason.
    pub(crate) failing: Option<String>,
    /// So many calls are answered with UNAVAILABLE, after they had their effect.
    pub(crate) lost_answers: u32,
    /// Watches end after the first event.
    pub(crate) short_watches: bool,
    /// Instances that do not leave a drained node.
    pub(crate) blocker: Option<String>,
    /// What is restored is refused with this.
    pub(crate) restore_refused: Option<String>,
}

/// Everything there is.
#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) instances: BTreeMap<String, v1::Instance>,
    pub(crate) nodes: BTreeMap<String, v1::Node>,
    pub(crate) events: Vec<v1::Event>,
    pub(crate) operations: BTreeMap<String, v1::Operation>,
    /// What was restored.
    pub(crate) restored: Vec<u8>,
    pub(crate) frozen: bool,
    pub(crate) script: Script,
    /// Method and request key of each mutation, in order.
    pub(crate) mutations: Vec<(&'static str, String)>,
    /// The request ids that calls came with.
    pub(crate) request_ids: Vec<String>,
    answers: HashMap<String, v1::Instance>,
    revision: u64,
    changes: broadcast::Sender<v1::InstanceEvent>,
}

/// The server, until it is dropped.
pub(crate) struct Fake {
    runtime: Option<tokio::runtime::Runtime>,
    port: u16,
    pub(crate) model: Arc<Mutex<Model>>,
}

#[derive(Clone)]
struct Service(Arc<Mutex<Model>>);

impl Fake {
    pub(crate) fn start() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let model = Arc::new(Mutex::new(Model::new()));
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let service = Service(model.clone());
        let _entered = runtime.enter();
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(ComputeServiceServer::new(service.clone()))
                .add_service(ClusterServiceServer::new(service.clone()))
                .add_service(OperationServiceServer::new(service.clone()))
                .add_service(StoreServiceServer::new(service))
                .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))),
        );
        drop(_entered);
        Self { runtime: Some(runtime), port, model }
    }

    /// With a running virtual machine `web` and a stopped container `job`.
    pub(crate) fn with_instances() -> Self {
        let fake = Self::start();
        {
            let mut model = fake.model.lock();
            model.add(
                "0190a1b2-c3d4-7000-8000-000000000001",
                "web",
                v1::InstanceType::Vm,
                InstanceState::Running,
            );
            model.add(
                "0190a1b2-c3d4-7100-8000-000000000002",
                "job",
                v1::InstanceType::Container,
                InstanceState::Stopped,
            );
        }
        fake
    }

    pub(crate) fn script(&self, script: Script) {
        self.model.lock().script = script;
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The instance of this name.
    pub(crate) fn instance(&self, name: &str) -> Option<v1::Instance> {
        self.model.lock().instances.values().find(|instance| instance.name == name).cloned()
    }

    /// The methods of the mutations so far.
    pub(crate) fn mutations(&self) -> Vec<&'static str> {
        self.model.lock().mutations.iter().map(|(method, _)| *method).collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Model {
    fn new() -> Self {
        let mut model = Self {
            instances: BTreeMap::new(),
            nodes: BTreeMap::new(),
            events: Vec::new(),
            operations: BTreeMap::new(),
            restored: Vec::new(),
            frozen: false,
            script: Script::default(),
            mutations: Vec::new(),
            request_ids: Vec::new(),
            answers: HashMap::new(),
            revision: 10,
            changes: broadcast::Sender::new(1024),
        };
        for (id, hostname) in [("node-a-id", "alpha"), ("node-b-id", "beta")] {
            let node = v1::Node {
                id: id.into(),
                hostname: hostname.into(),
                ip: "10.0.0.1".into(),
                port: 50052,
                status: v1::NodeStatus::Ready as i32,
                allocatable: Some(v1::Resources {
                    cpu_cores: 8,
                    memory_bytes: 16 << 30,
                    ..Default::default()
                }),
                supported_instance_types: vec!["vm".into()],
                ..Default::default()
            };
            model.nodes.insert(id.into(), node);
        }
        model
    }

    pub(crate) fn add(&mut self, id: &str, name: &str, kind: v1::InstanceType, state: InstanceState) {
        let wanted =
            if state == InstanceState::Stopped { InstanceWanted::Stopped } else { InstanceWanted::Running };
        let instance = v1::Instance {
            id: id.into(),
            name: name.into(),
            r#type: kind as i32,
            state: state as i32,
            wanted: wanted as i32,
            node_id: "node-a-id".into(),
            project: "default".into(),
            generation: 1,
            observed_generation: 1,
            spec: Some(v1::InstanceSpec {
                image: "tiny".into(),
                cpu_cores: 1,
                memory_bytes: 512 << 20,
                ..Default::default()
            }),
            metadata: Some(v1::Metadata {
                labels: [("tier".into(), name.into())].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.store(instance);
    }

    /// Writes a record and tells the watches.
    fn store(&mut self, mut instance: v1::Instance) -> v1::Instance {
        self.revision += 1;
        instance.revision = self.revision;
        let kind =
            if self.instances.contains_key(&instance.id) { EventType::Modified } else { EventType::Added };
        self.instances.insert(instance.id.clone(), instance.clone());
        self.tell(kind, instance.clone());
        instance
    }

    pub(crate) fn remove(&mut self, id: &str) {
        self.revision += 1;
        self.instances.remove(id);
        self.tell(EventType::Deleted, v1::Instance { id: id.into(), ..Default::default() });
    }

    fn tell(&self, kind: EventType, instance: v1::Instance) {
        let event =
            v1::InstanceEvent { r#type: kind as i32, instance: Some(instance), revision: self.revision };
        // Nobody may be watching.
        let _ = self.changes.send(event);
    }

    fn get(&self, id: &str) -> Result<v1::Instance, Status> {
        let found = self.instances.get(id).cloned();
        found.ok_or_else(|| status(ErrorCode::NotFound, format!("instance {id:?} does not exist")))
    }
}

fn status(code: ErrorCode, message: impl Into<String>) -> Status {
    hv_proto::status::to_status(&ServiceError::new(code, message))
}

impl Service {
    fn note<T>(&self, request: &Request<T>) {
        let id = request.metadata().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        self.0.lock().request_ids.push(id.to_owned());
    }

    /// Changes an instance once per request key, and lets it settle.
    fn change(
        &self,
        method: &'static str,
        (id, key): (&str, &str),
        change: impl FnOnce(&mut v1::Instance) -> Result<(), Status>,
    ) -> Result<v1::Instance, Status> {
        let mut model = self.0.lock();
        if let Some(answer) = model.answers.get(key) {
            return Ok(answer.clone());
        }
        let mut instance = model.get(id)?;
        change(&mut instance)?;
        instance.generation += 1;
        let answer = model.store(instance);
        model.mutations.push((method, key.to_owned()));
        model.answers.insert(key.to_owned(), answer.clone());
        self.settle(&mut model, &answer);
        self.answered(&mut model)?;
        Ok(answer)
    }

    /// The answer is lost where the script says so.
    fn answered(&self, model: &mut Model) -> Result<(), Status> {
        if model.script.lost_answers > 0 {
            model.script.lost_answers -= 1;
            return Err(status(ErrorCode::Unavailable, "try again"));
        }
        Ok(())
    }

    /// What node and agent would do.
    fn settle(&self, model: &mut Model, answer: &v1::Instance) {
        let script = model.script.clone();
        let mut instance = answer.clone();
        if let Some(reason) = script.pending {
            instance.state = InstanceState::Pending as i32;
            instance.state_reason = reason;
            model.store(instance);
            return;
        }
        instance.observed_generation = instance.generation;
        if instance.wanted() == InstanceWanted::Deleted {
            model.remove(&instance.id);
            return;
        }
        instance.node_id = "node-a-id".into();
        instance.state = match instance.wanted() {
            InstanceWanted::Stopped => InstanceState::Stopped,
            InstanceWanted::Paused => InstanceState::Paused,
            _ => InstanceState::Running,
        } as i32;
        if let Some(reason) = script.failing {
            instance.state = InstanceState::Failed as i32;
            instance.state_reason = reason;
        }
        model.store(instance);
    }
}
