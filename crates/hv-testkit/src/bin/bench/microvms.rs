//! A microVM through the system, against Firecracker started by hand with the same guest, in turns.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hv_client::ComputeClient;
use hv_proto::v1;
use hv_testkit::{
    AgentOptions, Cluster, ClusterOptions, DEADLINE, firecracker, image_dir, median, until_gone,
};
use serde_json::json;

use crate::output::wait_for_all;
use crate::report::{Bar, Row};

/// What the guest prints first.
const GREETING: &[u8] = b"hello";
/// Rounds, unless `BENCH_ROUNDS` says otherwise.
const ROUNDS: usize = 25;
/// What the system may add, in milliseconds.
const MAY_ADD_MS: f64 = 10.0;
const MEMORY_MIB: i64 = 128;

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let binary = firecracker().map_err(anyhow::Error::msg)?;
    let images = image_dir().context("there are no images: run hack/setup.sh images")?;
    let kernel = images.join("hello-microvm.elf");
    let mut cluster =
        Cluster::start(ClusterOptions { log_level: "warn", ..ClusterOptions::default() }).await?;
    let env = vec![
        ("HYPERVISOR_FIRECRACKER_BINARY_PATH", binary.display().to_string()),
        ("HYPERVISOR_FIRECRACKER_IMAGE_DIR", images.display().to_string()),
    ];
    let options = AgentOptions { drivers: vec!["firecracker"], env, ..AgentOptions::default() };
    let agent = cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    let dir = cluster.agent_dir(agent).join("firecracker");
    let client = cluster.clients()?.compute();
    let rounds = std::env::var("BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let (mut through, mut alone) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let bare_ms = bare(&binary, &kernel)?;
        let system_ms = through_system(&client, &dir, &format!("bench-{round}-x")).await?;
        // The first round warms up.
        if round > 0 {
            alone.push(bare_ms);
            through.push(system_ms);
        }
    }
    Ok(vec![Row {
        measure: "microVM: create to first output".into(),
        unit: "ms",
        bar: Some(Bar::OverAtMost(MAY_ADD_MS)),
        measured: median(&through),
        baseline: Some(("bare Firecracker".to_owned(), median(&alone))),
        raw: json!({ "system_ms": through, "bare_ms": alone }),
    }])
}

async fn through_system(client: &ComputeClient, dir: &Path, name: &str) -> Result<f64> {
    let request = v1::CreateInstanceRequest {
        name: name.into(),
        r#type: v1::InstanceType::Microvm.into(),
        spec: Some(v1::InstanceSpec {
            image: "hello-microvm".into(),
            cpu_cores: 1,
            memory_bytes: MEMORY_MIB << 20,
            ..v1::InstanceSpec::default()
        }),
        ..v1::CreateInstanceRequest::default()
    };
    let begin = Instant::now();
    let id = client.clone().create_instance(request).await?.into_inner().id;
    wait_for_all(vec![dir.join(&id).join("console.log")], GREETING, begin)?;
    let ms = begin.elapsed().as_secs_f64() * 1000.0;
    let request = v1::DeleteInstanceRequest { instance_id: id.clone(), force: true, ..Default::default() };
    client.clone().delete_instance(request).await?;
    until_gone(client, &id).await?;
    Ok(ms)
}

/// Starts a VMM by hand, with the least that boots the guest; milliseconds until its greeting.
fn bare(binary: &Path, kernel: &Path) -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let screen = dir.path().join("console.log");
    let begin = Instant::now();
    let mut child = Command::new(binary)
        .args(["--api-sock", "api.sock"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::from(std::fs::File::create(&screen)?))
        .stderr(Stdio::null())
        .spawn()?;
    let greeted = boot(&mut child, dir.path(), kernel, begin)
        .and_then(|()| wait_for_all(vec![screen], GREETING, begin));
    let ms = begin.elapsed().as_secs_f64() * 1000.0;
    child.kill()?;
    child.wait()?;
    greeted?;
    Ok(ms)
}

fn boot(child: &mut Child, dir: &Path, kernel: &Path, begin: Instant) -> Result<()> {
    let mut stream = loop {
        // The socket is there before Firecracker accepts.
        match UnixStream::connect(dir.join("api.sock")) {
            Ok(stream) => break stream,
            Err(_) => {
                ensure!(child.try_wait()?.is_none(), "Firecracker ended");
                ensure!(begin.elapsed() < DEADLINE, "Firecracker does not accept");
            }
        }
        std::thread::yield_now();
    };
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB });
    let source = json!({ "kernel_image_path": kernel, "boot_args": "console=ttyS0" });
    let action = json!({ "action_type": "InstanceStart" });
    for (path, body) in [("/machine-config", machine), ("/boot-source", source), ("/actions", action)] {
        let body = body.to_string();
        let head = format!(
            "PUT {path} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes())?;
        let mut answer = [0; 1024];
        let length = stream.read(&mut answer)?;
        let text = String::from_utf8_lossy(&answer[..length]);
        ensure!(text.starts_with("HTTP/1.1 204"), "Firecracker refuses {path}: {text}");
    }
    Ok(())
}
