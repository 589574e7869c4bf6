//! Runs `hypervisor-ctl` as a user would, with an environment of its own.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::fake::Fake;

/// What a run printed, and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// The standard output of a run that must have succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }

    /// The standard error of a run that must have ended with this code.
    #[track_caller]
    pub(crate) fn failed(self, code: i32) -> String {
        assert_eq!(self.code, code, "{self:?}");
        self.stderr
    }
}

/// The program with nothing of this machine's settings.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hypervisor-ctl"));
    command.env_clear().env("HOME", "/nonexistent").stdin(Stdio::null());
    command
}

/// Runs without a server.
pub(crate) fn alone(arguments: &[&str]) -> Ran {
    ran(command().args(arguments).output().unwrap())
}

/// Runs against the fake.
pub(crate) fn ctl(fake: &Fake, arguments: &[&str]) -> Ran {
    ran(against(fake).args(arguments).output().unwrap())
}

/// Runs against the fake with this on standard input.
pub(crate) fn ctl_with_input(fake: &Fake, arguments: &[&str], input: &str) -> Ran {
    let mut child = against(fake)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    ran(child.wait_with_output().unwrap())
}

/// The program, told where the fake is.
pub(crate) fn against(fake: &Fake) -> Command {
    let mut command = command();
    command.env("HYPERVISOR_CTL_SERVER", fake.address()).env("HYPERVISOR_CTL_TIMEOUT", "20s");
    command
}

fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
