//! Which of the nodes that fit.

use std::str::FromStr;

use hv_types::{Invalid, Resources};
use rand::Rng;

use crate::Candidate;

/// How to choose among nodes that fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The fullest: keeps whole nodes free for large instances.
    BinPack,
    /// The emptiest: a node that fails takes the least with it.
    #[default]
    Spread,
}

impl FromStr for Strategy {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match text {
            "bin-pack" => Ok(Self::BinPack),
            "spread" => Ok(Self::Spread),
            _ => Err(Invalid::new("scheduler.strategy", text, "must be `bin-pack` or `spread`")),
        }
    }
}

impl std::fmt::Display for Strategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BinPack => "bin-pack",
            Self::Spread => "spread",
        })
    }
}

/// Scores this close to the best are equal, and chance decides; in parts of a node's capacity.
const NEAR: f64 = 0.02;

/// How full the node would be with `need` on it, 0 to 1: the mean of the resources that it has.
fn fullness(node: &Candidate, need: Resources) -> f64 {
    let used = node.allocated.plus(need);
    let of = |used: f64, has: f64| if has > 0.0 { Some(used / has) } else { None };
    let parts = [
        of(f64::from(used.cpu_cores), f64::from(node.allocatable.cpu_cores)),
        of(used.memory_bytes as f64, node.allocatable.memory_bytes as f64),
    ];
    let known = parts.iter().flatten().count().max(1);
    parts.iter().flatten().sum::<f64>() / known as f64
}

/// One of `fitting` (indices into `nodes`, not empty).
pub(crate) fn choose(
    nodes: &[Candidate],
    fitting: &[usize],
    need: Resources,
    strategy: Strategy,
    rng: &mut impl Rng,
) -> usize {
    let score = |index: usize| match strategy {
        Strategy::BinPack => fullness(&nodes[index], need),
        Strategy::Spread => -fullness(&nodes[index], need),
    };
    let scored: Vec<(usize, f64)> = fitting.iter().map(|&index| (index, score(index))).collect();
    let best = scored.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
    let near: Vec<usize> =
        scored.iter().filter(|(_, s)| *s >= best - NEAR).map(|(index, _)| *index).collect();
    near[rng.random_range(0..near.len())]
}
