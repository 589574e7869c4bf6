//! The node for an ask: one of the near-best of those that fit.
//!
//! # Theory of operation
//! First the best cell with room is looked for over the lattices of the open groups. The score of a cell's nodes lies
//! between bounds that differ by less than [`NEAR`], so the upper bound of the best cell is at least the best score, and
//! every node whose cell has a lower bound of at least that less [`NEAR`] is near-best. Then chance decides among the
//! nodes of all such cells. In most cells every node has room; in those at the edge of what is asked for, and where
//! something other than cores and memory counts, the node drawn is checked and another drawn if it does not fit.
//!
//! Where preferences tell nodes of one group apart, a node that meets them all is looked for first. Only if there is none, or
//! few nodes come into question, the nodes are scored one by one.

use hv_types::Resources;
use rand::Rng;

use crate::Strategy;
use crate::groups::Group;
use crate::lattice::{Cells, Lattice};
use crate::score::NEAR;

/// How often a node is drawn before the one that was found first is taken.
const DRAWS: usize = 8;

/// Memory that one decision leaves to the next.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scratch {
    /// Groups with their score beside fullness.
    pub(crate) groups: Vec<(u32, f64)>,
    near: Vec<NearCell>,
    /// Nodes with their scores.
    pub(crate) nodes: Vec<(u32, f64)>,
    /// Cells that were searched in vain.
    pub(crate) searched: Vec<u32>,
}

/// A cell that may be near-best.
#[derive(Clone, Copy, Debug)]
struct NearCell {
    cell: u32,
    /// Whether all its nodes fit.
    certain: bool,
    /// How many nodes there are up to and with this cell.
    nodes: u32,
    /// What each of its nodes scores at least.
    least: f64,
}

/// What is looked for, and where.
pub(crate) struct Search<'a, F> {
    pub(crate) groups: &'a [Group],
    pub(crate) free: &'a [Resources],
    pub(crate) need: Resources,
    pub(crate) strategy: Strategy,
    /// Whether rules about other instances let it be on a node; `None` if there are none that tell nodes apart.
    pub(crate) allows: Option<F>,
}

/// The best cell so far.
struct Best {
    value: f64,
    cell: u32,
    /// A node of it that fits; `None` if all do.
    node: Option<u32>,
}

/// From where on nodes may have room, and from where on they have.
#[derive(Clone, Copy)]
struct Edges {
    /// The group's capacity that this is true for.
    schedulable: Resources,
    /// Masks of the rows and columns; none if nothing can have room.
    rows: u64,
    columns: u64,
    certain_row: usize,
    certain_column: usize,
}

impl<F: Fn(u32) -> bool> Search<'_, F> {
    /// A near-best node; `None` if none fits.
    pub(crate) fn run(&self, cells: &Cells, scratch: &mut Scratch, rng: &mut impl Rng) -> Option<u32> {
        let mut best = Best { value: f64::NEG_INFINITY, cell: 0, node: None };
        let mut edges = None;
        let Scratch { groups, near, searched, .. } = scratch;
        near.clear();
        for &(group, bonus) in groups.iter() {
            let group = &self.groups[group as usize];
            // Most neighbours are of one size.
            let edges = match &edges {
                Some(last) if Edges::is_of(last, group) => last,
                _ => edges.insert(self.edges(group)),
            };
            self.look(cells, &group.lattice, edges, bonus, (&mut best, near, searched), rng);
        }
        if best.value == f64::NEG_INFINITY {
            return None;
        }
        let mut total = 0;
        near.retain_mut(|cell| {
            let near = cell.least >= best.value - NEAR;
            if near {
                total += cells.slab[cell.cell as usize].nodes.len() as u32;
                cell.nodes = total;
            }
            near
        });
        for _ in 0..DRAWS {
            let drawn = rng.random_range(0..total);
            let at = near.partition_point(|cell| cell.nodes <= drawn);
            let NearCell { cell, certain, nodes, .. } = near[at];
            let node = cells.slab[cell as usize].nodes[(nodes - 1 - drawn) as usize];
            if certain || self.fits(node) {
                return Some(node);
            }
        }
        let nodes = &cells.slab[best.cell as usize].nodes;
        best.node.or_else(|| nodes.get(rng.random_range(0..nodes.len())).copied())
    }

    fn fits(&self, node: u32) -> bool {
        self.need.fits_in(self.free[node as usize]) && self.allows.as_ref().is_none_or(|allows| allows(node))
    }

    fn edges(&self, group: &Group) -> Edges {
        let (row, column) = group.lattice.corner(self.need);
        let (certain_row, certain_column) = group.lattice.certain(self.need);
        let exact = self.need.disk_bytes == 0 && self.need.gpu_count == 0 && self.allows.is_none();
        let from = |step: usize| if step < 64 { u64::MAX << step } else { 0 };
        Edges {
            schedulable: group.schedulable(),
            rows: from(row),
            columns: from(column),
            certain_row: if exact { certain_row } else { usize::MAX },
            certain_column,
        }
    }

    /// The step to look at first: the fullest have the lowest, the emptiest the highest.
    fn first(&self, mask: u64) -> usize {
        match self.strategy {
            Strategy::BinPack => mask.trailing_zeros() as usize,
            Strategy::Spread => 63 - mask.leading_zeros() as usize,
        }
    }

    /// Looks for cells of a group that are better than the best, or near to it.
    fn look(
        &self,
        cells: &Cells,
        lattice: &Lattice,
        edges: &Edges,
        bonus: f64,
        (best, near, searched): (&mut Best, &mut Vec<NearCell>, &mut Vec<u32>),
        rng: &mut impl Rng,
    ) {
        // What all nodes of the group have in common, and what a free core or byte adds to that.
        let (sign, common) = match self.strategy {
            Strategy::BinPack => (-1.0, bonus + lattice.full() + lattice.adds(self.need)),
            Strategy::Spread => (1.0, bonus - lattice.full() - lattice.adds(self.need) + lattice.width),
        };
        let (per_row, per_column) = lattice.steps();
        let mut rows = lattice.rows & edges.rows;
        while rows != 0 {
            let row = self.first(rows);
            rows &= !(1 << row);
            let of_row = common + sign * per_row * row as f64;
            let mut columns = lattice.columns[row] & edges.columns;
            while columns != 0 {
                let column = self.first(columns);
                columns &= !(1 << column);
                let value = of_row + sign * per_column * column as f64;
                let least = value - lattice.width;
                if least < best.value - NEAR {
                    break;
                }
                let cell = lattice.cell(row, column);
                let certain = row >= edges.certain_row && column >= edges.certain_column;
                let of = &cells.slab[cell as usize];
                if !certain && !self.need.fits_in(of.most) {
                    continue;
                }
                if value > best.value {
                    let node = if certain { None } else { self.find(&of.nodes, rng) };
                    if !certain && node.is_none() {
                        searched.push(cell);
                        continue;
                    }
                    *best = Best { value, cell, node };
                }
                near.push(NearCell { cell, certain, nodes: 0, least });
            }
        }
    }

    /// One of the nodes that fits, if any does.
    fn find(&self, nodes: &[u32], rng: &mut impl Rng) -> Option<u32> {
        let (later, first) = nodes.split_at(rng.random_range(0..nodes.len()));
        first.iter().chain(later).copied().find(|node| self.fits(*node))
    }
}

impl Edges {
    fn is_of(&self, group: &Group) -> bool {
        self.schedulable == group.schedulable()
    }
}

/// One of the near-best of nodes that were scored one by one; `None` if there are none.
pub(crate) fn draw(nodes: &mut Vec<(u32, f64)>, rng: &mut impl Rng) -> Option<u32> {
    let best = nodes.iter().map(|(_, score)| *score).fold(f64::NEG_INFINITY, f64::max);
    nodes.retain(|(_, score)| *score >= best - NEAR);
    (!nodes.is_empty()).then(|| nodes[rng.random_range(0..nodes.len())].0)
}
