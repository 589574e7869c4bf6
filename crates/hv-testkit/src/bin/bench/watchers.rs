//! From a commit to the last of a thousand watchers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hv_client::{Clients, ComputeClient};
use hv_proto::v1;
use hv_testkit::{StoreKind, median, percentile};
use serde_json::json;
use tokio::sync::mpsc;

use crate::fleet::{Server, instance, options};
use crate::report::{Bar, Row};

/// Watchers, over a few connections as those of a console's users would be.
const WATCHERS: usize = 1000;
/// Changes that are made, one after another.
const CHANGES: usize = 200;
/// The pause between two changes.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the last watcher may take before it counts as lost.
const LOST: Duration = Duration::from_secs(30);
/// What the watchers watch.
const PROJECT: &str = "watched";

/// Which change a watcher saw, and when.
type Seen = (usize, Instant);

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let mut server = Server::start(options(StoreKind::Embedded, Duration::from_secs(3600))).await?;
    let client = server.client()?.compute();
    let (alone, _) = round(&client, &server.clients()?, 1).await?;
    let before = server.usage()?.cpu;
    let own = hv_testkit::Usage::own()?.cpu;
    let (to_last, answers) = round(&client, &server.clients()?, WATCHERS).await?;
    let server_cpu = (server.usage()?.cpu - before).as_secs_f64();
    let generator_cpu = (hv_testkit::Usage::own()?.cpu - own).as_secs_f64();
    Ok(vec![Row {
        measure: format!("create call to the last of {WATCHERS} watchers, p99"),
        unit: "ms",
        bar: Some(Bar::Most(50.0)),
        measured: percentile(&to_last, 99.0),
        baseline: Some(("one watcher, p99".into(), percentile(&alone, 99.0))),
        raw: json!({
            "note": "counted from the sending of the create call, so it holds the commit itself",
            "p50_ms": median(&to_last), "p99_ms": percentile(&to_last, 99.0), "max_ms": percentile(&to_last, 100.0),
            "create_answer_p50_ms": median(&answers), "create_answer_p99_ms": percentile(&answers, 99.0),
            "one_watcher_p50_ms": median(&alone), "changes": CHANGES,
            "server_cpu_s": server_cpu, "generator_cpu_s": generator_cpu,
        }),
    }])
}

/// Milliseconds from the sending of each create to the last watcher, and to its own answer.
async fn round(
    client: &ComputeClient,
    channels: &[Clients],
    watchers: usize,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let (report, mut seen) = mpsc::unbounded_channel::<Seen>();
    let (ready, mut started) = mpsc::unbounded_channel();
    let prefix: Arc<str> = format!("w{watchers}-").into();
    let mut tasks = tokio::task::JoinSet::new();
    for index in 0..watchers {
        let client = channels[index % channels.len()].compute();
        tasks.spawn(watch(client, prefix.clone(), ready.clone(), report.clone()));
    }
    for _ in 0..watchers {
        tokio::time::timeout(LOST, started.recv()).await.context("a watch does not begin")?;
    }
    let (mut to_last, mut answers) = (Vec::new(), Vec::new());
    for change in 0..CHANGES {
        let sent = Instant::now();
        client.clone().create_instance(instance(format!("{prefix}{change}-x"), PROJECT)).await?;
        answers.push(sent.elapsed().as_secs_f64() * 1000.0);
        let mut last = sent;
        for _ in 0..watchers {
            let (number, at) = tokio::time::timeout(LOST, seen.recv())
                .await
                .context("a watcher saw nothing")?
                .context("gone")?;
            ensure!(number == change, "a watcher saw {number} instead of {change}");
            last = last.max(at);
        }
        to_last.push((last - sent).as_secs_f64() * 1000.0);
        tokio::time::sleep(PAUSE).await;
    }
    tasks.shutdown().await;
    Ok((to_last, answers))
}

/// Reports the first time that each instance of the round is seen.
async fn watch(
    mut client: ComputeClient,
    prefix: Arc<str>,
    ready: mpsc::UnboundedSender<()>,
    report: mpsc::UnboundedSender<Seen>,
) -> Result<()> {
    let request =
        v1::WatchInstancesRequest { project: PROJECT.into(), ..v1::WatchInstancesRequest::default() };
    let mut stream = client.watch_instances(request).await?.into_inner();
    let mut next = 0;
    let mut begun = false;
    while let Some(event) = stream.message().await? {
        let at = Instant::now();
        if event.r#type() == v1::EventType::Bookmark {
            if !std::mem::replace(&mut begun, true) {
                ready.send(())?;
            }
            continue;
        }
        let name = event.instance.map(|instance| instance.name).unwrap_or_default();
        let number =
            name.strip_prefix(&*prefix).and_then(|rest| rest.split('-').next()?.parse::<usize>().ok());
        if number == Some(next) {
            next += 1;
            report.send((next - 1, at))?;
        }
    }
    Ok(())
}
