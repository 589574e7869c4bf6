//! Why an instance would go where it would go, or why it can go nowhere and what would help.

use hv_types::resources::MIB;
use hv_types::{NodeId, Resources};

use crate::Strategy;
use crate::ask::Ask;
use crate::rejection::{Rejections, Rule};
use crate::score::Score;

/// Most host names that are given as examples for one rule.
pub const MAX_EXAMPLES: usize = 3;
/// Most nodes that are listed with their scores.
pub const MAX_BEST: usize = 5;

/// The whole answer for one ask.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// How many nodes there are.
    pub total: usize,
    /// How many can take it.
    pub fitting: usize,
    /// What rejects the others, in the order in which it is asked. A node counts once, for the first rule.
    pub rejected: Vec<Rejected>,
    /// The best of those that fit, best first, at most [`MAX_BEST`].
    pub best: Vec<Scored>,
    /// What would help, the most promising first; empty if a node fits.
    pub remedies: Vec<Remedy>,
    pub(crate) summary: String,
}

impl Explanation {
    /// One sentence for people.
    #[must_use]
    pub fn summary(&self) -> &str {
        &self.summary
    }
}

/// What one rule rejects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The rule.
    pub rule: Rule,
    /// How many nodes it was the first to reject.
    pub nodes: usize,
    /// What they lack; completes "2 nodes …".
    pub message: String,
    /// Host names of some, at most [`MAX_EXAMPLES`].
    pub examples: Vec<String>,
}

/// A node that fits.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Which node.
    pub node: NodeId,
    /// Its host name.
    pub hostname: String,
    /// Higher is better; comparable within one explanation only.
    pub score: f64,
    /// What it is made of.
    pub parts: Score,
    /// The same for people.
    pub message: String,
}

/// What would help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// The rule to be lifted.
    pub rule: Rule,
    /// How many nodes could take it if this rule, and no other, did not hold. 0 if others stand in the way as well.
    pub admits: usize,
    /// A sentence for people.
    pub message: String,
}

/// A node with all that stands in the way, as the fleet judges it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judged<'a> {
    pub(crate) id: &'a NodeId,
    pub(crate) hostname: &'a str,
    pub(crate) verdict: Verdict,
    pub(crate) free: Resources,
    pub(crate) score: Score,
}

/// Every rule that rejects a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict(u32);

impl Verdict {
    /// With this rule too, if it rejects.
    pub(crate) fn with(self, rule: Rule, rejects: bool) -> Self {
        Self(self.0 | u32::from(rejects) << rule as u32)
    }

    /// With what the other says too.
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Without the rules about room.
    pub(crate) fn without_room(self) -> Self {
        Self(self.0 & ((1 << Rule::Cpu as u32) - 1))
    }

    /// Whether nothing stands in the way.
    pub(crate) fn fits(self) -> bool {
        self.0 == 0
    }

    /// The first rule that rejects.
    pub(crate) fn first(self) -> Option<Rule> {
        Rule::ALL.get(self.0.trailing_zeros() as usize).copied()
    }

    /// The rule that rejects, if it is the only one.
    fn only(self) -> Option<Rule> {
        self.0.is_power_of_two().then(|| self.first()).flatten()
    }
}

/// The explanation of what was judged: every node once.
pub(crate) fn explain<'a>(
    ask: &Ask,
    strategy: Strategy,
    nodes: impl Iterator<Item = Judged<'a>>,
) -> Explanation {
    let mut rejections = Rejections::default();
    let mut examples: [Vec<String>; Rule::ALL.len()] = Default::default();
    let mut alone: [Alone; Rule::ALL.len()] = Default::default();
    let mut fitting = 0;
    let mut best: Vec<Judged<'a>> = Vec::with_capacity(MAX_BEST + 1);
    for node in nodes {
        rejections.grow();
        let Some(rule) = node.verdict.first() else {
            fitting += 1;
            let value = node.score.value(strategy);
            let at = best.partition_point(|other| {
                let theirs = other.score.value(strategy);
                theirs > value || (theirs == value && other.id < node.id)
            });
            best.insert(at, node);
            best.truncate(MAX_BEST);
            continue;
        };
        rejections.count(rule);
        if examples[rule as usize].len() < MAX_EXAMPLES {
            examples[rule as usize].push(node.hostname.to_owned());
        }
        if let Some(rule) = node.verdict.only() {
            alone[rule as usize].see(amount(rule, node.free).map_or(0, |(_, free)| free.full));
        }
    }
    let rejected = rejections.counts().map(|(rule, nodes)| Rejected {
        rule,
        nodes,
        message: rule.phrase(ask),
        examples: std::mem::take(&mut examples[rule as usize]),
    });
    let best: Vec<_> = best.into_iter().map(|node| scored(node, ask, strategy)).collect();
    let summary = match best.first() {
        Some(first) => placed(first, fitting, &rejections, ask),
        None => rejections.summary(ask),
    };
    Explanation {
        total: rejections.total(),
        fitting,
        rejected: rejected.collect(),
        remedies: if fitting > 0 { Vec::new() } else { remedies(ask, &rejections, &alone) },
        best,
        summary,
    }
}

/// The nodes that one rule alone rejects.
#[derive(Clone, Copy, Debug, Default)]
struct Alone {
    nodes: usize,
    /// The most that one of them has free of what they lack.
    most: u64,
    /// How many have as much as that.
    with_most: usize,
}

impl Alone {
    fn see(&mut self, free: u64) {
        if self.nodes == 0 || free > self.most {
            (self.most, self.with_most) = (free, 0);
        }
        self.nodes += 1;
        self.with_most += usize::from(free == self.most);
    }
}

/// What a rule about an amount is about, and how much of it there is, in the unit that people are told: in full units of
/// it for what there is, in begun ones for what is asked for. `None` for a rule about something else.
fn amount(rule: Rule, of: Resources) -> Option<(&'static str, Range)> {
    let mib = |bytes: u64| Range { full: bytes / MIB, begun: bytes.div_ceil(MIB) };
    let whole = |count: u32| Range { full: count.into(), begun: count.into() };
    Some(match rule {
        Rule::Cpu => ("free cores", whole(of.cpu_cores)),
        Rule::Memory => ("MiB of free memory", mib(of.memory_bytes)),
        Rule::Disk => ("MiB of free disk", mib(of.disk_bytes)),
        Rule::Gpu => ("free accelerators", whole(of.gpu_count)),
        Rule::PreferredNode
        | Rule::NotReady
        | Rule::Cordoned
        | Rule::InstanceType
        | Rule::Region
        | Rule::Zone
        | Rule::Labels
        | Rule::Taint
        | Rule::Image
        | Rule::Affinity
        | Rule::AntiAffinity
        | Rule::Spread
        | Rule::Devices => return None,
    })
}

/// An amount, rounded down and up.
struct Range {
    full: u64,
    begun: u64,
}

/// What would help: first the rules that alone keep nodes away, those of the most nodes first; then, if there is none,
/// the last rule that is asked: it came closest.
fn remedies(ask: &Ask, rejections: &Rejections, alone: &[Alone; Rule::ALL.len()]) -> Vec<Remedy> {
    let mut remedies: Vec<_> = Rule::ALL
        .into_iter()
        .zip(alone)
        .filter(|(_, alone)| alone.nodes > 0)
        .map(|(rule, alone)| Remedy { rule, admits: alone.nodes, message: promise(ask, rule, alone) })
        .collect();
    // Stable, and the later rule wins a tie: what is asked late is easier to give.
    remedies.reverse();
    remedies.sort_by_key(|remedy| std::cmp::Reverse(remedy.admits));
    if remedies.is_empty() {
        remedies.extend(rejections.counts().next_back().map(|(rule, _)| Remedy {
            rule,
            admits: 0,
            message: format!("no single change is enough; begin with this: {}", rule.remedy()),
        }));
    }
    remedies
}

fn promise(ask: &Ask, rule: Rule, alone: &Alone) -> String {
    let lack = match amount(rule, ask.resources()) {
        Some((what, need)) => {
            let (most, with) = (alone.most, count(alone.with_most));
            let verb = if alone.with_most == 1 { "has" } else { "have" };
            format!("{with} {verb} {most} {what}, it asks for {}", need.begun)
        }
        None => {
            let verb = if alone.nodes == 1 { "is" } else { "are" };
            format!("{} {verb} rejected only as {}", count(alone.nodes), rule.phrase(ask))
        }
    };
    format!("{lack}: {}", rule.remedy())
}

fn count(nodes: usize) -> String {
    if nodes == 1 { "1 node".into() } else { format!("{nodes} nodes") }
}

fn scored(node: Judged<'_>, ask: &Ask, strategy: Strategy) -> Scored {
    let Score { fullness, preferences_met, preferences, soft_taints, must_fetch } = node.score;
    let liked = match strategy {
        Strategy::BinPack => "the fullest is preferred",
        Strategy::Spread => "the emptiest is preferred",
    };
    let mut message = format!("{:.0} % full with it ({liked})", fullness * 100.0);
    if preferences > 0 {
        message.push_str(&format!(", meets {preferences_met} of {preferences} preferences"));
    }
    if soft_taints > 0 {
        message.push_str(&format!(", has {soft_taints} soft taints that it does not tolerate"));
    }
    if must_fetch {
        message.push_str(", must fetch the image first");
    }
    let left = node.free.minus(ask.resources());
    let memory = left.memory_bytes / MIB;
    message.push_str(&format!("; {} cores and {memory} MiB stay free", left.cpu_cores));
    Scored {
        node: node.id.clone(),
        hostname: node.hostname.to_owned(),
        score: node.score.value(strategy),
        parts: node.score,
        message,
    }
}

fn placed(first: &Scored, fitting: usize, rejections: &Rejections, ask: &Ask) -> String {
    let mut text = format!(
        "{fitting} of {} nodes can take it; {} is the best: {}",
        rejections.total(),
        first.hostname,
        first.message
    );
    let parts: Vec<_> = rejections.counts().map(|(rule, n)| format!("{n} {}", rule.phrase(ask))).collect();
    if !parts.is_empty() {
        text.push_str(&format!("; not {}", parts.join(", ")));
    }
    text
}
