//! The real program, killed at every crash point of the agent.

use std::path::Path;
use std::process::Stdio;

use hv_driver_fake::{LedgerEvent, read_ledger, read_record};
use hv_proto::v1::{InstanceState, InstanceWanted};
use hv_telemetry::crash::{Point, VARIABLE};
use tokio::process::{Child, Command};

use crate::control::{Control, assignment};
use crate::node::eventually;

/// Starts the program over a state directory; it may be told where to die.
fn spawn(control: &Control, state_dir: &Path, crash: Option<&str>) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypervisor-agent"));
    command
        .args(["--drivers", "fake", "--grpc-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"])
        .args(["--server-addr", &control.address.to_string()])
        .arg("--state-dir")
        .arg(state_dir)
        .env_clear()
        .env("HYPERVISOR_HEARTBEAT_RETRY_INTERVAL", "50ms")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if let Some(crash) = crash {
        command.env(VARIABLE, crash);
    }
    command.spawn().unwrap()
}

fn count(state_dir: &Path, what: LedgerEvent) -> usize {
    read_ledger(&state_dir.join("fake")).unwrap().iter().filter(|entry| entry.what == what).count()
}

/// Runs the program until it dies at the crash point, then again without one.
async fn die_and_come_back(control: &Control, state_dir: &Path, crash: &str, mut agent: Child) -> Child {
    let died = tokio::time::timeout(std::time::Duration::from_secs(20), agent.wait()).await;
    let status = died.unwrap_or_else(|_| panic!("{crash} was not reached")).unwrap();
    assert!(!status.success(), "{crash}: {status}");
    spawn(control, state_dir, None)
}

/// Creates, starts, stops and deletes an instance with one death at the point.
async fn survive(point: Point, nth: u32) {
    let control = Control::start().await;
    let dir = tempfile::tempdir().unwrap();
    let crash = format!("{point}:{nth}");
    let late = ["agent.stop", "agent.delete", "agent.update"];
    let is_late = late.iter().any(|part| point.name().starts_with(part)) || nth > 1;

    let mut agent = spawn(&control, dir.path(), Some(&crash));
    control.assign(assignment("a"));
    if !is_late {
        agent = die_and_come_back(&control, dir.path(), &crash, agent).await;
    }
    let mut died = !is_late;
    for (round, (wanted, state)) in [
        (InstanceWanted::Running, InstanceState::Running),
        // Of more cores than before.
        (InstanceWanted::Running, InstanceState::Running),
        (InstanceWanted::Stopped, InstanceState::Stopped),
        (InstanceWanted::Running, InstanceState::Running),
        (InstanceWanted::Deleted, InstanceState::Deleting),
    ]
    .into_iter()
    .enumerate()
    {
        if round == 1 {
            control.change("a", |assignment| {
                assignment.spec.get_or_insert_default().cpu_cores = 3;
            });
        }
        if control.state.lock().assignments.get("a").is_some_and(|a| a.wanted != i32::from(wanted)) {
            control.want("a", wanted);
        }
        loop {
            let is_deleted = wanted == InstanceWanted::Deleted;
            let reached = async {
                if is_deleted { control.gone("a").await } else { drop(control.settled("a", state).await) }
            };
            tokio::select! {
                () = reached => break,
                status = agent.wait() => {
                    assert!(!died, "{crash}: the agent ended twice: {status:?}");
                    died = true;
                    agent = spawn(&control, dir.path(), None);
                }
            }
        }
        let running = count(dir.path(), LedgerEvent::Started) - count(dir.path(), LedgerEvent::Ended);
        let expected = usize::from(wanted == InstanceWanted::Running);
        let ledger = read_ledger(&dir.path().join("fake")).unwrap();
        assert_eq!(running, expected, "{crash}: {running} run where {wanted:?} was wanted: {ledger:?}");
        if round == 1 {
            let id = "a".parse().unwrap();
            let made = read_record(&dir.path().join("fake"), &id).unwrap().unwrap().config.spec;
            assert_eq!(made.cpu_cores, 3, "{crash}: the driver was not told");
        }
    }
    if !died {
        agent = die_and_come_back(&control, dir.path(), &crash, agent).await;
    }
    let journal = dir.path().join("journal/instances");
    eventually(&format!("{crash}: nothing is left"), || {
        let left = std::fs::read_dir(&journal).unwrap().count();
        (left == 0 && !dir.path().join("fake/a").exists()).then_some(())
    })
    .await;
    assert_eq!(count(dir.path(), LedgerEvent::Started), 2, "{crash}");
    agent.kill().await.unwrap();
}

#[tokio::test]
async fn a_death_at_any_step_changes_nothing_in_the_end() {
    for point in Point::ALL.iter().copied().filter(|point| point.name().starts_with("agent.")) {
        survive(point, 1).await;
    }
}

#[tokio::test]
async fn a_death_at_a_later_time_of_the_same_step_changes_nothing_either() {
    for point in [
        Point::AgentAssignmentBeforeJournal,
        Point::AgentAssignmentAfterJournal,
        Point::AgentStartBefore,
        Point::AgentStartAfter,
        Point::AgentReportBefore,
        Point::AgentReportAfter,
    ] {
        survive(point, 2).await;
    }
}

#[tokio::test]
async fn a_death_on_the_way_into_rescue_starts_it_there_once() {
    for point in
        [Point::AgentUpdateBefore, Point::AgentUpdateAfter, Point::AgentStopBefore, Point::AgentStopAfter]
    {
        let (control, dir) = (Control::start().await, tempfile::tempdir().unwrap());
        let crash = format!("{point}:1");
        let agent = spawn(&control, dir.path(), Some(&crash));
        control.assign(assignment("a"));
        control.settled("a", InstanceState::Running).await;
        control.change("a", |assignment| {
            assignment.spec.get_or_insert_default().rescue = "tiny".into();
            assignment.restart_generation = assignment.generation;
        });
        let mut agent = die_and_come_back(&control, dir.path(), &crash, agent).await;
        control.settled("a", InstanceState::Running).await;
        let made = read_record(&dir.path().join("fake"), &"a".parse().unwrap()).unwrap().unwrap();
        assert_eq!(made.config.spec.rescue, "tiny", "{crash}");
        let runs = (count(dir.path(), LedgerEvent::Started), count(dir.path(), LedgerEvent::Ended));
        assert_eq!(runs, (2, 1), "{crash}");
        agent.kill().await.unwrap();
    }
}
