//! A cluster of real processes in a private directory.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hv_client::{ClientOptions, Clients};
use tempfile::TempDir;

use crate::netns::{Host, Network};
use crate::probe::{until, working_below};
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
    /// How many servers; more than one need etcd.
    pub servers: usize,
    /// The network in which each server and each agent gets a host of its own; `None`: all on this machine's loopback.
    pub network: Option<Arc<Network>>,
    /// What servers log: `info`, `warn`.
    pub log_level: &'static str,
    /// More variables for every server.
    pub server_env: Vec<(&'static str, String)>,
    /// Where the directory of the cluster is made; `None`: with temporary files.
    pub dir: Option<PathBuf>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            store: StoreKind::Embedded,
            heartbeat_timeout: Duration::from_secs(10),
            servers: 1,
            network: None,
            log_level: "info",
            server_env: Vec::new(),
            dir: None,
        }
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
    /// Which servers it knows, by index; empty: all.
    pub servers: Vec<usize>,
    /// Where its state is; `None`: in the cluster's directory.
    pub state_dir: Option<PathBuf>,
    /// More variables.
    pub env: Vec<(&'static str, String)>,
}

struct Agent {
    options: AgentOptions,
    host: Option<Host>,
    process: Option<Process>,
}

struct Server {
    host: Option<Host>,
    process: Option<Process>,
    addresses: Option<(String, String)>,
}

/// A cluster of real processes. Everything ends with it.
pub struct Cluster {
    // First, so that the processes end before their hosts and directories go.
    servers: Vec<Server>,
    agents: Vec<Agent>,
    // Then what the agents have left running, which outlives them by design.
    _guests: Guests,
    options: ClusterOptions,
    dir: TempDir,
}

/// Ends whatever works below a directory when the test does, however it does.
struct Guests(PathBuf);

impl Drop for Guests {
    fn drop(&mut self) {
        for pid in working_below(&self.0) {
            // One that has ended meanwhile is no loss.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// One heartbeat per this part of the node's lifetime.
const HEARTBEATS_PER_TIMEOUT: u32 = 5;

impl Cluster {
    /// Starts the servers.
    ///
    /// # Errors
    /// One does not come up.
    pub async fn start(options: ClusterOptions) -> Result<Self> {
        Self::start_with(options, &[]).await
    }

    /// Starts the servers with these variables in their environment.
    ///
    /// # Errors
    /// One does not come up.
    pub async fn start_with(options: ClusterOptions, env: &[(&str, String)]) -> Result<Self> {
        let mut cluster = Self::prepare(options)?;
        for index in 0..cluster.servers.len() {
            cluster.start_server_at(index, env).await?;
        }
        Ok(cluster)
    }

    /// The cluster's directory and hosts, with nothing running yet.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn prepare(options: ClusterOptions) -> Result<Self> {
        let mut named = tempfile::Builder::new();
        named.prefix("hv");
        let dir = match &options.dir {
            Some(parent) => named.tempdir_in(parent)?,
            None => named.tempdir()?,
        };
        let mut servers = Vec::new();
        for _ in 0..options.servers {
            let host = options.network.as_ref().map(|network| network.add_host()).transpose()?;
            servers.push(Server { host, process: None, addresses: None });
        }
        let _guests = Guests(dir.path().to_owned());
        Ok(Self { servers, agents: Vec::new(), _guests, options, dir })
    }

    /// The cluster's directory: `server` (`server-N` for the others), and `agent-N` for each agent.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Where a server keeps its state.
    #[must_use]
    pub fn server_dir(&self, index: usize) -> PathBuf {
        self.dir().join(server_name(index))
    }

    /// Starts the first server, at the address it had before if it ran before.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_server(&mut self, env: &[(&str, String)]) -> Result<()> {
        self.start_server_at(0, env).await
    }

    /// Starts a server, at the address it had before if it ran before.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_server_at(&mut self, index: usize, env: &[(&str, String)]) -> Result<()> {
        let server = &self.servers[index];
        let ip = server.host.as_ref().map_or("127.0.0.1", Host::ip);
        let (grpc, http) = server.addresses.clone().unwrap_or_else(|| (format!("{ip}:0"), format!("{ip}:0")));
        let timeout = self.options.heartbeat_timeout;
        let mut args =
            words(&["--log-level", self.options.log_level, "--grpc-address", &grpc, "--http-address", &http]);
        if server.host.is_none() {
            args.push("--dev".into());
        }
        args.extend(words(&["--heartbeat-timeout", &milliseconds(timeout)]));
        args.extend(words(&["--heartbeat-interval", &milliseconds(timeout / HEARTBEATS_PER_TIMEOUT)]));
        args.extend(["--data-dir".into(), self.server_dir(index).into()]);
        let mut env = [env, &self.options.server_env[..]].concat();
        env.push(("HYPERVISOR_SERVER_ID", server_name(index)));
        if let StoreKind::Etcd { endpoints, prefix } = &self.options.store {
            args.extend(words(&["--etcd-endpoints", &endpoints.join(",")]));
            env.push(("HYPERVISOR_ETCD_PREFIX", prefix.clone()));
        }
        let ready_file = self.server_dir(index).join("server.json");
        let log = self.dir().join(format!("{}.log", server_name(index)));
        let mut process = Process::start_on(server.host.as_ref(), Program::Server, &args, &env, &log)?;
        let ready = ready(&mut process, &ready_file).await?;
        self.servers[index].addresses = Some((field(&ready, "grpc")?, field(&ready, "http")?));
        self.servers[index].process = Some(process);
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
        let host = self.options.network.as_ref().map(|network| network.add_host()).transpose()?;
        self.agents.push(Agent { options, host, process: None });
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
        let host = self.agents[index].host.as_ref();
        let ip = host.map_or("127.0.0.1", Host::ip).to_owned();
        let known: Vec<usize> = match options.servers.as_slice() {
            [] => (0..self.servers.len()).collect(),
            some => some.to_vec(),
        };
        let addresses: Vec<String> =
            known.into_iter().map(|server| self.grpc_address_of(server)).collect::<Result<_>>()?;
        let mut args = words(&["--server-addr", &addresses.join(","), "--node-id", &format!("node-{index}")]);
        let any_port = format!("{ip}:0");
        args.extend(words(&["--grpc-address", &any_port, "--http-address", &any_port]));
        args.extend(words(&["--log-level", "info", "--drivers", &options.drivers.join(",")]));
        args.extend(["--state-dir".into(), state_dir.clone().into()]);
        if let Some(images) = &options.image_dir {
            args.extend(["--image-dir".into(), images.into()]);
        }
        let mut env: Vec<_> = env.to_vec();
        // Every agent of the test has the same host name otherwise.
        env.push(("HYPERVISOR_AGENT_HOSTNAME", format!("node-{index}")));
        env.push(("HYPERVISOR_AGENT_IP", ip));
        if let Some((cores, memory_bytes)) = options.capacity {
            env.push(("HYPERVISOR_AGENT_CAPACITY_CPU_CORES", cores.to_string()));
            env.push(("HYPERVISOR_AGENT_CAPACITY_MEMORY", memory_bytes.to_string()));
        }
        env.extend(options.env.iter().cloned());
        let log = self.dir().join(format!("agent-{index}.log"));
        let mut process = Process::start_on(host, Program::Agent, &args, &env, &log)?;
        ready(&mut process, &state_dir.join("agent.json")).await?;
        self.agents[index].process = Some(process);
        Ok(())
    }

    /// Where an agent keeps its state.
    #[must_use]
    pub fn agent_dir(&self, index: usize) -> PathBuf {
        let own = self.agents.get(index).and_then(|agent| agent.options.state_dir.clone());
        own.unwrap_or_else(|| self.dir().join(format!("agent-{index}")))
    }

    /// How many agents there are.
    #[must_use]
    pub fn agents(&self) -> usize {
        self.agents.len()
    }

    /// How many servers there are.
    #[must_use]
    pub fn servers(&self) -> usize {
        self.servers.len()
    }

    /// The host of an agent, where there is a network.
    #[must_use]
    pub fn agent_host(&self, index: usize) -> Option<&Host> {
        self.agents[index].host.as_ref()
    }

    /// The host of a server, where there is a network.
    #[must_use]
    pub fn server_host(&self, index: usize) -> Option<&Host> {
        self.servers[index].host.as_ref()
    }

    /// Where the first server serves gRPC.
    ///
    /// # Errors
    /// It never ran.
    pub fn grpc_address(&self) -> Result<String> {
        self.grpc_address_of(0)
    }

    /// Where a server serves gRPC.
    ///
    /// # Errors
    /// It never ran.
    pub fn grpc_address_of(&self, index: usize) -> Result<String> {
        Ok(self.servers[index].addresses.as_ref().context("the server never ran")?.0.clone())
    }

    /// Where the first server serves health.
    ///
    /// # Errors
    /// It never ran.
    pub fn http_address(&self) -> Result<String> {
        Ok(self.servers[0].addresses.as_ref().context("the server never ran")?.1.clone())
    }

    /// Clients of the first server.
    ///
    /// # Errors
    /// It never ran.
    pub fn clients(&self) -> Result<Clients> {
        self.clients_of(0)
    }

    /// Clients of a server.
    ///
    /// # Errors
    /// It never ran.
    pub fn clients_of(&self, index: usize) -> Result<Clients> {
        Ok(Clients::new(hv_client::channel(&ClientOptions::new(self.grpc_address_of(index)?))?))
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

    /// The first server's process.
    pub fn server(&mut self) -> Option<&mut Process> {
        self.server_at(0)
    }

    /// A server's process.
    pub fn server_at(&mut self, index: usize) -> Option<&mut Process> {
        self.servers[index].process.as_mut()
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
        for index in 0..self.servers.len() {
            let ended = match &mut self.servers[index].process {
                Some(process) => process.ended()?.is_some(),
                None => false,
            };
            if ended {
                self.start_server_at(index, &[]).await?;
                revived = true;
            }
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
        let servers = self.servers.iter().filter_map(|server| server.process.as_ref());
        let tails = servers.chain(agents).map(Process::log_tail);
        tails.collect::<Vec<_>>().join("\n----\n")
    }
}

/// A server's name in elections, and that of its directory.
fn server_name(index: usize) -> String {
    if index == 0 { "server".into() } else { format!("server-{index}") }
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::Guests;

    #[test]
    fn what_works_below_a_directory_ends_with_its_guests_and_nothing_else_does() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let below = dir.path().join("agent-0/qemu");
        std::fs::create_dir_all(&below).unwrap();
        let sleep = |place| Command::new("sleep").arg("600").current_dir(place).spawn().unwrap();
        let (mut guest, mut stranger) = (sleep(below.as_path()), sleep(elsewhere.path()));
        drop(Guests(dir.path().to_owned()));
        assert!(!guest.wait().unwrap().success());
        assert!(stranger.try_wait().unwrap().is_none());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}
