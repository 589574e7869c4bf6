//! The nodes of one group by what is free on them, so that the fullest or emptiest that fit are found without a scan.
//!
//! # Theory of operation
//! Free cores and free memory are each divided into at most 64 steps of the group's capacity; nodes in the same two steps
//! share a cell. Each row (cores) keeps a 64-bit mask of its occupied columns (memory), so the best cell of a row that has
//! room is one bit operation away. How full the nodes of a cell are differs by at most [`Lattice::width`], at most 1/64
//! of capacity: less than [`NEAR`](crate::NEAR). So every node of the best cell that fits is near-best, and no node's own
//! score has to be looked at.
//!
//! # Invariants
//! - Each node of the group is in the one cell that its free resources name.
//! - A cell's `most` is at least what each of its nodes has free; it may be more, after a node left.

use hv_types::Resources;

/// Steps of each resource.
const STEPS: usize = 64;

/// Where a node is kept: a cell, and the position in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) cell: u32,
    pub(crate) position: u32,
}

/// Nodes with about as much free.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    pub(crate) nodes: Vec<u32>,
    /// No node of the cell has more free of anything.
    pub(crate) most: Resources,
    row: u8,
    column: u8,
}

/// The cells of all groups: those of a group that shrinks serve the next that grows.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cells {
    pub(crate) slab: Vec<Cell>,
    spare: Vec<u32>,
}

impl Cells {
    /// Makes a cell's `most` exact again: it was searched in vain, and need not be for as much until a node comes.
    pub(crate) fn settle(&mut self, cell: u32, free: &[Resources]) {
        let Cell { nodes, most, .. } = &mut self.slab[cell as usize];
        *most = Resources::default();
        nodes.iter().for_each(|node| raise(most, free[*node as usize]));
    }
}

/// Which cells of a group are occupied.
#[derive(Clone, Debug)]
pub(crate) struct Lattice {
    /// Cores to a row, bytes to a column.
    cores: u32,
    bytes: u64,
    /// What a core, or a byte, is of fullness.
    core_weight: f64,
    byte_weight: f64,
    /// Fullness with nothing free: 1, or 0 if there never was anything.
    full: f64,
    /// By how much the fullness of two nodes of one cell may differ.
    pub(crate) width: f64,
    /// Which rows are occupied.
    pub(crate) rows: u64,
    /// Which columns of each row are.
    pub(crate) columns: [u64; STEPS],
    /// Where each row begins in `cells`.
    begins: [u16; STEPS],
    /// Occupied cells, by row and column.
    cells: Vec<u32>,
}

impl Lattice {
    pub(crate) fn new(schedulable: Resources) -> Self {
        let Resources { cpu_cores, memory_bytes, .. } = schedulable;
        let known = f64::from(u8::from(cpu_cores > 0) + u8::from(memory_bytes > 0));
        let weight = |has: f64| if has > 0.0 { 1.0 / (has * known) } else { 0.0 };
        let (cores, bytes) = (cpu_cores / STEPS as u32 + 1, memory_bytes / STEPS as u64 + 1);
        let (core_weight, byte_weight) = (weight(f64::from(cpu_cores)), weight(memory_bytes as f64));
        Self {
            cores,
            bytes,
            core_weight,
            byte_weight,
            full: known.min(1.0),
            width: f64::from(cores - 1) * core_weight + (bytes - 1) as f64 * byte_weight,
            rows: 0,
            columns: [0; STEPS],
            begins: [0; STEPS],
            cells: Vec::new(),
        }
    }

    /// The first row and column in which a node may have room; 64 or more if there is none.
    pub(crate) fn corner(&self, need: Resources) -> (usize, usize) {
        ((need.cpu_cores / self.cores) as usize, (need.memory_bytes / self.bytes) as usize)
    }

    /// The first row and column from which on every node has the cores, or the memory.
    pub(crate) fn certain(&self, need: Resources) -> (usize, usize) {
        (need.cpu_cores.div_ceil(self.cores) as usize, need.memory_bytes.div_ceil(self.bytes) as usize)
    }

    /// Fullness of a node with nothing free.
    pub(crate) fn full(&self) -> f64 {
        self.full
    }

    /// What a row, and a column, that is free takes off fullness. A node of a cell is at most so full as its row and
    /// column say, and by at most [`Lattice::width`] less.
    pub(crate) fn steps(&self) -> (f64, f64) {
        (f64::from(self.cores) * self.core_weight, self.bytes as f64 * self.byte_weight)
    }

    /// What `need` adds to the fullness of a node.
    pub(crate) fn adds(&self, need: Resources) -> f64 {
        f64::from(need.cpu_cores) * self.core_weight + need.memory_bytes as f64 * self.byte_weight
    }

    /// The cell, which must be occupied.
    pub(crate) fn cell(&self, row: usize, column: usize) -> u32 {
        self.cells[self.rank(row, column)]
    }

    /// All occupied cells.
    pub(crate) fn cells(&self) -> &[u32] {
        &self.cells
    }

    fn rank(&self, row: usize, column: usize) -> usize {
        let before = self.columns[row] & ((1 << column) - 1);
        usize::from(self.begins[row]) + before.count_ones() as usize
    }

    fn place(&self, free: Resources) -> (usize, usize) {
        let (row, column) = self.corner(free);
        (row.min(STEPS - 1), column.min(STEPS - 1))
    }

    /// Whether a node with so much free belongs into this cell.
    pub(crate) fn belongs(&self, cell: &Cell, free: Resources) -> bool {
        self.place(free) == (usize::from(cell.row), usize::from(cell.column))
    }

    /// Adds a node.
    pub(crate) fn insert(&mut self, cells: &mut Cells, node: u32, free: Resources) -> Spot {
        let (row, column) = self.place(free);
        let rank = self.rank(row, column);
        if self.columns[row] >> column & 1 == 0 {
            let slot = cells.spare.pop().unwrap_or_else(|| {
                cells.slab.push(Cell::default());
                cells.slab.len() as u32 - 1
            });
            let cell = &mut cells.slab[slot as usize];
            (cell.row, cell.column, cell.most) = (row as u8, column as u8, Resources::default());
            self.cells.insert(rank, slot);
            self.rows |= 1 << row;
            self.columns[row] |= 1 << column;
            self.begins[row + 1..].iter_mut().for_each(|begin| *begin += 1);
        }
        let slot = self.cells[rank];
        let cell = &mut cells.slab[slot as usize];
        cell.nodes.push(node);
        cell.raise(free);
        Spot { cell: slot, position: cell.nodes.len() as u32 - 1 }
    }

    /// Takes a node out. Returns the node that is at its position now.
    pub(crate) fn remove(&mut self, cells: &mut Cells, spot: Spot) -> Option<u32> {
        let cell = &mut cells.slab[spot.cell as usize];
        cell.nodes.swap_remove(spot.position as usize);
        if cell.nodes.is_empty() {
            let (row, column) = (usize::from(cell.row), usize::from(cell.column));
            let rank = self.rank(row, column);
            self.cells.remove(rank);
            self.columns[row] &= !(1 << column);
            self.rows &= !(u64::from(self.columns[row] == 0) << row);
            self.begins[row + 1..].iter_mut().for_each(|begin| *begin -= 1);
            cells.spare.push(spot.cell);
            return None;
        }
        cell.nodes.get(spot.position as usize).copied()
    }
}

impl Cell {
    /// Its row and column.
    pub(crate) fn place(&self) -> (usize, usize) {
        (usize::from(self.row), usize::from(self.column))
    }

    /// Takes into account that a node has so much free.
    pub(crate) fn raise(&mut self, free: Resources) {
        raise(&mut self.most, free);
    }
}

fn raise(most: &mut Resources, free: Resources) {
    *most = Resources {
        cpu_cores: most.cpu_cores.max(free.cpu_cores),
        memory_bytes: most.memory_bytes.max(free.memory_bytes),
        disk_bytes: most.disk_bytes.max(free.disk_bytes),
        gpu_count: most.gpu_count.max(free.gpu_count),
    };
}
