//! `instance update` and `instance snapshot …`.

use clap::{Args, Subcommand};
use hv_config::ByteSize;
use hv_proto::v1;

use super::{NameArgs, RequestKeyArgs, WaitArgs, value};

/// `instance update`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
What the instance's runtime cannot change while it runs takes effect when it is started the next time; the answer says
so, as does `instance describe`. The node must have room for what is added. Disks only grow.

Examples:
  hypervisor-ctl instance update web --cpus 4 --memory 8GiB
  hypervisor-ctl instance update db --set-disk name=data,size=200GiB --remove-disk scratch
  hypervisor-ctl instance update web --name web-old")]
pub struct UpdateArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "NAME")]
    pub target: String,
    /// Its new cores
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    #[arg(value_parser = clap::value_parser!(i32).range(1..=4096))]
    pub cpus: Option<i32>,
    /// Its new memory: a number of MiB, or a size as 512MiB or 1GiB
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, value_parser = value::memory)]
    pub memory: Option<ByteSize>,
    /// Its new name
    #[arg(long, value_name = "NEW")]
    pub name: Option<String>,
    /// A disk to add or to grow, as name=data,size=10GiB[,type=ssd]; may be repeated
    #[arg(long, value_name = "DISK", value_parser = value::disk)]
    pub set_disk: Vec<v1::DiskSpec>,
    /// A disk to remove with what is on it; may be repeated
    #[arg(long, value_name = "NAME")]
    pub remove_disk: Vec<String>,
    /// Only if the instance is still at this revision
    #[arg(long, value_name = "REVISION")]
    pub if_revision: Option<u64>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// `instance rescue`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The instance is stopped and started from the rescue image, with its own disks behind the first one. What is written to
the rescue disk is lost with the next start. Until `instance unrescue` it cannot be changed, moved, or have snapshots taken.
Containers have no rescue.

Examples:
  hypervisor-ctl instance rescue web --image debian-13
  hypervisor-ctl instance console web")]
pub struct RescueArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "NAME")]
    pub target: String,
    /// The image to start from
    #[arg(long, value_name = "IMAGE")]
    pub image: String,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// `instance unrescue`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  hypervisor-ctl instance unrescue web")]
pub struct UnrescueArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "NAME")]
    pub target: String,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// `instance rename`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
An instance keeps its id, its disks and what it runs. A guest that runs sees its new host name when it starts anew.
Instances of a set are named after it and cannot be renamed.

Examples:
  hypervisor-ctl instance rename web web-old")]
pub struct RenameArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "OLD")]
    pub target: String,
    /// Its new name: 1 to 63 lower-case letters, digits and -
    #[arg(value_name = "NEW")]
    pub new: String,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// What can be done with the snapshots of an instance.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Keep what an instance is at this moment under a name
    #[command(after_long_help = "\
Without --memory only the disks are kept, as if the power had failed at that moment.

Examples:
  hypervisor-ctl instance snapshot create web before-upgrade
  hypervisor-ctl instance snapshot create web warm --memory --no-wait")]
    Create(SnapshotCreateArgs),
    /// List the snapshots of an instance, oldest first
    #[command(
        visible_alias = "ls",
        after_long_help = "Examples:\n  hypervisor-ctl instance snapshot list web"
    )]
    List(NameArgs),
    /// Forget a snapshot
    #[command(
        visible_alias = "rm",
        after_long_help = "Examples:\n  hypervisor-ctl instance snapshot delete web before-upgrade"
    )]
    Delete(SnapshotArgs),
    /// Return an instance to a snapshot
    #[command(after_long_help = "\
What the instance has written since is lost. With memory in the snapshot it goes on from that moment, if it is to run;
without, it is started afresh from the disks as they were.

Examples:
  hypervisor-ctl instance snapshot revert web before-upgrade")]
    Revert(SnapshotArgs),
}

/// One snapshot.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// Name, id, or the beginning of an id
    pub name: String,
    /// The snapshot's name
    pub snapshot: String,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// A new snapshot.
#[derive(Debug, Args)]
pub struct SnapshotCreateArgs {
    /// Which one.
    #[command(flatten)]
    pub target: SnapshotArgs,
    /// Keep the memory of a running instance too
    #[arg(long)]
    pub memory: bool,
}
