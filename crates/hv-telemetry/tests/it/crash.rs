//! Crash points in a real process: this test binary runs itself again.

use std::process::{Command, ExitStatus};

use hv_telemetry::crash::{Point, VARIABLE, reach};

/// The test below, as the child process runs it.
const WALK: &str = "crash::a_walk_over_every_point_survives_without_the_variable";

/// How often the walk reaches each point.
const ROUNDS: u32 = 2;

#[test]
fn a_walk_over_every_point_survives_without_the_variable() {
    for round in 1..=ROUNDS {
        for point in Point::ALL {
            reach(*point);
            println!("passed {point}:{round}");
        }
    }
}

fn walk(variable: &str) -> (ExitStatus, String) {
    let child = Command::new(std::env::current_exe().unwrap())
        .args([WALK, "--exact", "--nocapture", "--test-threads=1"])
        .env(VARIABLE, variable)
        .output()
        .unwrap();
    (child.status, String::from_utf8_lossy(&child.stdout).into_owned())
}

#[cfg(unix)]
fn died(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(rustix::process::Signal::ABORT.as_raw())
}

#[cfg(not(unix))]
fn died(status: ExitStatus) -> bool {
    !status.success()
}

#[test]
fn every_point_kills_the_process_at_the_time_that_is_asked_for() {
    for (index, point) in Point::ALL.iter().enumerate() {
        // By turns the first and the second time, to keep the number of processes down.
        let nth = u32::try_from(index).unwrap() % ROUNDS + 1;
        let (status, output) = walk(&format!("{point}:{nth}"));
        assert!(died(status), "{point}:{nth}: {status}");
        assert!(!output.contains(&format!("passed {point}:{nth}\n")), "{point}:{nth} was passed");
        assert_eq!(output.contains(&format!("passed {point}:1\n")), nth == 2, "{point}:{nth}");
    }
}

#[test]
fn a_time_that_never_comes_kills_nothing() {
    let (status, output) = walk("agent.start.before:3");
    assert!(status.success(), "{status}");
    assert!(output.contains("passed qemu.delete.before_rmdir:2"), "{output}");
}

#[test]
fn a_misspelt_point_kills_the_process_rather_than_letting_a_test_pass() {
    let (status, _) = walk("agent.start.befor");
    assert!(died(status), "{status}");
}
