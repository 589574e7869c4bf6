//! How fast the stores are here, each figure beside what the disk itself can do in the same run.
//!
//! ```text
//! cargo run --release -p hv-store --example bench -- [--shape SHAPE]... [--etcd URL]... [--etcd-only]
//!     [--dir DIR] [--seconds N] [--rounds N] [--value BYTES] [--cache-mib N] [--keep-revisions N]
//! ```
//! Shapes: `puts` (single puts from 1, 64 and 256 clients), `create` (64 clients, each transaction two new keys and one
//! compare), `batch100` (4 clients, each transaction 100 new keys), `rebind100` (4 clients, each transaction overwrites
//! 100 keys and compares each), `keepalive` (256 clients renew 10,000 leases). Without any: all of them. The median round
//! is printed, with the slowest and the fastest.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hv_store::embedded::{EmbeddedOptions, EmbeddedStore};
use hv_store::etcd::{EtcdOptions, EtcdStore};
use hv_store::{SharedStore, StoreExt};

mod shapes;

use shapes::{Round, Shape};

struct Arguments {
    dir: PathBuf,
    etcd: Vec<String>,
    etcd_only: bool,
    shapes: Vec<Shape>,
    measured: Duration,
    rounds: usize,
    value_bytes: usize,
    embedded: EmbeddedOptions,
}

fn arguments() -> anyhow::Result<Arguments> {
    let mut parsed = Arguments {
        dir: std::env::temp_dir().join(format!("hv-store-bench-{}", std::process::id())),
        etcd: Vec::new(),
        etcd_only: false,
        shapes: Vec::new(),
        measured: Duration::from_secs(3),
        rounds: 3,
        value_bytes: 350,
        embedded: EmbeddedOptions::default(),
    };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        let mut value = || given.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--dir" => parsed.dir = value()?.into(),
            "--etcd" => parsed.etcd.push(value()?),
            "--etcd-only" => parsed.etcd_only = true,
            "--shape" => parsed.shapes.extend(Shape::named(&value()?)?),
            "--seconds" => parsed.measured = Duration::from_secs(value()?.parse()?),
            "--rounds" => parsed.rounds = value()?.parse::<usize>()?.max(1),
            "--value" => parsed.value_bytes = value()?.parse()?,
            "--cache-mib" => parsed.embedded.cache_bytes = value()?.parse::<usize>()? << 20,
            "--keep-revisions" => parsed.embedded.auto_compact_revisions = value()?.parse()?,
            _ => bail!("unknown flag {flag}"),
        }
    }
    if parsed.shapes.is_empty() {
        parsed.shapes = Shape::ALL.to_vec();
    }
    Ok(parsed)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = arguments()?;
    fs::create_dir_all(&arguments.dir)?;
    println!("load: {}", fs::read_to_string("/proc/loadavg").unwrap_or_default().trim());
    let raw = raw_flushes(&arguments.dir, Duration::from_secs(1))?;
    println!("raw fdatasync of 4 KiB: {raw:.0}/s");
    if !arguments.etcd_only {
        embedded(&arguments, raw).await?;
    }
    if !arguments.etcd.is_empty() {
        let options = EtcdOptions { endpoints: arguments.etcd.clone(), ..EtcdOptions::default() };
        let store: SharedStore = EtcdStore::connect(options).await?;
        let version = store.health().await?.version;
        measure(&format!("etcd {version}"), &store, &arguments, raw).await?;
    }
    fs::remove_dir_all(&arguments.dir)?;
    Ok(())
}

async fn embedded(arguments: &Arguments, raw: f64) -> anyhow::Result<()> {
    let dir = arguments.dir.join("store");
    let embedded = EmbeddedStore::open(&dir, arguments.embedded.clone())?;
    println!("embedded: {} KiB resident when open and empty", resident_kib());
    let store: SharedStore = embedded.clone();
    measure("embedded", &store, arguments, raw).await?;
    println!("embedded: {} KiB resident after that, {} KiB of files", resident_kib(), file_kib(&dir));
    let started = Instant::now();
    embedded.close().await;
    drop((embedded, store));
    let closed = started.elapsed();
    drop(EmbeddedStore::open(&dir, EmbeddedOptions::default())?);
    println!("embedded: closing took {closed:?}, opening and checking {:?}", started.elapsed() - closed);
    Ok(())
}

async fn measure(name: &str, store: &SharedStore, arguments: &Arguments, raw: f64) -> anyhow::Result<()> {
    for shape in &arguments.shapes {
        let mut rounds = Vec::new();
        for _ in 0..arguments.rounds {
            let before = cpu_seconds();
            let mut round = shape.run(store, arguments.measured, arguments.value_bytes).await?;
            round.cpu_seconds = cpu_seconds() - before;
            rounds.push(round);
        }
        print(name, *shape, rounds, raw);
    }
    let (started, mut count) = (Instant::now(), 0_u32);
    while started.elapsed() < Duration::from_secs(1) {
        store.get(format!("bench/0/{}", count % 1000)).await?;
        count += 1;
    }
    println!("{name}: {count} gets/s from one client");
    Ok(())
}

fn print(name: &str, shape: Shape, mut rounds: Vec<Round>, raw: f64) {
    rounds.sort_by(|a, b| a.per_second().total_cmp(&b.per_second()));
    let (slowest, fastest) = (rounds[0].per_second(), rounds[rounds.len() - 1].per_second());
    let middle = rounds.len() / 2;
    let round = &mut rounds[middle];
    round.latencies.sort();
    let at = |percent: usize| {
        let index = (round.latencies.len() - 1) * percent / 100;
        round.latencies[index].as_secs_f64() * 1000.0
    };
    let rate = round.per_second();
    println!(
        "{name} {:9} {rate:8.0} calls/s ({slowest:.0} to {fastest:.0}), {:8.0} keys/s, p50 {:.2} ms, p99 {:.2} ms, {:.2} x raw, {:.1} us of CPU a key{}",
        shape.name(),
        rate * round.keys_per_call as f64,
        at(50),
        at(99),
        rate / raw,
        round.cpu_seconds * 1e6 / (round.latencies.len() * round.keys_per_call).max(1) as f64,
        round.note,
    );
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

/// CPU that this process has used, where the platform tells.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: f64 =
        after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok()).sum();
    // USER_HZ is 100 on every Linux that this runs on.
    ticks / 100.0
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
