//! Signals to a real process: this test binary runs itself again.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use hv_telemetry::{Shutdown, ShutdownError};
use rustix::process::{Pid, Signal, kill_process};

/// The test below, as the child process runs it.
const CHILD: &str = "signals::a_server_ends_when_it_is_told_to";

/// Tells the child to listen to signals, and whether its task heeds them.
const TASK: &str = "HV_TELEMETRY_TEST_TASK";

/// Long enough for a busy machine; no test waits for it unless it fails.
const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn a_server_ends_when_it_is_told_to() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let result = runtime.block_on(async {
        let shutdown = Shutdown::on_signals().unwrap();
        let task = std::env::var(TASK);
        let token = shutdown.token();
        if task.as_deref() == Ok("stuck") {
            shutdown.spawn("stuck", async move {
                token.cancelled().await;
                println!("triggered");
                std::future::pending::<()>().await;
            });
        } else {
            shutdown.spawn("heeding", async move { token.cancelled().await });
        }
        println!("listening");
        if task.is_err() {
            shutdown.trigger();
        }
        shutdown.wait(DEADLINE).await
    });
    match result {
        Ok(()) => println!("ended in order"),
        Err(ShutdownError::Forced { running }) => println!("forced with {running:?}"),
        Err(error) => panic!("{error}"),
    }
}

struct Server {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    fn start(task: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([CHILD, "--exact", "--nocapture", "--test-threads=1"])
            .env(TASK, task)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut server = Self { child, lines };
        server.expect("listening");
        server
    }

    fn expect(&mut self, text: &str) {
        let found = self.lines.by_ref().any(|line| line.unwrap().contains(text));
        assert!(found, "the child ended without saying {text:?}");
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Only a failed test leaves it running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn one_signal_ends_the_process_in_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut server = Server::start("heeding");
        server.signal(signal);
        server.expect("ended in order");
        assert!(server.child.wait().unwrap().success());
    }
}

#[test]
fn a_second_signal_ends_a_stuck_shutdown_at_once() {
    let mut server = Server::start("stuck");
    server.signal(Signal::TERM);
    server.expect("triggered");
    server.signal(Signal::INT);
    server.expect("forced with [\"stuck\"]");
    assert!(server.child.wait().unwrap().success());
}
