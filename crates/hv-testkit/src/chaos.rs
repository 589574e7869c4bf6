//! Whole-process chaos: real servers, agents and etcd members under load, while they are killed, frozen and cut off.
//!
//! # Theory of operation
//! A [`World`] is a cluster of processes: etcd members, servers and agents with the fake driver, each on a host of its own
//! where network namespaces can be made. A [`Load`] asks for creates, stops, starts and deletes, each with a request key and
//! through any server, again and again until it has an answer. Meanwhile [`Fault`]s drawn from a seed are done and
//! undone, one at a time. When all is mended, [`check`] holds what was acknowledged against what the API says and against
//! what the nodes' own files say: nothing acknowledged is lost, each key has one effect, every instance is settled, no
//! instance ever ran on two nodes at once, no node ever ran more than it has.
//!
//! The seed fixes which faults come in which order and for how long; the processes' timing is not repeatable. What is
//! repeatable is simulated instead.

mod check;
mod dice;
mod faults;
mod load;
mod run;
mod scenarios;
mod shim;
mod truth;
mod world;

pub use check::{Verdict, check};
pub use dice::Dice;
pub use faults::{Fault, Weather};
pub use load::{Answered, Book, Load, LoadOptions, Record};
pub use run::{Run, storm};
pub use scenarios::{CutRound, EtcdStorm, LeaderRound, etcd_storm, leader_killed, node_cut_off};
pub use shim::Shim;
pub use truth::{Truth, Violation};
pub use world::{World, WorldOptions};
