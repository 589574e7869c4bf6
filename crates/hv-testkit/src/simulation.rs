//! Whole clusters in one process under a made-up clock, network, disk and store: the real servers and agents, random
//! histories drawn from a seed, and the invariants held against every step.
//!
//! # Theory of operation
//! Each process of the cluster is a tokio runtime of its own on one and the same thread, with a paused clock that the
//! world moves in small steps, each at its own rate. Killing a process is dropping its runtime. Below the servers is
//! [`SimStore`]; between clients, servers and agents go the real messages over a network that delays, cuts and resets;
//! nodes have the fake driver and real journals. Randomness and wall clocks come from the seed (see `entropy`), so one
//! seed is one history, whatever machine it runs on.
//!
//! A history begins with an empty cluster, has some seconds of asks and faults, and ends with a quiet time in which
//! everything must settle.

mod checker;
mod core;
mod driver;
mod entropy;
mod history;
mod host;
mod meddler;
mod network;
mod planted;
mod run;
mod store;
mod users;
mod world;

pub use history::Violation;
pub use planted::Bug;
pub use run::{Outcome, Started, run, run_all, start};
pub use store::SimStore;
