//! `image …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hv_config::HumanDuration;
use hv_types::InstanceType;

use super::{RequestKeyArgs, WaitArgs, value};

/// `image …`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// List the images that nodes have
    #[command(visible_alias = "ls", after_long_help = "Examples:\n  hypervisor-ctl image list --type vm")]
    List(ImageListArgs),
    /// Make nodes fetch an image, and wait until they have it
    Pull(ImagePullArgs),
    /// Send a file to a node as an image
    Push(ImagePushArgs),
    /// Show one image: what it is, where it is, how many instances use it
    #[command(
        visible_aliases = ["get", "describe"],
        after_long_help = "Examples:\n  hypervisor-ctl image inspect debian-13"
    )]
    Inspect(ImageNameArgs),
    /// Remove an image from nodes; refused where an instance uses it
    #[command(visible_alias = "rm")]
    Delete(ImageDeleteArgs),
    /// Remove images that no instance uses
    Gc(ImageGcArgs),
}

/// `image list`.
#[derive(Debug, Args)]
pub struct ImageListArgs {
    /// Only images for this type: vm, container or microvm
    #[arg(long, value_name = "TYPE", value_parser = value::instance_type)]
    pub r#type: Option<InstanceType>,
}

/// `image pull`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
An instance whose image is a reference makes its node fetch it by itself; pulling it before makes the first start quick.

Examples:
  hypervisor-ctl image pull --type container oci://registry.example:5000/busybox:1.36
  hypervisor-ctl image pull --type vm https://images.example/debian-13.qcow2 --name debian-13 --node n1 --node n2
  hypervisor-ctl image pull --type vm http://10.0.0.5/disk.raw --digest sha256:9f86d0…")]
pub struct ImagePullArgs {
    /// Where from: oci://registry/name:tag, https://…, http://… with --digest, or file:///… on the node
    pub reference: String,
    /// What it is for: vm, container or microvm
    #[arg(long, value_name = "TYPE", value_parser = value::instance_type)]
    pub r#type: InstanceType,
    /// The name under which it is kept; default: the reference
    #[arg(long)]
    pub name: Option<String>,
    /// Only on these nodes, by name or id; default: every node that is ready and runs the type
    #[arg(long = "node", visible_alias = "nodes", value_name = "NODE", value_delimiter = ',')]
    pub nodes: Vec<String>,
    /// What it must be: sha256: and 64 hexadecimal digits
    #[arg(long, value_name = "DIGEST")]
    pub digest: Option<String>,
    /// How many nodes fetch at once, up to 16 [default: 16]
    #[arg(long, value_name = "NODES", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub max_parallel: Option<u32>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// `image push`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl image push --type vm --name appliance --node n1 appliance.qcow2
  hypervisor-ctl image push --type container --name job --node n1 job-oci-layout.tar")]
pub struct ImagePushArgs {
    /// A disk (raw, qcow2, vmdk, vhd), a kernel (ELF), or an OCI image layout as a tar file
    #[arg(value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// What it is for: vm, container or microvm
    #[arg(long, value_name = "TYPE", value_parser = value::instance_type)]
    pub r#type: InstanceType,
    /// The name under which it is kept
    #[arg(long)]
    pub name: String,
    /// To which node, by name or id
    #[arg(long, value_name = "NODE")]
    pub node: String,
    /// What it must be: sha256: and 64 hexadecimal digits
    #[arg(long, value_name = "DIGEST")]
    pub digest: Option<String>,
}

/// Names an image.
#[derive(Debug, Args)]
pub struct ImageNameArgs {
    /// Its name, as `image list` shows it
    pub name: String,
}

/// `image delete`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:\n  hypervisor-ctl image delete debian-13 --node n1")]
pub struct ImageDeleteArgs {
    /// Its name, as `image list` shows it
    pub name: String,
    /// Only from this node, by name or id; repeatable; default: from all
    #[arg(long = "node", value_name = "NODE")]
    pub nodes: Vec<String>,
}

/// `image gc`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Nodes do this by themselves, too; see images.unused_for and images.keep_free in the agent's configuration.

Examples:
  hypervisor-ctl image gc --dry-run
  hypervisor-ctl image gc --unused-for 24h --node n1")]
pub struct ImageGcArgs {
    /// Only what no instance used for so long
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub unused_for: HumanDuration,
    /// Only on this node, by name or id; repeatable; default: on all
    #[arg(long = "node", value_name = "NODE")]
    pub nodes: Vec<String>,
    /// Only say what would go
    #[arg(long)]
    pub dry_run: bool,
}
