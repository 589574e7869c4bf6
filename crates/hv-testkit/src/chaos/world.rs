//! The processes that chaos is made with.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hv_client::Clients;
use hv_proto::v1;

use super::shim::Shim;
use super::truth::Truth;
use crate::cluster::{AgentOptions, Cluster, ClusterOptions, StoreKind};
use crate::etcd::Etcd;
use crate::netns::Network;
use crate::probe::until;
use crate::skip;

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// Members of etcd.
    pub members: usize,
    /// Servers.
    pub servers: usize,
    /// Agents.
    pub agents: usize,
    /// How many instances of one core fit on each.
    pub cores: u32,
    /// Each process group on a host of its own; the world cannot be made where that cannot be had.
    pub network: bool,
    /// How long a node lives without a heartbeat.
    pub ttl: Duration,
    /// How long after that its instances may be started elsewhere.
    pub grace: Duration,
    /// Servers with a clock that can be set, and a disk that can be slow.
    pub shim: bool,
}

impl Default for WorldOptions {
    fn default() -> Self {
        Self {
            members: 3,
            servers: 3,
            agents: 3,
            cores: 64,
            network: false,
            ttl: Duration::from_secs(3),
            grace: Duration::from_secs(1),
            shim: false,
        }
    }
}

/// etcd members, servers and agents. All of it ends with this value.
pub struct World {
    /// Servers and agents.
    pub cluster: Cluster,
    /// The store.
    pub etcd: Etcd,
    /// Clocks and disks of the servers, by server, where they are under control.
    pub shims: Vec<Shim>,
    /// What it was made of.
    pub options: WorldOptions,
}

impl World {
    /// Starts everything and waits until all nodes are ready. `None`, reported for `suite`, where something that it needs
    /// cannot be had here.
    ///
    /// # Errors
    /// Something does not come up.
    pub async fn start(suite: &str, options: WorldOptions) -> Result<Option<Self>> {
        let network = match options.network {
            true => match Network::create(suite)? {
                Some(network) => Some(Arc::new(network)),
                None => return Ok(None),
            },
            false => None,
        };
        let etcd = Etcd::start(options.members, network.as_deref(), &std::env::temp_dir()).await?;
        let Some(etcd) = etcd else {
            skip(suite, "there is no etcd 3.4: install the package etcd-server");
            return Ok(None);
        };
        let grace = format!("{}ms", options.grace.as_millis());
        let cluster = Cluster::prepare(ClusterOptions {
            store: StoreKind::Etcd { endpoints: etcd.endpoints(), prefix: "/chaos".into() },
            heartbeat_timeout: options.ttl,
            servers: options.servers,
            network,
            server_env: vec![("HYPERVISOR_HEARTBEAT_FAILOVER_GRACE", grace)],
            ..ClusterOptions::default()
        })?;
        let mut shims = Vec::new();
        if options.shim {
            for _ in 0..options.servers {
                match Shim::build(cluster.dir())? {
                    Some(shim) => shims.push(shim),
                    None => {
                        skip(suite, "there is no C compiler for the clock's shim: install gcc");
                        return Ok(None);
                    }
                }
            }
        }
        let mut world = Self { cluster, etcd, shims, options };
        for server in 0..world.options.servers {
            world.start_server(server).await?;
        }
        let agent = AgentOptions {
            drivers: vec!["fake"],
            capacity: Some((world.options.cores, 1 << 40)),
            ..AgentOptions::default()
        };
        for _ in 0..world.options.agents {
            world.cluster.add_agent(agent.clone()).await?;
        }
        world.until_ready().await?;
        Ok(Some(world))
    }

    /// Starts a server that does not run.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_server(&mut self, server: usize) -> Result<()> {
        let env: Vec<(&'static str, String)> = self.shims.get(server).map(Shim::env).unwrap_or_default();
        self.cluster.start_server_at(server, &env).await
    }

    /// Clients of every server.
    ///
    /// # Errors
    /// A server never ran.
    pub fn clients(&self) -> Result<Vec<Clients>> {
        (0..self.options.servers).map(|server| self.cluster.clients_of(server)).collect()
    }

    /// What the nodes say.
    #[must_use]
    pub fn truth(&self) -> Truth {
        Truth::new((0..self.cluster.agents()).map(|agent| self.cluster.agent_dir(agent)).collect())
    }

    /// Waits until all nodes are ready, as every server says.
    ///
    /// # Errors
    /// They are not in time.
    pub async fn until_ready(&self) -> Result<()> {
        let nodes = i32::try_from(self.options.agents)?;
        for clients in self.clients()? {
            until(&format!("{nodes} nodes to be ready"), async || {
                let info = info(&clients).await?;
                ensure!(info.ready_nodes == nodes, "{} of {nodes} nodes are ready", info.ready_nodes);
                Ok(Some(()))
            })
            .await
            .map_err(|error| error.context(self.cluster.logs()))?;
        }
        Ok(())
    }

    /// The index of the server that leads.
    ///
    /// # Errors
    /// None does, for long.
    pub async fn leader(&self, through: &Clients) -> Result<usize> {
        until("a server to lead", async || {
            let name = info(through).await?.leader;
            let index = match name.strip_prefix("server") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix('-').and_then(|index| index.parse().ok()),
                None => None,
            };
            Ok(index)
        })
        .await
    }
}

/// The cluster as a server sees it.
pub(crate) async fn info(clients: &Clients) -> Result<v1::ClusterInfo> {
    let asked = clients.cluster().get_cluster_info(hv_proto::Empty {}).await;
    Ok(asked.context("GetClusterInfo failed")?.into_inner())
}
