//! An instance that counts on the first of two nodes, and how it is moved, watched and checked.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt as _;
use hv_client::{AgentClient, ClientOptions, Clients};
use hv_proto::v1::{self, console_input::Input};
use hv_testkit::{
    AgentOptions, Cluster, ClusterOptions, DEADLINE, Network, SmallDisk, qemu_processes, skip, until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Instant;

use super::consoles::Consoles;
use super::guest::{self, Told, unbroken};

/// The nodes, by the index of their agent.
pub(super) const SOURCE: usize = 0;
pub(super) const TARGET: usize = 1;

/// How long a node lives without a heartbeat: longer than a server is held up by a test.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(30);
/// The pause between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Where the disks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disks {
    Copied,
    Shared,
}

/// What is around the instance.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    pub(super) disks: Disks,
    /// Each node has a host of its own, whose links can be cut.
    pub(super) network: bool,
    /// The target's state is on a disk of so many bytes.
    pub(super) target_disk: Option<u64>,
    /// Its image is fetched by the nodes, instead of lying in their directories.
    pub(super) fetched: bool,
}

impl Options {
    pub(super) fn new(disks: Disks) -> Self {
        Self { disks, network: false, target_disk: None, fetched: false }
    }
}

/// Two nodes, and the instance `web` that counts on the first.
pub(super) struct Moving {
    // First, so that everything ends before its directories go.
    pub(super) cluster: Cluster,
    pub(super) id: String,
    pub(super) target_disk: Option<SmallDisk>,
    consoles: Consoles,
    disks: Disks,
    dirs: TempDir,
}

/// How a move has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) state: String,
    pub(super) message: String,
    pub(super) moved: bool,
    /// How long it stood still at the source until everything was sent, in microseconds.
    pub(super) downtime_us: Option<u64>,
    pub(super) longest_silence: Duration,
}

impl Moving {
    /// `None`, and said so, where this machine cannot do it.
    pub(super) async fn start(suite: &str, options: Options) -> Result<Option<Self>> {
        let found = Command::new("qemu-system-x86_64").arg("--version").output();
        if !found.is_ok_and(|found| found.status.success()) {
            skip(suite, "qemu is not installed; apt-get install qemu-system-x86 qemu-utils");
            return Ok(None);
        }
        let network = match options.network {
            true => match Network::create(suite)? {
                Some(network) => Some(Arc::new(network)),
                None => return Ok(None),
            },
            false => None,
        };
        let target_disk = match options.target_disk {
            Some(bytes) => match SmallDisk::create(suite, bytes)? {
                Some(disk) => Some(disk),
                None => return Ok(None),
            },
            None => None,
        };
        let dirs = tempfile::tempdir()?;
        let (images, shared) = (dirs.path().join("images"), dirs.path().join("shared"));
        std::fs::create_dir(&images)?;
        guest::put_image(&images)?;
        // Whether KVM works is not what is asked; finding out takes half a second each time.
        let mut env = vec![("HYPERVISOR_DRIVERS_QEMU_ACCEL", "tcg".to_owned())];
        if options.disks == Disks::Shared {
            env.push(("HYPERVISOR_DRIVERS_QEMU_DISK_DIR", shared.display().to_string()));
        }
        if options.fetched {
            env.push(("HYPERVISOR_IMAGES_FILE_DIRS", format!("[{}]", images.display())));
        }
        let image = match options.fetched {
            true => format!("file://{}", images.join(guest::IMAGE_FILE).display()),
            false => "mover".to_owned(),
        };
        let agent = AgentOptions {
            drivers: vec!["qemu"],
            image_dir: Some(images).filter(|_| !options.fetched),
            capacity: Some((8, 8 << 30)),
            env,
            ..AgentOptions::default()
        };
        let of_cluster =
            ClusterOptions { heartbeat_timeout: HEARTBEAT_TIMEOUT, network, ..ClusterOptions::default() };
        let mut cluster = Cluster::start(of_cluster).await?;
        cluster.add_agent(agent.clone()).await?;
        cluster.until_ready(1).await?;
        let create =
            ["instance", "create", "--name", "web", "--type", "vm", "--image", &image, "--cpus", "1"];
        let policy = ["--memory", "128", "--restart", "always", "-o", "name"];
        cluster.ctl(&[&create[..], &policy].concat()).await.with_context(|| cluster.logs())?;
        let state_dir = target_disk.as_ref().map(|disk| disk.path().join("agent"));
        cluster.add_agent(AgentOptions { state_dir, ..agent }).await?;
        cluster.until_ready(2).await?;
        let web = get(&cluster).await?;
        let id = text(&web, "id").to_owned();
        let log = |agent| cluster.agent_dir(agent).join("qemu").join(&id).join("console.log");
        let consoles = Consoles::watch(vec![log(SOURCE), log(TARGET)]);
        let disks = options.disks;
        let moving = Self { cluster, id, target_disk, consoles, disks, dirs };
        moving.counts_on(10).await?;
        Ok(Some(moving))
    }

    /// The file of its image.
    pub(super) fn image_file(&self) -> PathBuf {
        self.dirs.path().join("images").join(guest::IMAGE_FILE)
    }

    /// Waits until it has counted so much further.
    pub(super) async fn counts_on(&self, more: u64) -> Result<Told> {
        let before = self.told()?.count;
        until(&format!("it to count from {before} on"), async || {
            Ok(Some(self.told()?).filter(|told| told.count >= before + more))
        })
        .await
        .with_context(|| self.cluster.logs())
    }

    /// What the guest says, at whichever node.
    pub(super) fn told(&self) -> Result<Told> {
        unbroken(&self.consoles.text()?)
    }

    /// Has it moved; the options of the command beside those of its disks. The operation's id if it is not waited for.
    pub(super) async fn migrate(&self, more: &[&str]) -> Result<String> {
        let copy: &[&str] = if self.disks == Disks::Copied { &["--copy-storage"] } else { &[] };
        self.cluster.ctl(&[&["instance", "migrate", "web"], copy, more].concat()).await
    }

    /// Begins to move it so slowly that each phase can be met.
    pub(super) async fn begin_slowly(&self) -> Result<String> {
        self.consoles.longest_silence();
        let slowly = ["--bandwidth", "4MiB", "--downtime-limit", "2s", "--no-wait", "-o", "json"];
        let begun: Value = serde_json::from_str(&self.migrate(&slowly).await?)?;
        Ok(text(&begun, "id").to_owned())
    }

    pub(super) async fn get(&self) -> Result<Value> {
        get(&self.cluster).await
    }

    pub(super) async fn operation(&self, id: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.cluster.ctl(&["operation", "get", id, "-o", "json"]).await?)?)
    }

    /// The last operation.
    pub(super) async fn last_operation(&self) -> Result<Value> {
        let list = ["operation", "list", "--for", "instance/web", "--tail", "1", "-o", "json"];
        let listed: Value = serde_json::from_str(&self.cluster.ctl(&list).await?)?;
        let operations = listed.as_array().or_else(|| listed["operations"].as_array());
        operations.and_then(|all| all.first()).cloned().with_context(|| format!("there is none: {listed}"))
    }

    fn agent_client(&self, agent: usize) -> Result<AgentClient> {
        let ready = std::fs::read(self.cluster.agent_dir(agent).join("agent.json"))?;
        let ready: Value = serde_json::from_slice(&ready)?;
        Ok(Clients::new(hv_client::channel(&ClientOptions::new(text(&ready, "grpc")))?).agent())
    }

    /// How far the source says that a move is.
    pub(super) async fn phase(&self, operation: &str) -> Result<v1::MigrationPhase> {
        let (instance_id, migration_id) = (self.id.clone(), operation.to_owned());
        let request = v1::AgentMigrationRequest { instance_id, migration_id };
        Ok(self.agent_client(SOURCE)?.get_migration(request).await?.into_inner().phase())
    }

    /// Its processes at a node.
    pub(super) fn processes(&self, agent: usize) -> Result<Vec<u32>> {
        let dir = self.cluster.agent_dir(agent).canonicalize()?;
        let of_node = |pid: &u32| {
            // It may end between the two looks.
            std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&dir))
        };
        Ok(qemu_processes(&self.id)?.into_iter().filter(of_node).collect())
    }

    /// What is left of it at a node: files, and processes.
    pub(super) fn left_at(&self, agent: usize) -> Result<Vec<String>> {
        let mut left: Vec<_> = self.processes(agent)?.iter().map(|pid| format!("process {pid}")).collect();
        files_of(&self.id, &self.cluster.agent_dir(agent), &mut left)?;
        Ok(left)
    }

    /// Waits until its move has ended and it runs, at one node and with nothing left at the other; restarts whatever has died
    /// meanwhile. `before` is its record before the move.
    pub(super) async fn settles(&mut self, before: &Value, operation: &str) -> Result<Ended> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.cluster.revive().await?;
            let seen = self.is_settled(before, operation).await;
            match seen {
                Ok(ended) => return Ok(ended),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context("it does not settle"));
                }
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    }

    async fn is_settled(&self, before: &Value, operation: &str) -> Result<Ended> {
        let operation = self.operation(operation).await?;
        ensure!(operation["finishedAt"].is_string(), "its move goes on: {operation}");
        let web = self.get().await?;
        ensure!(text(&web, "state") == "INSTANCE_STATE_RUNNING", "it does not run: {web}");
        ensure!(text(&web, "migrationTarget").is_empty(), "it is still moving: {web}");
        let moved = text(&web, "nodeId") != text(before, "nodeId");
        let grown = number(&web, "epoch") - number(before, "epoch");
        ensure!(grown == u64::from(moved), "moved: {moved}, and its epoch grew by {grown}: {web}");
        let (here, there) = if moved { (TARGET, SOURCE) } else { (SOURCE, TARGET) };
        let running = self.processes(here)?;
        ensure!(running.len() == 1, "moved: {moved}, and of processes there are {running:?}");
        let left = self.left_at(there)?;
        ensure!(left.is_empty(), "moved: {moved}, and at the other node is left: {left:?}");
        Ok(Ended {
            state: text(&operation, "state").to_owned(),
            message: text(&operation, "message").to_owned(),
            moved,
            downtime_us: text(&operation["parameters"], "downtime_us").parse().ok(),
            longest_silence: self.consoles.longest_silence(),
        })
    }

    /// Types at its console, and waits until it echoes that.
    pub(super) async fn answers(&self) -> Result<()> {
        let attach = v1::ConsoleAttach { instance_id: self.id.clone(), size: None };
        let say = |input| v1::ConsoleInput { input: Some(input) };
        let typed = [say(Input::Attach(attach)), say(Input::Data("~".into()))];
        let typed = futures::stream::iter(typed).chain(futures::stream::pending());
        let listening = async {
            let mut output = self.cluster.clients()?.compute().console(typed).await?.into_inner();
            while let Some(piece) = output.message().await? {
                if piece.data.contains(&b'~') {
                    return Ok(());
                }
            }
            bail!("its console was closed")
        };
        tokio::time::timeout(DEADLINE, listening).await.context("its console does not answer")?
    }
}

impl Drop for Moving {
    /// A machine outlives its agent; first the agents, which would start it again.
    fn drop(&mut self) {
        for agent in 0..self.cluster.agents() {
            if let Some(process) = self.cluster.agent(agent) {
                // What cannot be ended here ends with the cluster.
                let _ = process.kill();
            }
        }
        for pid in qemu_processes(&self.id).unwrap_or_default() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// What a directory has of an instance: what is named after it, but for the node's log of what happened.
fn files_of(id: &str, dir: &Path, found: &mut Vec<String>) -> Result<()> {
    let mut dirs = vec![dir.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries {
            let path: PathBuf = entry?.path();
            if path.to_string_lossy().contains(id) {
                found.push(path.display().to_string());
            } else if path.is_dir() {
                dirs.push(path);
            }
        }
    }
    Ok(())
}

async fn get(cluster: &Cluster) -> Result<Value> {
    Ok(serde_json::from_str(&cluster.ctl(&["instance", "get", "web", "-o", "json"]).await?)?)
}

pub(super) fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

/// 64-bit numbers are text in protobuf's JSON.
pub(super) fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().or_else(|| text(value, name).parse().ok()).unwrap_or_default()
}
