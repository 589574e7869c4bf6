//! What users ask for and what goes wrong, as the seed has it; and how all of that ends.

use std::time::Duration;

use hv_driver::Exit;
use hv_telemetry::crash::Point;
use rand::Rng;

use super::{MOST_INSTANCES, NODE_TTL, World, pick};
use crate::simulation::checker::node_id;
use crate::simulation::driver::Moods;
use crate::simulation::users::{Ask, AskNode};

impl World {
    /// One second's worth of asks and faults.
    pub(super) fn act(&mut self) {
        let mut asks = self.temper.asks;
        while asks > 0.0 {
            if self.rng.random_bool(asks.min(1.0)) {
                // Several at once, now and then, and then often of the same thing.
                let (times, focus) = (*pick(&mut self.rng, &[1, 1, 1, 3, 5]), self.rng.random_range(0..100));
                (0..times).for_each(|_| self.ask(focus));
            }
            asks -= 1.0;
        }
        if self.rng.random_bool(self.temper.faults) {
            self.go_wrong();
        }
    }

    fn some_servers(&mut self) -> Vec<usize> {
        let count = *pick(&mut self.rng, &[1, 1, 1, 2, 3]);
        (0..count).map(|_| self.rng.random_range(0..self.servers.len())).collect()
    }

    fn ask(&mut self, focus: usize) {
        let users = self.users.clone();
        let servers = self.some_servers();
        let known = users.known.lock().clone();
        let creates = known.is_empty() || self.rng.random_bool(0.35);
        if creates && self.made < MOST_INSTANCES {
            let (name, cores) = (format!("i{}", self.made), self.rng.random_range(1..=3));
            let failover = self.rng.random_bool(0.5);
            self.made += 1;
            self.history.note(format_args!("users create {name} with {cores} cores through {servers:?}"));
            self.users_host.enter(|| {
                tokio::spawn(users.create(name, cores, failover, servers));
            });
        } else if self.rng.random_bool(0.2) {
            let node = self.rng.random_range(0..self.nodes.len());
            let ask = *pick(
                &mut self.rng,
                &[AskNode::Cordon, AskNode::Drain, AskNode::Uncordon, AskNode::Uncordon],
            );
            self.history.note(format_args!("users ask {ask:?} of node {node}"));
            self.users_host.enter(|| {
                tokio::spawn(users.ask_node(node_id(node).to_string(), ask, servers[0]));
            });
        } else if !known.is_empty() {
            let which = if self.rng.random_bool(0.7) { focus } else { self.rng.random_range(0..100) };
            let (id, name) = known[which % known.len()].clone();
            let force = self.rng.random_bool(0.1);
            let asks = [
                Ask::Start,
                Ask::Stop,
                Ask::Restart,
                Ask::Pause,
                Ask::Resume,
                Ask::Stop,
                Ask::Delete { force },
            ];
            let ask = *pick(&mut self.rng, &asks);
            self.asked += 1;
            let key = format!("ask-{}", self.asked);
            self.history.note(format_args!("users ask {ask:?} of {name} with {key} through {servers:?}"));
            self.users_host.enter(|| {
                tokio::spawn(users.ask(id, ask, key, servers));
            });
        }
    }

    fn go_wrong(&mut self) {
        let server = self.rng.random_range(0..self.servers.len());
        let node = self.rng.random_range(0..self.nodes.len());
        let history = self.history.clone();
        match self.rng.random_range(0..17) {
            0 if self.servers[server].host.is_some() => {
                history.note(format_args!("server {server} is killed"));
                self.kill_server(server);
            }
            1 | 2 if self.nodes[node].host.is_some() && self.has_fencer(node) => {
                history.note(format_args!("agent {node} is killed"));
                self.kill_agent(node);
            }
            3 => self.power_off(node),
            4 => {
                let to_server = self.rng.random_bool(0.5);
                history.note(format_args!(
                    "node {node} and server {server} are cut, to the server: {to_server}"
                ));
                self.network.cut(node, server, to_server);
            }
            5 => {
                history.note(format_args!("node {node} is cut off"));
                for server in 0..self.servers.len() {
                    self.network.cut(node, server, true);
                    self.network.cut(node, server, false);
                }
            }
            6 | 7 => {
                history.note(format_args!("all cuts heal"));
                self.heal();
            }
            8 => {
                history.note(format_args!("server {server} is cut from the store"));
                if let Some(valve) = &self.servers[server].valve {
                    valve.change(|trouble| trouble.cut = true);
                }
            }
            9 => {
                history.note(format_args!("the watches of server {server} break"));
                if let Some(valve) = &self.servers[server].valve {
                    valve.change(|trouble| trouble.breaks += 1);
                }
            }
            10 => self.compact(),
            11 => self.doom(server, node),
            12 => {
                let by = self.rng.random_range(-30_000..30_000);
                history.note(format_args!("the wall clock of node {node} jumps by {by} ms"));
                self.nodes[node].wall_offset_ms += by;
                if let Some(host) = &mut self.nodes[node].host {
                    host.jump_wall(by);
                }
            }
            13 => self.end_a_guest(node),
            14 => self.kill_fencer(node),
            15 | 16 => {
                let until = self.now + Duration::from_millis(self.rng.random_range(500..12_000));
                if self.rng.random_bool(0.6) && self.has_fencer(node) {
                    history.note(format_args!("agent {node} is held for a while"));
                    self.nodes[node].frozen_until = Some(until);
                } else {
                    history.note(format_args!("server {server} is held for a while"));
                    self.servers[server].frozen_until = Some(until);
                }
            }
            _ => {}
        }
    }

    /// Kills the fencer of an agent that works. Both failing within one lease is beyond what fencing promises.
    fn kill_fencer(&mut self, number: usize) {
        let now = self.now;
        let node = &mut self.nodes[number];
        let is_well = node.host.is_some() && node.frozen_until.is_none() && !node.is_doomed;
        if is_well {
            self.history.note(format_args!("the fencer of node {number} dies"));
            node.fencer.crash();
            node.fencer_back_at = now + NODE_TTL;
        }
    }

    /// Whether the fencer has been there long enough to know all.
    fn has_fencer(&self, node: usize) -> bool {
        self.nodes[node].fencer_back_at <= self.now
    }

    fn compact(&mut self) {
        let mut core = self.store.core.lock();
        let revision = core.revision();
        self.history.note(format_args!("the store is compacted at {revision}"));
        core.compact(revision).expect("a revision that there is");
    }

    fn doom(&mut self, server: usize, node: usize) {
        let point = *pick(&mut self.rng, Point::ALL);
        let nth = self.rng.random_range(0..3);
        let host = match point.name().split('.').next() {
            Some("server") => self.servers[server].host.as_ref(),
            Some("agent") if self.has_fencer(node) => self.nodes[node].host.as_ref(),
            _ => None,
        };
        if let Some(host) = host {
            self.history.note(format_args!("server {server} or agent {node} is to die at {point} ({nth})"));
            host.life.doom(point, nth);
            self.nodes[node].is_doomed |= point.name().starts_with("agent.");
        }
    }

    fn end_a_guest(&mut self, node: usize) {
        let Some(driver) = self.nodes[node].driver.clone() else { return };
        let truth = self.nodes[node].machines.truth.lock();
        let running: Vec<_> =
            truth.runs.iter().filter(|(_, on)| on.contains(&node)).map(|(id, _)| id.clone()).collect();
        drop(truth);
        if running.is_empty() {
            return;
        }
        let id = pick(&mut self.rng, &running).clone();
        let exit =
            if self.rng.random_bool(0.5) { Exit::Finished } else { Exit::Failed("exit code 3".into()) };
        self.history.note(format_args!("the guest {id} on node {node} ends by itself"));
        if let Some(host) = &self.nodes[node].host {
            host.enter(|| drop(driver.inner.end_guest(&id, exit)));
        }
        self.nodes[node].machines.refresh(&id);
    }

    pub(super) fn heal(&mut self) {
        self.network.heal();
        for server in &self.servers {
            if let Some(valve) = &server.valve {
                valve.change(|trouble| trouble.cut = false);
            }
        }
    }

    /// Nothing goes wrong from now on.
    pub(super) fn calm_down(&mut self) {
        self.history.note(format_args!("quiet"));
        self.is_quiet = true;
        self.heal();
        let soon = self.now + Duration::from_millis(500);
        for server in &mut self.servers {
            server.back_at = server.back_at.map(|at| at.min(soon));
            server.frozen_until = server.frozen_until.map(|at| at.min(soon));
            if let Some(host) = &server.host {
                host.life.spare();
            }
            if let Some(valve) = &server.valve {
                valve.change(|trouble| {
                    trouble.fails = (0.0, 0.0);
                    trouble.delay_ms = trouble.delay_ms.min(10);
                });
            }
        }
        for node in &mut self.nodes {
            node.back_at = node.back_at.map(|at| at.min(soon));
            node.frozen_until = node.frozen_until.map(|at| at.min(soon));
            if let Some(host) = &node.host {
                host.life.spare();
            }
            *node.machines.moods.lock() = Moods::default();
        }
    }
}
