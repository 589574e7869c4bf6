//! Commands in a guest, through QEMU's agent in it (docs/interop/qemu-ga-ref of QEMU).
//!
//! # Caveats
//! The agent runs a command to its end and then tells its output; nothing can be typed meanwhile, and there is no
//! terminal.

use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream;
use hv_driver::{DriverError, Exec, ExecOutput, ExecRequest, Input, Result};
use hv_types::InstanceId;
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// How often the agent is asked whether a command has ended, at first and at last.
const POLL_INTERVAL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How many inputs are taken before they are refused.
const INPUT_QUEUE: usize = 1;
/// How many items of output wait for whoever reads them.
const OUTPUT_QUEUE: usize = 4;

/// The way to the agent of one guest.
#[async_trait]
pub trait GuestAgent: Send + Sync + 'static {
    /// What the agent returns for a command.
    async fn ask(&self, command: &'static str, arguments: Value) -> std::result::Result<Value, Trouble>;
}

/// Why the agent returns nothing.
#[derive(Debug)]
pub enum Trouble {
    /// It is not there, or does not answer.
    Silent(Box<dyn std::error::Error + Send + Sync>),
    /// It says no, and why.
    Refused(String),
    /// It could not be asked.
    Failed(DriverError),
}

/// Starts a command in the guest of an instance of `driver`. What it prints comes at its end.
///
/// # Errors
/// [`DriverError::WrongState`] if the agent does not answer, [`DriverError::Unsupported`] for what no agent can do.
pub async fn exec(
    driver: &'static str,
    id: &InstanceId,
    agent: impl GuestAgent,
    request: ExecRequest,
) -> Result<Exec> {
    let unsupported =
        |reason: &str| DriverError::Unsupported { driver, operation: "exec", reason: reason.to_owned() };
    if request.tty.is_some() {
        return Err(unsupported(
            "qemu's guest agent has no terminals; run it without one, or use the console",
        ));
    }
    let Some((program, arguments)) = request.command.split_first() else {
        return Err(unsupported("an empty command cannot be run"));
    };
    let environment: Vec<_> = request.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let mut start = json!({ "path": program, "arg": arguments, "capture-output": true });
    if !environment.is_empty() {
        start["env"] = environment.into();
    }
    let pid = match agent.ask("guest-exec", start).await {
        Ok(answer) => answer["pid"].clone(),
        Err(Trouble::Silent(_)) => {
            let reason = "the guest agent does not answer; install qemu-guest-agent in the guest, or wait until it is up";
            return Err(DriverError::wrong_state(id, "exec", reason));
        }
        // What the agent says of a program that is not there; a shell would say 127.
        Err(Trouble::Refused(reason)) => return Ok(not_started(&reason)),
        Err(Trouble::Failed(error)) => return Err(error),
    };
    let (input, typed) = mpsc::channel(INPUT_QUEUE);
    let (output, printed) = mpsc::channel(OUTPUT_QUEUE);
    let id = id.clone();
    tokio::spawn(async move {
        let work = async {
            tokio::select! {
                outputs = wait(&id, &agent, &pid) => outputs,
                () = refused_input(typed) => {
                    let reason = "qemu's guest agent passes no input on to a running command".to_owned();
                    Err(DriverError::Unsupported { driver, operation: "exec", reason })
                }
            }
        };
        let outputs = tokio::select! {
            outputs = work => outputs,
            // The agent cannot end a command; it runs to its end unheard.
            () = output.closed() => return,
        };
        let items = match outputs {
            Ok(outputs) => outputs.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        };
        for item in items {
            // Whoever asked may be gone.
            let _ = output.send(item).await;
        }
    });
    let output =
        stream::unfold(printed, |mut printed| async { printed.recv().await.map(|item| (item, printed)) });
    Ok(Exec { output: output.boxed(), input })
}

fn not_started(reason: &str) -> Exec {
    let items = [ExecOutput::Stderr(format!("{reason}\n").into()), ExecOutput::Exited { code: 127 }];
    Exec { output: stream::iter(items.map(Ok)).boxed(), input: mpsc::channel(INPUT_QUEUE).0 }
}

/// Returns when something is typed; never if nothing is.
async fn refused_input(mut typed: mpsc::Receiver<Input>) {
    loop {
        match typed.recv().await {
            Some(Input::Data(bytes)) if !bytes.is_empty() => return,
            Some(_) => {}
            None => return std::future::pending().await,
        }
    }
}

async fn wait(id: &InstanceId, agent: &impl GuestAgent, pid: &Value) -> Result<Vec<ExecOutput>> {
    let (mut interval, longest) = POLL_INTERVAL;
    loop {
        let status = agent.ask("guest-exec-status", json!({ "pid": pid })).await;
        let status = status.map_err(|trouble| match trouble {
            Trouble::Silent(cause) => DriverError::failed(id, "exec", cause),
            Trouble::Refused(reason) => {
                let reason = format!("the guest agent does not say what became of the command: {reason}");
                DriverError::failed(id, "exec", reason)
            }
            Trouble::Failed(error) => error,
        })?;
        if status["exited"].as_bool() == Some(true) {
            return outputs(&status).map_err(|e| DriverError::failed(id, "exec", e));
        }
        // The agent tells nothing by itself, so it is asked, ever more rarely.
        tokio::time::sleep(interval).await;
        interval = (interval * 2).min(longest);
    }
}

fn outputs(status: &Value) -> std::result::Result<Vec<ExecOutput>, String> {
    let decode = |name: &str| {
        let bytes = BASE64.decode(status[name].as_str().unwrap_or_default());
        bytes.map(Bytes::from).map_err(|e| format!("the guest agent's {name} cannot be understood: {e}"))
    };
    let mut items = Vec::new();
    let (stdout, stderr) = (decode("out-data")?, decode("err-data")?);
    items.extend((!stdout.is_empty()).then_some(ExecOutput::Stdout(stdout)));
    items.extend((!stderr.is_empty()).then_some(ExecOutput::Stderr(stderr)));
    if status["out-truncated"] == true || status["err-truncated"] == true {
        items.push(ExecOutput::Stderr("(the guest agent cut the output at 16 MiB)\n".into()));
    }
    let number = |name: &str| status[name].as_i64().and_then(|n| i32::try_from(n).ok());
    let code = number("exitcode").or_else(|| number("signal").map(|signal| 128 + signal)).unwrap_or(-1);
    items.push(ExecOutput::Exited { code });
    Ok(items)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A guest whose commands take three looks, unless there is no such program.
    struct Guest {
        status: Value,
        looks: AtomicU32,
    }

    #[async_trait]
    impl GuestAgent for Guest {
        async fn ask(&self, command: &'static str, arguments: Value) -> std::result::Result<Value, Trouble> {
            match (command, arguments["path"].as_str()) {
                ("guest-exec", Some("/missing")) => Err(Trouble::Refused("no such file".to_owned())),
                ("guest-exec", Some("/silent")) => Err(Trouble::Silent("no answer".into())),
                ("guest-exec", _) => Ok(json!({ "pid": 7 })),
                _ if self.looks.fetch_add(1, Ordering::Relaxed) < 2 => Ok(json!({ "exited": false })),
                _ => {
                    assert_eq!(arguments, json!({ "pid": 7 }));
                    Ok(self.status.clone())
                }
            }
        }
    }

    async fn run(program: &str, status: Value) -> Result<Vec<Result<ExecOutput>>> {
        let guest = Guest { status, looks: AtomicU32::new(0) };
        let request = ExecRequest { command: vec![program.to_owned()], env: Vec::new(), tty: None };
        let exec = exec("test", &"one".parse().unwrap(), guest, request).await?;
        Ok(exec.output.collect().await)
    }

    #[tokio::test]
    async fn a_command_tells_what_it_printed_and_how_it_ended() {
        let printed = json!({ "exited": true, "exitcode": 3, "out-data": "b3V0", "err-data": "ZXJy" });
        let items: Vec<_> = run("/true", printed).await.unwrap().into_iter().map(Result::unwrap).collect();
        let expected = [
            ExecOutput::Stdout("out".into()),
            ExecOutput::Stderr("err".into()),
            ExecOutput::Exited { code: 3 },
        ];
        assert_eq!(items, expected);
        let killed = run("/true", json!({ "exited": true, "signal": 9 })).await.unwrap();
        assert!(matches!(killed[..], [Ok(ExecOutput::Exited { code: 137 })]), "{killed:?}");
        let garbled = run("/true", json!({ "exited": true, "out-data": "?" })).await.unwrap();
        assert!(matches!(garbled[..], [Err(DriverError::Failed { .. })]), "{garbled:?}");
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_no_failure_and_a_silent_agent_is_one() {
        let missing = run("/missing", Value::Null).await.unwrap();
        assert!(matches!(missing[1], Ok(ExecOutput::Exited { code: 127 })), "{missing:?}");
        let silent = run("/silent", Value::Null).await.unwrap_err();
        assert!(matches!(silent, DriverError::WrongState { .. }), "{silent}");
    }
}
