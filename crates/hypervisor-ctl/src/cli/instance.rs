//! `instance …`, also reached as `vm`, `container` and `microvm`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hv_config::HumanDuration;
use hv_types::{InstanceState, InstanceType};

use super::placement::ShapeArgs;
use super::{
    CloneArgs, MigrateArgs, RenameArgs, RequestKeyArgs, RescueArgs, SnapshotCommand, UnrescueArgs,
    UpdateArgs, WaitArgs, value,
};

/// What can be done with instances.
#[derive(Debug, Subcommand)]
pub enum InstanceCommand {
    /// List instances
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Print instances
    #[command(after_long_help = "\
Examples:
  hypervisor-ctl instance get web
  hypervisor-ctl instance get web --watch
  hypervisor-ctl instance get web -o json")]
    Get(GetArgs),
    /// Everything about an instance: what it is made of, where it runs, what happened to it
    #[command(after_long_help = "Examples:\n  hypervisor-ctl instance describe web")]
    Describe(NameArgs),
    /// Why an instance is where it is, or why no node can take it and what would help
    #[command(after_long_help = "Examples:\n  hypervisor-ctl instance explain web")]
    Explain(NameArgs),
    /// Create an instance, or many alike, and wait until it runs
    Create(Box<CreateArgs>),
    /// Let an instance run
    #[command(after_long_help = "Examples:\n  hypervisor-ctl instance start web db")]
    Start(NamesArgs),
    /// Shut an instance down; its disks are kept
    Stop(StopArgs),
    /// Shut an instance down and let it run again
    Restart(RestartArgs),
    /// Let an instance stand still in memory
    #[command(after_long_help = "Examples:\n  hypervisor-ctl instance pause web")]
    Pause(NamesArgs),
    /// Let a paused instance go on
    #[command(after_long_help = "Examples:\n  hypervisor-ctl instance resume web")]
    Resume(NamesArgs),
    /// Change the cores, memory, disks or name of an instance
    Update(UpdateArgs),
    /// Give an instance another name, running or not
    Rename(RenameArgs),
    /// Start an instance from another image, to repair it
    Rescue(RescueArgs),
    /// Start an instance from its own disks again
    Unrescue(UnrescueArgs),
    /// Keep what an instance is, and return to it
    #[command(subcommand, visible_alias = "snapshots")]
    Snapshot(SnapshotCommand),
    /// Make new instances from a snapshot
    Clone(CloneArgs),
    /// Move a running instance to another node without stopping it
    Migrate(MigrateArgs),
    /// Remove an instance with its disks
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
    /// Use an instance's console
    Console(ConsoleArgs),
    /// Run a command in an instance
    Exec(ExecArgs),
    /// What an instance has printed
    Logs(LogsArgs),
    /// How much an instance uses
    Stats(StatsArgs),
}

/// `instance list`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl instance list
  hypervisor-ctl vm list --node node-1 --state running
  hypervisor-ctl instance list -l tier=web,zone=* -o name
  hypervisor-ctl instance list --watch")]
pub struct ListArgs {
    /// Only on this node
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Only of this type: vm, container or microvm
    #[arg(long, value_name = "TYPE", value_parser = value::instance_type)]
    pub r#type: Option<InstanceType>,
    /// Only in this state: pending, creating, running, stopped, paused, failed, …
    #[arg(long, value_name = "STATE", value_parser = value::instance_state)]
    pub state: Option<InstanceState>,
    /// Only with these labels, as a=b,c=* or c
    #[arg(short = 'l', long, value_name = "LABELS", value_parser = value::selector)]
    pub selector: Vec<value::Pairs>,
    /// Only of this project
    #[arg(long, value_name = "PROJECT")]
    pub project: Option<String>,
    /// Go on with every change
    #[arg(short, long)]
    pub watch: bool,
}

/// One object to look at.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Name, id, or the beginning of an id
    pub name: String,
}

/// One or more objects to look at.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Go on with every change; takes one name
    #[arg(short, long)]
    pub watch: bool,
}

/// One or more instances to change.
#[derive(Debug, Args)]
pub struct NamesArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
}

/// `instance stop`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl instance stop web
  hypervisor-ctl instance stop web --grace 2m
  hypervisor-ctl instance stop web --force")]
pub struct StopArgs {
    /// Which ones, and whether to wait.
    #[command(flatten)]
    pub target: NamesArgs,
    /// Do not ask the guest, pull the plug
    #[arg(long)]
    pub force: bool,
    /// How long the guest may take before the plug is pulled [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = value::grace)]
    pub grace: Option<HumanDuration>,
}

/// `instance restart`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl instance restart web
  hypervisor-ctl instance restart web --force")]
pub struct RestartArgs {
    /// Which ones, and whether to wait.
    #[command(flatten)]
    pub target: NamesArgs,
    /// Do not ask the guest, pull the plug
    #[arg(long)]
    pub force: bool,
}

/// `instance delete`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl instance delete web
  hypervisor-ctl instance list -l tier=test -o name | xargs hypervisor-ctl instance delete")]
pub struct DeleteArgs {
    /// Which ones, and whether to wait.
    #[command(flatten)]
    pub target: NamesArgs,
    /// Forget the instance even if its node does not answer; the node removes it when it comes back
    #[arg(long)]
    pub force: bool,
    /// Do not fail if there is no such instance
    #[arg(long)]
    pub ignore_not_found: bool,
}

/// `instance create`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl vm create web --image debian-13 --cpus 2 --memory 1GiB
  hypervisor-ctl instance create --name web --type vm --image debian-13 --cpus 2 --memory 1024
  hypervisor-ctl vm create db --image debian-13 --disk name=data,size=10GiB --user-data cloud-init.yaml \\
      --label tier=db --zone b --node-selector disk=ssd
  hypervisor-ctl vm create web --count 10 --image debian-13 --label tier=web --spread tier=web,topology=zone \\
      --restart on-failure --failover restart
  hypervisor-ctl vm create tiny --kernel vmlinuz --initrd initrd.img --kernel-args 'console=ttyS0'
  hypervisor-ctl container create job --image alpine -- /bin/sh -c 'echo done'")]
pub struct CreateArgs {
    /// Its name: 1 to 63 lower-case letters, digits and -
    #[arg(value_name = "NAME", required_unless_present = "name_flag", conflicts_with = "name_flag")]
    pub name: Option<String>,
    /// Its name, as a flag
    #[arg(id = "name_flag", long = "name", value_name = "NAME")]
    pub name_flag: Option<String>,
    /// Create so many alike, named NAME-1, NAME-2, …: all of them or none
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub count: Option<u32>,
    /// What it is like.
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// File with cloud-init user data; - for standard input
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Whether to wait.
    #[command(flatten)]
    pub wait: WaitArgs,
    /// The request's identity.
    #[command(flatten)]
    pub key: RequestKeyArgs,
    /// Containers: runs instead of the image's entry point
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `instance console`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
On a terminal, everything that is typed goes to the guest; Ctrl-] detaches. Otherwise standard input is sent, and
after its end the output is printed until there has been none for --linger.

Examples:
  hypervisor-ctl instance console web
  hypervisor-ctl instance console web --until 'login:' --timeout 60s
  echo uptime | hypervisor-ctl instance console web --no-raw")]
pub struct ConsoleArgs {
    /// Name, id, or the beginning of an id
    pub name: String,
    /// Send nothing; print until this text has been seen (exit 0) or --timeout is over (exit 7)
    #[arg(long, value_name = "TEXT")]
    pub until: Option<String>,
    /// Leave the terminal as it is and send standard input line by line, also with --until
    #[arg(long)]
    pub no_raw: bool,
    /// Key that detaches, as ctrl-] or ctrl-a; none for no such key
    #[arg(long, value_name = "KEY", default_value = "ctrl-]", value_parser = value::detach_key)]
    pub detach_key: value::DetachKey,
    /// After the end of standard input, stop when nothing was printed for so long
    #[arg(long, value_name = "DURATION", default_value = "2s")]
    pub linger: HumanDuration,
}

/// `instance exec`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The exit code is the command's own.

Examples:
  hypervisor-ctl instance exec web -- uname -a
  hypervisor-ctl instance exec -it web -- /bin/sh
  tar c site | hypervisor-ctl instance exec -i web -- tar x -C /srv")]
pub struct ExecArgs {
    /// Name, id, or the beginning of an id
    pub name: String,
    /// Send standard input
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Run it in a terminal
    #[arg(short = 't', long)]
    pub tty: bool,
    /// Environment variable; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = value::pair)]
    pub env: Vec<value::Pair>,
    /// Program and arguments; no shell is involved
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// `instance logs`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl instance logs web --tail 20
  hypervisor-ctl instance logs web --since 10m
  hypervisor-ctl instance logs web --follow")]
pub struct LogsArgs {
    /// Name, id, or the beginning of an id
    pub name: String,
    /// Go on with what comes
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last so many lines
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    pub tail: Option<i64>,
    /// Only what was printed in so long, as exactly as the runtime keeps times; never less
    #[arg(long, value_name = "DURATION")]
    pub since: Option<HumanDuration>,
}

/// `instance stats`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  hypervisor-ctl instance stats web db
  hypervisor-ctl instance stats web --watch --interval 5s")]
pub struct StatsArgs {
    /// Name, id, or the beginning of an id
    #[arg(value_name = "NAME", required = true)]
    pub names: Vec<String>,
    /// Read again and again
    #[arg(short, long)]
    pub watch: bool,
    /// How often to read with --watch
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = value::interval)]
    pub interval: HumanDuration,
}
