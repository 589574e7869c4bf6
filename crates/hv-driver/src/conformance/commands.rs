//! Claims about commands inside a guest.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use hv_types::InstanceId;

use super::{LOOK_INTERVAL, Subject, assert_unsupported, can, cleaned, config, report, runs, within};
use crate::{Capability, Driver, Exec, ExecOutput, ExecRequest, Input, InstanceConfig, TerminalSize};

/// The size of the suite's terminals.
const SIZE: TerminalSize = TerminalSize { width: 81, height: 25 };
/// The size to which they change.
const OTHER_SIZE: TerminalSize = TerminalSize { width: 132, height: 43 };

fn request(words: &[&str]) -> ExecRequest {
    let command = words.iter().map(|word| (*word).to_owned()).collect();
    ExecRequest { command, env: Vec::new(), tty: None }
}

/// What a command printed, and how it ended.
#[derive(Debug, Default)]
struct Ran {
    stdout: String,
    stderr: String,
    code: i32,
}

async fn to_the_end(mut exec: Exec) -> Ran {
    within("the command ends", async {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match exec.output.next().await {
                Some(Ok(ExecOutput::Stdout(bytes))) => stdout.extend_from_slice(&bytes),
                Some(Ok(ExecOutput::Stderr(bytes))) => stderr.extend_from_slice(&bytes),
                Some(Ok(ExecOutput::Exited { code })) => {
                    assert!(exec.output.next().await.is_none(), "something came after the end");
                    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                    return Ran { stdout: text(stdout), stderr: text(stderr), code };
                }
                Some(Err(error)) => panic!("the output failed: {error}"),
                None => panic!("it did not say how it ended"),
            }
        }
    })
    .await
}

async fn ran(driver: &dyn Driver, id: &InstanceId, words: &[&str]) -> Ran {
    to_the_end(driver.exec(id, request(words)).await.expect("exec")).await
}

/// A running guest that takes commands. `None`: there is none, or the driver has refused.
async fn with_shell(
    subject: &dyn Subject,
    capability: Capability,
) -> Option<(Arc<dyn Driver>, InstanceConfig)> {
    let (driver, mut config) = (subject.driver(), config(subject));
    let is_able = can(&*driver, capability).await;
    match subject.shell() {
        Some(spec) => config.spec = spec,
        None if is_able => {
            report::skipped("its tests have no guest that takes commands");
            return None;
        }
        None => {}
    }
    driver.create(&config).await.expect("create");
    driver.start(&config.id).await.expect("start");
    if !is_able {
        let tty = (capability == Capability::ExecTty).then_some(SIZE);
        let refused = driver.exec(&config.id, ExecRequest { tty, ..request(&["true"]) }).await;
        assert_unsupported(refused.map(drop), "a command");
        assert!(runs(&*driver, &config.id).await);
        cleaned(subject, &*driver, &config).await;
        return None;
    }
    // What has just begun to run may not take commands yet.
    within("the guest takes commands", async {
        while driver.exec(&config.id, request(&["true"])).await.is_err() {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    })
    .await;
    Some((driver, config))
}

async fn type_text(exec: &Exec, text: &str) {
    exec.input.send(Input::Data(Bytes::copy_from_slice(text.as_bytes()))).await.expect("input");
}

/// The exit code comes last, whatever it is.
pub async fn a_command_says_how_it_ended(subject: &dyn Subject) {
    let Some((driver, config)) = with_shell(subject, Capability::Exec).await else { return };
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255)] {
        let ran = ran(&*driver, &config.id, &["sh", "-c", script]).await;
        assert_eq!(ran.code, code, "{ran:?}");
    }
    assert!(runs(&*driver, &config.id).await);
    cleaned(subject, &*driver, &config).await;
}

/// All of it, in order, to its end.
pub async fn a_command_reads_what_is_typed(subject: &dyn Subject) {
    let Some((driver, config)) = with_shell(subject, Capability::Exec).await else { return };
    let exec = driver.exec(&config.id, request(&["cat"])).await.expect("exec");
    type_text(&exec, "one\n").await;
    type_text(&exec, "two \u{fc}\n").await;
    exec.input.send(Input::Eof).await.expect("input");
    let ran = to_the_end(exec).await;
    assert_eq!((ran.stdout.as_str(), ran.code), ("one\ntwo \u{fc}\n", 0), "{ran:?}");
    cleaned(subject, &*driver, &config).await;
}

/// Names and values are text and nothing else.
pub async fn a_command_sees_its_variables(subject: &dyn Subject) {
    let Some((driver, config)) = with_shell(subject, Capability::Exec).await else { return };
    let mut asked = request(&["env"]);
    asked.env = vec![("SUITE_A".to_owned(), "b c=\"d\" $(e)".to_owned())];
    let ran = to_the_end(driver.exec(&config.id, asked).await.expect("exec")).await;
    assert!(ran.stdout.lines().any(|line| line == "SUITE_A=b c=\"d\" $(e)"), "{ran:?}");
    cleaned(subject, &*driver, &config).await;
}

/// Standard output is not standard error.
pub async fn both_outputs_come_apart(subject: &dyn Subject) {
    let Some((driver, config)) = with_shell(subject, Capability::Exec).await else { return };
    let ran = ran(&*driver, &config.id, &["sh", "-c", "echo out ; echo err >&2 ; exit 3"]).await;
    assert_eq!((ran.stdout.trim(), ran.stderr.trim(), ran.code), ("out", "err", 3), "{ran:?}");
    cleaned(subject, &*driver, &config).await;
}

/// It fails at once, or says that it was not found; nothing else happens.
pub async fn an_unknown_command_fails_and_harms_nothing(subject: &dyn Subject) {
    let Some((driver, config)) = with_shell(subject, Capability::Exec).await else { return };
    if let Ok(exec) = driver.exec(&config.id, request(&["no-such-command-of-the-suite"])).await {
        let ran = to_the_end(exec).await;
        assert_ne!(ran.code, 0, "{ran:?}");
    }
    assert!(runs(&*driver, &config.id).await);
    assert_eq!(ran(&*driver, &config.id, &["sh", "-c", "exit 4"]).await.code, 4);
    cleaned(subject, &*driver, &config).await;
}

/// The program sees the size, and a new one; without a terminal there is none.
pub async fn a_terminal_has_a_size_that_changes(subject: &dyn Subject) {
    let Some((driver, config)) = with_shell(subject, Capability::ExecTty).await else { return };
    assert_ne!(ran(&*driver, &config.id, &["stty", "size"]).await.code, 0, "pipes have a size");
    let on_terminal =
        ExecRequest { tty: Some(SIZE), ..request(&["sh", "-c", "stty size ; read x ; stty size ; exit 5"]) };
    let mut exec = driver.exec(&config.id, on_terminal).await.expect("exec with a terminal");
    let mut printed = String::new();
    within("the size is told", async {
        while !printed.contains("25 81") {
            match exec.output.next().await {
                Some(Ok(ExecOutput::Stdout(bytes))) => printed.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {printed:?}"),
            }
        }
    })
    .await;
    exec.input.send(Input::Resize(OTHER_SIZE)).await.expect("resize");
    type_text(&exec, "x\n").await;
    let ran = to_the_end(exec).await;
    assert!(ran.stdout.contains("43 132"), "{ran:?}");
    assert_eq!(ran.code, 5);
    cleaned(subject, &*driver, &config).await;
}
