//! `make bench`: what the system costs, beside bare QEMU on the same machine in the same run.
//!
//! - Create to guest: from the call of CreateInstance to the guest's greeting on its console, against QEMU started by
//!   hand with exactly the same arguments; in turns, medians over several rounds.
//! - Idle memory of server and agent, and how long `hypervisor-ctl version` takes.
//!
//! Prints a table, and writes the raw figures as JSON to the file named by the first argument.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hv_client::ComputeClient;
use hv_testkit::{
    AgentOptions, Ask, Cluster, ClusterOptions, Program, create_request, image_dir, qemu_processes, until,
    until_gone,
};
use serde_json::json;

/// What the guest image prints when it is up.
const GREETING: &[u8] = b"hypervisor-guest: hello";
/// Rounds unless `BENCH_ROUNDS` says otherwise.
const ROUNDS: usize = 7;
/// How often `hypervisor-ctl version` is run.
const VERSIONS: usize = 21;
/// How long the programs are left alone before their memory is read.
const IDLE: Duration = Duration::from_secs(5);
/// How often a console is looked at; the same for both, and far below what is measured.
const LOOK: Duration = Duration::from_millis(5);

#[tokio::main]
async fn main() -> Result<()> {
    let images = image_dir().context("there is no guest image: run hack/setup.sh images")?;
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let options = AgentOptions { drivers: vec!["qemu"], image_dir: Some(images), ..AgentOptions::default() };
    let agent = cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    tokio::time::sleep(IDLE).await;
    let server_kib = cluster.server().map(|p| resident_kib(p.id())).context("the server is gone")??;
    let agent_kib = cluster.agent(agent).map(|p| resident_kib(p.id())).context("the agent is gone")??;
    let version_ms = version_times()?;

    let rounds = std::env::var("BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let client = cluster.clients()?.compute();
    let (mut through, mut bare) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        eprintln!("round {round} of {rounds}{}", if round == 0 { " (warms up, is not counted)" } else { "" });
        let (ms, machine) = through_system(&client, &format!("bench-{round}")).await?;
        let alone = bare_qemu(&machine)?;
        if round > 0 {
            through.push(ms);
            bare.push(alone);
        }
    }
    let (system_ms, bare_ms) = (median(&through), median(&bare));
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average: {}", load.trim());
    row("measure", "system", "bare QEMU", "ratio", "bar");
    let ratio = system_ms / bare_ms;
    row(
        "create to guest",
        &format!("{system_ms:.0} ms"),
        &format!("{bare_ms:.0} ms"),
        &format!("{ratio:.3}"),
        "1.10",
    );
    row("server, idle", &format!("{:.1} MiB", server_kib / 1024.0), "", "", "40 MiB");
    row("agent, idle", &format!("{:.1} MiB", agent_kib / 1024.0), "", "", "25 MiB");
    row("hypervisor-ctl version", &format!("{:.1} ms", median(&version_ms)), "", "", "10 ms");
    let raw = json!({
        "create_to_guest_ms": { "system": through, "bare_qemu": bare, "ratio_of_medians": ratio },
        "idle_memory_kib": { "server": server_kib, "agent": agent_kib },
        "ctl_version_ms": version_ms,
        "load_average": load.trim(),
    });
    if let Some(file) = std::env::args().nth(1) {
        std::fs::write(&file, format!("{raw:#}\n"))?;
        println!("raw figures: {file}");
    }
    Ok(())
}

fn row(measure: &str, system: &str, bare: &str, ratio: &str, bar: &str) {
    println!("{measure:<24} {system:>12} {bare:>12} {ratio:>8} {bar:>8}");
}

/// What is needed to start the same machine by hand.
struct Machine {
    program: PathBuf,
    args: Vec<String>,
}

/// Creates an instance and waits for its greeting; milliseconds, and how QEMU was started.
async fn through_system(client: &ComputeClient, name: &str) -> Result<(f64, Machine)> {
    let begin = Instant::now();
    let id = client.clone().create_instance(create_request(name)).await?.into_inner().id;
    let pid = loop {
        match qemu_processes(&id)?.first() {
            Some(pid) => break *pid,
            None => tokio::time::sleep(LOOK).await,
        }
        ensure!(begin.elapsed() < hv_testkit::DEADLINE, "no QEMU process appears");
    };
    let dir = std::fs::read_link(format!("/proc/{pid}/cwd"))?;
    wait_for_greeting(&dir, begin)?;
    let ms = begin.elapsed().as_secs_f64() * 1000.0;
    let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    let mut words = command.trim_end_matches('\0').split('\0').map(str::to_owned);
    words.next();
    let machine = Machine { program: std::fs::read_link(format!("/proc/{pid}/exe"))?, args: words.collect() };
    Ask::Delete.send(client, &id, &format!("delete-{name}")).await?;
    until_gone(client, &id).await?;
    until("QEMU to be gone", async || Ok(qemu_processes(&id)?.is_empty().then_some(()))).await?;
    Ok((ms, machine))
}

/// Starts the same machine by hand; milliseconds until its greeting.
fn bare_qemu(machine: &Machine) -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let begin = Instant::now();
    let mut child = Command::new(&machine.program)
        .args(&machine.args)
        .current_dir(&dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let greeted = wait_for_greeting(dir.path(), begin);
    let ms = begin.elapsed().as_secs_f64() * 1000.0;
    child.kill()?;
    child.wait()?;
    greeted?;
    Ok(ms)
}

/// Blocks until the console in `dir` has the greeting.
fn wait_for_greeting(dir: &Path, begin: Instant) -> Result<()> {
    let console = dir.join("console.log");
    loop {
        let text = std::fs::read(&console).unwrap_or_default();
        if text.windows(GREETING.len()).any(|window| window == GREETING) {
            return Ok(());
        }
        ensure!(begin.elapsed() < hv_testkit::DEADLINE, "no greeting: {}", String::from_utf8_lossy(&text));
        #[allow(clippy::disallowed_methods, reason = "nothing else runs in this program meanwhile")]
        std::thread::sleep(LOOK);
    }
}

fn resident_kib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no figure")?.parse()?)
}

fn version_times() -> Result<Vec<f64>> {
    let program = Program::Ctl.path()?;
    let mut times = Vec::with_capacity(VERSIONS);
    for _ in 0..VERSIONS {
        let begin = Instant::now();
        let status = Command::new(&program).arg("version").stdout(Stdio::null()).status()?;
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
        ensure!(status.success(), "hypervisor-ctl version failed");
    }
    Ok(times)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}
