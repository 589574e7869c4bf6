//! One ask before the whole fleet: what every rule says of a node, and what speaks for it.

use hv_types::Resources;
use hv_types::placement::Topology;

use crate::ask::Ask;
use crate::columns::Columns;
use crate::counts::Counts;
use crate::explanation::{Judged, Verdict};
use crate::groups::{Fixed, Group, HOSTNAME_LABEL, NO_GROUP};
use crate::rejection::{Rejections, Rule};
use crate::rules::{Rules, Scope};
use crate::score::{Score, fullness};

/// What the ask demands of the node itself: its id, or its host name label.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own<'a> {
    id: Option<Option<u32>>,
    label: Option<&'a str>,
}

impl<'a> Own<'a> {
    pub(crate) fn of(columns: &Columns, ask: &'a Ask) -> Self {
        let rules = ask.placement();
        Self {
            id: rules.preferred_node.as_ref().map(|id| columns.find_present(id)),
            label: rules.node_selector.requirements().get(HOSTNAME_LABEL).map(String::as_str),
        }
    }

    /// Whether it demands anything.
    pub(crate) fn is_some(self) -> bool {
        self.id.is_some() || self.label.is_some()
    }

    /// The only nodes that can meet it, if it names them.
    pub(crate) fn nodes(&self, columns: &'a Columns) -> Option<&[u32]> {
        match (&self.id, self.label) {
            (Some(id), _) => Some(id.as_slice()),
            (None, Some(hv_types::Selector::ANY) | None) => None,
            (None, Some(label)) => Some(columns.with_label(label)),
        }
    }

    fn verdict(self, columns: &Columns, node: u32) -> Verdict {
        let has = |want: &str| {
            let have = columns.labels[node as usize].as_deref();
            have.is_some_and(|have| want == hv_types::Selector::ANY || have == want)
        };
        Verdict::default()
            .with(Rule::PreferredNode, self.id.is_some_and(|id| id != Some(node)))
            .with(Rule::Labels, self.label.is_some_and(|want| !has(want)))
    }
}

/// An ask before the fleet.
#[derive(Clone, Debug)]
pub(crate) struct View<'a> {
    pub(crate) columns: &'a Columns,
    pub(crate) ask: &'a Ask,
    /// What the fixed rules say, by group.
    pub(crate) fixed: &'a [Fixed],
    pub(crate) own: Own<'a>,
    pub(crate) rules: Rules<'a>,
}

impl View<'_> {
    fn group(&self, node: u32) -> u32 {
        self.columns.group[node as usize]
    }

    /// What the rules say that depend on the node, its class and the shape alone.
    fn fixed(&self, node: u32) -> Verdict {
        self.fixed[self.group(node) as usize].verdict.and(self.own.verdict(self.columns, node))
    }

    fn others(&self, scope: Scope, node: u32) -> Verdict {
        if self.rules.is_empty() {
            return Verdict::default();
        }
        self.columns.place(node).map_or(Verdict::default(), |place| self.rules.verdict(scope, place))
    }

    fn room(&self, node: u32) -> Verdict {
        let (need, free) = (self.ask.resources(), self.columns.free[node as usize]);
        Verdict::default()
            .with(Rule::Cpu, need.cpu_cores > free.cpu_cores)
            .with(Rule::Memory, need.memory_bytes > free.memory_bytes)
            .with(Rule::Disk, need.disk_bytes > free.disk_bytes)
            .with(Rule::Gpu, need.gpu_count > free.gpu_count)
            .with(Rule::Devices, !self.has_devices(node))
    }

    fn has_devices(&self, node: u32) -> bool {
        self.ask.devices().is_none_or(|need| self.columns.has_devices(node, need))
    }

    /// Every rule that keeps the ask off a node of the fleet.
    pub(crate) fn verdict(&self, node: u32) -> Verdict {
        self.fixed(node).and(self.others(Scope::Both, node)).and(self.room(node))
    }

    /// What the rules about other instances and devices say that are not the same for all nodes of a group.
    pub(crate) fn allows(&self, node: u32) -> bool {
        self.others(Scope::Node, node).fits() && self.has_devices(node)
    }

    /// Whether a node meets every preference that tells nodes of one group apart.
    pub(crate) fn likes(&self, node: u32) -> bool {
        let met = |place| self.rules.preferences_met(Scope::Node, place) == self.rules.node_preferences();
        self.columns.place(node).is_some_and(met)
    }

    /// What a group's nodes have in common in their score beside fullness; `None` if rules reject them all.
    pub(crate) fn group_score(&self, group: u32) -> Option<Score> {
        let of = &self.columns.groups.slots[group as usize];
        let place = crate::counts::Place { node: u32::MAX, zone: of.zone, region: of.region };
        let common = self.fixed[group as usize].score();
        if self.rules.is_empty() {
            return Some(common);
        }
        let fits = self.rules.verdict(Scope::Group, place).fits();
        let preferences_met = self.rules.preferences_met(Scope::Group, place);
        fits.then_some(Score { preferences_met, ..common })
    }

    /// What speaks for a node of the fleet.
    pub(crate) fn score(&self, node: u32) -> Score {
        let group = self.group(node) as usize;
        let schedulable = self.columns.groups.slots[group].schedulable();
        let place = self.columns.place(node);
        Score {
            fullness: fullness(schedulable, self.columns.free[node as usize], self.ask.resources()),
            preferences_met: place.map_or(0, |place| self.rules.preferences_met(Scope::Both, place)),
            preferences: self.rules.preferences(),
            ..self.fixed[group].score()
        }
    }

    /// How many nodes each rule rejects, the first for each node. Nodes that fit count in the total alone.
    pub(crate) fn rejections(&self) -> Rejections {
        let mut rejections = Rejections::new(self.columns.present);
        for (number, group) in self.columns.groups.slots.iter().enumerate().filter(|(_, g)| g.nodes > 0) {
            let fixed = self.fixed[number].verdict.first();
            match fixed {
                // A rule about the node itself may come before.
                Some(rule) if !self.own.is_some() => rejections.add(rule, group.nodes as usize),
                None if !self.own.is_some() && self.rules.is_empty() => {
                    self.count_by_cell(group, &mut rejections);
                }
                Some(_) | None => {
                    let nodes = self.columns.members(number as u32);
                    nodes
                        .filter_map(|node| self.verdict(node).first())
                        .for_each(|rule| rejections.add(rule, 1));
                }
            }
        }
        rejections
    }

    /// Where nothing but room counts, most cells lack cores, or memory, on all of their nodes.
    fn count_by_cell(&self, group: &Group, rejections: &mut Rejections) {
        let need = self.ask.resources();
        let (row, column) = group.lattice.corner(need);
        let (certain_row, _) = group.lattice.certain(need);
        for cell in group.lattice.cells() {
            let cell = &self.columns.cells.slab[*cell as usize];
            let at = cell.place();
            if at.0 < row {
                rejections.add(Rule::Cpu, cell.nodes.len());
            } else if at.0 >= certain_row && at.1 < column {
                rejections.add(Rule::Memory, cell.nodes.len());
            } else {
                let nodes = cell.nodes.iter();
                nodes.filter_map(|node| self.room(*node).first()).for_each(|rule| rejections.add(rule, 1));
            }
        }
    }

    /// All nodes of the fleet, judged, in the order of their ids.
    pub(crate) fn judged(&self) -> impl Iterator<Item = Judged<'_>> {
        let ids = &self.columns.ids;
        let mut nodes: Vec<_> = self.columns.nodes().collect();
        nodes.sort_unstable_by_key(|node| &ids[*node as usize]);
        nodes.into_iter().map(|node| Judged {
            id: &ids[node as usize],
            hostname: &self.columns.hostnames[node as usize],
            verdict: self.verdict(node),
            free: self.columns.free[node as usize],
            score: self.score(node),
        })
    }

    /// What a node may promise in all.
    pub(crate) fn schedulable(&self, node: u32) -> Resources {
        self.columns.groups.slots[self.group(node) as usize].schedulable()
    }
}

/// The fewest of `peers` that are in one place, of all places where a node meets the fixed rules.
pub(crate) fn fewest(
    columns: &Columns,
    fixed: &[Fixed],
    own: Own<'_>,
    peers: &Counts,
    topology: Topology,
) -> u32 {
    let fits = |node: &u32| {
        let group = columns.group[*node as usize];
        group != NO_GROUP && fixed[group as usize].verdict.fits() && own.verdict(columns, *node).fits()
    };
    let at = |node: u32| columns.place(node).map_or(0, |place| peers.at(topology, place));
    if let Some(nodes) = own.nodes(columns) {
        return nodes.iter().copied().filter(fits).map(at).min().unwrap_or(0);
    }
    if own.is_some() {
        return columns.nodes().filter(fits).map(at).min().unwrap_or(0);
    }
    let groups = columns.groups.slots.iter().zip(fixed);
    let open =
        groups.filter(|(group, fixed)| group.nodes > 0 && fixed.verdict.fits()).map(|(group, _)| group);
    let by = peers.by(topology);
    let count = |place: u32| by.get(&place).copied().unwrap_or(0);
    match topology {
        Topology::Zone => open.map(|group| count(group.zone)).min().unwrap_or(0),
        Topology::Region => open.map(|group| count(group.region)).min().unwrap_or(0),
        Topology::Node => {
            // Nodes with none of the peers are not in the counts: if there are more nodes, one of them has none.
            let (mut counted, mut least) = (0, u32::MAX);
            for (_, count) in by.iter().filter(|(node, _)| fits(node)) {
                counted += 1;
                least = least.min(*count);
            }
            let all: u32 = open.map(|group| group.nodes).sum();
            if counted < all || counted == 0 { 0 } else { least }
        }
    }
}
