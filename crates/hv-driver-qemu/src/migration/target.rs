//! The node to which a machine is handed over.

use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use hv_driver::{Incoming, IncomingRequest, MigrationPhase, MigrationStatus, Storage};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::transfer::LOOK_INTERVAL;
use super::{CREDENTIALS, Waiting, give_key, hardware};
use crate::files::{INCOMING, InstanceDir, KEYS, OWNS_DISKS, Stored};
use crate::live::{Live, Status};
use crate::machine::Machine;
use crate::platform::Platform;
use crate::problem::{Outcome, Problem};

/// How many ports are tried for disks: somebody else may take one between its choice and its use.
const PORT_TRIES: usize = 8;
/// How long the last of it may take after the source has sent it.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(15);
/// Bytes of a key: as many as AES-256 takes.
const KEY_BYTES: usize = 32;

/// A hand-over to this node as it is kept on disk, from before anything else until the machine runs here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Expected {
    pub(crate) request: IncomingRequest,
    /// What the source was told; `None`: nothing yet.
    pub(crate) waiting: Option<Waiting>,
    /// Whether all of it came, and so its disks are whole here, which is noted before anybody is told.
    #[serde(default)]
    pub(crate) arrived: bool,
}

impl Expected {
    pub(crate) fn read(dir: &InstanceDir) -> Outcome<Option<Self>> {
        dir.read(INCOMING)
    }

    /// The answer that was given.
    pub(crate) fn answer(&self) -> Outcome<Option<Incoming>> {
        let to_json = |waiting: &Waiting| {
            serde_json::to_value(waiting).map_err(|e| Problem::Damaged(INCOMING.into(), e))
        };
        Ok(self.waiting.as_ref().map(to_json).transpose()?.map(|target| Incoming { target }))
    }
}

/// Says which disk is not there that is to be shared, and what has to be done.
pub(crate) fn missing_disk(machine: &Machine, storage: Storage) -> Option<String> {
    let stored = machine.stored();
    if storage == Storage::Copied || stored.writable().next().is_none() {
        return None;
    }
    if stored.disk_dir.is_none() {
        let remedy = "the disks of instances lie in their own directories on this node; copy them, or give both nodes \
                      a disk directory that they mount at the same place";
        return Some(remedy.to_owned());
    }
    let missing = stored.writable().map(|(_, disk)| stored.disk_path(disk)).find(|path| !path.is_file())?;
    Some(format!(
        "this node does not see {}; mount the source's disk directory here, or copy the disks",
        missing.display()
    ))
}

/// Makes a machine that was just launched listen, and says where.
pub(crate) async fn listen(
    machine: &Arc<Machine>,
    live: &Live,
    request: &IncomingRequest,
    machine_type: &str,
    platform: &Platform,
) -> Outcome<Incoming> {
    let stored = machine.stored();
    let key = random_hex(KEY_BYTES)?;
    give_key(machine, live, &key, "server").await?;
    let parameters = json!({ "tls-creds": CREDENTIALS });
    live.monitor.command("migrate-set-parameters", Some(parameters)).await?;
    let capabilities = json!({ "capabilities": super::transfer::capabilities(request.storage, false) });
    live.monitor.command("migrate-set-capabilities", Some(capabilities)).await?;
    let uri = format!("tcp:{}:0", in_uri(request.listen));
    live.monitor.command("migrate-incoming", Some(json!({ "uri": uri }))).await?;
    let told = live.monitor.command("query-migrate", None).await?;
    let port = told["socket-address"][0]["port"].as_str().and_then(|port| port.parse().ok());
    let memory_port = port.ok_or_else(|| Problem::Garbled(format!("where it listens: {told}")))?;
    let disk_port = match request.storage {
        Storage::Copied => serve_disks(live, &stored, request.listen).await?,
        Storage::Shared => 0,
    };
    let proof = match (&stored.disk_dir, request.storage) {
        (Some(dir), Storage::Shared) if stored.writable().next().is_some() => {
            let name = format!(".incoming-{}", random_hex(8)?);
            crate::files::write_atomically(&dir.join(&name), request.migration.as_bytes())?;
            name
        }
        _ => String::new(),
    };
    let waiting = Waiting {
        version: Waiting::VERSION,
        migration: request.migration.clone(),
        address: request.listen,
        memory_port,
        disk_port,
        key,
        hardware: hardware(&stored, machine_type, platform),
        proof,
    };
    let expected = Expected { request: request.clone(), waiting: Some(waiting), arrived: false };
    machine.dir.write(INCOMING, &expected)?;
    expected.answer()?.ok_or_else(|| Problem::Garbled("no answer".to_owned()))
}

/// Lets the source write the disks. QEMU does not say on which port it listens, so one is chosen for it.
async fn serve_disks(live: &Live, stored: &Stored, listen: IpAddr) -> Outcome<u16> {
    let mut tries = 0;
    let port = loop {
        let free = TcpListener::bind((listen, 0)).and_then(|listener| listener.local_addr());
        let port = free.map_err(Problem::Process)?.port();
        let address =
            json!({ "type": "inet", "data": { "host": listen.to_string(), "port": port.to_string() } });
        let start = json!({ "addr": address, "tls-creds": CREDENTIALS });
        tries += 1;
        match live.monitor.command("nbd-server-start", Some(start)).await {
            Ok(_) => break port,
            Err(error) if tries == PORT_TRIES => return Err(error),
            Err(_) => {}
        }
    };
    for (number, _) in stored.writable() {
        let node = format!("disk{number}");
        let export = json!({ "type": "nbd", "id": node, "node-name": node, "name": node, "writable": true });
        live.monitor.command("block-export-add", Some(export)).await?;
    }
    Ok(port)
}

/// How far the hand-over to this node is, while there is one.
pub(crate) async fn status(machine: &Arc<Machine>) -> Outcome<Option<MigrationStatus>> {
    let Some(expected) = Expected::read(&machine.dir)? else { return Ok(None) };
    let Ok(Some(live)) = machine.live("migration").await else { return Ok(None) };
    let phase = match live.status().await {
        Status::Waiting => MigrationPhase::Memory,
        Status::Still if expected.arrived || note_arrival(machine, &live).await? => {
            MigrationPhase::HandedOver
        }
        Status::Still => MigrationPhase::Memory,
        Status::Running | Status::HandedOver => return Ok(None),
    };
    let migration = expected.request.migration;
    Ok(Some(MigrationStatus { migration, phase, done_bytes: 0, total_bytes: 0, downtime: None }))
}

/// Notes that all of it came; `false` where it is just being resumed, stopped or deleted, which decides by itself.
async fn note_arrival(machine: &Machine, live: &Live) -> Outcome<bool> {
    let Ok(_change) = machine.change.try_lock() else { return Ok(false) };
    match Expected::read(&machine.dir)? {
        Some(expected) if live.status().await == Status::Still => {
            machine.dir.write(INCOMING, &Expected { arrived: true, ..expected })?;
            Ok(true)
        }
        Some(_) | None => Ok(false),
    }
}

/// Whether everything has come. What is on its way is waited for: the source knows a moment earlier than the target that
/// everything was sent.
pub(crate) async fn has_arrived(live: &Live) -> bool {
    let arrives = async {
        while live.status().await == Status::Waiting {
            let told = live.monitor.command("query-migrate", None).await.unwrap_or_default();
            if live.has_ended() || !matches!(told["status"].as_str(), Some("active" | "device" | "completed"))
            {
                return false;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        !live.has_ended()
    };
    tokio::time::timeout(ARRIVAL_TIMEOUT, arrives).await.unwrap_or(false)
}

/// Before a machine that was handed over to this node goes on: from here on its disks are its own.
pub(crate) async fn take_over(machine: &Machine, live: &Live) -> Outcome<()> {
    let Some(expected) = Expected::read(&machine.dir)? else { return Ok(()) };
    if live.status().await != Status::Still {
        return Ok(());
    }
    // Where there is none it need not end. The last one that writes the disks must be gone before the guest is.
    let _ = live.monitor.command("nbd-server-stop", None).await;
    own_disks(machine, &expected)
}

fn own_disks(machine: &Machine, expected: &Expected) -> Outcome<()> {
    if machine.stored().disk_dir.is_some() && expected.request.storage == Storage::Shared {
        machine.dir.append(OWNS_DISKS)?;
    }
    Ok(())
}

/// Makes a machine that died after all of it had come, and before it went on, one of this node, which starts from its disks:
/// whoever starts it knows that it is nowhere else. `false`: it never came.
pub(crate) fn inherit(machine: &Machine) -> Outcome<bool> {
    match Expected::read(&machine.dir)? {
        None => Ok(true),
        Some(expected) if !expected.arrived => Ok(false),
        Some(expected) => {
            own_disks(machine, &expected)?;
            taken_over(machine)?;
            Ok(true)
        }
    }
}

/// After it went on.
pub(crate) fn taken_over(machine: &Machine) -> Outcome<()> {
    let Some(expected) = Expected::read(&machine.dir)? else { return Ok(()) };
    if let (Some(dir), Some(waiting)) = (&machine.stored().disk_dir, &expected.waiting)
        && !waiting.proof.is_empty()
    {
        // It was of use to the source only.
        let _ = std::fs::remove_file(dir.join(&waiting.proof));
    }
    machine.dir.remove(INCOMING)?;
    let keys = machine.dir.file(KEYS);
    match std::fs::remove_dir_all(&keys) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Problem::file("remove", &keys)(e)),
        _ => Ok(()),
    }
}

/// An address as it stands in QEMU's addresses of migrations.
pub(super) fn in_uri(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

fn random_hex(length: usize) -> Outcome<String> {
    let mut bytes = vec![0u8; length];
    let mut filled = 0;
    while filled < length {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())
            .map_err(|e| Problem::Process(e.into()))?;
    }
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
