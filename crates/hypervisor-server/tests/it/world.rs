//! A real server in this process, and a double of an agent that registers nodes and reports states.

use std::time::Duration;

use hv_client::{AssignmentClient, ClientOptions, Clients, ClusterClient, ComputeClient};
use hv_proto::v1;
use hv_telemetry::Shutdown;
use hypervisor_server::{Server, Settings};
use tempfile::TempDir;

/// How long a condition may take to come true on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = tokio::time::Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begin.elapsed() < LIMIT, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) struct World {
    pub(crate) clients: Clients,
    pub(crate) server: Option<Server>,
    pub(crate) shutdown: Shutdown,
    _dir: TempDir,
}

pub(crate) fn settings(dir: &TempDir) -> Settings {
    let mut settings = Settings::default();
    settings.server.grpc_address = "127.0.0.1:0".parse().unwrap();
    settings.server.http_address = "127.0.0.1:0".parse().unwrap();
    settings.server.data_dir = dir.path().join("server");
    settings
}

pub(crate) async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let shutdown = Shutdown::new();
    let server = hypervisor_server::start(settings(&dir), &shutdown).await.unwrap();
    let options = ClientOptions::new(server.grpc_address.to_string());
    let clients = Clients::new(hv_client::channel(&options).unwrap());
    World { clients, server: Some(server), shutdown, _dir: dir }
}

impl World {
    pub(crate) fn compute(&self) -> ComputeClient {
        self.clients.compute()
    }

    pub(crate) fn cluster(&self) -> ClusterClient {
        self.clients.cluster()
    }

    pub(crate) fn assignment(&self) -> AssignmentClient {
        self.clients.assignment()
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub(crate) async fn info(&self) -> v1::ClusterInfo {
        self.cluster().get_cluster_info(hv_proto::Empty {}).await.unwrap().into_inner()
    }

    /// The store's revision once nothing of earlier calls is under way: what does not raise it has written nothing.
    pub(crate) async fn settled_revision(&self) -> u64 {
        let mut last = (0, tokio::time::Instant::now());
        until("the store to rest", async || {
            let now = self.info().await;
            if now.revision != last.0 || now.leader.is_empty() {
                last = (now.revision, tokio::time::Instant::now());
            }
            (last.1.elapsed() > Duration::from_millis(400)).then_some(last.0)
        })
        .await
    }

    /// A node as an agent registers it; says the cluster's id.
    pub(crate) async fn add_node(&self, node: v1::RegisterNodeRequest) -> String {
        self.cluster().register_node(node).await.unwrap().into_inner().cluster_id
    }

    pub(crate) async fn create(&self, name: &str) -> v1::Instance {
        self.compute().create_instance(wish(name)).await.unwrap().into_inner()
    }

    pub(crate) async fn get(&self, id: &str) -> v1::Instance {
        let request = v1::GetInstanceRequest { instance_id: id.into() };
        self.compute().get_instance(request).await.unwrap().into_inner()
    }

    pub(crate) async fn bound(&self, id: &str) -> v1::Instance {
        until("the instance to be bound", async || Some(self.get(id).await).filter(|i| !i.node_id.is_empty()))
            .await
    }

    /// Reports as the agent of the instance's node does; says the verdict.
    pub(crate) async fn report(
        &self,
        of: &v1::Instance,
        state: v1::InstanceState,
        gone: bool,
    ) -> v1::ReportVerdict {
        let report = v1::InstanceReport {
            instance_id: of.id.clone(),
            epoch: of.epoch,
            observed_generation: of.generation,
            state: state.into(),
            gone,
            ..v1::InstanceReport::default()
        };
        let request = v1::ReportInstancesRequest {
            node_id: of.node_id.clone(),
            cluster_id: self.info().await.cluster_id,
            reports: vec![report],
        };
        let answer = self.assignment().report_instances(request).await.unwrap().into_inner();
        v1::ReportVerdict::try_from(answer.verdicts[0]).unwrap()
    }

    pub(crate) async fn running(&self, name: &str) -> v1::Instance {
        let made = self.create(name).await;
        let bound = self.bound(&made.id).await;
        assert_eq!(self.report(&bound, v1::InstanceState::Running, false).await, v1::ReportVerdict::Accepted);
        self.get(&made.id).await
    }
}

pub(crate) fn node(id: &str, cores: i32) -> v1::RegisterNodeRequest {
    let room = v1::Resources { cpu_cores: cores, memory_bytes: 1 << 40, disk_bytes: 1 << 40, gpu_count: 0 };
    let image =
        |name: &str| v1::Image { name: name.into(), r#type: VM, size_bytes: 5, ..v1::Image::default() };
    let driver = v1::DriverInfo {
        name: "double".into(),
        r#type: VM,
        healthy: true,
        images_are_local: true,
        ..v1::DriverInfo::default()
    };
    v1::RegisterNodeRequest {
        node_id: id.into(),
        hostname: format!("host-{id}"),
        ip: "127.0.0.1".into(),
        port: 1,
        capacity: Some(room),
        drivers: vec![driver],
        images: ["tiny", "a:b", "a/b", "a_b"].map(image).into(),
        ..v1::RegisterNodeRequest::default()
    }
}

pub(crate) const VM: i32 = v1::InstanceType::Vm as i32;

pub(crate) fn wish(name: &str) -> v1::CreateInstanceRequest {
    let spec = v1::InstanceSpec {
        image: "tiny".into(),
        cpu_cores: 1,
        memory_bytes: 64 << 20,
        ..v1::InstanceSpec::default()
    };
    v1::CreateInstanceRequest {
        name: name.into(),
        r#type: VM,
        spec: Some(spec),
        ..v1::CreateInstanceRequest::default()
    }
}
