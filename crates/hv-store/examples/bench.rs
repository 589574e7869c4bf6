//! How fast the stores are here: durable puts per second and their latency, beside what the disk itself can do.
//!
//! `cargo run --release -p hv-store --example bench -- [--dir DIR] [--etcd URL]... [--seconds N] [--value BYTES]`

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::StreamExt;
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::etcd::{EtcdOptions, EtcdStore};
use hv_store::{KeyRange, SharedStore, StoreExt};

const CLIENTS: [usize; 3] = [1, 64, 256];
/// How many different keys each client writes.
const KEYS: usize = 1000;

struct Arguments {
    dir: PathBuf,
    etcd: Vec<String>,
    measured: Duration,
    value_bytes: usize,
}

fn arguments() -> anyhow::Result<Arguments> {
    let mut parsed = Arguments {
        dir: std::env::temp_dir().join(format!("hv-store-bench-{}", std::process::id())),
        etcd: Vec::new(),
        measured: Duration::from_secs(5),
        value_bytes: 512,
    };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        let value = given.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--dir" => parsed.dir = value.into(),
            "--etcd" => parsed.etcd.push(value),
            "--seconds" => parsed.measured = Duration::from_secs(value.parse()?),
            "--value" => parsed.value_bytes = value.parse()?,
            _ => bail!("unknown flag {flag}"),
        }
    }
    Ok(parsed)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = arguments()?;
    fs::create_dir_all(&arguments.dir)?;
    println!("load: {}", fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    println!("raw fdatasync of 4 KiB: {:.0}/s", raw_flushes(&arguments.dir, arguments.measured)?);

    let dir = arguments.dir.join("store");
    let embedded = EmbeddedStore::open(&dir, EmbeddedOptions::default())?;
    println!("embedded: {} KiB resident when open and empty", resident_kib());
    measure("embedded", embedded.clone(), &arguments).await?;
    println!("embedded: {} KiB resident after that, {} KiB of file", resident_kib(), file_kib(&dir));
    let started = Instant::now();
    embedded.close().await;
    drop(embedded);
    let closed = started.elapsed();
    drop(EmbeddedStore::open(&dir, EmbeddedOptions::default())?);
    println!("embedded: closing took {closed:?}, opening and checking {:?}", started.elapsed() - closed);
    fs::remove_dir_all(&arguments.dir)?;

    if !arguments.etcd.is_empty() {
        let options = EtcdOptions { endpoints: arguments.etcd.clone(), ..EtcdOptions::default() };
        measure("etcd", EtcdStore::connect(options).await?, &arguments).await?;
    }
    Ok(())
}

/// What the disk allows a writer that shares no flush.
fn raw_flushes(dir: &Path, measured: Duration) -> anyhow::Result<f64> {
    let mut file = File::create(dir.join("raw"))?;
    let page = [0x5a; 4096];
    let (started, mut count) = (Instant::now(), 0);
    while started.elapsed() < measured {
        file.write_all(&page)?;
        file.sync_data()?;
        count += 1;
    }
    fs::remove_file(dir.join("raw"))?;
    Ok(f64::from(count) / started.elapsed().as_secs_f64())
}

async fn measure(name: &str, store: SharedStore, arguments: &Arguments) -> anyhow::Result<()> {
    let value = vec![b'v'; arguments.value_bytes];
    for clients in CLIENTS {
        // One watch follows everything, as a server's cache does.
        let mut stream = store.watch(KeyRange::Prefix("bench/".into()), None).await?;
        let watched = tokio::spawn(async move {
            let mut count = 0_usize;
            while let Ok(Some(Ok(events))) = tokio::time::timeout(Duration::from_secs(1), stream.next()).await
            {
                count += events.changes.len();
            }
            count
        });
        let started = Instant::now();
        let until = started + arguments.measured;
        let tasks =
            (0..clients).map(|client| tokio::spawn(client_puts(store.clone(), client, value.clone(), until)));
        let done = futures::future::try_join_all(tasks).await?;
        let elapsed = started.elapsed();
        let mut latencies = Vec::new();
        for result in done {
            latencies.extend(result?);
        }
        latencies.sort();
        let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100];
        println!(
            "{name}: {clients:3} clients: {:.0} puts/s, p50 {:.2} ms, p99 {:.2} ms; the watch saw {} of {}",
            latencies.len() as f64 / elapsed.as_secs_f64(),
            at(50).as_secs_f64() * 1000.0,
            at(99).as_secs_f64() * 1000.0,
            watched.await?,
            latencies.len(),
        );
    }
    let (started, mut count) = (Instant::now(), 0);
    while started.elapsed() < Duration::from_secs(1) {
        store.get(format!("bench/0/{}", count % KEYS)).await?;
        count += 1;
    }
    println!("{name}: {:.0} gets/s from one client", count as f64 / started.elapsed().as_secs_f64());
    Ok(())
}

async fn client_puts(
    store: Arc<dyn hv_store::Store>,
    client: usize,
    value: Vec<u8>,
    until: Instant,
) -> hv_store::Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    while Instant::now() < until {
        let started = Instant::now();
        store.put(format!("bench/{client}/{}", latencies.len() % KEYS), value.clone()).await?;
        latencies.push(started.elapsed());
    }
    Ok(latencies)
}

/// Memory of this process, where the platform tells.
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

fn file_kib(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len() / 1024).sum()
}
