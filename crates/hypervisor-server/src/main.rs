//! `hypervisor-server`: the control plane.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use hv_config::{ListenAddress, Loaded, Sources};
use hv_telemetry::{LogOptions, Shutdown};
use hypervisor_server::Settings;

/// Where the configuration file is looked for if none is named.
const DEFAULT_FILE: &str = "/etc/hypervisor/server.yaml";

/// Variables of the agent and the command line, which share the prefix: on one machine all may be set.
const FOREIGN_VARIABLES: [&str; 7] = [
    "HYPERVISOR_SERVER",
    "HYPERVISOR_AGENT_*",
    "HYPERVISOR_CTL_*",
    "HYPERVISOR_DRIVERS_*",
    "HYPERVISOR_LIBVIRT_*",
    "HYPERVISOR_CONTAINERD_*",
    "HYPERVISOR_FIRECRACKER_*",
];

/// The control plane of Hypervisor: takes users' calls, places instances on nodes, and keeps the cluster's state.
///
/// Every setting can come from a flag, an environment variable (HYPERVISOR_SERVER_GRPC_ADDRESS=:9090), the
/// configuration file or the default, in this order. `config show` tells where each value came from.
#[derive(Parser)]
#[command(name = "hypervisor-server", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

const EXAMPLES: &str = "Examples:
  hypervisor-server --dev --data-dir ./dev        everything on loopback, state in ./dev
  hypervisor-server --config server.yaml          as configured
  hypervisor-server --etcd-endpoints http://10.0.0.1:2379,http://10.0.0.2:2379
  hypervisor-server config show                   the effective settings and their origin";

#[derive(Subcommand)]
enum Command {
    /// Run the server (the default).
    Serve,
    /// Show the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Print the version.
    Version,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Print every setting, its value and where it came from.
    Show,
}

#[derive(Args)]
struct Flags {
    /// Configuration file [default: /etc/hypervisor/server.yaml, if it is there]
    #[arg(long, global = true, env = "HYPERVISOR_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Run on loopback only, with the embedded store; for one machine and for development
    #[arg(long, global = true)]
    dev: bool,
    /// Where gRPC is served, as `:50051` or `127.0.0.1:50051`
    #[arg(long, global = true, value_name = "ADDRESS")]
    grpc_address: Option<String>,
    /// Where health and metrics are served
    #[arg(long, global = true, value_name = "ADDRESS")]
    http_address: Option<String>,
    /// Where the embedded store lies
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<String>,
    /// etcd members, separated by commas; none: the embedded store
    #[arg(long, global = true, value_name = "URLS")]
    etcd_endpoints: Option<String>,
    /// `spread` or `bin-pack`
    #[arg(long, global = true, value_name = "STRATEGY")]
    scheduler_strategy: Option<String>,
    /// How often nodes send heartbeats, as `10s`
    #[arg(long, global = true, value_name = "DURATION")]
    heartbeat_interval: Option<String>,
    /// How long a node lives without one, as `30s`
    #[arg(long, global = true, value_name = "DURATION")]
    heartbeat_timeout: Option<String>,
    /// debug, info, warn or error
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<String>,
    /// text or json
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hypervisor-server: {}", hv_telemetry::error_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    if let Some(Command::Version) = cli.command {
        println!("hypervisor-server {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    let loaded = load(&cli.flags)?;
    if let Some(Command::Config { command: ConfigCommand::Show }) = cli.command {
        print!("{}", loaded.to_table());
        return Ok(());
    }
    let settings = loaded.value;
    hv_telemetry::init(LogOptions { level: settings.log_level, format: settings.log_format })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the runtime cannot be started")?;
    runtime.block_on(serve(settings))
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    let shutdown = Shutdown::on_signals()?;
    let limit = settings.server.shutdown_timeout.get();
    let server = hypervisor_server::start(settings, &shutdown).await?;
    eprintln!("hypervisor-server is ready: gRPC on {}, HTTP on {}", server.grpc_address, server.http_address);
    let ended = shutdown.wait(limit).await;
    // Also where calls had to be cut: what was acknowledged is durable, and the ready file must not outlive the server.
    server.close().await;
    Ok(ended?)
}

fn load(flags: &Flags) -> anyhow::Result<Loaded<Settings>> {
    let mut loaded = Sources::new()
        .file(flags.config.clone())
        .fallback_file(DEFAULT_FILE)
        .environment(std::env::vars_os())
        .allow_variables(FOREIGN_VARIABLES)
        .flag("server.grpc_address", "--grpc-address", flags.grpc_address.as_ref())
        .flag("server.http_address", "--http-address", flags.http_address.as_ref())
        .flag("server.data_dir", "--data-dir", flags.data_dir.as_ref())
        .flag("etcd.endpoints", "--etcd-endpoints", flags.etcd_endpoints.as_ref())
        .flag("scheduler.strategy", "--scheduler-strategy", flags.scheduler_strategy.as_ref())
        .flag("heartbeat.interval", "--heartbeat-interval", flags.heartbeat_interval.as_ref())
        .flag("heartbeat.timeout", "--heartbeat-timeout", flags.heartbeat_timeout.as_ref())
        .flag("log_level", "--log-level", flags.log_level.as_ref())
        .flag("log_format", "--log-format", flags.log_format.as_ref())
        .load::<Settings>()?;
    if flags.dev {
        apply_dev(&mut loaded)?;
    }
    check(&loaded)?;
    Ok(loaded)
}

/// `--dev` moves what was not set elsewhere to loopback and to the current directory, and refuses anything wider.
fn apply_dev(loaded: &mut Loaded<Settings>) -> anyhow::Result<()> {
    let is_default = |key: &str| loaded.origin(key) == hv_config::Origin::Default;
    let (grpc, http, dir) =
        (is_default("server.grpc_address"), is_default("server.http_address"), is_default("server.data_dir"));
    let server = &mut loaded.value.server;
    if grpc {
        server.grpc_address = ListenAddress::loopback(server.grpc_address.port());
    }
    if http {
        server.http_address = ListenAddress::loopback(server.http_address.port());
    }
    if dir {
        server.data_dir = "hypervisor-dev".into();
    }
    for (key, address) in [
        ("server.grpc_address", &loaded.value.server.grpc_address),
        ("server.http_address", &loaded.value.server.http_address),
    ] {
        if !address.is_loopback() {
            return Err(loaded
                .refuse(key, "--dev serves loopback only; use an address as 127.0.0.1:50051")
                .into());
        }
    }
    Ok(())
}

fn check(loaded: &Loaded<Settings>) -> anyhow::Result<()> {
    let settings = &loaded.value;
    if let Err(refusal) = settings.scheduler.strategy.parse::<hv_scheduler::Strategy>() {
        return Err(loaded.refuse("scheduler.strategy", &refusal.expected).into());
    }
    if settings.heartbeat.timeout.get() < settings.heartbeat.interval.get() * 2 {
        return Err(loaded.refuse("heartbeat.timeout", "must be at least twice heartbeat.interval").into());
    }
    if settings.heartbeat.interval.get().as_millis() < 100 {
        return Err(loaded.refuse("heartbeat.interval", "must be at least 100ms").into());
    }
    if settings.server.leader_ttl.get().as_secs() < 1 {
        return Err(loaded.refuse("server.leader_ttl", "must be at least 1s").into());
    }
    if settings.limits.calls_at_once == 0 || settings.limits.node_calls_at_once == 0 {
        return Err(loaded
            .refuse("limits.calls_at_once", "must be at least 1, as limits.node_calls_at_once")
            .into());
    }
    if settings.tls.enabled && settings.tls.client_auth && settings.tls.ca_file.is_none() {
        return Err(loaded.refuse("tls.client_auth", "needs tls.ca_file").into());
    }
    if settings.tls.enabled && (settings.tls.cert_file.is_none() || settings.tls.key_file.is_none()) {
        return Err(loaded.refuse("tls.enabled", "needs tls.cert_file and tls.key_file").into());
    }
    Ok(())
}
