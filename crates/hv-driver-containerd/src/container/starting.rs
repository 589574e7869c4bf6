//! Starting a container.
//!
//! A start makes the task, whose first process waits in the control group, connects its network and then lets it
//! begin. The lock is held all the while: an empty group and a free lock prove that nothing runs (see `fence_target`).

use std::fs::File;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::CreateTaskRequest;
use hv_driver::fence::{self, FenceTarget, Zeal};
use hv_driver::{DriverError, Exit};
use parking_lot::Mutex;

use super::{Container, Done, Phase};
use crate::files::{ETC, EXIT, LOCK, RUN, STDIN, StoredExit, StoredRun, make_pipe, now_ms};
use crate::problem::{Outcome, Problem};
use crate::process::Process;
use crate::{keeper, spec};

/// How long containerd may take to clear away a task whose making was cut short.
const REMAINS_TIMEOUT: Duration = Duration::from_secs(10);
/// How often is tried meanwhile. containerd does not tell when it is done.
const REMAINS_INTERVAL: Duration = Duration::from_millis(50);

/// What is told of a start that was given up half-way is found out when it is next looked at.
struct Unfinished<'a>(Option<&'a Mutex<Phase>>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(phase) = self.0 {
            *phase.lock() = Phase::Unknown;
        }
    }
}

impl Container {
    pub(crate) async fn start(self: &Arc<Self>) -> Done<()> {
        let told = |problem: Problem| problem.told(&self.id, "start");
        let _change = self.change.lock().await;
        self.look().await.map_err(told)?;
        let phase = self.phase.lock().clone();
        let last = match phase {
            Phase::Up(_) if self.cgroup.is_frozen() => {
                return Err(DriverError::wrong_state(&self.id, "start", "it is paused; resume it"));
            }
            Phase::Up(_) => return Ok(()),
            Phase::Down(exit) => exit,
            Phase::Unknown => Exit::Lost,
        };
        let Some(lock) = self.dir.try_lock().map_err(told)? else {
            let reason = "another start of it is under way";
            return Err(DriverError::failed(&self.id, "start", Problem::State(reason.to_owned())));
        };
        let mut unfinished = Unfinished(Some(&self.phase));
        let run = self.prepare(last).await.map_err(told)?;
        let outcome = self.begin(run, &lock).await;
        unfinished.0 = None;
        match outcome {
            Ok((process, run)) => {
                self.up(process, run);
                Ok(())
            }
            Err(problem) => {
                let exit = Exit::Failed(problem.to_string());
                // What cannot be taken away now is when it is started or deleted the next time.
                self.kill_all();
                let is_cleared = self.clear().await.is_ok();
                let stored = StoredExit { run: run.number, exit: exit.clone(), is_cleared };
                self.dir.write(EXIT, &stored, false).map_err(told)?;
                *self.phase.lock() = Phase::Down(exit);
                Err(told(problem))
            }
        }
    }

    /// Takes away what the last run left, and counts this one.
    async fn prepare(&self, last: Exit) -> Outcome<StoredRun> {
        let before = self.dir.read::<StoredRun>(RUN)?;
        if let Some(before) = before {
            let exit = self.dir.read::<StoredExit>(EXIT)?.filter(|exit| exit.run == before.number);
            if !exit.as_ref().is_some_and(|exit| exit.is_cleared) {
                self.kill_all();
                self.clear().await?;
                // How the last run ended must be on record before its traces go.
                let exit = exit.map_or(last, |exit| exit.exit);
                self.dir.write(EXIT, &StoredExit { run: before.number, exit, is_cleared: true }, false)?;
            }
        }
        make_pipe(&self.dir.file(STDIN))?;
        self.write_etc(None)?;
        let number = before.map_or(1, |run| run.number + 1);
        let run = StoredRun { number, started_ms: now_ms(), ..StoredRun::default() };
        self.dir.write(RUN, &run, false)?;
        Ok(run)
    }

    /// The files that are mounted in the container.
    pub(crate) fn write_etc(&self, ip: Option<IpAddr>) -> Outcome<()> {
        let dir = self.dir.file(ETC);
        let host = spec::hostname(&self.stored().config.name);
        let own = ip.map_or_else(String::new, |ip| format!("{ip}\t{host}\n"));
        let hosts = format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}");
        let resolver = std::fs::read("/etc/resolv.conf").unwrap_or_default();
        let write = || {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::create_dir_all(&dir)?;
            // Rewritten in place: what is mounted is the file, not its name.
            for (name, text) in [
                ("hostname", format!("{host}\n").as_bytes()),
                ("hosts", hosts.as_bytes()),
                ("resolv.conf", &resolver),
            ] {
                std::fs::write(dir.join(name), text)?;
                std::fs::set_permissions(dir.join(name), std::fs::Permissions::from_mode(0o644))?;
            }
            Ok(())
        };
        write().map_err(Problem::file("write", &dir))
    }

    async fn begin(&self, mut run: StoredRun, _lock: &File) -> Outcome<(Process, StoredRun)> {
        let shared = &self.shared;
        let terminal = spec::has_terminal(&self.stored().config);
        let log = keeper::uri(&shared.keeper, &self.dir.path, shared.options.log_file_bytes, terminal);
        let request = CreateTaskRequest {
            container_id: self.id.to_string(),
            rootfs: self.root().await?,
            // The shim gives a container without a terminal no input beside a log of its own.
            stdin: if terminal { self.dir.file(STDIN).display().to_string() } else { String::new() },
            stdout: log.clone(),
            stderr: if terminal { String::new() } else { log },
            terminal,
            ..CreateTaskRequest::default()
        };
        run.pid = self.create_task(request).await?;
        let process = Process::open_in(run.pid, &self.cgroup)?;
        let process =
            process.ok_or_else(|| Problem::State("its process ended before it began".to_owned()))?;
        run.ip = shared.network.connect(self.id.as_str(), run.pid).await?;
        if run.ip.is_some() {
            self.write_etc(run.ip)?;
        }
        // Written before it is so: what was perhaps begun is taken for begun.
        run.is_begun = true;
        run.started_ms = now_ms();
        self.dir.write(RUN, &run, false)?;
        shared.client.start_process(self.id.as_str(), "").await?;
        Ok((process, run))
    }

    /// Makes the task. Of a start that was cut short containerd may have one, or be about to take one away: nothing of
    /// it was let begin.
    async fn create_task(&self, request: CreateTaskRequest) -> Outcome<i32> {
        let deadline = tokio::time::Instant::now() + REMAINS_TIMEOUT;
        loop {
            match self.shared.client.create_task(request.clone()).await {
                Err(problem) if problem.is_there() && tokio::time::Instant::now() < deadline => {
                    self.kill_all();
                    self.clear().await?;
                    tokio::time::sleep(REMAINS_INTERVAL).await;
                }
                other => return other,
            }
        }
    }

    /// Kills whatever is in the control group, without a driver's memory and without containerd.
    pub(super) fn kill_all(&self) {
        // Without its lock: this is the one who has it.
        let lock = self.dir.file(LOCK).with_extension("none");
        let _ = fence::kill(&FenceTarget::Cgroup { path: self.cgroup.processes_dir(), lock }, Zeal::Instance);
    }
}
