//! Decisions of the pure scheduler: runs the bench of `hv-scheduler` itself, one thread, no server.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::report::{Bar, Row};

/// Names the bench's program; `hack/bench.sh` builds it.
const PROGRAM: &str = "BENCH_SCHEDULER";

pub(crate) async fn measure() -> Result<Vec<Row>> {
    let program = std::env::var_os(PROGRAM).map(PathBuf::from);
    let program = program.with_context(|| format!("{PROGRAM} names no program: use hack/bench.sh"))?;
    let output = tokio::process::Command::new(&program).arg("--json").output().await;
    let output = output.with_context(|| program.display().to_string())?;
    ensure!(output.status.success(), "{}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let figures: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let mut rows: Vec<Row> = Vec::new();
    for figure in figures {
        let number = |name: &str| figure[name].as_f64().with_context(|| format!("no {name} in {figure}"));
        let text = |name: &str| figure[name].as_str().unwrap_or_default().to_owned();
        rows.push(Row {
            measure: format!(
                "decisions, pure scheduler, {} nodes, {}, {}",
                figure["nodes"],
                text("measure"),
                text("strategy")
            ),
            unit: "/s",
            bar: Some(Bar::Least(number("bar")?)),
            measured: number("per_second")?,
            baseline: Some(("row by row".into(), number("rows_per_cpu_second")?)),
            raw: json!(figure),
        });
    }
    Ok(rows)
}
