//! The driver contract, fulfilled with containerd.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::snapshots::PrepareSnapshotRequest;
use containerd_client::services::v1::{Container as Record, CreateContainerRequest};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hv_driver::{
    Capability, Console, Display, Driver, DriverError, DriverEvent, Exec, ExecRequest, Exit, FenceTarget,
    Fingerprint, Handle, InstanceConfig, LogRequest, Observed, Result, Stats, StopMode, Updated,
};
use hv_machine::{Found, check_version, heard};
use hv_types::instance::NetworkSpec;
use hv_types::{ImageInfo, InstanceId, InstanceType};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::cgroup::{self, Cgroup};
use crate::client::{Client, call};
use crate::container::{Container, Live, Shared, remove};
use crate::files::{CONFIG, LOCK, StateDir, Stored};
use crate::image::Images;
use crate::network::Network;
use crate::problem::{Outcome, Problem};
use crate::spec::{Parts, has_terminal};
use crate::{ContainerdOptions, NAME, daemon, exec, output};

/// Version of the handle's data, which is empty: everything is found by the instance's id.
const HANDLE_VERSION: u32 = 1;
/// How many events wait for a slow receiver before it loses the oldest.
const EVENT_QUEUE: usize = 1024;
/// How long containerd may take to tell its version.
const FINGERPRINT_TIMEOUT: Duration = Duration::from_secs(2);

/// What it can do.
const CAPABILITIES: [Capability; 9] = [
    Capability::Pause,
    Capability::Console,
    Capability::Logs,
    Capability::Exec,
    Capability::ExecTty,
    Capability::ResizeLive,
    Capability::Limits,
    Capability::Volumes,
    Capability::FetchedImages,
];

/// Containers, each a task of containerd.
pub struct ContainerdDriver {
    state: StateDir,
    images: Images,
    shared: Arc<Shared>,
    containers: Arc<Mutex<HashMap<InstanceId, Arc<Container>>>>,
    watched: OnceLock<()>,
}

impl Drop for ContainerdDriver {
    fn drop(&mut self) {
        self.shared.cancelled.cancel();
    }
}

/// This program, also if its file was replaced while it ran.
fn this_program() -> PathBuf {
    let path = std::env::current_exe().unwrap_or_default();
    match path.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(text) => text.into(),
        None => path,
    }
}

impl ContainerdDriver {
    /// A driver over a state directory. Neither it nor containerd need be there: [`Driver::fingerprint`] says what is
    /// missing.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    #[must_use]
    pub fn new(options: ContainerdOptions) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let state = StateDir(absolute(&options.state_dir));
        let client = Client::new(&options.address, &options.namespace, &options.snapshotter);
        let shared = Shared {
            network: Network::new(&options, &state.0),
            keeper: options.keeper.as_deref().map_or_else(this_program, absolute),
            client: client.clone(),
            options,
            events: broadcast::channel(EVENT_QUEUE).0,
            is_up: watch::Sender::new(true),
            cancelled: CancellationToken::new(),
        };
        Self {
            state,
            images: Images::new(client),
            shared: Arc::new(shared),
            containers: Arc::default(),
            watched: OnceLock::new(),
        }
    }

    /// Follows containerd from the first time on that somebody is interested.
    fn watch_daemon(&self) {
        self.watched.get_or_init(|| {
            let (shared, containers) = (self.shared.clone(), self.containers.clone());
            let cancelled = shared.cancelled.clone();
            let running = move || {
                let all = containers.lock();
                all.values()
                    .filter(|container| container.is_up())
                    .map(|container| container.id.clone())
                    .collect()
            };
            tokio::spawn(async move {
                tokio::select! {
                    () = cancelled.cancelled() => {}
                    () = daemon::watch(shared, running) => {}
                }
            });
        });
    }

    fn find(&self, id: &InstanceId, operation: &'static str) -> Result<Found<Container>> {
        self.watch_daemon();
        let mut containers = self.containers.lock();
        if let Some(container) = containers.get(id) {
            return Ok(Found::Whole(container.clone()));
        }
        let dir = self.state.of(id);
        if !dir.path.exists() {
            return Ok(Found::Nothing);
        }
        let Some(stored) = dir.read::<Stored>(CONFIG).map_err(|problem| problem.told(id, operation))? else {
            return Ok(Found::Part);
        };
        check_version(id, stored.version, Stored::VERSION)?;
        let container = Arc::new(Container::new(dir, stored, self.shared.clone()));
        containers.insert(id.clone(), container.clone());
        Ok(Found::Whole(container))
    }

    fn container(&self, id: &InstanceId, operation: &'static str) -> Result<Arc<Container>> {
        self.find(id, operation)?.whole(id, operation)
    }

    async fn live(&self, id: &InstanceId, operation: &'static str) -> Result<(Arc<Container>, Arc<Live>)> {
        let container = self.container(id, operation)?;
        match container.live(operation).await? {
            Some(live) => Ok((container, live)),
            None => Err(DriverError::wrong_state(id, operation, "it does not run; start it first")),
        }
    }

    fn cgroup(&self, id: &InstanceId) -> Cgroup {
        Cgroup::new(&self.shared.options.cgroup_parent, id.as_str())
    }

    /// Snapshot, record, files; the last of them says that it is complete.
    async fn make(&self, config: &InstanceConfig) -> Outcome<()> {
        let client = &self.shared.client;
        let image = self.images.resolve(config).await?;
        let dir = self.state.make(&config.id)?;
        let labels = HashMap::from([("containerd.io/gc.root".to_owned(), "hypervisor".to_owned())]);
        let request = PrepareSnapshotRequest {
            snapshotter: client.snapshotter.clone(),
            key: config.id.to_string(),
            parent: image.chain.clone(),
            labels,
        };
        let root =
            call("prepare snapshot", client.snapshots().prepare(client.request(request))).await?.mounts;
        let record = image.record.clone();
        let stored = Stored { version: Stored::VERSION, config: config.clone(), image };
        let (cgroup, options) = (self.cgroup(&config.id), &self.shared.options);
        let spec = Parts { stored: &stored, dir: &dir, cgroup: &cgroup, options, root: &root }.document()?;
        let container = Record {
            id: config.id.to_string(),
            image: record,
            runtime: Some(Runtime { name: options.runtime.clone(), options: None }),
            spec: Some(spec),
            snapshotter: client.snapshotter.clone(),
            snapshot_key: config.id.to_string(),
            ..Record::default()
        };
        let request = CreateContainerRequest { container: Some(container) };
        call("create container", client.containers().create(client.request(request))).await?;
        dir.write(CONFIG, &stored, true)
    }

    /// Removes what is there of an instance that is not whole.
    async fn remove(&self, id: &InstanceId) -> Outcome<()> {
        remove(&self.shared, id.as_str(), &self.cgroup(id)).await?;
        let (state, id) = (self.state.clone(), id.clone());
        let removal = tokio::task::spawn_blocking(move || state.remove(&id)).await;
        removal.unwrap_or_else(|panicked| Err(Problem::State(panicked.to_string())))
    }
}

/// What a specification asks for that containers do not have.
fn unsupported(config: &InstanceConfig) -> Option<(&'static str, String)> {
    let spec = &config.spec;
    let asks = [
        (
            "boot a kernel",
            !(spec.kernel.is_empty() && spec.initrd.is_empty() && spec.kernel_args.is_empty()),
            "a container has the node's kernel",
        ),
        (
            "start from a rescue image",
            spec.is_in_rescue(),
            "spec.rescue: a container has no disk to boot beside; stop it and run another one from a rescue image with the \
             same volumes",
        ),
        (
            "take user data",
            !spec.user_data.is_empty(),
            "a container has no cloud-init; give it a command, or environment",
        ),
        (
            "join a network",
            spec.network.as_ref().is_some_and(|network| *network != NetworkSpec::default()),
            "its containers are on the node's bridge",
        ),
        (
            "have devices of the node",
            !spec.devices.is_empty(),
            "spec.devices: a container shares the node's processors and memory, and gets no PCI devices",
        ),
        ("attach disks", !spec.disks.is_empty(), "a container has volumes instead: use volume_mounts"),
    ];
    asks.into_iter().find(|(_, is_asked, _)| *is_asked).map(|(what, _, why)| (what, why.to_owned()))
}

fn handle() -> Handle {
    Handle { driver: NAME.to_owned(), version: HANDLE_VERSION, data: Value::Null }
}

#[async_trait]
impl Driver for ContainerdDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn instance_type(&self) -> InstanceType {
        InstanceType::Container
    }

    async fn fingerprint(&self) -> Fingerprint {
        self.watch_daemon();
        let told = self.shared.client.version_text(FINGERPRINT_TIMEOUT).await;
        let writable = || {
            std::fs::create_dir_all(&self.state.0)
                .map_err(|e| format!("{} cannot be made: {e}", self.state.0.display()))
        };
        let (healthy, version, message) = match told {
            Ok(version) => match writable() {
                Ok(()) => {
                    let groups = if cgroup::is_unified() { "cgroup v2" } else { "cgroup v1" };
                    let remark = self.shared.network.remark();
                    (
                        true,
                        version,
                        remark.map_or_else(|| groups.to_owned(), |remark| format!("{groups}; {remark}")),
                    )
                }
                Err(reason) => (false, version, reason),
            },
            Err(problem) => {
                let address = self.shared.client.address.display().to_string();
                (false, String::new(), format!("{address}: {}", problem.remedy()))
            }
        };
        Fingerprint { healthy, version, message, capabilities: CAPABILITIES.to_vec(), images_are_local: true }
    }

    async fn images(&self) -> Result<Vec<ImageInfo>> {
        let listed = self.images.list().await;
        listed.map_err(|problem| DriverError::Unavailable { driver: NAME, reason: problem.remedy() })
    }

    async fn create(&self, config: &InstanceConfig) -> Result<Handle> {
        let id = &config.id;
        match self.find(id, "create")? {
            Found::Whole(_) => return Ok(handle()),
            Found::Nothing => {}
            // Nothing of it was ever used.
            Found::Part => self.remove(id).await.map_err(|problem| problem.told(id, "create"))?,
        }
        if let Some((operation, reason)) = unsupported(config) {
            return Err(DriverError::Unsupported { driver: NAME, operation, reason });
        }
        match self.make(config).await {
            Ok(()) => Ok(handle()),
            Err(problem) => {
                self.images.forget();
                // What cannot be taken away now is found by its directory later.
                if let Err(error) = self.remove(id).await {
                    tracing::warn!(instance = %id, %error, "what was half created is taken away later");
                }
                Err(problem.told(id, "create"))
            }
        }
    }

    async fn start(&self, id: &InstanceId) -> Result<Handle> {
        self.container(id, "start")?.start().await?;
        Ok(handle())
    }

    async fn stop(&self, id: &InstanceId, mode: StopMode) -> Result<()> {
        match self.find(id, "stop")? {
            Found::Nothing => Err(DriverError::NotFound(id.clone())),
            Found::Part => Ok(()),
            Found::Whole(container) => container.stop(mode).await,
        }
    }

    async fn pause(&self, id: &InstanceId) -> Result<()> {
        self.container(id, "pause")?.set_paused(true).await
    }

    async fn resume(&self, id: &InstanceId) -> Result<()> {
        self.container(id, "resume")?.set_paused(false).await
    }

    async fn delete(&self, id: &InstanceId) -> Result<()> {
        match self.find(id, "delete")? {
            Found::Nothing => return Ok(()),
            Found::Part => {}
            Found::Whole(container) => container.delete().await?,
        }
        self.remove(id).await.map_err(|problem| problem.told(id, "delete"))?;
        self.containers.lock().remove(id);
        if let Err(error) = self.images.prune().await {
            tracing::warn!(%error, "images that nobody needs are given up later");
        }
        Ok(())
    }

    async fn recover(&self, id: &InstanceId, _handle: Option<&Handle>) -> Result<Observed> {
        self.observe(id).await
    }

    async fn observe(&self, id: &InstanceId) -> Result<Observed> {
        match self.find(id, "observe")? {
            Found::Nothing => Ok(Observed::Absent),
            Found::Part => Ok(Observed::Stopped(Exit::NeverStarted)),
            Found::Whole(container) => container.observe().await,
        }
    }

    /// Its first process is in the control group before it is let begin, and the lock is held until then.
    fn fence_target(&self, id: &InstanceId) -> Option<FenceTarget> {
        Some(FenceTarget::Cgroup {
            path: self.cgroup(id).processes_dir(),
            lock: self.state.of(id).file(LOCK),
        })
    }

    async fn list(&self) -> Result<Vec<InstanceId>> {
        self.state.list().map_err(|e| DriverError::Unavailable {
            driver: NAME,
            reason: format!(
                "{} cannot be read: {e}; check the agent's state directory and its permissions",
                self.state.0.display()
            ),
        })
    }

    fn events(&self) -> BoxStream<'static, DriverEvent> {
        self.watch_daemon();
        heard(self.shared.events.subscribe())
    }

    fn health_turns(&self) -> BoxStream<'static, ()> {
        self.watch_daemon();
        let mut is_up = self.shared.is_up.subscribe();
        let known = *is_up.borrow_and_update();
        stream::unfold((is_up, known), |(mut is_up, known)| async move {
            let turned = *is_up.wait_for(|is_up| *is_up != known).await.ok()?;
            Some(((), (is_up, turned)))
        })
        .boxed()
    }

    async fn stats(&self, id: &InstanceId) -> Result<Stats> {
        let (container, live) = self.live(id, "stats").await?;
        let ended = || DriverError::wrong_state(id, "stats", "it has just ended; start it first");
        let mut stats = container.cgroup.stats().ok_or_else(ended)?;
        (stats.network_rx_bytes, stats.network_tx_bytes) = cgroup::network_bytes(live.process.pid);
        Ok(stats)
    }

    async fn console(&self, id: &InstanceId) -> Result<Console> {
        let (container, live) = self.live(id, "console").await?;
        let failed = |problem: Problem| match *live.ended.borrow() {
            true => DriverError::wrong_state(id, "console", "it has just ended; start it first"),
            false => DriverError::failed(id, "console", problem),
        };
        let input = exec::console_input(&container).map_err(failed)?;
        let output = output::console(&container.dir.path, live.ended.clone());
        let output = output.map_err(Problem::file("read the log in", &container.dir.path)).map_err(failed)?;
        Ok(Console { output, input })
    }

    async fn exec(&self, id: &InstanceId, request: ExecRequest) -> Result<Exec> {
        let (container, _) = self.live(id, "exec").await?;
        if container.cgroup.is_frozen() {
            return Err(DriverError::wrong_state(id, "exec", "it is paused; resume it first"));
        }
        exec::exec(&container, request).await
    }

    async fn logs(&self, id: &InstanceId, request: LogRequest) -> Result<BoxStream<'static, Result<Bytes>>> {
        let container = self.container(id, "logs")?;
        let ended = container.live("logs").await?.map(|live| live.ended.clone());
        let dir = container.dir.path.clone();
        let read = tokio::task::spawn_blocking(move || output::logs(&dir, request, ended)).await;
        let outcome = read.unwrap_or_else(|panicked| Err(std::io::Error::other(panicked)));
        outcome.map_err(|e| {
            DriverError::failed(id, "logs", Problem::file("read the log in", &container.dir.path)(e))
        })
    }

    async fn display(&self, id: &InstanceId) -> Result<Display> {
        self.container(id, "display")?;
        Err(self.cannot("show a screen", "a container has none; use its console"))
    }

    async fn update(&self, config: &InstanceConfig) -> Result<Updated> {
        let container = self.container(&config.id, "update")?;
        if let Some((operation, reason)) = unsupported(config) {
            return Err(DriverError::Unsupported { driver: NAME, operation, reason });
        }
        if has_terminal(config) != has_terminal(&container.stored().config) {
            return Err(DriverError::invalid(
                &config.id,
                "whether it has a terminal is decided when it is created",
            ));
        }
        container.update(config).await
    }
}
