//! What a node's score is made of.
//!
//! # Theory of operation
//! Of the nodes that fit, those with the fewest soft taints come first, then those that meet the most preferences, then
//! those that the [`Strategy`] likes, where having the image counts for something. One number says so: a preference weighs
//! more than fullness and image together can, a soft taint more than all preferences together.

use hv_types::Resources;

use crate::Strategy;

/// Scores this close to the best are equal, and chance decides; in parts of a node's capacity.
pub const NEAR: f64 = 0.02;
/// What a preference that is met adds: more than fullness, which is between 0 and 1, can make up for.
pub const PREFERENCE: f64 = 2.0;
/// What a soft taint that is not tolerated takes: more than all preferences, at most 32, can make up for.
pub const SOFT_TAINT: f64 = 100.0;

/// What it takes that the image must be fetched first: as much as half a node's fullness, so that images stay where they are
/// used and yet a full node is not filled further for the sake of a download.
pub(crate) const FETCH: f64 = 0.5;

/// What speaks for a node, and against it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// How full it would be, 0 to 1: the mean of cores and memory, as far as it has them.
    pub fullness: f64,
    /// How many preferences (soft rules) it meets.
    pub preferences_met: u32,
    /// How many preferences there are.
    pub preferences: u32,
    /// How many of its soft taints are not tolerated.
    pub soft_taints: u32,
    /// Whether it would have to fetch the image first.
    pub must_fetch: bool,
}

impl Score {
    /// Higher is better.
    #[must_use]
    pub fn value(self, strategy: Strategy) -> f64 {
        let fullness = match strategy {
            Strategy::BinPack => self.fullness,
            Strategy::Spread => -self.fullness,
        };
        let fetch = if self.must_fetch { FETCH } else { 0.0 };
        fullness + PREFERENCE * f64::from(self.preferences_met)
            - SOFT_TAINT * f64::from(self.soft_taints)
            - fetch
    }
}

/// How full a node with `schedulable` would be if `need` were taken from what is `free`: the mean of cores and memory, as
/// far as it has them. A node that has promised more than it has counts as full.
#[must_use]
pub fn fullness(schedulable: Resources, free: Resources, need: Resources) -> f64 {
    let part = |has: f64, free: f64, need: f64| (has > 0.0).then(|| (has - free + need) / has);
    let parts = [
        part(f64::from(schedulable.cpu_cores), f64::from(free.cpu_cores), f64::from(need.cpu_cores)),
        part(schedulable.memory_bytes as f64, free.memory_bytes as f64, need.memory_bytes as f64),
    ];
    let known = parts.iter().flatten().count().max(1);
    parts.iter().flatten().sum::<f64>() / known as f64
}
