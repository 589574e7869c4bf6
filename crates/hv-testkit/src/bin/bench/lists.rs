//! Reading 100,000 instances: the first page, all of them as a stream.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hv_client::Clients;
use hv_proto::v1;
use hv_testkit::{StoreKind, median, percentile};
use serde_json::json;
use tonic::Code;

use crate::fleet::{NODES, Seed, Server, options};
use crate::report::{Bar, Row};

/// Instances that there are.
const INSTANCES: usize = 100_000;
/// The page that is asked for.
const PAGE: i32 = 500;
/// How often it is asked for.
const PAGES: usize = 500;
/// How often everything is streamed.
const STREAMS: usize = 5;
/// Calls before the clock counts.
const WARM_UP: usize = 20;

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let seed = Seed { nodes: NODES, instances: INSTANCES };
    let options = options(StoreKind::Embedded, Duration::from_secs(3600));
    let (mut server, seeded) = Server::start_seeded(options, seed).await?;
    let client = server.client()?;
    let calls = times(PAGES, async || empty_call(&client).await).await?;
    let before = server.usage()?;
    let begin = Instant::now();
    let pages = times(PAGES, async || first_page(&client).await).await?;
    let spent = server.usage()?.cpu - before.cpu;
    let page_cpu_ms = spent.as_secs_f64() * 1000.0 / (PAGES + WARM_UP) as f64;
    let elapsed = begin.elapsed();
    let mut streams = Vec::new();
    let mut paged = Vec::new();
    for _ in 0..STREAMS {
        streams.push(stream_all(&client).await?);
        paged.push(page_all(&client).await?);
    }
    Ok(vec![
        Row {
            measure: format!("first page of {PAGE} of {INSTANCES} instances, p99"),
            unit: "ms",
            bar: Some(Bar::Most(5.0)),
            measured: percentile(&pages, 99.0),
            baseline: Some(("an empty call, p99".into(), percentile(&calls, 99.0))),
            raw: json!({
                "p50_ms": median(&pages), "p99_ms": percentile(&pages, 99.0), "max_ms": percentile(&pages, 100.0),
                "calls": PAGES, "elapsed_s": elapsed.as_secs_f64(), "server_cpu_ms_per_page": page_cpu_ms,
                "empty_call_p50_ms": median(&calls), "seeded_in_s": seeded.as_secs_f64(),
            }),
        },
        Row {
            measure: format!("stream of all {INSTANCES} instances"),
            unit: "s",
            bar: Some(Bar::Most(1.0)),
            measured: median(&streams),
            baseline: Some(("pages of 1,000".into(), median(&paged))),
            raw: json!({ "stream_s": streams, "pages_s": paged }),
        },
    ])
}

/// Milliseconds of so many calls, one after another.
async fn times(count: usize, mut call: impl AsyncFnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut taken = Vec::with_capacity(count);
    for round in 0..WARM_UP + count {
        let begin = Instant::now();
        call().await?;
        if round >= WARM_UP {
            taken.push(begin.elapsed().as_secs_f64() * 1000.0);
        }
    }
    Ok(taken)
}

/// A call that does nothing but find that something is not there.
async fn empty_call(client: &Clients) -> Result<()> {
    let answer = client.compute().get_instance(v1::GetInstanceRequest { instance_id: "none".into() }).await;
    ensure!(
        answer.is_err_and(|status| status.code() == Code::NotFound),
        "an instance that does not exist was found"
    );
    Ok(())
}

async fn first_page(client: &Clients) -> Result<()> {
    let request = v1::ListInstancesRequest { page_size: PAGE, ..v1::ListInstancesRequest::default() };
    let page = client.compute().list_instances(request).await?.into_inner();
    ensure!(page.instances.len() == usize::try_from(PAGE)?, "a page of {}", page.instances.len());
    ensure!(usize::try_from(page.total_count)? == INSTANCES, "{} in all", page.total_count);
    Ok(())
}

/// Seconds until a watch has sent everything and says so.
async fn stream_all(client: &Clients) -> Result<f64> {
    let begin = Instant::now();
    let mut stream =
        client.compute().watch_instances(v1::WatchInstancesRequest::default()).await?.into_inner();
    let mut seen = 0;
    loop {
        let event = stream.message().await?.context("the stream ended")?;
        if event.r#type() == v1::EventType::Bookmark {
            break;
        }
        seen += 1;
    }
    ensure!(seen == INSTANCES, "{seen} were sent");
    Ok(begin.elapsed().as_secs_f64())
}

/// Seconds until all pages were read.
async fn page_all(client: &Clients) -> Result<f64> {
    let begin = Instant::now();
    let mut request = v1::ListInstancesRequest { page_size: 1000, ..v1::ListInstancesRequest::default() };
    let mut seen = 0;
    loop {
        let page = client.compute().list_instances(request.clone()).await?.into_inner();
        seen += page.instances.len();
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    ensure!(seen == INSTANCES, "{seen} were listed");
    Ok(begin.elapsed().as_secs_f64())
}
