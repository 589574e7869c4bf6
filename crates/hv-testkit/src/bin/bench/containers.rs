//! Containers through the system, against a client that makes the same calls of containerd directly, in turns: one at a
//! time, and many at once.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use hv_client::ComputeClient;
use hv_proto::v1;
use hv_testkit::{
    AgentOptions, Cluster, ClusterOptions, Containerd, Program, Usage, image_dir, median, until_gone,
};
use serde_json::json;

use crate::output::wait_for_all;
use crate::report::{Bar, Row};

/// Names the direct client's program; `hack/bench.sh` builds it.
const PROGRAM: &str = "BENCH_DIRECT";
/// Rounds with one container, unless `BENCH_ROUNDS` says otherwise.
const ROUNDS: usize = 25;
/// Rounds with many.
const ROUNDS_OF_MANY: usize = 5;
/// How many are many; `BENCH_CONTAINERS` says otherwise.
const MANY: u32 = 200;
/// The most in one call.
const PER_CALL: u32 = 100;
/// What the system may add to one container, in milliseconds.
const MAY_ADD_MS: f64 = 15.0;
const IMAGE: &str = "hello";

pub(crate) async fn measure() -> Result<Vec<Row>> {
    if let Some(why) = Containerd::missing() {
        bail!(why);
    }
    let archive =
        image_dir().context("there are no images: run hack/setup.sh images")?.join("hello-container.tar");
    let daemon = Containerd::start().await?;
    let mut cluster =
        Cluster::start(ClusterOptions { log_level: "warn", ..ClusterOptions::default() }).await?;
    let mut env = daemon.env();
    env.push((
        "HYPERVISOR_IMAGES_FILE_DIRS",
        format!("[{}]", archive.parent().unwrap_or(&archive).display()),
    ));
    let capacity = Some((4096, 1 << 42));
    let options = AgentOptions { drivers: vec!["containerd"], env, capacity, ..AgentOptions::default() };
    let agent = cluster.add_agent(options).await?;
    cluster.until_ready(1).await?;
    let system =
        System { client: cluster.clients()?.compute(), dir: cluster.agent_dir(agent).join("containerd") };
    system.fetch(&archive).await?;

    let template = system.start("template", 1).await?;
    let mut direct = Direct::start(&daemon, &system.dir.join(&template.ids[0]), &template.ids[0])?;
    let rounds = std::env::var("BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let (mut through, mut alone) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let direct_ms = direct.run(&format!("one-{round}"), 1)?;
        let started = system.start(&format!("one-{round}-x"), 1).await?;
        // The first round warms up.
        if round > 0 {
            alone.push(direct_ms);
            through.push(started.ms);
        }
        system.remove(&started.ids).await?;
    }
    let many = std::env::var("BENCH_CONTAINERS").ok().and_then(|text| text.parse().ok()).unwrap_or(MANY);
    let (mut through_many, mut alone_many, mut agent_bytes) = (Vec::new(), Vec::new(), Vec::new());
    let agent_id = cluster.agent(agent).context("the agent is gone")?.id();
    for round in 0..ROUNDS_OF_MANY {
        alone_many.push(direct.run(&format!("many-{round}"), many)?);
        let started = system.start(&format!("many-{round}-x"), many).await?;
        through_many.push(started.ms);
        agent_bytes.push(Usage::of(agent_id)?.resident_bytes);
        system.remove(&started.ids).await?;
    }
    drop(direct);
    system.remove(&template.ids).await?;
    let raw_one = json!({ "system_ms": through, "direct_ms": alone });
    let raw_many =
        json!({ "system_ms": through_many, "direct_ms": alone_many, "agent_bytes_then": agent_bytes });
    Ok(vec![
        Row {
            measure: "container: create to first output".into(),
            unit: "ms",
            bar: Some(Bar::OverAtMost(MAY_ADD_MS)),
            measured: median(&through),
            baseline: Some(("direct client".to_owned(), median(&alone))),
            raw: raw_one,
        },
        Row {
            measure: format!("{many} containers at once: create to the last one's first output"),
            unit: "ms",
            bar: Some(Bar::TimesAtMost(1.0)),
            measured: median(&through_many),
            baseline: Some(("direct client".to_owned(), median(&alone_many))),
            raw: raw_many,
        },
    ])
}

/// The system, with the directory of its containers.
struct System {
    client: ComputeClient,
    dir: PathBuf,
}

/// Containers that have printed something.
struct Started {
    ids: Vec<String>,
    /// From the call until the last one's first output.
    ms: f64,
}

impl System {
    async fn fetch(&self, archive: &Path) -> Result<()> {
        let request = v1::PullImageRequest {
            image_ref: format!("file://{}", archive.display()),
            r#type: v1::InstanceType::Container.into(),
            name: IMAGE.to_owned(),
            ..v1::PullImageRequest::default()
        };
        let mut steps = self.client.clone().pull_image(request).await?.into_inner();
        let mut is_done = false;
        while let Some(step) = steps.message().await? {
            ensure!(step.error.is_empty(), "the image was not fetched: {}", step.error);
            is_done = step.completed;
        }
        ensure!(is_done, "the image was not fetched");
        Ok(())
    }

    async fn start(&self, name: &str, count: u32) -> Result<Started> {
        let template = |name: String| v1::CreateInstanceRequest {
            name,
            r#type: v1::InstanceType::Container.into(),
            spec: Some(v1::InstanceSpec {
                image: IMAGE.into(),
                cpu_cores: 1,
                memory_bytes: 64 << 20,
                ..v1::InstanceSpec::default()
            }),
            ..v1::CreateInstanceRequest::default()
        };
        let begin = Instant::now();
        let mut ids = Vec::new();
        if count == 1 {
            ids.push(self.client.clone().create_instance(template(name.to_owned())).await?.into_inner().id);
        }
        let mut left = if count == 1 { 0 } else { count };
        while left > 0 {
            let count = left.min(PER_CALL);
            let request =
                v1::CreateInstancesRequest { template: Some(template(format!("{name}-{left}"))), count };
            let made = self.client.clone().create_instances(request).await?.into_inner();
            ids.extend(made.instances.into_iter().map(|instance| instance.id));
            left -= count;
        }
        wait_for_all(ids.iter().map(|id| self.dir.join(id).join("console.log")).collect(), b"hello", begin)?;
        Ok(Started { ids, ms: begin.elapsed().as_secs_f64() * 1000.0 })
    }

    async fn remove(&self, ids: &[String]) -> Result<()> {
        for id in ids {
            let request =
                v1::DeleteInstanceRequest { instance_id: id.clone(), force: true, ..Default::default() };
            self.client.clone().delete_instance(request).await?;
        }
        for id in ids {
            until_gone(&self.client, id).await?;
        }
        Ok(())
    }
}

/// The direct client, a process of its own as the agent is.
struct Direct {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    // Its containers' directories.
    dir: tempfile::TempDir,
}

impl Direct {
    fn start(daemon: &Containerd, template_dir: &Path, template: &str) -> Result<Self> {
        let program = std::env::var_os(PROGRAM).map(PathBuf::from);
        let program = program.with_context(|| format!("{PROGRAM} names no program: use hack/bench.sh"))?;
        let dir = tempfile::tempdir()?;
        let network = json!({
            "cniVersion": "0.4.0", "name": daemon.bridge(), "type": "bridge", "bridge": daemon.bridge(),
            "isGateway": true, "ipMasq": false, "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                // The other half of the network is the system's.
                "ranges": [[{ "subnet": daemon.subnet(), "rangeStart": daemon.upper_half() }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
                "dataDir": dir.path().join("addresses"),
            },
        });
        let mut command = Command::new(&program);
        command.arg(daemon.address()).arg(template).arg(template_dir).arg(dir.path());
        command.arg(Program::Agent.path()?).arg(network.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = child.stdin.take().context("no pipe")?;
        let answers = BufReader::new(child.stdout.take().context("no pipe")?);
        let mut direct = Self { child, orders, answers, dir };
        direct.expect("ready")?;
        Ok(direct)
    }

    /// Starts so many containers and removes them; milliseconds until the last one's first output.
    fn run(&mut self, name: &str, count: u32) -> Result<f64> {
        let begin = Instant::now();
        writeln!(self.orders, "{name} {count}")?;
        let logs = (0..count).map(|index| self.dir.path().join(format!("{name}-{index}/console.log")));
        wait_for_all(logs.collect(), b"hello", begin)?;
        let ms = begin.elapsed().as_secs_f64() * 1000.0;
        writeln!(self.orders)?;
        self.expect("gone")?;
        Ok(ms)
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line.trim() == word, "the direct client ended instead of saying {word:?}");
        Ok(())
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
