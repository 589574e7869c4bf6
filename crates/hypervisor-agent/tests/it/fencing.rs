//! The real program with its real fencer: whatever is killed, stopped or cut off, what may run elsewhere never outlives
//! the lease, and nothing else notices.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, UNIX_EPOCH};

use hv_driver::FenceTarget;
use hv_driver::fence::{Outcome, Zeal, kill};
use hv_driver_fake::{LedgerEntry, LedgerEvent, read_ledger};
use hv_proto::v1::{InstanceState, InstanceWanted};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::control::{Control, assignment, guarded};
use crate::node::eventually;

/// How long a lease lives here. Its margin is a second, so what may run elsewhere is stopped after two.
const LEASE: Duration = Duration::from_secs(3);
/// Longer than the margin lets anything live.
const LONG: Duration = Duration::from_millis(3500);

/// A state directory, the agent over it, and the control plane.
struct Node {
    control: Control,
    dir: tempfile::TempDir,
    agent: Option<Child>,
}

impl Node {
    async fn new() -> Self {
        let control = Control::start().await;
        {
            let mut state = control.state.lock();
            state.lease_ttl_ms = u64::try_from(LEASE.as_millis()).unwrap();
            state.heartbeat_ms = 200;
        }
        Self { control, dir: tempfile::tempdir().unwrap(), agent: None }
    }

    /// A node on which `f`, which may run elsewhere, and `p`, which may not, run.
    async fn running() -> Self {
        let mut node = Self::new().await;
        node.start();
        node.control.assign(guarded("f"));
        node.control.assign(assignment("p"));
        for id in ["f", "p"] {
            node.control.settled(id, InstanceState::Running).await;
        }
        node.armed().await;
        node
    }

    fn start(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypervisor-agent"));
        command
            .args(["--drivers", "fake", "--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"])
            .args(["--server-addr", &self.control.address.to_string()])
            .arg("--state-dir")
            .arg(self.dir.path())
            .env_clear()
            .env("HYPERVISOR_HEARTBEAT_RETRY_INTERVAL", "50ms")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        self.agent = Some(command.spawn().unwrap());
    }

    fn signal(&self, signal: Signal) {
        let pid = self.agent.as_ref().unwrap().id().unwrap();
        kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
    }

    async fn kill(&mut self) {
        self.agent.take().unwrap().kill().await.unwrap();
    }

    /// Waits until the node says that it fences.
    async fn armed(&self) {
        eventually("it is armed", || self.says_armed(true)).await;
    }

    fn says_armed(&self, armed: bool) -> Option<()> {
        let state = self.control.state.lock();
        let last = state.heartbeats.last()?.fencing.clone()?;
        (last.armed == armed).then_some(())
    }

    fn says(&self, message: &str) -> Option<()> {
        let state = self.control.state.lock();
        let last = state.heartbeats.last()?.fencing.clone()?;
        (last.message == message).then_some(())
    }

    fn lock(&self) -> PathBuf {
        self.dir.path().join("fencing/lock")
    }

    fn kill_fencer(&self) {
        let target = FenceTarget::LockHolder { path: self.lock() };
        assert_eq!(kill(&target, Zeal::Instance), Outcome::Gone);
    }

    fn fencer(&self) -> Option<Pid> {
        pid_with_stdin(&self.lock())
    }

    fn ledger(&self, id: &str, what: LedgerEvent) -> Vec<LedgerEntry> {
        let ledger = read_ledger(&self.dir.path().join("fake")).unwrap();
        ledger.into_iter().filter(|entry| entry.id.as_str() == id && entry.what == what).collect()
    }

    fn count(&self, id: &str, what: LedgerEvent) -> usize {
        self.ledger(id, what).len()
    }

    /// Waits until `f` has ended, and checks that it was before the lease could have.
    async fn fenced_in_time(&self) {
        let end = eventually("f is stopped", || self.ledger("f", LedgerEvent::Ended).pop()).await;
        let renewed = self.control.state.lock().renewed_at.unwrap();
        let ended = UNIX_EPOCH + Duration::from_micros(end.at_us);
        let lived = ended.duration_since(renewed).unwrap_or_default();
        assert!(lived < LEASE, "f outlived the last renewal by {lived:?}");
        assert!(lived > Duration::from_millis(500), "f was stopped {lived:?} after a renewal");
        self.untouched("p");
    }

    fn untouched(&self, id: &str) {
        let counts = (self.count(id, LedgerEvent::Started), self.count(id, LedgerEvent::Ended));
        assert_eq!(counts, (1, 0), "{id} was touched");
    }

    /// Waits until `f` runs for the second time, without having been asked for.
    async fn runs_again(&self) {
        eventually("f runs again", || (self.count("f", LedgerEvent::Started) == 2).then_some(())).await;
        let report = eventually("it is reported", || {
            self.control.last("f").filter(|report| report.restart_count == 1)
        });
        assert_eq!(report.await.observed_generation, 1);
        self.control.settled("f", InstanceState::Running).await;
        self.untouched("p");
    }
}

fn pid_with_stdin(path: &Path) -> Option<Pid> {
    let pids = std::fs::read_dir("/proc").ok()?.filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let stdin = std::fs::read_link(format!("/proc/{pid}/fd/0")).ok()?;
        (stdin == path).then_some(pid)
    });
    pids.into_iter().find_map(Pid::from_raw)
}

#[tokio::test]
async fn an_agent_that_is_killed_leaves_the_work_to_its_fencer() {
    let mut node = Node::running().await;
    node.kill().await;
    node.fenced_in_time().await;
    node.start();
    node.runs_again().await;
}

#[tokio::test]
async fn an_agent_that_hangs_leaves_the_work_to_its_fencer() {
    let node = Node::running().await;
    node.signal(Signal::STOP);
    node.fenced_in_time().await;
    node.signal(Signal::CONT);
    node.runs_again().await;
}

#[tokio::test]
async fn a_node_that_is_cut_off_stops_what_may_run_elsewhere_and_starts_it_when_it_is_back() {
    let mut node = Node::running().await;
    node.control.down();
    node.fenced_in_time().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(node.count("f", LedgerEvent::Started), 1, "it was started without a lease");
    node.control.up().await;
    node.runs_again().await;
    node.armed().await;
}

#[tokio::test]
async fn what_was_moved_elsewhere_meanwhile_is_not_started_again() {
    let mut node = Node::running().await;
    node.control.down();
    node.fenced_in_time().await;
    // Another node has it by now, which the assignments say later than anything else.
    node.control.state.lock().assignments.remove("f");
    node.control.up().await;
    let journal = node.dir.path().join("journal/instances/f.json");
    eventually("f is forgotten", || (!journal.exists()).then_some(())).await;
    assert_eq!(node.count("f", LedgerEvent::Started), 1, "two copies");
    node.untouched("p");
}

#[tokio::test]
async fn an_agent_that_restarts_within_the_lease_disturbs_nothing() {
    let mut node = Node::running().await;
    node.kill().await;
    node.start();
    node.armed().await;
    node.control.settled("f", InstanceState::Running).await;
    tokio::time::sleep(LONG).await;
    node.untouched("f");
    node.untouched("p");
}

#[tokio::test]
async fn an_agent_that_hangs_in_the_middle_of_a_start_is_ended_by_the_fencer() {
    let mut node = Node::new().await;
    node.start();
    node.armed().await;
    let slow = crate::control::scripted("f", &[("delay-start", "1s")]);
    node.control.assign(hv_proto::v1::Assignment { fence: true, ..slow });
    eventually("it is being started", || {
        node.control.last("f").filter(|report| report.state() == InstanceState::Starting)
    })
    .await;
    node.signal(Signal::STOP);
    // What would start it as soon as it went on is gone before another node may have it.
    let ended = tokio::time::timeout(LEASE, node.agent.as_mut().unwrap().wait()).await;
    assert!(!ended.expect("the agent is ended before the lease can end").unwrap().success());
    assert_eq!(node.count("f", LedgerEvent::Started), 0);
    node.start();
    node.control.settled("f", InstanceState::Running).await;
}

#[tokio::test]
async fn a_fencer_that_is_killed_is_started_again_and_armed() {
    let mut node = Node::running().await;
    let first = node.fencer().expect("a fencer");
    node.control.state.lock().heartbeats.clear();
    node.kill_fencer();
    eventually("it says that it is not armed", || {
        let state = node.control.state.lock();
        state.heartbeats.iter().any(|beat| beat.fencing.as_ref().is_some_and(|f| !f.armed)).then_some(())
    })
    .await;
    node.armed().await;
    let second = eventually("another fencer", || node.fencer().filter(|pid| *pid != first)).await;
    assert_ne!(first, second);
    node.untouched("f");
    // The new one knows everything.
    node.kill().await;
    node.fenced_in_time().await;
}

#[tokio::test]
async fn a_fencer_that_hangs_is_replaced() {
    let mut node = Node::running().await;
    let first = node.fencer().expect("a fencer");
    kill_process(first, Signal::STOP).unwrap();
    eventually("another fencer", || node.fencer().filter(|pid| *pid != first)).await;
    node.armed().await;
    node.untouched("f");
    node.kill().await;
    node.fenced_in_time().await;
}

#[tokio::test]
async fn where_agent_and_fencer_died_the_next_agent_stops_what_nobody_vouches_for() {
    let mut node = Node::running().await;
    node.kill().await;
    node.kill_fencer();
    node.control.down();
    node.start();
    eventually("f is stopped", || node.ledger("f", LedgerEvent::Ended).pop()).await;
    node.untouched("p");
    node.control.up().await;
    node.runs_again().await;
}

#[tokio::test]
async fn while_failover_is_held_nothing_is_stopped() {
    let mut node = Node::running().await;
    node.control.state.lock().failover_held = true;
    eventually("it does not fence any more", || node.says("failover of this node is held")).await;
    node.control.down();
    tokio::time::sleep(LONG).await;
    node.untouched("f");
    // Nor does a dead agent change that, or the one that follows.
    node.kill().await;
    tokio::time::sleep(LEASE).await;
    node.untouched("f");
    node.start();
    node.control.state.lock().failover_held = false;
    node.control.up().await;
    node.armed().await;
    node.untouched("f");
    node.control.down();
    node.fenced_in_time().await;
}

#[tokio::test]
async fn a_node_is_disarmed_only_after_the_control_plane_has_heard_that_it_will_be() {
    let mut node = Node::running().await;
    {
        let mut state = node.control.state.lock();
        state.failover_held = true;
        // What it says then is recorded nowhere.
        state.ignores_unarmed = true;
    }
    eventually("it says so", || node.says("failover of this node is about to be held")).await;
    node.control.down();
    node.fenced_in_time().await;
}

#[tokio::test]
async fn after_a_boot_nothing_that_may_run_elsewhere_starts_before_the_lease_lives() {
    let mut node = Node::running().await;
    node.control.down();
    node.kill().await;
    node.fenced_in_time().await;
    node.start();
    let ready = node.dir.path().join(hypervisor_agent::READY_FILE);
    eventually("the agent listens", || ready.exists().then_some(())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(node.count("f", LedgerEvent::Started), 1);
    node.control.up().await;
    node.runs_again().await;
}

#[tokio::test]
async fn a_lease_counts_from_when_its_renewal_was_sent() {
    let mut node = Node::new().await;
    {
        let mut state = node.control.state.lock();
        // Half a second is left of it when the answer comes, and no heartbeat follows.
        state.answers_after = Duration::from_millis(1500);
        state.heartbeat_ms = 60_000;
        state.assignments.insert("f".into(), guarded("f"));
        state.assignments.insert("p".into(), assignment("p"));
    }
    node.start();
    let first = eventually("f runs", || node.ledger("f", LedgerEvent::Started).pop()).await;
    let registered = node.control.state.lock().renewed_at.unwrap();
    let end = eventually("f is stopped", || node.ledger("f", LedgerEvent::Ended).pop()).await;
    let lived = (UNIX_EPOCH + Duration::from_micros(end.at_us)).duration_since(registered).unwrap();
    assert!(end.at_us > first.at_us && lived < LEASE, "{lived:?}");
}

#[tokio::test]
async fn what_is_stopped_or_deleted_is_watched_no_more() {
    let mut node = Node::running().await;
    node.control.want("f", InstanceWanted::Stopped);
    node.control.settled("f", InstanceState::Stopped).await;
    let ends = node.count("f", LedgerEvent::Ended);
    node.kill().await;
    // A fencer without an agent and without work does not stay.
    eventually("the fencer ends", || node.fencer().is_none().then_some(())).await;
    assert_eq!(node.count("f", LedgerEvent::Ended), ends);
}
