//! What systemd is told of the programs: a socket stands in for it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hv_testkit::{AgentOptions, Cluster, ClusterOptions, Process};
use tokio::net::UnixDatagram;
use tokio::time::timeout;

/// The time after which systemd would take the program for dead.
const WATCHDOG: Duration = Duration::from_secs(2);
/// The longest that a test waits for a message.
const PATIENCE: Duration = Duration::from_secs(60);

/// The socket, and the variables that lead to it.
struct Manager {
    socket: UnixDatagram,
    env: [(&'static str, String); 2],
    _dir: tempfile::TempDir,
}

impl Manager {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        let env = [
            ("NOTIFY_SOCKET", path.display().to_string()),
            ("WATCHDOG_USEC", WATCHDOG.as_micros().to_string()),
        ];
        Ok(Self { socket, env, _dir: dir })
    }

    async fn message(&self) -> Result<String> {
        let mut buffer = [0; 256];
        let length = self.socket.recv(&mut buffer).await?;
        Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
    }

    async fn next(&self) -> Result<String> {
        timeout(PATIENCE, self.message()).await.context("nothing is said")?
    }

    async fn expect(&self, expected: &str) -> Result<()> {
        let said = self.next().await?;
        ensure!(said == expected, "{expected} was to be said, not {said}");
        Ok(())
    }

    /// Follows a program from its start to its end.
    async fn follow(&self, process: &mut Process) -> Result<()> {
        self.expect("READY=1").await?;
        self.expect("WATCHDOG=1").await?;
        self.expect("WATCHDOG=1").await?;
        // One that hangs says nothing. What it said before it was stopped is read first.
        process.freeze()?;
        while timeout(WATCHDOG, self.message()).await.is_ok() {}
        process.thaw()?;
        self.expect("WATCHDOG=1").await?;
        process.terminate().await?;
        while self.next().await? != "STOPPING=1" {}
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_tells_systemd_that_it_serves_and_lives_and_stops() -> Result<()> {
    let manager = Manager::new()?;
    let mut cluster = Cluster::start_with(ClusterOptions::default(), &manager.env).await?;
    manager.follow(cluster.server().context("it runs")?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_tells_systemd_that_it_serves_and_lives_and_stops() -> Result<()> {
    let manager = Manager::new()?;
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let options = AgentOptions { drivers: vec!["fake"], ..AgentOptions::default() };
    let agent = cluster.add_agent_with(options, &manager.env).await?;
    manager.follow(cluster.agent(agent).context("it runs")?).await
}
