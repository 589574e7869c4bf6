//! What the agent remembers across its own restarts: one small JSON file per instance, and one for the node.
//!
//! # Theory of operation
//! A file is written under another name, synced, renamed over the old one, and the directory is synced: a crash leaves
//! the old text or the new one, never a mixture. The agent saves an entry before it acts on it.
//!
//! # Failure and recovery
//! A file that cannot be read is left where it is and its instance is not touched until the control plane speaks of
//! it; the node shows the condition `Journal`. A file of a newer release keeps the agent from starting.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use hv_types::InstanceId;
use serde::{Deserialize, Serialize};

use crate::entry::{ENTRY_SCHEMA, Entry};

/// How a file that is being written ends.
const UNFINISHED: &str = ".tmp";
/// Largest file that is read, in bytes: a specification has bounds far below.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory or a file in it cannot be used.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The state directory cannot be used.
    #[error("cannot use the state directory {}; choose another with --state-dir, or make it writable", path.display())]
    StateDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another agent uses it.
    #[error("another agent uses the state directory {}; stop it, or give this one its own with --state-dir", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// It was written by a newer release.
    #[error("{} was written by a newer release (schema {found}, this one reads up to {ENTRY_SCHEMA}); upgrade this agent", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
    },
    /// The node's file cannot be read.
    #[error("{} is damaged; move it away, and set agent.node_id to the node's id so that the node is known again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

/// Who this node is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NodeFile {
    /// The node's id.
    pub(crate) node_id: Option<String>,
    /// The cluster that it belongs to.
    pub(crate) cluster_id: Option<String>,
}

/// What was read at the start.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    pub(crate) entries: Vec<Entry>,
    /// Instances whose file cannot be read, and why.
    pub(crate) damaged: BTreeMap<InstanceId, String>,
}

/// The open journal. Holds the state directory's lock.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    instances: PathBuf,
    _lock: File,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io { action, path, source }
}

impl Journal {
    /// Opens the journal of a state directory, which is made where it is missing.
    ///
    /// # Errors
    /// The directory cannot be used, or another agent uses it.
    pub(crate) fn open(state_dir: &Path) -> Result<Self, JournalError> {
        let dir = state_dir.join("journal");
        let instances = dir.join("instances");
        let unusable = |source| JournalError::StateDir { path: state_dir.to_owned(), source };
        make_private(&instances).map_err(unusable)?;
        let lock_path = state_dir.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(io_error("open the lock", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir, instances, _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(JournalError::Locked { path: state_dir.to_owned() }),
            Err(fs::TryLockError::Error(source)) => {
                Err(JournalError::Io { action: "take the lock", path: lock_path, source })
            }
        }
    }

    /// Who this node is, as far as it is known.
    ///
    /// # Errors
    /// The file is there and cannot be read: going on would make this a second node.
    pub(crate) fn node(&self) -> Result<NodeFile, JournalError> {
        let path = self.dir.join("node.json");
        match read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| JournalError::Damaged { path, source })
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(NodeFile::default()),
            Err(source) => Err(JournalError::Io { action: "read", path, source }),
        }
    }

    /// Remembers who this node is.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn save_node(&self, node: &NodeFile) -> Result<(), JournalError> {
        write(&self.dir, "node.json", &serde_json::to_vec_pretty(node).unwrap_or_default())
    }

    /// Everything that is remembered. What a crash left half written is removed.
    ///
    /// # Errors
    /// The directory cannot be read, or a newer release wrote it.
    pub(crate) fn read_all(&self) -> Result<Contents, JournalError> {
        let mut contents = Contents::default();
        let listing = fs::read_dir(&self.instances).map_err(io_error("list", &self.instances))?;
        for file in listing {
            let path = file.map_err(io_error("list", &self.instances))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.ends_with(UNFINISHED) {
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
                continue;
            }
            let Some(id) = name.strip_suffix(".json").and_then(|id| id.parse::<InstanceId>().ok()) else {
                continue;
            };
            let bytes = read(&path).map_err(io_error("read", &path))?;
            match parse(&path, &bytes)? {
                // An older schema lacks only what has a default.
                Ok(entry) if *entry.id() == id => {
                    contents.entries.push(Entry { schema: ENTRY_SCHEMA, ..entry });
                }
                Ok(entry) => {
                    contents.damaged.insert(id, format!("{} is about {}", path.display(), entry.id()));
                }
                Err(error) => {
                    contents.damaged.insert(id, format!("{}: {error}", path.display()));
                }
            }
        }
        contents.entries.sort_by(|a, b| a.id().cmp(b.id()));
        Ok(contents)
    }

    /// Remembers an instance. Returns when a crash can no longer undo it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn save(&self, entry: &Entry) -> Result<(), JournalError> {
        let text = serde_json::to_vec(entry).unwrap_or_default();
        write(&self.instances, &format!("{}.json", entry.id()), &text)
    }

    /// Forgets an instance; one that is not remembered is forgotten already.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub(crate) fn remove(&self, id: &InstanceId) -> Result<(), JournalError> {
        let path = self.instances.join(format!("{id}.json"));
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.and_then(|()| sync_dir(&self.instances)).map_err(io_error("remove", &path)),
        }
    }
}

/// `Err` inside: damaged.
fn parse(path: &Path, bytes: &[u8]) -> Result<Result<Entry, serde_json::Error>, JournalError> {
    #[derive(Deserialize)]
    struct Schema {
        schema: u32,
    }
    match serde_json::from_slice::<Schema>(bytes) {
        Ok(Schema { schema }) if schema > ENTRY_SCHEMA => {
            Err(JournalError::Newer { path: path.to_owned(), found: schema })
        }
        _ => Ok(serde_json::from_slice(bytes)),
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(File::open(path)?, MAX_FILE_BYTES), &mut bytes)?;
    Ok(bytes)
}

/// Replaces a file so that a crash leaves the old text or the new one.
///
/// # Errors
/// The directory cannot be written.
pub(crate) fn write(dir: &Path, name: &str, text: &[u8]) -> Result<(), JournalError> {
    let path = dir.join(name);
    let unfinished = dir.join(format!("{name}{UNFINISHED}"));
    let save = || {
        let mut file = File::create(&unfinished)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&unfinished, &path)?;
        sync_dir(dir)
    };
    save().map_err(io_error("write", &path))
}

/// Only for the agent's own user: specifications carry cloud-init documents, and these secrets.
#[cfg(unix)]
fn make_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// As the parent directory has it.
#[cfg(not(unix))]
fn make_private(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)
}

#[cfg(unix)]
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Directories cannot be opened as files there; the rename is journalled by the file system.
#[cfg(not(unix))]
fn sync_dir(_dir: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use hv_driver::InstanceConfig;
    use hv_types::InstanceType;

    use super::*;

    fn entry(id: &str) -> Entry {
        let id = id.parse().unwrap();
        let config = InstanceConfig {
            id,
            name: "a".into(),
            spec: Default::default(),
            metadata: Default::default(),
            image: None,
            rescue_image: None,
            devices: None,
        };
        Entry::local(config, InstanceType::Vm)
    }

    #[test]
    fn what_was_saved_is_read_back_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let node = NodeFile { node_id: Some("n".into()), cluster_id: None };
        {
            let journal = Journal::open(dir.path()).unwrap();
            journal.save(&entry("b")).unwrap();
            journal.save(&entry("a")).unwrap();
            journal.save(&Entry { generation: 7, ..entry("a") }).unwrap();
            journal.save(&entry("c")).unwrap();
            journal.remove(&"c".parse().unwrap()).unwrap();
            journal.remove(&"c".parse().unwrap()).unwrap();
            journal.save_node(&node).unwrap();
        }
        let journal = Journal::open(dir.path()).unwrap();
        let read: Vec<_> =
            journal.read_all().unwrap().entries.iter().map(|e| (e.id().to_string(), e.generation)).collect();
        assert_eq!(read, [("a".to_owned(), 7), ("b".to_owned(), 0)]);
        assert_eq!(journal.node().unwrap(), node);
    }

    #[test]
    fn a_write_that_a_crash_cut_off_leaves_the_old_text() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.save(&entry("a")).unwrap();
        let whole = serde_json::to_vec(&Entry { generation: 9, ..entry("a") }).unwrap();
        let unfinished = dir.path().join("journal/instances/a.json.tmp");
        for cut in 0..whole.len() {
            fs::write(&unfinished, &whole[..cut]).unwrap();
            let contents = journal.read_all().unwrap();
            assert_eq!((contents.entries.len(), contents.damaged.len()), (1, 0), "cut at {cut}");
            assert_eq!(contents.entries[0].generation, 0);
            assert!(!unfinished.exists());
        }
    }

    #[test]
    fn a_damaged_file_is_named_and_left_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        journal.save(&entry("a")).unwrap();
        let path = dir.path().join("journal/instances/b.json");
        for text in [&b""[..], b"{", b"{\"schema\":1}", b"\xff\xfe"] {
            fs::write(&path, text).unwrap();
            let contents = journal.read_all().unwrap();
            assert_eq!(contents.entries.len(), 1);
            assert!(contents.damaged["b"].contains("b.json"), "{:?}", contents.damaged);
            assert_eq!(fs::read(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_journal_of_the_release_before_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let mut old = serde_json::to_value(entry("a")).unwrap();
        for key in ["fence", "restart_policy", "restarts"] {
            old.as_object_mut().unwrap().remove(key).unwrap();
        }
        old["schema"] = 1.into();
        fs::write(dir.path().join("journal/instances/a.json"), serde_json::to_vec(&old).unwrap()).unwrap();
        let read = journal.read_all().unwrap();
        assert_eq!(
            (read.entries.len(), read.entries[0].schema, read.entries[0].fence),
            (1, ENTRY_SCHEMA, false)
        );
    }

    #[test]
    fn a_journal_of_a_newer_release_is_not_guessed_at() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        fs::write(dir.path().join("journal/instances/b.json"), b"{\"schema\":99}").unwrap();
        assert!(matches!(journal.read_all(), Err(JournalError::Newer { found: 99, .. })));
    }

    #[test]
    fn a_second_agent_is_kept_out() {
        let dir = tempfile::tempdir().unwrap();
        let first = Journal::open(dir.path()).unwrap();
        let refusal = Journal::open(dir.path()).unwrap_err().to_string();
        assert!(refusal.contains("--state-dir"), "{refusal}");
        drop(first);
        Journal::open(dir.path()).unwrap();
    }
}
