//! Who would have to give way for an instance that fits nowhere.
//!
//! # Theory of operation
//! On one node, those of lower priority are tried in two orders: the largest help first, and the lowest priority first.
//! Whoever turns out not to be needed is spared, the highest priority first. Of what the two orders find, and of all
//! nodes, the best is what asks the fewest to go; then what takes the lowest priorities; then what comes first by id.
//! The result depends on nothing but the fleet and the ask. The nodes that lack the least are looked at first, and only so
//! many that the work is bounded.

use hv_types::{InstanceId, NodeId, Resources};

use crate::fleet::{Fleet, NodeIndex};
use crate::view::View;

/// Most instances that have to go for one.
pub const MAX_VICTIMS: usize = 16;

/// Most nodes on which victims are chosen; the best of these is taken.
const MAX_CHOICES: usize = 256;
/// Most instances that are looked at, by and large: no node is begun after that.
const MAX_SEEN: usize = 100_000;

/// Room that could be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preemption {
    /// On which node.
    pub node: NodeId,
    /// The same, as the fleet counts.
    pub index: NodeIndex,
    /// Who would have to go, all of lower priority; the lowest first.
    pub victims: Vec<InstanceId>,
}

/// An instance that may have to go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate<'a> {
    pub(crate) id: &'a InstanceId,
    pub(crate) priority: i32,
    pub(crate) resources: Resources,
}

/// Who goes, and how bad that is: how many, the highest priority, the sum of priorities.
#[derive(Clone, Debug)]
pub(crate) struct Victims<'a> {
    pub(crate) cost: (usize, i32, i64),
    pub(crate) victims: Vec<Candidate<'a>>,
}

impl Fleet {
    /// See [`Fleet::preempt`].
    pub(crate) fn make_room(&self, view: &View<'_>) -> Option<Preemption> {
        let (columns, ask) = (view.columns, view.ask);
        let need = ask.resources();
        let may_help = |node: &u32| {
            let at = *node as usize;
            columns.lowest[at] < ask.priority()
                && need.fits_in(view.schedulable(*node))
                && view.verdict(*node).without_room().fits()
        };
        // Where the least is missing, the fewest have to go: these are looked at first.
        let mut nodes: Vec<_> =
            columns.nodes().filter(may_help).map(|node| (lacks(view, node), node)).collect();
        nodes.sort_unstable_by(|a, b| {
            a.0.total_cmp(&b.0).then_with(|| columns.ids[a.1 as usize].cmp(&columns.ids[b.1 as usize]))
        });
        let mut best: Option<(Victims<'_>, u32)> = None;
        let (mut found, mut seen) = (0, 0);
        for (_, node) in nodes {
            if found == MAX_CHOICES || seen > MAX_SEEN {
                break;
            }
            let here = &columns.bound[node as usize];
            seen += here.len();
            let here = here.iter().map(|number| columns.instances.get(*number));
            let candidates = here.filter(|bound| self.may_go(ask, bound)).map(|bound| Candidate {
                id: &bound.id,
                priority: bound.priority,
                resources: bound.resources,
            });
            let used = columns.used[node as usize].resources();
            let Some(victims) = choose(view.schedulable(node), used, need, candidates.collect()) else {
                continue;
            };
            found += 1;
            let id = &columns.ids[node as usize];
            if best
                .as_ref()
                .is_none_or(|(best, on)| (victims.cost, id) < (best.cost, &columns.ids[*on as usize]))
            {
                best = Some((victims, node));
            }
        }
        let (victims, node) = best?;
        let victims = victims.victims.iter().map(|victim| victim.id.clone()).collect();
        Some(Preemption { node: columns.ids[node as usize].clone(), index: NodeIndex(node), victims })
    }
}

/// How much a node lacks, in parts of what it has: the resource it lacks the most of.
fn lacks(view: &View<'_>, node: u32) -> f64 {
    let has = view.schedulable(node);
    let lacks = view.ask.resources().minus(view.columns.free[node as usize]);
    let part = |lacks: f64, has: f64| if lacks > 0.0 { lacks / has } else { 0.0 };
    part(f64::from(lacks.cpu_cores), f64::from(has.cpu_cores))
        .max(part(lacks.memory_bytes as f64, has.memory_bytes as f64))
        .max(part(lacks.disk_bytes as f64, has.disk_bytes as f64))
        .max(part(f64::from(lacks.gpu_count), f64::from(has.gpu_count)))
}

/// Whom to send away so that `need` fits into `schedulable`, of which `used` is promised. `None` if that cannot be done
/// with at most [`MAX_VICTIMS`].
pub(crate) fn choose<'a>(
    schedulable: Resources,
    used: Resources,
    need: Resources,
    mut candidates: Vec<Candidate<'a>>,
) -> Option<Victims<'a>> {
    // The youngest of equals goes first: it has done the least so far.
    candidates.sort_by(|a, b| a.priority.cmp(&b.priority).then_with(|| b.id.cmp(a.id)));
    let by_priority = take(schedulable, used, need, candidates.iter().copied());
    let excess = excess(schedulable, used, need);
    let help = |resources: Resources| {
        let part = |helps: f64, lacks: f64| if lacks > 0.0 { (helps / lacks).min(1.0) } else { 0.0 };
        part(f64::from(resources.cpu_cores), f64::from(excess.cpu_cores))
            + part(resources.memory_bytes as f64, excess.memory_bytes as f64)
            + part(resources.disk_bytes as f64, excess.disk_bytes as f64)
            + part(f64::from(resources.gpu_count), f64::from(excess.gpu_count))
    };
    // Stable: of those that help alike, the lowest priority stays first.
    candidates.sort_by(|a, b| help(b.resources).total_cmp(&help(a.resources)));
    let by_help = take(schedulable, used, need, candidates.into_iter());
    by_priority.into_iter().chain(by_help).min_by_key(|found| found.cost)
}

/// The first of `candidates` that make room, without those that turn out not to be needed.
fn take<'a>(
    schedulable: Resources,
    used: Resources,
    need: Resources,
    mut candidates: impl Iterator<Item = Candidate<'a>>,
) -> Option<Victims<'a>> {
    let mut left = used;
    let fits = |left: Resources| need.fits_in(schedulable.minus(left));
    let mut victims = Vec::new();
    while !fits(left) {
        let next = candidates.next()?;
        let lacks = excess(schedulable, left, need);
        if !helps(next.resources, lacks) {
            continue;
        }
        if victims.len() == 2 * MAX_VICTIMS {
            return None;
        }
        left = left.minus(next.resources);
        victims.push(next);
    }
    victims.sort_by(|a, b| a.priority.cmp(&b.priority).then_with(|| b.id.cmp(a.id)));
    for index in (0..victims.len()).rev() {
        let spared = left.plus(victims[index].resources);
        if fits(spared) {
            left = spared;
            victims.remove(index);
        }
    }
    let highest = victims.last()?.priority;
    let sum = victims.iter().map(|victim| i64::from(victim.priority)).sum();
    (victims.len() <= MAX_VICTIMS).then_some(Victims { cost: (victims.len(), highest, sum), victims })
}

/// What has to go at least. Where nothing is needed it does not matter that too much is promised already.
fn excess(schedulable: Resources, used: Resources, need: Resources) -> Resources {
    let excess = used.plus(need).minus(schedulable);
    Resources {
        cpu_cores: if need.cpu_cores > 0 { excess.cpu_cores } else { 0 },
        memory_bytes: if need.memory_bytes > 0 { excess.memory_bytes } else { 0 },
        disk_bytes: if need.disk_bytes > 0 { excess.disk_bytes } else { 0 },
        gpu_count: if need.gpu_count > 0 { excess.gpu_count } else { 0 },
    }
}

/// Whether `resources` has something of what is lacking.
fn helps(resources: Resources, lacks: Resources) -> bool {
    (lacks.cpu_cores > 0 && resources.cpu_cores > 0)
        || (lacks.memory_bytes > 0 && resources.memory_bytes > 0)
        || (lacks.disk_bytes > 0 && resources.disk_bytes > 0)
        || (lacks.gpu_count > 0 && resources.gpu_count > 0)
}
