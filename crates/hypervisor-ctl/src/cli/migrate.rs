//! `instance migrate`.

use clap::Args;
use hv_config::{ByteSize, HumanDuration};

use super::{RequestKeyArgs, WaitArgs};

/// `instance migrate`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The instance runs on while it is moved. Whatever fails before it has been handed over, it goes on where it was;
`hypervisor-ctl operation cancel` gives the move up.

Examples:
  hypervisor-ctl instance migrate web
  hypervisor-ctl vm migrate web --to node-2 --copy-storage
  hypervisor-ctl vm migrate web --downtime-limit 50ms --bandwidth 100MiB --give-up-after 10m --no-wait")]
pub struct MigrateArgs {
    /// Name, id, or the beginning of an id
    pub name: String,
    /// To which node [default: the one that the scheduler prefers]
    #[arg(long, value_name = "NODE")]
    pub to: Option<String>,
    /// Copy the disks too, instead of relying on both nodes reaching the same files
    #[arg(long)]
    pub copy_storage: bool,
    /// How long it may stand still [default: 300ms]
    #[arg(long, value_name = "DURATION")]
    pub downtime_limit: Option<HumanDuration>,
    /// Send at most so much in a second, as 100MiB [default: no bound]
    #[arg(long, value_name = "BYTES")]
    pub bandwidth: Option<ByteSize>,
    /// Give the move up if it takes longer [default: 1h]
    #[arg(long, value_name = "DURATION")]
    pub give_up_after: Option<HumanDuration>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}
