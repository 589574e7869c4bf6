//! Placement, policies and what else an instance is made of, as flags; and `schedule`.

use clap::Args;
use hv_config::{ByteSize, HumanDuration};
use hv_proto::v1;
use hv_types::InstanceType;
use hv_types::instance::{FailoverPolicy, RestartPolicy};

use super::value;

/// What an instance is made of and where it may go.
#[derive(Debug, Args)]
pub struct ShapeArgs {
    /// vm, container or microvm; implied by `vm create` and the like
    #[arg(long, value_name = "TYPE", value_parser = value::instance_type)]
    pub r#type: Option<InstanceType>,
    /// The image it starts from; see `hypervisor-ctl image list`
    #[arg(long, value_name = "IMAGE", required_unless_present = "kernel")]
    pub image: Option<String>,
    /// Processor cores
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true)]
    #[arg(value_parser = clap::value_parser!(i32).range(1..=4096))]
    pub cpus: i32,
    /// Memory: a number of MiB, or a size as 512MiB or 1GiB
    #[arg(long, value_name = "SIZE", default_value = "512MiB", allow_negative_numbers = true)]
    #[arg(value_parser = value::memory)]
    pub memory: ByteSize,
    /// A further disk, as name=data,size=10GiB[,type=ssd]; name=root,size=20GiB,boot sizes the image's own
    #[arg(long, value_name = "DISK", value_parser = value::disk)]
    pub disk: Vec<v1::DiskSpec>,
    /// Kernel for a direct boot: a file name in the node's image directory
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// Initial ram disk: a file name in the node's image directory
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<String>,
    /// Added to the kernel command line
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    pub kernel_args: Option<String>,
    /// Environment variable of a container; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = value::pair)]
    pub env: Vec<value::Pair>,
    /// What only some types have.
    #[command(flatten)]
    pub kind: KindArgs,
    /// A label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = value::pair)]
    pub label: Vec<value::Pair>,
    /// An annotation; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = value::pair)]
    pub annotation: Vec<value::Pair>,
    /// Whose it is [default: default]
    #[arg(long, value_name = "PROJECT")]
    pub project: Option<String>,
    /// Where it may go.
    #[command(flatten)]
    pub placement: PlacementArgs,
}

/// What only instances of some types have.
#[derive(Debug, Args)]
#[command(next_help_heading = "Of virtual machines and containers")]
pub struct KindArgs {
    /// How a virtual machine boots: bios or uefi [default: the driver's choice]
    #[arg(long, value_name = "FIRMWARE", value_parser = ["bios", "uefi"], hide_possible_values = true)]
    pub firmware: Option<String>,
    /// Give a virtual machine a trusted platform module of its own
    #[arg(long)]
    pub tpm: bool,
    /// Give each core of a virtual machine a processor of its node that no other instance gets
    #[arg(long)]
    pub dedicated_cpus: bool,
    /// Size of the huge pages that a virtual machine's memory lies in, as 2MiB or 1GiB
    #[arg(long, value_name = "SIZE")]
    pub hugepages: Option<ByteSize>,
    /// PCI device for a virtual machine, vendor:device as 10de:2204, with =COUNT for several; can be repeated
    #[arg(long, value_name = "KIND", value_parser = super::value::pci_need)]
    pub device: Vec<v1::PciNeed>,
    /// Whom a container runs as: uid or uid:gid [default: the image's user; 65534 where it names none]
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Where a container's process begins, an absolute path [default: the image's]
    #[arg(long, value_name = "DIR")]
    pub working_dir: Option<String>,
    /// Let a container write nothing outside of its volumes
    #[arg(long)]
    pub read_only: bool,
    /// Processes and threads of a container at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub pids_limit: Option<i64>,
    /// Command that tells whether a container is well: exit code 0 says so; words separated by spaces, no shell is
    /// involved
    #[arg(long, value_name = "COMMAND")]
    pub health_cmd: Option<String>,
    /// From one end of the check to the next begin [default: 30s]
    #[arg(long, value_name = "DURATION", requires = "health_cmd")]
    pub health_interval: Option<HumanDuration>,
    /// How long the check may take [default: 5s]
    #[arg(long, value_name = "DURATION", requires = "health_cmd")]
    pub health_timeout: Option<HumanDuration>,
    /// So many failures in a row end the container with a failure [default: 3]
    #[arg(long, value_name = "N", requires = "health_cmd")]
    pub health_retries: Option<u32>,
    /// Failures in the first seconds do not count, as 30s
    #[arg(long, value_name = "DURATION", requires = "health_cmd")]
    pub health_start: Option<HumanDuration>,
}

/// Where an instance may go.
#[derive(Debug, Args)]
#[command(next_help_heading = "Placement")]
pub struct PlacementArgs {
    /// Only this node
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Only this region
    #[arg(long)]
    pub region: Option<String>,
    /// Only this zone
    #[arg(long)]
    pub zone: Option<String>,
    /// Only nodes with these labels, as a=b,c=* or c
    #[arg(long, value_name = "LABELS", value_parser = value::selector)]
    pub node_selector: Vec<value::Pairs>,
    /// Where other instances are, as tier=web, instance=db or tier=web,topology=zone,preferred
    #[arg(long, value_name = "PEERS", value_parser = value::near)]
    pub near: Vec<v1::AffinityRule>,
    /// Where other instances are not, as tier=web or tier=web,topology=zone
    #[arg(long, value_name = "PEERS", value_parser = value::away)]
    pub away: Vec<v1::AffinityRule>,
    /// Evenly over places, as tier=web,topology=zone,max-skew=2
    #[arg(long, value_name = "PEERS", value_parser = value::spread)]
    pub spread: Vec<v1::SpreadRule>,
    /// A taint of nodes that does not matter, as gpu=a100, gpu or *
    #[arg(long, value_name = "TAINT", value_parser = value::toleration)]
    pub toleration: Vec<v1::Toleration>,
    /// Higher is placed first, -1000 to 1000
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    #[arg(value_parser = clap::value_parser!(i32).range(-1000..=1000))]
    pub priority: i32,
    /// When it ends by itself: never (leave it), on-failure or always (start it again on its node)
    #[arg(long, value_name = "POLICY", default_value = "never", value_parser = value::restart_policy)]
    pub restart: RestartPolicy,
    /// When its node is lost: never (wait for the node) or restart (start it afresh elsewhere, once it is certain that
    /// it does not run there)
    #[arg(long, value_name = "POLICY", default_value = "never", value_parser = value::failover_policy)]
    pub failover: FailoverPolicy,
}

/// `schedule`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Nothing is created. Takes what `instance create` takes, except for names, user data and commands.

Examples:
  hypervisor-ctl schedule --dry-run --type vm --image debian-13 --cpus 8 --memory 16GiB
  hypervisor-ctl schedule --dry-run --count 100 --type vm --image debian-13 --spread tier=web --label tier=web")]
pub struct ScheduleArgs {
    /// Required: only asks, changes nothing
    #[arg(long, required = true)]
    pub dry_run: bool,
    /// How many of them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// What each is like.
    #[command(flatten)]
    pub shape: ShapeArgs,
}
