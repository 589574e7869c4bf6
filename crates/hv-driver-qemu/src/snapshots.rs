//! Snapshots, kept inside the instance's qcow2 disks.
//!
//! # Theory of operation
//! A snapshot is in every disk under the same tag; memory, where it is kept, is in the first. `snapshots.json` lists
//! those that are complete: it is written last when one is taken and first when one is deleted, so what a crash leaves
//! in the disks without being listed is cleared away by the next attempt. A return to a snapshot without memory is
//! noted before it begins and finished by the next start.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use hv_driver::{DiskFormat, DriverError, Result, SnapshotInfo, SnapshotRequest, StopMode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::argv::Launch;
use crate::create::{Tools, run_tool};
use crate::files::{INCOMING, REVERTING, SNAPSHOTS};
use crate::jobs;
use crate::live::{Live, Status};
use crate::machine::Machine;
use crate::migration;
use crate::platform::Platform;
use crate::problem::{Outcome, Problem};

/// The job that saves, loads or deletes.
const JOB: &str = "snapshot";
/// Most snapshots of an instance.
const MAX_SNAPSHOTS: usize = 64;
/// Longest name.
const MAX_NAME_BYTES: usize = 63;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Index {
    snapshots: Vec<Kept>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Kept {
    info: SnapshotInfo,
    /// Whether the machine ran at that moment.
    ran: bool,
    /// Its deletion has begun.
    deleting: bool,
}

impl Index {
    fn read(machine: &Machine) -> Outcome<Self> {
        Ok(machine.dir.read(SNAPSHOTS)?.unwrap_or_default())
    }

    fn write(&self, machine: &Machine) -> Outcome<()> {
        machine.dir.write(SNAPSHOTS, self)
    }

    fn find(&self, name: &str) -> Option<&Kept> {
        self.snapshots.iter().find(|kept| kept.info.name == name && !kept.deleting)
    }
}

/// Never a number, which QEMU would take for an id of its own.
fn tag(name: &str) -> String {
    format!("hv.{name}")
}

/// Whether a machine has none, as far as can be read.
pub(crate) fn is_empty(machine: &Machine) -> bool {
    Index::read(machine).is_ok_and(|index| index.snapshots.is_empty())
}

/// The snapshots, oldest first.
pub(crate) async fn list(machine: &Machine) -> Result<Vec<SnapshotInfo>> {
    let index = Index::read(machine).map_err(machine.failed("list snapshots"))?;
    Ok(index.snapshots.into_iter().filter(|kept| !kept.deleting).map(|kept| kept.info).collect())
}

/// Keeps what the machine is now.
pub(crate) async fn take(
    machine: &Arc<Machine>,
    request: &SnapshotRequest,
    tools: &Tools,
) -> Result<SnapshotInfo> {
    let _change = machine.change.lock().await;
    let failed = || machine.failed("snapshot");
    let mut index = Index::read(machine).map_err(failed())?;
    if let Some(known) = index.find(&request.name) {
        return Ok(known.info.clone());
    }
    may_take(machine, &request.name, &index).map_err(|reason| DriverError::invalid(&machine.id, reason))?;
    let live = settled(machine, "snapshot").await?;
    clear_away(machine, live.as_deref(), &tag(&request.name), tools).await.map_err(failed())?;
    index.snapshots.retain(|kept| kept.info.name != request.name);
    let created_at = SystemTime::now();
    let (memory, ran, size_bytes) = match &live {
        Some(live) => {
            let ran = live.status().await == Status::Running;
            let size = take_live(machine, live, request).await.map_err(failed())?;
            (request.memory, ran, size)
        }
        None => {
            take_down(machine, request, tools).await.map_err(failed())?;
            (false, false, 0)
        }
    };
    let info = SnapshotInfo { name: request.name.clone(), created_at, memory, size_bytes };
    index.snapshots.push(Kept { info: info.clone(), ran, deleting: false });
    index.write(machine).map_err(failed())?;
    Ok(info)
}

fn may_take(machine: &Machine, name: &str, index: &Index) -> std::result::Result<(), String> {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(is_letter) {
        return Err("a snapshot's name has 1 to 63 lower-case letters, digits and `-`".to_owned());
    }
    if index.snapshots.len() >= MAX_SNAPSHOTS {
        return Err(format!("it has {MAX_SNAPSHOTS} snapshots already; delete some"));
    }
    let stored = machine.stored();
    if let Some((_, raw)) = stored.writable().find(|(_, disk)| disk.format != DiskFormat::Qcow2) {
        return Err(format!("disk `{}` is raw, which has no snapshots; use qcow2", raw.name));
    }
    if stored.writable().next().is_none() {
        return Err("it has no disk in which a snapshot could be kept; give it one".to_owned());
    }
    Ok(())
}

/// The machine, if it runs, with nothing else going on in it.
async fn settled(machine: &Arc<Machine>, operation: &'static str) -> Result<Option<Arc<Live>>> {
    let refused = |reason: &str| Err(DriverError::wrong_state(&machine.id, operation, reason));
    let live = machine.live_now(operation).await?;
    if migration::is_handed_over(machine, live.as_deref()).await.map_err(machine.failed(operation))? {
        return refused("it was handed over to another node");
    }
    if machine.dir.file(INCOMING).exists() {
        return refused("it waits for what another node hands over");
    }
    let Some(live) = live else { return Ok(None) };
    if migration::goes_on(machine).map_err(machine.failed(operation))? {
        return refused("it is being handed over to another node");
    }
    // What an earlier agent began and did not see end.
    jobs::finish(&live, JOB).await.map_err(machine.failed(operation))?;
    Ok(Some(live))
}

async fn take_live(machine: &Machine, live: &Live, request: &SnapshotRequest) -> Outcome<u64> {
    let (nodes, tag) = (nodes(machine), tag(&request.name));
    if request.memory {
        let save = json!({ "job-id": JOB, "tag": tag, "vmstate": nodes[0], "devices": nodes });
        jobs::run(live, "snapshot-save", save).await?;
    } else {
        let of_disk = |node: &String| {
            let data = json!({ "device": node, "name": tag });
            json!({ "type": "blockdev-snapshot-internal-sync", "data": data })
        };
        let actions: Vec<_> = nodes.iter().map(of_disk).collect();
        live.monitor.command("transaction", Some(json!({ "actions": actions }))).await?;
    }
    let images = images(live).await?;
    let sizes =
        images.iter().flat_map(|(_, image)| image["snapshots"].as_array().cloned().unwrap_or_default());
    Ok(sizes
        .filter(|kept| kept["name"] == tag.as_str())
        .filter_map(|kept| kept["vm-state-size"].as_u64())
        .sum())
}

async fn take_down(machine: &Machine, request: &SnapshotRequest, tools: &Tools) -> Outcome<()> {
    for file in files(machine) {
        image_tool(tools, "-c", &tag(&request.name), &file).await?;
    }
    Ok(())
}

fn nodes(machine: &Machine) -> Vec<String> {
    machine.stored().writable().map(|(number, _)| format!("disk{number}")).collect()
}

fn files(machine: &Machine) -> Vec<PathBuf> {
    let stored = machine.stored();
    stored.writable().map(|(_, disk)| machine.dir.path.join(stored.disk_path(disk))).collect()
}

/// What QEMU says of the image of each of its nodes.
async fn images(live: &Live) -> Outcome<Vec<(String, Value)>> {
    let told = live.monitor.command("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    let named = |node: &Value| Some((node["node-name"].as_str()?.to_owned(), node["image"].clone()));
    Ok(told.as_array().into_iter().flatten().filter_map(named).collect())
}

fn has(image: &Value, tag: &str) -> bool {
    image["snapshots"].as_array().into_iter().flatten().any(|kept| kept["name"] == tag)
}

async fn image_tool(tools: &Tools, option: &str, tag: &str, file: &std::path::Path) -> Outcome<()> {
    let mut command = tokio::process::Command::new(&tools.qemu_img);
    command.args(["snapshot", option, tag]).arg(file);
    run_tool(command, "qemu-img").await.map(drop)
}

/// The disks of a machine that is down which have a snapshot.
async fn files_with(machine: &Machine, tag: &str, tools: &Tools) -> Outcome<Vec<PathBuf>> {
    let mut found = Vec::new();
    for file in files(machine) {
        let mut command = tokio::process::Command::new(&tools.qemu_img);
        command.args(["info", "--output=json", "-f", "qcow2"]).arg(&file);
        let told = run_tool(command, "qemu-img").await?;
        let image: Value = serde_json::from_slice(&told).map_err(|e| Problem::Damaged(file.clone(), e))?;
        if has(&image, tag) {
            found.push(file);
        }
    }
    Ok(found)
}

/// The nodes of a machine that runs which have a snapshot.
async fn nodes_with(machine: &Machine, live: &Live, tag: &str) -> Outcome<Vec<String>> {
    let own = nodes(machine);
    let all = images(live).await?;
    let names = all.into_iter().filter(|(node, image)| own.contains(node) && has(image, tag));
    let mut names: Vec<_> = names.map(|(node, _)| node).collect();
    names.sort_by_key(|name| own.iter().position(|own| own == name));
    Ok(names)
}

/// Removes a snapshot from whichever disks have it.
async fn clear_away(machine: &Machine, live: Option<&Live>, tag: &str, tools: &Tools) -> Outcome<()> {
    if let Some(live) = live {
        for node in nodes_with(machine, live, tag).await? {
            let delete = json!({ "device": node, "name": tag });
            live.monitor.command("blockdev-snapshot-delete-internal-sync", Some(delete)).await?;
        }
        return Ok(());
    }
    for file in files_with(machine, tag, tools).await? {
        image_tool(tools, "-d", tag, &file).await?;
    }
    Ok(())
}

/// Forgets a snapshot.
pub(crate) async fn delete(machine: &Arc<Machine>, name: &str, tools: &Tools) -> Result<()> {
    let _change = machine.change.lock().await;
    let failed = || machine.failed("delete a snapshot");
    let mut index = Index::read(machine).map_err(failed())?;
    let Some(kept) = index.snapshots.iter_mut().find(|kept| kept.info.name == name) else { return Ok(()) };
    let live = settled(machine, "delete a snapshot").await?;
    kept.deleting = true;
    index.write(machine).map_err(failed())?;
    clear_away(machine, live.as_deref(), &tag(name), tools).await.map_err(failed())?;
    index.snapshots.retain(|kept| kept.info.name != name);
    index.write(machine).map_err(failed())
}

/// Returns to a snapshot.
pub(crate) async fn revert(
    machine: &Arc<Machine>,
    name: &str,
    tools: &Tools,
    platform: &Platform,
    machine_type: &str,
) -> Result<()> {
    let _change = machine.change.lock().await;
    let failed = || machine.failed("revert");
    let index = Index::read(machine).map_err(failed())?;
    let Some(kept) = index.find(name) else {
        let there: Vec<_> = index.snapshots.iter().map(|kept| kept.info.name.as_str()).collect();
        let reason = format!("it has no snapshot `{name}`; it has: {}", there.join(", "));
        return Err(DriverError::wrong_state(&machine.id, "revert", reason));
    };
    let live = settled(machine, "revert").await?;
    if !kept.info.memory {
        machine.dir.write(REVERTING, &name).map_err(failed())?;
        machine.stop_now(StopMode::Force).await?;
        return apply(machine, name, tools).await.map_err(failed());
    }
    let live = match live {
        Some(live) => live,
        None => {
            let launched = machine.launch(platform, machine_type, Launch::Still).await?;
            launched.ok_or_else(|| DriverError::failed(&machine.id, "revert", "qemu ended at once"))?
        }
    };
    let load = async {
        live.monitor.command("stop", None).await?;
        let nodes = nodes_with(machine, &live, &tag(name)).await?;
        let load = json!({ "job-id": JOB, "tag": tag(name), "vmstate": nodes.first(), "devices": nodes });
        jobs::run(&live, "snapshot-load", load).await?;
        if kept.ran {
            live.monitor.command("cont", None).await?;
        }
        Ok(())
    };
    load.await.map_err(failed())
}

/// Finishes a return that was begun, before the machine is started.
pub(crate) async fn finish_revert(machine: &Arc<Machine>, tools: &Tools) -> Result<()> {
    let _change = machine.change.lock().await;
    let name = machine.dir.read::<String>(REVERTING).map_err(machine.failed("start"))?;
    let Some(name) = name else { return Ok(()) };
    machine.stop_now(StopMode::Force).await?;
    apply(machine, &name, tools).await.map_err(machine.failed("start"))
}

async fn apply(machine: &Machine, name: &str, tools: &Tools) -> Outcome<()> {
    for file in files_with(machine, &tag(name), tools).await? {
        image_tool(tools, "-a", &tag(name), &file).await?;
    }
    machine.dir.remove(REVERTING)
}
