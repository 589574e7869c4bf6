//! Long work that QEMU does by itself (its jobs), waited for to the end.

use std::time::Duration;

use serde_json::{Value, json};

use crate::live::Live;
use crate::problem::{Outcome, Problem};

/// How long a job may take. Memory goes to a disk, so it is minutes at most.
const JOB_TIMEOUT: Duration = Duration::from_secs(600);
/// How often QEMU is asked whether a job has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Runs a job and waits for its end. `arguments` name it.
pub(crate) async fn run(live: &Live, command: &'static str, arguments: Value) -> Outcome<()> {
    let id = arguments["job-id"].as_str().unwrap_or_default().to_owned();
    live.monitor.command(command, Some(arguments)).await?;
    match finish(live, &id).await? {
        None => Ok(()),
        Some(reason) => Err(Problem::Refused { command: command.to_owned(), reason }),
    }
}

/// Waits until a job has ended, if there is one, and forgets it. Says why it failed, if it did.
pub(crate) async fn finish(live: &Live, id: &str) -> Outcome<Option<String>> {
    let work = async {
        loop {
            let jobs = live.monitor.command("query-jobs", None).await?;
            let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == id).cloned();
            let Some(job) = job else { return Ok(None) };
            if job["status"] == "concluded" {
                live.monitor.command("job-dismiss", Some(json!({ "id": id }))).await?;
                return Ok(job["error"].as_str().map(ToOwned::to_owned));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::time::timeout(JOB_TIMEOUT, work).await.map_err(|_| Problem::Timeout {
        what: format!("job {id} of qemu"),
        timeout_ms: u64::try_from(JOB_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
    })?
}
