//! A client that speaks to containerd directly, with nothing between: what `make bench` compares the system with.
//!
//! ```text
//! direct ADDRESS TEMPLATE TEMPLATE_DIR WORK_DIR KEEPER CNI_CONFIG
//! ```
//! It makes containers like one that the system made (`TEMPLATE`, whose directory is `TEMPLATE_DIR`), by the calls that
//! the driver makes: snapshot, container, task with a keeper of its log, address, start. A line `NAME COUNT` on the
//! standard input starts `COUNT` of them at once, `NAME-0` and so on, each with its directory in `WORK_DIR`; the next
//! line removes them, and is answered by `gone`.

use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest, DeleteTaskRequest,
    GetContainerRequest, KillRequest, StartRequest, WaitRequest,
};
use containerd_client::tonic::Request;
use containerd_client::tonic::transport::{Channel, Endpoint};
use futures::future::try_join_all;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::process::Command;
use tower::service_fn;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The driver's namespace in containerd.
const NAMESPACE: &str = "hypervisor";
/// Where Debian puts the network plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// How long a log may grow, in bytes: as the driver has it.
const LOG_BYTES: u64 = 4 << 20;
const SIGKILL: u32 = 9;

struct Direct {
    channel: Channel,
    template: Container,
    parent: String,
    template_dir: PathBuf,
    work_dir: PathBuf,
    keeper: String,
    network: String,
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().expect("a plain word"));
    request
}

/// Percent-encodes what the keeper's address cannot hold as it is; the bench's directories have nothing else.
fn encoded(dir: &Path) -> String {
    dir.display().to_string().replace('/', "%2F")
}

impl Direct {
    async fn new(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut next = || {
            arguments.next().ok_or("usage: direct ADDRESS TEMPLATE TEMPLATE_DIR WORK_DIR KEEPER CNI_CONFIG")
        };
        let (address, id) = (next()?, next()?);
        let connector = service_fn(move |_| {
            let address = address.clone();
            async move { UnixStream::connect(address).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await?;
        let asked = request(GetContainerRequest { id });
        let template = ContainersClient::new(channel.clone()).get(asked).await?.into_inner().container;
        let template = template.ok_or("containerd told no container")?;
        let stat = StatSnapshotRequest {
            snapshotter: template.snapshotter.clone(),
            key: template.snapshot_key.clone(),
        };
        let stat = SnapshotsClient::new(channel.clone()).stat(request(stat)).await?.into_inner();
        let parent = stat.info.ok_or("containerd told no snapshot")?.parent;
        let (template_dir, work_dir) = (next()?.into(), next()?.into());
        let (keeper, network) = (next()?, next()?);
        Ok(Self { channel, template, parent, template_dir, work_dir, keeper, network })
    }

    /// The files of a container: what is mounted in it, and the pipe that it reads from.
    fn prepare_files(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir.join("etc"))?;
        for file in std::fs::read_dir(self.template_dir.join("etc"))? {
            let file = file?;
            std::fs::copy(file.path(), dir.join("etc").join(file.file_name()))?;
        }
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, dir.join("stdin"), rustix::fs::FileType::Fifo, mode, 0)?;
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<()> {
        let dir = self.work_dir.join(id);
        self.prepare_files(&dir)?;
        let prepare = PrepareSnapshotRequest {
            snapshotter: self.template.snapshotter.clone(),
            key: id.to_owned(),
            parent: self.parent.clone(),
            labels: HashMap::from([("containerd.io/gc.root".to_owned(), "bench".to_owned())]),
        };
        let mut snapshots = SnapshotsClient::new(self.channel.clone());
        let rootfs = snapshots.prepare(request(prepare)).await?.into_inner().mounts;
        let mut container =
            Container { id: id.to_owned(), snapshot_key: id.to_owned(), ..self.template.clone() };
        if let Some(spec) = &mut container.spec {
            let text = String::from_utf8(std::mem::take(&mut spec.value))?;
            let text = text.replace(&self.template_dir.display().to_string(), &dir.display().to_string());
            spec.value = text.replace(&self.template.id, id).into_bytes();
        }
        let create = CreateContainerRequest { container: Some(container) };
        ContainersClient::new(self.channel.clone()).create(request(create)).await?;
        let task = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdin: dir.join("stdin").display().to_string(),
            stdout: format!("binary://{}?container-log={LOG_BYTES}:t:{}", self.keeper, encoded(&dir)),
            terminal: true,
            ..CreateTaskRequest::default()
        };
        let mut tasks = TasksClient::new(self.channel.clone());
        let pid = tasks.create(request(task)).await?.into_inner().pid;
        self.network("ADD", id, &format!("/proc/{pid}/ns/net")).await?;
        let start = StartRequest { container_id: id.to_owned(), exec_id: String::new() };
        tasks.start(request(start)).await?;
        Ok(())
    }

    async fn network(&self, command: &str, id: &str, namespace: &str) -> Result<()> {
        let mut plugin = Command::new(Path::new(PLUGINS).join("bridge"));
        plugin.env("CNI_COMMAND", command).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        plugin.env("CNI_NETNS", namespace).env("CNI_PATH", PLUGINS);
        let mut child = plugin.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        child.stdin.take().ok_or("no pipe")?.write_all(self.network.as_bytes()).await?;
        let status = child.wait().await?;
        if status.success() { Ok(()) } else { Err(format!("the bridge plugin: {status}").into()) }
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let mut tasks = TasksClient::new(self.channel.clone());
        let (container_id, exec_id) = (id.to_owned(), String::new());
        let kill = KillRequest {
            container_id: container_id.clone(),
            exec_id: exec_id.clone(),
            signal: SIGKILL,
            all: true,
        };
        tasks.kill(request(kill)).await?;
        tasks.wait(request(WaitRequest { container_id: container_id.clone(), exec_id })).await?;
        tasks.delete(request(DeleteTaskRequest { container_id })).await?;
        self.network("DEL", id, "").await?;
        let delete = DeleteContainerRequest { id: id.to_owned() };
        ContainersClient::new(self.channel.clone()).delete(request(delete)).await?;
        let remove =
            RemoveSnapshotRequest { snapshotter: self.template.snapshotter.clone(), key: id.to_owned() };
        SnapshotsClient::new(self.channel.clone()).remove(request(remove)).await?;
        std::fs::remove_dir_all(self.work_dir.join(id))?;
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let direct = Arc::new(Direct::new(std::env::args().skip(1)).await?);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    println!("ready");
    while let Some(line) = lines.next_line().await? {
        let (name, count) = line.split_once(' ').ok_or("expected NAME COUNT")?;
        let ids: Vec<String> = (0..count.parse()?).map(|index: u32| format!("{name}-{index}")).collect();
        try_join_all(ids.iter().map(|id| direct.start(id))).await?;
        lines.next_line().await?;
        try_join_all(ids.iter().map(|id| direct.remove(id))).await?;
        println!("gone");
    }
    Ok(())
}
