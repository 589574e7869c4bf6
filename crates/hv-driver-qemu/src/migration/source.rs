//! The node that hands a machine over.

use std::sync::Arc;
use std::time::Duration;

use hv_driver::{DriverError, MigrateRequest, MigrationPhase, MigrationStatus, Result, Storage};
use serde_json::json;
use tokio::time::Instant;

use super::transfer::{self, LOOK_INTERVAL};
use super::{CREDENTIALS, Outgoing, Waiting, give_key, goes_on, hardware, is_handed_over, keeps_still};
use crate::files::{KEYS, SNAPSHOTS, STARTED, Stored, now_ms};
use crate::live::{Live, Status};
use crate::machine::Machine;
use crate::platform::Platform;
use crate::problem::{Outcome, Problem};

/// How long QEMU may take to give a transfer of memory up.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it is waited for QEMU to confirm that, while the guest runs. What was given up is never completed (it leaves the
/// state `cancelling` for `cancelled` only); QEMU may wait for a target that does not answer until TCP gives up.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// Begins to hand a machine over, or goes on with it.
pub(crate) async fn migrate(
    machine: &Arc<Machine>,
    request: &MigrateRequest,
    machine_type: &str,
    platform: &Platform,
) -> Result<()> {
    let _change = machine.change.lock().await;
    let id = &machine.id;
    let refused = |reason: String| DriverError::wrong_state(id, "migrate", reason);
    let live = machine.live_now("migrate").await?;
    let known = Outgoing::read(&machine.dir).map_err(machine.failed("migrate"))?;
    let handed_over = is_handed_over(machine, live.as_deref()).await.map_err(machine.failed("migrate"))?;
    if let Some(known) = &known {
        if known.request.migration == request.migration {
            if let Some(live) = live {
                drive(machine, &live);
            }
            return Ok(());
        }
        if handed_over || known.goes_on() {
            let reason = format!("migration {} is not done with; abort it first", known.request.migration);
            return Err(refused(reason));
        }
    }
    let Some(live) = live else { return Err(refused("it does not run; start it first".to_owned())) };
    if live.status().await != Status::Running {
        return Err(refused("it stands still; resume it first".to_owned()));
    }
    let waiting = waiting(request).map_err(|reason| DriverError::invalid(id, reason))?;
    check(machine, request.storage, &waiting, &hardware(&machine.stored(), machine_type, platform))
        .map_err(|reason| DriverError::invalid(id, reason))?;
    if was_changed(machine).map_err(machine.failed("migrate"))? {
        return Err(refused("it was changed while it ran; restart it first".to_owned()));
    }
    Outgoing::new(request).begin(machine).map_err(machine.failed("migrate"))?;
    drive(machine, &live);
    Ok(())
}

/// Whether the running machine has other devices than one that is made of what is written down. Sizes of disks may have
/// grown: those that wait are made with the new ones.
fn was_changed(machine: &Machine) -> Outcome<bool> {
    let Some(started) = machine.dir.read::<Stored>(STARTED)? else { return Ok(false) };
    let shape = |stored: &Stored| {
        let disks: Vec<_> = stored.numbered().map(|(number, disk)| (number, disk.serial.clone())).collect();
        (stored.config.spec.cpu_cores, stored.config.spec.memory_bytes, disks)
    };
    Ok(shape(&started) != shape(&machine.stored()))
}

fn waiting(request: &MigrateRequest) -> std::result::Result<Waiting, String> {
    let waiting: Waiting = serde_json::from_value(request.target.clone())
        .map_err(|e| format!("the target's answer is none of the qemu driver: {e}"))?;
    if waiting.version != Waiting::VERSION {
        return Err(format!("the target's answer has version {}; upgrade this node", waiting.version));
    }
    if waiting.migration != request.migration {
        return Err(format!("the target waits for migration {}", waiting.migration));
    }
    if waiting.key.is_empty() || !waiting.key.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err("the target's key is none".to_owned());
    }
    Ok(waiting)
}

fn check(
    machine: &Machine,
    storage: Storage,
    waiting: &Waiting,
    own: &str,
) -> std::result::Result<(), String> {
    if waiting.hardware != own {
        return Err(format!(
            "the machine that waits differs from this one, which can be so after changes until it is restarted: \
             {} there, {own} here",
            waiting.hardware
        ));
    }
    let stored = machine.stored();
    let has_disks = stored.writable().next().is_some();
    match storage {
        Storage::Copied if machine.dir.file(SNAPSHOTS).exists() && !crate::snapshots::is_empty(machine) => {
            Err("snapshots are not copied; delete them first, or migrate with shared storage".to_owned())
        }
        Storage::Shared if has_disks => shares(&stored, waiting),
        Storage::Copied | Storage::Shared => Ok(()),
    }
}

/// Whether the target sees the same disks as this node: it made a file beside them.
fn shares(stored: &Stored, waiting: &Waiting) -> std::result::Result<(), String> {
    let is_name = waiting.proof.starts_with(".incoming-") && !waiting.proof.contains('/');
    match &stored.disk_dir {
        Some(dir) if is_name && dir.join(&waiting.proof).is_file() => Ok(()),
        Some(dir) => Err(format!(
            "the target does not see the disks in {}; mount the same directory there, or copy the disks",
            dir.display()
        )),
        None => {
            Err("its disks lie in the instance's own directory; copy them, or create instances with a disk \
                     directory that both nodes mount at the same place"
                .to_owned())
        }
    }
}

/// Goes on with a hand-over that was begun, unless somebody does so already.
pub(crate) fn drive(machine: &Arc<Machine>, live: &Arc<Live>) {
    let mut leaving = machine.leaving.lock();
    if leaving.as_ref().is_some_and(|driver| !driver.is_finished()) {
        return;
    }
    let (machine, live) = (machine.clone(), live.clone());
    let cancelled = machine.shared.cancelled.clone();
    *leaving = Some(tokio::spawn(async move {
        tokio::select! {
            () = cancelled.cancelled() => {}
            outcome = hand_over(&machine, &live) => {
                if let Err(problem) = outcome {
                    give_up(&machine, &live, &problem).await;
                }
            }
        }
    }));
}

async fn hand_over(machine: &Machine, live: &Live) -> Outcome<()> {
    let Some(mut outgoing) = Outgoing::read(&machine.dir)?.filter(Outgoing::goes_on) else { return Ok(()) };
    let waiting = waiting(&outgoing.request).map_err(Problem::Garbled)?;
    let stored = machine.stored();
    if !outgoing.memory_begun {
        give_key_once(machine, live, &waiting).await?;
        if outgoing.request.storage == Storage::Copied {
            transfer::copy_disks(live, &stored, &waiting, &outgoing).await?;
            while !transfer::look_at_copies(live, &stored).await?.are_ready {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
        outgoing.disk_bytes = transfer::look_at_copies(live, &stored).await?.done_bytes;
        outgoing.memory_begun = true;
        outgoing.still_since_ms = is_emulated(live).await?.then(now_ms);
        outgoing.status.phase = MigrationPhase::Memory;
        let begun = outgoing.clone();
        Outgoing::note(machine, |outgoing| {
            *outgoing = begun;
            true
        })?;
        send_memory(live, &waiting, &outgoing).await?;
    }
    loop {
        let told = live.monitor.command("query-migrate", None).await?;
        match told["status"].as_str().unwrap_or("none") {
            // Asked for, and not begun when somebody died.
            "none" => send_memory(live, &waiting, &outgoing).await?,
            "pre-switchover" => {
                transfer::finish_copies(live).await?;
                let go_on = json!({ "state": "pre-switchover" });
                // Somebody may have given it up.
                let _ = live.monitor.command("migrate-continue", Some(go_on)).await;
            }
            "completed" if is_handed_over(machine, Some(live)).await? => {
                return transfer::drop_copies(live).await;
            }
            // QEMU's account of an earlier one; somebody died before this one was begun.
            "completed" => {
                let reason = "it was never begun; try again".to_owned();
                return Err(Problem::Refused { command: "migrate".to_owned(), reason });
            }
            "failed" | "cancelled" => {
                let reason = told["error-desc"].as_str().unwrap_or("it was given up").to_owned();
                return Err(Problem::Refused { command: "migrate".to_owned(), reason });
            }
            _ => {}
        }
        if live.has_ended() {
            return Err(Problem::Disconnected("migrate".to_owned()));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn send_memory(live: &Live, waiting: &Waiting, outgoing: &Outgoing) -> Outcome<()> {
    if outgoing.still_since_ms.is_some() {
        live.monitor.command("stop", None).await?;
    }
    transfer::send_memory(live, waiting, outgoing).await
}

/// Whether QEMU emulates the guest's processors, whatever this agent would have it do now.
async fn is_emulated(live: &Live) -> Outcome<bool> {
    let kvm = live.monitor.command("query-kvm", None).await?;
    Ok(kvm["enabled"] != true)
}

/// Mirrors that go on use the key, so it is given only where there are none.
async fn give_key_once(machine: &Machine, live: &Live, waiting: &Waiting) -> Outcome<()> {
    let objects = live.monitor.command("qom-list", Some(json!({ "path": "/objects" }))).await?;
    let is_there = objects.as_array().into_iter().flatten().any(|object| object["name"] == CREDENTIALS);
    let is_ours = || {
        let key = std::fs::read_to_string(machine.dir.file(KEYS).join("keys.psk")).unwrap_or_default();
        key.trim().ends_with(&waiting.key)
    };
    match is_there && is_ours() {
        true => Ok(()),
        false => give_key(machine, live, &waiting.key, "client").await,
    }
}

/// Notes why it failed. The machine runs on.
async fn give_up(machine: &Machine, live: &Live, problem: &Problem) {
    let cause = std::error::Error::source(problem).map(|cause| format!(": {cause}")).unwrap_or_default();
    let reason = format!("{problem}{cause}");
    tracing::warn!(instance = %machine.id, %reason, "a migration failed");
    let noted = async {
        if is_handed_over(machine, Some(live)).await? || !goes_on(machine)? {
            return Ok(());
        }
        if !live.has_ended() {
            stop_transfer(machine, live).await?;
            // It may have been complete before it could be given up.
            if is_handed_over(machine, Some(live)).await? {
                return Ok(());
            }
            run_on(machine, live).await?;
        }
        note_failure(machine, reason)
    };
    if let Err(error) = noted.await {
        // Whoever asks next tries again.
        tracing::warn!(instance = %machine.id, %error, "a failed migration could not be cleared away");
    }
}

/// QEMU lets a machine go on by itself if it ran when its memory began to be sent.
async fn run_on(machine: &Machine, live: &Live) -> Outcome<()> {
    match keeps_still(machine)? {
        true => live.monitor.command("cont", None).await.map(drop),
        false => Ok(()),
    }
}

/// Ends the transfer of memory and of disks, wherever they are.
async fn stop_transfer(machine: &Machine, live: &Live) -> Outcome<()> {
    let stands_for_it = keeps_still(machine)?;
    transfer::cut(live).await;
    let begun = Instant::now();
    let cancel = async {
        loop {
            let told = live.monitor.command("query-migrate", None).await?;
            match told["status"].as_str().unwrap_or("none") {
                "none" | "completed" | "failed" | "cancelled" => return Ok(()),
                // A cancel that comes while QEMU is about to pause before the switch-over leaves it waiting there for ever
                // (QEMU 7.2, migration_maybe_pause: the state changes first, so nobody wakes it). One more wake-up frees
                // it, and does no harm where it does not wait: the next migration takes back what is left over.
                "cancelling" => {
                    if begun.elapsed() > CONFIRM_TIMEOUT && (stands_for_it || runs(live).await?) {
                        return Ok(());
                    }
                    let wake = json!({ "state": "cancelling" });
                    let _ = live.monitor.command("migrate-continue", Some(wake)).await;
                }
                _ => drop(live.monitor.command("migrate_cancel", None).await?),
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::time::timeout(CANCEL_TIMEOUT, cancel).await.map_err(|_| Problem::Timeout {
        what: "giving up the migration".to_owned(),
        timeout_ms: u64::try_from(CANCEL_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
    })??;
    transfer::drop_copies(live).await
}

/// Whether the guest runs, in QEMU's own words: one that is about to be handed over stands still for a moment.
async fn runs(live: &Live) -> Outcome<bool> {
    let told = live.monitor.command("query-status", None).await?;
    Ok(told["running"].as_bool().unwrap_or(false))
}

/// Ends a hand-over that goes on, before the machine is stopped: whether it was complete is certain afterwards.
/// `change` is held.
pub(crate) async fn settle(machine: &Arc<Machine>, live: &Live) -> Outcome<()> {
    if !goes_on(machine)? {
        return Ok(());
    }
    nobody_drives(machine).await;
    stop_transfer(machine, live).await?;
    if is_handed_over(machine, Some(live)).await? {
        return Ok(());
    }
    run_on(machine, live).await?;
    note_failure(machine, "the machine was stopped".to_owned())
}

/// Nobody goes on with what is being given up. What was sent to QEMU is done before what is asked of it now.
async fn nobody_drives(machine: &Machine) {
    let driver = machine.leaving.lock().take();
    if let Some(driver) = driver {
        driver.abort();
        let _ = driver.await;
    }
}

/// What was handed over has not failed.
fn note_failure(machine: &Machine, reason: String) -> Outcome<()> {
    Outgoing::note(machine, |outgoing| {
        let goes_on = outgoing.goes_on();
        if goes_on {
            outgoing.status.phase = MigrationPhase::Failed { reason };
        }
        goes_on
    })
}

/// Lets the machine run on here, whatever was sent.
pub(crate) async fn abort(machine: &Arc<Machine>) -> Result<()> {
    let _change = machine.change.lock().await;
    let failed = || machine.failed("abort a migration");
    nobody_drives(machine).await;
    let live = machine.live_now("abort a migration").await?;
    let outgoing = Outgoing::read(&machine.dir).map_err(failed())?;
    let Some(outgoing) = outgoing.filter(|known| known.goes_on() || known.is_handed_over()) else {
        return Ok(());
    };
    if let Some(live) = &live {
        stop_transfer(machine, live).await.map_err(failed())?;
        // A machine whose transfer ended early goes on by itself; one that was handed over does not.
        live.monitor.command("cont", None).await.map_err(failed())?;
        // What is not there need not go.
        let _ = live.monitor.command("object-del", Some(json!({ "id": CREDENTIALS }))).await;
    }
    // A second time nothing is to be done.
    let _ = std::fs::remove_dir_all(machine.dir.file(KEYS));
    let phase = if outgoing.is_handed_over() { "after" } else { "before" };
    let reason = format!("it was given up {phase} the hand-over");
    let give_up = |outgoing: &mut Outgoing| {
        outgoing.status.phase = MigrationPhase::Failed { reason };
        true
    };
    Outgoing::note(machine, give_up).map_err(failed())
}

/// How far the last hand-over is.
pub(crate) async fn status(machine: &Arc<Machine>) -> Result<Option<MigrationStatus>> {
    let failed = || machine.failed("migration");
    let live = machine.live("migration").await?;
    is_handed_over(machine, live.as_deref()).await.map_err(failed())?;
    let Some(mut outgoing) = Outgoing::read(&machine.dir).map_err(failed())? else { return Ok(None) };
    let Some(live) = live.filter(|_| outgoing.goes_on()) else {
        if outgoing.goes_on() {
            let reason = "the machine ended before everything was sent".to_owned();
            outgoing.status.phase = MigrationPhase::Failed { reason: reason.clone() };
            note_failure(machine, reason).map_err(failed())?;
        }
        return Ok(Some(outgoing.status));
    };
    drive(machine, &live);
    if outgoing.memory_begun {
        // What cannot be told now can be told the next time.
        let told = live.monitor.command("query-migrate", None).await.unwrap_or_default();
        outgoing.account(&told);
    } else if let Ok(copies) = transfer::look_at_copies(&live, &machine.stored()).await {
        outgoing.status.done_bytes = copies.done_bytes;
        outgoing.status.total_bytes = copies.total_bytes;
    }
    Ok(Some(outgoing.status))
}
