//! Placement, without I/O and without a clock: a fleet of nodes and what is bound to them, and for each ask a node, or
//! how many nodes each rule rejected.
//!
//! # Theory of operation
//! A [`Fleet`] is told of nodes ([`NodeView`]) and bindings change by change. An [`Ask`] is what one instance wants. Every
//! node passes through the rules in the order of [`Rule`]; the first that rejects it is the one that is counted, so that
//! the counts add up to the number of nodes. Of the nodes that are left those with the fewest soft taints come first, then
//! those that meet the most preferences, then the [`Strategy`] ranks; chance decides among the near-best: it keeps two
//! schedulers from choosing alike, and a bad node from getting everything.
//!
//! No decision does that row by row. What makes it fast is that three things are kept apart:
//!
//! | what | depends on | kept as | changes with |
//! |---|---|---|---|
//! | fixed rules: liveness, type, place, labels, taints, image | class of node, shape of ask | one verdict for each group of equal nodes, remembered for each shape | a class of node that was not there before |
//! | room and fullness | what is bound | a lattice for each group: nodes by free cores and memory, as bit masks | each binding: one node, one cell |
//! | rules about other instances | what is bound where | counts by node, zone and region, for the rules that are asked | each binding, where such rules are |
//!
//! So a decision costs groups times occupied rows of their lattices, not nodes, and a change costs what it changes. A
//! decision that fails costs cells, or nodes where rules tell the nodes of a group apart. Nodes are scored one by one only
//! where preferences tell nodes of one group apart and none meets them all, or where few nodes come into question anyway.
//!
//! # Invariants
//! - What is placed has room, and meets every required rule; so does everything bound before, as far as it keeps others
//!   away.
//! - Its score is at most [`NEAR`] below the best.
//! - The rejections of a failed placement sum to the number of nodes.
//! - Answers depend on the nodes and bindings that were told, not on how it came to them.
//! - Memory is that of the nodes, of what is bound, and of at most 512 shapes and 256 queries about other instances.
//!
//! The first four are property tests against a reference that remembers nothing (`tests/it`).

mod ask;
mod choose;
mod columns;
mod counts;
mod explanation;
mod fleet;
mod groups;
mod hash;
mod lattice;
mod node;
mod others;
mod preemption;
mod rejection;
mod rules;
mod score;
mod shapes;
mod slab;
mod strategy;
mod view;

pub use ask::{Ask, order};
pub use explanation::{Explanation, MAX_BEST, MAX_EXAMPLES, Rejected, Remedy, Scored};
pub use fleet::{Fleet, NodeIndex, Placed};
pub use node::{Images, NodeView};
pub use preemption::{MAX_VICTIMS, Preemption};
pub use rejection::{Rejections, Rule};
pub use score::{NEAR, PREFERENCE, SOFT_TAINT, Score, fullness};
pub use strategy::Strategy;
