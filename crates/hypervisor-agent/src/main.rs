//! `hypervisor-agent`: flags, configuration and logs around the library.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hv_config::{Loaded, Sources};
use hv_telemetry::{LogOptions, Shutdown};
use hypervisor_agent::config::Config;

/// The file that is read where --config names none.
const DEFAULT_CONFIG: &str = "/etc/hypervisor/agent.yaml";
/// Variables of the server and the command line, which share the prefix: on one machine all may be set.
const FOREIGN_VARIABLES: [&str; 6] = [
    "HYPERVISOR_SERVER*",
    "HYPERVISOR_CTL_*",
    "HYPERVISOR_CLUSTER_*",
    "HYPERVISOR_ETCD_*",
    "HYPERVISOR_SCHEDULER_*",
    "HYPERVISOR_EVENTS_*",
];
/// Threads that run tasks: the work is waiting, and each thread costs memory.
const WORKER_THREADS: usize = 2;
/// Threads that may block on files; further work of that kind waits.
const BLOCKING_THREADS: usize = 8;
/// How long blocking work may go on after the end.
const EXIT_DEADLINE: Duration = Duration::from_secs(5);

const AFTER_HELP: &str = "\
Examples:
  hypervisor-agent --server-addr 10.0.0.1:50051
      Joins the cluster of that server; state in /var/lib/hypervisor/agent.
  hypervisor-agent --state-dir ./node-a --grpc-address :0 --http-address :0
      A node of its own directory on free ports; ./node-a/agent.json says which.
  hypervisor-agent --drivers fake --state-dir ./fake
      A node that runs nothing, to try things out.
  hypervisor-agent config show
      Every setting in effect, and where it came from.

A setting is taken from the flag, else from the environment (agent.server_addr is HYPERVISOR_AGENT_SERVER_ADDR), else \
from the file, else from its default. configs/agent.example.yaml explains all of them.

Stopping the agent stops no instance: they run on, and the next start takes them over.";

/// The node agent of Hypervisor: runs the instances that the control plane binds to this node.
#[derive(Debug, Parser)]
#[command(name = "hypervisor-agent", version, after_help = AFTER_HELP, args_conflicts_with_subcommands = false)]
struct Cli {
    #[command(flatten)]
    flags: Flags,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Prints the version.
    Version,
    /// Stops what may run elsewhere when the control plane is out of reach. Started by the agent itself.
    #[command(hide = true)]
    Fencer,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Prints every setting with its value and origin.
    Show,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DriverName {
    Qemu,
    Fake,
    Libvirt,
    Containerd,
    Firecracker,
}

#[derive(Debug, Args)]
struct Flags {
    /// Configuration file [default: /etc/hypervisor/agent.yaml if it exists]
    #[arg(long, value_name = "FILE", env = "HYPERVISOR_CONFIG", global = true)]
    config: Option<PathBuf>,
    /// The server's address; several are tried in turn [default: 127.0.0.1:50051]
    #[arg(long, value_name = "HOST:PORT,…", global = true)]
    server_addr: Option<String>,
    /// The node's id [default: made at the first start and kept]
    #[arg(long, value_name = "ID", global = true)]
    node_id: Option<String>,
    /// Where the journal and the instances are kept [default: /var/lib/hypervisor/agent]
    #[arg(long, value_name = "DIR", global = true)]
    state_dir: Option<String>,
    /// Where the images of virtual machines are [default: images in the state directory]
    #[arg(long, value_name = "DIR", global = true)]
    image_dir: Option<String>,
    /// Where QEMU's disks lie that other nodes reach at the same path [default: in the state directory, on this node alone]
    #[arg(long, value_name = "DIR", global = true)]
    disk_dir: Option<String>,
    /// Where gRPC listens; port 0 takes a free one [default: :50052]
    #[arg(long, value_name = "[HOST]:PORT", global = true)]
    grpc_address: Option<String>,
    /// Where health and metrics listen [default: :8081]
    #[arg(long, value_name = "[HOST]:PORT", global = true)]
    http_address: Option<String>,
    /// Drivers to use, and no others [default: qemu]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', global = true)]
    drivers: Option<Vec<DriverName>>,
    /// The node's region
    #[arg(long, value_name = "NAME", global = true)]
    region: Option<String>,
    /// The node's zone
    #[arg(long, value_name = "NAME", global = true)]
    zone: Option<String>,
    /// A label of the node; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", global = true)]
    labels: Vec<String>,
    /// The least important records that are logged: debug, info, warn, error [default: info]
    #[arg(long, value_name = "LEVEL", global = true)]
    log_level: Option<String>,
    /// How records are written: text, json [default: text]
    #[arg(long, value_name = "FORMAT", global = true)]
    log_format: Option<String>,
}

impl Flags {
    fn load(self) -> anyhow::Result<Loaded<Config>> {
        let enabled = |name| self.drivers.as_ref().map(|drivers| drivers.contains(&name));
        let loaded = Sources::new()
            .file(self.config.as_ref())
            .fallback_file(DEFAULT_CONFIG)
            .environment(std::env::vars_os())
            // Of the other programs, which may share an environment with this one.
            .allow_variables(FOREIGN_VARIABLES)
            .flag("agent.server_addr", "--server-addr", self.server_addr.as_ref())
            .flag("agent.node_id", "--node-id", self.node_id.as_ref())
            .flag("agent.state_dir", "--state-dir", self.state_dir.as_ref())
            .flag("drivers.qemu.image_dir", "--image-dir", self.image_dir.as_ref())
            .flag("drivers.qemu.disk_dir", "--disk-dir", self.disk_dir.as_ref())
            .flag("agent.grpc_address", "--grpc-address", self.grpc_address.as_ref())
            .flag("agent.http_address", "--http-address", self.http_address.as_ref())
            .flag("drivers.qemu.enabled", "--drivers", enabled(DriverName::Qemu))
            .flag("drivers.fake.enabled", "--drivers", enabled(DriverName::Fake))
            .flag("libvirt.enabled", "--drivers", enabled(DriverName::Libvirt))
            .flag("containerd.enabled", "--drivers", enabled(DriverName::Containerd))
            .flag("firecracker.enabled", "--drivers", enabled(DriverName::Firecracker))
            .flag("agent.region", "--region", self.region.as_ref())
            .flag("agent.zone", "--zone", self.zone.as_ref())
            .repeated_flag("agent.labels", "--label", &self.labels)
            .flag("log_level", "--log-level", self.log_level.as_ref())
            .flag("log_format", "--log-format", self.log_format.as_ref())
            .load::<Config>()?;
        if let Err(refused) = loaded.value.check() {
            return Err(loaded.refuse(refused.key, refused.problem).into());
        }
        Ok(loaded)
    }
}

fn main() -> ExitCode {
    // containerd's shims start this program to keep what containers print.
    if let Some(ended) = hv_driver_containerd::keeper::run_if_asked() {
        return ended;
    }
    let cli = Cli::parse();
    match execute(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hypervisor-agent: {}", hv_telemetry::error_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn execute(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Some(Command::Version) => {
            println!("hypervisor-agent {}", env!("CARGO_PKG_VERSION"));
            return Ok(());
        }
        #[cfg(target_os = "linux")]
        Some(Command::Fencer) => {
            let dir =
                cli.flags.state_dir.unwrap_or_else(|| hypervisor_agent::config::DEFAULT_STATE_DIR.into());
            return Ok(hypervisor_agent::fencing::process::run(dir.as_ref())?);
        }
        #[cfg(not(target_os = "linux"))]
        Some(Command::Fencer) => anyhow::bail!("there is no fencer for this system"),
        Some(Command::Config { command: ConfigCommand::Show }) => {
            print!("{}", cli.flags.load()?.to_table());
            return Ok(());
        }
        None => {}
    }
    let config = cli.flags.load()?.value;
    hv_telemetry::init(LogOptions { level: config.log_level, format: config.log_format })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        let shutdown = Shutdown::on_signals()?;
        Box::pin(hypervisor_agent::run(config, shutdown)).await?;
        anyhow::Ok(())
    });
    runtime.shutdown_timeout(EXIT_DEADLINE);
    ended
}
