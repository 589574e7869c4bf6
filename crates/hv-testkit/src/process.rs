//! A child process that ends with its owner, and whose output is kept for the report of a failure.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::netns::Host;
use crate::programs::Program;

/// How much of a log a failure shows, in bytes.
const LOG_TAIL: usize = 4000;

/// A program that runs.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program; its output goes to `log`, after what is there. Settings of the test's own environment do not
    /// reach it, only those given.
    ///
    /// # Errors
    /// It was not built or cannot be started.
    pub fn start(program: Program, args: &[OsString], env: &[(&str, String)], log: &Path) -> Result<Self> {
        Self::start_on(None, program, args, env, log)
    }

    /// As [`Self::start`], on a host of a network.
    ///
    /// # Errors
    /// It was not built or cannot be started.
    pub fn start_on(
        host: Option<&Host>,
        program: Program,
        args: &[OsString],
        env: &[(&str, String)],
        log: &Path,
    ) -> Result<Self> {
        Self::spawn(host, &program.path()?, args, env, log)
            .with_context(|| format!("{} cannot be started", program.name()))
    }

    /// Starts any program.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(
        host: Option<&Host>,
        program: &Path,
        args: &[OsString],
        env: &[(&str, String)],
        log: &Path,
    ) -> Result<Self> {
        let output: File = OpenOptions::new().create(true).append(true).open(log)?;
        let inherited = std::env::vars_os().map(|(name, _)| name);
        let mut command = match host {
            Some(host) => host.command(program),
            None => Command::new(program),
        };
        command.args(args).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        for name in inherited.filter(|name| name.to_string_lossy().starts_with("HYPERVISOR_")) {
            command.env_remove(name);
        }
        let child = command
            .envs(env.iter().map(|(name, value)| (name, value)))
            .spawn()
            .with_context(|| program.display().to_string())?;
        Ok(Self { child, log: log.to_path_buf() })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Ends it as a power failure would: no handler runs.
    ///
    /// # Errors
    /// The system refuses.
    pub fn kill(&mut self) -> Result<()> {
        if self.ended()?.is_none() {
            self.child.kill()?;
        }
        self.child.wait()?;
        Ok(())
    }

    /// Stops it without ending it: it keeps its connections and answers nobody.
    ///
    /// # Errors
    /// The system refuses.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on after [`Self::freeze`].
    ///
    /// # Errors
    /// The system refuses.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.id())?).context("no process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn terminate(&mut self) -> Result<ExitStatus> {
        if let Some(pid) = Pid::from_raw(i32::try_from(self.id())?) {
            // It may have ended in this moment.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = tokio::time::Instant::now() + crate::DEADLINE;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            anyhow::ensure!(tokio::time::Instant::now() < deadline, "it does not end: {}", self.log_tail());
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    /// The end of its output.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_TAIL)..]).into_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nothing is left to tell if even this fails.
        let _ = self.kill();
    }
}
