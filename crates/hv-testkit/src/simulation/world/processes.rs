//! The processes of a history: how they are started, held, killed and brought back.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hv_client::Clients;
use hv_cluster::ClusterConfig;
use hv_driver::{Driver, Exit};
use hv_driver_fake::{FakeDriver, FakeOptions};
use hv_telemetry::Shutdown;
use hypervisor_agent::fencing::clock::SharedClock;
use hypervisor_agent::fencing::local::LocalFencer;
use hypervisor_agent::fencing::{Fencers, Seam};
use hypervisor_agent::{DriverSet, Machine, Tuning};
use parking_lot::Mutex;
use rand::Rng;

use super::{GRACE, HEARTBEAT, LEADER_TTL, NODE_TTL, World};
use crate::simulation::checker::node_id;
use crate::simulation::driver::SimDriver;
use crate::simulation::host::{Host, Life, MachineClock};
use crate::simulation::network::{Listener, Route};
use crate::simulation::planted::Bug;
use crate::simulation::store::SimStore;

impl World {
    pub(super) fn run_node(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        if !self.planted.is(Bug::IdleFencer) {
            node.fencer_host.run_until(now);
            node.machines.look_for_fenced();
        }
        let is_ended = node.host.as_ref().is_some_and(|host| host.life.is_dead());
        if is_ended {
            self.history.note(format_args!("agent {number} was ended by its fencer"));
            self.kill_agent(number);
            return;
        }
        if let Some(until) = node.frozen_until {
            if until > now {
                return;
            }
            node.frozen_until = None;
            if let Some(host) = &node.host {
                host.wake_at(now);
            }
        }
        if let Some(host) = &mut node.host {
            let lives = host.run_until(now);
            node.machines.look_for_fenced();
            if !lives {
                self.history.note(format_args!("agent {number} dies at a crash point"));
                self.kill_agent(number);
            }
        }
    }

    /// Whether a server is not held.
    pub(super) fn has_thawed(&mut self, number: usize) -> bool {
        let now = self.now;
        let server = &mut self.servers[number];
        match server.frozen_until {
            Some(until) if until > now => false,
            Some(_) => {
                server.frozen_until = None;
                if let Some(host) = &server.host {
                    host.wake_at(now);
                }
                true
            }
            None => true,
        }
    }

    pub(super) fn restart_what_is_due(&mut self) {
        for server in 0..self.servers.len() {
            if self.servers[server].back_at.is_some_and(|at| at <= self.now) {
                self.servers[server].back_at = None;
                self.start_server(server);
            }
        }
        for node in 0..self.nodes.len() {
            if self.nodes[node].back_at.is_some_and(|at| at <= self.now) {
                self.nodes[node].back_at = None;
                self.start_agent(node);
            }
        }
    }

    fn start_server(&mut self, number: usize) {
        let server = &mut self.servers[number];
        let host = Host::new(self.now, server.rate_ppm, server.wall_offset_ms);
        let (store, valve) = SimStore::new(&self.store, self.rng.random(), self.planted.clone());
        if !self.is_quiet {
            let temper = self.temper.clone();
            valve.change(|trouble| {
                trouble.delay_ms = temper.store_delay_ms;
                trouble.fails = temper.store_fails;
            });
        }
        let config = ClusterConfig {
            server_id: format!("server-{number}"),
            heartbeat_interval: HEARTBEAT,
            heartbeat_timeout: NODE_TTL,
            leader_ttl: LEADER_TTL,
            failover_grace: GRACE,
            ..ClusterConfig::default()
        };
        let (network, handle, life) = (self.network.clone(), host.handle(), host.life.clone());
        let history = self.history.clone();
        host.enter(|| {
            tokio::spawn(async move {
                let store: hv_store::SharedStore = Arc::new(store);
                let shutdown = Shutdown::new();
                loop {
                    match hypervisor_server::start_portless(store.clone(), config.clone(), &shutdown).await {
                        Ok((_cluster, routes)) => {
                            history.note(format_args!("server {number} serves"));
                            network.listen(number, Some(Listener { handle, routes, life }));
                            return std::future::pending::<()>().await;
                        }
                        // As a supervisor would.
                        Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
                    }
                }
            });
        });
        server.host = Some(host);
        server.valve = Some(valve);
    }

    fn start_agent(&mut self, number: usize) {
        let seed = self.rng.random();
        let node = &mut self.nodes[number];
        let host = Host::new(self.now, node.rate_ppm, node.wall_offset_ms);
        let options = FakeOptions { state_dir: node.machines.dir.clone(), ..FakeOptions::default() };
        let fake = Arc::new(FakeDriver::new(options));
        let driver = Arc::new(SimDriver::new(fake, node.machines.clone(), host.life.clone(), seed));
        let config = agent_config(number, node.cores, &node.machines.dir);
        let tuning = Tuning {
            attempts: 4,
            retry_base: Duration::from_millis(300),
            retry_max: Duration::from_secs(3),
            look_every: Duration::from_secs(5),
            inventory_every: Duration::from_secs(20),
            look_deadline: Duration::from_secs(3),
            fetch_deadline: Duration::from_mins(10),
            create_deadline: Duration::from_secs(8),
            step_deadline: Duration::from_secs(6),
            machine: Machine::Simulated { boot_id: format!("boot-{number}-{}", node.boot) },
            fencing: Seam {
                clock: machine_clock(self.planted.0),
                fencers: Fencers::Local(node.fencer.clone()),
            },
        };
        let clients = Clients::new(self.network.wire(number, Route::Any));
        let drivers = DriverSet::new(vec![driver.clone() as Arc<dyn Driver>]);
        let history = self.history.clone();
        host.enter(|| {
            tokio::spawn(async move {
                let shutdown = Shutdown::new();
                match hypervisor_agent::start_portless(config, drivers, tuning, clients, shutdown).await {
                    Ok(_) => history.note(format_args!("agent {number} runs")),
                    Err(error) => history.violation(
                        5,
                        format_args!("agent {number} cannot start: {}", hv_telemetry::error_chain(&error)),
                    ),
                }
                std::future::pending::<()>().await;
            });
        });
        node.driver = Some(driver);
        *node.agent.lock() = Some(host.life.clone());
        node.is_doomed = false;
        node.host = Some(host);
    }

    pub(super) fn kill_server(&mut self, number: usize) {
        self.network.listen(number, None);
        let pause = self.pause();
        let server = &mut self.servers[number];
        server.host = None;
        server.frozen_until = None;
        server.valve = None;
        server.back_at = Some(self.now + pause);
    }

    pub(super) fn kill_agent(&mut self, number: usize) {
        let pause = self.pause();
        let node = &mut self.nodes[number];
        node.host = None;
        *node.agent.lock() = None;
        node.frozen_until = None;
        node.driver = None;
        node.back_at = Some(self.now + pause);
    }

    fn pause(&mut self) -> Duration {
        let most = if self.is_quiet { 500 } else { 8_000 };
        Duration::from_millis(self.rng.random_range(10..=most))
    }

    /// All machines of a node stop, and its agent is gone.
    pub(super) fn power_off(&mut self, number: usize) {
        self.history.note(format_args!("node {number} loses its power"));
        self.kill_agent(number);
        let node = &mut self.nodes[number];
        node.boot += 1;
        (node.fencer, node.fencer_host) = fencer(self.now, node.rate_ppm, self.planted.0, node.agent.clone());
        let fake =
            FakeDriver::new(FakeOptions { state_dir: node.machines.dir.clone(), ..FakeOptions::default() });
        let there: Vec<_> = node.machines.truth.lock().exists.keys().cloned().collect();
        for id in there {
            // What cannot be read was not running.
            let _ = fake.end_guest(&id, Exit::Lost);
            node.machines.refresh(&id);
        }
    }
}

/// The clock by which a node counts its lease.
fn machine_clock(bug: Option<Bug>) -> SharedClock {
    let shown_ppm = if bug == Some(Bug::SlowClock) { 333_333 } else { 1_000_000 };
    Arc::new(MachineClock { shown_ppm })
}

/// A node's fencer, which outlives its agents.
pub(super) fn fencer(
    now: Duration,
    rate_ppm: u64,
    bug: Option<Bug>,
    agent: Arc<Mutex<Option<Arc<Life>>>>,
) -> (Arc<LocalFencer>, Host) {
    let end_agent = move || {
        if let Some(life) = &*agent.lock() {
            life.end();
        }
    };
    let fencer = LocalFencer::new(machine_clock(bug), end_agent);
    let host = Host::new(now, rate_ppm, 0);
    let task = fencer.clone().run();
    host.enter(|| drop(tokio::spawn(task)));
    (fencer, host)
}

fn agent_config(number: usize, cores: u32, fake_dir: &std::path::Path) -> hypervisor_agent::config::Config {
    let mut config = hypervisor_agent::config::Config::default();
    config.agent.node_id = Some(node_id(number).to_string());
    config.agent.hostname = Some(format!("host-{number}"));
    config.agent.ip = Some("192.0.2.1".into());
    config.agent.state_dir = fake_dir.parent().map(PathBuf::from).unwrap_or_default();
    config.agent.capacity.cpu_cores = Some(cores);
    config.agent.capacity.memory = "1GiB".parse().ok();
    config.agent.capacity.disk = "100GiB".parse().ok();
    let duration = |text: &str| text.parse().expect("a duration");
    config.heartbeat.interval = duration("1s");
    config.heartbeat.timeout = duration("1s");
    config.heartbeat.retry_interval = duration("300ms");
    config.drivers.fake.enabled = true;
    config
}
