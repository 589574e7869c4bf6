//! The latest revisions in memory, so that watches that keep up never read the disk.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::Change;

/// What one revision changed.
#[derive(Debug)]
pub(super) struct Revised {
    pub(super) revision: u64,
    pub(super) changes: Vec<Change>,
}

impl Revised {
    fn size_bytes(&self) -> usize {
        let changes: usize = self
            .changes
            .iter()
            .map(|change| match change {
                Change::Put(kv) => kv.key.len() + kv.value.len(),
                Change::Deleted { key, .. } => key.len(),
            })
            .sum();
        changes + size_of_val(&self.changes[..]) + size_of::<Self>()
    }
}

/// A row of consecutive revisions, bounded in bytes; the oldest go first.
#[derive(Debug)]
pub(super) struct Recent {
    revisions: VecDeque<(Arc<Revised>, usize)>,
    held_bytes: usize,
    limit_bytes: usize,
}

impl Recent {
    pub(super) fn new(limit_bytes: usize) -> Self {
        Self { revisions: VecDeque::new(), held_bytes: 0, limit_bytes }
    }

    /// Adds the next revision. After a gap (a recovery), what came before it is of no use.
    pub(super) fn push(&mut self, revised: Arc<Revised>) {
        if self.revisions.back().is_some_and(|(last, _)| last.revision + 1 != revised.revision) {
            self.revisions.clear();
            self.held_bytes = 0;
        }
        let size_bytes = revised.size_bytes();
        self.held_bytes += size_bytes;
        self.revisions.push_back((revised, size_bytes));
        while self.held_bytes > self.limit_bytes {
            let Some((_, size_bytes)) = self.revisions.pop_front() else { break };
            self.held_bytes -= size_bytes;
        }
    }

    /// Up to `count` revisions from `first` on; `None` if `first` is not held.
    pub(super) fn from(&self, first: u64, count: usize) -> Option<Vec<Arc<Revised>>> {
        let start = first.checked_sub(self.revisions.front()?.0.revision)?;
        let start = usize::try_from(start).ok()?;
        if start >= self.revisions.len() {
            return None;
        }
        Some(self.revisions.range(start..).take(count).map(|(revised, _)| Arc::clone(revised)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revised(revision: u64) -> Arc<Revised> {
        Arc::new(Revised { revision, changes: Vec::new() })
    }

    fn revisions_of(found: Option<Vec<Arc<Revised>>>) -> Option<Vec<u64>> {
        found.map(|found| found.iter().map(|revised| revised.revision).collect())
    }

    #[test]
    fn only_the_newest_are_held() {
        let one = revised(0).size_bytes();
        let mut recent = Recent::new(3 * one);
        for revision in 2..10 {
            recent.push(revised(revision));
        }
        assert_eq!(revisions_of(recent.from(6, 9)), None);
        assert_eq!(revisions_of(recent.from(7, 2)), Some(vec![7, 8]));
        assert_eq!(revisions_of(recent.from(10, 9)), None);
        assert_eq!(recent.held_bytes, 3 * one);
    }

    #[test]
    fn a_gap_drops_what_came_before_it() {
        let mut recent = Recent::new(usize::MAX);
        recent.push(revised(2));
        recent.push(revised(4));
        assert_eq!(revisions_of(recent.from(2, 9)), None);
        assert_eq!(revisions_of(recent.from(4, 9)), Some(vec![4]));
    }

    #[test]
    fn a_revision_larger_than_the_limit_is_not_held() {
        let mut recent = Recent::new(1);
        recent.push(revised(2));
        assert_eq!(recent.held_bytes, 0);
        assert!(recent.revisions.is_empty());
    }
}
