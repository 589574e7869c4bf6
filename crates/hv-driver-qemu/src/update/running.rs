//! Changes of a machine while it runs. What has to wait is said in words.

use std::time::Duration;

use serde_json::{Value, json};

use crate::argv::{disk_node, has_ports};
use crate::files::Stored;
use crate::live::Live;
use crate::problem::Outcome;

/// Memory comes in pieces of which Linux makes use (x86-64: 128 MiB).
const MEMORY_STEP: u64 = 128 << 20;
/// How long a guest may take to give memory back before it is said to wait.
const BALLOON_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a guest may take to let a disk go.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(8);
/// Why a new name waits.
pub(super) const NAME_WAITS: &str = "the guest sees its new name when it starts";
/// How often it is looked at meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Brings a running machine to what is written down, and says what has to wait.
pub(super) async fn bring(
    live: &Live,
    started: &Stored,
    after: &Stored,
    machine_type: &str,
) -> Outcome<Vec<String>> {
    let mut waits = Vec::new();
    let (old, new) = (&started.config, &after.config);
    if old.name != new.name {
        waits.push(NAME_WAITS.to_owned());
    }
    if old.spec.user_data != new.spec.user_data {
        waits.push("the guest sees its new user data when it starts".to_owned());
    }
    waits.extend(disks(live, after, machine_type).await?);
    waits.extend(cores(live, new.spec.cpu_cores).await?);
    waits.extend(memory(live, old.spec.memory_bytes, new.spec.memory_bytes).await?);
    Ok(waits)
}

/// The numbers of the disks that QEMU has.
pub(super) async fn numbers(live: &Live) -> Outcome<Vec<usize>> {
    let nodes = live.monitor.command("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    let number = |node: &Value| node["node-name"].as_str()?.strip_prefix("disk")?.parse().ok();
    Ok(nodes.as_array().into_iter().flatten().filter_map(number).collect())
}

/// The numbers of the disks that the guest has.
async fn devices(live: &Live) -> Outcome<Vec<usize>> {
    let all = live.monitor.command("qom-list", Some(json!({ "path": "/machine/peripheral" }))).await?;
    let number = |device: &Value| device["name"].as_str()?.strip_prefix("virtio-disk")?.parse().ok();
    Ok(all.as_array().into_iter().flatten().filter_map(number).collect())
}

async fn disks(live: &Live, after: &Stored, machine_type: &str) -> Outcome<Vec<String>> {
    let mut waits = Vec::new();
    let wanted: Vec<_> = after.numbered().map(|(number, _)| number).collect();
    for gone in devices(live).await?.into_iter().filter(|number| !wanted.contains(number)) {
        if !unplug(live, gone).await? {
            waits
                .push(format!("the guest does not let go of disk{gone}; it goes when the guest starts anew"));
        }
    }
    let kept = devices(live).await?;
    for left in numbers(live).await? {
        if !wanted.contains(&left) && !kept.contains(&left) {
            close(live, left).await?;
        }
    }
    for (number, disk) in after.writable() {
        if kept.contains(&number) {
            resize(live, number, disk.size_bytes).await?;
            continue;
        }
        let free = if has_ports(machine_type) { free_port(live).await? } else { None };
        let Some(port) = free else {
            waits.push(format!(
                "disk {}: the machine has no free slot; it comes when it starts anew",
                disk.name
            ));
            continue;
        };
        if !numbers(live).await?.contains(&number) {
            live.monitor.command("blockdev-add", Some(disk_node(after, number, disk))).await?;
        }
        let device = json!({
            "driver": "virtio-blk-pci", "id": format!("virtio-disk{number}"), "drive": format!("disk{number}"),
            "serial": disk.serial, "bus": port,
        });
        live.monitor.command("device_add", Some(device)).await?;
    }
    Ok(waits)
}

/// Only what is smaller is made larger.
async fn resize(live: &Live, number: usize, size_bytes: u64) -> Outcome<()> {
    let node = format!("disk{number}");
    let nodes = live.monitor.command("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    let known = nodes.as_array().into_iter().flatten().find(|known| known["node-name"] == node.as_str());
    let size = known.and_then(|known| known["image"]["virtual-size"].as_u64());
    if size.is_some_and(|size| size < size_bytes) {
        let to = json!({ "node-name": node, "size": size_bytes });
        live.monitor.command("block_resize", Some(to)).await?;
    }
    Ok(())
}

/// Asks the guest to let a disk go. `false` if it does not.
async fn unplug(live: &Live, number: usize) -> Outcome<bool> {
    let device = format!("virtio-disk{number}");
    // Refused where it was asked before, or the slot cannot be opened while the machine runs.
    if live.monitor.command("device_del", Some(json!({ "id": device }))).await.is_err() {
        return Ok(!devices(live).await?.contains(&number));
    }
    let gone = async {
        while devices(live).await?.contains(&number) {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(true)
    };
    tokio::time::timeout(UNPLUG_TIMEOUT, gone).await.unwrap_or(Ok(false))
}

/// Closes a disk that no guest has any more. Its device may take a moment to let go of it.
async fn close(live: &Live, number: usize) -> Outcome<()> {
    let begun = tokio::time::Instant::now();
    loop {
        let node = json!({ "node-name": format!("disk{number}") });
        match live.monitor.command("blockdev-del", Some(node)).await {
            Err(error) if begun.elapsed() > UNPLUG_TIMEOUT => return Err(error),
            Err(_) => tokio::time::sleep(LOOK_INTERVAL).await,
            Ok(_) => return Ok(()),
        }
    }
}

/// A root port with nothing behind it.
async fn free_port(live: &Live) -> Outcome<Option<String>> {
    let buses = live.monitor.command("query-pci", None).await?;
    let all = buses.as_array().into_iter().flatten();
    let mut devices = all.flat_map(|bus| bus["devices"].as_array().into_iter().flatten());
    let is_free = |device: &&Value| {
        let is_port = device["qdev_id"].as_str().is_some_and(|id| id.starts_with("port"));
        is_port && device["pci_bridge"]["devices"].as_array().is_none_or(Vec::is_empty)
    };
    Ok(devices.find(is_free).and_then(|port| port["qdev_id"].as_str()).map(ToOwned::to_owned))
}

async fn cores(live: &Live, wanted: u32) -> Outcome<Option<String>> {
    let there = live.monitor.command("query-cpus-fast", None).await?;
    let there = there.as_array().map_or(0, Vec::len);
    let wanted = wanted as usize;
    if wanted < there {
        return Ok(Some(format!("a running guest keeps its {there} cores")));
    }
    let slots = live.monitor.command("query-hotpluggable-cpus", None).await?;
    let is_free = |slot: &&Value| slot.get("qom-path").is_none();
    let mut free: Vec<_> = slots.as_array().into_iter().flatten().filter(is_free).collect();
    // QEMU lists the last one first.
    free.reverse();
    for (index, slot) in free.iter().take(wanted - there).enumerate() {
        let mut device = slot["props"].clone();
        device["driver"] = slot["type"].clone();
        device["id"] = format!("core{}", there + index).into();
        live.monitor.command("device_add", Some(device)).await?;
    }
    let most = there + free.len();
    Ok((wanted > most).then(|| format!("it was started with room for {most} cores")))
}

async fn memory(live: &Live, started: u64, wanted: u64) -> Outcome<Option<String>> {
    let told = live.monitor.command("query-memory-size-summary", None).await?;
    let total = started + told["plugged-memory"].as_u64().unwrap_or(0);
    if wanted > total {
        let more = wanted - total;
        if !more.is_multiple_of(MEMORY_STEP) {
            return Ok(Some(format!(
                "memory of a running guest grows by multiples of {} MiB",
                MEMORY_STEP >> 20
            )));
        }
        if let Some(reason) = add_memory(live, more).await? {
            return Ok(Some(reason));
        }
    }
    balloon(live, wanted, total.max(wanted)).await
}

async fn add_memory(live: &Live, size_bytes: u64) -> Outcome<Option<String>> {
    let there = live.monitor.command("query-memory-devices", None).await?;
    let number = there.as_array().map_or(0, Vec::len);
    let (backend, device) = (format!("memory{number}"), format!("dimm{number}"));
    // Left by an attempt that was cut short; one in use cannot go.
    let _ = live.monitor.command("object-del", Some(json!({ "id": backend }))).await;
    let object = json!({ "qom-type": "memory-backend-ram", "id": backend, "size": size_bytes });
    live.monitor.command("object-add", Some(object)).await?;
    let dimm = json!({ "driver": "pc-dimm", "id": device, "memdev": backend });
    match live.monitor.command("device_add", Some(dimm)).await {
        Ok(_) => Ok(None),
        Err(error) => {
            live.monitor.command("object-del", Some(json!({ "id": backend }))).await?;
            Ok(Some(format!("the machine was started without room for so much memory ({error})")))
        }
    }
}

/// Has the guest give memory back, or take it again.
async fn balloon(live: &Live, wanted: u64, most: u64) -> Outcome<Option<String>> {
    let actual = async || {
        let told = live.monitor.command("query-balloon", None).await?;
        Ok(told["actual"].as_u64().unwrap_or(most))
    };
    let is_so = |actual: u64| if wanted < most { actual <= wanted } else { actual >= wanted };
    if is_so(actual().await?) {
        return Ok(None);
    }
    live.monitor.command("balloon", Some(json!({ "value": wanted }))).await?;
    let settles = async {
        while !is_so(actual().await?) {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(())
    };
    match tokio::time::timeout(BALLOON_TIMEOUT, settles).await {
        Ok(settled) => settled.map(|()| None),
        Err(_) => {
            Ok(Some("the guest has not given its memory back; it needs a virtio-balloon driver".to_owned()))
        }
    }
}
