//! `instance clone`.

use clap::Args;

use super::{RequestKeyArgs, WaitArgs};

/// `instance clone`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Clones run on the node that has the snapshot, each with a name, id and addresses of its own. From a snapshot with memory they
go on where it was taken, instead of booting. Source and clones do not need each other afterwards.

Examples:
  hypervisor-ctl microvm snapshot create golden warm --memory
  hypervisor-ctl microvm clone golden --snapshot warm web
  hypervisor-ctl microvm clone golden --snapshot warm web --count 20")]
pub struct CloneArgs {
    /// Whose snapshot: name, id, or the beginning of an id
    pub source: String,
    /// The new instance's name
    #[arg(value_name = "NEWNAME")]
    pub name: String,
    /// From which snapshot
    #[arg(long, value_name = "NAME")]
    pub snapshot: String,
    /// Make so many, named NEWNAME-1, NEWNAME-2, …: all of them or none
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub count: Option<u32>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}
