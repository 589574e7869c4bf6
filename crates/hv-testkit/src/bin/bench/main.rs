//! `make bench`: every bar of the project as one row of one table, beside a baseline that is taken in the same run.
//!
//! ```text
//! hypervisor-bench [--rows GROUP,GROUP…] [--json FILE]
//! ```
//! The servers are release programs in processes of their own; this program is the load generator, and its processor time is
//! counted apart. Groups are measured one after another, each on a server of its own.

mod containers;
mod fleet;
mod guest;
mod heartbeats;
mod lists;
mod machine;
mod memory;
mod microvms;
mod million;
mod output;
mod placements;
mod recovery;
mod report;
mod scheduler;
mod watchers;

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use report::{Report, Row};

type Measure = fn() -> Pin<Box<dyn Future<Output = Result<Vec<Row>>>>>;

/// What can be measured, in the order of the table.
const GROUPS: [(&str, Measure); 14] = [
    ("scheduler", || Box::pin(scheduler::measure())),
    ("placements", || Box::pin(placements::embedded())),
    ("placements-etcd", || Box::pin(placements::etcd())),
    ("lists", || Box::pin(lists::measure())),
    ("watchers", || Box::pin(watchers::measure())),
    ("heartbeats", || Box::pin(heartbeats::measure())),
    ("million", || Box::pin(million::measure())),
    ("leader", || Box::pin(recovery::leader())),
    ("cut-off", || Box::pin(recovery::cut_off())),
    ("etcd-storm", || Box::pin(recovery::etcd())),
    ("guest", || Box::pin(guest::measure())),
    ("container", || Box::pin(containers::measure())),
    ("microvm", || Box::pin(microvms::measure())),
    ("agent-memory", || Box::pin(memory::measure())),
];

struct Arguments {
    rows: Vec<String>,
    json: Option<PathBuf>,
}

fn arguments() -> Result<Arguments> {
    let mut parsed = Arguments { rows: Vec::new(), json: None };
    let mut given = std::env::args().skip(1);
    while let Some(flag) = given.next() {
        let mut value = || given.next().with_context(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--rows" => parsed
                .rows
                .extend(value()?.split([',', ' ']).filter(|row| !row.is_empty()).map(str::to_owned)),
            "--json" => parsed.json = Some(value()?.into()),
            _ => bail!("unknown argument {flag}: --rows GROUPS, --json FILE; groups are {}", names()),
        }
    }
    for row in &parsed.rows {
        ensure!(GROUPS.iter().any(|(name, _)| name == row), "unknown group {row:?}: groups are {}", names());
    }
    Ok(parsed)
}

fn names() -> String {
    GROUPS.map(|(name, _)| name).join(", ")
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = arguments()?;
    let machine = machine::describe();
    println!("{machine:#}");
    let mut report = Report::default();
    for (name, measure) in GROUPS {
        if !arguments.rows.is_empty() && !arguments.rows.iter().any(|row| row == name) {
            continue;
        }
        let begin = Instant::now();
        println!("{name}:");
        match measure().await {
            Ok(rows) => report.add(rows),
            Err(error) => report.failed(name, format!("{error:#}")),
        }
        println!("  ({:.0} s)", begin.elapsed().as_secs_f64());
    }
    println!("\n{}", report.table());
    if let Some(file) = arguments.json {
        let mut machine = machine;
        machine["load_average_at_the_end"] = machine::describe()["load_average"].clone();
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(&file, format!("{:#}\n", report.json(machine)))?;
        println!("raw figures: {}", file.display());
    }
    Ok(())
}
