//! A node under test: a state directory, and an agent over it that can be stopped, killed and started again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hv_client::{AgentClient, ClientOptions, Clients, channel};
use hv_config::HumanDuration;
use hv_driver_fake::{FakeDriver, FakeOptions, LedgerEvent, read_ledger};
use hv_telemetry::Shutdown;
use hypervisor_agent::config::Config;
use hypervisor_agent::{Agent, AgentError, DriverSet, Tuning};
use tokio::runtime::Runtime;

use crate::control::Control;

/// How long a condition may take to become true.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a condition is tried.
const TRY_EVERY: Duration = Duration::from_millis(10);

/// Waits until there is something.
pub(crate) async fn eventually<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let search = async {
        loop {
            if let Some(found) = find() {
                return found;
            }
            tokio::time::sleep(TRY_EVERY).await;
        }
    };
    tokio::time::timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// A node.
pub(crate) struct Node {
    dir: tempfile::TempDir,
    server: String,
    pub(crate) config: Config,
    pub(crate) tuning: Tuning,
    running: Option<Running>,
}

struct Running {
    // The agent has a runtime of its own, so that it can be dropped at any await, as a kill would.
    runtime: Runtime,
    shutdown: Shutdown,
    agent: Agent,
    driver: Arc<FakeDriver>,
}

impl Node {
    /// A node without an agent.
    pub(crate) fn new(control: &Control) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.agent.state_dir = dir.path().join("state");
        config.agent.grpc_address = "127.0.0.1:0".parse().unwrap();
        config.agent.http_address = "127.0.0.1:0".parse().unwrap();
        config.agent.labels.insert("disk".into(), "ssd".into());
        config.heartbeat.retry_interval = HumanDuration::from_millis(20);
        config.heartbeat.timeout = HumanDuration::from_secs(2);
        let tuning = Tuning {
            attempts: 3,
            retry_base: Duration::from_millis(20),
            retry_max: Duration::from_millis(100),
            look_every: Duration::from_millis(200),
            inventory_every: Duration::from_millis(200),
            look_deadline: Duration::from_secs(2),
            create_deadline: Duration::from_secs(10),
            step_deadline: Duration::from_secs(10),
            ..Tuning::default()
        };
        Self { dir, server: control.address.to_string(), config, tuning, running: None }
    }

    /// This control plane may be dialled as well.
    pub(crate) fn also(&mut self, control: &Control) {
        self.server = format!("{}, {}", self.server, control.address);
    }

    /// A node whose agent runs.
    pub(crate) async fn started(control: &Control) -> Self {
        let mut node = Self::new(control);
        node.start().await;
        node
    }

    /// Where the fake driver keeps what it "runs".
    pub(crate) fn fake_dir(&self) -> PathBuf {
        self.dir.path().join("fake")
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.config.agent.state_dir
    }

    /// A second driver over the same state, as another process would have it.
    pub(crate) fn other_driver(&self) -> FakeDriver {
        FakeDriver::new(FakeOptions { state_dir: self.fake_dir(), ..FakeOptions::default() })
    }

    /// While no agent runs, a guest powers off, if it runs.
    pub(crate) fn driver_less_end(&self, id: &str) {
        self.other_driver().end_guest(&id.parse().unwrap(), hv_driver::Exit::Finished).unwrap();
    }

    /// Tries to start the agent.
    pub(crate) async fn try_start(&mut self) -> Result<(), AgentError> {
        self.config.agent.server_addr = self.server.clone();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let shutdown = Shutdown::new();
        let driver = Arc::new(self.other_driver());
        let drivers = DriverSet::new(vec![driver.clone()]);
        let starting =
            hypervisor_agent::start_with(self.config.clone(), drivers, self.tuning.clone(), shutdown.clone());
        match runtime.spawn(starting).await.unwrap() {
            Ok(agent) => {
                self.running = Some(Running { runtime, shutdown, agent, driver });
                Ok(())
            }
            Err(error) => {
                runtime.shutdown_background();
                Err(error)
            }
        }
    }

    /// Starts the agent; after a kill as soon as the lock is free.
    pub(crate) async fn start(&mut self) {
        let tries = async {
            while let Err(error) = self.try_start().await {
                assert!(error.to_string().contains("another agent"), "{error}");
                tokio::time::sleep(TRY_EVERY).await;
            }
        };
        tokio::time::timeout(PATIENCE, tries).await.expect("the agent starts");
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("the agent runs")
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.running().agent
    }

    /// The driver of the running agent.
    pub(crate) fn driver(&self) -> &FakeDriver {
        &self.running().driver
    }

    /// A client of the agent's own service.
    pub(crate) fn client(&self) -> AgentClient {
        let options = ClientOptions::new(self.agent().grpc.to_string());
        Clients::new(channel(&options).unwrap()).agent()
    }

    /// Stops the agent as a signal does.
    pub(crate) async fn stop(&mut self) {
        let running = self.running.take().expect("the agent runs");
        running.shutdown.trigger();
        running.shutdown.wait(PATIENCE).await.unwrap();
        running.runtime.shutdown_background();
    }

    /// Stops the agent at whatever it awaits, as a kill does.
    pub(crate) fn kill(&mut self) {
        self.running.take().expect("the agent runs").runtime.shutdown_background();
    }

    /// How often something ever happened to an instance.
    pub(crate) fn count(&self, id: &str, what: LedgerEvent) -> usize {
        let ledger = read_ledger(&self.fake_dir()).unwrap();
        ledger.iter().filter(|entry| entry.id.as_str() == id && entry.what == what).count()
    }

    /// Whether the fake driver has nothing.
    pub(crate) fn driver_list_is_empty(&self) -> bool {
        futures::executor::block_on(hv_driver::Driver::list(self.driver())).unwrap().is_empty()
    }

    /// The instances that the journal remembers.
    pub(crate) fn journalled(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.state_dir().join("journal/instances")).unwrap();
        let mut names: Vec<_> =
            files.map(|f| f.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.runtime.shutdown_background();
        }
    }
}
