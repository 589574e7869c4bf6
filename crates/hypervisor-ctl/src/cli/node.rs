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
What cannot be moved is listed with the reason, and the exit code is 5.

Examples:
  hypervisor-ctl node drain node-1
  hypervisor-ctl node drain node-1 --discard-local-disks")]
pub struct DrainArgs {
    /// Host name, id, or the beginning of an id
    pub name: String,
    /// Also move instances whose disks lie on the node: they start afresh from their image
    #[arg(long)]
    pub discard_local_disks: bool,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}
