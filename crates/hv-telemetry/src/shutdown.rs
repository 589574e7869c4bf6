//! Orderly shutdown: one token that everything watches, and the tasks that must end before the process does.
//!
//! # Theory of operation
//! The first SIGTERM or SIGINT (Ctrl-C elsewhere) cancels the [token](Shutdown::token); tasks started with
//! [`spawn`](Shutdown::spawn) watch it and end. `main` awaits [`wait`](Shutdown::wait), which returns when all have
//! ended, when its deadline passes, or at the second signal, and then returns itself: nothing calls `exit`, so
//! destructors run and logs are flushed. Tasks that still run are dropped with the runtime.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

/// Why the process ends before all of its tasks have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShutdownError {
    /// The deadline passed.
    #[error("shutdown took longer than {deadline_ms} ms, still running: {}", running.join(", "))]
    Deadline {
        /// The time that was allowed.
        deadline_ms: u128,
        /// The tasks that had not ended.
        running: Vec<String>,
    },
    /// A second signal asked for an immediate end.
    #[error("a second signal ended the shutdown, still running: {}", running.join(", "))]
    Forced {
        /// The tasks that had not ended.
        running: Vec<String>,
    },
}

/// The signal handlers could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for the signal {signal}")]
pub struct SignalError {
    /// The name of the signal.
    signal: &'static str,
    /// What the system said.
    source: io::Error,
}

/// Handle of one shutdown. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    token: CancellationToken,
    forced: CancellationToken,
    tracker: TaskTracker,
    running: Arc<Mutex<Running>>,
}

/// The names of the tasks that run, by their number.
#[derive(Debug, Default)]
struct Running {
    next: u64,
    names: BTreeMap<u64, String>,
}

impl Shutdown {
    /// Not tied to signals: [`trigger`](Self::trigger) starts it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tied to SIGTERM and SIGINT, or to Ctrl-C where there are no such signals. From then on they no longer kill the
    /// process by themselves. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`SignalError`] if the handlers cannot be installed.
    pub fn on_signals() -> Result<Self, SignalError> {
        let shutdown = Self::new();
        let mut signals = signals::Signals::listen()?;
        let listener = shutdown.clone();
        // Not tracked: it runs until the runtime goes.
        tokio::spawn(async move {
            let first = signals.next().await;
            tracing::info!(signal = first, "shutting down; a second signal ends it at once");
            listener.trigger();
            let second = signals.next().await;
            tracing::warn!(signal = second, "ending at once");
            listener.force();
        });
        Ok(shutdown)
    }

    /// The token that is cancelled when the shutdown starts.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Completes when the shutdown starts: for `serve_with_shutdown` and the like.
    pub fn triggered(&self) -> WaitForCancellationFutureOwned {
        self.token.clone().cancelled_owned()
    }

    /// Starts the shutdown, as the first signal does.
    pub fn trigger(&self) {
        self.token.cancel();
    }

    /// Starts the shutdown and ends the wait for tasks, as the second signal does.
    pub fn force(&self) {
        self.token.cancel();
        self.forced.cancel();
    }

    /// Runs a task that must end before the process does. It should watch the [`token`](Self::token). A task that
    /// panics is logged and starts the shutdown: a process that lost a part of itself must not look healthy.
    pub fn spawn<F>(&self, name: impl Into<String>, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let entry = Entry::new(self, name.into());
        self.tracker.spawn(async move {
            let _entry = entry;
            future.await
        })
    }

    /// The names of the tasks that run, oldest first.
    pub fn running(&self) -> Vec<String> {
        self.running.lock().names.values().cloned().collect()
    }

    /// Waits for the shutdown to start, then for the tasks to end, for `deadline` at most. What still runs then is
    /// logged and named in the error; it is dropped with the runtime.
    ///
    /// # Errors
    /// [`ShutdownError::Deadline`], or [`ShutdownError::Forced`] at the second signal.
    pub async fn wait(&self, deadline: Duration) -> Result<(), ShutdownError> {
        self.token.cancelled().await;
        self.tracker.close();
        let error = tokio::select! {
            // In this order: tasks that ended in time did end, whatever else happened at the same moment.
            biased;
            () = self.tracker.wait() => return Ok(()),
            () = self.forced.cancelled() => ShutdownError::Forced { running: self.running() },
            () = tokio::time::sleep(deadline) => {
                ShutdownError::Deadline { deadline_ms: deadline.as_millis(), running: self.running() }
            }
        };
        for name in self.running() {
            tracing::warn!(task = name, "still running at the end of the shutdown");
        }
        Err(error)
    }
}

/// Keeps a task's name in the list while the task lives, also if it never runs or panics.
struct Entry {
    shutdown: Shutdown,
    number: u64,
}

impl Entry {
    fn new(shutdown: &Shutdown, name: String) -> Self {
        let mut running = shutdown.running.lock();
        let number = running.next;
        running.next += 1;
        running.names.insert(number, name);
        drop(running);
        Self { shutdown: shutdown.clone(), number }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let name = self.shutdown.running.lock().names.remove(&self.number);
        if std::thread::panicking() {
            tracing::error!(task = name, "a task panicked, shutting down");
            self.shutdown.trigger();
        }
    }
}

#[cfg(unix)]
mod signals {
    //! SIGTERM and SIGINT.

    use tokio::signal::unix::{Signal, SignalKind, signal};

    use super::SignalError;

    pub(super) struct Signals {
        terminate: Signal,
        interrupt: Signal,
    }

    impl Signals {
        pub(super) fn listen() -> Result<Self, SignalError> {
            let listen = |kind, name| signal(kind).map_err(|source| SignalError { signal: name, source });
            Ok(Self {
                terminate: listen(SignalKind::terminate(), "SIGTERM")?,
                interrupt: listen(SignalKind::interrupt(), "SIGINT")?,
            })
        }

        /// The name of the next signal.
        pub(super) async fn next(&mut self) -> &'static str {
            tokio::select! {
                _ = self.terminate.recv() => "SIGTERM",
                _ = self.interrupt.recv() => "SIGINT",
            }
        }
    }
}

#[cfg(not(unix))]
mod signals {
    //! Ctrl-C.

    use super::SignalError;

    pub(super) struct Signals;

    impl Signals {
        pub(super) fn listen() -> Result<Self, SignalError> {
            Ok(Self)
        }

        /// The name of the next signal; without a handler for Ctrl-C there is none.
        pub(super) async fn next(&mut self) -> &'static str {
            if let Err(error) = tokio::signal::ctrl_c().await {
                tracing::error!(%error, "cannot listen for Ctrl-C");
                std::future::pending::<()>().await;
            }
            "Ctrl-C"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn the_wait_ends_when_every_task_has() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        let task = shutdown.spawn("watcher", async move { token.cancelled().await });
        assert_eq!(shutdown.running(), ["watcher"]);
        let early = tokio::time::timeout(LONG, shutdown.wait(LONG)).await;
        assert!(early.is_err(), "the wait ended before the shutdown began");
        shutdown.trigger();
        assert_eq!(shutdown.wait(LONG).await, Ok(()));
        assert!(shutdown.running().is_empty());
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_names_what_still_runs() {
        let shutdown = Shutdown::new();
        shutdown.spawn("quick", async {});
        shutdown.spawn("stuck", std::future::pending::<()>());
        shutdown.trigger();
        let error = shutdown.wait(Duration::from_millis(1500)).await.unwrap_err();
        assert_eq!(error, ShutdownError::Deadline { deadline_ms: 1500, running: vec!["stuck".to_owned()] });
        assert_eq!(error.to_string(), "shutdown took longer than 1500 ms, still running: stuck");
    }

    #[tokio::test(start_paused = true)]
    async fn force_ends_the_wait_before_the_deadline() {
        let shutdown = Shutdown::new();
        shutdown.spawn("stuck", std::future::pending::<()>());
        shutdown.force();
        let error = shutdown.wait(LONG).await.unwrap_err();
        assert_eq!(error, ShutdownError::Forced { running: vec!["stuck".to_owned()] });
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_panics_starts_the_shutdown() {
        let shutdown = Shutdown::new();
        let task = shutdown.spawn("broken", async { panic!("on purpose") });
        assert_eq!(shutdown.wait(LONG).await, Ok(()));
        assert!(task.await.unwrap_err().is_panic());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_is_aborted_is_forgotten() {
        let shutdown = Shutdown::new();
        let task = shutdown.spawn("aborted", std::future::pending::<()>());
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        assert!(shutdown.running().is_empty() && !shutdown.token().is_cancelled());
    }
}
