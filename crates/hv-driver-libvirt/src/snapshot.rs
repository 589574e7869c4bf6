//! Snapshots in the qcow2 disks themselves, with the memory of what runs (libvirt's internal snapshots).
//!
//! # Theory of operation
//! libvirt keeps the list and the state, QEMU writes memory and disks into one file. A snapshot of what does not run
//! has the disks only, and going back to it leaves the machine down. Going back to one with memory loads it into the
//! running QEMU, or starts one, under the same lock and permit as every start.

use std::time::{Duration, UNIX_EPOCH};

use hv_driver::{DriverError, Exit, Result, SnapshotInfo, SnapshotRequest};
use hv_types::instance::spec::Firmware;

use crate::NAME;
use crate::domain;
use crate::machine::{Machine, Seen};
use crate::node::Node;
use crate::problem::{Outcome, Problem};
use crate::xml::Element;

/// The longest name.
const MAX_NAME_BYTES: usize = 63;

impl Machine {
    fn check_name(&self, name: &str) -> Result<()> {
        let is_allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        if (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_allowed) {
            return Ok(());
        }
        let excerpt = hv_types::validate::excerpt(name);
        let reason = format!("name: a snapshot has 1 to 63 lower-case letters, digits and `-`; got {excerpt}");
        Err(DriverError::invalid(&self.id, reason))
    }

    pub(crate) async fn snapshot(&self, node: &Node, request: &SnapshotRequest) -> Result<SnapshotInfo> {
        self.check_name(&request.name)?;
        let _change = self.change.lock().await;
        let failed = self.failed("snapshot");
        if let Some(known) = self.find_snapshot(&request.name).await.map_err(&failed)? {
            return Ok(known);
        }
        let stored = self.stored();
        if stored.config.spec.firmware == Some(Firmware::Uefi) {
            let reason = "libvirt keeps no snapshots of machines with UEFI in their disks; use `bios`".to_owned();
            return Err(DriverError::Unsupported { driver: NAME, operation: "snapshot", reason });
        }
        match self.look().await.map_err(&failed)? {
            Seen::Running | Seen::Paused if !request.memory => {
                let reason = "while it runs libvirt keeps its disks only together with its memory; stop it first, or \
                              ask for memory too";
                return Err(DriverError::wrong_state(&self.id, "snapshot", reason));
            }
            Seen::HandedOver => return Err(self.handed_over("snapshot")),
            Seen::Running | Seen::Paused => {}
            Seen::Down(_) => {
                // It may never have been started, or was changed since.
                let daemon = self.daemon().await.map_err(&failed)?;
                daemon.define(&domain::describe(&stored, &self.dir, node)).await.map_err(&failed)?;
            }
        }
        let daemon = self.daemon().await.map_err(&failed)?;
        let document = Element::new("domainsnapshot").child(Element::new("name").text(&request.name));
        daemon.snapshot(&stored.domain(), &document).await.map_err(&failed)?;
        let taken = self.find_snapshot(&request.name).await.map_err(&failed)?;
        taken.ok_or_else(|| failed(Problem::Snapshot(request.name.clone())))
    }

    async fn find_snapshot(&self, name: &str) -> Outcome<Option<SnapshotInfo>> {
        let document = self.daemon().await?.snapshot_xml(&self.stored().domain(), name).await?;
        Ok(document.map(|document| info(name, &document)))
    }

    /// Oldest first.
    pub(crate) async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        let failed = self.failed("list snapshots of");
        let daemon = self.daemon().await.map_err(&failed)?;
        let names = match daemon.snapshot_names(&self.stored().domain()).await {
            // It was never defined.
            Err(problem) if problem.is_no_domain() => Vec::new(),
            other => other.map_err(&failed)?,
        };
        let mut found = Vec::new();
        for name in names {
            found.extend(self.find_snapshot(&name).await.map_err(&failed)?);
        }
        // libvirt's times have seconds; of one second, who came later lies below.
        found.sort_by_key(|snapshot| snapshot.created_at);
        Ok(found)
    }

    pub(crate) async fn delete_snapshot(&self, name: &str) -> Result<()> {
        let _change = self.change.lock().await;
        let failed = self.failed("delete a snapshot of");
        let daemon = self.daemon().await.map_err(&failed)?;
        match daemon.delete_snapshot(&self.stored().domain(), name).await {
            Err(problem) if problem.is_no_domain() => Ok(()),
            other => other.map_err(failed),
        }
    }

    pub(crate) async fn revert(&self, name: &str) -> Result<()> {
        let _change = self.change.lock().await;
        let failed = self.failed("revert");
        let Some(snapshot) = self.find_snapshot(name).await.map_err(&failed)? else {
            let excerpt = hv_types::validate::excerpt(name);
            let reason = format!("there is no snapshot {excerpt}; list them to see which there are");
            return Err(DriverError::wrong_state(&self.id, "revert", reason));
        };
        let seen = self.look().await.map_err(&failed)?;
        if seen == Seen::HandedOver {
            return Err(self.handed_over("revert"));
        }
        let _stopping = self.raise_stopping();
        let exit = match &seen {
            Seen::Down(exit) => exit.clone(),
            _ => Exit::Stopped,
        };
        let starting = self.raise_starting(exit);
        let outcome = self.go_back(name, snapshot.memory, &seen).await;
        drop(starting);
        outcome.map_err(failed)
    }

    async fn go_back(&self, name: &str, has_memory: bool, seen: &Seen) -> Outcome<()> {
        let daemon = self.daemon().await?;
        let is_down = matches!(seen, Seen::Down(_));
        if has_memory && is_down {
            self.count_run()?;
        }
        if !has_memory && !is_down {
            self.note_stop()?;
            daemon.destroy(&self.stored().domain()).await?;
            self.ended();
        }
        daemon.revert(&self.stored().domain(), name).await?;
        if has_memory { Ok(()) } else { self.settle_down() }
    }
}

/// What libvirt says of a snapshot.
fn info(name: &str, document: &Element) -> SnapshotInfo {
    let seconds = document.text_at("creationTime").and_then(|text| text.parse().ok()).unwrap_or(0);
    let memory = document.at("memory").and_then(|memory| memory.attribute("snapshot"));
    SnapshotInfo {
        name: name.to_owned(),
        created_at: UNIX_EPOCH + Duration::from_secs(seconds),
        memory: memory.is_some_and(|kind| kind != "no"),
        // It lies in the disks, and nobody counts it apart from them.
        size_bytes: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libvirts_description_is_understood() {
        let read = |memory: &str| {
            let text = format!("<domainsnapshot><creationTime>7</creationTime>{memory}</domainsnapshot>");
            info("x", &Element::parse(&text).unwrap())
        };
        assert!(read("<memory snapshot='internal'/>").memory);
        assert!(!read("<memory snapshot='no'/>").memory);
        assert!(!read("").memory);
        assert_eq!(read("").created_at, UNIX_EPOCH + Duration::from_secs(7));
    }
}
