//! The end of a container: noticed at once, explained as soon as containerd can.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::types::v1::Status;
use hv_driver::{DriverEvent, Exit};
use rustix::fs::FlockOperation;
use tokio::sync::watch;

use super::{Container, Live, Phase};
use crate::files::{EXIT, StoredExit, StoredRun};
use crate::keeper;
use crate::problem::{Outcome, Problem};

/// How long containerd may take until it knows how a process ended that has ended.
const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the last output may take to its log.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often is looked whether it has arrived. There is nothing to wait on: the keeper is nobody's child here.
const OUTPUT_INTERVAL: Duration = Duration::from_millis(5);
/// The exit status of a process that was killed: 128 and SIGKILL.
const KILLED: u32 = 137;

impl Container {
    pub(super) async fn watch(self: Arc<Self>, live: &Live, end: watch::Sender<bool>) {
        live.process.ended().await;
        let ooms = self.cgroup.oom_kills();
        let verdict = live.verdict.lock().clone();
        let is_own = verdict.as_ref().is_some_and(|exit| *exit == Exit::Stopped);
        let exit = match verdict {
            Some(exit) => exit,
            None => self.explained(ooms).await,
        };
        // The rest of its processes go with the first; what they printed last is still on its way.
        self.last_output().await;
        let is_cleared = match self.clear().await {
            Ok(()) => true,
            Err(problem) => {
                tracing::warn!(instance = %self.id, error = %problem, "what the container left is taken away later");
                false
            }
        };
        let what = format!("the container ended: {exit:?}");
        let stored = StoredExit { run: live.run.number, exit: exit.clone(), is_cleared };
        if let Err(error) = self.dir.write(EXIT, &stored, false) {
            tracing::warn!(instance = %self.id, %error, "how the container ended could not be noted");
        }
        *self.phase.lock() = Phase::Down(exit);
        // Whoever waits may be gone; nobody listening is no error.
        let _ = end.send(true);
        if !is_own {
            let _ = self.shared.events.send(DriverEvent { id: self.id.clone(), what });
        }
    }

    /// How it ended. Waits for containerd as long as that is away: it will know when it is back.
    async fn explained(&self, ooms: u64) -> Exit {
        let mut is_up = self.shared.is_up.subscribe();
        loop {
            let waited = self.shared.client.wait(self.id.as_str(), "");
            match tokio::time::timeout(EXPLAIN_TIMEOUT, waited).await {
                Ok(Ok(status)) => return exit_of(status, ooms),
                Ok(Err(problem)) if problem.is_down() => {
                    // Told by the watch of the daemon, which may not have noticed yet.
                    let _ = tokio::time::timeout(EXPLAIN_TIMEOUT, is_up.changed()).await;
                }
                Ok(Err(_)) | Err(_) => return if ooms > 0 { out_of_memory() } else { Exit::Lost },
            }
        }
    }

    /// How a run ended that nobody watched. containerd must be there to say it.
    pub(super) async fn end_unseen(&self, run: StoredRun) -> Outcome<Exit> {
        if !run.is_begun {
            self.kill_all();
            return Ok(Exit::NeverStarted);
        }
        let ooms = self.cgroup.oom_kills();
        let exit = match self.shared.client.task(self.id.as_str()).await? {
            Some(task) if task.status() == Status::Stopped => exit_of(task.exit_status, ooms),
            Some(_) => {
                match tokio::time::timeout(EXPLAIN_TIMEOUT, self.shared.client.wait(self.id.as_str(), ""))
                    .await
                {
                    Ok(Ok(status)) => exit_of(status, ooms),
                    _ => Exit::Lost,
                }
            }
            None => Exit::Lost,
        };
        let is_cleared = self.clear().await.is_ok();
        self.dir.write(EXIT, &StoredExit { run: run.number, exit: exit.clone(), is_cleared }, false)?;
        Ok(exit)
    }

    /// Waits until the keeper has written what there was.
    async fn last_output(&self) {
        let path = self.dir.file(keeper::LOCK);
        let is_free = || -> Outcome<bool> {
            let file = std::fs::File::open(&path).map_err(Problem::file("open", &path))?;
            Ok(rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok())
        };
        let wait = async {
            while is_free().is_ok_and(|is_free| !is_free) {
                tokio::time::sleep(OUTPUT_INTERVAL).await;
            }
        };
        let _ = tokio::time::timeout(OUTPUT_TIMEOUT, wait).await;
    }
}

fn out_of_memory() -> Exit {
    Exit::Failed("out of memory".to_owned())
}

/// What an exit status says; `ooms`: how many of the container's processes were killed for want of memory.
fn exit_of(status: u32, ooms: u64) -> Exit {
    match status {
        0 => Exit::Finished,
        KILLED if ooms > 0 => out_of_memory(),
        signalled @ 129..=192 => {
            Exit::Failed(format!("exit code {signalled}, as after signal {}", signalled - 128))
        }
        code if ooms > 0 => {
            Exit::Failed(format!("exit code {code}, after a process was killed for want of memory"))
        }
        code => Exit::Failed(format!("exit code {code}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_names_code_signal_and_memory() {
        let cases = [
            (0, 0, Exit::Finished),
            (3, 0, Exit::Failed("exit code 3".to_owned())),
            (137, 0, Exit::Failed("exit code 137, as after signal 9".to_owned())),
            (137, 1, Exit::Failed("out of memory".to_owned())),
            (1, 1, Exit::Failed("exit code 1, after a process was killed for want of memory".to_owned())),
        ];
        for (status, ooms, expected) in cases {
            assert_eq!(exit_of(status, ooms), expected);
        }
    }
}
