//! Handing a running machine over to another node.
//!
//! # Theory of operation
//! The target starts QEMU with `-incoming` and `-S`: it listens, takes everything in, and stands still afterwards until
//! it is resumed. The source sends its disks to the target's NBD server first, if they are to be copied (a mirror job
//! for each, which keeps up with what the guest writes), then memory. Before the last of it the source stands still; the
//! mirrors are finished then, and not before. QEMU at the source ends up in the state `postmigrate`.
//!
//! Both streams are encrypted and authenticated with a key that the target makes for this migration (TLS-PSK, RFC
//! 4279) and hands to the source inside [`hv_driver::Incoming::target`]: whoever connects without it is turned away.
//!
//! # Crash safety
//! What was asked is on disk before it is begun (`outgoing.json`, `incoming.json`), how far it is QEMU knows, and every
//! step looks first whether it was done. So whoever finds a migration half-way goes on with it. That everything
//! was handed over is on disk before anybody is told, hence a machine of which it was told never runs here again by
//! itself, even if its QEMU is gone.
//!
//! # Emulated guests
//! Those stand still from before their memory is sent: QEMU's emulator loses writes of a guest that runs meanwhile (seen with
//! 7.2: decision 0038).
//!
//! # Caveats
//! Both machines must be alike in every device. A machine that was changed while it ran may differ from one that is
//! made anew of the same specification; it is refused until it was restarted.

use std::time::Duration;

use hv_driver::{MigrateRequest, MigrationPhase, MigrationStatus, Storage};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::files::{InstanceDir, KEYS, OUTGOING, Stored, now_ms, write_atomically};
use crate::live::{Live, Status};
use crate::machine::Machine;
use crate::platform::{Accelerator, Platform};
use crate::problem::{Outcome, Problem};

pub(crate) mod source;
pub(crate) mod target;
mod transfer;

/// The object in QEMU that has the key.
const CREDENTIALS: &str = "migration-key";
/// The name that goes with the key.
const KEY_NAME: &str = "migration";

/// Where a target waits; what [`hv_driver::Incoming::target`] carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Waiting {
    version: u32,
    migration: String,
    address: std::net::IpAddr,
    memory_port: u16,
    /// Where disks are taken in; 0 where they are shared.
    disk_port: u16,
    /// The key, in hexadecimal digits.
    key: String,
    /// What the machine is made of, to be compared with what it is made of at the source.
    hardware: String,
    /// A file that the target made beside the shared disks, to be found by the source.
    proof: String,
}

impl Waiting {
    const VERSION: u32 = 1;
}

/// A hand-over to another node as it is kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outgoing {
    request: MigrateRequest,
    /// Memory has begun to be sent: QEMU's own account of it is the present one.
    memory_begun: bool,
    /// What the disks came to.
    disk_bytes: u64,
    /// Since when its guest is kept standing still for it, in milliseconds since 1970: one that QEMU emulates.
    #[serde(default)]
    still_since_ms: Option<u64>,
    status: MigrationStatus,
}

impl Outgoing {
    fn new(request: &MigrateRequest) -> Self {
        let phase = match request.storage {
            Storage::Copied => MigrationPhase::Disks,
            Storage::Shared => MigrationPhase::Memory,
        };
        let migration = request.migration.clone();
        let status = MigrationStatus { migration, phase, done_bytes: 0, total_bytes: 0, downtime: None };
        Self { request: request.clone(), memory_begun: false, disk_bytes: 0, still_since_ms: None, status }
    }

    pub(crate) fn read(dir: &InstanceDir) -> Outcome<Option<Self>> {
        dir.read(OUTGOING)
    }

    /// Notes what has changed, unless `change` says that nothing has. Several look and note at once, so each does it
    /// in one piece.
    fn note(machine: &Machine, change: impl FnOnce(&mut Self) -> bool) -> Outcome<()> {
        let _turn = machine.notes.lock();
        let Some(mut outgoing) = Self::read(&machine.dir)? else { return Ok(()) };
        match change(&mut outgoing) {
            true => machine.dir.write(OUTGOING, &outgoing),
            false => Ok(()),
        }
    }

    /// Notes a new one, in the place of an old one.
    fn begin(&self, machine: &Machine) -> Outcome<()> {
        let _turn = machine.notes.lock();
        machine.dir.write(OUTGOING, self)
    }

    pub(crate) fn is_handed_over(&self) -> bool {
        self.status.phase == MigrationPhase::HandedOver
    }

    /// Adds what QEMU says of memory.
    fn account(&mut self, told: &Value) {
        let ram = |name: &str| told["ram"][name].as_u64();
        let (Some(sent), Some(left)) = (ram("transferred"), ram("remaining")) else { return };
        self.status.done_bytes = self.disk_bytes + sent;
        self.status.total_bytes = self.disk_bytes + sent + left;
    }

    fn goes_on(&self) -> bool {
        matches!(self.status.phase, MigrationPhase::Disks | MigrationPhase::Memory)
    }

    /// Whether the disks belong to the target now.
    pub(crate) fn gave_disks_away(&self) -> bool {
        self.is_handed_over() && self.request.storage == Storage::Shared
    }
}

/// Whether a machine is being handed over just now.
pub(crate) fn goes_on(machine: &Machine) -> Outcome<bool> {
    Ok(Outgoing::read(&machine.dir)?.is_some_and(|outgoing| outgoing.goes_on()))
}

/// Whether a machine stands still only because it is being handed over.
pub(crate) fn keeps_still(machine: &Machine) -> Outcome<bool> {
    let outgoing = Outgoing::read(&machine.dir)?;
    Ok(outgoing.is_some_and(|outgoing| outgoing.goes_on() && outgoing.still_since_ms.is_some()))
}

/// Whether a machine was handed over. If so that is on disk afterwards.
pub(crate) async fn is_handed_over(machine: &Machine, live: Option<&Live>) -> Outcome<bool> {
    let Some(outgoing) = Outgoing::read(&machine.dir)? else { return Ok(false) };
    if outgoing.is_handed_over() {
        return Ok(true);
    }
    let Some(live) = live.filter(|_| outgoing.goes_on() && outgoing.memory_begun) else { return Ok(false) };
    if live.status().await != Status::HandedOver {
        return Ok(false);
    }
    let told = live.monitor.command("query-migrate", None).await?;
    // A guest that stood still before its memory was sent is in that state after a failure too (migration_iteration_finish).
    if told["status"] != "completed" {
        return Ok(false);
    }
    Outgoing::note(machine, |outgoing| {
        outgoing.account(&told);
        outgoing.status.phase = MigrationPhase::HandedOver;
        let since_still = outgoing.still_since_ms.map(|since| now_ms().saturating_sub(since));
        outgoing.status.downtime = since_still.or(told["downtime"].as_u64()).map(Duration::from_millis);
        true
    })?;
    Ok(true)
}

/// What must be alike at both ends, in words that can be compared.
fn hardware(stored: &Stored, machine_type: &str, platform: &Platform) -> String {
    let accelerator = match platform.accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    };
    let spec = &stored.config.spec;
    let disks: Vec<_> = stored
        .numbered()
        .map(|(number, disk)| format!("{number}={}:{}:{}", disk.serial, disk.size_bytes, disk.format.name()))
        .collect();
    format!(
        "qemu {}, {accelerator}, machine {machine_type}, {} cores, {} bytes of memory, {}, disks {}",
        platform.version,
        spec.cpu_cores,
        spec.memory_bytes,
        if stored.uefi.is_some() { "uefi" } else { "bios" },
        disks.join(" ")
    )
}

/// Gives QEMU the key of a migration, instead of any that it has.
async fn give_key(machine: &Machine, live: &Live, key: &str, end: &str) -> Outcome<()> {
    let dir = machine.dir.file(KEYS);
    std::fs::create_dir_all(&dir).map_err(Problem::file("make", &dir))?;
    write_atomically(&dir.join("keys.psk"), format!("{KEY_NAME}:{key}\n").as_bytes())?;
    // What is not there need not go.
    let _ = live.monitor.command("object-del", Some(json!({ "id": CREDENTIALS }))).await;
    let mut object = json!({ "qom-type": "tls-creds-psk", "id": CREDENTIALS, "dir": KEYS, "endpoint": end });
    if end == "client" {
        object["username"] = KEY_NAME.into();
    }
    live.monitor.command("object-add", Some(object)).await.map(drop)
}

/// Whether QEMU answered that there is no such thing.
fn is_missing(problem: &Problem) -> bool {
    let Problem::Refused { reason, .. } = problem else { return false };
    ["not found", "Failed to find", "Cannot find"].iter().any(|text| reason.contains(text))
}

async fn has_node(live: &Live, node: &str) -> Outcome<bool> {
    let nodes = live.monitor.command("query-named-block-nodes", Some(json!({ "flat": true }))).await?;
    Ok(nodes.as_array().into_iter().flatten().any(|known: &Value| known["node-name"] == node))
}
