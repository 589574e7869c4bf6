//! A container's health check: a command that says so with exit code 0.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use hv_driver::{ExecOutput, ExecRequest};
use hv_types::instance::HealthCheck;
use tokio::time::Instant;

use crate::container::{Container, Live};
use crate::exec;

/// How much of what a check printed is told, in bytes.
const COMPLAINT_BYTES: usize = 200;

/// Checks as long as the container runs; ends it after so many failures in a row.
pub(crate) async fn watch(container: &Arc<Container>, live: &Arc<Live>) {
    let Some(check) = container.stored().config.spec.health_check.clone() else { return };
    let seconds =
        |value: u32, default: u32| Duration::from_secs(u64::from(if value == 0 { default } else { value }));
    let interval = seconds(check.interval_seconds, HealthCheck::INTERVAL_SECONDS);
    let timeout = seconds(check.timeout_seconds, HealthCheck::TIMEOUT_SECONDS);
    let retries = if check.retries == 0 { HealthCheck::RETRIES } else { check.retries };
    let counts_from = Instant::now() + Duration::from_secs(u64::from(check.start_seconds));
    let mut failures = 0;
    while !live.gone_within(interval).await {
        // What stands still is not unwell, and where containerd is away nobody can say.
        if container.cgroup.is_frozen() || !*container.shared.is_up.borrow() {
            continue;
        }
        match probe(container, &check, timeout).await {
            Ok(()) => failures = 0,
            Err(_) if Instant::now() < counts_from => {}
            Err(reason) => {
                failures += 1;
                if failures >= retries {
                    let reason = format!("health check failed: {reason}");
                    if let Err(error) = container.fail(live, reason).await {
                        tracing::warn!(instance = %container.id, %error, "an unwell container could not be ended");
                    }
                    return;
                }
            }
        }
    }
}

async fn probe(container: &Arc<Container>, check: &HealthCheck, timeout: Duration) -> Result<(), String> {
    let request = ExecRequest { command: check.command.clone(), env: Vec::new(), tty: None };
    let mut printed = Vec::new();
    let run = async {
        let mut command = exec::exec(container, request).await.map_err(|error| {
            match std::error::Error::source(&error) {
                Some(cause) => format!("{error}: {cause}"),
                None => error.to_string(),
            }
        })?;
        while let Some(output) = command.output.next().await {
            match output.map_err(|error| error.to_string())? {
                ExecOutput::Stdout(bytes) | ExecOutput::Stderr(bytes) => {
                    let room = COMPLAINT_BYTES.saturating_sub(printed.len());
                    printed.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                ExecOutput::Exited { code: 0 } => return Ok(()),
                ExecOutput::Exited { code } => return Err(format!("exit code {code}")),
            }
        }
        Err("it ended without an exit code".to_owned())
    };
    let outcome = tokio::time::timeout(timeout, run).await;
    let outcome = outcome.unwrap_or_else(|_| Err(format!("no answer within {} s", timeout.as_secs())));
    outcome.map_err(|reason| match String::from_utf8_lossy(&printed).trim() {
        "" => reason,
        words => format!("{reason}: {words}"),
    })
}
