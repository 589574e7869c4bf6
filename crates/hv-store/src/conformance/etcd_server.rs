//! Starts real etcd servers for tests: private directories, free ports, killed when dropped.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::time::Instant;

use super::{certificates, skip};
use crate::Store;
use crate::etcd::{EtcdOptions, EtcdStore, EtcdTls};

/// How long a cluster may take to answer after it was started.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often starting is tried: another process may take a port that was free when it was chosen.
const START_ATTEMPTS: usize = 3;
/// Fast enough for tests, slow enough for a busy machine. A lease is never shorter than 1.5 times the election.
const HEARTBEAT_MS: u64 = 100;
const ELECTION_MS: u64 = 1000;

/// Which etcd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EtcdVersion {
    /// Debian's package `etcd-server`, `/usr/bin/etcd`.
    V3_4,
    /// From the project's tools directory.
    V3_5,
}

impl EtcdVersion {
    /// What the suite is called, as `etcd 3.5`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V3_4 => "etcd 3.4",
            Self::V3_5 => "etcd 3.5",
        }
    }

    /// The program, or why there is none.
    fn program(self) -> Result<PathBuf, String> {
        let (path, remedy) = match self {
            Self::V3_4 => (PathBuf::from("/usr/bin/etcd"), "install the package etcd-server"),
            Self::V3_5 => (tools_dir().join("etcd-3.5.1/etcd"), "run hack/setup.sh tools"),
        };
        let printed = match Command::new(&path).arg("--version").output() {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => return Err(format!("{} cannot be run ({error}); {remedy}", path.display())),
        };
        let wanted = format!("etcd Version: {}.", self.name().trim_start_matches("etcd "));
        if printed.starts_with(&wanted) {
            return Ok(path);
        }
        let found = printed.lines().next().unwrap_or("something unknown");
        Err(format!("{} is {found:?}, and {} is wanted", path.display(), self.name()))
    }
}

/// Where the project's setup puts tools.
fn tools_dir() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = variable("HYPERVISOR_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("hypervisor")))
        .or_else(|| variable("HOME").map(|dir| dir.join(".cache/hypervisor")))
        .unwrap_or_default();
    cache.join("tools")
}

/// What to start.
#[derive(Clone, Copy, Debug)]
pub struct EtcdSpec {
    /// Which etcd.
    pub version: EtcdVersion,
    /// How many members.
    pub members: usize,
    /// Clients and members need certificates.
    pub tls: bool,
    /// Size at which etcd refuses writes, in bytes; etcd's default if `None`.
    pub quota_bytes: Option<u64>,
}

/// A cluster of etcd servers that ends with this value.
pub struct EtcdServer {
    spec: EtcdSpec,
    program: PathBuf,
    tls: Option<EtcdTls>,
    members: Vec<Member>,
    dir: TempDir,
}

struct Member {
    name: String,
    client_url: String,
    peer_url: String,
    process: Option<Child>,
}

impl EtcdServer {
    /// Starts one member and waits until it answers. `None`, reported by [`skip`], if this etcd is not installed.
    ///
    /// # Panics
    /// If it is installed and does not come up.
    pub async fn start(version: EtcdVersion) -> Option<Self> {
        Self::start_with(EtcdSpec { version, members: 1, tls: false, quota_bytes: None }).await
    }

    /// As [`Self::start`], with more to choose.
    ///
    /// # Panics
    /// If it is installed and does not come up.
    pub async fn start_with(spec: EtcdSpec) -> Option<Self> {
        let program = match spec.version.program() {
            Ok(program) => program,
            Err(reason) => {
                skip(spec.version.name(), &reason);
                return None;
            }
        };
        for attempt in 1..=START_ATTEMPTS {
            let mut server = Self::prepare(spec, program.clone());
            for index in 0..server.members.len() {
                server.spawn(index);
            }
            match server.ready().await {
                Ok(()) => return Some(server),
                Err(why) => eprintln!("etcd did not start, attempt {attempt}: {why}\n{}", server.logs()),
            }
        }
        panic!("etcd did not start in {START_ATTEMPTS} attempts");
    }

    fn prepare(spec: EtcdSpec, program: PathBuf) -> Self {
        let dir = TempDir::with_prefix("etcd-").expect("a temporary directory");
        let tls = spec.tls.then(|| certificates::write(dir.path()));
        let scheme = if spec.tls { "https" } else { "http" };
        // All listeners are held until all ports are chosen, so that none is chosen twice.
        let listeners: Vec<_> =
            (0..spec.members * 2).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
        let url = |index: usize| {
            let address = listeners[index].local_addr().expect("a bound port");
            format!("{scheme}://{address}")
        };
        let members = (0..spec.members).map(|index| Member {
            name: format!("member{index}"),
            client_url: url(index * 2),
            peer_url: url(index * 2 + 1),
            process: None,
        });
        Self { members: members.collect(), spec, program, tls, dir }
    }

    /// The clients' addresses, by member.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(|member| member.client_url.clone()).collect()
    }

    /// How to connect to all members.
    #[must_use]
    pub fn options(&self) -> EtcdOptions {
        EtcdOptions { endpoints: self.endpoints(), tls: self.tls.clone(), ..EtcdOptions::default() }
    }

    /// Kills a member as a power cut would.
    pub fn kill_member(&mut self, index: usize) {
        if let Some(mut process) = self.members[index].process.take() {
            // It may have ended by itself; what counts is that it is gone.
            drop(process.kill());
            drop(process.wait());
        }
    }

    /// Asks a member to end, and waits until it has.
    pub fn stop_member(&mut self, index: usize) {
        self.signal(index, rustix::process::Signal::TERM);
        if let Some(mut process) = self.members[index].process.take() {
            process.wait().expect("the member ends");
        }
    }

    /// Kills all members. etcd 3.5.1 may lose acknowledged writes by that.
    pub fn kill(&mut self) {
        for index in 0..self.members.len() {
            self.kill_member(index);
        }
    }

    /// Stops a member's process without ending it: it keeps its connections and answers nobody.
    pub fn freeze_member(&self, index: usize) {
        self.signal(index, rustix::process::Signal::STOP);
    }

    /// Lets a frozen member go on.
    pub fn thaw_member(&self, index: usize) {
        self.signal(index, rustix::process::Signal::CONT);
    }

    fn signal(&self, index: usize, signal: rustix::process::Signal) {
        let process = self.members[index].process.as_ref().expect("the member runs");
        let pid = rustix::process::Pid::from_child(process);
        rustix::process::kill_process(pid, signal).expect("the member can be signalled");
    }

    /// Starts a killed member again with its data; [`Self::wait_ready`] waits for it.
    pub fn start_member(&mut self, index: usize) {
        assert!(self.members[index].process.is_none(), "the member still runs");
        self.spawn(index);
    }

    /// Kills all members, starts them again with their data, and waits until they answer.
    ///
    /// # Panics
    /// If they do not.
    pub async fn restart(&mut self) {
        self.kill();
        for index in 0..self.members.len() {
            self.spawn(index);
        }
        self.wait_ready().await;
    }

    /// Waits until the cluster answers.
    ///
    /// # Panics
    /// If it does not.
    pub async fn wait_ready(&mut self) {
        if let Err(why) = self.ready().await {
            panic!("etcd does not answer: {why}\n{}", self.logs());
        }
    }

    /// Which member leads, as etcd says itself.
    pub async fn leader(&self) -> Option<usize> {
        for (index, member) in self.members.iter().enumerate() {
            let options = EtcdOptions { endpoints: vec![member.client_url.clone()], ..self.options() };
            if let Ok(store) = EtcdStore::connect(options).await
                && store.is_leader().await
            {
                return Some(index);
            }
        }
        None
    }

    async fn ready(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            for member in &mut self.members {
                if let Some(Ok(Some(status))) = member.process.as_mut().map(Child::try_wait) {
                    return Err(format!("{} ended with {status}", member.name));
                }
            }
            let connected = async { EtcdStore::connect(self.options()).await?.health().await };
            let why = match connected.await {
                Ok(health) => {
                    let missing = |warning: &&String| {
                        warning.contains("does not answer") || warning.contains("knows no leader")
                    };
                    match health.warnings.iter().find(missing) {
                        None => return Ok(()),
                        Some(missing) => missing.clone(),
                    }
                }
                Err(error) => error.to_string(),
            };
            if Instant::now() > deadline {
                return Err(why);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn spawn(&mut self, index: usize) {
        let cluster: Vec<_> =
            self.members.iter().map(|member| format!("{}={}", member.name, member.peer_url)).collect();
        let member = &self.members[index];
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("{}.log", member.name)))
            .expect("the log opens");
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &member.name, "--initial-cluster", &cluster.join(",")])
            .arg("--data-dir")
            .arg(self.dir.path().join(&member.name))
            .args(["--listen-client-urls", &member.client_url, "--advertise-client-urls", &member.client_url])
            .args(["--listen-peer-urls", &member.peer_url, "--initial-advertise-peer-urls", &member.peer_url])
            .args(["--heartbeat-interval", &HEARTBEAT_MS.to_string()])
            .args(["--election-timeout", &ELECTION_MS.to_string()])
            .args(["--logger", "zap", "--log-level", "warn"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log is shared"))
            .stderr(log);
        if let Some(quota_bytes) = self.spec.quota_bytes {
            command.args(["--quota-backend-bytes", &quota_bytes.to_string()]);
        }
        if let Some(tls) = &self.tls {
            for side in ["", "peer-"] {
                command
                    .arg(format!("--{side}trusted-ca-file"))
                    .arg(&tls.ca)
                    .arg(format!("--{side}cert-file"))
                    .arg(&tls.cert)
                    .arg(format!("--{side}key-file"))
                    .arg(&tls.key)
                    .arg(format!("--{side}client-cert-auth"));
            }
        }
        self.members[index].process = Some(command.spawn().expect("etcd starts"));
    }

    fn logs(&self) -> String {
        let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_default();
        self.members
            .iter()
            .map(|member| read(&self.dir.path().join(format!("{}.log", member.name))))
            .collect()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        self.kill();
    }
}
