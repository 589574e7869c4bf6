//! `node …`.

use clap::{Args, Subcommand};
use hv_types::NodeStatus;

use super::{GetArgs, NameArgs, RequestKeyArgs, WaitArgs, value};

/// What can be done with nodes.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List nodes
    #[command(visible_alias = "ls")]
    List(NodeListArgs),
    /// Print nodes
    #[command(after_long_help = "Examples:\n  hypervisor-ctl node get node-1 -o yaml")]
    Get(GetArgs),
    /// Everything about a node: resources, drivers, conditions, instances, events
    #[command(after_long_help = "Examples:\n  hypervisor-ctl node describe node-1")]
    Describe(NameArgs),
    /// Take no new instances; what runs there stays
    #[command(after_long_help = "Examples:\n  hypervisor-ctl node cordon node-1")]
    Cordon(NodeNamesArgs),
    /// Take instances again; ends a drain
    #[command(after_long_help = "Examples:\n  hypervisor-ctl node uncordon node-1")]
    Uncordon(NodeNamesArgs),
    /// Cordon a node and move its instances away
    Drain(DrainArgs),
    /// Change taints, overcommit and reserve
    Update(NodeUpdateArgs),
    /// Leave instances where they are if the node is lost, for maintenance of it or of the network
    #[command(after_long_help = "\
Its instances then neither stop by themselves when the node is cut off nor are started elsewhere.

Examples:
  hypervisor-ctl node hold-failover node-1")]
    HoldFailover(NodeNamesArgs),
    /// End hold-failover
    #[command(after_long_help = "Examples:\n  hypervisor-ctl node release-failover node-1")]
    ReleaseFailover(NodeNamesArgs),
    /// Vouch that a node that does not answer is switched off; what may run elsewhere is started there at once
    #[command(after_long_help = "\
Only after you have seen that it is off: an instance that still runs there would run twice.

Examples:
  hypervisor-ctl node confirm-down node-1")]
    ConfirmDown(NodeNameArgs),
    /// Forget a node, also a lost one with --force
    #[command(visible_alias = "rm")]
    Remove(NodeRemoveArgs),
}

/// One node to change.
#[derive(Debug, Args)]
pub struct NodeNameArgs {
    /// Host name, id, or the beginning of an id
    pub name: String,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// `node remove`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl node remove node-1
  hypervisor-ctl node remove node-1 --force")]
pub struct NodeRemoveArgs {
    /// Which one.
    #[command(flatten)]
    pub target: NodeNameArgs,
    /// Also though instances are bound to it, if it does not answer: it is lost for good
    #[arg(long)]
    pub force: bool,
}

/// `node update`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Instances that are there already stay, whatever changes.

Examples:
  hypervisor-ctl node update node-1 --taint gpu=a100 --taint maintenance:prefer
  hypervisor-ctl node update node-1 --no-taints
  hypervisor-ctl node update node-1 --overcommit cpu=400,memory=120
  hypervisor-ctl node update node-1 --reserve cpus=2,memory=4GiB")]
pub struct NodeUpdateArgs {
    /// Which one.
    #[command(flatten)]
    pub target: NodeNameArgs,
    /// Keeps instances off that do not tolerate it, as key=value; with :prefer only if something else fits. Replaces all
    #[arg(long, value_name = "TAINT", value_parser = value::taint)]
    pub taint: Vec<hv_proto::v1::Taint>,
    /// Remove all taints
    #[arg(long, conflicts_with = "taint")]
    pub no_taints: bool,
    /// How much may be promised, in percent of what there is, as cpu=400,memory=120,disk=100
    #[arg(long, value_name = "PERCENTS", value_parser = value::overcommit)]
    pub overcommit: Option<hv_proto::v1::Overcommit>,
    /// What is kept back from instances, as cpus=2,memory=4GiB,disk=10GiB
    #[arg(long, value_name = "AMOUNTS", value_parser = value::amounts)]
    pub reserve: Option<hv_proto::v1::Resources>,
}

/// `node list`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl node list -o wide
  hypervisor-ctl node list --status ready --region north -l disk=ssd
  hypervisor-ctl node list --watch")]
pub struct NodeListArgs {
    /// Only in this status: ready, not-ready, maintenance or draining
    #[arg(long, value_name = "STATUS", value_parser = value::node_status)]
    pub status: Option<NodeStatus>,
    /// Only in this region
    #[arg(long)]
    pub region: Option<String>,
    /// Only in this zone
    #[arg(long)]
    pub zone: Option<String>,
    /// Only with these labels, as a=b,c=* or c
    #[arg(short = 'l', long, value_name = "LABELS", value_parser = value::selector)]
    pub selector: Vec<value::Pairs>,
    /// Go on with every change
    #[arg(short, long)]
    pub watch: bool,
}

/// One or more nodes to change.
#[derive(Debug, Args)]
pub struct NodeNamesArgs {
    /// Host name, id, or the beginning of an id
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// `node drain`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Progress is that of an operation: `hypervisor-ctl operation list --for node/NAME` shows it, `operation cancel` gives the
drain up. What cannot be moved is listed with the reason, and the exit code is 5.

Examples:
  hypervisor-ctl node drain node-1
  hypervisor-ctl node drain node-1 --discard-local-disks")]
pub struct DrainArgs {
    /// Host name, id, or the beginning of an id
    pub name: String,
    /// Also move instances whose disks lie on the node: they start afresh from their image
    #[arg(long)]
    pub discard_local_disks: bool,
    /// How many instances are on the move at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub max_parallel: u32,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}
