//! Commands in a guest, through its agent (docs/interop/qemu-ga-ref of QEMU).
//!
//! # Caveats
//! The agent runs a command to its end and then tells its output; nothing can be typed meanwhile, and there is no
//! terminal. libvirtd passes one command at a time on.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream;
use hv_driver::{DriverError, Exec, ExecOutput, ExecRequest, Input, Result};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::mpsc;

use crate::NAME;
use crate::machine::Machine;
use crate::problem::{Outcome, Problem};

/// How long the agent may take to answer a request, in seconds.
const ANSWER_TIMEOUT_S: i32 = 15;
/// How often the agent is asked whether a command has ended, at first and at last.
const POLL_INTERVAL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// How many inputs are taken before they are refused.
const INPUT_QUEUE: usize = 1;

/// Starts a command. What it prints comes at its end.
pub(crate) async fn exec(machine: Arc<Machine>, request: ExecRequest) -> Result<Exec> {
    let id = machine.id.clone();
    let unsupported = |reason: &str| DriverError::Unsupported {
        driver: NAME,
        operation: "exec",
        reason: reason.to_owned(),
    };
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
    let pid = match ask(&machine, "guest-exec", start).await {
        Ok(answer) => answer["pid"].clone(),
        Err(problem) if problem.is_agent_silent() => {
            let reason =
                "the guest agent does not answer; install qemu-guest-agent in the guest, or wait until it is up";
            return Err(DriverError::wrong_state(&id, "exec", reason));
        }
        // What the agent says of a program that is not there; a shell would say 127.
        Err(Problem::Refused { message, .. }) if message.contains("guest-exec") => return Ok(not_started(&message)),
        Err(problem) => return Err(machine.failed("exec")(problem)),
    };
    let (input, typed) = mpsc::channel(INPUT_QUEUE);
    let (output, printed) = mpsc::channel(4);
    tokio::spawn(async move {
        let work = async {
            tokio::select! {
                outputs = wait(&machine, &pid) => outputs.map_err(|problem| DriverError::failed(&id, "exec", problem)),
                () = refused_input(typed) => {
                    let reason = "qemu's guest agent passes no input on to a running command".to_owned();
                    Err(DriverError::Unsupported { driver: NAME, operation: "exec", reason })
                }
            }
        };
        let outputs = tokio::select! {
            outputs = work => outputs,
            // The agent cannot end a command; it runs to its end unheard.
            () = output.closed() => return,
        };
        match outputs {
            Ok(outputs) => {
                for item in outputs {
                    let _ = output.send(Ok(item)).await;
                }
            }
            Err(error) => {
                let _ = output.send(Err(error)).await;
            }
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

async fn wait(machine: &Machine, pid: &Value) -> Outcome<Vec<ExecOutput>> {
    let (mut interval, longest) = POLL_INTERVAL;
    loop {
        let status = ask(machine, "guest-exec-status", json!({ "pid": pid })).await?;
        if status["exited"].as_bool() == Some(true) {
            return outputs(&status);
        }
        // The agent tells nothing by itself, so it is asked, ever more rarely.
        tokio::time::sleep(interval).await;
        interval = (interval * 2).min(longest);
    }
}

fn outputs(status: &Value) -> Outcome<Vec<ExecOutput>> {
    let decode = |name: &str| {
        let bytes = BASE64.decode(status[name].as_str().unwrap_or_default());
        bytes.map(Bytes::from).map_err(|e| Problem::Garbled("guest-exec-status", e.into()))
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

async fn ask(machine: &Machine, name: &'static str, arguments: Value) -> Outcome<Value> {
    let command = json!({ "execute": name, "arguments": arguments }).to_string();
    let daemon = machine.daemon().await?;
    let answer = daemon.agent(&machine.stored().domain(), &command, ANSWER_TIMEOUT_S).await?;
    let answer: Value = serde_json::from_str(&answer).map_err(|e| Problem::Garbled(name, e.into()))?;
    Ok(answer["return"].clone())
}
