//! The steps of a hand-over at the source, each of which looks first whether it was done.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use hv_driver::Storage;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use super::target::in_uri;
use super::{CREDENTIALS, Outgoing, Waiting, has_node, is_missing};
use crate::files::Stored;
use crate::live::Live;
use crate::problem::{Outcome, Problem};

/// How long a connection to the target may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long finished jobs may take to be gone.
const JOB_TIMEOUT: Duration = Duration::from_secs(60);
/// How often QEMU is asked how far it is. It would say so itself, but to nobody who was away meanwhile.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(25);

/// What both ends must agree on, or may differ in.
pub(super) fn capabilities(storage: Storage, auto_converge: bool) -> Value {
    let of = |name: &str, state: bool| json!({ "capability": name, "state": state });
    json!([
        // The mirrors are finished while the guest stands still; without mirrors nothing is to be done then.
        of("pause-before-switchover", storage == Storage::Copied),
        of("auto-converge", auto_converge),
    ])
}

fn copy_of(number: usize) -> String {
    format!("copy{number}")
}

/// Begins to copy every disk that is not being copied yet.
pub(super) async fn copy_disks(
    live: &Live,
    stored: &Stored,
    waiting: &Waiting,
    outgoing: &Outgoing,
) -> Outcome<()> {
    let jobs = jobs(live).await?;
    for (number, _) in stored.writable() {
        let (disk, copy) = (format!("disk{number}"), copy_of(number));
        if jobs.iter().any(|job| job["id"] == copy.as_str()) {
            continue;
        }
        if !has_node(live, &copy).await? {
            let server = json!({
                "type": "inet",
                "host": waiting.address.to_string(),
                "port": waiting.disk_port.to_string(),
            });
            let node = json!({
                "driver": "nbd", "node-name": copy, "server": server, "export": disk, "tls-creds": CREDENTIALS,
                "discard": "unmap",
            });
            add_copy(live, waiting, node).await?;
        }
        let mirror = json!({
            "job-id": copy, "device": disk, "target": copy, "sync": "full",
            "speed": outgoing.request.bandwidth_limit,
            "copy-mode": "write-blocking", "auto-dismiss": false,
        });
        live.monitor.command("blockdev-mirror", Some(mirror)).await?;
    }
    Ok(())
}

/// Connects to a disk at the target. QEMU does nothing else meanwhile, and its guest stands still with it, so it is told to
/// give up soon; before 7.0 it cannot be told.
async fn add_copy(live: &Live, waiting: &Waiting, node: Value) -> Outcome<()> {
    reach(waiting).await?;
    let mut bounded = node.clone();
    bounded["open-timeout"] = CONNECT_TIMEOUT.as_secs().into();
    match live.monitor.command("blockdev-add", Some(bounded)).await {
        Err(Problem::Refused { reason, .. }) if reason.contains("open-timeout") => {
            live.monitor.command("blockdev-add", Some(node)).await.map(drop)
        }
        added => added.map(drop),
    }
}

/// Looks whether the target can be reached at all.
async fn reach(waiting: &Waiting) -> Outcome<()> {
    let address = SocketAddr::new(waiting.address, waiting.disk_port);
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let connected = connected.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()));
    connected.map(drop).map_err(|error| Problem::Unreachable(address, error))
}

/// Closes what is connected to the target. One that does not answer would keep QEMU waiting for it, and whatever it is told
/// afterwards; where nothing is connected, or QEMU is older than 6.0, there is nothing to close.
pub(super) async fn cut(live: &Live) {
    let Ok(known) = live.monitor.command("query-yank", None).await else { return };
    let is_ours = |instance: &Value| {
        let is_copy = instance["node-name"].as_str().is_some_and(|name| name.starts_with("copy"));
        instance["type"] == "migration" || is_copy
    };
    let ours: Vec<_> = known.as_array().into_iter().flatten().filter(|one| is_ours(one)).cloned().collect();
    if !ours.is_empty()
        && let Err(error) = live.monitor.command("yank", Some(json!({ "instances": ours }))).await
    {
        tracing::debug!(%error, "the connections of a migration were not closed");
    }
}

async fn jobs(live: &Live) -> Outcome<Vec<Value>> {
    let jobs = live.monitor.command("query-jobs", None).await?;
    let is_ours = |job: &Value| job["id"].as_str().is_some_and(|id| id.starts_with("copy"));
    Ok(jobs.as_array().into_iter().flatten().filter(|job| is_ours(job)).cloned().collect())
}

/// How far the disks are.
pub(super) struct Copies {
    pub(super) done_bytes: u64,
    pub(super) total_bytes: u64,
    /// Each is complete, and kept so.
    pub(super) are_ready: bool,
}

/// How far the disks are; fails if one of them cannot be copied.
pub(super) async fn look_at_copies(live: &Live, stored: &Stored) -> Outcome<Copies> {
    let jobs = jobs(live).await?;
    let failed = jobs.iter().find(|job| job["status"] == "concluded");
    if let Some(job) = failed {
        let reason = job["error"].as_str().unwrap_or("it ended before it was complete").to_owned();
        return Err(Problem::Refused { command: "the copy of a disk".to_owned(), reason });
    }
    let sum = |name: &str| jobs.iter().filter_map(|job| job[name].as_u64()).sum();
    let ready = jobs.iter().filter(|job| job["status"] == "ready").count();
    Ok(Copies {
        done_bytes: sum("current-progress"),
        total_bytes: sum("total-progress"),
        are_ready: ready == stored.writable().count(),
    })
}

/// Begins to send memory.
pub(super) async fn send_memory(live: &Live, waiting: &Waiting, outgoing: &Outgoing) -> Outcome<()> {
    let request = &outgoing.request;
    let capabilities = json!({ "capabilities": capabilities(request.storage, request.auto_converge) });
    live.monitor.command("migrate-set-capabilities", Some(capabilities)).await?;
    let downtime_ms = u64::try_from(request.downtime_limit.as_millis()).unwrap_or(u64::MAX);
    let parameters = json!({
        "tls-creds": CREDENTIALS,
        "downtime-limit": downtime_ms.clamp(1, MAX_DOWNTIME_MS),
        "max-bandwidth": if request.bandwidth_limit == 0 { MAX_BANDWIDTH } else { request.bandwidth_limit },
    });
    live.monitor.command("migrate-set-parameters", Some(parameters)).await?;
    let uri = format!("tcp:{}:{}", in_uri(waiting.address), waiting.memory_port);
    live.monitor.command("migrate", Some(json!({ "uri": uri }))).await.map(drop)
}

/// The longest downtime that QEMU takes (`MAX_MIGRATE_DOWNTIME_SECONDS`).
const MAX_DOWNTIME_MS: u64 = 2_000_000;
/// More than any network has, in bytes per second; QEMU takes 0 for no transfer at all.
const MAX_BANDWIDTH: u64 = 1 << 40;

/// Finishes the copies of a guest that stands still, so that they have everything, and lets them go.
pub(super) async fn finish_copies(live: &Live) -> Outcome<()> {
    end_copies(live, false).await
}

/// Ends the copies, complete or not.
pub(super) async fn drop_copies(live: &Live) -> Outcome<()> {
    end_copies(live, true).await
}

async fn end_copies(live: &Live, force: bool) -> Outcome<()> {
    let work = async {
        loop {
            let jobs = jobs(live).await?;
            if jobs.is_empty() {
                break;
            }
            for job in &jobs {
                let id = job["id"].as_str().unwrap_or_default();
                let outcome = match job["status"].as_str().unwrap_or_default() {
                    "concluded" => {
                        if !force && let Some(error) = job["error"].as_str() {
                            let reason = error.to_owned();
                            return Err(Problem::Refused {
                                command: "the copy of a disk".to_owned(),
                                reason,
                            });
                        }
                        live.monitor.command("job-dismiss", Some(json!({ "id": id }))).await
                    }
                    "ready" | "running" | "created" | "paused" | "standby" => {
                        let cancel = json!({ "device": id, "force": force });
                        live.monitor.command("block-job-cancel", Some(cancel)).await
                    }
                    _ => Ok(Value::Null),
                };
                // It may have gone on to its next state meanwhile.
                if let Err(error) = outcome {
                    tracing::debug!(%error, job = id, "a copy of a disk could not be ended yet");
                }
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        drop_nodes(live).await
    };
    tokio::time::timeout(JOB_TIMEOUT, work).await.map_err(|_| Problem::Timeout {
        what: "the end of the copies of disks".to_owned(),
        timeout_ms: u64::try_from(JOB_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
    })?
}

async fn drop_nodes(live: &Live) -> Outcome<()> {
    let nodes = live.monitor.command("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    let names = nodes.as_array().into_iter().flatten().filter_map(|node| node["node-name"].as_str());
    for copy in names.filter(|name| name.starts_with("copy")) {
        match live.monitor.command("blockdev-del", Some(json!({ "node-name": copy }))).await {
            Err(error) if !is_missing(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
