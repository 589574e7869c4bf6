//! `store …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What can be done with the store.
#[derive(Debug, Subcommand)]
pub enum StoreCommand {
    /// Size, room, members, revision, warnings
    #[command(after_long_help = "Examples:\n  hypervisor-ctl store status")]
    Status,
    /// Write all records, as they are at one moment, into a file
    #[command(after_long_help = "\
The file appears under its name only once it is whole. Signs of life, elections and request keys are not in it.

Examples:
  hypervisor-ctl store backup hypervisor.backup
  hypervisor-ctl store backup - | ssh vault 'cat > hypervisor.backup'")]
    Backup(StoreFileArgs),
    /// Take over the records of a backup, into a server whose store is empty
    #[command(after_long_help = "\
The file is checked before the first record is written. Nodes and instances that the records do not know of are kept
and reported as events, never removed.

Examples:
  hypervisor-ctl store restore hypervisor.backup")]
    Restore(StoreFileArgs),
    /// Print all records as lines of JSON
    #[command(after_long_help = "Examples:\n  hypervisor-ctl store dump --prefix instances/")]
    Dump(StoreDumpArgs),
    /// Forget superseded values, and give their room back with --defragment
    #[command(after_long_help = "\
Servers do this by themselves; it is for those who cannot wait.

Examples:
  hypervisor-ctl store compact --defragment")]
    Compact(StoreCompactArgs),
    /// Move all records to another server, as from the embedded store to etcd
    #[command(after_long_help = "\
Freezes this server (changes are refused, what runs goes on), copies, and leaves it frozen: point agents and users at the
other server, then stop this one. If the copy fails this server is unfrozen.

Examples:
  hypervisor-ctl store migrate --to 10.0.0.2:50051")]
    Migrate(StoreMigrateArgs),
    /// Refuse changes of users, on all servers
    #[command(after_long_help = "What runs goes on.\n\nExamples:\n  hypervisor-ctl store freeze")]
    Freeze,
    /// Accept changes of users again
    #[command(after_long_help = "Examples:\n  hypervisor-ctl store unfreeze")]
    Unfreeze,
}

/// A file.
#[derive(Debug, Args)]
pub struct StoreFileArgs {
    /// The file; - for standard output or input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// `store dump`.
#[derive(Debug, Args)]
pub struct StoreDumpArgs {
    /// Only records whose key starts with this, as instances/ or nodes/
    #[arg(long, value_name = "PREFIX", default_value = "")]
    pub prefix: String,
}

/// `store compact`.
#[derive(Debug, Args)]
pub struct StoreCompactArgs {
    /// Also give the room back to the file system, one member after the other
    #[arg(long)]
    pub defragment: bool,
}

/// `store migrate`.
#[derive(Debug, Args)]
pub struct StoreMigrateArgs {
    /// The server that takes over; its store must be empty
    #[arg(long, value_name = "ADDRESS")]
    pub to: String,
}
