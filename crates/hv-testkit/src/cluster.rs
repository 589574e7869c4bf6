//! A cluster of real processes in a private directory.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hv_client::{ClientOptions, Clients};
use tempfile::TempDir;

use crate::probe::until;
use crate::process::Process;
use crate::programs::Program;

/// Where the cluster keeps its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// In the server's own directory.
    Embedded,
    /// In etcd.
    Etcd {
        /// Its members.
        endpoints: Vec<String>,
        /// Where everything of this cluster lies in it.
        prefix: String,
    },
}

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Where the state is.
    pub store: StoreKind,
    /// How long a node lives without a heartbeat.
    pub heartbeat_timeout: Duration,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { store: StoreKind::Embedded, heartbeat_timeout: Duration::from_secs(10) }
    }
}

/// What an agent runs.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// Names of drivers: `qemu`, `fake`.
    pub drivers: Vec<&'static str>,
    /// Images of the QEMU driver.
    pub image_dir: Option<PathBuf>,
    /// What it claims to have, instead of what the machine has: cores and bytes of memory.
    pub capacity: Option<(u32, u64)>,
}

struct Agent {
    options: AgentOptions,
    process: Option<Process>,
}

/// A cluster of real processes. Everything ends with it.
pub struct Cluster {
    dir: TempDir,
    options: ClusterOptions,
    server: Option<Process>,
    addresses: Option<(String, String)>,
    agents: Vec<Agent>,
}

/// One heartbeat per this part of the node's lifetime.
const HEARTBEATS_PER_TIMEOUT: u32 = 5;

impl Cluster {
    /// Starts a server.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start(options: ClusterOptions) -> Result<Self> {
        Self::start_with(options, &[]).await
    }

    /// Starts a server with these variables in its environment.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_with(options: ClusterOptions, env: &[(&str, String)]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("hv").tempdir()?;
        let mut cluster = Self { dir, options, server: None, addresses: None, agents: Vec::new() };
        cluster.start_server(env).await?;
        Ok(cluster)
    }

    /// The cluster's directory: `server`, and `agent-N` for each agent.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts the server, at the address it had before if it ran before.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_server(&mut self, env: &[(&str, String)]) -> Result<()> {
        let (grpc, http) =
            self.addresses.clone().unwrap_or_else(|| ("127.0.0.1:0".into(), "127.0.0.1:0".into()));
        let timeout = self.options.heartbeat_timeout;
        let mut args =
            words(&["--dev", "--log-level", "info", "--grpc-address", &grpc, "--http-address", &http]);
        args.extend(words(&["--heartbeat-timeout", &milliseconds(timeout)]));
        args.extend(words(&["--heartbeat-interval", &milliseconds(timeout / HEARTBEATS_PER_TIMEOUT)]));
        args.extend(["--data-dir".into(), self.dir().join("server").into()]);
        let mut env = env.to_vec();
        if let StoreKind::Etcd { endpoints, prefix } = &self.options.store {
            args.extend(words(&["--etcd-endpoints", &endpoints.join(",")]));
            env.push(("HYPERVISOR_ETCD_PREFIX", prefix.clone()));
        }
        let ready_file = self.dir().join("server/server.json");
        let mut process = Process::start(Program::Server, &args, &env, &self.dir().join("server.log"))?;
        let ready = ready(&mut process, &ready_file).await?;
        self.addresses = Some((field(&ready, "grpc")?, field(&ready, "http")?));
        self.server = Some(process);
        Ok(())
    }

    /// Starts an agent; returns its index.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn add_agent(&mut self, options: AgentOptions) -> Result<usize> {
        self.add_agent_with(options, &[]).await
    }

    /// Starts an agent with these variables in its environment; returns its index.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn add_agent_with(&mut self, options: AgentOptions, env: &[(&str, String)]) -> Result<usize> {
        self.agents.push(Agent { options, process: None });
        let index = self.agents.len() - 1;
        self.start_agent(index, env).await?;
        Ok(index)
    }

    /// Starts an agent that ran before.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_agent(&mut self, index: usize, env: &[(&str, String)]) -> Result<()> {
        let options = self.agents[index].options.clone();
        let state_dir = self.agent_dir(index);
        let mut args =
            words(&["--server-addr", &self.grpc_address()?, "--node-id", &format!("node-{index}")]);
        args.extend(words(&["--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]));
        args.extend(words(&["--log-level", "info", "--drivers", &options.drivers.join(",")]));
        args.extend(["--state-dir".into(), state_dir.clone().into()]);
        if let Some(images) = &options.image_dir {
            args.extend(["--image-dir".into(), images.into()]);
        }
        let mut env: Vec<_> = env.to_vec();
        // Every agent of the test has the same host name otherwise.
        env.push(("HYPERVISOR_AGENT_HOSTNAME", format!("node-{index}")));
        env.push(("HYPERVISOR_AGENT_IP", "127.0.0.1".into()));
        if let Some((cores, memory_bytes)) = options.capacity {
            env.push(("HYPERVISOR_AGENT_CAPACITY_CPU_CORES", cores.to_string()));
            env.push(("HYPERVISOR_AGENT_CAPACITY_MEMORY", memory_bytes.to_string()));
        }
        let log = self.dir().join(format!("agent-{index}.log"));
        let mut process = Process::start(Program::Agent, &args, &env, &log)?;
        ready(&mut process, &state_dir.join("agent.json")).await?;
        self.agents[index].process = Some(process);
        Ok(())
    }

    /// Where an agent keeps its state.
    #[must_use]
    pub fn agent_dir(&self, index: usize) -> PathBuf {
        self.dir().join(format!("agent-{index}"))
    }

    /// Where the server serves gRPC.
    ///
    /// # Errors
    /// It never ran.
    pub fn grpc_address(&self) -> Result<String> {
        Ok(self.addresses.as_ref().context("the server never ran")?.0.clone())
    }

    /// Where the server serves health.
    ///
    /// # Errors
    /// It never ran.
    pub fn http_address(&self) -> Result<String> {
        Ok(self.addresses.as_ref().context("the server never ran")?.1.clone())
    }

    /// Clients of the server.
    ///
    /// # Errors
    /// It never ran.
    pub fn clients(&self) -> Result<Clients> {
        Ok(Clients::new(hv_client::channel(&ClientOptions::new(self.grpc_address()?))?))
    }

    /// Waits until so many nodes are ready.
    ///
    /// # Errors
    /// They are not in time.
    pub async fn until_ready(&self, nodes: i32) -> Result<()> {
        let clients = self.clients()?;
        until(&format!("{nodes} nodes to be ready"), async || {
            let info = clients.cluster().get_cluster_info(hv_proto::Empty {}).await?.into_inner();
            Ok((info.ready_nodes == nodes).then_some(()))
        })
        .await
        .map_err(|error| error.context(self.logs()))
    }

    /// The server's process.
    pub fn server(&mut self) -> Option<&mut Process> {
        self.server.as_mut()
    }

    /// An agent's process.
    pub fn agent(&mut self, index: usize) -> Option<&mut Process> {
        self.agents[index].process.as_mut()
    }

    /// Restarts whatever has died; says whether something had.
    ///
    /// # Errors
    /// It does not come up again.
    pub async fn revive(&mut self) -> Result<bool> {
        let mut revived = false;
        if let Some(server) = &mut self.server
            && server.ended()?.is_some()
        {
            self.start_server(&[]).await?;
            revived = true;
        }
        for index in 0..self.agents.len() {
            let ended = match &mut self.agents[index].process {
                Some(process) => process.ended()?.is_some(),
                None => false,
            };
            if ended {
                self.start_agent(index, &[]).await?;
                revived = true;
            }
        }
        Ok(revived)
    }

    /// Runs `hypervisor-ctl` against the server; its standard output if it succeeds.
    ///
    /// # Errors
    /// It fails; the message has its standard error.
    pub async fn ctl(&self, args: &[&str]) -> Result<String> {
        let mut command = tokio::process::Command::new(Program::Ctl.path()?);
        for (name, _) in
            std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HYPERVISOR_"))
        {
            command.env_remove(name);
        }
        command.arg("--server").arg(self.grpc_address()?).args(args).kill_on_drop(true);
        let output = command.stdin(std::process::Stdio::null()).output().await?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("hypervisor-ctl {}: {}\n{stdout}{stderr}", args.join(" "), output.status);
        }
        Ok(stdout)
    }

    /// The ends of all logs, for the report of a failure.
    #[must_use]
    pub fn logs(&self) -> String {
        let agents = self.agents.iter().filter_map(|agent| agent.process.as_ref());
        let tails = self.server.iter().chain(agents).map(Process::log_tail);
        tails.collect::<Vec<_>>().join("\n----\n")
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn milliseconds(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}

fn field(ready: &serde_json::Value, name: &str) -> Result<String> {
    Ok(ready[name].as_str().with_context(|| format!("the ready file has no {name}"))?.to_owned())
}

/// Waits for the ready file that this very process writes.
async fn ready(process: &mut Process, file: &Path) -> Result<serde_json::Value> {
    until(&format!("{} to be written", file.display()), async || {
        if let Some(status) = process.ended()? {
            return Ok(Some(Err(anyhow::anyhow!("it ended with {status}: {}", process.log_tail()))));
        }
        let Ok(content) = std::fs::read(file) else { return Ok(None) };
        let ready: serde_json::Value = serde_json::from_slice(&content)?;
        let is_own = ready["pid"].as_u64() == Some(u64::from(process.id()));
        Ok(is_own.then_some(Ok(ready)))
    })
    .await?
}
