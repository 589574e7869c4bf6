//! What the fake keeps on disk: one small file per instance, its console's log, and the ledger of starts.
//!
//! # Theory of operation
//! The files are the truth: they are read at every call and replaced by rename, so that killing the agent at any
//! instant leaves "running" instances as a real runtime would, and a test may change them behind the driver's back.
//! They are not flushed to the disk: what they simulate does not survive the host either.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hv_driver::{Exit, InstanceConfig};
use hv_types::{InstanceId, InstanceSpec};
use serde::{Deserialize, Serialize};

use crate::carried::{Arrived, Guest, Incoming, Outgoing, Snapshot};
use crate::console_log;
use crate::script::Operation;

/// The ledger's name; an instance's id never starts with a dot.
const LEDGER: &str = ".ledger.jsonl";
/// A ledger longer than this is begun anew.
const MAX_LEDGER_BYTES: u64 = 64 << 20;

/// What an instance is doing, as stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Being created; a crash or a failure left it so.
    Creating,
    /// It does not run.
    Stopped(Exit),
    /// It runs.
    Running {
        /// Since when, in milliseconds since 1970.
        since_ms: u64,
        /// When it ends by itself.
        exit_at_ms: Option<u64>,
        /// With which code.
        exit_code: i32,
    },
    /// It stands still, having run since then.
    Paused {
        /// Since when it runs, in milliseconds since 1970.
        since_ms: u64,
    },
}

impl Phase {
    pub(crate) fn runs(&self) -> bool {
        matches!(self, Self::Running { .. } | Self::Paused { .. })
    }
}

/// One instance, as stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What it is to be.
    pub config: InstanceConfig,
    /// What it is doing.
    pub phase: Phase,
    /// How often it went from not running to running.
    pub starts: u32,
    /// How often each scripted operation was attempted.
    pub attempts: BTreeMap<Operation, u32>,
    /// What its guest keeps.
    #[serde(default)]
    pub guest: Guest,
    /// The next start goes on with the guest's memory and does not boot.
    #[serde(default)]
    pub goes_on: bool,
    /// What it is to be made of from its next start on.
    #[serde(default)]
    pub waiting: Option<InstanceSpec>,
    /// Its snapshots, oldest first.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
    /// The hand-over that it was prepared for.
    #[serde(default)]
    pub incoming: Option<Incoming>,
    /// Its last migration away from here since it was started. What was handed over is stored as stopped.
    #[serde(default)]
    pub outgoing: Option<Outgoing>,
    /// How many migrations away from here were begun.
    #[serde(default)]
    pub migrations: u32,
}

impl Record {
    /// An instance of which nothing is there yet.
    #[must_use]
    pub fn creating(config: &InstanceConfig) -> Self {
        Self {
            config: config.clone(),
            phase: Phase::Creating,
            starts: 0,
            attempts: BTreeMap::new(),
            guest: Guest::default(),
            goes_on: false,
            waiting: None,
            snapshots: Vec::new(),
            incoming: None,
            outgoing: None,
            migrations: 0,
        }
    }

    /// Whether it stands still here for good.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        self.outgoing.as_ref().is_some_and(Outgoing::is_handed_over)
    }

    /// Whether it waits for another node to hand it over.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.incoming.as_ref().is_some_and(|incoming| incoming.waits)
    }
}

/// One line of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// Which instance.
    pub id: InstanceId,
    /// What happened to it.
    pub what: LedgerEvent,
    /// Which of its starts began or ended, from 1; 0 for what is neither.
    #[serde(default)]
    pub start: u32,
    /// When, in microseconds since 1970.
    pub at_us: u64,
    /// Which process did it.
    pub pid: u32,
}

/// What the ledger tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LedgerEvent {
    /// It was created.
    Created,
    /// It began to run.
    Started,
    /// It ended: stopped, or by itself.
    Ended,
    /// It was removed.
    Deleted,
}

/// Everything that ever happened to the instances of a state directory, in order; it outlives their deletion. Empty if
/// nothing ever did.
///
/// # Errors
/// The ledger cannot be read.
pub fn read_ledger(state_dir: &Path) -> io::Result<Vec<LedgerEntry>> {
    let ledger: Vec<LedgerEntry> = match fs::read_to_string(state_dir.join(LEDGER)) {
        Ok(text) => text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    let mut ledger = without_repeats(ledger);
    let files = Files { dir: state_dir.to_owned() };
    for id in files.list()? {
        let Some(record) = files.load(&id)? else { continue };
        undo_unsaved(&mut ledger, &record);
        // Ends that the fencer brought about, and that no driver has seen yet.
        if let Some(at_us) = files.fenced_at(&id)?.filter(|_| record.phase.runs()) {
            let (what, start) = (LedgerEvent::Ended, record.starts);
            ledger.push(LedgerEntry { id, what, start, at_us, pid: 0 });
        }
    }
    Ok(ledger)
}

/// The ledger is written before the record, and the record decides: what an agent that died in between wrote down and
/// did not do is done, and written down, again. Of such repeats the last counts.
fn without_repeats(ledger: Vec<LedgerEntry>) -> Vec<LedgerEntry> {
    let mut seen: HashSet<(InstanceId, LedgerEvent, u32)> = HashSet::new();
    let mut kept = Vec::with_capacity(ledger.len());
    for entry in ledger.into_iter().rev() {
        if entry.what == LedgerEvent::Deleted {
            // What was before is another life under the same id, whose starts are numbered from 1 too.
            seen.retain(|(id, ..)| *id != entry.id);
        }
        if entry.start == 0 || seen.insert((entry.id.clone(), entry.what, entry.start)) {
            kept.push(entry);
        }
    }
    kept.reverse();
    kept
}

/// Takes out what was written down last and is not done yet.
fn undo_unsaved(ledger: &mut Vec<LedgerEntry>, record: &Record) {
    let id = &record.config.id;
    let Some(last) = ledger.iter().rposition(|entry| entry.id == *id) else { return };
    let entry = &ledger[last];
    let is_done = match entry.what {
        LedgerEvent::Started => record.starts >= entry.start,
        LedgerEvent::Ended => record.starts > entry.start || !record.phase.runs(),
        LedgerEvent::Created | LedgerEvent::Deleted => true,
    };
    if !is_done {
        ledger.remove(last);
    }
}

/// What is stored of one instance, ended if the fencer ended it; `None` if nothing is.
///
/// # Errors
/// The file cannot be read.
pub fn read_record(state_dir: &Path, id: &InstanceId) -> io::Result<Option<Record>> {
    let files = Files { dir: state_dir.to_owned() };
    let mut record = files.load(id)?;
    if let Some(record) = &mut record
        && record.phase.runs()
        && files.fenced_at(id)?.is_some()
    {
        record.phase = Phase::Stopped(Exit::Fenced);
    }
    Ok(record)
}

pub(crate) fn now_ms() -> u64 {
    u64::try_from(since_epoch().as_millis()).unwrap_or(u64::MAX)
}

fn since_epoch() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// What was not there is gone too.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The state directory.
pub(crate) struct Files {
    pub(crate) dir: PathBuf,
}

impl Files {
    fn record_path(&self, id: &InstanceId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// Where the fencer's word lies that the instance has ended.
    pub(crate) fn marker_path(&self, id: &InstanceId) -> PathBuf {
        self.dir.join(format!("{id}.fenced"))
    }

    /// When the fencer ended it, in microseconds since 1970; `None` if it did not.
    pub(crate) fn fenced_at(&self, id: &InstanceId) -> io::Result<Option<u64>> {
        match fs::read_to_string(self.marker_path(id)) {
            Ok(text) => Ok(Some(text.trim().parse().unwrap_or(0))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// What the fencer did counts no more: it has been taken over into the record.
    pub(crate) fn unmark(&self, id: &InstanceId) -> io::Result<()> {
        gone(fs::remove_file(self.marker_path(id)))
    }

    fn log_path(&self, id: &InstanceId) -> PathBuf {
        self.dir.join(format!("{id}.log"))
    }

    /// Where a source puts what it hands over.
    fn arrived_path(&self, id: &InstanceId) -> PathBuf {
        self.dir.join(format!("{id}.arrived"))
    }

    /// What was handed over to here and not taken up yet.
    pub(crate) fn arrived(&self, id: &InstanceId) -> io::Result<Option<Arrived>> {
        match fs::read(self.arrived_path(id)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn put_arrived(&self, id: &InstanceId, arrived: &Arrived) -> io::Result<()> {
        let partial = self.dir.join(format!(".{id}.arriving"));
        fs::write(&partial, serde_json::to_vec(arrived)?)?;
        fs::rename(&partial, self.arrived_path(id))
    }

    pub(crate) fn remove_arrived(&self, id: &InstanceId) -> io::Result<()> {
        gone(fs::remove_file(self.arrived_path(id)))?;
        gone(fs::remove_file(self.dir.join(format!(".{id}.arriving"))))
    }

    pub(crate) fn load(&self, id: &InstanceId) -> io::Result<Option<Record>> {
        match fs::read(self.record_path(id)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(crate) fn save(&self, record: &Record) -> io::Result<()> {
        let id = &record.config.id;
        fs::create_dir_all(&self.dir)?;
        let partial = self.dir.join(format!(".{id}.partial"));
        fs::write(&partial, serde_json::to_vec_pretty(record)?)?;
        fs::rename(&partial, self.record_path(id))
    }

    /// The record goes last: as long as something is there, [`Files::list`] finds it.
    pub(crate) fn remove(&self, id: &InstanceId) -> io::Result<()> {
        let partial = self.dir.join(format!(".{id}.partial"));
        self.remove_arrived(id)?;
        let (log, cut) = (self.log_path(id), self.dir.join(format!("{id}.log-partial")));
        for path in [log, cut, self.marker_path(id), partial, self.record_path(id)] {
            gone(fs::remove_file(path))?;
        }
        // Something may have been handed over in between.
        self.remove_arrived(id)
    }

    pub(crate) fn list(&self) -> io::Result<Vec<InstanceId>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(|id| id.parse().ok());
            ids.extend(id);
        }
        ids.sort();
        Ok(ids)
    }

    pub(crate) fn note(&self, id: &InstanceId, what: LedgerEvent, start: u32) -> io::Result<()> {
        self.note_at(id, what, start, u64::try_from(since_epoch().as_micros()).unwrap_or(u64::MAX))
    }

    pub(crate) fn note_at(
        &self,
        id: &InstanceId,
        what: LedgerEvent,
        start: u32,
        at_us: u64,
    ) -> io::Result<()> {
        let entry = LedgerEntry { id: id.clone(), what, start, at_us, pid: std::process::id() };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        fs::create_dir_all(&self.dir)?;
        let mut file = fs::OpenOptions::new().create(true).append(true).open(self.dir.join(LEDGER))?;
        if file.metadata()?.len() > MAX_LEDGER_BYTES {
            file.set_len(0)?;
        }
        file.write_all(&line)
    }

    pub(crate) fn print(&self, id: &InstanceId, text: &[u8]) -> io::Result<()> {
        console_log::append(&self.log_path(id), now_ms(), text)
    }

    /// What was printed since then, in milliseconds since 1970, as far as it is kept.
    pub(crate) fn printed(&self, id: &InstanceId, since_ms: u64) -> io::Result<Vec<u8>> {
        console_log::read(&self.log_path(id), since_ms)
    }
}
