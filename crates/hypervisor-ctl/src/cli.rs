//! The command tree: every command, flag and help text.

mod clone;
mod image;
mod instance;
mod migrate;
mod node;
mod operation;
mod placement;
mod store;
mod update;
pub(crate) mod value;

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use hv_config::HumanDuration;
use hv_telemetry::{LogLevel, RequestId};

pub use clone::CloneArgs;
pub use image::{
    ImageCommand, ImageDeleteArgs, ImageGcArgs, ImageListArgs, ImageNameArgs, ImagePullArgs, ImagePushArgs,
};
pub use instance::{
    ConsoleArgs, CreateArgs, DeleteArgs, ExecArgs, GetArgs, InstanceCommand, ListArgs, LogsArgs, NameArgs,
    NamesArgs, RestartArgs, StatsArgs, StopArgs,
};
pub use migrate::MigrateArgs;
pub use node::{
    DrainArgs, NodeCommand, NodeListArgs, NodeNameArgs, NodeNamesArgs, NodeRemoveArgs, NodeUpdateArgs,
};
pub use operation::{OperationArgs, OperationCancelArgs, OperationCommand, OperationListArgs};
pub use placement::{KindArgs, PlacementArgs, ScheduleArgs, ShapeArgs};
pub use store::{StoreCommand, StoreCompactArgs, StoreDumpArgs, StoreFileArgs, StoreMigrateArgs};
pub use update::{
    RenameArgs, RescueArgs, SnapshotArgs, SnapshotCommand, SnapshotCreateArgs, UnrescueArgs, UpdateArgs,
};

use crate::output::OutputFormat;

const AFTER_HELP: &str = "\
Wherever a NAME is asked for, an id or the beginning of an id does too.

Exit codes:
  0  done
  1  failed
  2  wrong usage: a flag, a file or a value in it
  3  not found
  4  exists already, or changed by somebody else meanwhile
  5  not possible in the object's present state
  6  the server does not answer, or cannot now
  7  did not happen within --timeout
  8  the instance failed
  `instance exec` exits with the command's own code.

Settings: flag, then environment (HYPERVISOR_CTL_SERVER, HYPERVISOR_CTL_OUTPUT, …), then
~/.config/hypervisor/ctl.yaml, then the default. `hypervisor-ctl config show` prints what is in effect.

Examples:
  hypervisor-ctl vm create web --image debian-13 --cpus 2 --memory 1GiB
  hypervisor-ctl instance list -o wide
  hypervisor-ctl instance console web
  hypervisor-ctl apply -f web.yaml --dry-run";

/// Runs virtual machines, containers and microVMs on a cluster of nodes
#[derive(Debug, Parser)]
#[command(name = "hypervisor-ctl", version, max_term_width = 100, after_long_help = AFTER_HELP)]
#[command(after_help = "Use --help for exit codes, settings and examples.")]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalArgs {
    /// Where the server is: host:port, :port, http://… or https://… [default: 127.0.0.1:50051]
    #[arg(short, long, global = true, value_name = "ADDRESS")]
    pub server: Option<String>,
    /// How to print: table, wide, json, yaml or name [default: table]
    #[arg(short, long, global = true, value_name = "FORMAT", hide_possible_values = true)]
    pub output: Option<OutputFormat>,
    /// How long to wait for what was asked for, as 90s or 5m [default: 5m]
    #[arg(long, global = true, value_name = "DURATION")]
    pub timeout: Option<HumanDuration>,
    /// Print no progress and no confirmations
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Settings file [default: ~/.config/hypervisor/ctl.yaml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The request's identity in the logs of server and agents [default: a new one]
    #[arg(long, global = true, value_name = "ID")]
    pub request_id: Option<RequestId>,
    /// Print log records of the command line itself: debug, info, warn or error
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<LogLevel>,
    /// Certificate of the authority that signed the server's certificate; turns TLS on
    #[arg(long, global = true, value_name = "FILE", hide_short_help = true)]
    pub tls_ca_file: Option<PathBuf>,
    /// Own certificate, where the server asks for one
    #[arg(long, global = true, value_name = "FILE", hide_short_help = true)]
    pub tls_cert_file: Option<PathBuf>,
    /// Key of the own certificate
    #[arg(long, global = true, value_name = "FILE", hide_short_help = true)]
    pub tls_key_file: Option<PathBuf>,
    /// Name in the server's certificate, where it is not the address's host
    #[arg(long, global = true, value_name = "NAME", hide_short_help = true)]
    pub tls_server_name: Option<String>,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Virtual machines, containers and microVMs
    #[command(subcommand, visible_alias = "instances")]
    Instance(InstanceCommand),
    /// Instances of type vm; every command of `instance`
    #[command(subcommand, visible_alias = "vms")]
    Vm(InstanceCommand),
    /// Instances of type container; every command of `instance`
    #[command(subcommand, visible_alias = "containers")]
    Container(InstanceCommand),
    /// Instances of type microvm; every command of `instance`
    #[command(subcommand, visible_alias = "microvms")]
    Microvm(InstanceCommand),
    /// The machines that instances run on
    #[command(subcommand, visible_alias = "nodes")]
    Node(NodeCommand),
    /// What instances can be started from
    #[command(subcommand, visible_alias = "images")]
    Image(ImageCommand),
    /// The cluster as a whole
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Where instances would be placed now
    Schedule(Box<ScheduleArgs>),
    /// Work that takes long: drains and the like
    #[command(subcommand, visible_alias = "operations")]
    Operation(OperationCommand),
    /// Where all records lie: status, backup, restore, move
    #[command(subcommand)]
    Store(StoreCommand),
    /// What happened, newest last
    Events(EventsArgs),
    /// Create or update what files describe
    Apply(ApplyArgs),
    /// The settings of this command line
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The version of this command line, and of the server if asked for
    Version(VersionArgs),
    /// Shell completion
    Completion(CompletionArgs),
    /// Manual pages
    Man(ManArgs),
    /// The reference page of all commands, as Markdown
    #[command(hide = true)]
    DocsMarkdown,
}

/// `cluster …`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Nodes, instances, capacity, store and leader in one view
    #[command(
        after_long_help = "Examples:\n  hypervisor-ctl cluster info\n  hypervisor-ctl cluster info -o json"
    )]
    Info,
}

/// `events`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl events
  hypervisor-ctl events --for instance/web
  hypervisor-ctl events --watch --warnings")]
pub struct EventsArgs {
    /// Go on with what happens from now on
    #[arg(short, long)]
    pub watch: bool,
    /// Only about this object: instance/NAME or node/NAME
    #[arg(long = "for", value_name = "KIND/NAME", value_parser = value::event_object)]
    pub object: Option<value::EventObject>,
    /// Only what somebody should look at
    #[arg(long)]
    pub warnings: bool,
    /// At most so many of the past
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub tail: u32,
}

/// `apply`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
A file holds one or more YAML or JSON documents:

  kind: Instance
  name: web
  type: vm
  wanted: running          # running, stopped or paused; default: running when it is created
  spec:
    image: debian-13
    cpus: 2
    memory: 1GiB
    disks:
      - name: data
        size: 10GiB
  metadata:
    labels: {tier: web}
  zone: b                  # placement: region, zone, preferred_node_id, node_selector

Names are those of the API, as memory_bytes or memoryBytes; cpus, memory and size are short forms. What
`instance get -o yaml` prints can be applied again with `kind: Instance` added.

An instance that exists is updated: labels and annotations (each replaced as a whole where given), cpus, memory and
disks (the list as a whole: what is missing is removed with what is on it; disks only grow), and what it is wanted to
be. Nothing else can change; such a change is refused before anything is done.

Examples:
  hypervisor-ctl apply -f web.yaml --dry-run
  hypervisor-ctl apply -f deployment/
  generate | hypervisor-ctl apply -f -")]
pub struct ApplyArgs {
    /// A file, a directory (its .yaml, .yml and .json files) or - for standard input; may be repeated
    #[arg(short, long = "filename", value_name = "FILE|DIR|-", required = true)]
    pub filename: Vec<PathBuf>,
    /// Show what would change, and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// Whether to wait for what was asked for.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct WaitArgs {
    /// Wait until it is so, at most --timeout (the default)
    #[arg(long, overrides_with = "no_wait")]
    pub wait: bool,
    /// Return as soon as the server has noted the request
    #[arg(long, overrides_with = "wait")]
    pub no_wait: bool,
}

/// The identity of a mutation.
#[derive(Debug, Clone, Default, Args)]
pub struct RequestKeyArgs {
    /// Name this request: sent again with the same key it has no second effect [default: a new key]
    #[arg(long, value_name = "KEY", hide_short_help = true)]
    pub request_key: Option<hv_types::RequestKey>,
}

/// `config …`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Every setting with its value and where it came from
    Show,
}

/// `version`.
#[derive(Debug, Args)]
pub struct VersionArgs {
    /// Ask the server for its version too
    #[arg(long)]
    pub server_version: bool,
}

/// `completion`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl completion bash > /etc/bash_completion.d/hypervisor-ctl
  hypervisor-ctl completion zsh > \"${fpath[1]}/_hypervisor-ctl\"
  hypervisor-ctl completion fish > ~/.config/fish/completions/hypervisor-ctl.fish")]
pub struct CompletionArgs {
    /// Which shell
    pub shell: clap_complete::Shell,
}

/// `man`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl man | man -l -
  hypervisor-ctl man --dir /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Write a page for each command into this directory
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

/// The command tree, ready for documentation: names of all levels are filled in.
pub fn command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    command
}
