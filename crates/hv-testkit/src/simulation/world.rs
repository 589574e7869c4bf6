//! One history: a cluster drawn from the seed, what users ask and what goes wrong, then a quiet time in which everything
//! must settle.

mod mischief;
mod processes;

use std::sync::Arc;
use std::time::Duration;

use hv_client::Clients;
use hypervisor_agent::fencing::local::LocalFencer;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use self::processes::fencer;
use super::checker::Checker;
use super::driver::{Machines, Moods, SimDriver, Truth};
use super::history::History;
use super::host::{Host, Life};
use super::meddler::Meddler;
use super::network::{Network, Route};
use super::planted::{Bug, Planted};
use super::store::{Shared, Valve};
use super::users::Users;

/// How far the clocks of two processes drift apart at most, in parts per million of the true rate.
const DRIFT_PPM: u64 = 20_000;
/// How long everything may take to settle once nothing goes wrong any more.
const SETTLE: Duration = Duration::from_secs(120);
/// How often it is looked whether everything has settled.
const SETTLE_LOOK: Duration = Duration::from_secs(1);
/// How often in a row it must be so.
const SETTLED_LOOKS: u32 = 2;
/// Most instances of a history.
const MOST_INSTANCES: usize = 8;
const HEARTBEAT: Duration = Duration::from_secs(1);
const NODE_TTL: Duration = Duration::from_secs(4);
const LEADER_TTL: Duration = Duration::from_secs(2);
const GRACE: Duration = Duration::from_secs(1);

struct Node {
    host: Option<Host>,
    machines: Machines,
    driver: Option<Arc<SimDriver>>,
    fencer: Arc<LocalFencer>,
    fencer_host: Host,
    /// The agent that runs now, for the fencer to end.
    agent: Arc<Mutex<Option<Arc<Life>>>>,
    frozen_until: Option<Duration>,
    /// It is to die at a crash point.
    is_doomed: bool,
    /// When a fencer that died has surely been replaced and told everything.
    fencer_back_at: Duration,
    cores: u32,
    rate_ppm: u64,
    wall_offset_ms: i64,
    boot: u32,
    back_at: Option<Duration>,
}

struct Server {
    host: Option<Host>,
    valve: Option<Valve>,
    rate_ppm: u64,
    wall_offset_ms: i64,
    back_at: Option<Duration>,
    frozen_until: Option<Duration>,
}

/// How wild a history is.
#[derive(Clone, Debug)]
struct Temper {
    /// How likely a second has an action of users, and a fault.
    asks: f64,
    faults: f64,
    tick_ms: (u64, u64),
    store_delay_ms: u64,
    store_fails: (f64, f64),
    moods: Moods,
}

pub(crate) struct World {
    rng: StdRng,
    now: Duration,
    history: History,
    store: Shared,
    network: Network,
    servers: Vec<Server>,
    nodes: Vec<Node>,
    users_host: Host,
    users: Users,
    checker: Checker,
    temper: Temper,
    planted: Planted,
    made: usize,
    asked: u64,
    is_quiet: bool,
}

impl World {
    pub(crate) fn new(seed: u64, bug: Option<Bug>, dir: &std::path::Path, history: History) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let (servers, nodes) = (rng.random_range(1..=3), rng.random_range(1..=3));
        let calm = rng.random_bool(0.2);
        let temper = Temper {
            asks: rng.random_range(0.3..2.0),
            faults: if calm { 0.02 } else { rng.random_range(0.1..0.8) },
            tick_ms: *pick(&mut rng, &[(5, 20), (10, 40), (20, 60)]),
            store_delay_ms: *pick(&mut rng, &[0, 3, 10, 40]),
            store_fails: *pick(&mut rng, &[(0.0, 0.0), (0.0, 0.0), (0.01, 0.01), (0.05, 0.05)]),
            moods: Moods {
                delay_ms: *pick(&mut rng, &[0, 20, 300, 1500]),
                fails: *pick(&mut rng, &[0.0, 0.0, 0.1, 0.3]),
                fails_late: *pick(&mut rng, &[0.0, 0.0, 0.1]),
                hangs: *pick(&mut rng, &[0.0, 0.0, 0.02]),
            },
        };
        history.note(format_args!("seed {seed}: {servers} servers, {nodes} nodes, {temper:?}"));
        let truth: Arc<Mutex<Truth>> = Arc::default();
        let checker = Checker::new(history.clone(), truth.clone());
        let (store, planted) = (Shared::new(), Planted(bug));
        store.core.lock().is_hasty = planted.is(Bug::HastyLease);
        let meddler = Meddler { planted: planted.clone() };
        let network = Network::new(servers, *pick(&mut rng, &[0, 5, 50]), rng.random(), meddler);
        let clients =
            (0..servers).map(|server| Clients::new(network.wire(usize::MAX, Route::To(server)))).collect();
        let users = Users {
            clients: Arc::new(clients),
            asked: checker.asked.clone(),
            history: history.clone(),
            known: Arc::default(),
            waiting: Arc::default(),
        };
        let nodes = (0..nodes)
            .map(|node| {
                let rate_ppm = drift(&mut rng);
                let agent: Arc<Mutex<Option<Arc<Life>>>> = Arc::default();
                let (fencer, fencer_host) = fencer(Duration::ZERO, rate_ppm, bug, agent.clone());
                Node {
                    host: None,
                    fencer,
                    fencer_host,
                    agent,
                    frozen_until: None,
                    is_doomed: false,
                    fencer_back_at: Duration::ZERO,
                    machines: Machines {
                        node,
                        dir: dir.join(format!("node-{node}/fake")),
                        truth: truth.clone(),
                        history: history.clone(),
                        moods: Arc::new(Mutex::new(temper.moods.clone())),
                    },
                    driver: None,
                    cores: rng.random_range(2..=6),
                    rate_ppm,
                    wall_offset_ms: rng.random_range(-5000..5000),
                    boot: 0,
                    back_at: Some(Duration::ZERO),
                }
            })
            .collect();
        let servers = (0..servers)
            .map(|_| Server {
                host: None,
                valve: None,
                rate_ppm: drift(&mut rng),
                wall_offset_ms: rng.random_range(-5000..5000),
                back_at: Some(Duration::ZERO),
                frozen_until: None,
            })
            .collect();
        Self {
            rng,
            now: Duration::ZERO,
            history,
            store,
            network,
            servers,
            nodes,
            users_host: Host::new(Duration::ZERO, 1_000_000, 0),
            users,
            checker,
            temper,
            planted,
            made: 0,
            asked: 0,
            is_quiet: false,
        }
    }

    /// Lives through the history.
    pub(crate) fn run(&mut self) {
        let wild = Duration::from_millis(self.rng.random_range(8_000..25_000));
        let mut next_second = Duration::from_secs(3);
        while self.now < wild && !self.history.is_broken() {
            self.step();
            if self.now >= next_second {
                next_second += Duration::from_secs(1);
                self.act();
            }
        }
        self.calm_down();
        let (until, mut next_look, mut settled) = (self.now + SETTLE, self.now, 0);
        while !self.history.is_broken() {
            self.step();
            if self.now < next_look {
                continue;
            }
            next_look = self.now + SETTLE_LOOK;
            let mut open = self.checker.unsettled(self.nodes.len());
            if self.users.are_waiting() {
                open.push("a user waits for an answer".into());
            }
            settled = if open.is_empty() { settled + 1 } else { 0 };
            if settled == SETTLED_LOOKS {
                break;
            }
            if self.now >= until {
                self.history
                    .violation(5, format_args!("after {} s of quiet: {}", SETTLE.as_secs(), open.join("; ")));
            }
        }
        if !self.history.is_broken() {
            self.compare_lists();
        }
        let largest = self.network.largest_message();
        if largest > hv_proto::MAX_MESSAGE_BYTES {
            self.history.violation(7, format_args!("a message had {largest} bytes"));
        }
    }

    fn step(&mut self) {
        let tick = if self.is_quiet {
            Duration::from_millis(self.rng.random_range(50..100))
        } else {
            Duration::from_millis(self.rng.random_range(self.temper.tick_ms.0..=self.temper.tick_ms.1))
        };
        self.now += tick;
        self.history.set_now(self.now);
        self.store.advance(self.now);
        self.restart_what_is_due();
        let (servers, nodes) = (self.servers.len(), self.nodes.len());
        let mut order: Vec<usize> = (0..=servers + nodes).collect();
        order.shuffle(&mut self.rng);
        for which in order {
            let now = self.now;
            if which < servers {
                if !self.has_thawed(which) {
                    continue;
                }
                if let Some(host) = &mut self.servers[which].host
                    && !host.run_until(now)
                {
                    self.history.note(format_args!("server {which} dies at a crash point"));
                    self.kill_server(which);
                }
            } else if which < servers + nodes {
                self.run_node(which - servers);
            } else {
                self.users_host.run_until(now);
            }
            // After each process: what one does next may not hide what another one did wrong.
            self.checker.look(&mut self.store.core.lock());
        }
    }

    /// What each server shows is what the store has.
    fn compare_lists(&mut self) {
        let lists: Arc<Mutex<Vec<Option<Vec<String>>>>> =
            Arc::new(Mutex::new(vec![None; self.servers.len()]));
        for server in 0..self.servers.len() {
            let (users, lists) = (self.users.clone(), lists.clone());
            self.users_host.enter(|| {
                tokio::spawn(async move {
                    for _ in 0..10 {
                        if let Ok(found) = users.clone().list(server).await {
                            lists.lock()[server] = Some(found.into_iter().map(|(id, _)| id).collect());
                            return;
                        }
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                });
            });
        }
        let until = self.now + Duration::from_secs(20);
        while self.now < until && lists.lock().iter().any(Option::is_none) {
            self.step();
        }
        let there: Vec<String> = self.checker.instances.keys().map(ToString::to_string).collect();
        for (server, list) in lists.lock().iter().enumerate() {
            match list {
                None => self.history.violation(5, format_args!("server {server} does not list instances")),
                Some(list) if *list != there => self
                    .history
                    .violation(3, format_args!("server {server} shows {list:?}, and there are {there:?}")),
                Some(_) => {}
            }
        }
    }
}

fn pick<'a, T>(rng: &mut StdRng, among: &'a [T]) -> &'a T {
    &among[rng.random_range(0..among.len())]
}

fn drift(rng: &mut StdRng) -> u64 {
    rng.random_range(1_000_000 - DRIFT_PPM..=1_000_000 + DRIFT_PPM)
}
