//! From the create call to the guest's greeting, against QEMU started by hand with the same arguments, in turns; and what
//! the idle programs cost.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hv_client::ComputeClient;
use hv_testkit::{
    AgentOptions, Ask, Cluster, ClusterOptions, Program, Usage, create_request, image_dir, median,
    qemu_processes, until, until_gone,
};
use serde_json::json;

use crate::report::{Bar, Row};

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

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let images = image_dir().context("there is no guest image: run hack/setup.sh images")?;
    let mut cluster = Cluster::start(ClusterOptions::default()).await?;
    let options = AgentOptions { drivers: vec!["qemu"], image_dir: Some(images), ..AgentOptions::default() };
    let agent = cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    tokio::time::sleep(IDLE).await;
    let server = Usage::of(cluster.server().context("the server is gone")?.id())?.resident_bytes;
    let agent = Usage::of(cluster.agent(agent).context("the agent is gone")?.id())?.resident_bytes;
    let version_ms = version_times()?;

    let rounds = std::env::var("BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let client = cluster.clients()?.compute();
    let (mut through, mut bare) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (ms, machine) = through_system(&client, &format!("bench-{round}-x")).await?;
        let alone = bare_qemu(&machine)?;
        // The first round warms up.
        if round > 0 {
            through.push(ms);
            bare.push(alone);
        }
    }
    let row = |measure: &str, unit, bar, measured, baseline, raw| Row {
        measure: measure.into(),
        unit,
        bar: Some(bar),
        measured,
        baseline,
        raw,
    };
    let baseline = Some(("bare QEMU".to_owned(), median(&bare)));
    let raw = json!({ "system_ms": through, "bare_qemu_ms": bare });
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    Ok(vec![
        row("create to guest", "ms", Bar::TimesAtMost(1.05), median(&through), baseline, raw),
        row("server's memory, idle", "MiB", Bar::Most(40.0), mib(server), None, json!(server)),
        row("agent's memory, idle", "MiB", Bar::Most(25.0), mib(agent), None, json!(agent)),
        row("`hypervisor-ctl version`", "ms", Bar::Most(10.0), median(&version_ms), None, json!(version_ms)),
    ])
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
