//! etcd for whole-process chaos: members on this machine or on hosts of a network, killed, frozen and started again.

use std::ffi::OsString;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hv_store::Store as _;
use hv_store::etcd::{EtcdOptions, EtcdStore};
use tempfile::TempDir;

use crate::netns::{Host, Network};
use crate::probe::until;
use crate::process::Process;

/// Debian's etcd 3.4. Not 3.5.0 to 3.5.2: they may lose acknowledged writes when they are killed.
const PROGRAM: &str = "/usr/bin/etcd";
/// Ports on a host of its own.
const PORTS: (u16, u16) = (2379, 2380);
/// As in a small cluster on one site; a node's lease is never shorter than 1.5 elections.
const HEARTBEAT_MS: &str = "100";
const ELECTION_MS: &str = "1000";
/// How long a member may take to say whether it leads.
const ASK: Duration = Duration::from_secs(1);

/// Members of one etcd. They end with it.
pub struct Etcd {
    members: Vec<Member>,
    dir: TempDir,
}

struct Member {
    process: Option<Process>,
    host: Option<Host>,
    client_url: String,
    peer_url: String,
}

impl Etcd {
    /// One member on loopback, with its data below `dir`. `None` where etcd is not installed.
    ///
    /// # Errors
    /// It does not come up.
    pub async fn start_alone(dir: &Path) -> Result<Option<Self>> {
        Self::start(1, None, dir).await
    }

    /// So many members, on hosts of `network` or on loopback. `None` where etcd is not installed; the caller reports that.
    ///
    /// # Errors
    /// They do not come up.
    pub async fn start(members: usize, network: Option<&Network>, dir: &Path) -> Result<Option<Self>> {
        if !Path::new(PROGRAM).is_file() {
            return Ok(None);
        }
        let dir = tempfile::Builder::new().prefix("hv-etcd").tempdir_in(dir)?;
        // The listeners are held until all are chosen, so that no port is chosen twice.
        let prepared = (0..members).map(|_| Member::prepare(network)).collect::<Result<Vec<_>>>()?;
        let members = prepared.into_iter().map(|(member, _)| member).collect();
        let mut etcd = Self { members, dir };
        for index in 0..etcd.members.len() {
            etcd.start_member(index)?;
        }
        etcd.until_healthy().await?;
        Ok(Some(etcd))
    }

    /// The clients' addresses, by member.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client_url.clone()).collect()
    }

    /// How many members there are.
    #[must_use]
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Starts a member, with the data that it has.
    ///
    /// # Errors
    /// The system refuses.
    pub fn start_member(&mut self, index: usize) -> Result<()> {
        let name = |index: usize| format!("member{index}");
        let all: Vec<_> =
            self.members.iter().enumerate().map(|(i, m)| format!("{}={}", name(i), m.peer_url)).collect();
        let member = &self.members[index];
        let mut args: Vec<OsString> = [
            ["--name", &name(index)],
            ["--initial-cluster", &all.join(",")],
            ["--listen-client-urls", &member.client_url],
            ["--advertise-client-urls", &member.client_url],
            ["--listen-peer-urls", &member.peer_url],
            ["--initial-advertise-peer-urls", &member.peer_url],
            ["--heartbeat-interval", HEARTBEAT_MS],
            ["--election-timeout", ELECTION_MS],
            ["--log-level", "warn"],
            ["--logger", "zap"],
        ]
        .concat()
        .into_iter()
        .map(OsString::from)
        .collect();
        args.extend(["--data-dir".into(), self.dir.path().join(name(index)).into()]);
        let log = self.dir.path().join(format!("{}.log", name(index)));
        let process = Process::spawn(member.host.as_ref(), &PathBuf::from(PROGRAM), &args, &[], &log)?;
        self.members[index].process = Some(process);
        Ok(())
    }

    /// Kills a member as a power cut would.
    ///
    /// # Errors
    /// The system refuses.
    pub fn kill_member(&mut self, index: usize) -> Result<()> {
        match self.members[index].process.take() {
            Some(mut process) => process.kill(),
            None => Ok(()),
        }
    }

    /// A member's process, if it runs.
    #[must_use]
    pub fn member(&self, index: usize) -> Option<&Process> {
        self.members[index].process.as_ref()
    }

    /// The host of a member, where there is a network.
    #[must_use]
    pub fn member_host(&self, index: usize) -> Option<&Host> {
        self.members[index].host.as_ref()
    }

    /// Which member leads, as they say themselves; `None` during an election.
    pub async fn leader(&self) -> Option<usize> {
        for (index, member) in self.members.iter().enumerate() {
            if member.process.is_none() {
                continue;
            }
            let options =
                EtcdOptions { endpoints: vec![member.client_url.clone()], ..EtcdOptions::default() };
            let asked = tokio::time::timeout(ASK, async {
                match EtcdStore::connect(options).await {
                    Ok(store) => store.is_leader().await,
                    Err(_) => false,
                }
            });
            if asked.await.unwrap_or(false) {
                return Some(index);
            }
        }
        None
    }

    /// Waits until it answers.
    ///
    /// # Errors
    /// It does not, or a member has ended.
    pub async fn until_healthy(&mut self) -> Result<()> {
        for index in 0..self.members.len() {
            if let Some(process) = &mut self.members[index].process {
                let ended = process.ended()?;
                ensure!(ended.is_none(), "etcd member {index} ended: {ended:?}: {}", process.log_tail());
            }
        }
        let endpoints = self.endpoints();
        until("etcd to answer", async || {
            let options = EtcdOptions { endpoints: endpoints.clone(), ..EtcdOptions::default() };
            let health = EtcdStore::connect(options).await?.health().await?;
            let missing =
                |warning: &String| warning.contains("does not answer") || warning.contains("no leader");
            Ok((!health.warnings.iter().any(missing)).then_some(()))
        })
        .await
    }
}

impl Member {
    fn prepare(network: Option<&Network>) -> Result<(Self, [Option<TcpListener>; 2])> {
        let host = network.map(Network::add_host).transpose()?;
        if let Some(host) = host {
            let url = |port| format!("http://{}:{port}", host.ip());
            let (client_url, peer_url) = (url(PORTS.0), url(PORTS.1));
            return Ok((Self { process: None, host: Some(host), client_url, peer_url }, [None, None]));
        }
        let held = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
        let urls: Vec<_> = held
            .iter()
            .map(|listener| Ok(format!("http://{}", listener.local_addr().context("a bound port")?)))
            .collect::<Result<_>>()?;
        let [client_url, peer_url] = <[String; 2]>::try_from(urls).ok().context("two ports")?;
        let [first, second] = held;
        Ok((Self { process: None, host: None, client_url, peer_url }, [Some(first), Some(second)]))
    }
}
