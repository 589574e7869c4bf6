//! What the nodes themselves say: the files of the fake driver, which outlive everything that is killed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use hv_driver_fake::{LedgerEvent, Phase, Record, read_ledger, read_record};
use hv_types::InstanceId;

/// Something that must never happen, in words.
pub type Violation = String;

/// A time in which an instance ran on a node, in microseconds since 1970.
#[derive(Clone, Copy, Debug)]
struct Run {
    node: usize,
    from_us: u64,
    /// `None`: it still runs.
    to_us: Option<u64>,
}

/// The truth of all nodes.
#[derive(Clone, Debug)]
pub struct Truth {
    /// The fake driver's directory of each node.
    dirs: Vec<PathBuf>,
}

impl Truth {
    /// Of agents with these state directories.
    #[must_use]
    pub fn new(state_dirs: Vec<PathBuf>) -> Self {
        Self { dirs: state_dirs.into_iter().map(|dir| dir.join("fake")).collect() }
    }

    /// The nodes on which an instance runs now.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn runs_on(&self, id: &str) -> Result<Vec<usize>> {
        let id: InstanceId = id.parse()?;
        let mut nodes = Vec::new();
        for (node, dir) in self.dirs.iter().enumerate() {
            let record = read_record(dir, &id).with_context(|| dir.display().to_string())?;
            let runs = |record: &Record| matches!(record.phase, Phase::Running { .. } | Phase::Paused { .. });
            if record.as_ref().is_some_and(runs) {
                nodes.push(node);
            }
        }
        Ok(nodes)
    }

    /// Every time that an instance ran on two nodes at once, or on one node twice.
    ///
    /// # Errors
    /// A ledger cannot be read.
    pub fn overlaps(&self) -> Result<Vec<Violation>> {
        let mut found = Vec::new();
        for (id, mut runs) in self.runs()? {
            runs.sort_by_key(|run| run.from_us);
            for pair in runs.windows(2) {
                let ended = pair[0].to_us;
                if ended.is_none_or(|to_us| to_us > pair[1].from_us) {
                    found.push(format!(
                        "instance {id} ran twice: on node {} from {} to {ended:?}, on node {} from {}",
                        pair[0].node, pair[0].from_us, pair[1].node, pair[1].from_us
                    ));
                }
            }
        }
        Ok(found)
    }

    /// The most instances that ever ran on each node at once.
    ///
    /// # Errors
    /// A ledger cannot be read.
    pub fn most_at_once(&self) -> Result<Vec<usize>> {
        let mut edges: Vec<Vec<(u64, i32)>> = vec![Vec::new(); self.dirs.len()];
        for run in self.runs()?.into_values().flatten() {
            edges[run.node].push((run.from_us, 1));
            edges[run.node].extend(run.to_us.map(|to_us| (to_us, -1)));
        }
        let most = edges.into_iter().map(|mut edges| {
            // What ends in the same microsecond ends first.
            edges.sort_unstable();
            let mut now = 0i32;
            let most = edges.into_iter().map(|(_, step)| {
                now += step;
                now
            });
            usize::try_from(most.max().unwrap_or(0)).unwrap_or(0)
        });
        Ok(most.collect())
    }

    /// When each instance ran where.
    fn runs(&self) -> Result<BTreeMap<InstanceId, Vec<Run>>> {
        let mut runs: BTreeMap<InstanceId, Vec<Run>> = BTreeMap::new();
        for (node, dir) in self.dirs.iter().enumerate() {
            for entry in read_ledger(dir).with_context(|| dir.display().to_string())? {
                let of = runs.entry(entry.id.clone()).or_default();
                let open = of.iter_mut().rev().find(|run| run.node == node && run.to_us.is_none());
                match (entry.what, open) {
                    (LedgerEvent::Created, _) => {}
                    (LedgerEvent::Started, _) => of.push(Run { node, from_us: entry.at_us, to_us: None }),
                    (LedgerEvent::Ended | LedgerEvent::Deleted, Some(run)) => run.to_us = Some(entry.at_us),
                    (LedgerEvent::Ended | LedgerEvent::Deleted, None) => {}
                }
            }
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node's ledger: what happened when.
    fn node(lines: &[(&str, &str, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("fake")).unwrap();
        let text: String = lines
            .iter()
            .map(|(id, what, at_us)| {
                format!("{{\"id\":\"{id}\",\"what\":\"{what}\",\"at_us\":{at_us},\"pid\":1}}\n")
            })
            .collect();
        std::fs::write(dir.path().join("fake/.ledger.jsonl"), text).unwrap();
        dir
    }

    fn overlaps(nodes: &[tempfile::TempDir]) -> usize {
        Truth::new(nodes.iter().map(|dir| dir.path().into()).collect()).overlaps().unwrap().len()
    }

    #[test]
    fn an_instance_on_two_nodes_at_once_is_seen() {
        let first = || node(&[("i", "started", 10), ("i", "ended", 20)]);
        assert_eq!(overlaps(&[first(), node(&[("i", "started", 20)])]), 0);
        assert_eq!(overlaps(&[first(), node(&[("i", "started", 19)])]), 1);
        assert_eq!(overlaps(&[first(), node(&[("j", "started", 19)])]), 0);
        assert_eq!(overlaps(&[node(&[("i", "started", 10)]), node(&[("i", "started", 99)])]), 1);
        assert_eq!(overlaps(&[node(&[("i", "started", 10), ("i", "started", 11)])]), 1);
    }

    #[test]
    fn the_most_that_ran_at_once_is_counted() {
        let dir = node(&[
            ("a", "started", 1),
            ("b", "started", 2),
            ("a", "ended", 3),
            ("c", "started", 3),
            ("b", "deleted", 4),
        ]);
        assert_eq!(Truth::new(vec![dir.path().into()]).most_at_once().unwrap(), [2]);
    }
}
