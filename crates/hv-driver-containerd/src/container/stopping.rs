//! Stopping, holding, changing and removing a container.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::snapshots::RemoveSnapshotRequest;
use containerd_client::services::v1::{
    DeleteContainerRequest, PauseTaskRequest, ResumeTaskRequest, UpdateContainerRequest, UpdateTaskRequest,
};
use hv_driver::{DriverError, Exit, InstanceConfig, StopMode, Updated};
use prost_types::FieldMask;
use rustix::process::Signal;

use super::{Container, Done, Live, Phase, Shared};
use crate::client::call;
use crate::files::{CONFIG, EXEC, EXIT, Stored, StoredExit};
use crate::problem::{Gone as _, Outcome, Problem};
use crate::spec::{Parts, resources};

/// How often a kill is repeated until nothing is left.
const KILL_INTERVAL: Duration = Duration::from_millis(200);
/// How long a killed container may take to be gone; longer is a process stuck in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

impl Container {
    pub(crate) async fn stop(self: &Arc<Self>, mode: StopMode) -> Done<()> {
        let told = |problem: Problem| problem.told(&self.id, "stop");
        let _change = self.change.lock().await;
        self.look().await.map_err(told)?;
        let phase = self.phase.lock().clone();
        let Phase::Up(live) = phase else { return Ok(()) };
        if self.end(&live, Exit::Stopped).map_err(told)?
            && let StopMode::Graceful(patience) = mode
            && !self.cgroup.is_frozen()
        {
            live.process.signal(self.stop_signal()).map_err(told)?;
            if live.gone_within(patience).await {
                return Ok(());
            }
        }
        self.kill(&live).await
    }

    /// Decides how it ends, before the first signal and for good. `false` if it was decided already.
    fn end(&self, live: &Live, exit: Exit) -> Outcome<bool> {
        let mut verdict = live.verdict.lock();
        if verdict.is_some() {
            return Ok(false);
        }
        self.dir.write(
            EXIT,
            &StoredExit { run: live.run.number, exit: exit.clone(), is_cleared: false },
            false,
        )?;
        *verdict = Some(exit);
        Ok(true)
    }

    /// Ends it with a fault that the driver has found.
    pub(crate) async fn fail(self: &Arc<Self>, live: &Live, reason: String) -> Done<()> {
        self.end(live, Exit::Failed(reason)).map_err(|problem| problem.told(&self.id, "stop"))?;
        self.kill(live).await
    }

    async fn kill(&self, live: &Live) -> Done<()> {
        let deadline = tokio::time::Instant::now() + KILL_TIMEOUT;
        while tokio::time::Instant::now() < deadline {
            self.kill_all();
            if live.gone_within(KILL_INTERVAL).await {
                return Ok(());
            }
        }
        let timeout_ms = u64::try_from(KILL_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
        Err(DriverError::Timeout { id: self.id.clone(), operation: "stop", timeout_ms })
    }

    /// The image's, else SIGTERM.
    fn stop_signal(&self) -> Signal {
        let text = self.stored().image.stop_signal.clone();
        let name = text.strip_prefix("SIG").unwrap_or(&text);
        match name {
            "HUP" | "1" => Signal::HUP,
            "INT" | "2" => Signal::INT,
            "QUIT" | "3" => Signal::QUIT,
            "KILL" | "9" => Signal::KILL,
            "USR1" | "10" => Signal::USR1,
            "USR2" | "12" => Signal::USR2,
            "WINCH" | "28" => Signal::WINCH,
            _ => Signal::TERM,
        }
    }

    pub(crate) async fn set_paused(self: &Arc<Self>, is_paused: bool) -> Done<()> {
        let operation = if is_paused { "pause" } else { "resume" };
        let _change = self.change.lock().await;
        self.look().await.map_err(|problem| problem.told(&self.id, operation))?;
        if !self.is_up() {
            return Err(DriverError::wrong_state(&self.id, operation, "it does not run; start it first"));
        }
        if self.cgroup.is_frozen() == is_paused {
            return Ok(());
        }
        let client = &self.shared.client;
        let container_id = self.id.to_string();
        let mut tasks = client.tasks();
        let outcome = match is_paused {
            true => call("pause", tasks.pause(client.request(PauseTaskRequest { container_id }))).await,
            false => call("resume", tasks.resume(client.request(ResumeTaskRequest { container_id }))).await,
        };
        outcome.map(drop).map_err(|problem| problem.told(&self.id, operation))
    }

    /// Makes it what a configuration says.
    pub(crate) async fn update(self: &Arc<Self>, config: &InstanceConfig) -> Done<Updated> {
        let told = |problem: Problem| problem.told(&self.id, "update");
        let _change = self.change.lock().await;
        self.look().await.map_err(told)?;
        let old = self.stored();
        if old.config.spec == config.spec
            && old.config.name == config.name
            && old.config.metadata == config.metadata
        {
            return Ok(Updated::Done);
        }
        if old.config.spec.image != config.spec.image {
            return Err(DriverError::invalid(
                &self.id,
                "its image cannot be changed; make a new instance of it",
            ));
        }
        let mut config = config.clone();
        config.image.clone_from(&old.config.image);
        let new = Stored { config, ..(*old).clone() };
        let root = self.root().await.map_err(told)?;
        let (dir, cgroup, options) = (&self.dir, &self.cgroup, &self.shared.options);
        let spec = Parts { stored: &new, dir, cgroup, options, root: &root }.document().map_err(told)?;
        if self.is_up()
            && (old.config.spec.limits, old.config.spec.cpu_cores, old.config.spec.memory_bytes)
                != (new.config.spec.limits, new.config.spec.cpu_cores, new.config.spec.memory_bytes)
        {
            self.resize(&new).await.map_err(told)?;
        }
        let client = &self.shared.client;
        let container = containerd_client::services::v1::Container {
            id: self.id.to_string(),
            spec: Some(spec),
            ..Default::default()
        };
        let mask = FieldMask { paths: vec!["spec".to_owned()] };
        let request = UpdateContainerRequest { container: Some(container), update_mask: Some(mask) };
        call("update container", client.containers().update(client.request(request))).await.map_err(told)?;
        self.dir.write(CONFIG, &new, true).map_err(told)?;
        let waits = if self.is_up() { waits(&old, &new) } else { None };
        *self.stored.lock() = Arc::new(new);
        Ok(waits.map_or(Updated::Done, Updated::AtNextStart))
    }

    async fn resize(&self, new: &Stored) -> Outcome<()> {
        let client = &self.shared.client;
        let request = UpdateTaskRequest {
            container_id: self.id.to_string(),
            resources: Some(resources::document(&new.config.spec)?),
            ..UpdateTaskRequest::default()
        };
        call("update task", client.tasks().update(client.request(request))).await.map(drop)
    }

    /// Takes away everything in containerd. It does not run.
    pub(crate) async fn delete(self: &Arc<Self>) -> Done<()> {
        self.stop(StopMode::Force).await?;
        let _change = self.change.lock().await;
        remove(&self.shared, self.id.as_str(), &self.cgroup)
            .await
            .map_err(|problem| problem.told(&self.id, "delete"))
    }

    /// Ends further commands that an earlier agent started: nobody hears them any more.
    pub(super) async fn abandon_commands(&self) {
        let dir = self.dir.file(EXEC);
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(exec_id) = entry.file_name().into_string() else { continue };
            let (id, client) = (self.id.as_str(), &self.shared.client);
            let kill = client.kill(id, &exec_id, u32::try_from(Signal::KILL.as_raw()).unwrap_or(9)).await;
            if kill.is_ok() {
                let _ = client.wait(id, &exec_id).await;
            }
            let _ = client.delete_process(id, &exec_id).await;
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// What cannot change while it runs.
fn waits(old: &Stored, new: &Stored) -> Option<String> {
    let (was, is) = (&old.config.spec, &new.config.spec);
    let io =
        |spec: &hv_types::InstanceSpec| spec.limits.map(|limits| (limits.io_read_bps, limits.io_write_bps));
    let changed: Vec<&str> = [
        ("command", was.command != is.command || was.args != is.args),
        ("environment", was.env != is.env),
        ("volumes", was.volume_mounts != is.volume_mounts),
        ("user", was.user != is.user),
        ("working directory", was.working_dir != is.working_dir),
        ("read-only root", was.read_only_root != is.read_only_root),
        ("health check", was.health_check != is.health_check),
        ("bounds of I/O", io(was).unwrap_or_default() != io(is).unwrap_or_default()),
        ("host name", old.config.name != new.config.name),
    ]
    .into_iter()
    .filter_map(|(what, is_changed)| is_changed.then_some(what))
    .collect();
    (!changed.is_empty())
        .then(|| format!("{}: a container's process is given these when it begins", changed.join(", ")))
}

/// Removes task, container and snapshot of an id, and gives its address back.
pub(crate) async fn remove(shared: &Shared, id: &str, cgroup: &crate::cgroup::Cgroup) -> Outcome<()> {
    let client = &shared.client;
    let lock = std::path::PathBuf::from("/nonexistent");
    let target = hv_driver::FenceTarget::Cgroup { path: cgroup.processes_dir(), lock };
    let _ = hv_driver::fence::kill(&target, hv_driver::fence::Zeal::Instance);
    client.delete_task(id).await.or_gone()?;
    cgroup.remove().await;
    shared.network.disconnect(id).await?;
    let request = client.request(DeleteContainerRequest { id: id.to_owned() });
    call("delete container", client.containers().delete(request)).await.or_gone()?;
    let request = RemoveSnapshotRequest { snapshotter: client.snapshotter.clone(), key: id.to_owned() };
    call("remove snapshot", client.snapshots().remove(client.request(request))).await.or_gone()
}
